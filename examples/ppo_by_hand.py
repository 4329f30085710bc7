"""PPO by hand, from top to bottom: a plain loop on the raw environment.

Nothing of this package is used but the environment, the policy, and the equations in `agents/objectives/`. What
`agents.PPO` does besides is bookkeeping: schedules, checkpoints, logs, micro-batches that fit into memory.

python -m examples.ppo_by_hand
"""

from __future__ import annotations

from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from agents import CausalLMPolicy
from agents.objectives.advantages import gae, whiten
from agents.objectives.kl import kl_k1
from agents.objectives.losses import clipped_surrogate, value_loss
from text_env import NO_ACTION, TextVectorEnv

LEARNING_RATE = 1e-4  # high for a language model, but the built-in one is small
N_EPOCHS = 4  # passes over each rollout: sampling is expensive, so its texts serve for several steps
BATCH_SIZE = 16  # texts of a minibatch
CLIP_RANGE = 0.2  # ε: how far a token's probability may move before there is nothing more to gain
KL_COEF = 0.04  # β: what a nat of distance from the reference costs
GAMMA, GAE_LAMBDA = 1.0, 0.95  # a token at the end is worth as much as one at the start
VF_COEF = 0.1  # the weight of the critic's loss
MAX_GRAD_NORM = 1.0


class Rollout(NamedTuple):
    """E texts of at most T tokens. Row e of each array is one text; `mask` says where it has a token.

    :param packed: the texts as the policy reads them, a whole text at once.
    :param actions: the tokens that were chosen, int64 [E, T].
    :param log_probs: their log-probabilities when they were chosen, float64 [E, T].
    :param values: what the critic said before each of them, float64 [E, T].
    :param rewards: what the environment paid for each of them, float64 [E, T].
    :param mask: bool [E, T].
    """

    packed: dict[str, torch.Tensor]
    actions: np.ndarray
    log_probs: np.ndarray
    values: np.ndarray
    rewards: np.ndarray
    mask: np.ndarray


def make_policy(env: TextVectorEnv, model: object = "builtin") -> CausalLMPolicy:
    """A language model as the actor, and a linear layer on its last hidden state, 0 at the start, as the critic."""
    spaces = env.single_observation_space, env.single_action_space
    return CausalLMPolicy(*spaces, lambda _: LEARNING_RATE, model=model, eos_token_id=env.eos_token_ids)


@torch.no_grad()
def collect(env: TextVectorEnv, policy: CausalLMPolicy) -> Rollout:
    """Let the policy write one text in each row of the environment. A step is a token."""
    shape = env.num_envs, env.max_new_tokens
    actions, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    log_probs, values, rewards = np.zeros((3, *shape))
    policy.set_training_mode(False)
    observation, _ = env.reset()
    live = np.arange(env.num_envs)  # the rows whose text is not finished yet
    for step in range(env.max_new_tokens):
        # This looks as if it read every text again for every token. The policy keeps keys and values of the contexts
        # that it has seen, so it pays for the new tokens only.
        contexts = {name: torch.from_numpy(array[live]) for name, array in observation.items()}
        chosen, value, log_prob = policy(contexts)
        actions[live, step], mask[live, step] = chosen.numpy(), True
        log_probs[live, step], values[live, step] = log_prob.numpy(), value.flatten().numpy()
        tokens = np.full(env.num_envs, NO_ACTION)  # a finished row is left alone until all are
        tokens[live] = actions[live, step]
        # The reward is 0 until the text is finished; then it is what the reward model says of the whole text.
        observation, paid, terminated, _, _ = env.step(tokens)
        rewards[:, step] = paid
        live = live[~terminated[live]]
        if not len(live):
            break
    return Rollout(pack(observation, mask), actions, log_probs, values, rewards, mask)


def pack(observation: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, torch.Tensor]:
    """Position t of a model's answer predicts token t + 1, so one pass over a text scores all of its tokens. The last
    column is left out, since nothing follows it, and `action_mask` marks the positions after which the policy chose.
    """
    first = observation["prompt_length"] - 1  # [E, 1], the last token of the prompt
    columns = np.arange(observation["input_ids"].shape[1] - 1)
    packed = {
        "input_ids": observation["input_ids"][:, :-1],
        "action_mask": (columns >= first) & (columns < first + mask.sum(axis=1, keepdims=True)),
        "prompt_length": observation["prompt_length"],
    }
    return {name: torch.from_numpy(array) for name, array in packed.items()}


