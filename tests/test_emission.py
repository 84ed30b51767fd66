"""What a run writes: the exact list of (tag, step), the values at those weights, and the axis they stand on."""

import re
from functools import partial

import lightning_cases as cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.func import functional_call, jacrev

from grsd_callbacks import ShellDynamicsCallback, read_json_lines, tags

pytestmark = pytest.mark.usefixtures("unrendered")  # but for the run that is looked at closely
NUM, LR = 16, 0.5

# A run of 4 full-batch steps, measured every second step: the step at which each curve has its points.
ALL, LATER, STEPS = [0, 2, 4], [2, 4], [0, 2]
GOLDEN = {
    "grsd_bands/a_lower": ALL,
    "grsd_bands/a_upper": ALL,
    "grsd_bands/q_lower": ALL,
    "grsd_bands/q_upper": ALL,
    "grsd_closure/budget": LATER,
    "grsd_closure/dissipation": ALL,
    "grsd_closure/energy": ALL,
    "grsd_closure/probe": STEPS,
    "grsd_closure/transport": LATER,
    "grsd_exponents/a": ALL,
    "grsd_exponents/q": ALL,
    "grsd_health/coverage": LATER,
    "grsd_health/estimated_regime": ALL,
    "grsd_health/failed": ALL,
    "grsd_health/lr_lambda_max": ALL,
    "grsd_health/nominal_flow_time": ALL,
    "grsd_health/overhead_percent": LATER,
    "grsd_health/unresolved_energy": ALL,
    "grsd_loss/grad_norm_sq": ALL,
    "grsd_loss/probe": ALL,
    "grsd_position/reach": ALL,
    "grsd_position/relative": ALL,
    "grsd_regime/cka_distance": ALL,
    "grsd_regime/frozen_kernel_share": LATER,
    "grsd_regime/kernel_drift": ALL,
    "grsd_regime/target_alignment": ALL,
    "grsd_regime/transport_ratio": LATER,
    **{f"grsd_shell_energy/s{a:02d}": ALL for a in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15)},
    "grsd_shell_energy/s13": [0, 2],  # its only eigenvalue then leaves
    "grsd_spectrum/effective_rank": ALL,
    "grsd_spectrum/lambda_max": ALL,
    "grsd_spectrum/mean_eigenvalue": ALL,
    "grsd_time/flow_time": ALL,
    "grsd_work/effective_lr": STEPS,
    "grsd_work/total": STEPS,
}
# kept in JSON lines and callback_metrics, not drawn
KEPT = {
    "grsd_bands/count_lower": [4],
    "grsd_bands/count_upper": [4],
    "grsd_exponents/count": [4],
    **{f"grsd_final/{name}{end}": [4] for name in ("a", "a_start", "count", "q") for end in ("", "_lower", "_upper")},
    "grsd_health/estimated_position": ALL,
    "grsd_health/frozen_coverage": ALL,
    "grsd_health/gradient_free_parameters": ALL,
    "grsd_health/seconds": ALL,
    "grsd_health/unstable": ALL,
    "grsd_position/rank": ALL,
    "grsd_position/reach_rank": ALL,
    "grsd_position/resolved_modes": LATER,
    "grsd_position/to_mean": ALL,
    "grsd_spectrum/trace": ALL,
    "grsd_spectrum/trace_error": ALL,
    "grsd_time/lr": ALL,
}
TEXTS = {"grsd_run/tags": [0], "grsd_run/report": [0], "grsd_run/summary": [4]}
DRAWN = ("dissipation", "effective_lr", "energy", "flux", "loss", "spectrum", "verdict")
FIGURES = {f"grsd_figures/{name}": [4] for name in DRAWN}
LAYOUT = "custom_scalars__config__"
HISTOGRAMS = {f"grsd_histograms/{name}": ALL for name in ("count", "energy", "dissipation")}


def full_batch(folder, callbacks, *, max_epochs=4, **options):
    """Regression on all of its data in float64: what is measured is what is trained on."""
    cases.seed()
    x, y = cases.digits(NUM, torch.float64)
    module = cases.Module(cases.mlp(dtype=torch.float64), nn.MSELoss(), partial(torch.optim.SGD, lr=LR))
    data = cases.loader(x, cases.one_hot(y, torch.float64), NUM, shuffle=False)
    return cases.fit(module, data, folder, callbacks, max_epochs=max_epochs, **options)


