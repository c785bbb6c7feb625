"""Reads W&B's offline file: 7 bytes of header, then LevelDB log framing in blocks of 32 KiB."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32 * 1024, 7
FULL, LAST = 1, 4
# what every training logs; its pictures come at the end
KEYS = {
    "train/loss",
    "train/accuracy",
    "train/lr",
    "train/images_per_second",
    "train/grad_norm",
    "valid/loss",
    "valid/accuracy",
    "valid/macro_f1",
    "epoch",
    "step",
}


def read_records(file: Path) -> Iterator[Record]:
    data, position, parts = file.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (FULL, LAST):
            yield Record.FromString(parts)
            parts = b""


def find_runs(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))


def read_history(file: Path) -> list[dict[str, Any]]:
    """Return the logged rows, in order."""
    rows = []
    for record in read_records(file):
        if record.HasField("history"):
            row: dict[str, Any] = {}
            for item in record.history.item:
                key, *rest = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                row[key] = {**row.get(key, {}), rest[0]: value} if rest else value
            rows.append(row)
    return rows


def read_config(file: Path) -> dict[str, Any]:
    """Return the run's configuration."""
    config: dict[str, Any] = {}
    for record in read_records(file):
        for update in (record.config, record.run.config):
            for item in update.update:
                config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return config
