"""The two action spaces of text: tokens, and points among their embeddings.

They are Gymnasium's own spaces in every respect but their ``repr``. An algorithm made for the other kind of action
refuses the space before any code of ours runs, and prints it in its error: so the space says what to use instead.
"""

from __future__ import annotations

import numpy as np
from gymnasium import spaces


class Tokens(spaces.Discrete[np.int64]):
    """One of V tokens.

    :param n_tokens: V.
    """

    def __init__(self, n_tokens: int) -> None:
        super().__init__(n_tokens)

    def __repr__(self) -> str:
        return f"Discrete({self.n}) of tokens (for an algorithm with Box actions use 'TextRLHFContinuous-v0')"


class EmbeddingPoints(spaces.Box):
    """A point among token embeddings, each coordinate in [-1, 1].

    :param dimensions: H.
    """

    def __init__(self, dimensions: int) -> None:
        super().__init__(-1.0, 1.0, (dimensions,), np.float32)

    def __repr__(self) -> str:
        return f"{super().__repr__()} of token embeddings (for an algorithm with Discrete actions use 'TextRLHF-v0')"
