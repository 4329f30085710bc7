"""The training loop of the on-policy algorithms: collect whole episodes, shape rewards, estimate advantages, update,
log.

An algorithm defines how advantages are estimated (:meth:`OnPolicyAlgorithm.estimate`) and what the loss is
(:meth:`OnPolicyAlgorithm.loss`). It is an SB3 ``BaseAlgorithm`` with SB3's callbacks, loggers, schedules and
``predict``.
"""

from __future__ import annotations

import math
import time
import warnings
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Never, Self, get_args

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv

from agents.algorithms.bad_updates import save_for_inspection
from agents.algorithms.engine import Engine, launched, sharded
from agents.algorithms.environments import as_vec_env, check_groups
from agents.algorithms.gradient import Sums, add_up, to_host
from agents.algorithms.progress_bar import ProgressBar
from agents.algorithms.ranges import RANGES, SB3_ARGUMENTS, check_ranges
from agents.algorithms.resumable import Resumable
from agents.algorithms.snapshot import Snapshot, is_finite
from agents.models.pretrained import check_tokenizers, lora_arguments
from agents.models.reference import Reference
from agents.models.transfers import to_device
from agents.objectives.advantages import (
    discounted_returns,
    rounding_floor,
    signal_share,
    variance,
    whiten,
    whiten_groups,
)
from agents.objectives.kl import KLController, KLEstimator, kl_controller
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.collector import Interrupted, collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer, EpisodeSamples
from agents.rollouts.source import LOCAL, rollout_source
from agents.state import checkpoint
from agents.state.arguments import check_argument_names, check_number
from text_env.vector_env import TextVectorEnv

if TYPE_CHECKING:
    from agents.rollouts.backend import RolloutBackend

# What counts the same in the loss: every token, every text, or every place for a token in the response budget.
LossWeighting = Literal["token", "sequence", "constant"]

# Samples so many episodes into a buffer, and returns the final info of each, in the order in which they were started.
Collect = Callable[[int, EpisodeBuffer], list[dict[str, Any]]]

# The loss of the tokens of some episodes, given by their numbers, [N]; and what else to log, by name, [N] each.
Losses = Callable[[np.ndarray], tuple[torch.Tensor, dict[str, torch.Tensor]]]

# How far from 1 a ratio π / π_old may be before anything has been learned from a rollout: half of the usual clip range.
# Only rounding can make it differ from 1, by about 1e-5 in float32. What rounding has moved half-way to the edge of the
# clip range is clipped, or not, for no reason; and as many tokens count more or less than they should.
FIRST_RATIO_BOUND = 0.1

# What two float32 passes make of the same log-probability, in nats, and of a sum of many numbers, as a share of the
# largest: advantages that differ by no more are the same.
PASSES_AGREE_TO = 3e-5
FLOAT32_IS_GOOD_TO = 1e-5


