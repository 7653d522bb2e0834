"""A page on which a trained model can be tried: drop an image, see its classes, prompts, and where the model looks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import gradio

from insvp_fast.data.decode import read_image
from insvp_fast.errors import InsVPError
from insvp_fast.figures.attention import class_attention
from insvp_fast.figures.prompts import explain, overlay, pictures_of
from insvp_fast.figures.web import encode_picture
from insvp_fast.training.prediction import Classifier

__all__ = ["create_demo", "serve_demo"]

SHOWN_CLASSES = 5
CACHE_SECONDS = 600  # after which uploads are deleted
MAX_WAITING = 16  # images; further ones are refused
LEGEND = """
Prompts: gray is 0, and each is scaled to its largest magnitude. Grad-CAM: bright where patches speak for the likeliest
class. Attention: what the class token reads in the last block. The image stays on the machine that serves this page.
"""
CSS = """
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; }
.pictures figure { margin: 0; }
.pictures img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 6px; image-rendering: pixelated; }
.pictures figcaption { margin-top: 0.25rem; opacity: 0.75; font-size: 0.85rem; }
footer { display: none !important; }
"""


def create_demo(classifier: Classifier, name: str, max_pixels: int = 25_000_000) -> gradio.Blocks:
    """The page of a model, for ``serve_demo``.

    Args:
        name: its title.
        max_pixels: as in ``read_image``.
    """

    def show(file: str | None) -> tuple[dict[str, float] | None, str, str]:
        if file is None:
            return None, "", ""
        try:
            return _explain(classifier, file, max_pixels)
        except InsVPError as error:
            raise gradio.Error(escape(str(error)), print_exception=False) from error

    with gradio.Blocks(analytics_enabled=False, title=name, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)) as demo:
        gradio.HTML(f"<h1>{escape(name)}</h1>", padding=False)
        gradio.Markdown(LEGEND)
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                # no gradio.Image, which would open an image of any format and size
                upload = gradio.File(label="Image", elem_id="upload")
                label = gradio.Label(label="Classes", num_top_classes=SHOWN_CLASSES, elem_id="classes")
            with gradio.Column(scale=2, min_width=280):
                pictures, reason = gradio.HTML(elem_id="pictures", padding=False), gradio.Markdown()
        upload.change(show, upload, [label, pictures, reason], api_name="show")
    return demo


def serve_demo(demo: gradio.Blocks, host: str, port: int | None, max_bytes: int) -> str:
    """Serve a page in threads of its own, without gradio's sharing, history and monitoring.

    Args:
        port: None for one that is free.
        max_bytes: of an upload.

    Returns:
        The address of the page.
    """
    _, address, _ = demo.queue(max_size=MAX_WAITING).launch(
        server_name=host,
        server_port=port,
        max_file_size=max_bytes,
        css=CSS,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
    )
    return str(address)


def _explain(classifier: Classifier, file: str, max_pixels: int) -> tuple[dict[str, float], str, str]:
    """Probabilities by class name, the pictures in HTML, and why some are missing."""
    with open(file, "rb") as stream:
        image = read_image(stream, "the file", classifier.exif_rotation, max_pixels)
    model: Any = classifier.model
    batch = classifier.transform(image)[None].to(classifier.device)
    shown, reason = explain(model, batch)
    pictures = {
        title.replace("\n", " "): part[0] for title, (part, _) in pictures_of(shown, model.preprocessing).items()
    }
    reasons = [] if reason is None else [reason]
    try:
        pictures["attention"] = overlay(pictures["image"][None], class_attention(model, batch).cpu())[0]
    except InsVPError as error:
        reasons.append(str(error))
    values, classes = shown.probabilities[0].topk(min(SHOWN_CLASSES, len(classifier.class_names)))
    shares = {
        _label(classifier.class_names, index): v for index, v in zip(classes.tolist(), values.tolist(), strict=True)
    }
    return shares, _html(pictures), "\n\n".join(reasons)


def _label(names: Sequence[str], index: int) -> str:
    """The name of a class, with its index if others have the same name, or may get the name by theirs."""
    name, with_indices = names[index], [f"{name} ({i})" for i, name in enumerate(names)]
    return name if names.count(name) == 1 and name not in with_indices else with_indices[index]


def _html(pictures: dict[str, Any]) -> str:
    figures = (
        f'<figure><img src="{encode_picture(picture)}" alt="{title}"><figcaption>{title}</figcaption></figure>'
        for title, picture in pictures.items()
    )
    return f'<div class="pictures">{"".join(figures)}</div>'
