"""The house rules: imports run downward, leaf modules only, and the wheel holds the two packages."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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
    assert {"text_env.env", "text_env.episodes", "agents.policy", "agents.on_policy", "agents.cli"} <= set(NAMES)
    assert "agents.episode_buffer" in graph()["agents.on_policy"]


def test_imports_never_run_in_a_circle() -> None:
    edges = graph()
    assert [name for name in edges if name in reaches(edges, name)] == []


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


# Upper rooms use lower ones. A module may import what stands before it.
ORDER = [
    "agents.pretrained",
    "agents.causal_lm",
    "agents.contexts",
    "agents.advantages",
    "agents.losses",
    "agents.prefix_cache",
    "agents.constraints",
    "agents.critic",
    "agents.policy",
    "agents.maskable_policy",
    "agents.reference",
    "agents.episode_buffer",
    "agents.collector",
    "agents.sb3_vec_env",
    "agents.checkpoint",
    "agents.token_features",
    "agents.on_policy",
    "agents.a2c",
    "agents.grpo",
    "agents.ppo",
    "agents.reinforce",
    "agents.rloo",
    "agents.intervals",
    "agents.evaluation",
    "agents.reward_report",
    "agents.reward_model",
    "agents.run",
    "agents.cli",
]


def test_imports_of_the_learners_run_downward() -> None:
    for name, others in graph().items():
        if name in ORDER:
            upward = [other for other in others if other in ORDER and ORDER.index(other) >= ORDER.index(name)]
            assert upward == [], f"{name} imports {upward}"


def test_the_pure_functions_import_no_machinery() -> None:
    for name, allowed in (
        ("agents.advantages", {"numpy"}),
        ("agents.intervals", {"math", "numpy"}),
        ("agents.losses", {"torch"}),
    ):
        assert imports_of(NAMES[name]) - {"__future__"} <= allowed


def test_no_algorithm_is_built_on_another() -> None:
    edges = graph()
    algorithms = {
        name for name in edges if name in {f"agents.{a}" for a in ("ppo", "a2c", "reinforce", "rloo", "grpo")}
    }
    assert "agents.ppo" in algorithms
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
    assert set(tools["packages"]) == {"text_env", "text_env.builtin", "agents"}
    on_disk = {module_name(path) for path in MODULES if path.name == "__init__.py"}
    assert set(tools["packages"]) == on_disk  # a new folder must be listed
    assert project["scripts"] == {"textrlhf": "agents.cli:main"}
    for package in PACKAGES:
        assert "py.typed" in tools["package-data"][package]
        assert (ROOT / package / "py.typed").exists()


def test_what_the_packages_import_is_declared() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = config["project"]
    declared, optional = (
        {requirement.split(">")[0].split("[")[0].lower() for requirement in requirements}
        for requirements in (project["dependencies"], project["optional-dependencies"]["reward"])
    )
    distribution = {
        "yaml": "pyyaml",
        "stable_baselines3": "stable-baselines3",
        "vaderSentiment": "vadersentiment",
        "sb3_contrib": "sb3-contrib",
        "PIL": "pillow",
        "pyarrow": "datasets",  # which requires it
    }
    standard = set(sys.stdlib_module_names)
    for name, path in NAMES.items():
        for with_deferred, allowed in ((False, declared), (True, declared | optional)):
            imported = {other.split(".")[0] for other in imports_of(path, with_deferred)} - standard - set(PACKAGES)
            assert {distribution.get(other, other).lower() for other in imported} <= allowed, name
