"""Results on splits → claims with their verdicts, a table, the Pareto picture and the tables of bytes, between two marks of a page."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.experiment.arms import arm_of
from examples.experiment.claims import Results, share_of_gap
from examples.experiment.plots import pareto
from examples.experiment.report import (
    DATA,
    beside,
    by_arm,
    by_seed,
    check_marks,
    spread,
    verdicts,
    write_between_marks,
)
from examples.experiment.splits.draws import Split
from examples.experiment.splits.frontier import CLAIMS
from examples.experiment.splits.sizes import DRAW_LOGPROB_BYTES, STATISTICS
from examples.experiment.train import read_json

PARTS = DATA | {
    f"{data}, larger": f"{words}, a student of 5.3 million parameters"
    for data, words in DATA.items()
}
"""Which runs stand in one table."""


def write_frontier(results: Path, page: Path) -> None:
    """Render what is there, however little.

    Raises:
        ValueError: the page has no marks, or there are no results.
    """
    check_marks(page)
    runs = [read_json(path) for path in sorted(results.glob("*-rate*.json"))]
    if not runs:
        raise ValueError(f"{results} has no results yet; run: make experiment SPLITS=1")
    found = by_arm(runs)
    plan = read_json(results / "plan.json")
    wanted = sum(
        len(arms) * len(seeds) for arms, _, seeds in (*plan["stages"], *plan.get("larger", ()))
    )
    at = beside(page, results)
    sizes = read_json(results / "bytes.json") if (results / "bytes.json").exists() else None
    parts = [_state(runs, wanted), verdicts(found, CLAIMS)]
    for data, words in PARTS.items():
        if any(of == data for _, of in found):
            parts.append(f"### With {words}\n\n{_table(found, data, sizes)}")
    if sizes:
        picture = pareto(
            _points(found, sizes),
            title="Bytes of a token's target against the share of the gap from text to all probabilities",
            x="bytes per token that the loss reads, in Parquet (zstd)",
            y="share of the gap closed",
        )
        (results / "pareto.svg").write_text(picture, encoding="utf-8")
        parts += [
            f"![Share of the gap closed against bytes per token]({at}/pareto.svg)",
            "(With a quarter of the data; a dot is a mean over the seeds of the table, small dots are seeds.)",
            _columns(sizes),
            _ways(sizes),
        ]
    write_between_marks(page, parts)


def _state(runs: Sequence[dict[str, Any]], wanted: int) -> str:
    minutes = sum(run["seconds"] for run in runs) / 60
    text = f"{len(runs)} of {wanted} runs, together {minutes:.0f} minutes of wall time, several side by side on a shared machine."
    if len(runs) < wanted:
        text += " **Not complete**: `make experiment SPLITS=1` goes on from here. Seeds that are not there yet are named in the tables."
    return text


def target_bytes(sizes: dict[str, Any], split: Split) -> float:
    """Bytes per token of the columns that the loss of a split reads."""
    columns = sizes["splits"][str(split)]
    return float(sum(size for name, size in columns.items() if name not in STATISTICS))


def _table(found: Results, data: str, sizes: dict[str, Any] | None) -> str:
    lines = [
        "| entries + draws | bytes per token | E‖p̂ − p‖² | test CE | share of gap | KL to teacher | ECE | rank correlation of entropies "
        "| Σ min(p, q) | best step | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted({arm for arm, of in found if of == data}, key=_order):
        arm, seeds = arm_of(name), found[name, data]
        size, error = "–", "0" if name == "whole" else "–"
        if arm.split and sizes:
            size = f"{target_bytes(sizes, arm.split):.1f}"
            plain = name == str(arm.split)
            error = f"{sizes['squared_error'][str(arm.split)]:.4f}" if plain else "–"
        best = [run["best"] for run in seeds.values()]
        cells = [
            arm.title,
            size,
            error,
            spread([run["ce"] for run in best]),
            spread(by_seed(found, name, data, share_of_gap), "{:.0%}"),
            spread([run["kl"] for run in best]),
            spread([run["ece"] for run in best], "{:.1%}"),
            spread([run["entropy_rank"] for run in best], "{:.2f}"),
            spread([run["acceptance"] for run in best]),
            spread([run["best_step"] for run in seeds.values()], "{:.0f}"),
            ", ".join(map(str, sorted(seeds))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _order(name: str) -> tuple[int, int, int, str]:
    """Text, all probabilities, then by entries and draws."""
    split = arm_of(name).split
    return (0, 0, 0, name) if split is None else (1, split.top_k, split.num_draws, name)


def _points(found: Results, sizes: dict[str, Any]) -> dict[str, tuple[float, list[float]]]:
    """Name → (bytes, shares by seed), of plain splits with a quarter of the data."""
    points = {}
    for name, data in found:
        split = arm_of(name).split
        shares = by_seed(found, name, "quarter", share_of_gap)
        if data == "quarter" and split and name == str(split) and shares:
            points[name] = (target_bytes(sizes, split), shares)
    return points


def _columns(sizes: dict[str, Any]) -> str:
    lines = [
        "### What a token takes on disk, by column",
        "",
        "| entries + draws | ids of entries | their log-probabilities | tail | ids of draws | the loss reads | text's ids and statistics |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, columns in sizes["splits"].items():
        cells = [
            f"{columns[column]:.1f}" if column in columns else "–"
            for column in ("topk_indices", "topk_logprobs", "tail_logprob", "tail_indices")
        ]
        split = Split(*map(int, name.split("+")))
        rest = sum(columns[column] for column in STATISTICS)
        cells += [f"{target_bytes(sizes, split):.1f}", f"{rest:.1f}"]
        lines.append(f"| {name.replace('+', ' + ')} | {' | '.join(cells)} |")
    lines += [
        "",
        f"(Without `tail_logprobs`, which no loss reads: {DRAW_LOGPROB_BYTES} bytes a draw more.)",
    ]
    return "\n".join(lines)


def _ways(sizes: dict[str, Any]) -> str:
    lines = [
        "### Ids in the encodings that stock readers know",
        "",
        "Bytes per token, and nanoseconds of one core per token to write and to read, by zstd level:",
        "",
    ]
    levels = sorted({way["level"] for way in sizes["ways"]})
    lines += [
        f"| ids | encoding | {' | '.join(f'level {level}' for level in levels)} |",
        "|---" * (len(levels) + 2) + "|",
    ]
    rows: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for way in sizes["ways"]:
        cell = f"{way['bytes']:.1f} ({way['write_ns']:,}, {way['read_ns']:,})"
        rows[way["ids"], way["encoding"]][way["level"]] = cell
    for (ids, encoding), cells in rows.items():
        lines.append(f"| {ids} | {encoding} | {' | '.join(cells[level] for level in levels)} |")
    return "\n".join(lines)
