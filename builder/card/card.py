"""The manifest → the dataset card: README.md with its pictures, and the YAML head by which `load_dataset` knows its types.

In:   a manifest; the data files, for the pictures; and, where they exist, `verification.json` and `release.json`.
Out:  the same bytes for the same input, whether `build` or `publish` asks.

Names, descriptions and file names come from outside: `plain` makes them text that does nothing, and what goes into YAML or
TOML is quoted by a library.
"""

import functools
import json
from collections import Counter
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

from builder.card.charts import Curves, entropy_svg, marks, mass_svg, measure
from builder.card.citation import citation
from builder.card.example import context_of, table_of
from builder.card.licences import licence_head, licence_text
from builder.card.line import line_svg, words_of
from builder.card.markdown import plain
from builder.card.recipe_text import recipe_toml
from builder.card.records import CURVES, REPO, read_curves, read_verification
from builder.dataset import authorship
from builder.dataset.manifest import data_digest, mean_topk_mass, records_of, write_json
from builder.dataset.printable import as_size, counted, one_line
from builder.dataset.shards import atomic_file
from builder.sources import demo
from logit_dataset.schema import HEAD_FILE, TRAIN, Layout, card_features, columns

README = "README.md"
MASS, ENTROPY, LINE = "assets/mass.svg", "assets/entropy.svg", "assets/line.svg"
PICTURES = (MASS, ENTROPY, LINE)
"""That a card can have; the last one only where a recomputed position was recorded."""
END_OF_HEAD = "---\n\n---\n"
"""Of a card whose head is empty."""


def card_files(
    directory: Path, manifest: dict[str, Any], *, release: dict[str, Any] | None = None
) -> dict[str, bytes]:
    """The card of a dataset and its pictures: name → content.

    Args:
        directory: holds the data files (or what `keep_curves` wrote) and, if random rows were recomputed,
            `verification.json`.
        manifest: of the dataset, which need not be written yet.
        release: what `publish` says of this version and those before; None for a dataset that is not published.
    """
    curves = read_curves(directory, manifest) or _curves(
        directory, tuple((r.file, r.sha256) for r in records_of(manifest))
    )
    verification = read_verification(directory, manifest)
    card = render_card(manifest, curves=curves, verification=verification, release=release)
    return {README: card.encode(), **pictures(curves, verification)}


def pictures(curves: Curves, verification: dict[str, Any] | None) -> dict[str, bytes]:
    """The pictures of a card: name → content."""
    drawn = {MASS: mass_svg(curves), ENTROPY: entropy_svg(curves)}
    if line := line_of(verification):
        drawn[LINE] = line_svg(line)
    return {name: svg.encode() for name, svg in drawn.items()}


def line_of(verification: dict[str, Any] | None) -> dict[str, Any] | None:
    """The text that one of the pictures shows; None where none was recorded, as by older versions."""
    found: dict[str, Any] | None = ((verification or {}).get("example") or {}).get("line")
    return found


@functools.lru_cache(maxsize=1)
def _curves(directory: Path, files_and_hashes: tuple[tuple[str, str], ...]) -> Curves:
    """Measured once, though a plan, its description and the upload all need the card."""
    return measure(directory / file for file, _ in files_and_hashes)


def keep_curves(directory: Path, manifest: dict[str, Any], curves: Curves) -> None:
    """Write down what the pictures show, for a directory whose data files are elsewhere."""
    write_json(directory / CURVES, {"data": data_digest(manifest), **asdict(curves)})


def write_card(
    directory: Path, manifest: dict[str, Any], *, release: dict[str, Any] | None = None
) -> None:
    """Write the card and its pictures into a dataset's directory, and leave none there that it no longer has."""
    files = card_files(directory, manifest, release=release)
    for name in PICTURES:
        if name not in files:
            (directory / name).unlink(missing_ok=True)
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        with atomic_file(directory / name) as sink:
            sink.write(content)


def render_card(
    manifest: dict[str, Any],
    *,
    curves: Curves | None = None,
    verification: dict[str, Any] | None = None,
    release: dict[str, Any] | None = None,
) -> str:
    """The text of README.md."""
    from huggingface_hub import DatasetCard, DatasetCardData

    card = DatasetCard.from_template(
        DatasetCardData(**card_head(manifest)),
        template_str=_template(),
        **_variables(manifest, curves, verification, release),
    )
    return str(card)


