"""From preferences to a reward model: it learns, is measured as it will be used, and says what it can't use."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import save_model
from tiny import tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForMaskedLM

import agents.reward_models.train
from agents.cli import main
from agents.policies.causal_lm_policy import load_policy
from agents.reward_models.report import (
    calibration_bins,
    describe_margins,
    expected_calibration_error,
    margin_edges,
    report_table,
)
from agents.reward_models.train import (
    RewardModelConfig,
    fitting,
    load_base,
    pair_margins,
    pair_tokens,
    train_reward_model,
)
from agents.rollouts.sampling import sample_texts
from text_env.builtin import LANGUAGE_MODEL
from text_env.preferences import Preference
from text_env.rewards import SequenceClassifierReward, make_reward
from text_env.vector_env import TextVectorEnv

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GOOD, BAD = ("good", "loved", "great"), ("bad", "hated", "worse")


def toy_pairs(n: int = 240) -> list[dict[str, str]]:
    """Pairs that single words tell apart."""
    rng = np.random.default_rng(0)

    def draw(words: tuple[str, ...]) -> str:
        return f" was {rng.choice(words)} and {rng.choice(words)}."

    return [{"prompt": f"The film {i % 60}", "chosen": draw(GOOD), "rejected": draw(BAD)} for i in range(n)]


def toy_chats(n: int = 240) -> list[dict[str, Any]]:
    """The same as whole conversations, whose first turn is what both sides share."""
    return [
        {
            side: [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]
            for side in ("chosen", "rejected")
        }
        for pair in toy_pairs(n)
    ]


def save_base(directory: Path, kind: str = "llama", template: str | None = None, **kwargs: Any) -> str:
    save_model(directory, kind, **kwargs)
    if template is not None:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_base(tmp_path_factory.mktemp("chat_base"), template=TEMPLATE)


def settings(base: str, out: Path, **changes: Any) -> RewardModelConfig:
    quick: dict[str, Any] = {"learning_rate": 3e-3, "batch_size": 16, "max_new_tokens": 8, "device": "cpu"}
    quick |= {"held_out": 0.2, "n_normalisation_texts": 256, "progress": False}
    return RewardModelConfig(base=base, out=out, **{**quick, **changes})


DRAW = {name: getattr(agents.reward_models.train, name) for name in ("plot_calibration", "plot_margins")}


@pytest.fixture(scope="module", autouse=True)
def only_plots_that_are_looked_at() -> Iterator[None]:
    """To draw two plots takes as long as to train such a small model: only those of :class:`Trained` are real."""
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAW:
            patch.setattr(agents.reward_models.train, name, lambda _, path: path.touch())
        yield


class Trained:
    """A reward model of the toy pairs and what was reported of it."""

    def __init__(self, base: str, out: Path, preferences: list[dict[str, Any]], **changes: Any) -> None:
        self.base, self.directory = base, out
        with pytest.MonkeyPatch.context() as patch:
            for name, draw in DRAW.items():
                patch.setattr(agents.reward_models.train, name, draw)
            self.report = train_reward_model(settings(base, out, **changes), preferences)


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(base, tmp_path_factory.mktemp("trained") / "reward", toy_pairs())


@pytest.fixture(scope="module")
def trained_on_chats(chat_base: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(chat_base, tmp_path_factory.mktemp("trained") / "reward", toy_chats())


def weights(directory: Path | str) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(directory).state_dict()


# ---- it learns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["trained", "trained_on_chats"])
def test_it_learns_pairs_that_words_tell_apart(which: str, request: pytest.FixtureRequest) -> None:
    report = request.getfixturevalue(which).report
    assert report["pairs"]["train"] == 192
    assert report["pairs"]["held_out"] == report["held_out"]["pairs"] == report["train"]["pairs"] == 48
    assert report["held_out"]["accuracy"] > 0.95
    assert report["held_out"]["log_loss"] < 0.3
    assert report["pairs"]["conversational"] is (which == "trained_on_chats")


def test_without_learning_it_knows_nothing(base: str, tmp_path: Path) -> None:
    report = train_reward_model(settings(base, tmp_path / "out", learning_rate=0.0), toy_pairs())
    assert report["held_out"]["log_loss"] > 0.5
    before = load_base(base, "float32", conversational=False)[0].model.state_dict()
    after = weights(tmp_path / "out")
    assert all(tensor.equal(after[f"model.{name}"]) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_other_architectures_learn_too(kind: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", kind)
    report = train_reward_model(settings(base, tmp_path / "out", n_normalisation_texts=0), toy_pairs())
    assert report["held_out"]["accuracy"] > 0.95
    assert report["normalisation"] is None


def test_lora_learns_and_is_merged_into_the_base(base: str, tmp_path: Path) -> None:
    report = train_reward_model(settings(base, tmp_path / "out", lora_r=4, learning_rate=1e-2, epochs=2), toy_pairs())
    assert report["held_out"]["accuracy"] > 0.95
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    start, after = weights(base), weights(tmp_path / "out")
    assert set(after) == set(start)
    assert after["model.embed_tokens.weight"].equal(start["model.embed_tokens.weight"])  # no linear layer
    assert not after["model.layers.0.mlp.up_proj.weight"].equal(start["model.layers.0.mlp.up_proj.weight"])
    margins = pair_margins(SequenceClassifierReward(tmp_path / "out"), [Preference(**p) for p in toy_pairs()])
    assert (margins > 0).mean() > 0.95  # head and adapter were saved as they were trained


def test_micro_batches_change_nothing_but_the_memory(base: str, tmp_path: Path) -> None:
    for name, micro in (("whole", None), ("parts", 4)):
        changes = {"micro_batch_size": micro, "n_normalisation_texts": 0, "gradient_checkpointing": micro is not None}
        train_reward_model(settings(base, tmp_path / name, **changes), toy_pairs())
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.allclose(tensor, parts[name], atol=1e-4) for name, tensor in whole.items())
    assert not torch.allclose(whole["score.weight"], weights(base)["score.weight"], atol=1e-2)


def test_the_same_seed_gives_the_same_model_and_another_seed_another(
    trained: Trained, base: str, tmp_path: Path
) -> None:
    again = train_reward_model(settings(base, tmp_path / "again"), toy_pairs())
    train_reward_model(settings(base, tmp_path / "other", seed=1), toy_pairs())
    first = weights(trained.directory)
    assert all(tensor.equal(weights(tmp_path / "again")[name]) for name, tensor in first.items())
    assert not all(tensor.equal(weights(tmp_path / "other")[name]) for name, tensor in first.items())
    assert again["normalisation"] == trained.report["normalisation"]
    assert again["held_out"] == trained.report["held_out"]


def test_the_builtin_base_has_a_learning_rate_of_its_own(base: str, tmp_path: Path) -> None:
    changes = {"learning_rate": None, "max_pairs": 16, "n_normalisation_texts": 0}
    for name, rate in (("builtin", 5e-4), (base, 1e-4)):
        report = train_reward_model(settings(name, tmp_path / str(rate), **changes), toy_pairs())
        assert report["settings"]["learning_rate"] == rate


def test_fewer_pairs_are_a_part_of_more(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[list[int]]] = []
    run_trainer = agents.reward_models.train.run_trainer

    def look(config: Any, model: Any, tokenizer: Any, columns: dict[str, Any], scratch: Path) -> Any:
        given.append(columns["chosen_ids"])
        return run_trainer(config, model, tokenizer, columns, scratch)

    monkeypatch.setattr(agents.reward_models.train, "run_trainer", look)
    for n in (16, 48):
        config = settings(base, tmp_path / str(n), max_pairs=n, n_normalisation_texts=0)
        report = train_reward_model(config, toy_pairs())
        assert (report["pairs"]["train"], report["pairs"]["held_out"]) == (n, 48)
    assert given[1][:16] == given[0]


# ---- what is left --------------------------------------------------------------------------------------------------


def test_the_directory_is_complete(trained: Trained) -> None:
    names = {path.name for path in trained.directory.iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("reward_model.json", "calibration.png", "margins.png"),
    }
    for plot in ("calibration.png", "margins.png"):
        assert (trained.directory / plot).read_bytes().startswith(b"\x89PNG")
    assert json.loads((trained.directory / "reward_model.json").read_text()) == trained.report
    assert list(trained.directory.parent.iterdir()) == [trained.directory]  # nothing of the work is left
    assert trained.report["settings"]["learning_rate"] == 3e-3
    assert trained.report["settings"]["preferences"] == "a list"
    assert trained.report["parameters"] == sum(tensor.numel() for tensor in weights(trained.directory).values())


def fresh_scores(trained: Trained, prompts: list[Any]) -> np.ndarray:
    """Scores that the environment pays for texts that nobody has seen."""
    rows = [{"prompt": prompt} for prompt in prompts]
    env = TextVectorEnv(
        16, tokenizer=trained.base, prompts=rows, reward=str(trained.directory), max_prompt_tokens=40, max_new_tokens=8
    )
    torch.manual_seed(12345)
    infos = sample_texts(load_policy(trained.base, env, "cpu"), env, prompts)
    return np.array([info["score"] for info in infos])


@pytest.mark.parametrize("which", ["trained", "trained_on_chats"])
def test_the_policys_texts_score_mean_zero_and_standard_deviation_one_in_the_environment(
    which: str, request: pytest.FixtureRequest
) -> None:
    trained = request.getfixturevalue(which)
    prompts: list[Any] = [pair["prompt"] for pair in toy_pairs(240)]
    if which == "trained_on_chats":
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    scores = fresh_scores(trained, prompts)
    assert abs(scores.mean()) < 4 / len(scores) ** 0.5
    assert 0.8 < scores.std() < 1.25
    normalisation = trained.report["normalisation"]
    assert (normalisation["policy"], normalisation["texts"]) == (trained.base, 256)
    assert abs(normalisation["mean"]) + abs(normalisation["std"] - 1) > 0.05  # there was something to normalise


@pytest.mark.parametrize("which", ["trained", "trained_on_chats"])
def test_what_was_trained_on_is_token_by_token_what_the_environment_scores(
    which: str, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(which).directory
    reward = make_reward(str(directory))
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    pairs = [Preference(**pair) for pair in toy_pairs(6)]
    if which == "trained_on_chats":
        pairs = [pair._replace(prompt=[{"role": "user", "content": pair.prompt}]) for pair in pairs]
    prompts = [pair.prompt for pair in pairs]
    for side, columns in pair_tokens(reward.tokenizer, pairs).items():
        with torch.no_grad():  # one by one: no padding
            alone = [model(input_ids=torch.tensor([ids])).logits.item() for ids in columns]
        texts = [getattr(pair, side.removesuffix("_ids")) for pair in pairs]
        completions = [[{"role": "assistant", "content": text}] for text in texts] if "chats" in which else texts
        scores = np.array(reward(prompts=prompts, completions=completions))
        np.testing.assert_allclose(scores * reward.std + reward.mean, alone, atol=1e-5)


def test_plain_texts_get_no_end_and_conversations_only_what_their_template_writes(chat_base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_base)
    plain = pair_tokens(tokenizer, [Preference("The film", " was good.", " was bad.")])
    assert plain["chosen_ids"] == [tokenizer.encode("The film was good.")]
    assert tokenizer.eos_token_id not in plain["chosen_ids"][0]
    chat = pair_tokens(tokenizer, [Preference([{"role": "user", "content": "Hi"}], "Yes.", "No.")])
    assert tokenizer.decode(chat["rejected_ids"][0]) == "<user>Hi<eos><assistant>No.<eos>"


def test_a_conversation_that_the_template_refuses_is_shown(chat_base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_base)
    tokenizer.chat_template = "{{ raise_exception('no system message, please') }}"
    chat = Preference([{"role": "system", "content": "Be kind."}], "Yes.", "No.")
    with pytest.raises(ValueError, match=r"refuses .*'Be kind\.'.*no system message, please"):
        pair_tokens(tokenizer, [chat])


def test_a_tokenizer_that_adds_special_tokens_adds_them_to_plain_texts_only() -> None:
    class WithStart:
        def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
            return {"input_ids": [[99] * add_special_tokens + [len(text)] for text in texts]}

        name_or_path, special_tokens_map = "with-start", dict[str, str]()

        def get_chat_template(self) -> str:
            return "{% for message in messages %}{{ message.content }}{% endfor %}"

    assert pair_tokens(WithStart(), [Preference("a", "b", "cc")]) == {
        "chosen_ids": [[99, 2]],
        "rejected_ids": [[99, 3]],
    }
    chat = Preference([{"role": "user", "content": "a"}], "b", "cc")
    assert pair_tokens(WithStart(), [chat]) == {"chosen_ids": [[2]], "rejected_ids": [[3]]}


def test_half_precision_is_for_the_disk_only(base: str, trained: Trained, tmp_path: Path) -> None:
    report = train_reward_model(settings(base, tmp_path / "out", save_dtype="float16"), toy_pairs())
    whole, half = ((path / "model.safetensors").stat().st_size for path in (trained.directory, tmp_path / "out"))
    assert 0.4 < half / whole < 0.6
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").dtype == torch.float32
    assert report["held_out"]["margin_mean"] == pytest.approx(trained.report["held_out"]["margin_mean"], abs=0.02)
    assert report["held_out"]["margin_mean"] != trained.report["held_out"]["margin_mean"]  # measured as saved


def test_a_reward_model_can_be_trained_further_and_is_normalised_anew(
    trained: Trained, base: str, tmp_path: Path
) -> None:
    config = settings(str(trained.directory), tmp_path / "out", policy=base, learning_rate=1e-5)
    report = train_reward_model(config, toy_pairs())
    assert report["held_out"]["log_loss"] == pytest.approx(trained.report["held_out"]["log_loss"], abs=0.02)
    for name in ("mean", "std"):  # of raw scores, not of scores that were normalised already
        assert report["normalisation"][name] == pytest.approx(trained.report["normalisation"][name], rel=0.2, abs=0.05)


def test_an_encoder_can_be_the_base_and_another_model_the_policy(base: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForMaskedLM(BertConfig(vocab_size=300, pad_token_id=1, max_position_embeddings=128, **sizes))
    model.save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"is none \(BertForMaskedLM\): name one, or pass n_normalisation_texts=0"):
        train_reward_model(settings(str(tmp_path / "bert"), tmp_path / "out"), toy_pairs())
    report = train_reward_model(settings(str(tmp_path / "bert"), tmp_path / "out", policy=base, epochs=3), toy_pairs())
    assert report["held_out"]["accuracy"] > 0.9
    assert report["normalisation"]["policy"] == base


def test_prompts_of_ones_own_are_what_the_policy_continues(base: str, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "prompts.txt").write_text("I hated\nI loved\n")
    asked: list[str] = []

    def look(policy: Any, env: Any, prompts: list[str]) -> Any:
        asked.extend(prompts)
        return sample_texts(policy, env, prompts)

    monkeypatch.setattr(agents.reward_models.train, "sample_texts", look)
    pairs = [{key: value for key, value in pair.items() if key != "prompt"} for pair in toy_pairs()]
    with pytest.raises(ValueError, match="Expected prompts to sample from, since the pairs have none"):
        train_reward_model(settings(base, tmp_path / "out"), pairs)
    config = settings(base, tmp_path / "out", prompts=str(tmp_path / "prompts.txt"), n_normalisation_texts=40)
    train_reward_model(config, pairs)
    assert len(asked) == 40
    assert set(asked) == {"I hated", "I loved"}


def test_plain_prompts_of_ones_own_open_conversations_where_the_pairs_are_conversations(
    chat_base: str, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("The film\n")
    changes = {"prompts": str(tmp_path / "prompts.txt"), "n_normalisation_texts": 8}
    report = train_reward_model(settings(chat_base, tmp_path / "out", **changes), toy_chats())
    assert report["normalisation"]["texts"] == 8


def test_with_the_builtin_preferences_the_annotators_ceiling_is_reported(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", max_position_embeddings=512, num_hidden_layers=1)
    changes = {"preferences": "builtin", "max_pairs": 32, "n_normalisation_texts": 0}
    report = train_reward_model(settings(base, tmp_path / "out", **changes))
    ceiling = json.loads((LANGUAGE_MODEL.parent / "report.json").read_text())["preferences"]["eval"][
        "annotator_ceiling"
    ]
    assert report["annotator_ceiling"] == ceiling
    assert report["pairs"]["held_out"] == 1000
    rows = list(zip(*(column.cells for column in report_table(report).columns), strict=True))
    assert ("the annotator's ceiling", f"{ceiling:.3f}") in rows


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_pairs_that_are_too_long_are_left_out_and_counted(base: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    pairs = [Preference("a", "b", "c"), Preference("a", "b", "c" * 30), Preference("a", "b" * 30, "c")]
    kept, columns = fitting(pairs, tokenizer, 20)
    assert kept == pairs[:1]
    assert {name: len(column) for name, column in columns.items()} == {"chosen_ids": 1, "rejected_ids": 1}
    long = [{"prompt": "a", "chosen": "b" * 150, "rejected": "c" * i} for i in range(1, 11)]  # the base holds 128
    changes = {"held_out": 0.1, "n_normalisation_texts": 8}
    report = train_reward_model(settings(base, tmp_path / "out", **changes), [*toy_pairs(), *long])
    assert report["pairs"]["overlong"] == 10
    assert report["pairs"]["train"] + report["pairs"]["held_out"] == 240
    with pytest.raises(ValueError, match=r"Expected pairs of at most 5 tokens .* got 0 and 0"):
        train_reward_model(settings(base, tmp_path / "other", max_length=5), toy_pairs())


def test_malformed_rows_are_shown_before_training(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [*toy_pairs(), {"prompt": "a"}]
    config = settings(base, tmp_path / "out", progress=True, n_normalisation_texts=0)
    report = train_reward_model(config, pairs)
    assert report["pairs"]["malformed"] == 1
    assert report["pairs"]["first_malformed"] == ["row 240: no 'chosen' among its columns ['prompt']"]
    shown = capsys.readouterr()
    assert "Left out 1 malformed rows: row 240" in " ".join(shown.out.split())
    assert "chosen texts: 100%" in shown.err
    with pytest.raises(ValueError, match="got 1 of 241"):
        train_reward_model(dataclasses.replace(config, out=tmp_path / "other", max_malformed=0.0), pairs)


def test_a_directory_that_holds_something_is_never_touched(base: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something already"):
        train_reward_model(settings(base, tmp_path / "out"), toy_pairs())
    with pytest.raises(FileExistsError, match="holds something already"):
        train_reward_model(settings(base, tmp_path / "out" / "precious.txt"), toy_pairs())
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_an_empty_directory_is_filled_and_parents_are_made(base: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        train_reward_model(settings(base, out, n_normalisation_texts=0, max_pairs=16), toy_pairs())
        assert (out / "reward_model.json").exists()


def test_a_failure_leaves_nothing_behind(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents.reward_models.train, "pair_margins", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_reward_model(settings(base, tmp_path / "out", n_normalisation_texts=0, max_pairs=16), toy_pairs())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["trl", "datasets"])
def test_without_the_reward_extra_the_error_says_how_to_install_it(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'pip install "textrlhf\[reward\]"'):
        train_reward_model(settings(base, tmp_path / "out"), toy_pairs())
    assert main(["reward-model", "--base", base, "--out", str(tmp_path / "out")]) == 1
    assert 'pip install "textrlhf[reward]"' in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_used_is_refused_before_training(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents.reward_models.train, "run_trainer", lambda *_: pytest.fail("training has begun"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (tmp_path / "chats.json").write_text(json.dumps([{"prompt": [{"role": "user", "content": "Hi"}]}]))
    unpadded = save_base(tmp_path / "unpadded")
    tokenizer = AutoTokenizer.from_pretrained(unpadded)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(unpadded)
    refusals: list[tuple[dict[str, Any], list[dict[str, Any]], str]] = [
        (
            {"base": "no/such/model"},
            toy_pairs(),
            "Expected base to be 'builtin'.*'no/such/model', which is no directory here",
        ),
        ({"base": str(tmp_path / "adapter")}, toy_pairs(), "is an adapter: merge it into its own base"),
        ({"base": unpadded}, toy_pairs(), "to have a pad or an eos token"),
        ({}, toy_chats(), "to have a chat template, since the preferences are conversations"),
        ({"policy": "no/such/model"}, toy_pairs(), "'no/such/model'"),
        ({"prompts": "missing.jsonl"}, toy_pairs(), "there is no file 'missing.jsonl'"),
        ({"prompts": str(tmp_path / "chats.json")}, toy_pairs(), "Expected prompts to be texts, as those of the pairs"),
        ({"max_new_tokens": 1000}, toy_pairs(), "positions"),
        ({"batch_size": 0}, toy_pairs(), "divisor of batch_size=0"),
        ({"micro_batch_size": 5}, toy_pairs(), "divisor of batch_size=16, got 5"),
        ({"dtype": "float3"}, toy_pairs(), "Expected dtype"),
        ({"max_pairs": 0}, toy_pairs(), "got 0 and 48"),
        ({"max_pairs": -1}, toy_pairs(), "Expected max_pairs"),  # which would be all but the last
    ]
    for changes, preferences, message in refusals:
        with pytest.raises(ValueError, match=message):
            train_reward_model(settings(**{"base": base, "out": tmp_path / "out", **changes}), preferences)
    assert not (tmp_path / "out").exists()


def test_scores_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        pair_margins(lambda prompts, completions: [float("nan")] * len(prompts), [Preference("a", "b", "c")])


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_trains_from_a_file_and_the_result_is_a_reward_for_train(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs[/b].jsonl"  # no markup of Rich's
    pairs.parent.mkdir()
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in toy_pairs()))
    (tmp_path / "prompts.txt").write_text("The film\nI\n")
    out = str(tmp_path / "[red]reward")
    command = ["reward-model", "--preferences", str(pairs), "--base", base, "--out", out]
    options = ["--learning-rate", "3e-3", "--batch-size", "16", "--max-new-tokens", "8", "--device", "cpu"]
    assert main([*command, *options, "--n-normalisation-texts", "64"]) == 0
    shown = capsys.readouterr()
    for words in ("held-out accuracy", "expected calibration error", "normalised to 0 and 1"):
        assert words in " ".join(shown.out.split())
    assert "[/b].jsonl" in "".join(shown.out.split())  # a long path is broken anywhere
    assert f"use it as --reward {out};" in shown.out
    assert "policy's texts: 100%" in shown.err
    assert main([*command, *options]) == 1
    assert "holds something already" in capsys.readouterr().out
    train = ["train", "--model", base, "--prompts", str(tmp_path / "prompts.txt"), "--reward", out, "--device", "cpu"]
    sizes = ["--max-new-tokens", "6", "--n-episodes", "8", "--batch-size", "4", "--total-timesteps", "20"]
    assert main([*train, *sizes, "--run-dir", str(tmp_path / "run"), "--no-progress"]) == 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    reward = SequenceClassifierReward(out)
    for row in samples:
        [score] = reward(prompts=[row["prompt"]], completions=[row["completion"]])
        assert row["score"] == pytest.approx(score, abs=1e-4)


# ---- statistics ----------------------------------------------------------------------------------------------------


def test_the_figures_of_margins_are_those_worked_out_by_hand() -> None:
    margins = np.array([np.log(3), -np.log(3), 0.0, 2.0])
    figures = describe_margins(margins)
    assert figures["pairs"] == 4
    assert figures["accuracy"] == 2.5 / 4  # a tie counts half
    assert figures["accuracy_se"] == pytest.approx(np.sqrt((2 * 0.375**2 + 0.625**2 + 0.125**2) / 4) / 2)
    # −log σ: of log 3 it is log 4/3, of −log 3 log 4, of 0 log 2.
    assert figures["log_loss"] == pytest.approx((np.log(4 / 3) + np.log(4) + np.log(2) + np.log1p(np.exp(-2))) / 4)
    assert figures["margin_mean"] == pytest.approx(0.5)
    assert figures["margin_std"] == pytest.approx(np.sqrt((2 * np.log(3) ** 2 + 4) / 4 - 0.25))


def test_calibration_bins_are_those_worked_out_by_hand() -> None:
    # Confidences: 3/4, 3/4 (wrong), 1/2 (a tie), and 0.9.
    margins = np.array([np.log(3), -np.log(3), 0.0, np.log(9)])
    bins = calibration_bins(margins, n_bins=2)
    expected = [
        {"pairs": 1, "confidence": 0.5, "accuracy": 0.5},
        {"pairs": 3, "confidence": (0.75 + 0.75 + 0.9) / 3, "accuracy": 2 / 3},
    ]
    assert [{key: pytest.approx(value) for key, value in b.items()} for b in expected] == bins
    assert expected_calibration_error(bins) == pytest.approx(3 / 4 * (0.8 - 2 / 3))


def test_margins_without_bound_are_certain_and_overflow_nothing() -> None:
    figures = describe_margins(np.array([1e4, -1e4]))
    assert figures["log_loss"] == 5e3
    assert figures["calibration"] == [{"pairs": 2, "confidence": 1.0, "accuracy": 0.5}]
    assert figures["calibration_error"] == 0.5


def test_margins_that_say_what_is_true_are_calibrated_and_exaggerated_ones_are_not() -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(size=20_000)
    margins[rng.random(20_000) > 1 / (1 + np.exp(-margins))] *= -1  # chosen with probability σ(margin)
    assert expected_calibration_error(calibration_bins(margins)) < 0.02
    assert expected_calibration_error(calibration_bins(4 * margins)) > 0.1


def test_the_bars_hold_all_margins_and_none_holds_right_and_wrong_ones() -> None:
    for margins in np.random.default_rng(0).normal(size=(200, 8)):  # one in fourteen lost its largest
        edges = margin_edges(margins)
        assert np.histogram(margins, edges)[0].sum() == 8
        assert edges == sorted(edges)
        assert 0 in edges
