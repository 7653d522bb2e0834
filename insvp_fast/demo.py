"""A page on which a trained model can be tried: drop an image, see its classes, its prompts and where the model looks."""

from __future__ import annotations

from typing import Any

import gradio
import torch

from insvp_fast.data.decode import read_image
from insvp_fast.errors import DataError, InsVPError
from insvp_fast.figures.attention import class_attention
from insvp_fast.figures.prompts import explain, overlay, pictures_of
from insvp_fast.reference.prompted import PromptedReference
from insvp_fast.training.prediction import Classifier

__all__ = ["create_demo", "serve_demo"]

SHOWN_CLASSES = 5
SHOWN_SIDE = 224  # to which smaller pictures are enlarged, pixel by pixel
CACHE_SECONDS = 600  # after which uploads are deleted
MAX_WAITING = 16  # images; further ones are refused
HEADING = (
    "# {name}\nPrompts: gray is 0, and each is scaled to its largest magnitude. Grad-CAM and attention: bright where"
)
HEADING += " the model looks for its likeliest class. Images stay on the machine that runs this demo."


def create_demo(classifier: Classifier, name: str, max_pixels: int) -> gradio.Blocks:
    """The page of a model, ready for ``launch``.

    Args:
        name: its heading.
        max_pixels: as in ``read_image``.
    """

    def show(file: str | None) -> tuple[dict[str, float] | None, list[Any], str]:
        if file is None:
            return None, [], ""
        try:
            return _explain(classifier, file, max_pixels)
        except DataError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    with gradio.Blocks(analytics_enabled=False, title=name, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)) as demo:
        gradio.Markdown(HEADING.format(name=name))
        with gradio.Row():
            with gradio.Column(scale=1):
                # no gradio.Image, which opens whatever Pillow opens, of any size
                upload = gradio.File(label="Image", elem_id="upload")
                label = gradio.Label(label="Classes", num_top_classes=SHOWN_CLASSES, elem_id="classes")
            with gradio.Column(scale=2):
                gallery = gradio.Gallery(
                    label="Prompts and attention",
                    columns=3,
                    height="auto",
                    object_fit="contain",
                    format="png",
                    buttons=["download", "fullscreen"],
                    interactive=False,
                    elem_id="pictures",
                )
                reason = gradio.Markdown()
        upload.change(show, upload, [label, gallery, reason], api_name="show")
    return demo


def serve_demo(demo: gradio.Blocks, host: str, port: int, max_bytes: int, block: bool = True) -> str:
    """Serve a page, without gradio's sharing, history and monitoring.

    Args:
        max_bytes: of an upload.
        block: whether to return only when the process is interrupted.

    Returns:
        The address of the page.
    """
    demo.queue(max_size=MAX_WAITING).launch(
        server_name=host,
        server_port=port,
        max_file_size=max_bytes,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"insvp: the demo is at {demo.local_url}", flush=True)
    if block:
        demo.block_thread()
    return str(demo.local_url)


def _explain(classifier: Classifier, file: str, max_pixels: int) -> tuple[dict[str, float], list[Any], str]:
    """Probabilities by class name, pictures with their titles, and why pictures are missing."""
    with open(file, "rb") as stream:
        image = read_image(stream, "the file", classifier.exif_rotation, max_pixels)
    model: Any = classifier.model
    batch = classifier.transform(image)[None].to(classifier.device)
    shown, reason = explain(model, batch)
    pictures = {title: images[0] for title, (images, _) in pictures_of(shown, model.preprocessing).items()}
    if isinstance(model, PromptedReference):
        try:
            pictures["attention"] = overlay(pictures["image"][None], class_attention(model, batch).cpu())[0]
        except InsVPError as error:
            reason = "\n\n".join(filter(None, [reason, str(error)]))
    gallery = []
    for title, picture in pictures.items():
        pixels = (picture * 255).round().to(torch.uint8)
        scale = -(-SHOWN_SIDE // max(pixels.shape[1:]))
        enlarged = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        gallery.append((enlarged.permute(1, 2, 0).numpy(), title.replace("\n", " ")))
    values, classes = shown.probabilities[0].topk(min(SHOWN_CLASSES, len(classifier.class_names)))
    names = [classifier.class_names[index] for index in classes.tolist()]
    return dict(zip(names, values.tolist(), strict=True)), gallery, reason or ""
