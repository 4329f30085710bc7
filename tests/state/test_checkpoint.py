"""What a checkpoint holds, what loading it needs, and SB3's CheckpointCallback. Exactness: tests/invariants."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import EOS, largest_difference, make_env, make_model, make_ppo, save_model, weights_of
from safetensors import safe_open
from stable_baselines3.common.callbacks import CheckpointCallback
from transformers import GPT2Config

from agents.algorithms.a2c import A2C
from agents.algorithms.grpo import GRPO
from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.models.reference import Reference
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.state import checkpoint
from agents.state.manifest import seal
from agents.state.schedules import LearningRate


@pytest.fixture
def run(tmp_path: Path) -> PPO:
    """One iteration old, of a model that goes by name."""
    return make_ppo(model=save_model(tmp_path / "model"), clip_range=0.15, stats_window_size=7).learn(1)


def test_a_checkpoint_is_safetensors_and_json_only(run: PPO, tmp_path: Path) -> None:
    run.save(tmp_path / "checkpoint")
    names = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    weights = ["generators", "optimizer", "policy", "reference"]
    assert names == sorted([*(f"{name}.safetensors" for name in weights), "manifest.json", "state.json"])
    for name in (name for name in names if name.endswith(".safetensors")):
        with safe_open(tmp_path / "checkpoint" / name, "pt") as file:
            assert len(list(file.keys())) > 0
    values = json.loads((tmp_path / "checkpoint" / "state.json").read_text())["values"]
    assert values["algorithm"] == "agents.algorithms.ppo:PPO"
    assert values["policy_class"] == "agents.policies.causal_lm_policy:CausalLMPolicy"


def test_nothing_is_unpickled_when_a_checkpoint_is_loaded(
    run: PPO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(tmp_path / "checkpoint")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("loading a checkpoint must not run code that stands in it")

    for module, function in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, function, refuse)
    loaded = PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu")
    assert largest_difference(weights_of(run.policy), weights_of(loaded.policy)) == 0.0


def test_arguments_come_back_and_may_be_overruled(run: PPO, tmp_path: Path) -> None:
    run.save(tmp_path / "checkpoint")
    loaded = PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu", clip_range=0.3)
    assert (loaded.n_episodes, loaded.batch_size, loaded.n_epochs, loaded.seed) == (8, 4, 2, 0)
    assert loaded._stats_window_size == 7
    assert loaded.clip_range == 0.3
    assert loaded.num_timesteps == run.num_timesteps
    assert loaded.ep_info_buffer == run.ep_info_buffer


def test_what_is_given_counts_and_not_what_was_saved_of_the_same(run: PPO, tmp_path: Path) -> None:
    run.save(tmp_path / "run")
    own = Reference(make_ppo(model=make_model(sharp=0.1)).policy.lm)
    before = weights_of(own.lm)
    again = PPO.load(
        tmp_path / "run",
        make_env(),
        kl_coef=0.7,
        reference=own,
        policy_kwargs={**run.policy_kwargs, "optimizer_kwargs": {"weight_decay": 0.25}},
    )
    assert again.kl_coef == 0.7
    assert again.policy.optimizer.param_groups[0]["weight_decay"] == 0.25
    assert largest_difference(weights_of(own.lm), before) == 0
    drawn = []
    for _ in range(2):
        PPO.load(tmp_path / "run", make_env(), seed=5, policy_kwargs=run.policy_kwargs)
        drawn.append(float(torch.rand(())))
    torch.manual_seed(5)
    assert drawn == [float(torch.rand(()))] * 2


def test_another_seed_draws_other_prompts(run: PPO, tmp_path: Path) -> None:
    run.save(tmp_path / "run")
    drawn = []
    for seed in (5, 5, 6):
        again = PPO.load(tmp_path / "run", make_env(), seed=seed, policy_kwargs=run.policy_kwargs)
        again.learn(1, reset_num_timesteps=False)
        drawn.append([prompt.text for prompt in again.buffer.prompts])
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_warm_up_of_the_critic_can_be_given_anew(run: PPO, tmp_path: Path) -> None:
    run.save(tmp_path / "run")
    kept = PPO.load(tmp_path / "run", make_env(), policy_kwargs=run.policy_kwargs)
    anew = PPO.load(tmp_path / "run", make_env(), critic_warmup_episodes=16, policy_kwargs=run.policy_kwargs)
    assert (kept.critic_warmup_left, anew.critic_warmup_left) == (0, 16)
    anew.save(tmp_path / "again")
    again = PPO.load(tmp_path / "again", make_env(), critic_warmup_episodes=0, policy_kwargs=run.policy_kwargs)
    assert again.critic_warmup_left == 0


def test_a_minibatch_that_is_the_rollout_stays_so_when_the_rollout_is_another(tmp_path: Path) -> None:
    run: Any = make_ppo(model=save_model(tmp_path / "model"), algorithm=A2C, batch_size=None, n_epochs=1)
    run.save(tmp_path / "run")
    again = A2C.load(tmp_path / "run", make_env(), n_episodes=16)
    assert [len(minibatch) for minibatches in again._epochs(1) for minibatch in minibatches] == [16]
    again.n_episodes = 12
    assert [len(minibatch) for minibatches in again._epochs(1) for minibatch in minibatches] == [12]


def test_the_optimizer_goes_on_where_it_was(run: PPO, tmp_path: Path) -> None:
    run.save(tmp_path / "checkpoint")
    loaded = PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu")
    ours, theirs = run.policy.optimizer.state_dict(), loaded.policy.optimizer.state_dict()
    assert json.dumps(ours["param_groups"]) == json.dumps(theirs["param_groups"])
    assert ours["state"].keys() == theirs["state"].keys()
    assert ours["state"]
    for index, moments in ours["state"].items():
        assert all(torch.equal(value, theirs["state"][index][name]) for name, value in moments.items())


def test_the_reference_is_the_model_that_the_run_started_from(run: PPO, tmp_path: Path) -> None:
    run.save(tmp_path / "checkpoint")
    loaded = PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu")
    samples = run.buffer.pack(torch.arange(8).numpy())
    assert run.reference is not None
    assert loaded.reference is not None
    ours = run.reference.log_probs(samples.observations, samples.actions)
    assert ours.equal(loaded.reference.log_probs(samples.observations, samples.actions))
    assert (
        float((ours - run.policy.evaluate_actions(samples.observations, samples.actions)[1]).detach().abs().max())
        > 1e-5
    )


def test_sb3s_checkpoint_callback_saves_checkpoints_that_load(tmp_path: Path) -> None:
    run = make_ppo(model=save_model(tmp_path / "model"))
    run.learn(60, callback=CheckpointCallback(save_freq=5, save_path=str(tmp_path / "checkpoints")))
    saved = sorted((tmp_path / "checkpoints").iterdir(), key=lambda path: int(path.name.split("_")[2]))
    assert len(saved) >= 2
    assert all(path.is_dir() for path in saved)
    loaded = PPO.load(tmp_path / "checkpoints" / (saved[-1].name + ".zip"), env=make_env(), device="cpu")
    before = loaded.num_timesteps
    assert before == int(saved[-1].name.split("_")[2])
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps >= before + 20


# ---- what can go wrong ---------------------------------------------------------------------------------------------


def test_learning_without_an_environment_says_what_to_pass(run: PPO, tmp_path: Path) -> None:
    run.save(tmp_path / "checkpoint")
    loaded = PPO.load(tmp_path / "checkpoint", device="cpu")
    with pytest.raises(ValueError, match=r"Expected an environment, .* use load\(path, env=\.\.\.\)"):
        loaded.learn(1)


def test_loading_what_is_not_there_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"Expected a checkpoint directory with manifest\.json, found none at .*nowhere"
    ):
        PPO.load(tmp_path / "nowhere", env=make_env())


def test_a_schedule_that_is_code_must_be_given_again(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    make_ppo(model=model, learning_rate=lambda progress: 1e-3 * progress).save(tmp_path / "checkpoint")
    with pytest.raises(
        ValueError, match=r"\['learning_rate'\] can't be written down .* load\(path, env, learning_rate=\.\.\.\)"
    ):
        PPO.load(tmp_path / "checkpoint", env=make_env())
    loaded = PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu", learning_rate=lambda _: 5e-4)
    assert loaded.lr_schedule(1.0) == 5e-4


def test_a_learning_rate_that_is_data_need_not_be_given_again(tmp_path: Path) -> None:
    rate = LearningRate(1e-3, "cosine", warmup=0.25)
    make_ppo(model=save_model(tmp_path / "model"), learning_rate=rate).save(tmp_path / "checkpoint")
    loaded = PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu")
    assert loaded.learning_rate == rate
    assert [loaded.lr_schedule(progress) for progress in (0.9, 0.5)] == [rate(0.9), rate(0.5)]
    other = PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu", learning_rate=LearningRate(5e-4))
    assert other.lr_schedule(0.1) == 5e-4


@pytest.mark.parametrize(
    "policy_kwargs",
    [{"model": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4)}, {"optimizer_class": torch.optim.RMSprop}],
    ids=["model", "optimizer_class"],
)
def test_a_live_object_of_the_policy_must_be_given_again(tmp_path: Path, policy_kwargs: dict[str, Any]) -> None:
    """Otherwise the built-in model, or Adam, would quietly take its place."""
    [name] = policy_kwargs
    model = save_model(tmp_path / "model")
    run = make_ppo(model=model, policy_kwargs=policy_kwargs).learn(1)
    run.save(tmp_path / "checkpoint")
    with pytest.raises(
        ValueError, match=rf"\['{name}'\] can't be .* load\(path, env, policy_kwargs={{'{name}': \.\.\.}}\)"
    ):
        PPO.load(tmp_path / "checkpoint", env=make_env())
    loaded = PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu", policy_kwargs=policy_kwargs)
    assert largest_difference(weights_of(run.policy), weights_of(loaded.policy)) == 0.0


def test_a_reference_of_ones_own_must_be_given_again(tmp_path: Path) -> None:
    """Otherwise the KL would quietly be measured against another model."""
    model = save_model(tmp_path / "model")
    reference = Reference.load(save_model(tmp_path / "other", sharp=0.1), n_tokens=300, device="cpu")
    make_ppo(model=model, reference=reference).save(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"\['reference'\] can't be written down"):
        PPO.load(tmp_path / "checkpoint", env=make_env())
    assert PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu", reference=reference).reference is reference


def test_a_model_may_go_by_a_path_object(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    run = make_ppo(model=tmp_path / "model")
    run.save(tmp_path / "checkpoint")
    loaded = PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu")
    assert largest_difference(weights_of(run.policy), weights_of(loaded.policy)) == 0.0


def test_a_checkpoint_of_another_shape_does_not_load(run: PPO, tmp_path: Path) -> None:
    run.save(tmp_path / "checkpoint")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PPO.load(
            tmp_path / "checkpoint", env=make_env(), device="cpu", policy_kwargs={"model": make_model(hidden_size=16)}
        )


def test_a_resumed_run_is_held_to_the_reference_that_it_started_from(tmp_path: Path) -> None:
    model = make_model()  # live, and trained in place: when it is given again it is no longer what it was
    run = make_ppo(model=model).learn(1)
    run.save(tmp_path / "checkpoint")
    loaded = PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu", policy_kwargs={"model": model})
    assert run.reference is not None
    assert loaded.reference is not None
    assert largest_difference(weights_of(run.reference.lm), weights_of(loaded.reference.lm)) == 0.0
    assert largest_difference(weights_of(run.policy.lm), weights_of(loaded.reference.lm)) > 0.0


# ---- of which classes ----------------------------------------------------------------------------------------------


class GentlePPO(PPO):
    """A subclass that saves what PPO saves."""


class MyPolicy(CausalLMPolicy):
    """A policy with the weights of its base class."""


def grouped(cls: type[OnPolicyAlgorithm], model: str) -> OnPolicyAlgorithm:
    env = make_env(group_size=2)
    return cls("CausalLMPolicy", env, policy_kwargs={"model": model}, n_episodes=4, seed=0, device="cpu")


def test_a_checkpoint_of_another_algorithm_is_refused(tmp_path: Path) -> None:
    """GRPO and RLOO have the same weights, optimiser and counters: all would load."""
    grouped(RLOO, save_model(tmp_path / "model")).save(tmp_path / "checkpoint")
    with pytest.raises(
        ValueError,
        match=r"Expected a checkpoint of agents\.algorithms\.grpo:GRPO, got one that was written by "
        r"agents\.algorithms\.rloo:RLOO: use RLOO\.load\(path, env=\.\.\.\)",
    ):
        GRPO.load(tmp_path / "checkpoint", env=make_env(group_size=2))
    assert type(RLOO.load(tmp_path / "checkpoint", env=make_env(group_size=2), device="cpu")) is RLOO


@pytest.mark.parametrize(("saver", "loader"), [(GentlePPO, PPO), (PPO, GentlePPO)])
def test_neither_a_subclass_nor_a_base_class_is_the_same_algorithm(
    tmp_path: Path, saver: type[PPO], loader: type[PPO]
) -> None:
    policy_kwargs = {"model": save_model(tmp_path / "model")}
    saver("CausalLMPolicy", make_env(), policy_kwargs=policy_kwargs, device="cpu").save(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=rf"written by \S+:{saver.__name__}: use {saver.__name__}\.load"):
        loader.load(tmp_path / "checkpoint", env=make_env())
    assert type(saver.load(tmp_path / "checkpoint", env=make_env(), device="cpu")) is saver


def test_a_class_of_the_same_name_in_another_module_is_another_algorithm(run: PPO, tmp_path: Path) -> None:
    run.save(tmp_path / "checkpoint")
    namesake: type[PPO] = type("PPO", (PPO,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match=r"checkpoint of elsewhere:PPO, got .* agents\.algorithms\.ppo:PPO"):
        namesake.load(tmp_path / "checkpoint", env=make_env())


def test_a_policy_of_another_class_is_refused_until_it_is_given(tmp_path: Path) -> None:
    policy_kwargs = {"model": save_model(tmp_path / "model")}
    for policy, name in ((MyPolicy, "mine"), ("CausalLMPolicy", "plain")):
        PPO(policy, make_env(), policy_kwargs=policy_kwargs, device="cpu").save(tmp_path / name)
    with pytest.raises(
        ValueError,
        match=r"written with, \S+:MyPolicy, got \S+:CausalLMPolicy: use load\(path, env=\.\.\., policy=MyPolicy\)",
    ):
        PPO.load(tmp_path / "mine", env=make_env())
    with pytest.raises(ValueError, match=r"\S+:CausalLMPolicy, got \S+:MyPolicy: use .* policy=CausalLMPolicy\)"):
        PPO.load(tmp_path / "plain", env=make_env(), policy=MyPolicy)
    with pytest.raises(ValueError, match="got MlpPolicy: use "):
        PPO.load(tmp_path / "plain", env=make_env(), policy="MlpPolicy")
    assert type(PPO.load(tmp_path / "mine", env=make_env(), device="cpu", policy=MyPolicy).policy) is MyPolicy
    assert type(PPO.load(tmp_path / "plain", env=make_env(), device="cpu", policy=CausalLMPolicy).policy) is (
        CausalLMPolicy
    )


# ---- what a file may say -------------------------------------------------------------------------------------------


def rewritten(directory: Path, change: Any) -> None:
    """Change the values of a checkpoint, as whoever hands it on could."""
    state = json.loads((directory / "state.json").read_text())
    change(state["values"])
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "manifest.json").unlink()
    seal(directory, {})


def test_a_file_sets_no_attribute_that_the_class_does_not_list(run: PPO, tmp_path: Path) -> None:
    run.save(tmp_path / "checkpoint")
    rewritten(tmp_path / "checkpoint", lambda values: values["counters"].update(gamma=0.0))
    with pytest.raises(ValueError, match=r"Expected the counters \[.*\] of PPO, got \[.*'gamma'.*\]"):
        PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu")


def test_a_file_adds_no_option_to_the_optimizer(run: PPO, tmp_path: Path) -> None:
    run.save(tmp_path / "checkpoint")
    rewritten(tmp_path / "checkpoint", lambda values: values["optimizer"]["param_groups"][0].update(eps=1e-3, odd=1))
    [group, _] = PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu").policy.optimizer.param_groups
    assert group["eps"] == 1e-3
    assert "odd" not in group


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["policy_kwargs"].update(constraint="this:exits"),
        lambda values: values["policy_kwargs"].update(constraint=["this:exits"]),
        lambda values: values["arguments"].update(gamma="this:exits"),
    ],
    ids=["policy", "nested", "algorithm"],
)
def test_a_file_that_names_code_does_not_load(run: PPO, tmp_path: Path, change: Any) -> None:
    run.save(tmp_path / "checkpoint")
    rewritten(tmp_path / "checkpoint", change)
    with pytest.raises(ValueError, match=r"can't be written down and must be given again"):
        PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu")


def test_the_running_mean_of_reinforce_comes_back(tmp_path: Path) -> None:
    env, policy_kwargs = make_env(), {"model": save_model(tmp_path / "model")}
    run = REINFORCE("CausalLMPolicy", env, policy_kwargs=policy_kwargs, n_episodes=8, seed=0, device="cpu").learn(1)
    assert run.mean_return is not None
    run.save(tmp_path / "checkpoint")
    assert REINFORCE.load(tmp_path / "checkpoint", env=make_env(), device="cpu").mean_return == run.mean_return


def test_tied_weights_are_written_once_and_stay_tied(run: PPO, tmp_path: Path) -> None:
    names = [name for name in run.policy.lm.state_dict(prefix="lm.") if name.endswith(("wte.weight", "lm_head.weight"))]
    assert len(names) > 1
    run.save(tmp_path / "checkpoint")
    with safe_open(tmp_path / "checkpoint" / "policy.safetensors", "pt") as file:
        assert len(set(names) & set(file.keys())) == 1
        assert len(list(file.keys())) < len(run.policy.state_dict())
    loaded = PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu")
    assert largest_difference(weights_of(run.policy), weights_of(loaded.policy)) == 0.0
    model = loaded.policy.lm.model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert float(model.get_output_embeddings().weight[EOS, 0].detach()) != 0.0


def test_an_algorithm_goes_back_to_a_state_that_was_copied(run: PPO) -> None:
    state = copy.deepcopy(run.state())
    run.learn(40, reset_num_timesteps=False)
    expected = weights_of(run.policy)
    run.load_state(copy.deepcopy(state))
    assert largest_difference(weights_of(run.policy), state["policy"]) == 0.0
    run.learn(40, reset_num_timesteps=False)
    assert largest_difference(weights_of(run.policy), expected) == 0.0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_never_written_over_a_good_one(run: PPO, tmp_path: Path, wrong: float) -> None:
    run.save(tmp_path / "checkpoint")
    before = weights_of(run.policy)
    with torch.no_grad():
        run.policy.lm.model.transformer.h[0].ln_1.bias[3] = wrong
    with pytest.raises(FloatingPointError, match=r"got NaN or an infinite one in policy/.*h\.0\.ln_1\.bias: nothing"):
        run.save(tmp_path / "checkpoint")
    loaded = PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu")
    assert largest_difference(before, weights_of(loaded.policy)) == 0.0


def test_a_link_to_a_checkpoint_stays_a_link_however_often_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link, place = tmp_path / "latest", tmp_path / "disk" / "model"
    link.symlink_to(place)  # at first to nothing
    for number in range(3):
        checkpoint.save(link, {"x": torch.full((2,), float(number))})
        assert checkpoint.load(link)["x"].tolist() == checkpoint.load(place)["x"].tolist() == [number, number]
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["disk", "latest", "model"]
    place.rename(place.with_name("model.previous"))  # as a process leaves it that is killed between two renamings
    assert checkpoint.load(link)["x"].tolist() == [2, 2]
    checkpoint.save(link, {"x": torch.ones(2)})
    assert checkpoint.load(place)["x"].tolist() == [1, 1]


def test_an_environment_of_another_size_does_not_go_on(run: PPO, tmp_path: Path) -> None:
    run.save(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"Expected an environment of 4 rows, .* got 3\."):
        PPO.load(tmp_path / "checkpoint", env=make_env(3), device="cpu")


@pytest.mark.parametrize("found", ["a directory that holds chapters, thesis.txt", "a file"])
def test_saving_leaves_what_is_no_checkpoint_as_it_is(run: PPO, tmp_path: Path, found: str) -> None:
    path = tmp_path / "mine"
    if found == "a file":
        path.write_text("words")
    else:
        (path / "chapters").mkdir(parents=True)
        (path / "thesis.txt").write_text("words")
    with pytest.raises(FileExistsError, match=f"mine is {found}. Nothing was written"):
        run.save(path)
    assert (path if path.is_file() else path / "thesis.txt").read_text() == "words"
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("mine")] == ["mine"]


def test_saving_replaces_checkpoints_and_fills_empty_directories(
    run: PPO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    run.save(tmp_path / "empty")
    (tmp_path / "empty" / "manifest.json").unlink()  # damaged, and still a checkpoint
    run.save(tmp_path / "empty")
    PPO.load(tmp_path / "empty", env=make_env(), device="cpu")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="a directory that holds empty"):
        run.save(".")
