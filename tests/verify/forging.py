"""A dataset whose rows or manifest somebody changes, and then makes everything else fit: hashes, counts, sums, fingerprints, the card."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from builder.card.card import write_card
from builder.dataset.identity import fingerprint, plans_of, row_fingerprint
from builder.dataset.manifest import (
    FORMER_KEYS,
    data_file,
    read_manifest,
    records_of,
    totals_of,
    write_json,
)
from builder.dataset.shards import column_bytes, file_sha256, footer_sha256, nested_values

Row = dict[str, Any]
Manifest = dict[str, Any]


def rows_of(directory: Path, file: str) -> list[Row]:
    """Rows as dicts of numpy arrays."""
    table = pq.read_table(directory / file)
    rows = []
    for i in range(table.num_rows):
        row = {}
        for name in table.column_names:
            column = table[name].slice(i, 1)
            is_list = pa.types.is_list(column.type)
            row[name] = nested_values(column).copy() if is_list else column[0].as_py()
        rows.append(row)
    return rows


def head(row: Row) -> np.ndarray:
    return row["topk_logprobs"] if "topk_logprobs" in row else row["logprobs"]


def write_rows(path: Path, rows: list[Row]) -> None:
    """Rows in place of those of a file."""
    schema = pq.read_schema(path)
    arrays = []
    for field in schema:
        values = [row[field.name] for row in rows]
        if pa.types.is_list(field.type) and pa.types.is_list(field.type.value_type):
            values = [list(value) for value in values]
        arrays.append(pa.array(values, type=field.type))
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path)


def forge(directory: Path, change: Callable[[list[Row]], None], *, all_files: bool = True) -> None:
    """Change rows, and make all else fit."""
    shards = read_manifest(directory)["shards"]
    for shard in shards if all_files else shards[:1]:
        rows = rows_of(directory, shard["file"])
        change(rows)
        write_rows(directory / shard["file"], rows)
    refit(directory)


def lie(directory: Path, change: Callable[[Manifest], Any]) -> None:
    """Change the manifest, and nothing else."""
    manifest = read_json(directory)
    change(manifest)
    write_json(directory / "manifest.json", manifest)


def read_json(directory: Path) -> Manifest:
    return json.loads((directory / "manifest.json").read_text())


def refit(directory: Path, change: Callable[[Manifest], Any] = lambda _: None) -> None:
    """Make everything fit the data files that there are, after a change of the manifest."""
    manifest = read_json(directory)
    change(manifest)
    version = manifest["schema_version"]
    plan = plans_of(manifest)[0]
    old = manifest.get("row_fingerprint")
    manifest["fingerprint"] = fingerprint(plan, version)
    manifest["row_fingerprint"] = row_fingerprint(plan, version)
    if manifest["row_fingerprint"] != old:
        for shard in manifest["shards"]:
            sign_file(directory / shard["file"], manifest)
    ends: dict[int, dict[str, int]] = {}
    for shard in manifest["shards"]:
        for former, name in FORMER_KEYS.items():
            if former in shard:
                shard[name] = shard.pop(former)
        path = directory / shard["file"]
        rows = rows_of(directory, shard["file"])
        valid = np.concatenate([row["target_logprob"] for row in rows]).astype(float)
        sums = {
            "entropy": finite(sum(float(row["entropy"].astype(float).sum()) for row in rows)),
            "topk_mass": finite(sum(float(np.exp(head(row).astype(float)).sum()) for row in rows)),
            "target_nll": -float(np.nansum(valid)),
            "targets": int((~np.isnan(valid)).sum()),
        }
        if "completion_mask" in rows[0]:
            sums["completion_tokens"] = sum(int(row["completion_mask"].sum()) for row in rows)
        if "kept" in shard["sums"]:
            sums["kept"] = sum(len(head(row)) for row in rows)
        tokens = sum(len(row["input_ids"]) for row in rows)
        end = ends.setdefault(shard["partition"], {"tokens": 0, "documents": 0})
        end["tokens"] += tokens
        if "completions" in shard:
            shard["completions"]["completions"] = shard["completions"]["prompts"] = len(rows)
            shard["completions"]["tokens"] = sums["completion_tokens"]
        end["documents"] += sum(row["chunk_index"] == 0 for row in rows)
        shard.update(
            sha256=file_sha256(path),
            footer_sha256=footer_sha256(path),
            bytes=path.stat().st_size,
            rows=len(rows),
            tokens=tokens,
            sums=sums,
            offset_after=shard["offset_after"] | end,
            column_bytes=column_bytes(pq.read_metadata(path)),
        )
    chain(manifest)
    records = records_of(manifest)
    manifest["totals"] = totals_of(records)
    write_json(directory / "manifest.json", manifest)
    write_card(directory, manifest)


def finite(value: float) -> float:
    """What JSON can hold of it."""
    return float(np.nan_to_num(value, posinf=1e30, neginf=-1e30))


def chain(manifest: Manifest) -> None:
    """Have each shard start where the one before ends, count them anew, and have the last one end its partition."""
    last: dict[int, Manifest] = {}
    for shard in manifest["shards"]:
        before = last.get(shard["partition"])
        shard["offset_before"] = dict(before["offset_after"]) if before else {}
        shard["exhausted"] = False
        last[shard["partition"]] = shard
    for shard in last.values():
        shard["exhausted"] = True


def rename(directory: Path, manifest: Manifest) -> None:
    """Number the shards of a manifest anew, and their files with them."""
    counts: dict[int, int] = {}
    for shard in manifest["shards"]:
        shard["index"] = counts.get(shard["partition"], 0)
        counts[shard["partition"]] = shard["index"] + 1
        name = data_file(shard["partition"], shard["index"])
        (directory / shard["file"]).rename(directory / f"{name}.new")
        shard["file"] = name
    for path in (directory / "data").glob("*.parquet"):
        path.unlink()
    for path in (directory / "data").glob("*.new"):
        path.rename(path.with_suffix(""))


def sign_file(path: Path, manifest: Manifest) -> None:
    """Give a file the fingerprint and schema version of a manifest."""
    table = pq.read_table(path)
    metadata = {
        "logit_dataset.schema": manifest["schema_version"],
        "logit_dataset.row_fingerprint": manifest["row_fingerprint"],
    }
    pq.write_table(table.replace_schema_metadata(metadata), path)
