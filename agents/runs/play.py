"""Writing a text together with a model, token by token, in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.runs.not_scored import WHY, score_of
from agents.runs.token_records import token_texts
from text_env.rendering import printable, two_parts
from text_env.tokenization import encode
from text_env.vector_env import TextVectorEnv

HELP = (
    'Enter: the model samples a token. A number: that token. "text: the tokens of your own text. b: one token back. '
    "g: the model goes on to the end. q: leave. ?: this."
)


@dataclass(frozen=True)
class Sight:
    """What a model says of the next token.

    :param tokens: the most probable tokens, the most probable one first.
    :param probabilities: theirs, float64.
    :param entropy: of the whole distribution, in nats.
    :param value: what the critic expects; None: there is none that was trained.
    :param forbidden: the number of tokens that may not come next.
    """

    tokens: list[int]
    probabilities: list[float]
    entropy: float
    value: float | None
    forbidden: int


class Play:
    """A text that somebody and a model are writing.

    :param policy: the model.
    :param env: an environment of one row.
    :param seed: of the prompt.
    """

    def __init__(self, policy: CausalLMPolicy, env: TextVectorEnv, seed: int) -> None:
        self.policy = policy
        self.env = env
        policy.set_training_mode(False)
        env.autoreset_mode = AutoresetMode.DISABLED
        self.has_critic = any(bool(parameter.any()) for parameter in policy.value_head.parameters())
        self._observation, _ = env.reset(seed=seed)
        self.prompt = env.episodes.prompt(0)
        self.tokens: list[int] = []
        self.outcome: dict[str, Any] | None = None
        """The final info of the text; None as long as it goes on."""

    @property
    def text(self) -> tuple[str, str]:
        """The prompt and the response so far."""
        return self.env.episodes.text(0)

    def append(self, token: int) -> None:
        """Write a token.

        :param token: it must be allowed.
        :raises ValueError: if the text is finished, or the token forbidden.
        """
        if self.outcome is not None:
            raise ValueError("Expected a text that goes on, but this one is finished: go back with b, or leave with q.")
        if not self._allowed()[token]:
            [piece] = token_texts(self.env.tokenizer, [token], [*self.prompt.token_ids, *self.tokens])
            raise ValueError(f"Expected a token that may come next, got {piece!r}, which may not.")
        self._observation, _, over, _, infos = self.env.step(np.array([token]))
        self.tokens.append(token)
        if over[0]:
            self.outcome = {k: v[0] for k, v in infos.items() if not k.startswith("_") and infos[f"_{k}"][0]}

    def back(self) -> None:
        """Take the last token back.

        :raises ValueError: if there is none.
        """
        if not self.tokens:
            raise ValueError("Expected a text with a token to take back, but this is its beginning.")
        self.tokens.pop()
        options = {"prompt": [self.prompt], "response": [self.tokens]}
        self._observation, _ = self.env.reset(options=options)
        self.outcome = None

    @torch.no_grad()
    def look(self, top: int) -> Sight:
        """
        :param top: the number of tokens that are looked at; forbidden ones are never among them.
        :return: what the model says of the next token.
        """
        observation = {name: torch.from_numpy(array) for name, array in self._observation.items()}
        distribution = self.policy.get_distribution(observation)
        probabilities = distribution.distribution.probs[0].double().cpu()
        best = probabilities.topk(min(top, int((probabilities > 0).sum())))
        value = float(self.policy.predict_values(observation)) if self.has_critic else None
        return Sight(
            best.indices.tolist(),
            best.values.tolist(),
            float(torch.special.entr(probabilities).sum()),
            value,
            int((~self._allowed()).sum()),
        )

    @torch.no_grad()
    def sampled(self) -> int:
        """
        :return: a token, drawn from the model's distribution.
        """
        observation = {name: torch.from_numpy(array) for name, array in self._observation.items()}
        return int(self.policy(observation)[0])

    def pieces(self, tokens: list[int]) -> list[str]:
        """
        :param tokens: tokens of which each might be the next.
        :return: what each of them would add to the text.
        """
        before = [*self.prompt.token_ids, *self.tokens]
        return [token_texts(self.env.tokenizer, [token], before)[0] for token in tokens]

    def _allowed(self) -> np.ndarray:
        return self.env.action_masks()[0]


def play(game: Play, top: int, console: Console, read: Callable[[str], str] = input) -> None:
    """Let somebody write by commands, of which :data:`HELP` is the list, until they leave or there are no more.

    :param game: the text.
    :param top: the number of tokens to choose from.
    :param console: the terminal.
    :param read: a function that asks for a line and returns it, and raises EOFError where there is none.
    """
    console.print(HELP, style="dim", highlight=False, markup=False)
    while True:
        sight = None if game.outcome is not None else game.look(top)
        console.print(two_parts(*game.text))
        if sight is not None:
            console.print(_choices(game, sight))
        else:
            console.print(_outcome(game.outcome or {}))
        try:
            command = read("> ")
        except EOFError:
            return
        if command.strip() == "q":
            return
        try:
            _obey(command, game, sight, console)
        except ValueError as error:
            console.print(printable(str(error)), style="red", highlight=False, markup=False)


def _obey(command: str, game: Play, sight: Sight | None, console: Console) -> None:
    word = command.strip()
    if command.startswith('"'):
        for token in encode(game.env.tokenizer, [command[1:]], False)[0]:
            game.append(token)
    elif word == "b":
        game.back()
    elif word == "?":
        console.print(HELP, style="dim", highlight=False, markup=False)
    elif sight is None:
        raise ValueError("The text is finished: go back with b, or leave with q.")
    elif word == "":
        game.append(game.sampled())
    elif word == "g":
        while game.outcome is None:
            game.append(game.sampled())
    elif word.isdecimal() and 1 <= int(word) <= len(sight.tokens):
        game.append(sight.tokens[int(word) - 1])
    else:
        raise ValueError(f'Expected Enter, a number from 1 to {len(sight.tokens)}, "text, b, g, q or ?, got {word!r}.')


def _choices(game: Play, sight: Sight) -> Group:
    value = "" if sight.value is None else f" · value {sight.value:+.3f}"
    forbidden = f" · {sight.forbidden:,} tokens forbidden" if sight.forbidden else ""
    table = Table(box=None, show_header=False)
    for number, (piece, share) in enumerate(zip(game.pieces(sight.tokens), sight.probabilities, strict=True), 1):
        bar = "█" * round(20 * share)
        table.add_row(f"{number}", Text(repr(piece)), f"{share:6.1%}", Text(bar, "cyan"))
    facts = f"token {len(game.tokens) + 1} · entropy {sight.entropy:.2f} nats{value}{forbidden}"
    return Group(Text(facts, "dim"), table)


def _outcome(info: dict[str, Any]) -> Text:
    end = f" · ended by {info.get('finish_reason')}"
    if WHY in info:
        return Text.assemble((score_of(info), "bold"), end)
    numbers = {
        name: float(x) for name, x in info.items() if isinstance(x, int | float | np.number) and not isinstance(x, bool)
    }
    score = numbers.pop("score", float("nan"))
    rest = "".join(f" · {name.replace('_', ' ')} {x:+.3f}" for name, x in sorted(numbers.items()))
    return Text.assemble((f"score {score:+.3f}", "bold"), f"{rest}{end}")
