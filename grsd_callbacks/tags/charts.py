"""Tags under another prefix than `grsd_`, and the charts that TensorBoard opens with."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from grsd_callbacks.emission import Emission
from grsd_callbacks.tags.definitions import EXPONENTS, MAIN_EXPONENTS, SHELL_ENERGY, WORK


def layout(prefix: str = "grsd_") -> dict[str, Any]:
    """TensorBoard custom-scalars layout: what is learning, the exponents with their bands, the regime, the checks."""

    def lines(*tags: str) -> list[Any]:
        return ["Multiline", [re.escape(_with(prefix, tag)) + "$" for tag in tags]]

    def bands(names: Iterable[str]) -> dict[str, list[Any]]:
        tags = {n: (f"grsd_exponents/{n}", f"grsd_bands/{n}_lower", f"grsd_bands/{n}_upper") for n in names}
        drawn = {f"{n}: {EXPONENTS[n]}": ["Margin", [_with(prefix, tag) for tag in tags[n]]] for n in tags}
        return dict(reversed(drawn.items()))  # TensorBoard shows margin charts in reverse

    first = prefix.rstrip("_")
    return {
        f"{first} 1: what is learning": {
            "loss on the probe (loss)": lines("grsd_loss/probe"),
            "energy of each shell (loss)": ["Multiline", [_with(prefix, f"{SHELL_ENERGY}/s.*")]],
            "largest and mean eigenvalue (1 / flow time)": lines(
                "grsd_spectrum/lambda_max", "grsd_spectrum/mean_eigenvalue"
            ),
        },
        f"{first} 2: exponents, bands are 95 % intervals": bands(MAIN_EXPONENTS),
        f"{first} 3: lazy or rich": {
            "transport over dissipation (0: lazy)": lines("grsd_regime/transport_ratio"),
            "change of the kernel since the start": lines("grsd_regime/kernel_drift", "grsd_regime/cka_distance"),
            "effective learning rate (1: full-batch descent)": lines(f"{WORK}/effective_lr"),
        },
        f"{first} 4: can I trust it": {
            "identities (rounding is about 1e-7)": lines("grsd_closure/energy", "grsd_closure/dissipation"),
            "lr x lambda_max (above 2: no gradient flow)": lines("grsd_health/lr_lambda_max"),
            "time spent on measuring (%)": lines("grsd_health/overhead_percent"),
        },
    }


def renamed(emission: Emission, prefix: str) -> Emission:
    """The same emission with tags that begin with another prefix than `grsd_`."""

    def names(values: dict[str, Any]) -> dict[str, Any]:
        return {_with(prefix, tag): value for tag, value in values.items()}

    return replace(
        emission,
        scalars=names(emission.scalars),
        kept=names(emission.kept),
        histograms=names(emission.histograms),
        texts=names(emission.texts),
        figures=names(emission.figures),
    )


def _with(prefix: str, tag: str) -> str:
    return prefix + tag.removeprefix("grsd_")
