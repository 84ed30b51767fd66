"""The command line, as a user would type it: what it prints, what it refuses, what it leaves behind."""

import base64
import html
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import lightning_cases as cases
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import grsd_callbacks as grsd
from grsd_callbacks.cli import main
from grsd_callbacks.cli.compare import difference, holm, labels
from grsd_callbacks.cli.runlog import read_json
from grsd_callbacks.exponents import Estimate
from grsd_callbacks.json_lines import append_json_line
from grsd_callbacks.tags import TAGS

STEPS, EVERY = 60, 10
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:grsd. measuring every"),
]


def fit(folder, *, seed=0, shells_per_decade=3, name="", checkpoints=False, **options):
    """A small Lightning run with TensorBoard's files, JSON lines and (if asked for) checkpoints."""
    cases.seed(seed)
    module = cases.Module(cases.mlp(8), nn.MSELoss(), partial(torch.optim.SGD, lr=0.2))
    callback = grsd.ShellDynamicsCallback(
        every_n_steps=EVERY, num_probe=6, name=name, shells_per_decade=shells_per_decade, **options
    )
    saver = ModelCheckpoint(folder / "ckpt", "{step}", every_n_train_steps=20, save_top_k=-1, save_last=True)
    trainer = pl.Trainer(
        max_steps=STEPS, logger=TensorBoardLogger(folder, name="", version=""), accelerator="cpu",
        callbacks=[callback, *([saver] if checkpoints else [])], enable_checkpointing=checkpoints,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, cases.regression())
    return callback


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, fit(folder, checkpoints=True)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    return folder, fit(folder, seed=1, figures=False)


@pytest.fixture
def killed(run, tmp_path):
    """Event files alone, of a run that was stopped before its summary."""
    writer = SummaryWriter(tmp_path / "killed")
    for snapshot in run[1].history:
        grsd.TensorBoardSink(writer).write(grsd.Emission(snapshot.step, scalars=grsd.tags.scalars(snapshot)))
    writer.close()
    return tmp_path / "killed"


def command(*words):
    return main([str(word) for word in words])


def files(folder):
    return sorted((str(p), p.stat().st_mtime_ns) for p in Path(folder).rglob("*"))


# -- report ----------------------------------------------------------------------------------------------


def test_report_is_the_callbacks_own_summary(run, capsys):
    folder, callback = run
    assert command("report", folder) == 0
    assert capsys.readouterr().out == callback.summary() + "\n"
    assert command("report", folder / "grsd.jsonl") == 0
    assert capsys.readouterr().out == callback.summary() + "\n"


def test_report_from_event_files_is_the_same_where_the_run_was_finished(run, tmp_path, capsys):
    folder, callback = run
    for path in folder.glob("events*"):
        os.link(path, tmp_path / path.name)
    assert command("report", tmp_path) == 0
    out = capsys.readouterr().out
    assert out.startswith(callback.summary() + "\n") and "note: read from TensorBoard" in out


def test_report_from_curves_of_a_killed_run(run, killed, capsys):
    assert command("report", killed) == 0
    out = capsys.readouterr().out
    last = run[1].history[-1]
    assert f"{len(run[1].history)} measurements, step 0 -> {STEPS}" in out
    assert re.search(rf"grsd_loss/probe +\S+ +{re.escape(f'{last.loss:.4g}')} +loss\n", out)
    for name, energy in zip(last.grid.names(), last.energy.tolist(), strict=True):
        if energy > 1e-12:
            assert re.search(rf"shell_energy/{name} +\S+ +{re.escape(f'{energy:.4g}')} ", out), name


def test_report_of_a_folder_of_runs_names_each(run, other, tmp_path, capsys):
    for name, (folder, _) in (("one", run), ("two", other)):
        os.symlink(folder / "grsd.jsonl", (tmp_path / name).mkdir() or tmp_path / name / "grsd.jsonl")
    assert command("report", tmp_path) == 0
    out = capsys.readouterr().out
    assert "=== one (" in out and "=== two (" in out
    assert run[1].summary() in out and other[1].summary() in out


