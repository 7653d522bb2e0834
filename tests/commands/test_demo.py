"""``insvp demo``: what its page answers, what it refuses, and how a browser shows it."""

import re
import time

import numpy as np
import pytest
import torch
from PIL import Image

from insvp_fast import InsVPViT
from insvp_fast.commands import cli
from insvp_fast.training.backbone import load_backbone
from insvp_fast.training.prediction import load_classifier
from tests.browser import CHROMIUM, FLAGS, needs_chromium
from tests.commands.finished_run import HOSTILE, noise

gradio = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")
from insvp_fast.demo import create_demo, serve_demo  # noqa: E402 (it needs gradio)

TITLES = ["image", "global prompt", "patch prompt", "image prompt", "its heat map", "prompted image"]
TITLES += ["Grad-CAM with prompts", "Grad-CAM without prompts", "attention"]


@pytest.fixture(scope="module")
def address(hostile):
    demo = create_demo(load_classifier(hostile), "<i>a run</i>", max_pixels=2000)
    yield serve_demo(demo, "127.0.0.1", None, max_bytes=10_000)
    demo.close()


@pytest.fixture(scope="module")
def client(address):
    return gradio_client.Client(address, verbose=False)


@pytest.fixture
def image(tmp_path):
    noise(tmp_path / "a.png", np.random.default_rng(1))
    return tmp_path / "a.png"


def test_classes_and_pictures_are_those_of_the_model(hostile, client, image):
    label, pictures, reason = client.predict(gradio_client.handle_file(str(image)), api_name="/show")
    model = InsVPViT.from_pretrained(hostile / "adapter", backbone=load_backbone())
    expected = model(load_classifier(hostile).images([image])[0][0][None]).softmax(1)[0]
    found = {row["label"]: row["confidence"] for row in label["confidences"]}
    assert label["label"] == sorted(HOSTILE)[int(expected.argmax())]
    torch.testing.assert_close(
        torch.tensor([found[name] for name in sorted(HOSTILE)]), expected.detach(), rtol=1e-4, atol=1e-6
    )
    assert re.findall("<figcaption>(.*?)</figcaption>", pictures) == TITLES and reason == ""
    assert pictures.count('src="data:image/png;base64,') == len(TITLES)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["crane", "kite", "crane", "owl"], ["crane (0)", "kite", "crane (2)", "owl"]),
        (["cat", "cat", "cat (1)", "cat (4)"], ["cat (0)", "cat (1)", "cat (1) (2)", "cat (4)"]),
    ],
)
def test_classes_of_one_name_stay_apart(names, labels, hostile, image):
    classifier = load_classifier(hostile)
    classifier.class_names = names
    label = create_demo(classifier, "birds").fns[0].fn(str(image))[0]
    assert label.keys() == {*labels} and sum(label.values()) == pytest.approx(1)


def test_logits_that_are_no_numbers_are_an_error(hostile, image):
    classifier = load_classifier(hostile)
    torch.nn.init.constant_(classifier.model.head.bias, torch.nan)
    with pytest.raises(gradio.Error, match="the logits of the model are infinite or not a number: expected finite"):
        create_demo(classifier, "birds").fns[0].fn(str(image))


@pytest.mark.parametrize(
    ("size", "message"), [((50, 41), r"50x41 pixels: expected at most 2,000"), (None, "not an image that can be read")]
)
def test_what_is_no_small_image_is_refused(size, message, client, tmp_path):
    file = tmp_path / "a.png"
    Image.new("L", size).save(file) if size else file.write_text("<svg onload='alert(1)'/>")
    with pytest.raises(gradio_client.exceptions.AppError, match=message):
        client.predict(gradio_client.handle_file(str(file)), api_name="/show")


def test_large_uploads_and_files_of_the_machine_are_refused(address, image):
    httpx, api = gradio_client.client.httpx, f"{address}gradio_api"

    def upload(content):
        return httpx.post(f"{api}/upload", files={"files": ("a.png", content)})

    def show(path):
        data = [{"path": str(path), "meta": {"_type": "gradio.FileData"}}]
        event = httpx.post(f"{api}/call/show", json={"data": data}).json()["event_id"]
        return httpx.get(f"{api}/call/show/{event}").text.splitlines()[0]

    assert [upload(bytes(size)).status_code for size in (10_000, 10_001)] == [200, 413]
    assert show(upload(image.read_bytes()).json()[0]) == "event: complete"
    assert show(image) == "event: error"  # it was never uploaded


def test_a_port_in_use_is_said(hostile, address, capsys):
    port = address.rstrip("/").rpartition(":")[2]
    assert cli.main(["demo", str(hostile), "--port", port]) == 1
    assert f"--port {port}: no server can listen there" in capsys.readouterr().err


@needs_chromium
def test_a_browser_shows_them_without_a_complaint(address, image, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options)

    def wait_for(selector):
        deadline = time.monotonic() + 30
        while not (found := browser.find_elements("css selector", selector)):
            assert time.monotonic() < deadline, f"no {selector} on the page"
            time.sleep(0.1)
        return found

    try:
        browser.get(address)
        wait_for("#upload input[type=file]")[0].send_keys(str(image))
        wait_for("#pictures figure")
        captions = [element.text for element in wait_for("#pictures figcaption")]
        classes = browser.find_element("css selector", "#classes").text
        heading = browser.find_element("css selector", "h1").text
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        console = browser.get_log("browser")
    finally:
        browser.quit()
    assert captions == TITLES and heading == "<i>a run</i>"
    assert all(name in classes for name in HOSTILE)  # as text
    assert loaded and all(url.startswith((address, "data:")) for url in loaded)
    assert [entry["message"] for entry in console if entry["level"] == "SEVERE"] == []
