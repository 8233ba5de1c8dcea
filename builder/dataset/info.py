"""A finished dataset → what it is, for a person or a program."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from builder.corpus.sequences import NO_TOKEN
from builder.dataset import authorship
from builder.dataset.lookup import dataset_tokenizer, file_of_row, read_row, what_follows
from builder.dataset.manifest import read_manifest
from builder.dataset.printable import as_size, counted, one_line
from logit_dataset.files import first_line
from logit_dataset.schema import HEAD_FILE, Layout, columns, is_generated, loss_mask

Floats = npt.NDArray[np.float64]

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
        "columns": [column.name for column in columns(_layout(manifest))],
        "max_length": manifest["recipe"]["sequences"]["max_length"],
        **(
            {"generation": manifest["recipe"]["generation"]}
            if is_generated(manifest["recipe"])
            else {}
        ),
        "shards": len(manifest["shards"]),
        "environments": manifest["environments"],
    }


def describe(directory: Path) -> str:
    """The summary as text for a terminal."""
    return "\n".join(f"{key:<11}{value}" for key, value in facts(directory).items())


def facts(directory: Path) -> dict[str, str]:
    """The summary in words, each a line without anything that steers a terminal.

    Raises:
        ValueError: the directory holds no finished dataset.
    """
    summary = summarize(directory)
    totals, teacher, corpus = summary["totals"], summary["teacher"], summary["corpus"]
    corpus_name = (
        corpus.get("repo") or corpus.get("name") or f"local files ({len(corpus['files'])})"
    )
    corpus_pin = (corpus.get("commit") or corpus.get("sha256") or corpus["files"][0]["sha256"])[:12]
    teacher_name = teacher.get("repo") or teacher["name"]
    teacher_pin = (teacher.get("commit") or teacher["sha256"])[:12]
    what = "without an answer to learn" if "completion_tokens" in totals else "blank ones"
    if "completions" in totals:
        what = (
            "too long or blank ones" if totals["completions"]["prompts_too_long"] else "blank ones"
        )
    skipped = (
        f", {totals['documents_skipped']:,} {what} skipped" if totals["documents_skipped"] else ""
    )
    manifest = read_manifest(directory)
    layout, written = _layout(manifest), authorship.line(manifest)
    found = {
        "dataset": f"{summary['name']}  (schema {summary['schema_version']}, fingerprint {summary['fingerprint'][:12]})",
        "teacher": f"{teacher_name} @ {teacher_pin}, {teacher['parameters']:,} parameters, {_precision(teacher)}, "
        f"vocabulary {teacher['vocab_size']:,}",
        "corpus": f"{corpus_name} @ {corpus_pin}",
        "size": f"{counted(totals['tokens'], 'token')} in {counted(totals['rows'], 'row')} of {counted(totals['documents'], 'document')}{skipped}",
        **_completions(totals),
        **_splits(totals),
        **_converted(totals),
        **({"written": written} if written else {}),
        "disk": f"{as_size(totals['bytes'])} in {counted(summary['shards'], 'file')}, {totals['bytes_per_token']} bytes per token",
        "stored": _stored(layout),
        **_head(manifest),
        **_share(summary),
        "entropy": f"{totals['mean_entropy']:.3f} nats on average",
        "perplexity": f"{totals['teacher_perplexity'] or '?'} of the teacher on this text",
        "built in": f"{totals['seconds']:,.0f} s at {totals['tokens_per_second']:,.0f} tokens/s on "
        f"{', '.join(e['device'] for e in summary['environments'])}",
    }
    return {key: one_line(value) for key, value in found.items()}


def _precision(teacher: dict[str, Any]) -> str:
    """The type in which a teacher computes, and how its weights are packed, if they are."""
    packed = teacher.get("quantisation")
    if not isinstance(packed, dict):
        return str(teacher["dtype"])
    return f"{teacher['dtype']}, quantised ({packed.get('method')})"


def _stored(layout: Layout) -> str:
    """What is kept of each distribution."""
    parts = ["all log-probabilities" if layout.top_k == "all" else f"top {layout.top_k} and tail"]
    if layout.tail_samples:
        alone = "" if layout.tail_logprobs else ", ids alone"
        parts.append(f"{counted(layout.tail_samples, 'draw')} from the tail{alone}")
    if layout.temperatures:
        listed = ", ".join(f"{temperature:g}" for temperature in layout.temperatures)
        parts.append(f"logsumexp at temperature 1, {listed}")
    if layout.hidden_states:
        parts.append(f"hidden states of {layout.hidden_size}")
    if layout.completions_only:
        parts[0] += ", for completions only"
    return "; ".join(parts)


def _head(manifest: dict[str, Any]) -> dict[str, str]:
    head = manifest.get("teacher_head")
    if not head:
        return {}
    return {
        "head": f"{HEAD_FILE} makes the teacher's logits of these: {head['bytes'] / 1e6:,.1f} MB, {head['dtype']}, licence {head['license'] or 'not stated'}"
    }


def _completions(totals: dict[str, Any]) -> dict[str, str]:
    if "completion_tokens" not in totals:
        return {}
    count = totals["completion_tokens"]
    return {"of these": f"{counted(count, 'token')} in completions, {count / totals['tokens']:.1%}"}


def _splits(totals: dict[str, Any]) -> dict[str, str]:
    listed = [
        f"{counted(found['tokens'], 'token')} in {counted(found['rows'], 'row')} of {counted(found['documents'], 'document')} in {split}"
        for split, found in (totals.get("splits") or {}).items()
    ]
    return {"splits": ", ".join(listed)} if listed else {}


def _converted(totals: dict[str, Any]) -> dict[str, str]:
    found = totals.get("converted") or {}
    listed = ", ".join(f"{what} (in {count:,})" for what, count in found.items())
    return {"converted": listed} if listed else {}


def _share(summary: dict[str, Any]) -> dict[str, str]:
    if summary["top_k"] == "all":
        return {}
    share = summary["totals"]["mean_topk_mass"]
    return {f"top {summary['top_k']}": f"{share:.1%} of the probability on average"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternatives:
    """What the teacher expected at one position."""

    context: str
    """The text up to and with this position's token."""
    tokens: list[str]
    """The top K, or the whole vocabulary, most probable first, as `spell_token` writes them."""
    probabilities: Floats
    """Of these tokens."""
    tail: float
    """Probability of all other tokens together."""
    drawn: list[str]
    """Tokens drawn from these."""
    following: str | None
    """The token that really follows: at the end of a row its next chunk's first or end-of-sequence. None where there is
    neither, or where the document may have been cut short."""
    rank: int | None
    """Index in the top K of the token that really follows; None outside."""
    following_probability: float
    """Of the token that really follows; NaN where there is none."""
    entropy: float
    """Nats."""


