"""Invariant 2: a policy with a prefix memo is the same function as one without."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from graphs import RecordedGraphs
from learners import (
    EOS,
    counted_forwards,
    largest_difference,
    make_env,
    make_model,
    make_policy,
    observation_of,
    plain_log_probs,
    plain_value,
    weights_of,
)
from peft.tuners.lora import LoraLayer
from tiny import KINDS
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, MistralConfig

from agents.policies.causal_lm_policy import CausalLMPolicy

V = 300
WIDTH = 24
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


class Stream:
    """Rows of token contexts that grow, end and restart at random, as a batch of environments would have them."""

    def __init__(self, rows: int, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.contexts: list[list[int]] = [[] for _ in range(rows)]
        self.prompt_lengths = [0] * rows
        for row in range(rows):
            self.restart(row)

    def restart(self, row: int) -> None:
        # Few different prompts of few tokens: equal contexts in several rows are common.
        length = int(self.random.integers(1, 7))
        self.prompt_lengths[row] = length
        self.contexts[row] = [int(t) for t in np.random.default_rng(length).integers(2, V, length)]

    def branch(self, row: int) -> None:
        """Go on from somewhere within what another row has written, as values are estimated by continuations."""
        other = int(self.random.integers(len(self.contexts)))
        length = int(self.random.integers(self.prompt_lengths[other], len(self.contexts[other]) + 1))
        self.prompt_lengths[row] = self.prompt_lengths[other]
        self.contexts[row] = [*self.contexts[other][:length], int(self.random.integers(2, V))]

    def grow(self) -> None:
        for row, context in enumerate(self.contexts):
            ended = context[-1] == EOS and len(context) > self.prompt_lengths[row]
            if ended or len(context) >= WIDTH - 4 or self.random.random() < 0.05:
                self.branch(row) if self.random.random() < 0.5 else self.restart(row)
            # As a rule one token; more where an environment writes some of its own.
            for _ in range(int(self.random.integers(2, 5)) if self.random.random() < 0.1 else 1):
                # EOS anywhere; otherwise one of few tokens, so that rows coincide for a while.
                token = EOS if self.random.random() < 0.1 else int(self.random.integers(2, 5))
                self.contexts[row].append(token)


def check(policy: CausalLMPolicy, contexts: list[list[int]], prompt_lengths: list[int], tolerance: float) -> None:
    """Distribution and value of every context, against one plain forward pass for each."""
    observation = observation_of(contexts, prompt_lengths, WIDTH)
    with torch.no_grad():
        logits = policy.get_distribution(observation).distribution.logits
        values = policy.predict_values(observation)
        actions, forward_values, log_prob = policy.forward(observation)
    for i, context in enumerate(contexts):
        expected = plain_log_probs(policy, context, len(context) - prompt_lengths[i])
        allowed = expected > -torch.inf
        torch.testing.assert_close(logits[i][allowed].double(), expected[allowed], atol=tolerance, rtol=tolerance)
        assert abs(float(log_prob[i]) - float(expected[actions[i]])) < tolerance * (1 + abs(float(log_prob[i])))
        for value in (values[i], forward_values[i]):
            assert float(value) == pytest.approx(plain_value(policy, context), abs=tolerance, rel=tolerance)


def run_random_script(
    policy: CausalLMPolicy,
    seed: int,
    steps: int = 30,
    change: Callable[[], None] | None = None,
    tolerance: float = 1e-5,
) -> None:
    """A rollout of 6 rows, an evaluation of 2 in between, rows dropped, re-ordered and repeated, weights changed."""
    rollout, evaluation = Stream(6, seed), Stream(2, seed + 1)
    random = np.random.default_rng(seed + 2)
    for _ in range(steps):
        stream = evaluation if random.random() < 0.25 else rollout
        stream.grow()
        chosen = np.arange(len(stream.contexts))
        what = random.random()
        if what < 0.2:
            chosen = random.permutation(chosen)[: random.integers(1, len(chosen) + 1)]
        elif what < 0.3:
            chosen = random.choice(chosen, len(chosen))  # repetitions
        check(policy, [stream.contexts[i] for i in chosen], [stream.prompt_lengths[i] for i in chosen], tolerance)
        if change is not None and random.random() < 0.2:
            change()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_memoised_log_probs_and_values_are_the_plain_ones(kind: str, seed: int) -> None:
    policy = make_policy(make_env(), kind, min_new_tokens=2, temperature=0.7)
    assert policy._actor_memo is not None
    assert policy._actor_memo.enabled
    run_random_script(policy, seed)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_memoised_is_plain_with_lora(kind: str) -> None:
    policy = make_policy(make_env(), kind, lora=LORA)
    run_random_script(policy, seed=2)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_memoised_is_plain_with_a_separate_critic(kind: str) -> None:
    policy = make_policy(make_env(), kind, separate_critic=True)
    assert policy.critic is not None
    with torch.no_grad():  # of its own weights, not only its own copy
        for parameter in policy.critic.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    run_random_script(policy, seed=3, steps=20)


def test_memoised_is_plain_to_the_last_column_that_a_model_has() -> None:
    """Rows that wait beside growing ones must not be given a position that the model doesn't have."""
    policy = make_policy(make_env(), model=make_model("gpt2", max_position_embeddings=WIDTH))
    full = [7] * WIDTH
    for length in range(WIDTH - 3, WIDTH + 1):
        check(policy, [full, [5] * length], [1, 1], 1e-5)


