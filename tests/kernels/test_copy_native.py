"""The native copy against ``Tensor.copy_``."""

from __future__ import annotations

import pytest
import torch

from insvp_fast.reference import fold
from insvp_fast.runtime import native
from insvp_fast.runtime.elementwise import put
from tests.kernels.native_checks import needs_library

pytestmark = needs_library

VIEWS = {
    "whole": lambda x: x,
    "some": lambda x: x[:, 1:, :, 2:5],
    "turned": lambda x: x.transpose(1, 3),
    "a diagonal": lambda x: x.diagonal(dim1=1, dim2=2),
    "every second": lambda x: x[..., ::2],
    "one": lambda x: x[:1, :1, :1, :1],
    "none": lambda x: x[:, :0],
    "a number": lambda x: x[0, 0, 0, 0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8], ids=str)
@pytest.mark.parametrize("write", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("read", VIEWS.values(), ids=VIEWS)
def test_a_copy_writes_what_it_should_and_nothing_else(dtype, write, read):
    target, source = ((50 * torch.randn(2, 4, 4, 6)).to(dtype) for _ in range(2))
    expected = target.clone()
    if write(target).shape != read(source).shape:
        source = (50 * torch.randn(write(target).shape)).to(dtype)
        read = VIEWS["whole"]
    write(expected).copy_(read(source))
    native.copy(write(target), read(source))
    assert torch.equal(target, expected)
    write(expected).zero_()
    native.copy(write(target), None)
    assert torch.equal(target, expected)


@pytest.mark.parametrize("size", [(2, 3, 4), (3, 1, 1), (1, 5, 2)], ids=str)
def test_patches_become_an_image(size):
    """Six dimensions, of which none continues its neighbor in both tensors."""
    (B, C, P), (h, w) = size, (3, 5)
    patches = torch.randn(B, h * w, C * P * P)
    image = torch.full((B, C, h * P, w * P), float("nan"))
    native.copy(image.view(B, C, h, P, w, P), patches.view(B, h, w, C, P, P).permute(0, 3, 1, 4, 2, 5))
    assert torch.equal(image, fold(patches, P, h * P, w * P))


def test_large_copies_are_shared(threads):
    source = torch.randn(3, 700, 300)
    for count in (1, 3):
        threads(count)
        target = torch.zeros(3, 300, 700)
        put(target.mT, source)
        assert torch.equal(target.mT, source)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"x is torch.float32 \(2,\): expected torch.float32 \(3,\)"):
        native.copy(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="expected torch.int8"):
        native.copy(torch.zeros(3, dtype=torch.int8), torch.zeros(3))
    with pytest.raises(ValueError, match="too many dimensions"):
        native.copy(torch.zeros(2, 3, 4, 5, 6, 7).permute(5, 4, 3, 2, 1, 0), torch.zeros(7, 6, 5, 4, 3, 2))


def test_what_the_library_cannot_write_pytorch_copies():
    with torch.device("meta"):
        put(torch.empty(3), torch.empty(3))
    x = torch.zeros(2, dtype=torch.complex64).conj()
    put(x, torch.ones(2, dtype=torch.complex64))
    assert torch.equal(x.resolve_conj(), torch.ones(2, dtype=torch.complex64))
