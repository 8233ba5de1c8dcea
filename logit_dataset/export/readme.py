"""What stands beside an exported dataset: the configuration to paste, where the data are from, and what is lost."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from logit_dataset.export.weights import Tail
from logit_dataset.load import LogitDataset

TITLES = {"axolotl": "axolotl", "distillkit": "DistillKit", "maxtext": "MaxText"}
OF_TAIL: dict[Tail, str] = {
    "draws": "The mass outside the top {top_k}{known} is kept as {draws} ids drawn from it, each with the weight p_tail / {draws}. The gradient is "
    "an unbiased estimate of the one over the whole vocabulary. The loss is it too but for a constant that no student changes, so it does "
    "not end at 0. An id may come twice; that is right.",
    "bucket": "The mass outside the top {top_k}{known} is what the weights lack, which the loss takes for one event.",
    "none": "**The mass outside the top {top_k}{known} is lost.** The student learns to be more certain "
    "than its teacher.",
}


def readme(
    splits: Sequence[LogitDataset],
    *,
    output: Path,
    to: str,
    tail: Tail,
    length: int,
    packed: bool,
    rows: int,
) -> str:
    """The text of a README.md.

    Args:
        splits: what was exported.
        output: the directory.
        to, tail, length, packed: how.
        rows: how many were written.
    """
    data, names = splits[0], [one.split for one in splits]
    tokens = sum(one.num_tokens for one in splits)
    teacher, top_k = data.manifest["teacher"], int(data.layout.top_k)
    draws = data.layout.tail_samples if tail == "draws" else 0
    name = data.manifest["recipe"].get("name", "a logit dataset")
    config = _configuration(
        to, output=output, splits=names, vocab_size=teacher["vocab_size"], listed=top_k + draws, tail=tail, length=length, packed=packed
    )  # fmt: skip
    of_tail = _of_tail(data, tail, top_k, draws)
    lost = "\n".join(f"- {line}" for line in _lost(data, to, length))
    pin = teacher.get("commit") or teacher["sha256"]
    return f"""# {name} for {TITLES[to]}

{rows:,} rows, {tokens:,} tokens with distributions of {teacher.get("repo") or teacher["name"]} ({pin[:12]}), exported from the
logit dataset {name}, fingerprint {data.manifest["fingerprint"][:12]}. Its licence and its terms are those of that dataset. The student
needs the teacher's tokenizer: {teacher["vocab_size"]:,} ids.

## Configuration

```yaml
{config}
```

## The tail

{of_tail}

## What is lost

{lost}
"""


def _of_tail(data: LogitDataset, tail: Tail, top_k: int, draws: int) -> str:
    mass = data.manifest["totals"].get("mean_topk_mass")
    known = "" if mass is None else f" ({1 - mass:.1%} on average)"
    return OF_TAIL[tail].format(top_k=top_k, draws=draws, known=known)


def _lost(data: LogitDataset, to: str, length: int) -> list[str]:
    ours = {"input_ids", "topk_indices", "topk_logprobs", "tail_logprob", "tail_indices"}
    rest = [n for n in (*data.columns, "text") if n not in (*ours, "completion_mask")]
    lines = [f"the columns {', '.join(f'`{name}`' for name in rest)}, and the ids of documents"]
    if to != "axolotl":
        lines.append(
            f"sequences of more than {length:,} tokens are cut; behind a cut, the teacher knew what stands before it, the student does not"
        )
    if to == "axolotl":
        lines.append("the distribution behind the last token of each row")
    if to == "distillkit":
        lines.append(
            "the distribution behind the first token of each sequence: `labels` are −100 there, for DistillKit learns a distribution where "
            "there is a label, and a label from the position before it"
        )
        if "completion_mask" in data.columns:
            lines.append(
                "for the same reason, its cross-entropy counts the token before each completion, and not the last one of it"
            )
    if to == "maxtext":
        lines.append("distributions behind which the text is not known, at the end of sequences")
    return lines


def _eval_lines(to: str, output: Path, splits: Sequence[str]) -> Iterator[str]:
    """Of a configuration: the hold-out, where it was written beside the first split."""
    for split in splits[1:]:
        yield {
            "axolotl": f"\ntest_datasets:\n  - path: {output.name}\n    split: {split}",
            "distillkit": f"\n  eval_dataset:\n    repo_id: {output.name}\n    split: {split}",
        }[to]


def _configuration(
    to: str,
    *,
    output: Path,
    splits: Sequence[str],
    vocab_size: int,
    listed: int,
    tail: Tail,
    length: int,
    packed: bool,
) -> str:
    of: dict[str, Any] = {
        "axolotl": f"""plugins:
  - axolotl.integrations.kd.KDPlugin
kd_trainer: true
kd_temperature: 1.0  # the weights are those of temperature 1
kd_beta: 0.0
kd_normalize_topk: false  # with true, the mass outside the list is taken away again
kd_ce_alpha: 0.0
kd_alpha: 1.0
datasets:
  - path: {output.name}  # where this directory is
    split: {splits[0]}{"".join(_eval_lines(to, output, splits))}
skip_prepare_dataset: true
remove_unused_columns: false
sample_packing: true""",
        "distillkit": f"""dataset:
  train_dataset:
    repo_id: {output.name}  # where this directory is
    split: {splits[0]}{"".join(_eval_lines(to, output, splits))}
  prepacked: true
teacher:
  kind: dataset
  logprob_compressor:  # the rows are not compressed; it only names their sizes
    d: {vocab_size}
    k: {listed}
    exact_k: {listed}
    residual_bins: []
sequence_length: {length}
functionary_packing: {str(packed).lower()}{"  # without it, the sequences of a row see each other" if packed else ""}
use_flash_attention: {"true  # functionary_packing needs it" if packed else "false"}
loss_functions:
  - function: kl
    weight: 1.0
    temperature: 1.0
    missing_probability_handling: {"symmetric_uniform" if tail == "bucket" else "zero"}
training_args:
  remove_unused_columns: false""",
        "maxtext": f"""offline_data_dir: {output.name}  # where this directory is
max_target_length: {length}
distill_temperature: 1.0
distill_beta: 0.0""",
    }
    return str(of[to])
