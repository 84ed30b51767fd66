"""Lightning runs under strategy="ddp" on two processes; started as a script, since Lightning starts it once more.

python ddp_script.py OUT: what each rank found, in OUT/rank<RANK>.pt by case.
"""

import sys
import warnings
from functools import partial
from pathlib import Path

import lightning_cases as cases
import rank_cases
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from grsd_callbacks import RenormalizabilityCallback, ShellDynamicsCallback, renormalizability_monitor
from grsd_callbacks.kernel import NTKOperator

MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Grabs(Callback):
    """Keeps the first batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.batch = [t.clone() for t in batch]


def fit(folder, *callbacks, net=cases.bn_dropout, batch_size=cases.BATCH, max_epochs=1, **options):
    """One run, always from the same seed; the Trainer and the module."""
    cases.seed()
    module = cases.Module(net(), nn.CrossEntropyLoss(), MOMENTUM)
    data = cases.classes(batch_size=batch_size)
    logger = CSVLogger(folder, name="", version=0)
    options = {"logger": logger, "strategy": "ddp", "devices": 2, "max_epochs": max_epochs, **options}
    return cases.fit(module, data, folder, callbacks, **options), module


def image(trainer, module):
    """All that a rank's run leaves behind."""
    found = cases.image(trainer, module)
    found.pop("logged")  # rank zero's file, which rank one may read before it is complete
    return found


def monitored(folder, **options):
    """A run with the callback: what it leaves, what it measured, what it warned of."""
    callback = ShellDynamicsCallback(**{"every_n_steps": 2, **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, module = fit(folder, callback)
    monitor = callback.monitor
    return {
        "image": image(trainer, module),
        "steps": [s.step for s in callback.history],
        "history": [s.to_dict() for s in callback.history],
        "probe": None if monitor is None else monitor.probe.inputs,
        "failed": None if monitor is None else monitor.num_failed,
        "warnings": [str(w.message) for w in caught if "grsd" in str(w.message)],
    }


def broken(rank, where, method, on_call, error):
    """One call of an operator's method fails on one rank."""
    original = getattr(NTKOperator, method)
    return rank_cases.replaced(
        NTKOperator, method, rank_cases.failing(original, on_call, error) if rank == where else original
    )


def conditions(folder, make=fit, **options):
    """A run with the conditions: what it leaves, what each rank knows of them, what it warned of."""
    callback = RenormalizabilityCallback(num_probe=15, num_null=19, num_resamples=4, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        left = make(folder, callback)
    return {
        "image": image(*left) if make is fit else left,
        "conditions": [{**c.to_dict(), "cost": {}} for c in callback.conditions],
        "verdicts": None if callback.verdict is None else [v.condition for v in callback.verdict.verdicts],
        "files": sorted(path.name for path in folder.rglob("grsd_renorm*.jsonl")),
        "failed": callback.monitor.num_failed,
        "warnings": [str(w.message) for w in caught if "grsd" in str(w.message)],
    }


def broken_conditions(rank):
    """The second measurement of conditions fails on the rank that makes them."""
    original = renormalizability_monitor.conditions_at
    failing = rank_cases.failing(original, 2, RuntimeError("no conditions"))
    return rank_cases.replaced(renormalizability_monitor, "conditions_at", original if rank else failing)


class Sharded(cases.Module):
    """FSDP2, as Lightning asks for it."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def sharded(folder, *callbacks):
    """Whole weights, buffers and generator of a run under ModelParallelStrategy."""
    cases.seed()
    module = Sharded(cases.bn_dropout(), nn.CrossEntropyLoss(), MOMENTUM)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    cases.fit(module, cases.classes(), folder, callbacks, strategy=strategy, devices=2, max_epochs=1)
    whole = [p.full_tensor().tolist() for p in module.parameters()] + [b.tolist() for b in module.buffers()]
    return whole, torch.get_rng_state().tolist()


def message(folder, **options):
    """What a run that cannot begin says."""
    try:
        fit(folder, ShellDynamicsCallback(**options))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Resumed(ShellDynamicsCallback):
    """Looks at the run it continues."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not hasattr(self, "found"):
            self.found = [s.step for s in self.history]


def run(folder):
    """Every case; the first fit starts the other process."""
    grabs = Grabs()
    trainer, module = fit(folder / "plain", grabs)
    rank = trainer.global_rank
    found = {"plain": image(trainer, module), "first batch": grabs.batch}
    for method in ("exact", "krylov"):
        found[method] = monitored(folder / method, method=method, num_matvecs=6, num_density_matvecs=4, num_probe=15)
    found["default"] = monitored(folder / "default", every_n_steps=None, num_density_matvecs=4)
    with broken(rank, 1, "vjp", 8, torch.OutOfMemoryError("out of memory (made up)")):
        found["failing"] = monitored(folder / "failing", method="krylov", num_matvecs=6, num_density_matvecs=0)
    with broken(rank, 0, "__init__", 1, RuntimeError("no operator")):
        found["late"] = monitored(folder / "late")
    found["wrong use"] = message(folder / "wrong", loss="mse")
    pair = cases.digits()
    found["pair"] = monitored(folder / "pair", probe=(pair[0][:6], pair[1][:6]), work=False)
    found["more than a batch"] = monitored(folder / "more", num_probe=2 * cases.BATCH + 10)["probe"]
    trainer, _ = fit(folder / "saved", ShellDynamicsCallback(every_n_steps=2), max_epochs=1)
    trainer.save_checkpoint(folder / "saved.ckpt")
    resumed = Resumed(every_n_steps=2)
    trainer, _ = fit(folder / "resumed", resumed, max_epochs=2, ckpt_path=folder / "saved.ckpt")
    found["resumed"] = resumed.found, [s.step for s in resumed.history]
    callback = ShellDynamicsCallback(every_n_steps=2, num_probe=15, json_lines=None)
    images = sharded(folder / "sharded"), sharded(folder / "sharded measured", callback)
    found["conditions"] = conditions(folder / "conditions", every_n_steps=1)
    found["conditions by default"] = conditions(folder / "conditions by default", max_overhead=50.0)
    with broken_conditions(rank):
        found["conditions failing"] = conditions(folder / "conditions failing", every_n_steps=1)
    found["conditions sharded"] = conditions(folder / "conditions sharded", make=sharded, every_n_steps=1)
    found["sharded"] = images, [s.to_dict() for s in callback.history], callback.monitor.report
    return rank, found


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    rank, found = run(out)
    torch.save(found, out / f"rank{rank}.pt")
