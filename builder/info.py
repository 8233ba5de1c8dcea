"""A finished dataset → what it is, for a person or a program."""

from pathlib import Path
from typing import Any

import numpy as np

from builder.manifest import read_manifest, records_of
from builder.recompute import dataset_tokenizer, read_row

MAX_POSITIONS = 40
"""Positions that the overview of a row shows."""


def summarize(directory: Path) -> dict[str, Any]:
    """Plain JSON values: the manifest without its shards.

    Raises:
        ValueError: the directory holds no finished dataset.
    """
    manifest = read_manifest(directory)
    return {
        "name": manifest["recipe"]["name"],
        **{
            key: manifest[key]
            for key in ("schema_version", "fingerprint", "totals", "corpus", "teacher")
        },
        "top_k": manifest["recipe"]["output"]["top_k"],
        "max_length": manifest["recipe"]["sequences"]["max_length"],
        "shards": len(manifest["shards"]),
        "environments": manifest["environments"],
    }


def describe(directory: Path) -> str:
    """The summary as text for a terminal."""
    summary = summarize(directory)
    totals, teacher, corpus = summary["totals"], summary["teacher"], summary["corpus"]
    corpus_name = corpus.get("repo") or corpus.get("name") or f"{len(corpus['files'])} local files"
    corpus_pin = (corpus.get("commit") or corpus.get("sha256") or corpus["files"][0]["sha256"])[:12]
    teacher_name = teacher.get("repo") or teacher["name"]
    teacher_pin = (teacher.get("commit") or teacher["sha256"])[:12]
    skipped = (
        f", {totals['documents_skipped']:,} blank ones skipped"
        if totals["documents_skipped"]
        else ""
    )
    lines = {
        "dataset": f"{summary['name']}  (schema {summary['schema_version']}, fingerprint {summary['fingerprint'][:12]})",
        "teacher": f"{teacher_name} @ {teacher_pin}, {teacher['parameters']:,} parameters, {teacher['dtype']}, "
        f"vocabulary {teacher['vocab_size']:,}",
        "corpus": f"{corpus_name} @ {corpus_pin}",
        "size": f"{totals['tokens']:,} tokens in {totals['rows']:,} rows of {totals['documents']:,} documents{skipped}",
        "disk": f"{totals['bytes'] / 1e6:,.1f} MB in {summary['shards']} files, {totals['bytes_per_token']} bytes a token",
        f"top {summary['top_k']}": f"{totals['mean_topk_mass']:.1%} of the probability on average",
        "entropy": f"{totals['mean_entropy']:.3f} nats on average",
        "perplexity": f"{totals['teacher_perplexity']} of the teacher on this text",
        "built in": f"{totals['seconds']:,.0f} s at {totals['tokens_per_second']:,.0f} tokens/s on "
        f"{', '.join(e['device'] for e in summary['environments'])}",
    }
    return "\n".join(f"{key:<11}{value}" for key, value in lines.items())


def describe_row(
    directory: Path, row: int, *, position: int | None = None, teacher_path: Path | None = None
) -> str:
    """The text of a row with, at one position or at all, what the teacher expected to follow.

    Raises:
        ValueError: there is no such row or position, or the teacher's tokenizer cannot be found.
    """
    values = _find_row(directory, row)
    manifest = read_manifest(directory)
    tokenizer = dataset_tokenizer(manifest, teacher_path)

    def show(token: int) -> str:
        return repr(tokenizer.decode([token]))

    ids = values["input_ids"]
    heading = (
        f"row {row}: document {values['id']!r}, chunk {values['chunk_index']}, {len(ids)} tokens\n"
    )
    if position is None:
        return heading + _all_positions(values, show)
    if not 0 <= position < len(ids):
        raise ValueError(f"row {row} has positions 0 to {len(ids) - 1}, not {position}")
    context = tokenizer.decode(ids[: position + 1])
    return heading + f"{context[-300:]!r} is followed by:\n" + _one_position(values, position, show)


def _find_row(directory: Path, row: int) -> dict[str, Any]:
    first = 0
    for record in records_of(read_manifest(directory)):
        if first <= row < first + record.rows:
            return read_row(directory / record.file, row - first)
        first += record.rows
    raise ValueError(f"{directory} has rows 0 to {first - 1}, not {row}")


def _one_position(values: dict[str, Any], position: int, show: Any) -> str:
    ids = values["input_ids"]
    following = ids[position + 1] if position + 1 < len(ids) else None
    lines = [f"{'rank':>4}  {'probability':>11}  token"]
    tokens = values["topk_indices"][position].tolist()
    probabilities = np.exp(values["topk_logprobs"][position].astype(np.float64))
    for rank, (token, probability) in enumerate(zip(tokens, probabilities, strict=True), start=1):
        if rank <= 10 or token == following:
            mark = "   ← really followed" if token == following else ""
            lines.append(f"{rank:>4}  {probability:>11.4f}  {show(token)}{mark}")
    tail = np.exp(float(values["tail_logprob"][position]))
    lines.append(f"      {probabilities[10:].sum():>11.4f}  ranks 11 to {len(tokens)} together")
    lines.append(f"      {tail:>11.4f}  all other tokens together")
    target = float(values["target_logprob"][position])
    if following is not None and following not in tokens:
        lines.append(
            f"      {np.exp(target):>11.4f}  {show(following)}   ← really followed, outside the top {len(tokens)}"
        )
    lines.append(f"entropy {float(values['entropy'][position]):.3f} nats")
    return "\n".join(lines)


def _all_positions(values: dict[str, Any], show: Any) -> str:
    ids = values["input_ids"]
    lines = [
        f"{'position':>8}  {'token':<16} {'really followed':<24} {'teacher expected':<24} entropy"
    ]
    for position, token in enumerate(ids[:MAX_POSITIONS]):
        first = int(values["topk_indices"][position][0])
        first_probability = np.exp(float(values["topk_logprobs"][position][0]))
        target = float(values["target_logprob"][position])
        following = show(ids[position + 1]) if position + 1 < len(ids) else "(next or end)"
        lines.append(
            f"{position:>8}  {show(token):<16} {following:<15} {np.exp(target):>8.4f} "
            f"{show(first):<15} {first_probability:>8.4f} {float(values['entropy'][position]):>8.3f}"
        )
    if len(ids) > MAX_POSITIONS:
        lines.append(f"… and {len(ids) - MAX_POSITIONS} more; --position T shows any of them")
    return "\n".join(lines)
