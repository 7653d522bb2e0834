"""Training, from a recipe to a run folder; needs the extra ``train``.

recipe.py says what to do, backbone.py and data.py load what it names, loop.py trains, figures.py draws, and run.py ties
them together.
"""
