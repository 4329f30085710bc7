"""The Markov decision process: tokens are appended until the text is finished, and then the text is scored.

All dynamics are in this file, as array operations on n episodes at once; :mod:`text_env.env` and
:mod:`text_env.vector_env` present them to Gymnasium. A step changes nothing until everything that can fail has
succeeded, so that the step can be repeated once the cause of an error has been removed.

Notation: n rows, each of which plays one episode after another; L = ``max_prompt_tokens + max_new_tokens`` columns; V
tokens in the vocabulary; k of the n rows, where a method works on some of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from text_env.action_spaces import Tokens
from text_env.constraints import Constraint, Contexts, MinimumLength, all_of, allowed_tokens, make_constraint
from text_env.ends_of_text import ends_of_text
from text_env.finished_texts import FinishedTexts, LoggedByRewards, TrainerState, check_name
from text_env.prompts import Prompt, Prompts, check_text, checked_ids
from text_env.rewards import make_reward, score, score_parts
from text_env.settings import EpisodeSettings, check_integer
from text_env.shaping import PotentialShaping, make_shaping
from text_env.stop_strings import StopStrings
from text_env.streams import TokenStream
from text_env.tokenization import decode, decode_completions, encode, load_tokenizer, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_ACTION = -1
"""The action that leaves a row exactly as it is, in :meth:`text_env.vector_env.TextVectorEnv.step`."""

Observation = dict[str, NDArray[Any]]


def unpaid(max_episode_steps: int, max_new_tokens: int) -> str:
    """
    :param max_episode_steps: the number of steps after which episodes are cut from outside.
    :param max_new_tokens: the response budget, which is greater.
    :return: why that is a mistake, as a message for the user.
    """
    return (
        f"max_episode_steps={max_episode_steps} cuts episodes from outside, before their text is finished, which the "
        f"budget of max_new_tokens={max_new_tokens} allows. The score of an unfinished text is never paid, so the "
        f"reward of such an episode is 0. Leave max_episode_steps out (in gym.make, in register, and as "
        f"gymnasium.wrappers.TimeLimit), and make the budget smaller instead: max_new_tokens={max_episode_steps}."
    )


def checked_seed(seed: Any) -> int | None:
    """
    :param seed: an integer of at least 0, or None.
    :return: the same as a plain ``int``, or None.
    :raises ValueError: if it is neither.
    """
    if seed is None:
        return None
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"Expected a seed to be an integer of at least 0, or None, got {seed!r}.")
    return int(seed)


def checked_options(options: Any) -> dict[str, Any]:
    """
    :param options: the options of a reset: a mapping, or None.
    :return: the same as a dictionary of its own.
    :raises ValueError: if it is neither.
    """
    if not isinstance(options, Mapping | None):
        raise ValueError(f"Expected the reset options to be a mapping from names to values, got {options!r}.")
    return dict(options or {})


class Opening(NamedTuple):
    """How an episode starts.

    :param prompt: the prompt; None: one is drawn.
    :param response: the response tokens that exist already.
    """

    prompt: Prompt | None = None
    response: Sequence[int] = ()


class Outcome(NamedTuple):
    """What a token makes of each of k rows, before anything has happened.

    :param rows: int64 [k], the numbers of the rows.
    :param tokens: integers [k].
    :param rewards: float64 [k].
    :param terminated: bool [k].
    :param infos: one final info for each row that terminates, in order.
    :param potentials: float64 [k], those of the states that follow; NaN: not known yet.
    """

    rows: NDArray[np.int64]
    tokens: NDArray[np.integer[Any]]
    rewards: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    infos: list[dict[str, Any]]
    potentials: NDArray[np.float64]


class Episodes:
    """n episodes side by side.

    :param n: number of rows.
    :param settings: how the episodes go.
    :raises ValueError: for a setting that is out of range, or that names something which does not exist.
    """

    def __init__(self, n: int, settings: EpisodeSettings) -> None:
        check_integer("num_envs", n, 1)
        settings.check()
        for name in settings.metrics or {}:
            check_name(name)
        self.n = n
        self.tokenizer = load_tokenizer(settings.tokenizer)
        self.vocabulary = vocabulary_size(self.tokenizer)
        self.eos_token_ids = ends_of_text(self.tokenizer, settings.eos_token_ids)
        self.eos_token_id = self.eos_token_ids[0]  # the tokenizer's own
        pad = self.tokenizer.pad_token_id
        self.pad_token_id = self.eos_token_id if pad is None else int(pad)
        self.max_new_tokens = settings.max_new_tokens
        self.min_new_tokens = settings.min_new_tokens
        self.constraint: Constraint | None = make_constraint(settings.constraint)
        minimum = MinimumLength(self.min_new_tokens, self.eos_token_ids) if self.min_new_tokens else None
        self._all_constraints = all_of(minimum, self.constraint)
        self.stop = settings.stop_strings
        self._stop_strings = StopStrings(self.stop, self.tokenizer) if self.stop else None
        # Decoded texts contain no special tokens, so stop strings that are special tokens are compared by their ids.
        added = self.tokenizer.added_tokens_decoder
        self._stop_ids = [index for index, token in added.items() if token.special and str(token) in self.stop]
        self._is_end, self._is_stop = np.zeros((2, self.vocabulary), np.bool_)  # of each token
        self._is_end[list(self.eos_token_ids)] = True
        self._is_stop[self._stop_ids] = True
        self.group_size = settings.group_size
        self.prompts = Prompts(
            settings.prompts,
            self.tokenizer,
            settings.max_prompt_tokens,
            settings.overlong_prompts,
            settings.chat_template,
            self.eos_token_ids,
        )
        self.max_prompt_tokens = self.prompts.max_prompt_tokens
        options, limits = dict(settings.reward_kwargs or {}), settings.reward_limits
        self.reward = make_reward(settings.reward, limits, **options)
        metrics = (settings.metrics or {}).items()
        self.metrics = {name: make_reward(metric, limits, **options) for name, metric in metrics}
        self.trainer_state = TrainerState()
        self.shaping: PotentialShaping | None = make_shaping(settings.shaping, limits, **options)

        columns = self.max_prompt_tokens + self.max_new_tokens
        # These counts alone say where a text ends. The tokens can't, since pad may be the same token as eos.
        self._prompt_length = np.ones(n, np.int64)
        self._length = np.ones(n, np.int64)  # prompt and response
        self._first_action = np.ones(n, np.int64)  # where the policy's first token goes
        self._input_ids = np.full((n, columns), self.pad_token_id, np.int64)
        self._attention_mask = np.zeros((n, columns), np.int8)
        self._is_action = np.zeros((n, columns), np.bool_)  # the policy chose the token
        self._prompt: list[Prompt] = [self.prompts[0]] * n
        # Shaping: the potential of each row's state. NaN: not known yet, the row's next step asks for it.
        self._potential = np.full(n, np.nan)
        self.finished = np.ones(n, np.bool_)  # no row plays before its first `start`
        self._group_prompt = self.prompts[0]
        self._group_left = 0

    # Reading the episodes

    def observation_space(self) -> spaces.Space[Observation]:
        """
        :return: the space of one row's observation: the prompt, the response and padding, in this order.
        """
        columns = self._input_ids.shape[1]
        return spaces.Dict(  # type: ignore[return-value]
            {
                "input_ids": spaces.Box(0, self.vocabulary - 1, (columns,), np.int64),
                "attention_mask": spaces.Box(0, 1, (columns,), np.int8),
                # It makes the state Markov: with the mask it says what is left of the budget, and whether EOS counts.
                "prompt_length": spaces.Box(1, self.max_prompt_tokens, (1,), np.int64),
            }
        )

    def action_space(self) -> spaces.Discrete[np.int64]:
        """
        :return: the space of one row's action, the next token.
        """
        return Tokens(self.vocabulary)

    def observe(self, row: int | slice = slice(None)) -> Observation:
        """
        :param row: the number of one row, or a slice of rows.
        :return: the observation, a fresh copy: ``input_ids`` int64 [n, L], ``attention_mask`` int8 [n, L] and
            ``prompt_length`` int64 [n, 1]; of one row without the leading n.
        """
        return {
            "input_ids": self._input_ids[row].copy(),
            "attention_mask": self._attention_mask[row].copy(),
            "prompt_length": self._prompt_length[row, None].copy(),
        }

    def contexts(self, rows: NDArray[np.int64]) -> Contexts:
        """What :meth:`observe` shows of these rows, for a policy that reads token contexts.

        :param rows: int64 [k], the numbers of the rows.
        :return: k contexts, fresh copies.
        """
        length = self._length[rows]
        return Contexts(self._input_ids[rows], length, length - self._prompt_length[rows])

    def action_masks(self) -> NDArray[np.bool_]:
        """
        :return: bool [n, V], a fresh copy, true for the tokens that may follow. In a row whose episode is over, all
            are true.
        :raises ValueError: if the constraint forbids every token after some context, or returns something else than
            such a mask.
        """
        masks = np.ones((self.n, self.vocabulary), np.bool_)
        playing = np.flatnonzero(~self.finished)
        if self._all_constraints is not None and len(playing):
            masks[playing] = allowed_tokens(self._all_constraints, self.contexts(playing), self.vocabulary)
        return masks

    def text(self, row: int) -> tuple[str, str]:
        """
        :param row: the number of a row.
        :return: the text of the prompt, and the text of the response so far.
        """
        return self._prompt[row].text, self._completions([row], self._streams(np.array([row])))[0]

    def prompt(self, row: int) -> Prompt:
        """
        :param row: the number of a row.
        :return: the prompt of the episode that the row is playing or has just finished. A reset that is given it starts
            another episode of the same prompt, with the same columns.
        """
        return self._prompt[row]

    def stream(self, row: int) -> TokenStream:
        """
        :param row: the number of a row.
        :return: the tokens of the episode that the row is playing or has just finished.
        :raises gymnasium.error.ResetNeeded: if the row has not started an episode yet.
        """
        if not self._attention_mask[row, 0]:
            raise gym.error.ResetNeeded(f"Row {row} has not started an episode yet, so it has no tokens: call reset().")
        return self._streams(np.array([row]))[0]

    # The dynamics

    def openings(self, count: int, options: Mapping[str, Sequence[Any] | None]) -> list[Opening]:
        """Check the options of a reset. Nothing is drawn and nothing is changed.

        :param count: the number of episodes that are to be started.
        :param options: ``"prompt"`` and ``"response"``, each a list with one entry per episode, or missing, or None. An
            entry is a text, token ids, or None (a drawn prompt, an empty response). A prompt may also be an entry of
            ``prompts``, which keeps its columns.
        :return: how each of the episodes starts.
        :raises ValueError: for another option or another number of entries, if a prompt is empty or overlong, or if a
            response is finished already.
        """
        if unknown := sorted(set(options) - {"prompt", "response"}, key=str):
            raise ValueError(
                f"Unknown reset options {unknown}; known are 'prompt', 'response' and, for n rows, 'reset_mask'."
            )
        entries: dict[str, Sequence[Any]] = {}
        for name in ("prompt", "response"):
            values = options.get(name)
            entries[name] = [None] * count if values is None else values
            unordered = isinstance(values, str | bytes | Mapping) or not hasattr(entries[name], "__getitem__")
            if unordered or getattr(values, "ndim", 1) == 0 or len(entries[name]) != count:
                raise ValueError(
                    f"Expected options[{name!r}] to be a list with one entry for each of the {count} rows that are "
                    f"reset (None: nothing special), got {values!r}."
                )
        return [
            Opening(self._opening_prompt(prompt), self._opening_response(response))
            for prompt, response in zip(entries["prompt"], entries["response"], strict=True)
        ]

    def _opening_prompt(self, prompt: Any) -> Prompt | None:
        # An entry of `prompts` is taken as it is, with its columns; a text from outside has none.
        return prompt if prompt is None or isinstance(prompt, Prompt) else self.prompts.make(prompt)

    def _opening_response(self, response: str | Sequence[int] | None) -> list[int]:
        if response is None:
            return []
        if isinstance(response, str):
            check_text(response, "the response")
            [ids] = encode(self.tokenizer, [response], add_special_tokens=False)
        else:
            ids = checked_ids(response, self.vocabulary, "response")
        if len(ids) >= self.max_new_tokens:
            cause = f"spends the whole budget of max_new_tokens={self.max_new_tokens} with {len(ids)} tokens"
        elif ends := [token for token in ids[self.min_new_tokens :] if token in self.eos_token_ids]:
            cause = f"holds the end-of-text token {ends[0]}"
        elif any(string in decode(self.tokenizer, [ids])[0] for string in self.stop) or set(ids) & set(self._stop_ids):
            cause = f"holds one of the stop strings {self.stop}"
        else:
            return ids
        raise ValueError(f"Expected a response that can be continued, got {response!r}, which {cause}.")

    def drawn(
        self, openings: Sequence[Opening], generators: Sequence[np.random.Generator], new_group: bool = False
    ) -> list[Opening]:
        """Draw the prompts of the next k episodes, in this order, where none are given.

        A group is ``group_size`` consecutive episodes that share a drawn prompt. Episodes with a given prompt belong to
        no group.

        :param openings: how each episode starts, as :meth:`openings` returns it.
        :param generators: the random generator of each. The episode that opens a group draws the prompt of the group.
        :param new_group: open a new group, as a reset with a seed does.
        :return: the openings, each with a prompt.
        :raises ValueError: if a prompt that is generated cannot be; whatever else the program raises that makes it is
            passed on. Nothing has then changed: the same prompts are drawn the next time.
        """
        before = self._group_prompt, self._group_left, [generator.bit_generator.state for generator in generators]
        try:
            if new_group:
                self.begin_group()
            return [
                opening if opening.prompt else opening._replace(prompt=self._next_prompt(generator))
                for opening, generator in zip(openings, generators, strict=True)
            ]
        except BaseException:
            self._group_prompt, self._group_left, states = before
            for generator, state in zip(generators, states, strict=True):
                generator.bit_generator.state = state
            raise

    def start(self, rows: Sequence[int] | NDArray[np.int64], openings: Sequence[Opening]) -> list[dict[str, Any]]:
        """Start an episode in each of these rows. This cannot fail.

        :param rows: the numbers of k rows.
        :param openings: how each episode starts, as :meth:`drawn` returns it.
        :return: the reset info of each row.
        """
        infos = []
        for row, opening in zip(rows, openings, strict=True):
            prompt = opening.prompt
            assert prompt is not None
            ids = [*prompt.token_ids, *opening.response]
            self._prompt[row] = prompt
            self._prompt_length[row], self._length[row] = len(prompt.token_ids), len(ids)
            self._first_action[row] = len(ids)
            self._input_ids[row, : len(ids)] = ids
            self._input_ids[row, len(ids) :] = self.pad_token_id
            self._attention_mask[row] = 0
            self._attention_mask[row, : len(ids)] = 1
            self._is_action[row] = False  # whoever gave the response, the policy did not choose it here
            self._potential[row] = np.nan
            self.finished[row] = False
            infos.append({"prompt": prompt.text})
        return infos

    def begin_group(self) -> None:
        """Let the next episode open a new group, even if the current one is not complete."""
        self._group_left = 0

    def _next_prompt(self, generator: np.random.Generator) -> Prompt:
        if self._group_left == 0:
            self._group_prompt = self.prompts[int(generator.integers(len(self.prompts)))]
            self._group_left = self.group_size
        self._group_left -= 1
        return self._group_prompt

    def tokens(self, actions: Any) -> NDArray[np.integer[Any]]:
        """
        :param actions: n integers.
        :return: the actions as an array [n].
        :raises ValueError: if they are not integers, or not n of them.
        """
        tokens = np.asarray(actions)
        if tokens.shape != (self.n,) or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"Expected {self.n} actions, integers of shape ({self.n},), got {actions!r}.")
        return tokens

    def outcome(self, rows: NDArray[np.int64], tokens: NDArray[np.integer[Any]]) -> Outcome:
        """What one more token makes of each of these rows: the texts that it finishes are scored, and the rewards are
        shaped. Nothing changes until :meth:`append`.

        :param rows: int64 [k], the numbers of different rows.
        :param tokens: integers [k].
        :return: what :meth:`append` takes.
        :raises ValueError: if a token is outside the vocabulary.
        :raises gymnasium.error.ResetNeeded: if one of the episodes has ended already.
        :raises text_env.rewards.RewardError: if a reward or a potential fails.
        """
        if len(rows) and (tokens.min() < 0 or tokens.max() >= self.vocabulary):
            wrong = (tokens < 0) | (tokens >= self.vocabulary)
            raise ValueError(
                f"Expected every action to be a token in [0, {self.vocabulary}), got {tokens[wrong].tolist()} for "
                f"rows {rows[wrong].tolist()}."
            )
        if (over := self.finished[rows]).any():
            raise gym.error.ResetNeeded(
                f"A step after the end: the episodes of rows {rows[over].tolist()} are over or were never started. "
                f"Start new ones with reset(), in a vector environment with reset(options={{'reset_mask': ...}})."
            )
        before = self._length[rows] - self._prompt_length[rows]  # response tokens until now
        eos = self._is_end[tokens] & (before >= self.min_new_tokens)
        terminated = eos | (before + 1 >= self.max_new_tokens)
        stopped = np.zeros(len(rows), np.bool_)
        if self._stop_strings is not None:
            stopped = self._stops(rows, tokens) | self._is_stop[tokens]
            terminated |= stopped

        rewards = np.zeros(len(rows))
        infos: list[dict[str, Any]] = []
        if terminated.any():
            reasons = np.where(eos, "eos", np.where(stopped, "stop", "length"))[terminated].tolist()
            rewards[terminated], infos = self.finish(rows[terminated], tokens[terminated], reasons)
        potentials = self._potential[rows]
        if self.shaping is not None:
            shaped, potentials = self._shape(self.shaping, rows, tokens, terminated)
            rewards += shaped
        return Outcome(rows, tokens, rewards, terminated, infos, potentials)

    def append(self, outcome: Outcome) -> None:
        """Append the tokens. This cannot fail.

        :param outcome: what :meth:`outcome` has returned. Nothing may have changed since.
        """
        rows = outcome.rows
        columns = self._length[rows]  # where the tokens go
        self._potential[rows] = outcome.potentials
        self._input_ids[rows, columns] = outcome.tokens
        self._attention_mask[rows, columns] = 1
        self._is_action[rows, columns] = True
        self._length[rows] = columns + 1
        self.finished[rows] = outcome.terminated

    def finish(
        self, rows: NDArray[np.int64], tokens: NDArray[np.integer[Any]], reasons: Sequence[str]
    ) -> tuple[NDArray[np.float64], list[dict[str, Any]]]:
        """Score the texts that end with these tokens, which are not appended yet. Each reward is called once.

        :param rows: int64 [k].
        :param tokens: integers [k].
        :param reasons: for each row ``"eos"``, ``"stop"`` or ``"length"``.
        :return: scores float64 [k], and the final info of each row.
        :raises text_env.rewards.RewardError: if a reward fails.
        """
        logged = LoggedByRewards(len(rows), self.metrics)
        extras = {"trainer_state": self.trainer_state, "log_metric": logged.metric, "log_extra": logged.extra}
        texts = replace(self._texts(rows, self._streams(rows, tokens)), extras=extras)
        numbers = score_parts(self.reward, texts)
        numbers |= {name: score(metric, texts) for name, metric in self.metrics.items()}
        infos = [
            {
                "prompt": texts.prompts[index],
                "completion": texts.completions[index],
                "finish_reason": reason,
                # A part of a weighted sum that does not apply to a text has no number there.
                **{name: float(values[index]) for name, values in numbers.items() if not np.isnan(values[index])},
                **logged.of(index),
            }
            for index, reason in enumerate(reasons)
        ]
        return numbers["score"], infos

    def _shape(
        self,
        shaping: PotentialShaping,
        rows: NDArray[np.int64],
        tokens: NDArray[np.integer[Any]],
        terminated: NDArray[np.bool_],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What shaping pays for these tokens, which are not appended yet. The potential is called once at most.

        :return: the payments F, float64 [k], and the potentials of the states that follow, float64 [k].
        """
        before = self._length[rows] - self._prompt_length[rows]
        known = self._potential[rows]
        # The potential of an episode's first state is not known yet: `start` must not fail, so it calls no potential.
        unknown = np.isnan(known)
        # With `every=k` the potential changes at every k-th token only, and is not called in between.
        due = ~terminated & (shaping.seen(before + 1) == before + 1)
        seen = shaping.seen(before[unknown]).tolist()
        starts = [stream.cut(length) for stream, length in zip(self._streams(rows[unknown]), seen, strict=True)]
        streams = [*starts, *self._streams(rows[due], tokens[due])]
        asked = np.zeros(0)
        if streams:
            asked = shaping.potentials(self._texts(np.concatenate([rows[unknown], rows[due]]), streams))
        known[unknown], latest = np.split(asked, [int(unknown.sum())])
        following = np.where(terminated, 0.0, known)
        following[due] = latest
        return shaping.rewards(known, following), following

    def _streams(self, rows: NDArray[np.int64], tokens: NDArray[np.integer[Any]] | None = None) -> list[TokenStream]:
        """The streams of these rows; with ``tokens``, as they will be once the tokens are appended."""
        ends = [[]] * len(rows) if tokens is None else tokens[:, None].tolist()
        lengths, prompt_lengths = self._length[rows].tolist(), self._prompt_length[rows].tolist()
        return [
            TokenStream(
                (*self._input_ids[row, :length].tolist(), *end),
                (*self._is_action[row, :length].tolist(), *[True] * len(end)),
                prompt_length,
            )
            for row, length, prompt_length, end in zip(rows.tolist(), lengths, prompt_lengths, ends, strict=True)
        ]

    def _texts(self, rows: NDArray[np.int64], streams: Sequence[TokenStream]) -> FinishedTexts:
        """The texts of these rows with these streams, in the form that rewards take."""
        prompts = [self._prompt[row] for row in rows]
        return FinishedTexts(
            prompts=[prompt.text for prompt in prompts],
            completions=self._completions(rows, streams),
            completion_ids=[list(stream.completion_ids) for stream in streams],
            columns={name: [prompt.columns[name] for prompt in prompts] for name in self.prompts.columns},
            # Either all prompts of a set are conversations or none is: `Prompts` sees to it.
            messages=[prompt.messages for prompt in prompts if prompt.messages is not None] or None,
        )

    def _completions(self, rows: Iterable[int], streams: Sequence[TokenStream]) -> list[str]:
        # The end is no part of the text, even if the tokenizer does not count it among its special tokens.
        streams = [self._without_end(stream) for stream in streams]
        return decode_completions(self.tokenizer, streams, [self._prompt[row].decoded for row in rows])

    def _without_end(self, stream: TokenStream) -> TokenStream:
        before = len(stream.completion_ids) - 1
        ended = before >= self.min_new_tokens and stream.token_ids[-1] in self.eos_token_ids
        return stream.cut(before) if ended else stream

    def _stops(self, rows: NDArray[np.int64], tokens: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """Whether these tokens, which are not appended yet, complete a stop string in the response."""
        stop = self._stop_strings
        assert stop is not None
        # Before its last token a response held no stop string, or it would have ended. Of one that `reset` was given,
        # this is certain only from the policy's first token on.
        first, length, prompt = self._first_action[rows], self._length[rows], self._prompt_length[rows]
        stopped = stop.may_end_with(tokens) | ((first == length) & (first > prompt))
        if not stopped.any():
            return stopped
        rows, tokens, first, length, prompt = (array[stopped] for array in (rows, tokens, first, length, prompt))
        complete = (first == prompt) & (length - first + 2 <= stop.n_tail)
        starts = np.where(complete, first - 1, np.maximum(first, length + 1 - stop.n_tail))
        bounds = zip(rows.tolist(), starts.tolist(), length.tolist(), tokens.tolist(), strict=True)
        tails = [[*self._input_ids[row, start:end].tolist(), token] for row, start, end, token in bounds]
        doubtful = np.array(stop.may_be_new(tails, complete.tolist()), np.bool_)
        texts = self._completions(rows[doubtful], self._streams(rows[doubtful], tokens[doubtful]))
        doubtful[doubtful] = [stop.within(text) for text in texts]
        stopped[stopped] = doubtful
        return stopped


class EpisodesFace:
    """What the scalar and the vector environment both show of their episodes. None of these attributes can be set."""

    episodes: Episodes

    def stream(self, row: int = 0) -> TokenStream:
        """The tokens of an episode and which of them the policy chose, as far as the episode has been played.

        :param row: the number of the row.
        :return: the tokens of the episode that the row is playing or has just finished. If a row is reset in the step
            that ends its episode (``AutoresetMode.SAME_STEP``), this is the new episode.
        :raises gymnasium.error.ResetNeeded: if the row has not started an episode yet.
        """
        return self.episodes.stream(row)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer whose ids the actions are."""
        return self.episodes.tokenizer

    @property
    def eos_token_id(self) -> int:
        """The tokenizer's eos token, which ends a response."""
        return self.episodes.eos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a response, the tokenizer's eos token first."""
        return self.episodes.eos_token_ids

    @property
    def pad_token_id(self) -> int:
        """The token that fills ``input_ids`` where ``attention_mask`` is 0. It may equal ``eos_token_id``."""
        return self.episodes.pad_token_id

    @property
    def max_prompt_tokens(self) -> int:
        """The length of the longest prompt, in tokens."""
        return self.episodes.max_prompt_tokens

    @property
    def max_new_tokens(self) -> int:
        """The response budget, in tokens."""
        return self.episodes.max_new_tokens

    @property
    def min_new_tokens(self) -> int:
        """The number of response tokens before which an EOS ends nothing."""
        return self.episodes.min_new_tokens

    @property
    def constraint(self) -> Constraint | None:
        """The constraint on the tokens that may follow a context, ``min_new_tokens`` aside; None: there is none."""
        return self.episodes.constraint

    @property
    def group_size(self) -> int:
        """The number of consecutive episodes that share a prompt."""
        return self.episodes.group_size

    @property
    def prompts(self) -> Prompts:
        """The tokenised prompts that episodes draw from."""
        return self.episodes.prompts

    @property
    def reward(self) -> Any:
        """The reward, resolved from its name to a callable on batches of texts."""
        return self.episodes.reward

    @property
    def shaping(self) -> PotentialShaping | None:
        """The shaping of the rewards, its potential resolved to a callable; None: rewards are not shaped."""
        return self.episodes.shaping
