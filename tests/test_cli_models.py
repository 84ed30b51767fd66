"""`grsd checkpoints` and `grsd doctor`: measured checkpoints equal the run measured live; wrong ones are refused."""

import os
import re

import lightning_cases as cases
import pytest
import torch
import torch.nn.functional as F
from test_cli import command, files, fit
from torch import nn

import grsd_callbacks as grsd
from grsd_callbacks.cli import checkpoints as module
from grsd_callbacks.cli.runlog import read_json
from grsd_callbacks.monitor.measurer import Measurer
from grsd_callbacks.optimizer import StepSize

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:grsd. measuring every"),
]
SUBJECT = """
import torch, lightning_cases as cases
from torch import nn

def model():
    return cases.mlp(8)

def wide():
    return cases.mlp(12)

def deep():
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 10))

def module():
    return cases.Module(cases.mlp(8), nn.MSELoss())

def data():
    x, y = cases.digits()
    return x[:6], cases.one_hot(y[:6])

def very_wide():
    return nn.Linear(64, 700)

def wide_data():
    return cases.digits()[0], torch.zeros(64, 700)

def loader():
    return cases.regression(shuffle=False)

def other_data():
    x, y = data()
    return x + 1, y

def nothing():
    return 3

def strange(outputs, targets):
    return (outputs - targets).abs().pow(3).mean()

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, x):
        raise RuntimeError("no such path")

class Exotic(nn.Sequential):
    example_input_array = torch.zeros(3, 64)

def exotic():
    return Exotic(nn.Linear(64, 4), nn.ReLU(), nn.Dropout())
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "subject.py").write_text(SUBJECT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(folder, steps=60, every=20, momentum=0.5, key="model"):
    """Plain checkpoints of a small run, and the same run measured live."""
    folder.mkdir()
    cases.seed()
    model = cases.mlp(8)
    x, y = cases.digits()
    y = cases.one_hot(y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    monitor = grsd.ShellMonitor(model, "mse", (x[:6], y[:6]), every_n_steps=every, work=False)
    for step in range(steps + 1):
        monitor.step(step, optimizer=optimizer)
        if step % every == 0:
            torch.save(
                {key: model.state_dict(), "step": step, "optimizer": optimizer.state_dict()}, folder / f"{step}.pt"
            )
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return monitor


def arguments(*paths, model="model", data="data", loss="mse", **options):
    more = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    return (
        "checkpoints",
        *paths,
        "--model",
        f"subject.py:{model}",
        "--data",
        f"subject.py:{data}",
        "--loss",
        loss,
        *more,
    )


def same(a, b, *, rel=1e-12):
    assert [s.step for s in a] == [s.step for s in b]
    for one, two in zip(a, b, strict=True):
        assert one.flow_time == pytest.approx(two.flow_time, rel=rel)
        for name in ("edges", "energy", "dissipation", "counts", "frozen_energy", "transport", "flux"):
            torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=rel, atol=1e-18, equal_nan=True)


def test_checkpoints_measure_what_the_run_measured(here, capsys):
    monitor = train(here / "ck")
    assert command(*arguments("ck", out="out")) == 0
    history = read_json(here / "out" / "grsd.jsonl").history
    same(history, monitor.history)
    assert history[-1].health["nominal_flow_time"] == 0.0
    assert torch.isfinite(history[-1].flux).all() and float(history[-1].flux.abs().sum()) > 0
    captured = capsys.readouterr()
    assert "4 checkpoints" in captured.out and "4/4" in captured.err
    assert command("report", "out") == 0
    assert capsys.readouterr().out.splitlines()[0] == captured.out.splitlines()[0]


def test_interrupted_command_goes_on_and_ends_the_same(here, monkeypatch, capsys):
    train(here / "ck")
    assert command(*arguments("ck", out="whole")) == 0
    real, calls = module._measured, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "_measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(*arguments("ck", out="parts"))
    monkeypatch.setattr(module, "_measured", real)
    path = here / "parts" / "grsd.jsonl"
    assert len(path.read_bytes().splitlines()) == 3
    with open(path, "ab") as file:  # a killed process leaves half a line
        file.write(b'{"step": 60, "scala')
    capsys.readouterr()
    assert command(*arguments("ck", out="parts")) == 0
    assert "0/4" not in capsys.readouterr().err, "what was done is not done again"
    same(read_json(path).history, read_json(here / "whole" / "grsd.jsonl").history)
    before = path.read_bytes()
    assert command(*arguments("ck", out="parts")) == 0
    assert path.read_bytes() == before, "nothing is left to do"


def test_lightning_checkpoints_of_the_whole_module_and_of_the_net_inside(here, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    callback = fit(folder, checkpoints=True, figures=False)
    live = {s.step: s for s in callback.history}
    assert (folder / "ckpt" / "last.ckpt").exists(), "a copy of the last one, which counts once"
    torch.save(callback.monitor.probe.inputs, "x.pt")
    torch.save(callback.monitor.probe.targets, "y.pt")
    (here / "probe.py").write_text("import torch\ndef data():\n    return torch.load('x.pt'), torch.load('y.pt')\n")
    for model, loss in (("module", "auto"), ("model", "mse")):
        words = list(arguments(folder / "ckpt", model=model, loss=loss, out=f"out_{model}"))
        words[words.index("subject.py:data")] = "probe:data"
        assert command(*words) == 0
        history = read_json(here / f"out_{model}" / "grsd.jsonl").history
        assert [s.step for s in history] == [20, 40, 60]
        for s in history:
            torch.testing.assert_close(float(s.energy.sum()), float(live[s.step].energy.sum()), rtol=1e-10, atol=0.0)


def test_events_for_tensorboard(here, unrendered):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(here / "ck")
    for _ in range(2):  # the second time nothing is doubled
        assert command(*arguments("ck", out="out"), "--tensorboard") == 0
    events = EventAccumulator("out").Reload()
    assert [e.step for e in events.Scalars("grsd_loss/probe")] == [0, 20, 40, 60]
    assert {"grsd_figures/energy", "grsd_figures/flux"} <= set(events.Tags()["images"])


def wrong(here):
    """Arguments and complaint, for every kind of wrong use."""
    train(here / "ck")
    state = torch.load(here / "ck" / "0.pt", weights_only=True)
    (here / "empty").mkdir()
    (here / "broken.pt").write_bytes(b"not a checkpoint")
    torch.save([1, 2], here / "list.pt")
    torch.save({"step": 3}, here / "bare.pt")
    torch.save({"model": {f"{k}.{name}": v for name, v in state["model"].items() for k in "ab"}}, here / "twin.pt")
    torch.save({"model": {n: v * float("nan") for n, v in state["model"].items()}, "step": 0}, here / "nan.pt")
    torch.save({**state, "extra": 1, "model": {n: v + 1 for n, v in state["model"].items()}}, here / "again.pt")
    return [
        (arguments("ck", model="wide"), "another model: 0.weight has shape (8, 64), the model (12, 64)"),
        (arguments("ck", model="deep"), "another model: it lacks"),
        (arguments("missing.pt"), "does not exist"),
        (arguments("empty"), "holds no checkpoint"),
        (arguments("broken.pt"), "cannot be loaded with weights_only=True"),
        (arguments("list.pt"), "expected a mapping"),
        (arguments("bare.pt"), "holds no state_dict"),
        (arguments("twin.pt"), "holds several such models"),
        (arguments("ck/0.pt", "again.pt"), "two different checkpoints at step 0"),
        (arguments("ck", model="nothing"), "returned int, expected an nn.Module"),
        (arguments("ck", model="absent"), "has no function 'absent'"),
        (arguments("ck", data="nothing"), "expected 'auto', (inputs, targets)"),
        (arguments("ck", loss="auto"), "no nn.MSELoss or nn.CrossEntropyLoss"),
        (arguments("ck", loss="hinge"), "hinge"),
        (arguments("ck", num_matvecs="0"), "num_matvecs must be"),
        (arguments("ck", device="toaster"), "toaster"),
        (("checkpoints", "ck", "--model", "subject", "--data", "subject.py:data"), "module:function"),
        (("checkpoints", "ck", "--model", "no_such_module:f", "--data", "subject.py:data"), "cannot be imported"),
    ]


def test_wrong_use_is_refused_and_nothing_is_written(here, capsys):
    for words, complaint in wrong(here):
        before = [entry for entry in files(here) if "__pycache__" not in entry[0]]
        assert command(*words) == 2, words
        captured = capsys.readouterr()
        assert complaint in captured.err, (words, captured.err)
        assert captured.out == ""
        assert [entry for entry in files(here) if "__pycache__" not in entry[0]] == before, words


def test_checkpoint_with_nan_is_named(here, capsys):
    wrong(here)
    assert command(*arguments("nan.pt", out="out")) == 2
    assert "nan.pt cannot be measured: parameters hold NaN" in capsys.readouterr().err


def test_nothing_in_a_checkpoint_is_executed(here, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(here / "executed"),)

    torch.save({"model": Evil()}, here / "evil.pt")
    assert command(*arguments("evil.pt")) == 2
    assert "weights_only" in capsys.readouterr().err and not (here / "executed").exists()


def test_results_of_something_else_are_not_continued(here, capsys):
    train(here / "ck")
    assert command(*arguments("ck/0.pt", "ck/20.pt", out="out")) == 0
    before = files(here / "out")
    assert command(*arguments("ck", out="out", data="other_data")) == 2
    assert "other data, loss, model or settings" in capsys.readouterr().err
    assert command(*arguments("ck", out="out", shells_per_decade="4")) == 2
    assert command(*arguments("ck/20.pt", "ck/40.pt", out="out")) == 2
    assert "other checkpoints" in capsys.readouterr().err
    (here / "foreign").mkdir()
    (here / "foreign" / "grsd.jsonl").write_text("hello\n")
    assert command(*arguments("ck", out="foreign")) == 2
    assert (here / "foreign" / "grsd.jsonl").read_text() == "hello\n"
    assert files(here / "out") == before


def test_step_sizes_between_checkpoints():
    assert module.between(StepSize(0.1, 0.2), StepSize(0.1, 0.2)) == StepSize(0.1, 0.2)
    changed = module.between(StepSize(0.1, 0.1), StepSize(0.3, 0.3))
    assert changed.flow == pytest.approx(0.2) and changed.nominal and "changed" in changed.why
    unknown = module.between(module.NO_STEP_SIZE, StepSize(0.1, 0.1))
    assert unknown.flow == 1.0 and unknown.nominal and "counts steps" in unknown.why


@pytest.mark.parametrize(
    "make, flow, nominal",
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0.1, False),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1.0, False),
        (lambda p: torch.optim.Adam(p, lr=0.01), 0.01, True),
        (lambda p: torch.optim.SGD([{"params": [q], "lr": k + 1.0} for k, q in enumerate(p)], lr=0.1), None, True),
    ],
)
def test_step_size_is_read_from_optimizer_states_of_both_kinds(make, flow, nominal):
    state = make(list(nn.Linear(2, 1).parameters())).state_dict()
    for content in ({"optimizer_states": [state]}, {"optimizer": state}):
        size = module._size(content)
        assert size.nominal == nominal and (flow is None or size.flow == pytest.approx(flow))


# -- doctor ----------------------------------------------------------------------------------------------


def doctor(model, *more):
    return command("doctor", "--model", f"subject.py:{model}", *more)


def test_doctor_tries_every_way_and_says_what_it_costs(here, capsys):
    assert doctor("model", "--data", "subject.py:data", "--loss", "mse") == 0
    out = capsys.readouterr().out
    for promised in ("m = 60", "yes exact kernel", "linear 4", "yes products", "method      exact", "yes trial",
                     "bit-identical afterwards", "To spend 2 %, measure every"):  # fmt: skip
        assert promised in out, promised


def untimed(report):
    """A report without its measured times."""
    return re.sub(r"[0-9.e+-]+ s\b", "- s", report)


@pytest.mark.parametrize("name", ["data", "wide_data"])
def test_doctor_reports_what_a_run_would(here, capsys, name):
    """The same trial: function, observation, method, forms, way to J w and memory."""
    assert doctor("very_wide" if name == "wide_data" else "model", "--data", f"subject.py:{name}", "--loss", "mse") == 0
    out = capsys.readouterr().out
    torch.manual_seed(0)
    (x, y), net = (cases.digits()[0], torch.zeros(64, 700)), nn.Linear(64, 700)
    if name == "data":
        x, y = cases.digits()
        (x, y), net = (x[:6], cases.one_hot(y[:6])), cases.mlp(8)
    report = grsd.ShellMonitor(net, "mse", (x, y)).report
    assert untimed(report) in untimed(out)
    assert ("64 samples x 1 outputs, m = 64" if name == "wide_data" else "6 samples x 10 outputs, m = 60") in out


def test_doctor_counts_the_cheaper_of_two_whole_measurements(here, capsys, monkeypatch):
    """As the default schedule does; with the work of the step that follows each."""
    added = iter([50.0, 7.0, 0.5, 3.0])  # a measurement, its step; and again
    for name in ("_take", "_add_update"):
        original = getattr(Measurer, name)

        def slower(self, *args, original=original):
            self.watch.measuring_seconds += next(added)
            return original(self, *args)

        monkeypatch.setattr(Measurer, name, slower)
    assert doctor("model", "--data", "subject.py:data", "--loss", "mse") == 0
    seconds = float(re.search("yes trial measurement: ([0-9.]+) s", capsys.readouterr().out)[1])
    assert 3.5 <= seconds < 5.0


def test_doctor_takes_a_loader_and_a_loss_of_ones_own(here, capsys):
    assert doctor("model", "--data", "subject.py:loader", "--loss", "subject.py:strange", "--method", "krylov") == 0
    out = capsys.readouterr().out
    assert "method      krylov" in out and "general" in out


def test_doctor_without_data_uses_the_modules_example(here, capsys):
    assert doctor("exotic") == 0
    out = capsys.readouterr().out
    assert "3 samples x 4 outputs" in out and "1 x Dropout" in out and "1 x ReLU: has kinks" in out
    assert doctor("model") == 2
    assert "give --data" in capsys.readouterr().err


def test_doctor_of_a_model_that_cannot_be_measured(here, capsys):
    assert doctor("Broken", "--data", "subject.py:data", "--loss", "mse", "--num-probe", "3") in (1, 2)
    captured = capsys.readouterr()
    assert "no such path" in captured.out + captured.err
