"""Training is bit-identical with and without the callback, and each guard is missed when it is taken away."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache, partial
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning_cases as cases
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

import grsd_callbacks.callbacks.sampling
import grsd_callbacks.functional
from grsd_callbacks import ShellDynamicsCallback
from grsd_callbacks.guard import DisturbedTraining, undisturbed


class Case(NamedTuple):
    """How to make module and data, and what else the Trainer and the callback are told."""

    module: Callable[[], Any]
    data: Callable[[], Any] = cases.classes
    trainer: dict = {}
    callback: dict = {}
    tensorboard: bool = False


def classifier(net, module=cases.Module, **options):
    return lambda: module(net(), nn.CrossEntropyLoss(), **options)


MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
CASES = {
    "batch norm, dropout": Case(classifier(cases.bn_dropout, optimizer=MOMENTUM)),
    "transformer": Case(classifier(cases.Transformer)),
    "adamw": Case(classifier(cases.bn_dropout, optimizer=ADAMW), callback={"every_n_steps": 1}),
    "accumulate 2": Case(classifier(cases.bn_dropout), trainer={"accumulate_grad_batches": 2, "max_epochs": 3}),
    "clipping": Case(classifier(cases.bn_dropout), trainer={"gradient_clip_val": 0.05}),
    "two optimizers": Case(cases.Adversarial, callback={"loss": "mse", "unpack": lambda batch: (batch[0], batch[0])}),
    "log every 3": Case(classifier(cases.bn_dropout), trainer={"log_every_n_steps": 3}),
    "two workers": Case(
        classifier(cases.bn_dropout),
        data=lambda: cases.DataLoader(cases.Augmented(), batch_size=cases.BATCH, shuffle=True, num_workers=2),
        callback={"num_probe": 24},  # more than a batch holds, so the data set is asked
    ),
    "bf16-mixed": Case(classifier(cases.bn_dropout), trainer={"precision": "bf16-mixed"}),
    "float64": Case(classifier(cases.bn_dropout), trainer={"precision": "64-true"}),
    "krylov": Case(classifier(cases.bn_dropout), callback={"method": "krylov", "num_matvecs": 8}),
    "event files and figures": Case(classifier(cases.bn_dropout), tensorboard=True),
    "figures during the run": Case(
        classifier(cases.bn_dropout), tensorboard=True, callback={"figures_every_n_steps": 4}
    ),
    "transfer": Case(classifier(cases.bn_dropout), callback={"transfer": True}),
    "pairs": Case(classifier(cases.bn_dropout), callback={"every_n_steps": 4, "pair": True}),
    "draws in eval mode": Case(classifier(cases.Drawing)),
    "layer kept in eval mode": Case(classifier(cases.bn_dropout, module=cases.FrozenNorm)),
    "logs in forward": Case(classifier(cases.mlp, module=cases.LogsInForward)),
    "counts its calls": Case(classifier(cases.Counting)),
    "embedding with max_norm": Case(classifier(cases.Embedded)),
}


def run(case, callbacks=()):
    """Image of one training run, always from the same seed."""
    with TemporaryDirectory() as folder:
        cases.seed()
        module, data = case.module(), case.data()
        loggers = [CSVLogger(folder, name="", version=0)]
        loggers += [TensorBoardLogger(folder, name="events")] if case.tensorboard else []
        trainer = cases.fit(module, data, folder, callbacks, logger=loggers, **case.trainer)
        return cases.image(trainer, module)


@lru_cache
def undisturbed_image(name):
    return run(CASES[name])


def measured(name, **changes):
    """(parts of the run that differ from a run without the callback, the callback)."""
    options = {"every_n_steps": 2, "num_probe": 8, **CASES[name].callback, **changes}
    callback = ShellDynamicsCallback(**options)
    return cases.differences(undisturbed_image(name), run(CASES[name], [callback])), callback


def test_a_run_repeats_itself():
    name = "batch norm, dropout"
    assert cases.differences(undisturbed_image(name), run(CASES[name])) == []


@pytest.mark.parametrize("name", CASES)
def test_training_is_bit_identical(name):
    differing, callback = measured(name)
    assert differing == []
    assert len(callback.history) >= 4 and callback.monitor.num_failed == 0


def test_probe_loader_is_read_without_a_trace():
    """Iterating a loader draws a seed from the global generator, or from the loader's own."""
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    for options in ({}, {"generator": generator}, {"num_workers": 1}):
        probe = cases.classes(batch_size=4, **options)
        differing, callback = measured("batch norm, dropout", probe=probe)
        assert differing == [] and len(callback.history) == 5
    assert torch.equal(generator.get_state(), before)


def test_probe_may_be_the_training_loader_with_persistent_workers():
    case = Case(
        classifier(cases.mlp),
        data=lambda: cases.classes(num_workers=1, persistent_workers=True),
        trainer={"max_epochs": 1},
    )
    plain = run(case)
    shared = cases.classes(num_workers=1, persistent_workers=True)
    callback = ShellDynamicsCallback(probe=shared, every_n_steps=2)
    assert cases.differences(plain, run(case._replace(data=lambda: shared), [callback])) == []
    assert len(callback.history) == 3


# ---- negative controls: a guard is taken away, and the comparison notices ----


@pytest.mark.parametrize(
    ("guard", "name", "part"),
    [
        ("rng", "draws in eval mode", "torch rng"),
        ("rng", "draws in eval mode", "numpy rng"),
        ("rng", "draws in eval mode", "python rng"),
        ("attributes", "counts its calls", "weights"),
        ("logging", "logs in forward", "callback_metrics"),
        ("logging", "logs in forward", "logged"),
    ],
)
def test_guard_is_missed(monkeypatch, guard, name, part):
    monkeypatch.setattr(grsd_callbacks.functional, "undisturbed", partial(undisturbed, without=(guard,)))
    assert part in measured(name)[0]


def test_guard_of_modes_is_missed(monkeypatch):
    @contextmanager
    def careless(model, mode):
        model.eval()
        with undisturbed(model, without=("modes",)):
            yield
        model.train()

    monkeypatch.setattr(grsd_callbacks.functional, "undisturbed", careless)
    assert "flags" in measured("layer kept in eval mode")[0]


def test_copies_of_the_parameters_are_missed(monkeypatch):
    monkeypatch.setattr(grsd_callbacks.functional.ModelFunction, "_copy", lambda self, tensor: tensor.detach())
    with pytest.raises(DisturbedTraining, match="'net.embedding.weight' was written to in place"):
        measured("embedding with max_norm", on_error="raise")


def test_generators_around_the_data_set_are_missed(monkeypatch):
    monkeypatch.setattr(grsd_callbacks.callbacks.sampling, "undisturbed", partial(undisturbed, without=("rng",)))
    assert "weights" in measured("two workers")[0]
