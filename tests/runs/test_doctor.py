"""``textrlhf doctor``: each defect, made on purpose, is found under its name; where there is none, all is well."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learners import PROMPTS, constant, even_tokens, make_model
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from agents.cli import main
from agents.models.decoding import CACHE_ARGUMENT
from agents.models.pretrained import load_causal_lm
from agents.runs.config import EnvConfig, TrainConfig
from agents.runs.doctor import CHECKS, examine
from agents.runs.doctor_checks import patient
from agents.runs.doctor_checks.patient import Finding
from agents.runs.doctor_checks.rollouts import spread

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETS_THOUGHTS = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if not loop.last %}{% set text = m.content.split('</think>')[-1] %}{% endif %}"
    "<|{{ m.role }}|>{{ text }}<eos>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def prompts() -> list[dict[str, Any]]:
    return [{"prompt": prompt} for prompt in PROMPTS]


def examined(
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model: PreTrainedModel | None = None,
    env: dict[str, Any] | None = None,
    **run: Any,
) -> dict[str, Finding]:
    """What the doctor says of a random model that was saved with this tokenizer."""
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    (make_model(tokenizer=tokenizer) if model is None else model).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    settings = {"prompts": prompts(), "reward": even_tokens, "max_new_tokens": 8, "gold": None, **(env or {})}
    config = TrainConfig(model=str(directory), env=EnvConfig(**settings), device="cpu", **run)
    return examine(config, n_texts=4, n_tokens=8)


def verdicts(findings: dict[str, Finding]) -> dict[str, str]:
    """Only what isn't well."""
    return {name: finding.verdict for name, finding in findings.items() if finding.verdict != "ok"}


