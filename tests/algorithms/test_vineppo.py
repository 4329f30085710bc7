"""VinePPO: advantages from values that are measured, on tasks whose values can be worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import largest_difference, length_of, make_env, make_model, make_ppo, weights_of
from tiny import tiny_model, tiny_tokenizer

from agents.algorithms import vineppo
from agents.algorithms.vineppo import VinePPO
from agents.objectives.advantages import leave_one_out, step_advantages
from agents.rollouts.branching import Branches
from text_env.probes import VOCABULARY, make_probe

SEVEN = VOCABULARY.index("7")


def make_vine(**kwargs: Any) -> VinePPO:
    """As ``make_ppo``, with advantages that are not whitened."""
    made: Any = make_ppo(algorithm=VinePPO, **{"normalize_advantage": False, "kl_coef": 0.0, **kwargs})
    return made


def on_probe(name: str, **kwargs: Any) -> VinePPO:
    """With a policy to which all tokens are alike."""
    model = tiny_model("gpt2", len(VOCABULARY), num_hidden_layers=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    return make_vine(env=make_probe(name, 64), model=model, **kwargs)


def collect(model: VinePPO) -> VinePPO:
    """One rollout, and no update."""
    _, callback = model._setup_learn(10**6, None, True)
    assert model.collect_rollouts(callback)
    return model


def branches_of(model: VinePPO, monkeypatch: pytest.MonkeyPatch) -> Branches:
    """The branches of one rollout."""
    kept: list[Branches] = []

    def keep(*args: Any) -> Branches:
        kept.append(branch(*args))
        return kept[0]

    branch = vineppo.branch
    monkeypatch.setattr(vineppo, "branch", keep)
    collect(model)
    return kept[0]


def test_step_advantages_are_the_ones_worked_out_by_hand() -> None:
    # Two episodes, of steps of 2 and 1 tokens and of one step of 2. γ = ½; the last value is of no step's end.
    #   first step: 1 + ½ · 2 + ¼ · 8 − 5 = −1;  second: 4 − 8 = −4;  third: 0 + ½ · 6 − 1 = 2
    rewards, values = np.array([1.0, 2.0, 4.0, 0.0, 6.0]), np.array([5.0, 8.0, 1.0])
    lengths, last = np.array([2, 1, 2]), np.array([False, True, True])
    np.testing.assert_allclose(step_advantages(rewards, values, lengths, last, 0.5), [-1, -1, -4, 2, 2])
    # γ = 1: 3 + 8 − 5, 4 − 8, 6 − 1
    np.testing.assert_allclose(step_advantages(rewards, values, lengths, last, 1.0), [6, 6, -4, 5, 5])


def test_where_the_first_token_decides_it_gets_all_of_the_credit() -> None:
    model = collect(on_probe("early-credit", n_branches=400, branch_every=1))
    buffer = model.buffer
    first = np.zeros(buffer.n_tokens, bool)
    first[buffer.starts[:-1]] = True
    expected = (buffer.actions[first] == SEVEN) - 1 / 12  # one token of twelve
    np.testing.assert_allclose(buffer.advantages[first], expected, atol=0.06)  # four standard errors
    np.testing.assert_array_equal(buffer.advantages[~first], 0)


def test_where_every_token_counts_the_advantage_is_the_one_worked_out_by_hand() -> None:
    # The score is the share of sevens in four tokens, and EOS, one token of twelve, ends the text. Of m tokens that are
    # left, E_m = 1/12 (1 + E_{m−1}) + 10/12 E_{m−1} are sevens: 0, 0.0833, 0.1597, 0.2297, 0.2939. The step of the
    # first two tokens is worth its sevens and E_2, or 0 for the future once it has ended, less E_4; and so on.
    ahead = {0: 0.0, 2: 0.1597, 4: 0.2939}
    model = collect(on_probe("fixed-token", n_branches=2000, branch_every=2))
    buffer = model.buffer
    for episode in range(buffer.n_episodes):
        own = slice(buffer.starts[episode], buffer.starts[episode + 1])
        tokens, found = buffer.actions[own], buffer.advantages[own]
        for begin in range(0, len(tokens), 2):
            step = tokens[begin : begin + 2]
            left = 0 if begin + 2 >= len(tokens) else 2
            expected = ((step == SEVEN).sum() + ahead[left] - ahead[4 - begin]) / 4
            np.testing.assert_allclose(found[begin : begin + 2], expected, atol=0.02)


def test_with_one_step_it_is_the_return_less_that_of_other_texts_of_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_vine(env=make_env(8, reward=length_of), n_branches=3, branch_every=8, kl_coef=0.1)
    others = branches_of(model, monkeypatch).returns(1.0)
    buffer = model.buffer
    groups = np.column_stack([buffer.episode_sums(buffer.rewards), others])  # the text itself is the first of four
    expected = leave_one_out(groups.flatten(), 4)[::4]
    assert expected.std() > 0.5
    np.testing.assert_allclose(buffer.advantages, np.repeat(expected, buffer.lengths), atol=1e-5)


def test_values_are_after_the_penalties_and_telescope(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_vine(kl_coef=0.3, missing_eos_penalty=2.0, n_branches=2, branch_every=3, learning_rate=1e-2)
    model.learn(1)  # away from the reference
    branches = branches_of(model, monkeypatch)
    written = branches.buffer
    assert np.abs(written.log_ratio).max() > 1e-3
    cut = np.array([episode["finish_reason"] == "length" for episode in branches.episodes])
    score = np.array([episode["score"] for episode in branches.episodes])
    expected = score - 0.3 * written.episode_sums(written.log_ratio) - 2.0 * cut
    values = np.empty(len(branches.order))
    values[branches.order] = expected.reshape(-1, 2).mean(axis=1)
    buffer = model.buffer
    steps = -(-buffer.lengths // 3)
    first = np.cumsum(steps) - steps  # the states without a response
    # The sum of the advantages of an episode's steps is its return less the value of its prompt.
    for episode in range(buffer.n_episodes):
        own = slice(buffer.starts[episode], buffer.starts[episode + 1])
        total = buffer.rewards[own].sum() - values[first[episode]]
        assert buffer.advantages[own][::3].sum() == pytest.approx(total, abs=1e-4)


def test_steps_may_end_at_a_string() -> None:
    model = collect(make_vine(env=make_env(8, max_new_tokens=40), split="a", n_branches=2, model=make_model(ends=0.02)))
    buffer, tokenizer = model.buffer, model.vector_env.tokenizer
    changes = 0
    for episode in range(buffer.n_episodes):
        own = slice(buffer.starts[episode], buffer.starts[episode + 1])
        changed = np.diff(buffer.advantages[own]) != 0
        ends = np.array(["a" in tokenizer.decode([token]) for token in buffer.actions[own][:-1]], bool)
        assert not changed[~ends].any()
        changes += changed.sum()
    assert changes > 3


def test_branches_count_as_tokens_and_are_not_trained_on() -> None:
    model = collect(make_vine(n_branches=3, branch_every=2))
    spent = model.logger.name_to_value["time/branch_tokens"]
    assert model.num_timesteps == model.buffer.n_tokens + spent
    assert spent > model.buffer.n_tokens
    assert model.buffer.n_episodes == 8


def test_the_value_head_stays_as_it_is() -> None:
    model = make_vine(n_branches=1, learning_rate=1e-3)
    before = weights_of(model.policy)
    model.learn(1)
    after = weights_of(model.policy)
    assert torch.equal(before["value_head.weight"], after["value_head.weight"])
    assert largest_difference(before, after) > 1e-4


def test_a_small_target_kl_stops_the_update() -> None:
    epochs = []
    for target in (None, 1e-6):
        model = make_vine(n_branches=1, target_kl=target, learning_rate=1e-2, n_epochs=3)
        model.learn(1)
        epochs.append(model._n_updates)
    assert epochs == [3, 1]  # SB3 counts the epoch in which it stops


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path) -> None:
    def again() -> Any:
        return make_env(8, tokenizer=tiny_tokenizer())

    settings = {"n_branches": 2, "branch_every": 4, "kl_coef": 0.1}
    whole = make_vine(env=again(), **settings)
    whole.learn(1).learn(1, reset_num_timesteps=False)
    half = make_vine(env=again(), **settings)
    half.learn(1)
    half.save(tmp_path / "half")
    resumed = VinePPO.load(tmp_path / "half", again(), device="cpu", policy_kwargs={"model": make_model(ends=0.2)})
    resumed.learn(1, reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps > half.num_timesteps
    assert largest_difference(weights_of(whole.policy), weights_of(resumed.policy)) == 0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"n_branches": 0}, "n_branches >= 1, got 0"),
        ({"branch_every": 0}, "branch_every >= 1, got 0"),
        ({"split": ""}, "split to be a string that ends a step"),
    ],
)
def test_what_is_out_of_range_is_refused(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_vine(**argument)
