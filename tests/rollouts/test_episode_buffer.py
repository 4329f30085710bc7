"""`agents.rollouts.episode_buffer`: every token once, for our loop and for stock SB3's n-step rollouts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import EOS, PROMPTS, length_of, make_env, make_model, make_policy, observation_of

from agents.models.reference import Reference
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.collector import collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer, cheapest_split
from agents.rollouts.sb3_vec_env import TextVecEnv


class ConstantReference:
    """log π_ref = −2 whatever the token: makes the KL a matter of mental arithmetic."""

    def log_probs(self, observations: dict[str, torch.Tensor], actions: torch.Tensor) -> torch.Tensor:
        return torch.full((len(actions),), -2.0)


def make_buffer(n_envs: int, steps: int = 0, **kwargs: Any) -> EpisodeBuffer:
    env = make_env(n_envs)
    return EpisodeBuffer(steps, env.single_observation_space, env.single_action_space, "cpu", n_envs=n_envs, **kwargs)


def arrays(contexts: list[list[int]], prompt_lengths: list[int]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in observation_of(contexts, prompt_lengths).items()}


def three_steps_of_two_rows(buffer: EpisodeBuffer) -> EpisodeBuffer:
    """Row 0 writes 11 12 13 after the prompt 5 6 and is not done; row 1 ends with 21 after two tokens, and begins anew.

    Each row is in the middle of a response when the rollout begins: 9 and 8 are there already.
    """
    buffer.reset()
    buffer.add(arrays([[5, 6, 9], [7, 8]], [2, 1]), np.array([[11], [20]]), [0, 0], [False, False], *logged(0.1, 1.0))
    buffer.add(
        arrays([[5, 6, 9, 11], [7, 8, 20]], [2, 1]), np.array([[12], [21]]), [0, 4], [False, False], *logged(0.2, 2.0)
    )
    buffer.add(
        arrays([[5, 6, 9, 11, 12], [30]], [2, 1]), np.array([[13], [31]]), [0, 0], [False, True], *logged(0.3, 3.0)
    )
    return buffer


def logged(value: float, minus_log_prob: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and log-probabilities of the two rows: row 1 has ten times the value and half a nat more."""
    return torch.tensor([[value], [10 * value]]), torch.tensor([-minus_log_prob, -minus_log_prob + 0.5])


def test_a_cut_rollout_is_packed_with_its_prefixes_as_context_without_loss() -> None:
    buffer = three_steps_of_two_rows(make_buffer(2, steps=3))
    assert buffer.full
    buffer.finalize()
    assert buffer.n_episodes == 3
    assert buffer.lengths.tolist() == [3, 2, 1]
    assert buffer.actions.tolist() == [11, 12, 13, 20, 21, 31]
    samples = buffer.pack(np.arange(3))
    # The last action of each segment is followed by nothing, so it is no input; what is right of it is padding.
    assert samples.observations["input_ids"].tolist() == [[5, 6, 9, 11, 12], [7, 8, 20, 7, 7], [30, 30, 30, 30, 30]]
    assert samples.observations["action_mask"].int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert samples.observations["prompt_length"].tolist() == [[2], [1], [1]]
    assert samples.actions.tolist() == [11, 12, 13, 20, 21, 31]
    np.testing.assert_allclose(samples.old_values, [0.1, 0.2, 0.3, 1.0, 2.0, 3.0], rtol=1e-6)
    np.testing.assert_allclose(samples.old_log_prob, [-1, -2, -3, -0.5, -1.5, -2.5], rtol=1e-6)
    one = buffer.pack(np.array([1]))
    assert one.observations["input_ids"].tolist() == [[7, 8, 20]]


