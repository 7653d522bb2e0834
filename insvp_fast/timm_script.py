"""Run a script of timm that has no option for modules to import: ``python -m insvp_fast.timm_script validate.py ...``.

timm's train.py needs no such help: ``train.py --device-modules insvp_fast --model insvp_...``.
"""

from __future__ import annotations

import os
import runpy
import sys

__all__ = ["main"]


def main() -> None:
    """Run the script that the command line names, with the arguments behind it and our names in timm's registry."""
    del sys.argv[0]
    if not sys.argv or not os.path.exists(sys.argv[0]):
        found = f"the script is {sys.argv[0]}: no such file" if sys.argv else "no script is named"
        print(f"timm_script: error: {found}: expected one of timm, such as validate.py", file=sys.stderr)
        raise SystemExit(2)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
