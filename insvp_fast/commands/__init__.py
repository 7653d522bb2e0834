"""The commands of ``insvp``, one module each.

A module holds ``SUMMARY`` (its line in ``insvp --help``), ``add_arguments(parser)`` and ``run``, which gets the options
as keywords and returns the exit status; its docstring is what ``insvp COMMAND --help`` begins with. Nothing heavy is
imported before ``run``.
"""
