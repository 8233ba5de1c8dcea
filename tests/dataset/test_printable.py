"""What commands print steers no terminal, wherever it comes from."""

import json
import re
import shutil
from pathlib import Path

import pytest

from builder.dataset.printable import json_lines, lines, one_line
from tests.conftest import REPOSITORY
from tests.verify.forging import Row, forge, refit

HARM = ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\x7f", "\r", "\n", "\u202e", "\u2066", "\u2028", "\ud800", "\U000e0041", "\u00ad", "\ufeff", "\x85"]  # fmt: skip
STEERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u00ad\u202e\u2066\u2028\ud800\ufeff\U000e0041]")


@pytest.mark.parametrize("harm", HARM, ids=repr)
def test_what_steers_is_written_as_an_escape(harm):
    shown = one_line(f"a{harm}b")
    assert not STEERS.search(shown)
    assert shown.startswith("a\\")
    assert shown.endswith("b")
    assert harm == "\n" or not STEERS.search(lines(f"a{harm}b").replace("\n", ""))
    quoted = json.dumps({"x": harm}, ensure_ascii=False, indent=1)
    assert not STEERS.search(json_lines(quoted).replace("\n", ""))
    assert json.loads(json_lines(quoted)) == {"x": harm}


@pytest.mark.parametrize(
    "text", ["naïve café – “x”…", "東京 Москва שלום عالم", "👩‍👩‍👧‍👦🙂", "می‌خواهم", "a\\x1b"]
)
def test_what_does_not_steer_is_shown_as_it_is(text):
    assert one_line(text) == lines(text) == json_lines(text) == text


def test_long_texts_are_cut():
    assert one_line("abcdef", limit=4) == "abc…"
    assert one_line("abcd", limit=4) == "abcd"


def test_commands_print_by_the_functions_that_see_to_it():
    for path in (REPOSITORY / "builder" / "cli").glob("*.py"):
        if path.name not in ("terminal.py", "main.py"):
            assert not re.search(r"\b(print|echo)\(", path.read_text()), path


def test_ids_and_names_in_problems_do_nothing(cli, built, tmp_path):
    copy = Path(shutil.copytree(built, tmp_path / "copy"))

    def change(rows: list[Row]) -> None:
        for row in rows:
            row["id"] = f"\x1b[2J{row['id']}\u202e"
            row["chunk_index"] += 1

    forge(copy, change)
    refit(copy, lambda m: m["recipe"].update(name="\x1b[2J\n0 problems"))
    status, out, err = cli("verify", copy)
    assert status == 1
    assert "does not follow chunk" in out
    assert not STEERS.search((out + err).replace("\n", ""))
    assert "\n0 problems" not in out
    status, out, err = cli("info", copy)
    assert status == 0
    assert out.splitlines()[0].startswith("dataset    \\x1b[2J\\x0a0 problems  (schema")
