"""Rewards: the forms in which one is named, the classifier's arithmetic, failures that never pass as a score.

Conversations reach them as messages, and what a reward model reads of one is its own template's business.
"""

from __future__ import annotations

import asyncio
import csv
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from learners import make_env, make_model, make_policy, make_ppo, save_model
from tiny import RecordingReward, tiny_classifier, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from agents.cli import main
from agents.rollouts.sampling import sample_texts
from text_env import NO_ACTION, TextVectorEnv
from text_env.builtin import LANGUAGE_MODEL
from text_env.finished_texts import RESERVED_NAMES
from text_env.rewards import (
    FinishedTexts,
    Normalized,
    RewardError,
    SequenceClassifierReward,
    WeightedSum,
    make_reward,
    reward_name,
    score,
    score_parts,
)

TEXTS = FinishedTexts(
    prompts=["The movie", "I loved", "The film"],
    completions=[" was good", " this film so much, it was wonderful", " was a horrible mess"],
    completion_ids=[[5, 6], [7, 8, 9], [10]],
    columns={"answer": [1, 2, 3]},
)


def saved(path: Path, **kwargs: Any) -> str:
    """A classifier with its tokenizer, as a user finds one on the hub."""
    tokenizer = tiny_tokenizer()
    tiny_classifier("llama", tokenizer, pad_token_id=tokenizer.pad_token_id, **kwargs).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


# Functions as users write them for TRL: they take what they need and leave the rest to **kwargs.


def test_a_function_written_for_trl_works_unchanged() -> None:
    def by_completions(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    def by_prompts(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(prompt)) for prompt in prompts]

    def by_columns(completion_ids: list[list[int]], answer: list[int], **kwargs: Any) -> list[int]:
        return [len(ids) * wanted for ids, wanted in zip(completion_ids, answer, strict=True)]

    assert score(by_completions, TEXTS).tolist() == [9.0, 36.0, 20.0]
    assert score(by_prompts, TEXTS).tolist() == [9.0, 7.0, 8.0]
    assert score(by_columns, TEXTS).tolist() == [2.0, 6.0, 3.0]


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.5, True],
        (1, 2.5, 1),
        np.array([1, 2.5, 1]),
        torch.tensor([1, 2.5, 1], dtype=torch.bfloat16),
        torch.tensor([1, 2.5, 1], requires_grad=True),
        (x for x in [1, 2.5, 1]),
        pandas.Series([1, 2.5, 1], index=[4, 3, 2]),
        [np.float32(1), Decimal("2.5"), np.True_],
        {"a": 1, "b": 2.5, "c": 1}.values(),
    ],
)
def test_a_reward_may_return_any_sequence_of_numbers(returned: Any) -> None:
    scores = score(lambda **_: returned, TEXTS)
    assert scores.dtype == np.float64
    assert scores.tolist() == [1.0, 2.5, 1.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([0.0, float("nan"), 0.0], r"finite numbers, but returned nan for: prompt 'I loved', completion ' this film"),
        ([0.0, 0.0, float("inf")], r"finite numbers, but returned inf for: prompt 'The film'"),
        ([None, 0.0, 0.0], r"return numbers, but returned None for: prompt 'The movie'"),
        ([[0.0, 1.0]] * 3, r"return numbers, but returned \[0.0, 1.0\]"),
        ([0.0, 0.0], r"one number per text: expected 3, got 2. The first text was: prompt 'The movie'"),
        ([], "expected 3, got 0"),
        (0.5, r"return a list of 3 numbers, one per text, but returned 0.5"),
        (None, r"return a list of 3 numbers, one per text, but returned None"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, r"return a list of 3 numbers, one per text, but returned \{0: 1.0"),
        ({1.0, 2.0, 3.0}, r"return a list of 3 numbers, one per text, but returned \{1.0"),
        ({1: 1.0, 2: 2.0, 3: 3.0}.keys(), r"return a list of 3 numbers, one per text, but returned dict_keys"),
        ("123", "return a list of 3 numbers, one per text, but returned '123'"),
        (b"123", "return a list of 3 numbers, one per text, but returned b'123'"),
        (["1", "2", "3"], "return numbers, but returned '1' for: prompt 'The movie'"),
        (np.array(["1", "2", "3"]), r"return numbers, but returned .*'1'.* for: prompt 'The movie'"),
        ([0.0, b"1", 0.0], "return numbers, but returned b'1' for: prompt 'I loved'"),
        (torch.zeros(3, 1), r"return numbers, but returned tensor\(\[0.\]\) for: prompt 'The movie'"),
        (np.zeros((3, 1)), r"return numbers, but returned array\(\[0.\]\) for: prompt 'The movie'"),
        (torch.tensor(1.0), r"return a list of 3 numbers, one per text, but returned tensor\(1.\)"),
        (np.float64(1.0), "return a list of 3 numbers, one per text, but returned"),
        (
            [0.0, 10**400, 0.0],
            "return finite numbers, but returned an integer beyond every float for: prompt 'I",
        ),
        ([0.0, 1j, 0.0], r"return numbers, but returned 1j for: prompt 'I loved'"),
        (itertools.count(), "return one number per text: expected 3, got more"),
        (pandas.DataFrame({"a": [1.0], "b": [2.0], "c": [3.0]}), "return numbers, but returned 'a'"),
    ],
)
def test_anything_but_one_finite_number_per_text_is_an_error_naming_reward_and_text(
    returned: Any, message: str
) -> None:
    def my_reward(**_: Any) -> Any:
        return returned

    with pytest.raises(RewardError, match=f"'my_reward' must .*{message}"):
        score(my_reward, TEXTS)


