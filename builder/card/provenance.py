"""A manifest → the rows of the card that say where a dataset comes from: teacher, corpus, hashes, hardware.

In:   a manifest.
Out:  pairs of Markdown, a label and what stands beside it; what a manifest of an older version does not say is left out.

Cost: none; a few lines of text.
"""

from typing import Any

from builder.card.markdown import plain
from builder.card.records import REPO
from builder.dataset.printable import counted


def provenance(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """What a dataset was made of, where, and how fast: labels, and what stands beside them."""
    teacher, corpus, recipe = manifest["teacher"], manifest["corpus"], manifest["recipe"]
    devices = ", ".join(sorted({plain(e["device"]) for e in manifest["environments"]}))
    options = [
        f"{name} {plain(recipe['corpus'][name])}"
        for name in ("config", "split")
        if corpus.get("repo") and recipe["corpus"].get(name)
    ]
    return [
        ("teacher", f"{teacher_name(teacher)}, {_pin(teacher)}"),
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
        ("corpus", ", ".join([corpus_name(corpus), _pin(corpus), *options])),
        *_converted(manifest["totals"]),
        (
            "built on",
            f"{devices}, in {manifest['totals']['seconds']:,.0f} s at "
            f"{manifest['totals']['tokens_per_second']:,.0f} tokens/s",
        ),
    ]


def corpus_name(corpus: dict[str, Any]) -> str:
    """A corpus by its name: on the Hub, as given, or as a number of files."""
    if repo := corpus.get("repo"):
        return _link(repo, f"datasets/{repo}")
    if name := corpus.get("name"):
        return plain(name)
    return counted(len(corpus["files"]), "local file")


def teacher_name(teacher: dict[str, Any]) -> str:
    """A teacher by its name, on the Hub or as given."""
    return _link(teacher["repo"], teacher["repo"]) if teacher.get("repo") else plain(teacher["name"])  # fmt: skip


def _link(text: str, path: str) -> str:
    if not REPO.fullmatch(path.removeprefix("datasets/")):
        return plain(text)
    return f"[{plain(text)}](https://huggingface.co/{path})"


def _own_weights(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """The files that a teacher of its author's own code is given."""
    names = manifest["recipe"]["teacher"].get("weights") or []
    digests = manifest["teacher"].get("weights_sha256") or []
    files = [
        f"{plain(name)}, SHA-256 `{plain(digest)}`"
        for name, digest in zip(names, digests, strict=False)
    ]
    return [("weights", "; ".join(files))] if files else []


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
