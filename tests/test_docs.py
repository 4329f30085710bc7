"""The documentation points at code that is there.

Pages name functions, classes, methods and constants, and link each name to the file that defines it. Where a line of
code is the equation that the text explains, it is quoted after the name of its function and a colon:
``[`whiten`](../agents/objectives/advantages.py): `return ...` ``.
"""

from __future__ import annotations

import ast
import functools
import itertools
import json
import math
import pkgutil
import re
from pathlib import Path

import pytest

from agents.runs.algorithms import ALGORITHMS
from agents.runs.commands import COMMANDS
from agents.state.arguments import argument_defaults

ROOT = Path(__file__).parents[1]
CODE = ("agents", "text_env", "benchmarks", "data", "examples")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in ("docs", *CODE) for page in (ROOT / folder).rglob("*.md"))])
# Programs wrote these: they speak of the code as it was when it was measured.
REPORTS = [page for page in PAGES if page.is_relative_to(ROOT / "benchmarks" / "results")]
SOURCES = sorted(path for folder in (*CODE, "tests") for path in (ROOT / folder).rglob("*.py"))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`]+)`")
QUOTE = re.compile(r"\[`([\w.]+)`\]\(([^)\s]+\.py)\):\s+`([^`]+)`")
STATEMENT = re.compile(r"return .|.* [-+*/]?= ")
DOTTED = re.compile(r"(?<![\w./])(?:agents|text_env)(?:\.[A-Za-z_]\w*)+")
PATH = re.compile(r"(?<![\w./])(?:agents|text_env|benchmarks|data|docs|examples|tests)/[\w/.-]*\w")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def links(page: Path) -> list[tuple[str, str]]:
    """Text and target of every link into the repository."""
    return [
        (text, target.partition("#")[0])
        for text, target in LINK.findall(prose(page))
        if not re.match(r"[a-z]+:|#", target)
    ]


@functools.cache
def definitions(path: Path) -> dict[str, ast.stmt]:
    """What a file defines at its top level, by name; what its classes define, as ``Class.name``."""

    def of(body: list[ast.stmt], owner: str) -> dict[str, ast.stmt]:
        found: dict[str, ast.stmt] = {}
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found[owner + node.name] = node
            if isinstance(node, ast.ClassDef):
                found.update(of(node.body, f"{owner}{node.name}."))
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found.update({owner + name.id: node for name in targets if isinstance(name, ast.Name)})
        return found

    return of(ast.parse(path.read_text()).body, "")


def holds(function: ast.stmt, code: str) -> bool:
    """Whether a function has this statement or expression. Spaces, line breaks and comments make no difference."""
    quoted: ast.AST = ast.parse(code).body[0]
    if isinstance(quoted, ast.Expr):
        quoted = quoted.value
    return any(ast.dump(node) == ast.dump(quoted) for node in ast.walk(function) if type(node) is type(quoted))


CODE_LINKS = [(page, text, target) for page in PAGES for text, target in links(page) if target.endswith(".py")]
QUOTES = [(page, *quote) for page in PAGES for quote in QUOTE.findall(prose(page))]


def test_there_is_something_to_check() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/ppo.md", "benchmarks/README.md"} <= set(map(named, PAGES))
    assert len(CODE_LINKS) >= 50
    assert len(QUOTES) >= 18
    assert len([page for page, *_ in QUOTES if page.name == "ppo.md"]) >= 12


@pytest.mark.parametrize(
    ("page", "text", "target"), CODE_LINKS, ids=[f"{named(page)}:{text}" for page, text, _ in CODE_LINKS]
)
def test_a_link_to_code_names_what_the_file_defines(page: Path, text: str, target: str) -> None:
    names = SPAN.findall(text)
    assert names, f"Expected the link's text to be the name of what {target} defines, got {text!r}."
    assert [name for name in names if name not in definitions(page.parent / target)] == []


@pytest.mark.parametrize(
    ("page", "name", "target", "code"), QUOTES, ids=[f"{name}: {code[:40]}" for _, name, _, code in QUOTES]
)
def test_a_quoted_line_of_code_is_in_the_function_that_is_named_before_it(
    page: Path, name: str, target: str, code: str
) -> None:
    assert holds(definitions(page.parent / target)[name], code)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=named)
def test_no_line_of_code_is_quoted_without_the_function_that_it_is_in(page: Path) -> None:
    quoted = {code for other, *_, code in QUOTES if other == page}
    assert [span for span in SPAN.findall(prose(page)) if STATEMENT.match(span) and span not in quoted] == []