def test_a_generator_that_raises_names_the_reward_and_the_text() -> None:
    def my_reward(completions: list[str], **_: Any) -> Iterator[float]:
        yield 1.0
        raise KeyError("answer")

    with pytest.raises(RewardError, match=r"'my_reward' raised KeyError after 1 of 3 numbers: 'answer' for: prompt 'I"):
        score(my_reward, TEXTS)


def test_an_exception_in_a_reward_names_it_and_keeps_the_cause() -> None:
    def my_reward(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match=r"'my_reward' raised TypeError.*Let it accept \*\*kwargs") as caught:
        score(my_reward, TEXTS)
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize(("columns", "named"), [({"topic": ["rain"]}, r"the columns \['topic'\]"), ({}, "no further")])
def test_a_reward_that_asks_for_too_much_is_told_how_rewards_are_called(
    columns: dict[str, list[str]], named: str
) -> None:
    def my_reward(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    message = r"'answer'\. Rewards are called as my_reward\(prompts=.*, \*\*columns\), and these prompts have " + named
    with pytest.raises(RewardError, match=message):
        score(my_reward, FinishedTexts(["Write."], ["It"], [[1]], columns))


def test_a_type_error_inside_a_reward_says_nothing_of_its_arguments() -> None:
    def my_reward(completions: list[str], **_: Any) -> list[float]:
        return len(1)  # type: ignore[arg-type, return-value]

    with pytest.raises(RewardError, match="raised TypeError") as caught:
        score(my_reward, TEXTS)
    assert "are called as" not in str(caught.value)


def test_a_reward_that_edits_its_arguments_harms_nobody_else() -> None:
    def vandal(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        prompts.clear()
        completion_ids[0].clear()
        return [0.0] * 3

    score(vandal, TEXTS)
    assert len(TEXTS.prompts) == 3
    assert TEXTS.completion_ids[0] == [5, 6]


def test_rewards_are_named_for_errors_and_logs() -> None:
    class Brevity:
        def __call__(self, **_: Any) -> list[float]:
            return []

    named = Brevity()
    named.name = "short"  # type: ignore[attr-defined]
    assert [reward_name(reward) for reward in (len, Brevity(), named)] == ["len", "Brevity", "short"]


# Names


def test_a_callable_is_used_as_it_is_and_a_function_can_be_named(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "my_rewards_module.py").write_text(
        "class Nested:\n    @staticmethod\n    def brevity(completions, **_): return [-len(c) for c in completions]"
    )
    monkeypatch.chdir(tmp_path)
    assert make_reward(len) is len
    assert score(make_reward("my_rewards_module:Nested.brevity"), TEXTS).tolist() == [-9.0, -36.0, -20.0]


def test_names_are_matched_before_directories(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "sentiment").mkdir()
    monkeypatch.chdir(tmp_path)
    assert reward_name(make_reward("sentiment")) == "sentiment"


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (
            "sentimnt",
            ValueError,
            r"Unknown reward 'sentimnt'. Known names: builtin, sentiment, correct, format, length, overlong. Otherwise",
        ),
        ("sentiment+sentimnt", ValueError, "Unknown reward 'sentimnt'"),
        ("half*sentiment", ValueError, "'name' or 'weight\\*name', got 'half\\*sentiment'"),
        ("sentiment+", ValueError, "to name another reward, got ''"),
        ("sentiment+2*sentiment", ValueError, "to name another reward"),
        ({}, ValueError, "at least one reward"),
        ({"sentiment": float("nan")}, ValueError, "Expected finite weights"),
        ("nobody/no-such-model", ValueError, "Expected a directory or hub name of a Hugging Face sequence classifier"),
        ("no_such_module:reward", ValueError, "no module 'no_such_module'"),
        ("sys:path", TypeError, "Expected 'sys:path' to name a reward, which is a function"),
        (3, TypeError, "Expected a reward to be a callable"),
    ],
)
def test_what_is_no_reward_is_refused_with_what_was_expected(spec: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_reward(spec)


class Client:
    """What a reward keeps between its calls. It belongs to the event loop that it was made in, as HTTP clients do."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.loop = asyncio.get_running_loop()


def test_a_coroutine_function_is_run() -> None:
    clients: list[Client] = []

    async def slow(completions: list[str], **_: Any) -> list[float]:
        if not clients:
            clients.append(Client())
        async with clients[0].lock:
            await asyncio.sleep(0.001)
            assert asyncio.get_running_loop() is clients[0].loop
        return [float(len(completion)) for completion in completions]

    class Judge:
        async def __call__(self, **batch: Any) -> list[float]:
            return await slow(**batch)

    async def in_a_notebook() -> list[float]:
        return score(slow, TEXTS).tolist()

    expected = [9.0, 36.0, 20.0]
    for reward in (slow, Judge(), functools.partial(slow, unused=1)):
        assert score(make_reward(reward), TEXTS).tolist() == expected
    assert score(make_reward({slow: 2.0}), TEXTS).tolist() == [2 * value for value in expected]
    assert asyncio.run(in_a_notebook()) == expected


def test_a_coroutine_functions_failure_names_it() -> None:
    async def judge(**_: Any) -> list[float]:
        raise ConnectionError("no answer")

    with pytest.raises(RewardError, match=r"Reward 'judge' raised ConnectionError: no answer.*'The movie'"):
        score(judge, TEXTS)


# What TRL's trainers do beyond the call


def test_a_text_that_a_part_does_not_apply_to_is_scored_by_the_others() -> None:
    def maths(**_: Any) -> list[float | None]:
        return [1.0, None, None]

    def style(**_: Any) -> list[float | None]:
        return [10.0, 20.0, None]

    def length(**_: Any) -> list[float | None]:
        return [None, None, 5.0]

    both = make_reward({maths: 2.0, style: 0.5})
    with pytest.raises(RewardError, match=r"numbers, but returned None for: prompt 'The film'.*another part"):
        score(both, TEXTS)
    everything = make_reward({both: 1.0, length: 3.0})
    assert score(everything, TEXTS).tolist() == [7.0, 10.0, 15.0]
    parts = score_parts(make_reward({maths: 2.0, style: 0.5, length: 3.0}), TEXTS)
    assert parts["score"].tolist() == [7.0, 10.0, 15.0]
    assert np.isnan(parts["reward/maths"]).tolist() == [False, True, True]
    assert score(make_reward({Normalized(style, 10.0, 2.0): 1.0, length: 1.0}), TEXTS).tolist() == [0.0, 5.0, 5.0]


def test_a_part_that_does_not_apply_is_missing_from_the_info_and_from_the_means() -> None:
    def short(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [1.0 if len(ids) < 3 else None for ids in completion_ids]

    def always(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [0.25 for _ in completion_ids]

    env = TextVectorEnv(2, tokenizer=tiny_tokenizer(), prompts=["The"], reward={short: 1.0, always: 1.0})
    env.reset(seed=0)
    env.step(np.array([50, 50]))
    env.step(np.array([50, 0]))
    *_, infos = env.step(np.array([0, NO_ACTION]))
    final = infos["final_info"]
    assert final["score"][0] == 0.25
    assert "reward/short" not in final
    ppo = make_ppo(make_env(reward={short: 1.0, always: 1.0}), make_model(ends=0.3))
    ppo.learn(100, log_interval=0)
    assert ppo.logger.name_to_value["objective/reward/short"] == 1.0
    assert ppo.logger.name_to_value["objective/reward/always"] == 0.25


def test_what_trls_rewards_log_reaches_the_final_info() -> None:
    def graded(completions: list[str], log_metric: Any, log_extra: Any, trainer_state: Any, **_: Any) -> list[float]:
        log_metric("accuracy", 0.25)
        log_metric("accuracy", 0.75)
        log_extra("extracted", [completion[:1] for completion in completions])
        log_metric("step", trainer_state.global_step)
        return [1.0] * len(completions)

    def by_kwargs(completions: list[str], **kwargs: Any) -> list[float]:
        kwargs["log_metric"]("inner", 3)
        return [float(kwargs["trainer_state"].global_step)] * len(completions)

    def strict(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        return [0.0] * len(prompts)

    reward = {graded: 1.0, Normalized(by_kwargs, 0.0, 2.0): 1.0, strict: 1.0}
    env = TextVectorEnv(3, tokenizer=tiny_tokenizer(), prompts=["The"], reward=reward, shaping=graded)
    env.episodes.trainer_state.global_step = 6
    env.reset(seed=0)
    env.step(np.array([50, 51, 52]))
    *_, infos = env.step(np.array([0, 53, 0]))
    final = infos["final_info"]
    first, _, third = env.tokenizer.batch_decode([[50], [51], [52]])
    assert [final["extracted"][row] for row in (0, 2)] == [first, third]
    assert final["_extracted"].tolist() == [True, False, True]
    for name, value in (("accuracy", 0.5), ("inner", 3.0), ("step", 6.0), ("score", 4.0)):
        assert [final[name][row] for row in (0, 2)] == [value, value]
    assert score(graded, TEXTS).tolist() == [1.0] * 3  # also outside an environment


def test_a_reward_sees_how_far_training_has_come() -> None:
    seen: list[int] = []

    def curriculum(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        seen.append(trainer_state.global_step)
        return [0.0] * len(completions)

    ppo = make_ppo(make_env(reward=curriculum), n_epochs=2)
    ppo.learn(130)
    assert sorted(set(seen)) == list(range(0, ppo._n_updates, 2))
    assert len(set(seen)) > 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda metric, extra: metric("score", 1.0), "another name .*, got 'score', which the final info has already"),
        (
            lambda metric, extra: metric("gold", 1.0),
            "another name .*, got 'gold', which is a metric of the environment",
        ),
        (lambda metric, extra: metric("kl", 123.0), "another name .*, got 'kl', which the training logs itself"),
        (lambda metric, extra: metric("kl_coef", 0.0), "got 'kl_coef', which the training logs itself"),
        (lambda metric, extra: metric("timesteps", 1.0), "got 'timesteps', which samples.jsonl has already"),
        (lambda metric, extra: extra("length", [3]), "got 'length', which learners add to the final info"),
        (lambda metric, extra: metric(1, 1.0), "got 1, which is no string"),
        (lambda metric, extra: metric("reward/x", 1.0), "got 'reward/x'"),
        (lambda metric, extra: metric("x", "1"), r"log_metric\('x', ...\) to be given a number, got '1'"),
        (lambda metric, extra: extra("x", [1, 2]), "one value for each of the 1 texts"),
        (lambda metric, extra: extra("prompt", ["a"]), "got 'prompt'"),
    ],
)
def test_a_log_that_would_be_lost_or_overwrite_something_is_an_error(call: Any, message: str) -> None:
    def my_reward(log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        call(log_metric, log_extra)
        return [0.0]

    env = TextVectorEnv(1, tokenizer=tiny_tokenizer(), prompts=["The"], reward=my_reward, metrics={"gold": "sentiment"})
    env.reset(seed=0)
    with pytest.raises(RewardError, match=f"'my_reward' raised ValueError: .*{message}"):
        env.step(np.array([0]))


@pytest.mark.parametrize("name", sorted({*itertools.chain(*RESERVED_NAMES.values()), "reward/x", "_score"}))
def test_a_metric_with_the_name_of_something_else_is_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError, match=f"Expected another name for what is logged of a text, got '{name}', which"):
        TextVectorEnv(1, tokenizer="not/even/loaded", prompts=["The"], metrics={"gold": "sentiment", name: "sentiment"})


def test_a_directory_without_a_classifier_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"got '{tmp_path}'"):
        make_reward(tmp_path)


# Sums, normalisation, the lexicon


def test_sentiment_is_the_lexicons_compound_score_of_prompt_and_completion() -> None:
    scores = score(make_reward("sentiment"), TEXTS)
    # By hand, the lexicon's rule x / sqrt(x² + 15): good 1.9; loved 2.9, wonderful 2.7; horrible −2.5, mess −1.5.
    valences = np.array([1.9, 2.9 + 2.7, -2.5 - 1.5])
    assert scores == pytest.approx(valences / np.sqrt(valences**2 + 15), abs=1e-4)


def test_a_weighted_sum_is_the_same_as_mapping_and_as_string() -> None:
    single = score(make_reward("sentiment"), TEXTS)
    for spec in ("-0.5*sentiment", {"sentiment": -0.5}):
        assert score(make_reward(spec), TEXTS) == pytest.approx(-0.5 * single)

    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    both = make_reward({"sentiment": 2, length: 0.1})
    assert score(both, TEXTS) == pytest.approx(2 * single + 0.1 * np.array([9, 36, 20]))
    assert both.name == "2*sentiment+0.1*length"
    with pytest.raises(ValueError, match="different names, got 'length' twice"):
        make_reward({length: 1, functools.wraps(length)(lambda **_: []): 1})


def test_a_failing_part_of_a_sum_is_named_itself() -> None:
    def broken(**_: Any) -> list[float]:
        return [float("nan")] * 3

    with pytest.raises(RewardError, match="Reward 'broken' must return finite numbers"):
        score(WeightedSum({"broken": (broken, 1.0)}), TEXTS)


def test_a_normalised_reward_is_shifted_and_scaled() -> None:
    single = score(make_reward("sentiment"), TEXTS)
    normalised = Normalized("sentiment", mean=single.mean(), std=single.std())
    assert score(normalised, TEXTS) == pytest.approx((single - single.mean()) / single.std())
    for mean, std in ((0.0, 0.0), (float("nan"), 1.0), (0.0, -1.0)):
        with pytest.raises(ValueError, match="a standard deviation above 0"):
            Normalized("sentiment", mean, std)


# Sequence classifiers


def by_hand(directory: str) -> list[Any]:
    """Logits of each text alone, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype="float32").eval()
    tokenizer = tiny_tokenizer()
    logits = []
    for prompt, completion in zip(TEXTS.prompts, TEXTS.completions, strict=True):
        with torch.no_grad():
            logits.append(model(torch.tensor([tokenizer(prompt + completion)["input_ids"]])).logits[0].double())
    return logits