def test_named_callbacks_are_found_by_their_tags(tmp_path, capsys):
    callback = fit(tmp_path, name="ema", json_lines=None, figures=False)
    assert command("report", tmp_path) == 0
    assert capsys.readouterr().out.startswith(callback.summary())


def test_page_needs_nothing_from_outside(run, tmp_path, capsys):
    folder, callback = run
    page = tmp_path / "page.html"
    assert command("report", folder, "--html", page) == 0
    text = page.read_text()
    assert str(page) in capsys.readouterr().out
    assert not re.search(r"https?://|<link|<script|url\(", text)
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 8 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(base64.b64decode(source.split(",")[1])[:4] == b"\x89PNG" for source in sources)
    assert html.escape(callback.summary()) in text
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"], "no half-written file stays behind"


def test_page_from_event_files_has_the_figures_that_the_run_drew(run, tmp_path):
    for path in run[0].glob("events*"):
        os.link(path, tmp_path / path.name)
    assert command("report", tmp_path, "--html", tmp_path / "page.html") == 0
    assert (tmp_path / "page.html").read_text().count("data:image/png") == 7


# -- damaged and foreign files ---------------------------------------------------------------------------


def test_half_written_last_line_is_left_out_with_a_note(run, tmp_path, capsys):
    content = (run[0] / "grsd.jsonl").read_bytes()
    records = [k for k, line in enumerate(content.splitlines()) if b'"record"' in line]
    cut = b"\n".join(content.splitlines()[: records[-1]]) + b"\n" + content.splitlines()[records[-1]][:500]
    (tmp_path / "grsd.jsonl").write_bytes(cut)
    assert command("report", tmp_path) == 0
    out = capsys.readouterr().out
    assert "note: the last line is half-written" in out and "step 0 ->" in out


def test_steps_made_again_by_a_resumed_run_count_once(run, tmp_path, capsys):
    content = (run[0] / "grsd.jsonl").read_bytes()
    lines = content.splitlines(keepends=True)
    again = [line for line in lines if 20 <= int(re.match(rb'{"step": (\d+)', line).group(1)) and b'"record"' in line]
    (tmp_path / "grsd.jsonl").write_bytes(content + b"".join(again))
    assert [s.step for s in read_json(tmp_path / "grsd.jsonl").history] == list(range(0, STEPS + 1, EVERY))
    assert command("report", tmp_path) == 0
    assert "made again" in capsys.readouterr().out


def bad_inputs(folder):
    """Name of a bad RUN and what is to be said of it."""
    (folder / "empty").mkdir()
    foreign = folder / "foreign"
    foreign.mkdir()
    (foreign / "other.jsonl").write_text('{"loss": 1.0}\n')
    writer = SummaryWriter(foreign)
    writer.add_scalar("train_loss", 1.0, 0)
    writer.close()
    (folder / "foreign.jsonl").write_text('{"loss": 1.0}\n')
    (folder / "nothing.jsonl").write_text("")
    (folder / "torn.jsonl").write_text('{"step": 3, "scal')
    append_json_line(folder / "format.jsonl", 0, record={"format": 99})
    append_json_line(folder / "shapes.jsonl", 0, record={"format": 1, "step": 0})
    (folder / "events.out.tfevents.1.x").write_bytes(b"not an event file at all")
    return {
        "missing": "does not exist",
        "empty": "holds no run of grsd",
        "foreign": "holds no run of grsd",
        "foreign.jsonl": "was not written by this package",
        "nothing.jsonl": "holds no measurement",
        "torn.jsonl": "holds no measurement",
        "format.jsonl": "not a snapshot of format 1",
        "shapes.jsonl": "snapshot data lacks",
        "events.out.tfevents.1.x": "holds no run of grsd",
    }


