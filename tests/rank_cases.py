"""What each of two ranks does in the tests of torch.distributed; run as a script, one process a rank.

python rank_cases.py RANK SIZE STORE OUT: every case in turn, what it found in OUT/rank<RANK>.pt by case.
"""

import hashlib
import random
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import grsd_callbacks.functional as functional
import grsd_callbacks.outlet as outlet_module
import grsd_callbacks.team as team_module
from grsd_callbacks import MemorySink, ShellMonitor
from grsd_callbacks.distributed import ElsewhereError, Group
from grsd_callbacks.gram.division import partial_gram
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.layers import LinearCall
from grsd_callbacks.sharded import Twin, is_sharded
from grsd_callbacks.team import SharedOperator

METHODS = {
    "exact": {"method": "exact", "transfer": True},
    "krylov": {"method": "krylov", "num_matvecs": 6, "num_density_matvecs": 4},
    "lanczos": {"method": "lanczos", "num_matvecs": 6},
    "randomized": {"method": "randomized", "num_matvecs": 6},
}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


# ---- what is trained ----


def net(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(12, 3)).to(dtype)


def data(dtype=torch.float64, n=21):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(n, k, generator=generator, dtype=dtype) for k in (6, 3))


def spread(model, rank):
    """Running statistics that differ between ranks, as they do under DistributedDataParallel; rank zero's count."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None:
            norm.running_mean += 0.1 * (rank + 1)


def train(monitor, model, rank=0, size=1, num_steps=4, train_mode=False, pause=0.0):
    """Full-batch descent, each rank on all samples, so that one process takes the same steps to rounding."""
    parallel = nn.parallel.DistributedDataParallel(model) if size > 1 and not is_sharded(model) else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    dtype = next(model.parameters()).dtype
    x, y = data(dtype)
    model.train(train_mode)
    for step in range(num_steps):
        spread(model, rank)
        if monitor is not None:
            monitor.step(step, optimizer=optimizer)
        optimizer.zero_grad()
        nn.functional.mse_loss(parallel(x), y).backward()
        optimizer.step()
        time.sleep(pause)
    if monitor is not None:
        monitor.finish()
    return optimizer


def measured(method, dtype, rank=0, size=1, num_samples=21):
    """Snapshots of a run as plain data."""
    model = net(DTYPES[dtype])
    x, y = data(DTYPES[dtype])
    probe = (x[:num_samples], y[:num_samples])
    if rank:  # rank zero's probe counts
        probe = (torch.zeros_like(x[:2]), torch.zeros_like(y[:2]))
    monitor = ShellMonitor(model, "mse", probe, every_n_steps=2, on_error="raise", **METHODS[method])
    train(monitor, model, rank, size)
    return [snapshot.to_dict() for snapshot in monitor.history]


def fingerprint(model, optimizer):
    """Weights, buffers, optimizer state and generators, bit by bit."""
    state = [{k: v.tolist() for k, v in model.state_dict().items()}, str(optimizer.state_dict())]
    generators = [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]
    return hashlib.sha256(repr([state, generators, [m.training for m in model.modules()]]).encode()).hexdigest()


def trained(monitored, rank, size, fault=None, **options):
    """Fingerprint of a run in train mode, and its monitor; what is a fault in it begins after the set-up."""
    model = net()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(rank)
    monitor = ShellMonitor(model, "mse", data(), every_n_steps=1, **options) if monitored else None
    with fault or nullcontext():
        optimizer = train(monitor, model, rank, size, num_steps=3, train_mode=True)
    return fingerprint(model, optimizer), monitor


# ---- faults ----


@contextmanager
def replaced(owner, name, value):
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def failing(original, on_call, error):
    """The function, but one call of it raises."""
    calls = 0

    def function(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == on_call:
            raise error
        return original(*args, **kwargs)

    return function


def out_of_memory():
    return torch.OutOfMemoryError("out of memory (made up)")


#: name: (failing rank, owner, function, its call that fails, error, how the run measures)
FAULTS = {
    "rank 1, its part of J^T v": (1, NTKOperator, "vjp", 3, out_of_memory(), "krylov"),
    "rank 1, its part of J w": (1, NTKOperator, "jvp", 2, RuntimeError("no product"), "krylov"),
    "rank 1, its part of the kernel": (1, team_module, "partial_gram", 2, RuntimeError("no kernel"), "exact"),
    "rank 1, making the operator": (1, SharedOperator, "__init__", 2, out_of_memory(), "exact"),
    "rank 1, entering the guards": (1, functional, "undisturbed", 1, RuntimeError("no guard"), "exact"),
    "rank 0, entering the guards": (0, functional, "undisturbed", 1, RuntimeError("no guard"), "exact"),
    "rank 0, its part of J^T v": (0, NTKOperator, "vjp", 3, RuntimeError("no product"), "krylov"),
    "rank 0, eigenvalues": (0, torch.linalg, "eigh", 2, torch.linalg.LinAlgError("no convergence"), "exact"),
    "rank 0, its part of the kernel": (0, team_module, "partial_gram", 2, RuntimeError("no kernel"), "exact"),
    "rank 0, making the operator": (0, SharedOperator, "__init__", 2, out_of_memory(), "krylov"),
}


def faulty(name, rank, size):
    """One run in which one rank fails once."""
    where, owner, function, on_call, error, method = FAULTS[name]
    broken = failing(getattr(owner, function), on_call, error) if rank == where else getattr(owner, function)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image, monitor = trained(True, rank, size, replaced(owner, function, broken), **METHODS[method])
    return {
        "fingerprint": image,
        "failed": monitor.num_failed,
        "steps": [s.step for s in monitor.history],
        "warnings": [str(w.message) for w in caught],
    }


def figures(rank, size):
    """Where figures are drawn during a run, and what a failure to draw does."""
    drawn, original = [], outlet_module.run_figures

    def count(history, fits):
        drawn.append(history[-1].step)
        return original(history, fits)

    with replaced(outlet_module, "run_figures", count):
        trained(True, rank, size, writer=MemorySink(), figures_every_n_steps=1, **METHODS["krylov"])
    options = {"writer": MemorySink(), "figures_every_n_steps": 1, "on_error": "raise", **METHODS["krylov"]}
    with replaced(outlet_module, "run_figures", lambda *args: 1 / 0):
        try:
            trained(True, rank, size, **options)
            error = "nothing"
        except ZeroDivisionError as caught:
            error = f"{type(caught).__name__} of rank {caught.rank}"
    return drawn, error


def raising(rank, size):
    """on_error="raise" and errors of set-up reach every rank, with their own type."""
    found = {}
    x, y = data()
    narrow = nn.Linear(6, 3 - rank).double()  # on rank 1 of another shape than the targets', which it does not look at
    frozen = nn.Linear(6, 3).double().requires_grad_(rank == 0)
    unpicklable = {"x": x, "f": lambda: None}
    cases = {
        "rank 1 has nothing to train": lambda: ShellMonitor(frozen, "mse", (x, y)),
        "rank 0 has no probe": lambda: ShellMonitor(nn.Linear(6, 3), "mse", () if rank == 0 else (x, y)),
        "the probe cannot be sent": lambda: ShellMonitor(nn.Linear(6, 3), "mse", (unpicklable, y)),
        "another shape on rank 0": lambda: ShellMonitor(narrow, "mse", (x, y[:, :2])),
    }
    for name, function in cases.items():
        try:
            function()
            found[name] = "nothing"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    broken = failing(NTKOperator.vjp, 3, KeyError("made up")) if rank == 1 else NTKOperator.vjp
    try:
        trained(True, rank, size, replaced(NTKOperator, "vjp", broken), on_error="raise", **METHODS["krylov"])
    except KeyError as error:
        found["on_error"] = (str(error), error.rank)
    return found


# ---- other cases ----


def fully_sharded(model):
    """Every linear layer, and the rest together."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded(method, size):
    """As `measured`, of a model sharded by `fully_shard`, which leaves buffers alone: they are the same here."""
    model = fully_sharded(net())
    monitor = ShellMonitor(model, "mse", data(), every_n_steps=2, on_error="raise", **METHODS[method])
    train(monitor, model, 0, size)
    return [snapshot.to_dict() for snapshot in monitor.history], monitor.report


