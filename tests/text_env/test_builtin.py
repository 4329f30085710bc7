"""The built-in models, prompts and pairs are what their report says, and the script that made them runs."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.reward_models.report import describe_margins
from agents.reward_models.train import pair_margins, pair_tokens
from text_env.builtin import LANGUAGE_MODEL, PREFERENCES, REWARD_MODEL, prompts
from text_env.preferences import Preference, load_preferences
from text_env.rewards import SequenceClassifierReward

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "data" / "build_builtin.py"
BUILTIN = LANGUAGE_MODEL.parent
REPORT = json.loads((BUILTIN / "report.json").read_text())


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The build script as a module: ``data`` is a directory, not a package."""
    spec = importlib.util.spec_from_file_location("build_builtin", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(LANGUAGE_MODEL)


@pytest.fixture(scope="module")
def language_model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(LANGUAGE_MODEL)


@pytest.fixture(scope="module")
def reward_model() -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(REWARD_MODEL)


@pytest.fixture(scope="module")
def reward() -> SequenceClassifierReward:
    return SequenceClassifierReward(REWARD_MODEL)


@pytest.fixture(scope="module")
def held_out_pairs() -> list[Preference]:
    return load_preferences("builtin").held_out


# --------------------------------------------------------------------------------------------------- what ships


def test_everything_together_is_under_fifteen_megabytes() -> None:
    sizes = [file.stat().st_size for file in BUILTIN.rglob("*") if "__pycache__" not in file.parts]
    assert sum(sizes) < 15e6  # 12 for film reviews, 3 for arithmetic
    assert max(sizes) < 10e6


def test_the_models_ship_in_half_precision_and_load_in_full(language_model: Any, reward_model: Any) -> None:
    for directory, model in ((LANGUAGE_MODEL, language_model), (REWARD_MODEL, reward_model)):
        assert model.dtype == torch.float32
        n_parameters = sum(p.numel() for p in model.parameters())
        assert 1.9 < (directory / "model.safetensors").stat().st_size / n_parameters < 2.1
    assert sum(p.numel() for p in language_model.parameters()) == REPORT["language_model"]["parameters"]


def test_both_models_have_the_same_tokenizer_of_2048_entries_with_separate_pad_and_eos(
    tokenizer: Any, language_model: Any, reward_model: Any
) -> None:
    of_reward_model = transformers.AutoTokenizer.from_pretrained(REWARD_MODEL)
    assert of_reward_model.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == 2048
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<pad>", "<eos>", None)
    assert tokenizer.is_fast
    assert tokenizer.padding_side == "right"
    for model in (language_model, reward_model):
        assert model.config.vocab_size == 2048
        assert model.config.pad_token_id == tokenizer.pad_token_id
        assert model.config.eos_token_id == tokenizer.eos_token_id
    assert language_model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert language_model.generation_config.pad_token_id == tokenizer.pad_token_id


@given(text=st.text(max_size=200))
@settings(deadline=None)
def test_decoding_what_was_encoded_gives_the_very_same_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_encoding_adds_no_special_token(tokenizer: Any) -> None:
    ids = tokenizer("The movie was a delight.")["input_ids"]
    assert not set(ids) & {tokenizer.pad_token_id, tokenizer.eos_token_id}


def test_no_file_that_ships_names_the_machine_that_made_it() -> None:
    for file in [*BUILTIN.rglob("*"), *(REPOSITORY / "data").iterdir()]:
        if file.suffix in {".json", ".jsonl", ".md", ".py"}:
            assert not re.search(r"/(work|root|home|tmp)/", file.read_text(encoding="utf-8")), file


# ------------------------------------------------------------------------------------------------------ prompts


def test_there_are_over_a_hundred_training_prompts_and_a_disjoint_held_out_set() -> None:
    train, held_out = prompts("train"), prompts("eval")
    assert prompts() == train
    assert len(set(train)) == len(train) == REPORT["prompts"]["train"] > 100
    assert len(set(held_out)) == len(held_out) == REPORT["prompts"]["eval"] >= 64
    assert not set(train) & set(held_out)


def test_prompts_are_two_to_six_words_of_at_most_twelve_tokens_with_no_space_at_the_end(tokenizer: Any) -> None:
    for prompt in prompts("train") + prompts("eval"):
        assert 2 <= len(prompt.split()) <= 6
        assert prompt == prompt.strip()
        assert len(tokenizer(prompt)["input_ids"]) <= 12


def test_no_prompt_decides_the_lexicon_score(script: ModuleType) -> None:
    every = prompts("train") + prompts("eval")
    assert not script.lexicon_scores(every).any()
    # Nor may a prompt turn or emphasise what follows. (The analyzer finds "this good" a little better than "good".)
    followed = script.lexicon_scores([prompt + " good" for prompt in every])
    np.testing.assert_allclose(followed, script.lexicon_scores(["The good"])[0], atol=0.1)


def test_an_unknown_split_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown split 'test': expected one of 'train', 'eval'"):
        prompts("test")


# ------------------------------------------------------------------------------------------------------- models


def test_the_held_out_loss_of_the_shipped_language_model_is_the_reported_one(
    script: ModuleType, tokenizer: Any, language_model: Any
) -> None:
    _, held_out = script.load_corpus(script.CORPUS)
    total, count = 0.0, 0
    for review in held_out[:200]:  # one by one: no batching or padding of ours to get wrong
        ids = tokenizer(review["text"] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += language_model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    reported = REPORT["language_model"]["held_out_nats_per_token"]
    assert reported < 2.52
    assert total / count == pytest.approx(reported, abs=0.1)  # 200 of the 910 reviews

    sequences = script.tokenize(tokenizer, held_out[:200])
    assert script.nats_per_token(language_model, sequences) == pytest.approx(total / count, abs=1e-4)


def test_the_held_out_accuracy_of_the_reward_model_is_the_reported_one_and_within_eight_points_of_the_ceiling(
    reward: SequenceClassifierReward, held_out_pairs: list[Preference]
) -> None:
    assert len(held_out_pairs) == REPORT["preferences"]["eval"]["pairs"]
    accuracy = describe_margins(pair_margins(reward, held_out_pairs))["accuracy"]
    assert accuracy == pytest.approx(REPORT["reward_model"]["held_out_accuracy"], abs=0.005)
    annotator = REPORT["preferences"]["eval"]["annotator_ceiling"]
    assert 0.8 < annotator < 0.9
    assert annotator - 0.08 < accuracy < annotator + 0.03  # above the ceiling only by chance


def test_the_annotator_ceiling_follows_from_the_shipped_pairs_and_the_stated_scale(
    script: ModuleType, held_out_pairs: list[Preference]
) -> None:
    chosen, rejected = (
        script.lexicon_scores([pair.prompt + getattr(pair, key) for pair in held_out_pairs])
        for key in ("chosen", "rejected")
    )
    reported, scale = REPORT["preferences"]["eval"], REPORT["preferences"]["scale"]
    assert len(held_out_pairs) == reported["pairs"]
    # Identical texts are not shipped, hence the small difference.
    assert script.ceiling(chosen - rejected, scale) == pytest.approx(reported["annotator_ceiling"], abs=0.005)
    agreement = (chosen > rejected)[chosen != rejected].mean()
    assert agreement == pytest.approx(reported["annotator_agrees_with_lexicon"], abs=0.005)


def test_the_pairs_are_completions_of_the_prompts_of_their_split(script: ModuleType) -> None:
    for pair in script.read_jsonl(PREFERENCES):
        assert set(pair) == {"prompt", "chosen", "rejected", "split"}
        assert pair["chosen"] != pair["rejected"]
        assert "<eos>" not in pair["chosen"] + pair["rejected"]
    for split in ("train", "eval"):
        of_pairs = {pair["prompt"] for pair in script.read_jsonl(PREFERENCES) if pair["split"] == split}
        assert of_pairs == set(prompts(split))


def test_the_reward_model_was_trained_on_the_tokens_that_the_environment_scores(
    tokenizer: Any, held_out_pairs: list[Preference]
) -> None:
    columns = pair_tokens(tokenizer, held_out_pairs[:50])
    for key in ("chosen", "rejected"):
        for pair, ids in zip(held_out_pairs, columns[f"{key}_ids"], strict=False):
            assert ids == tokenizer(pair.prompt + getattr(pair, key))["input_ids"]
            assert tokenizer.eos_token_id not in ids


def test_a_text_scores_the_same_alone_and_padded_in_a_batch(
    tokenizer: Any, reward_model: Any, reward: SequenceClassifierReward
) -> None:
    texts = ["The film was wonderful.", "The film was", "I watched this film last night and it was a bore, a mess."]
    alone = [reward_model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    with torch.no_grad():
        batch = reward_model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
    np.testing.assert_allclose(batch.numpy(), alone, atol=1e-5)
    scores = np.array(reward(prompts=[""] * len(texts), completions=texts))
    np.testing.assert_allclose(scores * reward.std + reward.mean, alone, atol=1e-5)


def test_texts_of_the_untrained_policy_score_mean_zero_and_standard_deviation_one(
    script: ModuleType, tokenizer: Any, language_model: Any, reward: SequenceClassifierReward
) -> None:
    transformers.set_seed(1)
    starts = [prompts()[i % len(prompts())] for i in range(256)]
    completions = script.sample(language_model, tokenizer, starts, max_new_tokens=48)
    texts = [start + completion for start, completion in zip(starts, completions, strict=True)]
    scores = np.array(reward(prompts=starts, completions=completions))
    assert abs(scores.mean()) < 4 / 256**0.5
    assert 0.85 < scores.std() < 1.15
    # The proxy follows the gold score on texts that neither has seen.
    assert np.corrcoef(scores, script.lexicon_scores(texts))[0, 1] > 0.6


# ------------------------------------------------------------------------------------------------- build script


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        (
            "The plot was a delight from the start. The villain of the",
            "The plot was a delight from the start.",
        ),
        (
            "The plot was **really**  good\u2019s company \u2013 and fun. It is by Dr. Li",
            "The plot was really good's company - and fun.",
        ),
        ('The plot was fun, and they said so too. "It is great. I', "The plot was fun, and they said so too."),
        ("The plot was fun", None),
        ("The plot was fun.", None),
        ("The plot, as an AI language model, I cannot judge at all, I am afraid.", None),
        ("The plot of [movie name] was a delight from start to end.", None),
        ("The plot had no wit and no wit and no wit and no wit and no wit and no wit.", None),
    ],
)
def test_cleaning_keeps_whole_sentences_of_plain_review(script: ModuleType, raw: str, cleaned: str | None) -> None:
    assert script.clean_text(raw, "The plot") == cleaned


def test_the_committed_corpus_is_clean_already_and_has_no_duplicates(script: ModuleType) -> None:
    reviews = script.read_jsonl(script.CORPUS)
    assert script.CORPUS.stat().st_size < 10e6
    assert len({review["text"].lower() for review in reviews}) == len(reviews) > 25_000
    for review in reviews[::10]:
        assert script.clean_text(review["text"], review["opening"]) == review["text"]
        assert set(review) == {"text", "opening", "genre", "sentiment"}


def test_the_scale_found_for_a_ceiling_gives_that_ceiling(script: ModuleType) -> None:
    differences = np.random.default_rng(0).normal(size=1000)
    assert script.ceiling(differences, script.scale_for_ceiling(differences, 0.85)) == pytest.approx(0.85, abs=1e-6)


def test_batches_hold_every_sequence_once_within_the_token_budget(script: ModuleType) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, size=500).tolist()
    for rng in (None, np.random.default_rng(1)):
        batches = list(script.batches_of_tokens(lengths, 256, rng))
        assert sorted(i for batch in batches for i in batch) == list(range(500))
        assert max(max(lengths[i] for i in batch) * len(batch) for batch in batches) <= 256


