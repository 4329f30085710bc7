"""A Hugging Face causal language model as a Stable-Baselines3 actor-critic policy.

The policy is a pure function of token contexts. It has the whole interface of SB3's ``ActorCriticPolicy``, so SB3's
algorithms, callbacks and ``evaluate_policy`` work with it without changes. In addition, ``evaluate_actions`` takes
packed batches of whole episodes, which are recognised by an ``action_mask`` among the observations, and in which an
episode costs one forward pass over its tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from gymnasium import spaces
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from agents.models.adapter import unwrapped
from agents.models.causal_lm import CausalLM, OtherLogits, Positions
from agents.models.contexts import Contexts, check_spaces, contexts_of, packed_positions, share_prefixes
from agents.models.critic import make_critic
from agents.models.distribution import TokenDistribution, sample
from agents.models.finite import broken_parameters, check_numbers, check_scores
from agents.models.prefix_cache import PrefixCache
from agents.models.pretrained import (
    add_lora,
    check_positions,
    check_tokenizers,
    check_vocabulary,
    load_causal_lm,
    model_ends,
    tokenizer_beside,
)
from agents.models.transfers import to_device
from agents.policies.optimizers import EPS, optimizer_named
from text_env.ends_of_text import as_ids
from text_env.vector_env import TextVectorEnv, plain

VALUE_HEAD_FILE = "value_head.safetensors"
FORBIDDEN_LOGIT = -1e8  # as in sb3-contrib: its exponential is exactly 0, and its gradient is finite


class CausalLMActorCritic(BasePolicy):
    """The actor is a causal language model. The critic is a linear head on the last hidden state, zero before training.

    :param observation_space: the environment's Dict of ``input_ids``, ``attention_mask`` and ``prompt_length``.
    :param action_space: the environment's ``Discrete(V)``, one action per token.
    :param lr_schedule: the learning rate as a function of the remaining progress, which goes from 1 to 0.
    :param model: ``"builtin"``, a directory, a hub name, a GGUF file, the directory of a PEFT adapter (whose training
        then goes on), a ``PretrainedConfig`` (random weights), or a live model (which is then trained in place).
    :param dtype: the floating-point type of the weights: ``"float32"``, ``"bfloat16"``, …, or ``"auto"``, the type in
        which they were saved. The value head is never below float32.
    :param temperature: the temperature of the policy's distribution, in the rollout, in the update and in the
        reference.
    :param min_new_tokens: the number of response tokens before which EOS has probability 0. The algorithms of this
        package take it from the environment by default.
    :param eos_token_id: the token that ends an episode, or several of which each does; None: the tokenizer's and those
        of the model's generation config. The algorithms of this package take them from the environment by default.
    :param lora: the arguments of ``peft.LoraConfig``, or one that is made already. Only the adapter and the critic are
        then trained. None: no new adapter.
    :param separate_critic: True: the value head is on a copy of the actor's decoder instead of sharing it. A directory
        or hub name of a reward model with the same tokenizer (``"builtin"``: the built-in one): the critic starts as
        that model, as in Stiennon et al. 2020 (https://arxiv.org/abs/2009.01325).
    :param value_bins: the lowest value, the highest value and their number, for a critic that predicts a distribution
        over so many values, by classification; its value is the mean (Farebrother et al. 2024,
        https://arxiv.org/abs/2403.03950). The range should be somewhat wider than that of the returns. None: the critic
        predicts the value itself, by regression.
    :param value_sigma: the width of the targets of ``value_bins``, in distances between two values: the standard
        deviation of HL-Gauss, for which the paper has 0.75. None: two-hot targets.
    :param prefix_cache: whether to cache keys and values of contexts between calls. The results are the same without.
    :param autocast: the name of the floating-point type of matrix products, such as ``"bfloat16"``, while the weights
        keep theirs; None: the type of the weights.
    :param decode: how texts are written with ``prefix_cache``: "eager", or "compiled", for which the forward pass that
        reads one new token of each text is compiled or, on CUDA, captured into graphs (see docs/performance.md). "auto"
        is "compiled" on CUDA and "eager" elsewhere.
    :param compile_forward: whether to run whole sequences through ``torch.compile``. Compiling takes minutes, so this
        pays in long trainings.
    :param gradient_checkpointing: whether to compute the layers once more in the backward pass instead of keeping what
        is inside them: less memory, about a third more time, the same gradient. A live model for which transformers'
        ``gradient_checkpointing_enable()`` was called needs no such argument.
    :param constraint: which tokens may follow a context: a callable ``(contexts, n_tokens) -> bool [B, n_tokens]``, its
        name as ``"module:function"``, or a list of these (see :mod:`text_env.constraints`). All other tokens have
        probability 0, in the rollout, in the update and in the reference. The algorithms of this package take it from
        the environment by default.
    :param tokenizer: the tokenizer that is saved with the model, normally the environment's; None: the model's own.
    :param use_sde: must be False; part of SB3's signature.
    :param optimizer_class: the class of the optimiser, or its name in transformers, such as ``"adamw_8bit"`` (see
        :func:`agents.policies.optimizers.optimizer_named`).
    :param optimizer_kwargs: the arguments of the optimiser besides the learning rate. Adam's eps is 1e-5 by default.
    :raises ValueError: if the spaces are not those of a text environment, if the model has fewer logits than V or fewer
        positions than the longest context has tokens, or if its tokenizer is not the environment's.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        model: str | Path | PretrainedConfig | PreTrainedModel | PeftModel = "builtin",
        dtype: str | torch.dtype = "float32",
        temperature: float = 1.0,
        min_new_tokens: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        lora: dict[str, Any] | LoraConfig | None = None,
        separate_critic: bool | str | Path = False,
        value_bins: Sequence[float] | None = None,
        value_sigma: float | None = 0.75,
        prefix_cache: bool = True,
        autocast: str | None = None,
        decode: str = "auto",
        compile_forward: bool = False,
        gradient_checkpointing: bool = False,
        constraint: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        use_sde: bool = False,
        optimizer_class: type[torch.optim.Optimizer] | str = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        check_spaces(observation_space, action_space, type(self).__name__)
        if use_sde:
            raise ValueError("use_sde=True is for continuous actions; tokens are discrete. Use use_sde=False.")
        if isinstance(optimizer_class, str):
            optimizer_class, named = optimizer_named(optimizer_class)
            optimizer_kwargs = {**named, **(optimizer_kwargs or {})}
        elif optimizer_class is torch.optim.Adam:
            # The fused optimiser makes one pass over the weights instead of a dozen. It can't be combined with foreach.
            given = optimizer_kwargs or {}
            optimizer_kwargs = {"eps": EPS, "fused": not given.get("foreach"), **given}
        # SB3's actor-critic constructors would build an MLP and re-initialise linear layers orthogonally.
        BasePolicy.__init__(
            self,
            observation_space,
            action_space,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
        self.use_sde = False
        self.share_features_extractor = not separate_critic
        self.constructor_arguments = {
            "model": model,
            "dtype": dtype,
            "temperature": temperature,
            "min_new_tokens": min_new_tokens,
            "eos_token_id": eos_token_id,
            "lora": lora,
            "separate_critic": separate_critic,
            "value_bins": value_bins,
            "value_sigma": value_sigma,
            "prefix_cache": prefix_cache,
            "autocast": autocast,
            "decode": decode,
            "compile_forward": compile_forward,
            "gradient_checkpointing": gradient_checkpointing,
            "constraint": constraint,
            "tokenizer": tokenizer,
        }
        assert isinstance(action_space, spaces.Discrete)
        own_tokenizer = tokenizer_beside(model)
        check_tokenizers(tokenizer, own_tokenizer, model)
        if tokenizer is None:
            check_vocabulary(int(action_space.n), own_tokenizer, model)
        self.tokenizer = tokenizer if tokenizer is not None else own_tokenizer
        loaded = load_causal_lm(model, dtype)
        base = unwrapped(loaded)
        longest = observation_space["input_ids"].shape[0]  # type: ignore[index]
        critic, value_head = make_critic(
            loaded, separate_critic, dtype, self.tokenizer, longest, value_bins, value_sigma
        )
        if lora is not None:
            loaded = add_lora(loaded, lora, model)
        check_positions(base, longest)
        distribution = TokenDistribution(
            int(action_space.n),
            temperature,
            eos_token_ids=as_ids(eos_token_id) or model_ends(base, self.tokenizer, int(action_space.n)),
            min_new_tokens=min_new_tokens,
            constraint=constraint,
            autocast=autocast,
        )
        self.lm = CausalLM(loaded, distribution, compile_forward, gradient_checkpointing)
        self.critic = critic
        self.value_head = value_head
        if self.lm.model.dtype == torch.float64:
            self.value_head.double()
        self._actor_memo = PrefixCache(self.lm.backbone, decode=decode) if prefix_cache else None
        self._critic_memo = PrefixCache(critic, decode=decode) if prefix_cache and critic is not None else None
        self._compared_with: TokenDistribution | None = None  # the latest reference's that is known to be the same
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        actor = [p for name, p in trained if is_actor(name, p)]
        critic = [p for name, p in trained if not is_actor(name, p)]
        # Apart, since the critic may have a learning rate of its own.
        groups = [{"params": parameters} for parameters in (actor, critic)]
        self.optimizer = self.optimizer_class(groups, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def set_learning_rates(self, actor: float, critic: float) -> None:
        """
        :param actor: the learning rate of the actor's weights, those of a decoder that it shares with the critic
            included.
        :param critic: that of the critic's own weights.
        """
        for group, rate in zip(self.optimizer.param_groups, (actor, critic), strict=True):
            group["lr"] = rate

    # ---- SB3's interface ------------------------------------------------------------------------------------------

    def forward(
        self, obs: PyTorchObs, deterministic: bool = False, action_masks: np.ndarray | torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose the next token of each context.

        :param obs: a batch of B observations.
        :param deterministic: whether to choose the most probable token instead of sampling one.
        :param action_masks: what the environment's ``action_masks()`` returns, [B, V], true where a token is allowed.
        :return: actions int64 [B], values [B, 1] and log-probabilities [B], in nats. On a CPU they are numbers; on
            another device NaN is found by whoever copies them, as
            :func:`agents.rollouts.collector.collect_episodes` does once a token.
        :raises FloatingPointError: if the policy runs on a CPU and its answers are NaN.
        """
        return self.write(contexts_of(obs), deterministic, action_masks)

    def write(
        self, contexts: Contexts, deterministic: bool = False, action_masks: np.ndarray | torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As :meth:`forward`, for whoever has the contexts themselves, which then need not be told from padding.

        :param contexts: B contexts.
        :param deterministic: as for :meth:`forward`.
        :param action_masks: as for :meth:`forward`.
        :return: as :meth:`forward`.
        :raises FloatingPointError: as :meth:`forward`.
        """
        hidden = self._last_hidden(contexts)
        actions, log_prob = self._choose(hidden, contexts, deterministic, action_masks)
        values = self._last_values(contexts, hidden)
        if self.lm.device.type == "cpu":
            self.check_numbers(contexts, log_prob, values)
        return actions, values, log_prob

    def evaluate_actions(
        self, obs: PyTorchObs, actions: torch.Tensor, action_masks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Score given actions.

        :param obs: a batch of B observations, or a packed batch of E whole episodes (with ``action_mask``, see
            ``EpisodeBuffer``).
        :param actions: token ids, [N]. N is B, or the number of true entries of ``action_mask``, in row-major order.
        :param action_masks: [N, V], true or 1 where a token was allowed.
        :return: values [N, 1], log-probabilities [N] and entropies [N], in nats.
        :raises ValueError: if the log-probabilities of a packed batch under the reference are of another distribution
            than the policy's.
        :raises FloatingPointError: if the policy's answers are NaN.
        """
        predictions, log_prob, entropy, _ = self.evaluate(obs, actions, action_masks)
        if bool(torch.isnan(log_prob.detach().sum() + predictions.detach().sum())):
            check_scores(log_prob, predictions, *self._sequences(obs), self)
        return self.value_head.values(predictions), log_prob, entropy

    def evaluate(
        self,
        obs: PyTorchObs,
        actions: torch.Tensor,
        action_masks: torch.Tensor | None = None,
        other: OtherLogits | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As :meth:`evaluate_actions`, with the critic's predictions in place of the values, which with ``value_bins``
        are only the means of the distributions that it predicts; and with a comparison of the distributions that the
        actions were chosen from with another model's. Whether the answers are NaN is for whoever reads them to see,
        since to look would be to wait for the device.

        :param obs: as for :meth:`evaluate_actions`.
        :param actions: as for :meth:`evaluate_actions`.
        :param action_masks: as for :meth:`evaluate_actions`.
        :param other: the other model's logits, such as ``Reference.logits_at`` returns; None: nothing is compared.
        :return: predictions [N, P], for :meth:`value_loss`; log-probabilities [N] and entropies [N], in nats; and
            KL(π ‖ other) at each context, [N], nats, with its gradient, or None.
        :raises ValueError: as :meth:`evaluate_actions`.
        """
        measured = getattr(obs, "distribution", None)
        if measured is not None and measured is not self._compared_with:
            self.distribution.check_same(measured, "policy", "reference")
            self._compared_with = measured
        input_ids, at = self._sequences(obs)
        log_prob, entropy, kl, hidden = self.lm.evaluate(input_ids, at, actions.long().flatten(), action_masks, other)
        if self.critic is not None:
            hidden = self.lm.run(self.critic, input_ids)[at.row, at.column]
        return self._predictions(hidden), log_prob, entropy, kl

    def evaluate_log_probs(self, obs: PyTorchObs, actions: torch.Tensor) -> torch.Tensor:
        """The log-probabilities that :meth:`evaluate_actions` gives, for which no critic is needed.

        :param obs: as for :meth:`evaluate_actions`.
        :param actions: as for :meth:`evaluate_actions`.
        :return: log-probabilities [N], in nats.
        """
        input_ids, at = self._sequences(obs)
        return self.lm.evaluate(input_ids, at, actions.long().flatten(), None, None)[0]

    def _sequences(self, obs: PyTorchObs) -> tuple[torch.Tensor, Positions]:
        """The fewest sequences that hold all contexts of a batch, and where."""
        assert isinstance(obs, Mapping)
        if "action_mask" in obs:
            return obs["input_ids"], packed_positions(obs)
        return share_prefixes(contexts_of(obs), self.lm.device)

    def value_loss(
        self, predictions: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float | None
    ) -> torch.Tensor:
        """The loss of the critic: half the squared error or, with ``value_bins``, the cross-entropy.

        :param predictions: what :meth:`evaluate` or :meth:`evaluate_critic` returned, [N, P]; [N] stands for [N, 1].
        :param old_values: the values at the time of sampling, [N]; constants.
        :param returns: the targets of the values, [N]; constants.
        :param clip_range: ε of value clipping, as for :func:`agents.objectives.losses.value_loss`; None: no clipping.
        :return: the loss of each token, [N].
        """
        return self.value_head.loss(predictions, old_values, returns, clip_range)

    def evaluate_values(self, obs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """
        :param obs: a packed batch of E whole episodes, as for :meth:`evaluate_actions`.
        :return: values, [N], with the gradient of :meth:`evaluate_critic`.
        """
        return self.value_head.values(self.evaluate_critic(obs)).flatten()

    def evaluate_critic(self, obs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Predictions that only the critic's own weights have a gradient of, not those of a decoder shared with the
        actor.

        :param obs: a packed batch of E whole episodes, as for :meth:`evaluate_actions`.
        :return: predictions, [N, P], for :meth:`value_loss`.
        """
        input_ids, at = obs["input_ids"], packed_positions(obs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.critic is not None):
            hidden = self.lm.run(self.lm.backbone if self.critic is None else self.critic, input_ids)[at.row, at.column]
        return self._predictions(hidden)

    def predict_values(self, obs: PyTorchObs) -> torch.Tensor:
        """
        :param obs: a batch of B observations.
        :return: values, [B, 1].
        """
        contexts = contexts_of(obs)
        values = self._last_values(contexts, None)
        self.check_numbers(contexts, None, values)
        return values

    def _predict(
        self,
        observation: PyTorchObs,
        deterministic: bool = False,
        action_masks: np.ndarray | torch.Tensor | None = None,
    ) -> torch.Tensor:
        # Nobody asks for the values of these contexts, for which a critic of its own would cost as much again.
        contexts = contexts_of(observation)
        actions, log_prob = self._choose(self._last_hidden(contexts), contexts, deterministic, action_masks)
        # SB3 copies the actions to the host next: a NaN comes with the same copy.
        host = torch.stack([actions.double(), log_prob.double()]).cpu()
        self.check_numbers(contexts, host[1], None)
        return host[0].long()

    def _choose(
        self,
        hidden: torch.Tensor,
        contexts: Contexts,
        deterministic: bool,
        action_masks: np.ndarray | torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of each context, [B], and its log-probability, [B]."""
        probs = torch.softmax(self._logits(hidden, contexts, action_masks), dim=-1)
        actions = probs.argmax(dim=-1) if deterministic else sample(probs)
        return actions, probs.gather(-1, actions[:, None]).squeeze(-1).log()

    def check_numbers(self, contexts: Contexts, log_prob: torch.Tensor | None, values: torch.Tensor | None) -> None:
        """
        :param contexts: B contexts.
        :param log_prob: what :meth:`forward` said of them [B]; None: not looked at.
        :param values: likewise, [B] or [B, 1].
        :raises FloatingPointError: if one of the numbers is NaN, naming the context and the first broken parameter.
        """
        for what, answers in (("log-probabilities", log_prob), ("values", values)):
            if answers is not None:
                check_numbers(answers, what, lambda row: contexts.input_ids[row, : contexts.length[row]], self)

    def train(self, mode: bool = True) -> Self:
        """Set training mode. SB3 calls this before it changes weights, so the cache is emptied. Dropout stays off.

        :param mode: whether training mode is set.
        :return: the policy.
        """
        if mode:  # SB3's `train` begins with this: the weights are about to change
            self.clear_cache()
        super().train(mode)
        if self.critic is not None:
            self.critic.eval()
        return self

    @property
    def distribution(self) -> TokenDistribution:
        """Everything except the weights that determines the probability of a token."""
        return self.lm.distribution

    def reset_noise(self, n_envs: int = 1) -> None:
        """Not supported, since it belongs to state-dependent exploration.

        :param n_envs: not used.
        :raises ValueError: always.
        """
        raise ValueError("reset_noise is for state-dependent exploration, which needs continuous actions.")

    @property
    def lstm_actor(self) -> Any:
        """The LSTM that sb3-contrib's ``RecurrentPPO`` asks for. There is none.

        :raises TypeError: always; it says what to use instead.
        """
        raise TypeError(  # nn.Module would replace the text of an AttributeError
            f"{type(self).__name__} has no LSTM, which RecurrentPPO asks for: a language model's memory is its "
            "context. Train it with PPO, or use RecurrentPPO('MultiInputLstmPolicy', env, "
            "policy_kwargs={'features_extractor_class': TokenFeatures})."
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        moved = super()._apply(fn, recurse)
        for memo in self._memos():  # which would otherwise keep the weights as they were until its next call
            memo.release()
        return moved

    def clear_cache(self) -> None:
        """Empty the cache of contexts. This is needed only after a change of weights that PyTorch does not register."""
        for memo in self._memos():
            memo.clear()

    def _memos(self) -> list[PrefixCache]:
        return [memo for memo in (self._actor_memo, self._critic_memo) if memo is not None]

    # ---- saving ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a plain Hugging Face directory of the model or its adapter and the tokenizer, and a file of the critic.

        :param directory: the directory, which is created if it does not exist.
            ``AutoModelForCausalLM.from_pretrained(directory)`` loads it.
        :raises FloatingPointError: if a parameter is not finite. Nothing is written then.
        """
        if broken := broken_parameters(self):
            raise FloatingPointError(
                f"Expected finite weights to save, got NaN or infinite numbers in {len(broken)} parameters, the first "
                f"of which is {broken[0]!r}. What {directory} holds was left as it is."
            )
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.lm.save_pretrained(directory)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)
        save_file(self._critic_state(), directory / VALUE_HEAD_FILE)

    def load_value_head(self, directory: str | Path) -> None:
        """Load the critic that :meth:`save_pretrained` wrote.

        :param directory: the directory.
        :raises ValueError: if the critic there is of another kind than this policy's, as one with another
            ``separate_critic`` or other ``value_bins`` is.
        """
        state, own = load_file(Path(directory) / VALUE_HEAD_FILE), self._critic_state()
        strange = set(state) ^ set(own) or {name for name in own if state[name].shape != own[name].shape}
        # The weights may differ, but not the values that the predictions stand for.
        fixed = () if strange else (f"value_head.{name}" for name, _ in self.value_head.named_buffers())
        strange |= {name for name in fixed if not torch.equal(state[name].float(), own[name].float().cpu())}
        if strange:
            raise ValueError(
                f"Expected {directory} to hold a critic like this policy's; they differ in {sorted(strange)[:3]}. Make "
                "the policy with the separate_critic and the value_bins that were saved."
            )
        self.load_state_dict(state, strict=False)
        self.clear_cache()

    def _critic_state(self) -> dict[str, torch.Tensor]:
        state = self.state_dict()
        return {name: x.contiguous() for name, x in state.items() if name.startswith(("value_head.", "critic."))}

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,  # SB3's placeholder, since schedules are often lambdas
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
            **self.constructor_arguments,
        }

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _last_hidden(self, contexts: Contexts) -> torch.Tensor:
        return self._memoised(self.lm.backbone, self._actor_memo, contexts)

    def _memoised(self, backbone: nn.Module, memo: PrefixCache | None, contexts: Contexts) -> torch.Tensor:
        """The hidden state at the end of each context, [B, H]; cached only where no gradient is needed."""
        if memo is not None and not torch.is_grad_enabled():
            with self.lm.precision():
                return memo.last_hidden(contexts)
        input_ids, at = share_prefixes(contexts, self.lm.device)
        return self.lm.run(backbone, input_ids)[at.row, at.column]

    def _last_values(self, contexts: Contexts, hidden: torch.Tensor | None) -> torch.Tensor:
        if self.critic is not None:
            hidden = self._memoised(self.critic, self._critic_memo, contexts)
        elif hidden is None:
            hidden = self._last_hidden(contexts)
        return self._values(hidden)

    def _values(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.value_head.values(self._predictions(hidden))

    def _predictions(self, hidden: torch.Tensor) -> torch.Tensor:
        predictions: torch.Tensor = self.value_head(hidden.to(self.value_head.weight.dtype))
        return predictions

    def _logits(
        self, hidden: torch.Tensor, contexts: Contexts, action_masks: np.ndarray | torch.Tensor | None
    ) -> torch.Tensor:
        return self.lm.logits(hidden, self._early(contexts), self.lm.allowed(contexts, action_masks))

    def _early(self, contexts: Contexts) -> torch.Tensor | None:
        """The steps of the contexts; None if none of them is too short to end. Most of the time, nothing is copied."""
        early = contexts.step < self.distribution.min_new_tokens
        if not early.any():
            return None
        if early.all():
            return torch.zeros(len(early), dtype=torch.int64, device=self.lm.device)
        return self._steps(contexts)

    def _finite_logits(self, obs: PyTorchObs, action_masks: np.ndarray | torch.Tensor | None = None) -> torch.Tensor:
        """Logits for PyTorch's distributions, whose KL divergence has no gradient at minus infinity."""
        contexts = contexts_of(obs)
        # The fused attention kernels can be differentiated only once, and an algorithm that differentiates a
        # distribution, as TRPO does, may do so twice. Without gradient the fast kernels are kept.
        twice = sdpa_kernel(SDPBackend.MATH) if torch.is_grad_enabled() else contextlib.nullcontext()
        with twice:
            hidden = self._last_hidden(contexts)
        logits = self._logits(hidden, contexts, action_masks)
        self.check_numbers(contexts, 0 * logits.detach().amax(dim=-1), None)  # NaN where a logit is NaN or infinite
        return logits.clamp(min=FORBIDDEN_LOGIT)

    def _steps(self, contexts: Contexts) -> torch.Tensor:
        return to_device(self.lm.device, contexts.step)[0]


class CausalLMPolicy(CausalLMActorCritic, ActorCriticPolicy):
    # For SB3's PPO and A2C, sb3-contrib's TRPO, and our own algorithms.
    __doc__ = CausalLMActorCritic.__doc__

    def get_distribution(self, obs: PyTorchObs) -> CategoricalDistribution:
        """
        :param obs: a batch of B observations.
        :return: SB3's categorical distribution over the V tokens. It can be differentiated twice.
        """
        logits = self._finite_logits(obs)
        if logits.requires_grad:
            logits.register_hook(self._check_names)
        return CategoricalDistribution(self.distribution.n_tokens).proba_distribution(logits)

    def _check_names(self, _: torch.Tensor) -> None:
        """Called when the distribution is differentiated. An algorithm that differentiates it twice, as TRPO does,
        selects the actor's parameters by their names, which must not look like a critic's.
        """
        misleading = [name for name, p in self.named_parameters() if is_actor(name, p) and "value" in name]
        if torch.is_grad_enabled() and misleading:
            raise ValueError(
                "TRPO takes a parameter with 'value' in its name for the critic's, and would never train "
                f"{misleading[0]!r}, one of {len(misleading)}: use agents.TRPOCausalLMPolicy, not CausalLMPolicy."
            )


def is_actor(name: str, parameter: nn.Parameter) -> bool:
    """
    :param name: the name of a parameter of the policy.
    :param parameter: the parameter.
    :return: whether it is trained as a part of the actor: neither frozen nor the critic's.
    """
    return parameter.requires_grad and not name.startswith(("value_head.", "critic."))


def load_policy(
    model: str | Path | PreTrainedModel | PeftModel,
    env: TextVectorEnv | VecEnv,
    device: str = "auto",
    dtype: str = "float32",
    temperature: float = 1.0,
    separate_critic: bool | str | Path = False,
    autocast: str | None = None,
    value_bins: Sequence[float] | None = None,
    value_sigma: float | None = 0.75,
) -> CausalLMPolicy:
    """Load a policy for evaluation and sampling.

    :param model: the model, as for ``CausalLMPolicy``, for example a directory that ``save_pretrained`` wrote.
    :param env: the environment, from which spaces, tokenizer, EOS, minimum length and constraint are taken.
    :param device: the device that the policy runs on.
    :param dtype: the floating-point type of the weights.
    :param temperature: the temperature of the policy's distribution; 1 gives that of the model itself.
    :param separate_critic: what the critic was made of, as for ``CausalLMPolicy``. Its weights are another matter:
        :meth:`CausalLMActorCritic.load_value_head` loads them.
    :param autocast: the floating-point type of matrix products, as for ``CausalLMPolicy``.
    :param value_bins: what the critic predicts, as for ``CausalLMPolicy``.
    :param value_sigma: likewise.
    :return: the policy.
    :raises ValueError: for the reasons of ``CausalLMPolicy``.
    """
    env = plain(env)
    policy = CausalLMPolicy(
        env.single_observation_space,
        env.single_action_space,
        lambda _: 0.0,
        model=model,
        dtype=dtype,
        temperature=temperature,
        min_new_tokens=env.min_new_tokens,
        constraint=env.constraint,
        eos_token_id=env.eos_token_ids,
        separate_critic=separate_critic,
        autocast=autocast,
        value_bins=value_bins,
        value_sigma=value_sigma,
        tokenizer=env.tokenizer,
    )
    return policy.to(get_device(device))
