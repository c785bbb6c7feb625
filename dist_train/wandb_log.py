"""Reads the rows that a W&B run has kept in its folder, which tell a resumed training where to go on.

The file is a 7-byte header, then LevelDB log framing in blocks of 32 KiB, each record a protocol buffer; a run that
was killed leaves a cut-off end, which is where reading stops.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32 * 1024, 7
FULL, LAST = 1, 4


def last_steps(folder: Path) -> dict[str, int]:
    """Return for each key the last `step` that the runs in `folder` (wandb/) have logged it at."""
    last: dict[str, int] = {}
    for file in folder.glob("*run-*/*.wandb"):
        for row in read_rows(file):
            for key in row.keys() - {"step"} if isinstance(row.get("step"), int) else ():
                last[key] = max(last.get(key, -1), row["step"])
    return last


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the logged rows, in order."""
    for record in read_records(file):
        if record.HasField("history"):
            row: dict[str, Any] = {}
            for item in record.history.item:
                key, *rest = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                row[key] = {**row.get(key, {}), rest[0]: value} if rest else value
            yield row


def read_records(file: Path) -> Iterator[Any]:
    """Yield W&B's records up to the end, or to where the file is damaged."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    protocol: Any = wandb_internal_pb2
    data, position, parts = file.read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (FULL, LAST):
            try:
                yield protocol.Record.FromString(parts)
            except DecodeError:
                return
            parts = b""
