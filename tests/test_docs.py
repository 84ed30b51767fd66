"""The documentation runs: every Python block of every page, every link, every picture, every warning."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from warning_texts import Package, Unreadable

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


# ---- warnings ----


def quoted(text, mark='"'):
    """Patterns of the words quoted on a page, "..." standing for anything."""
    words = re.findall(f"{re.escape(mark)}(.*?){re.escape(mark[::-1])}", " ".join(text.split()))
    return {w: re.compile(".*?".join(re.escape(piece.strip()) for piece in w.split("...")), re.DOTALL) for w in words}


def complaints_about_warnings(package, page):
    """What is wrong with a page that is to explain each of a package's warnings under a few of its words."""
    headings = quoted(page, '**"')
    left = set(headings)
    for place, text in package.warnings():
        found = [words for words, pattern in headings.items() if pattern.search(text)]
        left -= set(found)
        if len(found) != 1:
            what = "in one place only" if found else "under a few of its words"
            yield f'{place}: explain this warning in docs/warnings.md {what}, as **"..."**: {text}'
    for words in sorted(left):
        yield f'docs/warnings.md: no warning says "{words}"'


def test_every_warning_is_explained():
    package, page = Package(ROOT / "grsd_callbacks"), (ROOT / "docs" / "warnings.md").read_text()
    assert len(list(package.warnings())) >= 17
    assert list(complaints_about_warnings(package, page)) == []


def test_every_sentence_of_the_check_of_the_model_is_explained():
    patterns = quoted((ROOT / "docs" / "warnings.md").read_text()).values()
    package = Package(ROOT / "grsd_callbacks")
    sentences = package.returned("_checked", package.trees["refusals.py"])
    assert len(sentences) == 2
    for text in sentences:
        assert any(len(pattern.pattern) > 20 and pattern.search(text) for pattern in patterns), text


HEAD = "from .outlet import warn\n"


@pytest.mark.parametrize(
    ("source", "page", "complaint"),
    [
        ('warn(f"all of {n} went")', '**"all of ... went"**', None),
        ('def f():\n    text = "one" if x else "two"\n    warn(text)', '**"one"** **"two"**', None),
        ('def g():\n    return f"{x} is" + " new"\nif text := g():\n    warn(g())', '**"is new"**', None),
        ('def warn(message):\n    notice(message)\nself.warn_once("key", "known")', '**"known"**', None),
        ('warnings.warn(message="of one word")', '**"one word"**', None),
        ('warn("new")', "", "a/__init__.py:2: explain this warning in docs/warnings.md under a few of its words"),
        ('warn(f"all of {n} went")', '**"went all of"**', "a/__init__.py:2: explain this warning"),
        ('warn(f"all of {n} went")', '**"all of"** **"went"**', "a/__init__.py:2: .* in one place only"),
        ('warn("new")', '**"new"** **"old"**', 'docs/warnings.md: no warning says "old"'),
        ("warn(error.args[0])", "", "a/__init__.py:2: the text of this warning cannot be read"),
        ("def f(text):\n    warn(text)", "", "a/__init__.py:3: the text of this warning cannot be read"),
        ("warn()", "", "a/__init__.py:2: warn.. without a message"),
        ("tell = outlet.warn", "", "a/__init__.py:2: call warn by its name"),
        ("partial(warn, 'new')", "", "a/__init__.py:2: call warn by its name"),
        ("from .notice import notice as tell", "", "a/__init__.py:2: import notice under its own name"),
    ],
)
def test_the_check_of_warnings_finds_what_is_not_explained(tmp_path, source, page, complaint):
    for name in ("a", "b"):  # of one name, and with a warning on the same line
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "__init__.py").write_text(HEAD + source)
    (tmp_path / "b" / "__init__.py").write_text(HEAD + 'warn("another")')
    try:
        found = list(complaints_about_warnings(Package(tmp_path), page + '**"another"**'))
    except Unreadable as error:
        found = [str(error)]
    if complaint is None:
        assert found == []
    else:
        assert re.match(complaint, found[0])
