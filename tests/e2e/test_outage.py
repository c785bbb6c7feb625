"""W&B servers that are not there, never answer, hang up, fail or deny the login: the training does not care."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest
from training import Training
from wandb_file import KEYS, find_runs, read_history

from dist_train.tracking import EXIT_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.faults]

KEY = "0123456789" * 4
ANSWERS = {"errs": b"500 Internal Server Error", "denies": b"401 Unauthorized"}


def serve(kind: str) -> int:
    """Start a server of one kind in a thread and return its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    port: int = listener.getsockname()[1]
    held: list[socket.socket] = []

    def answer() -> None:
        while True:
            client, _ = listener.accept()
            held.append(client)
            if kind in ANSWERS:
                client.recv(65536)
                client.sendall(b"HTTP/1.1 %b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % ANSWERS[kind])
            if kind != "hangs":
                client.close()

    threading.Thread(target=answer, daemon=True).start()
    return port


def seconds(run_dir: Path, *options: str) -> tuple[float, Training]:
    started = time.monotonic()
    training = Training(run_dir, "--track.tool", "wandb", *options)
    assert training.end(300) == 0, training.output[-3000:]
    return time.monotonic() - started, training


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> float:
    return seconds(tmp_path_factory.mktemp("plain") / "run", "--track.wandb", "disabled")[0]


@pytest.mark.parametrize("kind", ["hangs", "errs", "denies", "hangs up", "unknown"])
def test_a_broken_server_costs_no_more_than_the_stated_seconds_at_the_end(tmp_path, monkeypatch, undisturbed, kind):
    monkeypatch.setenv(
        "WANDB_BASE_URL", f"http://{'no.host.invalid' if kind == 'unknown' else '127.0.0.1'}:{serve(kind)}"
    )
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run_dir = tmp_path / "run"
    took, training = seconds(run_dir)
    assert took < 1.1 * undisturbed + EXIT_SECONDS
    assert training.output.count("cannot be reached") == 1
    assert "upload it with: wandb sync" in training.output
    rows = [row for file in find_runs(run_dir) for row in read_history(file)]
    assert {key for row in rows for key in row} >= KEYS | {"curves", "predictions"}
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(2, 13, 2))
    written = [file.read_bytes() for file in run_dir.rglob("*") if file.is_file()]
    assert not any(KEY.encode() in text for text in (*written, training.output.encode()))
