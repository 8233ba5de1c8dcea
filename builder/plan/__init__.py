"""A recipe → what building it takes, before anything is built.

In:    a recipe, and a number of tokens or a sample of the corpus.
Out:   tokens, bytes, hours, files, commits.
First: plan.py, on paper, by compute.py and storage.py; estimate.py reads a sample of the corpus.
"""
