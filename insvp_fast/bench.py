"""How InsVP is timed against the bare frozen timm ViT, and the report of ``insvp bench``.

A job makes a model do one thing: inference, forward + backward, or a training step. All models get the same random
weights, images and targets. The bare backbone's training step has a gradient to its input and none to its weights:
what prompting an image at least costs. Runs alternate in one process, so that whatever else the machine does falls on
all of them, and a ratio is the median of the ratios of neighbours.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from insvp_fast import InsVPConfig, InsVPReference, InsVPViT, native_status
from insvp_fast.runtime import hardware, products, torch_private
from insvp_fast.testing import DEVICE, relative_error, saved_bytes

__all__ = [
    "AMP",
    "CONFIGS",
    "JOBS",
    "PROVIDERS",
    "alternate",
    "clock",
    "compare",
    "forward_backward",
    "inference",
    "machine",
    "make_images",
    "make_model",
    "report",
    "table",
    "training_step",
]

PROVIDERS = ("bare", "reference", "insvp_fast", "bare compiled", "reference compiled", "insvp_fast compiled")
CONFIGS = {"paper": InsVPConfig(), "released": InsVPConfig.released()}
AMP = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # fp16 without a GradScaler: the same work
NUM_CLASSES = 200

Run = Callable[[], dict[str, Tensor]]
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------ models and jobs


def make_model(
    provider: str,
    name: str,
    config: InsVPConfig | None = None,
    options: Mapping[str, Any] | None = None,
    **backbone_kwargs: Any,
) -> nn.Module:
    """One of ``PROVIDERS`` around a timm ViT with random weights, on ``DEVICE``; seeded, so that all have the same.

    Args:
        options: further arguments of ``InsVPViT``, which change how it computes and not what.
        backbone_kwargs: for ``timm.create_model``.
    """
    kind, _, compiled = provider.partition(" ")
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=NUM_CLASSES, **backbone_kwargs)
    torch.manual_seed(1)
    model: nn.Module
    if kind == "bare":
        model = backbone.eval().requires_grad_(False)
    elif kind == "reference":
        model = InsVPReference(backbone, None, config)
    else:
        model = InsVPViT(backbone, None, config, **(options or {}))
    return compile_model(model.to(DEVICE)) if compiled else model.to(DEVICE)


def compile_model(model: nn.Module) -> nn.Module:
    """The model compiled for one shape, as one graph; what was compiled before is forgotten, lest a limit is hit."""
    torch.compiler.reset()
    return torch.compile(model, dynamic=False, fullgraph=True)  # type: ignore[return-value]


def make_images(model: nn.Module, batch: int) -> tuple[Tensor, Tensor]:
    """Random images and targets for a model."""
    # of the seeds tried, the one that leaves the specific prompter's pooling windows clearest: where two pixels differ
    # by less than fp32 rounds, the gradient of either is right, and no parity can be asked for
    torch.manual_seed(7)
    backbone: Any = getattr(model, "backbone", model)
    size = backbone.patch_embed.img_size
    return torch.randn(batch, 3, *size, device=DEVICE), torch.randint(0, NUM_CLASSES, (batch,), device=DEVICE)


def inference(model: nn.Module, batch: int, amp: torch.dtype | None) -> Run:
    """Logits without gradients, in evaluation mode."""
    image, _ = make_images(model.eval(), batch)

    def run() -> dict[str, Tensor]:
        with torch.inference_mode(), torch.autocast(DEVICE.type, amp, enabled=amp is not None):
            return {"logits": model(image)}

    return run


def forward_backward(model: nn.Module, batch: int, amp: torch.dtype | None) -> Run:
    """Logits, cross-entropy and the gradients of whatever requires one, by name; of the image if nothing else does."""
    image, target = make_images(model, batch)
    trained: dict[str, Tensor] = {
        name.removeprefix("_orig_mod."): p for name, p in model.named_parameters() if p.requires_grad
    }
    if not trained:
        trained = {"image": image.requires_grad_()}
    model.train("image" not in trained)

    def run() -> dict[str, Tensor]:
        for tensor in trained.values():
            tensor.grad = None
        with torch.autocast(DEVICE.type, amp, enabled=amp is not None):
            logits = model(image)
            loss = F.cross_entropy(logits.float(), target)
        loss.backward()
        gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
        return {"logits": logits.detach(), "loss": loss.detach(), **gradients}

    return run


def training_step(model: nn.Module, batch: int, amp: torch.dtype | None, **optimizer: Any) -> Run:
    """``forward_backward`` and AdamW on what is trained: ``model.trained_parameters()`` where there is one."""
    run = forward_backward(model, batch, amp)
    choose = getattr(model, "trained_parameters", lambda: [p for p in model.parameters() if p.requires_grad])
    trained = choose()
    adamw = torch.optim.AdamW(trained, **optimizer) if trained else None

    def step() -> dict[str, Tensor]:
        results = run()
        if adamw is not None:
            adamw.step()
        return results

    return step


JOBS: dict[str, Callable[..., Run]] = {
    "inference": inference,
    "forward + backward": forward_backward,
    "training step": training_step,
}


# --------------------------------------------------------------------------------------------------------------- timing


def clock() -> float:
    """Seconds, once the device has done what it was told: a GPU answers before."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(
    runs: Mapping[str, Callable[[], object]], rounds: int, warmup: float | None = None
) -> dict[str, list[float]]:
    """Seconds of each run in each round, after warm-up rounds: one, and on a GPU as many as its clocks need."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    begin, warmup = clock(), (3.0 if DEVICE.type == "cuda" else 0.0) if warmup is None else warmup
    warm = False
    while len(next(iter(seconds.values()))) < rounds:
        for name, run in runs.items():
            start = clock()
            run()
            elapsed = clock() - start
            if warm:
                seconds[name].append(elapsed)
        warm = warm or clock() - begin >= warmup
    return seconds


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and the percentiles 20 and 80."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), p20, p80


def compare(
    job: str,
    precision: str,
    providers: Sequence[str],
    name: str,
    batch: int,
    rounds: int,
    config: str = "paper",
    make: Callable[..., nn.Module] = make_model,
    **kwargs: Any,
) -> list[Row]:
    """One row per provider: times, ratios to the first provider, memory, and the error of logits against float64."""
    amp = AMP[precision]
    models = {provider: make(provider, name, CONFIGS[config], **kwargs) for provider in providers}
    runs = {provider: JOBS[job](model, batch, amp) for provider, model in models.items()}
    seconds = alternate(runs, rounds)
    exact: dict[str, Tensor] = {}
    rows = []
    for provider, model in models.items():
        median, _, _ = spread(seconds[provider])
        ratios = [mine / first for mine, first in zip(seconds[provider], seconds[providers[0]], strict=True)]
        ratio, p20, p80 = spread(ratios)
        row: Row = {"job": job, "precision": precision, "provider": provider, "model": name, "config": config}
        row |= {"batch": batch, "rounds": rounds, "seconds": median, "images per second": batch / median}
        row |= {"ratio": ratio, "ratio p20": p20, "ratio p80": p80}
        if DEVICE.type == "cuda":
            row["peak MB"] = peak_bytes(runs[provider]) / 1e6
        if job == "inference":
            kind = "bare" if provider.startswith("bare") else "reference"
            if kind not in exact:
                wide = make_model(kind, name, CONFIGS[config], **kwargs).double().eval()
                with torch.inference_mode():
                    exact[kind] = wide(make_images(wide, batch)[0].double())
            row["error"] = relative_error(runs[provider]()["logits"], exact[kind])
        else:
            image, _ = make_images(model, batch)  # another batch would be compiled anew
            image.requires_grad_(provider.startswith("bare"))
            row["saved MB per image"] = saved_bytes(model, image, amp) / batch / 1e6
        rows.append(row)
    return rows


def peak_bytes(run: Callable[[], object]) -> int:
    """GPU memory that a run takes at its highest beyond what was there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# -------------------------------------------------------------------------------------------------------------- machine


