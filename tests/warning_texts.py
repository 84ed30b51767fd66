"""The text of every warning that a package can give, read from its source; what is only known when it runs is `HOLE`.

A message may be a string, an f-string, a sum or a choice of such, a variable or constant that holds one, or what a
function of the package returns. What cannot be read is no gap in a list but an `Unreadable`.
"""

import ast
from collections.abc import Iterator
from itertools import product
from pathlib import Path

#: functions that give a warning, and where their message stands among the arguments
GIVES = {"warn": 0, "notice": 0, "warn_once": 1, "warning": 0, "rank_zero_warn": 0}
HOLE = "\0"


class Unreadable(AssertionError):
    """A warning whose text is not in the source, or a way to give one that cannot be followed."""


class Package:
    """The sources below a folder: the functions by name, and the warnings they give."""

    def __init__(self, root: Path) -> None:
        self.trees = {str(path.relative_to(root)): ast.parse(path.read_text()) for path in sorted(root.rglob("*.py"))}
        self.functions: dict[str, list[tuple[ast.FunctionDef, ast.Module]]] = {}
        for tree in self.trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    self.functions.setdefault(node.name, []).append((node, tree))

    def warnings(self) -> Iterator[tuple[str, str]]:
        """(place, text) of each."""
        for path, tree in self.trees.items():
            for node, function in _with_functions(tree):
                place = f"{path}:{getattr(node, 'lineno', 0)}"
                _refuse_detours(node, place)
                if not isinstance(node, ast.Call) or (name := _name(node.func)) not in GIVES:
                    continue
                if not (message := _message(node, GIVES[name])):
                    raise Unreadable(f"{place}: {name}() without a message")
                if function is not None and function.name in GIVES and _is_parameter(message, function):
                    continue  # hands on what it was given
                for text in self._texts(message, function, tree, place):
                    yield place, text

    def returned(self, name: str, near: ast.Module | None = None) -> list[str]:
        """What a function may return, but for nothing: one of a file if it has it, else any of that name."""
        found = []
        here = [(function, tree) for function, tree in self.functions[name] if tree is near]
        for function, tree in here or self.functions[name]:
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and node.value is not None:
                    found += self._texts(node.value, function, tree, f"{name}:{node.lineno}")
        return [text for text in found if text]

    def _texts(self, node: ast.expr, function: ast.FunctionDef | None, tree: ast.Module, place: str) -> list[str]:
        def texts(part: ast.expr) -> list[str]:
            return self._texts(part, function, tree, place)

        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=values):
                parts = [[HOLE] if isinstance(value, ast.FormattedValue) else texts(value) for value in values]
                return ["".join(choice) for choice in product(*parts)]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [a + b for a in texts(left) for b in texts(right)]
            case ast.IfExp(body=body, orelse=orelse):
                return texts(body) + texts(orelse)
            case ast.Name(id=name) if values := _assigned(name, function) or _assigned(name, tree):
                return [text for value in values for text in texts(value)]
            case ast.Call(func=called) if _name(called) in self.functions:
                return self.returned(_name(called), tree)
        raise Unreadable(f"{place}: the text of this warning cannot be read from the source: {ast.unparse(node)}")


def _name(node: ast.expr) -> str:
    return ast.unparse(node).split(".")[-1]


def _message(call: ast.Call, position: int) -> ast.expr | None:
    named = [keyword.value for keyword in call.keywords if keyword.arg == "message"]
    return named[0] if named else call.args[position] if len(call.args) > position else None


def _is_parameter(node: ast.expr, function: ast.FunctionDef) -> bool:
    return isinstance(node, ast.Name) and node.id in {argument.arg for argument in function.args.args}


def _with_functions(
    node: ast.AST, function: ast.FunctionDef | None = None
) -> Iterator[tuple[ast.AST, ast.FunctionDef | None]]:
    """Each node with the function it stands in."""
    yield node, function
    inner = node if isinstance(node, ast.FunctionDef) else function
    for child in ast.iter_child_nodes(node):
        yield from _with_functions(child, inner)


def _assigned(name: str, scope: ast.AST | None) -> list[ast.expr]:
    """What is put into a variable in a function, or into a constant of a module."""
    found = []
    for node in ast.walk(scope) if isinstance(scope, ast.FunctionDef) else scope.body if scope else []:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if value is not None and any(isinstance(t, ast.Name) and t.id == name for t in targets):
            found.append(value)
    return found


def _refuse_detours(node: ast.AST, place: str) -> None:
    """Ways by which a warning could be given unseen: under another name, or by handing the function on."""
    if isinstance(node, ast.ImportFrom):
        renamed = [alias.name for alias in node.names if alias.name in GIVES and alias.asname not in (None, alias.name)]
        if renamed:
            raise Unreadable(f"{place}: import {renamed[0]} under its own name")
    handed = [*node.args, *(k.value for k in node.keywords)] if isinstance(node, ast.Call) else []
    handed += [node.value] if isinstance(node, (ast.Assign, ast.Return)) and node.value is not None else []
    for value in handed:
        if isinstance(value, (ast.Name, ast.Attribute)) and _name(value) in set(GIVES) - {"warning"}:
            raise Unreadable(f"{place}: call {_name(value)} by its name instead of handing it on")
