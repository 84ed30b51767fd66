"""Systems with exactly known kernel spectra and dynamics, and dense oracles, to test a measuring tool against.

Every system answers the same questions at a flow time ``t``, in float64 on the CPU: ``kernel``, ``kernel_velocity``,
``residual``, ``spectrum``, ``energy``, ``dissipation``, ``counts``, ``loss`` and ``flux``; those that are networks also
give ``model()``, ``inputs`` and ``targets``, which ``nn.MSELoss()`` trains with the stated dynamics (``nu = 2/m``).

Conventions: residual ``r = sqrt(nu) (f - y)``, kernel ``M = nu J J^T``, rows sample-major; flow time is the sum of
learning rates, so ``r' = -M r``; ``edges`` are the inner shell edges (eigenvalues), so B edges make B + 1 shells, the
first below ``edges[0]`` and the last above ``edges[-1]``, every shell closed at its lower end; flux is counted positive
upward (towards larger eigenvalues) and ``E_a' = -D_a + J_a - J_{a+1}``.
"""

from .dense import dense_jacobian, dense_kernel, exact_flux, exact_transfer, smooth_flux
from .feature_learning import FeatureState, TwoLayerFeatureLearning
from .lazy import ConstantKernel, PowerLawKernel
from .linear_net import TwoLayerLinear
from .nulls import FrozenFeatures, rotate_outputs
from .products import DiagonalLinear, ScalarProduct
from .regression import PowerLawRandomFeatures, RidgelessRegression
from .rotation import CovariantChain, RotatingPair
from .system import FixedBasis, MonotoneDrift, RotatingFrame, System
from .transport import TransportKernel
from .windows import shell_counts, shell_windows

__all__ = [
    "ConstantKernel",
    "CovariantChain",
    "DiagonalLinear",
    "FeatureState",
    "FixedBasis",
    "FrozenFeatures",
    "MonotoneDrift",
    "PowerLawKernel",
    "PowerLawRandomFeatures",
    "RidgelessRegression",
    "RotatingFrame",
    "RotatingPair",
    "ScalarProduct",
    "System",
    "TransportKernel",
    "TwoLayerFeatureLearning",
    "TwoLayerLinear",
    "dense_jacobian",
    "dense_kernel",
    "exact_flux",
    "exact_transfer",
    "rotate_outputs",
    "shell_counts",
    "shell_windows",
    "smooth_flux",
]
