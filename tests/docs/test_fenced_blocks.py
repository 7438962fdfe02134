"""Runs what a reader would copy: fenced blocks of the Markdown pages, examples of the docstrings."""

import doctest
import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest
import torch
from sybil import Document, Example, Sybil
from sybil.evaluators.python import pad
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

import mtlweight

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NOT_CODE = {"text": "output", "mermaid": "a diagram"}


def run_both_sides(example: Example) -> None:
    """The program before the change, in a copy of the page's names, then the program after it."""
    for drop, namespace in (("+", dict(example.namespace)), ("-", example.namespace)):
        lines = ["" if line.startswith(drop) else line[1:] for line in example.parsed.splitlines()]
        exec(compile(pad("\n".join(lines), example.line), example.path, "exec"), namespace)


def check_command(example: Example) -> None:
    """Commands install and take minutes, so CI runs them elsewhere; here only what they refer to must exist."""
    subprocess.run(["bash", "-n", "-c", example.parsed], check=True)
    for script in re.findall(r"[\w./-]+\.py\b", example.parsed):
        assert (ROOT / script).is_file(), f"{example.path}:{example.line}: there is no {script}"
    known = set(importlib.metadata.metadata("mtlweight").get_all("Provides-Extra", []))
    for extras in re.findall(r"\.\[([\w,-]+)\]", example.parsed):
        unknown = set(extras.split(",")) - known
        assert not unknown, f"{example.path}:{example.line}: pyproject.toml has no extras {unknown}"


BLOCKS = Sybil(
    parsers=[
        PythonCodeBlockParser(),
        CodeBlockParser("diff", run_both_sides),
        CodeBlockParser("bash", check_command),
    ]
)


def run_page(path: Path) -> None:
    """All blocks of a page, in order, sharing their names."""
    document = BLOCKS.parse(path)
    document.namespace["__name__"] = "__main__"
    for example in document:
        example.evaluate()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# tests/testing/test_docs.py runs the blocks of this page and reads what they print.
PRINTS = ROOT / "docs" / "custom_weighting.md"


@pytest.mark.parametrize("page", [p for p in PAGES if p != PRINTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_fenced_block_of_the_page_runs(page):
    run_page(page)


@pytest.mark.training
@pytest.mark.parametrize("seed", range(1, 10))  # 0 is the page's own
@pytest.mark.parametrize("page", ["docs/slgrad.md"])
def test_what_the_page_asserts_of_a_training_holds_for_every_seed(page, seed, monkeypatch):
    seeded, given = torch.manual_seed, []
    monkeypatch.setattr(torch, "manual_seed", lambda of_the_page: given.append(of_the_page) or seeded(seed))
    run_page(ROOT / page)
    assert given  # otherwise all of these were one and the same training


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_fenced_block_of_the_page_has_a_language_that_is_run_or_is_not_code(page):
    fences = RawFencedCodeBlockLexer(re.compile(r"(?P<language>.*)\n"))
    for region in fences(Document.parse(str(page))):
        line = page.read_text().count("\n", 0, region.start) + 1
        language = region.lexemes["language"]
        assert language in {"python", "diff", "bash", *NOT_CODE}, f"{page}:{line}: a block of language {language!r}"


def docstrings_with_examples() -> list[doctest.DocTest]:
    names = [module.name for module in pkgutil.walk_packages(mtlweight.__path__, "mtlweight.")]
    modules = [mtlweight, *map(importlib.import_module, names)]
    # Not the module's own globals: an example may use what a reader can.
    names_of_a_reader: dict[str, object] = {}
    exec("import torch\nfrom mtlweight import *", names_of_a_reader)
    finder = doctest.DocTestFinder()
    found = [test for module in modules for test in finder.find(module, globs=names_of_a_reader)]
    return [test for test in found if test.examples]


@pytest.mark.parametrize("example", docstrings_with_examples(), ids=lambda example: example.name)
def test_the_example_of_the_docstring_runs_by_itself_and_prints_what_it_says(example):
    output: list[str] = []
    failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=output.append).failed
    assert not failed, "".join(output)


def page_with(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(text)
    return page


def test_a_block_sees_the_names_of_the_blocks_above_it_and_a_failure_points_to_its_line(tmp_path):
    page = page_with(tmp_path, "# Title\n\n```python\nzero = 0\n```\n\n```python\nprint()\n1 / zero\n```\n")
    with pytest.raises(ZeroDivisionError) as error:
        run_page(page)
    assert (str(error.traceback[-1].path), error.traceback[-1].lineno + 1) == (str(page), 9)


@pytest.mark.parametrize(("side", "line"), [("-", 6), ("+", 7)])
def test_a_diff_runs_on_both_sides_and_a_failure_points_to_its_line(tmp_path, side, line):
    diff = "```python\nzero, one = 0, 1\n```\n```diff\n for _ in range(1):\n-    1 / old\n+    1 / new\n```\n"
    values = {"old": "one", "new": "one", {"-": "old", "+": "new"}[side]: "zero"}
    page = page_with(tmp_path, diff.replace("old", values["old"]).replace("new", values["new"]))
    with pytest.raises(ZeroDivisionError) as error:
        run_page(page)
    assert (str(error.traceback[-1].path), error.traceback[-1].lineno + 1) == (str(page), line)


@pytest.mark.parametrize("command", ["python no_such_file.py", 'pip install -e ".[no-such-extra]"'])
def test_a_command_that_refers_to_what_is_not_there_fails(tmp_path, command):
    with pytest.raises(AssertionError, match=r"there is no|has no extras"):
        run_page(page_with(tmp_path, f"```bash\n{command}\n```\n"))
