"""A manifest → the variables of template.md: every sentence, number and table of the card that is not in the template itself.

In:   a manifest; and, where they exist, what the pictures show, `verification.json` and `release.json`.
Out:  plain values, and text that is Markdown already.

How:  a sentence that depends on the data is a function here; those that do not are in the template.

Cost: none; a few kilobytes of text.
"""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

from builder.card.charts import Curves, marks
from builder.card.citation import citation
from builder.card.example import context_of, table_of
from builder.card.licences import licence_text
from builder.card.line import words_of
from builder.card.markdown import plain
from builder.card.provenance import corpus_name, provenance, teacher_name
from builder.card.recipe_text import recipe_toml
from builder.card.records import line_of
from builder.dataset import authorship
from builder.dataset.manifest import mean_topk_mass, records_of
from builder.dataset.printable import as_size, counted, one_line
from logit_dataset.schema import HEAD_FILE, Layout, columns


def variables(
    manifest: dict[str, Any],
    curves: Curves | None,
    verification: dict[str, Any] | None,
    release: dict[str, Any] | None,
) -> dict[str, Any]:
    """What the template shows."""
    recipe, teacher = manifest["recipe"], manifest["teacher"]
    totals, sequences = manifest["totals"], recipe["sequences"]
    layout = Layout.of(recipe, teacher)
    where = f"{release['repo']} --revision v{release['version']}" if release else "DIRECTORY"
    where = one_line(where).replace("`", "")
    return {
        "title": plain(recipe["name"]),
        "description": plain(recipe.get("description") or ""),
        "tokens": f"{totals['tokens']:,}",
        "corpus": corpus_name(manifest["corpus"]),
        "teacher": teacher_name(teacher),
        "kept": _what_is_kept(manifest, layout),
        "is_whole": layout.top_k == "all",
        "document": _documents(manifest).removesuffix("s"),
        "is_of_chats": bool(recipe["corpus"].get("messages_column")),
        "turns": sequences.get("learn") == "last",
        "rows": "C" if layout.completions_only else "T",
        "at_wide": "[kept]" if layout.completion_mask and not layout.completions_only else "",
        "layout": layout,
        "load_arguments": _load_arguments(release),
        "held_out": _held_out(manifest),
        "columns": columns(layout),
        "head": _head(manifest),
        "column_bytes": _column_bytes(manifest),
        "end_of_document": _end_of_document(manifest),
        "writing": authorship.sentences(manifest),
        "statistics": _statistics(manifest),
        "marks": [(k, f"{curves.mass[k - 1]:.1%}") for k in marks(len(curves.mass))]
        if curves
        else [],
        "mass_alt": "Probability inside the k most probable tokens, against k",
        "entropy_alt": "Distribution of the entropy of the teacher’s predictions",
        "provenance": provenance(manifest),
        "verification": _verification_text(verification, where) + _own_code_text(manifest, where),
        **_example(verification),
        "tail_mass": f"{1 - _topk_mass(manifest):.1%}",
        "max_length": f"{sequences['max_length']:,}",
        "chunked": ", and longer documents were cut off there"
        if sequences["long_documents"] == "truncate"
        else "",
        "dtype": plain(teacher["dtype"]),
        "recipe": recipe_toml(recipe, manifest),
        "reproduce_note": _reproduce_note(recipe),
        "fingerprint": plain(manifest["fingerprint"]),
        "licence": licence_text(manifest),
        "publisher": plain(release["repo"].split("/")[0]) if release else "",
        "citation": citation(manifest, release),
        "changelog": _changelog(release),
    }


def _head(manifest: dict[str, Any]) -> str:
    """What is said of the teacher's last layer, where it stands beside the data."""
    head = manifest.get("teacher_head")
    if not head:
        return ""
    logits = "hidden_states · weightᵀ" + (" + bias" if head["has_bias"] else "")
    if head["scale"] != 1:
        logits = f"{head['scale']!r} · ({logits})" if head["has_bias"] else f"{head['scale']!r} · {logits}"  # fmt: skip
    if head["softcap"] is not None:
        logits = f"{head['softcap']!r} · tanh({logits} / {head['softcap']!r})"
    return (
        f"`{HEAD_FILE}` ({head['bytes'] / 1e6:,.1f} MB, {plain(head['dtype'])}) is the last layer of the teacher, which makes the logits of the "
        f"whole vocabulary: logits = {logits}. It is a part of the teacher, under the teacher’s licence: **{plain(head['license'] or 'not stated')}**."
    )


