"""A recipe → a finished dataset, resumed wherever it was interrupted.

In:    a recipe and a directory.
Out:   the directory, filled: a Hub repository. Shards may be on the Hub already (outbox.py, delivery.py).
First: build.py, then worker.py, which computes one shard; workers.py has many of those, by Ray.
"""
