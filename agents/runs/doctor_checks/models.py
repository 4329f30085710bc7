"""Checks of the model by itself: its size, its vocabulary, and whether a context's answer is that context's alone."""

from __future__ import annotations

import os
from collections import Counter

import torch
from transformers.pytorch_utils import Conv1D

from agents.algorithms.environments import default_rows
from agents.algorithms.ppo import PPO
from agents.models.adapter import unwrapped
from agents.models.decoding import CACHE_ARGUMENT
from agents.models.head import decoder_of
from agents.models.pretrained import check_positions, check_tokenizers, tokenizer_beside
from agents.runs.algorithms import algorithm_named
from agents.runs.config import lora_kwargs
from agents.runs.doctor_checks.patient import Finding, Patient

EXACT, ROUNDED, BROKEN = 1e-3, 0.1, 0.5
"""How far apart two ways to the same probability or ratio may be. The rounding of float32 stays far below the first.
Below float32, the second is half of the usual clip range of PPO, and beyond the third training follows the errors."""


def judged(patient: Patient, distance: float, found: str, cause: str) -> Finding:
    """
    :param patient: who is examined.
    :param distance: between two ways to the same probabilities or ratios, 0 if they agree.
    :param found: what was compared and how far apart it is, as a sentence.
    :param cause: what to look at if it is too far, as a sentence.
    :return: the verdict, which allows for rounding below float32.
    """
    if distance <= (ROUNDED if patient.low_precision else EXACT):
        return Finding("ok", found)
    if patient.low_precision and distance <= BROKEN:
        return Finding("warning", f"{found} So much is lost in rounding.", "Use --dtype float32 if memory allows.")
    return Finding("problem", found, f"Try --dtype float32. {cause}" if patient.low_precision else cause)