def test_the_kl_is_paid_and_cut_segments_are_bootstrapped_as_worked_out_by_hand() -> None:
    # β = 0.1, log π_ref = −2, so r_t = score − 0.1 (log π_old + 2):
    #   row 0:  log π_old = −1, −2, −3      r = −0.1, 0, 0.1
    #   row 1:  −0.5, −1.5 | −2.5           r = −0.15, 4 − 0.05 = 3.95 | 0.05
    # γ = 0.5, λ = 0.5, γλ = 0.25. V after the last step: 8 for row 0 and 6 for row 1, neither of which is done.
    #   row 0:  δ_2 =  0.1 + 0.5 · 8   − 0.3 =  3.8      A_2 = 3.8
    #           δ_1 =  0   + 0.5 · 0.3 − 0.2 = −0.05     A_1 = −0.05 + 0.25 · 3.8 = 0.9
    #           δ_0 = −0.1 + 0.5 · 0.2 − 0.1 = −0.1      A_0 = −0.1  + 0.25 · 0.9 = 0.125
    #   row 1:  δ_1 = 3.95 + 0 − 2 = 1.95                A_1 = 1.95  (the text ended: nothing follows)
    #           δ_0 = −0.15 + 0.5 · 2 − 1 = −0.15        A_0 = −0.15 + 0.25 · 1.95 = 0.3375
    #           its next text:  δ = 0.05 + 0.5 · 6 − 3 = 0.05
    buffer = make_buffer(2, steps=3, gamma=0.5, gae_lambda=0.5, reference=ConstantReference(), kl_coef=0.1)
    three_steps_of_two_rows(buffer)
    buffer.compute_returns_and_advantage(torch.tensor([[8.0], [6.0]]), np.array([False, False]))
    np.testing.assert_allclose(buffer.log_ratio, [1, 0, -1, 1.5, 0.5, -0.5], atol=1e-6)
    np.testing.assert_allclose(buffer.rewards, [-0.1, 0, 0.1, -0.15, 3.95, 0.05], atol=1e-6)
    np.testing.assert_allclose(buffer.advantages, [0.125, 0.9, 3.8, 0.3375, 1.95, 0.05], atol=1e-6)
    np.testing.assert_allclose(buffer.returns, [0.225, 1.1, 4.1, 1.3375, 3.95, 3.05], atol=1e-6)
    assert buffer.episode_sums(buffer.log_ratio).tolist() == [0.0, 2.0, -0.5]


@pytest.mark.parametrize(
    ("estimator", "token_kl"),
    # x = log π_old + 2, which is 1, 0, −1 in row 0, and 1.5, 0.5 | −0.5 in row 1.
    [
        ("k1", [1, 0, -1, 1.5, 0.5, -0.5]),
        # ½ x²
        ("k2", [0.5, 0, 0.5, 1.125, 0.125, 0.125]),
        # e^−x − 1 + x:  1/e;  0;  e − 2;  e^−1.5 + 0.5;  e^−0.5 − 0.5;  e^0.5 − 1.5
        ("k3", [0.3678794, 0, 0.7182818, 0.7231302, 0.1065307, 0.1487213]),
    ],
)
def test_the_kl_is_paid_by_the_estimator_that_was_asked_for(estimator: Any, token_kl: list[float]) -> None:
    buffer = make_buffer(2, steps=3, reference=ConstantReference(), kl_coef=0.1, kl_estimator=estimator)
    three_steps_of_two_rows(buffer)
    buffer.finalize()
    np.testing.assert_allclose(buffer.token_kl(estimator), token_kl, atol=1e-6)
    expected = np.array([0, 0, 0, 0, 4, 0]) - 0.1 * np.array(token_kl)
    np.testing.assert_allclose(buffer.rewards, expected, atol=1e-6)
    assert buffer.rewards.dtype == np.float32
    # Whatever is paid: log π_ref, which other losses want, is what the reference said.
    np.testing.assert_allclose(buffer.pack(np.arange(3)).ref_log_prob, [-2.0] * 6, atol=1e-6)


def test_a_kl_coefficient_of_zero_pays_nothing_and_measures_all_three_estimates() -> None:
    buffer = make_buffer(2, steps=3, reference=ConstantReference(), kl_coef=0.0, kl_estimator="k3")
    three_steps_of_two_rows(buffer)
    buffer.finalize()
    assert buffer.rewards.tolist() == [0, 0, 0, 0, 4, 0]
    assert [float(buffer.token_kl(name).sum()) for name in ("k1", "k2", "k3")] == pytest.approx(
        [1.5, 2.375, 2.0645434], abs=1e-6
    )


