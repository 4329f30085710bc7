"""Reading tables of prompts and of preferences: from files (JSON lines, JSON, CSV, Parquet, plain lines), and from live
objects (data frames, Arrow tables, columns).

All file formats but Parquet may be gzipped (``.gz`` after the name).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

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


def rows_of(table: Any, what: str, columns: Iterable[str]) -> Iterable[Any]:
    """The rows of a live table. Many kinds of table iterate over the names or the contents of their columns instead.

    :param table: a data frame (pandas, polars, or another with Arrow's ``__arrow_c_stream__``), an Arrow table or
        array, a mapping from the names of columns to columns of equal length, or anything that iterates over its rows,
        such as a list or a ``datasets.Dataset``.
    :param what: what the table holds, for error messages, for example ``"prompts"``.
    :param columns: names of columns, all of which are there if a mapping holds columns.
    :return: the rows. Those of tables with columns are mappings from the columns' names, with None where a table has no
        value, be it that pandas marks this by NaN.
    :raises ValueError: if the object has no rows, or has them in no order that is the same in every process.
    """
    kind = f"{type(table).__module__.partition('.')[0]}.{type(table).__name__}"
    if hasattr(table, "to_dicts"):  # polars.DataFrame
        return list(table.to_dicts())
    if hasattr(table, "to_pylist"):  # pyarrow's tables, record batches and arrays
        return list(table.to_pylist())
    if hasattr(table, "to_dict") and hasattr(table, "columns") and hasattr(table, "iloc"):  # pandas.DataFrame
        return [
            {name: _unwrapped(cell) for name, cell in row.items()}
            for row in _none_where_missing(table).to_dict("records")
        ]
    if isinstance(table, Mapping):
        return _rows_of_columns(table, what, list(columns))
    # A datasets.Dataset has a column_names too, and iterates over its rows.
    if hasattr(table, "__arrow_c_stream__") and not hasattr(table, "column_names"):
        try:
            import pyarrow
        except ImportError as error:
            raise ImportError(f'Reading {what} from {kind} needs pyarrow: pip install "textrlhf[reward]"') from error
        return list(pyarrow.table(table).to_pylist())
    if isinstance(table, str | bytes | bytearray | io.IOBase) or not isinstance(table, Iterable):
        raise ValueError(
            f"Expected {what} to be a name, a file's path, a table or a list of rows, got {type(table).__name__}."
        )
    if isinstance(table, AbstractSet):
        raise ValueError(
            f"Expected {what} in an order, got {kind}, whose order differs from process to process: use a list."
        )
    if hasattr(table, "columns") and not callable(table.columns):
        raise ValueError(
            f"Expected {what} as rows, got {kind}, a table of an unknown kind: turn it into a list of mappings, one "
            "for each row."
        )
    return table


def _rows_of_columns(table: Mapping[Any, Any], what: str, columns: list[str]) -> list[dict[Any, Any]]:
    values = {name: _listed(column) for name, column in dict(table).items()}
    lengths = {name: len(column) for name, column in values.items() if isinstance(column, list | tuple)}
    if not set(columns) <= set(lengths) or len(lengths) < len(values) or len(set(lengths.values())) != 1:
        named = " and ".join(map(repr, columns))
        raise ValueError(
            f"Expected {what} to be a list of rows, or a mapping from names to columns of equal length, {named} among "
            f"them; got {type(table).__name__} with {', '.join(f'{k!r}: {type(v).__name__}' for k, v in table.items())}"
            f". A data set with splits is given as one of them, data[{next(iter(table), 'train')!r}]."
        )
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def _listed(column: Any) -> Any:
    """A column as a list, if it is a pandas.Series, an array or the like; anything else as it is."""
    if hasattr(column, "notna"):
        return [_unwrapped(cell) for cell in _none_where_missing(column).tolist()]
    return column.tolist() if hasattr(column, "tolist") else column


def _none_where_missing(table: Any) -> Any:
    """A data frame or a column of pandas, which would turn None back into NaN in a column of numbers."""
    return table.astype(object).where(table.notna(), None)


def _unwrapped(cell: Any) -> Any:
    """A cell, whose list pandas.read_parquet gives as an array."""
    return cell.tolist() if isinstance(cell, np.ndarray) else cell
