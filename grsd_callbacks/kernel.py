"""The empirical neural tangent kernel as a linear operator: J V, J^T V and J J^T V without forming J.

    J = d f / d theta  on a batch,  rows sample-major:  row i C + c is output c of sample i
    NTKOperator is J J^T, shape (m, m), m = n C. The kernel of THEORY is M = nu J J^T; nu belongs to the loss.

J^T v is one backward pass over a retained graph. J w is, in this order of preference, whichever is right
(checked by v . M v = |J^T v|^2) and faster: double backward over the same graph, `torch.func.jvp`, central
differences.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grsd_callbacks.functional import ModelFunction, ParameterFilter
from grsd_callbacks.gram import Gram, exact_gram
from grsd_callbacks.losses import wide_dtype
from grsd_callbacks.probe import num_samples, take

T = TypeVar("T")
FORWARD_PATHS = ("double_backward", "forward", "central")
#: largest allowed relative gap |v.Mv - |J^T v|^2| / |J^T v|^2 of a path, by dtype of the products
ADJOINT_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


@dataclass
class _Graph:
    """Retained autograd graph of one chunk of samples."""

    outputs: Tensor
    cotangent: Tensor | None = None
    pulled: list[Tensor] = field(default_factory=list)


class NTKOperator:
    """J J^T of a model on a batch of inputs, by products only.

    Args:
        model: the network; measured as a pure function of copies of its parameters (see `ModelFunction`),
            the module itself is left bit-identical.
        inputs: a tensor (n, ...), a tuple of positional or a mapping of keyword inputs.
        params: which trainable parameters form theta (None: all that require a gradient).
        outputs: picks the output tensor (n, ...) from the model's raw output.
        dtype: dtype of the products; None is the parameters' own (half precision is raised to float32).
        chunk_size: samples per graph; None keeps one graph. Chunks assume that samples do not interact
            (true in eval mode). Results do not depend on it beyond rounding.
        forward: how J w is computed: "auto" (checked and timed once), or one of `FORWARD_PATHS`.
        mode: "eval" or "train": the mode of the modules during the measurement.

    Attributes:
        shape: (m, m).   num_samples: n.   num_outputs: C.   num_parameters: P.   dtype, device.
        num_products: J^T v and J w products so far, in units of kernel products (half each).

    Raises:
        ValueError, TypeError: model without trainable parameters, outputs that are not (n, ...), bad arguments.

    Cost: set-up one forward; J^T v 0.6, J w 0.6-1.4 gradients; memory of the graph plus O(P + m) per vector.

    Accuracy: exact derivatives of the copied model (kinks: autograd's choice); "central" is a difference
        quotient, relative error about 1e-9 in float64 and 1e-4 in float32.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> op = NTKOperator(net, torch.tensor([[3.0, 4.0]]))
        >>> (op @ torch.ones(1)).item()  # f = w.x, so J J^T = |x|^2
        25.0
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        params: ParameterFilter = None,
        outputs: Callable[[Any], Tensor] | None = None,
        dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        forward: str = "auto",
        mode: str = "eval",
    ) -> None:
        if forward not in ("auto", *FORWARD_PATHS):
            raise ValueError(f"forward must be 'auto' or one of {FORWARD_PATHS}, got {forward!r}")
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ValueError(f"chunk_size must be a positive integer or None, got {chunk_size!r}")
        self.function = ModelFunction(model, params=params, outputs=outputs, dtype=dtype, mode=mode)
        self.inputs = inputs
        self.num_samples = num_samples(inputs)
        if self.num_samples == 0:
            raise ValueError("inputs hold no samples: the leading dimension is 0")
        self.chunk_size = min(chunk_size or self.num_samples, self.num_samples)
        self.num_products = 0.0
        self.adjoint_gap = float("nan")
        self.refused: dict[str, str] = {}
        self._forward = None if forward == "auto" else forward
        self._checked = False
        self._graph: _Graph | None = None
        self._outputs: Tensor | None = None

    # -- sizes -------------------------------------------------------------------------------------------

    @property
    def outputs(self) -> Tensor:
        """f on the batch, detached, shape (n, ...)."""
        if self._outputs is None:
            self._outputs = self.run(lambda: torch.cat([self._graph_of(c).outputs.detach() for c in self._chunks()]))
            self._check_rows(self._outputs)
        return self._outputs

    @property
    def num_outputs(self) -> int:
        """C, output values per sample."""
        return self.outputs[0].numel()

    @property
    def shape(self) -> tuple[int, int]:
        """(m, m) with m = n C."""
        m = self.outputs.numel()
        return (m, m)

    @property
    def num_parameters(self) -> int:
        """P, the number of parameters in theta."""
        return self.function.num_parameters

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the products."""
        return self.function.dtype

    @property
    def device(self) -> torch.device:
        """Device of the products."""
        return self.function.device

    @property
    def forward_path(self) -> str:
        """The path J w takes; chosen at its first use."""
        return self.choose_forward()

    def choose_forward(self, *, timed: bool = True) -> str:
        """Choose the path for J w if none is chosen yet: the fastest right one, or untimed the first right one."""
        if self._forward is None:
            self._forward = self.run(lambda: self._choose_forward(timed))
        elif not self._checked:
            self.run(self._check_asked)
        self._checked = True
        return self._forward

    def adopt(self, path: str) -> None:
        """Take a path for J w that has been checked on the same model before."""
        self._forward, self._checked = path, True

    # -- products ----------------------------------------------------------------------------------------

    def vjp(self, V: Tensor) -> Tensor:
        """J^T V: (m,) -> (P,) or (m, k) -> (P, k). One backward pass per column."""
        V = self._vectors(V, self.shape[0], "V")
        return self.run(lambda: _columns(self._vjp, V))

    def jvp(self, W: Tensor) -> Tensor:
        """J W: (P,) -> (m,) or (P, k) -> (m, k)."""
        W = self._vectors(W, self.num_parameters, "W")
        self.forward_path  # noqa: B018  chosen before the loop
        return self.run(lambda: _columns(self._jvp, W))

    def __matmul__(self, V: Tensor) -> Tensor:
        """J J^T V: (m,) -> (m,) or (m, k) -> (m, k)."""
        return self.jvp(self.vjp(V))

    def gram(self, *, memory_limit: int | None = None) -> Tensor:
        """The exact J J^T, shape (m, m), float64, symmetric (see `exact_gram` for cost and accuracy)."""
        return self.exact_gram(memory_limit=memory_limit).matrix

    def exact_gram(self, *, memory_limit: int | None = None) -> Gram:
        """As `gram`, with the paths and checks behind it."""
        limits: dict[str, Any] = {} if memory_limit is None else {"memory_limit": memory_limit}
        return exact_gram(self.function, self.inputs, **limits)

    def release(self) -> None:
        """Drop the retained graph; the next product builds it again, at the same parameters."""
        self._graph = None

    def run(self, function: Callable[[], T]) -> T:
        """Run `function` with the model guarded and the copies in place (one session for many products)."""
        return self.function.run(function)

    def flatten(self, tensors: list[Tensor | None]) -> Tensor:
        """One (P,) vector from one tensor per parameter, in the order of `parameter_names`; None is zero."""
        parts = [
            torch.zeros(p.numel(), dtype=self.dtype, device=self.device) if t is None else t.detach().reshape(-1)
            for t, p in zip(map(_dense, tensors), self.function.parameters.values(), strict=True)
        ]
        return torch.cat(parts)

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Views of a (P,) vector in the parameters' shapes."""
        parameters = self.function.parameters.values()
        return [v.view_as(p) for v, p in zip(vector.split([p.numel() for p in parameters]), parameters, strict=True)]

    @property
    def parameter_names(self) -> list[str]:
        """Names of the parameters in theta, in order."""
        return list(self.function.parameters)

    # -- one column --------------------------------------------------------------------------------------

    def _vjp(self, v: Tensor) -> Tensor:
        self.num_products += 0.5
        leaves = list(self.function.parameters.values())
        total: list[Tensor | None] = [None] * len(leaves)
        for index, part in zip(self._chunks(), self._split(v), strict=True):
            graph = self._graph_of(index)
            grads = torch.autograd.grad(
                graph.outputs, leaves, part.view_as(graph.outputs), retain_graph=True, allow_unused=True
            )
            total = [_plus(a, _dense(b)) for a, b in zip(total, grads, strict=True)]
        return self.flatten(total)

    def _jvp(self, w: Tensor, path: str | None = None) -> Tensor:
        self.num_products += 0.5
        product = {"double_backward": self._jvp_double, "forward": self._jvp_forward, "central": self._jvp_central}
        tangents = self.unflatten(w)
        return torch.cat([product[path or self.forward_path](i, tangents).reshape(-1) for i in self._chunks()])

    def _jvp_double(self, index: slice, tangents: list[Tensor]) -> Tensor:
        """J w = d/dz (w . J^T z): the exact transpose of the backward pass in use."""
        graph = self._pulled(index)
        pairs = [(g, w) for g, w in zip(graph.pulled, tangents, strict=True) if g is not None and g.requires_grad]
        if not pairs or graph.cotangent is None:
            return torch.zeros_like(graph.outputs)
        (product,) = torch.autograd.grad(
            [g for g, _ in pairs], graph.cotangent, [w for _, w in pairs], retain_graph=True
        )
        return product.detach()

    def _pulled(self, index: slice) -> _Graph:
        """The graph of a chunk with J^T z as a differentiable function of z."""
        graph = self._graph_of(index)
        if graph.cotangent is None:
            z = torch.zeros_like(graph.outputs, requires_grad=True)
            leaves = list(self.function.parameters.values())
            pulled = torch.autograd.grad(graph.outputs, leaves, z, create_graph=True, allow_unused=True)
            graph.cotangent, graph.pulled = z, list(pulled)
        return graph

    def _jvp_forward(self, index: slice, tangents: list[Tensor]) -> Tensor:
        names, leaves = zip(*self.function.parameters.items(), strict=True)
        inputs = take(self.inputs, index, self.num_samples)

        def f(*values: Tensor) -> Tensor:
            return self.function.outputs(inputs, dict(zip(names, values, strict=True)))

        primals = tuple(p.detach() for p in leaves)
        with warnings.catch_warnings():  # torch's first forward-mode call warns of its own use of torch.jit
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.func.jvp(f, primals, tuple(tangents))[1].detach()

    def _jvp_central(self, index: slice, tangents: list[Tensor]) -> Tensor:
        """(f(theta + h w) - f(theta - h w)) / 2h, on float64 copies where the model runs in float64."""
        inputs = take(self.inputs, index, self.num_samples)
        size = float(torch.stack([t.norm() for t in tangents]).norm())
        scale = float(torch.stack([p.detach().norm() for p in self.function.parameters.values()]).norm())
        if size == 0.0:
            return torch.zeros_like(self._graph_of(index).outputs)
        relative = max(scale, 1e-3) / size
        try:
            return self._difference(inputs, tangents, 1e-5 * relative, wide_dtype(self.device))
        except (RuntimeError, ValueError):  # casts of its own inside the model
            return self._difference(inputs, tangents, torch.finfo(self.dtype).eps ** (1 / 3) * relative, self.dtype)

    def _difference(self, inputs: Any, tangents: list[Tensor], h: float, dtype: torch.dtype) -> Tensor:
        velocity = dict(zip(self.parameter_names, tangents, strict=True))
        ends = []
        with torch.no_grad():
            for shift in (h, -h):
                function = self.function.moved(velocity, shift, dtype=dtype)
                ends.append(function.run(partial(function.outputs, inputs)).detach())
        return ((ends[0] - ends[1]) / (2 * h)).to(self.dtype)

    # -- choice of the forward path ----------------------------------------------------------------------

    def _choose_forward(self, timed: bool) -> str:
        """The fastest path whose products obey v . M v = |J^T v|^2; why others were refused is kept."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.shape[0], generator=generator, dtype=torch.float64).to(self.device, self.dtype)
        products = self.num_products
        w, backward_seconds = self._timed(lambda: self._vjp(v))
        best: tuple[float, str, float] | None = None
        for path in FORWARD_PATHS:
            if best is not None and (path == "central" or not timed or best[0] <= 1.2 * backward_seconds):
                break
            trial = self._try_path(path, v, w)
            if trial is not None and (best is None or trial[0] < best[0]):
                best = (trial[0], path, trial[1])
        self.num_products = products
        if best is None:
            reasons = "; ".join(f"{path}: {why}" for path, why in self.refused.items())
            raise RuntimeError(f"no way to compute J w for this model ({reasons}); use method='exact'")
        self.adjoint_gap = best[2]
        return best[1]

    def _check_asked(self) -> None:
        """A path the user asked for is taken, but not silently if it is wrong."""
        assert self._forward is not None
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.shape[0], generator=generator, dtype=torch.float64).to(self.device, self.dtype)
        products = self.num_products
        w = self._vjp(v)
        self.adjoint_gap = self._gap(v, w, self._jvp(w, self._forward))  # a path that cannot work raises here
        self.num_products = products
        if not self.adjoint_gap <= ADJOINT_TOLERANCE.get(self.dtype, 1e-3):
            warnings.warn(
                f"J w by forward={self._forward!r} is not the transpose of J^T v on this model "
                f"(gap {self.adjoint_gap:.1e}); use forward='auto'",
                RuntimeWarning,
                stacklevel=2,
            )

    def _gap(self, v: Tensor, w: Tensor, product: Tensor) -> float:
        """Relative gap |v . J w - |w|^2| / |w|^2 for w = J^T v; 0 if w is zero."""
        wide = wide_dtype(w.device)
        squared = float(w.to(wide) @ w.to(wide))
        return abs(float(v.to(wide) @ product.to(wide)) - squared) / squared if squared > 0 else 0.0

    def _try_path(self, path: str, v: Tensor, w: Tensor) -> tuple[float, float] | None:
        """(seconds, adjoint gap) of one product on a path, or None with the reason in `refused`."""
        try:
            if path == "double_backward":
                for index in self._chunks():
                    self._pulled(index)
            elif path == "forward":
                self._jvp(w, path)  # the first call of a process loads decompositions
            product, seconds = self._timed(lambda: self._jvp(w, path))
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            self.refused[path] = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            return None
        gap = self._gap(v, w, product)
        if not gap <= ADJOINT_TOLERANCE.get(self.dtype, 1e-3):
            self.refused[path] = f"J w is not the transpose of J^T v (gap {gap:.1e})"
            return None
        return seconds, gap

    def _timed(self, function: Callable[[], T]) -> tuple[T, float]:
        synchronise(self.device)
        start = time.perf_counter()
        result = function()
        synchronise(self.device)
        return result, time.perf_counter() - start

    # -- chunks and graphs -------------------------------------------------------------------------------

    def _chunks(self) -> list[slice]:
        n, size = self.num_samples, self.chunk_size
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]

    def _split(self, v: Tensor) -> list[Tensor]:
        width = self.num_outputs
        return list(v.split([(c.stop - c.start) * width for c in self._chunks()]))

    def _graph_of(self, index: slice) -> _Graph:
        """The retained graph when all samples are in one chunk, else a fresh one per product."""
        whole = self.chunk_size >= self.num_samples
        if whole and self._graph is not None:
            return self._graph
        f = self.function.outputs(take(self.inputs, index, self.num_samples))
        graph = _Graph(f)
        if not f.requires_grad:
            raise ValueError("outputs do not depend on the selected parameters (detached, or under no_grad?)")
        if whole:
            self._graph = graph
        return graph

    def _check_rows(self, f: Tensor) -> None:
        if f.shape[0] != self.num_samples:
            raise ValueError(
                f"outputs must have one row per sample: inputs have {self.num_samples} samples, "
                f"the model returned shape {tuple(f.shape)}"
            )

    def _vectors(self, V: Tensor, rows: int, name: str) -> Tensor:
        if not isinstance(V, Tensor) or V.dim() not in (1, 2) or V.shape[0] != rows:
            got = tuple(V.shape) if isinstance(V, Tensor) else type(V).__name__
            raise ValueError(f"{name} must be a tensor of shape ({rows},) or ({rows}, k), got {got}")
        return V.detach().to(self.device, self.dtype)


def _columns(product: Callable[[Tensor], Tensor], V: Tensor) -> Tensor:
    if V.dim() == 1:
        return product(V)
    return torch.stack([product(column) for column in V.unbind(1)], dim=1)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _dense(gradient: Tensor | None) -> Tensor | None:
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that wall-clock times mean something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
