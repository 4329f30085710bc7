"""Stop strings are found at the end of a text exactly where the whole text would show them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import RecordingReward, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import text_env.stop_strings
from text_env.stop_strings import StopStrings, decodes_locally
from text_env.vector_env import TextVectorEnv


def with_decoder(words: list[str], decoder: Any) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<eos>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        inner.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")


# "é" is the bytes C3 A9, "€" is E2 82 AC; 61 is "a".
BYTES = ["<0xC3>", "<0xA9>", "<0xE2>", "<0x82>", "<0xAC>", "<0x61>"]
PIECES = ["▁", "▁a", "▁ab", "a", "b", "ab", "▁▁", "é", "ba"]


def llama_like() -> PreTrainedTokenizerFast:
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return with_decoder([*PIECES, *BYTES], decoders.Sequence(chain))


TOKENIZERS = {
    "byte-level": tiny_tokenizer(),
    "llama": llama_like(),
    "metaspace": with_decoder(PIECES, decoders.Metaspace()),
    "wordpiece": with_decoder(["a", "b", "##a", "##b", "##ab", ".", ",", "n't"], decoders.WordPiece()),
    "joined": with_decoder(["a", "b", "ab", "é"], None),
    "bpe": with_decoder(["a", "b</w>", "a</w>", "b"], decoders.BPEDecoder()),
}
# Of the byte-level tokenizer: parts of characters, letters, and a few of its merges.
BYTE_LEVEL = [0, 1, *TOKENIZERS["byte-level"]("ab a é € the was.\n")["input_ids"]]


def stepwise(name: str, tokens: list[int], stop: list[str], given: list[int], prompt: list[int]) -> Any:
    env = TextVectorEnv(
        1,
        tokenizer=TOKENIZERS[name],
        prompts=["a"],
        reward=RecordingReward(),
        max_prompt_tokens=6,
        max_new_tokens=len(tokens) + len(given),
        min_new_tokens=len(tokens) + len(given),
        stop=stop,
    )
    try:
        env.reset(options={"prompt": [prompt], "response": [given]})
    except ValueError:
        return "refused"
    for number, token in enumerate(tokens, 1):
        infos = env.step(np.array([token]))[4]
        if "final_info" in infos:
            return number, infos["final_info"]["completion"][0], infos["final_info"]["finish_reason"][0]
    raise AssertionError("The budget is spent.")


@contextmanager
def whole_texts() -> Iterator[None]:
    """Within it, the whole text is looked at after every token, which is the plain definition of a stop string."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopStrings, "may_end_with", lambda self, tokens: np.ones(len(tokens), np.bool_))
        patch.setattr(StopStrings, "may_be_new", lambda self, tails, complete: [True] * len(tails))
        yield


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_texts_end_where_decoding_the_whole_text_at_every_step_would_end_them(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = st.sampled_from(BYTE_LEVEL if name == "byte-level" else range(len(tokenizer)))
    tokens = data.draw(st.lists(ids, min_size=1, max_size=24))
    given_ids = data.draw(st.lists(ids, max_size=3))
    prompt = data.draw(st.lists(ids.filter(bool), min_size=1, max_size=6))
    # Stop strings from the text itself, or else hardly any would ever be met.
    text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False) + "ab é."
    first = data.draw(st.integers(0, len(text) - 1))
    stop = [text[first : first + data.draw(st.integers(1, 6))], data.draw(st.sampled_from(["aba", "é", " b a", "€."]))]
    got = stepwise(name, tokens, stop, given_ids, prompt)
    with whole_texts():
        assert got == stepwise(name, tokens, stop, given_ids, prompt)


def ids(name: str, *pieces: str) -> list[int]:
    tokenizer = TOKENIZERS[name]
    if name == "byte-level":
        return [token for piece in pieces for token in tokenizer(piece)["input_ids"]]
    return list(tokenizer.convert_tokens_to_ids(list(pieces)))


