"""The commands of ``insvp``, one module each.

Each has ``SUMMARY`` (its line in ``insvp --help``), ``add_arguments(parser)`` and ``run``, which gets the options as
keyword arguments and returns the exit status; its docstring begins ``insvp COMMAND --help``, which is why
the backticks in it are single. torch and other slow imports wait until ``run``.
"""