# ---- compiled and captured steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_captured_steps_give_the_plain_log_probs_and_values(
    kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = RecordedGraphs(monkeypatch)
    policy = make_policy(make_env(), kind, min_new_tokens=2, temperature=0.7, decode="compiled")
    run_random_script(policy, seed)
    assert graphs.replayed > 20


@pytest.mark.parametrize("options", [{"lora": LORA}, {"separate_critic": True}], ids=["lora", "critic"])
def test_captured_steps_are_plain_while_weights_change(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = RecordedGraphs(monkeypatch)
    policy = make_policy(make_env(), "llama", decode="compiled", **options)
    run_random_script(policy, seed=4, steps=20, change=optimizer_step(policy), tolerance=3e-5)
    assert graphs.replayed > 10


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("kind", "options"), [("gpt2", {}), ("llama", {}), ("qwen2", {"lora": LORA})], ids=["gpt2", "llama", "qwen2 lora"]
)
def test_compiled_steps_give_the_plain_log_probs_and_values(kind: str, options: dict[str, Any]) -> None:
    # One layer has all operations of a model in it; every other one is more C++ to compile.
    model = make_model(kind, num_hidden_layers=1)
    policy = make_policy(make_env(), model=model, min_new_tokens=2, decode="compiled", **options)
    run_random_script(policy, seed=0, change=optimizer_step(policy), tolerance=3e-5)
    assert policy._actor_memo is not None
    assert list(policy._actor_memo._launches.values()) == ["compiled"]


# ---- weight changes ------------------------------------------------------------------------------------------------


def optimizer_step(policy: CausalLMPolicy) -> Callable[[], None]:
    """A step that changes the weights by about 0.01."""

    def step() -> None:
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter) * torch.randn(())
        policy.optimizer.step()

    return step


def copy_in_place(policy: CausalLMPolicy) -> Callable[[], None]:
    @torch.no_grad()
    def copy() -> None:
        for parameter in policy.lm.parameters():
            parameter.copy_(parameter + torch.randn_like(parameter) * 0.01)

    return copy


def reassign_data(policy: CausalLMPolicy) -> Callable[[], None]:
    """What sb3-contrib's TRPO does in its line search."""

    def reassign() -> None:
        for parameter in policy.lm.parameters():
            parameter.data = parameter.data + torch.randn_like(parameter) * 0.01

    return reassign


