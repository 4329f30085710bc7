"""A rollout buffer that stores every token once.

An episode is one stream of tokens, some of which the policy chose. The others are context and have no loss: the prompt,
the beginning of a response that a reset was given, the beginning of an episode that an n-step rollout has cut, and
whatever an environment writes between two actions. Tokens are appended as they come, from all live rows, each with the
number of its *segment*, which is an episode or the rest of an episode that was cut. Once the rollout is over, a stable
sort puts the segments one after the other. A minibatch is a packed batch of whole segments.

The buffer can be used as ``rollout_buffer_class`` of SB3's on-policy algorithms. It subtracts the KL penalty from the
reward both for these and for the algorithms of this package: r_t = −β k_t, plus the environment's reward, where k_t
estimates the KL divergence of the policy from the reference at token t. By default k_t is the estimator k1, log π_old −
log π_ref.

The exact divergence is for the algorithms of this package only, since half of its gradient is a term of their loss.
With KL_t = KL(π ‖ π_ref) at context s_t, the gradient of −β E[Σ_t KL_t] is

    −β Σ_t E[∇ log π(a_t) Σ_{t' > t} KL_t'  +  ∇KL_t].

So an action pays for the divergence of the context that it leads to, r_t = −β KL_{t+1}; the first context's is no
action's reward; and the loss has β KL_t at each token.

Notation: E segments, M tokens of all streams, N actions among them.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

from agents.models.causal_lm import OtherLogits, Positions
from agents.models.contexts import Contexts, check_spaces, contexts_of, packed_positions
from agents.models.distribution import TokenDistribution
from agents.models.finite import check_scores
from agents.models.pretrained import check_vocabulary
from agents.models.reference import Reference
from agents.models.sizes import sizes_of
from agents.models.transfers import to_device
from agents.objectives.advantages import gae
from agents.objectives.kl import KL_ESTIMATORS, FixedKL, KLController, KLEstimator, SampledKL
from agents.policies.causal_lm_policy import CausalLMActorCritic
from text_env.prompts import Prompt


class EpisodeSamples(NamedTuple):
    """A packed batch of E whole episodes with N actions: SB3's ``RolloutBufferSamples``, log π_ref, and the scores.

    All tensors but ``observations`` have one entry per action, row by row. They are float32 [N], except for
    ``actions``.

    :param observations: ``input_ids``, int64 [E, T], right-padded, without the last action of each episode, which no
        action follows; ``action_mask``, bool [E, T], true where an action follows; ``prompt_length``, int64 [E, 1].
    :param actions: token ids, int64 [N].
    :param old_values: the values at the time of sampling.
    :param old_log_prob: log π_old, the log-probabilities at the time of sampling.
    :param advantages: the advantages, as the algorithm estimates them.
    :param returns: the targets of the value function.
    :param ref_log_prob: log π_ref, the log-probabilities under the reference; equal to ``old_log_prob`` if there is no
        reference.
    :param scores: the score of the text that the action belongs to; NaN where it isn't known.
    """

    observations: dict[str, torch.Tensor]
    actions: torch.Tensor
    old_values: torch.Tensor
    old_log_prob: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    ref_log_prob: torch.Tensor
    scores: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """int64 [E], the number of actions of each episode, in the order of the batch."""
        return self.observations["action_mask"].sum(dim=1)


class PackedObservations(dict[str, torch.Tensor]):
    """The observations of a packed batch, together with the positions of its actions, and with the distribution of its
    log-probabilities under the reference.

    :param tensors: the observations, as in :class:`EpisodeSamples`.
    :param at: the positions of the actions, as ``action_mask`` has them.
    :param distribution: the reference's distribution, which a policy compares with its own; None if there is no
        reference.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], at: Positions, distribution: TokenDistribution | None
    ) -> None:
        super().__init__(tensors)
        self.at = at
        self.distribution = distribution


