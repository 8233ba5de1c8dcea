"""The command `logit-dataset`: parse, call one function, print.

In:    arguments.
Out:   data on stdout, progress and notices on stderr, an exit status.
First: main.py; each command is a file of its name.
"""
