"""Kernel sub-packages; in a source checkout they live in the top-level ``kernels/`` directory."""

from pathlib import Path as _Path

_here = _Path(__file__).resolve().parent
# Looked for beside this file, not two levels up: in site-packages ``../../kernels`` may be somebody else's package.
if not (_here / "gpu").is_dir():
    __path__.append(str(_here.parents[1] / "kernels"))
