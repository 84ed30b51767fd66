"""A small GPT that learns to write this project's own documentation, measured while it trains.

Measured is the prediction after each of 16 snippets: m = 16 x the number of characters. All positions of all snippets
would be 64 times as many outputs; `outputs=` picks what is worth looking at.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grsd_callbacks as grsd

ROOT = Path(__file__).parent.parent


class Block(nn.Module):
    """Causal self-attention and an MLP, each on a residual branch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).reshape(n, t, width))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """Logits (n, t, vocabulary) of the next character."""

    def __init__(self, vocabulary: int, context: int, width: int = 48, depth: int = 2, heads: int = 3) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.places.weight[: text.shape[1]]
        return self.head(self.blocks(x))


def corpus() -> tuple[Tensor, str]:
    """The README and the docs, as indices into their characters."""
    text = "\n".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
    characters = "".join(sorted(set(text)))
    return torch.tensor([characters.index(c) for c in text]), characters


def last_position(logits: Tensor) -> Tensor:
    """What is measured of the model's output: the prediction after the whole snippet."""
    return logits[:, -1]


def main(argv: Sequence[str] | None = None) -> grsd.ShellMonitor:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--context", type=int, default=64, help="characters in sight")
    parser.add_argument("--samples", type=int, default=16, help="snippets that the kernel is measured on")
    parser.add_argument("--logdir", type=Path, default=Path("logs/gpt"))
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    text, characters = corpus()
    model = GPT(len(characters), options.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def snippets(num: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(text) - options.context - 1, (num,))
        rows = torch.stack([text[s : s + options.context + 1] for s in starts.tolist()])
        return rows[:, :-1], rows[:, 1:]

    x, y = snippets(options.samples)
    monitor = grsd.ShellMonitor(
        model, "cross_entropy", (x, y[:, -1]), outputs=last_position, total_steps=options.steps,
        max_overhead=None, per_decade=4, num_matvecs=32, num_density_matvecs=16,
        writer=[options.logdir, options.logdir / "grsd.jsonl"],
    )  # fmt: skip
    print(monitor.report, flush=True)
    for step in range(options.steps):
        monitor.step(step, optimizer=optimizer)
        x, y = snippets(32)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    monitor.finish()
    monitor.close()
    print(f"training loss {loss.item():.2f} nats a character\n\n{monitor.summary()}")
    return monitor


if __name__ == "__main__":
    main()
