"""The house rules: imports run downward, leaf modules only, and the wheel holds the two packages."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]
PACKAGES = ("text_env", "agents")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, with_deferred: bool = True) -> set[str]:
    """Modules that a file imports; those inside functions and under TYPE_CHECKING only if asked for."""
    found = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            if deferred and not with_deferred:
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                assert child.module is not None
                # `from package import module` imports the module.
                for alias in child.names:
                    submodule = f"{child.module}.{alias.name}"
                    found.add(submodule if submodule in NAMES else child.module)
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


NAMES = {module_name(path): path for path in MODULES}


def graph(with_deferred: bool = False) -> dict[str, set[str]]:
    return {
        name: {other for other in imports_of(path, with_deferred) if other in NAMES} for name, path in NAMES.items()
    }


def reaches(edges: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for other in edges[todo.pop()] - seen:
            seen.add(other)
            todo.append(other)
    return seen


def test_the_modules_are_found() -> None:
    assert {"text_env.env", "text_env.episodes", "agents.policies.causal_lm_policy", "agents.cli"} <= set(NAMES)
    assert "agents.rollouts.episode_buffer" in graph()["agents.algorithms.on_policy"]


def test_imports_never_run_in_a_circle() -> None:
    edges = graph()
    assert [name for name in edges if name in reaches(edges, name)] == []


def test_an_engine_of_several_processes_is_not_imported_unless_several_were_launched() -> None:
    reached = reaches(graph(), "agents.runs.train")
    assert "agents.algorithms.engine" in reached
    assert "agents.algorithms.accelerate_engine" not in reached


def test_rollouts_of_other_programs_are_not_imported_unless_asked_for() -> None:
    reached = reaches(graph(), "agents.runs.train")
    assert "agents.rollouts.source" in reached
    others = ("backend", "continuations", "remote", "vllm_servers")
    assert not reached & {f"agents.rollouts.{name}" for name in others}


def test_the_environment_knows_nothing_of_the_learners() -> None:
    for name, path in NAMES.items():
        if name.startswith("text_env"):
            imported = {other.split(".")[0] for other in imports_of(path)}
            assert not imported & {"agents", "benchmarks", "stable_baselines3", "sb3_contrib", "peft"}, name


def test_inside_a_package_only_leaf_modules_are_imported() -> None:
    for name, path in NAMES.items():
        roots = imports_of(path) & set(PACKAGES)
        # The root of the other package, below, may be imported for its effect: it registers the environment's name.
        assert roots <= ({"text_env"} if name.startswith("agents") else set()), name


# From the top floor down. A folder imports only from those below it, and from itself.
FLOORS = (
    "cli",
    "runs",
    "evaluation",
    "reward_models",
    "algorithms",
    "rollouts",
    "policies",
    "models",
    "objectives",
    "state",
)


def floor(name: str) -> int:
    """
    :param name: a module of ``agents``.
    :return: the number of its folder, 0 at the top.
    """
    return FLOORS.index(name.split(".")[1])


def test_every_folder_of_the_learners_has_its_floor() -> None:
    assert {name.split(".")[1] for name in NAMES if name.startswith("agents.")} == set(FLOORS)


def test_imports_of_the_learners_run_downward() -> None:
    for name, others in graph(with_deferred=True).items():
        if name.startswith("agents."):
            upward = [other for other in others if other.startswith("agents.") and floor(other) < floor(name)]
            assert upward == [], f"{name} imports {upward}"


def test_the_tests_mirror_the_folders() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and list(path.glob("test_*.py"))}
    assert folders == {"text_env", "invariants", "benchmarks", "clients", "gpu", *FLOORS} - {"cli"}


def test_the_pure_functions_import_no_machinery() -> None:
    for name, allowed in (
        ("agents.objectives.advantages", {"numpy", "collections.abc"}),
        ("agents.evaluation.intervals", {"functools", "math", "numpy", "typing"}),
        ("agents.evaluation.value_figures", {"agents.evaluation.intervals", "numpy"}),
        ("agents.evaluation.pass_at_k", {"collections.abc", "itertools", "math", "numpy"}),
        ("agents.objectives.losses", {"math", "torch"}),
        ("agents.objectives.value_targets", {"torch"}),
        ("agents.objectives.kl", {"torch", "typing"}),
    ):
        assert imports_of(NAMES[name]) - {"__future__"} <= allowed


def test_no_algorithm_is_built_on_another() -> None:
    edges = graph()
    algorithms = {
        name
        for name in edges
        if name in {f"agents.algorithms.{a}" for a in ("ppo", "a2c", "reinforce", "rloo", "grpo", "dapo", "vineppo")}
    }
    assert "agents.algorithms.ppo" in algorithms
    for name in algorithms:
        assert not reaches(edges, name) & (algorithms - {name})


@pytest.mark.parametrize("module", ["torch", "stable_baselines3", "agents"])
def test_importing_the_environment_does_not_import(module: str) -> None:
    script = f"import sys, text_env, gymnasium; gymnasium.spec('TextRLHF-v0'); print({module!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_the_wheel_holds_the_two_packages_and_nothing_else() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tools, project = config["tool"]["setuptools"], config["project"]
    found = find_packages(str(ROOT), include=tools["packages"]["find"]["include"])
    on_disk = {module_name(path.parent / "__init__.py") for path in MODULES}  # no folder of modules lacks its file
    assert set(found) == on_disk == {name for name, path in NAMES.items() if path.name == "__init__.py"}
    assert project["scripts"] == {"textrlhf": "text_env.namesake:main"}
    for package in PACKAGES:
        assert "py.typed" in tools["package-data"][package]
        assert (ROOT / package / "py.typed").exists()


def test_what_the_packages_import_is_declared() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = config["project"]
    extras = project["optional-dependencies"]
    declared, optional = (
        {requirement.split(">")[0].split("[")[0].lower() for requirement in requirements}
        for requirements in (
            project["dependencies"],
            [name for extra in ("reward", "tasks", "wandb", "trackio", "mlflow") for name in extras[extra]],
        )
    )
    distribution = {
        "yaml": "pyyaml",
        "stable_baselines3": "stable-baselines3",
        "vaderSentiment": "vadersentiment",
        "sb3_contrib": "sb3-contrib",
        "PIL": "pillow",
        "pyarrow": "datasets",  # which requires it
        "math_verify": "math-verify",
        "reasoning_gym": "reasoning-gym",
        "mlflow": "mlflow-skinny",
    }
    standard = set(sys.stdlib_module_names)
    for name, path in NAMES.items():
        for with_deferred, allowed in ((False, declared), (True, declared | optional)):
            imported = {other.split(".")[0] for other in imports_of(path, with_deferred)} - standard - set(PACKAGES)
            assert {distribution.get(other, other).lower() for other in imported} <= allowed, name


def test_every_field_of_a_docstring_has_a_line_of_its_own() -> None:
    """Sphinx and editors read several on one line as a single field."""
    crowded = re.compile(r"\S +:(param \w+|return|raises [\w.]+):")
    for path in MODULES:
        lines = path.read_text().splitlines()
        assert [line for line in lines if crowded.search(line)] == [], path


# ---- the reading order in CONTRIBUTING.md --------------------------------------------------------------------------


def reading_order() -> tuple[list[str], list[Path]]:
    """
    :return: the folders of the two packages that have a heading in the reading order, and all files, both as they come.
    """
    folders: list[str] = []
    files: list[Path] = []
    table = False
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        if line.startswith("#"):
            heading = re.match(r"### `((?:text_env|agents)/[\w/]*)`: ", line)
            folders += [heading[1]] if heading else []
            table = heading is not None
        elif table and (row := re.match(r"\| `([\w/]+\.py)` \| \S", line)):
            files.append(ROOT / folders[-1] / row[1])
    return folders, files


def has_code(path: Path) -> bool:
    """Whether there is more in a file than its docstring."""
    return len(ast.parse(path.read_text()).body) > 1


def test_the_reading_order_goes_through_the_folders_from_the_environment_upward() -> None:
    floors = [f"agents/{name}/" for name in reversed(FLOORS) if name != "cli"]
    assert reading_order()[0] == ["text_env/", *floors, "agents/"]


def test_the_reading_order_names_every_file_once() -> None:
    files = reading_order()[1]
    assert len(set(files)) == len(files)
    read, written = ({str(path.relative_to(ROOT)) for path in paths} for paths in (files, filter(has_code, MODULES)))
    assert read == written


def test_a_file_imports_only_what_stands_before_it_in_the_reading_order() -> None:
    names = [module_name(path) for path in reading_order()[1]]
    assert len(names) >= 60
    edges = graph()
    for position, name in enumerate(names):
        # A root is imported for its effect alone: it registers the environment's name.
        later = edges.get(name, set()) - set(names[:position]) - set(PACKAGES)
        assert later == set(), f"{name} imports {later}"


def members(cls: type[Any]) -> Iterator[tuple[str, Any, bool]]:
    """
    :param cls: a class.
    :return: the names of the functions and properties that it defines, the functions and properties, and whether they
        override one of a base class.
    """
    for name, member in vars(cls).items():
        if isinstance(member, property | cached_property | classmethod | staticmethod) or inspect.isfunction(member):
            overrides = any(name in vars(base) for base in cls.__mro__[1:])
            yield name, getattr(cls, name) if isinstance(member, classmethod | staticmethod) else member, overrides


def parameters(described: Any) -> list[str]:
    """
    :param described: a function, a property or a class.
    :return: the names of the parameters of the function, or of the constructor of the class.
    """
    if isinstance(described, property | cached_property):
        return []
    if isinstance(described, type) and "__init__" in vars(described):
        described = inspect.unwrap(described.__init__)  # type: ignore[misc]
    return [name for name in inspect.signature(described).parameters if name != "self"]


def documented_parameters(described: Any) -> list[str]:
    """
    :param described: a function, a property or a class.
    :return: the names in the fields ``:param name:`` of its docstring.
    """
    return re.findall(r"^ *:param (\w+):", described.__doc__ or "", re.MULTILINE)


def takes_undocumented_arguments(cls: type[Any]) -> bool:
    """
    :param cls: a class without ``:param`` fields.
    :return: whether it has a constructor of its own with parameters. The fields of a dataclass may have help texts.
    """
    own = {"__init__", "__new__"} & set(vars(cls)) and not dataclasses.is_dataclass(cls)
    return bool(own and not getattr(cls, "_is_protocol", False) and parameters(cls))


@pytest.mark.parametrize("name", NAMES)
def test_everything_public_has_a_docstring_that_lists_its_parameters(name: str) -> None:
    """An override may leave the parameters, or all of the docstring, to the method that it overrides."""
    module = importlib.import_module(name)
    assert module.__doc__
    for qualified, value in vars(module).items():
        if getattr(value, "__module__", None) != name or not (inspect.isfunction(value) or isinstance(value, type)):
            continue
        documented = documented_parameters(value)
        if isinstance(value, type):
            described = list(members(value))
            if not qualified.startswith("_"):
                # A dataclass and a NamedTuple without a docstring get their signature as one.
                assert not (value.__doc__ or f"{qualified}(").startswith(f"{qualified}("), qualified
                assert documented or not takes_undocumented_arguments(value), qualified
            assert not documented or documented == parameters(value), qualified
        else:
            described = [(qualified, value, False)]
        for own_name, member, overrides in described:
            where = f"{qualified}: {own_name}"
            documented = documented_parameters(member)
            if own_name.startswith("_"):
                assert own_name.startswith("__") or set(documented) <= set(parameters(member)), where
            elif not qualified.startswith("_"):
                assert member.__doc__ or overrides, where
                assert documented == parameters(member) or (overrides and not documented), where


def test_a_test_cannot_read_what_was_never_logged() -> None:
    from stable_baselines3.common.logger import Logger

    logger = Logger(None, [])
    logger.record_mean("there", 2.0)  # in which SB3 itself reads a name that isn't there yet
    assert logger.name_to_value["there"] == 2.0
    with pytest.raises(KeyError, match="missing is not in the log"):
        assert logger.name_to_value["missing"] == 0
