"""A critic under the microscope: its values beside what really follows.

An episode may start in the middle of a response, so what a state is worth can be found out: the policy writes on from
it, m times, and the mean of what these *branches* are paid is compared with the value. That is done at several
positions of held-out texts, and for *siblings*: two states that share a prefix, of which each goes on with another
segment that the policy wrote. Which of the two is worth more is what advantages are made of. Kazemnejad et al. 2025
(VinePPO, https://arxiv.org/abs/2410.01679, section 7) find that the critics of reasoning models hardly know, and that
few branches do, so branches are put to the same question here.

Notation: E texts; P positions of each; m branches of a state.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from agents.evaluation.evaluate import draw_prompts
from agents.evaluation.intervals import bootstrap_interval, finite, wilson_interval
from agents.evaluation.value_figures import calibration_bins, decided_pairs, ordered_right, value_figures
from agents.models.reference import Reference
from agents.objectives.advantages import discounted_returns
from agents.objectives.kl import KLEstimator
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.collector import collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer
from text_env.prompts import Prompt
from text_env.settings import check_integer
from text_env.vector_env import TextVectorEnv, plain


@dataclass(frozen=True)
class CriticTarget:
    """What a critic was trained to predict: the discounted sum of the rewards that follow a state, with all that the
    training adds to the environment's.

    :param reference: the frozen model that the KL penalty refers to; None: there is no penalty.
    :param kl_coef: β, the coefficient of the KL penalty.
    :param kl_estimator: the estimator of the penalty.
    :param missing_eos_penalty: what a text is paid less that the response budget has cut off.
    :param gamma: the discount γ.
    """

    reference: Reference | None = None
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k1"
    missing_eos_penalty: float = 0.0
    gamma: float = 1.0

    def returns(self, buffer: EpisodeBuffer, infos: list[dict[str, Any]]) -> np.ndarray:
        """
        :param buffer: n episodes, which are finalized: the KL penalty is paid.
        :param infos: their final infos.
        :return: the return that follows the state in which each episode was started, float64 [n].
        """
        rewards = buffer.rewards.astype(np.float64)
        cut = np.array([info["finish_reason"] == "length" for info in infos])
        rewards[buffer.starts[1:][cut] - 1] -= self.missing_eos_penalty
        nothing = np.zeros(buffer.n_episodes)
        first: np.ndarray = discounted_returns(buffer.padded(rewards), nothing, buffer.mask, self.gamma)[:, 0]
        return first


class State(NamedTuple):
    """A state on the way from a prompt to a text.

    :param text: the number of the text.
    :param position: the number of the position on the text.
    :param prompt: the prompt.
    :param response: the tokens of the response so far.
    """

    text: int
    position: int
    prompt: Prompt
    response: list[int]


class Branches(NamedTuple):
    """What the policy wrote on from S states, m times from each.

    :param values: the critic's values of the states, float64 [S].
    :param returns: what followed, float64 [S, m].
    :param tokens: the tokens that the policy chose, S lists of m texts.
    """

    values: np.ndarray
    returns: np.ndarray
    tokens: list[list[list[int]]]


def examine_critic(
    policy: CausalLMPolicy,
    env: TextVectorEnv | VecEnv,
    target: CriticTarget,
    n_texts: int = 32,
    n_positions: int = 6,
    n_branches: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare the values of a policy's critic with what really follows.

    The policy writes ``n_texts`` texts. Along each, P states are chosen at equal distances, the first state included;
    a text shorter than P tokens has fewer. From each state the policy writes on m times. Then, for two neighbouring
    states of a text, the first branch that is not finished where the second state is, and differs from it there, gives
    the latter a sibling, from which the policy writes on too. Where the branches of two siblings tell which is worth
    more, the critic is asked. So are the means of 1 and of m branches, for which both are branched once more.

    :param policy: the policy with its critic.
    :param env: the environment, which gives prompts and rewards. Its shaping, if it has one, is a part of the rewards.
    :param target: what the critic was trained to predict.
    :param n_texts: E, at least 2.
    :param n_positions: P, at least 2.
    :param n_branches: m, at least 2, since one says nothing of the spread.
    :param seed: the seed of the prompt order and of the intervals. Texts are sampled with PyTorch's generator.
    :return: a dict that JSON can represent. ``overall`` and each entry of ``by_position`` hold what
        :func:`agents.evaluation.value_figures.value_figures` returns, ``states`` and ``bias_interval``, the latter also
        ``position``, the mean share of the text before it. ``calibration`` is a list of
        :func:`agents.evaluation.value_figures.calibration_bins`. ``siblings`` holds ``pairs``, ``decided``, the number
        of pairs whose branches differ by more than two standard errors, and of these the shares that are ordered
        right: by the ``critic``, with ``critic_interval``, by ``one_branch`` and by ``all_branches``. ``states`` holds
        the values and the mean returns one by one. Intervals are of 95 %, clustered by text; None: nothing to say.
    :raises ValueError: if a number is too small, or if the critic is untrained.
    """
    env = plain(env)
    for name, number in (("n_texts", n_texts), ("n_positions", n_positions), ("n_branches", n_branches)):
        check_integer(name, number, 2)
    if not any(parameter.any() for parameter in policy.value_head.parameters()):
        raise ValueError(
            "Expected a trained critic, got a value head that is zero everywhere, as it is before training and after "
            "one without a critic (REINFORCE, RLOO, GRPO). Train by PPO or A2C."
        )
    drawn = draw_prompts(len(env.prompts), n_texts, seed)
    texts = _branch(policy, env, target, [State(n, 0, env.prompts[i], []) for n, i in enumerate(drawn)], 1)
    along = [
        State(number, position, env.prompts[drawn[number]], text[:length])
        for number, [text] in enumerate(texts.tokens)
        for position, length in enumerate(_positions(len(text), n_positions))
    ]
    lengths = [len(text) for [text] in texts.tokens]
    branches = _branch(policy, env, target, along, n_branches)
    pairs = siblings(along, branches.tokens)
    figures: dict[str, Any] = {
        "texts": n_texts,
        "positions": n_positions,
        "branches": n_branches,
        "overall": _figures(along, branches, seed),
        "by_position": _by_position(along, branches, lengths, seed),
        "calibration": calibration_bins(branches.values, branches.returns),
        "siblings": {"pairs": 0, "decided": 0},
        "states": {
            "text": [state.text for state in along],
            "position": [state.position for state in along],
            "value": branches.values.tolist(),
            "mean_return": branches.returns.mean(axis=1).tolist(),
        },
    }
    if pairs:
        others = _branch(policy, env, target, [other for _, other in pairs], n_branches)
        own = [number for number, _ in pairs]
        returns = np.stack([branches.returns[own], others.returns], axis=1)  # [N, 2, m]
        decided = np.flatnonzero(decided_pairs(returns))
        figures["siblings"] = {"pairs": len(pairs), "decided": len(decided)}
        if len(decided):
            again = [state for n in decided for state in (along[own[n]], pairs[n][1])]
            rivals = _branch(policy, env, target, again, n_branches).returns.reshape(-1, 2, n_branches)
            values = np.stack([branches.values[own], others.values], axis=1)[decided]  # [N, 2]
            clusters = np.array([pairs[n][1].text for n in decided])
            figures["siblings"] |= _contest(values, returns[decided], rivals, clusters)
    return figures


