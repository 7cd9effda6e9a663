"""The pictures of README.md show what is committed, and the table of docs/benchmarks.md says the same."""

import json
from xml.etree import ElementTree

import pytest
from support.paths import ROOT

from benchmarks import pictures


@pytest.mark.parametrize("name", pictures.pictures())
def test_pictures_are_drawn_from_what_is_committed(name):
    """`python -m benchmarks.pictures` draws them."""
    drawn = pictures.pictures()[name]
    assert (pictures.IMAGES / name).read_text() == drawn
    ElementTree.fromstring(drawn)
    assert f"](docs/images/{name})" in (ROOT / "README.md").read_text()


def test_terminal_shows_every_line():
    text = "$ jetkernels demo\n" + "word " * 50 + "\n\n  <a> & b\n"
    shown = [element.text or "" for element in ElementTree.fromstring(pictures.terminal(text)) if element.text]
    assert shown[0] == "$ jetkernels demo" and shown[-1] == "  <a> & b"
    assert " ".join(shown[1:-1]).split() == ["word"] * 50


def test_chart_and_table_say_the_same():
    found = pictures.speed_ups(json.loads(pictures.TIMES.read_text()))
    rows = (ROOT / "docs" / "benchmarks.md").read_text().split("\n")
    for op, _, _, _ in pictures.BARS:
        both = f"{found[op, 'fp32']:.1f}x, {found[op, 'bf16']:.1f}x"
        assert any(row.endswith(f"| {both} |") for row in rows), (op, both)
