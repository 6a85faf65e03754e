"""What save_pruned writes can be loaded, and it does not write what cannot: layers against their own tensors."""

import copy

import pytest
import torch
from torch import nn

from tp_importance.checkpoints.checkpoint import load_pruned, save_pruned
from tp_importance.checkpoints.content import check_layers, layer_problem, tensor_sizes


def test_attributes_left_as_they_were_are_saved_as_the_tensors_are(path):
    """People slice weights and forget the attributes; torch does not ask these."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.PReLU(6), nn.Flatten(), nn.Linear(6 * 36, 2))
    for layer, names in ((model[0], ("weight", "bias")), (model[1], ("weight", "bias")), (model[2], ("weight",))):
        for name in names:
            setattr(layer, name, nn.Parameter(getattr(layer, name).detach()[:4]))
    model[1].running_mean, model[1].running_var = model[1].running_mean[:4], model[1].running_var[:4]
    model[4].weight = nn.Parameter(model[4].weight.detach()[:, : 4 * 36])
    x = torch.randn(2, 3, 8, 8)
    y = model.eval()(x)
    save_pruned(model, path)
    again = load_pruned(lambda: nn.Sequential(*(copy.deepcopy(m) for m in model)), path)
    assert torch.equal(again(x), y) and model[0].out_channels == 6
    sizes = (again[0].out_channels, again[1].num_features, again[2].num_parameters, again[4].in_features)
    assert sizes == (4, 4, 4, 144)
    check_layers(again)


@pytest.mark.parametrize(
    ("layer", "values", "message"),
    [
        (nn.Conv2d(6, 6, 1), {"groups": 4}, "groups=4"),
        (nn.GroupNorm(2, 4), {"num_groups": 3}, "num_groups=3"),
        (nn.LayerNorm(4), {"normalized_shape": (3,)}, r"normalized_shape=\(3,\) make it \(3,\)"),
        (nn.LSTM(3, 4), {"hidden_size": 5}, r"hidden_size=5.*make it \(20, 3\)"),
        (nn.GRU(3, 4), {"num_layers": 2}, "weight_ih_l1 is missing"),
        (nn.RNN(3, 4, 2), {"num_layers": 1}, "one too many"),
        (nn.MultiheadAttention(8, 2), {"num_heads": 3}, "num_heads=3"),
        (nn.Linear(3, 4), {"bias": nn.Parameter(torch.zeros(3))}, r"bias has shape \(3,\)"),
        (nn.ConvTranspose2d(4, 6, 3), {"bias": nn.Parameter(torch.zeros(3))}, r"bias has shape \(3,\)"),
        (nn.Embedding(3, 4), {"weight": None}, "weight is missing"),
        (nn.BatchNorm1d(3), {"eps": 0}, "eps=0 must be .* positive"),
        (nn.BatchNorm1d(3), {"running_var": torch.tensor([1.0, -2.0, 1.0])}, "running_var is -2 in channel 1.*recalib"),
        (nn.LayerNorm(3), {"eps": float("nan")}, "eps=nan"),
        (
            nn.ConvTranspose2d(4, 6, 3),
            {"padding_mode": "reflect"},
            "padding_mode='reflect' is unknown; set it to 'zeros'",
        ),
    ],
)
def test_layers_that_cannot_run_are_not_saved(tmp_path, layer, values, message):
    assert layer_problem(layer) is None
    layer = copy.deepcopy(layer)
    for key, value in values.items():
        setattr(layer, key, value)
    with pytest.raises(ValueError, match=rf"layer '0' \({type(layer).__name__}\).*{message}"):
        save_pruned(nn.Sequential(layer), tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


def test_no_values_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match=r"state_dict/weight cannot be kept.*meta device"):
        save_pruned(nn.Linear(2, 2, device="meta"), tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


def test_layers_with_other_code_or_computed_tensors_are_left_alone(path):
    class Own(nn.Linear):
        def forward(self, x):
            return x

    own = Own(3, 4)
    own.weight = nn.Parameter(torch.ones(7))
    model = nn.Sequential(
        own,
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.InstanceNorm2d(3),
        nn.LayerNorm(4, bias=False),
        nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2),
        nn.MultiheadAttention(8, 2, kdim=3, vdim=5),
        nn.ConvTranspose3d(4, 6, 3, groups=2, output_padding=1, stride=2),
        nn.Conv1d(4, 6, 3, padding="same"),
        nn.RMSNorm(3),
        nn.Bilinear(2, 3, 4),
        nn.EmbeddingBag(3, 4),
        nn.GRUCell(3, 4),
    )
    state = torch.get_rng_state()
    check_layers(model)
    assert torch.equal(torch.get_rng_state(), state)
    for module in model.modules():
        kept = {key: getattr(module, key) for key in tensor_sizes(module)}
        assert kept == tensor_sizes(module)
    save_pruned(model, path)
    again = load_pruned(lambda: copy.deepcopy(model), path)
    assert values(again) == values(model)


def test_a_network_whose_training_went_wrong_is_kept(path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.LayerNorm(2, eps=0), nn.RMSNorm(2, eps=None))
    with torch.no_grad():
        model[0].weight[0], model[0].weight[1], model[0].bias[2] = torch.nan, torch.inf, -torch.inf
        model(torch.randn(2, 3, 2, 2))
    assert not model[1].running_var.isfinite().any() or model[1].running_var[:3].isnan().all()
    save_pruned(model, path)
    assert values(load_pruned(lambda: copy.deepcopy(model), path)) == values(model)


@pytest.mark.parametrize("kind", ["complex", "sparse"])
def test_complex_and_sparse_layers_need_such_a_factory(path, kind):
    def network(like):
        model = nn.Sequential(nn.Linear(3, 2, bias=False))
        if like == "complex":
            return nn.Sequential(nn.Linear(3, 2, dtype=torch.complex64))
        if like == "sparse":
            model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse(), requires_grad=False)
        return model

    model = network(kind)
    save_pruned(model, path)
    again = load_pruned(lambda: network(kind), path)
    assert torch.equal(again[0].weight.to_dense(), model[0].weight.to_dense())
    with pytest.raises(
        ValueError, match=rf"pruned\.pt .*layer '0' \(Linear\): its weight is .*{kind}.*factory that builds"
    ):
        load_pruned(lambda: network("real"), path)


@pytest.mark.parametrize("kind", ["sparse", "complex", "bool", "float8", "channels_last", "view"])
def test_unusual_tensors(path, kind):
    values = {
        "sparse": torch.eye(3).to_sparse(),
        "complex": torch.randn(3, dtype=torch.complex64).conj(),
        "bool": torch.tensor([True, False]),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "view": torch.randn(4, 6).t()[1:],
    }
    model = nn.ReLU()
    model.register_buffer("kept", values[kind])
    save_pruned(model, path)
    again = load_pruned(lambda: copy.deepcopy(model), path).kept
    assert again.dtype == model.kept.dtype and again.layout == model.kept.layout
    if kind == "sparse":
        assert torch.equal(again.to_dense(), model.kept.to_dense())
    else:
        assert again.stride() == model.kept.stride() and bytes_of(again) == bytes_of(model.kept)


def bytes_of(tensor):
    return tensor.resolve_conj().contiguous().view(torch.uint8).numpy().tobytes()


def values(model):
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [(n, t.dtype, t.shape, t.stride(), t.requires_grad, t.detach().numpy().tobytes()) for n, t in tensors]


@pytest.mark.parametrize("padding", [2, (2, 1), "same", "valid"])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_padding_is_that_of_the_file(tmp_path, padding, mode):
    saved = nn.Sequential(nn.Conv2d(3, 4, (5, 3), padding=padding, padding_mode=mode)).eval()
    save_pruned(saved, tmp_path / "a.pt")
    again = load_pruned(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)), tmp_path / "a.pt")
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(again(x), saved(x))
    assert list(again[0]._reversed_padding_repeated_twice) == list(saved[0]._reversed_padding_repeated_twice)
