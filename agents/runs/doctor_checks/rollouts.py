"""Checks of the policy as it writes: the memo, decoding beside reading whole texts, the first ratio, and the speed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch

from agents.models.contexts import Contexts
from agents.models.prefix_cache import PrefixCache
from agents.runs.doctor_checks.models import distance, judged
from agents.runs.doctor_checks.patient import Finding, Patient
from text_env.tokenization import decode

BATCH_TOKENS = 4096
EVERY = 8  # of the contexts that are read by themselves, for each of which the model runs once


def memo(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: whether keys and values are kept between tokens, and whether that changes nothing.
    """
    lm = patient.policy.lm
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = PrefixCache(lm.backbone)
    if not cache.enabled:
        return Finding(
            "warning",
            f"The memo is not used: {caught[-1].message}",
            "Expect slow rollouts, or take a model whose layers are all full attention.",
        )
    moved = 0.0
    with torch.no_grad():
        for contexts, memoised in _growing(patient, cache, n_texts=2):
            if (contexts.step[0] % EVERY) == 0:
                for row, length in enumerate(contexts.length):
                    alone = lm.hidden_states(torch.from_numpy(contexts.input_ids[row : row + 1, :length]).to(lm.device))
                    one = Contexts(*(array[row : row + 1] for array in contexts))
                    moved = max(moved, distance(_probs(patient, alone[:, -1], one), memoised[row]))
    return judged(
        patient,
        moved,
        f"The memo is used, and changes probabilities by at most {moved:.1e}.",
        "Pass policy_kwargs={'prefix_cache': False} in Python, and report the architecture.",
    )


def decoding(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: whether the model says the same when it writes token by token and when it reads whole texts.
    """
    lm, buffer = patient.policy.lm, patient.written.buffer
    n_texts = min(4, buffer.n_episodes)
    observations = buffer.pack(np.arange(n_texts)).observations
    moved = 0.0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the memo is not used, which its own check has said
        hidden = lm.hidden_states(observations["input_ids"].to(lm.device))
        for contexts, written in _growing(patient, PrefixCache(lm.backbone), n_texts):
            at = torch.from_numpy(contexts.length - 1).to(lm.device)
            rows = torch.from_numpy(_rows(buffer.lengths[:n_texts], int(contexts.step[0]))).to(lm.device)
            moved = max(moved, distance(_probs(patient, hidden[rows, at], contexts), written))
    return judged(
        patient,
        moved,
        f"Token by token and in whole texts, probabilities differ by at most {moved:.1e}.",
        "The policy that is trained is not the one that writes: report the architecture.",
    )


def first_ratio(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: how far the ratio of PPO is from 1 before anything has been learned.
    """
    buffer, ratios = patient.written.buffer, []
    with torch.no_grad():
        for episodes in buffer.batches(np.arange(buffer.n_episodes), BATCH_TOKENS):
            samples = buffer.pack(episodes)
            log_prob = patient.policy.evaluate_actions(samples.observations, samples.actions)[1]
            ratios.append((log_prob - samples.old_log_prob).exp().cpu().numpy())
    ratio = np.concatenate(ratios)
    dtype = patient.run.autocast or patient.run.dtype
    return judged(
        patient,
        float(np.nan_to_num(np.abs(ratio - 1), nan=1.0).max()),
        f"Before any update, in {dtype}, the ratios of {len(ratio)} tokens {spread(ratio)}; they should be 1.",
        "The policy that is trained is not the one that sampled: see the findings on decoding, padding and neighbours.",
    )


def spread(ratio: np.ndarray) -> str:
    """
    :param ratio: float [N].
    :return: where the ratios lie, as a verb and numbers.
    """
    low, high = (f"{end:.6g}" for end in (ratio.min(), ratio.max()))
    return f"are {low}" if low == high else f"lie between {low} and {high}"


def speed(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: how fast texts are written, and how many end by themselves.
    """
    written, budget = patient.written, patient.env.max_new_tokens
    buffer = written.buffer
    ended = int(np.isin(buffer.actions[buffer.starts[1:] - 1], patient.env.eos_token_ids).sum())
    n_tokens = len(buffer.actions)
    return Finding(
        "ok",
        f"{buffer.n_episodes} texts, {n_tokens} tokens in all, in {written.seconds:.1f} s: "
        f"{n_tokens / written.seconds:.0f} tokens/s; {ended} of the texts ended by themselves within {budget} tokens. "
        f"The first begins {decode(patient.tokenizer, [written.texts.completion_ids[0][:12]])[0]!r}.",
    )


def _growing(patient: Patient, cache: PrefixCache, n_texts: int) -> Iterator[tuple[Contexts, torch.Tensor]]:
    """The contexts of the first texts before each of their tokens, and the probabilities after them, [B, V], by way of
    the cache; texts that are over are left out.
    """
    policy, buffer = patient.policy, patient.written.buffer
    n_texts = min(n_texts, buffer.n_episodes)
    observations = buffer.pack(np.arange(n_texts)).observations
    input_ids = observations["input_ids"].cpu().numpy()
    prompt_length = observations["prompt_length"].cpu().numpy()[:, 0]
    for step in range(int(buffer.lengths[:n_texts].max())):
        rows = _rows(buffer.lengths[:n_texts], step)
        contexts = Contexts(input_ids[rows], prompt_length[rows] + step, np.full(len(rows), step))
        with policy.lm.precision():
            hidden = cache.last_hidden(contexts)
        yield contexts, _probs(patient, hidden, contexts)


def _rows(lengths: np.ndarray, step: int) -> np.ndarray:
    """Which texts go on after so many tokens."""
    return np.flatnonzero(lengths > step)


def _probs(patient: Patient, hidden: torch.Tensor, contexts: Contexts) -> torch.Tensor:
    lm = patient.policy.lm
    step = torch.from_numpy(contexts.step).to(hidden.device)
    return lm.logits(hidden, step, lm.allowed(contexts)).softmax(dim=-1)
