"""Rendering a prompt and the response to it: as a string, on the terminal, or as an image."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont
    from rich.text import Text

RenderMode = Literal["human", "ansi", "rgb_array"]

RENDER_MODES: tuple[str, ...] = get_args(RenderMode)
# The metadata of the scalar and of the vector environment.
METADATA: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 10}

# Every frame has the same size, since videos need that.
FRAME_HEIGHT, FRAME_WIDTH = 256, 512
_MARGIN, _LINE_HEIGHT, _FONT_SIZE = 8, 20, 15
# Apart in lightness as well as in hue, and the response on a ground of its own: nobody has to see colours for it.
_PROMPT_INK, _RESPONSE_INK, _RESPONSE_GROUND = "#6B7280", "#0B2E6B", "#E4EEFA"

_DIM, _BOLD_CYAN, _PLAIN = "\x1b[2m", "\x1b[1;36m", "\x1b[0m"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def check_render_mode(render_mode: str | None) -> None:
    """
    :param render_mode: the mode that the user asks for.
    :raises ValueError: if there is no such mode.
    """
    if render_mode is not None and render_mode not in RENDER_MODES:
        raise ValueError(f"Expected render_mode to be None or one of {RENDER_MODES}, got {render_mode!r}.")


def render(mode: str | None, prompt: str, response: str) -> str | NDArray[np.uint8] | None:
    """
    :param mode: ``"ansi"`` returns a string in which codes for the terminal tell the prompt, dim, from the response,
        bold and cyan; ``"human"`` prints the text in the same way; ``"rgb_array"`` returns an image in which the prompt
        is grey and the response blue on light blue; and None does nothing.
    :param prompt: the text of the prompt.
    :param response: the text of the response so far.
    :return: the string, the uint8 image [256, 512, 3], or None.
    """
    if mode == "ansi":
        parts = ((_DIM, prompt), (_BOLD_CYAN, response))
        return "".join(f"{code}{printable(text)}{_PLAIN}" for code, text in parts if text)
    if mode == "human":
        from rich.console import Console

        Console().print(two_parts(prompt, response))
    if mode == "rgb_array":
        return _draw(prompt, response)
    return None


def printable(text: str) -> str:
    """
    :param text: any text, such as a model may write.
    :return: the text without what a terminal would obey: a control character other than a tab or the end of a line is
        replaced by U+FFFD.
    """
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def two_parts(prompt: str, response: str) -> Text:
    """
    :param prompt: the text of the prompt.
    :param response: the text of the response.
    :return: both for a terminal, told apart as in the mode ``"ansi"``.
    """
    from rich.text import Text

    return Text.assemble((printable(prompt), "dim"), (printable(response), "bold cyan"))


@functools.cache
def _font() -> FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    # It comes with matplotlib, and has the letters of some fifty scripts, quotation marks and dashes.
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", _FONT_SIZE)


def _draw(prompt: str, response: str) -> NDArray[np.uint8]:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (FRAME_WIDTH, FRAME_HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), _font()
    lines = _lines(prompt, response, FRAME_WIDTH - 2 * _MARGIN)
    newest = lines[-((FRAME_HEIGHT - 2 * _MARGIN) // _LINE_HEIGHT) :]  # when there are too many
    for number, line in enumerate(newest):
        x, y = float(_MARGIN), _MARGIN + number * _LINE_HEIGHT
        for text, of_response in line:
            width = font.getlength(text)
            if of_response:
                draw.rectangle((x, y, x + width, y + _LINE_HEIGHT - 1), fill=_RESPONSE_GROUND)
            draw.text((x, y + 1), text, fill=_RESPONSE_INK if of_response else _PROMPT_INK, font=font)
            x += width
    return np.asarray(image, dtype=np.uint8).copy()


def _lines(prompt: str, response: str, width: float) -> list[list[tuple[str, bool]]]:
    """The lines, each as pieces with whether they are of the response. A line breaks between words where it can."""
    font = _font()
    lines: list[list[tuple[str, bool]]] = [[]]
    left = width
    for text, of_response in ((prompt, False), (response, True)):
        for word in re.findall(r"\n|[^\S\n]+|\S+", printable(text).replace("\t", "    ")):
            if word == "\n":
                lines.append([])
                left = width
                continue
            if font.getlength(word) > left and left < width:
                lines.append([])
                left = width
                if word.isspace():
                    continue
            while word:
                fits = _fitting(font, word, left)
                lines[-1].append((word[:fits], of_response))
                left -= font.getlength(word[:fits])
                word = word[fits:]
                if word:  # longer than a line
                    lines.append([])
                    left = width
    return lines


def _fitting(font: FreeTypeFont, word: str, width: float) -> int:
    """How many characters of a word fit into a line, at least one."""
    if font.getlength(word) <= width:
        return len(word)
    low, high = 1, len(word)
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if font.getlength(word[:middle]) <= width else (low, middle)
    return low