def test_a_language_model_is_no_reward_model_since_its_head_would_be_random() -> None:
    with pytest.raises(ValueError, match=r"got those of LlamaForCausalLM, without score\.weight: .* reward-model"):
        make_reward(str(LANGUAGE_MODEL))


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_score_of_a_reward_model_is_its_logit_whatever_the_batch(tmp_path: Path, batch_size: int) -> None:
    directory = saved(tmp_path)
    expected = [float(logits[0]) for logits in by_hand(directory)]
    assert np.std(expected) > 0.1  # texts are told apart
    assert score(SequenceClassifierReward(directory, batch_size=batch_size), TEXTS) == pytest.approx(expected, abs=1e-5)
    assert score(make_reward(directory), TEXTS) == pytest.approx(expected, abs=1e-5)


def test_mean_and_std_in_the_models_config_normalise_its_score(tmp_path: Path) -> None:
    directory = saved(tmp_path, reward_mean=0.25, reward_std=2.0)
    expected = [(float(logits[0]) - 0.25) / 2.0 for logits in by_hand(directory)]
    assert score(make_reward(directory), TEXTS) == pytest.approx(expected, abs=1e-5)


def test_of_two_labels_the_score_is_the_difference_of_their_logits(tmp_path: Path) -> None:
    directory = saved(tmp_path, num_labels=2)
    expected = [float(logits[1] - logits[0]) for logits in by_hand(directory)]
    assert score(make_reward(directory), TEXTS) == pytest.approx(expected, abs=1e-5)
    assert score(SequenceClassifierReward(directory, label=0), TEXTS) == pytest.approx([-x for x in expected], abs=1e-5)


