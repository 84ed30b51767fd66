"""A Hugging Face model, built from its config (nothing is downloaded): a tiny GPT-2 that learns to count.

Shows what such models need: `outputs=` takes the logits out of the model's output, the inputs are a mapping of keyword
arguments, and dropout is off during the measurement.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import grsd_callbacks as grsd

VOCABULARY, LENGTH = 16, 8


def counting(num: int) -> dict[str, Tensor]:
    """Sequences that go up by one, modulo the vocabulary, from random starts."""
    rows = torch.randint(VOCABULARY, (num, 1)) + torch.arange(LENGTH + 1)
    rows = rows % VOCABULARY
    return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}


def last_logits(output: Any) -> Tensor:
    return output.logits[:, -1]


def main(argv: Sequence[str] | None = None) -> grsd.ShellMonitor:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    probe = counting(16)
    monitor = grsd.ShellMonitor(
        model, "cross_entropy", ({"input_ids": probe["input_ids"]}, probe["labels"][:, -1]), outputs=last_logits,
        total_steps=options.steps, max_overhead=None, per_decade=3,
    )  # fmt: skip
    for step in range(options.steps):
        monitor.step(step, optimizer=optimizer)
        batch = counting(32)
        logits = model(input_ids=batch["input_ids"]).logits
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
        optimizer.step()
    monitor.finish()
    print(monitor.summary())
    return monitor


if __name__ == "__main__":
    main()
