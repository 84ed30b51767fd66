"""What a convolution sees of its images: padding, and the patches under its kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def windows(x: Tensor, m: Any, space: tuple[int, ...] | None = None) -> Tensor:
    """Patches of padded images, (images, channels, *kernel, *space), a view; `space` crops."""
    dims = len(m.kernel_size)
    for d, (size, step, gap) in enumerate(zip(m.kernel_size, m.stride, m.dilation)):
        x = x.unfold(2 + d, (size - 1) * gap + 1, step)[..., ::gap]
        if space is not None:
            x = x.narrow(2 + d, 0, space[d])
    return x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))


def padding(m: Any) -> list[int]:
    """Padding of a convolution in the order of F.pad."""
    pads: list[int] = []
    for d in reversed(range(len(m.kernel_size))):
        if m.padding == "same":
            total = m.dilation[d] * (m.kernel_size[d] - 1)
            pads += [total // 2, total - total // 2]
        elif m.padding == "valid":
            pads += [0, 0]
        else:
            pads += [m.padding[d]] * 2
    return pads
