"""A directory of results → tables, verdicts, two plots and samples of text, between two marks of a page of Markdown.

A number is a mean over seeds ± the standard deviation among them; without ± it is of one seed.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from examples.experiment.arms import ARMS
from examples.experiment.claims import CLAIMS, Claim, Results, share_of_gap
from examples.experiment.measure import PLACES
from examples.experiment.plots import COLOURS, curves, dots
from examples.experiment.train import read_json

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
DATA = {"train": "all data", "quarter": "a quarter of the data"}


def write_report(results: Path, page: Path) -> None:
    """Render what is there, however little.

    Raises:
        ValueError: the page has no marks, or there are no results.
    """
    check_marks(page)
    if not (results / "plan.json").exists():
        raise ValueError(f"{results} has no results yet; run: make experiment")
    plan, dataset = (read_json(results / f"{name}.json") for name in ("plan", "dataset"))
    runs = [
        run
        for path in sorted(results.glob("*-rate*.json"))
        if (run := read_json(path))["settings"]["steps"] in (plan["steps"], plan["quarter_steps"])
    ]
    found = by_arm(run for run in runs if run["settings"]["rate"] == plan["rate"])
    _plots(found, results)
    at = beside(page, results)
    parts = [_state(found, runs, plan, dataset), verdicts(found, CLAIMS)]
    for data, words in DATA.items():
        if any(which == data for _, which in found):
            parts.append(f"### With {words}\n\n{_table(found, data, dataset)}")
    parts += [
        f"![Validation cross-entropy over steps]({at}/curves.svg)",
        f"![Test cross-entropy of every arm]({at}/arms.svg)",
        _places(found),
        _costs(dataset),
        _rates(runs, plan["rate"]),
        _written(found),
    ]
    write_between_marks(page, parts)


def check_marks(page: Path) -> None:
    """See that a page has a place for results.

    Raises:
        ValueError: it has none.
    """
    content = page.read_text(encoding="utf-8")
    if BEGIN not in content or END not in content:
        raise ValueError(f"{page} has no lines {BEGIN} and {END}; add them where the results go")


def write_between_marks(page: Path, parts: Iterable[str]) -> None:
    """Put paragraphs where the last results were; empty ones are left out."""
    content = page.read_text(encoding="utf-8")
    body = "\n\n".join(filter(None, parts))
    before, after = content.split(BEGIN)[0], content.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}", encoding="utf-8")


def beside(page: Path, results: Path) -> str:
    """The directory of results, as links of a page name it."""
    return Path(os.path.relpath(results.resolve(), page.resolve().parent)).as_posix()


def by_arm(runs: Iterable[dict[str, Any]]) -> Results:
    """The runs by their arms, data and seeds; data of another student than the small one name it, too."""
    found: dict[tuple[str, str], dict[int, Any]] = defaultdict(dict)
    for run in runs:
        settings = run["settings"]
        student = settings.get("student", "small")  # files of before there were two have none
        data = settings["data"] if student == "small" else f"{settings['data']}, {student}"
        found[settings["arm"], data][settings["seed"]] = run
    return found


def _state(
    found: Results, runs: Sequence[dict[str, Any]], plan: dict[str, Any], dataset: dict[str, Any]
) -> str:
    wanted = sum(
        2 * (plan["seeds"] if arm.has_seeds else 1) for arm in ARMS.values()
    )  # two amounts of data
    done = sum(len(seeds) for seeds in found.values())
    tokens, python = dataset["tokens"], dataset["environment"]["python"]
    minutes = sum(run["seconds"] for run in runs) / 60
    lines = [
        f"{done} of {wanted} runs, {runs[0]['parameters']:,} parameters, {plan['steps']:,} steps with all data and {plan['quarter_steps']:,} with a quarter, of up to "
        f"{plan['batch_size'] * plan['length']:,} tokens at rate {plan['rate']:g}, {minutes:.0f} minutes of one core; "
        f"{tokens['train']:,} tokens to learn from, {tokens['quarter']:,} in the quarter, {tokens['validation']:,} to choose by, "
        f"{tokens['test']:,} to test on; of those to learn from, {dataset['text_outside_vocabulary']:.1%} are `other`; Python {python}."
    ]
    if done < wanted:
        lines.append("**Not complete**: these are the seeds so far.")
    return " ".join(lines)


def verdicts(found: Results, claims: Mapping[str, Claim]) -> str:
    """A row a claim."""
    lines = ["| | claim | number, by seed | must be above | |", "|---|---|---|---|---|"]
    for name, claim in claims.items():
        values = " ".join(spread([value]) for value in claim.values(found)) or "–"
        lines.append(
            f"| {name} | {claim.text} | {claim.number}: {values} | {claim.bound:g} | {claim.verdict(found)} |"
        )
    return "\n".join(lines)


def _table(found: Results, data: str, dataset: dict[str, Any]) -> str:
    lines = [
        "| arm | test CE, best | last | share of gap | KL to teacher | ECE | entropy − teacher's | its rank correlation "
        "| best step | steps to text's best | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for number, (name, arm) in enumerate(ARMS.items(), 1):
        seeds = found.get((name, data), {})
        if not seeds:
            continue

        def best(metric: str, seeds: Any = seeds) -> list[float]:
            return [run["best"][metric] for run in seeds.values()]

        cells = [
            f"{number} {arm.title}",
            spread(best("ce")),
            spread([run["last"]["ce"] for run in seeds.values()]),
            spread(by_seed(found, name, data, share_of_gap), "{:.0%}"),
            spread(best("kl")),
            spread(best("ece"), "{:.1%}"),
            spread(best("entropy_gap"), "{:+.2f}"),
            spread(best("entropy_rank"), "{:.2f}"),
            spread([run["best_step"] for run in seeds.values()], "{:.0f}"),
            _reached(by_seed(found, name, data, _steps_to_text)),
            str(len(seeds)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    teacher = dataset["teacher_on_test"]
    lines.append(
        f"| the teacher itself | {teacher['ce']:.3f} | | | 0 | {teacher['ece']:.1%} | 0 | 1 | | | |"
    )
    return "\n".join(lines)


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Mean ± standard deviation, if every value is a number."""
    if not values or any(map(isnan, values)):
        return "–"
    deviation = f" ± {form.replace('+', '').format(stdev(values))}" if len(values) > 1 else ""
    return form.format(mean(values)) + deviation


