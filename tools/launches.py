"""Say what a training step and inference launch on a GPU, operator by operator: docs/launches.md.

    python -m tools.launches            # prints the page
    python -m tools.launches --write    # writes it

No GPU is needed: the model runs on tensors without numbers that pretend to be on one, with the operators that the
dispatcher would send there. Two such models, one a block deeper, differ by what a block launches.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from insvp_fast.kernels.gpu import chip
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from triton.runtime.jit import KernelInterface

from insvp_fast import InsVPConfig, InsVPViT, coverage
from insvp_fast.runtime import prepack, products

PAGE = Path(__file__).parents[1] / "docs" / "launches.md"
NAME, DEPTH, BATCH = "vit_base_patch16_224", 12, 8
EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
NO_LAUNCH = (*EMPTY, "_unsafe_view", "detach", "device", "lift_fresh", "promote_types")
HEADER = """# Launches on a GPU

What the paper's configuration around a ViT-B/16 launches under bf16 autocast with torch {version}, and the release's in
training: PyTorch's operators without views and empty tensors, as its dispatcher sees them, and Triton kernels
(`_..._kernel`) by name. A block is one between the first and the last. Not here are the loss, the optimizer and the
look at the frozen weights. From the second batch of a shape on, a [CUDA graph](performance.md#on-a-gpu) launches all of
this but the norm behind the last block and the head: the kernels are the same, and the host calls once.

`python -m tools.launches --write` makes this page, without a GPU, and a test makes it again.

{summary}
"""


class Step(NamedTuple):
    """The operators of a forward pass and, in training, of a backward pass."""

    forward: Counter[str]
    backward: Counter[str]


class Recorder(TorchDispatchMode):
    """Counts PyTorch's operators and the Triton kernels that are launched, also inside this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "insvp_fast":
            with self:  # what it is registered with, instead of what it would be traced as
                return operator._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        name = operator._schema.name.partition("::")[2]
        is_view = not operator._schema.is_mutable and any(result.alias_info for result in operator._schema.returns)
        if not is_view and name not in NO_LAUNCH:
            self.counts[f"{operator.namespace}.{name}"] += 1
        return operator(*args, **(kwargs or {}))


def launch(kernel: Any, grid: Any) -> Any:
    """Instead of ``kernel[grid]``, which launches a Triton kernel."""
    (recorder,) = (mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Recorder))

    def run(*args: Any, **kwargs: Any) -> None:
        recorder.counts[kernel.fn.__name__] += 1

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the page instead of printing it")
    text = page()
    PAGE.write_text(text) if parser.parse_args().write else print(text)


def page() -> str:
    """The text of docs/launches.md."""
    training, inference = ([launches(depth, mode) for depth in (2, 3)] for mode in (True, False))
    released = [launches(depth, True, InsVPConfig.released()) for depth in (2, 3)]
    lines, summary = [], ["| | a block | 12 blocks and all else |", "|---|---|---|"]
    for title, steps, direction in (
        ("Training, forward", training, 0),
        ("Training, backward", training, 1),
        ("Inference", inference, 0),
        ("The release's configuration: training, forward", released, 0),
        ("The release's configuration: training, backward", released, 1),
    ):
        shallow, deep = (step[direction] for step in steps)
        block = deep - shallow
        total = shallow + Counter({name: (DEPTH - 2) * number for name, number in block.items()})
        summary.append(f"| {title[0].lower()}{title[1:]} | {block.total()} | {total.total()} |")
        lines += ["", f"## {title}", "", "| operator | a block | 12 blocks and all else |", "|---|---|---|"]
        for name in sorted(total, key=lambda name: (-block[name], -total[name], name)):
            lines.append(f"| `{name}` | {block[name] or ''} | {total[name]} |")
    return "\n".join([HEADER.format(version=version(), summary="\n".join(summary)).rstrip(), *lines]) + "\n"


def version() -> str:
    """Of torch, without what its operators do not change with."""
    return torch.__version__.partition("+")[0]


def launches(depth: int, training: bool, config: InsVPConfig | None = None) -> Step:
    """What the second step of a model launches: the first one packs the weights."""
    with torch.device("meta"):
        model = InsVPViT(timm.create_model(NAME, depth=depth), 200, config or InsVPConfig(), compile_prompters=False)
    model.train(training)
    with pretended_gpu(), torch.set_grad_enabled(training):
        move(model)
        image = torch.empty(BATCH, 3, 224, 224, device="cuda")
        for _ in range(2):
            with Recorder() as forward:
                logits = model(image)
            ones = torch.ones_like(logits)
            with Recorder() as backward, torch.no_grad():
                if training:
                    differentiate(logits, ones)
    return Step(forward.counts, backward.counts)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float) -> Tensor:
    """One of the kernels that PyTorch's attention chooses on a GPU; without one it takes its products."""
    assert mask is None
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    return out


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Tensors without numbers on an H100, bf16 autocast, and packed weights that are kept without a look at them."""
    made: dict[Any, Any] = {}

    def packed(sources: Any, name: Any, make: Any, **_: Any) -> Any:
        key = (*(None if w is None else prepack.place(w) for w in sources), name)
        if key not in made:
            made[key] = make()
        return made[key]

    with ExitStack() as stack:
        for home, name, value in (
            (chip, "arch", lambda device: 90),
            (chip, "shared_memory", lambda device: float("inf")),
            (coverage, "covers", lambda module, obstacle=None: True),  # it does not know such parameters
            (products, "packed", packed),
            (KernelInterface, "__getitem__", launch),
            (torch.cuda, "device_of", nullcontext),
            (F, "scaled_dot_product_attention", fused_attention),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda: True),
        ):
            stack.enter_context(patch.object(home, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.autocast("cuda", torch.bfloat16))
        yield


def move(model: nn.Module) -> None:
    """Put parameters and buffers where the device is pretended."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(p, device="cuda"), p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cuda")


def differentiate(result: Tensor, grad: Tensor) -> None:
    """A backward pass, node by node: PyTorch's engine wants the device of a tensor to exist."""
    assert result.grad_fn is not None
    order: list[Any] = []
    waiting, stack = Counter[Any](), [result.grad_fn]
    while stack:
        order.append(node := stack.pop())
        for following, _ in node.next_functions:
            if following is not None:
                waiting[following] += 1
                if waiting[following] == 1:
                    stack.append(following)
    grads: dict[Any, dict[int, Tensor]] = {result.grad_fn: {0: grad}}
    ready = [result.grad_fn]
    while ready:
        node = ready.pop()
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        held = grads.pop(node, {})
        outputs = run_node(node, [held.get(i) for i in range(len(node._input_metadata))]) if held and edges else []
        for (following, index), grad in itertools.zip_longest(edges, outputs):
            if grad is not None:
                own = grads.setdefault(following, {})
                wanted = following._input_metadata[index]
                grad = grad.sum_to_size(wanted.shape).to(wanted.dtype)  # as PyTorch's engine does
                own[index] = own[index] + grad if index in own else grad
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)


def run_node(node: Any, grads: list[Tensor | None]) -> list[Tensor | None]:
    """The gradients that a node of the graph passes on along its edges that lead anywhere."""
    in_python = isinstance(node, torch.autograd.function.BackwardCFunction)
    outputs = (node.apply if in_python else node)(*grads)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    wanted = node.needs_input_grad if in_python else [following is not None for following, _ in node.next_functions]
    return [grad for grad, needed in zip(outputs, wanted, strict=True) if needed]


if __name__ == "__main__":
    main()
