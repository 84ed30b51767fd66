"""The benchmarks' networks and data, from private random streams. Torch alone: peers' interpreters build the same.

    mlp         784-512-512-10, ReLU, squared loss                                  0.67 M parameters
    curve       1-64-64-1, tanh, squared loss: the deepest spectrum                  4 K
    resnet_gn   ResNet-20 for 32 x 32 images, GroupNorm, 10 classes                  0.27 M
    resnet_bn   the same with BatchNorm, measured in evaluation mode                 0.27 M
    gpt         4 layers, d = 128, T = 64, 65 tokens, tied embedding, last token    0.81 M
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("mlp", "curve", "resnet_gn", "resnet_bn", "gpt")
#: sizes of each net at "real" scale and for trying the scripts
SIZES: dict[str, dict[str, dict[str, int]]] = {
    "real": {
        "mlp": {"inputs": 784, "width": 512, "depth": 2, "outputs": 10},
        "curve": {"inputs": 1, "width": 64, "depth": 2, "outputs": 1},
        "resnet": {"width": 16, "blocks": 3, "side": 32, "outputs": 10},
        "gpt": {"layers": 4, "width": 128, "heads": 4, "length": 64, "vocabulary": 65},
    },
    "tiny": {
        "mlp": {"inputs": 20, "width": 16, "depth": 2, "outputs": 4},
        "curve": {"inputs": 1, "width": 16, "depth": 2, "outputs": 1},
        "resnet": {"width": 4, "blocks": 1, "side": 8, "outputs": 3},
        "gpt": {"layers": 1, "width": 16, "heads": 2, "length": 8, "vocabulary": 11},
    },
}


def mlp(inputs: int, width: int, depth: int, outputs: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """`depth` hidden layers of `width`."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), activation()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (1 x 1 where the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1, self.norm2 = norm(outputs), norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = stride == 1 and inputs == outputs
        shortcut = [] if same else [nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs)]
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of `blocks` blocks, widths w, 2w, 4w; ResNet-20 at w = 16 and 3 blocks."""

    def __init__(self, width: int, blocks: int, outputs: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), norm(width)
        stages: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(Block(channels, width * 2**stage, stride, norm))
                channels = width * 2**stage
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Logits of the token after the last one; embedding and head share their weight."""

    def __init__(self, layers: int, width: int, heads: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(x)[:, -1]))

    def hidden(self, x: Tensor) -> Tensor:
        """The residual stream after all layers, every position."""
        where = torch.arange(x.shape[1], device=x.device).expand(x.shape)  # batched: what peers ask for
        return self.layers(self.tokens(x) + self.positions(where))

    def all_logits(self, x: Tensor) -> Tensor:
        """Logits at every position, for training."""
        return self.head(self.norm(self.hidden(x)))


def sizes_of(name: str, scale: str = "real", **changes: int) -> dict[str, int]:
    """Sizes of a net, with changes such as width=256."""
    if name not in NAMES or scale not in SIZES:
        raise ValueError(f"name must be one of {NAMES} and scale one of {tuple(SIZES)}, got {name!r}, {scale!r}")
    return SIZES[scale][name.split("_")[0]] | changes


