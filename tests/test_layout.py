"""Modules import only from lower levels, and each third-party package has its one door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "grsd_callbacks"

LEVELS = {
    0: {
        "arguments",
        "distributed",
        "factors",
        "guard",
        "json_lines",
        "lean",
        "memory",
        "notice",
        "patches",
        "sample_axis",
    },
    1: {"functional", "krylov", "layers", "losses", "optimizer", "probe", "sharded"},
    2: {"kernel", "chunks", "gram", "paths", "plan", "training_step"},
    3: {"method", "randomized", "spectrum", "team", "observation", "refusals", "settings"},
    4: {"shells"},
    5: {"density", "flux", "transfer", "comparison", "drift", "exponents", "position"},
    6: {"snapshot", "ways", "measure", "emission", "trajectory", "run", "renormalizability"}
    | {"quantisation", "collapse"},
    7: {"tags", "figures", "report", "media"},
    8: {"sinks"},
    9: {"between", "schedule", "outlet", "monitor", "resume"},
    10: {"callbacks", "cli", "renormalizability_monitor", "renormalizability_callback"},
    11: {"__main__", "testing"},  # testing is for our tests and our users'; no module may need it
}
LEVEL = {module: level for level, modules in LEVELS.items() for module in modules}
SAME_LEVEL = {  # functional enters the guard of level 0; these pairs stand on one level
    ("kernel", "gram"),
    ("json_lines", "arguments"),
    ("kernel", "chunks"),
    ("kernel", "paths"),
    ("chunks", "paths"),
    ("chunks", "plan"),
    ("kernel", "plan"),
    ("plan", "paths"),
    ("comparison", "flux"),
    ("drift", "flux"),
    ("tags", "figures"),
    ("measure", "ways"),
    ("run", "measure"),
    ("run", "snapshot"),
    ("collapse", "snapshot"),
    ("quantisation", "measure"),
    ("run", "trajectory"),
    ("monitor", "schedule"),
    ("monitor", "outlet"),
    ("monitor", "resume"),
    ("cli", "callbacks"),
    ("renormalizability_callback", "callbacks"),
    ("renormalizability_callback", "renormalizability_monitor"),
}
IMPORT_NOTHING_OF_OURS = {"exponents", "testing"}

DOORS = {  # who may use it
    "lightning": {"callbacks", "cli"},
    "pytorch_lightning": {"callbacks", "cli"},
    "lightning_fabric": {"callbacks", "cli"},
    "tensorboard": {"sinks", "cli"},
    "torch.utils.tensorboard": {"sinks", "cli"},
    "matplotlib": {"figures"},
    "torch.distributed": {"distributed"},
}
ONLY_IN_FUNCTIONS = {"matplotlib", "tensorboard", "torch.utils.tensorboard"}
HEAVY = ("lightning", "pytorch_lightning", "lightning_fabric", "tensorboard", "matplotlib")


def modules(root):
    """Module name (a folder counts as one module) and path of every source file; `__init__` has no level."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).with_suffix("").parts[0]
        if name != "__init__":
            yield name, path