def test_of_more_labels_one_must_be_chosen_and_its_log_odds_are_the_score(tmp_path: Path) -> None:
    directory = saved(tmp_path, num_labels=3)
    with pytest.raises(
        ValueError, match=r"has 3 labels: expected label= to be one of \['LABEL_0', 'LABEL_1', 'LABEL_2'\]"
    ):
        make_reward(directory)
    probabilities = [logits.softmax(dim=0)[2].item() for logits in by_hand(directory)]
    expected = [np.log(p / (1 - p)) for p in probabilities]
    for label in (2, "LABEL_2"):
        assert score(SequenceClassifierReward(directory, label=label), TEXTS) == pytest.approx(expected, abs=1e-5)


def test_a_tokenizer_without_pad_pads_with_eos() -> None:
    tokenizer = tiny_tokenizer(pad=False)
    model = tiny_classifier("gpt2", tokenizer)
    assert model.config.pad_token_id is None
    reward = SequenceClassifierReward(model, tokenizer)
    together = score(reward, TEXTS)
    alone = SequenceClassifierReward(model, tokenizer, batch_size=1)
    assert together == pytest.approx(score(alone, TEXTS), abs=1e-5)
    assert (model.config.pad_token_id, tokenizer.pad_token_id) == (None, None)  # whose they are may need them so
    nothing = tiny_tokenizer(pad=False)
    nothing.eos_token = None
    with pytest.raises(ValueError, match="to have a pad or an eos token"):
        SequenceClassifierReward(model, nothing)