def reassign_data_twice(policy: CausalLMPolicy) -> Callable[[], None]:
    """The second contents may come to lie where the first ones lay, which then are the memo's no longer."""

    def reassign() -> None:
        for parameter in policy.lm.parameters():
            changed = parameter.data + torch.randn_like(parameter) * 0.01
            parameter.data = torch.zeros_like(parameter)
            parameter.data = changed.clone()

    return reassign


def load_state_dict(policy: CausalLMPolicy, assign: bool = False) -> Callable[[], None]:
    def load() -> None:
        state = {name: tensor + torch.randn_like(tensor) * 0.01 for name, tensor in policy.state_dict().items()}
        policy.load_state_dict(state, assign=assign)

    return load


def assign_state_dict(policy: CausalLMPolicy) -> Callable[[], None]:
    """Every parameter is another object afterwards."""
    return load_state_dict(policy, assign=True)


def exchange_a_layer(policy: CausalLMPolicy) -> Callable[[], None]:
    @torch.no_grad()
    def exchange() -> None:
        layers = policy.lm.backbone.h if hasattr(policy.lm.backbone, "h") else policy.lm.backbone.layers
        layers[0] = copy.deepcopy(layers[0])
        for parameter in layers[0].parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.01)  # unseen: the layer itself must be what is noticed

    return exchange


def resize_embeddings(policy: CausalLMPolicy) -> Callable[[], None]:
    @torch.no_grad()
    def resize() -> None:
        model = policy.lm.model
        embeddings = model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + 1)
        embeddings.weight.data.add_(torch.randn_like(embeddings.weight) * 0.01)

    return resize


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("change", "optimizer"),
    [
        (optimizer_step, {}),
        (optimizer_step, {"optimizer_kwargs": {"fused": True}}),
        (optimizer_step, {"optimizer_kwargs": {"foreach": True}}),
        (optimizer_step, {"optimizer_class": torch.optim.RMSprop}),
        (optimizer_step, {"lora": LORA, "optimizer_kwargs": {"fused": True}}),
        (optimizer_step, {"separate_critic": True, "optimizer_kwargs": {"fused": True}}),
        (copy_in_place, {}),
        (reassign_data, {}),
        (reassign_data_twice, {}),
        (load_state_dict, {}),
        (assign_state_dict, {}),
        (exchange_a_layer, {}),
        (resize_embeddings, {}),
    ],
    ids=[
        *("adam", "fused adam", "foreach adam", "rmsprop", "fused lora", "fused critic", "copy_", "reassign"),
        *("reassign twice", "load", "assign", "exchange", "resize"),
    ],
)
def test_any_weight_change_empties_the_memo(kind: str, change: Any, optimizer: dict[str, Any]) -> None:
    policy = make_policy(make_env(), kind, **optimizer)
    run_random_script(policy, seed=4, steps=15, change=change(policy), tolerance=3e-5)


def test_a_weight_change_that_nobody_can_see_needs_clear_cache() -> None:
    """The negative control: this is how a stale memo looks, so the tests above would have noticed one."""
    policy = make_policy(make_env())
    context, observation = [5, 6, 7], observation_of([[5, 6, 7]], [1], WIDTH)
    check(policy, [context], [1], 1e-5)
    for parameter in policy.lm.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)  # leaves both address and version as they were
    expected = plain_log_probs(policy, context, 2)
    with torch.no_grad():
        stale = policy.get_distribution(observation).distribution.logits[0].double()
        assert float((stale - expected).abs().max()) > 0.1
        policy.clear_cache()
        fresh = policy.get_distribution(observation).distribution.logits[0].double()
    torch.testing.assert_close(fresh, expected, atol=1e-5, rtol=1e-5)


def test_steps_of_an_optimizer_of_ones_own_empty_the_memo_too() -> None:
    """A fused step leaves no trace in the weights' versions."""
    policy = make_policy(make_env())
    own = torch.optim.AdamW(policy.lm.parameters(), lr=1e-2, fused=True)
    for _ in range(3):
        check(policy, [[5, 6, 7]], [1], 1e-5)
        for parameter in policy.lm.parameters():
            parameter.grad = torch.randn_like(parameter)
        own.step()
    check(policy, [[5, 6, 7]], [1], 1e-5)


