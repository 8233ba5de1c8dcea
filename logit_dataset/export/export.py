"""A dataset → a directory in another trainer's format, whole or not at all.

In:   a directory or a name on the Hub (which is streamed: no copy of it is kept), and which trainer.
Out:  data files, and a README.md with the configuration to paste and what is lost.

Cost: some row groups in memory. About as long as reading, which the compression of what is written doubles.
"""

import shutil
from pathlib import Path
from typing import Literal, get_args

from logit_dataset.export.array_record import maxtext_records, write_array_records
from logit_dataset.export.parquet import axolotl_tables, distillkit_tables, write_parquet
from logit_dataset.export.readme import readme
from logit_dataset.export.weights import Tail
from logit_dataset.load import LogitDataset, load_logits
from logit_dataset.schema import TRAIN, VALIDATION, splits_of

Trainer = Literal["axolotl", "distillkit", "maxtext"]
TAILS: dict[Trainer, tuple[Tail, ...]] = {
    "axolotl": ("draws", "none"),
    "distillkit": ("draws", "bucket", "none"),
    "maxtext": ("none",),
}
"""What each can be told of the tail, the best first."""


def export(
    source: str | Path,
    output: Path,
    *,
    to: Trainer,
    revision: str | None = None,
    tail: Tail | None = None,
    length: int | None = None,
    packed: bool = False,
    split: str | None = None,
) -> str:
    """Write a dataset in another trainer's format. Return a line that says what was written.

    Args:
        source: directory of a dataset, or its name on the Hub.
        output: a directory that does not exist.
        to: the trainer.
        revision: tag, branch or commit on the Hub.
        tail: what becomes of the mass outside the top K; None for the best that trainer and dataset allow.
        length: tokens per row, for DistillKit and MaxText, whose rows have one length; None for the recipe's `max_length`. Longer sequences
            are cut.
        packed: for DistillKit, put several sequences into a row. MaxText's rows are always packed, and axolotl packs by itself.
        split: write this split only. None writes `train` and, for axolotl and DistillKit, the held-out split if there is one. MaxText
            reads everything in a directory.

    Raises:
        ValueError: the dataset does not exist, lacks what this trainer needs, or the output exists.
    """
    if to not in get_args(Trainer):
        raise ValueError(f"to is {to!r}, expected one of {', '.join(get_args(Trainer))}")
    if output.exists():
        raise ValueError(f"{output} exists; remove it, or choose another output")
    is_here = Path(source).is_dir()
    data = load_logits(source, split=split or TRAIN, revision=revision, streaming=not is_here)
    splits = [data]
    if split is None and to != "maxtext" and VALIDATION in splits_of(data.manifest):
        splits.append(
            load_logits(source, split=VALIDATION, revision=revision, streaming=not is_here)
        )
    tail = _check_tail(data, to, tail)
    if length is not None and (length < 2 or to == "axolotl"):
        raise ValueError(
            "axolotl takes whole sequences and packs them by itself; leave length out"
            if to == "axolotl"
            else f"length is {length}, expected 2 or more"
        )
    if packed and to != "distillkit":
        raise ValueError(
            f"packed is only for DistillKit, and this is an export to {to}; leave packed out"
        )
    length = length or int(data.manifest["recipe"]["sequences"]["max_length"])
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        rows = 0
        for data in splits:
            if to == "maxtext":
                rows += write_array_records(maxtext_records(data, length=length), partial)
            elif to == "axolotl":
                rows += write_parquet(axolotl_tables(data, tail), partial, data.split)
            else:
                tables = distillkit_tables(data, tail, length=length, packed=packed)
                rows += write_parquet(tables, partial, data.split)
        text = readme(
            splits, output=output, to=to, tail=tail, length=length, packed=packed, rows=rows
        )
        (partial / "README.md").write_text(text, encoding="utf-8")
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    tokens = sum(data.num_tokens for data in splits)
    return f"{output}: {rows:,} rows, {tokens:,} tokens for {to}, tail {tail}; {output / 'README.md'} has the configuration"


def _check_tail(data: LogitDataset, to: Trainer, tail: Tail | None) -> Tail:
    if "topk_indices" not in data.columns:
        raise ValueError(
            "the dataset has whole distributions, which no format of others holds; build it with a top_k"
        )
    has_draws = "tail_indices" in data.columns
    possible = [kind for kind in TAILS[to] if kind != "draws" or has_draws]
    if tail is None:
        return possible[0]
    if tail == "draws" and not has_draws:
        raise ValueError(
            f"the dataset has no draws from the tail (no column tail_indices); use tail {' or '.join(possible)}"
        )
    if tail not in possible:
        raise ValueError(
            f"{to} cannot be told of the tail by {tail!r}; use {' or '.join(possible)}"
        )
    return tail
