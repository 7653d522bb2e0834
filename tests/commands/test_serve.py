"""``insvp serve``: the answers are those of ``insvp predict``, limits hold, and running requests are finished."""

import asyncio
import http.client
import io
import json
import socket
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")
pytest.importorskip("python_multipart", reason="needs the extra `serve`")
pytest.importorskip("prometheus_client", reason="needs the extra `serve`")

import uvicorn
from starlette.requests import Request
from starlette.testclient import TestClient

from insvp_fast import InsVPViT
from insvp_fast.commands import cli
from insvp_fast.commands.options import check_address
from insvp_fast.commands.serve import name_models
from insvp_fast.config import RELEASED_PREPROCESSING
from insvp_fast.data.images import Images
from insvp_fast.errors import CommandError, TrainingError
from insvp_fast.serving.app import create_app
from insvp_fast.serving.batcher import Batcher
from insvp_fast.serving.refusals import STATUS, Refusal
from insvp_fast.serving.uploads import Limits, open_uploads
from insvp_fast.training.prediction import load_classifier, predict
from tests.commands.finished_run import CLASSES

PNG = {"Content-Type": "image/png"}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture(scope="module")
def classifier(run):
    return load_classifier(run)


@pytest.fixture(scope="module")
def files(images) -> list:
    return sorted((images / "test").rglob("*.png"))


@pytest.fixture(scope="module")
def expected(run, files) -> dict[str, dict[str, float]]:
    """The probabilities of each class by ``insvp predict``, by the file's content."""
    predictions = predict(load_classifier(run), list(map(str, files)), top_k=len(CLASSES), workers=0)
    return {file.read_bytes(): dict(found.ranking) for file, found in zip(files, predictions, strict=True)}


@pytest.fixture(scope="module")
def client(run, classifier):
    limits = Limits(max_bytes=60_000, max_images=4, max_pixels=3000)
    with TestClient(create_app({"run": classifier, "adapter": load_classifier(run / "adapter")}, limits)) as client:
        yield client


def form(*contents: bytes) -> list:
    return [("files", (f"{i}.png", content, "image/png")) for i, content in enumerate(contents)]


def encoded(size: tuple[int, int], form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, form)
    return stream.getvalue()


def probabilities(prediction: dict) -> dict[str, float]:
    return dict(zip(prediction["classes"], prediction["probabilities"], strict=True))


@pytest.mark.parametrize("model", ["run", "adapter"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_answers_are_those_of_predict_in_order(client, expected, model, count):
    contents = list(expected)[-count:]
    answer = client.post("/predict", files=form(*contents), params={"model": model, "top_k": 99})
    assert answer.status_code == 200 and answer.json()["model"] == model
    predictions = answer.json()["predictions"]
    assert [found["file"] for found in predictions] == [f"{i}.png" for i in range(count)]
    for found, content in zip(predictions, contents, strict=True):
        assert found["probabilities"] == sorted(found["probabilities"], reverse=True)
        assert probabilities(found) == pytest.approx(expected[content], abs=1e-6)


@pytest.mark.parametrize("kind", ["image/png", "Image/PNG", "application/octet-stream"])
def test_a_body_that_is_the_image_is_answered(client, expected, kind):
    content = next(iter(expected))
    answer = client.post("/predict?model=run&top_k=2", content=content, headers={"Content-Type": kind}).json()
    (found,) = answer["predictions"]
    assert found["classes"] == sorted(expected[content], key=expected[content].get, reverse=True)[:2]


def test_a_name_that_no_answer_can_hold_is_shown_without_it(client, expected):
    """A charset of the client's choice decodes it to half a character."""
    part = b'--b\r\nContent-Disposition: form-data; name="f"; filename="\\ud800.png"\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b; charset=unicode_escape"}
    answer = client.post("/predict?model=run", content=part + next(iter(expected)) + b"\r\n--b--\r\n", headers=headers)
    assert [prediction["file"] for prediction in answer.json()["predictions"]] == ["?.png"]


def test_a_charset_that_does_not_decode_a_name_is_refused(client, expected):
    part = b'--b\r\nContent-Disposition: form-data; name="f"; filename="a.png"\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b; charset=undefined"}
    answer = client.post("/predict?model=run", content=part + next(iter(expected)) + b"\r\n--b--\r\n", headers=headers)
    assert (answer.status_code, answer.json()["kind"]) == (400, "malformed_upload")


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nope", 404, "unknown_path"),
        ("GET", "/health/", 404, "unknown_path"),
        ("POST", "/predict/", 404, "unknown_path"),
        ("PUT", "/predict", 405, "wrong_method"),
    ],
)
def test_what_is_not_there_is_refused_in_json_and_counted(client, method, path, status, kind):
    counters = f'insvp_errors_total{{kind="{kind}"}}', f'insvp_requests_total{{status="{status}"}}'
    before = [metrics(client).get(counter, 0) for counter in counters]
    answer = client.request(method, path)
    assert [metrics(client)[counter] for counter in counters] == [count + 1 for count in before]
    assert (answer.status_code, answer.json()["kind"]) == (status, kind)
    assert answer.json()["error"] == f"{method} {path}: expected POST /predict, or GET /health, /models or /metrics"
    assert status != 405 or answer.headers["Allow"] == "POST"


