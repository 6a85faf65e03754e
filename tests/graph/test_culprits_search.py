"""The search for groups to blame, on its own, and what it need not test again."""

import numpy as np
import pytest
import torch
from torch import nn

from tp_importance import prunable_groups
from tp_importance.graph import culprits
from tp_importance.graph.blame import Finding
from tp_importance.graph.oracle import Oracle, Outcome


class SplitAndView(nn.Module):
    """Two questions are open, and whatever the answers, two groups fail."""

    def __init__(self):
        super().__init__()
        self.stem, self.pair, self.side = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1), nn.Conv2d(3, 8, 1)
        self.body, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(24, 4, 1)

    def forward(self, x):
        first, second = self.pair(self.stem(x)).split((8, 8), 1)
        second = self.body(second).view(len(x), 4, 2, *x.shape[2:]).flatten(1, 2)
        return self.head(torch.cat([first, second, self.side(x)], 1))


def test_what_has_passed_is_not_tested_again_with_other_answers(monkeypatch):
    tested, compare = [], Oracle.compare

    def note(self, units, **options):
        outcome = compare(self, units, **options)
        tested.append((*units, len(outcome.findings) > 0))
        return outcome

    monkeypatch.setattr(Oracle, "compare", note)
    groups = prunable_groups(SplitAndView(), torch.randn(2, 3, 8, 8))
    assert groups.names == ["stem", "side"]
    assert [e.kind for e in groups.excluded] == ["output", "unverified", "unverified"]
    everything = ("stem", "pair", "body", "side", True)
    assert tested.count(everything) == 2  # once per answer
    assert tested.count(("stem", "side", False)) == 1


class Told:
    """Blame that knows for every place whom to suspect; of some, nobody."""

    def __init__(self, suspects):
        self._suspects = suspects

    def first(self, finding, among):
        return [name for name in self._suspects[finding.layer] if name in among]

    def possible(self, finding, among, sound=()):
        return set(self.first(finding, among))

    def readers(self, layer, positions=None):
        return set()


@pytest.mark.parametrize("silent", [0.0, 0.1, 0.4])
def test_what_is_left_passes_also_where_findings_name_nobody(silent):
    rng = np.random.default_rng(0)
    for _ in range(1000):
        names, rules, suspects = list("ABCDEF"), [], {}
        for number in range(rng.integers(1, 6)):
            place, needs = f"l{number}", set(rng.choice(names, rng.integers(1, 3), replace=False).tolist())
            rules.append((needs, place))
            more = rng.choice(names, rng.integers(0, 3), replace=False).tolist()
            suspects[place] = [] if rng.random() < silent else list(dict.fromkeys([*sorted(needs), *more]))

        def examine(some, rules=rules):
            return Outcome([Finding(place, "differs", "value", place) for needs, place in rules if needs <= {*some}])

        refused = culprits.Culprits(names, examine, Told(suspects)).find()
        assert not examine([name for name in names if name not in refused]).findings