def _column_bytes(manifest: dict[str, Any]) -> dict[str, str]:
    """What a token takes in each column; empty where that was not recorded."""
    records = records_of(manifest)
    if not all(record.column_bytes for record in records):
        return {}
    totals: Counter[str] = Counter()
    for record in records:
        totals.update(record.column_bytes or {})
    return {name: f"{size / manifest['totals']['tokens']:,.2f}" for name, size in totals.items()}


def _held_out(manifest: dict[str, Any]) -> str:
    """What the hold-out is; empty where there is none."""
    share = manifest["recipe"]["output"].get("validation")
    if not share:
        return ""
    return (
        f'`split="validation"` holds about {share:.3g} of the {_documents(manifest)}, and `train` the others: a hash of the id decides, so '
        "that all rows of one are in the same split."
    )


def _load_arguments(release: dict[str, Any] | None) -> str:
    if release is None:
        return '"path/to/this/directory"'
    repo, tag = (json.dumps(value) for value in (release["repo"], f"v{release['version']}"))
    return f"{repo}, revision={tag}"


def _end_of_document(manifest: dict[str, Any]) -> str:
    if manifest["teacher"]["eos_token_id"] is None:
        return "nothing (the tokenizer has no end-of-sequence token), and `target_logprob` is NaN there"
    return f"the end-of-sequence token (id {plain(manifest['teacher']['eos_token_id'])})"


def _what_is_kept(manifest: dict[str, Any], layout: Layout) -> str:
    """Of each distribution, in words."""
    if layout.completions_only:
        everything = replace(layout, completions_only=False)
        where = (
            "where the assistant speaks" if _documents(manifest) == "chats" else "in completions"
        )
        return f"{where}, {_what_is_kept(manifest, everything)}"
    if layout.top_k == "all":
        return (
            f"the log-probabilities of all {layout.vocab_size:,} tokens, and the partition function"
        )
    draws = (
        f", {counted(layout.tail_samples, 'token')} drawn from among these"
        if layout.tail_samples
        else ""
    )
    head = f"the {layout.top_k} most probable tokens with their true log-probabilities"
    if layout.top_k == 1:
        head = "the most probable token with its true log-probability"
    return f"{head}, the mass of all others{draws}, and the partition function"