def loaded_model(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: what was loaded.
    """
    model = unwrapped(patient.model)
    size = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    return Finding("ok", f"{type(model).__name__}, {size / 1e6:.1f} million parameters, {dtype}, on {model.device}.")


def vocabulary(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: whether the model has a logit for each token, and the same tokens.
    """
    model, n_tokens = unwrapped(patient.model), patient.everything.episodes.vocabulary
    check_tokenizers(patient.tokenizer, tokenizer_beside(patient.name), patient.name)
    head = model.get_output_embeddings()
    n_logits = 0 if head is None else int(head.weight.shape[0])
    if n_logits < n_tokens:
        return Finding(
            "problem",
            f"The tokenizer has ids up to {n_tokens - 1}, the model {n_logits} logits.",
            f"Use the model's own tokenizer, or model.resize_token_embeddings({n_tokens}) before it is saved.",
        )
    found = f"The tokenizer has {n_tokens} tokens, the model as many logits."
    if n_logits > n_tokens:
        found = f"The model has {n_logits} logits for {n_tokens} tokens; the {n_logits - n_tokens} others are not used."
    holes = n_tokens - len(set(patient.tokenizer.get_vocab().values()))
    if holes > 0:
        return Finding(
            "warning",
            f"{found} {holes} ids below {n_tokens} belong to no token, but can be sampled.",
            "Harmless if the model never gives them any probability; else forbid them with --constraint.",
        )
    return Finding("ok", found)


def context_length(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: whether the model can read the longest context.
    """
    env = patient.everything
    longest = (patient.room or env.max_prompt_tokens) + env.max_new_tokens
    model = unwrapped(patient.model)
    try:
        check_positions(model, longest)
    except ValueError as error:
        return Finding("problem", str(error), "Pass a smaller --max-new-tokens or --max-prompt-tokens.")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Finding("ok", f"Contexts have up to {longest} tokens; the model reads {positions or 'any number'}.")


def padding(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: whether what stands behind a text changes what the model says of it.
    """
    moved = 0.0
    for ids in _short_texts(patient):
        followed = torch.cat([ids, ids[:1].expand(len(ids) + 3)])
        alone, padded = (patient.probabilities(row[None])[0, : len(ids)] for row in (ids, followed))
        moved = max(moved, distance(alone, padded))
    return judged(
        patient,
        moved,
        f"Padding behind a text changes the probabilities of its tokens by at most {moved:.1e}.",
        "The model looks ahead: take a decoder with causal attention, or mend its mask.",
    )


def neighbours(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: whether other texts in a batch change what the model says of one.
    """
    texts = _short_texts(patient)
    shortest = min(map(len, texts))
    batch = torch.stack([ids[:shortest] for ids in texts])
    together = patient.probabilities(batch)
    moved = max(
        distance(patient.probabilities(row[None])[0], answer) for row, answer in zip(batch, together, strict=True)
    )
    return judged(
        patient,
        moved,
        f"Other texts in the batch change the probabilities of a text's tokens by at most {moved:.1e}.",
        "The model mixes the rows of a batch: look for statistics over the batch, or experts of limited capacity.",
    )


def lora_targets(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: which layers an adapter would be put on.
    """
    model = unwrapped(patient.model)
    head = model.get_output_embeddings()
    layers = Counter(
        name.removesuffix(".base_layer").rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head and ".lora_" not in name
    )
    listed = ", ".join(f"{name} ({count})" for name, count in sorted(layers.items()))
    lora = lora_kwargs(patient.run)
    targets = None if lora is None or lora["target_modules"] == "all-linear" else lora["target_modules"]
    # PEFT takes the end of a layer's path, too, such as "attn.c_attn". What else it says of a target, it says itself.
    paths = [f".{path}" for path, _ in model.named_modules()]
    if missing := [name for name in targets or () if not any(path.endswith(f".{name}") for path in paths)]:
        return Finding(
            "problem" if len(missing) == len(targets or ()) else "warning",
            f"The model has no layers called {', '.join(missing)}.",
            f"Choose --lora-target-modules among {listed}.",
        )
    if lora is None:
        return Finding("ok", f"No adapter is asked for; --lora-r would put one on {listed or 'no layer'}.")
    if not layers:
        return Finding("problem", "The model has no linear layers for an adapter.", "Train all weights: no --lora-r.")
    trained = sum(p.numel() for p in patient.adapted.parameters() if p.requires_grad)
    return Finding("ok", f"The adapter has {trained / 1e6:.2f} million weights, on {', '.join(targets or [listed])}.")


def memory(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: about how much memory the training takes, the activations of its backward pass aside.
    """
    run, policy = patient.run, patient.policy
    assert run.n_episodes is not None
    model = unwrapped(patient.model)
    adapted = policy.lm.adapter is not None
    weights = _bytes(model)
    # PPO's default is a critic of its own, unless an adapter shows that memory is scarce.
    by_default = issubclass(algorithm_named(run.algo), PPO) and not adapted
    critic = _bytes(decoder_of(model)) if run.critic not in (None, "head") or (run.critic is None and by_default) else 0
    trained = sum(p.nbytes for p in policy.parameters() if p.requires_grad) + critic
    parts = {
        "weights": weights,
        "reference": 0 if adapted else weights,
        "critic": critic,
        "gradient": trained,
        "Adam": 2 * trained,
        "copy for undoing": 3 * trained,
    }
    rows = default_rows(run.n_episodes, run.env.group_size or 1)
    longest = (patient.room or patient.everything.max_prompt_tokens) + patient.everything.max_new_tokens
    per_token = _memo_bytes(patient)
    parts["memo"] = rows * longest * per_token * (2 if critic else 1)
    total, available = sum(parts.values()), _available(model.device)
    listed = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    found = (
        f"About {_size(total)} of {_size(available)}, activations aside: {listed} ({_size(per_token)} a token, {rows} "
        "rows)."
    )
    if total > 0.9 * available:
        return Finding(
            "warning", found, "Use --lora-r 16, --dtype bfloat16, --critic head, or fewer episodes in a rollout."
        )
    return Finding("ok", found)


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """
    :param left: probabilities, [..., V].
    :param right: probabilities, [..., V].
    :return: the largest total variation distance of two distributions: how much probability is moved, from 0 to 1. NaN
        counts as 1.
    """
    moved = (left.double() - right.double()).abs().sum(dim=-1) / 2
    return float(moved.nan_to_num(nan=1.0).max())


def _short_texts(patient: Patient) -> list[torch.Tensor]:
    """The tokens of four prompts, repeated to at least eight tokens each."""
    prompts = [torch.tensor(prompt.token_ids[:64]) for prompt in patient.env.prompts[:4]]
    return [ids.repeat(-(-8 // len(ids)))[: max(8, len(ids))] for ids in prompts]


def _bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@torch.no_grad()
def _memo_bytes(patient: Patient) -> int:
    """What a token's keys and values take; 0 for a model that keeps none."""
    backbone, n = patient.policy.lm.backbone, 4
    kept = backbone(input_ids=_short_texts(patient)[0][None, :n].to(patient.policy.device), use_cache=True)
    layers = getattr(kept.get(CACHE_ARGUMENT), "layers", [])
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(x.nbytes for x in tensors if x is not None) // n


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _size(n_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"
