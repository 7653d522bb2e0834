"""What is compiled ahead of time: every Triton kernel at its main shapes, with the arguments of its launcher."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from insvp_fast.kernels.gpu import (
    activation,
    attention,
    chip,
    conv,
    conv_pool,
    fingerprint,
    gate,
    norm_insert,
    rotate,
    superpose,
)

# versions of triton that compile every shape without shortcomings (`python -m tools.aot --all`)
CHECKED = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}


class Case(NamedTuple):
    """One kernel to compile.

    Attributes:
        signature: types of the arguments that are given at run time, by name.
        constants: all other arguments, and the launch options.
        multiples: arguments that are multiples of 16 at this shape; a launch detects this by itself.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    multiples: tuple[str, ...] = ()


def case(name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any], *multiples: str) -> Case:
    """A case in which pointers that are not in ``signature`` are None."""
    absent = {a: None for a in kernel.arg_names if a.endswith("_ptr") and a not in signature}
    return Case(name, kernel, signature, absent | constants, multiples)


def pointers(kind: str, *names: str) -> dict[str, str]:
    """The signature of pointers of one type."""
    return {f"{name}_ptr": kind for name in names}


def superpose_cases(arch: int | str) -> Iterator[Case]:
    """The image prompt for images of 224x224, with patches of 16 and 14 pixels; in fp32 with dropout."""
    bf16, fp32 = torch.bfloat16, torch.float32
    variants = [(16, 16, bf16, bf16), (16, 16, fp32, fp32)]
    # The other variants are compiled for one or two architectures each, to keep the run short.
    if arch == 80:
        variants.append((14, 16, torch.float16, torch.float16))
    if arch == 90:
        variants += [(16, 16, fp32, bf16), (16, 16, torch.uint8, bf16)]
    if arch in (80, 90):
        variants += [(16, R, fp32, fp32) for R in ((32, 128) if arch == 80 else (64,))]
    for P, R, image, tokens in variants:
        x, y = POINTERS[image], POINTERS[tokens]
        scalars = {"M": "i32", "global_weight": "fp32", "patch_weight": "fp32"}
        weights = pointers("*fp32", "w1", "w2", "hidden")
        affine = pointers("*fp32", "scale", "shift") if image == torch.uint8 else {}
        affine |= pointers("*u8", "kept") if image == tokens == fp32 else {}
        shape, strides = (2, 3, 224, 224), (3 * 224 * 224, 224 * 224, 224, 1)
        fwd, bwd, bwd_weight = (
            {**superpose.constants(kind, shape, P, R, (image, tokens), arch), "IMAGE": strides}
            for kind in ("fwd", "bwd", "bwd_weight")
        )
        label = f"P{P}-{x[1:]}-{y[1:]}" + f"-R{R}" * (R != 16)
        yield case(
            f"superpose_fwd-{label}",
            superpose._superpose_fwd_kernel,
            pointers(x, "image")
            | affine
            | weights
            | pointers("*fp32", "b1", "b2")
            | pointers(y, "global", "tokens")
            | scalars,
            {**fwd, "GLOBAL": strides, "HAS_GLOBAL": True, "KEPT": strides},
        )
        yield case(
            f"superpose_bwd-{label}",
            superpose._superpose_bwd_kernel,
            pointers(y, "grad", "d_global")
            | {name: kind for name, kind in affine.items() if name == "kept_ptr"}
            | weights
            | pointers("*fp32", "d_hidden")
            | pointers(x, "d_image")
            | scalars,
            {**bwd, "NEED_IMAGE": image != torch.uint8, "NEED_GLOBAL": True},
        )
        if R != 16:
            continue
        yield case(
            f"superpose_bwd_weight-{label}",
            superpose._superpose_bwd_weight_kernel,
            pointers(y, "grad") | pointers(x, "image") | affine
            | pointers("*fp32", "hidden", "d_hidden", "dw1", "db1", "dw2", "db2")
            | {"M": "i32", "patch_weight": "fp32"},
            {**bwd_weight, "KEPT": strides},
        )  # fmt: skip


