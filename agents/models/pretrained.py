"""Loading language models by name: hub names, directories, GGUF files, PEFT adapters and configs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from agents.models.adapter import ADAPTER, REFERENCE, check_adapter, quiet_peft
from text_env.ends_of_text import as_ids
from text_env.pretrained_files import check_adapter_files, load_pretrained, not_loaded
from text_env.tokenization import base_of_adapter, pretrained_name, pretrained_tokenizer, vocabulary_size


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    """
    :param dtype: a ``torch.dtype``, its name (``"float32"``, ``"bfloat16"``, …), or ``"auto"``, the type in which the
        weights were saved.
    :return: the value for ``from_pretrained(dtype=...)``.
    :raises ValueError: for a name that is not a floating-point dtype.
    """
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"Expected dtype 'auto', 'float32', 'bfloat16', 'float16' or 'float64', got {dtype!r}.")
    return resolved


def load_causal_lm(
    model: str | Path | PretrainedConfig | PreTrainedModel | PeftModel, dtype: str | torch.dtype = "float32"
) -> PreTrainedModel | PeftModel:
    """Load a causal language model.

    :param model: ``"builtin"``, a directory, a hub name, a GGUF file, the directory or hub name of a PEFT adapter, a
        ``PretrainedConfig`` (random weights), or a live model.
    :param dtype: the floating-point type of the weights. A live model keeps its own, and adapters are float32 whatever
        the type of their base, so that small steps are not lost in rounding.
    :return: the model; for an adapter, PEFT's wrapper around its base, with the adapter's weights trainable.
    :raises ValueError: if there is no such model, if it is no causal language model, or if an adapter does not fit its
        base.
    """
    if isinstance(model, PeftModel):
        return _checked_live(model)
    if isinstance(model, PreTrainedModel):
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "Expected a live model with an adapter to be a peft.PeftModel, got transformers' own form of it: load "
                "it by PeftModel.from_pretrained(base, adapter), or give the adapter's name."
            )
        return model
    resolved = resolve_dtype(dtype)
    if isinstance(model, PretrainedConfig):
        random_model = AutoModelForCausalLM.from_config(model, trust_remote_code=False)
        return random_model if resolved == "auto" else random_model.to(resolved)
    if (base := base_of_adapter(model)) is not None:
        return _load_adapter(str(model), base, dtype)
    name, options = pretrained_name(model)
    if options:
        options |= _unpacked(options["gguf_file"])
    try:
        loaded: PreTrainedModel = load_pretrained(AutoModelForCausalLM, name, dtype=resolved, **options)
    except Exception as error:
        # A GGUF reader may raise anything for a type that it doesn't know. Otherwise only an OSError says that there is
        # no such model.
        if not (options or isinstance(error, OSError)):
            raise
        raise ValueError(
            "Expected model to be 'builtin', a directory with config.json and weights or with a PEFT adapter, a GGUF "
            f"file, or a hub name; got {str(model)!r}, {not_loaded(model, _first_line(error))}"
            + (_GGUF_HINT if options else "")
        ) from error
    if getattr(loaded, "_hf_peft_config_loaded", False):  # the hub name of an adapter
        return _load_adapter(name, str(next(iter(loaded.peft_config.values())).base_model_name_or_path), dtype)
    return loaded


def load_frozen(
    model: str | Path | PretrainedConfig | PreTrainedModel | PeftModel, dtype: str | torch.dtype = "float32"
) -> PreTrainedModel | PeftModel:
    """As :func:`load_causal_lm`, for a model that is going to be frozen.

    :param model: the model; a live one is copied, so that its owner may go on to train it.
    :param dtype: the floating-point type of the weights.
    :return: the model.
    :raises ValueError: as :func:`load_causal_lm`.
    """
    return load_causal_lm(copy.deepcopy(model) if isinstance(model, PreTrainedModel | PeftModel) else model, dtype)


_GGUF_HINT = (
    ". transformers reads GGUF files of a few architectures (Llama, Qwen2, Mistral, …) and quantisation types (Q4_0 to "
    "Q8_0, K-quants, F16, …), with the `gguf` package installed: pip install 'textrlhf[gguf]', or convert the file to "
    "one of those, or take the model's original directory."
)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _unpacked(gguf_file: str) -> dict[str, Any]:
    """Options that make weights ordinary tensors. Newer releases otherwise keep GGUF blocks, which can't be trained."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(gguf_file=gguf_file, dequantize=True)}


_REMEMBERED_HINT = (
    f" {REFERENCE!r} is what an earlier algorithm compares this model with. If that is over, take it out by "
    f"model.delete_adapter({REFERENCE!r}); else give each a model of its own."
)


