"""The README promises only what runs: the table of tags is the code's, its Python blocks work."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import grsd_callbacks as grsd
from grsd_callbacks.tags import meaning_card

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TAGS_PAGE = (ROOT / "docs" / "tags.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_table_of_tags_is_the_codes():
    found = re.search(r"<!-- tags -->\n(.*?)\n<!-- /tags -->", TAGS_PAGE, flags=re.DOTALL)
    assert found is not None
    assert found.group(1) == meaning_card(), "paste the output of `python -m grsd_callbacks.tags` between the marks"


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """Names that the blocks take for granted."""
    import lightning as L

    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x, y = torch.randn(64, 4), torch.randn(64, 2)
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    model = Model()
    return {
        "model": model,
        "train_loader": loader,
        "loader": loader,
        "x_probe": x[:8],
        "y_probe": y[:8],
        "optimizer": model.configure_optimizers(),
        "loss_fn": nn.MSELoss(),
        "grsd": grsd,
    }


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0][:30] for block in BLOCKS])
def test_blocks_run(block, scene):
    exec(block, scene)
    for name in ("callback", "monitor"):
        if name in scene:
            history = (scene[name]).history
            assert len(history) >= 2
            assert abs(history[-1].closures["dissipation"]) < 1e-4
    if "budget" in scene:
        assert float(scene["budget"].energy.sum()) == pytest.approx(
            float(F.mse_loss(scene["model"](scene["x_probe"]), scene["y_probe"]).detach()), rel=1e-5
        )
