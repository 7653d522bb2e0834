"""Pictures of runs, prompts, features and comparisons, in one style.

``style`` holds what they share. ``runs`` draws learning curves and confusion matrices; ``prompts`` the prompts of
images, with the maps of ``grad_cam`` and ``attention``; ``embedding`` t-SNE; ``comparison`` accuracies of methods and
of settings. ``web`` puts pictures into pages.
"""
