"""The exact KL divergence: as a reward for the steps before a context, and as a term of the loss at the context."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from learners import (
    constant,
    counted_forwards,
    even_tokens,
    in_float64,
    largest_difference,
    make_env,
    make_model,
    make_ppo,
    plain_log_probs,
    weights_of,
)

import agents.models.sizes
from agents.algorithms.a2c import A2C
from agents.algorithms.grpo import GRPO
from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.models.causal_lm import CausalLM
from agents.models.reference import Reference
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sb3_vec_env import TextVecEnv
from text_env.constraints import Contexts
from text_env.vector_env import TextVectorEnv

A, B, EOS = 10, 11, 0  # all tokens of the small world below
TEMPERATURE = 0.7
BETA = 0.5


def far_reference(env: TextVectorEnv, model: Any = None, **policy_kwargs: Any) -> Reference:
    """A frozen model that the policy is well away from."""
    model = make_model(sharp=0.1, ends=0.2) if model is None else model
    return Reference(make_ppo(env, model, policy_kwargs=policy_kwargs).policy.lm.requires_grad_(False))


def make_exact(env: TextVectorEnv | None = None, **kwargs: Any) -> PPO:
    """PPO, or another, whose policy does not change."""
    env = make_env() if env is None else env
    defaults = {"kl_estimator": "exact", "kl_coef": BETA, "learning_rate": 0.0}
    if "reference" not in kwargs:
        kwargs["reference"] = far_reference(env)
    return make_ppo(env, **{**defaults, **kwargs})


def gradient(model: OnPolicyAlgorithm, episodes: Any) -> torch.Tensor:
    """The gradient of the loss of a minibatch, of all weights of the language model that are trained."""
    model._backward(np.asarray(episodes))
    return torch.cat([p.grad.flatten() for p in model.policy.lm.parameters() if p.grad is not None])


# ---- what is measured, and who pays --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_it_is_the_sum_over_the_vocabulary_under_temperature_and_minimum_length(kind: str) -> None:
    env = make_env(4, min_new_tokens=3)
    reference = far_reference(env, make_model(kind, sharp=0.1), temperature=TEMPERATURE)
    policy_kwargs = {"temperature": TEMPERATURE}
    model = make_exact(env, model=make_model(kind), reference=reference, policy_kwargs=policy_kwargs).learn(
        1, log_interval=0
    )
    buffer = model.buffer
    beside = make_ppo(env, reference.lm.model, policy_kwargs=policy_kwargs).policy
    expected = []
    for episode in range(buffer.n_episodes):
        samples = buffer.pack(np.array([episode]))
        ids = samples.observations["input_ids"][0].tolist()
        prompt = int(samples.observations["prompt_length"])
        for step in range(int(buffer.lengths[episode])):
            p, q = (plain_log_probs(policy, ids[: prompt + step], step) for policy in (model.policy, beside))
            expected.append(sum(float(x.exp() * (x - y)) for x, y in zip(p, q, strict=True) if x > -torch.inf))
    assert buffer.exact_kl is not None
    np.testing.assert_allclose(buffer.exact_kl, expected, rtol=1e-4)
    assert min(expected) > 0.05


def test_an_action_pays_for_the_context_that_it_leads_to_and_nobody_for_the_first() -> None:
    model = make_exact(algorithm=REINFORCE).learn(1, log_interval=0)
    buffer = model.buffer
    assert buffer.exact_kl is not None
    scores = []
    for start, end in pairwise(buffer.starts):
        scores.append(float(np.mean(buffer.actions[start:end] % 2 == 0)))
        by_hand = np.array([*(-BETA * buffer.exact_kl[start + 1 : end]), 0.0])
        by_hand[-1] += scores[-1]
        np.testing.assert_allclose(buffer.rewards[start:end], by_hand, atol=1e-6)
    # The objective, which is logged, has all of it.
    logged = model.logger.name_to_value
    assert logged["objective/rlhf_reward"] == pytest.approx(
        np.mean(scores) - BETA * buffer.exact_kl.sum() / 8, rel=1e-5
    )
    assert logged["objective/kl_exact"] == pytest.approx(buffer.exact_kl.sum() / 8, rel=1e-5)
    assert logged["objective/kl"] == pytest.approx(buffer.log_ratio.sum() / 8, rel=1e-5)


def test_it_is_the_mean_of_k1_over_many_texts() -> None:
    model = make_exact(make_env(64), algorithm=REINFORCE, n_episodes=512).learn(1, log_interval=0)
    buffer = model.buffer
    assert buffer.exact_kl is not None
    exact, k1 = buffer.episode_sums(buffer.exact_kl), buffer.episode_sums(buffer.log_ratio)
    error = float((k1 - exact).std()) / np.sqrt(512)
    assert abs(float((k1 - exact).mean())) < 4 * error
    assert error < 0.1 * exact.mean()  # so that another divergence would be seen
    assert exact.std() < k1.std()


@pytest.mark.parametrize("algorithm", [PPO, A2C, REINFORCE])
def test_a_policy_that_is_its_reference_pays_nothing(algorithm: Any) -> None:
    model = make_exact(algorithm=algorithm, reference=None).learn(1, log_interval=0)
    assert model.buffer.exact_kl is not None
    np.testing.assert_allclose(model.buffer.exact_kl, 0.0, atol=1e-6)
    assert model.logger.name_to_value["train/kl_loss"] == pytest.approx(0.0, abs=1e-6)


# ---- its gradient --------------------------------------------------------------------------------------------------


def a_or_b_or_the_end(contexts: Contexts, n_tokens: int) -> np.ndarray:
    allowed = np.zeros((len(contexts.length), n_tokens), dtype=bool)
    allowed[:, [A, B, EOS]] = True
    return allowed


def count_a(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(ids.count(A)) for ids in completion_ids]


def nothing(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [0.0 for _ in completion_ids]


class SmallWorld:
    """Texts of at most three tokens, each A or B or, after two of them, the end: few enough to sum over all of them.

    :param algorithm: without a critic.
    :param estimator: of the KL divergence.
    :param reward: of a text.
    """

    n_groups, group = 150, 4  # of episodes

    def __init__(self, algorithm: Any, estimator: str, reward: Any) -> None:
        self.reward = reward
        env = make_env(
            32,
            prompts=["a"],
            reward=reward,
            max_new_tokens=3,
            min_new_tokens=2,
            constraint=a_or_b_or_the_end,
            group_size=self.group,
        )
        self.models = [
            in_float64(make_model(num_hidden_layers=1, sharp=sharp, seed=seed)) for seed, sharp in ((0, 0.04), (1, 0.3))
        ]
        self.model = make_exact(
            env,
            model=self.models[0],
            algorithm=algorithm,
            reference=far_reference(env, self.models[1], temperature=TEMPERATURE),
            kl_estimator=estimator,
            n_episodes=self.n_groups * self.group,
            batch_size=None,
            n_epochs=1,
            policy_kwargs={"temperature": TEMPERATURE},
            **({"baseline": "none"} if algorithm is REINFORCE else {}),
        ).learn(1, log_interval=0)
        self.prompt = env.tokenizer("a").input_ids

    def gradient(self, episodes: np.ndarray) -> torch.Tensor:
        """An estimate of the gradient of minus the objective, from some episodes."""
        scale = self.model.buffer.lengths[episodes].mean()  # the loss is a mean over tokens, and not over texts
        return float(scale) * gradient(self.model, episodes)

    def of_every_text(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient that each possible text gives, [12, P], and the texts' probabilities."""
        buffer = self.model.buffer
        texts = {tuple(buffer.actions[a:b].tolist()): episode for episode, (a, b) in enumerate(pairwise(buffer.starts))}
        assert len(texts) == 2 * 2 * 3  # all have been written
        episodes = np.array(list(texts.values()))
        log_prob = torch.from_numpy(buffer.episode_sums(buffer.log_probs)[episodes]).double()
        assert float(log_prob.exp().sum()) == pytest.approx(1.0, abs=1e-6)
        return torch.stack([self.gradient(episodes[[i]]) for i in range(12)]), log_prob.exp()

    def of_groups(self) -> torch.Tensor:
        """[n_groups, P], each from a group of episodes."""
        groups = np.arange(self.n_groups * self.group).reshape(self.n_groups, self.group)
        return torch.stack([self.gradient(row) for row in groups])

    def objective(self, response: tuple[int, ...] = ()) -> torch.Tensor:
        """Expected score minus β times the KL divergence, of all that may follow."""
        if len(response) == 3 or EOS in response:
            return torch.tensor(self.reward(completion_ids=[list(response)])[0], dtype=torch.float64)
        tokens = [A, B, EOS] if len(response) >= 2 else [A, B]
        ids = torch.tensor([[*self.prompt, *response]])
        p, q = ((m(ids).logits[0, -1, tokens] / TEMPERATURE).log_softmax(-1) for m in self.models)
        ahead = torch.stack([self.objective((*response, token)) for token in tokens])
        return (p.exp() * (ahead - BETA * (p - q.detach()))).sum()

    def truth(self) -> torch.Tensor:
        self.models[0].zero_grad()
        (-self.objective()).backward()
        return torch.cat([p.grad.flatten() for p in self.models[0].parameters() if p.grad is not None])


