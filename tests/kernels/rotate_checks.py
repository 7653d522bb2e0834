"""What the tests of rotate share."""

import torch

from insvp_fast.ops.rotate import rotate_bwd_reference, rotate_reference

SHAPES = [
    # B, S, first, N, parts besides the values, heads, d
    (0, 3, 0, 3, 2, 1, 2),
    (1, 4, 2, 0, 2, 3, 4),
    (2, 1, 0, 1, 1, 1, 2),
    (2, 9, 1, 5, 2, 2, 6),
    (3, 5, 0, 5, 1, 3, 18),
    (2, 7, 3, 4, 2, 2, 34),
    (1, 13, 1, 9, 2, 12, 64),
]


def operands(B, S, first, N, parts, heads, d, own, dtype, device="cpu"):
    """Packed tokens, the number of heads, a rotation, with ``own`` one for each head, and the first rotated token."""
    x = torch.randn(B, S, (parts + 1) * heads * d, device=device).to(dtype)
    # any numbers, not only sines and cosines
    return x, heads, torch.randn(*[heads] * own, N, 2 * d, device=device), first


def assert_rotated(found, given, half, forward, rounding):
    """What a kernel computes in fp32 and rounds once, with at most this relative error, against the formula."""
    x, heads, rotation, first = given
    formula = rotate_reference if forward else rotate_bwd_reference
    expected = formula(x.double(), heads, rotation.double(), first, half)
    # two products, each below |x| * |rotation|
    bound = 4 * torch.finfo(torch.float32).eps * largest(x) * largest(rotation)
    assert found.dtype == x.dtype and found.isfinite().all()
    assert ((found - expected).abs() <= bound + rounding * expected.abs()).all()


def largest(x):
    return float(x.abs().max()) if x.numel() else 0.0