def _checked_live(model: PeftModel) -> PeftModel:
    if list(model.peft_config) != [ADAPTER]:
        raise ValueError(
            f"Expected a PeftModel with one adapter, called {ADAPTER!r}; this one has {list(model.peft_config)}."
            + (_REMEMBERED_HINT if REFERENCE in model.peft_config else "")
        )
    check_adapter(model)
    model.set_adapter(ADAPTER)  # PEFT's default is to load adapters frozen
    return model


def _load_adapter(directory: str, base: str, dtype: str | torch.dtype) -> PeftModel:
    def mismatch(reason: str) -> ValueError:
        return ValueError(
            f"Expected the adapter in {directory!r} to fit its base {base!r}; {reason} Name the model that it was "
            "trained on as base_model_name_or_path in adapter_config.json."
        )

    try:
        model = load_causal_lm(base, dtype)
    except ValueError as error:
        raise mismatch(f"that could not be loaded: {error}") from error
    if not isinstance(model, PreTrainedModel):
        raise mismatch("that is an adapter itself: merge it into its base first.")
    try:
        check_adapter_files(directory)
        with quiet_peft():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, directory, adapter_name=ADAPTER, is_trainable=True)
    except (RuntimeError, ValueError, UserWarning) as error:
        raise mismatch(f"they don't fit together: {' '.join(str(error).split())[:300]}") from error
    check_adapter(adapted)
    check_tokenizers(tokenizer_beside(directory), tokenizer_beside(base), base)
    adapted.peft_config[ADAPTER].base_model_name_or_path = _plain_name(base)
    return adapted


def _plain_name(model: Any) -> str | None:
    """The name by which transformers finds this model from any directory; None if there is no such name."""
    if not isinstance(model, str | Path):
        return None  # a live model or a config exists in memory only
    name, options = pretrained_name(model)
    if options:
        return None
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def tokenizer_beside(model: Any) -> PreTrainedTokenizerBase | None:
    """
    :param model: a model, as for :func:`load_causal_lm`.
    :return: the tokenizer that is saved with the model. None for a config, a live model or a directory without one.
    """
    if not isinstance(model, str | Path):
        return None
    try:
        return pretrained_tokenizer(model)
    except ValueError:
        return None  # a directory without a tokenizer


def model_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, n_tokens: int) -> tuple[int, ...]:
    """
    :param model: a language model.
    :param tokenizer: its tokenizer; None if it is not known.
    :param n_tokens: V, the number of tokens of the environment.
    :return: the tokens at which the model's texts end: those of its generation config, at which transformers'
        ``generate`` ends them, and the tokenizer's eos token. Ids that are no tokens of the environment are left out.
    """
    config = model.generation_config
    own = as_ids(None if config is None else config.eos_token_id)
    ends = (*own, *as_ids(None if tokenizer is None else tokenizer.eos_token_id))
    return tuple(token for token in ends if token < n_tokens)


def lora_arguments(lora: dict[str, Any] | LoraConfig) -> dict[str, Any]:
    """
    :param lora: arguments of ``peft.LoraConfig``, or one that is made already.
    :return: the arguments that differ from PEFT's defaults, with lists in place of sets, so that JSON can hold them.
    :raises ValueError: for anything else, such as the config of another kind of adapter, and for a ``megatron_config``,
        for which PEFT would import a module by name.
    """
    if isinstance(lora, dict):
        if lora.get("megatron_config"):
            raise ValueError("Expected lora without megatron_config, for which PEFT would import a module by name.")
        return lora
    if type(lora) is not LoraConfig:
        raise ValueError(
            "Expected lora to be arguments of peft.LoraConfig ({'r': 16, 'target_modules': 'all-linear'}) or a "
            f"LoraConfig, got {lora!r}. Another kind of adapter can be put on a live model, by peft.get_peft_model."
        )
    defaults, given = vars(LoraConfig()), vars(lora)
    changed = {name: value for name, value in given.items() if name in defaults and value != defaults[name]}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in changed.items()}


def is_adapter(model: Any) -> bool:
    """
    :param model: a model, as for :func:`load_causal_lm`.
    :return: whether it is a PEFT adapter, live or in a directory. One on the hub is not looked up.
    :raises ValueError: if an adapter does not name its base.
    """
    return isinstance(model, PeftModel) or (isinstance(model, str | Path) and base_of_adapter(model) is not None)