def machine() -> dict[str, Any]:
    """What a figure must not be quoted without."""
    facts: dict[str, Any] = {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
    facts["attention"] = {precision: sdpa_backend(dtype or torch.float32) for precision, dtype in AMP.items()}
    if DEVICE.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "hip": torch.version.hip}
        return facts | {"cudnn": torch.backends.cudnn.version(), "state": gpu_state()}
    how = {str(dtype).removeprefix("torch."): products.cpu_provider(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return facts | {
        "device": f"{cpu_name()}, {instructions()}, {torch.get_num_threads()} threads",
        "instructions": instructions(),
        "bf16 products": hardware.has_products(torch.bfloat16),
        "frozen products": how,
        "native library": str(native_status()),
    }


def cpu_name() -> str:
    """The processor's name for itself, which does not tell its instructions."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def instructions() -> str:
    """The instruction set that PyTorch's code uses here, told finer where products in bf16 differ."""
    level = torch.backends.cpu.get_cpu_capability()
    if level != "AVX512":
        return level
    found = torch.cpu.get_capabilities()
    if found.get("amx_tile", False):
        return "AVX512-AMX"
    return "AVX512-BF16" if found.get("avx512_bf16", False) else level


def sdpa_backend(dtype: torch.dtype) -> str:
    """Which of its kernels PyTorch's attention takes for 197 queries and 206 keys."""
    q, k = (torch.empty(1, 12, length, 64, dtype=dtype, device=DEVICE) for length in (197, 206))
    return torch_private.sdpa_backend(q, k, k)


def gpu_state() -> str | None:
    """Power limit, clock and highest clock as nvidia-smi tells them."""
    if not (tool := shutil.which("nvidia-smi")):
        return None
    query = [
        tool,
        "--query-gpu=power.limit,clocks.sm,clocks.max.sm",
        "--format=csv",
        f"--id={torch.cuda.current_device()}",
    ]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.strip() or None


# --------------------------------------------------------------------------------------------------------------- report


def report(file: str | None, name: str, batch: int | None, rounds: int) -> list[Row]:
    """Time the providers, print each row, and write a table and a plot if there is a file for them.

    Shorter than ``benchmarks/paired.py``: the eager providers, inference and training step.
    """
    if file is not None:
        import matplotlib.figure  # noqa: F401  # not installed: better said now than after the measurement
    batch = batch or (2 if DEVICE.type == "cpu" else 64)
    rows: list[Row] = []
    for precision in ("fp32", "bf16"):
        if DEVICE.type == "cpu" and not hardware.has_products(AMP[precision] or torch.float32):
            print(f"{precision} left out: without instructions for it, PyTorch's own products take minutes")
            continue
        for job in ("training step", "inference"):
            rows += compare(job, precision, PROVIDERS[:3], name, batch, rounds)
            print("\n".join(map(line, rows[-3:])), flush=True)
    if file is not None:
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = path.with_suffix(".png")
        draw(rows, picture)
        facts = "\n".join(f"- {key}: {value}" for key, value in machine().items())
        path.write_text(
            f"# InsVP against the bare frozen timm ViT\n\n{name}, random weights and images, "
            "the paper's configuration.\n\n"
            f"{facts}\n\n{table(rows)}\n\n![images per second]({picture.name})\n"
        )
        print(f"written: {path}, {picture}")
    return rows


def line(row: Row) -> str:
    """A row as one line of a terminal."""
    text = f"{row['job']:18} {row['precision']:5} {row['config']:8} {row['provider']:24} batch {row['batch']}: "
    text += f"{row['seconds']:8.4f} s, {row['images per second']:9.2f} images/s, ratio {ratio(row)}"
    more = {"saved MB per image": "saved {:.1f} MB/image", "peak MB": "peak {:.0f} MB", "error": "error {:.1e}"}
    return ", ".join([text, *(form.format(row[key]) for key, form in more.items() if key in row)])


def ratio(row: Row) -> str:
    """Time over the first provider's time, with its spread where there is one."""
    return f"{row['ratio']:.2f}" + (f" ({row['ratio p20']:.2f}-{row['ratio p80']:.2f})" if "ratio p20" in row else "")


def table(rows: Sequence[Row]) -> str:
    """Rows as a table in Markdown; a ratio is time over the bare ViT's, with the percentiles 20 and 80."""
    lines = ["| job | precision | batch | | images/s | ratio | saved for backward, per image | error of logits |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        config = "" if row.get("config", "paper") == "paper" else f", {row['config']}"
        saved = f"{row['saved MB per image']:.0f} MB" if "saved MB per image" in row else ""
        error = f"{row['error']:.0e}" if "error" in row else ""
        cells = [f"{row['model']}{config}, {row['job']}", row["precision"], str(row["batch"]), title(row["provider"])]
        lines.append("| " + " | ".join([*cells, f"{row['images per second']:.2f}", ratio(row), saved, error]) + " |")
    return "\n".join(lines)


def title(provider: str) -> str:
    """A provider's name for readers."""
    kind, _, more = provider.partition(" ")
    names = {
        "bare": "bare timm ViT",
        "reference": "InsVPReference",
        "insvp_fast": "InsVPViT",
        "released": "the release",
    }
    return names.get(kind, kind) + (f", {more}" if more else "")


def draw(rows: Sequence[Row], file: Path) -> None:
    """Images per second, one panel per job and precision."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["job"], row["precision"]) for row in rows))
    figure = Figure(figsize=(3.4 * len(panels), 2.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        shown = [row for row in rows if (row["job"], row["precision"]) == panel][::-1]
        bars = axes.barh([title(row["provider"]) for row in shown], [row["images per second"] for row in shown])
        axes.bar_label(bars, [f"{row['images per second']:.3g}" for row in shown], padding=2)
        axes.set(xlabel="images/s", title=f"{', '.join(panel)}, batch {shown[0]['batch']}")
        axes.title.set_fontsize("medium")
        axes.margins(x=0.2)
    figure.suptitle(f"{rows[0]['model']} on {machine()['device']}, torch {torch.__version__}", fontsize="medium")
    figure.savefig(file, dpi=120)
