"""The pages on testing show what the kit says."""

import contextlib
import io
import re
from pathlib import Path

import hypothesis
import pytest

from mtlweight import testing
from mtlweight.testing import checks

DOCS = Path(__file__).parents[2] / "docs"


def test_the_failures_on_the_page_are_what_the_kit_prints():
    page = (DOCS / "custom_weighting.md").read_text()
    blocks = re.findall(r"```(python|text)\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {"__name__": "__main__"}
    hypothesis.settings.register_profile("before", hypothesis.settings())
    hypothesis.settings.register_profile("docs", hypothesis.settings(), derandomize=True)
    hypothesis.settings.load_profile("docs")
    try:
        printed = io.StringIO()
        for kind, block in blocks:
            if kind == "python":
                with contextlib.redirect_stdout(printed):
                    exec(block, names)
            else:
                assert printed.getvalue() == block
                printed = io.StringIO()
        assert printed.getvalue() == ""
    finally:
        hypothesis.settings.load_profile("before")


@pytest.mark.parametrize("name", [*testing.__all__, *checks.__all__])
def test_the_docs_mention_the_name_as_code(name):
    text = (DOCS / "testing.md").read_text()
    assert re.search(rf"`@?(?:mtlweight\.)?{name}\b", text)


@pytest.mark.parametrize("name", [*testing.__all__, *checks.__all__])
def test_the_name_has_a_docstring(name):
    assert (getattr(testing, name, None) or getattr(checks, name)).__doc__
