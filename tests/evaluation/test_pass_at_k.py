"""`agents.evaluation.pass_at_k`: k attempts at a task with a right answer."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from agents.evaluation import pass_at_k as module
from agents.evaluation.intervals import wilson_interval
from agents.evaluation.pass_at_k import majority_at_k, pass_at_k

ONE_PROMPT = np.zeros(10, dtype=int)


def one_prompt(n: int) -> np.ndarray:
    return np.zeros(n, dtype=int)


def majority_of(answers: list[str | None], right: dict[str, float]) -> float:
    """One vote, as one counts it by hand."""
    counts = Counter(answer for answer in answers if answer is not None)
    most = [answer for answer, count in counts.items() if count == max(counts.values())]
    return sum(right[answer] for answer in most) / len(most) if most else 0.0


# ---- pass@k --------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_one_worked_out_by_hand() -> None:
    # 3 of 10 are right. Of k = 2: 1 − (7 · 6) / (10 · 9) = 48 / 90; of k = 5: 1 − 21 / 252.
    correct = np.repeat([1.0, 0.0], [3, 7])
    assert pass_at_k(correct, ONE_PROMPT, 2) == pytest.approx(np.full(10, 48 / 90))
    assert pass_at_k(correct, ONE_PROMPT, 5) == pytest.approx(np.full(10, 231 / 252))
    assert pass_at_k(correct, ONE_PROMPT, 8).tolist() == [1.0] * 10  # no 8 of 10 are among the 7 wrong ones


@pytest.mark.parametrize("n_right", range(8))
@pytest.mark.parametrize("k", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_text(n_right: int, k: int) -> None:
    correct = np.random.default_rng(n_right).permutation(np.repeat([1.0, 0.0], [n_right, 7 - n_right]))
    share = np.mean([max(subset) for subset in combinations(correct, k)])
    assert pass_at_k(correct, one_prompt(7), k) == pytest.approx(np.full(7, share), abs=1e-15)


def test_pass_at_1_is_the_mean_and_pass_at_n_says_whether_any_is_right() -> None:
    random = np.random.default_rng(0)
    clusters = random.permutation(np.repeat(np.arange(20), 6))  # in any order
    correct = (random.random(120) < 0.2).astype(float)
    first, last = pass_at_k(correct, clusters, 1), pass_at_k(correct, clusters, 6)
    assert first.mean() == pytest.approx(correct.mean())
    for prompt in range(20):
        texts = clusters == prompt
        assert first[texts] == pytest.approx(np.full(6, correct[texts].mean()))
        assert last[texts].tolist() == [correct[texts].max()] * 6
    assert 0 < last.mean() < 1


def test_pass_at_1_is_the_mean_although_some_prompts_have_more_texts_than_others() -> None:
    correct, clusters = np.array([1, 1, 1, 0, 0.0]), np.array([4, 4, 4, 9, 9])
    assert pass_at_k(correct, clusters, 1).mean() == correct.mean() == 0.6


def test_pass_at_k_is_exact_where_binomials_are_astronomic() -> None:
    correct = np.zeros(5_000)
    correct[0] = 1
    assert pass_at_k(correct, one_prompt(5_000), 2_500)[0] == 0.5  # the one is in half of all subsets
    assert pass_at_k(correct, one_prompt(5_000), 1)[0] == 1 / 5_000


def test_pass_at_k_of_many_texts_estimates_that_of_k_texts_without_bias() -> None:
    """A text is right with probability 0.3: of two, one is with 1 − 0.7². The plug-in 1 − (1 − c/n)² is too low."""
    random = np.random.default_rng(0)
    clusters = np.repeat(np.arange(20_000), 4)
    correct = (random.random(80_000) < 0.3).astype(float)
    assert pass_at_k(correct, clusters, 2).mean() == pytest.approx(0.51, abs=0.006)  # four standard errors and more
    shares = correct.reshape(-1, 4).mean(axis=1)
    assert np.mean(1 - (1 - shares) ** 2) < 0.47


def test_nineteen_of_twenty_intervals_of_pass_at_k_hold_the_true_rate() -> None:
    """Half of the prompts are solved with probability 0.1, the others with 0.6; 8 texts of each of 48."""
    random = np.random.default_rng(1)
    clusters = np.repeat(np.arange(48), 8)
    for k in (1, 4, 8):
        truth = np.mean([1 - (1 - chance) ** k for chance in (0.1, 0.6)])
        held = 0
        for _ in range(300):
            chances = random.choice([0.1, 0.6], size=48)[clusters]
            values = pass_at_k((random.random(384) < chances).astype(float), clusters, k)
            low, high = wilson_interval(values, clusters)
            held += low < truth < high
        assert 0.91 < held / 300 < 0.99


@pytest.mark.parametrize("k", [0, 4])
def test_a_k_of_more_than_a_prompts_texts_is_refused_with_what_to_do(k: int) -> None:
    correct, clusters = np.ones(7), np.array([0, 0, 0, 0, 1, 1, 1])
    message = f"number of texts of each prompt, got k={k} and a prompt of 3 texts: write at least k texts for each"
    with pytest.raises(ValueError, match=message):
        pass_at_k(correct, clusters, k)
    with pytest.raises(ValueError, match=message):
        majority_at_k(correct, ["a"] * 7, clusters, k)
    with pytest.raises(ValueError, match="a prompt of 0 texts"):
        pass_at_k(np.zeros(0), np.zeros(0, dtype=int), 1)


def test_partly_right_is_neither_right_nor_wrong() -> None:
    with pytest.raises(ValueError, match=r"Expected correct to be 1\.0 for a right text and 0\.0 for a wrong one"):
        pass_at_k(np.array([0.5, 1.0]), one_prompt(2), 1)


# ---- majority@k ----------------------------------------------------------------------------------------------------


def test_a_majority_is_the_one_worked_out_by_hand() -> None:
    # Of all four, 7 has two votes of three, and None has none. Of three: 7 7 9 and 7 7 – are won, 7 9 – twice is a tie.
    correct, answers = np.array([1, 1, 0, 0.0]), ["7", "7", "9", None]
    assert majority_at_k(correct, answers, one_prompt(4), 4).tolist() == [1.0] * 4
    assert majority_at_k(correct, answers, one_prompt(4), 3) == pytest.approx(np.full(4, (1 + 1 + 0.5 + 0.5) / 4))
    # The wrong answer is the most frequent one although each has fewer votes than there are texts without an answer.
    correct, answers = np.array([1, 0, 0, 0, 0, 0.0]), ["7", "9", "9", None, None, None]
    assert majority_at_k(correct, answers, one_prompt(6), 6).tolist() == [0.0] * 6
    assert majority_at_k(np.zeros(2), [None, None], one_prompt(2), 2).tolist() == [0.0, 0.0]  # nobody has a vote


@pytest.mark.parametrize("seed", range(12))
def test_a_majority_is_the_mean_over_all_subsets(seed: int) -> None:
    random = np.random.default_rng(seed)
    choices = ["7", "8", "9", None]
    answers = [choices[i] for i in random.choice(4, size=8, p=[0.3, 0.3, 0.2, 0.2])]
    right = {"7": 1.0, "8": 0.0, "9": 0.0}
    correct = np.array([right.get(answer, 0.0) for answer in answers])  # type: ignore[arg-type]
    for k in range(1, 9):
        mean = np.mean([majority_of(list(subset), right) for subset in combinations(answers, k)])
        assert majority_at_k(correct, answers, one_prompt(8), k) == pytest.approx(np.full(8, mean))


def test_a_vote_of_one_is_right_as_often_as_a_text() -> None:
    random = np.random.default_rng(0)
    clusters = np.repeat(np.arange(9), 5)
    correct = (random.random(45) < 0.4).astype(float)
    answers = ["7" if right else str(random.integers(3)) for right in correct]
    assert majority_at_k(correct, answers, clusters, 1) == pytest.approx(pass_at_k(correct, clusters, 1))


def test_a_majority_improves_on_one_text_only_where_the_right_answer_is_the_most_frequent() -> None:
    wrong = [str(number) for number in range(5)]
    often = majority_at_k(np.repeat([1.0, 0.0], [4, 5]), ["7"] * 4 + wrong, one_prompt(9), 7)
    seldom = majority_at_k(np.repeat([1.0, 0.0], [4, 5]), ["7"] * 4 + ["3"] * 5, one_prompt(9), 7)
    assert often[0] == 1.0 > 4 / 9 > seldom[0]


def test_random_subsets_are_the_same_for_a_seed_and_come_near_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    clusters = np.repeat(np.arange(4), 16)
    answers: list[str | None] = [str(number) for number in random.choice([7, 8, 9], size=64, p=[0.4, 0.4, 0.2])]
    correct = np.array([float(answer == "7") for answer in answers])
    assert math.comb(16, 7) > module.MAX_SUBSETS
    first = majority_at_k(correct, answers, clusters, 7, seed=3)
    assert majority_at_k(correct, answers, clusters, 7, seed=3).tolist() == first.tolist()
    assert majority_at_k(correct, answers, clusters, 7, seed=4).tolist() != first.tolist()
    monkeypatch.setattr(module, "MAX_SUBSETS", math.inf)
    assert first == pytest.approx(majority_at_k(correct, answers, clusters, 7), abs=4 * 0.016)
