"""The manifest → the dataset card: README.md of a dataset, with the YAML head by which `load_dataset` knows its types."""

from typing import Any

import yaml

from builder.schema import card_features, columns


def render_card(manifest: dict[str, Any]) -> str:
    """The card of a finished build."""
    recipe, totals, teacher = manifest["recipe"], manifest["totals"], manifest["teacher"]
    top_k, with_text = recipe["output"]["top_k"], recipe["output"]["text"]
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
            "features": card_features(with_text=with_text, top_k=top_k),
            "splits": [
                {"name": "train", "num_bytes": totals["bytes"], "num_examples": totals["rows"]}
            ],
            "download_size": totals["bytes"],
            "dataset_size": totals["bytes"],
        },
    }
    rows = "\n".join(
        f"| `{column.name}` | {column.dtype}{f' [{column.shape}]' if column.shape else ''} | {column.meaning} |"
        for column in columns(with_text=with_text)
    )
    return f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---

# {recipe["name"]}

{totals["tokens"]:,} tokens of text with the next-token distributions of a teacher, {teacher["architecture"]} with
{teacher["parameters"]:,} parameters in {teacher["dtype"]}: its {top_k} most probable tokens at every position, the mass of all
others, and the partition function.

```python
from datasets import load_dataset

dataset = load_dataset("path/to/this/directory", split="train").with_format("torch")
row = dataset[0]
row["input_ids"], row["topk_indices"], row["topk_logprobs"]  # (T,), (T, {top_k}), (T, {top_k})
```

Position t holds the teacher's distribution for the token that **follows** `input_ids[t]`; nothing is shifted.

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
| mean probability inside the top {top_k} | {totals["mean_topk_mass"]} |
| teacher's perplexity on this text | {totals["teacher_perplexity"]} |

Provenance, hashes and the whole recipe are in `manifest.json` (fingerprint `{manifest["fingerprint"][:16]}`).
"""
