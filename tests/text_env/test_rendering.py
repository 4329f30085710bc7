"""What can be looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from text_env import TextEnv, TextVectorEnv
from text_env.rendering import FRAME_HEIGHT, FRAME_WIDTH, render


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


def test_ansi_is_the_text_so_far(tokenizer: Any) -> None:
    assert make(tokenizer, "ansi").render() == "The movie was good"


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


@pytest.mark.parametrize("text", ["", "\n\n", "naïve — “quoted” 🎬 電影", "word " * 2000])
def test_any_text_can_be_drawn(text: str) -> None:
    assert render("rgb_array", text, text).shape == (FRAME_HEIGHT, FRAME_WIDTH, 3)  # type: ignore[union-attr]


def test_without_a_mode_nothing_is_rendered(tokenizer: Any) -> None:
    assert make(tokenizer, None).render() is None


def test_the_vector_environment_renders_every_row(tokenizer: Any) -> None:
    env = TextVectorEnv(2, tokenizer=tokenizer, prompts=["The movie"], reward="sentiment", render_mode="ansi")
    env.reset(options={"response": [" was good", None]})
    assert env.render() == ("The movie was good", "The movie")
