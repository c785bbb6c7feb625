"""bench/scaling.py: its arithmetic, its buckets beside DDP's own, and its command."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.nn.parallel import DistributedDataParallel

from dist_train.model import FaceModel

BENCH = ROOT / "bench"
GIGABIT = 125e6


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("scaling")


@pytest.fixture
def steps(scaling):
    return importlib.import_module("steps")


def test_a_ring_sends_fewer_bytes_and_a_tree_fewer_messages(scaling):
    link = scaling.Link(bandwidth=GIGABIT, latency=1e-3)
    assert scaling.all_reduce(125_000_000, 2, link) == {"ring": pytest.approx(1.002), "tree": pytest.approx(2.002)}
    many = scaling.all_reduce(1000, 1024, link)
    assert many["tree"] == pytest.approx(0.020, rel=1e-2) and many["ring"] == pytest.approx(2.046, rel=1e-2)
    inside = scaling.Link(bandwidth=1e12, latency=0)
    assert scaling.all_reduce(1000, 8, link, per_node=8, inside=inside)["ring"] < 1e-8
    assert scaling.all_reduce(1000, 16, link, per_node=8, inside=inside)["ring"] == pytest.approx(0.002, rel=1e-1)


def test_the_all_reduce_hides_behind_the_backward_pass_but_for_its_end(scaling):
    step = scaling.Step(before=1.0, backward=2.0, after=0.5, ready=[(0.5, 125_000_000), (2.0, 12_500_000)])
    free = scaling.Link(float("inf"), 0.0)
    assert [scaling.predict(step, count, free) for count in (1, 2, 1024)] == [3.5] * 3
    link = scaling.Link(GIGABIT, 0.0)
    assert scaling.predict(step, 2, link) == pytest.approx(3.5 + 0.1)  # the last bucket
    assert scaling.predict(step, 2, link._replace(bandwidth=GIGABIT / 10)) == pytest.approx(1 + 0.5 + 10 + 1 + 0.5)
    busy = link._replace(host=1e-8)  # the processor is kept from computing for 1.375 s
    assert scaling.predict(step, 2, busy) == pytest.approx(3.5 + 1.375)


def test_buckets_are_those_of_ddp(steps, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = FaceModel(pretrained=False)
        order: list[int] = []
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: order.append(4 * p.numel()))
        parallel = DistributedDataParallel(model)
        sizes: list[int] = []

        def reduce(_, bucket):  # DDP wants no annotations, or classes
            sizes.append(bucket.buffer().nbytes)
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        parallel.register_comm_hook(None, reduce)
        for _ in range(2):  # DDP puts the buckets into the order of the first backward pass
            order.clear(), sizes.clear()
            parallel(torch.rand(2, 3, 32, 32)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert [size for _, size in steps.fill_buckets(list(enumerate(order)))] == sizes
    assert len(sizes) == 3


@pytest.mark.slow
def test_its_command_predicts_and_measures(tmp_path):
    command = [
        sys.executable,
        BENCH / "scaling.py",
        "--check",
        "--rounds",
        "1",
        "--steps",
        "2",
        "--warmup",
        "1",
        "--batch",
        "8",
        "--counts",
        "2",
    ]
    done = subprocess.run([*command, "--rates", "--json", tmp_path / "out.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["processes"] for row in report["predicted"]] == [2**power for power in range(11)]
    assert set(report["check"]["cases"]) == {"2 processes"}
    assert all(0.2 < case["ratio"] < 5 for case in report["check"]["cases"].values())
