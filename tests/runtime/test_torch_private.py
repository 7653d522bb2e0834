"""What PyTorch does not promise: in one file, and right without it."""

import ast
import importlib
import platform
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import insvp_fast
from insvp_fast import ops
from insvp_fast.ops.attention import attention_reference
from insvp_fast.runtime import hardware, native, torch_private
from insvp_fast.testing import assert_within_budget

PACKAGE = Path(insvp_fast.__file__).parent
ALLOWED = {
    "_apply": "torch.nn.Module's, overridden: it is how subclasses follow `to`",
    "_buffers": "torch.nn.Module's, as old as itself",
    "_modules": "the same",
    "_parameters": "the same",
    "_compiled_call_impl": "a torch.nn.Module's that ``compile`` has been called on: nothing else tells",
    "_backward_hooks": "the hooks of a torch.nn.Module: nothing else tells whether there are any",
    "_backward_pre_hooks": "the same",
    "_forward_hooks": "the same",
    "_forward_pre_hooks": "the same",
    "_version": "of a tensor: in PyTorch's documentation of in-place correctness checks",
    "_asdict": "named tuples have it for everybody",
    "_fields": "the same",
    "_make": "the same",
    "_replace": "the same",
    "_field_defaults": "the same",
    "_model_args": "timm's, of what its builders make: its get_model_args reads it",
    "_pos_embed": "timm's, part of every ViT that is understood",
    "_forward_embeds": "timm's, of NaFlexVit: the only way to the tokens before its blocks",
    "_apply_learned_pos_embed": "timm's, of NaFlexVit: its position embedding for a grid of patches",
    "_apply_factorized_pos_embed": "the same",
    "_get_rel_pos_bias": "timm's, of Swin and BEiT: their bias, which is a sum of tables",
    "timm.models._features.FeatureGetterNet": "timm exports its other ways to get features",
    "timm.models._features.feature_take_indices": "timm's models all call it",
    "timm.models._manipulate.group_with_matcher": "timm exports what calls it, which asks for a whole model",
    "torch._inductor.aoti_compile_and_package": "in PyTorch's documentation of AOTInductor",
    "torch._inductor.aoti_load_package": "the same",
    "torch._inductor.exc.InductorError": "what the above raises",
    "_file_dict": "torchvision's, of one data set",
    "_samples": "torchvision's, of one data set",
    "_hub_mixin_info": "huggingface_hub's, of the mixin that the model inherits",
    "_reset_state": "accelerate's",
    "_Pickler": "the standard library's, in Python",
    "_exit": "in Python's documentation of os",
    "_actions": "argparse's, which shtab and others read: the options of a parser",
    "_SubParsersAction": "argparse's, as above",
}


def private(name):
    return name.startswith("_") and not name.startswith("__")


