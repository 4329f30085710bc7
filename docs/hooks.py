"""What makes a site of the pages in this folder and of the repository around it, when MkDocs builds it.

The pages are plain Markdown that reads well in the repository too: links point at files. On the site a link to a name
in one of the packages leads to its place in the API reference, and a link to any other file leads to a copy of it. The
front page is ``README.md``; the order of the API reference is the reading order in ``CONTRIBUTING.md``.

``<!-- code: agents/algorithms/rloo.py RLOO.estimate -->`` becomes the code of that name, as it is today; without a name
it becomes the whole file. A reader of the repository doesn't see it, and follows the link before it.
"""

from __future__ import annotations

import ast
import functools
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGES = ("text_env", "agents")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\[[^\]]*\])\(([^)\s#]*)(#[^)\s]*)?\)")
CODE = re.compile(r"^<!-- code: (\S+\.py) ?([\w.]*) -->$", re.MULTILINE)


def origin(src_uri: str) -> str:
    """
    :param src_uri: where a page is on the site.
    :return: where its text is in the repository.
    """
    if src_uri == "index.md":
        return "README.md"
    return f"docs/{src_uri}" if (ROOT / "docs" / src_uri).exists() else src_uri


def place(path: str) -> str:
    """
    :param path: a file of the repository.
    :return: where it is on the site: a page for Markdown and for code, a copy of anything else.
    """
    if path == "README.md":
        return "index.md"
    if path.endswith(".py"):
        return f"{'api' if path.split('/')[0] in PACKAGES else 'source'}/{path.removesuffix('.py')}.md"
    return path.removeprefix("docs/")


@functools.cache
def definitions(path: str) -> dict[str, ast.AST]:
    """
    :param path: a file of code.
    :return: its functions and classes by name, and the methods of its classes as ``Class.name``.
    """
    found: dict[str, ast.AST] = {}
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{inner.name}": inner for inner in node.body if hasattr(inner, "name")}
    return found


def is_documented(path: str, name: str) -> bool:
    """
    :param path: a file of code.
    :param name: a name in it.
    :return: whether the name has an entry of its own in the API reference.
    """
    node = definitions(path).get(name)
    if not isinstance(node, ast.FunctionDef | ast.ClassDef) or any(part.startswith("_") for part in name.split(".")):
        return False
    return bool(ast.get_docstring(node)) or ast.unparse(node.body[0]).startswith("__doc__ = ")


def excerpt(path: str, name: str) -> str:
    """
    :param path: a file of code.
    :param name: a function or a class in it; empty: all of it.
    :return: the code as a block of Markdown; that of a function or a class without its docstring.
    """
    code = (ROOT / path).read_text()
    if not name:
        return f'```python title="{path}"\n{code}```'
    node: Any = definitions(path)[name]
    lines = code.splitlines()
    hidden = range(0)
    if ast.get_docstring(node):
        hidden = range(node.body[0].lineno, node.body[0].end_lineno + 1)
    shown = [lines[number - 1] for number in range(node.lineno, node.end_lineno + 1) if number not in hidden]
    indent = min(len(line) - len(line.lstrip()) for line in shown if line.strip())
    return "\n".join([f'```python title="{path}: {name}"', *(line[indent:] for line in shown), "```"])


def reading_order() -> dict[str, list[str]]:
    """
    :return: the folders of the reading order in ``CONTRIBUTING.md``, with the paths of their files.
    """
    folders: dict[str, list[str]] = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        if heading := re.match(r"### `((?:text_env|agents)/[\w/]*)`: ", line):
            folder = heading[1]
            folders.setdefault(folder, [])
        elif row := re.match(r"\| `([\w/]+\.py)` \| ", line):
            folders[folder].append(folder + row[1])
    return folders


def module(path: str) -> str:
    """
    :param path: a file of code.
    :return: the name of the module.
    """
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def api_index() -> str:
    """
    :return: the first page of the API reference: the public names and what each is.
    """
    lines = ["# API reference", "", "What the two packages export; every module follows in reading order.", ""]
    for package in PACKAGES:
        lines += [f"## `{package}`", "", "| name | what it is |", "| --- | --- |"]
        extensions = griffe.load_extensions(str(ROOT / "docs" / "docstrings.py"))
        members = griffe.load(package, search_paths=[str(ROOT)], extensions=extensions).members
        for name in sorted(members):
            if members[name].is_alias and members[name].target_path.startswith(PACKAGES) and name in exported(package):
                described = members[name].final_target
                said = described.docstring.value.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
                lines.append(f"| [`{name}`][{described.path}] | {said} |")
        lines.append("")
    return "\n".join(lines)


def exported(package: str) -> set[str]:
    """
    :param package: one of the two packages.
    :return: the strings in its ``__init__.py``, among which are the names that it exports.
    """
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def on_config(config: MkDocsConfig) -> None:
    """Put the API reference at the end of the navigation."""
    api: list[Any] = [{"Public names": "api/index.md"}]
    for folder, files in reading_order().items():
        api.append({folder: [{path.removeprefix(folder): place(path)} for path in files]})
    config.nav.append({"API reference": api})


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside of this folder: the front page, the API reference, and all files that a page links to."""
    pages = {"api/index.md": api_index()}
    for modules in reading_order().values():
        for path in modules:
            # The public names of a package are described where they are defined.
            hidden = "    options: {members: false}\n" if path.endswith("__init__.py") else ""
            pages[place(path)] = f"::: {module(path)}\n{hidden}"
    todo = ["README.md", "CHANGELOG.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(todo)
    while todo:
        path = todo.pop()
        here = place(path)
        if path.endswith(".md"):
            text = (ROOT / path).read_text()
            targets = {resolved(path, target) for _, target, _ in LINK.findall(FENCE.sub("", text)) if is_local(target)}
            targets = {target for target in targets if (ROOT / target).is_file()}  # MkDocs warns of the others
            todo += sorted(targets - seen)
            seen |= targets
            if files.get_file_from_path(here) is None:
                pages[here] = text
        elif path.endswith(".py"):
            pages.setdefault(here, f"# `{path}`\n\n{excerpt(path, '')}\n")
        else:
            files.append(File.generated(config, here, abs_src_path=str(ROOT / path)))
    for here, text in pages.items():
        files.append(File.generated(config, here, content=text))
    return files


def is_local(target: str) -> bool:
    """
    :param target: of a link.
    :return: whether it is a file of the repository.
    """
    return bool(target) and not re.match(r"[a-z]+:", target)


def resolved(path: str, target: str) -> str:
    """
    :param path: of a file of the repository.
    :param target: of a link in it.
    :return: the path that the link leads to, from the root of the repository.
    """
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the places of their targets on the site, and put in the code that a page asks for."""
    here = page.file.src_uri
    if here.startswith(("api/", "source/")):
        return markdown
    path = origin(here)

    def moved(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if not is_local(target):
            return found[0]
        target = resolved(path, target)
        if target.endswith(".py") and target.split("/")[0] in PACKAGES:
            for name in re.findall(r"`([\w.]+)`", text):
                if is_documented(target, name):
                    return f"{text}[{module(target)}.{name}]"
        return f"{text}({posixpath.relpath(place(target), posixpath.dirname(here))}{anchor})"

    parts = re.split(f"({FENCE.pattern})", markdown, flags=FENCE.flags)
    moved_parts = [part if number % 2 else LINK.sub(moved, part) for number, part in enumerate(parts)]
    return CODE.sub(lambda found: excerpt(found[1], found[2]), "".join(moved_parts))
