"""Triton kernels, one file per operation, imported when an operation first runs on a GPU."""

# In a checkout `import kernels.gpu` would work too, and load every kernel a second time.
if not __name__.startswith("insvp_fast."):
    raise ImportError("import these kernels as insvp_fast.kernels.gpu")