def add_lora(model: PreTrainedModel | PeftModel, lora: dict[str, Any] | LoraConfig, name: Any = None) -> PeftModel:
    """Add a trainable low-rank adapter to a model, in place, and freeze all other weights.

    :param model: the base model.
    :param lora: the arguments of ``peft.LoraConfig``, for example ``{"r": 16, "target_modules": "all-linear"}``, or
        one that is made already.
    :param name: the name that :func:`load_causal_lm` loaded the base by, which a saved adapter refers to; None: none.
    :return: PEFT's wrapper around the model. Its ``get_base_model()`` is ``model`` itself, with the adapter inside.
    :raises ValueError: if the model has an adapter already, or if the adapter would train weights of the base as well.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "Expected lora=None with a model that is an adapter already: training goes on with that one. For a new "
            "adapter on top, merge the old one into its base (PEFT's merge_and_unload) and save that."
        )
    with quiet_peft():
        config = LoraConfig(**{"task_type": "CAUSAL_LM", **lora_arguments(lora)})
        adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    if adapted.peft_config[ADAPTER].task_type == "CAUSAL_LM":
        check_adapter(adapted)  # not for classifiers: their new head must be trained, and they need no reference
    adapted.peft_config[ADAPTER].base_model_name_or_path = _plain_name(name)
    return adapted


def check_positions(model: PreTrainedModel, longest: int) -> None:
    """Check that a model can read contexts of some length. Learned position embeddings are limited in number; rotary
    ones get worse beyond the positions of the training, so configs state a limit for both.

    Some rotary position embeddings switch to other frequencies when a sequence of the batch gets long, for all
    sequences in it. What such a model says of a context depends on the batch, so contexts must stay below the length at
    which it switches.

    :param model: any model.
    :param longest: the length of the longest context, in tokens.
    :raises ValueError: if the model has fewer positions, or switches at fewer.
    """
    config: Any = model.config.get_text_config()
    available = getattr(config, "max_position_embeddings", None)
    if available is not None and longest > available:
        raise ValueError(
            f"Expected a model with at least {longest} positions (max_prompt_tokens + max_new_tokens of the "
            f"environment); {type(model).__name__} has {available}. Make the environment's budgets smaller, "
            "max_new_tokens above all, or take a model with more positions."
        )
    for kind, switch in _frequency_switches(config):
        if switch is not None and longest > switch:
            raise ValueError(
                f"Expected contexts of at most {switch} tokens, the original length of the rotary embeddings "
                f"({kind!r}) of {type(model).__name__}, got max_prompt_tokens + max_new_tokens = {longest}: a longer "
                "sequence changes the frequencies of the whole batch, so that log-probabilities would depend on their "
                "neighbours. Make the environment's budgets smaller, or change the model's config.rope_parameters to "
                "a rope_type that is the same for all lengths, such as 'yarn' or 'linear'."
            )


def _frequency_switches(config: Any) -> Iterator[tuple[str, int | None]]:
    """The rotary embeddings whose frequencies depend on the longest sequence of a batch, and from which length on."""
    given = getattr(config, "rope_parameters", None) or {}
    for parameters in (given, *given.values()):  # models with several kinds of layers have one for each kind
        kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
        if kind is not None and (kind == "longrope" or "dynamic" in kind):
            own = None if kind != "longrope" else parameters.get("original_max_position_embeddings")
            yield kind, own or getattr(config, "max_position_embeddings", None)


def check_tokenizers(given: PreTrainedTokenizerBase | None, own: PreTrainedTokenizerBase | None, model: object) -> None:
    """Check that the environment's token ids mean the same tokens to the model.

    :param given: the environment's tokenizer, or None, in which case there is nothing to check.
    :param own: the model's tokenizer, or None, in which case there is nothing to check.
    :param model: what the model is called in the error.
    :raises ValueError: if a token of the environment's tokenizer has another id in the model's, or none.
    """
    if given is None or own is None or given is own:
        return
    ids = own.get_vocab()
    strange = [token for token, index in given.get_vocab().items() if ids.get(token) != index]
    if strange:
        raise ValueError(
            f"Expected the environment to use the tokenizer of the model {model!r}; {len(strange)} of its tokens have "
            f"another id there or none, for example {strange[:3]}. Name the model that the environment's tokenizer "
            "belongs to, policy_kwargs={'model': ...} or --model, or make the environment with the tokenizer of this "
            f"one, tokenizer={model!r}."
        )


def check_vocabulary(n_tokens: int, own: PreTrainedTokenizerBase | None, model: object) -> None:
    """As :func:`check_tokenizers`, where of the environment's tokenizer only its size is known.

    :param n_tokens: V, the number of tokens of the environment.
    :param own: the model's tokenizer, or None, in which case there is nothing to check.
    :param model: what the model is called in the error.
    :raises ValueError: if the model's tokenizer has another number of tokens.
    """
    if own is not None and vocabulary_size(own) != n_tokens:
        raise ValueError(
            f"Expected the environment to use the tokenizer of the model {model!r}, which has {vocabulary_size(own)} "
            f"tokens; the environment has {n_tokens}. Name the model that the environment's tokenizer belongs to, "
            "policy_kwargs={'model': ...}, or make the environment with the tokenizer of this one, "
            f"tokenizer={model!r}. For a tokenizer with some more or fewer tokens, give it to the policy: "
            "policy_kwargs={'tokenizer': ...}."
        )
