"""What can be looked at."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from text_env import TextEnv, TextVectorEnv
from text_env.rendering import FRAME_HEIGHT, FRAME_WIDTH, printable, render


def make(tokenizer: Any, mode: str | None) -> TextEnv:
    env = TextEnv(
        tokenizer=tokenizer,
        prompts=["The movie"],
        reward="sentiment",
        max_prompt_tokens=8,
        max_new_tokens=8,
        render_mode=mode,
    )
    env.reset(options={"response": " was good"})
    return env


def plain(text: Any) -> str:
    """A text without the codes that colour it."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def test_ansi_is_the_text_so_far_with_the_prompt_dim_and_the_response_in_colour(tokenizer: Any) -> None:
    shown = make(tokenizer, "ansi").render()
    assert plain(shown) == "The movie was good"
    assert shown == "\x1b[2mThe movie\x1b[0m\x1b[1;36m was good\x1b[0m"


@pytest.mark.parametrize("mode", ["ansi", "human"])
def test_a_text_can_give_the_terminal_no_orders(mode: Any, capsys: Any) -> None:
    shown = render(mode, "a\x1b[2Jb\r\nc", "\x07d\te\x9b31m") or capsys.readouterr().out
    assert plain(shown).split() == ["a\ufffd[2Jb", "c\ufffdd", "e\ufffd31m"]
    assert printable("“naïve” — 電影 🎬\n") == "“naïve” — 電影 🎬\n"


def test_human_prints_the_text_and_returns_nothing(tokenizer: Any, capsys: Any) -> None:
    assert make(tokenizer, "human").render() is None
    assert capsys.readouterr().out.strip() == "The movie was good"


def test_square_brackets_in_a_text_are_printed_and_not_taken_for_markup(capsys: Any) -> None:
    render("human", "[bold]a", "[/nothing]")
    assert capsys.readouterr().out.strip() == "[bold]a[/nothing]"


def test_rgb_array_is_an_image_of_constant_size_that_changes_with_the_text(tokenizer: Any) -> None:
    env = make(tokenizer, "rgb_array")
    first: Any = env.render()
    env.step(70)
    second: Any = env.render()
    assert first.shape == second.shape == (FRAME_HEIGHT, FRAME_WIDTH, 3)
    assert first.dtype == np.uint8
    assert (first != second).any()


def colours(image: Any) -> set[tuple[int, ...]]:
    return {tuple(pixel) for pixel in image.reshape(-1, 3).tolist()}


def test_in_an_image_prompt_and_response_differ_in_colour_and_ground() -> None:
    prompt, response = (colours(render("rgb_array", *texts)) for texts in (("word", ""), ("", "word")))
    assert (0xE4, 0xEE, 0xFA) in response - prompt
    assert (0x0B, 0x2E, 0x6B) in response - prompt
    assert min(sum(colour) for colour in prompt) > min(sum(colour) for colour in response)


@pytest.mark.parametrize("text", ["“", "—", "é", "ж", "π"])
def test_an_image_has_the_letters_that_are_not_of_latin_1(text: str) -> None:
    missing = render("rgb_array", "\U0010fffd", "")  # what the font draws for a letter that it hasn't
    assert (render("rgb_array", text, "") != missing).any()


def test_lines_of_an_image_break_between_words_and_the_newest_are_shown() -> None:
    image: Any = render("rgb_array", "word " * 2000, "the end")
    ink = (image != 255).any(axis=2)
    assert not ink[:, -4:].any()
    assert not ink[:, :4].any()
    assert (image[-40:] == (0xE4, 0xEE, 0xFA)).all(axis=2).any()
    assert not (image[:200] == (0xE4, 0xEE, 0xFA)).all(axis=2).any()
    first: Any = render("rgb_array", "word " * 14 + "a", "")
    assert (first[:28] == render("rgb_array", "word " * 14, "")[:28]).all()  # type: ignore[index]


@pytest.mark.parametrize("text", ["", "\n\n", "naïve — “quoted” 🎬 電影", "word " * 2000, "x" * 5000])
def test_any_text_can_be_drawn(text: str) -> None:
    assert render("rgb_array", text, text).shape == (FRAME_HEIGHT, FRAME_WIDTH, 3)  # type: ignore[union-attr]


def test_without_a_mode_nothing_is_rendered(tokenizer: Any) -> None:
    assert make(tokenizer, None).render() is None


def test_the_vector_environment_renders_every_row(tokenizer: Any) -> None:
    env = TextVectorEnv(2, tokenizer=tokenizer, prompts=["The movie"], reward="sentiment", render_mode="ansi")
    env.reset(options={"response": [" was good", None]})
    assert tuple(map(plain, env.render())) == ("The movie was good", "The movie")