def test_the_readme_is_a_front_door_of_at_most_8_kb() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 8_192
    code = text.index("```python")
    assert text[:code].count("\n") <= 20  # on the first screen: how to train one's own model on one's own reward
    assert len(re.findall(r"!\[", text)) == 1
    five = text[text.index("## Five results") : text.index("## Where to go next")]
    assert len(re.findall(r"^- ", five, re.MULTILINE)) == 5
    assert all("](docs/" in line for line in re.split(r"^- ", five, flags=re.MULTILINE)[1:])


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    assert [target for _, target in links(page) if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_page_points_at_the_number_of_a_line(page: Path) -> None:
    assert re.findall(r"\S+#L\d+", page.read_text()) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in REPORTS], ids=named)
def test_what_a_page_names_is_there(page: Path) -> None:
    spans = SPAN.findall(prose(page))
    assert missing_names(" ".join(spans)) == []
    assert missing_paths(" ".join(spans)) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in REPORTS], ids=named)
def test_what_the_examples_of_a_page_import_is_there(page: Path) -> None:
    for language, code in FENCE.findall(page.read_text()):
        if language == "python":
            imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
            names = [f"{node.module}.{alias.name}" for node in imports for alias in node.names]
            assert missing_names(" ".join(names)) == []


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_what_a_docstring_names_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            assert missing_names(" ".join(SPAN.findall(text))) == []
            assert missing_paths(text) == []


@pytest.mark.parametrize("name", ["Makefile", "pyproject.toml"])
def test_what_the_build_files_name_is_there(name: str) -> None:
    text = (ROOT / name).read_text()
    assert PATH.findall(text)
    assert missing_paths(text) == []


def rows(page: Path, first: str) -> list[dict[str, str]]:
    """The table whose header begins with a cell, as the cells of each row by the header's; without a header, by ""."""
    lines = iter(page.read_text().splitlines())
    header = next(cells(line) for line in lines if line.startswith(f"| {first}"))
    next(lines)
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines))
    return [dict(zip(header, cells(line), strict=True)) for line in table]


