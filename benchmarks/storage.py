"""Bytes per token by column: our two Parquet profiles beside the raw values and what `Dataset.push_to_hub` would write."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from builder.dataset.shards import column_bytes, nested_values, parquet_writer


def measure(dataset: Path, scratch: Path) -> dict[str, dict[str, float]]:
    """For each way to store the dataset: bytes per token of each column, and of all files together."""
    table = pa.concat_tables(pq.read_table(p) for p in sorted((dataset / "data").glob("*.parquet")))
    tokens = len(nested_values(table["input_ids"]))
    found = {"raw values": _raw(table, tokens)}
    # What push_to_hub calls for each shard.
    Dataset(table).to_parquet(scratch / "hub.parquet")
    for profile in ("default", "compact"):
        with parquet_writer(scratch / f"{profile}.parquet", table.schema, profile) as writer:
            for batch in table.to_batches():
                writer.write_batch(batch)
    for label, name in (
        ("push_to_hub", "hub"),
        ("default profile", "default"),
        ("compact profile", "compact"),
    ):
        path = scratch / f"{name}.parquet"
        sizes = column_bytes(pq.read_metadata(path))
        found[label] = {name: round(size / tokens, 2) for name, size in sizes.items()}
        found[label]["whole file"] = round(path.stat().st_size / tokens, 2)
    return found


def _raw(table: pa.Table, tokens: int) -> dict[str, float]:
    sizes = {}
    for name in table.column_names:
        if pa.types.is_list(table[name].type):
            sizes[name] = nested_values(table[name]).nbytes / tokens
        elif pa.types.is_string(table[name].type):
            sizes[name] = sum(len(text.encode()) for text in table[name].to_pylist()) / tokens
        else:
            sizes[name] = table[name].nbytes / tokens
    sizes["whole file"] = sum(sizes.values())
    return {name: round(size, 2) for name, size in sizes.items()}
