"""Numbers that are not finite, memory that is not enough, and arguments that could only hurt."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import largest_difference, make_env, make_model, make_ppo, weights_of
from stable_baselines3.common.logger import configure
from test_engine import HALVES, Meeting, OfSeveral, collected

from agents.algorithms.a2c import A2C
from agents.algorithms.dapo import DAPO
from agents.algorithms.grpo import GRPO
from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.algorithms.ranges import RANGES, SB3_ARGUMENTS
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.algorithms.vineppo import VinePPO
from agents.state import checkpoint
from agents.state.arguments import argument_defaults

ALGORITHMS = (PPO, VinePPO, A2C, REINFORCE, RLOO, GRPO, DAPO)


def moments_of(model: OnPolicyAlgorithm) -> list[torch.Tensor]:
    return [x.clone() for state in model.policy.optimizer.state.values() for x in state.values()]


def everything(model: OnPolicyAlgorithm) -> list[torch.Tensor]:
    return [*weights_of(model.policy).values(), *moments_of(model)]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


# ---- what is not finite -------------------------------------------------------------------------------------------


def nan_loss(model: PPO) -> None:
    loss = model.loss

    def broken(*args: Any) -> Any:
        tokens, logged = loss(*args)
        return tokens * math.nan, logged

    model.loss = broken  # type: ignore[method-assign]


def infinite_gradient(model: PPO) -> None:
    next(iter(model.policy.value_head.parameters())).register_hook(lambda gradient: gradient * math.inf)


def overflow_in_the_forward_pass(model: PPO) -> None:
    evaluate = model.policy.evaluate

    def broken(*args: Any, **kwargs: Any) -> Any:
        evaluate(*args, **kwargs)
        raise FloatingPointError("Expected finite numbers, but log-probabilities are NaN.")

    model.policy.evaluate = broken  # type: ignore[method-assign]


def infinite_weights(model: PPO) -> None:
    step = model.policy.optimizer.step

    def broken(*args: Any, **kwargs: Any) -> Any:
        step(*args, **kwargs)
        with torch.no_grad():
            model.policy.value_head.weight[0, 0] = math.inf

    model.policy.optimizer.step = broken  # type: ignore[method-assign]


def nan_moment(model: PPO) -> None:
    step = model.policy.optimizer.step

    def broken(*args: Any, **kwargs: Any) -> Any:
        step(*args, **kwargs)
        model.policy.optimizer.state[model.policy.value_head.weight]["exp_avg_sq"][0, 0] = math.nan

    model.policy.optimizer.step = broken  # type: ignore[method-assign]


BREAKS = [nan_loss, infinite_gradient, overflow_in_the_forward_pass, infinite_weights, nan_moment]


@pytest.mark.parametrize("first_step_is_fine", [False, True], ids=["first step", "second step"])
@pytest.mark.parametrize("break_it", BREAKS, ids=[of.__name__ for of in BREAKS])
def test_an_update_with_a_number_that_is_not_finite_leaves_weights_and_moments_as_they_were(
    break_it: Callable[[PPO], None], first_step_is_fine: bool
) -> None:
    model = make_ppo(n_epochs=1)
    model.learn(1)
    before, updates = everything(model), model._n_updates
    if first_step_is_fine:
        backward, calls = model._backward, []

        def then_break(minibatch: np.ndarray) -> dict[str, float]:
            calls.append(1)
            if len(calls) == 2:
                assert not same(before, everything(model))  # the control: something was there to undo
                break_it(model)
            return backward(minibatch)

        model._backward = then_break  # type: ignore[method-assign]
    else:
        break_it(model)
    with pytest.warns(UserWarning, match=r"bad update number 1 in a row\. .*as before the update, and training goes"):
        model.update()
    assert same(before, everything(model))
    assert model._n_updates == updates
    assert (model.bad_updates, model.bad_updates_in_a_row) == (1, 1)
    assert model.logger.name_to_value["train/bad_updates"] == 1


def test_of_an_update_that_is_undone_nothing_else_is_left() -> None:
    model = make_ppo(trust_region=8.0, kl_target=1e-3)
    model.learn(1)
    model.step_factor = 0.5
    beta, updates = model.kl_coef, model._n_updates
    infinite_weights(model)
    with pytest.warns(UserWarning, match="bad update number 1 in a row"):
        model.learn(1, reset_num_timesteps=False)
    assert model.logger.name_to_value == {}  # the row has been written
    assert (model.step_factor, model.kl_coef, model._n_updates) == (0.5, beta, updates)
    with pytest.warns(UserWarning, match="bad update number 2 in a row"):
        assert not model.update()
    assert model.logger.name_to_value["train/n_updates"] == updates


@pytest.mark.parametrize("undone", [False, True], ids=["made", "undone"])
def test_an_update_lets_go_of_gradient_and_copies_before_anything_else_needs_memory(undone: bool) -> None:
    model = make_ppo(n_epochs=1)
    unshard, held = model.engine.unshard, []

    def look() -> None:
        held.append((model.before, [p.grad for p in model.policy.parameters() if p.grad is not None]))
        unshard()

    model.engine.unshard = look  # type: ignore[method-assign]
    if undone:
        infinite_weights(model)
    with pytest.warns(UserWarning, match="bad update number 1") if undone else contextlib.nullcontext():
        model.learn(1)
    assert held[-1] == (None, [])


def test_a_warm_up_that_is_undone_is_not_over() -> None:
    model = make_ppo(critic_warmup_episodes=8, policy_kwargs={"separate_critic": True})
    step, calls = model.engine.step, []

    def bad_once() -> None:
        step()
        calls.append(1)
        if len(calls) == 1:
            raise FloatingPointError("once.")

    model.engine.step = bad_once  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="once"):
        model.learn(1)
    assert model.critic_warmup_left == 8
    assert model.update()
    assert model.critic_warmup_left == 0


def test_a_run_with_one_bad_update_goes_on_as_if_its_rollout_had_taught_nothing() -> None:
    model = make_ppo(n_epochs=1)
    train, calls = model.train, []

    def bad_once() -> None:
        calls.append(1)
        train()
        if len(calls) == 2:
            raise FloatingPointError("once.")

    model.train = bad_once  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="once"):
        model.learn(100)
    assert len(calls) > 2
    assert (model.bad_updates, model.bad_updates_in_a_row) == (1, 0)
    assert model._n_updates == len(calls) - 1


@pytest.mark.parametrize("max_bad_updates", [0, 1, 3])
def test_after_so_many_bad_updates_in_a_row_the_run_stops_and_its_rollout_is_saved(
    tmp_path: Path, max_bad_updates: int
) -> None:
    model = make_ppo(max_bad_updates=max_bad_updates)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    nan_loss(model)
    before = everything(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(FloatingPointError, match=r"The loss is nan.* training stops.*The rollout is in") as error:
            model.learn(10_000)
    model.logger.close()
    assert len(caught) == max(0, max_bad_updates - 1)
    assert model.bad_updates == max(1, max_bad_updates)
    assert same(before, everything(model))
    saved = tmp_path / f"bad_update_{model.num_timesteps}"
    assert str(saved) in str(error.value)
    tree = checkpoint.load(saved)
    np.testing.assert_array_equal(tree["rollout"]["log_probs"].numpy(), model.buffer.log_probs)
    assert len(tree["texts"]) == 8
    assert tree["facts"]["reason"].startswith("The loss is nan")
    assert sorted(tree["facts"]["minibatch"]) == sorted(model._minibatch.tolist())


def test_without_a_directory_of_the_logger_the_rollout_is_saved_in_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = make_ppo(max_bad_updates=1)
    estimate = model.estimate

    def broken(buffer: Any) -> None:
        estimate(buffer)
        buffer.returns[3] = np.inf

    model.estimate = broken  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match=str(tmp_path)):
        model.learn(1)
    (saved,) = tmp_path.glob("*/bad_update_*")
    tree = checkpoint.load(saved)
    assert "returns" not in tree["rollout"]
    assert tree["not_finite"]["returns"] == model.buffer.returns.tolist()


def test_the_number_of_bad_updates_survives_a_checkpoint(tmp_path: Path) -> None:
    model = make_ppo(n_epochs=1)
    model.learn(1)
    model.bad_updates, model.bad_updates_in_a_row = 5, 2
    model.save(tmp_path / "checkpoint")
    other = make_ppo(n_epochs=1)
    other.load_state(checkpoint.load(tmp_path / "checkpoint"))
    assert (other.bad_updates, other.bad_updates_in_a_row) == (5, 2)


@pytest.mark.parametrize("name", ["lm", "value_head"])
def test_weights_that_are_not_finite_are_not_written_over_good_ones(tmp_path: Path, name: str) -> None:
    model = make_ppo()
    model.policy.save_pretrained(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        next(iter(getattr(model.policy, name).parameters())).view(-1)[0] = math.nan
    with pytest.raises(FloatingPointError, match=f"in 1 parameters, the first of which is '{name}"):
        model.policy.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_trust_region_shortens_an_update_after_which_the_policy_has_no_numbers() -> None:
    model = make_ppo(trust_region=0.05)
    model.learn(1)
    calls: list[int] = []
    evaluate = model.policy.evaluate_log_probs

    def far(*args: Any) -> Any:  # the update is over, and its length is measured
        calls.append(1)
        return evaluate(*args) * (math.nan if len(calls) == 1 else 1)

    model.policy.evaluate_log_probs = far  # type: ignore[method-assign]
    model.update()
    assert model.logger.name_to_value["train/update_kl"] == math.inf
    assert 0 < model.logger.name_to_value["train/update_kept"] <= 0.1
    assert model.bad_updates == 0


# ---- memory -------------------------------------------------------------------------------------------------------

ALLOCATIONS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    MemoryError(),
]


def little_memory(model: OnPolicyAlgorithm, error: BaseException, tokens: int) -> None:
    """As if a backward pass of more than so many tokens, padding included, did not fit."""
    pack, backward = model.buffer.pack, model.engine.backward
    sizes: list[int] = []

    def look(part: np.ndarray) -> Any:
        samples = pack(part)
        sizes.append(samples.observations["input_ids"].numel())
        return samples

    def limited(loss: torch.Tensor, last: bool) -> None:
        backward(loss, last)  # what was added must not count when it is tried again
        if sizes[-1] > tokens:
            raise error

    model.buffer.pack, model.engine.backward = look, limited  # type: ignore[method-assign]


@pytest.mark.parametrize("error", ALLOCATIONS, ids=lambda error: type(error).__name__)
def test_an_update_out_of_memory_is_tried_again_in_smaller_parts_with_the_same_gradient(error: BaseException) -> None:
    model = collected()
    means = model._backward(np.arange(8))
    expected = [p.grad.clone() for p in model.policy.parameters() if p.grad is not None]
    little_memory(model, error, tokens=60)
    with pytest.warns(UserWarning, match=r"out of memory\. It is tried again with micro_batch_tokens="):
        again = model._backward(np.arange(8))
    ours = [p.grad for p in model.policy.parameters() if p.grad is not None]
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-8)
    assert again == pytest.approx(means, rel=1e-6, abs=1e-7)
    assert 20 < model.micro_batch_tokens <= 60
    model._backward(np.arange(8))  # stays at that: another warning would be an error


def test_one_text_that_does_not_fit_is_an_error_that_says_what_to_do() -> None:
    model = collected()
    little_memory(model, ALLOCATIONS[0], tokens=3)
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(MemoryError, match=r"one text at a time: CUDA out of memory.*gradient_checkpointing"),
    ):
        model._backward(np.arange(8))


def test_another_runtime_error_is_not_taken_for_want_of_memory() -> None:
    model = collected()
    little_memory(model, RuntimeError("expected scalar type Float but found Half"), tokens=3)
    with pytest.raises(RuntimeError, match="scalar type"):
        model._backward(np.arange(8))


def test_the_critics_own_passes_are_tried_again_as_well() -> None:
    model = collected(critic_epochs=1)
    little_memory(model, ALLOCATIONS[1], tokens=60)
    with pytest.warns(UserWarning, match="out of memory"):
        model.fit_critic(1)


# ---- several processes --------------------------------------------------------------------------------------------


def two_processes() -> list[Any]:
    alone, meeting = collected(micro_batch_tokens=40), Meeting(2)
    models = []
    for rank in range(2):
        model = copy.copy(alone)
        model.policy = copy.deepcopy(alone.policy)
        model.buffer = copy.copy(alone.buffer)
        model.engine = OfSeveral(model.policy, meeting, rank)
        models.append(model)
    return models


def test_a_number_that_is_not_finite_in_one_process_stops_the_step_of_all() -> None:
    models = two_processes()
    overflow_in_the_forward_pass(models[1])

    def outcome(model: PPO, minibatch: np.ndarray) -> str:
        with pytest.raises(FloatingPointError) as error:
            model._backward(minibatch)
        return str(error.value)

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(outcome, models, HALVES))
    assert "another process" in said[0]
    assert "log-probabilities are NaN" in said[1]


@pytest.mark.filterwarnings("ignore:An update ran out of memory")
def test_memory_that_is_not_enough_in_one_process_makes_the_parts_of_all_smaller() -> None:
    models, expected = two_processes(), collected()
    expected._backward(np.arange(8))
    evaluate = models[1].policy.evaluate
    for model in models:
        model.micro_batch_tokens = 4096  # all of a process's texts at once

    def limited(obs: Any, *args: Any, **kwargs: Any) -> Any:
        if obs["input_ids"].numel() > 25:
            raise ALLOCATIONS[0]
        return evaluate(obs, *args, **kwargs)

    models[1].policy.evaluate = limited
    with ThreadPoolExecutor(2) as pool:
        means = list(pool.map(lambda model, minibatch: model._backward(minibatch), models, HALVES))
    assert means[0] == means[1]
    assert models[0].micro_batch_tokens == models[1].micro_batch_tokens < 40
    for model in models:
        for ours, theirs in zip(model.policy.parameters(), expected.policy.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-10, rtol=1e-8)


# ---- what is logged of the first minibatch ------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [PPO, VinePPO, GRPO, DAPO])
def test_the_first_minibatch_has_no_kl_divergence_and_nothing_clipped(algorithm: type[OnPolicyAlgorithm]) -> None:
    model = make_ppo(make_env(group_size=4), algorithm=algorithm, learning_rate=1e-2)
    model.learn(1, log_interval=0)
    logged = model.logger.name_to_value
    assert "train/first_approx_kl" in logged
    assert abs(logged["train/first_approx_kl"]) < 1e-8 < logged["train/approx_kl"]
    assert logged["train/first_clip_fraction"] == 0.0


# ---- the critic's own passes --------------------------------------------------------------------------------------


def test_texts_that_are_masked_teach_the_critic_nothing_in_its_own_passes() -> None:
    changes = []
    for spoilt in (False, True):
        model = collected(critic_epochs=1, mask_truncated=True)
        model.buffer.truncated[:] = [True, False] * 4
        before = weights_of(model.policy)
        if spoilt:
            of_cut = np.repeat(model.buffer.truncated, model.buffer.lengths)
            model.buffer.returns[of_cut] += 100.0
        torch.manual_seed(0)
        np.random.seed(0)
        model.fit_critic(1)
        changes.append(weights_of(model.policy))
        assert largest_difference(before, changes[-1]) > 0
    assert largest_difference(*changes) == 0.0


# ---- arguments ----------------------------------------------------------------------------------------------------

CASES = [(algorithm, name) for algorithm in ALGORITHMS for name in argument_defaults(algorithm) if name in RANGES]
MAY_BE_NEGATIVE = ("missing_eos_penalty", "positive_score", "ent_coef")


def test_every_number_of_a_constructor_has_a_range() -> None:
    for algorithm in ALGORITHMS:
        for name, default in argument_defaults(algorithm).items():
            if isinstance(default, int | float) and not isinstance(default, bool):
                assert name in RANGES
    assert set(RANGES) == {name for _, name in CASES}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1])
@pytest.mark.parametrize("name", sorted(RANGES))
def test_a_number_that_could_only_hurt_is_refused_by_name(name: str, value: Any) -> None:
    if value == -1 and name in MAY_BE_NEGATIVE:
        return
    for algorithm in [algorithm for algorithm, own in CASES if own == name][:1]:
        with pytest.raises(ValueError, match="target KL" if (name, value) == ("kl_target", -1) else name):
            algorithm("CausalLMPolicy", "TextRLHF-v0", **{name: value})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_looks_at_its_numbers(algorithm: type[OnPolicyAlgorithm]) -> None:
    for name in [name for other, name in CASES if other is algorithm]:
        with pytest.raises(ValueError, match=r"got nan"):
            algorithm("CausalLMPolicy", "TextRLHF-v0", **{name: math.nan})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", 1.5),
        ("max_grad_norm", 0.0),
        ("dual_clip", 1.0),
        ("n_epochs", 1.5),
        ("n_episodes", True),
        ("gamma", "1"),
    ],
)
def test_numbers_at_the_edge_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Expected {name}.* got '?{value}"):
        PPO("CausalLMPolicy", "TextRLHF-v0", **{name: value})


@pytest.mark.parametrize("temperature", [math.nan, math.inf, -1.0, 0.0])
def test_a_temperature_that_makes_no_distribution_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="Expected a finite temperature > 0"):
        make_ppo(policy_kwargs={"temperature": temperature})


@pytest.mark.parametrize("name", ["learning_rate", "critic_learning_rate"])
def test_a_schedule_that_gives_nan_is_refused_before_it_reaches_the_optimiser(name: str) -> None:
    model = make_ppo(model=make_model(ends=0.2), **{name: lambda progress: 1e-3 if progress == 1 else math.nan})
    before = weights_of(model.policy)
    with pytest.raises(ValueError, match=f"Expected {name} to be a finite number >= 0, got nan"):
        model.learn(10)
    assert largest_difference(before, weights_of(model.policy)) == 0.0


def test_an_unknown_argument_names_the_algorithm_and_what_to_write_instead() -> None:
    with pytest.raises(TypeError, match=r"^PPO got an unexpected .* 'n_steps' \(.* n_episodes of them\);"):
        make_ppo(n_steps=64)
    with pytest.raises(TypeError, match=r"'clip_rnge' \(did you mean 'clip_range'\?\); known are policy, env, "):
        make_ppo(clip_rnge=0.1)
    for algorithm in ALGORITHMS:
        assert not set(SB3_ARGUMENTS) & set(argument_defaults(algorithm))


def test_an_unknown_policy_names_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"policy to be one of \['CausalLMPolicy'\], .* got 'MlpPolicy'"):
        PPO("MlpPolicy", make_env(2))
