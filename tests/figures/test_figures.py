"""What is on the pictures: titles, rows, curves, and labels that do not cover one another."""

import base64
import io
import warnings
from itertools import combinations
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from insvp_fast import InsVPConfig, InsVPViT
from insvp_fast.errors import DataError, TrainingError
from insvp_fast.figures import comparison, style
from insvp_fast.figures.comparison import plot_parameters, plot_sensitivity
from insvp_fast.figures.embedding import choose_images, collect_vectors, plot_tsne
from insvp_fast.figures.grad_cam import grad_cam
from insvp_fast.figures.prompts import PromptedImages, explain, one_per_class, pictures_of, plot_prompts
from insvp_fast.figures.runs import plot_confusion, plot_curves
from insvp_fast.figures.style import drawable, drawing
from insvp_fast.figures.web import encode_picture

STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def model_of(**changes) -> InsVPViT:
    backbone = VisionTransformer(img_size=16, patch_size=8, embed_dim=48, depth=2, num_heads=2)
    return InsVPViT(backbone, 3, InsVPConfig(prompt_length=2, **changes)).eval()


def titles(figure) -> list[str]:
    return [axes.get_title().replace("\n", " ") for axes in figure.axes if axes.get_title()]


def test_curves_show_what_there_is(drawn, tmp_path):
    records = [{"model": "InsVP", "epoch": epoch, "loss": 1 / epoch, "val_accuracy": None} for epoch in (1, 2, 3)]
    plot_curves(records, tmp_path / "a.png")  # trained on val: nothing to select on
    more = [record | {"val_loss": 0.5, "val_accuracy": 0.9} for record in records]
    once = {"model": "linear probe", "epoch": 1, "loss": 0.7, "val_accuracy": 0.8}
    plot_curves([*more, once], tmp_path / "b.png")
    assert [titles(figure) for figure in drawn] == [["loss"], ["loss", "accuracy"]]
    for axes in drawn[1].axes:
        shown = [tick for tick in axes.get_xticks() if 1 <= tick <= 3]
        assert shown == [1, 2, 3]
    (loss, accuracy) = drawn[1].axes
    assert [line.get_label() for line in loss.lines] == [
        "InsVP, training",
        "linear probe, training",
        "InsVP, validation",
    ]
    probe = next(line for line in accuracy.lines if line.get_label().startswith("linear probe"))
    assert list(probe.get_xdata()) == [0, 1] and set(probe.get_ydata()) == {0.8}  # from edge to edge


def test_curves_begin_before_training_and_show_what_selects(drawn, tmp_path):
    scores = [{"val_accuracy": 0.4 + 0.1 * epoch, "val_f1": 0.3 + 0.1 * epoch, "val_loss": 1.0} for epoch in (0, 1)]
    records = [{"model": "InsVP", "epoch": 0} | scores[0], {"model": "InsVP", "epoch": 1, "loss": 0.5} | scores[1]]
    plot_curves(records, tmp_path / "one.png", "f1")
    assert titles(drawn[0]) == ["loss", "accuracy", "macro F1"]
    loss, _, f1 = drawn[0].axes
    assert [list(line.get_xdata()) for line in (*loss.lines, *f1.lines)] == [[1], [0, 1], [0, 1]]
    assert list(f1.lines[0].get_ydata()) == [record["val_f1"] for record in records]


def test_a_confusion_matrix_of_many_classes_is_drawn_without_names(tmp_path):
    plot_confusion(torch.eye(555, dtype=torch.int64), [f"class {i}" for i in range(555)], tmp_path / "birds.png")
    assert Image.open(tmp_path / "birds.png").size[0] < 2500


def test_a_confusion_matrix_shows_shares_of_the_true_class_and_counts(drawn, tmp_path):
    plot_confusion(torch.tensor([[1, 3, 0], [0, 1, 1], [0, 0, 0]]), "abc", tmp_path / "few.png")
    axes = drawn[0].axes[0]
    assert axes.images[0].get_array().tolist() == [[0.25, 0.75, 0], [0, 0.5, 0.5], [0, 0, 0]]
    texts = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}  # at (column, row)
    light, dark = "white", "black"  # on a dark and on a light cell
    assert texts == {(0, 0): ("1", light), (1, 0): ("3", dark), (1, 1): ("1", light), (2, 1): ("1", light)}


