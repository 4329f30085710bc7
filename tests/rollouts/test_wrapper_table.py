"""The table of wrappers in docs/sb3.md, a test for each row: what Gymnasium's and SB3's wrappers make of a training."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import wrappers
from gymnasium.error import DependencyNotInstalled
from gymnasium.wrappers import vector
from learners import largest_difference, make_env, make_ppo, weights_of
from sb3_contrib.common.wrappers import ActionMasker, TimeFeatureWrapper
from stable_baselines3.common import vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from test_sb3 import make_stock, options

from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sb3_vec_env import TextVecEnv

PAGE = Path(__file__).parents[2] / "docs" / "sb3.md"

# The verdicts. Where SB3's own buffer is used, "another task" trains as well as "works".
WORKS, WARNS, REFUSED, OTHER = "works", "warns", "refused", "another task"

NO_CONTEXTS = "reads token contexts"
NOT_A_BOX = r"Box|observation space to have a shape|must have the shape attribute"
LAST_OBSERVATION = "Expected no wrapper of observations"
OTHER_TOKENS = "Expected every context to go on with the action that was chosen"


class Row(NamedTuple):
    """A row of the table.

    :param verdict: one of the verdicts above.
    :param said: a regular expression for what the error or the warning says; for "another task", what ``EpisodeBuffer``
        says, if it refuses it.
    :param wrap: puts the wrapper around an environment.
    """

    verdict: str
    said: str
    wrap: Callable[[Any], Any]


def next_token(action: Any) -> Any:
    return (action + 1) % 300


def half(reward: Any) -> Any:
    return reward / 2


def same(observation: Any) -> Any:
    return observation


def by(module: Any, name: str, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    """The wrapper of that name, looked up when it is used: some import packages that may not be there."""
    return lambda env: getattr(module, name)(env, *args, **kwargs)


def limited(steps: int, name: str, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda env: getattr(wrappers, name)(wrappers.TimeLimit(env, steps), **kwargs)


def masker(env: Any) -> Any:
    return ActionMasker(env, lambda inner: inner.unwrapped.action_masks())


S = wrappers
SCALAR = {
    "AddRenderObservation": Row(REFUSED, NO_CONTEXTS, by(S, "AddRenderObservation")),
    "AddRenderObservation(render_only=False)": Row(WORKS, "", by(S, "AddRenderObservation", render_only=False)),
    "AddWhiteNoise": Row(WORKS, "", by(S, "AddWhiteNoise", 0.5)),
    "ArrayConversion": Row(WORKS, "", by(S, "ArrayConversion", np, np)),
    "AtariPreprocessing": Row(REFUSED, "frame-skip", by(S, "AtariPreprocessing")),
    "Autoreset": Row(WORKS, "", by(S, "Autoreset")),
    "ClipAction": Row(REFUSED, NOT_A_BOX, by(S, "ClipAction")),
    "ClipReward": Row(WORKS, "", by(S, "ClipReward", -1, 1)),
    "DelayObservation": Row(REFUSED, "Expected a context to begin with its prompt", by(S, "DelayObservation", 1)),
    "DiscretizeAction": Row(REFUSED, NOT_A_BOX, by(S, "DiscretizeAction", 4)),
    "DiscretizeObservation": Row(REFUSED, NOT_A_BOX, by(S, "DiscretizeObservation", 4)),
    "DtypeObservation": Row(REFUSED, NOT_A_BOX, by(S, "DtypeObservation", np.float32)),
    "FilterObservation": Row(REFUSED, NO_CONTEXTS, by(S, "FilterObservation", ["input_ids"])),
    "FlattenObservation": Row(REFUSED, NO_CONTEXTS, by(S, "FlattenObservation")),
    "FrameStackObservation": Row(REFUSED, NO_CONTEXTS, by(S, "FrameStackObservation", 2)),
    "GrayscaleObservation": Row(REFUSED, NOT_A_BOX, by(S, "GrayscaleObservation")),
    "HumanRendering": Row(WORKS, "", by(S, "HumanRendering")),
    "JaxToNumpy": Row(WORKS, "", by(S, "JaxToNumpy")),
    "JaxToTorch": Row(WORKS, "", by(S, "JaxToTorch")),
    "MaxAndSkipObservation": Row(REFUSED, NOT_A_BOX, by(S, "MaxAndSkipObservation", 2)),
    "Monitor": Row(WORKS, "", Monitor),
    "NormalizeObservation": Row(REFUSED, NOT_A_BOX, by(S, "NormalizeObservation")),
    "NormalizeReward": Row(WORKS, "", by(S, "NormalizeReward")),
    "NumpyToTorch": Row(WORKS, "", by(S, "NumpyToTorch")),
    "ObstructView": Row(WORKS, "", by(S, "ObstructView", 0.5, 2)),
    "OrderEnforcing": Row(WORKS, "", by(S, "OrderEnforcing")),
    "PassiveEnvChecker": Row(WORKS, "", by(S, "PassiveEnvChecker")),
    "RecordEpisodeStatistics": Row(WORKS, "", by(S, "RecordEpisodeStatistics")),
    "RecordVideo": Row(WORKS, "", by(S, "RecordVideo", "videos")),
    "RenderCollection": Row(WORKS, "", by(S, "RenderCollection")),
    "RepeatAction": Row(OTHER, "", by(S, "RepeatAction", 2)),
    "RescaleAction": Row(REFUSED, NOT_A_BOX, by(S, "RescaleAction", 0, 1)),
    "RescaleObservation": Row(REFUSED, NOT_A_BOX, by(S, "RescaleObservation", 0, 1)),
    "ReshapeObservation": Row(REFUSED, NOT_A_BOX, by(S, "ReshapeObservation", (1,))),
    "ResizeObservation": Row(REFUSED, NOT_A_BOX, by(S, "ResizeObservation", (8, 8))),
    "StickyAction": Row(OTHER, OTHER_TOKENS, by(S, "StickyAction", 0.9)),
    "TimeAwareObservation": Row(REFUSED, NO_CONTEXTS, limited(8, "TimeAwareObservation")),
    "TimeAwareObservation(flatten=False)": Row(WORKS, "", limited(8, "TimeAwareObservation", flatten=False)),
    "TimeLimit": Row(WARNS, "max_episode_steps=3 cuts episodes from outside", by(S, "TimeLimit", 3)),
    "TransformAction": Row(OTHER, OTHER_TOKENS, by(S, "TransformAction", next_token, None)),
    "TransformObservation": Row(WORKS, "", by(S, "TransformObservation", same, None)),
    "TransformReward": Row(WORKS, "", by(S, "TransformReward", half)),
    "ActionMasker": Row(WORKS, "", masker),
    "TimeFeatureWrapper": Row(REFUSED, "No `observation` key", TimeFeatureWrapper),
}
V = vector
VECTOR = {
    "ArrayConversion": Row(REFUSED, "DLPack", by(V, "ArrayConversion", np, np)),
    "ClipAction": Row(REFUSED, NOT_A_BOX, by(V, "ClipAction")),
    "ClipReward": Row(WORKS, "", by(V, "ClipReward", -1, 1)),
    "DictInfoToList": Row(REFUSED, "Expected infos as a dict of arrays", by(V, "DictInfoToList")),
    "DtypeObservation": Row(REFUSED, NOT_A_BOX, by(V, "DtypeObservation", np.float32)),
    "FilterObservation": Row(REFUSED, LAST_OBSERVATION, by(V, "FilterObservation", ["input_ids"])),
    "FlattenObservation": Row(REFUSED, LAST_OBSERVATION, by(V, "FlattenObservation")),
    "GrayscaleObservation": Row(REFUSED, NOT_A_BOX, by(V, "GrayscaleObservation")),
    "HumanRendering": Row(WORKS, "", by(V, "HumanRendering")),
    "JaxToNumpy": Row(REFUSED, "DLPack|jax", by(V, "JaxToNumpy")),
    "JaxToTorch": Row(REFUSED, "DLPack|jax", by(V, "JaxToTorch")),
    "NormalizeObservation": Row(REFUSED, LAST_OBSERVATION, by(V, "NormalizeObservation")),
    "NormalizeReward": Row(WORKS, "", by(V, "NormalizeReward")),
    "NumpyToTorch": Row(REFUSED, "DLPack", by(V, "NumpyToTorch")),
    "RecordEpisodeStatistics": Row(WORKS, "", by(V, "RecordEpisodeStatistics")),
    "RecordVideo": Row(WARNS, "Recorded episodes will not contain the last frame", by(V, "RecordVideo", "videos")),
    "RescaleAction": Row(REFUSED, NOT_A_BOX, by(V, "RescaleAction", 0, 1)),
    "RescaleObservation": Row(REFUSED, NOT_A_BOX, by(V, "RescaleObservation", 0, 1)),
    "ReshapeObservation": Row(REFUSED, NOT_A_BOX, by(V, "ReshapeObservation", (1,))),
    "ResizeObservation": Row(REFUSED, NOT_A_BOX, by(V, "ResizeObservation", (8, 8))),
    "TransformAction": Row(OTHER, OTHER_TOKENS, by(V, "TransformAction", next_token)),
    "TransformObservation": Row(REFUSED, LAST_OBSERVATION, by(V, "TransformObservation", same)),
    "TransformReward": Row(WORKS, "", by(V, "TransformReward", half)),
    "VectorizeTransformAction": Row(
        OTHER,
        OTHER_TOKENS,
        by(V, "VectorizeTransformAction", S.TransformAction, func=next_token, action_space=None),
    ),
    "VectorizeTransformObservation": Row(
        REFUSED,
        LAST_OBSERVATION,
        by(V, "VectorizeTransformObservation", S.TransformObservation, func=same, observation_space=None),
    ),
    "VectorizeTransformReward": Row(WORKS, "", by(V, "VectorizeTransformReward", S.TransformReward, func=half)),
}
SB3 = {
    "VecCheckNan": Row(WORKS, "", by(vec_env, "VecCheckNan", raise_exception=True)),
    "VecExtractDictObs": Row(REFUSED, NO_CONTEXTS, by(vec_env, "VecExtractDictObs", "input_ids")),
    "VecFrameStack": Row(REFUSED, NO_CONTEXTS, by(vec_env, "VecFrameStack", 2)),
    "VecMonitor": Row(WARNS, "already wrapped with a `Monitor`", by(vec_env, "VecMonitor")),
    "VecNormalize": Row(REFUSED, "VecNormalize: norm_obs=False", by(vec_env, "VecNormalize")),
    "VecNormalize(norm_obs=False)": Row(WORKS, "", by(vec_env, "VecNormalize", norm_obs=False)),
    "VecTransposeImage": Row(WORKS, "", by(vec_env, "VecTransposeImage")),
    "VecVideoRecorder": Row(
        WORKS, "", by(vec_env, "VecVideoRecorder", "videos", lambda step: step == 0, video_length=4)
    ),
}
TABLES = {"Gymnasium": SCALAR, "Gymnasium, vector": VECTOR, "SB3": SB3}
ROWS = [(table, name) for table, rows in TABLES.items() for name in rows]


def environment(table: str, row: Row) -> Any:
    """The environment in a wrapper."""
    if table == "Gymnasium":
        return row.wrap(gym.make("TextRLHF-v0", render_mode="rgb_array", **options()))
    if table == "SB3":
        return row.wrap(TextVecEnv(make_env(2, render_mode="rgb_array")))
    # Gymnasium's own check of the mode would hide what this package says.
    mode = "NextStep" if row.verdict == REFUSED else "SameStep"
    return row.wrap(make_env(2, render_mode="rgb_array", autoreset_mode=mode))


def trained(table: str, row: Row, **kwargs: Any) -> float:
    """How far 32 tokens of SB3's PPO move a weight at most."""
    make: dict[str, Any] = {"Gymnasium": lambda env: DummyVecEnv([lambda: env]), "SB3": lambda env: env}
    env = make.get(table, TextVecEnv)(environment(table, row))
    model = make_stock(env=env, n_steps=16 // env.num_envs, n_epochs=1, **kwargs)
    before = weights_of(model.policy)
    model.learn(32)
    model.env.close()
    return largest_difference(before, weights_of(model.policy))


def tried(function: Callable[[], Any]) -> tuple[Exception | None, str]:
    """
    :return: the error, if there was one, and the first warning. Without a package that the wrapper needs, the test is
        skipped.
    """
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            function()
        except (DependencyNotInstalled, ModuleNotFoundError) as missing:
            pytest.skip(str(missing))
        except Exception as error:
            return error, ""
    return None, " ".join(str(warning.message) for warning in seen)


@pytest.fixture
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for the videos
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # for the windows


@pytest.mark.usefixtures("_in_a_folder_of_its_own")
@pytest.mark.parametrize("buffer", [None, EpisodeBuffer], ids=["SB3's buffer", "EpisodeBuffer"])
@pytest.mark.parametrize(("table", "name"), ROWS)
def test_the_wrapper_does_what_the_table_says(table: str, name: str, buffer: Any) -> None:
    row = TABLES[table][name]
    moved: list[float] = []
    error, warned = tried(lambda: moved.append(trained(table, row, rollout_buffer_class=buffer)))
    if row.verdict == REFUSED or (row.verdict == OTHER and row.said and buffer is EpisodeBuffer):
        assert isinstance(error, AssertionError | AttributeError | BufferError | TypeError | ValueError), error
        assert re.search(row.said, str(error)), error
    else:
        assert error is None
        assert moved[0] > 0
        assert bool(re.search(row.said, warned)) if row.verdict == WARNS else not warned


@pytest.mark.usefixtures("_in_a_folder_of_its_own")
@pytest.mark.parametrize(("table", "name"), ROWS)
def test_the_algorithms_of_this_package_refuse_every_wrapper_since_they_would_pass_it_by(table: str, name: str) -> None:
    env: list[Any] = []
    error, _ = tried(lambda: env.append(environment(table, TABLES[table][name])))
    if error is not None:
        assert TABLES[table][name].verdict == REFUSED, error  # it can't even be put around the environment
        return
    with pytest.raises(ValueError, match=r"wrappers would never apply|For single or wrapped environments use SB3"):
        make_ppo(env[0])


def test_rewards_reach_the_algorithm_as_the_wrapper_makes_them() -> None:
    env = environment("Gymnasium, vector", VECTOR["TransformReward"])
    model = make_stock(env=TextVecEnv(env), rollout_buffer_class=EpisodeBuffer).learn(64)
    scores = [info["r"] for info in model.ep_info_buffer]
    assert scores
    assert all(0 <= score <= 0.5 for score in scores)  # half of a share
    assert max(scores) > 0.25


# ---- the table of the page -----------------------------------------------------------------------------------------


def rows_of_the_page() -> list[tuple[str, str, str]]:
    """
    :return: kind, wrapper and verdict of each row of the page's table; rows of several wrappers one by one.
    """
    section = PAGE.read_text().split("\n## Wrappers\n")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.split(" | ")] for line in section.splitlines() if line.startswith("| `")]
    return [
        (kind, name, verdict)
        for names, kind, verdict, _ in ([cell.strip("| ") for cell in line] for line in lines)
        for name in re.findall(r"`([^`]+)`", names)
    ]


def test_the_page_has_these_rows_and_no_others() -> None:
    ours = [(table, name, TABLES[table][name].verdict) for table, name in ROWS]
    written = rows_of_the_page()
    assert len(set(written)) == len(written)
    assert set(written) == set(ours)


def test_the_table_names_every_wrapper_of_gymnasium_and_sb3() -> None:
    named = {table: {name.split("(")[0] for name in rows} for table, rows in TABLES.items()}
    assert set(wrappers.__all__) - {"vector"} <= named["Gymnasium"]
    assert set(vector.__all__) <= named["Gymnasium, vector"]
    theirs = {
        name
        for name in vec_env.__all__
        if isinstance(cls := getattr(vec_env, name), type) and issubclass(cls, vec_env.VecEnvWrapper)
    }
    assert theirs - {"VecEnvWrapper"} <= named["SB3"]
