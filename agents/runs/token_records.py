"""A few episodes of a training, token by token, with what the training made of each token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from transformers import PreTrainedTokenizerBase

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.runs.config import TrainConfig
from agents.state.replacing import sync
from text_env.tokenization import decode

DIGITS = 4  # of every number, which is for reading


class RecordEpisodes(BaseCallback):
    """Writes the first few episodes of a rollout to a file once they have been learnt from: those of the first rollout,
    of one every few iterations, and of the last.

    It draws no random numbers, and costs a forward pass over these episodes.

    :param path: the file, ``episodes.jsonl``, with one line per episode: ``timesteps``, when its rollout was over;
        ``prompt``, ``completion``, ``score`` and ``finish_reason``; ``tokens``, the texts of its n actions; and n
        numbers each of ``value``, the critic's, before the action; ``return``, its target; ``reward``, the KL penalty
        included; ``advantage``, as the loss has it; ``kl``, log π_old − log π_ref, and ``entropy``, both in nats;
        ``probability``, π_old; and ``ratio``, π/π_old after the update.
    :param config: the configuration of the run, of which ``n_samples`` and ``sample_every`` count here, too.
    """

    def __init__(self, path: Path, config: TrainConfig) -> None:
        super().__init__()
        self._path = path
        self._n = config.n_samples
        self._every = config.sample_every
        self._infos: list[dict[str, Any]] = []  # of the latest rollout; a resumed training has none yet

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._infos = self.locals["episodes"]

    def _on_rollout_start(self) -> None:
        if (cast(OnPolicyAlgorithm, self.model)._iterations - 1) % self._every == 0:
            self._write()

    def _on_training_end(self) -> None:
        self._write()

    def _write(self) -> None:
        if not self._infos:
            return
        model = cast(OnPolicyAlgorithm, self.model)
        rows = records(model, self._infos[: self._n])
        with self._path.open("a") as file:
            for row in rows:
                file.write(json.dumps({"timesteps": model.num_timesteps, **row}, ensure_ascii=False) + "\n")
        sync(self._path)  # as a checkpoint that knows of them will be


@torch.no_grad()
def records(model: OnPolicyAlgorithm, infos: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    :param model: an algorithm after an update, whose buffer holds the rollout.
    :param infos: the final infos of the rollout's first n episodes.
    :return: what :class:`RecordEpisodes` writes of each, but for ``timesteps``.
    """
    buffer, policy = model.buffer, model.policy
    tokenizer = model.vector_env.tokenizer
    log_prob, entropy = np.zeros((2, buffer.n_tokens), dtype=np.float32)
    policy.set_training_mode(False)
    for batch in buffer.batches(np.arange(len(infos)), model.micro_batch_tokens):
        samples = buffer.pack(batch)
        _, now, spread = policy.evaluate_actions(samples.observations, samples.actions)
        assert spread is not None
        at = np.concatenate([np.arange(buffer.starts[e], buffer.starts[e + 1]) for e in batch])
        log_prob[at], entropy[at] = now.float().cpu().numpy(), spread.float().cpu().numpy()
    figures = {
        "value": buffer.values,
        "return": buffer.returns,
        "reward": buffer.rewards,
        "advantage": buffer.advantages,
        "kl": buffer.log_ratio,
        "entropy": entropy,
        "probability": np.exp(buffer.log_probs),
        "ratio": np.exp(log_prob - buffer.log_probs),
    }
    rows = []
    for episode, info in enumerate(infos):
        own = slice(buffer.starts[episode], buffer.starts[episode + 1])
        rows.append(
            {
                **{name: info[name] for name in ("prompt", "completion", "finish_reason")},
                "score": float(info["score"]),
                "tokens": token_texts(tokenizer, buffer.actions[own].tolist(), buffer.prompts[episode].token_ids),
                **{name: [_short(x) for x in numbers[own]] for name, numbers in figures.items()},
            }
        )
    return rows


def token_texts(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], preceding: Sequence[int] = ()
) -> list[str]:
    """
    :param tokenizer: the tokenizer of the token ids.
    :param token_ids: the tokens of a text.
    :param preceding: the tokens of what stands before the text.
    :return: what each of them adds to the text: nothing for the first parts of a character that several tokens make up;
        the name of a special token.
    """
    special = set(tokenizer.all_special_ids)
    texts: list[str] = []
    begun: list[int] = []  # the tokens of a character that isn't finished
    for number, token in enumerate(token_ids):
        if token in special:
            texts.append(str(tokenizer.convert_ids_to_tokens(token)))
            begun = []
            continue
        begun.append(token)
        # Many decoders drop the space before the first word of what they are given, so there is a token before it.
        first = number - len(begun)
        before = [token_ids[first]] if first >= 0 else list(preceding[-1:])
        head, whole = decode(tokenizer, [before, [*before, *begun]])
        text = whole[len(head) :] if whole.startswith(head) else decode(tokenizer, [begun])[0]
        unfinished = text.endswith("\N{REPLACEMENT CHARACTER}") and len(begun) < 4 and number + 1 < len(token_ids)
        texts.append("" if unfinished else text)
        begun = begun if unfinished else []
    return texts


def _short(number: np.floating[Any]) -> float | None:
    """A few digits of a number; None where it is none, which JSON has no word for."""
    return float(f"{number:.{DIGITS}g}") if np.isfinite(number) else None