def test_one_image_of_each_class_is_shown():
    assert one_per_class([2, 2, 0, 0, 1], 10) == [2, 4, 0]
    classes = one_per_class(list(range(25)), 10)
    assert classes == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    assert one_per_class([], 10) == []


def test_every_prompt_has_a_column_and_wrong_classes_are_marked(drawn, tmp_path):
    images, model = torch.randn(2, 3, 16, 16), model_of()
    best = model(images).argmax(1).tolist()
    shown, reason = explain(model, images)
    plot_prompts(shown, "abc", STATISTICS, tmp_path / "a.png", classes=[best[0], (best[1] + 1) % 3])
    assert reason is None
    assert torch.equal(shown.prompted_image, shown.image + shown.image_prompt)
    assert torch.equal(shown.heat_map, shown.image_prompt.abs().mean(1))
    assert torch.equal(shown.grad_cam, grad_cam(model, images, best))
    assert torch.equal(shown.grad_cam_without_prompts, grad_cam(model, images, best, prompts=False))
    prompts = ["global prompt", "patch prompt", "image prompt", "its heat map", "prompted image"]
    assert titles(drawn[0]) == ["image", *prompts, "Grad-CAM with prompts", "Grad-CAM without prompts"]
    predicted = [text for axes in drawn[0].axes for text in axes.texts if text.get_text().startswith("predicted")]
    assert [text.get_color() == "black" for text in predicted] == [True, False]
    shown, _ = explain(model_of(patch_prompt=False, global_prompt=False), images)
    plot_prompts(shown, "abc", STATISTICS, tmp_path / "b.png", names=["x", "y"])
    assert titles(drawn[1]) == ["image", "Grad-CAM with prompts", "Grad-CAM without prompts"]
    assert shown.prompted_image is None


