"""The kernels; in a checkout they are in the top-level folder ``kernels/``, in an installed package here."""

from pathlib import Path as _Path

_here = _Path(__file__).resolve().parent
# First beside this file: in site-packages ``../../kernels`` may be another project's package.
if not (_here / "gpu").is_dir():
    __path__.append(str(_here.parents[1] / "kernels"))
