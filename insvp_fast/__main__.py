"""``python -m insvp_fast``, for launchers of several processes: the same as ``insvp``."""

from insvp_fast.commands.cli import run

if __name__ == "__main__":
    run()