def spread(flat: torch.Tensor, mask: np.ndarray) -> np.ndarray:
    """One number per token, [N], as rows of texts, [E, T]."""
    rows = np.zeros(mask.shape)
    rows[mask] = flat.numpy()
    return rows


@torch.no_grad()
def judge(rollout: Rollout, reference: CausalLMPolicy) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How much better than expected was each token? Advantages, the critic's targets, and the log-ratios, [E, T]."""
    actions = torch.from_numpy(rollout.actions[rollout.mask])
    _, ref_log_prob, _ = reference.evaluate_actions(rollout.packed, actions)
    log_ratio = np.where(rollout.mask, rollout.log_probs - spread(ref_log_prob, rollout.mask), 0.0)
    # The reward model is right only near the texts that it knows. So each token pays for its distance from the
    # reference, the model as it was before training; summed over a text, that is the KL divergence in the mean.
    rewards = rollout.rewards - KL_COEF * kl_k1(torch.from_numpy(log_ratio)).numpy()
    # The score comes once, at the end. The critic spreads it over the tokens: each gets its one-step surprise, and a
    # share of the surprises after it. All texts have ended, so nothing is worth anything after the last token.
    nothing = np.zeros(len(rewards))
    advantages, targets = gae(rewards, rollout.values, nothing, rollout.mask, GAMMA, GAE_LAMBDA)
    # Whitened over the whole rollout: a minibatch of bad texts must not be taken for one of average texts.
    advantages[rollout.mask] = whiten(advantages[rollout.mask])
    return advantages, targets, log_ratio


def update(
    policy: CausalLMPolicy, rollout: Rollout, advantages: np.ndarray, targets: np.ndarray
) -> tuple[float, float]:
    """Several steps on the same texts. Returns how far the first ratios are from 1, and the share that was clipped."""
    policy.set_training_mode(True)  # forgets the contexts that it has seen: the weights are about to change
    distance, clipped = [], []
    for _ in range(N_EPOCHS):
        for texts in np.random.permutation(len(rollout.mask)).reshape(-1, min(BATCH_SIZE, len(rollout.mask))):
            mask = rollout.mask[texts]
            arrays = (rollout.log_probs, rollout.values, advantages, targets)
            old_log_prob, old_values, advantage, target = (
                torch.from_numpy(array[texts][mask]).float() for array in arrays
            )
            packed = {name: tensor[texts] for name, tensor in rollout.packed.items()}
            actions = torch.from_numpy(rollout.actions[texts][mask])
            values, log_prob, _ = policy.evaluate_actions(packed, actions)
            # Raise the probability of tokens that were better than expected, within the clip range.
            policy_loss = clipped_surrogate(log_prob - old_log_prob, advantage, CLIP_RANGE).mean()
            critic_loss = value_loss(values.flatten(), old_values, target, None).mean()
            policy.optimizer.zero_grad()
            (policy_loss + VF_COEF * critic_loss).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
            policy.optimizer.step()
            moved = ((log_prob - old_log_prob).exp() - 1).abs().detach()
            distance.append(float(moved.max()))
            clipped.append(float((moved > CLIP_RANGE).float().mean()))
    return distance[0], float(np.mean(clipped))


def train(env: TextVectorEnv, policy: CausalLMPolicy, reference: CausalLMPolicy, iterations: int) -> list[float]:
    """Write, judge, update; again and again. Returns the mean scores of the rollouts."""
    scores = []
    for iteration in range(iterations):
        rollout = collect(env, policy)
        advantages, targets, log_ratio = judge(rollout, reference)
        # Before any step policy and texts fit together, so every ratio is 1. If not, there is a bug: look there first.
        first_ratio, clipped = update(policy, rollout, advantages, targets)
        scores.append(float(rollout.rewards.sum(axis=1).mean()))
        kl, length = log_ratio.sum(axis=1).mean(), rollout.mask.sum(axis=1).mean()
        print(
            f"{iteration:3}  score {scores[-1]:+.2f}  KL {kl:z5.2f} nats  length {length:4.1f}  "
            f"clipped {clipped:4.0%}  first ratio 1 ± {first_ratio:.0e}"
        )
    return scores


def main(iterations: int = 12, num_envs: int = 64, seed: int = 0) -> list[float]:
    """Train the built-in model to write what the built-in reward model likes."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    # TextArithmetic-v0 has the same interface; its policy would be make_policy(env, "builtin:arithmetic").
    env = gym.make_vec("TextRLHF-v0", num_envs=num_envs, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=seed)
    policy = make_policy(env)
    reference = make_policy(env)  # the same weights, which nobody trains
    return train(env, policy, reference, iterations)


if __name__ == "__main__":
    main()
