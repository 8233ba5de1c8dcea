"""A manifest and its data → the dataset card and its pictures.

In:    a finished dataset.
Out:   the card and `assets/`.
First: card.py, then template.md and variables.py.
"""
