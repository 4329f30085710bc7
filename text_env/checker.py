"""The conformance suite: it checks that a variant of the environment keeps the contract of the environment.

``check_text_env(env)`` and ``check_text_vector_env(env)`` return nothing, or raise an ``AssertionError`` whose message
says which part of the contract is broken. They play a few short episodes, so the environment should have a small budget
and a cheap, deterministic reward. Call Gymnasium's own ``check_env`` as well: it knows nothing of text, but it checks
rendering, which this suite does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from text_env.episodes import NO_ACTION, Observation
from text_env.prompts import N_INSPECTED
from text_env.rewards import FinishedTexts, score
from text_env.shaping import PotentialShaping
from text_env.streams import TokenStream
from text_env.tokenization import decode, decode_completions, vocabulary_size

# The last digits of a model's score may depend on the other texts in the batch.
_TOLERANCE = 1e-4

FINAL_KEYS = ("score", "prompt", "completion", "finish_reason")


class _Step(NamedTuple):
    obs: Observation
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


def check_text_env(env: gym.Env[Any, Any]) -> None:
    """Check a scalar environment.

    :param env: a :class:`text_env.env.TextEnv`, or an environment that should behave like one; it may be wrapped.
    :raises AssertionError: if the contract is broken; the message says how.
    """
    _check_spaces(env.unwrapped, env.observation_space, env.action_space)
    for _ in range(2):  # the second episode would show what the first has left behind
        _check_episode(env)
    _check_ends(env)
    _check_seeding(env)
    _check_openings(env)
    _check_refusals(env)
    with _telling_reward(env.unwrapped):
        _check_episode(env)


def check_text_vector_env(
    env: VectorEnv[Any, Any, Any], make_single: Callable[[], gym.Env[Any, Any]] | None = None
) -> None:
    """Check a vector environment.

    :param env: a :class:`text_env.vector_env.TextVectorEnv`, or an environment that should behave like one, with at
        least two rows. Its ``autoreset_mode`` is changed during the check and restored at the end.
    :param make_single: makes a scalar environment with the same settings. If it is given, every row is compared with
        such an environment, step by step.
    :raises AssertionError: if the contract is broken; the message says how.
    """
    assert env.num_envs >= 2, f"The suite needs at least two rows, to see that they don't touch; got {env.num_envs}."
    _check_spaces(env.unwrapped, env.single_observation_space, env.single_action_space)
    assert env.observation_space == batch_space(env.single_observation_space, env.num_envs), (
        "The observation space must be the batch of the single one."
    )
    before: AutoresetMode = env.unwrapped.autoreset_mode  # type: ignore[attr-defined]
    try:
        for mode in AutoresetMode:
            env.unwrapped.autoreset_mode = mode  # type: ignore[attr-defined]
            assert env.metadata.get("autoreset_mode") == mode, "metadata['autoreset_mode'] must follow autoreset_mode."
            _check_autoreset(env, mode)
        env.unwrapped.autoreset_mode = AutoresetMode.DISABLED  # type: ignore[attr-defined]
        _check_rows_alone(env)
        with _telling_reward(env.unwrapped):
            _check_autoreset(env, AutoresetMode.DISABLED)
        _check_masked_reset(env)
        _check_batch_refusals(env)
        if make_single is not None:
            _check_against_singles(env, make_single)
    finally:
        env.unwrapped.autoreset_mode = before  # type: ignore[attr-defined]


@contextmanager
def _telling_reward(face: Any) -> Iterator[None]:
    """While it lasts, texts are scored by numbers that are never 0. Where the environment's own reward is 0, as that of
    most texts is in many tasks, a payment that is doubled or divided would not show.
    """

    def telling(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [1.5 + len(ids) for ids in completion_ids]

    episodes = getattr(face, "episodes", None)
    if episodes is None:  # an environment from outside this package keeps its own reward
        yield
        return
    before = episodes.reward
    episodes.reward = telling
    try:
        yield
    finally:
        episodes.reward = before


# One episode


def _check_spaces(face: Any, observation: spaces.Space[Any], action: spaces.Space[Any]) -> None:
    columns, vocabulary = face.max_prompt_tokens + face.max_new_tokens, vocabulary_size(face.tokenizer)
    expected = spaces.Dict(
        input_ids=spaces.Box(0, vocabulary - 1, (columns,), np.int64),
        attention_mask=spaces.Box(0, 1, (columns,), np.int8),
        prompt_length=spaces.Box(1, face.max_prompt_tokens, (1,), np.int64),
    )
    assert observation == expected, f"The observation space must be {expected}, but it is {observation}."
    assert action == spaces.Discrete(vocabulary), (
        f"The action space must be Discrete({vocabulary}), one action per token, but it is {action}."
    )
    assert face.eos_token_id == face.tokenizer.eos_token_id, "eos_token_id must be the tokenizer's."
    assert face.eos_token_id in face.eos_token_ids, "eos_token_ids must hold the tokenizer's eos token."


def _stream(obs: Observation) -> TokenStream:
    """The stream of tokens that an observation shows. All tokens after the prompt count as chosen by the policy, since
    an observation does not say which of them ``reset`` was given.
    """
    token_ids = tuple(obs["input_ids"][: int(obs["attention_mask"].sum())].tolist())
    prompt_length = int(obs["prompt_length"][0])
    return TokenStream(token_ids, tuple(place >= prompt_length for place in range(len(token_ids))), prompt_length)


def _check_observation(face: Any, obs: Any, space: spaces.Space[Any]) -> None:
    assert obs in space, f"The observation {obs} is not in the observation space {space}."
    for name, box in space.spaces.items():  # type: ignore[attr-defined]
        assert obs[name].dtype == box.dtype, f"The dtype of {name!r} must be {box.dtype}, not {obs[name].dtype}."
    mask = obs["attention_mask"]
    length = int(mask.sum())
    assert mask[:length].all(), "Texts are left-aligned: the attention mask must be ones, then zeros."
    assert 1 <= obs["prompt_length"][0] <= length, "prompt_length must be within what the attention mask covers."
    assert (obs["input_ids"][length:] == face.pad_token_id).all(), "Behind the text there must be pad_token_id only."


def _ordinary_tokens(face: Any, count: int) -> list[int]:
    """Tokens that end no text by themselves; the same ones at every call."""
    special = {*face.eos_token_ids, face.pad_token_id, *face.tokenizer.all_special_ids}
    candidates = [token for token in range(vocabulary_size(face.tokenizer)) if token not in special]
    return [int(token) for token in np.random.default_rng(0).choice(candidates, count)]


def _play(env: gym.Env[Any, Any], tokens: list[int]) -> list[_Step]:
    """Step through the tokens until they are used up or the episode ends."""
    steps: list[_Step] = []
    for token in tokens:
        obs, reward, terminated, truncated, info = deepcopy(env.step(token))
        steps.append(_Step(obs, float(reward), terminated, truncated, info))
        if terminated or truncated:
            break
    return steps


def _shaping(face: Any) -> PotentialShaping | None:
    # An environment from outside this package need not have the attribute.
    return getattr(face, "shaping", None)


def _text_is_all(face: Any) -> bool:
    """Whether rewards are given nothing of a prompt but its text, which is in the info."""
    return not face.prompts.columns and all(prompt.messages is None for prompt in face.prompts[:N_INSPECTED])


def _shaped(face: Any, shaping: PotentialShaping, prompt: str, before: Observation, step: _Step) -> float:
    """The reward that a step must have: γ Φ(s') − Φ(s), and at the end, where Φ(s') is 0, the score in addition."""

    def potential(obs: Observation) -> float:
        stream = _stream(obs)
        stream = stream.cut(int(shaping.seen(np.array(len(stream.completion_ids)))))
        spelt = decode(face.tokenizer, [stream.cut(0).token_ids])
        completions = decode_completions(face.tokenizer, [stream], spelt)
        return float(shaping.potentials(FinishedTexts([prompt], completions, [list(stream.completion_ids)]))[0])

    if step.terminated:
        return float(step.info.get("score", np.nan)) - potential(before)
    return shaping.gamma * potential(step.obs) - potential(before)


def _check_episode(env: gym.Env[Any, Any]) -> None:
    """One step appends one token, and only the last step pays the score."""
    face: Any = env.unwrapped
    obs, info = env.reset()
    prompt, shaping = str(info.get("prompt")), _shaping(face)
    _check_observation(face, obs, env.observation_space)
    assert isinstance(info.get("prompt"), str), "The info of a reset must hold the prompt as a string."
    stream = _stream(obs)
    assert not stream.completion_ids, "A reset must start with the prompt alone."
    seen: list[tuple[Observation, Observation]] = [(obs, deepcopy(obs))]
    for token in _ordinary_tokens(face, face.max_new_tokens + 1):
        previous = deepcopy(obs)
        obs, reward, terminated, truncated, info = env.step(token)
        _check_observation(face, obs, env.observation_space)
        assert obs["prompt_length"] == previous["prompt_length"], "The prompt's length must not change in an episode."
        stream = stream.appended(token)
        assert _stream(obs) == stream, "A step must append its token to the context, and no more."
        for earlier, copy in seen:
            assert not any(np.shares_memory(obs[key], earlier[key]) for key in obs), (
                "Observations must be fresh copies: two of them share memory."
            )
            assert data_equivalence(earlier, copy, exact=True), (
                "A step changed an observation that was returned before."
            )
        seen.append((obs, deepcopy(obs)))
        assert isinstance(reward, float), f"The reward must be a float, not {type(reward).__name__}."
        assert truncated is False, "Nothing in the environment truncates: EOS, stop strings and the budget terminate."
        if shaping is not None and _text_is_all(face):
            step = _Step(obs, float(reward), terminated, truncated, info)
            expected = _shaped(face, shaping, prompt, previous, step)
            assert np.isclose(reward, expected, rtol=_TOLERANCE, atol=_TOLERANCE), (
                f"A shaped reward must be γ Φ(s') − Φ(s), at the end with the score, {expected}, but it is {reward}."
            )
        if terminated:
            break
        assert shaping is not None or reward == 0.0, f"The reward must be 0 before the last token, but it is {reward}."
        assert not set(FINAL_KEYS) & set(info), "The final info must not appear before the last step."
    assert terminated is True, (
        f"The budget of {face.max_new_tokens} tokens is spent, but the episode did not terminate."
    )
    _check_final(face, obs, float(reward), info)
    # The environment must not keep its state in what it has handed out.
    first, info = env.reset(seed=11)
    kept = _stream(first)
    for array in first.values():
        array[...] = 0
    token = _ordinary_tokens(face, 1)[0]
    following = env.step(token)[0]
    assert _stream(following) == kept.appended(token), "Writing into a returned observation changed the episode."


def _check_final(face: Any, obs: Observation, reward: float, info: dict[str, Any]) -> None:
    assert set(FINAL_KEYS) <= set(info), f"The final info must hold {FINAL_KEYS}, but it holds {sorted(info)}."
    response = _stream(obs).completion_ids
    assert _shaping(face) is not None or reward == info["score"], (
        f"The last reward must be the score {info['score']}, but it is {reward}."
    )
    eos = response[-1] in face.eos_token_ids and len(response) > face.min_new_tokens  # one that counts
    written = decode(face.tokenizer, [response[:-1] if eos else response])[0]
    assert info["completion"].strip() == written.strip(), (
        f"The completion must be all of the response, its last token included: {written!r}, not {info['completion']!r}."
    )
    reason, spent = info["finish_reason"], len(response) == face.max_new_tokens
    right = {"eos": eos, "length": spent and not eos, "stop": not eos}
    assert right.get(reason, False), (
        f"The finish reason is {reason!r} after {len(response)} of {face.max_new_tokens} tokens, EOS last: {eos}."
    )
    if _text_is_all(face):
        texts = FinishedTexts([info["prompt"]], [info["completion"]], [list(response)])
        expected = score(face.reward, texts)[0]
        assert np.isclose(info["score"], expected, rtol=_TOLERANCE, atol=_TOLERANCE), (
            f"The score must be what the reward says of the finished text, {expected}, but it is {info['score']}."
        )


def _check_ends(env: gym.Env[Any, Any]) -> None:
    """Each EOS ends the episode, unless it comes before ``min_new_tokens``."""
    face: Any = env.unwrapped
    for eos in face.eos_token_ids:
        env.reset(seed=5)
        early = _play(env, [eos] * face.min_new_tokens)
        assert not any(step.terminated for step in early[: face.max_new_tokens - 1]), (
            f"An EOS within the first min_new_tokens={face.min_new_tokens} tokens must not end the episode."
        )
        if face.min_new_tokens < face.max_new_tokens:
            last = _play(env, [eos])[-1]
            assert last.terminated, f"EOS must terminate, but {eos} does not."
            assert last.info.get("finish_reason") == "eos", "The finish reason of an EOS must be 'eos'."
            _check_final(face, last.obs, last.reward, last.info)


def _check_seeding(env: gym.Env[Any, Any]) -> None:
    tokens = _ordinary_tokens(env.unwrapped, 3)
    # Several seeds are tried, since one seed may draw the same prompt twice by chance.
    starts = [[deepcopy(env.reset(seed=seed)) for seed in range(16)] for _ in range(2)]
    assert data_equivalence(starts[0], starts[1], exact=True), "The same seed must give the same prompt."
    episodes = []
    for _ in range(2):
        env.reset(seed=7)
        episodes.append([step._asdict() for step in _play(env, tokens)])
    assert data_equivalence(episodes[0], episodes[1], exact=True), (
        "The same seed and the same actions must give the same episode."
    )
    prompts: Any = env.unwrapped.prompts  # type: ignore[attr-defined]
    if len({prompt.text for prompt in prompts[:N_INSPECTED]}) > 1:
        drawn = {env.reset(seed=seed)[1]["prompt"] for seed in range(64)}
        assert len(drawn) > 1, "64 seeds drew one and the same prompt of several."


def _check_openings(env: gym.Env[Any, Any]) -> None:
    """An episode that starts with a given response goes on as one that has written it."""
    face: Any = env.unwrapped
    prompt = face.prompts[0]  # with its columns, which the reward may need: a text from outside has none
    tokens = _ordinary_tokens(face, face.max_new_tokens)
    for given, what in ((list(prompt.token_ids), "ids"), (prompt, "entry")):
        obs, _ = env.reset(options={"prompt": given})
        assert _stream(obs).token_ids == tuple(prompt.token_ids), (
            f"reset(options={{'prompt': {what}}}) must start with that prompt."
        )
    written = _play(env, tokens)
    for n_given in range(1, len(written)):
        obs, _ = env.reset(options={"prompt": prompt, "response": tokens[:n_given]})
        assert data_equivalence(obs, written[n_given - 1].obs, exact=True), (
            "reset(options={'response': ids}) must give the observation that writing the response gives."
        )
        rest = _play(env, tokens[n_given:])
        assert len(rest) == len(written) - n_given, "A response given at reset must count against the budget."
        assert rest[-1].info["completion"] == written[-1].info["completion"], (
            "A response given at reset belongs to the completion that is scored."
        )
        rewards = [step.reward for step in rest]
        assert _equivalent(rewards, [step.reward for step in written[n_given:]]), (
            f"An episode that starts with a response must be paid as one that wrote it, but it is paid {rewards}."
        )


def _check_refusals(env: gym.Env[Any, Any]) -> None:
    """Calls that must raise an error, and must leave the episode as it was."""
    face: Any = env.unwrapped
    token, finished = _ordinary_tokens(face, 1)[0], [face.eos_token_ids[-1]] * face.max_new_tokens
    obs = deepcopy(env.reset(seed=3)[0])
    for wrong in (-1, vocabulary_size(face.tokenizer)):
        _check_raises(
            ValueError, partial(env.step, wrong), f"The action {wrong}, which is no token, must raise ValueError."
        )
    _check_raises(
        ValueError,
        lambda: env.reset(options={"response": finished}),
        "A response that is finished already must raise ValueError at reset.",
    )
    _check_raises(ValueError, lambda: env.reset(options={"prompt": []}), "An empty prompt must raise ValueError.")
    if face.max_new_tokens > 1:
        following = env.step(token)[0]
        assert _stream(following) == _stream(obs).appended(token), "A refused call must leave the episode as it was."
    _play(env, finished)
    _check_raises(gym.error.ResetNeeded, lambda: env.step(token), "A step after the end must raise ResetNeeded.")
    env.reset()


def _check_raises(error: type[Exception], call: Callable[[], Any], sentence: str) -> None:
    try:
        call()
    except error:
        return
    except Exception as other:
        raise AssertionError(f"{sentence} It raised {type(other).__name__}: {other}") from other
    raise AssertionError(sentence)


# Several rows


def _row(obs: Observation, row: int) -> Observation:
    return {key: array[row] for key, array in obs.items()}


def _only(env: VectorEnv[Any, Any, Any], tokens: dict[int, int]) -> NDArray[np.int64]:
    actions = np.full(env.num_envs, NO_ACTION, np.int64)
    for row, token in tokens.items():
        actions[row] = token
    return actions


def _row_info(infos: dict[str, Any], row: int) -> dict[str, Any]:
    """The info of one row, from Gymnasium's arrays and masks."""
    return {
        key: _row_info(value, row) if isinstance(value, dict) else value[row]
        for key, value in infos.items()
        if not key.startswith("_") and infos[f"_{key}"][row]
    }


