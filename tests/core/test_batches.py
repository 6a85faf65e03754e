from collections import UserDict, namedtuple
from itertools import chain

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tp_importance import recalibrate_batchnorm
from tp_importance.core.batches import split_batch
from tp_importance.core.devices import reference_tensor, to_model
from tp_importance.core.forward import call_model, run_batch
from tp_importance.core.guards import preserved
from tp_importance.core.loaders import check_loader, iterate, require_reiterable
from tp_importance.statistics.observe import observe

X, Y = torch.randn(2, 3), torch.tensor([0, 1])
Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("batch", "args", "kwargs", "labels"),
    [
        (X, (X,), {}, None),
        ((X,), (X,), {}, None),
        ([X, Y], (X,), {}, Y),
        ((X, Y, "extra"), (X,), {}, Y),
        ((X, [{"boxes": Y}]), (X,), {}, None),
        (Pair(X, Y), (X,), {}, Y),
        (((X, X + 1), Y), (X, X + 1), {}, Y),
        (({"a": X}, Y), (), {"a": X}, Y),
        (({"a": X, "labels": Y},), (), {"a": X}, Y),
        ({"a": X}, (), {"a": X}, None),
        ({"a": X, "labels": Y}, (), {"a": X}, Y),
        ({"a": X, "label": Y}, (), {"a": X}, Y),
        ({"label": X, "labels": Y, "a": X}, (), {"a": X}, Y),
        (UserDict(a=X, labels=Y), (), {"a": X}, Y),
    ],
)
def test_split_batch(batch, args, kwargs, labels):
    got_args, got_kwargs, got_labels = split_batch(batch)
    assert len(got_args) == len(args) and all(map(torch.equal, got_args, args))
    assert got_kwargs.keys() == kwargs.keys() and all(torch.equal(got_kwargs[k], kwargs[k]) for k in kwargs)
    assert got_labels is labels


def test_split_batch_leaves_the_batch_alone():
    batch = {"a": X, "labels": Y}
    split_batch(batch)
    assert set(batch) == {"a", "labels"}


@pytest.mark.parametrize("batch", ["text", 3, None, ("a", Y), (3, Y), {1: X}])
def test_split_batch_refuses(batch):
    with pytest.raises(TypeError):
        split_batch(batch)


@pytest.mark.parametrize("batch", [(), [], {}])
def test_split_batch_refuses_empty(batch):
    with pytest.raises(ValueError, match="empty"):
        split_batch(batch)


def test_to_model_dtype_and_structure():
    moved = to_model(nn.Linear(3, 3).double(), {"p": Pair(X, Y), "l": [X, (Y, "s")], "c": X.to(torch.complex64)})
    assert isinstance(moved["p"], Pair) and isinstance(moved["l"], list) and isinstance(moved["l"][1], tuple)
    assert moved["p"].x.dtype == torch.float64 and moved["p"].y.dtype == torch.int64
    assert moved["l"][0].dtype == torch.float64 and moved["l"][1][1] == "s"
    assert moved["c"].dtype == torch.complex64
    assert torch.equal(moved["p"].x.float(), X)


def test_to_model_device():
    assert to_model(nn.Linear(3, 3, device="meta"), (X, Y))[1].is_meta


def test_to_model_without_tensors_and_without_need():
    assert to_model(nn.ReLU(), X) is X
    assert to_model(nn.Linear(1, 1), X) is X


def test_reference_tensor_prefers_floating_ones():
    net = nn.Module()
    net.register_buffer("table", torch.zeros(3, dtype=torch.int64))
    assert reference_tensor(net).dtype == torch.int64
    net.register_buffer("scale", torch.ones(1, dtype=torch.float16))
    assert reference_tensor(net).dtype == torch.float16
    net.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    assert reference_tensor(net).dtype == torch.float64


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float16))

    def forward(self, a, b=1):
        return self.weight * (a + b)


@pytest.mark.parametrize("batch", [X, (X, Y), ((X, 1), Y), {"a": X, "b": 1, "labels": Y}, ({"a": X}, Y)])
def test_run_batch(batch):
    out = run_batch(Sum(), batch)
    assert out.dtype == torch.float16
    assert torch.equal(out, X.half() + 1)


