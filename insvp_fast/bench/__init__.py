"""Timing InsVP against the bare frozen timm ViT: what ``insvp bench`` and the scripts in ``benchmarks/`` share.

``models`` builds what is compared, ``jobs`` says what a model is timed at, ``timing`` measures, ``floor`` says what the
needed operations would take, ``machine`` describes where, ``tables`` shows the results and ``report`` is ``insvp
bench``.
"""
