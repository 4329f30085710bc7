"""The head, applied apart from the model: the same logits as the model's own, small or large, in every architecture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learners import make_env, make_policy, observation_of
from tiny import tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from agents.models.causal_lm import CausalLM
from agents.models.distribution import TokenDistribution
from agents.models.head import LogitMap

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 64, "logits_soft_cap": 5.0, "num_hidden_layers": 3},
    "xlstm": {"num_heads": 4, "num_blocks": 2, "output_logit_soft_cap": 3.0},
    "minicpm3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "dim_model_base": 9,
    },
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8, "attention_chunk_size": 64},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 7.0},
    "hyperclovax": {"logits_scaling": 3.0},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 4.0},
}


def random_model(name: str, times: float = 1.0) -> PreTrainedModel:
    """A random model whose weights are so many times as large as usual."""
    if name not in CONFIG_MAPPING:  # MiniCPM3 came with transformers 5.13, HyperCLOVA X with 5.9
        pytest.skip(f"This version of transformers has no {name}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CONFIG_MAPPING[name](**{**SMALL, **ARCHITECTURES[name]})
        model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(times)
    return model


@pytest.mark.filterwarnings("ignore:.*is run without prefix cache")
@pytest.mark.parametrize("times", [1.0, 8.0])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_the_models_own(name: str, times: float) -> None:
    model = random_model(name, times)
    policy = make_policy(make_env(), model=model, eos_token_id=0)
    contexts = [[5, 6, 7, 250], [9, 8], [31, 40, 5, 6, 7, 8]]
    with torch.no_grad():
        ours = policy.get_distribution(observation_of(contexts, [1, 1, 1])).distribution.logits
        for row, context in enumerate(contexts):
            theirs = torch.log_softmax(model(torch.tensor([context]), use_cache=False).logits[0, -1].double(), dim=-1)
            torch.testing.assert_close(ours[row].double(), theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


def own_map(model: PreTrainedModel) -> LogitMap:
    return CausalLM(model, TokenDistribution(300))._logit_map


class OwnHead(LlamaForCausalLM):
    """Does to its logits what nobody's config says."""

    def change(self, logits: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


class ScaledAndCapped(OwnHead):
    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return 4.0 * torch.tanh(0.7 * logits / 2.5)


class Scaled(OwnHead):
    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return logits * 0.37


class Centred(OwnHead):
    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return logits - logits.mean(dim=-1, keepdim=True)


class CutOff(OwnHead):
    """Differs only where logits are large."""

    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.clamp(-20.0, 20.0)


def with_head(cls: type[OwnHead]) -> OwnHead:
    model = cls(tiny_model("llama").config).eval()
    model.load_state_dict(tiny_model("llama").state_dict())
    return model


def test_a_scale_and_a_cap_of_unknown_names_are_measured() -> None:
    assert own_map(with_head(Scaled)).scale == pytest.approx(0.37, rel=1e-6)
    both = own_map(with_head(ScaledAndCapped))
    assert both.cap == pytest.approx(4.0, rel=1e-6)
    assert both.scale == pytest.approx(0.7 * 4.0 / 2.5, rel=1e-6)
    assert own_map(tiny_model("llama")) == LogitMap()


@pytest.mark.parametrize("cls", [Centred, CutOff])
def test_a_head_that_does_something_else_is_refused_by_name(cls: type[OwnHead]) -> None:
    expected = (
        rf"Expected the logits of {cls.__name__} to be its output embeddings of the last hidden state, scaled or "
        r"capped .* is off by \de-0\d of the largest logit\. This architecture does something else on the way"
    )
    with pytest.raises(ValueError, match=expected):
        own_map(with_head(cls))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "minicpm3"])
def test_the_head_is_found_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    assert own_map(random_model(name).to(dtype)) == own_map(random_model(name))


def test_a_layer_between_the_decoder_and_the_output_embeddings_is_refused_by_name() -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    bert = AutoModelForCausalLM.from_config(CONFIG_MAPPING["bert"](**sizes, is_decoder=True)).eval()
    with pytest.raises(ValueError, match=r"logits of BertLMHeadModel .* does something else on the way"):
        own_map(bert)
    electra = AutoModelForCausalLM.from_config(CONFIG_MAPPING["electra"](**sizes, is_decoder=True)).eval()
    with pytest.raises(ValueError, match=r"decoder of ElectraForCausalLM to give hidden states of 128 units, .* 32"):
        own_map(electra)


class Odd(torch.nn.Module):
    """A decoder that calls its hidden states something else."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **kwargs: Any) -> Any:
        return SimpleNamespace(states=self.inner(**kwargs).last_hidden_state)


class OddModel(LlamaForCausalLM):
    def forward(self, input_ids: Any, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.lm_head(self.model(input_ids=input_ids, use_cache=use_cache).states))

    def get_output_embeddings(self) -> Any:
        return self.lm_head


def test_a_decoder_without_last_hidden_states_is_refused_by_name() -> None:
    model = OddModel(tiny_model("llama").config).eval()
    model.model = Odd(model.model)
    with pytest.raises(ValueError, match="Expected the decoder of OddModel to give a last_hidden_state, got a Simple"):
        own_map(model)


def test_a_model_that_is_its_own_decoder_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    head = model.lm_head
    monkeypatch.setattr(model, "get_output_embeddings", lambda: head)
    monkeypatch.setattr(model, "base_model_prefix", "nothing")
    with pytest.raises(ValueError, match=r"Expected a model with a decoder below its head.*; GPT2LMHeadModel has none"):
        own_map(model)