def siblings(along: list[State], tokens: list[list[list[int]]]) -> list[tuple[int, State]]:
    """
    :param along: states along texts, one text after the other, in the order of their positions.
    :param tokens: the branches of each state.
    :return: the number of a state, and a state as many tokens long that shares with it the prefix up to the state
        before it, and differs afterwards. A state has none if all branches are the same up to there, or finished.
    """
    pairs = []
    for number, (parent, child) in enumerate(itertools.pairwise(along)):
        if child.text != parent.text:
            continue
        start, end = len(parent.response), len(child.response)
        for branch in tokens[number]:
            segment = branch[: end - start]
            if len(branch) > end - start and segment != child.response[start:]:
                pairs.append((number + 1, child._replace(response=[*parent.response, *segment])))
                break
    return pairs


def _positions(length: int, n_positions: int) -> list[int]:
    """At most so many different numbers of tokens, at equal distances, from 0 to below the length of a text."""
    return sorted({number * length // n_positions for number in range(n_positions)})


def _branch(
    policy: CausalLMPolicy, env: TextVectorEnv, target: CriticTarget, states: list[State], n_branches: int
) -> Branches:
    each = [state for state in states for _ in range(n_branches)]
    buffer = EpisodeBuffer(
        0,
        env.single_observation_space,
        env.single_action_space,
        policy.device,
        n_envs=env.num_envs,
        reference=target.reference,
        kl_coef=target.kl_coef,
    )
    buffer.kl_estimator = target.kl_estimator  # which may be exact
    policy.set_training_mode(False)
    prompts, responses = [state.prompt for state in each], [state.response for state in each]
    infos = collect_episodes(policy, env, len(each), buffer, prompts=prompts, responses=responses)
    buffer.finalize(policy)
    chosen = [part.tolist() for part in np.split(buffer.actions, buffer.starts[1:-1])]
    values = buffer.values[buffer.starts[:-1]].astype(np.float64)
    return Branches(
        values.reshape(len(states), n_branches).mean(axis=1),  # of one state; they differ by rounding only
        target.returns(buffer, infos).reshape(len(states), n_branches),
        [chosen[first : first + n_branches] for first in range(0, len(each), n_branches)],
    )


def _figures(states: list[State], branches: Branches, seed: int) -> dict[str, Any]:
    errors = branches.values - branches.returns.mean(axis=1)
    interval = bootstrap_interval(errors, np.array([state.text for state in states]), seed)
    figures = value_figures(branches.values, branches.returns)
    return {"states": len(states), **figures, "bias_interval": finite(interval)}


def _by_position(along: list[State], branches: Branches, lengths: list[int], seed: int) -> list[dict[str, Any]]:
    rows = []
    for position in sorted({state.position for state in along}):
        which = [number for number, state in enumerate(along) if state.position == position]
        if len(which) < 2:  # of one state there is no variance
            continue
        states = [along[number] for number in which]
        before = float(np.mean([len(state.response) / lengths[state.text] for state in states]))
        here = Branches(branches.values[which], branches.returns[which], [])
        rows.append({"position": before, **_figures(states, here, seed)})
    return rows


def _contest(values: np.ndarray, returns: np.ndarray, rivals: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
    """Who orders siblings as their branches do: the critic, [N, 2], or other branches, [N, 2, m]."""
    by_critic = ordered_right(values, returns)
    by_one = [ordered_right(rivals[..., branch], returns).mean() for branch in range(rivals.shape[-1])]
    return {
        "critic": float(by_critic.mean()),
        "critic_interval": list(wilson_interval(by_critic, clusters)),
        "one_branch": float(np.mean(by_one)),
        "all_branches": float(ordered_right(rivals.mean(axis=-1), returns).mean()),
    }
