"""The manifest → the dataset card: README.md with its pictures, and the YAML head by which `load_dataset` knows its types.

In:   a manifest; the data files, for the pictures; and, where they exist, `verification.json` and `release.json`.
Out:  the same bytes for the same input, whether `build` or `publish` asks.

Names, descriptions and file names come from outside: `plain` makes them text that does nothing, and what goes into YAML or
TOML is quoted by a library.
"""

import functools
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from builder.card.charts import Curves, entropy_svg, mass_svg, measure
from builder.card.licences import licence_head
from builder.card.line import line_svg
from builder.card.records import CURVES, REPO, line_of, read_curves, read_verification
from builder.card.variables import variables
from builder.dataset.manifest import data_digest, records_of, write_json
from builder.dataset.printable import one_line
from builder.dataset.shards import atomic_file
from builder.sources import demo
from logit_dataset.schema import TRAIN, Layout, card_features

README = "README.md"
MASS, ENTROPY, LINE = "assets/mass.svg", "assets/entropy.svg", "assets/line.svg"
PICTURES = (MASS, ENTROPY, LINE)
"""That a card can have; the last one only where a recomputed position was recorded."""
END_OF_HEAD = "---\n\n---\n"
"""Of a card whose head is empty."""


def card_files(
    directory: Path, manifest: dict[str, Any], *, release: dict[str, Any] | None = None
) -> dict[str, bytes]:
    """Render the card of a dataset and its pictures: name → content.

    Args:
        directory: holds the data files (or the output of `keep_curves`) and, after a re-scoring pass, `verification.json`.
        manifest: of the dataset; it need not be written yet.
        release: what `publish` says of this version and earlier ones; None if the dataset is not published.
    """
    curves = read_curves(directory, manifest) or _curves(
        directory, tuple((r.file, r.sha256) for r in records_of(manifest))
    )
    verification = read_verification(directory, manifest)
    card = render_card(manifest, curves=curves, verification=verification, release=release)
    return {README: card.encode(), **pictures(curves, verification)}


def pictures(curves: Curves, verification: dict[str, Any] | None) -> dict[str, bytes]:
    """Draw the pictures of a card: name → content."""
    drawn = {MASS: mass_svg(curves), ENTROPY: entropy_svg(curves)}
    if line := line_of(verification):
        drawn[LINE] = line_svg(line)
    return {name: svg.encode() for name, svg in drawn.items()}


@functools.lru_cache(maxsize=1)
def _curves(directory: Path, files_and_hashes: tuple[tuple[str, str], ...]) -> Curves:
    """Measured once, though a plan, its description and the upload all need the card."""
    return measure(directory / file for file, _ in files_and_hashes)


def keep_curves(directory: Path, manifest: dict[str, Any], curves: Curves) -> None:
    """Store what the pictures show, for a directory whose data files are elsewhere."""
    write_json(directory / CURVES, {"data": data_digest(manifest), **asdict(curves)})


def write_card(
    directory: Path, manifest: dict[str, Any], *, release: dict[str, Any] | None = None
) -> None:
    """Write the card and its pictures into a dataset's directory, and delete pictures that the card no longer has."""
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
    """Render README.md."""
    from huggingface_hub import DatasetCard, DatasetCardData

    card = DatasetCard.from_template(
        DatasetCardData(**card_head(manifest)),
        template_str=_template(),
        **variables(manifest, curves, verification, release),
    )
    return str(card)


def render_body(
    manifest: dict[str, Any],
    *,
    curves: Curves | None = None,
    verification: dict[str, Any] | None = None,
    release: dict[str, Any] | None = None,
) -> str:
    """Render README.md below its YAML head."""
    import jinja2

    shown = variables(manifest, curves, verification, release)
    text: str = jinja2.Template(_template()).render(card_data="", **shown)
    return text.removeprefix(END_OF_HEAD)


def _template() -> str:
    return (resources.files("builder.card") / "template.md").read_text(encoding="utf-8")


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


def _size_category(rows: int) -> str:
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    index = max(0, len(str(rows)) - 3)
    if index == 0:
        return "n<1K"
    return f"{bounds[index - 1]}<n<{bounds[index]}" if index < len(bounds) else "n>1T"
