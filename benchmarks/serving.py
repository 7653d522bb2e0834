"""Latency and throughput of `insvp serve` under load, beside a plain loop over the same images.

python -m benchmarks.serving runs/digits-1 --clients 8 --seconds 60 --output serving.json

The server is a process of its own, the clients are threads of this one with a connection each: they send an image, wait
for the answer, compare it with the plain loop's, and send the next. Needs the extra ``serve``.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from insvp_fast.bench.machine import machine_facts
from insvp_fast.commands.options import positive
from insvp_fast.data.image_list import ImageList
from insvp_fast.training.prediction import Classifier, load_classifier

CPU = "process_cpu_seconds_total"  # of the server
TOLERANCE = 1e-5  # of probabilities: batches of other sizes round otherwise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder or an adapter folder")
    parser.add_argument("images", nargs="*", help="files and folders; by default 64 made-up JPEGs of 500x375 pixels")
    parser.add_argument("--clients", type=positive, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--loop-seconds", type=float, default=10, help="of each plain loop")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--options", default="", help="of `insvp serve`, such as '--max-wait-ms 2'")
    parser.add_argument("--output", default="serving.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    classifier, load = load_classifier(arguments.run), [os.getloadavg()]
    with tempfile.TemporaryDirectory() as folder:
        files = list(ImageList(arguments.images or [make_images(Path(folder))]))
        expected = {file: ranking(classifier, [file])[0] for file in files}
        rows = [time_loop(classifier, files, batch, arguments.loop_seconds) for batch in (1, 8)]
        load.append(os.getloadavg())
        with serve(arguments.run, ["--threads", str(arguments.threads), *arguments.options.split()]) as port:
            rows.append(time_server(port, files, expected, arguments.clients, arguments.seconds))
        load.append(os.getloadavg())
    result = {"machine": machine_facts(), "cores": os.cpu_count(), "load average": load, "rows": rows}
    result |= {"run": arguments.run, "images": len(files), "options": arguments.options}
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print_table(rows)


def make_images(folder: Path, number: int = 64) -> str:
    """Noise of a low frequency as JPEGs."""
    random = np.random.default_rng(0)
    for index in range(number):
        small = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg", quality=90)
    return str(folder)


def ranking(classifier: Classifier, files: list[str]) -> list[dict[str, float]]:
    """The probability of each class for each file: what `insvp predict` does without its loader."""
    images = classifier.images(files)
    logits = classifier.logits(torch.stack([images[index][0] for index in range(len(files))]))
    return list(map(dict, classifier.rank(logits, len(classifier.class_names))))


def time_loop(classifier: Classifier, files: list[str], batch: int, seconds: float) -> dict[str, Any]:
    times: list[float] = []
    cpu = time.process_time()
    end, endless = time.perf_counter() + seconds, cycle(files)
    while (start := time.perf_counter()) < end:
        ranking(classifier, list(islice(endless, batch)))
        times.append(time.perf_counter() - start)
    cpu = time.process_time() - cpu
    return row(f"plain loop, batch {batch}", times, len(times) * batch, sum(times), cpu)


@contextlib.contextmanager
def serve(run: str, options: list[str]) -> Iterator[int]:
    """The port of a running `insvp serve`, which is told to end and has to do so."""
    command = [sys.executable, "-m", "insvp_fast", "serve", run, "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = (re.search(r"running on http://[\d.]+:(\d+)", line) for line in process.stderr)
        try:
            yield int(next(filter(None, found))[1])
        finally:
            process.terminate()
            process.communicate(timeout=30)


def time_server(
    port: int, files: list[str], expected: dict[str, dict[str, float]], clients: int, seconds: float
) -> dict[str, Any]:
    contents = [Path(file).read_bytes() for file in files]

    def ask(client: int) -> tuple[list[float], list[str]]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        times, errors = [], []
        index = client * len(files) // clients
        while (start := time.perf_counter()) < end:
            index = (index + 1) % len(files)
            try:
                answer = post(connection, contents[index])
            except (OSError, http.client.HTTPException, RuntimeError) as error:
                errors.append(repr(error))
                connection.close()
                continue
            times.append(time.perf_counter() - start)
            right = expected[files[index]]
            if any(abs(right[name] - value) > TOLERANCE for name, value in answer.items()):
                errors.append(f"{files[index]}: {answer} is not {right}")
        return times, errors

    cpu, begin = metric(port, CPU), time.perf_counter()
    end = begin + seconds
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(ask, range(clients)))
    wall, cpu = time.perf_counter() - begin, metric(port, CPU) - cpu
    times, errors = [time for times, _ in found for time in times], [error for _, errors in found for error in errors]
    size = metric(port, "insvp_batch_size_sum") / max(metric(port, "insvp_batch_size_count"), 1)
    more = {"errors": len(errors), "first errors": errors[:3], "mean batch": size}
    return row(f"server, {clients} clients", times, len(times), wall, cpu) | more


def post(connection: http.client.HTTPConnection, content: bytes) -> dict[str, float]:
    connection.request("POST", "/predict?top_k=1000000", content, {"Content-Type": "image/jpeg"})
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {body[:200]!r}")
    prediction = json.loads(body)["predictions"][0]
    return dict(zip(prediction["classes"], prediction["probabilities"], strict=True))


def metric(port: int, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def row(name: str, times: list[float], images: int, wall: float, cpu: float) -> dict[str, Any]:
    quantiles = {f"p{q} ms": float(np.percentile(times, q)) * 1000 for q in (50, 95, 99)}
    rates = {"images per second": images / wall, "CPU ms per image": cpu / images * 1000}
    return {"what": name, "requests": len(times)} | rates | quantiles


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| | images/s | p50 | p95 | p99 | CPU time per image | errors | mean batch |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        times = " | ".join(f"{row[f'p{q} ms']:.1f} ms" for q in (50, 95, 99))
        size = f"{row['mean batch']:.1f}" if "mean batch" in row else ""
        cells = f"{row['images per second']:.0f} | {times} | {row['CPU ms per image']:.1f} ms"
        print(f"| {row['what']} | {cells} | {row.get('errors', '')} | {size} |")


if __name__ == "__main__":
    main()
