"""The documentation runs: every Python block of every page, every link, every picture, every warning."""

import ast
import re
import warnings
from pathlib import Path

import pytest
import torch

import grsd_callbacks as grsd

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text())]
#: what is made smaller in a page's code, so that the tests stay short
SMALLER = {"steps = 3000": "steps = 24"}


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "page"}
    for block in BLOCK.findall(page.read_text()):
        for old, new in SMALLER.items():
            block = block.replace(old, new)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
            warnings.filterwarnings("ignore", "`isinstance.treespec")
            warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
            exec(compile(block, str(page), "exec"), names)


def test_what_is_made_smaller_is_there():
    text = "".join(page.read_text() for page in PAGES)
    assert all(text.count(old) == 1 for old in SMALLER)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_picture_has_its_script_in_the_text():
    for page in PAGES:
        if re.search(r"!\[", page.read_text()):
            assert re.search(r"python examples/\w+\.py --out docs/", page.read_text()), page


def test_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    assert all(f"({page.name})" in index for page in PAGES if page.stem != "README")


def test_every_public_name_is_on_its_page():
    page = (ROOT / "docs" / "api.md").read_text()
    named = re.findall(r"^\| `(\w+)` \| ", page, flags=re.MULTILINE)
    assert sorted(named) == sorted(grsd.__all__)


def constant_parts(message):
    """The fixed pieces of a string or an f-string in the source; none for a variable."""
    values = message.values if isinstance(message, ast.JoinedStr) else [message]
    return [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]


def emitted_warnings():
    """Fixed pieces of every warning's text in the package, with the place it comes from."""
    for path in sorted((ROOT / "grsd_callbacks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).split(".")[-1]
            arguments = node.args[1:2] if name == "warn_once" else node.args[:1] if name in ("warn", "notice") else []
            for message in arguments:
                if parts := constant_parts(message):
                    yield f"{path.name}:{node.lineno}", parts


def test_every_warning_is_explained():
    page = (ROOT / "docs" / "warnings.md").read_text()
    quoted = [
        [piece.strip() for piece in words.split("...") if piece.strip()]
        for words in re.findall(r'\*\*"(.*?)"\*\*', " ".join(page.split()))
    ]
    found = dict(emitted_warnings())
    assert len(found) >= 10
    for place, parts in found.items():
        text = " ".join(" ".join(parts).split())
        assert any(all(piece in text for piece in words) for words in quoted), (
            f'{place}: explain this warning in docs/warnings.md, under a few of its words as **"..."**: {text}'
        )
