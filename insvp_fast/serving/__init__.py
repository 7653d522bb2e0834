"""Classifying images over HTTP; needs the extra ``serve``.

app.py has the endpoints, uploads.py reads the files of a request within the limits, batcher.py collects images of all
requests into batches, refusals.py says what is refused with which status, metrics.py counts.
"""
