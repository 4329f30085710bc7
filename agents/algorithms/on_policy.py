"""The shared on-policy loop: collect whole episodes, shape, estimate advantages, update, log.

An algorithm says only what is its own: how advantages are estimated (:meth:`OnPolicyAlgorithm.estimate`) and what the
loss is (:meth:`OnPolicyAlgorithm.loss`). It is an SB3 ``BaseAlgorithm``: callbacks, loggers, schedules and ``predict``
are SB3's.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections import defaultdict
from typing import Any, ClassVar, Self

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv

from agents.algorithms.engine import Engine
from agents.algorithms.progress_bar import ProgressBar
from agents.algorithms.resumable import Resumable
from agents.models.pretrained import check_tokenizers
from agents.models.reference import Reference
from agents.objectives.advantages import variance, whiten
from agents.objectives.kl import AdaptiveKL, FixedKL, KLController, KLEstimator
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.collector import Interrupted, collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer, EpisodeSamples
from agents.rollouts.sb3_vec_env import TextVecEnv, make_vec_env
from text_env.vector_env import TextVectorEnv, plain

MAX_ROWS = 64  # of an environment that is given by name


class OnPolicyAlgorithm(Resumable):
    """What PPO, A2C, REINFORCE and their kin have in common.

    :param policy: ``"CausalLMPolicy"`` or a class that takes packed batches of episodes.
    :param env: a registered name, a ``TextVectorEnv``, or the SB3 environment that ``make_vec_env`` returns.
    :param learning_rate: a number, a ``LearningRate`` or another function of the remaining progress (1 → 0), which a
        checkpoint can't hold.
    :param n_episodes: episodes of a rollout; all are started and finished under one set of weights.
    :param batch_size: *episodes* of a minibatch; None: all of the rollout.
    :param n_epochs: passes over a rollout. All steps but the first are off-policy, for which PPO's and GRPO's ratio
        makes up; the other algorithms' defaults take one step.
    :param gamma: discount; not used by algorithms whose action is the whole text (RLOO, GRPO).
    :param max_grad_norm: gradient clipping.
    :param kl_coef: β of the KL penalty; 0 measures the KL without penalising it.
    :param kl_target: nats per episode; β then adapts to hold the KL there, starting from ``kl_coef``.
    :param kl_estimator: the estimator of each token's KL that the reward pays for: ``"k1"``, the log-ratio, ``"k2"`` or
        ``"k3"`` (see ``agents.objectives.losses`` and ``docs/ppo.md``). ``kl_target`` is of k1, whatever is paid.
    :param missing_eos_penalty: taken off the reward (never the reported score) of texts that were cut by the budget.
    :param normalize_advantage: whiten advantages over the whole rollout.
    :param micro_batch_tokens: tokens of one forward pass; less memory, same gradient.
    :param reference: the frozen model; by default the policy as it is at the start. One of your own must have the
        policy's temperature, minimum length and constraint.
    :param policy_kwargs: for the policy.
    :param tensorboard_log: SB3's.
    :param verbose: SB3's.
    :param seed: of
        everything random.
    :param device: ``"auto"``, ``"cpu"``, ``"cuda"``, …
    :param stats_window_size: SB3's.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"CausalLMPolicy": CausalLMPolicy}

    # More than 1: episodes are compared with others of the same prompt, and an environment given by name is made so.
    default_group_size: ClassVar[int] = 1
    # False: the loss has a KL term of its own, so the reward has none.
    kl_in_reward: ClassVar[bool] = True
    # How gradients are applied, and what several processes agree on.
    engine_class: ClassVar[type[Engine]] = Engine

    def __init__(
        self,
        policy: str | type[CausalLMPolicy],
        env: str | VecEnv | TextVectorEnv,
        learning_rate: float | Schedule = 3e-4,
        n_episodes: int = 16,
        batch_size: int | None = None,
        n_epochs: int = 1,
        gamma: float = 1.0,
        max_grad_norm: float = 1.0,
        kl_coef: float = 0.04,
        kl_target: float | None = None,
        kl_estimator: KLEstimator = "k1",
        missing_eos_penalty: float | None = None,
        normalize_advantage: bool = False,
        micro_batch_tokens: int = 4096,
        reference: Reference | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
    ) -> None:
        batch_size = n_episodes if batch_size is None else batch_size
        for name, value in (("n_episodes", n_episodes), ("batch_size", batch_size), ("n_epochs", n_epochs)):
            if value < 1:
                raise ValueError(f"Expected {name} >= 1, got {value}.")
        if kl_estimator != "k1" and not self.kl_in_reward:
            raise ValueError(
                f"kl_estimator={kl_estimator!r} chooses the KL penalty in the reward, where {type(self).__name__} has "
                "none: its penalty is a term of its loss. Leave kl_estimator out."
            )
        vec_env = _as_vec_env(env, n_episodes, self.default_group_size)
        if self.default_group_size > 1:
            _check_groups(type(self).__name__, vec_env.vector_env, n_episodes)
        super().__init__(
            policy,
            vec_env,
            learning_rate,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
            supported_action_spaces=(spaces.Discrete,),
        )
        self.n_episodes = n_episodes
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.gamma = gamma
        self.max_grad_norm = max_grad_norm
        self.kl_target = kl_target
        self.kl_estimator = kl_estimator
        self.missing_eos_penalty = missing_eos_penalty
        self.normalize_advantage = normalize_advantage
        self.micro_batch_tokens = micro_batch_tokens
        self.kl: KLController = FixedKL(kl_coef) if kl_target is None else AdaptiveKL(kl_coef, kl_target)
        self.reference = reference
        self.reference_was_given = reference is not None
        self._setup_model()

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        env = self.vector_env
        known = {
            "min_new_tokens": env.min_new_tokens,
            "constraint": env.constraint,
            "eos_token_id": env.eos_token_id,
            "tokenizer": env.tokenizer,
        }
        policy_kwargs = {**known, **self.policy_kwargs}
        self.policy = self.policy_class(self.observation_space, self.action_space, self.lr_schedule, **policy_kwargs)  # type: ignore[assignment]
        self.policy.to(self.device)
        self.engine = self.engine_class(self.policy)
        self.policy.distribution.check_environment(env)
        if self.reference is None:
            self.reference = Reference.of(self.policy)
        self.policy.distribution.check_same(self.reference.distribution, "policy", "reference")
        check_tokenizers(self.policy.tokenizer, self.reference.tokenizer, "of the reference")
        self.buffer = EpisodeBuffer(
            0,
            self.observation_space,
            self.action_space,
            self.device,
            gamma=self.gamma,
            n_envs=self.n_envs,
            reference=self.reference,
            kl_coef=self.kl,
            kl_estimator=self.kl_estimator if self.kl_in_reward else None,
        )

    @property
    def kl_coef(self) -> float:
        """β, as the controller has it now; setting it sets the controller's."""
        return self.kl.coef

    @kl_coef.setter
    def kl_coef(self, coef: float) -> None:
        self.kl.coef = coef

    @property
    def vector_env(self) -> TextVectorEnv:
        """The environment below the SB3 adapter; our loop drives it directly."""
        return self._text_env.vector_env

    # ---- what is an algorithm's own -------------------------------------------------------------------------------

    @abstractmethod
    def estimate(self, buffer: EpisodeBuffer) -> None:
        """Set ``buffer.advantages`` (and ``buffer.returns``, if there is a critic) from ``buffer.rewards``, all [N]."""

    @abstractmethod
    def loss(
        self, samples: EpisodeSamples, values: torch.Tensor, log_prob: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        :param samples: a packed batch.
        :param values: [N].
        :param log_prob: [N].
        :param entropy: [N].
        :return: the loss of each token [N], whose mean over a minibatch is minimised, and what to log, [N] each.
        """

    def token_weights(self, lengths: np.ndarray) -> np.ndarray:
        """What a token of each episode counts in that mean; by default every token counts the same.

        :param lengths: int [E], tokens of each episode.
        :return: [E], positive.
        """
        return np.ones(len(lengths))

    def stop_early(self, means: dict[str, float]) -> bool:
        """Whether to skip this step and the rest of the update, given the minibatch's logged means."""
        return False

    # ---- the loop -------------------------------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train.

        :param total_timesteps: tokens to generate; the last rollout is finished.
        :param callback: SB3's.
        :param log_interval: iterations between two log lines.
        :param tb_log_name: of the TensorBoard run.
        :param reset_num_timesteps: False goes on counting.
        :param progress_bar: tokens so far, with the latest score and KL.
        :return: self.
        """
        bar = ProgressBar()
        if progress_bar:
            # Not SB3's own bar, which adds every row of the environment at every step.
            given = callback if isinstance(callback, list) else [callback]
            callback = [*(c if isinstance(c, BaseCallback) else ConvertCallback(c) for c in given), bar]
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name or type(self).__name__
        )
        callback.on_training_start(locals(), globals())
        try:
            self._iterate(total_timesteps, callback, log_interval)
        finally:  # also after an error the terminal must be given back
            bar.close()
        callback.on_training_end()
        return self

    def _iterate(self, total_timesteps: int, callback: BaseCallback, log_interval: int) -> None:
        iteration = 0
        while self.num_timesteps < total_timesteps:
            if not self.collect_rollouts(callback):
                break
            iteration += 1
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            # The last rollout overshoots; a schedule should not be asked about negative progress.
            self._current_progress_remaining = max(0.0, self._current_progress_remaining)
            self.train()
            self.kl.update(self.engine.mean(self.buffer.episode_sums(self.buffer.log_ratio)))
            if log_interval and iteration % log_interval == 0:
                self._dump_logs(iteration)

    def collect_rollouts(self, callback: BaseCallback) -> bool:
        """Fill the buffer with whole episodes and estimate their advantages.

        :return: False if the callback stopped the training, in this process or in another.
        """
        self.policy.set_training_mode(False)
        self.vector_env.episodes.trainer_state.global_step = self._n_updates  # for rewards that change with training
        before = self.num_timesteps
        callback.on_rollout_start()

        def on_step(n_tokens: int, infos: dict[str, Any]) -> bool:
            self.num_timesteps += n_tokens
            callback.update_locals({"infos": [], "n_tokens": n_tokens, "vector_infos": infos, "self": self})
            return callback.on_step()

        start = time.perf_counter()
        episodes = []
        try:
            episodes = collect_episodes(self.policy, self.vector_env, self.n_episodes, self.buffer, on_step=on_step)
            interrupted = False
        except Interrupted:
            interrupted = True
        seconds = time.perf_counter() - start
        # During the rollout a process counts its own tokens; here all of them come to the same count.
        self.num_timesteps = before + int(self.engine.total(self.num_timesteps - before))
        if self.engine.total(interrupted):
            return False
        self.policy.clear_cache()  # the update will empty it anyway; the reference can use the memory
        buffer = self.buffer
        buffer.finalize()
        cut = np.array([episode["finish_reason"] == "length" for episode in episodes])
        if self.missing_eos_penalty is not None:
            last_tokens = buffer.starts[1:] - 1
            buffer.rewards[last_tokens[cut]] -= self.missing_eos_penalty
        self.set_advantages(buffer)
        self._log_rollout(episodes, cut, seconds)
        callback.update_locals({"episodes": episodes})
        callback.on_rollout_end()
        return True

    def set_advantages(self, buffer: EpisodeBuffer) -> None:
        """As the algorithm estimates them, whitened if that was asked for."""
        self.estimate(buffer)
        if self.normalize_advantage:
            buffer.advantages = whiten(buffer.advantages, self.engine.mean).astype(np.float32)

    def train(self) -> None:
        """Epochs of minibatches of episodes; the gradient is that of the whole minibatch, however it is split."""
        buffer = self.buffer
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        start = time.perf_counter()
        history: dict[str, list[float]] = defaultdict(list)
        stopped, used = False, 0
        for _ in range(self.n_epochs):
            order = np.random.permutation(self.n_episodes)
            for minibatch in np.split(order, range(self.batch_size, self.n_episodes, self.batch_size)):
                used += int(buffer.lengths[minibatch].sum())
                means = self._backward(minibatch)
                means["grad_norm"] = self.engine.clip(self.max_grad_norm)
                for name, value in means.items():
                    history[name].append(value)
                stopped = self.stop_early(means)
                if stopped:
                    break
                self.engine.step()
            if stopped:
                break
            self._n_updates += 1
        for name, values in history.items():
            self.logger.record(f"train/{name}", float(np.mean(values)))
        seconds = time.perf_counter() - start
        self.logger.record("time/update_tokens_per_second", self.engine.total(used) / seconds)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if "value_loss" in history:
            self.logger.record("train/explained_variance", self._explained_variance())

    def _backward(self, minibatch: np.ndarray) -> dict[str, float]:
        """Leave the gradient of the minibatch's mean loss in the parameters.

        :param minibatch: int [E], episodes of the buffer.
        :return: what :meth:`loss` logs, mean over tokens as they count.
        """
        lengths = self.buffer.lengths
        weights = self.token_weights(lengths)
        total_weight = self.engine.total((weights * lengths)[minibatch].sum())
        self.engine.zero_grad()
        means: dict[str, float] = defaultdict(float)
        parts = self.engine.micro_batches(list(self.buffer.batches(minibatch, self.micro_batch_tokens)))
        for number, (part, factor) in enumerate(parts, 1):
            samples = self.buffer.pack(part)
            values, log_prob, entropy = self.policy.evaluate_actions(samples.observations, samples.actions)
            assert entropy is not None
            loss, logged = self.loss(samples, values.flatten(), log_prob, entropy)
            weight = torch.from_numpy(factor * np.repeat(weights[part], lengths[part])).to(loss)
            self.engine.backward((weight * loss).sum() / total_weight, last=number == len(parts))
            for name, per_token in {"loss": loss, **logged}.items():
                means[name] += float((weight * per_token.detach()).sum()) / total_weight
        return {name: self.engine.total(mean) for name, mean in means.items()}

    def _explained_variance(self) -> float:
        """The share of the returns' variance that the critic foresaw; not a number where they have none."""
        buffer, mean = self.buffer, self.engine.mean
        spread = variance(buffer.returns, mean)
        return float(1 - variance(buffer.returns - buffer.values, mean) / spread) if spread else math.nan

    def _log_rollout(self, episodes: list[dict[str, Any]], cut: np.ndarray, seconds: float) -> None:
        buffer = self.buffer
        scores = np.array([episode["score"] for episode in episodes])
        kl = buffer.episode_sums(buffer.log_ratio)
        assert self.ep_info_buffer is not None
        elapsed = (time.time_ns() - self.start_time) / 1e9
        self.ep_info_buffer.extend({"r": e["score"], "l": e["length"], "t": elapsed} for e in episodes)
        record, mean = self.logger.record, self.engine.mean
        record("objective/scores", mean(scores))
        record("objective/scores_std", math.sqrt(variance(scores, mean)))
        record("objective/kl", mean(kl))
        record("objective/kl_k2", mean(buffer.episode_sums(buffer.token_kl("k2"))))
        record("objective/kl_k3", mean(buffer.episode_sums(buffer.token_kl("k3"))))
        record("objective/kl_coef", self.kl.coef)
        record("objective/rlhf_reward", mean(buffer.episode_sums(buffer.rewards)))
        record("objective/entropy", -mean(buffer.log_probs))
        named = {k for e in episodes for k, v in e.items() if isinstance(v, float | np.floating) and k != "score"}
        for name in sorted(named):
            # A part of the reward that does not apply to a text has no number there.
            record(f"objective/{name}", mean(np.array([episode[name] for episode in episodes if name in episode])))
        record("completions/mean_length", mean(buffer.lengths))
        record("completions/clipped_ratio", mean(cut))
        record("time/tokens_per_second", self.engine.total(buffer.n_tokens) / seconds)

    def _dump_logs(self, iteration: int) -> None:
        assert self.ep_info_buffer is not None
        elapsed = max((time.time_ns() - self.start_time) / 1e9, 1e-9)
        record = self.logger.record
        record("rollout/ep_rew_mean", self.engine.mean(np.array([info["r"] for info in self.ep_info_buffer])))
        record("rollout/ep_len_mean", self.engine.mean(np.array([info["l"] for info in self.ep_info_buffer])))
        record("time/iterations", iteration, exclude="tensorboard")
        record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / elapsed))
        record("time/time_elapsed", elapsed, exclude="tensorboard")
        record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)


