"""The step that puts the new modules in: what it keeps, what it leaves alone, and that it is all or nothing."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as masks

from helpers.checkpoint_cases import assert_same
from tp_importance import explicit_attention, load_pruned, save_pruned
from tp_importance.core.copies import copied
from tp_importance.errors import TracingError
from tp_importance.testing import Snapshot

TORCH = "torch.nn.modules.activation.MultiheadAttention"
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    """Attention and a layer behind it."""

    def __init__(self, attention=None):
        super().__init__()
        self.attention = attention or nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def block():
    torch.manual_seed(0)
    return Block()


@pytest.mark.parametrize("training", [True, False])
def test_in_place(training):
    model = block().train(training)
    twin, head = copied(model).eval(), model.head
    report = explicit_attention(model, X)
    assert report.rewritten == {"attention": TORCH} and not report.left_out
    assert str(report) == f"rewrote 1 of 1 modules\n  attention: {TORCH}"
    assert model.head is head and all(m.training is training for m in model.modules())
    assert list(model.state_dict()) == [
        *(f"attention.{p}_proj.{t}" for p in "qkv" for t in ("weight", "bias")),
        *("attention.out_proj.weight", "attention.out_proj.bias", "head.weight", "head.bias"),
    ]
    torch.testing.assert_close(model.eval()(X), twin(X))
    assert not explicit_attention(model, X).rewritten


def test_hooks_stay_and_their_handles_work():
    model, seen = block(), []
    attention = model.attention
    handles = [
        attention.register_forward_hook(lambda m, *_: seen.append(("out", m))),
        attention.register_forward_pre_hook(lambda m, args, kwargs: seen.append(("in", m)), with_kwargs=True),
        attention.register_full_backward_hook(lambda m, *_: seen.append(("gradient", m))),
    ]
    explicit_attention(model, X)
    seen.clear()
    new = model.attention
    model(X.clone().requires_grad_()).sum().backward()
    assert seen == [("in", new), ("out", new), ("gradient", new)]
    for handle in handles:
        handle.remove()
    model(X)
    assert len(seen) == 3


def test_frozen_stays_frozen_and_old_optimizers_are_warned_of():
    model = block()
    model.attention.in_proj_bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    explicit_attention(model)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [f"attention.{p}_proj.bias" for p in "qkv"]
    with pytest.warns(UserWarning, match=r"trains 2 of 6 parameters that pruning has replaced"):
        optimizer.step()


def test_without_gradients_around():
    model = block()
    with torch.inference_mode():
        explicit_attention(model, X)
    assert not any(p.is_inference() for p in model.parameters())
    model(X).sum().backward()
    model = block()
    with torch.device("meta"):
        explicit_attention(model, X)
    assert {p.device.type for p in model.attention.parameters()} == {"cpu"}


class Derived(nn.MultiheadAttention):
    """Computes what it likes."""


def hooked(attention):
    attention.out_proj.register_forward_hook(lambda *_: None)


def masked(attention):
    masks.random_unstructured(attention, "in_proj_weight", 0.5)


def parametrized(attention):
    nn.utils.parametrizations.weight_norm(attention.out_proj)


def patched(attention):
    attention.forward = attention.forward


def renamed(attention):
    attention.register_state_dict_post_hook(lambda *_: None)


def wrapped(attention):
    class Adapted(nn.Linear):
        pass

    attention.out_proj = Adapted(16, 16)


LEFT = {
    "derived": (lambda: Block(Derived(16, 4)), "its class Derived may compute something else than torch"),
    "bias_kv": (lambda: Block(nn.MultiheadAttention(16, 4, add_bias_kv=True)), "adds a key and a value of its own"),
    "zero": (lambda: Block(nn.MultiheadAttention(16, 4, add_zero_attn=True)), "adds a key and a value of its own"),
    **{
        change.__name__: (lambda change=change: (made := block(), change(made.attention))[0], reason)
        for change, reason in {
            hooked: "its layer out_proj has hooks, which would be lost",
            masked: "a weight is computed",
            parametrized: "a weight of its layer out_proj is computed",
            patched: "its forward was replaced",
            renamed: "it has hooks on its state dict",
            wrapped: "its layer out_proj is a Adapted",
        }.items()
    },
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_alone(kind):
    make, reason = LEFT[kind]
    model = make()
    snapshot = Snapshot(model)
    report = explicit_attention(model)
    assert not report.rewritten and reason in report.left_out["attention"]
    assert f"left alone: attention: {report.left_out['attention']}" in str(report)
    snapshot.check()


def test_ignored_layers_and_the_model_itself():
    model = nn.Sequential(block(), block())
    report = explicit_attention(model, X[..., :16], ignored_layers=[model[0]], forward_fn=lambda net, x: net[1](x))
    assert list(report.rewritten) == ["1.attention"] and not report.left_out
    whole = explicit_attention(nn.MultiheadAttention(16, 4))
    assert whole.left_out == {"": "it is the model itself: put it into an nn.Sequential"}


class Pair(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.first(x) + self.second(x)


def test_shared_modules_and_shared_weights_stay_shared():
    one = block()
    same = Pair(one, one)
    explicit_attention(same, X)
    assert same.first.attention is same.second.attention
    tied = Pair(block(), block())
    for part in ("", "out_proj"):
        a, b = (m.attention.get_submodule(part) for m in (tied.first, tied.second))
        b._parameters.update(a._parameters)
    expected = tied.eval()(X)
    assert len(explicit_attention(tied, X).rewritten) == 2
    first, second = tied.first.attention, tied.second.attention
    assert first is not second and all(p is q for p, q in zip(first.parameters(), second.parameters(), strict=True))
    torch.testing.assert_close(tied(X), expected)


def test_what_else_is_shared_is_left_alone():
    model = Pair(block(), block())
    model.second.attention.in_proj_weight = model.first.attention.in_proj_weight
    report = explicit_attention(model)
    assert not report.rewritten and report.left_out == {
        "first.attention": "its in_proj_weight is shared with second.attention",
        "second.attention": "its in_proj_weight is shared with first.attention",
    }
    model = Pair(block(), block())
    model.kept = model.first.attention.in_proj_bias
    report = explicit_attention(model)
    assert list(report.rewritten) == ["second.attention"]
    assert report.left_out == {"first.attention": "its in_proj_bias is shared with the model itself"}
    model = Pair(block(), block())  # these are handed on as they are
    model.second.head.bias, model.kept = model.first.head.bias, model.first.attention.out_proj.weight
    assert len(explicit_attention(model).rewritten) == 2 and model.kept is model.first.attention.out_proj.weight


class Hidden(Block):
    """Calls its attention past the module."""

    def __init__(self):
        super().__init__()
        self.parts = [self.attention]

    def forward(self, x):
        return self.head(self.parts[0](x, x, x, need_weights=False)[0])


class Curious(Block):
    """Looks into its attention."""

    def forward(self, x):
        return super().forward(x) if self.attention.bias_k is None else x


PASSES = itertools.count()


class Restless(Block):
    """Another output in every pass."""

    def forward(self, x):
        return super().forward(x) + next(PASSES)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Hidden, "still calls the old module attention"),
        (Curious, "does not run with new modules in place of attention"),
        (Restless, "outputs of Restless differ"),
    ],
)
def test_a_network_that_does_not_take_them_is_as_before(make, reason):
    torch.manual_seed(0)
    model = make()
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=reason):
        explicit_attention(model, X)
    snapshot.check()


@pytest.mark.parametrize("when", [1, 2])
def test_interrupted_it_is_as_before(when):
    model, calls = block(), []
    model.attention.register_forward_hook(lambda *_: None)
    snapshot = Snapshot(model)

    def forward(net, x):
        calls.append(type(net.attention).__name__)
        if len(calls) == when:
            raise KeyboardInterrupt
        return net(x)

    with pytest.raises(KeyboardInterrupt):
        explicit_attention(model, X, forward_fn=forward)
    assert calls == ["MultiheadAttention", "ExplicitMultiheadAttention"][:when]
    snapshot.check()


def test_rewriters_of_the_user():
    class Own(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind, self.layer = kind, nn.Linear(16, 16)

        def forward(self, x):
            return self.layer(x)

    def rewrite(old):
        if old.kind == "odd":
            raise ValueError("it is odd")
        return nn.Sequential(old.layer, nn.Identity())

    model = nn.Sequential(Own("even"), Own("odd"), nn.MultiheadAttention(16, 4))
    layer = model[0].layer
    report = explicit_attention(model, X, rewriters={Own: rewrite}, forward_fn=lambda net, x: net[1](net[0](x)))
    assert list(report.rewritten) == ["0", "2"] and report.left_out == {"1": "it is odd"}
    assert model[0][0] is layer
    ours = nn.Sequential(block())
    assert explicit_attention(ours, X, rewriters={nn.MultiheadAttention: lambda old: refuse()}).left_out
    with pytest.raises(TypeError, match="must return a new module, not None"):
        explicit_attention(nn.Sequential(Own("even")), rewriters={Own: lambda old: None})
    with pytest.raises(TypeError, match="must map types of modules to functions"):
        explicit_attention(model, rewriters={"Own": rewrite})
    with pytest.raises(TypeError, match="must map types of modules to functions"):
        explicit_attention(model, rewriters=[rewrite])


def refuse():
    raise ValueError("not this one")


def test_a_rewriter_that_computes_something_else_is_found():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match="outputs of Sequential differ with new modules in place of 1"):
        explicit_attention(model, X, rewriters={nn.ReLU: lambda old: nn.GELU()})
    snapshot.check()


def test_errors_of_the_network_and_of_the_caller():
    with pytest.raises(TracingError, match="does not run on example_inputs: "):
        explicit_attention(block(), torch.randn(2, 5, 15))
    with pytest.raises(ValueError, match="give them, too"):
        explicit_attention(block(), forward_fn=lambda net, x: net(x))
    with pytest.raises(TypeError):
        explicit_attention(lambda x: x, X)


def test_checkpoints(tmp_path):
    """Rewritten and pruned: the factory is that of the network as it was, or one that rewrites."""
    model, path = block(), tmp_path / "pruned.pt"
    explicit_attention(model, X)
    attention, keep = model.attention, [0, 1, 2, 3, 8, 9, 10, 11]
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        layer.weight, layer.bias = nn.Parameter(layer.weight[keep]), nn.Parameter(layer.bias[keep])
        layer.out_features = 8
    attention.out_proj.in_features = 8
    attention.out_proj.weight = nn.Parameter(attention.out_proj.weight[:, keep])
    attention.num_heads = 2
    attention.scale = 0.7
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_pruned(model, path)

        def rewrites():
            explicit_attention(made := block())
            return made

        for factory in (block, rewrites):
            again = load_pruned(factory, path)
            assert_same(model, again)
            assert (again.attention.num_heads, again.attention.scale) == (2, 0.7)
            assert torch.equal(again(X), model(X))