def build(name: str, scale: str = "real", *, seed: int = 0, **changes: int) -> nn.Module:
    """The net with weights from a private stream, in evaluation mode, running statistics set from data."""
    sizes = sizes_of(name, scale, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = _make(name, sizes)
    if name == "resnet_bn":
        _set_statistics(net, batch(name, scale, 64, **changes).inputs)
    return net.eval()


def _make(name: str, sizes: dict[str, int]) -> nn.Module:
    if name == "mlp":
        return mlp(**sizes)
    if name == "curve":
        return mlp(**sizes, activation=nn.Tanh)
    if name == "gpt":
        return GPT(**sizes)
    groups = min(8, sizes["width"] // 2)
    norm = nn.BatchNorm2d if name == "resnet_bn" else lambda channels: nn.GroupNorm(groups, channels)
    return ResNet(sizes["width"], sizes["blocks"], sizes["outputs"], norm)


def _set_statistics(net: nn.Module, x: Tensor) -> None:
    """Running statistics of the batch x itself, momentum as before."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.momentum = 1.0
    with torch.no_grad():
        net.train()(x)
    for module, momentum in zip(norms, momenta):
        module.momentum = momentum


@dataclass(frozen=True, eq=False)
class Batch:
    """n samples: inputs, targets (values, classes, or next tokens) and, for text, the whole sequences."""

    inputs: Tensor
    targets: Tensor
    sequences: Tensor | None = None


def batch(name: str, scale: str = "real", n: int = 8, *, seed: int = 1, **changes: int) -> Batch:
    """n samples of a synthetic data set."""
    sizes = sizes_of(name, scale, **changes)
    if name == "mlp":
        return _regression(sizes, n, seed)
    if name == "curve":
        return _curve(n)
    if name == "gpt":
        return _text(sizes, n, seed)
    return _images(sizes, n, seed)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _regression(sizes: dict[str, int], n: int, seed: int) -> Batch:
    """Inputs with the covariance spectrum k^-2 of natural images, a random two-layer teacher, 10 % noise."""
    d, outputs = sizes["inputs"], sizes["outputs"]
    scales = torch.arange(1, d + 1).float() ** -1.0
    x = _normal(n, d, seed=seed) * (scales * (d / scales.square().sum()).sqrt())
    teacher = _normal(d, 64, seed=seed + 1) * d**-0.5, _normal(64, outputs, seed=seed + 2) / 8
    return Batch(x, torch.tanh(x @ teacher[0]) @ teacher[1] + 0.1 * _normal(n, outputs, seed=seed + 3))


def _curve(n: int) -> Batch:
    """A function on the line with detail at every scale."""
    x = torch.linspace(-1, 1, n)[:, None]
    return Batch(x, sum(torch.sin(3.0**k * x + k) / 2.0**k for k in range(4)))


def _images(sizes: dict[str, int], n: int, seed: int) -> Batch:
    """Each class has a smooth pattern; images add smooth noise of the same size and a little white noise."""
    side, classes = sizes["side"], sizes["outputs"]
    y = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    patterns, noise = _smooth(classes, side, seed + 1), _smooth(n, side, seed + 2)
    return Batch(patterns[y] + noise + 0.1 * _normal(n, 3, side, side, seed=seed + 3), y)


def _smooth(n: int, side: int, seed: int) -> Tensor:
    coarse = _normal(n, 3, max(2, side // 4), max(2, side // 4), seed=seed)
    return F.interpolate(coarse, (side, side), mode="bilinear")


def _text(sizes: dict[str, int], n: int, seed: int) -> Batch:
    """Sequences of a random second-order Markov chain; the target is the token after the last."""
    length, vocabulary = sizes["length"], sizes["vocabulary"]
    table = 2 * _normal(2, vocabulary, vocabulary, seed=seed + 1)
    tokens = [torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)]
    for u in torch.rand(n, length + 1, generator=torch.Generator().manual_seed(seed)).T:
        odds = (table[0, tokens[-1]] + table[1, tokens[-2]]).softmax(-1).cumsum(-1)
        tokens.append((odds < u[:, None]).sum(-1).clamp_max(vocabulary - 1))
    sequences = torch.stack(tokens[2:], 1)
    return Batch(sequences[:, :-1].contiguous(), sequences[:, -1], sequences)


def loss_function(name: str) -> nn.Module:
    """Mean squared error for the regressions, cross-entropy for the others."""
    return nn.MSELoss() if name in ("mlp", "curve") else nn.CrossEntropyLoss()


def train(net: nn.Module, name: str, data: Batch, steps: int, *, batch_size: int = 64, rate: float = 1e-3) -> float:
    """Adam; returns the last batch's loss and leaves the net in evaluation mode.

    A GPT learns from every position. The order of samples is a private stream's.
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    criterion, n = loss_function(name), len(data.inputs)
    net.train()
    value = torch.tensor(float("nan"))
    for _ in range(steps):
        index = torch.randint(n, (min(batch_size, n),), generator=generator).to(data.inputs.device)
        value = _training_loss(net, criterion, data, index)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    net.eval()
    return float(value.detach())


def _training_loss(net: nn.Module, criterion: nn.Module, data: Batch, index: Tensor) -> Tensor:
    if isinstance(net, GPT) and data.sequences is not None:
        tokens = data.sequences[index]
        return criterion(net.all_logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    return criterion(net(data.inputs[index]), data.targets[index])
