"""Which parts of a net are its blocks, and how coherent are their kernels?

    M = sum_l M_l,      C_lm = |J_l^T J_m|_F / (|J_l^T J_l|_F |J_m^T J_m|_F)^(1/2),     |J_l^T J_m|_F^2 = tr(M_l M_m)

Blocks with orthogonal ranges have C_lm = 0, equal kernels C_lm = 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grsd_callbacks.arguments import checked
from grsd_callbacks.exponents.intervals import student_quantile
from grsd_callbacks.gram import Gram, exact_gram
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.memory import row_blocks
from grsd_callbacks.renormalizability.verdicts import Z

#: half-samples of the probe behind an interval
NUM_RESAMPLES = 24
#: what no module can be called
_NO_BLOCK = "."


@dataclass(frozen=True)
class Block:
    """One block of a net.

    Attributes:
        name: of the module.
        parameters: names of its measured parameters, not empty.
        in_sequence: whether it is one of the blocks that follow one another (else it stands beside: stem, head, ...).
    """

    name: str
    parameters: tuple[str, ...]
    in_sequence: bool = True


@checked
def find_blocks(model: nn.Module, names: Sequence[str] | None = None, parameters: Sequence[str] = ()) -> list[Block]:
    """The blocks of a net in order: children of its longest `nn.Sequential` or `nn.ModuleList`.

    Only children that hold measured parameters count; the first of several equally long containers is taken. Without
    any container of two such children, every module with parameters of its own is a block. Parameters outside (stem,
    head, positions) form one more block for each module that holds them, which takes no part in layer-to-layer
    Jacobians.

    Args:
        model: the net.
        names: names of the block modules, as in `model.named_modules()`, in order, instead of finding them.
        parameters: names of the measured parameters; empty for all trainable ones.

    Raises:
        ValueError: a name is no module of the model, holds no measured parameter, or lies inside another block.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> [(block.name, block.parameters) for block in find_blocks(net)]
        [('0', ('0.weight', '0.bias')), ('2', ('2.weight', '2.bias')), ('4', ('4.weight', '4.bias'))]
    """
    measured = list(parameters) or [name for name, p in model.named_parameters() if p.requires_grad]
    chosen = _found(model, measured) if names is None else _named(model, list(names), measured)
    owner: dict[str, str] = {}
    for name in chosen:
        owner.update({p: name for p in measured if _is_inside(p, name)})
    for p in measured:
        owner.setdefault(p, p.rpartition(".")[0])
    order = list(dict.fromkeys(owner[p] for p in measured))
    return [Block(name, tuple(p for p in measured if owner[p] == name), name in chosen) for name in order]


def _is_inside(parameter: str, module: str) -> bool:
    return not module or parameter.startswith(f"{module}.")


def _found(model: nn.Module, measured: list[str]) -> list[str]:
    best: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            children = [f"{path}.{name}" if path else name for name, _ in module.named_children()]
            holding = [child for child in children if any(_is_inside(p, child) for p in measured)]
            best = holding if len(holding) > len(best) else best
    return best if len(best) > 1 else list(dict.fromkeys(p.rpartition(".")[0] for p in measured))


def _named(model: nn.Module, names: list[str], measured: list[str]) -> list[str]:
    known = {path for path, _ in model.named_modules()}
    for name in names:
        if name not in known:
            raise ValueError(f"blocks: {name!r} is no module of {type(model).__name__}; see model.named_modules()")
        if not any(_is_inside(p, name) for p in measured):
            raise ValueError(f"blocks: {name!r} holds no measured parameter")
        if any(other != name and name.startswith(f"{other}.") for other in names):
            raise ValueError(f"blocks: {name!r} lies inside another block; blocks must not overlap")
    return names


class BlockOperator(NTKOperator):
    """An operator whose exact kernel is formed once, with its parts by block, so that `block_kernels` forms none.

    Args:
        model, inputs, options: as for `NTKOperator`.
        blocks: names of the block modules, see `find_blocks`.
    """

    def __init__(self, model: nn.Module, inputs: Any, *, blocks: Sequence[str] | None = None, **options: Any) -> None:
        super().__init__(model, inputs, **options)
        self.blocks = find_blocks(model, blocks, self.parameter_names)
        self._gram: Gram | None = None

    def exact_gram(self, *, memory_limit: int | None = None) -> Gram:
        """As for every operator, with `blocks`: m^2 numbers a block, kept as long as the operator."""
        if self._gram is None:
            limit, sums = memory_limit or self.gram_memory, self.gram_dtype
            owner = _owners(self.blocks)
            self._gram = exact_gram(self.function, self.inputs, memory_limit=limit, blocks=owner, sums=sums)
        return self._gram


def _owners(blocks: Sequence[Block]) -> dict[str, str]:
    """The block of every parameter."""
    return {name: block.name for block in blocks for name in block.parameters}


@checked
def block_kernels(op: NTKOperator, blocks: Sequence[Block]) -> dict[str, Tensor]:
    """J_l J_l^T of every block, float64, shape (m, m); they sum to J J^T exactly if all parameters are in a block.

    Cost: one exact kernel (none where a `BlockOperator` of these blocks has formed it) and m^2 floats a block.
    """
    if isinstance(op, BlockOperator) and op.blocks == list(blocks):
        found = op.exact_gram().blocks or {}
    else:
        owner = {**dict.fromkeys(op.parameter_names, _NO_BLOCK), **_owners(blocks)}
        found = exact_gram(op.function, op.inputs, memory_limit=op.gram_memory, blocks=owner).blocks or {}
    m = op.shape[0]
    nothing = torch.zeros(m, m, dtype=torch.float64, device=op.device)
    return {block.name: found.get(block.name, nothing) for block in blocks}


@dataclass(frozen=True, eq=False)
class BlockIncoherence:
    """How much the kernels of a net's blocks overlap.

    Attributes:
        names: the blocks, L of them, in order.
        coherence: C_lm, shape (L, L), 1 on the diagonal.
        band_profile: mean of C_lm over |l - m| = d, for d = 0, 1, ..., shape (L,).
        mean: of C_lm over l != m.
        decay_length: of exp(-d / length) fitted to C_lm, l != m, in blocks; inf where C does not decay.
        cross_share: `sum_{l != m} tr(M_l M_m) / sum_l |M_l|_F^2`: |M|_F^2 is 1 + this times that of incoherent blocks;
            0 for orthogonal blocks, L - 1 for equal ones; NaN where fewer than two kernels are not zero.
        cross_share_error: its standard error from half-samples of the probe; NaN without.
        null_mean, null_error: mean and standard deviation of the cross share of blocks with the same spectra in
            independent random bases (exact moments for the orthogonal group).
        p_value: of a cross share as large in such random bases (normal approximation).
    """

    names: tuple[str, ...]
    coherence: Tensor
    band_profile: Tensor
    mean: float
    decay_length: float
    cross_share: float
    cross_share_error: float
    null_mean: float
    null_error: float
    p_value: float


@checked
def block_incoherence(
    kernels: Mapping[str, Tensor], *, num_outputs: int = 1, num_resamples: int = 0, seed: int = 0
) -> BlockIncoherence:
    """C_lm of block kernels, its profile over depth distance, and what random bases would give.

    Args:
        kernels: J_l J_l^T by block, in order of depth, shape (m, m), rows sample-major (`block_kernels`); any common
            factor drops out.
        num_outputs: rows per sample, which resampling keeps together.
        num_resamples: half-samples of the probe behind the standard error (delete-half jackknife).
        seed: of the private generator that draws them.

    Raises:
        ValueError: fewer than two blocks, or kernels that are not square and of one size.

    Cost: L^2 m^2 / 2 multiplications, as many for all half-samples together, and L^2 n^2 / 2 for each.

    Example:
        >>> kernels = {"a": torch.diag(torch.tensor([1.0, 0.0])), "b": torch.eye(2)}
        >>> found = block_incoherence(kernels)
        >>> round(found.mean**2, 6), round(found.cross_share, 6)  # tr(M_a M_b) = 1, |M_a|^2 = 1, |M_b|^2 = 2
        (0.707107, 0.666667)
    """
    names, stacked = tuple(kernels), [k.detach().to(torch.float64) for k in kernels.values()]
    if len(names) < 2:
        raise ValueError(f"kernels must hold at least two blocks, got {list(names)}; name them by blocks=")
    m = stacked[0].shape[0]
    if any(k.shape != (m, m) for k in stacked):
        raise ValueError(f"kernels must all have shape ({m}, {m}), got {[tuple(k.shape) for k in stacked]}")
    G = _products(stacked)
    sizes = np.sqrt(np.diag(G))
    safe = np.where(sizes > 0, sizes, np.nan)
    C = np.sqrt(np.maximum(G, 0.0) / np.outer(safe, safe))
    L = len(names)
    profile = [float(np.nanmean(np.diag(C, d))) if np.isfinite(np.diag(C, d)).any() else math.nan for d in range(L)]
    null_mean, null_error = _random_bases(stacked, G)
    share = _cross_share(G)
    return BlockIncoherence(
        names=names,
        coherence=torch.from_numpy(C),
        band_profile=torch.tensor(profile, dtype=torch.float64),
        mean=float(np.nanmean(C[np.triu_indices(L, 1)])) if np.isfinite(C[np.triu_indices(L, 1)]).any() else math.nan,
        decay_length=_decay_length(C),
        cross_share=share,
        cross_share_error=_half_sample_error(stacked, num_outputs, num_resamples, seed),
        null_mean=null_mean,
        null_error=null_error,
        p_value=0.5 * math.erfc((share - null_mean) / null_error / math.sqrt(2)) if null_error > 0 else math.nan,
    )


def _products(kernels: list[Tensor]) -> np.ndarray:
    """tr(M_l M_m), shape (L, L)."""
    total = kernels[0].new_zeros(len(kernels), len(kernels))
    for rows in row_blocks(*kernels[0].shape):
        flat = torch.stack([k[rows].reshape(-1) for k in kernels])
        total += flat @ flat.T
    return total.cpu().numpy()


def _cross_share(G: np.ndarray) -> float:
    """NaN for fewer than two kernels that are not zero (before a head that starts at zero, say): nothing overlaps."""
    own = float(np.trace(G))
    return float(G.sum() - own) / own if (np.diag(G) > 0).sum() > 1 else math.nan


def _decay_length(C: np.ndarray) -> float:
    a, b = np.triu_indices(len(C), 1)
    used = np.isfinite(C[a, b]) & (C[a, b] > 0)
    distance, y = (b - a)[used].astype(float), np.log(C[a, b][used])
    if len(np.unique(distance)) < 2:
        return math.nan
    slope = float(np.polyfit(distance, y, 1)[0])
    return -1 / slope if slope < 0 else math.inf


def _random_bases(kernels: list[Tensor], G: np.ndarray) -> tuple[float, float]:
    """Moments of the cross share for Haar-random bases.

    `E tr(A Q B Q^T) = tr A tr B / m`, variance `2 |A0|^2 |B0|^2 / ((m - 1)(m + 2))` with A0, B0 the traceless parts;
    different pairs are uncorrelated.
    """
    m = kernels[0].shape[0]
    traces = np.array([float(k.trace()) for k in kernels])
    traceless = np.maximum(np.diag(G) - traces**2 / m, 0.0)
    a, b = np.triu_indices(len(kernels), 1)
    mean = 2 * float((traces[a] * traces[b]).sum()) / m
    variance = 4 * float((2 * traceless[a] * traceless[b]).sum()) / max((m - 1) * (m + 2), 1)
    own = float(np.trace(G))
    return (mean / own, math.sqrt(variance) / own) if own > 0 else (math.nan, math.nan)


def _half_sample_error(kernels: list[Tensor], num_outputs: int, num: int, seed: int) -> float:
    if num < 2:
        return math.nan
    m, L = kernels[0].shape[0], len(kernels)
    weights = half_weights(m, num_outputs, num, seed)
    G = np.zeros((num, L, L))
    for a in range(L):
        for b in range(a, L):
            G[:, a, b] = G[:, b, a] = half_products(kernels[a], kernels[b], weights).cpu().numpy()
    return resampled_error([_cross_share(g) for g in G])


def resampled_error(values: Sequence[float]) -> float:
    """Standard error from the values on half-samples, widened by Student's quantile over the normal one.

    A scatter known from few draws needs that: 1.96 such errors then are the 95 % interval. NaN for fewer than two.
    """
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1)) * student_quantile(0.95, len(values) - 1) / Z


def half_samples(m: int, num_outputs: int, num: int, seed: int) -> list[Tensor]:
    """Rows of random halves of the probe's samples: a kernel on them is a principal submatrix, no product is needed.

    The spread of a smooth statistic over halves drawn without replacement is its standard error on the whole (delete-d
    jackknife with d = n / 2, factor 1).

    Raises:
        ValueError: m is not a multiple of num_outputs.
    """
    if num_outputs < 1 or m % num_outputs:
        raise ValueError(f"num_outputs must divide the {m} rows, got {num_outputs!r}")
    n = m // num_outputs
    random = torch.Generator().manual_seed(seed)
    halves = [torch.randperm(n, generator=random)[: max(n // 2, 1)].sort().values for _ in range(num)]
    return [(half[:, None] * num_outputs + torch.arange(num_outputs)).reshape(-1) for half in halves]


def half_weights(m: int, num_outputs: int, num: int, seed: int) -> Tensor:
    """The same halves by sample, 1 inside and 0 outside, shape (num, n), float64."""
    weights = torch.zeros(num, m // max(num_outputs, 1), dtype=torch.float64)
    for row, rows in zip(weights, half_samples(m, num_outputs, num, seed), strict=True):
        row[rows[::num_outputs] // num_outputs] = 1.0
    return weights


def half_products(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """<A, B>_F of the principal submatrices of (m, m) matrices on every half, shape (num,).

    The products are summed over pairs of samples once, so that a half costs n^2 and no submatrix is copied.
    """
    n = weights.shape[1]
    pairs = (a * b).view(n, len(a) // n, n, len(a) // n).sum((1, 3))
    w = weights.to(pairs)
    return (w @ pairs * w).sum(1)
