"""`make bench`: measure, print tables, and write the numbers to a JSON file.

Example: python -m benchmarks --tokens 8000 --rounds 3 --only capture reading
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import sample

SECTIONS = (
    *("capture", "options", "generation", "storage", "reading", "trainers", "students"),
    *("scaling", "memory", "startup", "host", "shapes"),
)
BARS = {
    "build_over_forward": {"float32": 0.96, "bfloat16": 0.93},
    "build_over_naive": {"float32": 1.3, "bfloat16": 1.8},
}
DATASET_TOKENS = 20_000
"""Of the dataset whose storage and reading are measured."""


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--tokens", type=int, default=12_000, help="of a build, in each round")
    parser.add_argument("--prompts", type=int, default=64, help="to be completed, in each round")
    parser.add_argument("--rounds", type=int, default=5, help="after one that does not count")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--output", type=Path, default=Path("out/bench.json"))
    options = parser.parse_args()

    from builder.console.terminal import quiet_libraries

    quiet_libraries()
    results: dict[str, Any] = {"machine": sample.machine(options.device)}
    print(" · ".join(f"{name} {value}" for name, value in results["machine"].items()))
    started = time.perf_counter()
    if "shapes" in options.only:
        results["shapes"] = _shapes(options)
    if "capture" in options.only:
        results["capture"] = _capture(options)
    if "options" in options.only:
        results["options"] = _options(options)
    if "generation" in options.only:
        results["generation"] = _generation(options)
    if {"storage", "reading", "trainers", "students"} & set(options.only):
        results |= _stored(options)
    if "scaling" in options.only:
        results |= _scaling(options)
    if "memory" in options.only:
        from benchmarks import memory

        results["memory"] = memory.measure()
        _table(
            "peak memory above the weights", {k: f"{v} MB" for k, v in results["memory"].items()}
        )
    if "startup" in options.only:
        from benchmarks import startup

        results["startup"] = startup.measure(options.device)
        _table("seconds before work", results["startup"])
    if "host" in options.only:
        results["host"] = _host(options)
    sample.write_json(options.output, results)
    print(f"\n{time.perf_counter() - started:,.0f} s; all numbers are in {options.output}")


def _shapes(options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import shapes

    found = shapes.measure(options.device, options.rounds)
    copy = found["copy_gigabytes_per_second"]
    for size, ways in found["capture"].items():
        _table(
            f"capture of random logits, {size} (a copy: {copy:,} GB/s)",
            {
                name: f"{way['microseconds_a_row']} µs a row, {way['gigabytes_per_second']:,} GB/s"
                for name, way in ways.items()
            },
        )
    for name, rates in found["tokens_per_second"].items():
        _table(f"random weights, {name}, tokens/s", {key: f"{v:,}" for key, v in rates.items()})
    return found


def _capture(options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import capture

    results = {}
    for dtype in ("float32", "bfloat16"):
        found = capture.measure(
            dtype, device=options.device, tokens=options.tokens, rounds=options.rounds
        )
        results[dtype] = found
        rows: dict[str, object] = {}
        for name in ("forward", "build", "naive"):
            rows[f"{name}, tokens/s"] = f"{found[f'{name}_tokens_per_second']:,}"
        for name, bars in BARS.items():
            rows[name.replace("_over_", " ÷ ")] = f"{found[name]} (bar {bars[dtype]})"
        rows["forward ÷ matrix product, by plan's FLOP"] = f"{found['forward_over_product']:.0%}"
        for stage, share in found["stages"].items():
            rows[f"share of {stage}"] = f"{share:.1%}"
        _table(f"capture, {dtype}", rows)
    return results


def _options(options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import options as section

    found = section.measure(
        "bfloat16", device=options.device, tokens=options.tokens // 2, rounds=options.rounds
    )
    rows: dict[str, object] = {"plain": " · ".join(f"{k} {v:,}" for k, v in found["plain"].items())}
    for name in section.OPTIONS:
        rows[name] = " · ".join(f"{key} {value:,}" for key, value in found[name].items())
    _table("options, bfloat16", rows)
    return found


def _generation(options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import generation

    results = {}
    for dtype in ("float32", "bfloat16"):
        found = generation.measure(
            dtype, device=options.device, prompts=options.prompts, rounds=options.rounds
        )
        results[dtype] = found
        rows: dict[str, object] = {
            f"{name}, written tokens/s": v for name, v in found["tokens_per_second"].items()
        }
        for how in ("drawn", "greedy"):
            rows[f"build ÷ generate, {how}"] = found[f"build_over_generate_{how}"]
        _table(f"generation, {dtype}", rows)
    return results


def _scaling(options: argparse.Namespace) -> dict[str, Any]:
    from importlib.util import find_spec

    if find_spec("ray") is None:
        _say("scaling is left out, for Ray is not installed")
        return {}
    from benchmarks import scaling

    found = scaling.measure(options.tokens, options.rounds)
    rows: dict[str, object] = {
        "one worker, tokens/s": f"{found['one_tokens_per_second']:,}",
        "two workers, tokens/s": f"{found['two_tokens_per_second']:,}",
        "two ÷ twice one": f"{found['efficiency']} (bar 0.9)",
    }
    _table("workers of one thread, float32", rows)
    return {"scaling": found}


def _stored(options: argparse.Namespace) -> dict[str, Any]:
    from builder.build.build import build

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        _say("building a dataset to store and read …")
        recipe = sample.recipe("bfloat16", DATASET_TOKENS)
        build(recipe, base, base / "dataset", device=options.device)
        if "storage" in options.only:
            from benchmarks import storage

            results["storage"] = storage.measure(base / "dataset", base)
            for way, sizes in results["storage"].items():
                _table(f"bytes per token, {way}", sizes)
        if "reading" in options.only:
            from benchmarks import reading

            results["reading"] = reading.measure(base / "dataset", rounds=options.rounds)
            rates, cpu = (results["reading"][n] for n in ("tokens_per_second", "cpu_microseconds"))
            rows: dict[str, object] = {
                f"{name}, tokens/s": f"{rate:,}, CPU {cpu[name]} µs a token"
                for name, rate in rates.items()
            }
            for name, bar in (("batches", 0.9), ("shuffled", 0.8)):
                rows[f"{name} ÷ decode"] = (
                    f"{results['reading'][f'{name}_over_decode']} (bar {bar}), by CPU time "
                    f"{results['reading'][f'decode_over_{name}_cpu']}"
                )
            rows["shuffled ÷ lists"] = f"{results['reading']['shuffled_over_lists']} (bar 10)"
            _table("reading", rows)
        if "trainers" in options.only:
            from benchmarks import trainers

            results["trainers"] = trainers.measure(base / "dataset", rounds=options.rounds)
            bars = {"collator, one worker": 150_000}
            _table(
                "for other trainers",
                {
                    name: f"{v['tokens_per_second']:,} tokens/s (bar {bars.get(name, 300_000):,}), CPU {v['cpu_microseconds']} µs a token"
                    for name, v in results["trainers"].items()
                },
            )
        if "students" in options.only:
            from benchmarks import students

            results["students"] = {
                "losses": students.losses(),
                "waiting": students.waiting(base / "dataset"),
            }
            _table(
                "loss and gradients of 2,048 positions, V 49k",
                {
                    k: f"{v['megabytes']} MB, {v['seconds']} s"
                    for k, v in results["students"]["losses"].items()
                },
            )
            waits = results["students"]["waiting"]
            _table(
                "a student of 1M parameters",
                {
                    "milliseconds a step": waits["milliseconds_a_step"],
                    "share waiting for data": f"{waits['share_waiting']:.2%} (bar 2%)",
                },
            )
    return results


def _host(options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import host

    found = host.measure(rounds=options.rounds)
    for name in ("with draws", "without draws"):
        _table(f"host, {name}: tokens/s, and CPU microseconds a token by stage", found[name])
    return found


def _table(title: str, rows: dict[str, Any]) -> None:
    width = max(map(len, rows))
    print(f"\n{title}")
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")
    sys.stdout.flush()


def _say(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    main()
