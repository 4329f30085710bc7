"""Models by the names that they go by: GGUF files and PEFT adapters; what a LoRA policy holds, and compares with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from learners import even_tokens
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents.algorithms.ppo import PPO
from agents.cli import main
from agents.models.causal_lm import CausalLM
from agents.models.distribution import TokenDistribution
from agents.models.pretrained import load_causal_lm, tokenizer_beside
from agents.models.reference import Reference
from agents.policies.causal_lm_policy import CausalLMPolicy, load_policy
from text_env.tokenization import load_tokenizer
from text_env.vector_env import TextVectorEnv

# PEFT's own, which these tests use beside ours: it asks transformers for an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A directory with a tiny Llama and its tokenizer."""
    directory = tmp_path / "base"
    tokenizer = tiny_tokenizer()
    tiny_model("llama", tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def environment(tokenizer: Any, rows: int = 4, **options: Any) -> TextVectorEnv:
    return TextVectorEnv(
        rows,
        tokenizer=tokenizer,
        prompts=["The movie", "I", "That film was"],
        reward=even_tokens,  # on which random texts differ
        max_prompt_tokens=8,
        max_new_tokens=6,
        **options,
    )


def trained(model: Any, env: TextVectorEnv, **policy_kwargs: Any) -> PPO:
    """Two rollouts at a learning rate that moves every weight well away from where it was."""
    return PPO(
        "CausalLMPolicy",
        env,
        learning_rate=3e-2,
        n_episodes=4,
        batch_size=2,
        n_epochs=1,
        policy_kwargs={"model": model, **policy_kwargs},
        seed=0,
    ).learn(30)


def greedy(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    """Eight tokens by transformers' own ``generate``."""
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=8, min_new_tokens=8, pad_token_id=1)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def own_greedy(policy: CausalLMPolicy, tokenizer: Any, prompt: str) -> list[int]:
    """The same, by whole forward passes of the policy's own model."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(8):
        logits = policy.lm.model(input_ids=torch.tensor([ids])).logits[0, -1].clone()
        logits[tokenizer.eos_token_id] = -torch.inf
        ids = [*ids, int(logits.argmax())]
    return ids[start:]


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, model: Any, tokenizer: Any, architecture: str = "llama") -> None:
    """A Llama model as llama.cpp's converter writes it: float32, rotary heads interleaved."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    # transformers takes <|endoftext|> for granted in files of this kind, and would add it.
    writer.add_token_list(["<|endoftext|>" if token == tokenizer.eos_token else token for token in tokens])
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in core["merges"]])
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        array = tensor.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in key:
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        name = names.get_name(key, try_suffixes=(".weight",))
        assert name is not None, key
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path: Path, base: Path) -> Path:
    directory = tmp_path / "quantised"
    directory.mkdir()
    path = directory / "tiny.gguf"
    write_gguf(path, AutoModelForCausalLM.from_pretrained(base), tiny_tokenizer())
    return path


def test_a_gguf_file_is_the_model_and_the_tokenizer_that_were_written_into_it(base: Path, gguf_file: Path) -> None:
    original, loaded = AutoModelForCausalLM.from_pretrained(base), load_causal_lm(gguf_file)
    ids = torch.arange(2, 40)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, original(input_ids=ids).logits, rtol=0, atol=1e-5)
    text = "The movie was bad. I loved it!"
    for tokenizer in (load_tokenizer(gguf_file), load_tokenizer(str(gguf_file))):
        assert tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
        assert tokenizer.eos_token_id == 0


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_policy_trained_from_a_gguf_file_is_saved_as_a_plain_directory(
    tmp_path: Path, gguf_file: Path, lora: Any
) -> None:
    env = environment(str(gguf_file))
    policy = trained(str(gguf_file), env, lora=lora).policy
    policy.save_pretrained(tmp_path / "policy")
    assert not (tmp_path / "policy" / "adapter_config.json").exists()
    plain, tokenizer = (
        kind.from_pretrained(tmp_path / "policy", dtype="float32") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    before = load_causal_lm(gguf_file)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (plain, policy.lm.model, before)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)
    assert (logits[0] - logits[2]).abs().max() > 1e-2  # training did move it
    assert greedy(plain, tokenizer, "The movie") == own_greedy(policy, env.tokenizer, "The movie")