def test_pictures_have_the_colors_of_what_they_show():
    pixels, statistics = torch.rand(2, 3, 4, 4), {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
    mean, std = (torch.tensor(statistics[key])[:, None, None] for key in ("mean", "std"))
    prompt = torch.zeros(2, 3, 4, 4)
    prompt[0, 0, 0, 0], prompt[0, 0, 0, 1] = -2.0, 1.0
    strong, ramp = torch.full((2, 4, 4), 4.0), torch.linspace(0, 1, 16).view(1, 4, 4)
    strong[1] = 2.0
    cams = torch.cat([ramp, 3 * ramp])
    shown = PromptedImages((pixels - mean) / std, prompt, None, prompt, strong, pixels + 9, cams, None, torch.eye(2))
    pictures = {title.replace("\n", " "): picture for title, picture in pictures_of(shown, statistics).items()}
    assert pictures.keys() == {
        "image",
        "global prompt",
        "image prompt",
        "its heat map",
        "prompted image",
        "Grad-CAM with prompts",
    }
    torch.testing.assert_close(pictures["image"][0], pixels)
    assert (pictures["prompted image"][0] == 1).all()  # no pixel is brighter
    prompted, largest = pictures["global prompt"]
    assert prompted[0, 0, 0, :3].tolist() == [0, 0.75, 0.5] and (prompted[1] == 0.5).all() and largest[0] == "max 2"
    yellow, green = (torch.tensor(matplotlib.colormaps["viridis"](share)[:3]) for share in (1.0, 0.5))
    heat = pictures["its heat map"][0][:, :, 0, 0]  # on one scale
    torch.testing.assert_close(heat, torch.stack([yellow, green]), check_dtype=False)
    over = pictures["Grad-CAM with prompts"][0] - 0.4 * pixels.mean(1, keepdim=True)  # each on its own scale
    torch.testing.assert_close(over[0], over[1])
    torch.testing.assert_close(over[0, :, -1, -1], 0.6 * yellow, check_dtype=False)


def test_logits_that_are_no_numbers_are_not_drawn():
    model, images = model_of(), torch.randn(1, 3, 16, 16)
    torch.nn.init.constant_(model.head.bias, torch.inf)
    with pytest.raises(TrainingError, match="the logits of the model are infinite or not a number: expected finite"):
        explain(model, images)


def test_tsne_is_of_what_the_head_reads(drawn, tmp_path):
    model, images = model_of(), torch.randn(24, 3, 16, 16)
    vectors = collect_vectors(model, images.split(7))
    assert {title: v.shape for title, v in vectors.items()} == {
        "specific prompts": (24, 96),
        "features without prompts": (24, 48),
        "features with prompts": (24, 48),
    }
    with torch.inference_mode():
        logits = model.head(torch.from_numpy(vectors["features with prompts"]))
        torch.testing.assert_close(logits, model(images), rtol=1e-5, atol=1e-6)
    classes = [i % 3 for i in range(24)]
    apart = np.eye(3, dtype=np.float32)[classes]
    panels = {"noise": np.random.default_rng(0).normal(size=(24, 60)).astype(np.float32), "apart": apart}
    scores = plot_tsne(panels, classes, "abc", tmp_path / "a.svg")
    assert scores["apart"] == 1 and abs(scores["noise"]) < 0.1
    assert titles(drawn[0])[1] == "apart silhouette 1.00"
    assert [text.get_text() for text in drawn[0].legends[0].texts] == ["a", "b", "c"]
    again = plot_tsne(panels, classes, "abc", tmp_path / "b.svg")
    points = [figure.axes[0].collections[0].get_offsets() for figure in drawn]
    assert again == scores and np.array_equal(*points)


def test_tsne_takes_so_many_images_of_twenty_classes():
    classes = [i % 50 for i in range(1000)]
    chosen = choose_images(classes, 120, seed=3)
    assert len(chosen) == 120 == len(set(chosen)) and len({classes[i] for i in chosen}) <= 20
    assert chosen == choose_images(classes, 120, seed=3) != choose_images(classes, 120, seed=4)
    with pytest.raises(DataError, match="of 1 classes"):
        choose_images([0, 0, 0], 10, seed=0)


def test_names_of_methods_cover_nothing(drawn, tmp_path):
    crowded = [(f"method {i}", 10_000 + 300 * i, 0.9 + 0.001 * i, 0.01) for i in range(8)]
    plot_parameters([*crowded, ("InsVP", 17_487, 0.95, 0.0), ("full", 10**8, 0.93, 0.02)], tmp_path / "a.png")
    axes = drawn[0].axes[0]
    assert axes.get_xscale() == "log"
    labels = [text for text in axes.texts if isinstance(text, Annotation) and text.get_text()]
    drawn[0].draw_without_rendering()  # in the resolution of the figure, not of the file
    boxes = {text.get_text(): text.get_window_extent() for text in labels}
    assert len(boxes) == 10
    for (one, box), (other, another) in combinations(boxes.items(), 2):
        assert not box.overlaps(another), f"{one} covers {other}"
    for x, y in (axes.transData.transform(text.xy) for text in labels):
        assert not any(box.contains(x, y) for box in boxes.values())


def test_settings_share_an_axis(drawn, tmp_path):
    panels = {name: [(3, 0.8, 0.1), (1, 0.7, 0.0), (2, 0.9, 0.05)] for name in ("L", "blocks", "beta_I", "beta_F")}
    plot_sensitivity(panels, tmp_path / "a.png")
    axes = drawn[0].axes
    assert [a.get_xlabel() for a in axes] == list(panels) and len({a.get_ylim() for a in axes}) == 1
    assert list(axes[0].lines[0].get_xdata()) == [1, 2, 3]
    band = axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (pytest.approx(0.7), pytest.approx(0.95))


def test_axes_say_what_was_measured_and_whether_it_deviates(drawn, tmp_path):
    for deviation in (None, 0.1):
        methods = [("VP", 10, 0.5, deviation), ("VPT", 20, 0.6, deviation)]
        plot_parameters(methods, tmp_path / "a.png", measured="macro F1")
        plot_sensitivity({"L": [(1, 0.5, deviation), (2, 0.6, deviation)]}, tmp_path / "b.png", measured="macro F1")
    labels = [figure.axes[0].get_ylabel() or figure.get_supylabel() for figure in drawn]
    assert labels == ["macro F1", "macro F1", "macro F1", "macro F1\nmean and standard deviation over seeds"]
    assert [len(figure.axes[0].collections) for figure in drawn[::2]] == [0, 2]  # error bars


def test_a_line_joins_every_name_that_is_far_from_its_point(drawn, tmp_path, monkeypatch):
    for offset, joined in (((0, 12), False), ((0, -18), True), ((0, 24), True), ((8, 0), False), ((32, 6), True)):
        monkeypatch.setattr(comparison, "OFFSETS", [offset])
        plot_parameters([("VP", 10, 0.5, None), ("VPT", 20, 0.6, None)], tmp_path / "a.png")
        lines = [text for text in drawn[-1].axes[0].texts if not text.get_text()]
        assert bool(lines) == joined, offset


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def savefig(figure, stream, **_):
        stream.write(b"half of it")
        raise RuntimeError

    (file := tmp_path / "a.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(RuntimeError), drawing(file, 2, 2):
        pass
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(("side", "kind"), [(64, "png"), (65, "jpeg")])
def test_pictures_in_pages_are_lossless_if_they_are_small(side, kind):
    head, content = encode_picture(torch.full((3, 2, side), 0.999)).split(",")
    assert head == f"data:image/{kind};base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.size == (side, 2) and image.getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("vectors", [np.ones((10, 4)), np.full((10, 60), np.nan), np.full((10, 4), np.inf)])
def test_vectors_without_places_are_refused(vectors, tmp_path):
    with pytest.raises(DataError, match="t-SNE of features: the vectors are all equal or not finite"):
        plot_tsne({"features": vectors.astype(np.float32)}, [0] * 5 + [1] * 5, ["x", "y"], tmp_path / "a.png")


def test_names_of_every_kind_can_be_drawn(tmp_path):
    names = [
        "great white shark, white shark, man-eater, Carcharodon carcharias",
        "a\nb\x01",
        "\udcff",
        "é ☃",
        "$_{$",
        40 * "x",
    ]
    assert [drawable(name) for name in names] == [names[0][:39] + "…", r"a\nb\x01", r"\udcff", *names[3:]]
    plot_confusion(torch.eye(6), names, tmp_path / "a.svg")
    ElementTree.parse(tmp_path / "a.svg")


def test_characters_that_no_font_has_are_told_once(tmp_path, monkeypatch):
    """Another warning while a picture is drawn stays what it is."""
    monkeypatch.setattr(style, "_told", set())

    def draw(*names: str) -> None:
        for name in names:
            with drawing(tmp_path / "a.png", 1, 1) as figure:
                figure.suptitle(name)
                warnings.warn("another", stacklevel=1)

    with pytest.warns(UserWarning, match="no installed font has ⌚, drawn as boxes: expected one of Noto") as warned:
        draw("⌚", "⌚⌛", "⌚")
    assert [str(one.message).partition(",")[0].removeprefix("no installed font has ") for one in warned] == [
        *("another", "⌚"),
        *("another", "⌛"),
        "another",
    ]


@pytest.mark.filterwarnings("error")
def test_characters_come_from_other_fonts_that_are_installed(tmp_path, monkeypatch, caplog):
    """matplotlib's DejaVu Sans has no watch, its STIX has one."""
    monkeypatch.setattr(style, "FALLBACKS", ("a font that nobody has", "STIXGeneral"))
    with drawing(tmp_path / "b.png", 2, 2) as figure:
        figure.suptitle("\N{WATCH}")
    assert not caplog.records  # nor a word about the font that is not there