def by_seed(
    found: Results, arm: str, data: str, value: Callable[[Any, str, str], Any]
) -> list[Any]:
    """A number of each seed for which text and the whole distribution were run, too."""
    sets = [set(found.get((name, data), {})) for name in ("text", arm, "whole")]
    return [
        value(lambda a, d, seed=seed: found[a, d][seed], arm, data)
        for seed in sorted(set.intersection(*sets))
    ]


def _steps_to_text(get: Any, arm: str, data: str) -> int | None:
    goal = min(point["ce"] for point in get("text", data)["curve"])
    return next((p["step"] for p in get(arm, data)["curve"] if p["ce"] <= goal), None)


def _reached(steps: Sequence[int | None]) -> str:
    reached = [step for step in steps if step is not None]
    if len(reached) < len(steps):
        return f"never in {len(steps) - len(reached)} of {len(steps)}"
    return spread(reached, "{:.0f}")


def _places(found: Results) -> str:
    """Where an arm gains and loses, of the seeds in which it was measured."""
    lines = [
        "### Where the cross-entropy comes from (test documents, all data, at the best point)",
        "",
        "| arm | CE of tokens in the top K | in the tail | `other` | mass on the tail − the teacher's | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for number, (name, arm) in enumerate(ARMS.items(), 1):
        runs = [run["best"] for run in found.get((name, "train"), {}).values()]
        runs = [run for run in runs if all(f"ce_{where}" in run for where in PLACES)]
        if runs:
            cells = [spread([run[f"ce_{where}"] for run in runs]) for where in PLACES]
            cells.append(spread([run["tail_mass_gap"] for run in runs], "{:+.1%}"))
            lines.append(f"| {number} {arm.title} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines) if len(lines) > 4 else ""


def _costs(dataset: dict[str, Any]) -> str:
    lines = [
        "### What a target costs",
        "",
        "| arm | bytes per token, raw | in Parquet | what has to be run |",
        "|---|---|---|---|",
    ]
    api = dataset["api"]
    for number, (name, arm) in enumerate(ARMS.items(), 1):
        stored = dataset["stored_bytes"][name]
        runs = {
            "text": "nothing",
            "samples": f"open weights: the teacher once over each token; an API: {api['calls']:,} calls with "
            f"{api['prompt_tokens']:,} prompt tokens and {api['sampled_tokens']:,} sampled ones",
        }.get(name, "the teacher once over each token")
        size = f"{stored:.1f}" if stored else "–"
        lines.append(f"| {number} {arm.title} | {arm.raw_bytes:,} | {size} | {runs} |")
    lines += [
        "",
        "(For the training documents in chunks of 256 tokens; a prompt of t tokens for the token after it.)",
    ]
    return "\n".join(lines)


def _rates(runs: Sequence[dict[str, Any]], chosen: float) -> str:
    """Best validation cross-entropy of arms that were run at other rates than the chosen one, too."""
    by_arm: dict[str, dict[float, float]] = defaultdict(dict)
    for run in runs:
        settings = run["settings"]
        if settings["data"] == "train" and settings["seed"] == 0:
            by_arm[settings["arm"]][settings["rate"]] = min(p["ce"] for p in run["curve"])
    rates = sorted({rate for found in by_arm.values() for rate in found})
    if len(rates) < 2:
        return ""
    lines = [
        "### Other learning rates (seed 0, all data, best validation CE)",
        "",
        f"| arm | {' | '.join(f'{rate:g}' for rate in rates)} |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for name, found in by_arm.items():
        if set(found) != {chosen}:
            cells = [f"{found[rate]:.3f}" if rate in found else "–" for rate in rates]
            lines.append(f"| {ARMS[name].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _written(found: Results) -> str:
    """What they wrote stands in blocks of code: nothing in it is a mark of Markdown."""
    parts = ["### What the students write (seed 0, all data, at their best point)"]
    for name in ("text", "tail_draws", "whole"):
        if 0 in (seeds := found.get((name, "train"), {})):
            texts = seeds[0]["written"].items()
            lines = [f"{prompt} … {' '.join(text.split())}" for prompt, text in texts]
            parts += [f"{ARMS[name].title}:", "\n".join(["```", *lines, "```"])]
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _plots(found: Results, results: Path) -> None:
    lines = {}
    for colour, (name, arm) in zip(COLOURS, ARMS.items(), strict=True):
        if seeds := found.get((name, "train")):
            points = zip(*(run["curve"] for run in seeds.values()), strict=True)
            mean_points = [(at[0]["step"], mean(point["ce"] for point in at)) for at in points]
            lines[arm.title] = (colour, mean_points)
    plot = curves(
        lines,
        title="Held-out cross-entropy over steps",
        x="steps",
        y="validation cross-entropy, nats",
    )
    (results / "curves.svg").write_text(plot, encoding="utf-8")
    rows = {
        arm.title: {
            words: [run["best"]["ce"] for run in found.get((name, data), {}).values()]
            for data, words in DATA.items()
        }
        for name, arm in ARMS.items()
    }
    colours = dict(zip(DATA.values(), ("#4e79a7", "#f28e2b"), strict=True))
    plot = dots(
        rows,
        colours,
        title="Test cross-entropy of every arm",
        x="test cross-entropy at the best point, nats",
    )
    (results / "arms.svg").write_text(plot, encoding="utf-8")
