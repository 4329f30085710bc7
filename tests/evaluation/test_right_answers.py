"""An evaluation of tasks with a right answer: `agents.evaluation.right_answers`, and what it adds to a result."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from learners import PROMPTS, even_tokens, four_is_right, make_env, make_model, make_policy
from rich.console import Console

from agents.evaluation.evaluate import draw_prompts, evaluate
from agents.evaluation.intervals import bootstrap_interval, compare, wilson_interval
from agents.evaluation.pass_at_k import majority_at_k, pass_at_k
from agents.evaluation.report import answers_table
from agents.evaluation.right_answers import have_right_answers, measure_answers
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.sampling import sample_texts
from text_env.vector_env import TextVectorEnv


def verdict_only(completion_ids: list[list[int]], log_extra: Callable[..., None], **_: Any) -> list[float]:
    """A task whose reward says nothing of answers, and that every text solves."""
    log_extra("correct", [1.0 for _ in completion_ids])
    return [1.0 for _ in completion_ids]


class Seen:
    """A reward that remembers what another was asked and what it logged, in order."""

    def __init__(self, reward: Callable[..., list[float]]) -> None:
        self.reward = reward
        self.texts: list[dict[str, Any]] = []

    def __call__(self, **batch: Any) -> list[float]:
        texts = [
            {"prompt": prompt, "length": len(ids)}
            for prompt, ids in zip(batch["prompts"], batch["completion_ids"], strict=True)
        ]
        log_extra = batch["log_extra"]

        def log(name: str, values: list[Any]) -> None:
            for text, value in zip(texts, values, strict=True):
                text[name] = value
            log_extra(name, values)

        self.texts += texts
        return self.reward(**{**batch, "log_extra": log})


def make_pair(env: TextVectorEnv) -> tuple[CausalLMPolicy, CausalLMPolicy]:
    """A policy that writes short texts, and a reference that writes longer ones."""
    policy, reference = (make_policy(env, model=make_model(ends=ends)) for ends in (0.3, 0.1))
    torch.manual_seed(0)
    return policy, reference


def test_a_tasks_figures_are_those_of_its_texts() -> None:
    reward = Seen(four_is_right)
    env = make_env(1, reward=reward)  # one row: the reward sees the texts in order
    policy, reference = make_pair(env)
    result = evaluate(policy, reference, env, 48, samples_per_prompt=12, pass_at_k=[1, 4, 12])
    assert len(reward.texts) == 2 * (48 + 4)  # sampled texts of both, then the likeliest text of each prompt
    drawn = draw_prompts(4, 48, 0, 12)
    answers = result["answers"]
    assert set(answers) == {"samples_per_prompt", "policy", "reference", "intervals", "comparison"}
    assert answers["samples_per_prompt"] == 12
    values: dict[str, dict[str, np.ndarray]] = {}
    for writer, texts, greedy in (
        ("policy", reward.texts[:48], reward.texts[96:100]),
        ("reference", reward.texts[48:96], reward.texts[100:]),
    ):
        assert [text["prompt"] for text in texts] == [PROMPTS[i] for i in drawn]
        assert [text["prompt"] for text in greedy] == PROMPTS
        correct = np.array([text["correct"] for text in texts])
        lengths = np.array([text["length"] for text in texts], dtype=float)
        right = correct == 1
        assert 0 < right.sum() < 48
        assert result[writer]["correct"] == result[writer]["score"] == pytest.approx(correct.mean())
        assert result[writer]["well_formed"] == pytest.approx(np.mean(lengths % 2 == 0))
        votes = [text["answer"] for text in texts]
        values[writer] = {
            **{f"pass@{k}": pass_at_k(correct, drawn, k) for k in (1, 4, 12)},
            **{f"majority@{k}": majority_at_k(correct, votes, drawn, k) for k in (4, 12)},
        }
        for name, of_texts in values[writer].items():
            assert answers[writer][name] == pytest.approx(of_texts.mean())
            assert answers["intervals"][writer][name] == pytest.approx(wilson_interval(of_texts, drawn))
        assert answers[writer]["greedy_accuracy"] == np.mean([text["correct"] for text in greedy])
        assert answers[writer]["mean_length_right"] == lengths[right].mean() == 4
        assert answers[writer]["mean_length_wrong"] == pytest.approx(lengths[~right].mean())
        assert answers["intervals"][writer]["mean_length_wrong"] == pytest.approx(
            bootstrap_interval(lengths[~right], drawn[~right])
        )
        expected = {*values[writer], "greedy_accuracy", "mean_length_right", "mean_length_wrong"}
        assert set(answers[writer]) == set(answers["intervals"][writer]) == expected
    for name in values["policy"]:
        assert answers["comparison"][name] == compare(values["policy"][name], values["reference"][name], drawn)
    assert set(answers["comparison"]) == {*values["policy"], "greedy_accuracy"}
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_pass_at_1_is_what_the_metrics_call_correct() -> None:
    env = make_env(4, reward=four_is_right)
    policy, reference = make_pair(env)
    result = evaluate(policy, reference, env, 30, samples_per_prompt=7)  # four prompts, of which two have 8 texts
    assert result["prompts"] == 4
    assert result["answers"]["policy"]["pass@1"] == pytest.approx(result["policy"]["correct"])
    low, _, high = (result["answers"]["policy"][name] for name in ("pass@1", "majority@7", "pass@7"))
    assert 0 < low < high <= 1


def test_texts_without_a_right_answer_are_left_out_of_what_is_said_of_answers() -> None:
    """A mixture of tasks: of each second prompt no right answer is known."""

    def mixture(prompts: list[str], completion_ids: list[list[int]], log_extra: Callable[..., None], **_: Any) -> Any:
        known = [PROMPTS.index(prompt) % 2 == 0 for prompt in prompts]
        right = [float(len(ids) < 4) for ids in completion_ids]
        log_extra("correct", [verdict if judge else None for verdict, judge in zip(right, known, strict=True)])
        log_extra("answer", [str(len(ids)) for ids in completion_ids])
        return right

    env = make_env(4, reward=mixture)
    result = evaluate(*make_pair(env), env, 32, samples_per_prompt=8, n_texts=32)
    known = [text for text in result["texts"] if PROMPTS.index(text["prompt"]) % 2 == 0]
    assert len(known) == 16
    for writer in ("policy", "reference"):
        share = np.mean([text[writer]["correct"] for text in known])
        assert 0 < share < 1
        assert result["answers"][writer]["pass@1"] == result[writer]["correct"] == share
        assert all("correct" not in text[writer] for text in result["texts"] if text not in known)


def test_whether_there_are_right_answers_does_not_depend_on_what_is_written() -> None:
    right, wrong, unknown, partly = ({"correct": value} for value in (1.0, 0.0, None, 0.5))
    assert all(have_right_answers(infos) for infos in ([right], [wrong, unknown], [{}, right, wrong]))
    assert not any(have_right_answers(infos) for infos in ([unknown], [{}], [right, partly]))


def test_the_same_answer_in_other_words_is_one_vote() -> None:
    texts = [("1,000", "1000", 1.0), ("1000.0", "1000", 1.0), ("7", "7", 0.0), ("7", "7", 0.0), ("1e3", "1000", 1.0)]
    infos = [{"answer": a, "vote": v, "correct": c, "length": 1} for a, v, c in texts]
    drawn = np.zeros(5, int)
    assert measure_answers(infos, drawn, infos[:1], drawn[:1], [5], 0).rates["majority@5"][0].tolist() == [1.0] * 5
    for info in infos:
        del info["vote"]
    assert measure_answers(infos, drawn, infos[:1], drawn[:1], [5], 0).rates["majority@5"][0].tolist() == [0.0] * 5


def test_a_vote_that_only_one_writer_could_hold_is_shown_without_a_comparison() -> None:
    def answers_if_long(completion_ids: list[list[int]], log_extra: Callable[..., None], **_: Any) -> list[float]:
        log_extra("correct", [float(len(ids) > 2) for ids in completion_ids])
        if all(len(ids) == 8 for ids in completion_ids):
            log_extra("answer", ["8" for _ in completion_ids])
        return [0.0 for _ in completion_ids]

    env = make_env(4, reward=answers_if_long)
    short, long = (make_policy(env, model=make_model(ends=ends)) for ends in (1 - 1e-9, 1e-9))
    for policy, reference, row in ((short, long, "100.0%"), (long, short, "–")):
        result = evaluate(policy, reference, env, 8, samples_per_prompt=2)
        assert set(result["answers"]["comparison"]) == {"pass@1", "pass@2", "greedy_accuracy"}
        [line] = [line for line in shown(result).splitlines() if "majority@2" in line and "│" in line]
        assert line.split("│")[2].split()[0] == row


def test_another_policy_takes_the_references_place_here_too() -> None:
    env = make_env(4, reward=four_is_right)
    policy, reference = make_pair(env)
    answers = evaluate(policy, reference, env, 8, against=policy)["answers"]
    assert set(answers) == {"samples_per_prompt", "policy", "against", "intervals", "comparison"}
    assert set(answers["intervals"]) == {"policy", "against"}
    assert answers["policy"]["greedy_accuracy"] == answers["against"]["greedy_accuracy"]
    assert set(answers["comparison"]) == {"pass@1", "greedy_accuracy"}  # with one sample of each prompt


def test_where_no_text_is_wrong_there_is_no_length_of_wrong_texts() -> None:
    env = make_env(4, reward=verdict_only, prompts=["The movie"])
    policy, reference = make_pair(env)
    result = evaluate(policy, reference, env, 6, samples_per_prompt=3)
    answers = result["answers"]
    assert answers["policy"]["mean_length_wrong"] is answers["intervals"]["policy"]["mean_length_wrong"] is None
    assert answers["policy"]["mean_length_right"] == result["policy"]["mean_length"]
    assert answers["policy"]["pass@3"] == 1.0
    assert answers["intervals"]["policy"]["pass@3"][0] < 1.0  # so few texts don't prove that all are right
    assert not any(name.startswith("majority") for name in answers["policy"])  # the reward logs no answers
    assert answers["comparison"]["greedy_accuracy"]["difference_interval"] is None  # there is one prompt
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert shown(result).count("–") == 2


def test_an_ordinary_task_has_no_answers_and_nothing_more_is_written() -> None:
    reward = Seen(lambda **batch: even_tokens(**batch))
    env = make_env(4, reward=reward)
    policy, reference = make_pair(env)
    assert "answers" not in evaluate(policy, reference, env, 12, samples_per_prompt=3)
    assert len(reward.texts) == 24
    with pytest.raises(
        ValueError, match=r"hold correct=1\.0 or correct=0\.0 for pass_at_k.*got one with \['completion'"
    ):
        evaluate(policy, reference, env, 12, samples_per_prompt=3, pass_at_k=[3])


def test_a_share_that_a_reward_calls_correct_makes_no_task_with_a_right_answer() -> None:
    def share(completions: list[str], log_metric: Callable[..., None], **_: Any) -> list[float]:
        log_metric("correct", 0.3)
        return [0.0 for _ in completions]

    env = make_env(4, reward=share)
    policy, reference = make_pair(env)
    assert "answers" not in evaluate(policy, reference, env, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pass_at_k": [1, 4]}, "at most samples_per_prompt=1, got 4: .* so ask for samples_per_prompt=4"),
        ({"pass_at_k": [0]}, "Expected each k of pass_at_k to be an integer of at least 1, got 0"),
        ({"samples_per_prompt": 0}, "Expected samples_per_prompt to be an integer of at least 1, got 0"),
        ({"samples_per_prompt": 13}, "Expected at least as many episodes as samples_per_prompt=13, got 12"),
    ],
)
def test_too_few_texts_are_refused_before_any_is_written(options: dict[str, Any], message: str) -> None:
    reward = Seen(four_is_right)
    env = make_env(4, reward=reward)
    policy, reference = make_pair(env)
    with pytest.raises(ValueError, match=message):
        evaluate(policy, reference, env, 12, **options)
    assert reward.texts == []


def test_as_many_prompts_are_drawn_as_have_enough_texts() -> None:
    drawn = draw_prompts(100, 64, seed=1, samples_per_prompt=8)
    assert np.unique(drawn, return_counts=True)[1].tolist() == [8] * 8
    assert len(set(drawn[:8])) == 8  # the first texts are of different prompts
    assert drawn[:8].tolist() == draw_prompts(100, 64, seed=1)[:8].tolist()
    for n_prompts, n_episodes, samples in ((3, 64, 8), (7, 50, 6), (7, 50, 8), (100, 50, 50)):
        times = np.unique(draw_prompts(n_prompts, n_episodes, 0, samples), return_counts=True)[1]
        assert (times.sum(), times.min() >= samples) == (n_episodes, True)


def test_greedy_accuracy_is_of_the_likeliest_texts() -> None:
    env = make_env(4, reward=four_is_right)
    policy, reference = make_pair(env)
    greedy = sample_texts(policy, env, PROMPTS, deterministic=True)
    for seed in range(2):
        result = evaluate(policy, reference, env, 8, seed=seed)
        assert result["answers"]["policy"]["greedy_accuracy"] == np.mean([info["correct"] for info in greedy])


def shown(result: dict[str, Any]) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(answers_table(result))
    return capture.get()


def test_the_table_shows_each_figure_of_both_with_its_interval() -> None:
    env = make_env(4, reward=four_is_right)
    policy, reference = make_pair(env)
    result = evaluate(policy, reference, env, 64, samples_per_prompt=8)
    lines = {line.split("│")[1].strip(): line for line in shown(result).splitlines() if line.startswith("│")}
    answers = result["answers"]
    assert list(lines) == list(answers["policy"])  # a line each, on the narrowest of terminals
    for writer in ("policy", "reference"):
        for name in answers["comparison"]:
            low, high = answers["intervals"][writer][name]
            assert f" {100 * answers[writer][name]:.1f}% [{100 * low:.0f}, {100 * high:.0f}] " in lines[name]
        low, high = answers["intervals"][writer]["mean_length_wrong"]
        expected = f" {answers[writer]['mean_length_wrong']:.1f} [{low:.1f}, {high:.1f}] "
        assert expected in lines["mean_length_wrong"]
    compared = answers["comparison"]["pass@8"]
    low, high = compared["difference_interval"]
    assert f" {100 * compared['difference']:+.1f} [{100 * low:.0f}, {100 * high:.0f}] " in lines["pass@8"]
