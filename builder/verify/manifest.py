"""A manifest → where it contradicts itself: totals, the chain of shards, fingerprints, counts.

In:   a manifest, and its shard records.
Out:  one line for each contradiction, and one for what cannot be told.

How:  a manifest says most things twice: totals are sums over shards, each shard starts where the one before ended, and both fingerprints
      are functions of what stands beside them. Whoever changes one has to change the other. Nothing here opens a data file.

Cost: microseconds a shard.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from builder.dataset.identity import differences, fingerprint, plans_of, row_fingerprint
from builder.dataset.manifest import FILE_NAME, ShardRecord, data_file, totals_of
from logit_dataset.schema import SCHEMA_VERSION, SPLITS

Offset = dict[str, Any]

DIGITS = {
    **dict.fromkeys(("mean_entropy", "mean_topk_mass", "mean_target_nll"), 4),
    **{"teacher_perplexity": 3, "bytes_per_token": 2, "seconds": 1, "tokens_per_second": 1},
}
"""Behind the point, to which totals are rounded."""


def check_manifest(manifest: dict[str, Any], records: list[ShardRecord]) -> list[str]:
    """What contradicts itself, one line each.

    Args:
        manifest: of a dataset.
        records: its shards, in its order.
    """
    found = [
        *_files(records),
        *_order(records, manifest["recipe"]["output"]),
        *_sections(manifest),
        *_totals(manifest, records),
        *(() if is_of_later_schema(manifest) else _fingerprints(manifest)),
    ]
    for before, record in pairwise([None, *records]):
        assert record
        follows = before is not None and before.partition == record.partition
        found += _chain(before if follows else None, record)
        found += _counts(record, before if follows else None, manifest["recipe"])
    return [line if line.startswith("data/") else f"{FILE_NAME}: {line}" for line in found]


def is_of_later_schema(manifest: dict[str, Any]) -> bool:
    """Whether a later version wrote it, whose fingerprints may be made of more than is known here."""
    its, ours = (
        tuple(map(int, version.split("."))) for version in (manifest["schema_version"], SCHEMA_VERSION)
    )  # fmt: skip
    return its[:2] > ours[:2]


def start_of(record: ShardRecord, before: ShardRecord | None) -> Offset | None:
    """The corpus offset at which a shard starts; None where that was not recorded, and there is none before it."""
    if record.offset_before is not None:
        return record.offset_before
    return before.offset_after if before else None


def _files(records: list[ShardRecord]) -> Iterator[str]:
    """A record a file, a file a record."""
    for file, count in Counter(record.file for record in records).items():
        if count > 1:
            yield f"{file}: is listed {count} times"
    for record in records:
        expected = data_file(record.partition, record.index, record.split)
        if record.file != expected:
            yield f"{record.file}: is listed as shard {record.index} of partition {record.partition}, whose file is {expected}"


def _order(records: list[ShardRecord], output: dict[str, Any]) -> Iterator[str]:
    """Partitions in their order, and in each the shards 0, 1, … of which the last one, and no other, is the end.

    Where there is a hold-out, as many partitions of it stand behind those of `train`; no document of one may have been held out.
    """
    partitions: int = output.get("partitions", 1)
    splits = SPLITS if output.get("validation") else (None,)
    for record in records:
        expected = splits[min(record.partition // partitions, len(splits) - 1)]
        if record.split != expected:
            yield f"{record.file}: is listed in the split {record.split}, but partition {record.partition} is of {expected}"
    partitions_of_all = partitions * len(splits)
    places = [(record.partition, record.index) for record in records]
    if places != sorted(places):
        yield "shards are not in the order of partition and index, which is that of the rows"
    by_partition: dict[int, list[ShardRecord]] = {}
    for record in records:
        by_partition.setdefault(record.partition, []).append(record)
    if extra := sorted(by_partition.keys() - set(range(partitions_of_all))):
        yield f"lists shards of partition {extra[0]}, but recipe.output.partitions is {partitions}"
    for partition in range(min(partitions, len(records) + 1)):
        if partition not in by_partition:
            yield f"lists no shard of partition {partition}, but recipe.output.partitions is {partitions}"
    for partition, chain in by_partition.items():
        indices = sorted({record.index for record in chain})
        gaps = [i for i, index in enumerate(indices) if i != index]
        if gaps:
            yield f"{data_file(partition, gaps[0])}: is not listed, but later shards of its partition are"
        last = max(chain, key=lambda record: record.index)
        for record in chain:
            if record is last and not record.exhausted:
                yield f"{record.file}: is the last of its partition, but does not end it (exhausted is false): shards are missing"
            elif record.exhausted and record.index < last.index:
                yield f"{record.file}: ends its partition (exhausted is true), but is not the last"


def _chain(before: ShardRecord | None, record: ShardRecord) -> Iterator[str]:
    """A shard starts where the one before it ended, and the counts in offsets grow by what it holds.

    A shard that was recorded by a schema before 1.2 does not say where it starts.
    """
    end: Offset = before.offset_after if before else {}
    start = start_of(record, before)
    if start is None:
        start = {}
    if changes := differences(end, start):
        where = f"{before.file} ends" if before else "a partition starts"
        yield f"{record.file}: starts elsewhere in the corpus than {where} ({'; '.join(changes[:3])})"
        return
    for name in ("tokens", "documents", "skipped"):
        then, now = start.get(name, 0), record.offset_after.get(name)
        if not (_is_count(then) and _is_count(now) and now >= then):
            yield f"{record.file}: offset_after.{name} is {now!r}, expected a count of at least {then!r}"
        elif name == "tokens" and now - then != record.tokens:
            yield f"{record.file}: has {record.tokens:,} tokens, but its offsets count {now - then:,}"


def documents_of(record: ShardRecord, before: ShardRecord | None) -> int | None:
    """How many documents of the corpus became rows in a shard, by its offsets; None where they do not tell."""
    start = start_of(record, before)
    counts = [{} if start is None else start, record.offset_after]
    then, now = counts[0].get("documents", 0), counts[1].get("documents")
    return now - then if _is_count(then) and _is_count(now) else None


def _counts(
    record: ShardRecord, before: ShardRecord | None, recipe: dict[str, Any]
) -> Iterator[str]:
    """Counts of a record that bound each other."""
    sums, done = record.sums, record.completions
    if not 0 < record.rows <= record.tokens:
        yield f"{record.file}: has {record.rows:,} rows of {record.tokens:,} tokens together"
    for name in ("targets", "completion_tokens", "kept"):
        if (count := getattr(sums, name)) is not None and count > record.tokens:
            yield f"{record.file}: sums.{name} is {count:,}, more than its {record.tokens:,} tokens"
    least = recipe["output"]["shard_tokens"]
    if not record.exhausted and record.tokens < least:
        yield (
            f"{record.file}: has {record.tokens:,} tokens, but goes on behind it, and recipe.output.shard_tokens is {least:,}"
        )
    if done is None:
        if recipe.get("generation"):
            yield f"{record.file}: has no counts of completions, but the recipe has a generation"
        return
    samples = (recipe.get("generation") or {}).get("samples", 1)
    for what, one, other in (
        ("completions", done.completions, record.rows),
        ("completions", done.completions, done.prompts * samples),
        ("prompts", done.prompts, documents_of(record, before)),
        ("tokens of completions", done.tokens, sums.completion_tokens),
    ):
        if one != other:
            yield f"{record.file}: counts {one} {what}, where {other} are to be expected"
    if done.ended > done.completions:
        yield f"{record.file}: counts {done.ended} completions that ended, of {done.completions}"


def _totals(manifest: dict[str, Any], records: list[ShardRecord]) -> Iterator[str]:
    """Totals are those of the records, to the last digit that is written."""
    try:
        expected = _flat(totals_of(records))
    except (KeyError, TypeError):
        yield "offsets of shards do not count documents, so that totals cannot be compared"
        return
    found = _flat(manifest["totals"])
    wrong = [
        f"{name} is {found.get(name)} and not {value}"
        for name, value in expected.items()
        if not _is_same(found.get(name), value, DIGITS.get(name.rpartition(".")[2]))
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        yield f"totals are not those of its shards ({', '.join(wrong[:3])}{more})"


def _flat(totals: dict[str, Any]) -> dict[str, Any]:
    """Totals with those of completions and splits beside the others."""
    found: dict[str, Any] = {}
    for key, value in totals.items():
        if key in ("completions", "splits") and isinstance(value, dict):
            found |= {f"{key}.{name}": inner for name, inner in _flat_values(value).items()}
        else:
            found[key] = value
    return found


def _flat_values(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= {f"{key}.{n}": v for n, v in value.items()} if isinstance(value, dict) else {key: value}  # fmt: skip
    return found


def _is_same(found: Any, expected: Any, digits: int | None) -> bool:
    if digits is not None and isinstance(found, float) and isinstance(expected, float):
        # Another library's exp may round the last digit the other way.
        return bool(abs(found - expected) <= 1.01 * 10.0**-digits)
    return type(found) is type(expected) and bool(found == expected)


def _sections(manifest: dict[str, Any]) -> Iterator[str]:
    """What recipe and sources both say."""
    recipe, teacher, corpus = manifest["recipe"], manifest["teacher"], manifest["corpus"]
    pairs = [
        ("teacher.repo", recipe["teacher"].get("repo"), teacher.get("repo")),
        ("corpus.repo", recipe["corpus"].get("repo"), corpus.get("repo")),
    ]
    if not any(key.startswith("quanti") for key in teacher):
        pairs.append(("teacher.dtype", recipe["teacher"]["dtype"], teacher["dtype"]))
    if used := teacher.get("head_dtype"):
        pairs.append(("teacher.head_dtype", recipe["teacher"].get("head_dtype"), used))
    for path, one, other in pairs:
        if one != other:
            yield f"{path} is {other!r}, but recipe.{path} is {one!r}"


def _fingerprints(manifest: dict[str, Any]) -> Iterator[str]:
    """Both are functions of recipe, corpus, and where the teacher is from."""
    version = manifest["schema_version"]
    plans = plans_of(manifest)
    for name, function in (("fingerprint", fingerprint), ("row_fingerprint", row_fingerprint)):
        if manifest.get(name) is None:
            continue  # there was none once
        if manifest[name] not in {function(plan, version) for plan in plans}:
            yield (
                f"{name} is {manifest[name][:12]}…, but that of its recipe, corpus and teacher is "
                f"{function(plans[0], version)[:12]}…"
            )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