def test_bad_runs_are_refused_and_nothing_is_written(run, tmp_path, capsys):
    for name, complaint in bad_inputs(tmp_path).items():
        before = files(tmp_path)
        for words in (["report", tmp_path / name, "--html", tmp_path / "page.html"],
                      ["compare", run[0], tmp_path / name]):  # fmt: skip
            assert command(*words) == 2, name
            captured = capsys.readouterr()
            assert complaint in captured.err and captured.err.startswith(f"grsd {words[0]}: "), name
            assert captured.out == "" and "Traceback" not in captured.err
        assert files(tmp_path) == before, name


def test_page_that_cannot_be_written(run, tmp_path, capsys):
    assert command("report", run[0], "--html", tmp_path / "missing" / "page.html") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_page_without_matplotlib(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert command("report", run[0], "--html", tmp_path / "page.html") == 2
    assert "pip install 'grsd-callbacks[plot]'" in capsys.readouterr().err and not list(tmp_path.iterdir())


# -- compare ---------------------------------------------------------------------------------------------


def test_compare_sets_runs_side_by_side(run, other, capsys):
    assert command("compare", run[0], other[0]) == 0
    out = capsys.readouterr().out
    first, last = read_json(run[0] / "grsd.jsonl"), read_json(other[0] / "grsd.jsonl")
    assert re.search(rf"loss on the probe +{first.history[-1].loss:.4g} +{last.history[-1].loss:.4g}\n", out)
    for fits in (first.fits(), last.fits()):
        for fit in fits.values():
            assert fit.refused or f"{fit.exponent:.3f} [{fit.lower:.3f}, {fit.upper:.3f}]" in out
    difference_of_a = last.fits()["a"].exponent - first.fits()["a"].exponent
    assert re.search(rf"\na +{re.escape(f'{difference_of_a:+.3f}')} \[", out)


def test_compare_shells_line_up_by_eigenvalue(run, other, capsys):
    command("compare", run[0], other[0])
    table = capsys.readouterr().out.split("shell energies at the end")[1].split("\n\n")[0]
    rows = {row.split()[0]: row.split()[1:] for row in table.splitlines()[2:]}
    for k, (_, callback) in enumerate((run, other)):
        last = callback.history[-1]
        for edge, energy in zip(last.edges.tolist(), last.energy[1:].tolist(), strict=True):
            if energy > 0:
                cells = [c for c in rows[f"{edge:.3g}"] if c != "?"]
                assert cells[k] == f"{energy:.3g}"


def test_compare_from_curves_alone(run, killed, capsys):
    assert command("compare", run[0], killed) == 0
    out = capsys.readouterr().out
    assert "curves in float32" in out
    a = run[1].history[-1].exponents["a"]
    assert out.count(f"{a.exponent:.3f} [{a.lower:.3f}, {a.upper:.3f}]") == 2


def test_compare_refuses_different_grids(run, tmp_path, capsys):
    fit(tmp_path, shells_per_decade=4, figures=False)
    assert command("compare", run[0], tmp_path) == 2
    captured = capsys.readouterr()
    assert "runs of different grids" in captured.err and "3 shells a decade" in captured.err and captured.out == ""


def test_compare_refuses_one_run_and_folders_of_several(run, other, tmp_path, capsys):
    assert command("compare", run[0]) == 2
    for name, (folder, _) in (("one", run), ("two", other)):
        os.symlink(folder / "grsd.jsonl", (tmp_path / name).mkdir() or tmp_path / name / "grsd.jsonl")
    assert command("compare", run[0], tmp_path) == 2
    assert "holds 2 runs; name one of them" in capsys.readouterr().err


def test_labels_are_the_shortest_that_tell_runs_apart(tmp_path):
    def logs(*names):
        return [grsd.cli.runlog.RunLog("", tmp_path / name / "version_0" / "grsd.jsonl") for name in names]

    assert labels(logs("sgd", "adam")) == ["sgd", "adam"]
    assert labels(logs("sgd/1", "adam/1")) == ["sgd", "adam"]
    assert len(set(labels(logs("sgd", "sgd")))) == 2


def test_probability_of_a_difference_is_that_of_normal_errors():
    d = difference(Estimate(1.0, 0.9, 1.1), Estimate(1.2, 1.05, 1.35))
    error = math.hypot(0.1, 0.15)
    assert (d.value, d.lower, d.upper) == pytest.approx((0.2, 0.2 - error, 0.2 + error))
    assert d.p == pytest.approx(math.erfc(0.2 / error * 1.959964 / math.sqrt(2)))
    skew = difference(Estimate(0.0, 0.0, 0.0), Estimate(1.0, 0.5, 3.0))  # the side towards zero counts
    assert skew.p == pytest.approx(math.erfc(2 * 1.959964 / math.sqrt(2)))


def test_false_alarms_come_as_often_as_announced():
    draws = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half = 1.959964
    alarms = sum(
        difference(Estimate(x, x - half, x + half), Estimate(y, y - half, y + half)).p < 0.05 for x, y in draws.tolist()
    )
    assert abs(alarms / 4000 - 0.05) < 5 * math.sqrt(0.05 * 0.95 / 4000)


def test_holm_correction():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7])[0] == 1.0
    assert math.isnan(holm([math.nan, 0.01])[0]) and holm([math.nan, 0.01])[1] == 0.01