@pytest.mark.parametrize("host", ["", "127.0.0.1", "localhost"])
def test_a_free_address_is_taken(host):
    check_address(host, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "nohost.invalid", "a" * 70])
def test_an_address_that_is_taken_or_unknown_is_told_before_models_are_loaded(host, run, capsys, monkeypatch):
    monkeypatch.setattr("insvp_fast.training.prediction.load_classifier", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(run), "--host", host, "--port", str(port)]) == 1
    assert f"--host is {host!r} and --port {port}: no server can listen there (" in capsys.readouterr().err


def test_an_unreadable_image_spoils_no_other(client, expected):
    good, *_ = expected
    damaged = encoded((40, 40))[:60]
    counter = 'insvp_errors_total{kind="unreadable_image"}'
    before = metrics(client).get(counter, 0)
    answer = client.post("/predict?model=run&top_k=99", files=form(damaged, good, b"%!PS-Adobe-3.0 EPSF-3.0\n"))
    first, second, third = answer.json()["predictions"]
    assert answer.status_code == 200
    assert "image 0: not an image that can be read" in first["error"] and "classes" not in first
    assert probabilities(second) == pytest.approx(expected[good], abs=1e-6)
    assert "image 2: not an image that can be read (none of AVIF, BMP" in third["error"]  # Ghostscript never sees it
    assert metrics(client)[counter] == before + 2


BITMAP = encoded((4, 4), "BMP")
BOMB = BITMAP[:18] + struct.pack("<ii", 9000, 9000) + BITMAP[26:]  # a header that promises pixels


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encoded((80, 40)), "it has 80x40 pixels: expected at most 3,000"),
        (BOMB, "it has 9000x9000 pixels: expected at most 3,000"),
        (encoded((2, 202)), "it has 2x202 pixels: expected sides of at most 100:1"),
        (encoded((40, 40), "ICO"), "not an image that can be read"),
        (b"no image", "not an image that can be read"),
    ],
    ids=["large", "bomb", "thin", "other format", "text"],
)
def test_images_are_refused_by_their_header(client, content, message):
    answer = client.post("/predict?model=run", content=content, headers=PNG)
    assert answer.status_code == 422
    assert message in answer.json()["predictions"][0]["error"]


MULTIPART = {"Content-Type": "multipart/form-data; boundary=b"}
PART = b'--b\r\nContent-Disposition: form-data; name="f"; filename="%d.png"\r\n\r\n%s\r\n'


