"""The command line, end to end on the tiniest settings: `textrlhf train | evaluate | sample`."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from learners import PROMPTS, make_env, save_model, weights_of
from transformers import AutoModelForCausalLM

from agents.algorithms.ppo import PPO
from agents.cli import main, run_of
from agents.policies.causal_lm_policy import load_policy
from agents.runs.algorithms import algorithm_named
from agents.runs.commands import SampleConfig
from agents.runs.config import EnvConfig, TrainConfig, dump_config, load_config
from agents.runs.model_card import write_card
from agents.state.history import CheckpointHistory
from agents.state.lock import locked
from agents.state.schedules import LearningRate
from text_env.builtin import prompts
from text_env.tasks import Task

TINY = ["--max-new-tokens", "6", "--n-episodes", "8", "--batch-size", "4", "--n-epochs", "1", "--device", "cpu"]


class Run:
    """A model, prompts, and a run that was trained from them by the command line."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = save_model(root / "model")
        (root / "prompts.txt").write_text("\n".join(PROMPTS))
        self.prompts = str(root / "prompts.txt")
        self.directory = root / "run"

    def train(self, directory: Path, *more: str) -> int:
        names = ["--model", self.model, "--prompts", self.prompts, "--reward", "learners:even_tokens"]
        names += ["--gold", "sentiment"]
        return main(["train", *names, *TINY, "--total-timesteps", "100", "--run-dir", str(directory), *more])

    def evaluate(self, policy: Path | str, *more: str) -> int:
        names = ["--policy", str(policy), "--prompts", self.prompts, "--device", "cpu", "--trust"]
        return main(["evaluate", *names, *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(tmp_path_factory.mktemp("cli"))
    assert (
        made.train(
            made.directory, "--sample-every", "2", "--n-samples", "3", "--no-progress", "--learning-rate", "3e-3"
        )
        == 0
    )
    return made


# ---- train ---------------------------------------------------------------------------------------------------------


def test_a_run_directory_is_complete(run: Run) -> None:
    names = {path.name for path in run.directory.iterdir()}
    assert names >= {"config.yaml", "progress.csv", "samples.jsonl", "learning_curve.png", "policy"}
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (run.directory / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    files = {path.name for path in (run.directory / "policy").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "value_head.safetensors"}
    AutoModelForCausalLM.from_pretrained(run.directory / "policy")


def test_progress_csv_has_a_row_for_every_iteration(run: Run) -> None:
    with (run.directory / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    tokens = [int(row["time/total_timesteps"]) for row in rows]
    assert len(rows) >= 2
    assert tokens == sorted(tokens)
    assert tokens[-1] >= 100
    for name in ("objective/scores", "objective/gold_score", "objective/kl", "train/loss", "rollout/ep_rew_mean"):
        assert all(np.isfinite(float(row[name])) for row in rows)


def test_samples_are_of_the_same_prompts_at_the_start_in_between_and_at_the_end(run: Run) -> None:
    rows = [json.loads(line) for line in (run.directory / "samples.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in rows} == set(PROMPTS[:3])
    times = [row["timesteps"] for row in rows]
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] >= 100
    assert len(set(times)) >= 3
    assert all(set(row) >= {"prompt", "completion", "score", "gold_score", "finish_reason"} for row in rows)


def test_the_config_is_complete_and_is_the_same_when_it_is_read_again(run: Run) -> None:
    written = yaml.safe_load((run.directory / "config.yaml").read_text())
    config = load_config(run.directory / "config.yaml")
    assert written == yaml.safe_load(dump_config(config))
    assert written["env"]["reward"] == "learners:even_tokens"
    assert (written["n_episodes"], written["total_timesteps"], written["seed"]) == (8, 100, 0)
    assert set(written) == set(TrainConfig.__dataclass_fields__)
    assert set(written["env"]) == set(EnvConfig.__dataclass_fields__)


def test_the_same_config_gives_the_same_policy_and_overrides_win(run: Run, tmp_path: Path) -> None:
    config = ["train", "--config", str(run.directory / "config.yaml"), "--no-progress"]
    assert main([*config, "--run-dir", str(tmp_path / "again")]) == 0
    assert main([*config, "--run-dir", str(tmp_path / "other"), "--seed", "1", "--max-new-tokens", "4"]) == 0
    first, again, other = (
        AutoModelForCausalLM.from_pretrained(path / "policy")
        for path in (run.directory, tmp_path / "again", tmp_path / "other")
    )
    assert all(tensor.equal(weights_of(again)[name]) for name, tensor in weights_of(first).items())
    assert not all(tensor.equal(weights_of(other)[name]) for name, tensor in weights_of(first).items())
    written = yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())
    assert (written["seed"], written["env"]["max_new_tokens"], written["n_episodes"]) == (1, 4, 8)


def test_a_config_file_may_be_a_part_of_one(run: Run, tmp_path: Path) -> None:
    values = {
        "model": run.model,
        "env": {"prompts": run.prompts, "reward": "sentiment", "gold": None, "max_new_tokens": 4},
        "n_episodes": 4,
        "total_timesteps": 10,
        "device": "cpu",
        "algo_kwargs": {"clip_range": 0.1, "target_kl": None},
    }
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(values))
    assert (
        main(["train", "--config", str(tmp_path / "part.yaml"), "--run-dir", str(tmp_path / "run"), "--no-progress"])
        == 0
    )
    header = (tmp_path / "run" / "progress.csv").read_text().splitlines()[0]
    assert "gold_score" not in header
    assert (tmp_path / "run" / "learning_curve.png").exists()


def test_arguments_of_the_algorithm_reach_it(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PPO] = []
    learn = PPO.learn

    def look(self: PPO, *args: Any, **kwargs: Any) -> PPO:
        seen.append(self)
        return learn(self, *args, **kwargs)

    monkeypatch.setattr(PPO, "learn", look)
    options = ["--algo-kwargs", "clip_range", "0.07", "clip_range_vf", "null", "--kl-target", "2.0", "--lora-r", "2"]
    options += ["--kl-estimator", "k3", "--learning-rate", "2e-4"]
    assert run.train(tmp_path / "run", *options, "--lr-schedule", "constant", "--temperature", "0.9") == 0
    [model] = seen
    assert (model.clip_range, model.clip_range_vf, model.kl_target) == (0.07, None, 2.0)
    assert model.kl_estimator == model.buffer.kl_estimator == "k3"
    assert model.lr_schedule(0.0) == model.lr_schedule(1.0) == 2e-4
    assert model.policy.distribution.temperature == 0.9
    # The adapter that was left is a policy like any other.
    assert run.evaluate(tmp_path / "run" / "policy", "--episodes", "4") == 0


def test_the_exact_divergence_is_an_option(run: Run, tmp_path: Path) -> None:
    assert run.train(tmp_path / "run", "--kl-estimator", "exact") == 0
    with (tmp_path / "run" / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["objective/kl_exact"]) == pytest.approx(0.0, abs=1e-5)
    assert float(rows[-1]["objective/kl_exact"]) > 1e-5
    assert float(rows[-1]["train/kl_loss"]) > 0
    assert "kl_estimator: exact" in (tmp_path / "run" / "config.yaml").read_text()


def test_an_algorithm_of_ones_own_goes_by_module_and_class() -> None:
    assert algorithm_named("ppo") is PPO
    assert algorithm_named("agents.algorithms.ppo:PPO") is PPO


def test_progress_shows_tokens_score_and_kl(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.train(tmp_path / "run", "--total-timesteps", "20") == 0
    shown = capsys.readouterr().out
    assert re.search(r"tokens .*score [+-]\d\.\d\d  KL -?\d\.\d\d nats", shown)
    assert "Wrote" in shown


# ---- evaluate ------------------------------------------------------------------------------------------------------


def test_evaluate_writes_the_json_that_was_promised(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.evaluate(run.directory / "policy", "--episodes", "12", "--json", str(tmp_path / "out.json")) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result) >= {"policy", "reference", "kl", "score_gain_std", "episodes", "win_rate", "perplexity"}
    assert set(result["comparison"]) == {"score", "gold_score"}
    assert "texts" not in result
    for name in ("policy", "reference"):
        assert set(result[name]) >= {"score", "gold_score", "distinct_2", "mean_length"}
    assert result["episodes"] == 12
    assert result["kl"] > 0  # the reference is the model that the run's own config names
    shown = capsys.readouterr().out
    assert "12 episodes each" in shown
    assert "score gain (std)" in shown
    low, high = result["win_rate_interval"]
    assert f"{100 * result['win_rate']:.0f}% [{100 * low:.0f}, {100 * high:.0f}]" in shown
    assert "change" in shown


def test_evaluate_shows_texts_side_by_side(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--episodes", "6", "--texts", "2", "--json", str(tmp_path / "out.json")]
    assert run.evaluate(run.directory / "policy", *options) == 0
    texts = json.loads((tmp_path / "out.json").read_text())["texts"]
    assert len(texts) == 2
    shown = "".join(capsys.readouterr().out.split())
    for pair in texts:
        assert pair["prompt"] in PROMPTS
        for name in ("policy", "reference"):
            assert f"{pair[name]['score']:+.2f}{pair['prompt']}".replace(" ", "")[:8] in shown


def test_evaluate_compares_two_policies_against_each_other(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, json_path = str(run.directory / "policy"), tmp_path / "out.json"
    assert run.evaluate(policy, "--against", run.model, "--episodes", "8", "--json", str(json_path)) == 0
    result = json.loads(json_path.read_text())
    assert result["compared_with"] == "against"
    assert abs(result["kl"]) > 0.01
    assert result["kl_against"] == pytest.approx(0, abs=1e-4)  # this one is the reference itself
    shown = capsys.readouterr().out
    assert "difference" in shown
    assert "against" in shown
    assert re.search(rf"KL \(nats/episode\) +│ -?0\.00 +│ {result['kl']:.2f} ", shown)


def test_evaluate_may_sharpen_both_by_a_temperature(run: Run, tmp_path: Path) -> None:
    entropy = {}
    for temperature in ("1.0", "0.1"):
        path = tmp_path / f"{temperature}.json"
        options = ["--temperature", temperature, "--episodes", "16", "--json", str(path)]
        assert run.evaluate(run.directory / "policy", *options) == 0
        entropy[temperature] = json.loads(path.read_text())["reference"]["perplexity"]
    assert entropy["0.1"] < 0.5 * entropy["1.0"]


def test_evaluate_with_the_policy_itself_as_reference_finds_no_kl(run: Run, tmp_path: Path) -> None:
    policy = str(run.directory / "policy")
    options = ["--reference", policy, "--reward", "sentiment", "--episodes", "8", "--json", str(tmp_path / "out.json")]
    assert run.evaluate(policy, *options) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["kl"] == pytest.approx(0, abs=1e-4)
    assert result["policy"]["score"] == result["policy"]["gold_score"]  # both are the sentiment now


def test_evaluate_gives_the_same_figures_for_the_same_seed(run: Run, tmp_path: Path) -> None:
    results = []
    for number, seed in enumerate((0, 0, 1)):
        path = tmp_path / f"{number}.json"
        assert run.evaluate(run.directory / "policy", "--episodes", "8", "--seed", str(seed), "--json", str(path)) == 0
        results.append(path.read_text())
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_evaluate_says_how_often_k_texts_hold_a_right_answer(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    options = ["--reward", "learners:four_is_right", "--episodes", "24", "--json", str(path)]
    assert run.evaluate(run.directory / "policy", *options, "--samples-per-prompt", "8", "--pass-at-k", "1", "4") == 0
    result = json.loads(path.read_text())
    assert result["prompts"] == 3
    for writer in ("policy", "reference"):
        figures = result["answers"][writer]
        assert set(figures) >= {"pass@1", "pass@4", "majority@4", "greedy_accuracy", "mean_length_wrong"}
        assert "pass@8" not in figures
    shown = capsys.readouterr().out
    assert "at least 8 texts for each of 3 prompts" in shown
    assert re.search(rf"│ pass@4 .*│ {100 * result['answers']['policy']['pass@4']:.1f}% \[", shown)
    assert run.evaluate(run.directory / "policy", "--episodes", "4", "--pass-at-k", "1") == 1
    assert "Use such a reward, or leave pass_at_k out." in " ".join(capsys.readouterr().out.split())


def test_evaluate_uses_held_out_prompts_by_default(tmp_path: Path) -> None:
    task, out = tmp_path / "sums.jsonl", tmp_path / "out.json"
    rows = [{"prompt": f"{n}+1=", "answer": n + 1, "split": "eval" if n < 3 else "train"} for n in range(9)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--policy", "builtin", "--reference", "builtin", "--device", "cpu", "--json", str(out), "--texts", "8"]
    for more, prompt_set, held_out in (
        ([], "builtin:eval", set(prompts("eval"))),
        (["--task", str(task), "--max-new-tokens", "4"], str(task), {"0+1=", "1+1=", "2+1="}),
    ):
        assert main(["evaluate", *options, "--episodes", "8", *more]) == 0
        result = json.loads(out.read_text())
        assert result["prompt_set"] == prompt_set
        assert {text["prompt"] for text in result["texts"]} <= held_out


def test_prompts_without_a_held_out_part_are_called_what_the_run_was_trained_on(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.txt").write_text("\n".join(PROMPTS))
    out = run.directory / "evaluation.json"
    options = ["evaluate", "--policy", str(run.directory), "--episodes", "4", "--device", "cpu", "--trust"]
    for named, trained_on in (([], True), (["--prompts", str(tmp_path / "other.txt")], False)):
        assert main([*options, *named, "--json", str(out)]) == 0
        assert json.loads(out.read_text())["trained_on"] is trained_on
        assert ("which the run was trained on" in " ".join(capsys.readouterr().out.split())) is trained_on
        assert (", which it was trained on)" in write_card(run.directory).read_text()) is trained_on
    out.unlink()
    for name in ("builtin", "builtin:train"):
        assert EnvConfig(prompts=name).for_evaluation().prompt_set(EnvConfig(prompts=name)) == {
            "prompt_set": "builtin:eval",
            "trained_on": False,
        }
    assert EnvConfig(prompts="./a.txt").for_evaluation().prompt_set(EnvConfig(prompts="a.txt"))["trained_on"]


def test_evaluate_takes_a_run_or_its_policy_and_says_where_there_is_none(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for policy in (run.directory, run.directory / "policy"):
        options = ["--against", str(policy), "--episodes", "4", "--json", str(tmp_path / "out.json")]
        assert run.evaluate(policy, *options) == 0
        results.append((tmp_path / "out.json").read_text())
    assert results[0] == results[1]
    capsys.readouterr()
    assert main(["sample", "--policy", str(run.directory), "--prompt", "a", "--device", "cpu", "--trust"]) == 0
    missing = str(tmp_path / "nothing")
    capsys.readouterr()
    assert f"There is no directory '{missing}'." in failed(capsys, run.evaluate(missing))
    assert "belongs to no run" in failed(capsys, run.evaluate("builtin"))


# ---- critic --------------------------------------------------------------------------------------------------------

SMALL = ["--texts", "6", "--positions", "2", "--branches", "3", "--device", "cpu", "--trust"]


def test_critic_examines_a_run_by_what_it_paid_and_draws_a_picture(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, picture = tmp_path / "out.json", run.directory / "critic.png"
    assert main(["critic", "--policy", str(run.directory), *SMALL, "--json", str(path)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "The critic: 6 texts, 2 positions, 3 branches" in shown
    assert f"prompts: {run.prompts}, which the run was trained on" in shown
    result = json.loads(path.read_text())
    assert result["overall"]["states"] == len(result["states"]["value"])
    assert len(set(result["states"]["value"])) > 2  # the critic that was saved, not a new one
    assert result["kl_coef"] == 0.04
    again = ["--policy", str(run.directory / "policy"), "--plot", str(tmp_path / "again.png")]
    assert main(["critic", *again, *SMALL, "--json", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == result
    assert (tmp_path / "again.png").exists()


def test_critic_pays_the_kl_coefficient_that_an_adaptive_run_ended_with(run: Run, tmp_path: Path) -> None:
    directory, path = tmp_path / "run", tmp_path / "out.json"
    assert run.train(directory, "--kl-target", "50", "--algo-kwargs", "gamma", "0.9", "--no-progress") == 0
    assert main(["critic", "--policy", str(directory), *SMALL, "--json", str(path)]) == 0
    with (directory / "progress.csv").open() as file:
        last = float(list(csv.DictReader(file))[-1]["objective/kl_coef"])
    assert json.loads(path.read_text())["kl_coef"] == last != 0.04


def test_critic_finds_a_critic_with_a_decoder_of_its_own(tmp_path: Path) -> None:
    options = ["--model", "builtin", "--critic", "builtin", *TINY, "--total-timesteps", "8", "--no-progress"]
    assert main(["train", *options, "--run-dir", str(tmp_path / "run")]) == 0
    assert main(["critic", "--policy", str(tmp_path / "run"), *SMALL]) == 0


def test_critic_refuses_what_has_none(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "got one without config.yaml" in failed(capsys, main(["critic", "--policy", run.model, *SMALL]))
    directory = tmp_path / "run"
    assert run.train(directory, "--algo", "reinforce", "--no-progress") == 0
    assert "Expected a trained critic" in failed(capsys, main(["critic", "--policy", str(directory), *SMALL]))
    (directory / "policy" / "value_head.safetensors").unlink()
    assert "holds no value_head.safetensors" in failed(capsys, main(["critic", "--policy", str(directory), *SMALL]))


# ---- sample --------------------------------------------------------------------------------------------------------


def test_sample_prints_texts_that_begin_with_the_prompt(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    policy = str(run.directory / "policy")
    options = ["--prompt", "The movie", "I loved", "--n", "2", "--max-new-tokens", "5", "--device", "cpu", "--trust"]
    assert main(["sample", "--policy", policy, *options]) == 0
    shown = capsys.readouterr().out
    assert shown.count("The movie") >= 2
    assert shown.count("I loved") >= 2
    assert len(re.findall(r"\([+-]\d\.\d\d\)", shown)) == 4
    assert main(["sample", "--policy", policy, *options, "--seed", "0"]) == 0
    assert capsys.readouterr().out == shown


def test_greedy_samples_are_the_models_most_probable_text(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    policy = run.directory / "policy"
    options = ["--prompt", "a", "--greedy", "--max-new-tokens", "5", "--device", "cpu", "--trust"]
    assert main(["sample", "--policy", str(policy), *options]) == 0
    env = make_env(1, max_new_tokens=5)
    loaded = load_policy(policy, env, device="cpu")
    ids = env.tokenizer("a", return_tensors="pt")["input_ids"]
    written = loaded.lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5, pad_token_id=1
    )
    text = env.tokenizer.decode(written[0], skip_special_tokens=True)
    assert capsys.readouterr().out.startswith(text)


def test_text_in_square_brackets_is_printed_as_it_is(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """rich would take it for markup."""
    options = ["--prompt", "[red] [/nothing] x", "--max-new-tokens", "1", "--greedy", "--device", "cpu", "--trust"]
    assert main(["sample", "--policy", str(run.directory / "policy"), *options]) == 0
    assert "[red] [/nothing] x" in capsys.readouterr().out


def test_a_text_is_shown_where_the_reward_needs_a_column_that_a_typed_prompt_does_not_have(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max-new-tokens", "4", "--reward", "2*test_cli:agrees+0.1*sentiment", "--device", "cpu", "--prompt"]
    assert main(["sample", "--policy", "builtin", *options, "The movie"]) == 0
    reason = "not scored: TypeError: agrees() missing 1 required positional argument: 'answer'"
    assert re.search(rf"The movie.* \({re.escape(reason)}\)", " ".join(capsys.readouterr().out.split()))
    monkeypatch.setattr("sys.stdin", io.StringIO("g\nb\ng\n"))
    assert main(["play", "builtin", *options, "The movie"]) == 0
    assert " ".join(capsys.readouterr().out.split()).count(f"{reason} · ended by") == 2


# ---- demo ----------------------------------------------------------------------------------------------------------


def run_demo_with(monkeypatch: pytest.MonkeyPatch, run_dir: Path, **changed: float) -> int:
    """The demo without its training: everything is as it should be, except for what is changed."""
    reference = {"score": 0.0, "gold_score": 0.1, "distinct_2": 0.8}
    policy = {"score": 2.0, "gold_score": 0.9, "distinct_2": 0.7}
    figures = {"kl": 9.0, "score_gain_std": 2.0, "episodes": 256, "compared_with": "reference", "comparison": {}}
    writers = {"policy": policy, "reference": reference, "prompt_set": "builtin:eval"}
    for name, value in changed.items():
        (policy if name in policy else figures)[name] = value

    def train(config: TrainConfig) -> None:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / "config.yaml").write_text(dump_config(config))
        rows = [
            {"timesteps": t, "prompt": "The movie", "completion": f" [/b]\x1b[2J\u2028 at {t}", "score": 1.0}
            for t in (0, 50, 99)
        ]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (config.run_dir / "samples.jsonl").write_text("".join(lines))

    monkeypatch.setattr("agents.runs.train.train", train)
    monkeypatch.setattr("agents.cli._evaluate", lambda *_: {**writers, **figures})
    return main(["demo", "--run-dir", str(run_dir)])


def test_the_demo_prints_its_figures_and_texts_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo_with(monkeypatch, tmp_path / "demo") == 0
    shown = capsys.readouterr().out
    assert "256 episodes each" in shown
    for tokens in (0, 99):  # as they are, but a control character is obeyed by no terminal
        assert f"The movie [/b]\ufffd[2J\u2028 at {tokens}" in shown
    assert "at 50" not in shown
    assert shown.count("yes ") == 4
    assert json.loads((tmp_path / "demo" / "evaluation.json").read_text())["kl"] == 9.0


@pytest.mark.parametrize(
    "changed", [{"score_gain_std": 1.4}, {"gold_score": 0.45}, {"kl": 15.1}, {"distinct_2": 0.39}], ids=str
)
def test_the_demo_fails_when_something_was_not_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changed: dict[str, float]
) -> None:
    assert run_demo_with(monkeypatch, tmp_path / "demo", **changed) == 1
    shown = capsys.readouterr().out
    assert (shown.count("yes "), shown.count("NO ")) == (3, 1)


def test_the_demo_replaces_a_demo_and_no_other_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo_with(monkeypatch, tmp_path / "demo") == 0
    (tmp_path / "demo" / "old").touch()
    assert run_demo_with(monkeypatch, tmp_path / "demo") == 0
    assert not (tmp_path / "demo" / "old").exists()
    capsys.readouterr()
    message = failed(capsys, run_demo_with(monkeypatch, run.directory))
    assert "holds a run that is no demo's; choose another --run-dir" in message
    assert (run.directory / "policy" / "model.safetensors").exists()


def test_the_demo_replaces_a_demo_as_the_training_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = tmp_path / "demo"
    main(["demo", "--run-dir", str(demo), "--total-timesteps", "1", "--episodes", "2"])
    assert (demo / "evaluation.json").exists(), capsys.readouterr().out  # it got as far as it could, learned or not
    assert run_demo_with(monkeypatch, demo) == 0, capsys.readouterr().out
    assert {path.name for path in demo.iterdir()} == {"config.yaml", "samples.jsonl", "evaluation.json"}


def test_the_demo_does_not_replace_a_demo_that_is_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = tmp_path / "demo"
    assert run_demo_with(monkeypatch, demo) == 0
    (demo / "old").touch()
    with locked(demo):  # as a training holds it
        assert "is writing in" in failed(capsys, run_demo_with(monkeypatch, demo))
    assert (demo / "old").exists()
    second: list[int] = []

    def meanwhile(path: Path) -> None:
        if not second:
            second.append(-1)  # not a third one
            second[0] = main(["demo", "--run-dir", str(demo)])

    monkeypatch.setattr("agents.cli._print_texts", meanwhile)
    assert run_demo_with(monkeypatch, demo) == 0
    assert second == [1]  # while the first is being evaluated
    assert (demo / "evaluation.json").exists()


# ---- what can go wrong ---------------------------------------------------------------------------------------------


def failed(capsys: pytest.CaptureFixture[str], status: int) -> str:
    assert status == 1
    return " ".join(capsys.readouterr().out.split())


def test_a_directory_that_holds_a_run_is_not_overwritten(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run.directory / "progress.csv").read_bytes()
    message = failed(capsys, run.train(run.directory))
    assert "FileExistsError" in message
    assert f"holds a run already: `textrlhf train --resume {run.directory} --trust` goes on with it" in message
    assert "choose another --run-dir for a new one" in message
    assert (run.directory / "progress.csv").read_bytes() == before


def test_a_policy_that_was_saved_from_python_is_not_replaced_by_a_run(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "mine"
    load_policy(run.model, make_env(1), "cpu").save_pretrained(directory / "policy")
    (directory / "samples.jsonl").write_text("mine")
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    message = failed(capsys, run.train(directory, "--no-progress"))
    assert "mine holds no run, but policy and samples.jsonl, which a run would replace; choose another" in message
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_unknown_names_are_refused_with_the_known_ones(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = failed(capsys, run.train(tmp_path / "a", "--algo", "dqn"))
    assert (
        "Expected algo to be one of ['a2c', 'dapo', 'grpo', 'ppo', 'reinforce', 'rloo', 'vineppo'] or 'module:Class', "
        "got 'dqn'" in message
    )
    message = failed(capsys, run.train(tmp_path / "b", "--reward", "bilutin"))
    assert "Known names: builtin, sentiment" in message
    message = failed(capsys, run.train(tmp_path / "c", "--model", str(tmp_path / "nothing")))
    assert "nothing" in message
    message = failed(capsys, run.train(tmp_path / "d", "--prompts", str(tmp_path / "nothing.txt")))
    assert "there is no file" in message
    message = failed(capsys, run.train(tmp_path / "e", "--algo", "agents.models.reference:Reference"))
    assert (
        "Expected 'agents.models.reference:Reference' to be a subclass of agents.algorithms.on_policy.OnPolicyAlgorithm"
        in message
    )
    message = failed(capsys, run.train(tmp_path / "e", "--algo", "stable_baselines3:TD3"))
    assert "TD3 is Stable-Baselines3's: use it in Python" in message
    assert "TextRLHFContinuous-v0" in message
    message = failed(capsys, run.train(tmp_path / "f", "--dtype", "float31"))
    assert "Expected dtype 'auto', 'float32'" in message
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_an_algorithm_in_a_module_that_is_not_there_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = failed(capsys, run.train(tmp_path / "run", "--algo", "no_such_module:PPO"))
    assert "ValueError" in message
    assert "no_such_module" in message


def test_an_argument_that_the_algorithm_does_not_have_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = failed(capsys, run.train(tmp_path / "run", "--algo-kwargs", "clip_rang", "0.1"))
    assert "Unknown algo_kwargs ['clip_rang']; PPO takes ['clip_range'" in message


def test_a_config_with_an_unknown_key_is_refused_with_the_known_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("learning_rat: 0.1\n")
    message = failed(capsys, main(["train", "--config", str(path)]))
    assert "unknown ['learning_rat']; TrainConfig has ['algo', 'algo_kwargs', 'autocast', 'batch_size'" in message
    path.write_text("env: {rewards: builtin}\n")
    message = failed(capsys, main(["train", "--config", str(path)]))
    assert "unknown ['rewards']; EnvConfig has ['chat_template', 'constraint', 'env', 'eos_token_ids'" in message


def test_a_config_file_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "FileNotFoundError" in failed(capsys, main(["train", "--config", str(tmp_path / "nothing.yaml")]))
    assert "--config needs a YAML file after it" in failed(capsys, main(["train", "--config"]))


def test_an_option_that_does_not_exist_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--no-such-option"])
    assert stopped.value.code == 2
    assert "no-such-option" in capsys.readouterr().err


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in (([], 2), (["--help"], 0), (["nonsense"], 2)):
        assert main(arguments) == status
        shown = capsys.readouterr().out
        assert all(f"textrlhf {command}" in shown for command in ("train", "evaluate", "sample", "demo"))


def test_every_command_explains_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    for command, option in (
        ("train", "--kl-target"),
        ("evaluate", "--reference"),
        ("sample", "--greedy"),
        ("demo", "--run-dir"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        assert option in capsys.readouterr().out


# ---- what goes wrong halfway ---------------------------------------------------------------------------------------


def fails_later(prompts: list[str], **_: Any) -> list[float]:
    """A reward that gives up after a few calls."""
    fails_later.calls += 1  # type: ignore[attr-defined]
    if fails_later.calls > 12:  # type: ignore[attr-defined]
        raise RuntimeError("the judge has left")
    return [0.0 for _ in prompts]


def test_a_reward_that_fails_in_mid_training_does_not_cost_the_policy(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails_later.calls = 0  # type: ignore[attr-defined]
    assert run.train(tmp_path / "run", "--reward", "test_cli:fails_later", "--total-timesteps", "5000") == 1
    assert "the judge has left" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy").num_parameters() > 0


def test_a_config_may_write_numbers_as_people_do(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("learning_rate: 1e-4\nenv:\n")
    assert load_config(tmp_path / "config.yaml").learning_rate == 1e-4


def test_an_algo_kwarg_with_an_option_of_its_own_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.train(tmp_path / "run", "--algo-kwargs", "n_epochs", "2") == 1
    assert "options of their own" in capsys.readouterr().out


def test_a_config_in_the_working_directory_is_not_taken_for_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("foo: 1")
    monkeypatch.chdir(tmp_path)
    with run_of(SampleConfig("builtin", ["I"])) as found:
        assert found is None


def test_a_training_that_fails_keeps_its_last_checkpoint_which_goes_on(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails_later.calls = 0  # type: ignore[attr-defined]
    options = ["--reward", "test_cli:fails_later", "--total-timesteps", "5000", "--checkpoint-every", "1"]
    assert run.train(tmp_path / "run", *options, "--learning-rate", "3e-3", "--lr-warmup", "0.1") == 1
    assert "the judge has left" in capsys.readouterr().out
    fails_later.calls = 0  # type: ignore[attr-defined]  # the judge is back
    env = EnvConfig(prompts=run.prompts, reward="test_cli:fails_later", max_new_tokens=6).make(8, run.model)
    history = CheckpointHistory(tmp_path / "run" / "checkpoints")
    model = PPO.load(history.path(history.timesteps()[-1]), env=env)
    assert model.learning_rate == LearningRate(3e-3, "linear", warmup=0.1)
    tokens = model.num_timesteps
    rows = list(csv.DictReader((tmp_path / "run" / "progress.csv").read_text().splitlines()))
    assert str(tokens) == rows[-1]["time/total_timesteps"]  # of the last iteration that was finished
    model.learn(20, reset_num_timesteps=False)
    assert model.num_timesteps >= tokens + 20


def agrees(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """A reward that needs a column of the prompts."""
    return [float(text.count(right)) for text, right in zip(completions, answer, strict=True)]


def judged_twice() -> Task:
    rows = [{"prompt": prompt, "answer": "1"} for prompt in PROMPTS]
    settings = {"max_new_tokens": 4}
    return Task("twice", lambda split: rows, "correct", {"once_more": agrees}, settings)


def test_of_a_task_texts_are_sampled_after_prompts_without_a_right_answer(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.train(tmp_path / "run", "--task", "test_cli:judged_twice", "--prompts", "builtin") == 0
    capsys.readouterr()
    options = ["--policy", str(tmp_path / "run" / "policy"), "--prompt", "The movie", "--device", "cpu", "--trust"]
    assert main(["sample", *options]) == 0, capsys.readouterr().out
    assert "The movie" in capsys.readouterr().out


def two_more(largest: int = 3) -> Task:
    def prompts(split: str) -> list[dict[str, str]]:
        return [{"prompt": f"The {split} film of {number}", "answer": "1"} for number in range(largest)]

    return Task("more", prompts, "correct", settings={"max_new_tokens": 4})


@pytest.mark.parametrize("trained_on", ["file", "judged_twice", "two_more"])
def test_another_task_than_the_runs_is_evaluated_on_its_own_prompts_with_its_own_arguments(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained_on: str
) -> None:
    env: dict[str, Any] = {"prompts": run.prompts, "reward": "sentiment", "max_new_tokens": 4}
    if trained_on != "file":
        env |= {"task": f"test_cli:{trained_on}", "task_kwargs": {"largest": "5"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": run.model, "env": env}))
    shutil.copytree(run.directory / "policy", tmp_path / "policy")
    seen: list[list[str]] = []

    def evaluated(policy: Any, reference: Any, env: Any, *_: Any) -> dict[str, Any]:
        seen.append([prompt.text for prompt in env.prompts])
        raise ValueError("enough")

    monkeypatch.setattr("agents.evaluation.evaluate.evaluate", evaluated)
    options = ["--task", "test_cli:two_more", "--episodes", "2", "--device", "cpu"]
    assert "enough" in failed(capsys, main(["evaluate", "--policy", str(tmp_path), *options]))
    n = 5 if trained_on == "two_more" else 3  # what the run's own task was given holds for that one alone
    assert seen == [[f"The eval film of {number}" for number in range(n)]]


@pytest.mark.parametrize(("named", "longest"), [([], 22), (["--prompts"], 60)])
def test_held_out_problems_are_as_long_as_the_task_says(
    named: list[str], longest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not as long as the first ones are, for which longer ones would be replaced."""
    if named:
        named = [*named, str(tmp_path / "long.txt")]
        (tmp_path / "long.txt").write_text("+".join(["1234"] * 12) + "=\n")

    def seen(policy: Any, reference: Any, env: Any, *_: Any) -> dict[str, Any]:
        lengths.append(env.max_prompt_tokens)
        raise ValueError("enough")

    lengths: list[int] = []
    monkeypatch.setattr("agents.evaluation.evaluate.evaluate", seen)
    options = ["--policy", "builtin:arithmetic", "--reference", "builtin:arithmetic", "--device", "cpu"]
    assert main(["evaluate", *options, "--task", "arithmetic", "--episodes", "2", *named]) == 1
    assert lengths == [longest]


def test_prompts_with_columns_that_the_reward_needs_are_trained_on_and_evaluated(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "answer": "1"}) + "\n" for p in PROMPTS))
    options = ["--prompts", str(path), "--reward", "test_cli:agrees"]
    assert run.train(tmp_path / "run", *options) == 0
    longer = tmp_path / "longer.jsonl"  # than any that was trained on
    longer.write_text(json.dumps({"prompt": " ".join(PROMPTS[0].split() * 20), "answer": "1"}) + "\n")
    question = ["--policy", str(tmp_path / "run" / "policy"), "--prompts", str(longer), "--episodes", "2", "--trust"]
    assert main(["evaluate", *question, "--max-new-tokens", "4", "--gold", "learners:even_tokens"]) == 0
