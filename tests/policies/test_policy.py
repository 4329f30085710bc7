"""The policy and the language model below it: what may be given, what is saved, what is said when it does not fit."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from learners import (
    EOS,
    counted_forwards,
    largest_difference,
    length_of,
    make_env,
    make_model,
    make_policy,
    observation_of,
    plain_log_probs,
    plain_value,
    save_model,
    tensors_of,
    weights_of,
)
from tiny import KINDS, tiny_classifier, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, T5Config, T5ForConditionalGeneration

from agents.models.critic import ValueHead
from agents.models.distribution import LogProbAndEntropy
from agents.models.pretrained import load_causal_lm, tokenizer_beside
from agents.models.reference import Reference
from agents.policies.causal_lm_policy import CausalLMPolicy, load_policy
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sampling import sample_texts
from agents.rollouts.sb3_vec_env import TextVecEnv
from text_env.tokenization import pretrained_tokenizer

LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


# ---- SB3's contract ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_forward_gives_actions_values_and_log_probs_that_belong_together(kind: str) -> None:
    env = make_env(5)
    policy = make_policy(env, kind)
    observation = tensors_of(env.reset(seed=0)[0])
    with torch.no_grad():
        actions, values, log_prob = policy.forward(observation)
    assert actions.shape == (5,)
    assert actions.dtype == torch.int64
    assert values.shape == (5, 1)
    assert log_prob.shape == (5,)
    evaluated_values, evaluated_log_prob, entropy = policy.evaluate_actions(observation, actions)
    torch.testing.assert_close(evaluated_values, values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(evaluated_log_prob, log_prob, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(policy.predict_values(observation), values, atol=1e-5, rtol=1e-5)
    distribution = policy.get_distribution(observation)
    torch.testing.assert_close(distribution.log_prob(actions), log_prob, atol=1e-5, rtol=1e-5)
    assert entropy is not None
    torch.testing.assert_close(distribution.entropy(), entropy, atol=1e-5, rtol=1e-5)


def test_deterministic_actions_are_the_most_probable_tokens() -> None:
    env = make_env(4)
    policy = make_policy(env)
    observation = env.reset(seed=0)[0]
    actions, _ = policy.predict(observation, deterministic=True)
    for row, action in enumerate(actions):
        context = observation["input_ids"][row][observation["attention_mask"][row] == 1].tolist()
        assert action == int(plain_log_probs(policy, context, 0).argmax())


def test_log_prob_and_entropy_are_those_worked_out_by_hand() -> None:
    # Logits log 1, log 2, log 5 and a forbidden token: probabilities 1/8, 2/8, 5/8, 0.
    logits = torch.tensor([[1.0, 2.0, 5.0, 0.0]], dtype=torch.float64).log().requires_grad_()
    log_prob, entropy = LogProbAndEntropy.apply(logits, torch.tensor([1]))
    assert float(log_prob.detach()) == pytest.approx(np.log(0.25))
    # −(⅛ log ⅛ + ¼ log ¼ + ⅝ log ⅝) = 0.259930 + 0.346574 + 0.293752
    assert float(entropy.detach()) == pytest.approx(0.900256, abs=1e-6)
    (log_prob + entropy).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad[0, :3]).all()
    # d log π(1): 1[i = 1] − π_i;  d entropy: −π_i (log π_i + H)
    probabilities = np.array([1, 2, 5]) / 8
    expected = (np.arange(3) == 1) - probabilities - probabilities * (np.log(probabilities) + 0.9002560)
    np.testing.assert_allclose(logits.grad[0, :3], expected, atol=1e-6)
    assert float(logits.grad[0, 3]) == 0.0


def test_the_closed_form_gradient_of_log_prob_and_entropy_is_the_numerical_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    actions = torch.tensor([0, 6, 3, 3, 1])
    assert torch.autograd.gradcheck(lambda x: LogProbAndEntropy.apply(x, actions), (logits,))


def test_values_are_zero_until_something_is_learned() -> None:
    env = make_env(3)
    policy = CausalLMPolicy(env.single_observation_space, env.single_action_space, lambda _: 0.1, model=make_model())
    assert policy.predict_values(tensors_of(env.reset()[0])).tolist() == [[0.0], [0.0], [0.0]]


def test_adams_epsilon_is_the_one_that_matters_early_on() -> None:
    assert make_policy(make_env()).optimizer.defaults["eps"] == 1e-5
    assert make_policy(make_env(), optimizer_kwargs={"eps": 1e-7}).optimizer.defaults["eps"] == 1e-7


def test_a_copy_of_a_policy_is_independent_and_trains() -> None:
    env = make_env(3)
    policy = make_policy(env)
    observation = tensors_of(env.reset(seed=0)[0])
    with torch.no_grad():
        policy.forward(observation)  # the memo holds something
    twin = copy.deepcopy(policy)
    before = weights_of(policy)
    twin.optimizer.zero_grad()
    (-twin.evaluate_actions(observation, torch.tensor([5, 6, 7]))[1].mean()).backward()
    twin.optimizer.step()
    assert largest_difference(before, weights_of(policy)) == 0.0
    assert largest_difference(before, weights_of(twin)) > 1e-4
    context = observation["input_ids"][0][observation["attention_mask"][0] == 1].tolist()
    with torch.no_grad():
        log_probs = torch.log_softmax(twin.get_distribution(observation).distribution.logits[0].double(), dim=-1)
    torch.testing.assert_close(log_probs, plain_log_probs(twin, context, 0), atol=1e-5, rtol=1e-5)


# ---- models --------------------------------------------------------------------------------------------------------


def test_a_model_goes_by_directory_path_config_or_itself(tmp_path: Path) -> None:
    name = save_model(tmp_path / "model")
    by_name, by_path = load_causal_lm(name), load_causal_lm(tmp_path / "model")
    assert largest_difference(weights_of(by_name), weights_of(by_path)) == 0.0
    assert load_causal_lm(by_name) is by_name
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2)
    assert load_causal_lm(config, "bfloat16").dtype == torch.bfloat16
    for model in (name, tmp_path / "model", config, by_name):
        assert make_policy(make_env(), model=model).distribution.n_tokens == 300


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", torch.bfloat16])
def test_weights_have_the_dtype_that_was_asked_for(tmp_path: Path, dtype: Any) -> None:
    policy = make_policy(make_env(), model=save_model(tmp_path / "model"), dtype=dtype)
    expected = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert policy.lm.model.dtype == expected
    assert policy.value_head.weight.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    observation = observation_of([[5, 6, 7]], [2])
    with torch.no_grad():
        _, values, log_prob = policy.forward(observation)
    assert values.dtype == log_prob.dtype == policy.value_head.weight.dtype  # so that `.numpy()` works


def test_padded_embeddings_are_fine_and_their_logits_are_left_out() -> None:
    policy = make_policy(make_env(), model=tiny_model("llama", 320))
    logits = policy.get_distribution(observation_of([[5, 6]], [1])).distribution.logits
    assert logits.shape == (1, 300)
    with torch.no_grad():
        torch.testing.assert_close(logits[0].double(), plain_log_probs(policy, [5, 6], 1), atol=1e-5, rtol=1e-5)


def test_a_model_with_fewer_logits_than_tokens_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"at least 300 logits.* GPT2LMHeadModel has 280.*resize_token_embeddings\(300\)"
    ):
        make_policy(make_env(), model=tiny_model("gpt2", 280))


def test_an_unknown_model_is_refused_with_what_was_expected() -> None:
    with pytest.raises(
        ValueError, match=r"Expected model to be 'builtin', a directory .* or a hub name; got 'no/such-model'"
    ):
        make_policy(make_env(), model="no/such-model")


def test_a_model_that_is_no_causal_language_model_is_refused() -> None:
    config = T5Config(vocab_size=300, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    for model in (T5ForConditionalGeneration(config), make_model("gpt2").base_model):
        name = type(model).__name__
        with pytest.raises(
            ValueError, match=rf"Expected a causal language model \(a decoder with a head\), got {name}"
        ):
            make_policy(make_env(), model=model)


@pytest.mark.parametrize("dtype", ["int64", "float31", "load"])
def test_a_dtype_that_is_none_is_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(ValueError, match=f"Expected dtype 'auto', 'float32', .* got '{dtype}'"):
        make_policy(make_env(), model=save_model(tmp_path / "model"), dtype=dtype)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"Expected a finite temperature > 0, got {temperature}. For greedy actions"):
        make_policy(make_env(), temperature=temperature)


def test_continuous_exploration_is_refused() -> None:
    with pytest.raises(ValueError, match="use_sde=True is for continuous actions"):
        make_policy(make_env(), use_sde=True)
    with pytest.raises(ValueError, match="continuous actions"):
        make_policy(make_env()).reset_noise()


def test_a_minimum_length_needs_to_know_eos() -> None:
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, eos_token_id=None, bos_token_id=None)
    with pytest.raises(ValueError, match="min_new_tokens=2 needs eos_token_id"):
        make_policy(make_env(), model=config, eos_token_id=None, min_new_tokens=2)


def test_the_ends_of_a_text_are_the_tokenizers_and_those_of_the_generation_config(tmp_path: Path) -> None:
    by_tokenizer = make_policy(make_env(), model=save_model(tmp_path / "model"), eos_token_id=None)
    by_config = make_policy(make_env(), model=tiny_model("gpt2", eos_token_id=[7, 8]), eos_token_id=None)
    assert by_tokenizer.distribution.eos_token_ids == (EOS,)
    assert by_config.distribution.eos_token_ids == (7, 8)


def test_other_spaces_are_refused() -> None:
    env = make_env()
    box = spaces.Box(0, 1, (4,), np.float32)
    with pytest.raises(ValueError, match=r"expected a Dict observation space with .*'attention_mask', 'input_ids'"):
        CausalLMPolicy(box, env.single_action_space, lambda _: 0.1)
    without = spaces.Dict({"input_ids": env.single_observation_space["input_ids"]})
    with pytest.raises(ValueError, match="expected a Dict observation space"):
        CausalLMPolicy(without, env.single_action_space, lambda _: 0.1)
    for actions in (box, spaces.Discrete(300, start=1)):
        with pytest.raises(ValueError, match="expected a Discrete action space starting at 0"):
            CausalLMPolicy(env.single_observation_space, actions, lambda _: 0.1)


# ---- LoRA and the separate critic ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_with_lora_only_the_adapter_and_the_value_head_are_trained(kind: str) -> None:
    env = make_env(3)
    policy = make_policy(env, kind, lora=LORA)
    before = weights_of(policy)
    observation = tensors_of(env.reset(seed=0)[0])
    values, log_prob, _ = policy.evaluate_actions(observation, torch.tensor([5, 6, 7]))
    (values.mean() - log_prob.mean()).backward()
    policy.optimizer.step()
    moved = {name for name, tensor in policy.state_dict().items() if not tensor.equal(before[name])}
    assert moved
    assert all("lora_" in name or name.startswith("value_head.") for name in moved)
    # Each weight once: the PEFT wrapper must not be registered beside the model that it wraps.
    assert len({id(p) for p in policy.parameters()}) == len(list(policy.parameters()))
    assert not any("base_model.model" in name for name in before)


def test_a_fresh_lora_adapter_changes_nothing() -> None:
    plain = make_policy(make_env(), "llama")
    adapted = make_policy(make_env(), "llama", lora={"r": 4, "target_modules": "all-linear"})
    observation = observation_of([[5, 6, 7]], [2])
    for ours, theirs in zip(plain.forward(observation, True), adapted.forward(observation, True), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_reference_of_a_lora_policy_is_its_base_without_a_second_copy() -> None:
    policy = make_policy(make_env(), "llama", lora=LORA)
    base = make_policy(make_env(), "llama")
    samples = {"input_ids": torch.tensor([[5, 6, 7]]), "action_mask": torch.tensor([[False, True, True]])}
    observation, actions = {**samples, "prompt_length": torch.tensor([[2]])}, torch.tensor([9, 10])
    adapted = policy.evaluate_actions(observation, actions)[1].detach()
    reference = Reference.of(policy)
    assert reference.lm is policy.lm
    torch.testing.assert_close(
        reference.log_probs(observation, actions), base.evaluate_actions(observation, actions)[1].detach()
    )
    assert float((adapted - reference.log_probs(observation, actions)).abs().max()) > 1e-3
    assert policy.evaluate_actions(observation, actions)[1].detach().equal(adapted)


def test_a_critic_of_its_own_is_not_asked_where_only_actions_are() -> None:
    env = make_env(3)
    policy = make_policy(env, separate_critic=True)
    observation = env.reset(seed=0)[0]
    assert policy.critic is not None
    with counted_forwards(policy.critic) as shapes:
        policy.predict(observation)
        assert shapes == []
        policy.forward(tensors_of(observation))
        assert len(shapes) == 1


def test_a_separate_critic_learns_without_moving_the_actor() -> None:
    env = make_env(3)
    policy = make_policy(env, separate_critic=True)
    before = weights_of(policy)
    observation = tensors_of(env.reset(seed=0)[0])
    policy.evaluate_actions(observation, torch.tensor([5, 6, 7]))[0].sum().backward()
    policy.optimizer.step()
    moved = {name.split(".")[0] for name, tensor in policy.state_dict().items() if not tensor.equal(before[name])}
    assert moved == {"critic", "value_head"}
    context = observation["input_ids"][1][observation["attention_mask"][1] == 1].tolist()
    assert float(policy.predict_values(observation)[1].detach()) == pytest.approx(
        plain_value(policy, context), abs=1e-5
    )


# ---- saving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_is_saved_is_a_plain_hugging_face_directory(kind: str, tmp_path: Path) -> None:
    env = make_env(1)
    policy = make_policy(env, kind, tokenizer=env.tokenizer)
    policy.save_pretrained(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    inputs = tokenizer("The movie", return_tensors="pt")
    written = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    expected = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    [info] = sample_texts(policy, env, ["The movie"], deterministic=True)
    assert info["completion"] == expected
    loaded = load_policy(tmp_path / "policy", env, device="cpu")
    assert sample_texts(loaded, env, ["The movie"], deterministic=True)[0]["completion"] == expected


def test_a_lora_policy_is_saved_as_an_adapter_that_loads_over_its_base(tmp_path: Path) -> None:
    env = make_env(1)
    policy = make_policy(env, model=save_model(tmp_path / "base"), lora=LORA)
    policy.save_pretrained(tmp_path / "policy")
    assert (tmp_path / "policy" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "policy" / "model.safetensors").exists()
    loaded = load_policy(tmp_path / "policy", env, device="cpu")
    observation = observation_of([[5, 6, 7]], [2])
    with torch.no_grad():
        ours, theirs = (p.get_distribution(observation).distribution.logits for p in (policy, loaded))
        base = load_policy(tmp_path / "base", env, device="cpu").get_distribution(observation).distribution.logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert float((ours - base).abs().max()) > 1e-2


@pytest.mark.parametrize("separate_critic", [False, True])
def test_the_critic_is_saved_beside_the_model_and_comes_back(separate_critic: bool, tmp_path: Path) -> None:
    env = make_env(1)
    policy = make_policy(env, separate_critic=separate_critic)
    if policy.critic is not None:
        with torch.no_grad():
            for parameter in policy.critic.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    policy.save_pretrained(tmp_path / "policy")
    loaded = make_policy(env, model=str(tmp_path / "policy"), separate_critic=separate_critic)
    loaded.value_head.weight.data.zero_()
    observation = observation_of([[5, 6, 7], [8]], [2, 1])
    expected = policy.predict_values(observation)
    assert float((loaded.predict_values(observation) - expected).detach().abs().max()) > 1e-2
    loaded.load_value_head(tmp_path / "policy")
    torch.testing.assert_close(loaded.predict_values(observation), expected, atol=1e-6, rtol=1e-6)


def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    name = save_model(tmp_path / "model")
    other = tiny_tokenizer()
    other.add_tokens(["<another>"])
    env = make_env()
    with pytest.raises(ValueError, match=r"1 of its tokens have another id there or none, for example \['<another>'\]"):
        CausalLMPolicy(
            env.single_observation_space, env.single_action_space, lambda _: 0.0, model=name, tokenizer=other
        )


def test_a_model_with_fewer_positions_than_the_longest_context_is_refused() -> None:
    env = make_env()
    with pytest.raises(ValueError, match="at least 24 positions"):
        CausalLMPolicy(
            env.single_observation_space,
            env.single_action_space,
            lambda _: 0.0,
            model=make_model(max_position_embeddings=20),
        )


def gradients(policy: CausalLMPolicy) -> torch.Tensor:
    """Of the mean log-probability of a few fixed actions, flattened."""
    contexts = [[5, 6, 7], [5, 6, 7, 8, 9], [10, 11]]
    _, log_prob, _ = policy.evaluate_actions(observation_of(contexts, [1, 1, 1]), torch.tensor([8, 12, 13]))
    log_prob.mean().backward()
    return torch.cat([p.grad.flatten() for p in policy.lm.parameters() if p.grad is not None])


def test_autocast_keeps_weights_and_gives_the_gradient_of_float32_within_bfloat16() -> None:
    exact, autocast = (make_policy(make_env(), "llama", autocast=dtype) for dtype in (None, "bfloat16"))
    left, right = gradients(exact), gradients(autocast)
    assert {p.dtype for p in autocast.parameters()} == {torch.float32}
    assert not torch.equal(left, right)  # it did something
    assert torch.nn.functional.cosine_similarity(left, right, dim=0) > 0.999


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_policy_has_the_gradient_of_the_plain_one() -> None:
    # One layer is one graph with everything in it that is differentiated; every other one is more C++ to compile.
    plain, compiled = (
        make_policy(make_env(), model=make_model(num_hidden_layers=1), compile_forward=choice)
        for choice in (False, True)
    )
    torch.testing.assert_close(gradients(plain), gradients(compiled), rtol=1e-4, atol=1e-6)


def test_a_critic_that_starts_as_the_reward_model_says_what_it_says(tmp_path: Path) -> None:
    env = make_env(reward=length_of)
    classifier = tiny_classifier("llama", seed=3, pad_token_id=1)
    classifier.config.reward_mean, classifier.config.reward_std = 0.5, 2.0
    classifier.save_pretrained(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(tmp_path / "reward")
    policy = make_policy(env, "gpt2", separate_critic=str(tmp_path / "reward"), randomize=False)
    context = [5, 9, 17, 40]
    with torch.no_grad():
        expected = (classifier(torch.tensor([context])).logits[0, 0] - 0.5) / 2.0
    actual = policy.predict_values(observation_of([context], [2]))
    torch.testing.assert_close(actual[0, 0].detach(), expected, atol=1e-5, rtol=1e-5)
    assert abs(float(expected)) > 0.1
    critic = {name for name, p in policy.named_parameters() if name.startswith("critic.") and p.requires_grad}
    assert len(critic) > 10, "it is trained"


def test_a_critic_that_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    env = make_env()
    with pytest.raises(ValueError, match=r"Expected separate_critic to be False, True .* could not be loaded"):
        make_policy(env, separate_critic=str(tmp_path / "nothing"))
    tiny_classifier("llama", num_labels=2, pad_token_id=1).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match=r"a decoder with a `score` head of one label"):
        make_policy(env, separate_critic=str(tmp_path / "two"))


def test_the_value_head_learns_ten_times_as_fast_as_the_language_model() -> None:
    head = ValueHead(4)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01, eps=1e-12)
    hidden = torch.ones(1, 4)
    head(hidden).sum().backward()
    optimizer.step()
    # Every weight and the bias have moved by the learning rate: 5 × 0.01, times the scale.
    assert head(hidden).item() == pytest.approx(-0.05 * ValueHead.SCALE)
    head.set(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor(0.5))
    assert head(hidden).item() == pytest.approx(10.5)


def test_an_environment_of_another_number_of_tokens_is_refused_where_its_tokenizer_is_not_known(tmp_path: Path) -> None:
    env = make_env(2)
    spaces_of_env = env.single_observation_space, env.single_action_space
    directory = save_model(tmp_path / "model")
    CausalLMPolicy(*spaces_of_env, lambda _: 0.0, model=directory)
    message = r"'builtin', which has 2048 tokens; the environment has \d+\. Name the model .* policy_kwargs"
    with pytest.raises(ValueError, match=message):
        CausalLMPolicy(*spaces_of_env, lambda _: 0.0)
    EpisodeBuffer(8, *spaces_of_env, "cpu", reference=directory)
    with pytest.raises(ValueError, match=message):
        EpisodeBuffer(8, *spaces_of_env, "cpu", reference="builtin")


def test_policies_are_loaded_for_the_environment_in_either_form() -> None:
    env = TextVecEnv(make_env(2))
    policy = load_policy(make_model(), env, device="cpu")
    (text,) = sample_texts(policy, env, list(env.vector_env.prompts)[:1])
    assert text["completion"]


def test_a_directory_without_a_tokenizer_has_none_and_none_is_made_up(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    assert tokenizer_beside(str(tmp_path)) is None
    with pytest.raises(ValueError, match="there are no tokenizer files"):
        pretrained_tokenizer(str(tmp_path))