@pytest.mark.parametrize(
    ("query", "sent", "status", "kind"),
    [
        ("model=owls", {"content": b"x", "headers": PNG}, 404, "unknown_model"),
        ("", {"content": b"x", "headers": PNG}, 422, "invalid_query"),
        ("model=run&top_k=0", {"content": b"x", "headers": PNG}, 422, "invalid_query"),
        ("model=run&top_k=" + "9" * 5000, {"content": b"x", "headers": PNG}, 422, "invalid_query"),
        ("model=run&topk=1", {"content": b"x", "headers": PNG}, 422, "invalid_query"),
        ("model=run", {"json": {"image": "x"}}, 415, "unknown_content_type"),
        ("model=run", {"content": b"x"}, 415, "unknown_content_type"),
        ("model=run", {"content": b"", "headers": PNG}, 422, "no_image"),
        ("model=run", {"content": b"x" * 60_001, "headers": PNG}, 413, "too_many_bytes"),
        ("model=run", {"content": iter([b"x" * 40_000] * 2), "headers": PNG}, 413, "too_many_bytes"),
        ("model=run", {"content": iter([b"--b\r\n", b"x" * 60_000]), "headers": MULTIPART}, 413, "too_many_bytes"),
        ("model=run", {"files": form(*[b"x"] * 5)}, 413, "too_many_images"),
        ("model=run", {"files": [("note", (None, b"text"))]}, 400, "malformed_upload"),
        ("model=run", {"content": b"x", "headers": MULTIPART}, 400, "malformed_upload"),
        ("model=run", {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "malformed_upload"),
        ("model=run", {"content": b"--b--\r\n", "headers": MULTIPART}, 422, "no_image"),
        ("model=run", {"content": PART % (0, b"x") + b"--b-", "headers": MULTIPART}, 400, "incomplete_upload"),
        ("model=run", {"content": PART % (0, b"x") + b"--b", "headers": MULTIPART}, 400, "incomplete_upload"),
        ("model=run", {"content": PART % (0, b"x") + PART[:60], "headers": MULTIPART}, 400, "incomplete_upload"),
        ("model=run", {"content": PART % (0, b"x"), "headers": MULTIPART}, 400, "incomplete_upload"),
        ("model=run", {"content": (PART % (0, b"x"))[:-3], "headers": MULTIPART}, 400, "incomplete_upload"),
    ],
)
def test_requests_outside_the_limits_are_refused(client, query, sent, status, kind):
    counters = f'insvp_errors_total{{kind="{kind}"}}', f'insvp_requests_total{{status="{status}"}}'
    before = metrics(client)
    answer = client.post(f"/predict?{query}", **sent)
    assert (answer.status_code, answer.json()["kind"]) == (status, kind)
    assert "Retry-After" not in answer.headers
    after = metrics(client)
    assert [after[counter] - before.get(counter, 0) for counter in counters] == [1, 1]


def test_fields_that_are_no_files_are_named(client):
    fields = [(name, (None, b"text")) for name in ("note", "more")]
    answer = client.post("/predict?model=run", files=[*form(b"x"), *fields])
    assert answer.json() == {"error": "the field note is no file: expected files alone", "kind": "malformed_upload"}


@pytest.mark.parametrize("end", [b"--b--", b"--b--\r\n", b"--b--\r\nan epilogue --b"])
def test_every_end_of_a_whole_body_counts(client, expected, end):
    body = b"".join(PART % (i, content) for i, content in enumerate(list(expected)[:2])) + end
    answer = client.post("/predict?model=run", content=iter([body[:-9], body[-9:]]), headers=MULTIPART)
    assert answer.status_code == 200 and len(answer.json()["predictions"]) == 2


def test_every_refusal_is_documented():
    page = Path(__file__).parents[2] / "docs" / "serving.md"
    if not page.is_file():
        pytest.skip("only a checkout has docs/")
    text = page.read_text()
    assert [kind for kind, status in STATUS.items() if f"| {status} | `{kind}` |" not in text] == []


def metrics(client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


@pytest.mark.parametrize(("message", "kind"), [(None, "slow_upload"), ("http.disconnect", "incomplete_upload")])
def test_uploads_that_never_end_are_given_up(message, kind):
    async def receive():
        return {"type": message} if message else await asyncio.sleep(60)

    async def upload():
        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"image/png")]}
        async with open_uploads(Request(scope, receive), Limits(upload_seconds=0.02)):
            pass

    with pytest.raises(Refusal) as refused:
        asyncio.run(upload())
    assert refused.value.kind == kind


def opened(content_type: str, receive, *headers: tuple[bytes, bytes]):
    """``open_uploads`` of a request, within the limits of the server's defaults."""
    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", content_type.encode()), *headers]}
    return open_uploads(Request(scope, receive), Limits())


def test_uploaded_files_are_closed_at_the_end():
    async def receive():
        return {"type": "http.request", "body": PART % (0, b"pixels") + b"--b--"}

    async def upload():
        async with opened(MULTIPART["Content-Type"], receive, (b"content-length", b"unknown")) as (found,):
            assert found.file.read() == b"pixels"
        return found.file

    assert asyncio.run(upload()).closed


def test_nothing_is_read_of_a_body_that_says_it_is_too_large():
    async def upload():
        async with opened("image/png", None, (b"content-length", b"99999999")):
            pass

    with pytest.raises(Refusal, match="the body is too large"):
        asyncio.run(upload())


def test_models_are_warmed_up_with_one_image_and_with_a_full_batch():
    sizes = []
    warmed = SimpleNamespace(image_shape=(3, 4, 4), logits=lambda images: sizes.append(tuple(images.shape)))
    with TestClient(create_app({"animals": warmed}, max_batch=3)):
        assert sorted(sizes) == [(1, 3, 4, 4), (3, 3, 4, 4)]