def test_a_text_that_the_model_cannot_hold_is_an_error_unless_cutting_is_asked_for() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_classifier("gpt2", tokenizer, pad_token_id=1, max_position_embeddings=8)
    long = FinishedTexts(["The movie was good and the music was good"], [" and the story was bad"], [[5]])
    with pytest.raises(RewardError, match="'GPT2ForSequenceClassification' raised"):
        score(SequenceClassifierReward(model, tokenizer), long)
    assert np.isfinite(score(SequenceClassifierReward(model, tokenizer, max_length=8), long)).all()


def test_a_live_model_needs_its_tokenizer_and_keeps_device_and_dtype() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_classifier("llama", tokenizer, pad_token_id=1).to(torch.bfloat16)
    with pytest.raises(ValueError, match="Expected the tokenizer of a live reward model"):
        SequenceClassifierReward(model)
    assert np.isfinite(score(SequenceClassifierReward(model, tokenizer), TEXTS)).all()
    assert model.dtype == torch.bfloat16


def test_a_model_in_half_precision_is_scored_in_float32_on_a_cpu_unless_told_otherwise(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    LlamaForSequenceClassification.from_pretrained(directory).half().save_pretrained(directory)
    assert SequenceClassifierReward(directory, device="cpu").model.dtype == torch.float32
    assert SequenceClassifierReward(directory, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_model_made_by_name_is_shared_while_somebody_holds_it(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    first = make_reward(directory)
    assert make_reward(directory) is first
    assert make_reward(Path(directory)) is first


def test_arguments_reach_the_classifiers_that_are_made_by_name_and_tell_them_apart(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", num_labels=3)
    reward = make_reward({directory: 1.0, "sentiment": 1.0}, label="LABEL_2", batch_size=2, dtype="bfloat16")
    model = reward.rewards["model"]
    assert (model.batch_size, model.model.dtype) == (2, torch.bfloat16)
    assert make_reward(directory, batch_size=2, dtype="bfloat16", label="LABEL_2") is model
    assert make_reward(directory, batch_size=2, dtype="bfloat16", label=2) is not model
    expected = make_reward(directory, label=2)
    assert score(model, TEXTS) == pytest.approx(score(expected, TEXTS), abs=0.1)
    assert make_reward(f"0.5*{directory}+sentiment", label=2).rewards["model"] is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"batchsize": 2},
            r"Unknown reward_kwargs \['batchsize'\]; known are 'batch_size', 'device', 'dtype', 'max_length', 'label'",
        ),
        ({"batch_size": 0}, "batch_size to be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size to be an integer of at least 1, got 2.5"),
        ({"max_length": "long"}, "max_length to be an integer of at least 1, got 'long'"),
        ({"dtype": "bfloat17"}, "dtype to be 'auto' or one of PyTorch's, such as 'bfloat16', got 'bfloat17'"),
        ({"device": "gpu"}, "device to be 'auto' or one of PyTorch's; 'gpu'"),
        ({"chat_template": True}, "the tokenizer of reward 'model' to have a chat template"),
    ],
)
def test_arguments_that_a_classifier_cannot_use_are_refused(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    directory = saved(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        make_reward(directory, **arguments)


# Conversations

CHAT = [
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How was the movie"}],
    # The assistant's turn has begun already: the completion goes on with it.
    [{"role": "user", "content": "Tell me of the film"}, {"role": "assistant", "content": "I loved"}],
    [{"role": "user", "content": "And the music"}],
]


def chat(**changes: Any) -> FinishedTexts:
    spoken = ["\n".join(message["content"] for message in messages) for messages in CHAT]
    texts = {"prompts": spoken, "completions": TEXTS.completions, "completion_ids": TEXTS.completion_ids}
    return FinishedTexts(**{**texts, "columns": TEXTS.columns, "messages": CHAT, **changes})


def test_a_function_written_for_trls_conversations_works_unchanged() -> None:
    def politeness(prompts: list[Any], completions: list[Any], answer: list[int], **kwargs: Any) -> list[float]:
        contents = [completion[0]["content"] for completion in completions]
        assert [completion[0]["role"] for completion in completions] == ["assistant"] * 3
        assert [len(completion) for completion in completions] == [1] * 3
        return [
            len(prompt) + len(content) * number
            for prompt, content, number in zip(prompts, contents, answer, strict=True)
        ]

    expected = [2.0 + 9, 2.0 + 36 * 2, 1.0 + 20 * 3]
    assert score(politeness, chat()).tolist() == expected
    assert chat().as_keywords()["prompts"] == CHAT
    # Inside sums and normalisations too, at any depth.
    nested = Normalized(WeightedSum({"part": (Normalized(politeness, 1.0, 2.0), 4.0)}), 2.0, 0.5)
    assert score(nested, chat()) == pytest.approx([(4 * (value - 1) / 2 - 2) / 0.5 for value in expected])


def test_a_reward_that_edits_a_conversation_harms_nobody_else() -> None:
    def vandal(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        prompts[0][0]["content"] = "Be rude."
        prompts[1].clear()
        return [0.0] * 3

    seen = RecordingReward()
    score(WeightedSum({"vandal": (vandal, 1.0), "seen": (seen, 1.0)}), chat())
    assert seen.calls[0]["prompts"] == CHAT
    assert CHAT[0][0]["content"] == "Be kind."
    assert len(CHAT[1]) == 2


@pytest.mark.parametrize("texts", [TEXTS, chat()], ids=["plain", "conversations"])
def test_what_a_reward_is_called_with_can_be_handed_on_as_it_is(texts: FinishedTexts) -> None:
    assert FinishedTexts.from_keywords(**texts.as_keywords()) == texts


def test_a_failing_reward_shows_the_conversation() -> None:
    with pytest.raises(RewardError, match=r"returned nan for: prompt \[\{'role': 'user', .*'I loved'\}\], completion"):
        score(lambda **_: [0.0, float("nan"), 0.0], chat())


def test_the_lexicon_judges_what_the_assistant_wrote_opening_words_included() -> None:
    spoken = [" was good", "I loved this film so much, it was wonderful", " was a horrible mess"]
    expected = score(make_reward("sentiment"), FinishedTexts([""] * 3, spoken, TEXTS.completion_ids))
    assert score(make_reward("sentiment"), chat()).tolist() == expected.tolist()
    assert score(make_reward("sentiment"), TEXTS)[1] == expected[1]  # "I loved" is a plain prompt there


TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} {% endfor %}"
"""Without a special token: a BERT whose tokenizer writes none either reads bare words."""
SPELT = [
    "[system] Be kind. [user] How was the movie [assistant] was good ",
    "[user] Tell me of the film [assistant] I loved this film so much, it was wonderful ",
    "[user] And the music [assistant] was a horrible mess ",
]


def bert_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Nothing like the policies' own: whole words, all lower case, and [CLS] and [SEP] around whatever it encodes."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    said = " ".join([*SPELT, *TEXTS.prompts, *TEXTS.completions]).lower()
    words = [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(said)]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*special, *words]))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.chat_template = template
    return tokenizer


