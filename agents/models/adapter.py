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
        """Keep a frozen copy of the adapter as it is now, for :meth:`as_remembered`. It takes a few megabytes."""
        wrapper = self.wrapper
        trainable = {name: p.requires_grad for name, p in wrapper.named_parameters()}
        with quiet_peft():
            wrapper.add_adapter(REFERENCE, wrapper.peft_config[ADAPTER])
        weights = get_peft_model_state_dict(wrapper, adapter_name=ADAPTER)
        set_peft_model_state_dict(wrapper, weights, adapter_name=REFERENCE)
        wrapper.set_adapter(ADAPTER)
        for name, parameter in wrapper.named_parameters():
            parameter.requires_grad_(trainable.get(name, False))

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
            merged = copy.deepcopy(self.wrapper).cpu().float().merge_and_unload(adapter_names=[ADAPTER])
            merged.save_pretrained(directory)


def check_adapter(model: PeftModel) -> None:
    """Check that an adapter can be switched off completely. Otherwise the reference, which shares the base model, would
    change with the policy.

    :param model: the model, with the adapter that is going to be trained.
    :raises ValueError: if training would change weights of the base model as well.
    """
    config: Any = model.peft_config[ADAPTER]
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
