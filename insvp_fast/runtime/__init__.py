"""What the operations run on.

- ``hardware``: what this machine's processors compute fast.
- ``dtypes``: those of arithmetic.
- ``buffers``: memory for large results on CPUs, used again.
- ``activations``: the activations of an MLP, by name, in PyTorch's own operators.
- ``elementwise``: copies and sums that may be part of a program of native calls.
- ``rows``: products in which NaN stays in its row.
- ``products``: products with frozen weights, by whatever multiplies fastest.
- ``prepack``: the packed weights behind them, made once and again when they change.
- ``fingerprint``: what tells that they have changed.
- ``native``: the C++ library for CPUs.
- ``recording``, ``programs``: its calls, recorded and run again.
- ``triton_kernels``: whether those for GPUs can run.
- ``cuda_graphs``: the kernels of a function on a GPU, launched all at once.
- ``torch_private``: all that is used of PyTorch and not promised by it, with fallbacks.
"""
