"""The activations and their derivatives written out, to be evaluated in double precision."""

import math

import torch


def _gelu(x):
    below = torch.special.erfc(-x / math.sqrt(2)) / 2
    return x * below, below + x * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh(x):
    u, du = 1.5957691216057308 * (x + 0.044715 * x**3), 1.5957691216057308 * (1 + 3 * 0.044715 * x**2)
    return _times_sigmoid(x, u, du)


def _times_sigmoid(x, u, du):
    s, rest = torch.sigmoid(u), torch.sigmoid(-u)
    return x * s, s + x * s * rest * du


FORMULAS = {  # to the value and the derivative
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: _times_sigmoid(x, 1.702 * x, 1.702),
    "silu": lambda x: _times_sigmoid(x, x, 1.0),
}
