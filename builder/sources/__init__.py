"""What a recipe names → exact things: a commit on the Hub, or local files with their hashes.

In:    a recipe.
Out:   `Sources`, plain values with their provenance; and from those, documents, an encoder and a teacher.
First: resolve.py, then opening.py.
"""
