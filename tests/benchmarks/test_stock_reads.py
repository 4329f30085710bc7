"""The count behind the bound of stock SB3's speed-up, by hand and in miniature."""

from __future__ import annotations

import numpy as np
import pytest

from agents.models.contexts import Contexts
from benchmarks.stock_reads import Reads, main, reads


def test_reads_are_counted_as_by_hand() -> None:
    """Two texts, 5 6 7 8 and 5 6 9, of which three and one contexts are in the minibatch."""
    input_ids = np.array([[5, 6, 7, 8], [5, 0, 0, 0], [5, 6, 7, 0], [5, 6, 9, 0]])
    contexts = Contexts(input_ids, np.array([4, 1, 3, 3]), np.array([3, 0, 2, 2]))
    # 4 × 4 columns; two sequences of 4 columns; 5, 56, 567, 5678, 569.
    assert reads(contexts) == Reads(actions=4, plain=16, ours=8, least=5)


def test_the_table_has_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--episodes", "4", "--response", "4"])
    shown = capsys.readouterr().out
    assert "with EpisodeBuffer" in shown
    [step] = [line for line in shown.splitlines() if "a step" in line]
    # Four contexts of 8 to 11 tokens in a minibatch of plain reading; one whole text in one of the buffer's.
    assert int(step.split("│")[2]) <= 4 * 11
    assert int(step.split("│")[5]) == 11
