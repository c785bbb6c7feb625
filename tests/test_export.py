"""dist-train export: what is written gives the run's answers, in onnxruntime, in timm and in load_run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml

from dist_train import FaceModel, load_run
from dist_train.cli import main
from dist_train.data.synthetic import draw_faces
from dist_train.export import with_channels
from dist_train.files import sha256


def make_run(folder: Path, gray: bool = True, **options: object) -> Path:
    """Write a run folder of a model with random weights on 32-pixel built-in faces."""
    torch.manual_seed(0)
    model = FaceModel(pretrained=False, image_size=32, gray=gray, **options)  # type: ignore[arg-type]
    model.save(folder / "best")
    data = {"source": "synthetic", "image_size": 32, "count": 140}
    settings = {"data": {**data, "path": None}, "model": {"pretrained": False, "weights": None}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    summary = {"best_valid_acc": 0.61, "best_epoch": 3, "epochs": 4, "precision": "bf16", "world_size": 2}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def export(run_dir: Path, kind: str, *options: str, code: int = 0) -> Path:
    out = run_dir.parent / f"{run_dir.name}-{kind}"
    assert main(["export", str(run_dir), "--format", kind, "--out", str(out), *options]) == code
    return out


def logits(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor(images)).numpy()


@pytest.mark.parametrize("gray", [True, False])
@pytest.mark.slow
def test_onnx_gives_the_models_logits(gray: bool, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX needs the extra export")
    run_dir = make_run(tmp_path / "run", gray, temperature=1.7)
    out = export(run_dir, "onnx")
    session = runtime.InferenceSession(out / "model.onnx")
    assert session.get_inputs()[0].type == "tensor(uint8)"  # normalisation is inside
    images = np.random.default_rng(0).integers(0, 256, (1000, 1 if gray else 3, 32, 32), dtype=np.uint8)
    expected = logits(load_run(run_dir), images)
    for count in (1, 7, 1000):  # any batch size
        found = session.run(None, {"images": images[:count]})[0]
        assert np.abs(found - expected[:count]).max() < 1e-4
        assert (found.argmax(1) == expected[:count].argmax(1)).all()
    assert json.loads((out / "config.json").read_text())["classes"][3] == "happy"


@pytest.mark.parametrize(("given", "wanted"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_images_get_the_channels_of_the_model(given: int, wanted: int, tmp_path: Path) -> None:
    """As FaceModel does by itself, up to rounding."""
    model = load_run(make_run(tmp_path / "run", gray=wanted == 1, in_channels=wanted))
    images = np.random.default_rng(0).integers(0, 256, (4, given, 32, 32), dtype=np.uint8)
    fitting = with_channels(images, wanted)
    assert fitting.shape == (4, wanted, 32, 32) and fitting.dtype == np.uint8
    np.testing.assert_allclose(logits(model, fitting), logits(model, images), atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["static", "dynamic"])
def test_int8_is_small_and_its_cost_is_stated(how: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX needs the extra export")
    out = export(make_run(tmp_path / "run"), "onnx", "--quantize", how)
    assert (out / "model.int8.onnx").stat().st_size < 0.3 * (out / "model.onnx").stat().st_size
    report = json.loads((out / "quantization.json").read_text())
    assert report["quantization"] == how and report["validation_images"] == 21
    assert report["accuracy_delta"] == pytest.approx(report["accuracy_int8"] - report["accuracy_fp32"])
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json", "model.int8.onnx", "model.onnx", "quantization.json"
    ]  # fmt: skip


@pytest.mark.parametrize("backbone", ["resnet18", "timm/resnet10t", "shufflenet_v2_x0_5"])
def test_hub_folder_is_read_by_timm_and_load_run(backbone: str, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", backbone=backbone)
    images = draw_faces(9, size=32)[0]
    out = export(run_dir, "hub")
    expected = logits(load_run(run_dir), images)
    np.testing.assert_allclose(logits(load_run(out), images), expected, atol=1e-5)
    card = (out / "README.md").read_text()
    if backbone == "shufflenet_v2_x0_5":  # timm has none
        assert "architecture" not in json.loads((out / "config.json").read_text()) and "import timm" not in card
        return
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 32, 32)
    mean, std = (np.array(config[name], np.float32)[:, None, None] for name in ("mean", "std"))
    normal = ((images.repeat(3, 1) / 255 - mean) / std).astype(np.float32)
    np.testing.assert_allclose(logits(model, normal), expected, atol=1e-3)
    assert "import timm" in card


def test_model_card_says_what_matters(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    card = (export(run_dir, "hub") / "README.md").read_text()
    assert "| validation accuracy | 61.0% |" in card
    for words in ("An expression is not an emotion", "EU AI Act", "Label noise", "Licence", "Training data", "bias"):
        assert words in card
    assert "made-up people" in card and "license: mit" in card and str(tmp_path) not in card
    figures = {
        "accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "images": 1000, "clean_accuracy": 0.45, "clean_images": 900,
        "macro_f1": 0.4, "top2_accuracy": 0.8, "ece": 0.1,
        "classes": [{"name": "hap|py", "precision": 0.1, "recall": 0.2, "f1": 0.3, "support": 40}],
        "split": "test", "tta": True, "model_temperature": 1.0, "weights": sha256(run_dir / "best/model.safetensors"),
    }  # fmt: skip
    (run_dir / "report.json").write_text(json.dumps(figures))
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    settings["data"]["path"] = str(tmp_path / "secret")
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    run_dir.rename(tmp_path / "judged")
    card = (export(tmp_path / "judged", "hub") / "README.md").read_text()
    assert (
        "accuracy on 1,000 test images, ten views of each | 50.0% (95 %: 40.0 to 60.0)" in card and "| 45.0% |" in card
    )
    assert r"| hap\|py | 0.100 | 0.200 | 0.300 | 40 |" in card and "\n\n| class |" in card and "ECE" in card
    assert "license: other" in card and "secret" not in card and "61.0%" not in card


def test_a_report_of_an_earlier_model_is_not_in_the_card(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    (run_dir / "report.json").write_text(json.dumps({"accuracy": 0.5, "weights": "of another"}))
    card = (export(run_dir, "hub") / "README.md").read_text()
    assert "50.0%" not in card and "| validation accuracy | 61.0% |" in card
    assert "\n\nThe validation accuracy is" in card  # no row of the table


def test_the_card_tells_timms_users_of_the_temperature(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", temperature=2.5)
    assert "divide timm's logits by 2.500" in (export(run_dir, "hub") / "README.md").read_text()


def test_safetensors_come_back(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    images = draw_faces(9, size=32)[0]
    out = export(run_dir, "safetensors")
    assert (logits(load_run(out), images) == logits(load_run(run_dir), images)).all()


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run(tmp_path / "run")
    used = export(run_dir, "safetensors")
    before = {file: file.read_bytes() for file in used.iterdir()}
    export(run_dir, "safetensors", code=2)
    assert f"--out: {used} exists" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in used.iterdir()} == before
    export(run_dir, "hub", "--quantize", "static", code=2)
    assert "--quantize" in capsys.readouterr().err
    export(run_dir, "onnx", "--push", "a/b", code=2)
    assert "--push" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    export(run_dir, "onnx", code=2)
    assert "onnxscript: pip install 'dist_train[export]'" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir() if file.name != "cache") == ["run", "run-safetensors"]


def test_push_without_network_keeps_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = export(make_run(tmp_path / "run"), "hub", "--push", "nobody/nothing", code=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dist-train: error: --push: nobody/nothing") and "hf auth login" in error
    assert (out / "README.md").is_file()
