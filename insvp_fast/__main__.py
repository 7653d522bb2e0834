"""``python -m insvp_fast``, for launchers of several processes: the same as ``insvp``."""

import sys

from insvp_fast.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