MINIATURE = """
    --n-reviews 800 --vocab-size 320 --hidden-size 32 --n-layers 1 --n-heads 2 --intermediate-size 64 --epochs 1
    --no-compile --n-prompts 12 --n-eval-prompts 4 --n-pairs 64 --n-eval-pairs 32 --max-new-tokens 12
    --n-normalisation-texts 64 --reward-epochs 1 --threads 1
"""


def test_one_command_rebuilds_everything_from_the_corpus_in_miniature(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "build", "--out", str(tmp_path), *MINIATURE.split()])
    runpy.run_path(str(SCRIPT), run_name="__main__")  # the command, without another process's imports

    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report) == list(script.STAGES) == list(REPORT)
    assert report["language_model"]["held_out_nats_per_token"] < 0.9 * np.log(320)  # it has learned something
    others = {"__init__.py", "__pycache__", "README.md", "arithmetic"}  # not made by this script
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in BUILTIN.iterdir()} - others

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "reward_model")
    assert len(tokenizer) == 320
    policy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "language_model")
    assert {file.name for file in (tmp_path / "reward_model").iterdir()} == {
        file.name for file in REWARD_MODEL.iterdir()
    }
    start = script.load_prompts(tmp_path, "train")[:2]
    completions = script.sample(policy, tokenizer, start, max_new_tokens=4)
    reward = SequenceClassifierReward(tmp_path / "reward_model")
    assert reward.std != 1.0
    assert np.isfinite(reward(prompts=start, completions=completions)).all()


def test_a_later_stage_runs_again_by_itself(script: ModuleType, tmp_path: Path) -> None:
    config = script.Build(out=tmp_path, n_reviews=1500, vocab_size=320, n_prompts=12, n_eval_prompts=4, threads=1)
    n_threads = torch.get_num_threads()
    try:
        config.stages = ("tokenizer", "prompts")
        script.build(config)
        before = (tmp_path / "prompts.jsonl").read_bytes()
        config.stages = ("prompts",)
        script.build(config)
    finally:
        torch.set_num_threads(n_threads)
    assert (tmp_path / "prompts.jsonl").read_bytes() == before
    assert list(json.loads((tmp_path / "report.json").read_text())) == ["tokenizer", "prompts"]
