"""The web page of a run: a photograph goes in; boxed faces, their probabilities and saliency come out.

In: a run folder. Out: a Gradio page on this machine, which keeps no picture and fetches nothing from elsewhere.
"""

from __future__ import annotations

import base64
import io
import logging
import os
import signal
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from dist_train.config import InputError
from dist_train.data.synthetic import EXPRESSIONS, draw_faces
from dist_train.inference import Face, Predictor, stack
from dist_train.page import embed_picture
from dist_train.saliency import explain, overlay
from dist_train.sources import Fault, read_shot

logger = logging.getLogger(__name__)

LARGEST_FILE = "20mb"
MOST_FACES = 12
KEPT = (60, 300)  # seconds between two sweeps, and after which an uploaded file is deleted
WAITING = 16  # visitors in the queue; one is served at a time
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif")
EXAMPLES = ("happy", "surprise", "angry", "sad")

templates = Environment(loader=PackageLoader("dist_train"), autoescape=True, undefined=StrictUndefined)


def serve(run_dir: str | os.PathLike[str], host: str = "127.0.0.1", port: int = 7860) -> None:
    """Show the page at host:port until interrupted.

    Raises InputError for a folder without a complete model, missing packages, and an address that is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: it is not to call home
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise InputError("demo needs gradio: pip install 'dist_train[demo]'") from error
    predictor = Predictor(run_dir, faces=True)
    with tempfile.TemporaryDirectory(prefix="dist_train-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(predictor, draw_examples(Path(folder)))
        try:
            page.queue(max_size=WAITING, default_concurrency_limit=1).launch(
                server_name=host,
                server_port=port,
                share=False,
                ssr_mode=False,
                max_file_size=LARGEST_FILE,
                footer_links=[],
                theme=gradio.themes.Default(primary_hue="blue", font=FONTS, font_mono=FONTS),
                css=(Path(__file__).parent / "templates" / "demo.css").read_text(),
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise InputError(f"--port: {host}:{port} cannot be used ({error}); choose another") from error
        logger.info("demo: %s (Ctrl+C ends it)", page.local_url)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl+C: the folder is to be deleted
        page.block_thread()


def build_page(predictor: Predictor, examples: Sequence[Path]) -> Any:
    """Return the page, a gradio.Blocks."""
    import gradio

    with gradio.Blocks(title="Facial expressions", analytics_enabled=False, delete_cache=KEPT) as page:
        gradio.HTML(_render("demo_head.html", classes=predictor.classes))
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=2, min_width=300):
                upload: Any = gradio.Image(
                    type="filepath",
                    sources=["upload", "webcam"],
                    label="Photograph",
                    height=340,
                    buttons=[],
                    alt_text="The photograph you gave",
                )
                # we read the file ourselves: Gradio would decode it without bounds (and a subclass writes a .pyi file)
                upload.preprocess = lambda payload: payload and payload.path
                gradio.HTML('<p class="note">Or try one of these drawn faces:</p>')
                with gradio.Row(elem_id="examples"):
                    for file in examples:
                        button = gradio.Button(file.stem, icon=str(file), min_width=60)
                        button.keep_in_cache.add(str(file))  # the sweep would take it for an upload
                        button.click(partial(str, file), None, upload, api_visibility="private", show_progress="hidden")
            with gradio.Column(scale=3, min_width=300):
                result = gradio.HTML(_render("demo_result.html"), elem_id="result")
        upload.change(
            lambda path: show(predictor, path), upload, result, api_visibility="private", show_progress="minimal"
        )
    return page


def show(predictor: Predictor, path: str | None) -> str:
    """Return the result, as HTML, for an uploaded file; for one that cannot be read, what is wrong with it."""
    if path is None:
        return _render("demo_result.html")
    shot = read_shot(Path(path))
    if isinstance(shot, Fault):
        return _render("demo_result.html", fault=shot.reason)
    picture = shot.picture
    found = predictor.judge([picture])[0]
    faces = found[:MOST_FACES] or predictor.judge_whole([picture])
    crops = [predictor.crop(picture, face.box) for face in faces]
    images = stack(crops)
    best = torch.tensor([int(face.probabilities.argmax()) for face in faces])
    maps = explain(predictor.model, images, best).numpy()
    return _render(
        "demo_result.html",
        picture=_embed(picture),
        width=picture.width,
        height=picture.height,
        found=len(found),
        faces=[
            {"box": face.box, "crop": embed_picture(crop), "glow": embed_picture(glow), **_describe(face, predictor)}
            for face, crop, glow in zip(faces, crops, overlay(images.numpy(), maps), strict=True)
        ],
    )


def draw_examples(folder: Path) -> list[Path]:
    """Write a drawn face of some expressions to `folder` and return the files."""
    images, labels = draw_faces(70, seed=3, size=256)
    files = []
    for name in EXAMPLES:
        files.append(folder / f"{name}.png")
        Image.fromarray(images[list(labels).index(EXPRESSIONS.index(name)), 0]).save(files[-1])
    return files


def _describe(face: Face, predictor: Predictor) -> dict[str, Any]:
    """Return the likeliest class, and all with their probabilities in the model's order."""
    best = int(face.probabilities.argmax())
    shares = zip(predictor.classes, map(float, face.probabilities), strict=True)
    return {"label": predictor.classes[best], "confidence": float(face.probabilities[best]), "shares": list(shares)}


def _embed(picture: Image.Image) -> str:
    """Return a data: address of a picture, so that no file is left."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _render(template: str, **values: Any) -> str:
    return templates.get_template(template).render(values)