def norm_insert_cases(arch: int | str) -> Iterator[Case]:
    """Width 768: all bf16 with weight and bias folded away, also without centering (RMSNorm), an fp32 stream with bf16
    products, and all fp32.
    """
    bf16, fp32, sizes = "*bf16", "*fp32", {"M": "i32", "T": "i32", "L": "i32"}
    variants = [(bf16, bf16, False, True), (fp32, bf16, True, True)]
    if arch == 90:
        variants += [(fp32, fp32, True, True), (bf16, bf16, False, False)]
    for stream, product, affine, center in variants:
        label = f"{stream[1:]}-{product[1:]}" + "-affine" * affine + "-rms" * (not center)
        constants = {"CENTER": center, "D": 768, **norm_insert.launch_config(768)}
        yield case(
            f"norm_insert_fwd-{label}",
            norm_insert._norm_insert_fwd_kernel,
            pointers(stream, "residual", "total") | pointers(product, "branch", "prompts", "normed")
            | (pointers(fp32, "weight", "bias") | pointers(product, "xhat") if affine else {})
            | pointers(fp32, "rstd") | sizes | {"prompt_stride": "i32", "eps": "fp32"},
            constants,
            "prompt_stride",
        )  # fmt: skip
        yield case(
            f"norm_insert_bwd-{label}",
            norm_insert._norm_insert_bwd_kernel,
            pointers(stream, "grad_residual", "d_residual", "d_prompts") | pointers(product, "grad_normed", "xhat")
            | (pointers(fp32, "weight") if affine else {})
            | (pointers(product, "d_branch") if stream != product else {})
            | pointers(fp32, "rstd") | sizes,
            constants,
        )  # fmt: skip


def activation_cases(arch: int | str) -> Iterator[Case]:
    """The activations with the pre-activation kept and with the derivative kept in 8 bits, in bf16, GELU also in fp32.

    Backward from 8 bits is the same for all.
    """
    variants = [("*bf16", name) for name in ("gelu", "gelu_tanh", "quick_gelu", "silu")]
    for dtype, name in variants + [("*fp32", "gelu")] * (arch == 90):
        label, n, constants = f"{name}-{dtype[1:]}", {"N": "i32"}, {"ACTIVATION": name, **activation.LAUNCH}
        for suffix, code, kept in (("", {}, dtype), ("_code", pointers("*u8", "code"), "*u8")):
            fwd = pointers(dtype, "pre", "hidden") | code | n
            yield case(f"activation_fwd{suffix}-{label}", activation._activation_fwd_kernel, fwd, constants, "N")
            if suffix == "" or name == "gelu":
                bwd = pointers(dtype, "grad", "out") | pointers(kept, "kept") | n
                yield case(f"activation_bwd{suffix}-{label}", activation._activation_bwd_kernel, bwd, constants, "N")


def gate_cases(arch: int | str, every_shape: bool) -> Iterator[Case]:
    """The hidden layer of EVA-02-B; of EVA-02-L, and the widest with the activation of most instructions."""
    shapes = [("*bf16", 2048, "silu", True)]
    if arch == 90 or every_shape:
        shapes.append(("*fp32", gate.WIDEST[True], "gelu", True))
    if every_shape:
        shapes += [("*bf16", 2730, "silu", True), ("*bf16", gate.WIDEST[True], "gelu", True)]
        shapes += [(dtype, gate.WIDEST[False], "gelu", False) for dtype in ("*bf16", "*fp32")]
    for dtype, D, name, normalized in shapes:
        config = {"ACTIVATION": name, "D": D, **gate.launch_config(D, normalized)}
        label, sizes = f"{name}-D{D}-{dtype[1:]}", {"M": "i32"}
        if normalized:
            sizes["eps"] = "fp32"
        else:
            config["eps"] = None
        fwd = pointers(dtype, "pre", "factor", "hidden") | sizes
        bwd = pointers(dtype, "grad", "pre", "factor", "d_pre", "d_factor") | sizes
        yield case(f"gate_fwd-{label}", gate._gate_fwd_kernel, fwd, config)
        yield case(f"gate_bwd-{label}", gate._gate_bwd_kernel, bwd, config)


def rotate_cases(arch: int | str, every_shape: bool) -> Iterator[Case]:
    """EVA-02-B and DINOv3-B, forward and backward; and the widest heads, of a width that is no power of two."""
    shapes = [("*bf16", 64, True, True), ("*bf16", 64, False, False)]
    if every_shape:
        widths, ways = (64, 88, rotate.WIDEST_HEAD), (True, False)
        shapes += [shape for shape in itertools.product(("*bf16", "*fp32"), widths, ways, ways) if shape not in shapes]
    for dtype, d, half, forward in shapes:
        sizes = dict.fromkeys(("M", "S", "first", "N", "head_stride"), "i32")
        signature = pointers(dtype, "x", "out") | pointers("*fp32", "rotation") | sizes
        constants = {"PARTS": 3, "H": 12, "D": d, "HALF": half, "FORWARD": forward, **rotate.launch_config(d)}
        label = f"{'half' if half else 'pairs'}-{'fwd' if forward else 'bwd'}-d{d}-{dtype[1:]}"
        yield case(f"rotate-{label}", rotate._rotate_kernel, signature, constants, "head_stride")