def is_typing_guard(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imported_names(tree, depth=0):
    """(dotted name, inside a function, only for type checkers) of all that a module imports or spells out.

    `depth` is the module's depth below the package; relative imports come out as "grsd_callbacks.x".
    """
    found = []

    def visit(node, in_function, typing_only):
        if isinstance(node, ast.Import):
            found.extend((alias.name, in_function, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level > depth + 1:
                raise AssertionError("a relative import leaves the package")
            if node.level == depth + 1:
                base = f"grsd_callbacks.{base}".rstrip(".")
            if node.level in (0, depth + 1):  # others stay inside a folder, which is one module
                found.extend((f"{base}.{alias.name}", in_function, typing_only) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            found.append((ast.unparse(node), in_function, typing_only))
        in_function |= isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            guarded = typing_only or (is_typing_guard(node) and child in node.body)
            visit(child, in_function, guarded)

    visit(tree, False, False)
    return found


def complaints(root):
    """Every breach of the rules in a package folder, as sentences."""
    for name, path in modules(root):
        if name not in LEVEL:
            yield f"{path.name}: add {name!r} to LEVELS in tests/test_layout.py, at the level it belongs to"
            continue
        depth = len(path.relative_to(root).parts) - 1
        for dotted, in_function, typing_only in imported_names(ast.parse(path.read_text()), depth):
            yield from level_complaints(name, dotted, root)
            if not typing_only:
                yield from door_complaints(name, dotted, in_function)


def level_complaints(name, dotted, root):
    if not dotted.startswith("grsd_callbacks."):
        return
    target = dotted.split(".")[1]
    if target == name:
        return
    if name in IMPORT_NOTHING_OF_OURS:
        yield f"{name} imports {target}, and may import nothing of ours"
    elif target not in LEVEL:
        yield f"{name} imports {dotted}: import from the module that defines it"
    elif LEVEL[target] >= LEVEL[name] and (name, target) not in SAME_LEVEL:
        yield f"{name} (level {LEVEL[name]}) imports {target} (level {LEVEL[target]})"


def door_complaints(name, dotted, in_function):
    for package, allowed in DOORS.items():
        if dotted != package and not dotted.startswith(f"{package}."):
            continue
        if name not in allowed:
            yield f"{name} uses {dotted}; only {', '.join(sorted(allowed))} may"
        elif package in ONLY_IN_FUNCTIONS and not in_function:
            yield f"{name} uses {dotted} outside a function"


def test_our_modules_keep_the_rules():
    assert {name for name, _ in modules(PACKAGE)}, "no module found"
    assert list(complaints(PACKAGE)) == []


@pytest.mark.parametrize(
    "file, source, complaint",
    [
        ("kernel.py", "from .functional import f", None),
        ("kernel.py", "from . import spectrum", "kernel (level 2) imports spectrum (level 3)"),
        ("kernel.py", "def f():\n    from .spectrum import g", "kernel (level 2) imports spectrum (level 3)"),
        ("kernel.py", "from grsd_callbacks.measure import g", "kernel (level 2) imports measure (level 6)"),
        ("kernel.py", "import grsd_callbacks.measure", "kernel (level 2) imports measure (level 6)"),
        ("kernel.py", "from . import NTKOperator", "kernel imports grsd_callbacks.NTKOperator: import from"),
        ("gram.py", "from .kernel import g", "gram (level 2) imports kernel (level 2)"),
        ("kernel.py", "from .gram import g", None),
        ("kernel.py", "from .testing import f", "kernel (level 2) imports testing (level 11)"),
        ("testing.py", "from .krylov import f", "testing imports krylov, and may import nothing of ours"),
        ("exponents.py", "from .krylov import f", "exponents imports krylov, and may import nothing of ours"),
        ("kernel/rows.py", "from .blocks import f\nfrom ..functional import g", None),
        ("kernel/rows.py", "from ..spectrum import g", "kernel (level 2) imports spectrum (level 3)"),
        ("new.py", "", "new.py: add 'new' to LEVELS"),
        ("callbacks/lightning_facts.py", "import lightning.pytorch as L", None),
        ("monitor.py", "def f():\n    import lightning", "monitor uses lightning; only callbacks, cli may"),
        ("sinks.py", "def f():\n    from torch.utils.tensorboard import SummaryWriter", None),
        ("sinks.py", "from torch.utils.tensorboard import S", "sinks uses torch.utils.tensorboard.S outside a func"),
        ("sinks.py", "from torch.utils import tensorboard", "sinks uses torch.utils.tensorboard outside a function"),
        ("figures.py", "def f():\n    import matplotlib.pyplot as plt", None),
        ("figures.py", "import matplotlib.pyplot", "figures uses matplotlib.pyplot outside a function"),
        ("emission.py", "if TYPE_CHECKING:\n    from matplotlib.figure import Figure", None),
        ("emission.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import matplotlib", "emission uses matplotlib; only"),
        ("kernel.py", "torch.distributed.all_reduce(x)", "kernel uses torch.distributed.all_reduce; only"),
        ("distributed.py", "import torch.distributed as dist", None),
    ],
)
def test_the_rules_find_what_breaks_them(tmp_path, file, source, complaint):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    found = list(complaints(tmp_path))
    if complaint is None:
        assert found == []
    else:
        assert found and found[0].startswith(complaint)


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120, check=False
    )


def test_importing_the_package_imports_nothing_heavy():
    result = run_python(f"import sys, grsd_callbacks; print([name for name in {HEAVY} if name in sys.modules])")
    assert result.stdout == "[]\n", result.stderr


def test_all_but_the_callbacks_import_where_nothing_heavy_is_installed():
    names = sorted({name for name, _ in modules(PACKAGE)} - {"callbacks", "cli", "renormalizability_callback"})
    blocked = f"import sys, importlib\nfor name in {HEAVY}: sys.modules[name] = None\n"
    result = run_python(blocked + f"for name in {names}: importlib.import_module('grsd_callbacks.' + name)")
    assert result.returncode == 0, result.stderr
