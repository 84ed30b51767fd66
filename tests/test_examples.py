"""Every example runs, small, and prints what it promises."""

import importlib.util
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
EXAMPLES = {path.stem for path in (ROOT / "examples").glob("*.py")}


def load(folder, name):
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_by_a_test():
    assert EXAMPLES == {"digits", "picture"}, "a new example: run it in this file (picture: tests/test_figures.py)"


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


@pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")
def test_overhead_benchmark_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    bench = load("benchmarks", "bench_overhead")
    out = tmp_path / "overhead.json"
    record = bench.main(["--size", "tiny", "--logdir", str(tmp_path / "logs"), "--out", str(out)])
    assert set(record["results"]) == {"squared", "cross_entropy"} and out.exists()
    for found in record["results"].values():
        assert found["reported_overhead_percent"] > 0 and found["measurements"] == [3]
