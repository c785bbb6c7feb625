"""Tables of predictions: rows appended to a CSV, JSON lines or parquet file, which appears when all are written."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from dist_train.config import InputError

ENDINGS = (".csv", ".jsonl", ".parquet")

Row = Mapping[str, Any]
Write = Callable[[Sequence[Row]], None]


@contextmanager
def open_table(out: Path | None, columns: Mapping[str, type]) -> Iterator[Write]:
    """Give a function that appends rows to `out` (None: CSV on standard output).

    columns: names and types (str, int or float; any value may be None). Raises InputError for an ending other than
    ENDINGS, a folder that does not exist or cannot be written, and parquet without pyarrow.
    """
    if out is None:
        yield _csv_writer(sys.stdout, columns)
        return
    if out.suffix not in ENDINGS:
        raise InputError(f"--out: {out} ends in none of {', '.join(ENDINGS)}")
    if not out.parent.is_dir() or out.is_dir():
        raise InputError(f"--out: {out} cannot be written: {'a folder' if out.is_dir() else 'no such folder'}")
    aside = out.with_name(f".{out.name}")
    try:
        aside.touch()
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written: {error.strerror}") from error
    try:
        if out.suffix == ".parquet":
            with _parquet_writer(aside, columns) as write:
                yield write
        else:
            with aside.open("w", encoding="utf-8", newline="") as file:
                yield _csv_writer(file, columns) if out.suffix == ".csv" else _jsonl_writer(file)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)


def _csv_writer(file: TextIO, columns: Mapping[str, type]) -> Write:
    writer = csv.DictWriter(file, list(columns))
    writer.writeheader()
    return writer.writerows


def _jsonl_writer(file: TextIO) -> Write:
    return lambda rows: file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def _parquet_writer(file: Path, columns: Mapping[str, type]) -> Iterator[Write]:
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter
    except ImportError as error:
        raise InputError("--out: parquet needs pyarrow: pip install 'dist_train[predict]'") from error
    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema([(name, kinds[kind]) for name, kind in columns.items()])
    with ParquetWriter(file, schema) as writer:
        yield lambda rows: writer.write_table(pa.Table.from_pylist(list(rows), schema))
