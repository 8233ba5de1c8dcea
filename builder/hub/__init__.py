"""A finished dataset → a tagged version on the Hub.

In:    the directory of a dataset, and the name of a repository.
Out:   a commit on main, and a tag; each step can be repeated.
First: publish.py, which carries out what release.py has planned.
"""
