"""The LoRA adapter inside a language model: checking it, saving it, and restoring what it was before training.

The frozen reference of the KL penalty needs no second copy of a base model if the adapter alone is trained. It is the
same model with the adapter switched off or, if training goes on from an existing adapter, with a frozen copy of that
adapter switched on.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

ADAPTER, REFERENCE = "default", "reference"
"""Names of the adapter that is trained, and of its frozen copy."""


class Adapter:
    """An adapter in a model, and PEFT's wrapper around that model. The wrapper owns no weights but those in the model.

    :param wrapper: PEFT's model, with one adapter, called :data:`ADAPTER`.
    """

    def __init__(self, wrapper: PeftModel) -> None:
        self.wrapper = wrapper

    def remember(self) -> None:
        """Keep a frozen copy of the adapter as it is now, for :meth:`as_remembered`. It takes a few megabytes.

        :raises ValueError: if there is such a copy, which a reference may be using.
        """
        wrapper = self.wrapper
        if REFERENCE in wrapper.peft_config:
            raise ValueError(
                "Expected a policy whose adapter is remembered for no reference yet, since there is room for one copy "
                "in the model. For a second reference save the policy, and use Reference.load(directory, n_tokens)."
            )
        trainable = {name: p.requires_grad for name, p in wrapper.named_parameters()}
        with quiet_peft():
            wrapper.add_adapter(REFERENCE, wrapper.peft_config[ADAPTER])
        weights = get_peft_model_state_dict(wrapper, adapter_name=ADAPTER)
        set_peft_model_state_dict(wrapper, weights, adapter_name=REFERENCE)
        wrapper.set_adapter(ADAPTER)
        for name, parameter in wrapper.named_parameters():
            parameter.requires_grad_(trainable.get(name, False))
        wrapper.eval()  # the copy has a dropout of its own

    @contextlib.contextmanager
    def as_remembered(self) -> Iterator[None]:
        """A context manager in which the model is what it was before training: with the frozen copy of the adapter if
        :meth:`remember` made one, else without an adapter.

        :return: the context manager.
        """
        model: nn.Module = self.wrapper
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for layer in layers:
            if REFERENCE in layer._get_available_adapters():
                layer.set_adapter(REFERENCE)
            else:
                layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_adapter(ADAPTER)
                layer.enable_adapters(True)
            # Switching adapters also changes which parameters are trainable.
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for parameter in trainable:
                parameter.requires_grad_(True)

    def save_pretrained(self, directory: Path) -> None:
        """Write a directory that transformers loads without this package.

        If transformers can load the base model by its name, the adapter alone is written. Otherwise (a GGUF file, a
        config, a live model) the adapter is merged into the base, in float32, in which the sum of both loses nothing.

        :param directory: an existing directory.
        """
        if self.wrapper.peft_config[ADAPTER].base_model_name_or_path:
            self.wrapper.save_pretrained(str(directory), selected_adapters=[ADAPTER])
        else:
            merge(copy.deepcopy(self.wrapper).cpu().float()).save_pretrained(directory)


def merge(model: PeftModel) -> PreTrainedModel:
    """
    :param model: PEFT's wrapper. What is in it is changed.
    :return: the model inside, with the adapter added to its weights. Where the adapter changes one of two layers that
        share their weights, the embeddings and the head, each has weights of its own in it.
    """
    base: Any = unwrapped(model)
    shared = base.get_input_embeddings(), base.get_output_embeddings()
    weights = [getattr(layer, "base_layer", layer).weight for layer in shared if layer is not None]
    if any(isinstance(layer, BaseTunerLayer) for layer in shared) and weights[0] is weights[-1] and len(weights) == 2:
        head: Any = getattr(shared[1], "base_layer", shared[1])
        head.weight = nn.Parameter(weights[1].detach().clone(), requires_grad=False)
        base.config.get_text_config().tie_word_embeddings = base.config.tie_word_embeddings = False
    with quiet_peft():
        return cast(PreTrainedModel, model.merge_and_unload(adapter_names=[ADAPTER]))


# Ways in which LoRA can be initialised that take the adapter's product away from the base, so that both together are
# the model, and neither is without the other.
CHANGES_THE_BASE = frozenset({"pissa", "olora", "corda", "loftq"})


def check_adapter(model: PeftModel) -> None:
    """Check that an adapter can be switched off completely, and leaves the base as it was. Otherwise the reference,
    which shares the base model, would change with the policy, or be another model.

    :param model: the model, with the adapter that is going to be trained.
    :raises ValueError: if training would change weights of the base model as well, if the adapter is not inside the
        model's layers, or if it was initialised by changing the base.
    """
    config: Any = model.peft_config[ADAPTER]
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"Expected an adapter of the model's layers, such as LoRA, got {config.peft_type}: what it puts before the "
            "text or between the layers is no part of the model inside, which is what writes and is trained here."
        )
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().partition("_")[0] in CHANGES_THE_BASE:
        raise ValueError(
            f"Expected an adapter that leaves its base as it is, got init_lora_weights={start!r}, which takes what the "
            "adapter adds from the base: without the adapter it would be no reference. Leave init_lora_weights out; an "
            "adapter that is trained already can be merged into its base (PEFT's merge_and_unload)."
        )
    if getattr(config, "modules_to_save", None) or getattr(config, "bias", "none") != "none":
        raise ValueError(
            "Expected an adapter without modules_to_save and with bias='none', since weights of the base that are "
            f"trained themselves can't be switched off for the reference; got modules_to_save={config.modules_to_save} "
            f"and bias={config.bias!r}. Merge it into its base first (PEFT's merge_and_unload)."
        )


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """A context manager in which PEFT does not warn of GPT-2's transposed layers, which it handles correctly, and of
    its own use of deprecated names.

    :return: the context manager.
    """
    with warnings.catch_warnings():
        for message in ("fan_in_fan_out is set to False", "`is_gradient_checkpointing` is deprecated"):
            warnings.filterwarnings("ignore", message=message)
        yield


def unwrapped(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """
    :param model: a model, or PEFT's wrapper around one.
    :return: the model itself, with the adapter inside if there is one.
    """
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
