"""The probe: the fixed samples on which the kernel is measured.

A probe is a pair (inputs, targets) whose tensors share a leading sample dimension. It is cloned once
and never changes during a run, so differences between measurements are never sampling noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data import DataLoader

from grsd_callbacks.guard import preserve_object_rng, preserve_rng

#: m = samples x outputs that a probe of our choice aims at, by device type
PROBE_SIZE = {"cpu": 320, "cuda": 2048}
TARGET_KEYS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True, eq=False)
class Probe:
    """Samples of a run: `inputs` (a pytree of tensors with n leading rows), `targets` alike."""

    inputs: Any
    targets: Any

    @property
    def num_samples(self) -> int:
        """Number of samples n (the leading dimension shared by all batched tensors)."""
        return num_samples(self.inputs)

    def take(self, index: Any) -> Probe:
        """The probe restricted to the samples of `index` (a slice or an index tensor)."""
        n = self.num_samples
        return self._mapped(lambda tree: take(tree, index, n))

    def to(self, device: torch.device | str) -> Probe:
        """The same samples on another device (values and dtypes unchanged)."""
        return self._mapped(lambda tree: tree_map(lambda leaf: _moved(leaf, device), tree))

    def clone(self) -> Probe:
        """A detached copy that shares no memory with the batch it came from."""
        return self._mapped(lambda tree: tree_map(_copied, tree))

    def _mapped(self, function: Callable[[Any], Any]) -> Probe:
        """Targets that are the inputs (a whole batch, for a training step) stay so."""
        inputs = function(self.inputs)
        return Probe(inputs, inputs if self.targets is self.inputs else function(self.targets))

    def check(self) -> Probe:
        """Return self, or raise if inputs and targets cannot be a probe.

        Raises:
            ValueError: no tensor in `inputs`, no samples, or targets with another number of samples.
        """
        n = self.num_samples
        if n == 0:
            raise ValueError("probe has no samples: the inputs' leading dimension is 0; give at least one sample")
        for leaf in () if self.targets is self.inputs else tree_flatten(self.targets)[0]:
            if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] != n):
                raise ValueError(
                    f"probe targets must have one row per sample: inputs have {n} samples, "
                    f"targets have shape {tuple(leaf.shape)}"
                )
        return self


def num_samples(tree: Any) -> int:
    """Leading dimension of the first tensor of at least one dimension in `tree`."""
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    raise ValueError(
        "probe inputs hold no tensor with a sample dimension: give (inputs, targets) with tensors of shape (n, ...)"
    )


def samples_wanted(num_outputs: int, device: torch.device) -> int:
    """Samples of a probe of our choice: so many that samples x outputs is `PROBE_SIZE`, at least 8."""
    return max(8, PROBE_SIZE.get(device.type, PROBE_SIZE["cpu"]) // max(1, num_outputs))


def take(tree: Any, index: Any, n: int) -> Any:
    """Select samples in every tensor of `tree` whose leading dimension is n; other leaves are shared.

    Raises:
        ValueError: another leaf holds the edges of a graph, (2, number), and some lead out of what is selected; on a
            GPU a model that was run on that would end the process.
    """
    sizes: list[int] = []

    def select(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == n):
            return leaf
        part = leaf[index]
        sizes.append(len(part))
        return part

    selected = tree_map(select, tree)
    for leaf in tree_flatten(tree)[0] if sizes and sizes[0] < n else ():
        if _is_edges(leaf, n) and sizes[0] <= int(leaf.max()) < n:
            raise ValueError(f"{sizes[0]} of the {n} nodes of a graph cannot be taken without the others")
    return selected


def _is_edges(leaf: Any, n: int) -> bool:
    if not isinstance(leaf, Tensor) or leaf.dim() != 2 or leaf.shape[0] != 2 or n == 2 or leaf.numel() == 0:
        return False
    return leaf.dtype in (torch.int32, torch.int64)


def unpack_batch(batch: Any) -> tuple[Any, Any]:
    """Split a training batch into (inputs, targets).

    Understood: a pair (list or tuple of two), and a mapping with exactly one of the keys
    `labels, label, targets, target, y` (the rest are keyword inputs; a single rest entry is passed alone).

    Raises:
        ValueError: for every other structure, naming the remedy.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        keys = [key for key in TARGET_KEYS if key in batch]
        if len(keys) == 1:
            rest = {key: value for key, value in batch.items() if key != keys[0]}
            return (next(iter(rest.values())) if len(rest) == 1 else rest), batch[keys[0]]
    what = f"a mapping with keys {list(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    if isinstance(batch, (tuple, list)):
        what += f" of {len(batch)} items"
    raise ValueError(
        f"probe: cannot tell inputs from targets in {what}; "
        "give probe=(inputs, targets), or unpack= a function from a batch to (inputs, targets)"
    )