class OnPolicyAlgorithm(Resumable):
    """The base class of PPO, VinePPO, A2C, REINFORCE, RLOO, GRPO and DAPO.

    :param policy: ``"CausalLMPolicy"``, or a class of policies that take packed batches of episodes.
    :param env: a registered name, a ``TextVectorEnv``, or the SB3 environment that ``make_vec_env`` returns.
        An environment given by name that poses a task which has a model of its own, as ``TextArithmetic-v0`` does,
        makes that the policy's, unless ``policy_kwargs`` name another. It gets the tokenizer of
        ``policy_kwargs["model"]`` and, where that is not the built-in one, room for the longest prompt in it, unless
        the registered name says otherwise.
    :param learning_rate: a number, a ``LearningRate``, or another function of the remaining progress, which goes from 1
        to 0. A checkpoint can't hold such a function.
    :param n_episodes: the number of episodes of a rollout. All of them are started and finished under the same weights.
    :param batch_size: the number of *episodes* of a minibatch; None: all of the rollout.
    :param n_epochs: the number of passes over a rollout. All steps but the first are off-policy, which the ratio in the
        loss of PPO, VinePPO, GRPO and DAPO corrects; the other algorithms take one step by default.
    :param gamma: the discount γ. Algorithms whose action is the whole text (RLOO, GRPO, DAPO) don't use it.
    :param max_grad_norm: the norm to which longer gradients are scaled down.
    :param max_bad_updates: the number of updates in a row in which a number was not finite, each of which is undone,
        after which training stops with an error. Undoing needs a copy of the trained weights and of the optimiser's
        state, from the beginning to the end of an update. 0: there is no copy, and the first such update stops the
        training.
    :param kl_coef: β, the coefficient of the KL penalty. With 0 the KL divergence is measured without a penalty.
    :param kl_target: a KL divergence in nats per episode. β is adapted to hold it, starting from ``kl_coef``. None: β
        is constant.
    :param kl_estimator: the estimator of the KL divergence at each token that the penalty in the reward uses: ``"k1"``,
        the log-ratio, ``"k2"`` or ``"k3"`` (see :mod:`agents.objectives.kl` and ``docs/ppo.md``); or ``"exact"``, the
        divergence itself over the whole vocabulary, as a reward for the steps before a context and as a term of the
        loss at the context. ``kl_target`` refers to k1 in any case.
    :param missing_eos_penalty: a number that is subtracted from the reward, but not from the reported score, of texts
        that the response budget has cut off; None: nothing is subtracted.
    :param normalize_advantage: whether to shift and scale advantages to mean 0 and variance 1 over the whole rollout,
        or to a smaller variance where they vary more than the returns, by errors of the critic (see
        :func:`agents.objectives.advantages.signal_share`; with an exact KL divergence in the loss, whose price depends
        on the scale, it is not looked for); ``"group"``: over the texts of each prompt.
    :param loss_weighting: what counts the same in the loss. ``"token"``: every token, by the mean over the tokens of a
        minibatch. ``"sequence"``: every text, by the mean over texts of the mean over the tokens of each.
        ``"constant"``: every token, by the sum over tokens divided by the response budgets of all texts, so that what a
        token counts doesn't depend on the lengths of others (Dr. GRPO, Liu et al. 2025,
        https://arxiv.org/abs/2503.20783).
    :param mask_truncated: whether to leave texts that the response budget has cut out of the loss (DAPO's overlong
        filtering, Yu et al. 2025, https://arxiv.org/abs/2503.14476). In the baselines of others their scores still
        count. A minibatch of nothing else makes no step.
    :param micro_batch_tokens: the largest number of tokens of one forward pass, padding included. Fewer take less
        memory and give the same gradient. An update that runs out of memory lowers it. None: what suits the device
        (:mod:`agents.models.sizes`), 4,096 on a CPU and 16,384 elsewhere.
    :param rollouts: who writes the texts. ``"local"``: the policy itself. The address of a server of vLLM, such as
        ``"http://localhost:8000"``, or several with commas in between: that server, with the policy's weights, while
        the environment judges as ever (``docs/engines.md``). Anything else: a program with the two methods of
        :class:`agents.rollouts.backend.RolloutBackend`.
    :param max_lag: how many updates old the weights may be that a text was sampled from, when it is learned from. With
        0 a rollout is written, learned from, and then the next one is written; otherwise the next one is written while
        the latest one is learned from. More than 1 saves sending new weights (:mod:`agents.rollouts.remote`).
    :param importance_cap: C, the largest importance weight π_old / μ of a token that another program sampled, from its
        distribution μ (see :func:`agents.objectives.losses.truncated_importance_weight`); None: no such weights.
    :param importance_bound: b > 1: a token that another program sampled is left out of the policy's gradient unless
        π_old / μ is between 1/b and b; None: all count.
    :param reference: the frozen model that the KL penalty refers to. Its temperature, minimum length and constraint
        must be those of the policy. None: the policy as it is at the start.
    :param policy_kwargs: the keyword arguments of the policy.
    :param stats_window_size: the number of latest episodes over which SB3's ``rollout/`` statistics are taken.
    :param tensorboard_log: the directory of TensorBoard logs; None: no such logs.
    :param verbose: SB3's verbosity, 0, 1 or 2.
    :param seed: the seed of all random generators; None: they are not seeded.
    :param device: the device of the policy: ``"auto"``, ``"cpu"``, ``"cuda"``, …
    :param unknown: what is no argument at all.
    :raises TypeError: for unknown arguments; it says what to write instead.
    :raises ValueError: if a number is out of range, or if environment, policy and reference don't fit together.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"CausalLMPolicy": CausalLMPolicy}

    # Greater than 1: episodes are compared with others of the same prompt, and an environment that is given by name is
    # made with groups of this size.
    default_group_size: ClassVar[int] = 1
    # False: the KL penalty is a term of the loss and not of the reward.
    kl_in_reward: ClassVar[bool] = True
    # False: advantages may have been divided by a standard deviation before they are normalised.
    advantages_have_unit_of_rewards: ClassVar[bool] = True
    # True: the action is the whole text. There is no discount, and no critic whose errors could be in the advantages.
    whole_texts: ClassVar[bool] = False
    state_attributes: ClassVar[tuple[str, ...]] = ("step_factor",)
    # The engine decides how gradients are applied, and what several processes agree on. None: that of a single process,
    # unless several were launched.
    engine_class: ClassVar[type[Engine] | None] = None

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
        max_bad_updates: int = 3,
        kl_coef: float = 0.04,
        kl_target: float | None = None,
        kl_estimator: KLEstimator = "k1",
        missing_eos_penalty: float | None = None,
        normalize_advantage: bool | Literal["group"] = False,
        loss_weighting: LossWeighting = "token",
        mask_truncated: bool = False,
        micro_batch_tokens: int | None = None,
        rollouts: str | RolloutBackend = LOCAL,
        max_lag: int = 0,
        importance_cap: float | None = 2.0,
        importance_bound: float | None = None,
        reference: Reference | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        **unknown: Never,
    ) -> None:
        check_argument_names(type(self), unknown, SB3_ARGUMENTS)
        check_ranges({**vars(self), **locals()})  # those of a subclass are attributes by now
        self.kl: KLController = kl_controller(kl_coef, kl_target)
        if kl_estimator != "k1" and not self.kl_in_reward:
            raise ValueError(
                f"kl_estimator={kl_estimator!r} chooses the KL penalty in the reward, where {type(self).__name__} has "
                "none: its penalty is a term of its loss. Leave kl_estimator out."
            )
        if normalize_advantage not in (True, False, "group"):
            raise ValueError(f"Expected normalize_advantage to be True, False or 'group', got {normalize_advantage!r}.")
        if loss_weighting not in get_args(LossWeighting):
            raise ValueError(f"Expected loss_weighting to be one of {get_args(LossWeighting)}, got {loss_weighting!r}.")
        if rollouts != LOCAL and launched()[1] > 1:
            raise ValueError(
                f"Expected rollouts='local' with several processes, which would send the servers their weights at "
                f"different times, got {rollouts!r}. Use more servers with one process."
            )
        policy_kwargs = dict(policy_kwargs or {})
        if policy_kwargs.get("lora") is not None:  # in a form that a checkpoint can hold
            policy_kwargs["lora"] = lora_arguments(policy_kwargs["lora"])
        vec_env = as_vec_env(env, n_episodes, self.default_group_size, policy_kwargs, at_once=rollouts != LOCAL)
        policy_kwargs = {**self.default_policy_kwargs(vec_env.vector_env, policy_kwargs), **policy_kwargs}
        if self.default_group_size > 1:
            check_groups(type(self).__name__, vec_env.vector_env, n_episodes)
        elif normalize_advantage == "group":
            check_groups("normalize_advantage='group'", vec_env.vector_env, n_episodes)
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
        self.kl_estimator = kl_estimator
        self.missing_eos_penalty = missing_eos_penalty
        self.normalize_advantage = normalize_advantage
        self.loss_weighting = loss_weighting
        self.mask_truncated = mask_truncated
        self.micro_batch_tokens = micro_batch_tokens
        self.rollouts = rollouts
        self.max_lag = max_lag
        self.importance_cap = importance_cap
        self.importance_bound = importance_bound
        self.max_bad_updates = max_bad_updates
        self.bad_updates = 0  # that were undone
        self.bad_updates_in_a_row = 0
        self._minibatch = np.arange(0)  # the latest one, by the numbers of its episodes
        self.reference = reference
        self.reference_was_given = reference is not None
        self.step_factor = 1.0  # what multiplies the actor's learning rate, as a trust region does
        self.before: Snapshot | None = None  # during an update
        self._iterations = 0  # finished ones, those before a resumption included
        self._advantage_unit = 1.0  # what advantages were divided by
        self._signal_share: float | None = None  # what whitened advantages were multiplied by; None: not whitened
        self._warned_of_first_ratio = False
        # Before the first step after a rollout, of each micro-batch the largest distance of a ratio from 1; else None.
        self._first_ratios: list[torch.Tensor] | None = None
        self._setup_model()

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name not in self.policy_aliases:
            raise ValueError(
                f"Expected policy to be one of {sorted(self.policy_aliases)}, or a class of such policies, got "
                f"{policy_name!r}: token contexts are read by a language model."
            )
        return self.policy_aliases[policy_name]

    def _setup_model(self) -> None:
        self._engine_class = self.engine_class or _engine_of_launch()
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        env = self.vector_env
        known = {
            "min_new_tokens": env.min_new_tokens,
            "constraint": env.constraint,
            "eos_token_id": env.eos_token_ids,
            "tokenizer": env.tokenizer,
        }
        policy_kwargs = {**known, **self.policy_kwargs}
        self.policy = self.policy_class(self.observation_space, self.action_space, self.lr_schedule, **policy_kwargs)  # type: ignore[assignment]
        self.policy.to(self.device)
        self.engine = self._engine_class(self.policy)
        self.engine.share(self.n_episodes, env.group_size)  # raises now if a share would not be whole
        self.engine.share(self.batch_size or self.n_episodes)
        if self.engine.rank:
            self.verbose, self.tensorboard_log = 0, None
        self.policy.distribution.check_environment(env)
        if self.reference is None:
            self.reference = Reference.of(self.policy)
        self.policy.distribution.check_same(self.reference.distribution, "policy", "reference")
        check_tokenizers(self.policy.tokenizer, self.reference.tokenizer, "of the reference")
        options = self.max_lag, self.importance_cap, self.importance_bound
        self.source = rollout_source(self.rollouts, self.policy, env, self.n_episodes, *options)
        self.buffer = self.new_buffer()
        self._tell(self.buffer)

    def set_random_seed(self, seed: int | None = None) -> None:
        """As SB3's. Each of several processes draws random numbers of its own.

        :param seed: the seed; None: the generators are not seeded.
        """
        super().set_random_seed(self._engine_class.seed(seed))

    def new_buffer(self) -> EpisodeBuffer:
        """An empty buffer for whole episodes of the environment."""
        return EpisodeBuffer(
            0, self.observation_space, self.action_space, self.device, gamma=self.gamma, n_envs=self.n_envs
        )

    def _tell(self, buffer: EpisodeBuffer) -> None:
        """Tell the buffer how to measure and pay the KL divergence: the attributes may have been set in between."""
        if self.kl_estimator == "exact" and self.gamma != 1:
            raise ValueError(
                f"Expected gamma=1 with kl_estimator='exact', which is the divergence of whole texts, got {self.gamma}."
            )
        if self.kl_estimator == "exact" and self.normalize_advantage == "group":
            raise ValueError(
                "Expected normalize_advantage=True or False with kl_estimator='exact', got 'group': the divergence in "
                "the loss would need another price in each group."
            )
        buffer.reference, buffer.kl = self.reference, self.kl
        buffer.kl_estimator = self.kl_estimator if self.kl_in_reward else None

    @property
    def kl_coef(self) -> float:
        """β, the current coefficient of the KL penalty. Setting it sets the controller's."""
        return self.kl.coef

    @kl_coef.setter
    def kl_coef(self, coef: float) -> None:
        self.kl.coef = coef

    @property
    def kl_target(self) -> float | None:
        """The KL divergence that β is adapted to hold, in nats per episode; None for a constant β. Setting it replaces
        the controller, which starts from the current β.
        """
        return getattr(self.kl, "target", None)

    @kl_target.setter
    def kl_target(self, target: float | None) -> None:
        self.kl = kl_controller(self.kl.coef, target)

    @property
    def vector_env(self) -> TextVectorEnv:
        """The environment inside SB3's adapter, which the training loop uses directly."""
        return self._text_env.vector_env

    def learning_rates(self) -> tuple[float, float]:
        """
        :return: the learning rates of the actor and of the critic's own weights, as the schedules have them now.
        """
        rate = self.lr_schedule(self._current_progress_remaining)
        return rate, rate

    def default_policy_kwargs(self, env: TextVectorEnv, policy_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What the policy is made of where its arguments don't say.

        :param env: the environment.
        :param policy_kwargs: what they say.
        :return: keyword arguments of the policy.
        """
        return {}

    # ---- what an algorithm defines --------------------------------------------------------------------------------

    @abstractmethod
    def estimate(self, buffer: EpisodeBuffer) -> None:
        """Estimate the advantages of a rollout.

        :param buffer: the rollout. ``buffer.advantages`` must be set from ``buffer.rewards``, float32 [N] for N
            actions, and so must ``buffer.returns`` if the loss uses them. Advantages have the unit of the rewards, in
            which an exact KL divergence in the loss has its price.
        """

    @abstractmethod
    def loss(
        self, samples: EpisodeSamples, values: torch.Tensor, log_prob: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of each token, whose weighted mean over a minibatch is minimised.

        :param samples: a packed batch of N actions.
        :param values: the values under the policy that is trained, [N]; of a critic with ``value_bins`` the logits of
            its distributions, [N, M]. The policy's ``value_loss`` takes either.
        :param log_prob: the log-probabilities of the actions under the policy that is trained, [N].
        :param entropy: the entropies of the distributions of the actions, [N], nats.
        :return: the losses, [N]; and what to log, by name, [N] each.
        """

    def token_weights(self, lengths: np.ndarray) -> np.ndarray:
        """The weight of a token in the mean of the loss over a minibatch, by default as ``loss_weighting`` says.

        :param lengths: int [E], the number of actions of each episode.
        :return: the weight of each token of an episode, [E], at least 0.
        """
        return 1.0 / lengths if self.loss_weighting == "sequence" else np.ones(len(lengths))

    def sample(self, collect: Collect) -> list[dict[str, Any]]:
        """Fill ``buffer`` with the episodes of a rollout. By default they are the next ``n_episodes``, or this
        process's share of so many, whatever they are; an algorithm may collect more and choose
        (``EpisodeBuffer.extend``).

        :param collect: a function that samples as many episodes as its first argument says into a buffer, which it
            empties before; see ``agents.rollouts.collector.collect_episodes``. All of them count as timesteps.
        :return: the final infos of the episodes in the buffer, in their order.
        """
        return collect(self.engine.share(self.n_episodes), self.buffer)

    def stop_early(self, means: dict[str, float]) -> bool:
        """Whether to skip this step and the rest of the update. By default never.

        :param means: the mean over the minibatch of what :meth:`loss` logs, by name.
        :return: whether to stop.
        """
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
        """Train the policy.

        :param total_timesteps: the number of tokens to generate. The rollout in which it is reached is completed.
        :param callback: SB3's callbacks, or functions.
        :param log_interval: the number of iterations between two log entries; 0: nothing is logged.
        :param tb_log_name: the name of the TensorBoard run; None: that of the class.
        :param reset_num_timesteps: whether to count tokens from 0. False continues an earlier training.
        :param progress_bar: whether to show a progress bar with the latest score and KL divergence.
        :return: the algorithm.
        :raises ValueError: if ``total_timesteps`` is no number.
        """
        check_number("total_timesteps", total_timesteps)
        _ = self._text_env  # raises where there is no environment to learn in
        bar = ProgressBar()
        if progress_bar:
            # Not SB3's bar, which counts one token for every row of the environment at every step.
            given = callback if isinstance(callback, list) else [callback]
            callback = [*(c if isinstance(c, BaseCallback) else ConvertCallback(c) for c in given), bar]
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name or type(self).__name__
        )
        if reset_num_timesteps:
            self._iterations = 0
        callback.on_training_start(locals(), globals())
        try:
            self._iterate(total_timesteps, callback, log_interval)
        finally:  # the bar must be removed from the terminal after an error, too
            bar.close()
        callback.on_training_end()
        return self

    def _iterate(self, total_timesteps: int, callback: BaseCallback, log_interval: int) -> None:
        while self.num_timesteps < total_timesteps:
            before = self.num_timesteps
            if not self.collect_rollouts(callback):
                break
            self._iterations += 1
            # Schedules are read in the middle of the rollout. At its end, where SB3 reads them, a rate that falls to 0
            # would be 0 at the last update, which is one of ten in a short run. The last rollout exceeds the total.
            middle = (before + min(self.num_timesteps, total_timesteps)) / 2
            self._current_progress_remaining = 1.0 - middle / total_timesteps
            if self.update() and self._first_ratios is None:  # the policy was trained, and not the critic alone
                self.kl.update(self.engine.mean(self.buffer.episode_sums(self.buffer.log_ratio)))
            if log_interval and self._iterations % log_interval == 0:
                self._dump_logs(self._iterations)

    def collect_rollouts(self, callback: BaseCallback) -> bool:
        """Fill the buffer with whole episodes and estimate their advantages.

        :param callback: SB3's callback, which is called at each step of the environment.
        :return: False if a callback has stopped the training, in this process or in another.
        """
        self.policy.set_training_mode(False)
        self.vector_env.episodes.trainer_state.global_step = self._n_updates  # for rewards that change with training
        before = self.num_timesteps
        callback.on_rollout_start()

        def on_step(n_tokens: int, step: dict[str, Any]) -> bool:
            self.num_timesteps += n_tokens
            callback.update_locals({**step, "n_tokens": n_tokens, "self": self, "env": self.env})
            with self._text_env.left_as_it_was():  # a callback may evaluate the policy in the very same environment
                return callback.on_step()

        def collect(n_episodes: int, buffer: EpisodeBuffer) -> list[dict[str, Any]]:
            return collect_episodes(self.source.writer, self.vector_env, n_episodes, buffer, on_step=on_step)

        start = time.perf_counter()
        self.source.prepare()
        episodes = []
        try:
            episodes = self.sample(collect)
            interrupted = False
        except Interrupted:
            interrupted = True
        seconds = time.perf_counter() - start
        # During the rollout a process counts its own tokens. From here on all processes have the same count.
        n_tokens = int(self.engine.total(self.num_timesteps - before))
        self.num_timesteps = before + n_tokens
        if self.engine.total(interrupted):
            return False
        self.policy.clear_cache()  # the update would empty it anyway, and the reference needs memory
        buffer = self.buffer
        self.source.score(buffer)
        self.pay_penalties(buffer, episodes)
        self.set_advantages(buffer)
        if self._signal_share is not None:
            self.logger.record("train/signal_share", self._signal_share)
        for name, figure in self.source.correct(buffer).items():
            self.logger.record(name, figure)
        self._first_ratios = []  # the next step is the first one after these texts were sampled
        self._log_rollout(episodes)
        self.logger.record("time/tokens_per_second", n_tokens / seconds)
        callback.update_locals({"episodes": episodes})
        callback.on_rollout_end()
        if self.num_timesteps < self._total_timesteps:
            self.source.write_ahead()
        return True

    def pay_penalties(self, buffer: EpisodeBuffer, episodes: list[dict[str, Any]]) -> None:
        """Finalize a buffer of whole episodes, so that their rewards have the KL penalty and the one for missing ends.

        :param buffer: the E episodes.
        :param episodes: the final info of each.
        """
        self._tell(buffer)
        buffer.finalize(self.policy)
        buffer.scores = np.array([episode["score"] for episode in episodes], dtype=np.float32)
        buffer.truncated = np.array([episode["finish_reason"] == "length" for episode in episodes])
        if self.missing_eos_penalty is not None:
            last_tokens = buffer.starts[1:] - 1
            buffer.rewards[last_tokens[buffer.truncated]] -= self.missing_eos_penalty

    def set_advantages(self, buffer: EpisodeBuffer) -> None:
        """Estimate the advantages of a rollout, and normalise them if ``normalize_advantage`` is set.

        :param buffer: the rollout, whose advantages are set.
        """
        self.estimate(buffer)
        self._advantage_unit, self._signal_share = 1.0, None
        if not self.normalize_advantage:
            return
        advantages, mean = buffer.advantages, self.engine.mean
        returns = self._returns(buffer, buffer.rewards)
        without_penalty = self._returns(buffer, buffer.rewards + buffer.kl_penalty)
        rounding = self._rounding_of_advantages(buffer, returns)
        # An exact divergence is in the loss at its own price, and in no return at the first context.
        critic_may_err = not self.whole_texts and buffer.exact_kl is None
        paid = returns if critic_may_err else advantages
        if self.normalize_advantage == "group":
            of_group = buffer.lengths, self.vector_env.group_size
            whitened = whiten_groups(advantages, paid, without_penalty, *of_group, rounding)
        else:
            floor = rounding_floor(without_penalty, rounding, mean)
            spread = math.sqrt(variance(advantages, mean))
            self._advantage_unit = 1.0 if spread <= floor else spread
            self._signal_share = 0.0 if spread <= floor else signal_share(advantages, paid, mean)
            whitened = self._signal_share * whiten(advantages, mean, floor)
        buffer.advantages = whitened.astype(np.float32)

    def _returns(self, buffer: EpisodeBuffer, rewards: np.ndarray) -> np.ndarray:
        """
        :param buffer: a rollout of N actions.
        :param rewards: float [N].
        :return: their discounted returns, float32 [N].
        """
        gamma, mask = 1.0 if self.whole_texts else self.gamma, buffer.mask
        padded = discounted_returns(buffer.padded(rewards), np.zeros(buffer.n_episodes), mask, gamma)
        return padded[mask].astype(np.float32)

    def _rounding_of_advantages(self, buffer: EpisodeBuffer, returns: np.ndarray) -> tuple[float, float]:
        """The standard deviations that advantages may have by rounding alone, for :func:`rounding_floor`: as
        differences of values and returns; and as sums of a KL penalty that is 0, of two passes over the same text.
        """
        if not self.advantages_have_unit_of_rewards:
            return 0.0, 0.0
        largest = max(float(np.abs(numbers).max()) for numbers in (buffer.values, returns))
        penalty = 0.0
        if self.kl_in_reward:
            name = self.policy.distribution.autocast
            dtype = self.policy.lm.model.dtype if name is None else getattr(torch, name)
            typical = math.sqrt(float(np.square(buffer.log_probs, dtype=np.float64).mean()))
            off = PASSES_AGREE_TO + 2 * torch.finfo(dtype).eps * typical  # per token
            penalty = self.kl.coef * off * math.sqrt(buffer.n_tokens / buffer.n_episodes)
        return self.engine.largest(FLOAT32_IS_GOOD_TO * largest), self.engine.largest(penalty)

    def update(self) -> bool:
        """:meth:`train`, all or nothing: if a number of an update was not finite, weights, optimiser and what else
        changes while training are set back.

        :return: whether the update was made, and not set back.
        :raises FloatingPointError: if ``max_bad_updates`` in a row were bad. The last one's rollout has been saved.
        """
        self.engine.shard()
        self.before = Snapshot(self.policy) if self.max_bad_updates else None
        numbers = {name: getattr(self, name) for name in ("_n_updates", *self.state_attributes)}
        bad_updates, reason = self.bad_updates, ""
        try:
            self.train()
            # The steps themselves can overflow, at a learning rate that is far too high.
            if self.engine.largest(not is_finite(self.policy)):
                raise FloatingPointError(
                    "After the update some weights, or moments of the optimiser, are not finite: try a lower learning "
                    "rate."
                )
            self.bad_updates_in_a_row = 0
        except FloatingPointError as error:
            reason = str(error)
            self.bad_updates += 1
            self.bad_updates_in_a_row += 1
            if self.before is not None:
                self.before.restore()
                for name, number in numbers.items():
                    setattr(self, name, number)
        finally:  # let go of, before whole weights and a rollout need memory
            self.before = None
            self.engine.zero_grad()
        self.engine.unshard()
        if self.bad_updates > bad_updates:
            self._report_bad_update(reason)
        self.logger.record("train/bad_updates", self.bad_updates)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        return self.bad_updates == bad_updates

    def _report_bad_update(self, reason: str) -> None:
        """
        :param reason: what was not finite.
        :raises FloatingPointError: if training should not go on.
        """
        undone = "Weights and optimiser are as before the update" if self.max_bad_updates else "Nothing was undone"
        message = (
            f"A number was not finite in the update after {self.num_timesteps} tokens, bad update number "
            f"{self.bad_updates_in_a_row} in a row. {reason} {undone}"
        )
        if self.bad_updates_in_a_row < self.max_bad_updates:
            warnings.warn(f"{message}, and training goes on with the next rollout.", stacklevel=3)
            return
        facts = {"reason": reason, "num_timesteps": self.num_timesteps, "minibatch": self._minibatch.tolist()}
        saved = save_for_inspection(
            self.logger.get_dir(), f"bad_update_{self.num_timesteps}", self.buffer, self.vector_env, facts
        )
        raise FloatingPointError(
            f"{message}, and training stops (max_bad_updates={self.max_bad_updates}). The rollout is in {saved}, for "
            f"{checkpoint.__name__}.load."
        )

    def train(self) -> None:
        """Update the policy: ``n_epochs`` passes over the rollout, in minibatches of episodes. Each step follows the
        gradient of a whole minibatch, however it is split into micro-batches.
        """
        buffer = self.buffer
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        start = time.perf_counter()
        history: dict[str, list[float]] = defaultdict(list)
        stopped, used = False, 0
        for minibatches in self._epochs(self.n_epochs):
            for minibatch in minibatches:
                used += int(buffer.lengths[minibatch].sum())
                means = self._backward(minibatch)
                if not means:  # nothing in it has a weight
                    continue
                if self._first_ratios is not None:
                    self._report_first(means.pop("first_ratio"), means)
                    self._first_ratios = None
                self.engine.clip(self.max_grad_norm, means["grad_norm"])
                for name, value in means.items():
                    history[name].append(value)
                stopped = self.stop_early(means)
                if stopped:
                    break
                self.engine.step()
            self._n_updates += 1  # as SB3 counts, one that was stopped as well
            if stopped:
                break
        for name, values in history.items():
            self.logger.record(f"train/{name}", float(np.mean(values)))
        seconds = time.perf_counter() - start
        self.logger.record("time/update_tokens_per_second", self.engine.total(used) / seconds)
        if "value_loss" in history:
            self.logger.record("train/explained_variance", self._explained_variance())

    def _update_learning_rate(self, optimizers: Any) -> None:
        RANGES["learning_rate"].check("learning_rate", self.lr_schedule(self._current_progress_remaining))
        super()._update_learning_rate(optimizers)
        actor, critic = self.learning_rates()
        self.policy.set_learning_rates(self.step_factor * actor, critic)

    def _epochs(self, n_epochs: int) -> Iterator[list[np.ndarray]]:
        """For each pass over the rollout its minibatches, each the int [E] numbers of its episodes."""
        n_episodes = self.engine.share(self.n_episodes)
        batch_size = self.engine.share(self.batch_size or self.n_episodes)
        for _ in range(n_epochs):
            yield np.split(np.random.permutation(n_episodes), range(batch_size, n_episodes, batch_size))

    def _backward(self, minibatch: np.ndarray) -> dict[str, float]:
        """:meth:`gradient` of the algorithm's own loss, which also measures how far the first ratios are from 1."""
        return self.gradient(minibatch, self._losses)

    def _losses(self, part: np.ndarray) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        samples = self.buffer.pack(part)
        predictions, log_prob, entropy, kl = self.engine.policy.evaluate(
            samples.observations, samples.actions, other=self.buffer.ref_logits(part)
        )
        if self._first_ratios is not None:
            ratio = torch.exp(log_prob.detach() - samples.old_log_prob)
            self._first_ratios.append((ratio - 1).abs().max())
        loss, logged = self.loss(samples, predictions.squeeze(-1), log_prob, entropy)
        if kl is not None:  # the exact divergence, at the price that it has in the advantages
            loss = loss + self.kl.coef / self._advantage_unit * kl
            logged["kl_loss"] = kl
        return loss, logged

    def gradient(self, minibatch: np.ndarray, losses: Losses) -> dict[str, float]:
        """Compute the gradient of the weighted mean of a loss over a minibatch.

        If memory is not enough, the whole minibatch is tried again with half the ``micro_batch_tokens``, which stay at
        that. However many micro-batches there are, the host waits for the device once, at the end.

        :param minibatch: int [E], the numbers of the episodes in the buffer.
        :param losses: the loss of the tokens of some episodes, given by their numbers, [N]; and what else to log, by
            name, [N] each.
        :return: the weighted means over tokens of the loss and of what else is logged, and ``grad_norm``, the norm of
            the gradient; nothing, and no gradient, if no token has a weight.
        :raises FloatingPointError: if the loss is not finite, or if ``losses`` raised it, in this process or in
            another.
        :raises MemoryError: if memory is not enough for one episode at a time.
        """
        self._minibatch = minibatch
        lengths = self.buffer.lengths
        weights = self.token_weights(lengths)
        if self.mask_truncated:
            weights = np.where(self.buffer.truncated, 0.0, weights)
        total_weight = divisor = self.engine.total((weights * lengths)[minibatch].sum())
        if total_weight == 0:
            return {}
        if self.loss_weighting == "constant":  # each text is divided by, as if it were as long as the budget
            divisor = self.engine.total(weights[minibatch].sum()) * self.vector_env.max_new_tokens

        def add(part: np.ndarray, factor: float, last: bool) -> Sums:
            loss, logged = losses(part)
            each = factor * weights[part]
            weight: float | torch.Tensor = float(each[0])
            if (each != weight).any():  # otherwise there is nothing to copy to the device
                weight = to_device(loss.device, np.repeat(each, lengths[part]))[0].to(loss)
            self.engine.backward((weight * loss).sum() / divisor, last)
            every = {"loss": loss.detach(), **{name: of.detach() for name, of in logged.items()}}
            sums = (weight * torch.stack(list(every.values()))).sum(dim=1) / total_weight
            return dict(zip(every, sums.unbind(), strict=True))

        while True:
            if self._first_ratios:  # of an attempt that memory was not enough for
                self._first_ratios = []
            parts = self.buffer.batches(minibatch, self.micro_batch_tokens)
            if (sums := add_up(self.engine, parts, add)) is not None:
                return self._read(sums, parts)
            tokens = max(len(part) * np.diff(self.buffer.stream_starts)[part].max() for part in parts)
            tokens = int(self.engine.largest(tokens))
            self.micro_batch_tokens = min(self.micro_batch_tokens or tokens, tokens) // 2
            warnings.warn(
                f"An update ran out of memory. It is tried again with micro_batch_tokens={self.micro_batch_tokens}, "
                "which gives the same gradient and holds as long as this process trains.",
                stacklevel=2,
            )

    def _read(self, sums: list[Sums], parts: list[np.ndarray]) -> dict[str, float]:
        """What :meth:`gradient` returns, from the sums over its micro-batches."""
        measured = {"grad_norm": self.engine.norm()}
        if self._first_ratios:
            measured["first_ratio"] = torch.stack(self._first_ratios).max()
        *of_parts, numbers = to_host(*sums, measured)
        means = {name: self.engine.total(sum(part[name] for part in of_parts)) for name in of_parts[0]}
        if not math.isfinite(means["loss"]):
            self.engine.unshard()
            with torch.no_grad():  # once more, to say where, if what is broken is the model
                for part in parts:
                    samples = self.buffer.pack(part)
                    self.policy.evaluate_actions(samples.observations, samples.actions)
            raise FloatingPointError(f"The loss is {means['loss']}; expected a finite one.")
        return means | {
            name: self.engine.largest(value) if name == "first_ratio" else value for name, value in numbers.items()
        }

    def _report_first(self, distance: float, means: dict[str, float]) -> None:
        """
        :param distance: the largest distance from 1 of the ratios at the first minibatch of the first epoch.
        :param means: the means over this minibatch of what :meth:`loss` logs, by name.
        """
        self.logger.record("train/ratio_first_max", distance)
        for name in ("approx_kl", "clip_fraction"):
            if name in means:
                self.logger.record(f"train/first_{name}", means[name])
        if distance > FIRST_RATIO_BOUND and not self._warned_of_first_ratio:
            self._warned_of_first_ratio = True
            dtype = self.policy.distribution.autocast or str(self.policy.lm.model.dtype).removeprefix("torch.")
            if dtype in ("float32", "float64"):
                cause = (
                    f"Rounding in {dtype} accounts for 1e-4 of that, so the rest is a bug: what scores a text is not "
                    "what sampled it, as with weights that somebody changed in between, dropout that is on, or a "
                    "constraint that is no function of the context alone."
                )
            else:
                cause = (
                    f"Sampling and training round differently in {dtype}, so that clipping and the gradient follow "
                    "rounding errors. Use policy_kwargs={'dtype': 'float32'}, without autocast."
                )
            warnings.warn(
                "Expected the policy that is trained to be the one that sampled, with every ratio of their "
                f"probabilities 1 before the first step of an update; one is off by {distance:.2g} (train/"
                f"ratio_first_max; more than {FIRST_RATIO_BOUND}, half of the usual clip range). {cause}",
                stacklevel=2,
            )

    def _explained_variance(self) -> float:
        """The share of the variance of returns that the critic has predicted; NaN if all returns are the same."""
        buffer, mean = self.buffer, self.engine.mean
        spread = variance(buffer.returns, mean)
        return float(1 - variance(buffer.returns - buffer.values, mean) / spread) if spread else math.nan

    def _log_rollout(self, episodes: list[dict[str, Any]]) -> None:
        buffer = self.buffer
        scores = np.array([episode["score"] for episode in episodes])
        kl = buffer.episode_sums(buffer.log_ratio)
        assert self.ep_info_buffer is not None
        elapsed = (time.time_ns() - self.start_time) / 1e9
        for infos in self.engine.gather([{"r": e["score"], "l": e["length"], "t": elapsed} for e in episodes]):
            self.ep_info_buffer.extend(infos)
        record, mean = self.logger.record, self.engine.mean
        record("objective/scores", mean(scores))
        record("objective/scores_std", math.sqrt(variance(scores, mean)))
        record("objective/kl", mean(kl))
        record("objective/kl_k2", mean(buffer.episode_sums(buffer.token_kl("k2"))))
        record("objective/kl_k3", mean(buffer.episode_sums(buffer.token_kl("k3"))))
        record("objective/kl_coef", self.kl.coef)
        paid = buffer.episode_sums(buffer.rewards)
        if buffer.exact_kl is not None:
            record("objective/kl_exact", mean(buffer.episode_sums(buffer.exact_kl)))
            paid = paid - self.kl.coef * buffer.exact_kl[buffer.starts[:-1]]  # which is no token's reward
        record("objective/rlhf_reward", mean(paid))
        record("objective/entropy", -mean(buffer.log_probs))
        # What does not apply to a text has no number there. Another process may have numbers where this one has none.
        numbers: dict[str, list[float]] = defaultdict(list)
        for episode in episodes:
            for name, value in episode.items():
                if isinstance(value, float | np.floating) and name != "score" and not np.isnan(value):
                    numbers[f"objective/{name}"].append(float(value))
            for name, verdict in (("right", 1.0), ("wrong", 0.0)):  # of tasks with a right answer
                if episode.get("correct") == verdict:
                    numbers[f"completions/mean_length_{name}"].append(episode["length"])
        for name in self.engine.names(numbers):
            count, total = self.engine.total(len(numbers[name])), self.engine.total(sum(numbers[name]))
            record(name, total / count)
        record("completions/mean_length", mean(buffer.lengths))
        record("completions/clipped_ratio", mean(buffer.truncated))
        if self.mask_truncated:
            masked = self.engine.total(buffer.lengths[buffer.truncated].sum())
            record("completions/masked_token_ratio", masked / self.engine.total(buffer.n_tokens))

    def state(self) -> dict[str, Any]:
        """As the base class's, with what is known of the next rollout already."""
        return {**super().state(), "source": self.source.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """As the base class's."""
        super().load_state(state)
        if known := state.get("source"):
            self.source.load_state(known)

    def dump_logs(self, iteration: int = 0) -> None:
        """Write the log, as SB3's ``LogEveryNTimesteps`` asks for at any time.

        :param iteration: iterations so far.
        """
        self._dump_logs(iteration)

    def _dump_logs(self, iteration: int) -> None:
        assert self.ep_info_buffer is not None
        elapsed = max((time.time_ns() - self.start_time) / 1e9, 1e-9)
        record = self.logger.record
        if len(self.ep_info_buffer):
            record("rollout/ep_rew_mean", float(np.mean([info["r"] for info in self.ep_info_buffer])))
            record("rollout/ep_len_mean", float(np.mean([info["l"] for info in self.ep_info_buffer])))
        record("time/iterations", iteration, exclude="tensorboard")
        record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / elapsed))
        record("time/time_elapsed", elapsed, exclude="tensorboard")
        record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)


def _engine_of_launch() -> type[Engine]:
    """The engine for the number of processes that were launched."""
    if launched()[1] == 1:
        return Engine
    if sharded():
        from agents.algorithms.fsdp_engine import FSDPEngine

        return FSDPEngine
    from agents.algorithms.accelerate_engine import AccelerateEngine

    return AccelerateEngine