def callback(**options):
    return ShellDynamicsCallback(**{"num_probe": NUM, "every_n_steps": 2, **options})


def events(trainer):
    sizes = {"scalars": 0, "tensors": 0, "histograms": 0, "images": 0}
    return EventAccumulator(trainer.log_dir, size_guidance=sizes).Reload()


def curve(read, tag):
    return {event.step: event.value for event in read.Scalars(tag)}


def oracle(state):
    """loss, |grad L|^2, eigenvalues and squared coefficients at given weights, by jacrev."""
    x, y = cases.digits(NUM, torch.float64)
    net = cases.mlp(dtype=torch.float64)
    theta = {name.removeprefix("net."): value for name, value in state.items()}
    f = functional_call(net, theta, x)
    jacobian = jacrev(lambda p: functional_call(net, p, x))(theta)
    J = torch.cat([part.reshape(f.numel(), -1) for part in jacobian.values()], 1)
    nu = 2 / f.numel()
    r = nu**0.5 * (f - cases.one_hot(y, torch.float64)).reshape(-1)
    eigenvalues, vectors = torch.linalg.eigh(nu * J @ J.T)
    loss = F.mse_loss(f, cases.one_hot(y, torch.float64))
    return loss.item(), (nu * (J.T @ r) @ (J.T @ r)).item(), eigenvalues.numpy(), ((vectors.T @ r) ** 2).numpy()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    weights, ours = cases.Weights(), callback()
    trainer = full_batch(folder, [weights, ours], logger=TensorBoardLogger(folder))
    return trainer, ours, weights, events(trainer)


def test_golden_list_of_tags_and_steps(run):
    read = run[3]
    found = {tag: sorted(curve(read, tag)) for tag in read.Tags()["scalars"] if tag.startswith("grsd_")}
    assert found == GOLDEN
    counts = {tag: len(read.Scalars(tag)) for tag in found}
    assert counts == {tag: len(steps) for tag, steps in GOLDEN.items()}  # nothing is written twice


def test_golden_list_of_what_is_kept_but_not_drawn(run):
    """A run draws about 60 curves at most; the rest is in the JSON lines and in the metrics."""
    trainer, ours, *_ = run
    lines = read_json_lines(f"{trainer.log_dir}/grsd.jsonl")
    found = {}
    for line in lines:
        for tag in line.get("scalars", {}):
            found.setdefault(tag, set()).add(line["step"])
    assert {tag: sorted(steps) for tag, steps in found.items()} == {**GOLDEN, **KEPT}
    assert KEPT.keys() <= trainer.callback_metrics.keys()
    assert not any(tag in tags.KEPT for tag in GOLDEN) and len(GOLDEN) <= 60
    most = [tag for tag in tags.TAGS if tag not in tags.KEPT and tag not in tags.TRANSFER_TAGS]
    assert len(most) <= 42, "of the longest run, shells and grsd_work aside"


def test_golden_list_of_texts_histograms_and_figures(run):
    read = run[3]
    tensors = {tag.removesuffix("/text_summary"): [e.step for e in read.Tensors(tag)] for tag in read.Tags()["tensors"]}
    assert tensors == {**TEXTS, LAYOUT: [0]}
    assert {tag: [e.step for e in read.Histograms(tag)] for tag in read.Tags()["histograms"]} == HISTOGRAMS
    assert {tag: [e.step for e in read.Images(tag)] for tag in read.Tags()["images"]} == FIGURES


