"""From `module:function` on the command line to a model, its loss and a probe."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grsd_callbacks.cli.runlog import UsageError
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.losses import Loss, calibrate, check_pair, resolve_loss
from grsd_callbacks.observation import choose_observe
from grsd_callbacks.probe import Probe, probe_from, samples_wanted
from grsd_callbacks.settings import Settings


@dataclass(eq=False)
class Subject:
    """What a command measures.

    Attributes:
        model: the network, on its device.
        loss: the loss, or None where none is known and none was asked for.
        probe: the samples; targets are None without data.
        settings: how to measure.
    """

    model: nn.Module
    loss: Loss | None
    probe: Probe
    settings: Settings


def subject(options: argparse.Namespace, observe: str | None = None) -> Subject:
    """Model, loss and probe as the options name them.

    Args:
        options: the command line.
        observe: what of the outputs is going to be measured (`choose_observe`), which the number of samples follows.

    Raises:
        UsageError: one of them cannot be had, or they do not fit together.
    """
    try:
        device = torch.device(options.device)
        settings = Settings(
            method=options.method, num_matvecs=options.num_matvecs, shells_per_decade=options.shells_per_decade
        )
        model = resolve(options.model, "--model")()
        if not isinstance(model, nn.Module):
            raise UsageError(f"--model {options.model} returned {type(model).__name__}, expected an nn.Module")
        model = model.to(device)
        data = resolve(options.data, "--data")() if options.data else example(model)
        loss = find_loss(options.loss, model) if options.data else None
        probe = _cut(model, loss, probe_from(data, options.num_probe), options.num_probe, observe).to(device)
        found = Subject(model, loss, probe, settings)
        if loss is not None:
            found.loss = _fitting(found)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{type(error).__name__}: {error}") from error
    return found


def resolve(name: str, option: str) -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names; the present folder is searched first.

    Raises:
        UsageError: no such module, file or function; or the module raises while it is imported.
    """
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise UsageError(f"{option} must be module:function or file.py:function, got {name!r}")
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else _from_name(where)
    except Exception as error:
        raise UsageError(f"{option}: {where} cannot be imported ({type(error).__name__}: {error})") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"{option}: {where} has no function {attribute!r}")
    return function


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.stem in sys.modules and getattr(sys.modules[path.stem], "__file__", None) == str(path):
        return sys.modules[path.stem]
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # classes of the file can be found by name
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def _from_name(name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def example(model: nn.Module) -> Any:
    """A LightningModule's own example inputs, without targets.

    Raises:
        UsageError: the model has none.
    """
    inputs = getattr(model, "example_input_array", None)
    if inputs is None:
        raise UsageError("give --data module:function that returns (inputs, targets) or a DataLoader")
    return inputs, None


def find_loss(name: str, model: nn.Module) -> Loss:
    """The loss that --loss names.

    Raises:
        UsageError: "auto", and the model holds no loss or several.
    """
    if name == "auto":
        from grsd_callbacks.callbacks import auto_loss

        try:
            return resolve_loss(auto_loss(model))
        except ValueError as error:
            raise UsageError(f"--loss: {error}") from None
    return resolve_loss(resolve(name, "--loss") if ":" in name else name)


def _cut(model: nn.Module, loss: Loss | None, probe: Probe, asked: int | None, observe: str | None) -> Probe:
    """The first samples of the probe, so many that samples x numbers observed is what a measurement can bear."""
    if asked is not None:
        return probe
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    one = NTKOperator(model, probe.take(slice(0, min(2, probe.num_samples))).to(device).inputs)
    wanted = samples_wanted(one.num_outputs, device)
    if loss is not None and choose_observe(observe, loss, wanted * one.num_outputs) is not None:
        wanted = samples_wanted(1, device)
    return probe.take(slice(0, wanted))


def _fitting(found: Subject) -> Loss:
    """The loss, once it is known to fit the model's outputs on the probe."""
    assert found.loss is not None
    loss, targets = found.loss, found.probe.targets
    op = NTKOperator(found.model, found.probe.inputs)
    check_pair(loss, op.outputs, targets)
    op.run(lambda: loss.evaluate(op.outputs, targets))
    return op.run(lambda: calibrate(loss, op.outputs, targets))
