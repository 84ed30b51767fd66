"""Figures show the snapshot's own numbers, without warnings, whatever the run; and they leave matplotlib alone."""

import importlib.util
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from known_runs import train

from grsd_callbacks import figures
from grsd_callbacks import testing as known
from grsd_callbacks.exponents import fit_loss, fit_spectrum, frontier
from grsd_callbacks.figures.history import is_log_spaced
from grsd_callbacks.shells import ShellGrid
from grsd_callbacks.snapshot import Snapshot
from grsd_callbacks.testing import CovariantChain

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("matplotlib.image")

ROOT = Path(__file__).parent.parent
CHAIN = CovariantChain(num_modes=24)
GRID = ShellGrid.logarithmic(1e-6, 10.0, per_decade=2)
MAPS = [figures.energy_map, figures.dissipation_map, figures.flux_map, figures.effective_lr_map]
DRAWN_FROM_HISTORY = [*MAPS, figures.spectrum_figure, figures.loss_figure, figures.overview]
LOG_STEPS = [0, 1, 2, 3, 5, 8, 13, 20, 32, 50, 79, 126, 200, 316, 501, 1000]


def snapshot(step, lr=0.1, krylov=False):
    """The exact chain at flow time lr * step."""
    t, edges = lr * step, GRID.edges
    energy, dissipation = CHAIN.energy(t, edges), CHAIN.dissipation(t, edges)
    flux = CHAIN.flux(t, edges) if step else torch.full((len(edges),), torch.nan, dtype=torch.float64)
    values, g = CHAIN.modes(t)
    order = values.argsort(descending=True)
    ones = torch.ones_like(energy)
    resolved = energy >= 0
    if krylov:
        resolved[:10] = False
    spread = [torch.stack([x * resolved, x + 4 * x * ~resolved]) for x in (energy, dissipation)]
    rates = torch.linspace(-1, 5, len(ones)).double()
    return Snapshot(
        step=step, flow_time=t, loss=float(energy.sum()), grad_norm_sq=float(dissipation.sum()), nu=1.0,
        num_samples=24, num_outputs=1, method="krylov" if krylov else "exact", edges=edges, energy=energy,
        dissipation=dissipation, counts=CHAIN.counts(t, edges).double(), energy_bounds=spread[0],
        dissipation_bounds=spread[1], count_bounds=torch.stack([ones, ones]),
        resolved=resolved, eigenvalues=values[order], weights=g[order] ** 2 if krylov else None, frozen_energy=energy,
        transport=torch.zeros_like(energy), flux=flux, work=dissipation, effective_lr=rates,
        summary={"lambda_max": float(values.max()), "floor": 1e-9, "lr": lr},
        reasons={} if step else {"flux": "first measurement"},
    )  # fmt: skip


def run(steps=LOG_STEPS, **options):
    return [snapshot(step, **options) for step in steps]


