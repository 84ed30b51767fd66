"""Layers whose per-sample gradients have structure: what one call of a layer adds to a row of J.

    dW of output c on sample i  =  sum_t  right[i, c, t] (x) left[i, t]

`left` is known from the forward (inputs, patches, tokens), `right` from the gradient at the layer's output.
Biases and the weights of norms have rows of their own, one number per channel.

Letters: n samples, k outputs (columns) at once, T positions, G groups, p and q the sizes of the two factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from grsd_callbacks.factors import products
from grsd_callbacks.patches import padding, windows


class Call:
    """One call of one layer, recorded in a forward.

    Attributes:
        names: the parameter each role ("weight", "bias") goes by, of those that are measured.
        edge: where the gradient of the layer's raw output arrives.
        layout: (outer, inner): positions that vary slower and faster than the sample index.
        active: positions with a gradient at all (None: all of them).
        T, G, p, q: sizes of the factors, all positions counted.
    """

    path = ""
    T = G = p = q = 1
    #: weight[first axis] is the q axis (Linear, Conv) or the p axis (transposed Conv, Embedding)
    q_first = True

    def __init__(self, module: Any, names: dict[str, str], x: Tensor, output: Tensor) -> None:
        self.module = module
        self.names = names
        self.input = x.detach()
        self.version = _version(x)
        self.shape = output.shape
        self.features = tuple(x.shape[len(self.lead()) :])
        self.edge: GradientEdge | None = get_gradient_edge(output)
        self.layout = (1, 1)
        self.active: Tensor | None = None

    @property
    def unchanged(self) -> bool:
        """Whether the recorded input still holds the values the layer saw."""
        return self.version == _version(self.input)

    @property
    def output_edge(self) -> GradientEdge:
        """`edge`, while the graph is kept."""
        assert self.edge is not None, "the graph was released"
        return self.edge

    @property
    def positions(self) -> int:
        """Positions with a gradient."""
        return self.T if self.active is None else len(self.active)

    @property
    def numel(self) -> int:
        """Output values of the layer, all samples."""
        return self.shape.numel()

    def lead(self) -> tuple[int, ...]:
        """The output's dimensions that run over samples and positions, sample dimension included."""
        return tuple(self.shape[:1])

    def layouts(self, n: int) -> list[tuple[int, int]]:
        """Ways in which the leading dimensions can hold n samples, likeliest first."""
        lead = self.lead()
        total = math.prod(lead)
        if not lead or total % n:
            return []
        if n == 1:
            return [(1, total)]
        found = [(1, total // n)] if lead[0] % n == 0 else []
        if len(lead) > 1 and lead[1] == n:
            found.append((lead[0], total // (lead[0] * n)))
        elif lead[0] % n == 0 and lead[0] > n:
            found.append((lead[0] // n, total // lead[0]))
        return found

    def settle(self, layout: tuple[int, int]) -> None:
        """Fix the layout, and with it the sizes of the factors."""
        self.layout = layout
        self.T = layout[0] * layout[1] * self.inner_positions()

    def inner_positions(self) -> int:
        """Positions inside one entry of the leading dimensions."""
        return 1

    def spread(self, edge: GradientEdge, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        """Read the output where it has become one per sample: `before` is its shape there, `after` once broadcast."""
        rest = len(self.shape) - len(self.lead())
        lead_before, lead_after = before[: len(before) - rest], after[: len(after) - rest]
        if before[len(lead_before) :] == self.shape[len(self.shape) - rest :] == after[len(lead_after) :]:
            self.input = self.input.reshape(*lead_before, *self.features).expand(*lead_after, *self.features)
            self.edge, self.shape = edge, torch.Size(after)

    def split(self, g: Tensor, n: int) -> Tensor:
        """Gradients of the output (k, *lead, *rest) -> (n, k, positions of lead, *rest)."""
        return self._split(g, n, tuple(self.shape[len(self.lead()) :]))

    def _split(self, x: Tensor, n: int, rest: tuple[int, ...]) -> Tensor:
        outer, inner = self.layout
        x = x.reshape(x.shape[0], outer, n, inner, *rest)
        return x.permute(2, 0, 1, 3, *range(4, x.dim())).flatten(2, 3)

    def of(self, samples: slice, n: int) -> Tensor:
        """The input of some samples, (samples, positions of lead, *rest)."""
        return self._split(self.input.unsqueeze(0), n, self.features)[samples, 0]

    def left(self, samples: slice, n: int) -> Tensor:
        """The forward's factor, (samples, G, active T, p)."""
        left = self._left(self.of(samples, n))
        return left if self.active is None else left.index_select(2, self.active)

    def right(self, g: Tensor) -> Tensor:
        """The backward's factor of split output gradients, (n, k, G, active T, q)."""
        right = self._right(g)
        return right if self.active is None else right.index_select(3, self.active)

    def normalised(self, samples: slice, n: int) -> Tensor:
        """What a norm's weight multiplies, (samples, positions of lead, *rest)."""
        return self._normalised(self.of(samples, n))

    def diagonal(self, role: str, g: Tensor, samples: slice, n: int, scaled: Tensor | None = None) -> Tensor:
        """Rows of a bias or of a norm's weight, (samples, k, width); `scaled` saves computing `normalised` again."""
        if role == "bias":
            return self._per_channel(g)
        if scaled is None:
            scaled = self.normalised(samples, n)
        return torch.stack([self._per_channel((g[:, c] * scaled).unsqueeze(1))[:, 0] for c in range(g.shape[1])], dim=1)

    def rows(self, role: str, g: Tensor, samples: slice, n: int, shape: torch.Size, span: slice) -> Tensor:
        """Explicit rows of one parameter, restricted to `span` of its first axis, (samples, k, span, rest)."""
        if not self.is_factored(role):
            return self.diagonal(role, g, samples, n).unflatten(2, (shape[0], -1))[:, :, span]
        full = self.weight_shaped(products(self.right(g), self.left(samples, n)), shape)
        return full.flatten(3)[:, :, span] if full.dim() > 3 else full.unsqueeze(3)[:, :, span]

    def weight_shaped(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """(..., G, q, p) as gradients of the weight's shape."""
        return (rows if self.q_first else rows.mT).reshape(*rows.shape[:-3], *shape)

    def is_factored(self, role: str) -> bool:
        """Whether the parameter's row is a sum of outer products (else it is diagonal)."""
        return role == "weight"

    def _left(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _right(self, g: Tensor) -> Tensor:
        raise NotImplementedError

    def _per_channel(self, g: Tensor) -> Tensor:
        """(n, k, positions, channels, ...) -> (n, k, channels)."""
        return g.flatten(4).sum((2, 4)) if g.dim() > 4 else g.sum(2)

    def _normalised(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class LinearCall(Call):
    """y = W x + b on the last dimension; any number of positions."""

    path = "linear"

    def __init__(self, module: nn.Linear, names: dict[str, str], x: Tensor, output: Tensor) -> None:
        super().__init__(module, names, x, output)
        self.p, self.q = module.in_features, module.out_features

    def lead(self) -> tuple[int, ...]:
        """All dimensions but the last."""
        return tuple(self.shape[:-1])

    def rows(self, role: str, g: Tensor, samples: slice, n: int, shape: torch.Size, span: slice) -> Tensor:
        """Only the span's outputs are multiplied."""
        if role == "bias":
            return super().rows(role, g, samples, n, shape, span)
        return products(self.right(g)[..., span], self.left(samples, n))[:, :, 0]

    def _left(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1)

    def _right(self, g: Tensor) -> Tensor:
        return g.unsqueeze(2)


class EmbeddingCall(Call):
    """y = W[token]: an outer product of the token's unit vector, over the tokens present, and the gradient."""

    path = "embedding"
    q_first = False

    def __init__(self, module: nn.Embedding, names: dict[str, str], x: Tensor, output: Tensor) -> None:
        super().__init__(module, names, x, output)
        tokens = torch.unique(x)
        self.tokens = tokens if module.padding_idx is None else tokens[tokens != module.padding_idx]
        self.p, self.q = len(self.tokens), module.embedding_dim

    def lead(self) -> tuple[int, ...]:
        """The dimensions of the tokens."""
        return tuple(self.shape[:-1])

    def rows(self, role: str, g: Tensor, samples: slice, n: int, shape: torch.Size, span: slice) -> Tensor:
        """Only the tokens of the span that occur are summed."""
        first, stop, _ = span.indices(shape[0])
        found = torch.nonzero((self.tokens >= first) & (self.tokens < stop)).flatten()
        right, left = self.right(g), self.left(samples, n).index_select(3, found)
        rows = right.new_zeros(*right.shape[:2], stop - first, self.q)
        return rows.index_copy_(2, self.tokens[found] - first, products(right, left)[:, :, 0].mT)

    def weight_shaped(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Rows of tokens that do not occur are zero."""
        full = rows.new_zeros(*rows.shape[:-3], *shape)
        return full.index_copy_(full.dim() - 2, self.tokens, rows[..., 0, :, :].mT)

    def _left(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-1) == self.tokens).to(self.module.weight.dtype).unsqueeze(1)

    def _right(self, g: Tensor) -> Tensor:
        return g.unsqueeze(2)


class SpatialCall(Call):
    """Inputs (images, channels, *space); a sample may have several images."""

    def __init__(self, module: Any, names: dict[str, str], x: Tensor, output: Tensor) -> None:
        super().__init__(module, names, x, output)
        self.space = tuple(output.shape[2:])

    def inner_positions(self) -> int:
        """Output pixels of one image."""
        return math.prod(self.space)

    def _grouped(self, x: Tensor) -> Tensor:
        """(n, k, images, G q, *space) -> (n, k, G, images space, q) without a copy for one image per sample."""
        n, k, images = x.shape[:3]
        x = x.reshape(n, k, images, self.G, -1, math.prod(x.shape[4:]))
        x = x.squeeze(2) if images == 1 else x.permute(0, 1, 3, 4, 2, 5).flatten(4)
        return x.mT


class ConvCall(SpatialCall):
    """A convolution: a Linear on patches, one per output pixel."""

    path = "conv"

    def __init__(self, module: Any, names: dict[str, str], x: Tensor, output: Tensor) -> None:
        super().__init__(module, names, x, output)
        self.G = module.groups
        self.p = module.in_channels // self.G * math.prod(module.kernel_size)
        self.q = module.out_channels // self.G

    def _left(self, x: Tensor) -> Tensor:
        m = self.module
        n, images = x.shape[:2]
        x = x.flatten(0, 1)
        pads = padding(m)
        if any(pads):
            mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
            x = F.pad(x, pads, mode=mode)
        return self._grouped(windows(x, m).reshape(n, 1, images, m.in_channels * math.prod(m.kernel_size), -1))[:, 0]

    def _right(self, g: Tensor) -> Tensor:
        return self._grouped(g)


class TransposedConvCall(SpatialCall):
    """A transposed convolution: the patches are those of the output gradient."""

    path = "conv_transpose"
    q_first = False

    def __init__(self, module: Any, names: dict[str, str], x: Tensor, output: Tensor) -> None:
        super().__init__(module, names, x, output)
        self.G = module.groups
        self.p = module.in_channels // self.G
        self.q = module.out_channels // self.G * math.prod(module.kernel_size)
        self.space = tuple(x.shape[2:])

    def _left(self, x: Tensor) -> Tensor:
        return self._grouped(x.unsqueeze(1))[:, 0]

    def _right(self, g: Tensor) -> Tensor:
        m = self.module
        n, k, images = g.shape[:3]
        pads = [p for size in reversed(m.padding) for p in (size, size)]
        g = windows(F.pad(g.flatten(0, 2), pads), m, self.space)
        return self._grouped(g.reshape(n, k, images, m.out_channels * math.prod(m.kernel_size), *self.space))


class LayerNormCall(Call):
    """LayerNorm and RMSNorm: normalised over the last dimensions."""

    path = "norm"

    def lead(self) -> tuple[int, ...]:
        """All dimensions but the normalised ones."""
        return tuple(self.shape[: -len(self.module.normalized_shape)])

    def is_factored(self, role: str) -> bool:
        """Never: the rows are diagonal."""
        return False

    def _per_channel(self, g: Tensor) -> Tensor:
        return g.sum(2).flatten(2)

    def _normalised(self, x: Tensor) -> Tensor:
        m = self.module
        if isinstance(m, nn.LayerNorm):
            return F.layer_norm(x, m.normalized_shape, None, None, m.eps)
        return F.rms_norm(x, m.normalized_shape, None, m.eps)


class ChannelNormCall(SpatialCall):
    """GroupNorm, InstanceNorm, and BatchNorm on its running statistics."""

    path = "norm"

    def is_factored(self, role: str) -> bool:
        """Never: the rows are diagonal."""
        return False

    def _normalised(self, x: Tensor) -> Tensor:
        m = self.module
        flat = x.flatten(0, 1)
        if isinstance(m, nn.GroupNorm):
            return F.group_norm(flat, m.num_groups, None, None, m.eps).view_as(x)
        if m.running_mean is None or m.training:
            return F.instance_norm(flat, eps=m.eps).view_as(x)
        return F.batch_norm(flat, m.running_mean, m.running_var, None, None, False, 0.0, m.eps).view_as(x)


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _always(m: Any, x: Tensor) -> bool:
    return True


def _images(m: Any, x: Tensor) -> bool:
    return x.dim() == len(m.kernel_size) + 2


def _plain_embedding(m: Any, x: Tensor) -> bool:
    return not m.scale_grad_by_freq and m.max_norm is None


def _running(m: Any, x: Tensor) -> bool:
    return m.running_mean is not None and not m.training


def _batched_instances(m: Any, x: Tensor) -> bool:
    return x.dim() == {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}.get(type(m)) and (
        m.running_mean is None or not m.training
    )


#: by the forward that a module runs: (rule, whether it holds for this module and input)
RULES: dict[Any, tuple[type[Call], Callable[[Any, Tensor], bool]]] = {
    nn.Linear.forward: (LinearCall, _always),
    nn.Embedding.forward: (EmbeddingCall, _plain_embedding),
    nn.LayerNorm.forward: (LayerNormCall, _always),
    nn.RMSNorm.forward: (LayerNormCall, _always),
    nn.GroupNorm.forward: (ChannelNormCall, _always),
    nn.BatchNorm1d.forward: (ChannelNormCall, _running),
    nn.InstanceNorm1d.forward: (ChannelNormCall, _batched_instances),
    **{layer.forward: (ConvCall, _images) for layer in (nn.Conv1d, nn.Conv2d, nn.Conv3d)},
    **{
        layer.forward: (TransposedConvCall, _images)
        for layer in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    },
}


def rule_of(module: nn.Module) -> tuple[type[Call], Callable[[Any, Tensor], bool]] | None:
    """The rule for a module that runs exactly torch's own forward, else None."""
    return None if "forward" in module.__dict__ else RULES.get(type(module).forward)