def test_the_threads_of_a_server_end_with_it(classifier, expected):
    def own() -> set[str]:
        return {thread.name for thread in threading.enumerate() if thread not in before}

    before = threading.enumerate()
    with TestClient(create_app({"animals": classifier})) as client:
        assert client.post("/predict", content=next(iter(expected)), headers=PNG).status_code == 200
        assert {"model_0", "decode_0"} <= own()
    assert not {"model_0", "decode_0"} & own()


def test_models_health_and_metrics(classifier, expected):
    app = create_app({"animals": classifier})
    assert TestClient(app).get("/health").status_code == 503  # it has not started
    with TestClient(app) as client:
        assert client.get("/health").json() == {"ready": True}
        assert client.get("/models").json()["models"]["animals"] == {"classes": CLASSES, "input_size": [3, 32, 32]}
        assert client.post("/predict", files=form(*list(expected)[:3])).status_code == 200
        found = metrics(client)
        assert client.get("/metrics").headers["Content-Type"].startswith("text/plain; version=")
    buckets = {'insvp_request_seconds_bucket{le="0.03"}', 'insvp_batch_size_bucket{le="256.0",model="animals"}'}
    assert found["process_resident_memory_bytes"] > 0 and buckets <= found.keys()
    assert found['insvp_requests_total{status="200"}'] == found["insvp_request_seconds_count"] == 1
    assert found['insvp_images_total{model="animals"}'] == found['insvp_batch_size_sum{model="animals"}'] == 3
    assert found["insvp_queue_length"] == 0
    assert TestClient(app).get("/health").status_code == 503  # it has ended


class Held:
    """A classifier that waits, when it is asked to compute images, until it is let go on, or fails."""

    def __init__(self, classifier, error: Exception | None = None) -> None:
        self.inner, self.error, self.reached, self.let_go = classifier, error, threading.Event(), threading.Event()

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def logits(self, images):
        if images.any():  # those of the warm-up are zero
            self.reached.set()
            assert self.let_go.wait(10)
            if self.error:
                raise self.error
        return self.inner.logits(images)


def test_a_full_server_says_so_and_answers_the_others(classifier, expected):
    held, content = Held(classifier), next(iter(expected))
    app = create_app({"animals": held}, Limits(max_requests=1))
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            held.reached.clear()
            held.let_go.clear()
            running = pool.submit(client.post, "/predict", content=content, headers=PNG)
            assert held.reached.wait(10)
            refused = client.post("/predict", content=content, headers=PNG)
            assert (refused.status_code, refused.json()["kind"], refused.headers["Retry-After"]) == (503, "busy", "1")
            assert client.get("/health").status_code == 200
            held.let_go.set()
            assert running.result().status_code == 200
        assert client.post("/predict", content=content, headers=PNG).status_code == 200


def test_images_that_wait_for_the_model_are_counted(classifier, expected):
    held, content = Held(classifier), next(iter(expected))
    with TestClient(create_app({"animals": held}, max_batch=1)) as client, ThreadPoolExecutor(3) as pool:
        running = [pool.submit(client.post, "/predict", content=content, headers=PNG) for _ in range(3)]
        end = time.monotonic() + 8
        while metrics(client)["insvp_queue_length"] < 2 and time.monotonic() < end:
            time.sleep(0.01)
        assert metrics(client)["insvp_queue_length"] == 2
        held.let_go.set()
        assert [one.result().status_code for one in running] == [200] * 3


def test_a_failure_of_the_model_is_500_and_not_the_end(classifier, expected):
    held, content = Held(classifier, RuntimeError("out of memory")), next(iter(expected))
    held.let_go.set()
    with TestClient(create_app({"animals": held}), raise_server_exceptions=False) as client:
        assert client.post("/predict", content=content, headers=PNG).status_code == 500
        found = metrics(client)
        assert found['insvp_errors_total{kind="internal"}'] == found['insvp_requests_total{status="500"}'] == 1
        held.error = None
        assert client.post("/predict", content=content, headers=PNG).status_code == 200


def test_logits_that_are_no_numbers_are_an_error_in_words(run, expected):
    broken = load_classifier(run)
    torch.nn.init.constant_(broken.model.head.bias, torch.nan)
    with TestClient(create_app({"animals": broken})) as client:
        answer = client.post("/predict", content=next(iter(expected)), headers=PNG)
        assert metrics(client)['insvp_errors_total{kind="not_finite"}'] == 1
    assert (answer.status_code, answer.json()["kind"]) == (500, "not_finite")
    assert answer.json()["error"].startswith("animals: the logits of the model are infinite or not a number")


