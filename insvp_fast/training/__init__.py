"""Training, from a recipe to a run folder; needs the extra ``train``.

recipe.py holds the settings of a run, candidates.py the models that it trains, run.py the run as a whole and trainer.py
the training loop. load.py, evaluation.py and prediction.py use a finished run. Nothing is imported here: ``recipe``,
``candidates`` and ``run_folder`` must not load torch.
"""
