"""Adapters, backbones and the authors' checkpoints, on disk and on the Hub.

adapter.py saves and loads adapters, with adapter_config.py and model_card.py for two of their files; backbone.py builds
backbones from names and files; weights.py tells the formats of their files apart and converts them, with huggingface.py
and jax_weights.py; released.py knows the checkpoints of the authors' code. names.py names an adapter's files. Below
them, files.py reads files without running code in them, and state_dict.py unwraps, checks and hashes what they hold.
"""
