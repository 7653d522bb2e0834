"""Run a script of timm that has no option for modules to import: ``python -m insvp_fast.timm_script validate.py ...``.

timm's train.py needs no such help: ``train.py --device-modules insvp_fast --model insvp_...``.
"""

from __future__ import annotations

import runpy
import sys

__all__ = ["main"]


def main() -> None:
    """Run the script that the command line names, with the arguments behind it and our names in timm's registry."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
