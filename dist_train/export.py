"""export(): a run's best model for use elsewhere: safetensors, ONNX (also int8), or a Hugging Face Hub folder.

In: a run folder. Out: a new folder, which appears when all is written and checked.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2.functional import rgb_to_grayscale

from dist_train.config import Config, InputError
from dist_train.data.images import load_splits
from dist_train.data.imageset import ImageSet
from dist_train.data.lazy import LazyImages
from dist_train.data.synthetic import draw_faces
from dist_train.hub import push_folder, write_hub_folder
from dist_train.inference import BATCH
from dist_train.model import FaceModel, load_run

logger = logging.getLogger(__name__)

CHECKED = 1000  # images on which ONNX has to agree with torch
CALIBRATED = 512  # training images from which the ranges of int8 are taken
LARGEST_DIFFERENCE = 1e-4


def export(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,
    *,
    quantize: str | None = None,
    config: Config | None = None,
    push: str | None = None,
) -> Path:
    """Write the best model of a run to the folder `out` and return it.

    format: onnx, safetensors or hub. quantize: static or dynamic, an int8 copy of the ONNX model besides. config: the
    run's, for whose images quantize needs the data. push: repository on the Hugging Face Hub
    (USER/NAME) to upload a hub folder to. Raises InputError for a folder in use, for options that do not go together,
    for missing packages and data, and RuntimeError if an exported model does not agree with the run's.
    """
    if (quantize and format != "onnx") or (push and format != "hub"):
        raise InputError(f"--format: {format} does not go with {'--quantize' if quantize else '--push'}")
    model = load_run(run_dir)
    with new_folder(Path(out)) as folder:
        if format == "onnx":
            export_onnx(model, folder)
            if quantize and config:
                _export_int8(model, folder, quantize, load_splits(config.data))
        elif format == "hub":
            write_hub_folder(model, Path(run_dir), folder)
        else:
            model.save(folder)
    logger.info("export: %s", out)
    if push:
        push_folder(Path(out), push)
    return Path(out)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write to, which becomes `out` at the end; on a failure nothing is left."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: {out} exists and is not an empty folder; name another")
    aside = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        aside.replace(out)
    except OSError as error:
        raise InputError(f"--out: {error.filename}: {error.strerror}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def export_onnx(model: FaceModel, folder: Path) -> None:
    """Write model.onnx, checked against torch, and config.json.

    The model takes `images`, uint8 [batch, C, S, S] in 0..255 (C 1 if it is trained on gray images, else 3; S the
    image size), normalises by itself, and gives `logits`, float32 [batch, K].
    """
    _require_packages()
    example = torch.zeros(2, 1 if model.gray else 3, model.image_size or 48, model.image_size or 48, dtype=torch.uint8)
    batch = {"images": {0: torch.export.Dim("batch")}}
    options: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"], "verbose": False}
    program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=batch, **options)
    assert program is not None
    program.save(folder / "model.onnx", external_data=False)
    (folder / "config.json").write_text(json.dumps({**model.settings, "classes": model.classes}, indent=2) + "\n")
    images = draw_faces(CHECKED, seed=1, size=example.shape[2])[0].repeat(example.shape[1], 1)
    difference, agree = compare(_torch_logits(model, images), onnx_logits(folder / "model.onnx", images))
    if difference > LARGEST_DIFFERENCE or agree < 1:
        raise RuntimeError(f"model.onnx differs from the model by {difference:.2g}; same class: {agree:.2%}")
    logger.info("export: model.onnx agrees on %d images to %.1e, same class for all", CHECKED, difference)


def onnx_logits(file: Path, images: np.ndarray | LazyImages) -> np.ndarray:
    """Return the logits, float32 [N, K], that an exported model gives for images, uint8 [N, 1 or 3, S, S]."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    channels = session.get_inputs()[0].shape[1]
    parts = [
        session.run(None, {"images": with_channels(images[at : at + BATCH], channels)})[0]
        for at in range(0, len(images), BATCH)
    ]
    return np.concatenate(parts)


def with_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """Return uint8 [N, `channels`, S, S]: gray images repeated for a model of colour, or the colour taken out."""
    if images.shape[1] <= channels:
        return images.repeat(channels // images.shape[1], 1)
    return rgb_to_grayscale(torch.from_numpy(images)).numpy()


def compare(expected: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Return the largest difference of two sets of logits [N, K], and the share of rows with the same class."""
    return float(np.abs(expected - found).max()), float((expected.argmax(1) == found.argmax(1)).mean())


def _torch_logits(model: FaceModel, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate([model(part).numpy() for part in torch.from_numpy(images).split(BATCH)])


def _export_int8(model: FaceModel, folder: Path, how: str, splits: tuple[ImageSet, ImageSet]) -> None:
    """Write model.int8.onnx and, to quantization.json, what it costs in accuracy on the validation images."""
    train, validation = splits
    some = np.random.default_rng(0).permutation(len(train))[:CALIBRATED]
    calibration = with_channels(train.images[some], 1 if model.gray else 3)
    quantize_onnx(folder / "model.onnx", folder / "model.int8.onnx", how, calibration)
    images = validation.images
    logits = {name: onnx_logits(folder / name, images) for name in ("model.onnx", "model.int8.onnx")}
    full, int8 = ((found.argmax(1) == validation.labels).mean() for found in logits.values())
    report = {
        "quantization": how,
        "validation_images": len(images),
        "accuracy_fp32": float(full),
        "accuracy_int8": float(int8),
        "accuracy_delta": float(int8 - full),
        "same_class": compare(*logits.values())[1],
    }
    (folder / "quantization.json").write_text(json.dumps(report, indent=2) + "\n")
    logger.info(
        "export: %s int8: accuracy %.2f %%, %+.2f points, on %d validation images",
        how,
        100 * int8,
        100 * (int8 - full),
        len(images),
    )


def quantize_onnx(file: Path, out: Path, how: str, images: np.ndarray) -> None:
    """Write an int8 copy of an ONNX model: dynamic (ranges found at each call) or static (from `images`)."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"images": images[at : at + BATCH]} for at in range(0, len(images), BATCH)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    ready = out.with_name(".prepared.onnx")
    quant_pre_process(file, ready)
    if how == "dynamic":
        quantize_dynamic(ready, out, weight_type=QuantType.QUInt8)  # onnxruntime has no ConvInteger for signed weights
    else:
        quantize_static(ready, out, Reader(), per_channel=True)
    ready.unlink()


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"--format: onnx needs {error.name}: pip install 'dist_train[export]'") from error