def alternatives(
    directory: Path,
    row: int,
    position: int,
    *,
    split: str | None = None,
    teacher_path: Path | None = None,
) -> Alternatives:
    """The teacher's alternatives at a position of a row, by its number as `file_of_row` takes it.

    Raises:
        ValueError: there is no such row or position, or the teacher's tokenizer cannot be found.
    """
    manifest = read_manifest(directory)
    values, targets = _find_row(directory, manifest, row, split)
    ids = values["input_ids"]
    if not 0 <= position < len(ids):
        raise ValueError(
            f"row {row} has positions 0 to {len(ids) - 1}, not {position}; choose one of these"
        )
    index = _kept_index(values, _layout(manifest), position)
    if index is None:
        kept = np.flatnonzero(loss_mask(values["completion_mask"]))
        where = f"the first of which is {kept[0]}" if len(kept) else "of which this row has none"
        raise ValueError(
            f"row {row} stores no distribution at position {position}, because the next token is not part of a completion; choose a position before a completion's token,"
            f" {where}"
        )
    tokenizer = dataset_tokenizer(manifest, teacher_path)
    return alternatives_of(values, targets, position, index, tokenizer)


def alternatives_of(
    values: dict[str, Any], targets: list[int], position: int, index: int, tokenizer: Any
) -> Alternatives:
    """The same, of a row that has been read.

    Args:
        values: the row.
        targets: the token that follows each position.
        position: one that is kept.
        index: its place in columns of several values.
        tokenizer: the teacher's.
    """
    ids = values["input_ids"]
    topk_ids, topk_logprobs, tail_logprob = _ranked(values, position, index)
    drawn = values["tail_indices"][index].tolist() if "tail_indices" in values else []
    following = targets[position]
    return Alternatives(
        context=_spell(tokenizer, ids[: position + 1]),
        tokens=[spell_token(tokenizer, token) for token in topk_ids],
        probabilities=np.exp(topk_logprobs),
        tail=float(np.exp(tail_logprob)),
        drawn=[spell_token(tokenizer, token) for token in drawn if token not in topk_ids],
        following=None if following == NO_TOKEN else spell_token(tokenizer, following),
        rank=topk_ids.index(following) if following in topk_ids else None,
        following_probability=float(np.exp(values["target_logprob"][position].astype(np.float64))),
        entropy=float(values["entropy"][position]),
    )


def describe_position(found: Alternatives) -> str:
    """The first ten alternatives and the token that really followed, as a table."""
    lines = [
        f"{found.context[-300:]!r} is followed by:",
        f"{'rank':>4}  {'probability':>11}  token",
    ]
    shown = list(range(min(10, len(found.tokens))))
    if found.rank is not None and found.rank >= len(shown):
        shown.append(found.rank)
    for rank in shown:
        mark = "   ← really followed" if rank == found.rank else ""
        lines.append(
            f"{rank + 1:>4}  {found.probabilities[rank]:>11.4f}  {found.tokens[rank]!r}{mark}"
        )
    if len(found.tokens) > 10:
        rest = found.probabilities[10:].sum()
        lines.append(f"{'':>4}  {rest:>11.4f}  ranks 11 to {len(found.tokens)} together")
    if found.tail:
        drawn = f", such as {', '.join(map(repr, found.drawn))}" if found.drawn else ""
        lines.append(f"{'':>4}  {found.tail:>11.4f}  all other tokens together{drawn}")
    if found.following is not None and found.rank is None:
        lines.append(
            f"{'':>4}  {found.following_probability:>11.4f}  {found.following!r}   ← really followed, "
            f"outside the top {len(found.tokens)}"
        )
    elif found.following is None and not np.isnan(found.following_probability):
        lines.append(
            f"{'':>4}  {found.following_probability:>11.4f}  what really followed; the document may have been cut here"
        )
    lines.append(f"entropy {found.entropy:.3f} nats")
    return "\n".join(lines)