@pytest.mark.parametrize(
    ("name", "pieces", "stop", "end"),
    [
        ("byte-level", ["aaaaaa", "é", "bb"], "é", "é"),  # the character's last byte completes it
        ("byte-level", ["aaaaaa", "€", ".", "b"], "€.", "€."),
        ("llama", ["a", "a", "a", "<0xC3>", "<0xA9>", "b", "b"], "aé", "aé"),
        ("llama", ["a", "a", "a", "<0xE2>", "<0x82>", "<0xAC>", "b", "b"], "€", "€"),
        ("llama", ["b", "b", "b", "<0x61>", "b", "b"], "a", "a"),
        ("llama", ["b", "b", "b", "<0xC3>", "<0x61>", "b", "a", "b"], "a", "ba"),  # bytes that are no text together
        ("llama", ["▁a", "▁", "<0x61>", "<0xC3>"], "a \N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}" * 2),
        ("llama", ["b", "<eos>", "<0xC3>", "<eos>", "<0xA9>", "b"], "é", "é"),  # ends of text that come too early
        ("llama", ["▁", "▁", "a", "b", "b"], " a", " a"),
        ("wordpiece", ["a", "##b", "a", "."], "a.", "a."),
        ("joined", ["a", "b", "a"], "b a", "b a"),
    ],
)
def test_a_stop_string_is_seen_with_the_token_that_completes_it(
    name: str, pieces: list[str], stop: str, end: str
) -> None:
    tokens = ids(name, *pieces)
    number, completion, reason = stepwise(name, [*tokens, *tokens[:1]], [stop], [], ids(name, "a"))
    assert (completion.endswith(end), reason) == (True, "stop")
    with whole_texts():
        assert stepwise(name, [*tokens, *tokens[:1]], [stop], [], ids(name, "a"))[0] == number


def test_only_decoders_that_are_known_to_keep_to_a_token_are_trusted() -> None:
    assert {name for name, tokenizer in TOKENIZERS.items() if not decodes_locally(tokenizer)} == {"bpe"}
    for decoder in (decoders.CTC(), decoders.Strip(" ", 0, 1), decoders.Replace("ab", "c")):
        assert not decodes_locally(with_decoder(["a"], decoders.Sequence([decoder])))
    assert not decodes_locally(object())


@pytest.mark.parametrize("name", ["byte-level", "llama", "metaspace", "wordpiece", "joined"])
def test_a_step_decodes_the_end_of_a_text_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    real = text_env.stop_strings.decode

    def counting(tokenizer: Any, token_ids: Any) -> list[str]:
        decoded.extend(len(ids) for ids in token_ids)
        return real(tokenizer, token_ids)

    for module in ("stop_strings", "tokenization"):
        monkeypatch.setattr(f"text_env.{module}.decode", counting)
    tokenizer = TOKENIZERS[name]
    token = tokenizer.convert_tokens_to_ids("a")
    broken = tokenizer("é")["input_ids"][0]  # where it is a part of a character, no token after it says how to read it
    env = TextVectorEnv(
        2, tokenizer=tokenizer, prompts=["a"], reward=RecordingReward(), max_new_tokens=200, stop=["xyz", "stop"]
    )
    env.reset(seed=0)
    for step in range(199):
        decoded.clear()
        env.step(np.array([token, broken if step % 3 else token]))
        if step > 20:
            assert max(decoded, default=0) < 20


@pytest.mark.parametrize(
    ("stop", "harmless"), [(["the\n", "."], ["a", "b", " ", "€", "é"]), (["é"], ["a", "b", " ", "\n"])]
)
def test_most_tokens_need_no_look_at_the_text(stop: list[str], harmless: list[str]) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    strings = StopStrings(stop, tokenizer)
    tokens = np.array([token for text in harmless for token in tokenizer(text)["input_ids"]])
    if stop == ["é"]:  # a part of a character may complete it
        assert strings.may_end_with(np.array(tokenizer("é")["input_ids"])).all()
    assert not strings.may_end_with(np.append(tokens, tokenizer.eos_token_id)).any()
    for text in stop:
        assert strings.may_end_with(np.array(tokenizer(text)["input_ids"][-1:])).all()
    assert StopStrings(stop, TOKENIZERS["bpe"]).may_end_with(np.array([2, 3])).all()  # where nothing is certain