def test_a_batch_without_all_results_is_an_error_of_its_own():
    async def main():
        with ThreadPoolExecutor(1) as pool:
            batcher = Batcher(lambda items: items[:1], pool, max_batch=2, max_wait=0.01)
            running = asyncio.create_task(batcher.run())
            found = await asyncio.gather(batcher.submit(1), batcher.submit(2), return_exceptions=True)
            assert [type(error) for error in found] == [ValueError, ValueError]
            assert await batcher.submit(3) == 3
            running.cancel()

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_batch_that_fails_for_who_has_gone_fails_for_the_others_too():
    async def main():
        with ThreadPoolExecutor(1) as pool:
            batcher = Batcher(lambda items: [1 / item for item in items], pool, max_batch=2, max_wait=0.01)
            given_up, waiting = (asyncio.create_task(batcher.submit(0)) for _ in range(2))
            await asyncio.sleep(0)
            given_up.cancel()
            running = asyncio.create_task(batcher.run())
            with pytest.raises(ZeroDivisionError):
                await waiting
            assert await batcher.submit(2) == 0.5
            running.cancel()

    asyncio.run(asyncio.wait_for(main(), 5))


def test_batches_are_full_or_late_and_errors_stay_in_theirs():
    batches = []

    def compute(items):
        batches.append(items)
        return [1 / item for item in items]

    async def submit():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(compute, executor, max_batch=3, max_wait=0.05)
            given_up = asyncio.create_task(batcher.submit(9))
            await asyncio.sleep(0)
            given_up.cancel()  # it is computed, and nobody waits for it
            others = [asyncio.create_task(batcher.submit(item)) for item in (1, 2, 4, 0, 5, 8)]
            await asyncio.sleep(0)
            assert len(batcher) == 7
            running = asyncio.create_task(batcher.run())
            start = time.monotonic()
            found = await asyncio.gather(*others, return_exceptions=True)
            running.cancel()
            return found, time.monotonic() - start

    found, seconds = asyncio.run(submit())
    assert batches == [[9, 1, 2], [4, 0, 5], [8]] and seconds >= 0.04
    assert found[:2] == [1, 0.5] and found[5] == 1 / 8
    assert [type(error) for error in found[2:5]] == [ZeroDivisionError] * 3


@pytest.fixture
def server(classifier):
    """A server at a socket: its port, and a function that stops it as SIGTERM does."""
    held = Held(classifier)
    held.let_go.set()
    server = uvicorn.Server(uvicorn.Config(create_app({"animals": held}), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)

    def stop():
        server.should_exit = True

    port, connections = server.servers[0].sockets[0].getsockname()[1], server.server_state.connections
    yield SimpleNamespace(port=port, stop=stop, thread=thread, held=held, connections=connections)
    stop()
    thread.join(10)


def post(connection: http.client.HTTPConnection, content: bytes) -> dict[str, float]:
    connection.request("POST", "/predict?top_k=99", content, PNG)
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert response.status == 200, answer
    return probabilities(answer["predictions"][0])


def test_four_clients_at_a_socket_and_an_orderly_end(server, expected):
    contents = list(expected)

    def ask(client: int, until: float) -> int:
        connection, answered = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10), 0
        while time.monotonic() < until:
            content = contents[(client + answered) % len(contents)]
            assert post(connection, content) == pytest.approx(expected[content], abs=1e-6)
            answered += 1
        return answered

    with ThreadPoolExecutor(4) as pool:
        answered = list(pool.map(ask, range(4), [time.monotonic() + 1.5] * 4))
        assert min(answered) > 1
        server.held.reached.clear()
        server.held.let_go.clear()
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        last = pool.submit(post, connection, contents[0])
        assert server.held.reached.wait(10)
        server.stop()
        time.sleep(0.3)
        assert server.thread.is_alive() and not last.done()
        server.held.let_go.set()
        assert last.result() == pytest.approx(expected[contents[0]], abs=1e-6)
        server.thread.join(10)
        assert not server.thread.is_alive()