def attention_cases(arch: int | str, every_shape: bool) -> Iterator[Case]:
    """ViT-B/16 with 9 prompts, the most tokens that ``attention.covers`` allows, and other shapes within."""
    bf16, fp16, d = torch.bfloat16, torch.float16, 64
    shapes = [(bf16, 12, 197, 206), (fp16, 3, 231, 240)]
    # The other shapes are compiled for one architecture each, to keep the run short. T = 1 is a class token alone.
    shapes += {
        80: [(bf16, 12, 55, 64)],
        90: [(bf16, 3, 100, 109), (bf16, 12, 1, 206)],
        100: [(bf16, 3, 119, 128)],
        "gfx942": [(bf16, 3, 119, 128)],
    }[arch]
    if every_shape:
        others = [
            (dtype, H, S - 9, S) for dtype, H, S in itertools.product((bf16, fp16), (3, 12), (64, 109, 128, 206, 240))
        ]
        shapes += [shape for shape in others if shape not in shapes]
    for dtype, H, T, S in shapes:
        x, label = POINTERS[dtype], f"H{H}-T{T}-S{S}-{POINTERS[dtype][1:]}"
        fwd, bwd = (attention.constants(kind, H, T, S, d, dtype, arch) for kind in ("fwd", "bwd"))
        yield Case(
            f"attention_fwd-{label}",
            attention._attention_fwd_kernel,
            {"qkv_ptr": x, "out_ptr": x, "log2_scale": "fp32"},
            fwd | {"QKV": (S * 3 * H * d, 3 * H * d)},
        )
        yield Case(
            f"attention_bwd-{label}",
            attention._attention_bwd_kernel,
            {"grad_ptr": x, "qkv_ptr": x, "d_qkv_ptr": x, "scale": "fp32", "log2_scale": "fp32"},
            bwd | {"GRAD": (T * H * d, H * d), "QKV": (S * 3 * H * d, 3 * H * d)},
        )


def conv_cases(arch: int | str) -> Iterator[Case]:
    """The global prompter's convolutions of images of 224x224 under bf16 autocast."""
    bf16, fp32, side = "*bf16", "*fp32", 224
    variants = [(3, 6, 5, fp32, bf16)] + [(6, 3, 12, bf16, bf16)] * (arch == 90)
    for C, OUT, dilation, x, y in variants:
        label, relu = f"C{C}-{x[1:]}-{y[1:]}", C == 3
        narrow = torch.bfloat16 if y == bf16 else torch.float32
        same = {"MAP": (side, side), "CENTER": (side, side), "TAPS": (3, 3), "DILATION": dilation}
        same |= {"MARGIN": (dilation, dilation), "X": (C * side**2, side**2, side, 1)}
        yield case(
            f"conv_fwd-{label}",
            conv._conv_kernel,
            pointers(x, "x") | pointers(fp32, "weight", "bias") | pointers(y, "y"),
            same | {"C": C, "OUT": OUT, "WEIGHT": (9 * C, 9, 3, 1), "RELU": relu} | conv.MAP_LAUNCH,
        )
        yield case(
            f"conv_bwd_weight-{label}",
            conv._conv_bwd_weight_kernel,
            pointers(y, "grad", *(["y"] if relu else [])) | pointers(x, "x") | pointers(fp32, "d_weight", "d_bias")
            | {"M": "i32"},
            same | {"C": C, "OUT": OUT} | chip.operands(narrow, arch)
            | conv.weight_config(9 * C, OUT, arch),
        )  # fmt: skip


def windows_cases(arch: int | str) -> Iterator[Case]:
    """The release's dense convolutions of images of 224x224 under bf16 autocast; for A100 and H100 in fp32 too."""
    bf16, fp32, side = torch.bfloat16, torch.float32, 224
    variants = [(6, 3, 25, bf16, bf16)] + [(3, 6, 11, fp32, bf16)] * (arch == 90)
    variants += [(6, 3, 25, fp32, fp32)] * (arch in (80, 90))
    for C, OUT, taps, x, y in variants:
        label, margin = f"C{C}-{POINTERS[x][1:]}-{POINTERS[y][1:]}", taps // 2
        fixed = {"MAP": (side, side), "CENTER": (side, side), "TAPS": (taps, taps), "MARGIN": (margin, margin)}
        fixed |= {"OFFSET": conv.tl.int32} | chip.operands(y, arch)

        def constants(kind: str, C: int, OUT: int, taps=taps, margin=margin, y=y, fixed=fixed) -> dict[str, Any]:
            strides = C * side**2, side**2, side, 1
            return fixed | {"C": C, "OUT": OUT, "X": strides} | conv.windows_config(kind, OUT, taps, margin, y, arch)

        moved = pointers(POINTERS[y], "moved") | pointers("*fp32", "weight") | {"M": "i32"}
        yield case(
            f"windows_fwd-{label}",
            conv._conv_windows_kernel,
            pointers(POINTERS[x], "x") | moved | pointers("*fp32", "bias") | pointers(POINTERS[y], "y"),
            constants("map", C, OUT) | {"RELU": C == 3},
        )
        if (C, arch) == (6, 90):  # nobody asks for the image's gradient
            yield case(
                f"windows_bwd_map-{label}",
                conv._conv_windows_kernel,
                pointers(POINTERS[y], "x") | moved | pointers(POINTERS[x], "y"),
                constants("map", OUT, C) | {"RELU": False},
            )
        yield case(
            f"windows_bwd_weight-{label}",
            conv._conv_windows_bwd_weight_kernel,
            pointers(POINTERS[y], "grad") | pointers(POINTERS[x], "x") | pointers("*fp32", "d_moved") | {"M": "i32"},
            constants("weight", C, OUT),
        )


