import pytest
import torch


@pytest.fixture
def path(tmp_path):
    """Of the file; weights are drawn from here on."""
    torch.manual_seed(0)
    return tmp_path / "pruned.pt"
