"""What all tests share: small class folders, the command line in this process, and real launches.

Tests run in as many processes as there are cores (pytest -n 0: in one), each on one thread.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: a download fails at once

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from dist_train.cli import main
from dist_train.data.synthetic import EXPRESSIONS, draw_faces

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "launch" / "accelerate"
SMALL = ("--config", str(ROOT / "configs" / "smoke.yaml"), "--model.backbone", "timm/test_resnet")
LAUNCHERS = ("ACCELERATE_", "MASTER_", "WANDB_", "OMP_", "PET_", "SLURM_", "GLOO_", "DIST_TRAIN_")

ONE_OF_SEVERAL = "PYTEST_XDIST_WORKER" in os.environ  # of the processes that run tests


def pytest_configure() -> None:
    if ONE_OF_SEVERAL:
        torch.set_num_threads(1)


def pytest_xdist_auto_num_workers() -> int:
    """One test process for each core; no other beside a test that fills a GPU."""
    return 0 if torch.cuda.is_available() else min(4, len(os.sched_getaffinity(0)))


def may_unshare() -> bool:
    """Return whether this machine lets us have mounts and networks of our own (root in a container often may not)."""
    unshare = shutil.which("unshare")
    return (
        unshare is not None
        and not subprocess.run([unshare, "--mount", "--net", "true"], capture_output=True).returncode
    )


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No W&B login, no cache, no launcher's variables and no Accelerator from elsewhere."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS) or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    if ONE_OF_SEVERAL:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # threads of launches side by side sleep while they wait
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def draw_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes drawn faces as class folders and returns the path."""

    def draw(name: str = "faces", **counts: int) -> Path:
        for seed, (split, count) in enumerate((counts or {"train": 70, "validation": 35}).items()):
            images, labels = draw_faces(count, seed=seed)
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                file = tmp_path / name / split / EXPRESSIONS[label] / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image[0]).save(file)
        return tmp_path / name

    return draw


@pytest.fixture
def smoke(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that runs `dist-train train` on SMALL here and returns the run folder."""

    def run(name: str = "run", *options: str, code: int = 0) -> Path:
        run_dir = tmp_path / name
        arguments = ["train", *SMALL, "--run_dir", str(run_dir), "--track.tool", "none", *options]
        assert main(arguments) == code
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        return run_dir

    return run


def accelerate_launch(recipe: str | None, *arguments: str) -> list[str]:
    """Return the command line of accelerate launch with a recipe of launch/accelerate, or with none."""
    config = ["--config_file", str(RECIPES / f"{recipe}.yaml")] if recipe else []
    return [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *config, *arguments]


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs accelerate launch for real and returns the finished process."""

    def run(recipe: str | None, *arguments: str, succeeds: bool = True) -> subprocess.CompletedProcess[str]:
        command = accelerate_launch(recipe, *arguments)
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert (done.returncode == 0) == succeeds, done.stderr[-4000:]
        return done

    return run


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Callable[[Path, str, int], None]]:
    """Return a function that opens a page in Chromium and fails for any fault."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def open_page(file: Path, scheme: str, width: int) -> None:
            context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
            page, said = context.new_page(), []
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: said.append(request.url))
            page.goto(file.as_uri())
            found = Axe().run(page).response["violations"]
            faults = [(f["id"], f["nodes"][0]["html"][:200]) for f in found if f["impact"] in ("serious", "critical")]
            assert faults == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width  # wide tables scroll by themselves
            page.evaluate("for (const image of document.images) image.loading = 'eager'")
            page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
            page.screenshot(path=tmp_path / f"{file.stem}_{scheme}_{width}.png", full_page=True)
            assert [text for text in said if not text.startswith(("data:", file.as_uri()))] == []
            context.close()

        yield open_page
        browser.close()