def test_nothing_is_decoded_for_who_has_gone(server, expected, monkeypatch):
    begun, go_on, decode = [], threading.Event(), Images.decode

    def decode_later(self, index):
        begun.append(index)
        assert go_on.wait(10)
        return decode(self, index)

    monkeypatch.setattr(Images, "decode", decode_later)
    content, connection = next(iter(expected)), http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    body = b"".join(PART % (i, content) for i in range(8)) + b"--b--"
    connection.request("POST", "/predict", body, MULTIPART)
    wait_for(lambda: len(begun) == 2)  # the server's threads for it
    connection.close()
    wait_for(lambda: not server.connections)
    go_on.set()
    assert post(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10), content)
    assert sorted(begun) == [0, 0, 1]


def wait_for(condition) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_command_hands_its_options_on(run, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: served.append((app, options)))
    options = ["--port", "0", "--max-images", "1", "--max-wait-ms", "0", "--threads", "1"]
    assert cli.main(["serve", f"birds={run}", f"{run}/adapter", *options]) == 0
    ((app, given),) = served
    assert (given["host"], given["port"]) == ("127.0.0.1", 0)
    with TestClient(app) as client:
        assert list(client.get("/models").json()["models"]) == ["birds", "adapter"]
        answer = client.post("/predict?model=birds", files=form(b"x", b"y"))
        assert answer.json()["kind"] == "too_many_images" and "at most 1" in answer.json()["error"]
    with pytest.raises(SystemExit):
        cli.main(["serve", str(run), "--port", "65536"])
    assert "65536: expected a port, 0 to 65535" in capsys.readouterr().err
    for wrong in ("0", "1025", "9" * 20):
        with pytest.raises(SystemExit):
            cli.main(["serve", str(run), "--threads", wrong])
        assert f"{wrong}: expected 1 to 1024" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", str(run)]) == 1
    assert "pip install 'insvp-fast[serve]'" in capsys.readouterr().err


def test_an_adapter_is_served_in_fp32_if_it_says_what_its_classes_are(tmp_path):
    model = InsVPViT("vit_shapes_32", num_classes=2, pretrained=True).bfloat16()
    model.save_pretrained(tmp_path, preprocessing=RELEASED_PREPROCESSING | {"input_size": (3, 32, 32)})
    with pytest.raises(TrainingError, match=f"{tmp_path} records no class names"):
        load_classifier(tmp_path)
    model.save_pretrained(tmp_path, class_names=["cat", "dog"])
    classifier = load_classifier(tmp_path)
    logits = classifier.logits(torch.zeros(2, 3, 32, 32))
    assert logits.dtype == torch.float32 and not logits.requires_grad


def test_models_are_named_by_folder_or_as_told(tmp_path):
    (tmp_path / "a=b").mkdir()
    found = name_models([f"{tmp_path}/a=b", "birds=runs/cub-1", "runs/dogs-2/"])
    assert found == {"a=b": f"{tmp_path}/a=b", "birds": "runs/cub-1", "dogs-2": "runs/dogs-2/"}
    with pytest.raises(CommandError, match="x/cub and y/cub are both named cub: expected NAME=RUN for one"):
        name_models(["x/cub", "y/cub"])
    for text in ("=x/cub", "cub="):
        with pytest.raises(CommandError, match=f"{text} names no model: expected RUN or NAME=RUN"):
            name_models([text])


def test_refused_requests_leave_room_for_others(classifier, expected):
    with TestClient(create_app({"animals": classifier}, Limits(max_requests=1))) as client:
        for _ in range(2):
            assert client.post("/predict", content=b"", headers=PNG).json()["kind"] == "no_image"
        assert client.post("/predict", content=next(iter(expected)), headers=PNG).status_code == 200


def test_an_item_that_has_waited_long_enough_is_computed_at_once():
    async def main():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(lambda items: items, executor, max_batch=2, max_wait=1.5)
            waiting = asyncio.create_task(batcher.submit(1))
            await asyncio.sleep(1.6)  # nobody takes it yet
            running, start = asyncio.create_task(batcher.run()), time.monotonic()
            assert await waiting == 1
            running.cancel()
            return time.monotonic() - start

    assert asyncio.run(main()) < 1.2


def test_the_time_to_answer_is_in_seconds(classifier, expected):
    with TestClient(create_app({"animals": classifier})) as client:
        start = time.perf_counter()
        client.post("/predict", content=next(iter(expected)), headers=PNG)
        seconds = time.perf_counter() - start
        assert 0 < metrics(client)["insvp_request_seconds_sum"] <= seconds


def test_a_body_of_just_as_many_bytes_as_are_allowed_is_read(client):
    for content in (b"x" * 60_000, iter([b"x" * 30_000] * 2)):
        assert client.post("/predict?model=run", content=content, headers=PNG).status_code == 422
