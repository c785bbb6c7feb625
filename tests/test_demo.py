"""dist-train demo: the page in a real browser, and what it makes of files that mean no good."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import make_cases
from PIL import Image
from scenes import compose

from dist_train import FaceModel
from dist_train.cli import main
from dist_train.data.synthetic import draw_faces
from dist_train.demo import build_page, draw_examples
from dist_train.inference import Predictor

ARTEFACTS = Path(__file__).parent / "artefacts"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SQUARES = [(60, 120, 220, 280), (380, 160, 520, 300)]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    FaceModel(pretrained=False, image_size=48, gray=True).save(folder / "best")
    return folder


@pytest.fixture
def served(run_dir: Path, tmp_path: Path) -> Iterator[str]:
    """The address of the running page; at the end it is interrupted and must leave nothing."""
    pytest.importorskip("gradio", reason="the page needs gradio (the extra demo)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "own").mkdir()
    surroundings = {**os.environ, "TMPDIR": str(tmp_path / "own")}
    command = [sys.executable, "-m", "dist_train", "demo", str(run_dir), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=surroundings)
    try:
        for _ in range(1200):
            if (found := re.search(r"demo: (http\S+)", (tmp_path / "log").read_text())) or process.poll() is not None:
                break
            time.sleep(0.1)
        assert found, (tmp_path / "log").read_text()
        yield found[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()
        assert not list((tmp_path / "own").glob("dist_train-demo-*"))  # no picture is kept
    finally:
        process.kill()


def test_examples_outlive_the_sweep_of_uploads(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeper = pytest.importorskip("gradio.route_utils", reason="needs gradio (the extra demo)")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    (tmp_path / "gradio").mkdir()
    examples = draw_examples(tmp_path / "gradio")
    page = build_page(Predictor(run_dir), examples)
    sweeper.delete_files_created_by_app(page, 0)
    assert [file for file in examples if not file.exists()] == []


@pytest.fixture
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.slow
def test_page_boxes_two_faces(browser: Any, served: str, tmp_path: Path) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    pytest.importorskip("facenet_pytorch", reason="finding faces needs facenet-pytorch (the extra predict)")
    compose(SQUARES).save(tmp_path / "two.png")
    ARTEFACTS.mkdir(exist_ok=True)
    assert served.startswith("http://127.0.0.1:")
    for scheme, width in (("light", 1280), ("dark", 1280), ("light", 390)):
        page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        errors: list[str] = []
        elsewhere: list[str] = []
        page.on("console", lambda message, e=errors: e.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error, e=errors: e.append(str(error)))
        page.on(
            "request",
            lambda request, e=elsewhere: (
                None if request.url.startswith((served, "data:", "blob:")) else e.append(request.url)
            ),
        )
        page.goto(served, timeout=120_000)
        page.wait_for_selector("#result .empty", timeout=120_000)
        page.screenshot(path=ARTEFACTS / f"demo-{scheme}-{width}-start.png", full_page=True)
        page.set_input_files("input[type=file]", tmp_path / "two.png")
        page.wait_for_selector("#result .face", timeout=120_000)
        page.wait_for_timeout(500)  # until Gradio has faded it in
        page.screenshot(path=ARTEFACTS / f"demo-{scheme}-{width}.png", full_page=True)
        assert page.locator("#result svg .box").count() == 2
        assert page.locator("#result .face").count() == 2
        for number in (0, 1):
            rows = page.locator("#result .face").nth(number).locator("tbody tr")
            assert rows.count() == 7
            shares = [float(text.split()[0]) for text in rows.locator(".share").all_inner_texts()]
            assert sum(shares) == pytest.approx(100, abs=0.4)
        assert "2 faces found" in page.locator("#result [role=status]").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        grave = [v for v in axe.run(page).response["violations"] if v["impact"] in ("serious", "critical")]
        assert not grave, [(v["id"], [node["html"] for node in v["nodes"]]) for v in grave]
        assert not errors and not elsewhere
        page.context.close()


@pytest.mark.slow
def test_page_by_keyboard_and_with_bad_files(browser: Any, served: str, tmp_path: Path) -> None:
    page = browser.new_page()
    page.goto(served, timeout=120_000)
    page.wait_for_selector("#result .empty", timeout=120_000)
    for _ in range(20):  # Tab reaches the examples, Enter chooses one
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText") == "surprise":
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("#result .face", timeout=120_000)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')
    for name in ("text.png", "drawing.svg"):
        page.reload()
        page.wait_for_selector("#result .empty", timeout=120_000)
        page.set_input_files("input[type=file]", tmp_path / name)
        page.wait_for_selector("#result [role=alert]", timeout=120_000)
        assert "not a picture of a known kind" in page.locator("#result [role=alert]").inner_text()
    (tmp_path / "large.png").write_bytes(bytes(21_000_000))
    page.reload()
    page.wait_for_selector("#result .empty", timeout=120_000)
    page.set_input_files("input[type=file]", tmp_path / "large.png")
    page.wait_for_selector("text=/exceed the maximum allowed size/", timeout=120_000)
    assert page.locator("#result .empty").count() == 1


@pytest.mark.slow
def test_hostile_files_get_an_answer_or_are_refused(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("facenet_pytorch", reason="finding faces needs facenet-pytorch (the extra predict)")
    from dist_train.demo import show
    from dist_train.inference import Predictor

    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile").mkdir()
    cases = make_cases(tmp_path / "hostile", Image.fromarray(draw_faces(1, seed=4)[0][0, 0]))
    predictor = Predictor(run_dir, faces=True)
    for case in cases:
        html = show(predictor, case.path)
        answered = 'class="face"' in html
        assert answered != ('role="alert"' in html), case
        assert answered or case.due in ("refusal", "either"), case
        assert not answered or case.due != "refusal", case


def test_bad_arguments(run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="the page needs gradio (the extra demo)")
    pytest.importorskip("facenet_pytorch", reason="finding faces needs facenet-pytorch (the extra predict)")
    assert main(["demo", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["demo", str(run_dir), "--port", str(taken.getsockname()[1])]) == 2
    assert "--port: 127.0.0.1:" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", str(run_dir)]) == 2
    assert "pip install 'dist_train[demo]'" in capsys.readouterr().err
