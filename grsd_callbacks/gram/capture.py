"""One forward with its layers recorded: which parameter is used where, and nowhere else.

A parameter is read from recorded calls only if the autograd graph has exactly as many uses of it as calls were
recorded; what is tied, reparametrised or used by hand then shows as a difference and is left to explicit rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.layers import Call, rule_of

#: nodes that only change the shape of what passes, or repeat it
_MOVES = ("UnsqueezeBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ExpandBackward0")

Uses = dict[str, list[tuple[Call, str]]]


@dataclass(eq=False)
class Record:
    """A forward on n samples.

    Attributes:
        outputs: f, shape (n, C), with its graph.
        calls: recorded layer calls that reach f, in order.
        uses: by parameter, its (call, role) pairs, for parameters used by recorded calls alone.
        unused: parameters that do not reach f.
        widest: numbers in the largest gradient that a backward pass makes.
        structure: the backward nodes' names, in a fixed order.
    """

    outputs: Tensor
    calls: list[Call]
    uses: Uses
    unused: set[str]
    widest: int = 0
    structure: tuple[str, ...] = ()

    def release(self) -> None:
        """Let go of the graph; inputs of the layers stay."""
        self.outputs = self.outputs.detach()
        for call in self.calls:
            call.edge = None


def record(function: ModelFunction, inputs: Any, n: int) -> Record:
    """Run the model on `inputs`, n samples, inside `function.run`.

    Raises:
        ValueError: the outputs do not have one row per sample, or do not depend on the parameters.
    """
    with recording(function) as calls, torch.enable_grad():
        outputs = function.outputs(inputs)
    if outputs.shape[0] != n:
        raise ValueError(
            f"outputs must have one row per sample: inputs have {n} samples, "
            f"the model returned shape {tuple(outputs.shape)}"
        )
    if not outputs.requires_grad:
        raise ValueError("outputs do not depend on the selected parameters (detached, or under no_grad?)")
    outputs = outputs.reshape(n, -1)
    parents, uses_in_graph = _walk(outputs)
    calls = [call for call in calls if call.output_edge.node in parents]
    for call in calls:
        _follow(call, parents, n)
    found: Uses = {}
    for call in calls:
        for role, name in call.names.items():
            found.setdefault(name, []).append((call, role))
    counts = {name: uses_in_graph[id(p)] for name, p in function.parameters.items()}
    uses = {name: pairs for name, pairs in found.items() if counts[name] == len(pairs)}
    widest = max(math.prod(_shape(node) or (0,)) for node in parents)
    unused = {name for name, count in counts.items() if count == 0}
    return Record(outputs, calls, uses, unused, widest, tuple(node.name() for node in parents))


@contextmanager
def recording(function: ModelFunction) -> Iterator[list[Call]]:
    """Record calls of known layers that use measured parameters; hooks see raw outputs and are removed after."""
    names = {id(p): name for name, p in function.parameters.items()}
    calls: list[Call] = []
    handles = []
    for module in function.model.modules():
        if rule_of(module) is not None and any(id(p) in names for p in module._parameters.values()):
            hook = _recorder(names, calls)
            handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _recorder(names: dict[int, str], calls: list[Call]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs.get("input")
        rule = rule_of(module)
        if rule is None or not isinstance(x, Tensor) or not isinstance(output, Tensor) or not output.requires_grad:
            return
        if output.is_nested:  # no shape to read samples from
            return
        kind, holds = rule
        own = {role: module._parameters.get(role) for role in ("weight", "bias")}  # others make these: weight_orig, ...
        used = {role: names[id(p)] for role, p in own.items() if p is not None and id(p) in names}
        if used and holds(module, x):
            calls.append(kind(module, used, x, output))

    return hook


def _walk(outputs: Tensor) -> tuple[dict[Node, list[Node]], Counter[int]]:
    """All nodes of the graph with the nodes that use them, and for every leaf (by id) the number of edges into it."""
    assert outputs.grad_fn is not None
    parents: dict[Node, list[Node]] = {outputs.grad_fn: []}
    leaves: Counter[int] = Counter()
    stack = [outputs.grad_fn]
    while stack:
        parent = stack.pop()
        for node, _ in parent.next_functions:
            if node is None:
                continue
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                leaves[id(leaf)] += 1
            if node not in parents:
                parents[node] = []
                stack.append(node)
            parents[node].append(parent)
    return parents, leaves


def _follow(call: Call, parents: dict[Node, list[Node]], n: int) -> None:
    """Follow an output that all samples share (positions of a transformer) to where it is added to each of them."""
    node = call.output_edge.node
    shape: tuple[int, ...] | None = tuple(call.shape)
    before: tuple[int, ...] = ()
    while n > 1 and shape is not None and math.prod(shape) == call.numel:
        if len(parents[node]) != 1 or not _only_moves(parents[node][0]):
            return
        node, before = parents[node][0], shape
        shape = _shape(node)
    if shape is not None and before and math.prod(shape) == n * call.numel:
        call.spread(GradientEdge(node, 0), before, shape)


def _only_moves(node: Node) -> bool:
    """Whether a node passes gradients on unchanged, but for a change of shape."""
    name = node.name()
    return name in _MOVES or (name == "AddBackward0" and getattr(node, "_saved_alpha", None) == 1)


def _shape(node: Node) -> tuple[int, ...] | None:
    """Shape of the output that a node made, if it has one in plain numbers (nested tensors do not)."""
    metadata = getattr(node, "_input_metadata", None)
    try:
        shape = tuple(metadata[0].shape) if metadata else None
    except RuntimeError:
        return None
    return shape if shape is not None and all(type(size) is int for size in shape) else None