# -- tags and the program itself -------------------------------------------------------------------------


def test_tags_lists_every_tag_with_unit_and_meaning(capsys):
    assert command("tags") == 0
    out = " ".join(capsys.readouterr().out.split())
    for tag, spec in TAGS.items():
        assert f"{tag} {spec.unit} {spec.meaning[:30]}" in out


def test_python_m_and_the_installed_script_are_the_same_program():
    result = subprocess.run(
        [sys.executable, "-m", "grsd_callbacks", "report", "nowhere"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (2, "") and result.stderr == "grsd report: nowhere does not exist\n"
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert 'grsd = "grsd_callbacks.cli:main"' in pyproject


def test_wrong_words_exit_with_two(capsys):
    for words in ([], ["nothing"], ["report"]):
        with pytest.raises(SystemExit) as caught:
            command(*words)
        assert caught.value.code == 2


# -- beside a RenormalizabilityCallback ------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A run of both monitors, and their summaries."""
    folder = tmp_path_factory.mktemp("both")
    x, y = cases.digits(8)
    x, y, net = x, cases.one_hot(y), cases.mlp(8)
    shells = grsd.ShellMonitor(net, "mse", (x, y), every_n_steps=10, writer=folder / "grsd.jsonl")
    writer = folder / "grsd_renorm.jsonl"
    conditions = grsd.RenormalizabilityMonitor(net, "mse", (x, y), every_n_steps=10, writer=writer)
    for monitor in (shells, conditions):
        monitor.step(0, lr=0.1)
        monitor.finish()
    return folder, shells.summary(), conditions.summary()


def test_report_shows_shells_and_conditions_of_a_run(both, tmp_path, capsys):
    folder, shells, conditions = both
    assert command("report", folder) == 0
    assert capsys.readouterr().out == f"{shells}\n\n{conditions}\n"
    assert command("report", folder / "grsd_renorm.jsonl") == 0
    assert capsys.readouterr().out == conditions + "\n"
    os.link(folder / "grsd_renorm.jsonl", tmp_path / "alone.jsonl")
    assert command("report", tmp_path) == 0
    assert capsys.readouterr().out == conditions + "\n"


def test_compare_takes_the_shells_and_refuses_conditions_alone(both, run, capsys):
    folder, *_ = both
    assert command("compare", folder, run[0]) == 0
    capsys.readouterr()
    assert command("compare", folder / "grsd_renorm.jsonl", run[0]) == 2
    assert "conditions of a run only" in capsys.readouterr().err
