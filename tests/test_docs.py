"""The documentation points at code that is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[`([^`]+)`\]\(\.\./([\w/]+\.py)#L(\d+)\)")
LINKS = [match.groups() for match in LINK.finditer((ROOT / "docs" / "ppo.md").read_text())]


def test_every_equation_has_a_link():
    assert len(LINKS) >= 14


@pytest.mark.parametrize(("code", "path", "line"), LINKS, ids=[f"{path}:{code[:40]}" for code, path, _ in LINKS])
def test_a_linked_line_holds_the_code_that_the_text_quotes(code: str, path: str, line: str):
    lines = (ROOT / path).read_text().splitlines()
    found = [number for number, text in enumerate(lines, 1) if text.strip() == code]
    assert found == [int(line)]