def test_without_a_reference_every_estimate_is_zero() -> None:
    buffer = three_steps_of_two_rows(make_buffer(2, steps=3))
    buffer.finalize()
    assert all(buffer.token_kl(name).tolist() == [0] * 6 for name in ("k1", "k2", "k3"))


def test_an_unknown_estimator_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Expected kl_estimator to be one of \('k1', 'k2', 'k3', 'exact'\), got 'k4'"):
        make_buffer(2, kl_estimator="k4")


def test_a_segment_that_ended_with_the_rollout_is_not_bootstrapped() -> None:
    buffer = three_steps_of_two_rows(make_buffer(2, steps=3, gamma=1.0, gae_lambda=1.0))
    buffer.compute_returns_and_advantage(torch.tensor([[8.0], [6.0]]), np.array([True, False]))
    # Monte-Carlo sums: row 0 has ended with nothing; row 1's first text has 4; its second goes on from V = 6.
    np.testing.assert_allclose(buffer.returns, [0, 0, 0, 4, 4, 6], atol=1e-6)
    wrong = three_steps_of_two_rows(make_buffer(2, steps=3, gamma=1.0, gae_lambda=1.0))
    wrong.compute_returns_and_advantage(torch.tensor([[8.0], [6.0]]), np.array([False, False]))
    np.testing.assert_allclose(wrong.returns[:3], [8, 8, 8], atol=1e-6)


def test_advantages_are_those_of_sb3s_own_rollout_buffer() -> None:
    """The same transitions in both, no reference: cut, ended and restarted rows alike."""
    random = np.random.default_rng(0)
    env, steps, rows = make_env(3), 12, 3
    spaces = env.single_observation_space, env.single_action_space
    ours = EpisodeBuffer(steps, *spaces, "cpu", gae_lambda=0.9, gamma=0.97, n_envs=rows)
    theirs = sb3.common.buffers.DictRolloutBuffer(steps, *spaces, "cpu", gae_lambda=0.9, gamma=0.97, n_envs=rows)
    contexts, starts = [[5], [6], [7]], np.ones(rows, dtype=bool)
    stored = np.zeros((steps, rows), dtype=int)
    for buffer in (ours, theirs):
        buffer.reset()
    for step in range(steps):
        tokens = random.integers(2, 300, rows)
        stored[step] = np.arange(rows) + step * rows
        rewards = random.normal(size=rows)
        values, log_probs = torch.from_numpy(random.normal(size=(2, rows))).float()
        for buffer in (ours, theirs):
            observation = arrays(contexts, [1, 1, 1])
            buffer.add(observation, tokens[:, None], rewards, starts.astype(np.float32), values[:, None], log_probs)
        starts = random.random(rows) < 0.3
        contexts = [
            [9] if start else [*context, int(t)] for context, start, t in zip(contexts, starts, tokens, strict=True)
        ]
    last_values = torch.from_numpy(random.normal(size=(rows, 1))).float()
    for buffer in (ours, theirs):
        buffer.compute_returns_and_advantage(last_values, starts)
    # Ours lie segment after segment, so pair them up by the value, which is different everywhere.
    order, other = np.argsort(ours.values), np.argsort(theirs.values.flatten())
    np.testing.assert_allclose(ours.advantages[order], theirs.advantages.flatten()[other], atol=1e-5)
    np.testing.assert_allclose(ours.returns[order], theirs.returns.flatten()[other], atol=1e-5)


