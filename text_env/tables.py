"""Rows in files, as prompts and preferences come: JSON lines, JSON, CSV, Parquet, plain lines. All but Parquet may be
gzipped (``.gz`` after the name)."""

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
    """Stands where a row would, if its line can't be read while the others can."""

    reason: str


class NumberedRow(NamedTuple):
    """A row and where it stands: ``"line 7"`` of a text file, counted from 1; elsewhere ``"row 7"``, an index."""

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
        yield NumberedRow(f"line {reader.line_num}", row)  # where it ends: quoted fields may hold line breaks


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
    :param path: of a file, which need not exist.
    :return: which of :data:`FORMATS` its name says it is in; None: none of them.
    """
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in TEXT_READERS or (suffix == PARQUET and path.suffix != ".gz") else None


def read_table(path: Path, what: str) -> list[NumberedRow]:
    """Read a file whose name says its format.

    :param path: for which :func:`table_format` isn't None.
    :param what: it holds, for errors: ``"prompts"``.
    :return: its rows; :class:`BrokenRow` for a line of a ``.jsonl`` file that is no JSON.
    :raises ValueError: if there is no such file, or it as a whole isn't in its format.
    :raises ImportError: for Parquet without pyarrow.
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
        # newline="": the csv module splits lines itself. utf-8-sig: spreadsheets write a byte order mark, others don't.
        opener: Callable[..., IO[str]] = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            return list(TEXT_READERS[suffix](file))
    except (ValueError, csv.Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
        hint = " If it holds one object a line, name it .jsonl." if "Extra data" in str(error) else ""
        raise ValueError(f"Expected {str(path)!r} to be a well-formed {suffix} file: {error}.{hint}") from error


def read_rows(path: Path, what: str) -> list[Any]:
    """As :func:`read_table`, for those to whom every row matters.

    :return: the rows alone.
    :raises ValueError: as there, and for a broken row.
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