def _as_vec_env(env: str | VecEnv | TextVectorEnv, n_episodes: int, group_size: int) -> TextVecEnv:
    if isinstance(env, str):
        grouped = {"group_size": group_size} if group_size > 1 else {}
        env = make_vec_env(env, n_envs=default_rows(n_episodes, group_size), env_kwargs=grouped)
    if isinstance(env, TextVecEnv):
        plain(env.outermost)  # the loop drives the environment itself: wrappers would never apply
        return env
    if isinstance(env, VectorEnv):
        return TextVecEnv(plain(env))
    raise ValueError(
        "Expected env to be a registered name ('TextRLHF-v0'), gym.make_vec('TextRLHF-v0', num_envs=...) or "
        f"agents.make_vec_env(...), got {type(env).__name__}. For single or wrapped environments use SB3's algorithms."
    )


def default_rows(n_episodes: int, group_size: int) -> int:
    """
    :param n_episodes: of a rollout.
    :param group_size: of the environment.
    :return: rows of an environment that is made for it: at most ``MAX_ROWS``, and whole groups.
    """
    rows = min(n_episodes, MAX_ROWS)
    return max(rows // group_size, 1) * group_size


def _check_groups(algorithm: str, env: TextVectorEnv, n_episodes: int) -> None:
    """Episodes are grouped by the order of their start, so groups must neither be cut nor begin in mid-rollout."""
    size = env.group_size
    if size < 2:
        raise ValueError(
            f"{algorithm} compares the texts of one prompt with each other: expected an environment with group_size >= "
            f"2, got {size}. Make it with group_size=4, for example."
        )
    if n_episodes % size or env.num_envs % size:
        raise ValueError(
            f"Expected n_episodes and the rows of the environment to be multiples of its group_size={size}, got "
            f"n_episodes={n_episodes} and {env.num_envs} rows."
        )
