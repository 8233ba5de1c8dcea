"""The contract that every step is told by.

In:    a TOML file, or a section in a manifest.
Out:   a frozen, validated Recipe: everything that decides the bytes of a dataset.
First: sections.py, which holds every key.
"""
