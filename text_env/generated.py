"""Problems that a program makes when they are asked for, without end, and the part of them that is held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Literal, get_args

Split = Literal["train", "eval"]

HELD_OUT_SHARE = 16
"""One problem of so many is held out, where nothing else is asked for."""

ENDLESS = 2**31
"""The number of problems where no number is asked for."""

ATTEMPTS = 1024
"""The number of problems that are tried for each one that is wanted, until it belongs to the split."""


def split_of(prompt: str, one_in: int = HELD_OUT_SHARE) -> Split:
    """
    :param prompt: the text of a problem.
    :param one_in: one problem of so many is held out.
    :return: the part that the problem belongs to. It depends on nothing but the text: whatever seeds the problems of
        training and of evaluation are made from, none is in both parts.
    """
    digest = blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "train" if int.from_bytes(digest, "little") % one_in else "eval"


def check_split(split: Any) -> None:
    """
    :param split: the name of a part.
    :raises ValueError: if it is neither ``"train"`` nor ``"eval"``.
    """
    if split not in get_args(Split):
        raise ValueError(f"Expected split to be 'train' or 'eval' (the held-out part), got {split!r}.")


class GeneratedPrompts(Sequence[dict[str, Any]]):
    """A sequence of problems, each of which is made when it is asked for, and is the same whenever it is.

    :param make: from a number of at least 0 to a problem, a mapping with the keys ``"prompt"`` and, usually,
        ``"answer"``. It must give the same problem for the same number.
    :param split: the part of the problems that the sequence consists of, as :func:`split_of` says.
    :param size: the number of problems; None: without end, which is to say :data:`ENDLESS` of them.
    :param instruction: what follows the text of each problem in its prompt. The split does not depend on it.
    :param one_in: one problem of so many is held out. To find one, so many have to be made: less than the default suits
        a program that is slow.
    :raises ValueError: if the split or the size is out of range.
    """

    def __init__(
        self,
        make: Callable[[int], Mapping[str, Any]],
        split: Split = "train",
        size: int | None = None,
        instruction: str = "",
        one_in: int = HELD_OUT_SHARE,
    ) -> None:
        check_split(split)
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(
                f"Expected size, the number of problems, to be at least 1 or None (endless), got {size!r}."
            )
        self._make, self.split, self._instruction, self._one_in = make, split, instruction, one_in
        self._size = ENDLESS if size is None else size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"Expected an index below {len(self)}, got {index}.")
        return next(self.candidates(index % len(self)))

    def candidates(self, index: int) -> Iterator[dict[str, Any]]:
        """
        :param index: the place of a problem in the sequence, at least 0.
        :return: the problems that may stand in this place, the first of which does; the others are for whoever cannot
            use the first, because it is too long, for example.
        :raises ValueError: if there are none: the program has no problems that belong to this split.
        """
        found = False
        for number in range(index * ATTEMPTS, (index + 1) * ATTEMPTS):
            row = dict(self._make(number))
            if split_of(row["prompt"], self._one_in) == self.split:
                found = True
                yield {**row, "prompt": row["prompt"] + self._instruction}
        if not found:
            raise ValueError(
                f"None of {ATTEMPTS} problems belongs to the split {self.split!r}: there are too few different ones. "
                "Make them more varied."
            )
