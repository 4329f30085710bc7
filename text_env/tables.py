"""Reading tables of prompts and of preferences from files: JSON lines, JSON, CSV, Parquet and plain lines.

All formats but Parquet may be gzipped (``.gz`` after the name).
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

PARQUET = ".parquet"


class BrokenRow(NamedTuple):
    """Takes the place of a row whose line can't be read, in a file whose other lines can.

    :param reason: why the line can't be read.
    """

    reason: str


class NumberedRow(NamedTuple):
    """A row and its place.

    :param where: ``"line 7"`` in a text file, counted from 1; ``"row 7"`` in other tables, counted from 0.
    :param row: the row, or a :class:`BrokenRow`.
    """

    where: str
    row: Any


def _json_lines(file: IO[str]) -> Iterator[NumberedRow]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                row = BrokenRow(f"not JSON: {error}")
            yield NumberedRow(f"line {number}", row)


def _json(file: IO[str]) -> Iterator[NumberedRow]:
    rows = json.load(file)
    if not isinstance(rows, list):
        raise ValueError(f"its rows must stand in a list, [...], but it holds {type(rows).__name__}")
    yield from _numbered(rows)


def _csv(file: IO[str]) -> Iterator[NumberedRow]:
    reader = csv.DictReader(file)
    for row in reader:
        # The line in which the row ends: quoted fields may hold line breaks.
        yield NumberedRow(f"line {reader.line_num}", row)


def _lines(file: IO[str]) -> Iterator[NumberedRow]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield NumberedRow(f"line {number}", line.rstrip("\r\n"))


def _numbered(rows: list[Any]) -> Iterator[NumberedRow]:
    return (NumberedRow(f"row {index}", row) for index, row in enumerate(rows))


TEXT_READERS: dict[str, Callable[[IO[str]], Iterator[NumberedRow]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".txt": _lines,
}
FORMATS = (*TEXT_READERS, PARQUET)


def table_format(path: Path) -> str | None:
    """
    :param path: the path of a file, which need not exist.
    :return: the one of :data:`FORMATS` that the file's name ends with, ``.gz`` aside; None: the name has another end.
    """
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in TEXT_READERS or (suffix == PARQUET and path.suffix != ".gz") else None


def read_table(path: Path, what: str) -> list[NumberedRow]:
    """Read a table from a file whose name tells its format.

    :param path: the path of the file, for which :func:`table_format` is not None.
    :param what: what the file holds, for error messages, for example ``"prompts"``.
    :return: the rows; a :class:`BrokenRow` for each line of a ``.jsonl`` file that is not JSON.
    :raises ValueError: if there is no such file, or the file as a whole is not in its format.
    :raises ImportError: if the file is in Parquet and pyarrow is not installed.
    """
    suffix = table_format(path)
    assert suffix is not None
    if not path.is_file():
        raise ValueError(
            f"Expected {what} to name a file, but there is no file {str(path)!r} (looked in {Path.cwd()})."
        )
    try:
        if suffix == PARQUET:
            return list(_numbered(_parquet(path)))
        # newline="": the csv module splits lines itself. utf-8-sig: spreadsheets may write a byte order mark.
        opener: Callable[..., IO[str]] = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            return list(TEXT_READERS[suffix](file))
    except (ValueError, csv.Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
        hint = " If it holds one object a line, name it .jsonl." if "Extra data" in str(error) else ""
        raise ValueError(f"Expected {str(path)!r} to be a well-formed {suffix} file: {error}.{hint}") from error


def read_rows(path: Path, what: str) -> list[Any]:
    """Read a table in which no row may be broken.

    :param path: as for :func:`read_table`.
    :param what: as for :func:`read_table`.
    :return: the rows.
    :raises ValueError: for the reasons of :func:`read_table`, and for a broken row.
    :raises ImportError: if the file is in Parquet and pyarrow is not installed.
    """
    rows = read_table(path, what)
    for where, row in rows:
        if isinstance(row, BrokenRow):
            raise ValueError(
                f"Expected {str(path)!r} to be a well-formed {table_format(path)} file: {where} is {row.reason}."
            )
    return [row for _, row in rows]


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f'Reading {str(path)!r} needs pyarrow: pip install "textrlhf[reward]"') from error
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows
