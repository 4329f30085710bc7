"""The two action spaces of text: tokens, and points among their embeddings.

Both are Gymnasium's own spaces except for their ``repr``. An algorithm that is made for the other kind of action
refuses the space before any code of this package runs, and its error prints the space. So the ``repr`` says which
environment to use instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from gymnasium import spaces

if TYPE_CHECKING:
    Discrete: TypeAlias = spaces.Discrete[np.int64]
else:
    Discrete = spaces.Discrete  # below Gymnasium 1.4 it takes no type


class Tokens(Discrete):
    """One of V tokens.

    :param n_tokens: the size V of the vocabulary.
    """

    def __init__(self, n_tokens: int) -> None:
        super().__init__(n_tokens)

    def __repr__(self) -> str:
        return f"Discrete({self.n}) of tokens (for an algorithm with Box actions use 'TextRLHFContinuous-v0')"


class EmbeddingPoints(spaces.Box):
    """A point among token embeddings, each coordinate in [-1, 1].

    :param dimensions: the size H of an embedding.
    """

    def __init__(self, dimensions: int) -> None:
        super().__init__(-1.0, 1.0, (dimensions,), np.float32)

    def __repr__(self) -> str:
        return f"{super().__repr__()} of token embeddings (for an algorithm with Discrete actions use 'TextRLHF-v0')"
