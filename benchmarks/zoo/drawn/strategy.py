"""How programs are drawn, and a number of them examined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.zoo.drawn.program import OPERATIONS, Program

NUMBERS = st.tuples(*[st.integers(0, 6)] * 4)
STEPS = st.tuples(st.sampled_from(list(OPERATIONS)), NUMBERS)
MOST = 20
"""Steps of a program."""


def programs(least: int = 5) -> st.SearchStrategy[Program]:
    """Programs of at least so many steps."""
    return st.builds(
        Program,
        dims=st.sampled_from([2, 2, 2, 1, 3]),
        channels=st.sampled_from([3, 1, 2]),
        steps=st.lists(STEPS, min_size=least, max_size=MOST).map(tuple),
        outputs=st.sampled_from([0, 0, 1, 2]),
    )


def each(examine: Callable[[Program], Any], *, number: int, start: int) -> None:
    """Examine programs, and raise what the smallest one raises with which something is wrong.

    Args:
        examine: raises if something is wrong.
        number: of programs.
        start: seed; the same programs are drawn for the same one.
    """

    @seed(start)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def run(program: Program) -> None:
        examine(program)

    run()
