"""Every example runs, small, and prints what it promises."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
EXAMPLES = {path.stem for path in (ROOT / "examples").glob("*.py")}
TESTS = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
SMALL = pytest.mark.filterwarnings("ignore:grsd. measuring every")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def load(folder, name):
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_by_a_test():
    missing = [name for name in EXAMPLES if f'"examples", "{name}"' not in TESTS and f"{name}.py" not in TESTS]
    assert not missing, f"{missing}: run it small in this file (or in a test file of its own)"


def closed(history, tolerance=1e-4):
    return max(abs(s.closures["dissipation"]) for s in history) < tolerance


@SMALL
def test_custom_loop(tmp_path, capsys):
    monitor = load("examples", "custom_loop").main(["--steps", "30", "--logdir", str(tmp_path)])
    assert monitor.num_failed == 0 and monitor.history[-1].step == 30 and closed(monitor.history)
    assert (tmp_path / "grsd.jsonl").exists() and list(tmp_path.glob("events*"))
    assert "exponents, 95 % intervals" in capsys.readouterr().out


@SMALL
def test_gpt_on_our_own_documentation(tmp_path, capsys):
    words = ["--steps", "12", "--context", "16", "--samples", "3", "--logdir", str(tmp_path)]
    monitor = load("examples", "gpt").main(words)
    assert monitor.num_failed == 0 and closed(monitor.history)
    assert monitor.history[-1].loss < monitor.history[0].loss
    assert monitor.history[0].num_outputs > 60, "the characters of the README"


@SMALL
def test_hugging_face_model_from_its_config():
    monitor = load("examples", "hugging_face").main(["--steps", "8"])
    assert monitor.num_failed == 0 and closed(monitor.history) and monitor.history[0].num_outputs == 16


@SMALL
def test_resume(tmp_path, monkeypatch, capsys, unrendered):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    callback = load("examples", "resume").main(["--steps", "40", "--logdir", str(tmp_path)])
    steps = [s.step for s in callback.history]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == 40
    unknown = [s.reasons["flux"] for s in callback.history if not s.flux.isfinite().all()]
    assert unknown == ["first measurement", "first measurement after a resume"]
    assert {float(s.edges[0]) for s in callback.history} == {float(callback.history[0].edges[0])}


@SMALL
def test_checkpoints(tmp_path, capsys):
    assert load("examples", "checkpoints").main(["--steps", "16", "--logdir", str(tmp_path)]) == 0
    assert "6 checkpoints" in capsys.readouterr().out and (tmp_path / "grsd.jsonl").exists()


@SMALL
def test_optimizers(tmp_path, capsys):
    found = load("examples", "optimizers").main(["--steps", "20", "--out", str(tmp_path / "o.png")])
    assert {"SGD", "Adam"} <= set(found) and ("Muon" in found) == hasattr(torch.optim, "Muon")
    assert all(rate == pytest.approx(1, abs=0.02) for rate in found["SGD"].values()), "exact for gradient descent"
    assert max(found["Adam"].values()) > 2 * min(found["Adam"].values())
    assert (tmp_path / "o.png").stat().st_size > 5000


def test_tutorial_draws_its_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    callback = load("examples", "tutorial").main(["--steps", "40", "--out", str(tmp_path)])
    assert closed(callback.history) and callback.monitor.num_failed == 0 and callback.history[-1].step == 40
    page = (ROOT / "docs" / "tutorial.md").read_text()
    shown = set(re.findall(r"\(tutorial/(\w+\.png)\)", page))
    kept = {path.name for path in (ROOT / "docs" / "tutorial").iterdir()}
    assert shown == kept <= {path.name for path in tmp_path.iterdir()}, "the page shows what the script draws"
    assert "exponents, 95 % intervals" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")
@pytest.mark.filterwarnings("ignore:grsd. measuring every")
def test_demo(tmp_path, capsys):
    callbacks = load("examples", "digits").main(
        ["--steps", "30", "--every-n-steps", "10", "--quiet", "--logdir", str(tmp_path)]
    )
    printed = capsys.readouterr().out
    for promised in ("shells of M", "exponents, 95 % intervals", "closures", "% of the training time", "tensorboard"):
        assert promised in printed
    for name, callback in callbacks.items():
        assert [s.step for s in callback.history] == [0, 10, 20, 30] and callback.monitor.num_failed == 0
        assert max(abs(s.closures["dissipation"]) for s in callback.history) < 1e-5
        events = EventAccumulator(str(tmp_path / name / "version_0")).Reload()
        assert [e.step for e in events.Scalars("grsd_loss/probe")] == [0, 10, 20, 30]
        assert {"grsd_figures/energy", "grsd_figures/flux"} <= set(events.Tags()["images"])
    squared = callbacks["squared"].history
    assert max(abs(s.closures["energy"]) for s in squared) < 1e-6


def test_compression(capsys):
    found = load("examples", "compression").main(["--samples", "12", "--width", "32", "--steps", "60"])
    printed = capsys.readouterr().out
    for promised in ("pi_c of L_prune", "chi / pi_c", "bits   loss", "energy a mode over lambda"):
        assert promised in printed
    assert abs(found["rounding"].step.exponent - 2) < 0.3
    losses = found["pruning"].loss
    assert len(losses) == 119 and losses[-1] > losses[0]  # forgetting all but one mode costs most


def test_scaling_law(capsys):
    arguments = ["--modes", "80", "--sizes", "3", "4", "6", "9", "14", "20", "--steps", "400"]
    found = load("examples", "scaling_law").main(arguments)
    printed = capsys.readouterr().out
    assert "foretold by one" in printed and "compute-optimal size" in printed
    for name in ("size", "time", "compute"):
        foretold, exact = getattr(found["laws"], name), getattr(found["exact"], name)
        assert abs(foretold.value - exact.value) < 0.1 * exact.value
    assert abs(found["fits"]["compute"].exponent - found["exact"].compute.value) < 0.1


@pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")
def test_overhead_benchmark_runs(tmp_path, monkeypatch, unrendered):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    bench = load("benchmarks", "bench_overhead")
    out = tmp_path / "overhead.json"
    record = bench.main(["--size", "tiny", "--logdir", str(tmp_path / "logs"), "--out", str(out)])
    assert [found["case"] for found in record["results"]] == ["mlp", "resnet"] and out.exists()
    for found in record["results"]:
        assert found["reported_percent"][0] > 0 and found["measurements"] == [3]
        assert len(found["on_cpu_percent"]) == len(found["control_cpu_percent"]) == 1