class _Column:
    """An array that grows by doubling its storage."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._data = np.empty(1024, dtype=dtype)
        self._size = 0

    def extend(self, values: Any) -> None:
        end = self._size + len(values)
        if end > len(self._data):
            self._data = np.resize(self._data, max(end, 2 * len(self._data)))
        self._data[self._size : end] = values
        self._size = end

    @property
    def array(self) -> np.ndarray:
        return self._data[: self._size]


class EpisodeBuffer(RolloutBuffer):
    """A rollout buffer of episodes, whose memory is proportional to the number of tokens.

    :param buffer_size: the number of steps of each environment row in an n-step rollout, SB3's ``n_steps``. 0: no
        limit, for the algorithms of this package, which collect whole episodes.
    :param observation_space: the observation space of the text environment.
    :param action_space: the action space of the text environment.
    :param device: the device of the samples.
    :param gae_lambda: λ of generalized advantage estimation.
    :param gamma: the discount γ.
    :param n_envs: the number of environment rows.
    :param reference: the frozen model that the KL penalty refers to; None: no penalty. The name of a model stands for
        ``Reference.load(name)``. For a policy with a temperature, a minimum length or a constraint, pass
        ``Reference.load(name, ..., temperature=...)``, since a policy refuses batches of a reference with another
        distribution.
    :param kl_coef: β, the coefficient of the KL penalty, or the controller that has it. Only the algorithms of this
        package update a controller. With 0 the KL divergence is measured without a penalty.
    :param kl_estimator: the estimator k of the penalty: ``"k1"``, ``"k2"`` or ``"k3"`` (see
        :mod:`agents.objectives.kl`); None: no penalty. Only the policy gradient of k1 is that of the KL divergence
        (``docs/ppo.md``). The algorithms of this package set it to ``"exact"`` where they are told so.
    :raises ValueError: for another estimator, for spaces that are not the text environment's, or if the tokenizer of a
        reference that is given by name has another number of tokens.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "auto",
        gae_lambda: float = 0.95,
        gamma: float = 1.0,
        n_envs: int = 1,
        reference: Reference | str | None = None,
        kl_coef: float | KLController = 0.04,
        kl_estimator: KLEstimator | None = "k1",
    ) -> None:
        check_spaces(observation_space, action_space, "EpisodeBuffer")
        if isinstance(reference, str):
            assert isinstance(action_space, spaces.Discrete)
            name, n_tokens = reference, int(action_space.n)
            reference = Reference.load(name, n_tokens=n_tokens, device=device)
            check_vocabulary(n_tokens, reference.tokenizer, name)
        self.reference = reference
        self.kl: KLController = FixedKL(kl_coef) if isinstance(kl_coef, int | float) else kl_coef
        if kl_estimator == "exact":
            raise ValueError(
                "Expected kl_estimator to be 'k1', 'k2' or 'k3', got 'exact': half of its gradient is a term of the "
                "loss, which SB3's algorithms don't have. Use it with an algorithm of this package, as in "
                "agents.PPO(..., kl_estimator='exact')."
            )
        self.kl_estimator = kl_estimator
        super().__init__(buffer_size, observation_space, action_space, device, gae_lambda, gamma, n_envs)

    @property
    def kl_estimator(self) -> KLEstimator | None:
        """The estimator of the KL penalty; None where there is no penalty."""
        return self._kl_estimator

    @kl_estimator.setter
    def kl_estimator(self, kl_estimator: KLEstimator | None) -> None:
        if kl_estimator is not None and kl_estimator not in get_args(KLEstimator):
            raise ValueError(f"Expected kl_estimator to be one of {get_args(KLEstimator)}, got {kl_estimator!r}.")
        self._kl_estimator = kl_estimator

    @property
    def kl_coef(self) -> float:
        """β, the current coefficient of the KL penalty. Setting it sets the controller's."""
        return self.kl.coef

    @kl_coef.setter
    def kl_coef(self, coef: float) -> None:
        self.kl.coef = coef

    # ---- filling --------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Empty the buffer."""
        self.pos = 0
        self.full = False
        self._n_segments = 0
        self._open = np.full(self.n_envs, -1, dtype=np.int64)  # the segment of each row; −1: none
        self._written = np.zeros(self.n_envs, dtype=np.int64)  # the number of tokens in each row's stream so far
        self._latest = np.zeros(self.n_envs, dtype=np.int64)  # the latest action of each row
        self._prompt_lengths: list[int] = []
        self.prompts: list[Prompt] = []  # of each episode, if whoever fills the buffer says so
        self._stream = {
            "segment": _Column(np.int32),
            "token": _Column(np.int32),
            "is_action": _Column(np.bool_),
        }
        self._logged = {name: _Column(np.float32) for name in ("rewards", "values", "log_probs")}
        self._laid_out = self._finalized = False
        self.exact_kl: np.ndarray | None = None  # float32 [N], nats; None where no exact divergence is paid
        self.kl_penalty: np.ndarray = np.zeros(0, dtype=np.float32)  # [N], that the rewards pay already
        self._ref_hidden: torch.Tensor | None = None  # [N, H], likewise

    def add(  # type: ignore[override]
        self,
        obs: Mapping[str, np.ndarray] | Contexts,
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: torch.Tensor | np.ndarray,
        log_prob: torch.Tensor | np.ndarray,
        rows: np.ndarray | None = None,
    ) -> None:
        """Append one transition of each of B rows.

        :param obs: the observations before the action, or the contexts that they show.
        :param action: token ids, [B] or [B, 1].
        :param reward: the environment's rewards, [B].
        :param episode_start: bool [B], true where this is the first step of an episode.
        :param value: the values of the observations, [B] or [B, 1].
        :param log_prob: the log-probabilities of the actions, [B].
        :param rows: int [B], the numbers of the environment rows; None: all of them.
        :raises ValueError: if a context does not extend the previous one of its row, or not by the action that was
            chosen there, though no episode starts there.
        """
        rows = np.arange(self.n_envs) if rows is None else rows
        for row in rows[np.asarray(episode_start, dtype=bool) | (self._open[rows] < 0)]:
            self._open[row] = self._n_segments
            self._n_segments += 1
            self._written[row] = 0
        self._add_context(obs, rows)
        action = np.asarray(action).reshape(-1)
        self._extend_stream(self._open[rows], action, True)
        self._written[rows] += 1
        self._latest[rows] = action
        self._logged["rewards"].extend(reward)
        self._logged["values"].extend(_flat(value))
        self._logged["log_probs"].extend(_flat(log_prob))
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def _add_context(self, obs: Mapping[str, np.ndarray] | Contexts, rows: np.ndarray) -> None:
        """Append the tokens of the observations that are not yet in the streams: first all of them, later few."""
        written = self._written[rows]
        lengths = obs.length if isinstance(obs, Contexts) else _lengths(obs["attention_mask"], written)
        if (shorter := lengths < written).any():
            raise ValueError(
                f"Expected every context to go on from the one before it; those of rows {rows[shorter].tolist()} "
                "became shorter, though no episode started there."
            )
        input_ids = obs.input_ids if isinstance(obs, Contexts) else obs["input_ids"]
        read = input_ids[np.arange(len(rows)), np.maximum(written, 1) - 1]
        if (other := (written > 0) & (read != self._latest[rows])).any():
            first = int(other.argmax())
            raise ValueError(
                f"Expected every context to go on with the action that was chosen, got token {int(read[first])} after "
                f"action {int(self._latest[rows[first]])} in row {rows[first]}: a wrapper writes other tokens than the "
                "policy chooses, so that its log-probabilities are not those of the text. Leave it out."
            )
        longer = np.flatnonzero(lengths > written)
        if len(longer) == 0:
            return
        if isinstance(obs, Contexts):
            input_ids, length, step = (array[longer] for array in obs)
        else:
            input_ids, length, step = contexts_of({name: array[longer] for name, array in obs.items()})
        for i, row in enumerate(rows[longer]):
            if self._written[row] == 0:
                self._prompt_lengths.append(int(length[i] - step[i]))
            tokens = input_ids[i, self._written[row] : length[i]]
            self._extend_stream(np.full(len(tokens), self._open[row]), tokens, False)
        self._written[rows[longer]] = length

    def _extend_stream(self, segment: np.ndarray, tokens: np.ndarray, is_action: bool | np.ndarray) -> None:
        self._stream["segment"].extend(segment)
        self._stream["token"].extend(tokens)
        self._stream["is_action"].extend(np.broadcast_to(is_action, len(tokens)))

    def extend(self, other: EpisodeBuffer, episodes: np.ndarray | None = None) -> None:
        """Append episodes of another buffer, for rollouts that are put together from several.

        :param other: a buffer of whole episodes, which is not changed. Its first episode becomes number ``n_episodes``
            of this buffer.
        :param episodes: int [E], the numbers of the episodes to append, in ascending order; None: all of them.
        :raises ValueError: if :meth:`finalize` has been called for one of the buffers, or if the other one holds an
            unfinished episode.
        """
        if self._laid_out or other._laid_out:
            raise ValueError("Expected two buffers that are still being filled: extend before finalize().")
        if (other._open >= 0).any():
            raise ValueError(
                f"Expected a buffer of whole episodes; those of rows {np.flatnonzero(other._open >= 0).tolist()} are "
                "not over: close() them first."
            )
        episodes = np.arange(other.n_episodes) if episodes is None else episodes
        number = np.full(other.n_episodes, -1)  # of each of their episodes in this buffer; −1: left out
        number[episodes] = self._n_segments + np.arange(len(episodes))
        segment, tokens, is_action = (column.array for column in other._stream.values())
        wanted = number[segment] >= 0
        self._extend_stream(number[segment[wanted]], tokens[wanted], is_action[wanted])
        for name, column in self._logged.items():
            column.extend(other._logged[name].array[wanted[is_action]])
        self._prompt_lengths += [other._prompt_lengths[episode] for episode in episodes]
        if other.prompts:
            self.prompts += [other.prompts[episode] for episode in episodes]
        self._n_segments += len(episodes)

    def close(self, row: int) -> int:
        """Mark a row's episode as finished.

        :param row: the number of the row.
        :return: the number of the episode's segment, in the order in which segments were started.
        """
        segment = int(self._open[row])
        self._open[row] = -1
        return segment

    # ---- laying out -----------------------------------------------------------------------------------------------

    def finalize(self, policy: CausalLMActorCritic | None = None) -> None:
        """Sort the tokens by segment, compute log-probabilities under the reference, and apply the KL penalty.

        :param policy: the policy that sampled, which the estimator ``"exact"`` needs; the others don't.
        :raises ValueError: if the reference gives a sampled token probability 0, or if the policy is missing.
        """
        if self._finalized:
            return
        if self.reference is not None and policy is None and self.kl_estimator == "exact" and self.kl_coef > 0:
            raise ValueError(
                "Expected finalize(policy) for kl_estimator='exact', which needs the policy's whole distributions and "
                "a term of the loss. Use 'k1' with SB3's algorithms, or an algorithm of this package."
            )
        self._lay_out()
        self._finalized = True
        self.kl_penalty = np.zeros_like(self.rewards)
        if self.reference is not None:
            self._compare(self.reference, policy if self.kl_estimator == "exact" and self.kl_coef > 0 else None)
            if not np.isfinite(self.log_ratio).all():
                raise ValueError(
                    "The reference gives probability 0 to a token that the policy sampled, so the KL is infinite. "
                    "Expected policy and reference under the same constraint, a pure function of contexts."
                )
            if self.exact_kl is not None:
                next_kl = np.append(self.exact_kl[1:], np.float32(0))
                next_kl[self.starts[1:] - 1] = 0  # no context follows the last action of an episode
                self.kl_penalty = self.kl_coef * next_kl
            elif self.kl_estimator is not None and self.kl_estimator != "exact":
                self.kl_penalty = self.kl_coef * self.token_kl(self.kl_estimator)
        self.rewards = self.rewards - self.kl_penalty

    @torch.no_grad()
    def score(self, policy: CausalLMActorCritic) -> None:
        """Take values and log-probabilities from a policy, for actions that another program has sampled, whose own
        log-probabilities remain as ``behaviour_log_probs``. This must be done before :meth:`finalize`.

        :param policy: the policy, such as it is going to be trained.
        :raises ValueError: if the policy gives probability 0 to a token that was sampled.
        """
        self._lay_out()
        values, log_probs = np.zeros_like(self.values), np.zeros_like(self.log_probs)
        for batch in self.batches(np.arange(self.n_episodes)):
            samples, index = self.pack(batch), self._token_index(batch)
            scores = policy.evaluate_actions(samples.observations, samples.actions)
            values[index], log_probs[index] = _flat(scores[0]), _flat(scores[1])
        self.behaviour_log_probs, self.log_probs, self.values = self.log_probs, log_probs, values
        if not np.isfinite(self.log_probs).all():
            wrong = self.actions[~np.isfinite(self.log_probs)]
            raise ValueError(
                f"The policy gives probability 0 to tokens that were sampled for it, token {wrong[0]} first: expected "
                "them from the policy's own distribution, with its minimum length and its constraint."
            )

    def _lay_out(self) -> None:
        """Sort the tokens by segment. From then on segments can be packed, and nothing can be added."""
        if self._laid_out:
            return
        segment, tokens, is_action = (column.array for column in self._stream.values())
        order = np.argsort(segment, kind="stable")
        self.tokens, self.is_action = tokens[order], is_action[order]  # [M]
        self.stream_starts = np.concatenate([[0], np.cumsum(np.bincount(segment, minlength=self._n_segments))])
        segment = segment[is_action]  # the segment of each of the N actions
        order = np.argsort(segment, kind="stable")
        self.values = self._logged["values"].array[order]
        self.log_probs = self._logged["log_probs"].array[order]
        self.behaviour_log_probs = self.log_probs  # log μ, of whoever sampled; log_probs are log π_old
        self.rewards = self._logged["rewards"].array[order]  # the KL penalty is subtracted later
        self.lengths = np.bincount(segment, minlength=self._n_segments)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        del self._stream, self._logged
        self._laid_out = True
        self.advantages = np.zeros_like(self.rewards)
        self.returns = np.zeros_like(self.rewards)
        # What only the environment knows of an episode; whoever collects whole episodes sets it.
        self.scores = np.full(self.n_episodes, np.nan, dtype=np.float32)
        self.truncated = np.zeros(self.n_episodes, dtype=bool)  # cut by the response budget
        self.log_ratio = np.zeros_like(self.rewards)  # log π_old − log π_ref

    @torch.no_grad()
    def _compare(self, reference: Reference, policy: CausalLMActorCritic | None) -> None:
        """Measure how much more probable the policy finds its actions than the reference does. With a policy, measure
        the exact divergence as well, and keep the reference's hidden states for the loss. The host waits for the device
        once, after the last batch.
        """
        batches = list(self.batches(np.arange(self.n_episodes)))
        index = np.concatenate([self._token_index(batch) for batch in batches])
        measured: list[list[torch.Tensor]] = []
        hidden: list[torch.Tensor] = []
        for batch in batches:
            samples = self.pack(batch)
            if policy is None:
                measured.append([reference.log_probs(samples.observations, samples.actions)])
            else:
                scores = reference.scores(samples.observations, samples.actions)
                other = reference.logits_at(scores.hidden)
                kl = policy.evaluate(samples.observations, samples.actions, other=other)[3]
                assert kl is not None
                measured.append([scores.log_prob, kl.to(scores.log_prob)])
                hidden.append(scores.hidden)
        numbers = torch.stack([torch.cat(column) for column in zip(*measured, strict=True)]).cpu().numpy()
        if np.isnan(numbers).any():
            for batch in batches:  # once more, to say where
                observations, actions = self.pack(batch)[:2]
                log_prob = reference.log_probs(observations, actions)
                check_scores(log_prob, None, observations["input_ids"], packed_positions(observations), reference.lm)
                if policy is not None:
                    policy.evaluate_actions(observations, actions)
        self.log_ratio[index] = self.log_probs[index] - numbers[0]
        if policy is not None:
            self.exact_kl = np.zeros_like(self.rewards)
            self.exact_kl[index] = numbers[1]
            order = np.empty_like(index)
            order[index] = np.arange(len(index))
            together = torch.cat(hidden)
            self._ref_hidden = together[to_device(together.device, order)[0]]

    def ref_logits(self, episodes: np.ndarray) -> OtherLogits | None:
        """
        :param episodes: int [E], the numbers of the episodes of a packed batch.
        :return: the reference's logits at its N actions, which the exact divergence in the loss is made of; None where
            the loss has no such term.
        """
        if self._ref_hidden is None:
            return None
        assert self.reference is not None
        [index] = to_device(self._ref_hidden.device, self._token_index(episodes))
        return self.reference.logits_at(self._ref_hidden[index])

    def token_kl(self, estimator: SampledKL) -> np.ndarray:
        """
        :param estimator: ``"k1"``, ``"k2"`` or ``"k3"``.
        :return: the estimate of KL(π_old ‖ π_ref) at each action, float32 [N], nats; 0 if there is no reference.
        """
        log_ratio = torch.from_numpy(self.log_ratio).double()  # so that rounding can't make k3 negative
        return KL_ESTIMATORS[estimator](log_ratio).float().numpy()

    @property
    def n_episodes(self) -> int:
        """The number E of segments in the buffer."""
        return self._n_segments

    @property
    def n_tokens(self) -> int:
        """The number N of actions in the buffer."""
        return len(self.actions)

    @property
    def nbytes(self) -> int:
        """The memory of the stored rollout, in bytes."""
        streams = (self.tokens, self.is_action, self.stream_starts)
        logged = (self.values, self.log_probs, self.rewards, self.lengths, self.starts)
        derived = (self.advantages, self.returns, self.log_ratio)
        exact = [array for array in (self.exact_kl, self._ref_hidden) if array is not None]
        return sum(array.nbytes for array in (*streams, *logged, *derived, *exact))

    @property
    def actions(self) -> np.ndarray:  # type: ignore[override]
        """int32 [N], the tokens that the policy chose, episode by episode."""
        actions: np.ndarray = self.tokens[self.is_action]
        return actions

    @property
    def mask(self) -> np.ndarray:
        """bool [E, T], true where an episode has an action; T is the largest number of actions of an episode."""
        mask: np.ndarray = np.arange(self.lengths.max()) < self.lengths[:, None]
        return mask

    def padded(self, flat: np.ndarray) -> np.ndarray:
        """
        :param flat: one number per action, [N].
        :return: the numbers with one episode per row, [E, T], 0 on padding.
        """
        mask = self.mask
        out = np.zeros(mask.shape, dtype=flat.dtype)
        out[mask] = flat
        return out

    def episode_sums(self, flat: np.ndarray) -> np.ndarray:
        """
        :param flat: one number per action, [N].
        :return: the sum over each episode, [E].
        """
        return np.add.reduceat(flat, self.starts[:-1])

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: np.ndarray) -> None:
        """Finalize the buffer and estimate advantages and returns by generalized advantage estimation.

        :param last_values: the values of the observations after the last step, [n_envs].
        :param dones: bool [n_envs], true where the last step ended an episode.
        """
        bootstrap = np.zeros(self._n_segments, dtype=np.float32)
        cut = (self._open >= 0) & ~np.asarray(dones, dtype=bool)
        bootstrap[self._open[cut]] = _flat(last_values)[cut]
        self.finalize()
        self.estimate_gae(self.gamma, self.gae_lambda, bootstrap)

    def estimate_gae(
        self,
        gamma: float,
        gae_lambda: float | np.ndarray,
        last_values: np.ndarray | None = None,
        gae_lambda_value: float | None = None,
    ) -> None:
        """Set ``advantages`` and ``returns`` by generalized advantage estimation.

        :param gamma: the discount γ.
        :param gae_lambda: λ, one number or one for each segment, [E].
        :param last_values: the value of the context after the last step of each segment, [E]; None: 0, since all
            episodes have terminated.
        :param gae_lambda_value: λ of ``returns``, the critic's targets; None: ``gae_lambda``.
        """
        mask = self.mask
        last_values = np.zeros(self.n_episodes) if last_values is None else last_values
        rewards, values = self.padded(self.rewards), self.padded(self.values)
        advantages, returns = gae(rewards, values, last_values, mask, gamma, gae_lambda)
        if gae_lambda_value is not None:
            _, returns = gae(rewards, values, last_values, mask, gamma, gae_lambda_value)
        self.advantages = advantages[mask].astype(np.float32)
        self.returns = returns[mask].astype(np.float32)

    # ---- handing out ----------------------------------------------------------------------------------------------

    def response_before(self, episode: int, action: int) -> np.ndarray:
        """
        :param episode: the number of an episode.
        :param action: the number of one of its actions, from 0.
        :return: int32, the tokens of the response before that action. With the episode's prompt they are the state in
            which the action was chosen, from which a reset can go on.
        """
        start, end = self.stream_starts[episode : episode + 2]
        chosen = start + np.flatnonzero(self.is_action[start:end])
        response: np.ndarray = self.tokens[start + self._prompt_lengths[episode] : chosen[action]]
        return response

    def pack(self, episodes: np.ndarray) -> EpisodeSamples:
        """
        :param episodes: int [E], the numbers of the episodes, in the order of the batch.
        :return: the packed batch of these episodes, on the buffer's device, where it is copied in one transfer.
        """
        size = self._stream_lengths[episodes] - 1  # no action follows the last one
        columns = np.arange(size.max())
        real = columns < size[:, None]  # [E, T]
        first = self.stream_starts[episodes]
        stream = np.concatenate([np.arange(start, start + n) for start, n in zip(first, size, strict=True)])
        # Padding repeats the first token; causal attention never looks at it.
        input_ids = np.repeat(self.tokens[first][:, None], len(columns), axis=1).astype(np.int64)
        input_ids[real] = self.tokens[stream]
        action_mask = np.zeros(real.shape, dtype=bool)
        action_mask[real] = self.is_action[stream + 1]
        prompt_length = np.array([self._prompt_lengths[e] for e in episodes])
        row, column = np.nonzero(action_mask)
        index = self._token_index(episodes)
        observations = input_ids, action_mask, prompt_length[:, None]
        at = row, column, column + 1 - prompt_length[row]
        per_action = (
            self.actions[index].astype(np.int64),
            self.values[index],
            self.log_probs[index],
            self.advantages[index],
            self.returns[index],
            self.log_probs[index] - self.log_ratio[index],
            np.repeat(self.scores[episodes], self.lengths[episodes]),
        )
        tensors = to_device(torch.device(self.device), *observations, *at, *per_action)
        return EpisodeSamples(
            PackedObservations(
                dict(zip(("input_ids", "action_mask", "prompt_length"), tensors, strict=False)),
                Positions(*tensors[3:6]),
                getattr(self.reference, "distribution", None),
            ),
            *tensors[6:],
        )

    def batches(self, episodes: np.ndarray, max_tokens: int | None = None) -> list[np.ndarray]:
        """Split episodes into batches of similar length within a budget of tokens, padding included, such that padding
        and forward passes together cost as little as possible.

        :param episodes: int [E], the numbers of the episodes.
        :param max_tokens: the budget; None: what suits the device. An episode that exceeds it is a batch of its own.
        :return: batches of episode numbers, which together hold every episode once, the longest episodes first.
        """
        _, pass_tokens, pass_overhead = sizes_of(torch.device(self.device))
        size = self._stream_lengths[episodes]
        order = np.argsort(-size, kind="stable")
        starts = cheapest_split(size[order], pass_tokens if max_tokens is None else max_tokens, pass_overhead)
        return np.split(episodes[order], starts)

    def get(self, batch_size: int | None = None) -> Generator[EpisodeSamples, None, None]:  # type: ignore[override]
        """Shuffled packed minibatches, for SB3's ``train()``.

        :param batch_size: the number of actions of a minibatch. Whole segments are added until it is reached. None: one
            batch of everything.
        :return: an iterator over packed batches.
        """
        order = np.random.permutation(self.n_episodes)
        if batch_size is None:
            yield self.pack(order)
            return
        tokens = np.cumsum(self.lengths[order])
        # A segment belongs to the minibatch in which it starts.
        number = (tokens - self.lengths[order]) // batch_size
        for part in np.split(order, np.flatnonzero(np.diff(number)) + 1):
            yield self.pack(part)

    @property
    def _stream_lengths(self) -> np.ndarray:
        """int64 [E], the number of tokens of each stream."""
        lengths: np.ndarray = np.diff(self.stream_starts)
        return lengths

    def _token_index(self, episodes: np.ndarray) -> np.ndarray:
        """The indices of the actions of these segments in the flat arrays."""
        return np.concatenate([np.arange(self.starts[e], self.starts[e + 1]) for e in episodes])