def test_every_tag_is_explained(run):
    card = tags.meaning_card()
    for tag in [*GOLDEN, *KEPT, *HISTOGRAMS, *FIGURES]:
        general = re.sub("^grsd_final/.*", "grsd_final/<exponent>", re.sub("/s[0-9]+$", "/<shell>", tag))
        assert f"`{general}`" in card
    text = run[3].Tensors("grsd_run/tags/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == card


@pytest.mark.parametrize("step", ALL)
def test_values_are_those_of_the_weights_at_that_step(run, step):
    """Everything on disk against an independent jacrev; curves are float32 there."""
    trainer, ours, weights, read = run
    loss, grad_norm_sq, eigenvalues, g2 = oracle(weights.at[step])
    edges = ours.history[0].edges.numpy()
    shell = np.searchsorted(edges, eigenvalues, side="right")
    expected = {
        "grsd_loss/probe": loss,
        "grsd_loss/grad_norm_sq": grad_norm_sq,
        "grsd_spectrum/lambda_max": eigenvalues[-1],
        "grsd_spectrum/effective_rank": eigenvalues.sum() ** 2 / (eigenvalues**2).sum(),
        "grsd_spectrum/mean_eigenvalue": (eigenvalues**2 @ g2) / (eigenvalues @ g2),
        "grsd_health/lr_lambda_max": LR * eigenvalues[-1],
        "grsd_time/flow_time": LR * step,
        **{f"grsd_shell_energy/s{a:02d}": 0.5 * g2[shell == a + 1].sum() for a in range(3, 16) if (a, step) != (13, 4)},
    }
    assert {tag: curve(read, tag)[step] for tag in expected} == pytest.approx(expected, rel=1e-6)
    kept = next(line for line in read_json_lines(f"{trainer.log_dir}/grsd.jsonl") if line["step"] == step)
    assert kept["scalars"]["grsd_spectrum/trace"] == pytest.approx(eigenvalues.sum(), rel=1e-10)


def test_json_lines_hold_every_digit(run):
    trainer, ours, weights, _ = run
    lines = read_json_lines(f"{trainer.log_dir}/grsd.jsonl")
    records = {line["step"]: line["record"] for line in lines if "record" in line}  # the later line is complete
    assert sorted(records) == ALL
    for snapshot in ours.history:
        record = records[snapshot.step]
        loss, grad_norm_sq, eigenvalues, _ = oracle(weights.at[snapshot.step])
        assert record["loss"] == snapshot.loss == pytest.approx(loss, rel=1e-12)
        assert sum(record["dissipation"]) == pytest.approx(grad_norm_sq, rel=1e-10)
        assert record["eigenvalues"] == pytest.approx(eigenvalues[::-1].tolist(), rel=1e-9, abs=1e-14)
        assert record["effective_lr"] == pytest.approx(snapshot.effective_lr.tolist(), nan_ok=True, rel=0)


def test_axis_is_the_users_own(run):
    """train_loss by self.log and our probe loss are of the same weights wherever they share an x."""
    theirs, ours = curve(run[3], "train_loss"), curve(run[3], "grsd_loss/probe")
    assert sorted(theirs) == [0, 1, 2, 3] and sorted(ours) == ALL
    assert {step: theirs[step] for step in STEPS} == {step: ours[step] for step in STEPS}


def test_first_measurement_is_before_the_first_step(run):
    cases.seed()
    net = cases.mlp(dtype=torch.float64)
    assert run[1].history[0].loss == pytest.approx(oracle(net.state_dict())[0], rel=1e-12)


def test_axis_under_accumulation_counts_optimizer_steps(tmp_path):
    ours = callback(every_n_steps=1, num_probe=8)
    cases.seed()
    module = cases.Module(cases.mlp(), nn.CrossEntropyLoss())
    weights = cases.Weights()
    cases.fit(module, cases.classes(), tmp_path, [weights, ours], accumulate_grad_batches=2)
    assert [s.step for s in ours.history] == sorted(weights.at) == [0, 1, 2, 3, 4]


def test_axis_of_manual_optimization_counts_batches_as_their_curves_do(tmp_path):
    ours = ShellDynamicsCallback(loss="mse", unpack=lambda b: (b[0], b[0]), num_probe=2, every_n_steps=3)
    cases.seed()
    trainer = cases.fit(cases.Adversarial(), cases.classes(), tmp_path, [ours], logger=TensorBoardLogger(tmp_path))
    assert trainer.global_step == 16
    assert sorted(curve(events(trainer), "train_loss")) == list(range(8))
    assert [s.step for s in ours.history] == [0, 3, 6, 8]
    assert sorted(curve(events(trainer), "grsd_loss/probe")) == [0, 3, 6, 8]


@pytest.mark.filterwarnings("ignore:The number of training batches .1. is smaller than the logging interval")
def test_log_every_n_steps_drops_none_of_ours(tmp_path):
    ours = callback()
    trainer = full_batch(tmp_path, [ours], logger=TensorBoardLogger(tmp_path), log_every_n_steps=3)
    assert sorted(curve(events(trainer), "train_loss")) == [2]
    assert sorted(curve(events(trainer), "grsd_loss/probe")) == ALL


def test_csv_logger_gets_every_scalar(tmp_path, run):
    ours = callback()
    trainer = full_batch(tmp_path, [ours], logger=CSVLogger(tmp_path))
    found = {}
    for tag, step, _ in cases.csv_cells(trainer, ours=True):
        found.setdefault(tag, []).append(step)
    assert found == GOLDEN
    losses = {step: float(text) for tag, step, text in cases.csv_cells(trainer, ours=True) if tag == "grsd_loss/probe"}
    assert losses == {s.step: s.loss for s in run[1].history}


def test_every_logger_present_gets_its_share(tmp_path):
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tensorboard")]
    trainer = full_batch(tmp_path, [callback()], logger=loggers)
    assert sorted({tag for tag, _, _ in cases.csv_cells(trainer, ours=True)}) == sorted(GOLDEN)
    read = EventAccumulator(loggers[1].log_dir).Reload()
    assert {t for t in read.Tags()["scalars"] if t.startswith("grsd_")} == set(GOLDEN)


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": True}])
def test_without_a_logger_there_is_history_and_no_file(tmp_path, options):
    ours = callback()
    full_batch(tmp_path, [ours], **options)
    assert [s.step for s in ours.history] == ([0, 1] if "fast_dev_run" in options else ALL)
    assert ours.monitor.num_failed == 0 and "sum E = L" in ours.summary()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_json_lines_go_where_they_are_sent(tmp_path):
    full_batch(tmp_path, [callback(json_lines=str(tmp_path / "here" / "x.jsonl"))])
    assert {line["step"] for line in read_json_lines(tmp_path / "here" / "x.jsonl")} == set(ALL)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["x.jsonl"]


def test_nothing_goes_through_self_log(tmp_path):
    trainer = full_batch(tmp_path, [callback()], logger=CSVLogger(tmp_path))
    theirs = sorted(name for name in trainer.callback_metrics if not name.startswith("grsd_"))  # ours are a mirror
    assert theirs == sorted(trainer.logged_metrics) == ["train_loss"]


def test_two_callbacks_side_by_side(tmp_path):
    """Tags are prefixed by the names, and both states are in the checkpoint."""
    plain, other = callback(), callback(name="deep", shells_per_decade=1, every_n_steps=4)
    trainer = full_batch(tmp_path, [plain, other], logger=TensorBoardLogger(tmp_path))
    read = events(trainer)
    assert sorted(curve(read, "grsd_loss/probe")) == ALL and sorted(curve(read, "grsd_deep_loss/probe")) == [0, 4]
    assert {t for t in read.Tags()["scalars"] if t.startswith("grsd_") and "_deep_" not in t} == set(GOLDEN)
    assert {t for t in read.Tags()["tensors"] if "deep" in t} == {f"grsd_deep_run/{t[9:]}/text_summary" for t in TEXTS}
    for name, steps in (("grsd.jsonl", ALL), ("grsd_deep.jsonl", [0, 4])):
        assert sorted({line["step"] for line in read_json_lines(f"{trainer.log_dir}/{name}")}) == steps
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    states = torch.load(path, weights_only=True)["callbacks"]
    assert {key: len(states[key]["run"]["history"]) for key in (plain.state_key, other.state_key)} == {
        "ShellDynamicsCallback": 3,
        "ShellDynamicsCallback[deep]": 2,
    }


def test_two_callbacks_of_one_name_are_refused_by_the_trainer(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        cases.quiet_trainer(tmp_path, [callback(), callback()])
