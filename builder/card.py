"""The manifest → the dataset card: README.md of a dataset, with the YAML head by which `load_dataset` knows its types."""

from typing import Any

import yaml

from builder.schema import Layout, card_features, columns


def render_card(manifest: dict[str, Any]) -> str:
    """The card of a finished build."""
    recipe, totals, teacher = manifest["recipe"], manifest["totals"], manifest["teacher"]
    layout = Layout.of(recipe["output"], teacher)
    head = {
        "pretty_name": recipe["name"],
        "tags": ["distillation", "logits", "logit-dataset"],
        "task_categories": ["text-generation"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/train-*.parquet"}],
            }
        ],
        "dataset_info": {
            "config_name": "default",
            "features": card_features(layout),
            "splits": [
                {"name": "train", "num_bytes": totals["bytes"], "num_examples": totals["rows"]}
            ],
            "download_size": totals["bytes"],
            "dataset_size": totals["bytes"],
        },
    }
    rows = "\n".join(
        f"| `{column.name}` | {column.dtype}{f' [{column.shape}]' if column.shape else ''} | {column.meaning} |"
        for column in columns(layout)
    )
    return f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---

# {recipe["name"]}

{totals["tokens"]:,} tokens of text with the next-token distributions of a teacher, {teacher["architecture"]} with
{teacher["parameters"]:,} parameters in {teacher["dtype"]}: {_what_is_kept(layout)}

```python
from datasets import load_dataset

dataset = load_dataset("path/to/this/directory", split="train").with_format("torch")
row = dataset[0]
{_example(layout)}
```

Position t holds the teacher's distribution for the token that **follows** `input_ids[t]`; nothing is shifted.
{_how_to_use(layout)}
| column | type | meaning |
|---|---|---|
{rows}

| | |
|---|---|
| documents | {totals["documents"]:,} |
| rows | {totals["rows"]:,} |
| tokens | {totals["tokens"]:,} |
| bytes a token | {totals["bytes_per_token"]} |
| mean entropy | {totals["mean_entropy"]} nats |
| mean probability inside {"the vocabulary" if layout.top_k == "all" else f"the top {layout.top_k}"} | {totals["mean_topk_mass"]} |
| teacher's perplexity on this text | {totals["teacher_perplexity"]} |

Provenance, hashes and the whole recipe are in `manifest.json` (fingerprint `{manifest["fingerprint"][:16]}`).
"""


def _what_is_kept(layout: Layout) -> str:
    if layout.top_k == "all":
        return f"the log-probabilities of all {layout.vocab_size:,} tokens\nat every position, and the partition function."
    draws = f", {layout.tail_samples} tokens drawn from among these" if layout.tail_samples else ""
    return f"its {layout.top_k} most probable tokens at every position, the mass of all\nothers{draws}, and the partition function."


def _example(layout: Layout) -> str:
    if layout.top_k == "all":
        return f'row["input_ids"], row["logprobs"]  # (T,), (T, {layout.vocab_size})'
    return (
        'row["input_ids"], row["topk_indices"], row["topk_logprobs"]'
        f"  # (T,), (T, {layout.top_k}), (T, {layout.top_k})"
    )


def _how_to_use(layout: Layout) -> str:
    """What a reader has to know of columns that are not always there."""
    if not layout.tail_samples:
        return ""
    return (
        "\nThe top K is exact and the tail is sampled, so that for any f over the vocabulary, without bias, "
        "E[f] = Σ exp(`topk_logprobs`) f(`topk_indices`)\n"
        "+ exp(`tail_logprob`) / M · Σ f(`tail_indices`).\n"
    )
