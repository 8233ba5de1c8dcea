"""A manifest may come from anywhere: whatever stands in it, commands answer in one line that names file and key, or do their work."""

import copy
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.card.card import render_body, render_card
from builder.dataset.info import describe, summarize
from builder.dataset.manifest import read_manifest, records_of
from builder.verify.manifest import check_manifest

ESCAPES = "\x1b]0;owned\x07\x9b2J\u202e\n--- more"
WRONG = [None, True, -1, 2**70, 1.5, float("nan"), "", ESCAPES, [], [ESCAPES], {}, {"x": ESCAPES}]
GONE = object()


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of some JSON values, of lists the first one's."""
    items = values.items() if isinstance(values, dict) else enumerate(values[:1])
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def changed(manifest: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(manifest)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return result


def test_whatever_stands_anywhere_is_refused_by_name_or_does_no_harm(built, tmp_path):
    original = read_manifest(built)
    refused, accepted = 0, 0
    for path in places(original):
        for value in (*WRONG, GONE):
            manifest = changed(original, path, value)
            (tmp_path / "manifest.json").write_text(json.dumps(manifest))
            try:
                read = read_manifest(tmp_path)
            except ValueError as error:
                refused += 1
                message = str(error)
                assert "manifest.json" in message, message
                assert "\x1b" not in message, message
                assert len(message.splitlines()) == 1, message
                named = [str(key) for key in path if isinstance(key, str)]
                if value is not GONE or path[-1] not in ("schema_version", 0):
                    assert any(
                        key.replace("_", " ") in message.replace("_", " ") for key in named
                    ), (path, value, message)
                continue
            accepted += 1
            # What was accepted can be told, compared and shown.
            assert summarize(tmp_path)["shards"] == len(read["shards"])
            told = describe(tmp_path)
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", told), told
            assert "\n--- more" not in told
            for line in check_manifest(read, records_of(read)):
                assert "manifest.json" in line or line.startswith("data/")
            if value is ESCAPES or accepted % 10 == 0:
                body = render_body(read)
                assert "\x1b" not in body
            if value is ESCAPES:
                card = render_card(read)
                assert "\x1b" not in card
                assert card.split("---\n", 2)[2] == body
    assert refused > 500
    assert accepted > 100


@pytest.mark.parametrize("seed", range(60))
def test_commands_answer_in_one_line(cli, built, tmp_path, seed):
    """Through the door: nothing ends in a traceback, or in “not expected”."""
    generator = random.Random(seed)
    directory = tmp_path / "d"
    shutil.copytree(built, directory)
    manifest = read_manifest(directory)
    path = generator.choice(list(places(manifest)))
    manifest = changed(manifest, path, generator.choice([*WRONG, GONE]))
    (directory / "manifest.json").write_text(json.dumps(manifest))
    for command in (
        ["info"],
        ["info", "--format", "json"],
        ["info", "--row", "0"],
        ["verify"],
        ["card"],
    ):
        status, out, err = cli(*command, directory)
        assert status in (0, 1)
        assert "not expected" not in err
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out + err), (out, err)
        if status and not out:
            assert len(err.splitlines()) == 1, err


def test_json_of_escape_codes_is_the_same_values(cli, built, tmp_path):
    directory = Path(shutil.copytree(built, tmp_path / "d"))
    manifest = changed(read_manifest(directory), ("recipe", "name"), ESCAPES + "\U000e0041")
    (directory / "manifest.json").write_text(json.dumps(manifest))
    status, out, _ = cli("info", directory, "--format", "json")
    assert status == 0
    assert out.isprintable() or not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\U000e0041]", out)
    assert json.loads(out)["name"] == manifest["recipe"]["name"]


def test_a_manifest_that_is_too_large_is_not_read(built, tmp_path):
    path = tmp_path / "manifest.json"
    with path.open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(
        ValueError, match=r"is damaged \(it has 268,435,457 bytes, expected at most"
    ):
        read_manifest(tmp_path)