def _finish_row(env: VectorEnv[Any, Any, Any], row: int) -> tuple[Any, Any, Any, Any, Any]:
    """Write EOS in one row until its episode ends, and give the other rows NO_ACTION."""
    face: Any = env.unwrapped
    for _ in range(face.max_new_tokens):
        result = env.step(_only(env, {row: face.eos_token_id}))
        if result[2][row]:
            return result
    raise AssertionError(f"Row {row} did not terminate within its budget of {face.max_new_tokens} tokens.")


def _check_autoreset(env: VectorEnv[Any, Any, Any], mode: AutoresetMode) -> None:
    face: Any = env.unwrapped
    start, _ = env.reset(seed=21)
    start = deepcopy(start)
    obs, rewards, terminated, truncated, infos = _finish_row(env, 1)
    assert (rewards.dtype, terminated.dtype, truncated.dtype) == (np.float64, np.bool_, np.bool_), (
        "Rewards must be float64, terminations and truncations bool."
    )
    assert not truncated.any(), "Nothing in the environment truncates."
    assert terminated.tolist() == [row == 1 for row in range(env.num_envs)], "Only the row that was finished may end."
    for row in set(range(env.num_envs)) - {1}:
        assert data_equivalence(_row(obs, row), _row(start, row), exact=True), (
            f"NO_ACTION must leave a row exactly as it is, but row {row} changed."
        )
        assert rewards[row] == 0.0, f"NO_ACTION must pay nothing, but row {row} was paid {rewards[row]}."
    info = _row_info(infos, 1)
    if mode == AutoresetMode.SAME_STEP:
        assert {"final_obs", "final_info"} <= set(info), (
            "Under SAME_STEP the infos must hold final_obs and final_info for the row that ended."
        )
        assert not np.any(infos["_final_obs"] != terminated), "_final_obs must mark the rows that ended, and no others."
        _check_final(face, info["final_obs"], float(rewards[1]), info["final_info"])
        assert not _stream(_row(obs, 1)).completion_ids, (
            "Under SAME_STEP the observation of a row that ended must be a new episode's."
        )
        return
    _check_final(face, _row(obs, 1), float(rewards[1]), info)
    token = _ordinary_tokens(face, 1)[0]
    if mode == AutoresetMode.NEXT_STEP:
        obs, rewards, terminated, _, infos = env.step(_only(env, {1: token}))
        assert not _stream(_row(obs, 1)).completion_ids, (
            "Under NEXT_STEP the step after an end must start a new episode."
        )
        assert rewards[1] == 0.0, "The step that resets a row must pay nothing."
        assert not terminated[1], "The step that resets a row must end nothing."
        assert "prompt" in _row_info(infos, 1), "The step that resets a row must give the reset's info."
    else:
        _check_raises(
            gym.error.ResetNeeded,
            lambda: env.step(_only(env, {1: token})),
            "With autoreset disabled, a step after the end must raise ResetNeeded.",
        )


