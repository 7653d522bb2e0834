"""``insvp report``: what is on the page, that nothing in it is taken for HTML, and how a browser shows it."""

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from insvp_fast.commands import cli
from insvp_fast.errors import TrainingError
from insvp_fast.methods import create_model
from insvp_fast.report import page, results
from insvp_fast.report.page import _classes, _labels, render
from insvp_fast.report.results import find_results
from insvp_fast.training.backbone import load_backbone
from insvp_fast.training.metrics import metrics_of_pairs
from tests.browser import needs_chromium, open_page
from tests.commands.finished_run import CLASSES, HOSTILE, with_random_head, write_run, write_run_of_several_labels

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """A page's tags, attributes and texts; fails where tags do not match."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] != "style":
            self.texts.append(" ".join(data.split()))

    def behind(self, text: str) -> list[str]:
        """Each text that follows this one."""
        return [after for before, after in pairwise(self.texts) if before == text]

    def sources(self, kind: str = "") -> list[str]:
        return [value for name, value in self.attributes if name == "src" and value.startswith(f"data:image/{kind}")]


@pytest.fixture(scope="module")
def report(hostile) -> Path:
    assert cli.main(["report", str(hostile)]) == 0
    return hostile / "report.html"


def test_the_page_says_what_eval_says_and_shows_the_worst_first(hostile, report, capsys):
    assert cli.main(["eval", str(hostile)]) == 0
    facts, page = json.loads((hostile / "eval.json").read_text()), Page(report)
    for title, key in (("top-1 accuracy", "top1"), ("mean per class", "mean_per_class"), ("F1", "f1")):
        assert page.texts[page.texts.index(title) - 1] == f"{facts[key]:.1%}"
    wrong = round(8 * (1 - facts["top1"]))
    assert 0 < wrong < 8 and f"{wrong} of 8 images are classified wrongly" in " ".join(page.texts)
    losses = [float(text) for text in page.behind("loss")]
    assert len(losses) == wrong and losses == sorted(losses, reverse=True)
    assert "the epoch to keep was selected on the test images" in " ".join(page.texts)
    assert {"select_on", "batch_size", "torch", "2.11<0>", "insvp train --data '<b>'"} <= set(page.texts)
    assert len(page.sources("png")) == 8 * wrong  # image, three prompts, heat map, prompted image, two maps
    assert len(page.sources("svg")) == 2


def test_names_are_text_and_nothing_is_loaded(report):
    page = Page(report)
    assert not {"script", "iframe", "object", "b", "form"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    links = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert links and all(value.startswith("data:") for value in links)
    css = re.search("<style>(.*?)</style>", report.read_text(), re.DOTALL)[1]
    assert "url(" not in css and "@import" not in css
    assert set(HOSTILE) <= set(page.texts)
    assert any(text.endswith("<b onload='alert(3)'>.png") for text in page.texts)


@needs_chromium
def test_a_browser_shows_it_without_a_complaint(report, tmp_path):
    dom, console = open_page(report, tmp_path / "profile")
    assert console == []
    assert "Worst mistakes" in dom and "<script" not in dom
    broken = tmp_path / "broken.html"
    broken.write_text("<script>missing()</script>")
    assert "missing is not defined" in open_page(broken, tmp_path / "profile")[1][0]


def test_several_labels_per_image(tmp_path, capsys, monkeypatch):
    run = write_run_of_several_labels(tmp_path)
    assert cli.main(["report", str(run), "--mistakes", "2", "--output", str(tmp_path / "new" / "page.html")]) == 0
    assert "mAP" in capsys.readouterr().out
    page = Page(tmp_path / "new" / "page.html")
    assert {"mean average precision", "micro F1", "average precision"} <= set(page.texts)
    assert "Accuracy of the" not in " ".join(page.texts) and len(page.sources("svg")) == 1  # no confusion matrix
    assert page.texts.count("predicted") == 2
    for text in page.behind("true"):
        assert re.sub(r" \(\d+\.\d%\)", "", text) in ("none", "sea, sky", "sky", "sea", "sand")

    def judge(logits, targets):  # of two images one label too many, or too few
        found = targets - 0.5
        found[:2, 0] *= -1
        return found, torch.arange(len(targets)) + 1.0

    monkeypatch.setattr(results, "_judge", judge)
    found = find_results(run, most=6, batch_size=6)
    assert found.wrong == 2 and found.mistakes.losses == [2.0, 1.0]


@pytest.mark.parametrize(
    ("method", "titles", "reason"),
    [
        ("vpt_deep", ["image", "Grad-CAM with prompts", "Grad-CAM without prompts"], ""),
        ("lora", ["image"], "no Grad-CAM of a TunedViT: its method changes the backbone"),
    ],
)
def test_other_methods_have_fewer_pictures(method, titles, reason, images, tmp_path, capsys):
    torch.manual_seed(0)
    model = with_random_head(create_model(method, load_backbone(), 6))
    names = sorted(path.name for path in (images / "test").iterdir())
    run = write_run(tmp_path / method, images, model, names, method=method)
    printed = []
    for command in (["report", str(run), "--mistakes", "1"], ["eval", str(run)]):
        assert cli.main(command) == 0
        printed.append(re.search(r"top-1 .* top-5 (?!100).* F1 [0-9.]+%", capsys.readouterr().out)[0])
    assert printed[0] == printed[1]
    page = Page(run / "report.html")
    alternatives = [value for name, value in page.attributes if name == "alt"]
    assert alternatives[2:] == titles  # after the curves and the confusion matrix
    assert not reason or reason in page.texts


def test_json_says_what_was_written(hostile, tmp_path, capsys):
    file = tmp_path / "page.html"
    assert cli.main(["report", str(hostile), "--output", str(file), "--mistakes", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["file"], facts["images"]) == (str(file), 8)
    assert any("selected on the test images" in text for text in facts["warnings"])
    assert len(Page(file).behind("loss")) == 1 < facts["mistakes"]


def test_control_characters_are_shown_and_not_written(hostile, tmp_path):
    names = ["a\x00\x1b[31m", "b\x85\u2028", "c\udcff\u202e", "f\u00e4<u>"]
    results = find_results(hostile, 3)._replace(class_names=names)
    (tmp_path / "page.html").write_text(page := render(hostile, results, ["\x07 rings"]))
    assert not re.search("[^\n -~\xa1-\u2027\u2030-\ud7ff]", page)
    shown = {r"\x07 rings", r"a\x00\x1b[31m", r"b\x85\u2028", r"c\udcff\u202e", "f\u00e4<u>"}
    assert shown <= set(Page(tmp_path / "page.html").texts)


@pytest.mark.parametrize(("kept", "shown"), [(0, "0"), (3, "3"), (None, "–")])
def test_the_kept_epoch_may_be_the_first(kept, shown, hostile, tmp_path):
    shutil.copy(hostile / "config.json", tmp_path)
    result = {"model": "InsVP", "test_accuracy": 0.5, "trained_parameters": 7, "kept_epoch": kept}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(result))
    (tmp_path / "page.html").write_text(render(tmp_path, find_results(hostile, 1), []))
    assert Page(tmp_path / "page.html").behind("7") == [shown]


@pytest.mark.parametrize(
    ("tested", "most", "caption"),
    [
        (2, 50, "Accuracy of the classes that have test images, the worst first"),
        (4, 50, "Accuracy of the classes, the worst first"),
        (4, 3, "Accuracy of the 3 worst of 4 classes, the worst first"),
        (3, 2, "Accuracy of the 2 worst of 3 classes that have test images, the worst first"),
    ],
)
def test_classes_are_counted_that_have_test_images(tested, most, caption, hostile, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MAX_ROWS", most)
    metrics = metrics_of_pairs(torch.arange(tested).expand(2, -1), 4, tested)
    (tmp_path / "page.html").write_text(render(hostile, find_results(hostile, 1)._replace(metrics=metrics), []))
    assert caption in Page(tmp_path / "page.html").texts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("class_names"), "in config.json class_names is None: expected list"),
        (lambda config: config.update(recipe=[]), "is not a run folder of `insvp train`: config.json has no recipe"),
        (lambda config: config["recipe"].update(tomorrow=1), "does not know: another version wrote config.json"),
        (lambda config: config.update(asked={"tomorrow": 1}), "does not know: another version wrote config.json"),
    ],
)
def test_a_run_whose_config_has_other_keys_is_refused(change, message, hostile, tmp_path, capsys):
    config = json.loads((hostile / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for command in ("report", "eval"):
        assert cli.main([command, str(tmp_path)]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "tsne"])
def test_a_backbone_that_is_elsewhere_is_given(command, hostile, capsys):
    assert cli.main([command, str(hostile), "--backbone", "vit_shapes_32@gone.safetensors"]) == 1
    assert "gone.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("command", ["report", "tsne", "eval"])
def test_an_unreadable_image_is_named_in_one_line(command, workers, images, tmp_path, capsys):
    data = Path(shutil.copytree(images, tmp_path / "data"))
    (data / "test" / "bee" / "0.png").write_bytes(b"no image")
    model = with_random_head(create_model("vpt_deep", load_backbone(), 6))
    run = write_run(tmp_path / "run", data, model, CLASSES, method="vpt_deep")
    assert cli.main([command, str(run), "--workers", workers]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"insvp: error: {data}/test/bee/0.png: not an image that can be read")
    assert "Traceback" not in error


def test_logits_that_are_no_numbers_are_no_mistakes(hostile, monkeypatch):
    nan = float("nan")
    monkeypatch.setattr(results, "_judge", lambda logits, targets: (targets[:, None], torch.full((len(targets),), nan)))
    with pytest.raises(TrainingError, match="the logits became infinite or not a number"):
        find_results(hostile, 3)


def test_what_is_no_run_is_refused(hostile, tmp_path, capsys):
    shutil.copytree(hostile / "adapter", tmp_path / "adapter")
    assert cli.main(["report", str(tmp_path / "adapter")]) == 1
    assert "is not a run folder of `insvp train`" in capsys.readouterr().err
    with pytest.raises(TrainingError, match="an adapter does not say where its test images are: expected a run folder"):
        find_results(tmp_path / "adapter", 3)


def test_the_loss_of_an_image_of_several_labels_is_the_mean_over_the_classes():
    _, losses = results._judge(torch.tensor([[0.0, 0.0, 0.0], [9.0, -9.0, 0.0]]), torch.tensor([[1.0, 0.0, 1.0]] * 2))
    assert losses.tolist() == pytest.approx([0.6931, 0.2311], abs=1e-4)


def test_a_right_image_is_no_mistake_however_large_its_loss(hostile, monkeypatch):
    def judge(logits, targets):
        right = torch.arange(len(targets)) == 0
        return torch.where(right, targets, (targets + 1) % 4)[:, None], torch.where(right, 9.0, 1.0)

    monkeypatch.setattr(results, "_judge", judge)
    found = results.find_results(hostile, most=3)
    assert found.mistakes.losses == [1.0] * 3 and 3 < found.wrong < 8


def test_a_model_without_mistakes_has_a_page(hostile, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_judge", lambda logits, targets: (targets[:, None], torch.ones(len(targets))))
    found = find_results(hostile, most=3)
    assert (found.wrong, found.mistakes.names, found.mistakes.shown) == (0, [], None)
    (tmp_path / "page.html").write_text(render(hostile, found, []))
    page = Page(tmp_path / "page.html")
    assert "Every test image is classified correctly." in page.texts and not page.sources("png")


def test_labels_with_a_probability_of_at_least_a_half_are_predicted():
    shown = SimpleNamespace(probabilities=torch.tensor([[0.625, 0.375, 0.5]]))
    mistakes = results.Mistakes(["a.png"], torch.tensor([[0.0, 1.0, 0.0]]), [1.0], shown, None)
    assert _labels(mistakes, 0, ["sand", "sea", "sky"]) == ("sea (37.5%)", "sand (62.5%), sky (50.0%)")


def test_a_class_is_mistaken_for_the_most_frequent_of_the_others():
    confusion = torch.tensor([[5, 1, 2], [0, 3, 0], [0, 0, 0]])
    rows = _classes([0.625, 1.0, None], confusion, ["ant", "bee", "cat"])
    assert [(row.name, row.images, row.mistaken_for) for row in rows] == [("ant", 8, "cat"), ("bee", 3, "")]
