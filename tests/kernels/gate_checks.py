"""What the tests of gate share."""

import torch
import torch.nn.functional as F

from tests.activations import FORMULAS

EPS = 1e-6


def operands(shape, gated, dtype):
    """A gradient, and what the two products give, the second None where there is none."""
    grad, pre, factor = (torch.randn(shape).to(dtype) for _ in range(3))
    return grad, pre, factor if gated else None


def exact(grad, pre, factor, activation, eps):
    """The hidden layer, and the gradients by pre and factor."""
    inputs = [x.double().requires_grad_() for x in (pre, factor) if x is not None]
    hidden = FORMULAS[activation](inputs[0])[0]
    hidden = hidden if factor is None else hidden * inputs[1]
    hidden = hidden if eps is None or not hidden.numel() else F.layer_norm(hidden, hidden.shape[-1:], eps=eps)
    return [hidden, *torch.autograd.grad(hidden, inputs, grad.double())]


def computed(kernel, grad, pre, factor, activation, eps):
    """The same by a kernel."""
    hidden = kernel.gate_fwd(pre, factor, activation, eps)
    gradients = kernel.gate_bwd(grad.clone(), pre, factor, activation, eps)
    return [x for x in (hidden, *gradients) if x is not None]
