"""Progress in the log of a batch job: a line when a stage has begun, then one a minute, with what it does and how long it still takes."""

import re
import subprocess
import sys
import time
from typing import Any

import pytest

from builder.console import progress as module
from builder.console.progress import progress
from builder.dataset.printable import duration
from tests.conftest import run_cli


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "START_SECONDS", 0.05)
    monkeypatch.setattr(module, "LOG_SECONDS", 0.05)


def wait_for(capsys: Any, pattern: str) -> str:
    seen = ""
    for _ in range(400):
        seen += capsys.readouterr().err
        if re.search(pattern, seen, flags=re.MULTILINE):
            return seen
        time.sleep(0.02)
    raise AssertionError(seen)


def test_a_log_has_a_line_while_nothing_happens_and_says_what_is_done(fast, capsys):
    with progress("build", 1000) as shown:
        shown.tell("loading the teacher")
        wait_for(capsys, r"^build: no tokens yet, after 0 s, loading the teacher$")
        shown.tell("")
        shown.start_from(500)
        shown.update(100)
        time.sleep(0.01)
        shown.update(150)
        wait_for(capsys, r"^build: 750 tokens of 1,000 \(75%\), [\d,]+ tokens/s, \d+ s left, after 0 s$")  # fmt: skip
        shown.update(250)
    assert capsys.readouterr().err.endswith("build: 1,000 tokens of 1,000 (100%), after 0 s\n")


def test_a_total_that_is_passed_is_not_shown(fast, capsys):
    with progress("build", 10) as shown:
        shown.update(14)
        wait_for(capsys, r"^build: 14 tokens, [\d,]+ tokens/s, after 0 s$")


def test_without_a_total_there_is_a_rate_and_no_time_left(fast, capsys):
    with progress("verify", None) as shown:
        shown.update(1)
        assert "left" not in wait_for(capsys, r"^verify: 1 token, [\d,]+ tokens/s, after 0 s$")


def test_what_is_short_and_what_is_quiet_writes_nothing(fast, capsys, monkeypatch):
    with progress("verify", 10, is_quiet=True) as shown:
        time.sleep(0.2)
        shown.update(10)
    monkeypatch.setattr(module, "START_SECONDS", 60)
    with progress("verify", 10) as shown:
        shown.update(10)
    assert capsys.readouterr().err == ""


def test_a_stage_that_fails_does_not_say_that_it_ended(fast, capsys):
    def fail() -> None:
        with progress("build", 10):
            wait_for(capsys, "^build: no tokens yet")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert "of 10 (100%)" not in capsys.readouterr().err


def test_a_piped_build_says_how_far_it_is(make_recipe, tmp_path):
    recipe = make_recipe()
    code = (
        "import sys, time\n"
        "from builder.cli import main\nfrom builder.console import progress\n"
        "from builder.build import worker\n"
        "progress.START_SECONDS = progress.LOG_SECONDS = 0.02\n"
        "load = worker.open_teacher\n"
        "worker.open_teacher = lambda *a, **k: (time.sleep(0.3), load(*a, **k))[1]\n"
        f"sys.argv = ['logit-dataset', 'build', {str(recipe)!r}, '-o', {str(tmp_path / 'out')!r}]\n"
        "main.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_loud())  # fmt: skip
    assert re.search(r"^build: no tokens yet, after \d+ s, loading the teacher$", done.stderr, flags=re.MULTILINE)  # fmt: skip
    assert re.search(r"^build: [\d,]+ tokens, after \d+ s$", done.stderr, flags=re.MULTILINE)
    quiet = run_cli("verify", tmp_path / "out", "--quiet")
    assert (quiet.returncode, quiet.stderr) == (0, "")


def _loud() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "LOGIT_DATASET_QUIET"}


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(3.4, "3 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (200_000, "2.3 days")],
)  # fmt: skip
def test_durations_are_for_people(seconds, shown):
    assert duration(seconds) == shown


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert run_cli("--version").stdout == f"logit-dataset {version('logit-dataset')}\n"