def conv_pool_cases(arch: int | str) -> Iterator[Case]:
    """The specific prompter's convolutions of images of 224x224, in bf16; for A100 and H100 the first in fp32 too."""
    bf16, fp32 = torch.bfloat16, torch.float32
    first, second = (3, 9, 224, 52, 4, 7, -5), (9, 27, 52, 16, 3, 9, 2)
    variants = [(*second, bf16), (*first, bf16)] + [(*first, fp32)] * (arch in (80, 90))
    for C, OUT, side, grid, pool, taps, margin, dtype in variants:
        x, scalars, label = POINTERS[dtype], {"M": "i32", "slope": "fp32"}, f"C{C}-{POINTERS[dtype][1:]}"
        same = {"C": C, "OUT": OUT, "MAP": (side, side), "GRID": (grid, grid), "POOL": pool, "TAPS": (taps, taps)}
        same |= {"OFFSET": conv_pool.tl.int32} | chip.operands(dtype, arch)
        patches = {"MARGIN": (margin, margin), "X": (C * side**2, side**2, side, 1)}
        result = pointers("*fp32", "y") | pointers("*u8", "index")
        yield case(
            f"conv_pool_fwd-{label}",
            conv_pool._conv_pool_fwd_kernel,
            pointers(x, "x", "moved") | pointers("*fp32", "weight", "bias") | result | scalars,
            same | patches | conv_pool.launch_config("fwd", OUT, pool, dtype, arch),
        )
        yield case(
            f"conv_pool_bwd_weight-{label}",
            conv_pool._conv_pool_bwd_weight_kernel,
            pointers("*fp32", "grad", "d_moved", "d_bias") | pointers(x, "x") | result | scalars,
            same | patches | conv_pool.launch_config("bwd_weight", OUT, pool, dtype, arch),
        )
        yield case(
            f"conv_pool_spread-{label}",
            conv_pool._conv_pool_spread_kernel,
            pointers("*fp32", "grad") | pointers(x, "spread") | result | {"slope": "fp32"},
            {"GRID": (grid, grid), "POOL": pool, **conv_pool.SPREAD_LAUNCH},
        )
        config = conv_pool.launch_config("bwd_map", C, conv_pool.SIDE, dtype, arch)
        center = {"CENTER": (grid * pool, grid * pool), "MARGIN": (taps - 1 - margin,) * 2, "SIDE": conv_pool.SIDE}
        yield case(
            f"conv_pool_bwd_map-{label}",
            conv_pool._conv_pool_bwd_map_kernel,
            pointers("*fp32", "weight") | pointers(x, "spread", "moved", "d_x") | {"M": "i32"},
            {key: value for key, value in same.items() if key not in ("GRID", "POOL")} | center | config,
        )


def fingerprint_cases() -> Iterator[Case]:
    """The checksums of packed weights."""
    signature = {"table_ptr": "*i64", "sums_ptr": "*i64", "first_line": "i32", "small": "i32"}
    yield Case("fingerprint", fingerprint._fingerprint_kernel, signature, fingerprint.LAUNCH)


def cases(target: str, every_shape: bool = False) -> list[Case]:
    """Every kernel with the launch parameters for ``target``."""
    arch = int(target) if target.isdigit() else target
    return [
        *superpose_cases(arch),
        *norm_insert_cases(arch),
        *activation_cases(arch),
        *gate_cases(arch, every_shape),
        *rotate_cases(arch, every_shape),
        *attention_cases(arch, every_shape),
        *conv_cases(arch),
        *windows_cases(arch),
        *conv_pool_cases(arch),
        *fingerprint_cases(),
    ]
