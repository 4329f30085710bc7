"""The conformance suite passes what keeps the contract, and fails each environment that breaks one clause of it."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from tiny import RecordingReward, tiny_tokenizer

from text_env import NO_ACTION, TextEnv, TextVectorEnv
from text_env.checker import check_text_env, check_text_vector_env

EOS = 0


def kwargs(**changes: Any) -> dict[str, Any]:
    return {
        "tokenizer": tiny_tokenizer(),
        "prompts": ["The movie", "I loved", "The film was"],
        "reward": RecordingReward(),
        "max_prompt_tokens": 6,
        "max_new_tokens": 5,
        **changes,
    }


VARIANTS: list[dict[str, Any]] = [
    {},
    {"tokenizer": tiny_tokenizer(pad=False), "min_new_tokens": 2},
    {"min_new_tokens": 5},
    {"max_new_tokens": 1},
    {"stop": ["a", "e"]},
    {"group_size": 3, "reward": {"sentiment": 1.0}, "metrics": {"gold_score": "sentiment"}},
    {"prompts": [{"prompt": "The", "column": 1}]},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_environment_passes_bare_and_wrapped(variant: dict[str, Any]) -> None:
    check_text_env(TextEnv(**kwargs(**variant)))
    check_text_env(gym.make("TextRLHF-v0", **kwargs(**variant)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_vector_environment_passes_and_keeps_its_autoreset_mode(variant: dict[str, Any]) -> None:
    env = TextVectorEnv(3, **kwargs(**variant), autoreset_mode="NextStep")
    single = None if variant.get("group_size", 1) > 1 else lambda: TextEnv(**kwargs(**variant))
    check_text_vector_env(env, single)
    assert env.autoreset_mode == AutoresetMode.NEXT_STEP


# Scalar environments that break one clause each


class ReusesItsArrays(TextEnv):
    def step(self, action: Any) -> Any:
        obs, *rest = super().step(action)
        self.buffer = getattr(self, "buffer", obs)
        for key in obs:
            self.buffer[key][...] = obs[key]
        return self.buffer, *rest


class KeepsItsStateInWhatItReturns(TextEnv):
    def reset(self, **options: Any) -> Any:
        obs, info = super().reset(**options)
        return {**obs, "input_ids": self.episodes._input_ids[0]}, info


class WidensItsMask(TextEnv):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.observation_space = spaces.Dict(
            {**self.observation_space.spaces, "attention_mask": spaces.Box(0, 1, (11,), np.int64)}  # type: ignore[attr-defined]
        )


class LeavesRubbishBehindTheText(TextEnv):
    def step(self, action: Any) -> Any:
        obs, *rest = super().step(action)
        obs["input_ids"][obs["attention_mask"] == 0] = 77
        return obs, *rest


class MovesTheTextToTheRight(TextEnv):
    def reset(self, **options: Any) -> Any:
        obs, info = super().reset(**options)
        return {**obs, "input_ids": obs["input_ids"][::-1], "attention_mask": obs["attention_mask"][::-1]}, info


class WritesATokenOfItsOwn(TextEnv):
    def step(self, action: Any) -> Any:
        result = super().step(action)
        return result if result[2] else super().step(action)


class RewritesWhatStandsBefore(TextEnv):
    def step(self, action: Any) -> Any:
        self.episodes._input_ids[0, self.episodes._length[0] - 1] = 77
        return super().step(action)


class PaysForEveryToken(TextEnv):
    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        return obs, reward + 0.1, *rest


class PaysNumpyNumbers(TextEnv):
    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        return obs, np.float32(reward), *rest


class TruncatesAtTheBudget(TextEnv):
    def step(self, action: Any) -> Any:
        obs, reward, terminated, _, info = super().step(action)
        cut = info.get("finish_reason") == "length"
        return obs, reward, terminated and not cut, cut, info


class ScoresWithoutTheLastToken(TextEnv):
    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        if terminated:
            length = int(obs["attention_mask"].sum())
            ids = obs["input_ids"][int(obs["prompt_length"][0]) : length - 1].tolist()
            info["score"] = reward = self.reward(completion_ids=[ids])[0]
        return obs, reward, terminated, truncated, info


class ReportsACutCompletion(TextEnv):
    def step(self, action: Any) -> Any:
        *rest, info = super().step(action)
        if info:
            info["completion"] = info["completion"][:-1]
        return *rest, info


class HidesTheScore(TextEnv):
    def step(self, action: Any) -> Any:
        *rest, info = super().step(action)
        return *rest, {key: value for key, value in info.items() if key != "score"}


class IgnoresEos(TextEnv):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.episodes.min_new_tokens = self.max_new_tokens

    @property
    def min_new_tokens(self) -> int:
        return 0


class EndsAtAnEosThatIsTooEarly(IgnoresEos):
    def __init__(self, **options: Any) -> None:
        TextEnv.__init__(self, **options)

    @property
    def min_new_tokens(self) -> int:
        return 2


class CountsEosAmongTheBudgetOnly(TextEnv):
    def step(self, action: Any) -> Any:
        *rest, info = super().step(action)
        return *rest, {**info, "finish_reason": "length"} if info else info


class IgnoresItsSeed(TextEnv):
    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return super().reset(options=options)


class DrawsTheSamePromptAlways(TextEnv):
    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return super().reset(seed=0, options=options)


class IgnoresAGivenPrompt(TextEnv):
    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        if options:
            self.episodes.openings(1, {key: [value] for key, value in options.items()})
        return super().reset(seed=seed, options={k: v for k, v in (options or {}).items() if k != "prompt"})


class TakesAGivenResponseForPrompt(TextEnv):
    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        obs, info = super().reset(seed=seed, options=options)
        if options and options.get("response") and obs["attention_mask"].sum() <= self.max_prompt_tokens:
            return super().reset(options={"prompt": obs["input_ids"][: obs["attention_mask"].sum()]})
        return obs, info


class ClipsWrongActions(TextEnv):
    def step(self, action: Any) -> Any:
        return super().step(np.clip(action, 0, len(self.tokenizer) - 1))


class StepsAfterTheEnd(TextEnv):
    def step(self, action: Any) -> Any:
        if self.episodes.finished[0]:
            self.reset()
        return super().step(action)


class TakesAFinishedResponse(TextEnv):
    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        try:
            return super().reset(seed=seed, options=options)
        except ValueError:
            return super().reset(seed=seed)


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (ReusesItsArrays, "two of them share memory"),
        (KeepsItsStateInWhatItReturns, "A step changed an observation that was returned before"),
        (WidensItsMask, "The observation space must be"),
        (LeavesRubbishBehindTheText, "there must be pad_token_id only"),
        (MovesTheTextToTheRight, "Texts are left-aligned"),
        (WritesATokenOfItsOwn, "must append its token to the context, and no more"),
        (RewritesWhatStandsBefore, "must append its token to the context, and no more"),
        (PaysForEveryToken, "must be 0 before the last token"),
        (PaysNumpyNumbers, "The reward must be a float, not float32"),
        (TruncatesAtTheBudget, "Nothing in the environment truncates"),
        (ScoresWithoutTheLastToken, "The score must be what the reward says of the finished text"),
        (ReportsACutCompletion, "its last token included"),
        (HidesTheScore, "The final info must hold"),
        (IgnoresEos, "EOS must terminate"),
        (EndsAtAnEosThatIsTooEarly, "within the first min_new_tokens=2 tokens must not end"),
        (CountsEosAmongTheBudgetOnly, "The finish reason of an EOS must be 'eos'"),
        (IgnoresItsSeed, "The same seed must give the same prompt"),
        (DrawsTheSamePromptAlways, "64 seeds drew one and the same prompt"),
        (IgnoresAGivenPrompt, "must start with that prompt"),
        (TakesAGivenResponseForPrompt, "must give the observation that writing the response gives"),
        (ClipsWrongActions, "which is no token, must raise ValueError"),
        (StepsAfterTheEnd, "A step after the end must raise ResetNeeded"),
        (TakesAFinishedResponse, "finished already must raise ValueError at reset"),
    ],
)
def test_a_broken_environment_fails_with_the_sentence_that_it_breaks(broken: Any, sentence: str) -> None:
    prompts = [f"prompt {letter}" for letter in "abcdefgh"]  # so many that a wrong draw shows
    with pytest.raises(AssertionError, match=sentence):
        check_text_env(broken(**kwargs(prompts=prompts, max_prompt_tokens=8)))


# Vector environments that break one clause each


class TakesNoActionForEos(TextVectorEnv):
    def step(self, actions: Any) -> Any:
        return super().step(np.where(actions == NO_ACTION, EOS, actions))


class PaysTheWrongRow(TextVectorEnv):
    def step(self, actions: Any) -> Any:
        obs, rewards, *rest = super().step(actions)
        return obs, np.roll(rewards, 1), *rest


class ForgetsTheFinalObservation(TextVectorEnv):
    def step(self, actions: Any) -> Any:
        *rest, infos = super().step(actions)
        return *rest, {key: value for key, value in infos.items() if "final_obs" not in key}


class NeverResets(TextVectorEnv):
    def step(self, actions: Any) -> Any:
        with patch.object(self, "_start", lambda *_: {}):
            return super().step(actions)


class SaysNothingOfItsMode(TextVectorEnv):
    @property
    def autoreset_mode(self) -> AutoresetMode:
        return self._mode

    @autoreset_mode.setter
    def autoreset_mode(self, mode: Any) -> None:
        self._mode = AutoresetMode(mode)


class ResetsEveryRow(TextVectorEnv):
    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        if options and "reset_mask" in options:
            options = {"prompt": [options["prompt"][0]] * self.num_envs}
        return super().reset(seed=seed, options=options)


class RestartsAfterTheEndUnasked(TextVectorEnv):
    def step(self, actions: Any) -> Any:
        over = self.episodes.finished & (actions != NO_ACTION)
        if over.any() and self.autoreset_mode == AutoresetMode.DISABLED:
            self.reset(options={"reset_mask": over})
        return super().step(actions)


class PaysInSinglePrecision(TextVectorEnv):
    def step(self, actions: Any) -> Any:
        obs, rewards, *rest = super().step(actions)
        return obs, rewards.astype(np.float32), *rest


class ScoresDependOnTheNeighbours(TextVectorEnv):
    def step(self, actions: Any) -> Any:
        obs, rewards, terminated, truncated, infos = super().step(actions)
        busy = (actions != NO_ACTION).sum()
        if terminated.any() and "score" in infos:
            infos["score"] = infos["score"] + busy
            rewards = np.where(terminated, rewards + busy, rewards)
        return obs, rewards, terminated, truncated, infos


class SeedsEveryRowAlike(TextVectorEnv):
    def _seeds(self, seed: Any) -> Any:
        return [seed] * self.num_envs


class StepsBeforeItChecks(TextVectorEnv):
    def step(self, actions: Any) -> Any:
        valid = (actions >= NO_ACTION) & (actions < len(self.tokenizer))
        result = super().step(np.where(valid, actions, NO_ACTION))
        if not valid.all():
            raise ValueError("that came too late")
        return result


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (TakesNoActionForEos, "Only the row that was finished may end"),
        (PaysTheWrongRow, "NO_ACTION must pay nothing"),
        (ForgetsTheFinalObservation, "must hold final_obs and final_info"),
        (NeverResets, "the step after an end must start a new episode|must be a new episode's"),
        (SaysNothingOfItsMode, r"metadata\['autoreset_mode'\] must follow"),
        (ResetsEveryRow, "A masked reset must leave the other rows as they are"),
        (RestartsAfterTheEndUnasked, "With autoreset disabled, a step after the end must raise ResetNeeded"),
        (PaysInSinglePrecision, "Rewards must be float64"),
        (ScoresDependOnTheNeighbours, "The score must be what the reward says|plays differently alone"),
        (SeedsEveryRowAlike, "starts differently from the scalar environment"),
        (StepsBeforeItChecks, "A refused step must leave all rows as they were"),
    ],
)
def test_a_broken_vector_environment_fails_with_the_sentence_that_it_breaks(broken: Any, sentence: str) -> None:
    prompts = [f"prompt {letter}" for letter in "abcdefgh"]
    options = kwargs(prompts=prompts, max_prompt_tokens=8)
    with pytest.raises(AssertionError, match=sentence):
        check_text_vector_env(broken(4, **options), lambda: TextEnv(**options))


class PaysDouble(TextEnv):
    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        return obs, 2 * reward, *rest


class PaysDoubleInRows(TextVectorEnv):
    def step(self, actions: Any) -> Any:
        obs, rewards, *rest = super().step(actions)
        return obs, 2 * rewards, *rest


def nothing(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def test_a_doubled_payment_shows_although_every_text_scores_0() -> None:
    silent = kwargs(reward=nothing)
    check_text_env(TextEnv(**silent))
    check_text_vector_env(TextVectorEnv(2, **silent))
    for broken in (PaysDouble(**silent), gym.wrappers.TransformReward(TextEnv(**silent), lambda reward: 2 * reward)):
        with pytest.raises(AssertionError, match="The last reward must be the score"):
            check_text_env(broken)
        assert broken.unwrapped.reward is nothing  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="The last reward must be the score"):
        check_text_vector_env(PaysDoubleInRows(2, **silent))
    with pytest.raises(AssertionError, match="A shaped reward must be"):
        check_text_env(PaysDouble(**silent, shaping=nothing))