def draw(figure):
    """Render, with every warning an error, and hand the figure on."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()
    return figure


def rendered(figure):
    """As `draw`, without the layout, which takes as long again: for what does not depend on where things are."""
    figure.set_layout_engine("none")
    return draw(figure)


def mesh_of(figure):
    return next(c for c in figure.axes[0].collections if type(c).__name__ == "QuadMesh")


def values_of(figure, shape):
    return np.ma.filled(mesh_of(figure).get_array().reshape(shape).astype(float), np.nan)


def limits_of(figure):
    corners = mesh_of(figure).get_coordinates()
    return corners[0, :, 0], corners[:, 0, 1]


def line(figure, label, axes=0):
    return next(x for x in figure.axes[axes].lines if str(x.get_label()).startswith(label))


def texts(figure):
    return [t.get_text() for axes in figure.axes for t in axes.texts]


def labels(figure):
    return figure.axes[0].get_legend_handles_labels()[1]


def stacked(history, name):
    return np.stack([getattr(s, name).numpy() for s in history], axis=1)


# -- the numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", ["step", "flow_time"])
@pytest.mark.parametrize("make, name", [(figures.energy_map, "energy"), (figures.dissipation_map, "dissipation")])
def test_maps_show_the_shells_and_leave_out_what_is_negligible(make, name, time):
    history = run()
    figure = rendered(make(history, time=time))
    expected = stacked(history, name)
    expected = np.where(expected > 1e-6 * expected.sum(0), expected, np.nan)
    np.testing.assert_array_equal(values_of(figure, expected.shape), expected)
    x, y = limits_of(figure)
    np.testing.assert_array_equal(y[1:-1], GRID.edges.numpy())
    positions = np.array([getattr(s, time) for s in history])
    assert (x[:-1] < positions).all() and (positions < x[1:]).all()


def test_flux_cells_are_the_intervals_between_measurements_and_centred_on_edges():
    history = run()
    history[5] = replace(history[5], flux=history[5].flux * torch.nan, reasons={"flux": "resumed"})
    figure = rendered(figures.flux_map(history))
    expected = stacked(history, "flux")[:, 1:]
    np.testing.assert_array_equal(values_of(figure, expected.shape), expected)
    x, y = limits_of(figure)
    assert x.tolist() == [s.step for s in history]
    np.testing.assert_array_equal(y, GRID.centers.numpy())
    assert "upward" in figure.axes[0].get_title(loc="left") and "no number (break in the run)" in labels(figure)


def test_upward_flux_is_red_and_downward_blue_with_white_at_zero():
    history = run([0, 1, 2])
    values = torch.zeros_like(history[1].flux)
    values[3], values[4] = 1.0, -1.0
    mesh = mesh_of(rendered(figures.flux_map([history[0], *(replace(s, flux=values) for s in history[1:])])))
    assert mesh.norm.vmin == -mesh.norm.vmax
    red, blue, white = (mesh.to_rgba(x) for x in (1.0, -1.0, 0.0))
    assert red[0] > red[2] and blue[2] > blue[0] and min(white[:3]) > 0.9


def test_effective_rates_are_symmetric_around_one_and_negative_ones_are_crossed():
    history = run()
    figure = rendered(figures.effective_lr_map(history))
    expected = stacked(history, "effective_lr")
    np.testing.assert_array_equal(values_of(figure, expected.shape), np.where(expected > 0, expected, np.nan))
    norm = mesh_of(figure).norm
    assert norm.vmin * norm.vmax == pytest.approx(1) and norm(1.0) == pytest.approx(0.5)
    (crossed,) = (c for c in figure.axes[0].collections if type(c).__name__ == "PolyCollection")
    assert len(crossed.get_paths()) == (expected[:, 0] <= 0).sum()  # a row's neighbours are one rectangle


def test_the_energy_map_carries_frontier_and_lambda_max():
    history = run()
    figure = rendered(figures.energy_map(history))
    median = frontier(GRID.edges.numpy(), stacked(history, "frozen_energy").T)
    assert np.isfinite(median).any()
    np.testing.assert_array_equal(line(figure, "frontier").get_ydata(), median)
    largest = [s.summary["lambda_max"] for s in history]
    np.testing.assert_array_equal(line(figure, r"$\lambda_{\max}$").get_ydata(), largest)


@pytest.mark.parametrize("make", [figures.energy_map, figures.dissipation_map])
def test_unresolved_shells_are_hatched(make):
    assert "not resolved" in labels(rendered(make(run(krylov=True))))
    assert "not resolved" not in labels(rendered(make(run())))


def hatched(figure):
    """Lower and upper limits of the hatched rectangles."""
    found = [c for c in figure.axes[0].collections if type(c).__name__ == "PolyCollection"]
    corners = [path.vertices[:, 1] for c in found for path in c.get_paths()]
    return sorted({(float(y.min()), float(y.max())) for y in corners})


def rows_of(mask):
    """The same of the shells in a mask."""
    edges = GRID.edges.numpy()
    limits = np.concatenate([[edges[0] ** 2 / edges[1]], edges, [edges[-1] ** 2 / edges[-2]]])
    return [(pytest.approx(limits[a]), pytest.approx(limits[a + 1])) for a in np.flatnonzero(mask)]


@pytest.mark.parametrize("edge", [2, 11])
def test_dissipation_below_the_floor_of_a_kernel_is_hatched_however_narrow_its_bounds(edge):
    """With the shells whose bounds are wide, here that of the largest D, and no others; krylov has no such floor."""
    history, floor = run([0, 1]), float(GRID.edges[edge])
    D, shells = history[1].dissipation, np.arange(GRID.num_shells)
    top = int(D.argmax())
    last = {"dissipation_bounds": torch.stack([D, D + 4 * D * (D == D.max())]), "summary": {"floor": floor}}
    assert top > 11
    for method, below in (("lanczos", shells <= edge), ("krylov", shells < 0)):
        past = [replace(history[0], method=method), replace(history[1], method=method, **last)]
        assert hatched(rendered(figures.dissipation_map(past))) == rows_of(below | (shells == top))


def test_without_bounds_dissipation_is_hatched_as_energy_is():
    unknown = torch.full((2, GRID.num_shells), torch.nan, dtype=torch.float64)
    resolved = torch.arange(GRID.num_shells) >= 5
    bounds = {"energy_bounds": unknown, "dissipation_bounds": unknown}
    past = [replace(s, method="randomized", resolved=resolved, **bounds) for s in run([0, 1])]
    expected = rows_of(~resolved.numpy())
    for make in (figures.energy_map, figures.dissipation_map):
        assert hatched(rendered(make(past))) == expected


def test_the_spectrum_shows_both_ends_and_the_law_in_its_window():
    history = run()
    fit = fit_spectrum(np.arange(1, 201) ** -1.5)
    figure = rendered(figures.spectrum_figure(history, fit))
    for s in (history[0], history[-1]):
        drawn = line(figure, f"step {s.step}")
        np.testing.assert_array_equal(drawn.get_xdata(), np.arange(1, 25))
        np.testing.assert_array_equal(drawn.get_ydata(), s.eigenvalues.numpy())
    law = line(figure, r"$\lambda_i")
    x, y = law.get_data()
    assert (x[0], x[-1]) == pytest.approx(fit.window)
    np.testing.assert_allclose(y, x**-1.5)
    assert "a = 1.50" in law.get_label() and "95 %" in law.get_label()


def test_krylov_spectra_show_nodes_and_the_energy_of_each():
    history = run(krylov=True)
    drawn = line(rendered(figures.spectrum_figure(history)), "step 1000")
    np.testing.assert_array_equal(drawn.get_xdata(), history[-1].eigenvalues.numpy())
    np.testing.assert_array_equal(drawn.get_ydata(), history[-1].weights.numpy() / 2)
    assert history[-1].weights.sum() / 2 == pytest.approx(history[-1].loss)


def test_rounding_below_the_floor_is_marked():
    history = [replace(s, eigenvalues=torch.cat([s.eigenvalues, torch.tensor([1e-20, -1e-21])])) for s in run()]
    assert "below rounding" in labels(rendered(figures.spectrum_figure(history)))
    assert "below rounding" not in labels(rendered(figures.spectrum_figure(run())))


def test_the_loss_and_its_gradient_are_drawn_against_flow_time_with_chi():
    history = run()
    t = np.logspace(-1, 2, 40)
    fit = fit_loss(t, 2 * t**-0.5)
    figure = rendered(figures.loss_figure(history, fit))
    left, right = figure.axes
    np.testing.assert_array_equal(left.lines[0].get_xdata(), [s.flow_time for s in history[1:]])
    np.testing.assert_array_equal(left.lines[0].get_ydata(), [s.loss for s in history[1:]])
    np.testing.assert_array_equal(right.lines[0].get_ydata(), [s.grad_norm_sq for s in history[1:]])
    assert line(figure, "loss at the start").get_ydata()[0] == history[0].loss
    assert "= 0.50" in line(figure, r"$L \sim").get_label()
    assert left.get_xscale() == left.get_yscale() == right.get_yscale() == "log"


def test_a_refused_fit_says_why():
    refused = fit_loss([1.0, 2.0], [1.0, 0.5])
    assert refused.refused
    figure = rendered(figures.loss_figure(run(), refused))
    assert any("not fitted" in text for text in labels(figure))


def test_fits_default_to_those_of_the_last_measurement():
    history = run()
    history[-1] = replace(history[-1], exponents={"a": fit_spectrum(np.arange(1, 201) ** -1.25)})
    assert any("a = 1.25" in text for text in labels(rendered(figures.spectrum_figure(history))))


def test_transfer_rows_gain_from_columns():
    matrix = CHAIN.transfer(1.0, GRID.edges)
    figure = rendered(figures.transfer_figure(matrix, GRID))
    np.testing.assert_array_equal(values_of(figure, matrix.shape), matrix.numpy())
    axes = figure.axes[0]
    assert "giver" in axes.get_xlabel() and "receiver" in axes.get_ylabel()
    assert mesh_of(figure).norm.vmin == -mesh_of(figure).norm.vmax


# -- whatever the run --------------------------------------------------------------------------------------------


def all_nan(history):
    return [replace(s, flux=s.flux * torch.nan, effective_lr=s.effective_lr * torch.nan) for s in history]


def all_zero(history):
    empty = {name: 0 * getattr(history[0], name) for name in ("energy", "dissipation", "frozen_energy", "eigenvalues")}
    return [replace(s, loss=0.0, grad_norm_sq=0.0, flux=0 * s.energy[1:], summary={}, **empty) for s in history]


def broken(history):
    nan = {name: getattr(history[0], name) * torch.nan for name in ("energy", "dissipation", "frozen_energy", "flux")}
    return [replace(s, loss=float("nan"), grad_norm_sq=float("nan"), **nan) for s in history]


CASES = {
    "one": run([0]),
    "one, later": run([700]),
    "two": run([0, 1]),
    "three": run([0, 1, 1000]),
    "log-spaced": run(),
    "even, 100": run(range(0, 1000, 10)),
    "pairs": run([step + k for step in range(0, 300, 50) for k in (0, 1)]),
    "without the start": run(LOG_STEPS[4:]),
    "krylov": run(krylov=True),
    "krylov, one": run([0], krylov=True),
    "no flow time": run(lr=0.0),
    "tiny flow time": run(lr=1e-9),
    "nothing known": all_nan(run()),
    "nothing there": all_zero(run()),
    "nothing there, one": all_zero(run([0])),
    "all NaN": broken(run()),
}


@pytest.mark.parametrize("history", CASES.values(), ids=CASES)
def test_every_run_is_drawn_without_a_warning(history):
    figure = draw(figures.overview(history))  # draws what the others draw
    assert len([axes for axes in figure.axes if axes.get_title(loc="left")]) == 6
    assert figure.canvas.get_width_height() == (1620, 920)


@pytest.mark.parametrize("make", [*MAPS, figures.spectrum_figure, figures.loss_figure], ids=lambda make: make.__name__)
def test_figures_have_the_size_of_tensorboard(make):
    assert draw(make(run([0, 1]))).canvas.get_width_height() == (640, 480)


@pytest.mark.parametrize("name", ["log-spaced", "no flow time", "tiny flow time", "one"])
def test_flow_time_can_be_the_axis_even_where_none_has_passed(name):
    figure = rendered(figures.overview(CASES[name], time="flow_time"))
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left").startswith("Shell energy")]
    left, right = axes.get_xlim()
    assert axes.get_xlabel().startswith("flow time") and np.isfinite([left, right]).all() and left < right


def test_empty_maps_say_why():
    assert any("first measurement" in t for t in texts(rendered(figures.flux_map(run([0])))))
    assert any("optimizer step" in t for t in texts(rendered(figures.effective_lr_map(CASES["nothing known"]))))
    assert any("every shell is empty" in t for t in texts(rendered(figures.energy_map(CASES["nothing there"]))))
    assert any("no flow time" in t for t in texts(rendered(figures.loss_figure(run([0])))))


@pytest.mark.parametrize("matrix", [torch.zeros(16, 16), torch.full((16, 16), torch.nan)])
def test_transfer_matrices_without_transfer(matrix):
    assert len(GRID.edges) == 15
    np.testing.assert_array_equal(values_of(rendered(figures.transfer_figure(matrix, GRID)), (16, 16)), matrix.numpy())


@pytest.mark.parametrize(
    "steps, expected",
    [(LOG_STEPS[1:], True), (range(10, 1000, 10), False), ([1, 2, 3, 4, 5, 6], False), ([1, 2], False),
     ([s + k for s in range(1, 500, 50) for k in (0, 1)], False)],
)  # fmt: skip
def test_the_axis_is_logarithmic_where_the_steps_are(steps, expected):
    assert is_log_spaced(np.array(steps, dtype=float)) is expected


def test_log_spaced_cells_meet_halfway_on_the_axis():
    x, _ = limits_of(rendered(figures.energy_map(run([0, 1, 10, 100, 1000]))))
    np.testing.assert_allclose(x, [-0.5, 0.5, 10**0.5, 10**1.5, 10**2.5, 10**3.5])


# -- readable ----------------------------------------------------------------------------------------------------


def test_text_is_large_enough_and_axes_have_units():
    figure = rendered(figures.overview(run()))
    for text in figure.findobj(matplotlib.text.Text):
        assert not text.get_text() or text.get_fontsize() >= 9, text.get_text()
    for axes in figure.axes:
        assert axes.get_ylabel() and (axes.get_xlabel() or not axes.get_title(loc="left"))


@pytest.mark.parametrize("make", DRAWN_FROM_HISTORY, ids=lambda make: make.__name__)
@pytest.mark.parametrize("krylov", [False, True])
def test_legends_stay_inside_their_axes(make, krylov):
    figure = draw(make(run(krylov=krylov)))
    for axes in figure.axes:
        if axes.get_legend() is not None:
            inner, outer = axes.get_legend().get_window_extent(), axes.get_window_extent()
            assert outer.x0 <= inner.x0 and inner.x1 <= outer.x1 and outer.y0 <= inner.y0 and inner.y1 <= outer.y1


def test_a_dark_style_changes_neither_white_for_zero_nor_dark_lines():
    with matplotlib.rc_context({"axes.facecolor": "black", "figure.facecolor": "black", "text.color": "white"}):
        figure = rendered(figures.overview(run()))
    for axes in figure.axes:
        if axes.get_title(loc="left"):
            assert matplotlib.colors.to_hex(axes.get_facecolor()) == "#ffffff"


# -- wrong use ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", DRAWN_FROM_HISTORY, ids=lambda make: make.__name__)
def test_an_empty_history_is_refused(make):
    with pytest.raises(ValueError, match="at least one measurement"):
        make([])


def test_histories_that_are_not_one_run_are_refused():
    with pytest.raises(ValueError, match="in order"):
        figures.energy_map(run([5, 3]))
    other = replace(snapshot(10), edges=2 * GRID.edges)
    with pytest.raises(ValueError, match="same shells"):
        figures.energy_map([snapshot(0), other])
    with pytest.raises(ValueError, match="time must be one of"):
        figures.energy_map(run([0]), time="epoch")


def test_matrices_that_are_no_transfer_are_refused():
    with pytest.raises(ValueError, match=r"shape \(16, 16\), got \(3, 3\)"):
        figures.transfer_figure(torch.zeros(3, 3), GRID)
    with pytest.raises(ValueError, match="antisymmetric"):
        figures.transfer_figure(torch.ones(16, 16), GRID)


# -- the verdict -------------------------------------------------------------------------------------------------


def card(history, fits=None):
    """Name, value, comment and mark of every line, in the order drawn."""
    texts = [t.get_text() for t in draw(figures.verdict_figure(history, fits)).axes[0].texts]
    return {name: (value, comment, mark) for name, value, comment, mark in zip(*(texts[k::4] for k in range(4)))}


def test_verdict_says_what_each_number_deserves():
    good = fit_loss(np.geomspace(1, 1e3, 30), np.geomspace(1, 1e3, 30) ** -0.5)
    lines = card(run(), {"chi": good})
    value, comment, mark = lines[r"$L \sim t^{-\chi}$"]
    assert value.startswith("0.50  [") and comment == "power law" and mark == "\u2713"
    assert lines[r"$\lambda_i \sim i^{-a}$"] == ("not fitted", "not known", "\u2013")


def test_verdict_marks_what_does_not_hold():
    history = run()
    last = replace(
        history[-1],
        closures={"dissipation": 0.2, "energy": 1e-9},
        health={"lr_lambda_max": 3.0, "unresolved_energy": 0.5, "nominal_flow_time": 1.0, "failed": 2.0},
    )
    lines = card([*history[:-1], last])
    assert lines[r"$\Sigma D = |\nabla L|^2$"] == ("2e-01", "does not close", "!")
    assert lines[r"lr $\lambda_{\max}$, largest"] == ("3", "above 2", "!")
    assert lines["energy not resolved"] == ("50.0 %", "much", "!")
    assert lines["flow time"] == ("nominal", "no true t", "!")
    assert lines["failed measurements"][0] == "2"
    assert lines[r"$\Sigma E = L$"][1] in ("closes", "does not close")


# -- tags --------------------------------------------------------------------------------------------------------

TAGS = ["energy", "dissipation", "flux", "spectrum", "effective_lr", "loss", "verdict"]


def test_figures_of_a_run_by_tag():
    history = run()
    drawn = figures.run_figures(history, {"chi": fit_loss([1.0, 2.0], [1.0, 0.5])})
    assert list(drawn) == [f"grsd_figures/{name}" for name in TAGS]
    assert set(drawn) < set(figures.FIGURES)
    history.clear()  # a run goes on; these figures do not change
    for make in drawn.values():
        draw(make())
    assert any("not fitted" in text for text in labels(drawn["grsd_figures/loss"]()))


def test_the_latest_transfer_is_among_them_where_it_was_measured():
    history = run([0, 1, 2])
    history[:2] = [replace(s, transfer=k * CHAIN.transfer(1.0, GRID.edges)) for k, s in enumerate(history[:2], 1)]
    drawn = figures.run_figures(history)
    assert set(drawn) == set(figures.FIGURES) - {"grsd_figures/collapse"}
    figure = rendered(drawn["grsd_figures/transfer"]())
    np.testing.assert_array_equal(values_of(figure, (16, 16)), history[1].transfer.numpy())


def test_the_collapse_is_drawn_with_its_score_where_the_loss_has_an_exponent():
    monitor = train(known.PowerLawKernel(60, 2.0, 2.2), 0.2, 300, per_decade=10)
    fits = monitor.final_exponents()
    figure = draw(figures.run_figures(monitor.history, fits)["grsd_figures/collapse"]())
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert sum("score" in text and "times permuted" in text for text in texts) == 2
    alone = draw(figures.collapse_figure(monitor.history[:3], fits))
    assert any("no collapse" in text.get_text() for axes in alone.axes for text in axes.texts)


def test_nothing_is_drawn_of_nothing():
    assert figures.run_figures([]) == {}


def test_every_tag_has_unit_and_meaning():
    assert all(tag.startswith("grsd_figures/") and unit and meaning for tag, (unit, meaning) in figures.FIGURES.items())


# -- the picture of the README -----------------------------------------------------------------------------------


def test_the_example_writes_its_picture(tmp_path):
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("picture", ROOT / "examples" / "picture.py")
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    out = tmp_path / "new" / "picture.png"
    assert picture.main(["--out", str(out), "--steps", "4", "--num-probe", "6", "--width", "8"]) == out
    assert matplotlib.image.imread(out).shape[:2] == (920, 1620)


# -- matplotlib is left alone ------------------------------------------------------------------------------------

SETUP = f"""
import sys, warnings
warnings.simplefilter("error")
sys.path.insert(0, {str(ROOT / "tests")!r})
"""


def run_python(code):
    result = subprocess.run(
        [sys.executable, "-c", SETUP + code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_pyplot_rcparams_and_backend_are_untouched():
    code = """
import matplotlib
matplotlib.use("svg")
before = dict(matplotlib.rcParams)
import test_figures as t
for make in t.figures.run_figures(t.run()).values(): t.rendered(make())
t.draw(t.figures.overview(t.run()))
print("matplotlib.pyplot" in sys.modules, dict(matplotlib.rcParams) == before, matplotlib.get_backend())
"""
    assert run_python(code) == ["False", "True", "svg"]


def test_without_matplotlib_there_are_no_figures_and_one_warning():
    code = """
import pickle
sys.modules["matplotlib"] = None
from grsd_callbacks import figures
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = [figures.run_figures([object()]) for _ in range(3)]
print(found == [{}, {}, {}], len(caught), caught[0].category.__name__, issubclass(caught[0].category, UserWarning))
assert "pip install 'grsd-callbacks[plot]'" in str(caught[0].message)
try:
    figures.drawing.new_figure()
except ImportError as error:
    print("pip" in str(error))
"""
    assert run_python(code) == ["True", "1", "FigureWarning", "True", "True"]
