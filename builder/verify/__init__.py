"""A finished dataset → everything that is wrong with it.

In:    the directory of a dataset; its teacher, if rows are to be computed again.
Out:   one line for each problem.
First: verify.py; rows.py checks a file, recompute.py asks the teacher.
"""
