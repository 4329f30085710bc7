"""The dynamics: what a token does, what ends a text, where the score lands, how prompts are drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import RecordingReward, ids_score, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from text_env import EmbeddingAction, RewardError, TextEnv, TextVectorEnv
from text_env.checker import check_text_env, check_text_vector_env

PROMPTS = ["The movie", "I loved", "The film was", "The music"]
TOKENIZERS = {pad: tiny_tokenizer(pad) for pad in (True, False)}  # without a pad token, eos serves as one
EOS = 0


def make(tokenizer: Any, **kwargs: Any) -> TextEnv:
    """A scalar environment with small budgets; keyword arguments override."""
    defaults = {"prompts": PROMPTS, "reward": "sentiment", "max_prompt_tokens": 8, "max_new_tokens": 4}
    return TextEnv(tokenizer=tokenizer, **{**defaults, **kwargs})


def write(env: TextEnv, tokens: list[int]) -> list[Any]:
    steps = []
    for token in tokens:
        steps.append(env.step(token))
        if steps[-1][2]:
            break
    return steps


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.one_of(st.just(EOS), st.integers(0, 299)), min_size=8, max_size=8),
    pad=st.booleans(),
    min_new_tokens=st.integers(0, 8),
)
def test_the_score_lands_on_the_true_last_token_also_when_pad_is_eos(
    tokens: list[int], pad: bool, min_new_tokens: int
) -> None:
    reward = RecordingReward()
    env = make(TOKENIZERS[pad], reward=reward, max_new_tokens=8, min_new_tokens=min_new_tokens)
    obs, _ = env.reset(seed=0)
    prompt = obs["input_ids"][: obs["prompt_length"][0]].tolist()
    # By hand: the first EOS that counts, otherwise the budget.
    ends = [position for position, token in enumerate(tokens) if token == EOS and position >= min_new_tokens]
    written = tokens[: ends[0] + 1] if ends else tokens
    steps = write(env, tokens)
    assert [step[1] for step in steps] == [0.0] * (len(written) - 1) + [ids_score(written)]
    assert [step[2] for step in steps] == [False] * (len(written) - 1) + [True]
    assert [call["completion_ids"] for call in reward.calls] == [[written]]
    assert steps[-1][4]["finish_reason"] == ("eos" if ends else "length")
    last = steps[-1][0]
    columns = len(prompt) + len(written)
    assert last["input_ids"].tolist() == [*prompt, *written, *[env.pad_token_id] * (16 - columns)]
    assert last["attention_mask"].tolist() == [1] * columns + [0] * (16 - columns)


@pytest.mark.parametrize("min_new_tokens", [0, 1, 3])
def test_eos_counts_from_min_new_tokens_response_tokens_on(tokenizer: Any, min_new_tokens: int) -> None:
    env = make(tokenizer, max_new_tokens=8, min_new_tokens=min_new_tokens)
    env.reset(seed=0)
    assert len(write(env, [EOS] * 8)) == min_new_tokens + 1


def test_the_budget_ends_a_text_even_if_eos_never_counts(tokenizer: Any) -> None:
    env = make(tokenizer, min_new_tokens=4)
    env.reset(seed=0)
    steps = write(env, [EOS] * 8)
    assert len(steps) == 4
    assert steps[-1][4]["finish_reason"] == "length"


def test_an_eos_that_spends_the_budget_is_an_eos(tokenizer: Any) -> None:
    env = make(tokenizer, max_new_tokens=3)
    env.reset(seed=0)
    assert write(env, [50, 51, EOS])[-1][4]["finish_reason"] == "eos"


def test_a_stop_string_ends_the_text_as_soon_as_it_is_there_also_across_tokens(tokenizer: Any) -> None:
    env = make(tokenizer, max_new_tokens=20, min_new_tokens=19, stop=["never", "xyz"])
    env.reset(options={"prompt": "The movie"})
    tokens = tokenizer("abxyzzy")["input_ids"]
    steps = write(env, tokens)
    assert (steps[-1][4]["completion"], steps[-1][4]["finish_reason"]) == ("abxyz", "stop")


def test_a_stop_string_in_the_prompt_stops_nothing(tokenizer: Any) -> None:
    env = make(tokenizer, prompts=["The movie"], max_new_tokens=3, stop="movie")
    env.reset(seed=0)
    assert len(write(env, [50, 51, 52])) == 3


def test_a_response_given_at_reset_counts_against_the_budget_and_is_scored_with_the_rest(tokenizer: Any) -> None:
    reward = RecordingReward()
    env = make(tokenizer, reward=reward, max_new_tokens=5)
    start = tokenizer(" was")["input_ids"]
    obs, _ = env.reset(options={"prompt": "The film", "response": " was"})
    assert obs["input_ids"][: obs["attention_mask"].sum()].tolist() == tokenizer("The film")["input_ids"] + start
    assert obs["prompt_length"] == len(tokenizer("The film")["input_ids"])
    steps = write(env, [60] * 9)
    assert len(start) + len(steps) == 5
    assert reward.calls[0]["completion_ids"] == [start + [60] * len(steps)]
    assert steps[-1][4]["completion"].startswith(" was")


def test_prompt_and_response_may_be_token_ids_even_some_that_no_text_gives(tokenizer: Any) -> None:
    env = make(tokenizer, max_new_tokens=8, min_new_tokens=3)
    ids = np.array([40, 41, 42])  # three single characters, which a tokenizer would have merged or not
    obs, info = env.reset(options={"prompt": ids, "response": (EOS, 5, 6)})
    assert obs["input_ids"][:6].tolist() == [40, 41, 42, EOS, 5, 6]
    assert info["prompt"] == tokenizer.decode(ids)


def test_a_group_shares_a_prompt_and_the_next_group_draws_anew(tokenizer: Any) -> None:
    env = make(tokenizer, group_size=3)
    drawn = [env.reset(seed=0)[1]["prompt"]] + [env.reset()[1]["prompt"] for _ in range(59)]
    groups = [set(drawn[first : first + 3]) for first in range(0, 60, 3)]
    assert all(len(group) == 1 for group in groups)
    assert set.union(*groups) == set(PROMPTS)


def test_groups_run_over_rows_and_through_resets_in_the_order_in_which_episodes_start(tokenizer: Any) -> None:
    env = TextVectorEnv(
        4,
        tokenizer=tokenizer,
        prompts=[f"prompt {letter}" for letter in "abcdefgh"],
        reward="sentiment",
        max_prompt_tokens=16,
        max_new_tokens=4,
        group_size=3,
    )
    first = env.reset(seed=3)[1]["prompt"].tolist()
    assert len(set(first[:3])) == 1
    # Row 3 opened the second group; the two rows that restart now are its other two episodes.
    infos = env.step(np.array([50, EOS, 50, EOS]))[4]
    assert infos["prompt"].tolist() == [None, first[3], None, first[3]]


def test_a_seed_begins_a_new_group(tokenizer: Any) -> None:
    env = make(tokenizer, group_size=3)
    runs = []
    for _ in range(2):
        runs.append([env.reset(seed=5)[1]["prompt"]] + [env.reset()[1]["prompt"] for _ in range(6)])
    assert runs[0] == runs[1]


def test_an_episode_with_a_given_prompt_stands_outside_the_groups(tokenizer: Any) -> None:
    env = make(tokenizer, group_size=2)
    opened = env.reset(seed=1)[1]["prompt"]
    env.reset(options={"prompt": "I hated"})
    assert env.reset()[1]["prompt"] == opened


def test_prompts_are_drawn_uniformly_by_the_rows_own_generator(tokenizer: Any) -> None:
    env = make(tokenizer)
    env.reset(seed=9)
    counts = dict.fromkeys(PROMPTS, 0)
    for _ in range(2000):
        counts[env.reset()[1]["prompt"]] += 1
    # Four standard deviations of a binomial count with p = 1/4.
    assert all(abs(count - 500) < 4 * np.sqrt(2000 * 3 / 16) for count in counts.values())
    expected = np.random.default_rng(9)
    env.reset(seed=9)
    expected.integers(4)
    assert [env.reset()[1]["prompt"] for _ in range(20)] == [PROMPTS[expected.integers(4)] for _ in range(20)]


def test_one_call_scores_all_the_rows_that_finish_in_a_step_and_no_others(tokenizer: Any) -> None:
    reward = RecordingReward()
    env = TextVectorEnv(5, tokenizer=tokenizer, prompts=PROMPTS, reward=reward, max_prompt_tokens=8, max_new_tokens=8)
    env.reset(seed=0)
    env.step(np.full(5, 50))
    assert reward.calls == []
    env.step(np.array([EOS, 51, EOS, 52, EOS]))
    assert [call["completion_ids"] for call in reward.calls] == [[[50, EOS]] * 3]


def test_columns_of_the_prompts_reach_rewards_and_metrics_as_lists(tokenizer: Any) -> None:
    seen: list[Any] = []

    def reward(prompts: list[str], answer: list[Any], **_: Any) -> list[float]:
        seen.append((prompts, answer))
        return [0.0] * len(prompts)

    rows = [{"prompt": "The movie", "answer": 42}, {"prompt": "I loved"}]
    env = TextVectorEnv(
        2,
        tokenizer=tokenizer,
        prompts=rows,
        reward=reward,
        max_prompt_tokens=8,
        max_new_tokens=4,
        metrics={"other": reward},
    )
    prompts = env.reset(seed=0)[1]["prompt"].tolist()
    env.step(np.array([EOS, EOS]))
    answers = {"The movie": 42, "I loved": None}
    assert seen == [(prompts, [answers[prompt] for prompt in prompts])] * 2


def test_a_metric_is_reported_and_never_paid_and_its_failure_is_an_error(tokenizer: Any) -> None:
    env = make(tokenizer, reward=lambda completions, **_: [1.0], metrics={"two": lambda completions, **_: [2.0]})
    env.reset(seed=0)
    _, reward, _, _, info = env.step(EOS)
    assert (reward, info["score"], info["two"]) == (1.0, 1.0, 2.0)
    failing = make(tokenizer, metrics={"two": lambda completions, **_: [None]})
    failing.reset(seed=0)
    with pytest.raises(RewardError, match="must return numbers, but returned None"):
        failing.step(EOS)


def test_a_weighted_sum_reports_its_parts_unweighted(tokenizer: Any) -> None:
    env = make(tokenizer, reward={"sentiment": 2.0, RecordingReward(): -1.0})
    env.reset(options={"prompt": "I loved"})
    info = env.step(EOS)[4]
    assert info["score"] == pytest.approx(2 * info["reward/sentiment"] - info["reward/recording"])
    assert info["reward/recording"] == ids_score([EOS])


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As SentencePiece does, it writes spaces as ▁ and drops the first one of whatever it decodes."""
    words = ["<eos>", "▁The", "▁film", "▁was", "▁good", "s", "<unk>"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")


def test_the_space_between_prompt_and_completion_survives_sentencepiece() -> None:
    tokenizer = sentencepiece_like()
    assert tokenizer.decode([3, 4]) == "was good"  # the trap: on its own the completion loses its space
    env = make(tokenizer, prompts=["The film"], reward=lambda completions, **_: [0.0], max_prompt_tokens=4)
    for response, completion in ([3, 4, 0], " was good"), ([5, 3, 0], "s was"), ([0], ""):
        env.reset(seed=0)
        assert write(env, response)[-1][4]["completion"] == completion


def test_a_border_within_a_character_is_decoded_as_well_as_it_can_be(tokenizer: Any) -> None:
    ids = tokenizer("é")["input_ids"]
    assert len(ids) == 2
    env = make(tokenizer)
    env.reset(options={"prompt": [*tokenizer("caf")["input_ids"], ids[0]]})
    info = write(env, [ids[1], EOS])[-1][4]
    assert info["completion"] == "\N{REPLACEMENT CHARACTER}"


def test_a_truncated_prompt_is_what_is_seen_reported_and_scored(tokenizer: Any) -> None:
    text = "The movie was good and the music was good"
    ids = tokenizer(text)["input_ids"]
    env = make(tokenizer, prompts=[text], max_prompt_tokens=3, overlong_prompts="truncate_left")
    obs, info = env.reset(seed=0)
    assert obs["input_ids"][:3].tolist() == ids[-3:]
    assert info["prompt"] == tokenizer.decode(ids[-3:])
    assert write(env, [EOS])[-1][4]["prompt"] == info["prompt"]


def tokenizer_with_holes() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 2, "<unk>": 3, "<eos>": 9}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")


def test_a_vocabulary_with_holes_ends_at_its_largest_id() -> None:
    tokenizer = tokenizer_with_holes()
    assert len(tokenizer) == 4
    settings: Any = {"tokenizer": tokenizer, "prompts": ["a b"], "reward": RecordingReward(), "max_new_tokens": 4}
    env = TextEnv(**settings)
    assert env.action_space.n == 10  # type: ignore[attr-defined]
    check_text_env(env)
    check_text_vector_env(TextVectorEnv(2, **settings), lambda: TextEnv(**settings))
    obs, _ = env.reset(options={"prompt": [9, 2]})
    assert obs in env.observation_space
    *_, info = write(env, [1, 8, 2, 9])[-1]  # two ids of no token say nothing
    assert (info["completion"].strip(), info["finish_reason"]) == ("b", "eos")
    with pytest.raises(ValueError, match=r"lie in \[0, 10\), got \[10\]"):
        env.reset(options={"prompt": [10]})
    points = np.random.default_rng(0).normal(size=(10, 3))
    continuous = EmbeddingAction(TextEnv(**settings), points)
    continuous.reset()
    *_, info = continuous.step(continuous.nearest_token.points[9])
    assert info["finish_reason"] == "eos"