def render_body(
    manifest: dict[str, Any],
    *,
    curves: Curves | None = None,
    verification: dict[str, Any] | None = None,
    release: dict[str, Any] | None = None,
) -> str:
    """The text of README.md below its YAML head."""
    import jinja2

    variables = _variables(manifest, curves, verification, release)
    text: str = jinja2.Template(_template()).render(card_data="", **variables)
    return text.removeprefix(END_OF_HEAD)


def _template() -> str:
    return (resources.files("builder.card") / "template.md").read_text(encoding="utf-8")


def _variables(
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
        "corpus": _corpus_name(manifest["corpus"]),
        "teacher": _teacher_name(teacher),
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
        "provenance": _provenance(manifest),
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


def card_head(manifest: dict[str, Any]) -> dict[str, Any]:
    """The YAML head; what is None is not in it."""
    recipe, totals = manifest["recipe"], manifest["totals"]
    corpus, splits = manifest["corpus"], totals.get("splits") or {TRAIN: totals}
    language = recipe["corpus"].get("language") or (
        demo.CORPUS_LANGUAGE if recipe["corpus"].get("embedded") else ()
    )
    repo = corpus.get("repo")
    return {
        "pretty_name": one_line(recipe["name"]),
        **licence_head(manifest),
        "language": list(language) or None,
        "size_categories": [_size_category(totals["rows"])],
        "task_categories": ["text-generation"],
        "source_datasets": [repo] if repo and REPO.fullmatch(repo) else None,
        "tags": ["distillation", "knowledge-distillation", "logits", "logit-dataset"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": split, "path": f"data/{split}-*.parquet"} for split in splits
                ],
            }
        ],
        "dataset_info": {
            "config_name": "default",
            "features": card_features(Layout.of(recipe, manifest["teacher"])),
            "splits": [
                {"name": split, "num_bytes": of_split["bytes"], "num_examples": of_split["rows"]}
                for split, of_split in splits.items()
            ],
            "download_size": totals["bytes"],
            "dataset_size": totals["bytes"],
        },
    }


def _held_out(manifest: dict[str, Any]) -> str:
    """What the hold-out is; empty where there is none."""
    share = manifest["recipe"]["output"].get("validation")
    if not share:
        return ""
    return (
        f'`split="validation"` holds about {share:.3g} of the {_documents(manifest)}, and `train` the others: a hash of the id decides, so '
        "that all rows of one are in the same split."
    )


def _size_category(rows: int) -> str:
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    index = max(0, len(str(rows)) - 3)
    if index == 0:
        return "n<1K"
    return f"{bounds[index - 1]}<n<{bounds[index]}" if index < len(bounds) else "n>1T"


def _load_arguments(release: dict[str, Any] | None) -> str:
    if release is None:
        return '"path/to/this/directory"'
    repo, tag = (json.dumps(value) for value in (release["repo"], f"v{release['version']}"))
    return f"{repo}, revision={tag}"


def _end_of_document(manifest: dict[str, Any]) -> str:
    if manifest["teacher"]["eos_token_id"] is None:
        return "nothing (the tokenizer has no end-of-sequence token), and `target_logprob` is NaN there"
    return f"the end-of-sequence token (id {plain(manifest['teacher']['eos_token_id'])})"


def _corpus_name(corpus: dict[str, Any]) -> str:
    if repo := corpus.get("repo"):
        return _link(repo, f"datasets/{repo}")
    if name := corpus.get("name"):
        return plain(name)
    count = len(corpus["files"])
    return f"{count:,} local file{'s' if count > 1 else ''}"


def _teacher_name(teacher: dict[str, Any]) -> str:
    return _link(teacher["repo"], teacher["repo"]) if teacher.get("repo") else plain(teacher["name"])  # fmt: skip


def _link(text: str, path: str) -> str:
    if not REPO.fullmatch(path.removeprefix("datasets/")):
        return plain(text)
    return f"[{plain(text)}](https://huggingface.co/{path})"


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


