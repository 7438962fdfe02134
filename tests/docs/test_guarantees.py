"""The page of guarantees names tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guarantees.md").read_text()
ROWS = {cells[1].strip(): cells[2] for cells in (line.split("|") for line in PAGE.splitlines() if "::" in line)}


@pytest.mark.parametrize("tests", ROWS.values(), ids=ROWS)
def test_a_promise_names_tests_that_exist(tests):
    file = None
    named = re.findall(r"`(tests/[\w/]+\.py)?::(\w+)(\.\.\.)?`", tests)
    assert named
    for path, name, cut in named:
        file = path or file
        end = "" if cut else r"( =|\()"
        assert re.search(rf"^(def )?{name}{end}", (ROOT / file).read_text(), re.MULTILINE), name


def test_every_row_names_a_test():
    rows = re.findall(r"^\| .+ \|$", PAGE, re.MULTILINE)
    promises = [row for row in rows if not row.startswith("| promise ")]
    assert [row for row in promises if "::" not in row] == [row for row in promises if "the same test" in row]
