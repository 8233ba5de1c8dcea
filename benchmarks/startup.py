"""What a command costs before it does work: `--help`, a fresh build, and a build that resumes after 90 % of the shards."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import sample

SHARDS = 10
RECIPE = """
name = "startup"
[corpus]
embedded = "python-docs"
max_documents = {shards}
[teacher]
embedded = "smollm2-135m-instruct"
[sequences]
max_length = 64
long_documents = "truncate"
[output]
shard_tokens = 1
"""


def measure(device: str) -> dict[str, float]:
    """Seconds of wall-clock time that are not spent in shards."""
    with tempfile.TemporaryDirectory() as scratch:
        base, output = Path(scratch), Path(scratch) / "out"
        (base / "recipe.toml").write_text(RECIPE.format(shards=SHARDS), encoding="utf-8")
        command = ["build", base / "recipe.toml", "--output", output, "--device", device]
        help_seconds = min(sample.seconds(lambda: _run("--help")) for _ in range(3))
        fresh = sample.seconds(lambda: _run(*command, "--max-shards", SHARDS - 1))
        first = sum(_shard_seconds(output / ".build" / "records"))
        resumed = sample.seconds(lambda: _run(*command))
        manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
        last = manifest["shards"][-1]["seconds"]
    return {
        "help": round(help_seconds, 2),
        "fresh build": round(fresh - first, 2),
        "resumed build": round(resumed - last, 2),
    }


def _shard_seconds(records: Path) -> list[float]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in records.glob("*.json")]
    return [record["seconds"] for record in found]


def _run(*arguments: object) -> None:
    command = [sys.executable, "-m", "builder.cli", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)
