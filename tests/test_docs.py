"""The documentation points at code that is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[`([^`]+)`\]\(\.\./([\w/]+\.py)#L(\d+)\)")
PAGES = sorted((ROOT / "docs").glob("*.md"))
LINKS = [match.groups() for page in PAGES for match in LINK.finditer(page.read_text())]
REFERENCE = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def test_every_equation_has_a_link():
    assert len(LINKS) >= 20


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs"])
def test_what_a_page_points_at_is_there(path: str):
    pages = PAGES if path == "docs" else [ROOT / path]
    links = [(page, name) for page in pages for name in REFERENCE.findall(page.read_text())]
    missing = [name for page, name in links if not (page.parent / name).exists()]
    assert links or path not in ("README.md", "docs")
    assert missing == []


@pytest.mark.parametrize(("code", "path", "line"), LINKS, ids=[f"{path}:{code[:40]}" for code, path, _ in LINKS])
def test_a_linked_line_holds_the_code_that_the_text_quotes(code: str, path: str, line: str):
    lines = (ROOT / path).read_text().splitlines()
    found = [number for number, text in enumerate(lines, 1) if text.strip() == code]
    assert found == [int(line)]