def _statistics(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    totals, top_k = manifest["totals"], manifest["recipe"]["output"]["top_k"]
    perplexity = totals["teacher_perplexity"]
    share = [(f"probability inside the top {top_k}", f"{_topk_mass(manifest):.1%} on average")]
    if top_k == "all":
        share = []
    return [
        ("tokens", f"{totals['tokens']:,}"),
        *_completions(totals),
        ("rows", f"{totals['rows']:,}, from {totals['documents']:,} {_documents(manifest)}"),
        *_splits(manifest),
        (
            "size",
            f"{as_size(totals['bytes'])}, {float(totals['bytes_per_token'])} bytes per token",
        ),
        ("entropy", f"{totals['mean_entropy']:.3f} nats on average"),
        *share,
        (
            "perplexity of the teacher on these texts",
            f"{perplexity:,.3f}" if perplexity else "infinite",
        ),
    ]


def _splits(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """What is in each, where there are several."""
    what = _documents(manifest)
    rows = []
    for split, found in (manifest["totals"].get("splits") or {}).items():
        perplexity = found["teacher_perplexity"]
        rows.append(
            (
                f"in `{split}`",
                f"{found['tokens']:,} tokens in {found['rows']:,} rows, from {found['documents']:,} {what}; perplexity "
                f"{f'{perplexity:,.3f}' if perplexity else 'infinite'}",
            )
        )
    return rows


def _completions(totals: dict[str, Any]) -> list[tuple[str, str]]:
    count, written = totals.get("completion_tokens"), totals.get("completions")
    if count is None:
        return []
    rows = [("of completions", f"{counted(count, 'token')}, {count / totals['tokens']:.1%}")]
    if written:
        mean = count / written["completions"]
        rows.append(("completions", f"{written['completions']:,} of {mean:,.1f} tokens on average"))
    return rows


def _documents(manifest: dict[str, Any]) -> str:
    if "completions" in manifest["totals"]:
        return "prompts"
    return "chats" if manifest["recipe"]["corpus"].get("messages_column") else "documents"


def _topk_mass(manifest: dict[str, Any]) -> float:
    """Unrounded, so that its complement and the picture show the same digits."""
    return mean_topk_mass(records_of(manifest))


def _own_code_text(manifest: dict[str, Any], where: str) -> str:
    """What running the teacher takes, if it is its author's own code."""
    recipe = manifest["recipe"]["teacher"]
    if not recipe.get("python"):
        return ""
    code, beside = plain(recipe["python"]), [plain(name) for name in recipe.get("weights") or []]
    weights = f", and {', '.join(beside)} beside it" if beside else ""
    return (
        f" The teacher is code of its author’s ({code}), which is not in this dataset, and which reading the dataset does not need. To run "
        f"it again, get that file{weights}, with the hashes below, read it, for it is run, and name it: `logit-dataset verify {where} "
        f"--recompute 5 --teacher {code}`."
    )


def _verification_text(record: dict[str, Any] | None, where: str) -> str:
    if record is None:
        return (
            "Hashes, schema and the invariants of every row can be checked, and random rows can be run through the teacher "
            f"again, with `logit-dataset verify {where} --recompute 5`. No result of the latter was recorded for this version."
        )
    return (
        f"Hashes, schema and the invariants of every row were checked. On {plain(record['date'])}, {counted(record['rows'], 'random row')} "
        f"({counted(record['tokens'], 'token')}, seed {plain(record['seed'])}) {'was' if record['rows'] == 1 else 'were'} run through the teacher again, on "
        f"{plain(record['environment']['device'])}, and compared with a plain float64 log-softmax: log-probabilities differ by "
        f"{record['mean_abs_error']:.2g} nats on average and {record['max_abs_error']:.2g} at most{_yardstick(record)}, the teacher’s first choice "
        f"is the stored one at {record['top1_agreement']:.2%} of the positions, and the mean negative log-probability of the "
        f"texts is {record['nll_stored']:.4f} as stored and {record['nll_recomputed']:.4f} as recomputed. Do not take our word "
        f"for it: `logit-dataset verify {where} --recompute 5` takes other rows each time."
    )


def _yardstick(record: dict[str, Any]) -> str:
    """What the differences may be; older records say nothing of it."""
    limit, floor = record.get("limit") or {}, record.get("floor")
    if floor and limit.get("mean_abs_error") is not None:
        return (
            f" (noise of the teacher itself: {floor['mean_abs_error']:.2g} and {floor['max_abs_error']:.2g}; allowed: "
            f"{limit['mean_abs_error']:.2g} and {limit['max_beyond_rounding']:.2g})"
        )
    if floor or not limit or record.get("max_beyond_rounding") is None:
        return ""
    return (
        f" (beyond rounding to float16 {record['max_beyond_rounding']:.2g}, allowed "
        f"{limit['max_beyond_rounding']:.2g})"
    )


def _example(record: dict[str, Any] | None) -> dict[str, Any]:
    found = record.get("example") if record else None
    if not found:
        return {"example": []}
    entropy, line = f"{found['entropy']:.2f}", line_of(record)
    return {
        "example": table_of(found),
        "line_alt": words_of(line) if line else "",
        "example_context": context_of(found),
        "example_entropy": entropy,
    }


def _reproduce_note(recipe: dict[str, Any]) -> str:
    local = [
        recipe["teacher"].get(key) for key in ("path", "gguf", "python", "tokenizer", "config")
    ]
    local.append(recipe["sequences"].get("chat_template"))
    if recipe["corpus"]["files"] or any(local):
        return " beside the files that it names (their hashes are in the manifest)"
    return ""


def _changelog(release: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [
        {
            "title": plain(f"v{entry['version']} ({entry['date']})"),
            "lines": [plain(line) for line in entry["changes"]],
        }
        for entry in (release["changelog"] if release else [])
    ]