def test_a_second_rollout_goes_on_in_the_middle_of_the_episode() -> None:
    buffer = three_steps_of_two_rows(make_buffer(2, steps=3))
    buffer.compute_returns_and_advantage(torch.zeros(2, 1), np.array([False, False]))
    buffer.reset()
    assert not buffer.full
    buffer.add(
        arrays([[5, 6, 9, 11, 12, 13], [30, 31]], [2, 1]), np.array([[14], [32]]), [1, 0], [False, False], *logged(1, 1)
    )
    buffer.finalize()
    samples = buffer.pack(np.arange(2))
    assert samples.observations["input_ids"].tolist() == [[5, 6, 9, 11, 12, 13], [30, 31, 30, 30, 30, 30]]
    assert samples.observations["prompt_length"].tolist() == [[2], [1]]
    assert samples.actions.tolist() == [14, 32]


# ---- minibatches ---------------------------------------------------------------------------------------------------


@st.composite
def filled_buffers(draw: st.DrawFn) -> EpisodeBuffer:
    buffer = make_buffer(1)
    number = 0
    for length in draw(st.lists(st.integers(1, 6), min_size=1, max_size=8)):
        context = [7] * draw(st.integers(1, 5))
        prompt_length = len(context)
        for step in range(length):
            observation = arrays([context], [prompt_length])
            buffer.add(observation, np.array([number]), [0.0], [step == 0], np.array([number]), np.array([-1.0]))
            context = [*context, number]
            number += 1
    buffer.finalize()
    return buffer


