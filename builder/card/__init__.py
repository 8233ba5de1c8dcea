"""A manifest and its data → the dataset card and its pictures.

In:    a finished dataset.
Out:   the card and `assets/`.
First: card.py and its template.md.
"""
