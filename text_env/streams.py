"""The tokens of an episode, and which of them the policy chose.

The prompt, the beginning of a response that ``reset`` was given, the tokens that the policy writes, and tokens that an
environment may write between them are one stream: each token stands where it was written, and a mask says whether the
policy chose it.

Notation: T tokens in a stream, of which the first P are the prompt.
"""

from __future__ import annotations

from typing import NamedTuple


class TokenStream(NamedTuple):
    """The tokens of one episode, as far as it has been played.

    :param token_ids: the prompt and everything that follows it, T integers.
    :param is_action: T booleans, true where the policy chose the token. They are false in the prompt and in the
        beginning of a response that ``reset`` was given.
    :param prompt_length: the number P of tokens in the prompt.
    """

    token_ids: tuple[int, ...]
    is_action: tuple[bool, ...]
    prompt_length: int

    @property
    def completion_ids(self) -> tuple[int, ...]:
        """The T − P token ids that follow the prompt, whoever wrote them."""
        return self.token_ids[self.prompt_length :]

    def appended(self, token_id: int, is_action: bool = True) -> TokenStream:
        """
        :param token_id: the next token.
        :param is_action: whether the policy chose it.
        :return: the stream with that token at its end.
        """
        return TokenStream((*self.token_ids, token_id), (*self.is_action, is_action), self.prompt_length)

    def cut(self, n_completion: int) -> TokenStream:
        """
        :param n_completion: a number of tokens, at most T − P.
        :return: the stream as it was when the completion had so many tokens.
        """
        end = self.prompt_length + n_completion
        return TokenStream(self.token_ids[:end], self.is_action[:end], self.prompt_length)
