"""Rendering a prompt and the response to it: as a string, on the terminal, or as an image."""

from __future__ import annotations

import textwrap
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

RenderMode = Literal["human", "ansi", "rgb_array"]

RENDER_MODES: tuple[str, ...] = get_args(RenderMode)
# The metadata of the scalar and of the vector environment.
METADATA: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 10}

# Every frame has the same size, since videos need that. 80 characters of Pillow's built-in font fit into a line.
FRAME_HEIGHT, FRAME_WIDTH = 256, 512
_LINE_HEIGHT, _CHARACTERS = 15, 80


def check_render_mode(render_mode: str | None) -> None:
    """
    :param render_mode: the mode that the user asks for.
    :raises ValueError: if there is no such mode.
    """
    if render_mode is not None and render_mode not in RENDER_MODES:
        raise ValueError(f"Expected render_mode to be None or one of {RENDER_MODES}, got {render_mode!r}.")


def render(mode: str | None, prompt: str, response: str) -> str | NDArray[np.uint8] | None:
    """
    :param mode: ``"ansi"`` returns a string, ``"human"`` prints the text with the prompt dimmed, ``"rgb_array"``
        returns an image, and None does nothing.
    :param prompt: the text of the prompt.
    :param response: the text of the response so far.
    :return: the string, the uint8 image [256, 512, 3], or None.
    """
    if mode == "ansi":
        return prompt + response
    if mode == "human":
        _print(prompt, response)
    if mode == "rgb_array":
        return _draw(prompt + response)
    return None


def _print(prompt: str, response: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console().print(Text.assemble((prompt, "dim"), (response, "bold")))


def _draw(text: str) -> NDArray[np.uint8]:
    from PIL import Image, ImageDraw, ImageFont

    lines = [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, _CHARACTERS) or [""]]
    image = Image.new("RGB", (FRAME_WIDTH, FRAME_HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default_imagefont()
    shown: list[Any] = lines[-(FRAME_HEIGHT // _LINE_HEIGHT) :]  # the newest lines, when there are too many
    for number, line in enumerate(shown):
        # Pillow's built-in bitmap font has only the characters of Latin-1; a missing one must not stop a training run.
        printable = line.encode("latin-1", "replace").decode("latin-1")
        draw.text((4, 2 + number * _LINE_HEIGHT), printable, fill="black", font=font)
    return np.asarray(image, dtype=np.uint8).copy()