def own_names(trees):
    """Private names that the package gives itself."""
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def foreign_names(tree, own):
    """Private attributes of others in a file, and private things that it imports: line and name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            if ast.unparse(node).startswith("torch.") or node.attr not in own:
                yield node.lineno, node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            paths = [f"{getattr(node, 'module', None) or ''}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, path) for path in paths if any(map(private, path.split("."))))


def scan(sources):
    trees = {path: ast.parse(text) for path, text in sources.items()}
    own = set(own_names(trees.values()))
    return {
        f"{path}:{line} {name}"
        for path, tree in trees.items()
        for line, name in foreign_names(tree, own)
        if name not in ALLOWED and not path.endswith("torch_private.py")
    }


def test_one_file_names_what_pytorch_does_not_promise():
    kernels = Path(importlib.import_module("insvp_fast.kernels.gpu").__file__).parent
    files = {str(path.relative_to(root)): path for root in (PACKAGE, kernels) for path in root.rglob("*.py")}
    assert len(files) > 60
    assert not scan({name: path.read_text() for name, path in files.items()})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("torch._x(y)", ["a.py:1 _x"]),
        ("def _x(): pass\ntorch.cpu._x()", ["a.py:2 _x"]),
        ("f = torch.ops.aten._x.default", ["a.py:1 _x"]),
        ("x.storage()._cdata", ["a.py:1 _cdata"]),
        ("module._slow_forward = None", ["a.py:1 _slow_forward"]),
        ("from torch._C import x", ["a.py:1 torch._C.x"]),
        ("from torch import _x", ["a.py:1 torch._x"]),
        ("import torch._inductor.config", ["a.py:1 .torch._inductor.config"]),
        ("self._x = 1\nother._x", []),
        ("module.__dict__, x._version", []),
    ],
)
def test_the_scan_sees(text, found):
    assert sorted(scan({"a.py": text})) == found


def gone(*arguments, **options):
    raise AttributeError("gone")


def refuses(*arguments, **options):
    raise TypeError("takes another argument")


def lies(x, *arguments, **options):
    return x


@pytest.fixture
def without(monkeypatch):
    """Imports the file anew, in a PyTorch where a private name is something else."""

    def replace(owner, name, replacement):
        monkeypatch.setattr(owner, name, replacement)
        return importlib.reload(torch_private)

    yield replace
    monkeypatch.undo()
    importlib.reload(torch_private)


@pytest.mark.parametrize("replacement", [None, gone, refuses, lies])
def test_each_function_is_tried_before_it_is_used(without, replacement):
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    changed = without(torch.ops.aten, flash, replacement)
    assert not changed.HAS_FLASH and not changed.FLASH_KEEPS_NAN
    assert not without(torch.ops.aten, f"{flash}_backward", replacement).HAS_FLASH
    changed = without(torch, "_softmax_backward_data", replacement)
    assert changed.softmax_bwd is changed._softmax_bwd_formula
    q = torch.zeros(1, 1, 2, 8)
    assert without(torch, "_fused_sdp_choice", replacement or gone).sdpa_backend(q, q, q) == "unknown"


class Renamed(torch.Tensor):
    """A subclass that changes nothing."""


def sparse(x):
    return torch.eye(2).to_sparse()


def zero(x):
    return torch._efficientzerotensor(x.shape)


def fake(x):
    return FakeTensorMode().from_tensor(x)


OTHER_TENSORS = [fake, sparse, torch._neg_view, zero, lambda x: x.as_subclass(Renamed)]
SURROUNDINGS = [FakeTensorMode, TorchDispatchMode, TorchFunctionMode, torch.profiler.profile]
TRANSFORMS = [torch.func.vmap, torch.func.functionalize, make_fx, lambda ask: lambda x: torch.jit.trace(ask, x)]


def test_plain_tensors_need_no_dispatcher():
    x = torch.zeros(2)
    for tensor in (x, x.clone().requires_grad_(), torch.nn.Parameter(x), x[1:], torch.zeros(2, 3).T):
        assert not torch_private.dispatches([tensor, None, 1.5, "auto"])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert not torch_private.dispatches([x, torch.zeros(2)])


@pytest.mark.parametrize("change", OTHER_TENSORS)
def test_the_dispatcher_sees_other_tensors(change):
    x = torch.zeros(2)
    assert torch_private.dispatches([x, change(x)])
    assert torch_private.dispatches([x.to("meta")])


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_the_dispatcher_sees_what_surrounds_a_call(surroundings):
    x = torch.zeros(2)
    with surroundings():
        assert torch_private.dispatches([x])
    assert not torch_private.dispatches([x])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:.*jit.trace")
def test_the_dispatcher_sees_traces_and_transforms(transform):
    asked = []
    transform(lambda x: (asked.append(torch_private.dispatches([x])), x + 1)[1])(torch.zeros(2))
    assert asked[0]


def test_operators_keep_what_the_dispatcher_does():
    x, layer = torch.randn(3, 8), ops.FrozenLinear(torch.randn(5, 8))
    torch.testing.assert_close(ops.linear(torch._neg_view(x), layer), -x @ layer.weight.T)
    torch.testing.assert_close(ops.linear(x, ops.FrozenLinear(torch._neg_view(layer.weight))), -x @ layer.weight.T)
    with torch.profiler.profile() as profile:
        ops.linear(x, layer)
    assert "insvp_fast::linear_fwd" in {event.name for event in profile.events()}


@pytest.mark.parametrize(
    "name",
    ["_dispatch_keys", "_dispatch_tls_local_include_set", "_len_torch_function_stack", "DispatchKeySet"],
)
@pytest.mark.parametrize("replacement", [None, gone, refuses])
def test_the_dispatcher_is_asked_where_pytorch_does_not_tell(without, name, replacement):
    assert without(torch._C, name, replacement).dispatches([torch.zeros(2)])


@pytest.mark.parametrize("replacement", [gone, refuses])
def test_the_processor_tells_what_onednn_does_not(without, replacement):
    known = dict(torch_private.HAS_PRODUCTS)
    for kind in ("bf16", "fp16"):
        changed = without(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", replacement)
    if torch.cpu.get_capabilities()["architecture"] == "x86_64":
        assert known == changed.HAS_PRODUCTS


@pytest.mark.parametrize(
    ("instructions", "has_bf16"),
    [
        (["avx2"], False),
        (["avx2", "avx512_bw", "avx512_vl", "avx512_dq"], False),  # where oneDNN emulates them, and says yes
        (["avx2", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16"], True),
        (["avx2", "avx512_bw", "avx512_vl", "avx512_dq", "amx_tile", "amx_bf16"], True),
    ],
)
def test_bf16_products_need_instructions(without, instructions, has_bf16):
    found = {"architecture": "x86_64", **dict.fromkeys(instructions, True)}
    without(torch.cpu, "get_capabilities", lambda: found)
    changed = without(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert changed.HAS_PRODUCTS[torch.bfloat16] == hardware.has_products(torch.bfloat16) == has_bf16


@pytest.mark.parametrize(
    ("level", "instructions", "name"),
    [
        ("AVX2", ["avx512_bf16", "amx_tile"], "AVX2"),  # as ATEN_CPU_CAPABILITY has it
        ("AVX512", [], "AVX512"),
        ("AVX512", ["avx512_bf16"], "AVX512-BF16"),
        ("AVX512", ["avx512_bf16", "amx_tile"], "AVX512-AMX"),
    ],
)
def test_the_name_of_an_instruction_set_is_that_of_the_fastest_products(monkeypatch, level, instructions, name):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
    assert hardware.instruction_set() == name
    assert hardware.wide_vectors() == (level == "AVX512")


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name"),
    [
        ("AuthenticAMD", 25, 0x01, "A CPU"),  # Zen 3
        ("AuthenticAMD", 25, 0x11, "A CPU, Zen 4"),
        ("AuthenticAMD", 26, 0x02, "A CPU, Zen 5"),
        ("AuthenticAMD", 26, 0x50, "A CPU"),  # newer
        ("GenuineIntel", 26, 0x02, "A CPU"),
    ],
)
def test_processors_of_one_name_and_instruction_set_are_told_apart(tmp_path, vendor, family, model, name):
    one = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: A CPU\n\n"
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\n" + one + "processor\t: 1\n" + one)
    assert hardware.cpu_name(str(file)) == name


def test_a_processor_without_a_file_of_facts_has_a_name():
    assert hardware.cpu_name("/missing") == (platform.processor() or platform.machine())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_of_a_softmax_without_pytorchs(dtype):
    scores = torch.randn(3, 4, 31, dtype=torch.float64)
    p, grad = scores.softmax(-1).to(dtype), torch.randn(3, 4, 31).to(dtype)
    exact = torch_private._softmax_bwd_formula(grad.double(), p.double())
    expected = torch.autograd.functional.vjp(lambda s: s.softmax(-1), scores, grad.double())[1]
    torch.testing.assert_close(torch_private._softmax_bwd_formula(grad.double(), scores.softmax(-1)), expected)
    plain = p * (grad - (p * grad).sum(-1, keepdim=True))
    assert_within_budget(torch_private._softmax_bwd_formula(grad, p), plain, exact, dtype)


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_attention_without_pytorchs_private_functions(monkeypatch, dtype, products):
    """On a processor for which it would be taken, with 16-bit products and without."""
    monkeypatch.setattr(torch_private, "HAS_FLASH", False)
    monkeypatch.setattr(torch_private, "HAS_PRODUCTS", {torch.bfloat16: products, torch.float16: products})
    monkeypatch.setattr(torch_private, "softmax_bwd", torch_private._softmax_bwd_formula)
    monkeypatch.setattr(hardware, "wide_vectors", lambda: False)
    monkeypatch.setattr(native, "available", lambda *dtypes: False)
    qkv, grad = torch.randn(2, 7, 3 * 32).to(dtype), torch.randn(2, 5, 32).to(dtype)

    def run(function, to):
        x = qkv.to(to).requires_grad_()
        y = function(x, 4, 5, 0.3)
        return y, *torch.autograd.grad(y, x, grad.to(to))

    exact = run(attention_reference, torch.float64)
    for y, plain, e in zip(run(ops.attention, dtype), run(attention_reference, dtype), exact, strict=True):
        assert y.dtype == dtype
        assert_within_budget(y, plain, e, dtype)