def cells(line: str) -> list[str]:
    """The cells of a row of a table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def default_of(name: str, argument: str) -> object:
    """The default of an algorithm's argument, or of its environment's `group_size`."""
    algorithm = ALGORITHMS[name.lower()]
    own = {"group_size": algorithm.default_group_size}
    return {**argument_defaults(algorithm), **own}.get(argument, "–")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_page_of_an_algorithm_has_the_defaults_of_its_class(name: str) -> None:
    page = ROOT / "docs" / f"{name}.md"
    table = [list(row.values()) for row in rows(page, "argument")]
    said = {argument.strip("`"): ast.literal_eval(default.strip("`")) for argument, default, *_ in table}
    assert {"learning_rate", "n_episodes", "batch_size", "n_epochs", "kl_coef"} <= set(said)
    assert said == {argument: default_of(name, argument) for argument in said}


def test_the_table_of_all_algorithms_has_the_defaults_of_their_classes() -> None:
    table = rows(ROOT / "docs" / "algorithms.md", "| `learning_rate`")
    assert [row.pop("").strip("`").lower() for row in table] == list(ALGORITHMS)
    for name, row in zip(ALGORITHMS, table, strict=True):
        said = {key.strip("`"): cell if cell == "–" else ast.literal_eval(cell.strip("`")) for key, cell in row.items()}
        assert said == {argument: default_of(name, argument) for argument in said}


def test_the_algorithms_page_says_how_many_gradient_steps_a_rollout_has() -> None:
    table = rows(ROOT / "docs" / "algorithms.md", "| advantage")
    assert [row[""].strip("`").lower() for row in table] == list(ALGORITHMS)
    for row in table:
        defaults = argument_defaults(ALGORITHMS[row[""].strip("`").lower()])
        size = defaults["batch_size"] or defaults["n_episodes"]
        assert int(row["steps a rollout"]) == defaults["n_epochs"] * math.ceil(defaults["n_episodes"] / size)


def test_pages_say_the_speeds_that_the_table_has() -> None:
    table = rows(ROOT / "docs" / "performance.md", "figure |")
    columns = ("AMD EPYC, AVX-512", "AMD EPYC, AVX2", "Intel Xeon (older)")
    first = {row["figure"]: [row[column].split(" (")[0] for column in columns] for row in table}
    beside = [figures for name, figures in first.items() if re.search(r"÷ `generate\b", name)]
    amd, _, intel = ([float(figures[n]) for figures in beside if figures[n]] for n in range(3))
    readme, token = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/token_by_token.md"))
    assert f"{min(amd):.2f} to {max(amd):.2f} times as fast as `generate()`" in readme
    head, own = first["TRL 1.12.0 PPO iteration ÷ ours"], first["… ours with a separate critic, as TRL has it"]
    # Updates were measured with today's trust region on the second processor alone.
    assert f"{own[1]} times as fast as TRL's, and with the critic as a head on the policy {head[1]} times" in readme
    assert f"it was {min(intel):.2f} to {max(intel):.2f}, {own[2]} and {head[2]}" in readme
    assert f"{amd[0]:.2f} times as fast as transformers' `generate()`" in token
    assert f"({intel[0]:.2f} on an Intel Xeon, older)" in token
    share = next(figures for name, figures in first.items() if name.startswith("share of the rollout"))
    assert f"{100 * float(share[0]):.1f} % of a rollout is spent in" in token
    update = next(figures for name, figures in first.items() if name.startswith("PPO update ÷ bare"))
    assert f"{update[1]} times the tokens a second of a bare forward and backward pass" in token
    assert f"takes {head[1]} times as long" in token
    assert f"and {own[1]} times as long as one with a critic of its own" in token


def test_pages_say_what_the_seeds_of_the_demo_and_the_trials_of_the_defaults_came_to() -> None:
    measured = ROOT / "benchmarks" / "results"
    seeds = json.loads((measured / "demo_seeds.json").read_text())["seeds"]
    trials = json.loads((measured / "trials" / "results.json").read_text())
    results, ppo = (" ".join((ROOT / "docs" / name).read_text().split()) for name in ("results.md", "ppo.md"))

    def span(key: str, style: str) -> str:
        return " to ".join(f"{end:{style}}" for end in (min(row[key] for row in seeds), max(row[key] for row in seeds)))

    said = f"score {span('score_gain_std', '+.2f')} standard deviations, gold score {span('gold_gain', '+.2f')}, KL "
    said += f"{span('kl', '.1f')} nats, distinct-2 {span('distinct_2_ratio', '.2f')} of the start"
    assert said in results

    def objective(*names: str) -> list[str]:
        found = [[row["objective"] for row in trials if row["trial"] == name] for name in names]
        return [f"{sum(objectives) / len(objectives):.2f}" for objectives in found]

    critics = objective("head, 4 epochs", "copy, 4 epochs", "reward model, 4 epochs")
    assert "{} with a head on the policy, {} with a copy, {} with the reward model".format(*critics) in ppo
    passes = objective(*(f"reward model, {n}" for n in ("1 epoch at 4e-4", "2 epochs", "4 epochs at 1.5e-4")))
    assert "1 epoch at 4e-4 {}, 2 at 3e-4 {}, 4 at 1.5e-4 {}".format(*passes) in ppo
    small = objective("reward model, 2 epochs", *(f"reward model, 2 epochs, lambda 0.{n}" for n in (9, 8, 6)))
    assert "0.95: {}; 0.9: {}; 0.8: {}; 0.6: {}".format(*small) in ppo
    assert "next to nothing is learned in this time ({})".format(*objective("head, trust region 0.1")) in ppo


def test_the_page_about_ppo_has_the_table_of_the_ablation() -> None:
    table = (ROOT / "benchmarks" / "results" / "ablation" / "table.md").read_text()
    assert table in (ROOT / "docs" / "ppo.md").read_text()


def test_the_page_about_the_command_line_shows_and_explains_every_command() -> None:
    page = (ROOT / "docs" / "command_line.md").read_text()
    shown = re.findall(r"^textrlhf ([\w-]+)", "".join(code for _, code in FENCE.findall(page)), re.MULTILINE)
    assert set(shown) == set(COMMANDS)
    assert [name for name in COMMANDS if f"- **`{name}`**" not in page] == []


def missing_names(text: str) -> list[str]:
    """The dotted names of either package that nothing bears."""

    def is_there(name: str) -> bool:
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            return False
        return True

    return [name for name in DOTTED.findall(text) if not is_there(name)]


def missing_paths(text: str) -> list[str]:
    """The paths, from the root of the repository, at which there is nothing."""
    return [path for path in PATH.findall(text) if not (ROOT / path).exists()]


def test_a_wrong_name_path_or_quotation_is_noticed() -> None:
    assert missing_names("`agents.PPO` `agents.ppo.PPO` `text_env.episodes.NO_ACTION`") == ["agents.ppo.PPO"]
    assert missing_paths("agents/cli.py, agents/ppo.py, docs/ppo.md") == ["agents/ppo.py"]
    losses = definitions(ROOT / "agents" / "objectives" / "losses.py")
    assert "clipped_surrogate" in losses
    assert "torch" not in losses
    assert "EpisodeBuffer.finalize" in definitions(ROOT / "agents" / "rollouts" / "episode_buffer.py")
    assert holds(losses["policy_gradient"], "return  -log_prob*advantages")
    assert not holds(losses["policy_gradient"], "return log_prob * advantages")
    assert not holds(losses["clipped_surrogate"], "return -log_prob * advantages")