def _check_masked_reset(env: VectorEnv[Any, Any, Any]) -> None:
    face: Any = env.unwrapped
    token = _ordinary_tokens(face, 1)[0]
    env.reset(seed=31)
    if face.max_new_tokens > 1:
        env.step(_only(env, {0: token}))
    _finish_row(env, 1)
    before = deepcopy(env.step(_only(env, {}))[0])
    mask = np.arange(env.num_envs) == 1
    prompt = tuple(face.prompts[0].token_ids)
    obs, infos = env.reset(options={"reset_mask": mask, "prompt": [list(prompt)]})
    assert obs in env.observation_space, "A masked reset must return the observations of all rows."
    assert _stream(_row(obs, 1)).token_ids == prompt, (
        "A masked reset must start the marked row with the prompt that it is given."
    )
    for row in np.flatnonzero(~mask).tolist():
        assert data_equivalence(_row(obs, row), _row(before, row), exact=True), (
            f"A masked reset must leave the other rows as they are, but row {row} changed."
        )
    assert infos["_prompt"].tolist() == mask.tolist(), (
        "The infos of a masked reset must be of the rows that were reset."
    )


def _check_rows_alone(env: VectorEnv[Any, Any, Any]) -> None:
    """A row that is played together with others behaves as it does when it is played alone."""
    face: Any = env.unwrapped
    tokens = _ordinary_tokens(face, face.max_new_tokens)
    # The rows end at different times, so that a score in the wrong row is noticed.
    plans = [
        [*tokens[: row % face.max_new_tokens], *[face.eos_token_id] * face.max_new_tokens]
        for row in range(env.num_envs)
    ]
    env.reset(seed=41)
    together: list[Any] = [None] * env.num_envs
    for time in range(face.max_new_tokens):
        live = {row: plans[row][time] for row in range(env.num_envs) if together[row] is None}
        obs, rewards, terminated, _, infos = env.step(_only(env, live))
        for row in np.flatnonzero(terminated).tolist():
            together[row] = deepcopy((_row(obs, row), rewards[row], _row_info(infos, row)))
    for row in range(env.num_envs):
        assert together[row] is not None, f"Row {row} did not terminate within its budget."
        env.reset(seed=41)
        for time in range(face.max_new_tokens):
            obs, rewards, terminated, _, infos = env.step(_only(env, {row: plans[row][time]}))
            if terminated[row]:
                break
        alone = (_row(obs, row), rewards[row], _row_info(infos, row))
        assert _equivalent(alone, together[row]), f"Row {row} plays differently alone than beside the others."