def describe_row(
    directory: Path, row: int, *, split: str | None = None, teacher_path: Path | None = None
) -> str:
    """A row's tokens with, at each position, what really followed and what the teacher expected.

    Raises:
        ValueError: there is no such row, or the teacher's tokenizer cannot be found.
    """
    manifest = read_manifest(directory)
    values, targets = _find_row(directory, manifest, row, split)
    tokenizer = dataset_tokenizer(manifest, teacher_path)
    ids = values["input_ids"]

    def show(token: int) -> str:
        return "(not known)" if token == NO_TOKEN else repr(spell_token(tokenizer, token))

    lines = [
        f"row {row}: document {values['id']!r}, chunk {values['chunk_index']}, {counted(len(ids), 'token')}",
        f"{'position':>8}  {'token':<16} {'really followed':<24} {'teacher expected':<24} entropy",
    ]
    for position, token in enumerate(ids[:MAX_POSITIONS]):
        index, expected = _kept_index(values, _layout(manifest), position), f"{'(not kept)':<24}"
        if index is not None:
            topk_ids, topk_logprobs, _ = _ranked(values, position, index)
            expected = f"{show(topk_ids[0]):<15} {np.exp(topk_logprobs[0]):>8.4f}"
        target = np.exp(float(values["target_logprob"][position]))
        lines.append(
            f"{position:>8}  {show(token):<16} {show(targets[position]):<15} {target:>8.4f} "
            f"{expected} {float(values['entropy'][position]):>8.3f}"
        )
    if len(ids) > MAX_POSITIONS:
        lines.append(f"… and {len(ids) - MAX_POSITIONS} more; --position T shows any of them")
    return "\n".join(lines)


def _kept_index(values: dict[str, Any], layout: Layout, position: int) -> int | None:
    """Where a position stands among those whose columns of several values were kept; None if it was not."""
    if not layout.completions_only:
        return position
    kept = loss_mask(values["completion_mask"])
    return int(kept[:position].sum()) if kept[position] else None


def _ranked(values: dict[str, Any], position: int, index: int) -> tuple[list[int], Floats, float]:
    """Ids and log-probabilities at a position, most probable first, and the log-probability of all others together.

    In columns of several values a token, it has this index.
    """
    if "logprobs" in values:
        logprobs = values["logprobs"][index].astype(np.float64)
        order = np.argsort(-logprobs, kind="stable")
        return order.tolist(), logprobs[order], -np.inf
    logprobs = values["topk_logprobs"][index].astype(np.float64)
    return (
        values["topk_indices"][index].tolist(),
        logprobs,
        float(values["tail_logprob"][position]),
    )


def _layout(manifest: dict[str, Any]) -> Layout:
    return Layout.of(manifest["recipe"], manifest["teacher"])


def spell_token(tokenizer: Any, token: int) -> str:
    """The text of one token, spaces included; bytes of a part of a character as in <0xE2>, and <id 9> for no token."""
    raw: str | None = tokenizer.convert_ids_to_tokens(token)
    # Decoded alone, a token of such a tokenizer would lose the space at its beginning.
    return raw.replace("▁", " ") if raw and raw.startswith("▁") else _spell(tokenizer, [token])


def _spell(tokenizer: Any, tokens: list[int]) -> str:
    """The text of some tokens, with the bytes of characters of which only a part is there, and <id 9> for what is no token."""
    pieces = tokenizer.convert_ids_to_tokens(tokens)
    if None in pieces:  # logits are often padded beyond the tokenizer's vocabulary
        parts = []
        for is_token, some in itertools.groupby(zip(tokens, pieces, strict=True), lambda one: one[1] is not None):  # fmt: skip
            ids = [token for token, _ in some]
            parts += [_spell(tokenizer, ids)] if is_token else [f"<id {token}>" for token in ids]
        return "".join(parts)
    text: str = tokenizer.decode(tokens)
    if "\ufffd" not in text:
        return text
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    raw = "".join(pieces)
    if not all(character in byte_of for character in raw):
        return text  # not a byte-level vocabulary
    exact = bytes(byte_of[character] for character in raw).decode("utf-8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", exact)


def _find_row(
    directory: Path, manifest: dict[str, Any], row: int, split: str | None
) -> tuple[dict[str, Any], list[int]]:
    """A row, and the token that follows each of its positions."""
    file, number = file_of_row(directory, row, split)
    try:
        values = read_row(directory / file, number)
        last, _ = what_follows(manifest, file, number, values, lambda name: directory / name)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # such as a missing file
            raise
        raise ValueError(
            f"{directory / file} cannot be read ({first_line(error)}); fetch or build the dataset again"
        ) from None
    return values, [*values["input_ids"][1:], last]