def test_a_gguf_file_that_transformers_cannot_read_is_refused_with_what_can_be_done(tmp_path: Path, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    unknown = tmp_path / "unknown.gguf"
    write_gguf(unknown, model, tiny_tokenizer(), architecture="no-such-architecture")
    with pytest.raises(ValueError, match=r"a GGUF file.*unknown\.gguf.*could not be loaded.*quantisation types"):
        load_causal_lm(unknown)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ValueError, match=r"broken\.gguf.*could not be loaded"):
        load_causal_lm(tmp_path / "broken.gguf")
    with pytest.raises(ValueError, match=r"Expected a GGUF file, but there is none at '.*missing\.gguf'"):
        load_causal_lm(tmp_path / "missing.gguf")


# ---- adapters -------------------------------------------------------------------------------------------------------


def write_adapter(directory: Path, base: Path, seed: int = 1) -> Path:
    """An adapter as somebody's fine-tuning leaves it: not zero."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA, task_type="CAUSAL_LM", init_lora_weights=False)
    )
    model.save_pretrained(str(directory))
    return directory


def test_an_adapter_is_loaded_over_its_base_with_the_tokenizer_of_that(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    expected = AutoPeftModelForCausalLM.from_pretrained(adapter)
    loaded = load_causal_lm(adapter)
    ids = torch.arange(2, 40)[None]
    assert torch.equal(loaded(input_ids=ids).logits, expected(input_ids=ids).logits)
    tokenizer = tokenizer_beside(adapter)
    assert tokenizer is not None
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_training_goes_on_from_an_adapter_and_compares_with_where_it_began(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    env = environment(str(adapter))
    started = load_causal_lm(adapter)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        expected = torch.log_softmax(started(input_ids=ids[:, :-1]).logits, dim=-1)[0, 3:]
    expected = expected.gather(-1, ids[0, 4:, None]).squeeze(-1)
    model = trained(str(adapter), env)
    names = [name for name, p in model.policy.lm.named_parameters() if p.requires_grad]
    assert names
    assert all("lora" in name and ".default." in name for name in names)
    mask = torch.zeros(1, ids.shape[1] - 1, dtype=torch.bool)
    mask[:, 3:] = True
    packed = {"input_ids": ids[:, :-1], "action_mask": mask, "prompt_length": torch.tensor([[4]])}
    assert model.reference is not None
    torch.testing.assert_close(model.reference.log_probs(packed, ids[0, 4:]), expected, rtol=0, atol=1e-5)
    assert [name for name, p in model.policy.lm.named_parameters() if p.requires_grad] == names
    with torch.no_grad():
        now = model.policy.evaluate_actions(packed, ids[0, 4:])[1]
    assert (now - expected).abs().max() > 1e-2  # while the policy has gone on
    model.policy.save_pretrained(tmp_path / "policy")
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "policy"))
    assert list(saved.peft_config) == ["default"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert greedy(saved, tokenizer, "The movie") == own_greedy(model.policy, tokenizer, "The movie")


def test_the_kl_to_the_reference_is_zero_at_the_start_also_when_training_goes_on(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    env = environment(str(adapter))
    model = PPO("CausalLMPolicy", env, learning_rate=0.0, n_episodes=4, policy_kwargs={"model": str(adapter)}, seed=0)
    model.learn(20)
    assert np.abs(model.buffer.log_ratio).max() < 1e-5


def test_a_run_that_went_on_from_an_adapter_is_resumed_exactly(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    straight = trained(str(adapter), environment(str(adapter)))
    straight.save(tmp_path / "checkpoint")
    straight.learn(30, reset_num_timesteps=False)
    resumed = PPO.load(tmp_path / "checkpoint", env=environment(str(adapter)))
    resumed.learn(30, reset_num_timesteps=False)
    for (name, mine), (_, theirs) in zip(
        straight.policy.state_dict().items(), resumed.policy.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def test_an_adapter_for_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for other, message in (
        (tiny_model("llama", tiny_tokenizer(), hidden_size=48), "fit"),
        (tiny_model("gpt2", tiny_tokenizer()), "don't fit together"),
    ):
        other.save_pretrained(tmp_path / "other")
        changed = {**config, "base_model_name_or_path": str(tmp_path / "other")}
        (adapter / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(
            ValueError, match=f"Expected the adapter in '.*adapter' to fit its base '.*other'.*{message}"
        ):
            load_causal_lm(adapter)
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")})
    )
    with pytest.raises(ValueError, match=r"to fit its base '.*gone'; that could not be loaded"):
        load_causal_lm(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="to name the base of the adapter"):
        load_causal_lm(adapter)


def test_a_second_adapter_on_top_of_one_is_refused(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    with pytest.raises(ValueError, match="lora=None with a model that is an adapter already"):
        trained(str(adapter), environment(str(adapter)), lora=LORA)


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def test_the_reference_of_a_lora_policy_is_its_base_to_1e_5(base: Path) -> None:
    env = environment(str(base))
    model = trained(str(base), env, lora=LORA)
    untouched = CausalLM(load_causal_lm(base), TokenDistribution(len(env.tokenizer)))
    samples = model.buffer.pack(np.arange(4))
    assert model.reference is not None
    ours = model.reference.log_probs(samples.observations, samples.actions)
    theirs = Reference(untouched).log_probs(samples.observations, samples.actions)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with torch.no_grad():
        now = model.policy.evaluate_actions(samples.observations, samples.actions)[1]
    assert (now - theirs).abs().max() > 1e-2


def tensor_bytes(tensors: Any) -> int:
    unique = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(unique.values())


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_lora_run_holds_one_base_and_at_most_four_adapters(tmp_path: Path, base: Path, goes_on: bool) -> None:
    """Adapter, Adam's two moments, and the frozen copy of an adapter that training went on from."""
    start = write_adapter(tmp_path / "adapter", base) if goes_on else base
    model = trained(str(start), environment(str(start)), lora=None if goes_on else LORA)
    assert model.reference is not None
    base_bytes = tensor_bytes(AutoModelForCausalLM.from_pretrained(base).parameters())
    adapter_bytes = tensor_bytes(p for p in model.policy.lm.parameters() if p.requires_grad)
    optimizer = [x for state in model.policy.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    live = tensor_bytes([*model.policy.parameters(), *model.reference.lm.parameters(), *optimizer])
    assert adapter_bytes > 0
    assert live <= 1.05 * base_bytes + 4 * adapter_bytes


def test_a_bfloat16_base_has_a_float32_adapter_and_rollouts_that_are_what_is_trained(base: Path) -> None:
    env = environment(str(base))
    model = PPO(
        "CausalLMPolicy",
        env,
        learning_rate=0.0,
        n_episodes=4,
        policy_kwargs={"model": str(base), "dtype": "bfloat16", "lora": LORA},
        seed=0,
    ).learn(20)
    types = {p.requires_grad: p.dtype for p in model.policy.lm.parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    samples = model.buffer.pack(np.arange(4))
    with torch.no_grad():
        again = model.policy.evaluate_actions(samples.observations, samples.actions)[1]
    # bfloat16 has eight bits: logits of order 1 differ by some hundredths between one order of sums and another.
    assert (again - samples.old_log_prob).abs().max() < 0.05


def test_a_lora_policy_is_evaluated_as_it_was_trained(tmp_path: Path, base: Path) -> None:
    env = environment(str(base))
    policy = trained(str(base), env, lora=LORA).policy
    policy.save_pretrained(tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy", env)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.lm.hidden_states(ids), policy.lm.hidden_states(ids), rtol=0, atol=1e-5)


def test_the_command_line_trains_an_adapter_and_goes_on_from_it(tmp_path: Path, base: Path) -> None:
    (tmp_path / "prompts.txt").write_text("The movie\nI loved\n")
    common = ["--prompts", str(tmp_path / "prompts.txt"), "--reward", "sentiment", "--total-timesteps", "20"]
    sizes = ["--n-episodes", "4", "--batch-size", "4", "--n-epochs", "1", "--max-new-tokens", "6", "--no-progress"]
    lora = ["--lora-r", "4", "--lora-target-modules", "q_proj,v_proj"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", "--model", str(base), "--run-dir", str(first), *common, *sizes, *lora]) == 0
    config = json.loads((first / "policy" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert main(["train", "--model", str(first / "policy"), "--run-dir", str(second), *common, *sizes]) == 0
    assert (second / "policy" / "adapter_model.safetensors").exists()
    question = ["--policy", str(second / "policy"), "--prompts", str(tmp_path / "prompts.txt"), "--episodes", "4"]
    assert main(["evaluate", *question, "--json", str(tmp_path / "evaluation.json")]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["episodes"] == 4


def test_an_adapter_of_a_live_model_or_a_config_is_saved_merged(tmp_path: Path, base: Path) -> None:
    """Its base is in memory only: the directory that it once came from holds something else."""
    changed = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        changed.get_input_embeddings().weight.mul_(1.5)
    env = environment(str(base))
    ids = torch.arange(2, 40)[None]
    for number, model in enumerate((changed, changed.config)):
        policy = trained(model, env, lora=LORA).policy
        policy.save_pretrained(tmp_path / str(number))
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        with torch.no_grad():
            torch.testing.assert_close(
                saved(input_ids=ids).logits, policy.lm.model(input_ids=ids).logits, rtol=0, atol=1e-4
            )


def test_a_saved_adapter_is_found_from_any_directory(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    trained(base.name, environment(base.name), lora=LORA).policy.save_pretrained(tmp_path / "policy")
    monkeypatch.chdir("/")
    assert load_causal_lm(tmp_path / "policy").num_parameters() > 0


def test_a_live_adapter_model_is_trained_though_peft_loads_it_frozen(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    model = trained(live, environment(str(base)))
    assert [name for name, p in model.policy.lm.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"to be a peft\.PeftModel"):
        load_causal_lm(AutoModelForCausalLM.from_pretrained(adapter))


# Older versions of PEFT warn of the first of them before we refuse it.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
@pytest.mark.parametrize("extra", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_an_adapter_that_trains_weights_of_the_base_is_refused(tmp_path: Path, base: Path, extra: Any) -> None:
    with pytest.raises(ValueError, match="Expected an adapter without modules_to_save"):
        trained(str(base), environment(str(base)), lora={**LORA, **extra})
    config = LoraConfig(**{**LORA, **extra}, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="Expected an adapter without modules_to_save"):
        load_causal_lm(tmp_path / "adapter")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_is_taken_from_its_base_is_refused(base: Path, start: str) -> None:
    with pytest.raises(ValueError, match=f"leaves its base as it is, got init_lora_weights='{start}'"):
        make_lora_policy(base, lora={**LORA, "init_lora_weights": start})


def test_an_adapter_that_is_not_inside_the_model_is_refused(base: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    live = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with pytest.raises(
        ValueError, match=r"Expected an adapter of the model's layers, such as LoRA, got .*PROMPT_TUNING"
    ):
        load_causal_lm(live)


def make_lora_policy(model: Any, **kwargs: Any) -> CausalLMPolicy:
    env = environment(tiny_tokenizer())
    spaces = env.single_observation_space, env.single_action_space
    model = str(model) if isinstance(model, Path) else model
    return CausalLMPolicy(*spaces, lambda _: 0.0, model=model, tokenizer=env.tokenizer, **kwargs)


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_critic_beside_an_adapter_is_saved_and_loaded(tmp_path: Path, base: Path, goes_on: bool) -> None:
    bins = (-1.0, 1.0, 11) if goes_on else None
    start = {"model": write_adapter(tmp_path / "adapter", base)} if goes_on else {"model": base, "lora": LORA}
    policy = make_lora_policy(**start, separate_critic=True, value_bins=bins)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        own, critics = (decoder(input_ids=ids).last_hidden_state for decoder in (policy.lm.backbone, policy.critic))
        torch.testing.assert_close(own, critics, rtol=0, atol=1e-4)  # the copy is of the policy as it is
        for name, p in policy.named_parameters():
            if name.startswith(("critic.", "value_head.")):
                assert p.requires_grad
                p.add_(0.01 * torch.randn_like(p))
    policy.save_pretrained(tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy", environment(str(base)), "cpu", separate_critic=True, value_bins=bins)
    loaded.load_value_head(tmp_path / "policy")
    for name, weight in policy._critic_state().items():
        assert torch.equal(weight, loaded._critic_state()[name])


def test_an_adapter_is_remembered_once_and_without_dropout(base: Path) -> None:
    config = LoraConfig(**LORA, task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=0.5)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    policy = make_lora_policy(model)
    Reference.of(policy)
    assert not any(module.training for module in policy.lm.model.modules())
    with pytest.raises(ValueError, match="remembered for no reference yet"):
        Reference.of(policy)
    with pytest.raises(ValueError, match="'reference' is what an earlier algorithm compares this model with"):
        load_causal_lm(model)
    model.delete_adapter("reference")
    assert load_causal_lm(model) is model


@pytest.mark.parametrize("wrap", [False, True])
def test_a_live_model_is_copied_for_a_reference_and_trained_itself(base: Path, wrap: bool) -> None:
    live: Any = AutoModelForCausalLM.from_pretrained(base)
    if wrap:
        live = get_peft_model(live, LoraConfig(**LORA, task_type="CAUSAL_LM", init_lora_weights=False))
    env = environment(str(base))
    reference = Reference.load(live, len(env.tokenizer), "cpu", eos_token_id=env.eos_token_ids)
    assert any(p.requires_grad for p in live.parameters())
    before = {name: weight.clone() for name, weight in reference.lm.state_dict().items()}
    kwargs: dict[str, Any] = {"reference": reference, "policy_kwargs": {"model": live}}
    model = PPO("CausalLMPolicy", env, learning_rate=0.05, n_episodes=4, batch_size=4, seed=0, **kwargs).learn(60)
    assert np.abs(model.buffer.log_ratio).max() > 1e-3
    assert all(torch.equal(weight, before[name]) for name, weight in reference.lm.state_dict().items())


def test_an_adapter_on_a_head_that_shares_its_weights_is_saved_as_it_writes(tmp_path: Path) -> None:
    live = tiny_model("llama", tiny_tokenizer(), tie_word_embeddings=True)
    assert live.lm_head.weight is live.model.embed_tokens.weight
    lora = {"r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    with pytest.warns(UserWarning, match="tie_word_embeddings"):  # PEFT's, of what is mended here
        policy = make_lora_policy(live, lora=lora)
    policy.save_pretrained(tmp_path / "policy")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        expected = policy.lm.model(input_ids=ids).logits
        torch.testing.assert_close(saved(input_ids=ids).logits, expected, rtol=0, atol=1e-4)


def test_a_broken_gguf_file_is_an_error_of_one_line_on_the_command_line(
    tmp_path: Path, gguf_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.gguf").write_bytes(gguf_file.read_bytes()[:200])
    assert main(["train", "--model", str(tmp_path / "cut.gguf"), "--run-dir", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().out
    assert "cut.gguf" in message
    assert "could not be loaded" in message
