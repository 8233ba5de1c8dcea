"""Sequences and a teacher → blocks of rows, with the exact statistics of every position.

In:    sequences in the corpus's order, or prompts that the teacher completes.
Out:   `Block`s in the same order, whatever was batched with what.
First: distribution.py (one position), then pipeline.py (many); generation.py where the teacher writes.
"""
