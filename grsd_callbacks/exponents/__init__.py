"""Exponents one can believe: power laws with intervals that cover and verdicts that can be "no".

Numbers in, small frozen records out; numpy only. Wrong use raises; too little data gives a record with NaN and a
reason.

| question | function | exponent returned |
|---|---|---|
| is y a power of x? | `fit_power_law` | slope (negative for decay) |
| how fast does the spectrum fall? | `fit_spectrum` | a of `lambda_i ~ i^-a`, positive |
| how heavy is the tail of its density? | `fit_tail` | alpha of `p ~ lambda^-alpha`, positive |
| how many eigenvalues does a shell hold? | `fit_counts` | n of `N_a ~ lambda^-n`, positive |
| how is energy spread over scales? | `fit_energy` | q of `E_a ~ lambda^q` |
| how fast does the loss fall? | `fit_loss`, `local_slope` | chi of `L ~ t^-chi`, positive (local slope: negative) |
| what does a finite probe hide? | `energy_tail`, `finite_size_bias`, `unbiased_scale` | |
| where is the frontier? | `frontier`, `progress_contour`, `shell_labels`, `resolved_modes` | (a lambda, a number) |
| how fast does it move? | `elasticity` | rho of `lambda* ~ t^-rho`, positive |
| how do modes drift? | `velocity_exponents` | b, p of `v = c lambda^b t^p` |
| is there a floor? | `fit_scaling_law` | alpha of `A x^-alpha + floor`, positive |
| what does forgetting weak modes cost? | `compression_exponents` | pi_c of `L_prune ~ lambda_c^pi_c`, positive |
| what would larger runs do? | `resource_laws` | of the loss over parameters, time, compute, positive |
| are all times one curve? | `self_similar_collapse` | (a score) |
| do they fit together? | `closure`, `combine` | (a difference) |
"""

from .collapse import Collapse, self_similar_collapse
from .compression import Compression, compression_exponents
from .dynamics import elasticity, fit_loss, local_slope
from .finite_size import energy_tail, finite_size_bias, unbiased_scale
from .frozen import frontier, progress_contour, resolved_modes, shell_labels
from .powerlaw import fit_power_law
from .records import Closure, Estimate, PowerLawFit, VelocityExponents
from .resources import ResourceLaws, resource_laws
from .scaling import closure, combine, fit_scaling_law
from .spectrum import fit_counts, fit_energy, fit_spectrum
from .tail import fit_tail
from .velocity import velocity_exponents

__all__ = [
    "Closure",
    "Collapse",
    "Compression",
    "Estimate",
    "PowerLawFit",
    "ResourceLaws",
    "VelocityExponents",
    "closure",
    "combine",
    "compression_exponents",
    "elasticity",
    "energy_tail",
    "finite_size_bias",
    "fit_counts",
    "fit_energy",
    "fit_loss",
    "fit_power_law",
    "fit_scaling_law",
    "fit_spectrum",
    "fit_tail",
    "frontier",
    "local_slope",
    "progress_contour",
    "resolved_modes",
    "resource_laws",
    "self_similar_collapse",
    "shell_labels",
    "unbiased_scale",
    "velocity_exponents",
]