def probe_from(source: Any, num: int | None = None, unpack: Callable[[Any], tuple[Any, Any]] = unpack_batch) -> Probe:
    """A cloned probe of at most `num` samples from a pair or from a loader's first batches.

    Args:
        source: `(inputs, targets)`, a `Probe`, or an iterable of batches such as a DataLoader.
        num: number of samples to keep (the first ones); None keeps a pair whole and one batch of a loader.
        unpack: how to read a batch of an iterable source. Reading a loader moves no random generator.

    Raises:
        ValueError: for an empty loader or a structure that is not a probe.
        TypeError: for a source that is neither a pair nor iterable.
    """
    if isinstance(source, Probe):
        probe = source.check()
    elif isinstance(source, (tuple, list)):
        if len(source) != 2:
            raise ValueError(f"probe: expected a pair (inputs, targets), got {len(source)} items")
        probe = Probe(*source).check()
    elif isinstance(source, Iterable) and not isinstance(source, (str, bytes, Tensor, Mapping)):
        probe = _from_loader(source, num, unpack)
    else:
        raise TypeError(f"probe: expected 'auto', (inputs, targets) or a DataLoader, got {type(source).__name__}")
    if num is not None and probe.num_samples > num:
        probe = probe.take(slice(0, num))
    return probe.clone()


def _from_loader(loader: Iterable[Any], num: int | None, unpack: Callable[[Any], tuple[Any, Any]]) -> Probe:
    parts: list[Probe] = []
    found = 0
    with preserve_rng(), preserve_object_rng(loader):
        for batch in _private(loader):
            part = Probe(*unpack(batch)).check()
            parts.append(part)
            found += part.num_samples
            if num is None or found >= num:
                break
    if not parts:
        raise ValueError("probe: the loader is empty; give a loader with at least one batch, or (inputs, targets)")
    return concatenate(parts)


def _private(loader: Iterable[Any]) -> Iterable[Any]:
    """The same loader with workers of its own: persistent ones may belong to the training."""
    if not isinstance(loader, DataLoader):
        return loader
    twin = copy.copy(loader)
    twin._iterator = None
    return twin


def concatenate(parts: list[Probe]) -> Probe:
    """One probe from several of the same structure."""
    if len(parts) == 1:
        return parts[0]
    inputs = _joined([p.inputs for p in parts])
    same = all(p.targets is p.inputs for p in parts)
    return Probe(inputs, inputs if same else _joined([p.targets for p in parts]))


def _joined(trees: list[Any]) -> Any:
    counts = [num_samples(tree) for tree in trees]
    flat = [tree_flatten(tree) for tree in trees]
    leaves = []
    for column in zip(*(leaves for leaves, _ in flat), strict=True):
        batched = all(
            isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == n
            for leaf, n in zip(column, counts, strict=True)
        )
        leaves.append(torch.cat(column) if batched else column[0])
    return tree_unflatten(leaves, flat[0][1])


def _moved(leaf: Any, device: torch.device | str) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def plain_leaves(tree: Any) -> list[Any]:
    """The leaves of a pytree as a checkpoint may hold them (weights_only loading): others are left out as None."""
    plain = (Tensor, bool, int, float, str)
    return [leaf if isinstance(leaf, plain) else None for leaf in tree_flatten(tree)[0]]


def restored(template: Probe, leaves: dict[str, list[Any]]) -> Probe:
    """The probe of a checkpoint: its `plain_leaves` in the structure of the present run's batches.

    Raises:
        ValueError: the structure has another number of leaves.
    """
    trees = []
    for name in ("inputs", "targets"):
        present, spec = tree_flatten(getattr(template, name))
        if len(present) != len(leaves[name]):
            raise ValueError(
                f"probe: the checkpoint's {name} have {len(leaves[name])} parts, this run's {len(present)}; "
                "resume with the data and arguments of the run that was saved"
            )
        parts = [old if old is not None else new for old, new in zip(leaves[name], present, strict=True)]
        trees.append(tree_unflatten(parts, spec))
    return Probe(trees[0], trees[0] if template.targets is template.inputs else trees[1])
