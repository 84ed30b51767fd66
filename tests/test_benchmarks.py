"""The benchmarks run at tiny size without peers, and their JSON has what the tables need."""

import json

import pytest
import torch

from benchmarks import bench_accuracy, bench_conditions, bench_kernel, bench_overhead, bench_products, common, nets
from benchmarks.peers.launch import Worker


@pytest.fixture(autouse=True)
def no_peers(monkeypatch):
    monkeypatch.delenv("GRSD_PEERS_PYTHON", raising=False)
    monkeypatch.delenv("GRSD_JAX_PYTHON", raising=False)


def run(script, tmp_path, *more):
    out = tmp_path / "out.json"
    script.main(["--size", "tiny", "--threads", "1", "--out", str(out), *more])
    found = json.loads(out.read_text())
    assert {"python", "torch", "grsd_callbacks", "threads", "device", "size"} <= set(found["environment"])
    return found["results"]


def test_kernel(tmp_path, capsys):
    methods = ("ours-float32", "tutorial-contraction", "nngeometry", "neural-tangents")
    (found,) = run(bench_kernel, tmp_path, "--cases", "mlp", "--rounds", "2", "--methods", *methods)
    ours, contraction = found["methods"]["ours"], found["methods"]["tutorial-contraction"]
    assert found["m"] == 16 and ours["seconds"] > 0 and ours["peak_bytes"] >= 0 and ours["relative_error"] == 0
    assert contraction["seconds_over_ours"] > 0 and contraction["relative_error"] < 1e-5
    best = found["best_peer"]
    assert best["method"] in ("tutorial-contraction", "nngeometry")
    assert set(best["speed_up"]) == {"ours", "ours-float32"} == set(best["our_memory_over_its"])
    assert best["speed_up"]["ours"] == pytest.approx(found["methods"][best["method"]]["seconds_over_ours"])
    assert 0 < found["methods"]["ours-float32"]["relative_error"] < 1e-5
    shown = capsys.readouterr().out
    for absent in ("nngeometry", "neural-tangents"):
        if found["methods"][absent]["status"] == "not installed":
            assert any(absent in line and "not installed" in line for line in shown.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tutorial-contraction", "tutorial-products"])
@pytest.mark.parametrize("net", ["resnet_gn", "resnet_bn", "gpt"])
def test_tutorials_agree_with_us(net, method, tmp_path, monkeypatch):
    monkeypatch.setitem(bench_kernel.CASES, "tiny", {net: bench_kernel.Case(net, 3, "tiny")})
    (found,) = run(bench_kernel, tmp_path, "--cases", net, "--rounds", "1", "--methods", method)
    assert found["methods"][method]["relative_error"] < 1e-5


def test_products(tmp_path):
    ways = ("ours-auto", "ours-double_backward", "curvlinops")
    (found,) = run(bench_products, tmp_path, "--cases", "mlp", "--rounds", "2", "--methods", *ways)
    auto = found["methods"]["ours-auto"]
    assert auto["product_in_gradients"] > 0 and auto["relative_error"] < 1e-3
    assert auto["set_up_in_gradients"] is not None and set(auto["paths"]) <= set(bench_products.PATHS)
    assert found["methods"]["curvlinops"]["status"] in ("not installed", "done")


def test_accuracy(tmp_path):
    for found in run(bench_accuracy, tmp_path):
        few, many = found["products"]
        assert 0 <= many["total_variation"] <= few["total_variation"] < 1
        assert few["covered"] == many["covered"] == 1
        assert {"total_variation_binned", "unresolved_shells", "covered_strictly", "decades_right"} <= set(many)


def test_accuracy_vanishes_at_full_budget():
    case = bench_accuracy.Case("mlp", 6, 20, 32, "tiny", products=(24,), dtype=torch.float64)
    args = bench_accuracy.common.parser("", "unused").parse_args(["--threads", "1"])
    (found,) = bench_accuracy.measure("mlp", case, args)["products"]
    assert found["total_variation"] < 1e-8


@pytest.mark.parametrize("name", nets.NAMES)
def test_nets(name):
    state = torch.get_rng_state()
    net, data = nets.build(name, "tiny"), nets.batch(name, "tiny", 5)
    before = net(data.inputs)
    assert before.shape[0] == len(data.targets) == 5 and not net.training
    assert torch.isfinite(before).all() and torch.equal(before, nets.build(name, "tiny")(data.inputs))
    losses = [nets.train(net, name, data, 1) for _ in range(2)]
    assert all(loss > 0 for loss in losses) and not net.training
    assert torch.equal(state, torch.get_rng_state())


def test_nets_refuse_unknown_names():
    with pytest.raises(ValueError, match="name must be one of"):
        nets.build("vgg")


def test_unknown_case_is_refused():
    with pytest.raises(ValueError, match="no case matches"):
        common.chosen({"mlp": 1}, ["vgg"])


def test_slow_worker_is_stopped():
    spec = {"net": "mlp", "scale": "tiny", "n": 4, "threads": 1}
    worker = Worker("run_ours", spec, max_seconds=0.0)
    try:
        assert worker.status == "ready"
        assert worker.run() is None and worker.status == "over the cap"
    finally:
        worker.close()


def test_missing_interpreter_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("GRSD_PEERS_PYTHON", str(tmp_path / "python"))
    worker = Worker("run_torchjd", {"net": "mlp", "scale": "tiny", "n": 2})
    assert worker.status == "not installed" and worker.run() is None
    worker.close()


@pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")
def test_conditions(tmp_path):
    found = run(bench_conditions, tmp_path)
    for r in found.values():
        assert r["measured_at"][0] == 0 and r["measured_at"][-1] == r["steps"] == 12
        assert len(r["paired_cpu_percent"]) == len(r["paired_wall_percent"]) == 1
        assert r["overhead_percent"] > 0 and r["final_seconds"] > 0 and len(r["verdicts"]) == 6


@pytest.mark.slow
@pytest.mark.skipif(bench_overhead.num_cores() < 2, reason="needs two cores that a process can be bound to")
def test_overhead_of_runs_side_by_side(tmp_path):
    (found,) = run(bench_overhead, tmp_path, "--cases", "mlp", "--together", "--rounds", "2", "--logdir", str(tmp_path))
    assert found["together"] and found["steps"] == 30 and found["method"] == "exact"
    for key in ("on_cpu_percent", "control_cpu_percent", "on_wall_percent", "reported_percent", "measurements"):
        assert len(found[key]) == 2
    assert min(found["measurements"]) >= 2 and min(found["reported_percent"]) > 0