def distribution_after(policy: CausalLMPolicy, context: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return policy.get_distribution(observation_of([context], [1], WIDTH)).distribution.logits[0].double()


def test_an_adapter_that_is_switched_scaled_or_merged_empties_the_memo() -> None:
    policy = make_policy(make_env(), lora=LORA)
    assert policy.lm.adapter is not None
    wrapper, context = policy.lm.adapter.wrapper, [5, 6, 7]
    layers = [module for module in policy.lm.modules() if isinstance(module, LoraLayer)]
    adapted = distribution_after(policy, context)
    seen = [adapted]

    def look() -> None:
        check(policy, [context], [1], 1e-5)
        seen.append(distribution_after(policy, context))

    with wrapper.disable_adapter():
        look()
    look()
    assert seen[-1].equal(adapted)
    for layer in layers:
        layer.set_scale("default", 3.0)
    look()
    wrapper.merge_adapter()
    look()
    wrapper.unmerge_adapter()
    for layer in layers:
        layer.set_scale("default", 1.0)
    wrapper.add_adapter("other", wrapper.peft_config["default"])
    wrapper.set_adapter("other")
    look()
    differences = [float((x - y).abs().max()) for x, y in itertools.pairwise(seen)]
    assert [difference > 1e-2 for difference in differences] == [True, True, True, False, True], differences


def test_what_was_read_under_an_autocast_is_not_remembered_beyond_it() -> None:
    policy, context = make_policy(make_env(), "llama"), [5, 6, 7]
    with torch.autocast("cpu", torch.bfloat16):
        rough = distribution_after(policy, context)
    check(policy, [context], [1], 1e-5)
    assert float((rough - distribution_after(policy, context)).abs().max()) > 1e-4


def test_sharded_weights_are_watched_too() -> None:
    policy, context = make_policy(make_env(), "llama"), [5, 6, 7]
    whole = distribution_after(policy, context)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(policy.lm.backbone, mesh=init_device_mesh("cpu", (1,)))
        assert all(isinstance(parameter, DTensor) for parameter in policy.lm.backbone.parameters())
        torch.testing.assert_close(distribution_after(policy, context), whole)
        with torch.no_grad():
            for parameter in policy.lm.backbone.parameters():
                parameter.mul_(1.1)
        changed = distribution_after(policy, context)
        assert float((changed - whole).abs().max()) > 1e-2
        policy.clear_cache()
        torch.testing.assert_close(distribution_after(policy, context), changed)
    finally:
        distributed.destroy_process_group()


def test_opening_training_empties_the_memo_and_predicting_does_not() -> None:
    policy = make_policy(make_env())
    observation = observation_of([[5, 6, 7]], [1], WIDTH)
    with torch.no_grad(), counted_forwards(policy.lm.backbone) as shapes:
        policy.predict_values(observation)
        policy.set_training_mode(False)
        policy.predict_values(observation)
        assert shapes == [(1, 3)]
        policy.set_training_mode(True)
        policy.predict_values(observation)
        assert shapes == [(1, 3), (1, 3)]


def test_a_copy_of_a_policy_has_a_memo_of_its_own() -> None:
    policy = make_policy(make_env(), optimizer_kwargs={"fused": True})
    check(policy, [[5, 6, 7]], [1], 1e-5)
    twin = copy.deepcopy(policy)
    check(twin, [[5, 6, 7]], [1], 1e-5)
    optimizer_step(twin)()
    check(twin, [[5, 6, 7]], [1], 1e-5)
    check(policy, [[5, 6, 7]], [1], 1e-5)
    assert largest_difference(weights_of(twin), weights_of(policy)) > 1e-3


def test_calls_in_inference_mode_and_outside_of_it_may_alternate() -> None:
    policy = make_policy(make_env())
    context = [5, 6]
    for token in range(5, 10):
        context.append(token)
        observation = observation_of([context], [1], WIDTH)
        with torch.inference_mode() if token % 2 else torch.no_grad():
            logits = policy.get_distribution(observation).distribution.logits[0].double()
        torch.testing.assert_close(logits.clone(), plain_log_probs(policy, context, 1), atol=1e-5, rtol=1e-5)


# ---- it is a memo --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_pays_for_the_tokens_that_it_has_not_seen(kind: str) -> None:
    policy = make_policy(make_env(), kind)
    contexts = [[5, 6, 7], [9, 8, 7, 6]]
    with torch.no_grad(), counted_forwards(policy.lm.backbone) as shapes:
        policy.forward(observation_of(contexts, [3, 4], WIDTH))
        assert shapes == [(2, 4)]  # both prompts, padded to the longer
        for token in range(10, 16):
            contexts = [[*context, token] for context in contexts]
            policy.forward(observation_of(contexts, [3, 4], WIDTH))
        assert shapes[1:] == [(2, 1)] * 6
        policy.forward(observation_of(contexts, [3, 4], WIDTH))  # seen already
        assert len(shapes) == 7
        policy.forward(observation_of([[*contexts[0], 3], [4, 4]], [3, 2], WIDTH))  # the second row restarts
        assert sorted(shapes[7:]) == [(1, 1), (1, 2)]
        policy.forward(observation_of([[*contexts[0], 3, 3]], [3], WIDTH))  # the second row has left
        assert shapes[9:] == [(1, 1)]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_row_that_grew_by_several_tokens_pays_for_those(kind: str) -> None:
    policy = make_policy(make_env(), kind)
    first, second = [5, 6, 7, 8, 9, 10], [9, 8, 7, 6]
    with counted_forwards(policy.lm.backbone) as shapes, torch.no_grad():
        policy.forward(observation_of([first, second], [1, 1], WIDTH))
        first = [*first, 11, 12, 13]
        policy.forward(observation_of([first, second], [1, 1], WIDTH))
        assert shapes == [(2, 6), (1, 3)]
        policy.forward(observation_of([[*first, 14], [*second, 5, 5]], [1, 1], WIDTH))
        assert sorted(shapes[2:]) == [(1, 2), (2, 1)]
    check(policy, [[*first, 14, 15], [*second, 5, 5, 4]], [1, 1], 1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_groups_prompt_is_read_once(kind: str) -> None:
    policy = make_policy(make_env(), kind)
    prompt, other = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [4, 4]
    with counted_forwards(policy.lm.backbone) as shapes, torch.no_grad():
        policy.forward(observation_of([prompt, prompt, prompt, other], [10, 10, 10, 2], WIDTH))
        assert shapes == [(2, 10)]
        # A row that starts later, with the others already further on, reads the last token alone.
        contexts = [[*prompt, 3], [*prompt, 2], [*prompt, 3], prompt]
        policy.forward(observation_of(contexts, [10] * 4, WIDTH))
        assert sorted(shapes[1:]) == [(1, 1), (3, 1)]
    check(policy, [[*context, 7] for context in contexts], [10] * 4, 1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_branches_in_mid_response_read_what_is_their_own(kind: str) -> None:
    policy = make_policy(make_env(), kind)
    trunk = [5, 6, 7, 8, 9, 10, 11, 12]
    with counted_forwards(policy.lm.backbone) as shapes, torch.no_grad():
        policy.forward(observation_of([trunk], [3], WIDTH))
        branches = [[*trunk, 3], [*trunk, 2], [*trunk[:6], 4, 4]]
        policy.forward(observation_of(branches, [3] * 3, WIDTH))
        assert shapes[1:] == [(3, 2)]  # one token or two, on top of copies of the trunk
    check(policy, [[*branch, 7] for branch in branches], [3] * 3, 1e-5)


def test_contexts_that_all_begin_alike_have_their_beginning_read_once() -> None:
    policy = make_policy(make_env())
    system = [5, 6, 7, 8, 9, 10, 11, 12]
    contexts = [[*system, 3, 3], [*system, 4], [*system, 5, 6, 7]]
    with counted_forwards(policy.lm.backbone) as shapes, torch.no_grad():
        policy.forward(observation_of(contexts, [10, 9, 11], WIDTH))
    assert shapes == [(1, 8), (3, 3)]
    check(policy, contexts, [10, 9, 11], 1e-5)


def test_a_rollout_goes_on_where_it_was_after_an_evaluation_of_another_batch_size() -> None:
    policy = make_policy(make_env())
    contexts = [[5, 6, 7], [9, 8, 7, 6], [4, 4]]
    with torch.no_grad(), counted_forwards(policy.lm.backbone) as shapes:
        policy.forward(observation_of(contexts, [3, 4, 2], WIDTH))
        other = [100, 101]
        for _ in range(4):
            policy.forward(observation_of([other], [2], WIDTH))
            other.append(102)
        del shapes[:]
        contexts = [[*context, 11] for context in contexts]
        policy.forward(observation_of(contexts, [3, 4, 2], WIDTH))
    assert shapes == [(3, 1)]


def test_predicting_in_the_middle_of_a_rollout_changes_nothing() -> None:
    rollouts = []
    for look in (False, True):
        policy = make_policy(make_env(), model=make_model(ends=0.1))
        stream = Stream(4, seed=7)
        seen = []
        for _ in range(12):
            stream.grow()
            observation = observation_of(stream.contexts, stream.prompt_lengths, WIDTH)
            if look:
                alone = {name: tensor[2].numpy() for name, tensor in observation.items()}
                policy.predict(alone, deterministic=True)
                policy.predict({name: tensor[1:3].numpy() for name, tensor in observation.items()}, deterministic=True)
            with torch.no_grad():
                seen.append(policy.forward(observation, deterministic=True))
        rollouts.append([torch.cat(part) for part in zip(*seen, strict=True)])
    (actions, values, log_probs), (other_actions, other_values, other_log_probs) = rollouts
    assert actions.equal(other_actions)
    torch.testing.assert_close(values, other_values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_probs, other_log_probs, atol=1e-5, rtol=1e-5)


def test_memory_is_reused_when_rows_restart_for_ever() -> None:
    """Columns that no row sees any more are dropped: storage is bounded by what the rows hold, not by time."""
    policy = make_policy(make_env())
    memo = policy._actor_memo
    assert memo is not None
    stream = Stream(3, seed=8)
    capacities = []
    with torch.no_grad():
        for _ in range(600):
            stream.grow()
            policy.forward(observation_of(stream.contexts, stream.prompt_lengths, WIDTH))
            capacities.append(memo._blocks[0].visible.shape[1])
    assert max(capacities) <= 4 * WIDTH + 64
    check(policy, stream.contexts, stream.prompt_lengths, 1e-5)


# ---- without it ----------------------------------------------------------------------------------------------------


def sliding_window_model() -> Any:
    config = MistralConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        initializer_range=0.2,
        pad_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config).float().eval()


def test_an_architecture_with_sliding_windows_falls_back_and_says_so_once(recwarn: pytest.WarningsRecorder) -> None:
    policy = make_policy(make_env(), model=sliding_window_model())
    run_random_script(policy, seed=5, steps=10)
    warnings = [str(warning.message) for warning in recwarn]
    assert len(warnings) == 1
    assert "MistralModel is run without prefix cache: not all of its layers are full attention" in warnings[0]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_memo_can_be_switched_off_and_the_results_are_the_same(kind: str) -> None:
    policy = make_policy(make_env(), kind, prefix_cache=False)
    assert policy._actor_memo is None
    run_random_script(policy, seed=6, steps=10)


def test_without_the_memo_every_call_pays_for_whole_contexts() -> None:
    policy = make_policy(make_env(), prefix_cache=False)
    with torch.no_grad(), counted_forwards(policy.lm.backbone) as shapes:
        for context in ([5, 6], [5, 6, 7], [5, 6, 7, 8]):
            policy.forward(observation_of([context], [2], WIDTH))
    assert shapes == [(1, 2), (1, 3), (1, 4)]