def _check_batch_refusals(env: VectorEnv[Any, Any, Any]) -> None:
    face: Any = env.unwrapped
    before = deepcopy(env.reset(seed=51)[0])
    token = _ordinary_tokens(face, 1)[0]
    for wrong in (-2, vocabulary_size(face.tokenizer)):
        actions = _only(env, {0: token, 1: wrong})
        _check_raises(
            ValueError, partial(env.step, actions), f"The action {wrong}, which is no token, must raise ValueError."
        )
    after = env.step(_only(env, {}))[0]
    assert data_equivalence(after, before, exact=True), "A refused step must leave all rows as they were."


def _check_against_singles(env: VectorEnv[Any, Any, Any], make_single: Callable[[], gym.Env[Any, Any]]) -> None:
    """Row i, which is seeded with s + i, behaves as the scalar environment seeded with s + i."""
    face: Any = env.unwrapped
    env.unwrapped.autoreset_mode = AutoresetMode.SAME_STEP  # type: ignore[attr-defined]
    singles = [make_single() for _ in range(env.num_envs)]
    obs, infos = env.reset(seed=61)
    for row, single in enumerate(singles):
        assert _equivalent((_row(obs, row), _row_info(infos, row)), single.reset(seed=61 + row)), (
            f"Row {row} starts differently from the scalar environment with its seed."
        )
    generator = np.random.default_rng(0)
    for _ in range(3 * face.max_new_tokens):
        actions = generator.integers(vocabulary_size(face.tokenizer), size=env.num_envs)
        ending = generator.random(env.num_envs) < 0.2
        actions[ending] = generator.choice(face.eos_token_ids, ending.sum())
        obs, rewards, terminated, _, infos = env.step(actions)
        for row, single in enumerate(singles):
            info = _row_info(infos, row)
            got = (_row(obs, row), rewards[row], terminated[row], info)
            single_obs, reward, ended, _, single_info = single.step(actions[row])
            if ended:
                final = {"final_obs": single_obs, "final_info": single_info}
                single_obs, single_info = single.reset()
                single_info = final | single_info
            assert _equivalent(got, (single_obs, reward, ended, single_info)), (
                f"Row {row} plays differently from the scalar environment with its seed."
            )


def _equivalent(one: Any, other: Any) -> bool:
    """Whether two results are equal, with a tolerance for numbers, whatever their container and scalar types."""
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(_equivalent(one[k], other[k]) for k in one)
        )
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_equivalent, one, other))
    if isinstance(one, str):
        return one == str(other)
    if one is None or other is None:  # of a text without an answer, for example
        return one is other
    return bool(np.shape(one) == np.shape(other) and np.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE))