def _provenance(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    teacher, corpus, recipe = manifest["teacher"], manifest["corpus"], manifest["recipe"]
    devices = ", ".join(sorted({plain(e["device"]) for e in manifest["environments"]}))
    options = [
        f"{name} {plain(recipe['corpus'][name])}"
        for name in ("config", "split")
        if corpus.get("repo") and recipe["corpus"].get(name)
    ]
    return [
        ("teacher", f"{_teacher_name(teacher)}, {_pin(teacher)}"),
        (
            "architecture",
            f"{plain(teacher['architecture'])}, {teacher['parameters']:,} parameters, run in {plain(teacher['dtype'])} "
            f"with {plain(teacher['attention'])} attention"
            + (f", logits in {plain(head)}" if (head := teacher.get("head_dtype")) else ""),
        ),
        *_own_weights(manifest),
        *_quantisation(teacher),
        (
            "vocabulary",
            f"{teacher['vocab_size']:,} logits; the tokenizer ({_tokenizer_source(teacher)}SHA-256 "
            f"`{plain(teacher['tokenizer_sha256'][:16])}`) has {teacher['tokenizer_vocab_size']:,} tokens",
        ),
        *_chat_template(manifest),
        ("corpus", ", ".join([_corpus_name(corpus), _pin(corpus), *options])),
        *_converted(manifest["totals"]),
        (
            "built on",
            f"{devices}, in {manifest['totals']['seconds']:,.0f} s at "
            f"{manifest['totals']['tokens_per_second']:,.0f} tokens/s",
        ),
    ]


def _own_weights(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """The files that a teacher of its author's own code is given."""
    names = manifest["recipe"]["teacher"].get("weights") or []
    digests = manifest["teacher"].get("weights_sha256") or []
    files = [
        f"{plain(name)}, SHA-256 `{plain(digest)}`"
        for name, digest in zip(names, digests, strict=False)
    ]
    return [("weights", "; ".join(files))] if files else []


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


def _quantisation(teacher: dict[str, Any]) -> list[tuple[str, str]]:
    """How the teacher's weights are packed, where they are."""
    found = teacher.get("quantisation")
    if not isinstance(found, dict):
        return []
    config = dict(found.get("config") or {})
    groups = [pair for group in config.pop("groups", []) for pair in group.items()]
    said = ", ".join(f"{name} {value}" for name, value in [*config.items(), *groups])
    how = "unpacked before they are used" if found["dequantised"] else "used as they are packed"
    stored = ", ".join(found["stored_as"]) or "plain numbers"
    text = f"{found['method']}{f' ({said})' if said else ''}: weights are stored as {stored}, {how}"
    return [("quantisation", plain(text))]


def _tokenizer_source(teacher: dict[str, Any]) -> str:
    """Which of a teacher's files made its token ids; older manifests do not say."""
    source = teacher.get("tokenizer_source")
    return f"{plain(source)}, " if source else ""


def _chat_template(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    digest = manifest["teacher"].get("chat_template_sha256")
    if digest is None:
        return []
    file = manifest["recipe"]["sequences"].get("chat_template")
    name = plain(file) if file else "the tokenizer’s own"
    return [("chat template", f"{name}, SHA-256 `{plain(digest)}`")]


def _converted(totals: dict[str, Any]) -> list[tuple[str, str]]:
    """What was converted in documents, or left out of them."""
    found = totals.get("converted") or {}
    if not found:
        return []
    return [
        ("converted", ", ".join(f"{plain(what)} (in {count:,})" for what, count in found.items()))
    ]


def _pin(source: dict[str, Any]) -> str:
    """The commit or hash of a teacher or corpus."""
    if source.get("commit"):
        return f"commit `{plain(source['commit'])}`"
    package = f"package {plain(source['package'])} {plain(source.get('version') or '')}, " if source.get("package") else ""  # fmt: skip
    digest = source.get("sha256") or source["files"][0]["sha256"]
    more = f" and {len(source['files']) - 1:,} more" if len(source.get("files", ())) > 1 else ""
    return f"{package}SHA-256 `{plain(digest)}`{more}"


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
