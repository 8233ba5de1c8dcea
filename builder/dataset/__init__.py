"""What a dataset is on disk: Parquet shards, a manifest, and what identifies it.

In:    blocks of rows; records of shards.
Out:   `data/*.parquet` and `manifest.json`; and back: a row, what is known of a dataset.
First: shards.py, then manifest.py.
"""