@pytest.mark.parametrize("reward", [nothing, count_a])
def test_over_all_texts_the_mean_gradient_is_that_of_the_objective(reward: Any) -> None:
    for estimator in ("k1", "exact"):
        world = SmallWorld(REINFORCE, estimator, reward)
        truth = world.truth()
        gradients, probabilities = world.of_every_text()
        torch.testing.assert_close(probabilities @ gradients, truth, atol=1e-6 * float(truth.abs().max()), rtol=1e-4)


def test_the_gradient_of_the_divergence_is_less_noisy_than_with_k1(
    record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = {}
    for estimator in ("k1", "exact"):
        world = SmallWorld(REINFORCE, estimator, nothing)
        gradients, probabilities = world.of_every_text()
        noise[estimator] = float(probabilities @ (gradients - world.truth()).square().sum(dim=1))  # tr Cov
    ratio = noise["exact"] / noise["k1"]
    record_property("noise of exact / noise of k1", ratio)
    with capsys.disabled():
        print(f"\nnoise of the gradient of the KL divergence, exact / k1: {ratio:.3f}")
    assert ratio < 0.9


@pytest.mark.parametrize("without", ["the term of the loss", "the reward"])
def test_one_half_of_it_alone_misses_the_gradient_by_a_lot(without: str) -> None:
    world = SmallWorld(REINFORCE, "exact", nothing)
    truth = world.truth()
    if without == "the reward":
        world.model.buffer.rewards[:] = 0
        world.model.set_advantages(world.model.buffer)
    else:
        world.model.buffer._ref_hidden = None
    gradients, probabilities = world.of_every_text()
    assert float((probabilities @ gradients - truth).norm()) > 0.05 * float(truth.norm())


def z_scores(gradients: torch.Tensor, mean: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """By how many standard errors the mean of gradients is off: along the truth, and in nine random directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(len(truth), 9, generator=generator, dtype=truth.dtype)
    along = (gradients - mean) @ torch.cat([truth[:, None], directions], dim=1)
    return along.mean(dim=0) / (along.std(dim=0) / len(gradients) ** 0.5)


def test_with_rloo_too_the_sampled_gradients_agree_with_k1s_and_the_objectives() -> None:
    worlds = {estimator: SmallWorld(RLOO, estimator, count_a) for estimator in ("k1", "exact")}
    truth = worlds["exact"].truth()
    k1, exact = (worlds[estimator].of_groups() for estimator in ("k1", "exact"))
    np.testing.assert_array_equal(*(world.model.buffer.actions for world in worlds.values()))  # the same texts
    for gradients, mean in ((k1, truth), (exact, truth), (exact - k1, torch.zeros_like(truth))):
        assert float(z_scores(gradients, mean, truth).abs().max()) < 4


def test_at_the_optimum_k1_takes_the_scores_noise_away_and_the_exact_sum_does_not() -> None:
    """There every text has the same score − β log π/π_ref, so with k1 no text of a group is better than another."""
    noise = {}
    for estimator in ("k1", "exact"):
        world = SmallWorld(RLOO, estimator, nothing)
        buffer = world.model.buffer
        buffer.rewards[buffer.starts[1:] - 1] += BETA * buffer.episode_sums(buffer.log_ratio)  # such scores
        world.model.set_advantages(buffer)
        gradients = world.of_groups()
        noise[estimator] = float(gradients.var(dim=0).sum())
        if estimator == "exact":  # nothing is left to learn, and the mean is 0 all the same
            assert float(z_scores(gradients, torch.zeros_like(gradients[0]), gradients[0]).abs().max()) < 4
    assert noise["k1"] < 1e-6
    assert noise["exact"] > 1e-2


def test_whitened_advantages_leave_the_price_as_it_is() -> None:
    model = make_exact(n_epochs=1, batch_size=None, vf_coef=0.0).learn(1, log_interval=0)
    whitened, spread = gradient(model, range(8)), model.buffer.advantages.std()
    model.normalize_advantage = False
    model.set_advantages(model.buffer)
    unit = float(model.buffer.advantages.std() / spread)  # the standard deviation, and more where the critic errs
    model.buffer.advantages -= model.buffer.advantages.mean()
    torch.testing.assert_close(unit * whitened, gradient(model, range(8)), atol=1e-5, rtol=1e-3)
    assert unit < 0.9


# ---- in parts, and at what cost ------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of positions of every call for logits."""
    numbers: list[int] = []
    logits = CausalLM.logits

    def noted(self: CausalLM, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        numbers.append(len(hidden))
        return logits(self, hidden, *args)

    monkeypatch.setattr(CausalLM, "logits", noted)
    return numbers


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}])
def test_micro_batches_and_chunks_leave_the_gradient_as_it_is(
    lora: Any, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = None if lora else far_reference(make_env(), in_float64(make_model("llama", sharp=0.1)))
    model = make_exact(
        model=in_float64(make_model("llama")),
        reference=reference,
        policy_kwargs={"lora": lora},
        micro_batch_tokens=4096,
    )
    if lora:
        model.policy.lm.double()
    model.learn(1)
    assert model.buffer.exact_kl is not None
    assert float(model.buffer.exact_kl.min()) > 1e-4
    whole = gradient(model, range(8))
    model.micro_batch_tokens = 24
    in_parts = gradient(model, range(8))
    monkeypatch.setattr(agents.models.sizes, "CPU", agents.models.sizes.CPU._replace(chunk_elements=5 * 300))
    seen.clear()
    in_chunks = gradient(model, range(8))
    assert max(seen) == 5  # of the policy's and of the reference's distributions
    assert len(seen) >= 3 * model.buffer.n_tokens / 5
    torch.testing.assert_close(in_parts, whole, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(in_chunks, whole, atol=1e-9, rtol=1e-9)
    monkeypatch.undo()
    model.buffer._ref_hidden = None
    assert float((gradient(model, range(8)) - whole).norm()) > 1e-3 * float(whole.norm())


def test_with_lora_the_reference_is_the_model_without_its_adapter() -> None:
    lora = {"r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    shared = make_exact(model=make_model("llama"), reference=None, policy_kwargs={"lora": lora}).learn(
        1, log_interval=0
    )
    assert shared.reference is not None
    assert shared.reference.lm is shared.policy.lm
    base = far_reference(make_env(), make_model("llama"))
    apart = make_exact(model=make_model("llama"), reference=base, policy_kwargs={"lora": lora}).learn(1, log_interval=0)
    assert shared.buffer.exact_kl is not None
    np.testing.assert_array_equal(shared.buffer.actions, apart.buffer.actions)
    np.testing.assert_allclose(shared.buffer.exact_kl, apart.buffer.exact_kl, atol=1e-5)
    torch.testing.assert_close(gradient(shared, range(8)), gradient(apart, range(8)), atol=1e-5, rtol=1e-4)


def forwards(estimator: str, kl_coef: float) -> tuple[list[Any], list[Any]]:
    """What the policy's and the reference's decoder were given in one iteration."""
    model = make_exact(kl_estimator=estimator, kl_coef=kl_coef)
    assert model.reference is not None
    with (
        counted_forwards(model.policy.lm.backbone) as of_policy,
        counted_forwards(model.reference.lm.backbone) as of_reference,
    ):
        model.learn(1)
    return of_policy, of_reference


def test_a_coefficient_of_zero_costs_nothing_and_the_reference_reads_a_text_once_in_any_case() -> None:
    free = forwards("k1", 0.0)
    assert forwards("exact", 0.0) == free
    policy, reference = forwards("exact", BETA)
    assert reference == free[1]
    assert len(policy) == len(free[0]) + len(reference)  # once more, for its distributions


def test_a_coefficient_of_zero_measures_no_exact_divergence() -> None:
    model = make_exact(kl_coef=0.0).learn(1, log_interval=0)
    assert model.buffer.exact_kl is None
    assert "objective/kl_exact" not in model.logger.name_to_value
    assert model.logger.name_to_value["objective/kl"] > 0


def test_what_is_kept_of_the_reference_is_a_hidden_state_a_token() -> None:
    sizes = {}
    for estimator in ("k1", "exact"):
        buffer = make_exact(kl_estimator=estimator).learn(1, log_interval=0).buffer
        sizes[estimator] = buffer.nbytes
    assert sizes["exact"] - sizes["k1"] == buffer.n_tokens * (4 * 32 + 4)  # 32 hidden units, and the divergence


# ---- it holds the policy, and what is refused ----------------------------------------------------------------------


def test_a_high_price_keeps_ppo_near_its_reference() -> None:
    def divergence(kl_coef: float) -> float:
        env = make_env(32, reward=even_tokens, max_new_tokens=6, min_new_tokens=6)
        model = make_ppo(
            env,
            make_model(num_hidden_layers=1),
            kl_estimator="exact",
            kl_coef=kl_coef,
            n_episodes=32,
            batch_size=16,
            n_epochs=4,
            learning_rate=3e-3,
        ).learn(2_000)
        return float(model.buffer.episode_sums(model.buffer.log_ratio).mean())

    assert divergence(2.0) < 0.3 * divergence(0.0)


def test_algorithms_without_a_penalty_in_the_reward_refuse_it() -> None:
    with pytest.raises(
        ValueError, match="kl_estimator='exact' chooses the KL penalty in the reward, where GRPO has none"
    ):
        make_exact(make_env(4, group_size=4), algorithm=GRPO)


def test_a_discount_is_refused_whenever_it_is_set() -> None:
    with pytest.raises(ValueError, match=r"Expected gamma=1 with kl_estimator='exact'.*got 0\.9"):
        make_exact(gamma=0.9)
    with pytest.raises(ValueError, match=r"normalize_advantage=True or False with kl_estimator='exact', got 'group'"):
        make_exact(make_env(group_size=2), normalize_advantage="group")
    model = make_exact()
    model.gamma = 0.9
    with pytest.raises(ValueError, match="Expected gamma=1"):
        model.learn(1)


def test_stable_baselines3s_algorithms_refuse_it() -> None:
    env = make_env(4)
    policy_kwargs = {"model": make_model(), "eos_token_id": EOS}

    def make(**kwargs: Any) -> sb3.A2C:
        return sb3.A2C(
            CausalLMPolicy,
            TextVecEnv(env),
            n_steps=4,
            policy_kwargs=policy_kwargs,
            rollout_buffer_class=EpisodeBuffer,
            rollout_buffer_kwargs={"reference": far_reference(env), **kwargs},
            device="cpu",
        )

    with pytest.raises(ValueError, match="a term of the loss, which SB3's algorithms don't have"):
        make(kl_estimator="exact")
    model = make()
    model.rollout_buffer.kl_estimator = "exact"
    with pytest.raises(ValueError, match=r"Expected finalize\(policy\) for kl_estimator='exact'"):
        model.learn(16)


def test_the_divergence_keeps_its_price_where_all_texts_are_paid_the_same() -> None:
    env = make_env(max_new_tokens=1, reward=constant)  # the first context's divergence is in no reward
    model = make_exact(env, learning_rate=1e-2, n_episodes=32, batch_size=None, n_epochs=1)
    before = weights_of(model.policy)
    model.learn(1)
    assert largest_difference(before, weights_of(model.policy)) > 1e-3
    assert not model.buffer.advantages.any()  # a critic that knows nothing yet, and one return
    assert model._advantage_unit == 1.0
