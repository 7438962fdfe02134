"""Every name that users type is documented."""

import inspect
import re
from pathlib import Path

import pytest

import mtlweight

DOCS = Path(__file__).parents[2] / "docs"
NAMES = sorted(name for name in mtlweight.__all__ if not name.startswith("__"))
WEIGHTINGS = [
    name
    for name in NAMES
    if inspect.isclass(value := getattr(mtlweight, name))
    and issubclass(value, mtlweight.Weighting)
    and not inspect.isabstract(value)
]


def text_of(folder: Path) -> str:
    return "\n".join(page.read_text() for page in sorted(folder.rglob("*.md")))


@pytest.mark.parametrize("name", NAMES)
def test_the_name_has_a_docstring_of_its_own(name):
    docstring = getattr(mtlweight, name).__doc__ or ""
    # A dataclass without a docstring gets its signature as one.
    assert docstring
    assert not docstring.startswith(f"{name}(")


@pytest.mark.parametrize("name", NAMES)
def test_the_docs_mention_the_name_as_code(name):
    assert re.search(rf"`(?:mtlweight\.)?{name}\b", text_of(DOCS)), f"no page under docs/ has `{name}` in it"


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_weighting_has_an_entry_of_its_own_under_docs_methods(name):
    assert re.search(rf"^#+ .*\b{name}\b", text_of(DOCS / "methods"), re.MULTILINE), f"no heading names {name}"


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_docstring_of_the_weighting_has_an_example(name):
    assert ">>> " in getattr(mtlweight, name).__doc__