def cheapest_split(size: np.ndarray, budget: int, overhead: int) -> np.ndarray:
    """Split a sequence of texts into batches, each of which is padded to its longest text.

    :param size: int64 [E], the lengths of the texts, in descending order.
    :param budget: the number of tokens that a batch of several texts may have, padding included.
    :param overhead: what a batch costs besides its tokens, in tokens.
    :return: int64, where the second batch and those after it start. No other split costs less.
    """
    cost = np.zeros(len(size) + 1, dtype=np.int64)  # of the first i texts, split as well as can be
    start = np.zeros(len(size) + 1, dtype=np.int64)  # of the last batch among these
    for end in range(1, len(size) + 1):
        count = np.arange(end, 0, -1)  # texts of the last batch, for each place where it may start
        tokens = count * size[:end]
        total = np.where((tokens <= budget) | (count == 1), cost[:end] + tokens + overhead, np.iinfo(np.int64).max)
        start[end] = total.argmin()
        cost[end] = total[start[end]]
    starts = []
    while (end := start[end]) > 0:
        starts.append(end)
    return np.array(starts[::-1], dtype=np.int64)


def _lengths(mask: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The lengths of contexts, as far as it matters whether they are the expected ones; seen from two columns."""
    index, last = np.arange(len(mask)), mask.shape[1] - 1
    shorter = (expected > 0) & (mask[index, expected - 1] == 0)
    longer = (expected <= last) & (mask[index, np.minimum(expected, last)] != 0)
    lengths: np.ndarray = expected - shorter + longer
    return lengths


def _flat(array: torch.Tensor | np.ndarray) -> np.ndarray:
    values = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
    return values.reshape(-1)
