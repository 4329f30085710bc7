"""Several tokens may end a text: where they are found, and what the environment makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import transformers.utils.hub
from learners import PROMPTS, length_of
from tiny import tiny_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from text_env.checker import check_text_env, check_text_vector_env
from text_env.ends_of_text import ends_of_text
from text_env.env import TextEnv
from text_env.prompts import Prompts
from text_env.vector_env import TextVectorEnv

EOS, PAD, PLAIN = 0, 1, 2  # <eos>, <pad>, and a token of ordinary text


def with_turns() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a special token that ends a turn, and one that opens the next."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>", "<assistant>"]})
    return tokenizer


END, ASSISTANT = 300, 301


def saved(directory: Path, generation: Any = None, config: Any = None, adapter: Any = None) -> str:
    """A directory with a tokenizer and what these files say; None: there is no such file."""
    with_turns().save_pretrained(directory)
    files = {"generation_config.json": generation, "config.json": config, "adapter_config.json": adapter}
    for name, content in files.items():
        if content is not None:
            (directory / name).write_text(json.dumps(content))
    return str(directory)


def settings(**kwargs: Any) -> dict[str, Any]:
    defaults = {"prompts": PROMPTS, "reward": length_of, "max_prompt_tokens": 16, "max_new_tokens": 6}
    return {**defaults, **kwargs}


def written(env: TextVectorEnv, tokens: list[int]) -> dict[str, Any]:
    """Write tokens in the only row, the last of which must end the text; the final info."""
    env.reset(seed=0)
    for token in tokens[:-1]:
        assert not env.step([token])[2].any()
    _, _, terminated, _, infos = env.step(tokens[-1:])
    assert terminated.all()
    return {name: value[0] for name, value in infos["final_info"].items()}


# ---- where they are found ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, (EOS,)),
        ({"generation": {"eos_token_id": [END, 5]}}, (EOS, 5, END)),
        ({"generation": {"eos_token_id": END}, "config": {"eos_token_id": 5}}, (EOS, END)),
        ({"generation": {"temperature": 1.0}, "config": {"eos_token_id": [5, EOS]}}, (EOS, 5)),
        ({"config": {"text_config": {"eos_token_id": 5}}}, (EOS, 5)),
        ({"config": {"eos_token_id": None, "text_config": None}}, (EOS,)),
        ({"generation": {"eos_token_id": [END, 50256, -1]}}, (EOS, END)),
    ],
)
def test_the_ends_are_the_tokenizers_and_those_of_the_first_file_that_names_some(
    tmp_path: Path, files: dict[str, Any], ends: tuple[int, ...]
) -> None:
    place = saved(tmp_path, **files)
    by_name = TextEnv(tokenizer=place, **settings())
    live = TextEnv(tokenizer=AutoTokenizer.from_pretrained(place), **settings())
    assert by_name.eos_token_ids == live.eos_token_ids == ends
    assert by_name.eos_token_id == EOS


def test_an_adapter_ends_texts_as_its_base_does_unless_it_says_otherwise(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", generation={"eos_token_id": [END, 5]})
    adapter = saved(tmp_path / "adapter", adapter={"base_model_name_or_path": base})
    assert TextEnv(tokenizer=adapter, **settings()).eos_token_ids == (EOS, 5, END)
    (tmp_path / "adapter" / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert TextEnv(tokenizer=adapter, **settings()).eos_token_ids == (EOS, 7)
    nameless = saved(tmp_path / "nameless", adapter={"base_model_name_or_path": None})
    assert ends_of_text(AutoTokenizer.from_pretrained(nameless)) == (EOS,)


@pytest.mark.parametrize("place", ["", "someone/something", "no such directory", "/nowhere/at/all", "../up"])
def test_a_place_that_is_not_there_is_no_error(place: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = place
    assert ends_of_text(tokenizer) == (EOS,)


def test_a_network_that_fails_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(transformers.utils.hub, "cached_file", fail)
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = "someone/something"
    assert ends_of_text(tokenizer) == (EOS,)


def test_a_hub_name_is_looked_for_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--someone--something" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    refs = tmp_path / "models--someone--something" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: True)
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = "someone/something"
    assert ends_of_text(tokenizer) == (EOS, 5)


@pytest.mark.parametrize("content", ["{", "[1, 2]", '"text"'])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match=r"Expected .*generation_config.json to be a JSON"):
        ends_of_text(tokenizer)


def test_what_is_given_counts_and_the_tokenizers_own_end_always_does(tmp_path: Path) -> None:
    place = saved(tmp_path, generation={"eos_token_id": [END, 5]})
    assert TextEnv(tokenizer=place, eos_token_ids=[9, np.int64(7), EOS], **settings()).eos_token_ids == (EOS, 7, 9)
    assert TextEnv(tokenizer=place, eos_token_ids=(), **settings()).eos_token_ids == (EOS,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([5, 302], r"Expected eos_token_ids to lie in \[0, 302\), the tokens of the tokenizer, got \[302\]"),
        ([-1], r"got \[-1\]"),
        (5, "Expected eos_token_ids to be a list of token ids, got 5"),
        ("<end>", "Expected eos_token_ids to be a list of token ids, got '<end>'"),
        ([1.5], "Expected eos_token_ids to be a list of token ids"),
    ],
)
def test_ids_that_are_no_tokens_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextEnv(tokenizer=with_turns(), eos_token_ids=given, **settings())


def test_looking_for_them_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    code = (
        "import sys; from text_env.ends_of_text import _said_at; "
        f"print(_said_at({str(tmp_path)!r}), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(0, 5) False\n"


# ---- what the environment makes of them ----------------------------------------------------------------------------


@pytest.mark.parametrize("end", [EOS, PLAIN, END])
def test_a_text_ends_at_any_of_them_and_none_is_a_part_of_it(end: int) -> None:
    env = TextVectorEnv(1, tokenizer=with_turns(), eos_token_ids=[PLAIN, END], **settings())
    words = env.tokenizer(" was good")["input_ids"][:4]
    final = written(env, [*words, end])
    assert final["finish_reason"] == "eos"
    assert final["completion"] == env.tokenizer.decode(words)
    assert final["score"] == len(words) + 1  # the reward is given all tokens


@pytest.mark.parametrize("end", [EOS, PLAIN, END])
def test_none_of_them_ends_a_text_before_its_minimum_length(end: int) -> None:
    env = TextVectorEnv(1, tokenizer=with_turns(), eos_token_ids=[PLAIN, END], min_new_tokens=2, **settings())
    env.reset(seed=0)
    for _ in range(2):
        assert np.flatnonzero(~env.action_masks()[0]).tolist() == [EOS, PLAIN, END]
        assert not env.step([end])[2].any()
    assert env.action_masks().all()
    assert env.step([end])[2].all()


@pytest.mark.parametrize("end", [EOS, PLAIN, END])
def test_a_given_response_may_hold_none_of_them(end: int) -> None:
    env = TextEnv(tokenizer=with_turns(), eos_token_ids=[PLAIN, END], min_new_tokens=1, **settings())
    with pytest.raises(ValueError, match=f"holds the end-of-text token {end}"):
        env.reset(options={"response": [7, end]})
    env.reset(options={"response": [end, 7]})  # too early to count


@pytest.mark.parametrize("mode", ["file", "setting"])
def test_the_conformance_suite_holds_with_several_ends(tmp_path: Path, mode: str) -> None:
    place = saved(tmp_path, generation={"eos_token_id": [PLAIN, END]})
    kwargs = settings(tokenizer=place) if mode == "file" else settings(tokenizer=with_turns(), eos_token_ids=[2, 300])
    for minimum in (0, 2):
        check_text_env(TextEnv(min_new_tokens=minimum, **kwargs))
        env = TextVectorEnv(3, min_new_tokens=minimum, **kwargs)
        check_text_vector_env(env, lambda: TextEnv(min_new_tokens=minimum, **kwargs))  # noqa: B023


class ForgetsAnEnd(TextEnv):
    """It says that more tokens end a text than do."""

    eos_token_ids = (EOS, END)


def test_the_conformance_suite_notices_an_end_that_ends_nothing() -> None:
    with pytest.raises(AssertionError, match="EOS must terminate, but 300 does not"):
        check_text_env(ForgetsAnEnd(tokenizer=with_turns(), **settings()))


def test_gym_makes_both_forms_by_name(tmp_path: Path) -> None:
    place = saved(tmp_path, generation={"eos_token_id": [EOS, END]})
    env = gym.make("TextRLHF-v0", tokenizer=place, **settings())
    env.reset(seed=0)
    _, _, terminated, _, info = env.step(END)
    assert (terminated, info["finish_reason"]) == (True, "eos")
    many = gym.make_vec("TextRLHF-v0", num_envs=2, tokenizer=place, eos_token_ids=[5], **settings())
    many.reset(seed=0)
    assert many.step(np.array([END, 5]))[2].tolist() == [False, True]


# ---- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["<end>", "<eos>", "<end><eos><end>"])
def test_a_prompt_loses_all_of_them_at_its_end(ending: str) -> None:
    tokenizer = with_turns()
    prompts = Prompts([f"The movie{ending}", "The<end> movie"], tokenizer, 32, eos_token_ids=[END])
    assert (prompts[0].text, prompts[0].token_ids) == ("The movie", tokenizer("The movie")["input_ids"])
    assert END in prompts[1].token_ids  # in the middle it stays
    assert prompts.make([7, END, EOS, END]).token_ids == [7]
    assert Prompts(["The"], tokenizer, 32).make([7, END]).token_ids == [7, END]


# As in Phi-3, whose generation config names <|assistant|> among the ends, and whose generation prompt is that token.
OPENS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if not loop.last or m.role != 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_the_token_that_opens_the_assistants_turn_stays_even_if_it_ends_texts_too() -> None:
    tokenizer = with_turns()
    tokenizer.chat_template = OPENS
    kwargs = settings(tokenizer=tokenizer, max_prompt_tokens=64, eos_token_ids=[END, ASSISTANT])
    env = TextEnv(**kwargs)
    first = env.prompts[0].token_ids
    assert tokenizer.decode(first) == "[user]The movie<end><assistant>"
    assert env.prompts.make(first).token_ids == first
    begun = [{"role": "user", "content": "The movie"}, {"role": "assistant", "content": "I loved"}]
    assert tokenizer.decode(env.prompts.make(begun).token_ids) == "[user]The movie<end>[assistant]I loved"
    check_text_env(env)
