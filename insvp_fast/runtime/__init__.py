"""What the operations run on.

- ``hardware``: what this machine's processors compute fast.
- ``buffers``: memory for large results on CPUs, used again.
- ``rows``: products in which NaN stays in its row.
- ``products``: products with frozen weights, by whatever multiplies fastest.
- ``prepack``: the packed weights behind them, made once and again when they change.
- ``fingerprint``: what tells that they have changed.
- ``native``: the C++ library for CPUs.
- ``torch_private``: all that is used of PyTorch and not promised by it, with fallbacks.
"""
