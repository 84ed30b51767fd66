"""Small float64 networks of every awkward kind, and rows of J by plain autograd on the module itself."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from grsd_callbacks import testing as known


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randint(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def seeded(make, seed=0, dtype=torch.float64):
    """The module with weights drawn from a private stream, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().to(dtype).eval()


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


def autograd_rows(model, inputs, pick=lambda raw: raw):
    """J, shape (m, P), one backward pass a row, on the module's own parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if isinstance(inputs, dict):
        raw = model(**inputs)
    else:
        raw = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    rows = []
    for value in pick(raw).flatten():
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([flat(g, p) for g, p in zip(grads, parameters, strict=True)]))
    return torch.stack(rows)


def jacobian(model, x, params=None):
    """J by jacrev (which cannot batch the fused attention kernels)."""
    with sdpa_kernel(SDPBackend.MATH):
        return known.dense_jacobian(model, x, params)


def flat(gradient, parameter):
    if gradient is None:
        return torch.zeros(parameter.numel(), dtype=parameter.dtype)
    return (gradient.to_dense() if gradient.is_sparse else gradient).flatten()


def orthogonal(m, seed=0):
    return torch.linalg.qr(randn(m, m, seed=seed))[0]


def with_spectrum(eigenvalues, seed=0, dtype=torch.float64):
    """A linear model and inputs whose J J^T has these eigenvalues, and the eigenvectors as columns."""
    m = len(eigenvalues)
    basis = orthogonal(m, seed)
    inputs = (basis * eigenvalues.sqrt()) @ orthogonal(m, seed + 1000).T
    return nn.Linear(m, 1, bias=False, dtype=dtype), inputs.to(dtype), basis


def mlp(seed=0):
    return seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), seed)


def cnn(activation=nn.SiLU, seed=0, norm=True):
    def make():
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.GroupNorm(2, 4) if norm else nn.Identity(),
            activation(),
            nn.Conv2d(4, 4, 3, stride=2),
            activation(),
            nn.Flatten(),
            nn.Linear(16, 2),
        )

    return seeded(make, seed)


class Transformer(nn.Module):
    """One pre-norm block over continuous tokens; scaled dot-product attention, GELU, mean pooling."""

    def __init__(self, width=6, num_outputs=2):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, x):
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return self.head(x.mean(1))


def transformer(seed=0):
    return seeded(Transformer, seed)


MAIN = {
    "mlp": (mlp, lambda n=7: randn(n, 5, seed=1)),
    "cnn": (cnn, lambda n=7: randn(n, 1, 6, 6, seed=1)),
    "transformer": (transformer, lambda n=7: randn(n, 4, 6, seed=1)),
}


# ---- awkward ones ----


class Hooked(nn.Module):
    """A forward hook that scales the output, and a parameter-free submodule."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.body.register_forward_hook(lambda module, args, output: 2 * output.tanh())

    def forward(self, x):
        return self.body(x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return torch.tanh(self.encode(x)) @ self.decode.weight


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.body.requires_grad_(False)

    def forward(self, x):
        return self.head(self.body(x).sin())


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Bilinear(3, 2, 2)

    def forward(self, x, scale):
        return self.a(x).tanh() + self.b(x, scale)


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


class ModelOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, input_ids=None, mask=None):
        hidden = self.a(input_ids) * mask
        return Output(hidden.exp(), hidden)


class DictOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x):
        return {"loss": None, "logits": self.a(x).sin()}


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.never = nn.Linear(3, 2), nn.Linear(7, 7)

    def forward(self, x):
        return self.a(x).sigmoid()


class Embedded(nn.Module):
    def __init__(self, sparse=False):
        super().__init__()
        self.table, self.head = nn.Embedding(6, 3, sparse=sparse), nn.Linear(3, 2)

    def forward(self, tokens):
        return self.head(self.table(tokens).tanh().mean(1))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(checkpoint(lambda v: self.a(v).tanh(), x, use_reentrant=False))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Bag(nn.Module):
    """EmbeddingBag has no second derivative."""

    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(6, 3), nn.Linear(3, 2)

    def forward(self, tokens):
        return self.head(self.bag(tokens).tanh())


class Distances(nn.Module):
    """cdist has no second derivative."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return torch.cdist(x, self.centres)


class Normalised(nn.Module):
    """Batch norm with statistics of its own, in evaluation mode: buffers."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.norm.running_mean += 0.3
        self.norm.running_var *= 1.7

    def forward(self, x):
        return self.norm(self.a(x)).tanh()


class MultiHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.layer(x)[:, 0])


def zoo():
    """name -> (module, inputs, how to pick the output tensor from the raw output)."""
    x, plain = randn(5, 3, seed=2), lambda raw: raw
    tokens, sequence = randint(6, 5, 4, seed=3), randn(5, 4, 3, seed=4)
    both = {"input_ids": x, "mask": randn(5, 2, seed=5)}
    return {
        "hooks": (seeded(Hooked), x, plain),
        "buffers": (seeded(Normalised), x, plain),
        "tied": (seeded(Tied), x, plain),
        "frozen": (seeded(Frozen), x, plain),
        "tuple": (seeded(TwoInputs), (x, randn(5, 2, seed=6)), plain),
        "keywords": (seeded(ModelOutput), both, lambda raw: raw.logits),
        "dict output": (seeded(DictOutput), x, lambda raw: raw["logits"]),
        "unused": (seeded(Unused), x, plain),
        "embedding": (seeded(Embedded), tokens, plain),
        "sparse": (seeded(lambda: Embedded(sparse=True)), tokens, plain),
        "checkpoint": (seeded(Checkpointed), x, plain),
        "attention": (seeded(MultiHead), randn(5, 3, 4, seed=7), plain),
        "lstm": (seeded(Recurrent), sequence, plain),
        "bag": (seeded(Bag), tokens, plain),
        "cdist": (seeded(Distances), x, plain),
    }
