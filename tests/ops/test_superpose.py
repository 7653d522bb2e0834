"""superpose against its formula in double precision, and as a PyTorch operator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from insvp_fast import ops, reference
from insvp_fast.ops import Blend, PatchWeights
from insvp_fast.ops.superpose import superpose_reference
from insvp_fast.runtime import native
from insvp_fast.testing import assert_within_budget, relative_error
from tests.gradients import DTYPES, copies, with_gradients


def superpose_inputs(B=2, C=3, grid=(2, 3), P=4, R=5, dtype=torch.float32, grad=True):
    K = C * P * P
    shapes = [(B, C, grid[0] * P, grid[1] * P)] * 2
    images = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    weights = [torch.randn(shape) / shape[-1] ** 0.5 for shape in ((R, K), (R,), (K, R), (K,))]
    return [t.requires_grad_(grad) for t in (*images, *weights)], P


def formula(image, global_prompt, w1, b1, w2, b2, P):
    return superpose_reference(image, global_prompt, PatchWeights(w1, b1, w2, b2), Blend(P, 0.7, 0.3))


def fast(image, global_prompt, w1, b1, w2, b2, P, **options):
    return ops.superpose(image, global_prompt, PatchWeights(w1, b1, w2, b2), Blend(P, 0.7, 0.3), **options)


@pytest.mark.parametrize("impl", ["auto", "reference", "native"])
@settings(max_examples=12)
@given(
    B=st.sampled_from([0, 1, 3]),
    C=st.sampled_from([1, 3]),
    grid=st.sampled_from([(1, 1), (2, 3), (3, 1)]),
    P=st.sampled_from([4, 8, 14, 16]),
    R=st.sampled_from([1, 5, 16]),
    prompt=st.booleans(),
)
def test_superpose(impl, B, C, grid, P, R, prompt):
    if impl == "native" and not native.available():
        pytest.skip(str(native.native_status()))
    inputs, _ = superpose_inputs(B, C, grid, P, R)
    inputs[0] = inputs[0].detach().mT.contiguous().mT.requires_grad_()  # not contiguous

    def run(function, inputs, **kwargs):
        image, p_g, *weights = inputs
        return function(image, p_g if prompt else None, *weights, P=P, **kwargs)

    if not prompt:
        inputs[1].requires_grad_(False)
    exact = with_gradients(lambda *t: run(formula, t), copies(inputs, torch.float64))
    found = with_gradients(lambda *t: run(fast, t, impl=impl), inputs)
    for value, expected in zip(found, exact, strict=True):
        tolerance = 1e-5 if value.numel() > 1 else 1e-4  # a single sum of both signs may cancel
        assert value.shape == expected.shape and relative_error(value, expected) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_superpose_in_low_precision(dtype):
    inputs, P = superpose_inputs(P=16, dtype=dtype)
    exact = with_gradients(lambda *t: formula(*t, P=P), copies(inputs, torch.float64))
    plain = with_gradients(lambda *t: formula(*t, P=P), copies(inputs, dtype))
    found = with_gradients(lambda *t: fast(*t, P=P), inputs)
    assert found[0].dtype == dtype
    for value, rough, expected in zip(found, plain, exact, strict=True):
        assert_within_budget(value, rough, expected, dtype)


@pytest.mark.parametrize("impl", ["auto", "reference", "native"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_superpose_of_8_bit_images(impl, dtype):
    if impl == "native" and (not native.available() or dtype == torch.float16):
        pytest.skip("nothing that the native library covers")
    (_, prompt, *weights), P = superpose_inputs()
    image, scale, shift = torch.randint(256, prompt.shape, dtype=torch.uint8), torch.rand(3) / 50, torch.randn(3)
    inputs = [prompt, *weights]
    found = with_gradients(lambda *t: fast(image, *t, P=P, dtype=dtype, scale=scale, shift=shift, impl=impl), inputs)
    values = reference.normalize(image, scale.double(), shift.double())
    exact = with_gradients(lambda *t: formula(values, *t, P=P), copies(inputs, torch.float64))
    plain = with_gradients(
        lambda *t: formula(values.to(dtype or torch.float32), *t, P=P),
        copies(inputs, dtype or torch.float32),
    )
    assert found[0].dtype == (dtype or torch.float32)
    for value, rough, truth in zip(found, plain, exact, strict=True):
        assert_within_budget(value, rough, truth, dtype or torch.float32)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_superpose_wants_scale_and_shift_for_8_bit_images_alone(kind):
    (_, prompt, *weights), P = superpose_inputs(grad=False)
    image, vector = torch.zeros(prompt.shape, dtype=kind), torch.ones(3)
    wrong = [{"scale": vector}, {"shift": vector}, {} if kind == torch.uint8 else {"scale": vector, "shift": vector}]
    for arguments in wrong:
        with pytest.raises(ValueError, match="expected scale and shift for uint8"):
            fast(image, prompt, *weights, P=P, **arguments)
    with pytest.raises(ValueError, match=r"shift is torch.float32 \(2,\): expected torch.float32 \(3,\)"):
        fast(image.byte(), prompt, *weights, P=P, scale=vector, shift=vector[:2])


def test_superpose_gradcheck():
    inputs, P = superpose_inputs(B=1, C=1, grid=(1, 2), P=2, R=3, dtype=torch.float64)
    inputs = copies(inputs, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: fast(*t, P=P), inputs)


def test_superpose_opcheck():
    inputs, P = superpose_inputs(grad=False)
    opcheck(torch.ops.insvp_fast.superpose_fwd.default, (*inputs, P, 0.7, 0.3, torch.float32, None, None, "auto"))
    tokens, hidden = torch.ops.insvp_fast.superpose_fwd(*inputs, P, 0.7, 0.3, torch.float32, None, None, "auto")
    for needs in ((True, True), (False, False)):
        arguments = (
            torch.randn_like(tokens),
            inputs[0],
            hidden,
            inputs[2],
            inputs[4],
            P,
            0.7,
            0.3,
            *needs,
            None,
            None,
            "auto",
        )
        opcheck(torch.ops.insvp_fast.superpose_bwd.default, arguments)
    image, affine = (50 * inputs[0].abs()).byte(), (torch.rand(3), torch.rand(3))
    opcheck(
        torch.ops.insvp_fast.superpose_fwd.default, (image, *inputs[1:], P, 0.7, 0.3, torch.float32, *affine, "auto")
    )
    arguments = (
        torch.randn_like(tokens),
        image,
        hidden,
        inputs[2],
        inputs[4],
        P,
        0.7,
        0.3,
        False,
        True,
        *affine,
        "auto",
    )
    opcheck(torch.ops.insvp_fast.superpose_bwd.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_superpose_compiles_whole(dynamic):
    inputs, P = superpose_inputs()
    compiled = torch.compile(lambda *t: fast(*t, P=P), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for value, expected in zip(
        with_gradients(compiled, inputs), with_gradients(lambda *t: fast(*t, P=P), inputs), strict=True
    ):
        assert torch.equal(value, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"P": 5}, "image of 8x12 pixels: expected multiples of the patch size 5"),
        (
            {"global_prompt": torch.zeros(1, 3, 8, 12)},
            r"global_prompt has shape \(1, 3, 8, 12\): expected that of the image, \(2, 3, 8, 12\)",
        ),
        ({"w2": torch.zeros(48, 4)}, r"w2 has shape \(48, 4\): expected \(48, 5\)"),
        ({"impl": "cuda"}, "impl='cuda': expected one of"),
    ],
)
def test_superpose_refuses(change, message):
    inputs, P = superpose_inputs()
    names = ("image", "global_prompt", "w1", "b1", "w2", "b2")
    arguments = dict(zip(names, inputs, strict=True)) | {"P": P} | change
    with pytest.raises(ValueError, match=message):
        fast(**arguments)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_superpose_refuses_a_mask_of_another_dtype_or_image(impl):
    (image, prompt, *weights), P = superpose_inputs(grad=False)
    kept = torch.rand(image.shape) < 0.5
    for wrong in (kept.to(image.dtype), kept.byte(), kept[:1], kept[:, :1]):
        with pytest.raises(ValueError, match=r"kept is torch\..*: expected torch.bool \(2, 3, 8, 12\)"):
            fast(image, prompt, *weights, P=P, kept=wrong, impl=impl)


@pytest.mark.parametrize(("impl", "refused"), [("native", torch.float16), ("triton", torch.float64)])
@pytest.mark.parametrize("which", ["image", "prompt", "weight", "result"])
def test_a_named_superpose_says_what_it_computes_in(impl, refused, which, device):
    if impl == "native" and not native.native_status():
        pytest.skip(str(native.native_status()))
    inputs, P = superpose_inputs(grad=False)
    if which != "result":
        index = {"image": 0, "prompt": 1, "weight": 4}[which]
        inputs[index] = inputs[index].to(refused)
    result = refused if which == "result" else torch.float32
    inputs = [x.to(device if impl == "triton" else "cpu") for x in inputs]
    with pytest.raises(RuntimeError, match=f'impl="{impl}" cannot compute in {refused}: expected torch.float32'):
        fast(*inputs, P=P, dtype=result, impl=impl)
