"""What TensorBoard really shows of a run, in a real browser (Chromium, without a window).

Needs a `chromium` (or `google-chrome`) on the PATH; set GRSD_SCREENSHOTS=folder to keep a picture of every page.
"""

import os
import warnings
from pathlib import Path

import browser
import pytest
from test_cli import fit

from grsd_callbacks.tags import HISTOGRAMS, MAIN_EXPONENTS, layout

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:grsd. measuring every"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A function that opens one page of TensorBoard on a small run's logs, and the run's callback."""
    path = browser.find_chromium()
    if path is None:
        reason = f"NO BROWSER TEST WAS RUN: none of {', '.join(browser.NAMES)} is installed"
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("logs")
    callback = fit(folder, figures_every_n_steps=20)
    with browser.tensorboard(folder) as address, browser.Browser(path) as tab:

        def show(plugin, ready, what):
            tab.open(f"{address}/#{plugin}")
            tab.wait_for(lambda: ready(tab), what)
            if "GRSD_SCREENSHOTS" in os.environ:
                Path(os.environ["GRSD_SCREENSHOTS"]).mkdir(parents=True, exist_ok=True)
                tab.screenshot(Path(os.environ["GRSD_SCREENSHOTS"]) / f"{plugin}.png")
            return tab

        yield show, callback


def drawn_lines(tab):
    """How many curves have been drawn with more than one point (icons are paths too, but of no such class)."""
    return sum("L" in (d or "") for d in tab.all("path.line", "e.getAttribute('d')"))


def test_scalars(page):
    show, callback = page
    tab = show("scalars", lambda t: "grsd_bands" in t.text() and drawn_lines(t) > 4, "scalar charts")
    text = tab.text()
    for group in ("grsd_bands", "grsd_closure", "grsd_exponents", "grsd_health", "grsd_loss", "grsd_regime",
                  "grsd_shell_energy", "grsd_spectrum", "grsd_time", "grsd_work"):  # fmt: skip
        assert group in text, group


def test_time_series_draws_the_last_value(page):
    show, callback = page
    tab = show("timeseries", lambda t: "grsd_bands /a_lower" in t.text() and "Smoothed" in t.text(), "cards")
    last = callback.history[-1]
    assert str(round(last.exponents["a"].lower, 4)) in tab.text() and f"{last.step}" in tab.text()


def was_fitted(callback, name):
    """Whether the run has ever had this exponent."""
    return any(name in s.exponents and not s.exponents[name].refused for s in callback.history)


def test_custom_scalars_open_in_our_order(page):
    show, callback = page
    titles = [title for category in layout().values() for title in category]
    tab = show("custom_scalars", lambda t: t.text().count("Matches (") >= 10 and drawn_lines(t) > 15, "charts")
    text = tab.text()
    places = [text.index(category) for category in layout()]
    assert places == sorted(places)
    bands = [text.index(f" {name}: ") for name in MAIN_EXPONENTS]
    assert bands == sorted(bands), "margin charts: a, q, chi, rho, rho_contour"
    assert all(title in text for title in titles)
    refused = [name for name in MAIN_EXPONENTS if not was_fitted(callback, name)]
    assert text.count("Matches (0)") == len(refused), "every chart but those of refused exponents has a curve"
    areas = tab.all(".area", "e.getAttribute('d')")
    assert sum(len(area or "") > 20 for area in areas) >= 1, "an interval is drawn as a band"


def test_images_are_shown_whole(page):
    show, _ = page
    wide = "e.complete ? e.naturalWidth + 'x' + e.naturalHeight : ''"

    def loaded(tab):
        return tab.all("img", wide).count("640x480") >= 7

    tab = show("images", loaded, "seven figures")
    text = tab.text()
    for name in ("dissipation", "effective_lr", "energy", "flux", "loss", "spectrum", "verdict"):
        assert f"grsd_figures/{name}" in text
    sliders = tab.all("paper-slider#steps", "getComputedStyle(e).display != 'none' && e.max")
    assert sliders.count(2) >= 7, "figures of steps 20, 40 and 60 to slide between"


def test_histograms(page):
    show, _ = page
    tab = show("histograms", lambda t: len(t.all(".histogram")) >= 12, "histograms")
    text = tab.text()
    for tag in HISTOGRAMS:
        assert tag in text
    assert "histogram is empty" not in text.lower()
    outlines = [d for d in tab.all(".histogram path, path.outline", "e.getAttribute('d')") if d]
    assert outlines and not any("NaN" in d for d in outlines)


def test_texts(page):
    show, callback = page
    tab = show("text", lambda t: all(w in t.text() for w in ("closures", "J w", "L on the probe")), "cards")
    text = tab.text()
    assert "exponents, 95 % intervals" in text, "the summary"
    assert "shell dynamics of the empirical NTK" in text, "the report"
    assert "L on the probe" in text, "the meaning of tags"
    row = next(line for line in callback.summary().splitlines() if line.strip().startswith("s"))
    assert " ".join(row.split()) in text, "with the numbers of the callback's own summary"
    cells = tab.all("td")
    assert "grsd_loss/probe" in [c.strip() for c in cells], "the meaning is a table"