def test_with_the_built_in_model_and_reward_all_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "findings.json"
    assert main(["doctor", "--texts", "8", "--tokens", "16", "--device", "cpu", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["healthy"]
    assert [finding["check"] for finding in result["findings"]] == list(CHECKS)
    assert {finding["verdict"] for finding in result["findings"]} == {"ok"}
    assert not any(finding["advice"] for finding in result["findings"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in CHECKS)


def test_with_a_tiny_model_all_is_well(tmp_path: Path) -> None:
    assert verdicts(examined(tmp_path)) == {}


def test_a_problem_is_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-prompt-tokens", "2", "--texts", "2", "--tokens", "2", "--device", "cpu"]
    assert main(["doctor", *options, "--json", str(tmp_path / "findings.json")]) == 1
    assert not json.loads((tmp_path / "findings.json").read_text())["healthy"]
    assert "problem" in capsys.readouterr().out


# ---- tokenizer and prompts -----------------------------------------------------------------------------------------


def test_a_pad_token_that_ends_texts_is_found(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    findings = examined(tmp_path, tokenizer)
    assert verdicts(findings) == {"pad token": "warning"}
    assert "'<eos>' (0)" in findings["pad token"].found


def test_a_tokenizer_that_appends_eos_is_found(tmp_path: Path) -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
    findings = examined(tmp_path, tokenizer)
    assert verdicts(findings) == {"appended tokens": "warning"}
    assert "'<eos>' (0) behind every text" in findings["appended tokens"].found


def test_several_ends_of_text_are_named(tmp_path: Path) -> None:
    model = make_model()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [0, 7]
    findings = examined(tmp_path, model=model)
    assert verdicts(findings) == {}
    assert findings["end of text"].found.startswith("A text ends at any of 2 tokens: '<eos>' (0), ")


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (CHATML, {}),
        (FORGETS_THOUGHTS, {"chat template": "warning"}),
        (CHATML.replace("<eos>", "<|end|>"), {"end of text": "problem"}),
        ("{{ raise_exception('no') }}", {"prompts": "problem", "chat template": "problem"}),
    ],
    ids=["well", "forgets", "no end", "refuses"],
)
def test_a_chat_template_that_rewrites_history_or_ends_turns_otherwise_is_found(
    template: str, found: dict[str, str], tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = template
    findings = examined(tmp_path, tokenizer, env={"max_prompt_tokens": 40})
    assert {name: verdict for name, verdict in verdicts(findings).items() if verdict != "skipped"} == found


def test_a_template_that_forgets_thinking_is_told_so_in_words(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = FORGETS_THOUGHTS
    said = examined(tmp_path, tokenizer, env={"max_prompt_tokens": 60})["chat template"].found
    assert said == (
        "The chat template rewrites history: the thinking in an answer is written in another way once the user replies."
    )


def test_prompts_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    findings = examined(tmp_path, env={"max_prompt_tokens": 3})
    assert verdicts(findings) == {"prompts": "problem"}
    lengths = [len(tiny_tokenizer()(prompt)["input_ids"]) for prompt in PROMPTS]
    count = sum(length > 3 for length in lengths)
    assert f"{count} of {len(PROMPTS)} prompts have more than 3 tokens" in findings["prompts"].found
    assert f"--max-prompt-tokens {max(lengths)}," in findings["prompts"].advice


def test_prompts_that_are_cut_are_counted(tmp_path: Path) -> None:
    findings = examined(tmp_path, env={"max_prompt_tokens": 3, "overlong_prompts": "truncate_left"})
    assert verdicts(findings) == {"prompts": "warning"}
    assert findings["prompts"].found.endswith("They lose their beginnings.")


# ---- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "name"), [(0, "neighbours"), (1, "padding")])
def test_a_model_that_looks_elsewhere_is_found(
    dim: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any) -> Any:
        model = load_causal_lm(*args)

        def look(_module: Any, _args: Any, output: Any) -> Any:
            output["last_hidden_state"] = output.last_hidden_state + output.last_hidden_state.mean(dim, keepdim=True)
            return output

        model.base_model.register_forward_hook(look)
        return model

    monkeypatch.setattr(patient, "load_causal_lm", load)
    found = verdicts(examined(tmp_path))
    assert found[name] == "problem"
    assert {"padding", "neighbours"} & set(found) == {name}
    assert found["policy"] == "problem"  # which training would say
    assert found["decoding"] == "skipped"


def test_padded_embeddings_are_told_and_missing_ones_are_found(tmp_path: Path) -> None:
    findings = examined(tmp_path / "more", model=make_model(tokenizer=320))
    assert verdicts(findings) == {}
    assert "320 logits for 300 tokens; the 20 others are not used" in findings["vocabulary"].found
    findings = examined(tmp_path / "fewer", model=make_model(tokenizer=280))
    assert findings["vocabulary"].verdict == "problem"
    assert "resize_token_embeddings(300)" in findings["vocabulary"].advice


def test_too_few_positions_are_found(tmp_path: Path) -> None:
    findings = examined(tmp_path, model=make_model(max_position_embeddings=32), env={"max_new_tokens": 20})
    assert verdicts(findings) == {"context length": "problem"}
    assert "at least 36 positions" in findings["context length"].found


# From transformers 5.24 on a state is passed under the name of a cache.
NO_CACHE = "not all of its layers are full attention" if CACHE_ARGUMENT == "cache" else "takes no past_key_values"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (MambaConfig(vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=2), NO_CACHE),
        (
            MistralConfig(
                vocab_size=300,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                sliding_window=8,
            ),
            "not all of its layers are full attention",
        ),
    ],
    ids=["state space", "sliding window"],
)
def test_a_model_without_memo_is_told_why(config: PretrainedConfig, why: str, tmp_path: Path) -> None:
    findings = examined(tmp_path, model=AutoModelForCausalLM.from_config(config).eval())
    assert verdicts(findings) == {"memo": "warning"}
    assert why in findings["memo"].found


def test_the_layers_of_an_adapter_are_named_and_missing_ones_found(tmp_path: Path) -> None:
    findings = examined(tmp_path / "all", lora_r=2)
    assert verdicts(findings) == {}
    assert "on c_attn (2), c_fc (2), c_proj (4)." in findings["LoRA"].found
    assert "reference" not in findings["memory"].found
    findings = examined(tmp_path / "none", lora_r=2, lora_target_modules="q_proj")
    assert findings["LoRA"] == Finding(
        "problem",
        "The model has no layers called q_proj.",
        "Choose --lora-target-modules among c_attn (2), c_fc (2), c_proj (4).",
    )
    assert findings["adapter"].verdict == "problem"
    findings = examined(tmp_path / "part", lora_r=2, lora_target_modules="attn.c_attn, 1.mlp.c_fc")  # as PEFT reads it
    assert verdicts(findings) == {}
    findings = examined(tmp_path / "some", lora_r=2, lora_target_modules="attn.c_attn, q_proj")
    assert findings["LoRA"][:2] == ("warning", "The model has no layers called q_proj.")


def test_ratios_that_are_all_alike_and_tokens_of_all_texts_are_said_as_they_are(tmp_path: Path) -> None:
    assert spread(np.array([1.0, 1.0000001])) == "are 1"
    assert spread(np.array([0.9, 1.1])) == "lie between 0.9 and 1.1"
    assert re.match(r"4 texts, \d+ tokens in all, in [\d.]+ s: \d+ tokens/s; ", examined(tmp_path)["speed"].found)


def test_a_first_ratio_that_rounding_moves_is_found(tmp_path: Path) -> None:
    """So low a temperature multiplies the logits by thirty, and with them what bfloat16 has rounded off in each of
    eight layers. Whether that is worth a warning or is a problem depends on the processor's products.
    """
    for dtype, found in (("float32", set()), ("bfloat16", {"decoding", "first ratio"})):
        model = make_model("llama", num_hidden_layers=8)
        findings = examined(tmp_path, model=model, dtype=dtype, temperature=0.03)
        assert set(verdicts(findings)) == found
        assert f"in {dtype}, the ratios of" in findings["first ratio"].found


def test_more_memory_than_there_is_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.runs.doctor_checks.models._available", lambda device: 10_000)
    findings = examined(tmp_path)
    assert verdicts(findings) == {"memory": "warning"}
    assert "of 10 KiB" in findings["memory"].found


def test_the_memory_of_a_token_is_that_of_its_keys_and_values(tmp_path: Path) -> None:
    found = examined(tmp_path)["memory"].found
    layers, numbers, n_bytes = 2, 2 * 32, 4
    assert f"({layers * numbers * n_bytes} bytes a token, 64 rows)" in found


def test_what_needs_a_model_that_is_not_there_is_skipped(tmp_path: Path) -> None:
    env = EnvConfig(tokenizer="builtin", gold=None)
    findings = examine(TrainConfig(model=str(tmp_path / "nosuch"), env=env, device="cpu"), 2, 2)
    found = verdicts(findings)
    assert found.pop("model") == "problem"
    assert set(found.values()) == {"skipped"}
    assert findings["decoding"].found == "Needs what could not be made: the model."
    assert {"end of text", "prompts"} & set(found) == set()


# ---- the reward ----------------------------------------------------------------------------------------------------


def by_size(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) / len(completions) for text in completions]


def by_order(completions: list[str], **_: Any) -> list[float]:
    return [len(text) + 10.0 * place for place, text in enumerate(completions)]


def not_finite(completions: list[str], **_: Any) -> list[float]:
    return [float("nan") for _ in completions]


class Moody:
    """A reward with a state: it scores every batch one point higher than the last."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        self.calls += 1
        return [len(text) + float(self.calls) for text in completions]


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (by_size, {"batch size": "problem"}),
        (by_order, {"batch order": "problem", "batch size": "problem"}),
        (constant, {"scores": "warning"}),
        (Moody(), {"repeatability": "warning", "batch order": "warning", "batch size": "warning"}),
    ],
    ids=["size", "order", "constant", "moody"],
)
def test_a_reward_that_depends_on_more_than_the_text_is_found(
    reward: Any, expected: dict[str, str], tmp_path: Path
) -> None:
    assert verdicts(examined(tmp_path, env={"reward": reward})) == expected


def test_scores_that_are_not_finite_are_found_and_unknown_rewards_too(tmp_path: Path) -> None:
    findings = examined(tmp_path, env={"reward": not_finite})
    assert findings["scores"].verdict == "problem"
    assert "must return finite numbers, but returned nan" in findings["scores"].found
    findings = examined(tmp_path, env={"reward": "nosuch"})
    assert findings["reward"].verdict == "problem"
    assert findings["scores"].verdict == "skipped"


def test_the_reward_is_given_the_columns_of_its_prompts(tmp_path: Path) -> None:
    def wants(completions: list[str], wanted: list[str], **_: Any) -> list[float]:
        return [float(len(text) + len(want)) for text, want in zip(completions, wanted, strict=True)]

    rows = [{**row, "wanted": "x" * number} for number, row in enumerate(prompts())]
    assert verdicts(examined(tmp_path, env={"reward": wants, "prompts": rows})) == {}


def test_a_task_is_examined_with_its_own_prompts_budget_and_reward() -> None:
    env = EnvConfig(task="arithmetic", gold=None)
    findings = examine(TrainConfig(env=env, device="cpu"), n_texts=4, n_tokens=8)
    assert verdicts(findings) == {"scores": "warning"}  # no text of eight tokens is a solution
    assert "'correct" in findings["scores"].found