@given(filled_buffers(), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_minibatches_hold_every_token_once_whatever_their_size(buffer: EpisodeBuffer, batch_size: int) -> None:
    batches = list(buffer.get(batch_size))
    tokens = [batch.actions.tolist() for batch in batches]
    assert sorted(token for batch in tokens for token in batch) == list(range(buffer.n_tokens))
    assert [batch.actions.tolist() for batch in buffer.get(None)] != []
    longest = int(buffer.lengths.max())
    assert all(len(batch) < batch_size + longest for batch in tokens)  # whole segments until it is reached
    for batch in batches:
        assert batch.actions.tolist() == batch.old_values.long().tolist()
        assert int(batch.observations["action_mask"].sum()) == len(batch.actions)


@given(filled_buffers(), st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_micro_batches_hold_every_episode_once_and_keep_to_their_budget(buffer: EpisodeBuffer, budget: int) -> None:
    parts = buffer.batches(np.arange(buffer.n_episodes), budget)
    assert sorted(np.concatenate(parts).tolist()) == list(range(buffer.n_episodes))
    for part in parts:
        columns = buffer.pack(part).observations["input_ids"].shape[1]
        assert len(part) == 1 or len(part) * columns <= budget


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 120), st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_no_split_of_texts_costs_less_than_the_one_that_is_found(
    lengths: list[int], budget: int, overhead: int
) -> None:
    size = np.array(sorted(lengths, reverse=True))

    def cost(starts: Any) -> float:
        parts = np.split(size, starts)
        fits = all(len(part) == 1 or len(part) * part[0] <= budget for part in parts)
        return sum(len(part) * int(part[0]) + overhead for part in parts) if fits else np.inf

    places = range(1, len(size))
    every = (starts for n in range(len(size)) for starts in itertools.combinations(places, n))
    found = cheapest_split(size, budget, overhead)
    assert cost(found) == min(map(cost, map(list, every))) < np.inf


def test_on_a_cpu_padding_is_saved_and_on_an_accelerator_launches() -> None:
    buffer = make_buffer(1)
    for prompt in ([[5]], [[5] * 14]):
        for _ in range(20):
            buffer.add(
                arrays(prompt, [len(prompt[0])]), np.array([7]), [0.0], [True], np.array([0.0]), np.array([-1.0])
            )
    buffer.finalize()
    episodes = np.random.default_rng(0).permutation(40)
    assert [sorted(part) for part in buffer.batches(episodes)] == [[*range(20, 40)], [*range(20)]]
    buffer.device = torch.device("cuda")
    assert [sorted(part) for part in buffer.batches(episodes)] == [[*range(40)]]


def test_minibatches_come_in_a_new_order_every_time() -> None:
    buffer = make_buffer(1)
    for number in range(20):
        buffer.add(arrays([[7]], [1]), np.array([number]), [0.0], [True], np.array([0.0]), np.array([-1.0]))
    buffer.finalize()
    np.random.seed(0)
    first, second = ([batch.actions.tolist() for batch in buffer.get(5)] for _ in range(2))
    assert [len(batch) for batch in first] == [5, 5, 5, 5]
    assert first != second


# ---- what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("response", [56, 1016])
def test_a_generated_token_takes_at_most_64_bytes_whatever_the_length(response: int) -> None:
    env = make_env(2, max_prompt_tokens=8, max_new_tokens=response, prompts=["a"])
    buffer = EpisodeBuffer(0, env.single_observation_space, env.single_action_space, "cpu", n_envs=2)
    context = np.full((2, 8 + response), 7)
    for step in range(response):
        mask = np.broadcast_to(np.arange(8 + response) < 8 + step, context.shape)
        observation = {"input_ids": context, "attention_mask": mask, "prompt_length": np.array([[8], [8]])}
        zeros = np.zeros(2)
        buffer.add(observation, np.array([7, 7]), zeros, [step == 0] * 2, zeros, zeros)
    buffer.finalize()
    assert buffer.n_tokens == 2 * response
    assert buffer.nbytes / buffer.n_tokens <= 64
    # SB3's own buffer keeps ids, mask and prompt length of every context: 9 bytes a column and step, and 8.
    assert buffer.nbytes / buffer.n_tokens < (9 * (8 + response) + 8) / 8


def test_packing_what_a_rollout_stored_gives_its_log_probs_back() -> None:
    env = make_env(3)
    policy = make_policy(env, model=make_model(ends=0.2))
    buffer = EpisodeBuffer(0, env.single_observation_space, env.single_action_space, "cpu", n_envs=3)
    collect_episodes(policy, env, 10, buffer)
    buffer.finalize()
    assert buffer.lengths.min() < buffer.lengths.max()
    for batch in (np.array([3]), np.array([9, 0, 4]), np.arange(10)):
        samples = buffer.pack(batch)
        values, log_prob, _ = policy.evaluate_actions(samples.observations, samples.actions)
        torch.testing.assert_close(log_prob, samples.old_log_prob, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values.flatten(), samples.old_values, atol=1e-5, rtol=1e-5)


# ---- inside stock SB3 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "kwargs"),
    [(sb3.PPO, {"batch_size": 10, "n_epochs": 2}), (sb3.A2C, {})],
    ids=["PPO", "A2C"],
)
def test_stock_sb3_learns_with_it_and_pays_the_kl(algorithm: Any, kwargs: dict[str, Any]) -> None:
    env = make_env(3, reward=length_of)
    reference = Reference.of(make_policy(env, model=make_model(sharp=0.1)))
    model = algorithm(
        CausalLMPolicy,
        TextVecEnv(env),
        n_steps=10,  # no multiple of the budget of 8: rollouts cut episodes
        gamma=1.0,
        seed=0,
        device="cpu",
        policy_kwargs={"model": make_model(ends=0.2)},
        rollout_buffer_class=EpisodeBuffer,
        rollout_buffer_kwargs={"reference": reference, "kl_coef": 0.25},
        **kwargs,
    )
    before = model.policy.lm.model.get_input_embeddings().weight.detach().clone()
    model.learn(90)
    buffer = model.rollout_buffer
    assert buffer.n_tokens == 30
    assert not before.equal(model.policy.lm.model.get_input_embeddings().weight.detach())
    # A segment either ended, and was paid its length in all (of which a part may stem from before the cut), or was cut.
    unshaped = buffer.rewards + 0.25 * buffer.log_ratio
    ended = [bool(unshaped[end - 1] > 0.5) for end in buffer.starts[1:]]
    assert sum(ended) >= 2
    prompt_ids = {tuple(prompt.token_ids) for prompt in env.prompts}
    continued = 0
    for number in range(buffer.n_episodes):
        samples = buffer.pack(np.array([number]))
        inputs = samples.observations["input_ids"][0].tolist()
        prompt_length = int(samples.observations["prompt_length"])
        assert tuple(inputs[:prompt_length]) in prompt_ids
        already = int(samples.observations["action_mask"][0].int().argmax()) + 1 - prompt_length
        continued += already > 0
        if ended[number]:
            last = buffer.starts[number + 1] - 1
            assert unshaped[last] == pytest.approx(already + int(buffer.lengths[number]), abs=1e-4)
            assert buffer.actions[last] == EOS or already + buffer.lengths[number] == 8
    assert continued >= 1
    # What was logged as the KL is the one to the reference, under which the tokens are scored again here.
    samples = buffer.pack(np.arange(buffer.n_episodes))
    again = samples.old_log_prob - reference.log_probs(samples.observations, samples.actions)
    np.testing.assert_allclose(buffer.log_ratio, again.numpy(), atol=1e-5)
    assert np.abs(buffer.log_ratio).max() > 0.05


