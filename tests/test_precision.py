"""Every precision of the Trainer: the function of the parameters as kept, on float32 or float64, without autocast."""

import lightning_cases as cases
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from grsd_callbacks import ShellDynamicsCallback
from grsd_callbacks.gram import SUMS_FLOOR
from grsd_callbacks.spectrum import RELATIVE_FLOOR

# dtype of the parameters, and of what is measured
PRECISIONS = {
    "32-true": (torch.float32, torch.float32),
    "16-mixed": (torch.float32, torch.float32),
    "bf16-mixed": (torch.float32, torch.float32),
    "bf16-true": (torch.bfloat16, torch.float32),
    "16-true": (torch.float16, torch.float32),
    "64-true": (torch.float64, torch.float64),
}


class ByStep(cases.Module):
    """The loss is only in the step, which casts with self.dtype."""

    def __init__(self, net, criterion):
        super().__init__(net, None)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0].to(self.dtype)), batch[1])
        self.log("train_loss", loss)
        return loss


class Casting(cases.Module):
    """The forward casts with self.dtype."""

    def forward(self, x):
        return self.net(x.to(self.dtype))


@pytest.mark.filterwarnings("ignore:You passed `Trainer.accelerator=.cpu., precision=.16-mixed")
@pytest.mark.parametrize("kind", [Casting, ByStep])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision(precision, kind, tmp_path):
    kept, measured = PRECISIONS[precision]
    inside = []

    class Spy(nn.Tanh):
        def forward(self, x):
            inside.append((x.dtype, torch.is_autocast_enabled("cpu")))
            return super().forward(x)

    def run(callbacks):
        cases.seed()
        net = nn.Sequential(nn.Linear(64, 12), Spy(), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.Linear(12, 10))
        module = kind(net, nn.CrossEntropyLoss())
        logger = CSVLogger(tmp_path, name=str(len(callbacks)))
        trainer = cases.fit(module, cases.classes(), tmp_path, callbacks, precision=precision, logger=logger)
        return module, cases.image(trainer, module)

    _, plain = run([])
    trained = len(inside)
    callback = ShellDynamicsCallback(every_n_steps=4, num_probe=8, on_error="raise")
    module, image = run([callback])
    assert cases.differences(plain, image) == []
    assert next(module.parameters()).dtype == kept
    ours = [found for found in inside[trained:] if found == (measured, False)]
    assert len(ours) > 0 and len(callback.history) == 3
    names = f"{str(measured)[6:]} copies of {str(kept)[6:]} parameters, autocast off"
    assert names in callback.monitor.report
    for snapshot in callback.history:
        assert abs(snapshot.closures["dissipation"]) < (1e-4 if measured == torch.float32 else 1e-10)
        assert snapshot.summary["floor"] == pytest.approx(RELATIVE_FLOOR[measured] * snapshot.summary["lambda_max"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_precision_that_is_asked_for(dtype, tmp_path):
    """float64 of the same float32 weights: equal to rounding, with a lower floor."""
    cases.seed()
    callback = ShellDynamicsCallback(every_n_steps=4, num_probe=8, dtype=dtype, on_error="raise")
    module = cases.Module(cases.mlp(), nn.CrossEntropyLoss())
    cases.fit(module, cases.classes(), tmp_path, [callback], max_epochs=1)
    assert f"{dtype} copies of float32 parameters" in callback.monitor.report
    floor = callback.history[0].summary["floor"] / callback.history[0].summary["lambda_max"]
    assert floor == pytest.approx(RELATIVE_FLOOR[getattr(torch, dtype)])


def test_exact_kernels_from_products_in_float32(tmp_path):
    """The floor rises, the totals stay: energies sum to the loss and the dissipation to the squared gradient."""
    found = {}
    for gram_dtype in (None, "float32"):
        cases.seed()
        callback = ShellDynamicsCallback(every_n_steps=4, num_probe=8, gram_dtype=gram_dtype, on_error="raise")
        module = cases.Module(cases.mlp(), nn.CrossEntropyLoss())
        cases.fit(module, cases.classes(), tmp_path, [callback], max_epochs=1, logger=False)
        found[gram_dtype] = callback
    snapshots = {name: callback.history[-1] for name, callback in found.items()}
    single, double = snapshots["float32"], snapshots[None]
    assert single.method == double.method == "exact"
    floor = SUMS_FLOOR[torch.float32]
    assert single.summary["floor"] == pytest.approx(floor * single.summary["lambda_max"])
    assert double.summary["floor"] == pytest.approx(RELATIVE_FLOOR[torch.float32] * double.summary["lambda_max"])
    assert f"down to {floor:.0e} lambda_max" in found["float32"].monitor.report
    assert single.summary["lambda_max"] == pytest.approx(double.summary["lambda_max"], rel=1e-6)
    assert single.energy.sum() == pytest.approx(float(double.energy.sum()), rel=1e-6)
    assert single.dissipation.sum() == pytest.approx(single.grad_norm_sq, rel=1e-5)
