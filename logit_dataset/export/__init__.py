"""A dataset in the formats of trainers that read their own.

In:   a dataset, on the disk or on the Hub.
Out:  a directory for axolotl, DistillKit or MaxText, with a README that says how to use it and what is lost.
First: export.py
"""