def save_bert(path: Path, template: str | None = TEMPLATE) -> str:
    """A reward model of another family than any policy here, with its own tokenizer and chat template."""
    tokenizer = bert_tokenizer(template)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=32,
            num_labels=1,
            initializer_range=0.5,
        )
        BertForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def bert_by_hand(directory: str, texts: Sequence[str], special: bool, dtype: torch.dtype = torch.float32) -> Any:
    """The logit of each text alone, with [CLS] and [SEP] or without."""
    model = BertForSequenceClassification.from_pretrained(directory, dtype=dtype).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    with torch.no_grad():
        encoded = [tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"] for text in texts]
        logits = [float(model(input_ids=ids).logits) for ids in encoded]
    assert np.std(logits) > 0.05  # texts are told apart
    return pytest.approx(logits, abs=1e-5 if dtype == torch.float32 else 0.05)


PLAIN = [prompt + completion for prompt, completion in zip(TEXTS.prompts, TEXTS.completions, strict=True)]
TURNS = [
    f"[user] {prompt} [assistant] {completion.strip()} "
    for prompt, completion in zip(TEXTS.prompts, TEXTS.completions, strict=True)
]
ASSISTANTS = [" was good", "I loved this film so much, it was wonderful", " was a horrible mess"]


@pytest.mark.parametrize(
    ("texts", "template", "chat_template", "read", "special"),
    [
        (chat(), TEMPLATE, None, SPELT, False),
        (chat(), TEMPLATE, True, SPELT, False),
        (chat(), TEMPLATE, False, ASSISTANTS, True),
        (chat(), None, None, ASSISTANTS, True),
        (TEXTS, TEMPLATE, None, PLAIN, True),
        (TEXTS, TEMPLATE, False, PLAIN, True),
        (TEXTS, TEMPLATE, True, TURNS, False),
    ],
)
def test_what_a_reward_model_reads_is_its_own_templates_doing(
    tmp_path: Path,
    texts: FinishedTexts,
    template: str | None,
    chat_template: bool | None,
    read: list[str],
    special: bool,
) -> None:
    directory = save_bert(tmp_path, template)
    scores = score(make_reward(directory, chat_template=chat_template, batch_size=2), texts)
    assert scores == bert_by_hand(directory, read, special)
    assert scores != bert_by_hand(directory, read, not special)  # a second pair of special tokens would be seen


def test_a_reward_model_of_another_family_scores_a_llama_policys_texts(tmp_path: Path) -> None:
    directory = save_bert(tmp_path / "bert")
    tokenizer = tiny_tokenizer()
    opened = "{% if add_generation_prompt %}a:{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}" + opened
    conversations = [messages for messages in CHAT if messages[-1]["role"] == "user"]
    env = TextVectorEnv(
        4,
        tokenizer=tokenizer,
        prompts=conversations,
        reward={directory: 2.0},
        max_prompt_tokens=64,
        max_new_tokens=8,
        metrics={"gold_score": directory},
        shaping=directory,
        reward_kwargs={"batch_size": 3, "dtype": "bfloat16"},
    )
    reward = env.reward.rewards["bert"]
    assert (reward.batch_size, reward.model.dtype) == (3, torch.bfloat16)
    assert env.episodes.metrics["gold_score"] is reward
    assert env.shaping is not None
    assert env.shaping.potential is reward
    drawn = [env.prompts[row % 2] for row in range(6)]
    infos = sample_texts(make_policy(env, "llama"), env, drawn)  # type: ignore[arg-type]
    spelt = [
        "".join(f"[{m['role']}] {m['content']} " for m in prompt.messages)
        + f"[assistant] {info['completion'].strip()} "
        for prompt, info in zip(drawn, infos, strict=True)
    ]
    assert len({info["completion"] for info in infos}) > 3
    logits = bert_by_hand(directory, spelt, special=False, dtype=torch.bfloat16)
    assert [info["reward/bert"] for info in infos] == logits
    assert [info["gold_score"] for info in infos] == logits
    assert [info["score"] for info in infos] == [2 * info["reward/bert"] for info in infos]


# In logs and evaluations


def test_each_of_several_weighted_rewards_is_logged_and_evaluated_by_its_name(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", ends=0.2)
    (tmp_path / "prompts.txt").write_text("The movie\nI loved this\n")
    run = tmp_path / "run"
    options = [
        "--model",
        model,
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--reward",
        "0.5*sentiment+2*learners:even_tokens",
    ]
    sizes = [
        "--n-episodes",
        "4",
        "--total-timesteps",
        "10",
        "--max-new-tokens",
        "4",
        "--device",
        "cpu",
        "--no-progress",
    ]
    assert main(["train", *options, *sizes, "--run-dir", str(run)]) == 0
    with (run / "progress.csv").open() as file:
        logged = {name: float(value) for name, value in list(csv.DictReader(file))[-1].items()}
    parts = {name: logged[f"objective/reward/{name}"] for name in ("sentiment", "even_tokens")}
    assert logged["objective/scores"] == pytest.approx(0.5 * parts["sentiment"] + 2 * parts["even_tokens"], abs=1e-4)

    evaluation = ["evaluate", "--policy", str(run / "policy"), "--prompts", str(tmp_path / "prompts.txt"), "--trust"]
    assert main([*evaluation, "--episodes", "8", "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    for writer in ("policy", "reference"):
        means = result[writer]
        weighted = 0.5 * means["reward/sentiment"] + 2 * means["reward/even_tokens"]
        assert means["score"] == pytest.approx(weighted, abs=1e-6)
