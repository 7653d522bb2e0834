"""The commands of ``insvp``, one module each.

Each has ``SUMMARY`` (its line in ``insvp --help``), ``add_arguments(parser)`` and ``run``, which gets the options as
keyword arguments, prints for people, and returns its result for ``--json``: a dictionary, or None where there is none,
as in all processes but the main one. Errors that leave a result are sentences in its ``errors``. The docstring begins
``insvp COMMAND --help``, which is why the backticks in it are single. torch and other slow imports wait until ``run``.
"""