def sharded_training(monitored, rank, size, room=Twin.make_room):
    """Weights and generators of a sharded run, how many measurements failed, and what was warned of."""
    model = fully_sharded(net())
    torch.manual_seed(rank)
    with replaced(Twin, "make_room", room), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = ShellMonitor(model, "mse", data(), every_n_steps=1, **METHODS["exact"]) if monitored else None
        train(monitor, model, rank, size, num_steps=3, train_mode=True)
    whole = [p.full_tensor().tolist() for p in model.parameters()] + [b.tolist() for b in model.buffers()]
    messages = [str(w.message) for w in caught if "failed" in str(w.message)]
    return (whole, torch.get_rng_state().tolist()), monitor and monitor.num_failed, messages


def refused_shards():
    """What is said of models that cannot be gathered."""
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallel = parallelize_module(net(), init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    found = []
    for model, options in ((parallel, {}), (fully_sharded(net()), {"distributed": False})):
        try:
            ShellMonitor(model, "mse", data(), **options)
        except ValueError as error:
            found.append(str(error))
    return found


def broken_by_one(rank, size, how):
    """One rank alone notices that the run is broken, between a measurement and the end of the step after it or later.

    Each rank's steps, whether the second one's work is known, and why flux is missing, by rank zero.
    """
    model = net()
    monitor = ShellMonitor(model, "mse", data(), every_n_steps=1, on_error="raise", **METHODS["exact"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(4):
        monitor.step(step, optimizer=optimizer)
        if step == 1 and rank == size - 1:
            if how == "written":
                monitor.new_segment("weights were loaded")
            else:
                monitor._identity = ()  # as if parameters had been replaced
        optimizer.zero_grad()
        nn.functional.mse_loss(model(data()[0]), data()[1]).backward()
        optimizer.step()
    monitor.finish()
    work = [bool(s.work.isfinite().all()) for s in monitor.history]
    return [s.step for s in monitor.history], work, [s.reasons.get("flux", "") for s in monitor.history]


def timed(rank, size):
    """The default schedule where rank 1 trains and measures at another speed."""
    original = SharedOperator._gram

    def slow(self, limit):
        time.sleep(0.02 * rank)
        return original(self, limit)

    with replaced(SharedOperator, "_gram", slow):
        model = net()
        monitor = ShellMonitor(model, "mse", data(), total_steps=40, max_overhead=1.0 + 5 * rank, method="exact")
        train(monitor, model, rank, size, num_steps=40, pause=0.002 + 0.01 * rank)
    return [s.step for s in monitor.history], monitor.schedule.state_dict()["points"], monitor.schedule.decision


def by_itself(rank):
    """distributed=False: rank zero measures, rank 1 does not even have a monitor."""
    if rank:
        return []
    model = net()
    monitor = ShellMonitor(model, "mse", data(), every_n_steps=2, distributed=False, **METHODS["krylov"])
    monitor.step(0, lr=0.1)
    return monitor.history


def interacting(rank, size):
    """A net whose samples see each other is measured by rank zero alone."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)]
    model = nn.Sequential(*layers).double()
    monitor = ShellMonitor(model, "mse", data(), every_n_steps=2, on_error="raise", **METHODS["krylov"])
    train(monitor, model, rank, size, num_steps=2)
    return [s.to_dict() for s in monitor.history], monitor.report


def shares(rank, size):
    """What each rank has worked on, by its own counts."""
    model = net()
    monitor = ShellMonitor(model, "mse", data(), every_n_steps=1, on_error="raise", work=False, **METHODS["krylov"])
    ops, make = [], monitor._operator
    monitor._operator = lambda: ops.append(make()) or ops[-1]
    monitor.step(0, lr=0.1)
    function = ops[0].function
    partial = partial_gram(function, monitor.probe.inputs, rank, size)
    return ops[0].local.num_samples, ops[0].local.num_products, partial.matrix, partial.plan, monitor.report


def relearned():
    """Kernels that rank zero has made alone, after each of three measurements; a layer's rule breaks after the first.

    What every rank remembers of it is then wrong, and dropped by all.
    """
    alone, counts = [], []
    whole, left = NTKOperator.exact_gram, LinearCall._left
    monitor = ShellMonitor(net(), "mse", data(), every_n_steps=1, on_error="raise", work=False, method="exact")
    with replaced(NTKOperator, "exact_gram", lambda op, **options: (alone.append(1), whole(op, **options))[1]):
        for step in range(3):
            changed = (LinearCall, "_left", lambda call, x: 1.01 * left(call, x))
            with replaced(*changed) if step else nullcontext():
                monitor.step(step, lr=0.1)
            counts.append(len(alone))
    return counts


def traffic(method, **options):
    """Bytes of tensors in the collectives of one measurement and its update, and how many collectives."""
    model = net()
    monitor = ShellMonitor(model, "mse", data(), on_error="raise", **{**METHODS[method], "transfer": False, **options})
    sent = []

    def counted(original, objects):
        def function(tensor, *args, **kwargs):
            sent.append(0 if objects else tensor.numel() * tensor.element_size())
            return original(tensor, *args, **kwargs)

        return function

    with ExitStack() as stack:
        for name in ("broadcast", "reduce", "all_reduce"):
            stack.enter_context(replaced(dist, name, counted(getattr(dist, name), False)))
        for name in ("broadcast", "all_gather"):  # what objects are sent by
            original = getattr(dist.distributed_c10d, name)
            stack.enter_context(replaced(dist.distributed_c10d, name, counted(original, True)))
        monitor.step(0, lr=0.1)
        monitor.finish_update(1)
    return sum(sent), len(sent), monitor.probe.num_samples * 3, sum(p.numel() for p in model.parameters())


def collectives(rank, size):
    """Each method of the group on its own."""
    group = Group.current()
    x = torch.full((3,), float(rank + 1), dtype=torch.float64)
    mixed = [torch.full((2, 2), rank), torch.tensor(rank == 0), torch.full((5,), rank + 0.5, dtype=torch.bfloat16)]
    mixed.append(torch.arange(2**21, dtype=torch.float64).view(2, -1).T + rank)  # large, and not contiguous
    group.overwrite(mixed)
    try:
        group.together(lambda: 1 / rank)
        raised = None
    except ZeroDivisionError as error:
        raised = (str(error), error.rank, error.__cause__ is None)
    try:
        group.together(lambda: (_ for _ in ()).throw(Odd(rank, "argument")))
        odd = None
    except Exception as error:
        odd = f"{type(error).__name__}: {error}"
    try:
        group.together(lambda: (_ for _ in ()).throw(ElsewhereError() if rank == 0 else ValueError("mine")))
        first = None
    except Exception as error:
        first = f"{type(error).__name__}: {error}"
    return {
        "sum": group.sum(x.clone(), everywhere=True).tolist(),
        "all": [group.all(True), group.all(rank == 0)],
        "overwritten": [t.double().sum().item() for t in mixed],
        "integers": group.integers([7 + rank, rank]),
        "share": group.share(lambda: {"rank": rank, "tensor": torch.ones(2)}),
        "gather": group.gather(("rank", rank)),
        "share_of": [group.share_of(n) for n in (0, 1, 5)],
        "errors": [raised, odd, first],
        "alone": Group(0, 1).together(lambda: rank),
    }


class Odd(Exception):
    """Cannot be built from its text alone."""

    def __init__(self, rank, argument):
        super().__init__(f"odd {argument}")


def run(rank, size):
    """Every case."""
    found = {"collectives": collectives(rank, size)}
    for method in METHODS:
        for dtype in DTYPES:
            found[f"{method} {dtype}"] = measured(method, dtype, rank, size)
    with replaced(SharedOperator, "share_copies", lambda op: None):
        found["without the copies"] = measured("krylov", "float64", rank, size)
    found["one sample"] = measured("krylov", "float64", rank, size, num_samples=1)
    found["interacting"] = interacting(rank, size)
    found["shares"] = shares(rank, size)
    found["relearned"] = relearned()
    found["plain"] = trained(False, rank, size)[0]
    for method in METHODS:
        found[f"trained {method}"] = trained(True, rank, size, **METHODS[method])[0]
    for name in FAULTS:
        found[name] = faulty(name, rank, size)
    for method in METHODS:
        found[f"traffic {method}"] = traffic(method, every_n_steps=100, figures=False)
        found[f"traffic {method}, default"] = traffic(method)
    found["raising"] = raising(rank, size)
    found["figures"] = figures(rank, size)
    found["timed"] = timed(rank, size)
    for how in ("written", "replaced"):
        found[how] = broken_by_one(rank, size, how)
    for method in METHODS:
        found[f"sharded {method}"] = sharded(method, size)
    found["sharded plain"] = sharded_training(False, rank, size)
    found["sharded measured"] = sharded_training(True, rank, size)
    room = failing(Twin.make_room, 3, out_of_memory()) if rank == 1 else Twin.make_room
    found["sharded failing"] = sharded_training(True, rank, size, room)
    found["refused shards"] = refused_shards()
    found["by itself"] = [s.to_dict() for s in by_itself(rank)]
    return found


if __name__ == "__main__":
    rank, size, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    torch.save(run(rank, size), out / f"rank{rank}.pt")
    dist.destroy_process_group()