def test_a_reference_may_go_by_name(tmp_path: Any) -> None:
    from learners import save_model

    name = save_model(tmp_path / "model")
    model = sb3.PPO(
        CausalLMPolicy,
        TextVecEnv(make_env(2, prompts=PROMPTS)),
        n_steps=8,
        batch_size=8,
        n_epochs=1,
        seed=0,
        device="cpu",
        policy_kwargs={"model": name},
        rollout_buffer_class=EpisodeBuffer,
        rollout_buffer_kwargs={"reference": name},
    )
    model.learn(16)
    assert isinstance(model.rollout_buffer.reference, Reference)
    assert np.abs(model.rollout_buffer.log_ratio).max() < 1e-5  # the rollout was the first: policy = reference


def test_the_samples_of_a_batch_know_the_lengths_and_the_scores_of_their_texts() -> None:
    buffer = three_steps_of_two_rows(make_buffer(2))
    buffer.finalize()
    batch = np.array([2, 0])
    assert buffer.pack(batch).lengths.tolist() == buffer.lengths[batch].tolist() == [1, 3]
    assert buffer.pack(batch).scores.isnan().all()  # nobody has said
    buffer.scores[:] = [0.5, 2.0, -1.0]
    assert buffer.pack(batch).scores.tolist() == [-1.0, 0.5, 0.5, 0.5]


def test_what_somebody_else_sampled_gets_the_values_and_log_probabilities_of_the_policy() -> None:
    env = make_env(4)
    policy = make_policy(env)
    reference = Reference.of(make_policy(env, model=make_model("gpt2", seed=3)))
    scored, plain = (make_buffer(4, reference=reference) for _ in range(2))
    torch.manual_seed(0)
    collect_episodes(policy, env, 4, plain)
    segment, tokens = plain._stream["segment"].array.copy(), plain._stream["token"].array.copy()
    is_action = plain._stream["is_action"].array.copy()
    plain.finalize()
    scored.reset()
    scored._n_segments, scored._prompt_lengths = plain.n_episodes, plain._prompt_lengths
    scored._extend_stream(segment, tokens, is_action)
    for column in scored._logged.values():
        column.extend(np.full(is_action.sum(), -3.0))
    scored.score(policy)
    scored.finalize()
    np.testing.assert_allclose(scored.log_probs, plain.log_probs, atol=1e-5)
    np.testing.assert_allclose(scored.values, plain.values, atol=1e-5)
    np.testing.assert_allclose(scored.log_ratio, plain.log_ratio, atol=1e-5)
    assert scored.behaviour_log_probs.tolist() == [-3.0] * scored.n_tokens
    assert plain.behaviour_log_probs is plain.log_probs


def test_a_token_that_the_policy_could_not_have_sampled_is_refused() -> None:
    env = make_env(1)
    buffer = make_buffer(1)
    buffer.reset()
    observation = arrays([[5, 6]], [2])
    buffer.add(observation, np.array([EOS]), [1.0], [True], torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=rf"probability 0 to tokens that were sampled for it, token {EOS} first"):
        buffer.score(make_policy(env, min_new_tokens=2))
    with pytest.raises(ValueError, match="still being filled"):
        make_buffer(1).extend(buffer)