def test_run_batch_hands_the_raw_batch_to_forward_fn():
    batch = object()
    assert run_batch(Sum(), batch, lambda model, got: (type(model), got)) == (Sum, batch)


@pytest.mark.parametrize("inputs", [X, (X, 1), [X], {"a": X, "b": 1}])
def test_call_model(inputs):
    assert torch.equal(call_model(Sum(), inputs), X + 1)


def test_call_model_refuses():
    with pytest.raises(TypeError, match="int"):
        call_model(Sum(), 3)


@pytest.mark.parametrize("loader", [X, {"a": X}, 3, None])
def test_iterate_refuses(loader):
    with pytest.raises(TypeError, match="batch"):
        iterate(loader)


# preserved


def flags(model):
    return [m.training for m in model.modules()], {n: p.requires_grad for n, p in model.named_parameters()}


def network():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Dropout(), nn.Conv2d(4, 2, 1)))
    net[1].eval()
    net[2][1].bias.requires_grad_(False)
    return net


@pytest.mark.parametrize("fails", [False, True])
def test_preserved_flags(fails):
    net = network()
    before = flags(net)
    try:
        with preserved(net) as same:
            assert same is net
            net.train(False).requires_grad_(True)
            net[2].train()
            net[0].requires_grad_(False)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert flags(net) == before


def test_preserved_follows_replaced_parameters_by_name():
    net = network().requires_grad_(False)
    net[0].weight.requires_grad_(True)
    old = net[2][1].weight
    with preserved(net):
        old.requires_grad_(True)
        net[2][1].weight = nn.Parameter(torch.zeros(1, 4, 1, 1))
        net[0].weight = nn.Parameter(torch.zeros(2, 3, 3, 3), requires_grad=False)
    assert not net[2][1].weight.requires_grad and not old.requires_grad
    assert net[0].weight.requires_grad


def test_preserved_follows_moved_parameters_by_identity():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    with preserved(net):
        net.requires_grad_(True)
        del net[0]  # the trainable layer now bears the name of the frozen one
    assert net[0].weight.requires_grad


def test_preserved_tied_and_new_parameters():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    with preserved(net):
        net.requires_grad_(False)
        net.append(nn.Linear(2, 2).requires_grad_(False))
    assert net[1].weight.requires_grad and net[1].weight is net[0].weight
    assert not net[2].weight.requires_grad


def test_preserved_hooks():
    net = network()
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append("old"))
    with preserved(net):
        for module in net.modules():
            module.register_forward_hook(lambda *_: calls.append("f"), always_call=True)
            module.register_forward_hook(lambda *_, **__: calls.append("k"), with_kwargs=True)
            module.register_forward_pre_hook(lambda *_: calls.append("p"))
            module.register_full_backward_hook(lambda *_: calls.append("b"))
            module.register_full_backward_pre_hook(lambda *_: calls.append("bp"))
    net(torch.randn(2, 3, 5, 5)).sum().backward()
    assert calls == ["old"]
    for module in net.modules():
        assert not module._forward_hooks_always_called and not module._forward_hooks_with_kwargs
        assert module._is_full_backward_hook is None


