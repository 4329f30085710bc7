"""The score of a text never depends on the texts beside it, on pad tokens, or on what a name stood for before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import KINDS, tiny_classifier, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    FNetConfig,
    FNetForSequenceClassification,
    Gemma3Config,
    Gemma3ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from agents.models.pretrained import add_lora
from agents.reward_models.train import load_base
from text_env.classifier_reward import SequenceClassifierReward
from text_env.rewards import FinishedTexts, RewardError, make_reward, score

SHORT, LONG, ENDED = "w3", " ".join(f"w{number}" for number in range(9, 17)), "w4 w5 <eos>"
TEXTS = [SHORT, LONG, ENDED, "<eos> w7 <eos> <eos>", "w1 w2 w3 w4 w5"]


def words_tokenizer(pad: str | None = None) -> PreTrainedTokenizerFast:
    """Whole words: w0 … w29 are the ids 3 … 32, behind <unk>, <pad> and <eos>."""
    words = ["<unk>", "<pad>", "<eos>", *(f"w{number}" for number in range(30))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", pad_token=pad)


def scores(model: Any, tokenizer: Any, texts: list[str] = TEXTS, **kwargs: Any) -> list[float]:
    reward = SequenceClassifierReward(model, tokenizer, **kwargs)
    return score(reward, FinishedTexts(texts, [""] * len(texts), [[]] * len(texts))).tolist()


def at_the_last_token(model: Any, tokenizer: Any) -> list[float]:
    """The head on the hidden state of each text's very last token, worked out without the classifier's own forward."""
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state
            expected.append(float(model.score(hidden[0, -1])[0]))
    assert np.std(expected) > 0.1  # texts are told apart
    return expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config_pad", [None, 0, 1, 2, 6])
@pytest.mark.parametrize("tokenizer_pad", [None, "<pad>", "<eos>", "w3"])
def test_a_decoders_score_is_that_of_the_last_token_whatever_is_a_pad_token(
    kind: str, config_pad: int | None, tokenizer_pad: str | None
) -> None:
    tokenizer = words_tokenizer(tokenizer_pad)
    model = tiny_classifier(kind, tokenizer, pad_token_id=config_pad)
    expected = at_the_last_token(model, tokenizer)
    for batch_size in (1, 2, 8):
        assert scores(model, tokenizer, batch_size=batch_size) == pytest.approx(expected, abs=1e-4)
    assert model.config.pad_token_id == config_pad
    assert not model._forward_pre_hooks
    assert not model.score._forward_hooks


def test_a_decoders_texts_share_a_forward_pass_although_their_lengths_differ() -> None:
    tokenizer = words_tokenizer()
    model = tiny_classifier("llama", tokenizer)
    reward = SequenceClassifierReward(model, tokenizer)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    for _ in range(3):
        score(reward, FinishedTexts(TEXTS, [""] * 5, [[]] * 5))
    assert sizes == [5, 1, 5, 5, 5]  # the second: once, the first text is scored alone as well


@pytest.mark.parametrize("tokenizer_pad", [None, "<pad>", "<eos>"])
def test_an_adapter_and_a_composite_model_are_scored_alike_alone_and_together(tokenizer_pad: str | None) -> None:
    tokenizer = words_tokenizer(tokenizer_pad)
    lora = {"task_type": "SEQ_CLS", "r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    adapted = add_lora(tiny_classifier("llama", tokenizer), lora).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer), "pad_token_id": None}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    composite = Gemma3ForSequenceClassification(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, num_labels=1)
    ).eval()
    torch.nn.init.normal_(composite.score.weight)
    for model in (adapted, composite):
        together = scores(model, tokenizer)
        assert np.std(together) > 1e-3
        assert together == pytest.approx(scores(model, tokenizer, batch_size=1), abs=1e-4)


def test_encoders_that_do_not_keep_padding_out_are_scored_without_any() -> None:
    tokenizer = words_tokenizer("<pad>")
    torch.manual_seed(0)
    fnet = FNetForSequenceClassification(
        FNetConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, intermediate_size=16, num_labels=1)
    ).eval()
    xlnet = XLNetForSequenceClassification(
        XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=16, num_labels=1, summary_type="last")
    ).eval()
    for model, head in ((fnet, fnet.classifier), (xlnet, xlnet.logits_proj)):
        torch.nn.init.normal_(head.weight, std=3.0)
        tokenizer.model_input_names = ["input_ids", *(["attention_mask"] if model is xlnet else [])]
        alone = scores(model, tokenizer, batch_size=1)
        assert np.std(alone) > 0.05
        assert scores(model, tokenizer) == pytest.approx(alone, abs=1e-4)
        reward = SequenceClassifierReward(model, tokenizer)
        reward._may_pad = True
        padded = score(reward, FinishedTexts(TEXTS, [""] * len(TEXTS), [[]] * len(TEXTS)))
        assert padded.tolist() != pytest.approx(alone, abs=0.01)


def rope_model(**parameters: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=parameters.pop("positions"),
        rope_parameters={"rope_theta": 100.0, **parameters},
        initializer_range=0.5,
        num_labels=1,
    )
    return LlamaForSequenceClassification(config).eval()


def test_rotary_embeddings_that_change_with_the_longest_text_change_no_other_score() -> None:
    tokenizer = words_tokenizer("<pad>")
    factors = {"short_factor": [1.0] * 8, "long_factor": [9.0] * 8, "original_max_position_embeddings": 4}
    model = rope_model(positions=32, rope_type="longrope", factor=8.0, **factors)
    assert scores(model, tokenizer) == pytest.approx(scores(model, tokenizer, batch_size=1), abs=1e-4)
    model = rope_model(positions=6, rope_type="dynamic", factor=8.0)
    with pytest.raises(RewardError, match=r"at most 6 tokens, since .* got 8 tokens: pass max_length=6"):
        scores(model, tokenizer)
    assert len(scores(model, tokenizer, max_length=6)) == 5


def test_a_pad_token_that_the_model_has_no_embedding_for_is_never_looked_up() -> None:
    tokenizer = words_tokenizer()
    model = tiny_classifier("gpt2", tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    assert scores(model, tokenizer) == pytest.approx(at_the_last_token(model, tokenizer), abs=1e-4)


# What a reward model is trained from


@pytest.mark.parametrize("tokenizer_pad", [None, "<pad>", "<eos>"])
def test_a_base_judges_a_text_alike_alone_and_together(tmp_path: Path, tokenizer_pad: str | None) -> None:
    tiny_model("llama", words_tokenizer(), pad_token_id=6).save_pretrained(tmp_path)
    words_tokenizer(tokenizer_pad).save_pretrained(tmp_path)
    model, tokenizer = load_base(str(tmp_path), "float32", conversational=False)
    model.eval()
    torch.nn.init.normal_(model.score.weight)
    expected = at_the_last_token(model, tokenizer)
    with torch.no_grad():
        inputs = tokenizer(TEXTS, padding=True, padding_side="right", return_tensors="pt")
        together = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0].tolist()
    assert together == pytest.approx(expected, abs=1e-4)
    assert model.config.pad_token_id == tokenizer.pad_token_id


# Names


def save_classifier(directory: Path, seed: int) -> None:
    tokenizer = words_tokenizer("<pad>")
    tiny_classifier("llama", tokenizer, seed=seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def weights(reward: Any) -> float:
    return float(reward.model.score.weight.detach().sum())


def test_a_directory_that_was_trained_again_is_loaded_again(tmp_path: Path) -> None:
    save_classifier(tmp_path, seed=0)
    first = make_reward(tmp_path)
    assert make_reward(tmp_path) is first
    save_classifier(tmp_path, seed=1)
    again = make_reward(tmp_path)
    assert weights(again) == float(tiny_classifier("llama", words_tokenizer(), seed=1).score.weight.detach().sum())
    assert weights(first) != weights(again)
    # Also where the size and all files but one are as they were.
    state = (tmp_path / "config.json").stat()
    os.utime(tmp_path / "config.json", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert make_reward(tmp_path) is not again


def test_a_relative_name_means_what_it_means_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate("ab"):
        save_classifier(tmp_path / name / "model", seed)
    monkeypatch.chdir(tmp_path / "a")
    first = make_reward("model")
    monkeypatch.chdir(tmp_path / "b")
    second = make_reward("model")
    assert weights(first) != weights(second)
    assert make_reward(tmp_path / "b" / ".." / "a" / "model") is first