def test_preserved_covers_every_hook_dictionary_of_torch():
    from tp_importance.core.guards import HOOKS

    known = {key for key in vars(nn.Module()) if "hook" in key and "state_dict" not in key}
    assert known == {*HOOKS, "_is_full_backward_hook"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_preserved_scripted_model():
    net = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    with preserved(net):
        net.eval()
    assert net.training


class Items(Dataset):
    """A data set of a user."""

    def __init__(self, *items):
        self.items, self.read = items, 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.read += 1
        return self.items[i]


class Stream(IterableDataset):
    def __init__(self, *items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


IMAGES, LABELS = torch.randn(8, 3, 4, 4), torch.arange(8) % 2
ONE_BATCH = r"not an iterable of batches; pass \[\(X, Y\)\], or DataLoader\(TensorDataset\(X, Y\)"
SAMPLES = r"gives single samples, not batches; pass DataLoader\(dataset, batch_size=64\)"


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (IMAGES, r"single Tensor.*pass \[batch\], or DataLoader\(TensorDataset\(X\)"),
        ({"x": IMAGES}, r"single dict.*pass \[batch\]"),
        ((IMAGES, LABELS), ONE_BATCH),
        ([IMAGES, LABELS.float()], ONE_BATCH),
        (TensorDataset(IMAGES, LABELS), f"TensorDataset, which {SAMPLES}"),
        (TensorDataset(IMAGES), f"TensorDataset, which {SAMPLES}"),
        (3, r"int cannot be iterated over; .*DataLoader\(dataset"),
        (None, "NoneType cannot be iterated over"),
    ],
)
@pytest.mark.parametrize("use", [check_loader, iterate, lambda loader: recalibrate_batchnorm(bn(), loader)])
def test_what_only_looks_like_a_loader(loader, message, use):
    with pytest.raises(TypeError, match=message):
        use(loader)


@pytest.mark.parametrize("kind", [Items, Stream])
@pytest.mark.parametrize(
    "item", [(IMAGES[0], 1), (IMAGES[0], LABELS[0]), (IMAGES[0], 0.5), {"x": IMAGES[0], "label": 1}]
)
def test_data_sets_give_samples(kind, item):
    with pytest.raises(TypeError, match=f"loader is a {kind.__name__}, which {SAMPLES}"):
        list(iterate(kind(item, item)))


@pytest.mark.parametrize(
    "loader",
    [
        [IMAGES, IMAGES],
        (IMAGES, IMAGES[:1]),
        [LABELS, LABELS],
        (IMAGES, LABELS[:3]),
        [IMAGES],
        [(IMAGES, 3), (IMAGES, 3)],  # a second item may be anything where no labels are needed
        Stream((IMAGES, LABELS), (IMAGES, LABELS)),
        DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4),
        DataLoader(TensorDataset(IMAGES[None], LABELS[None]), batch_size=None),
        (b for b in [IMAGES]),
    ],
)
def test_legal_loaders(loader):
    assert list(iterate(loader))


def test_a_data_set_of_batches_is_legal_and_read_once():
    loader = Items((IMAGES, LABELS), (IMAGES, LABELS))
    batches = iterate(loader)
    next(batches), next(batches)
    assert loader.read == 2


def bn():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.parametrize("x", [IMAGES[:, 0], IMAGES[:, :2], IMAGES[0]])
def test_inputs_that_do_not_fit_are_named(x):
    model = bn()
    with pytest.raises((RuntimeError, ValueError)) as caught:
        observe(model, [(x, LABELS[: len(x)])], [])
    (note,) = caught.value.__notes__
    assert str(tuple(x.shape)) in note and "DataLoader(dataset, batch_size=64)" in note
    assert not model[0]._forward_hooks and model.training


def test_errors_of_ours_get_no_note():
    with pytest.raises(ValueError, match="no variance") as caught:
        recalibrate_batchnorm(bn(), [torch.randn(1, 3, 3, 3)])
    assert not hasattr(caught.value, "__notes__")


class StartsAgain:
    """An iterator as data libraries have it: it is its own, and starts again."""

    def __iter__(self):
        self.left = 2
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        self.left -= 1
        return IMAGES


@pytest.mark.parametrize(
    "loader", [(b for b in [X]), iter([X]), zip([X], [Y], strict=True), chain([X]), iter(DataLoader(X)), map(id, [X])]
)
def test_what_runs_once_is_refused_where_it_must_run_twice(loader):
    with pytest.raises(TypeError, match=r"gives its batches only once.*list\(loader\), or a DataLoader"):
        require_reiterable(loader)


@pytest.mark.parametrize("loader", [[X], (X,), DataLoader(X), range(3), StartsAgain(), Stream(X)])
def test_what_may_run_twice(loader):
    require_reiterable(loader)
    assert len(list(iterate(loader))) == len(list(iterate(loader))) > 0
