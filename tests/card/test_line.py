"""The card's line of text: the tokens and surprises of the file, whatever the text is; and none of a dataset without texts."""

import json
import random
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from builder.build.build import build
from builder.card.card import write_card
from builder.card.colours import LIGHT, SURPRISE_BOUNDS
from builder.card.line import CELL, LEFT, line_svg, words_of
from builder.dataset.manifest import read_manifest
from builder.dataset.spelling import pieces, signs
from builder.hub.release import local_files
from builder.recipe.file import load_recipe
from builder.verify.card import _check_drawing
from builder.verify.verify import record_recomputation, verify
from tests.card.test_card import HOSTILE, MARKDOWN

SVG = "{http://www.w3.org/2000/svg}"


def recorded(dataset: Path, directory: Path, teacher: Path, seed: int = 11) -> Path:
    """A copy with a recorded recomputation."""
    copied = Path(shutil.copytree(dataset, directory))
    record_recomputation(copied, verify(copied, recompute=4, seed=seed, teacher_path=teacher), "cpu")  # fmt: skip
    return copied


def drawn(svg: str) -> tuple[list[tuple[str, str]], list[tuple[float, float, float]]]:
    """Texts of the lines with their grounds, and x, width and bottom of everything."""
    root = ElementTree.fromstring(svg)
    ground, found, boxes = "none", [], []
    for element in root:
        if element.tag == f"{SVG}rect":
            x, y, width, height = (float(element.get(k, 0)) for k in ("x", "y", "width", "height"))
            ground = element.get("fill", "")
            boxes.append((x, width, y + height))
        elif element.get("textLength"):
            found.append((element.text or "", ground))
            boxes.append((float(element.get("x")), float(element.get("textLength")), float(element.get("y"))))  # fmt: skip
            ground = "none"
    return found, boxes


def line_of(*tokens: str, followed: int = 0, is_cut: bool = False) -> dict:
    return {
        "tokens": list(tokens),
        "surprises": [None, *(0.7 * i for i in range(len(tokens) - 1))],
        "followed": followed,
        "is_cut": is_cut,
    }


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_the_picture_shows_the_tokens_and_surprises_of_the_file(
    built, tiny_teacher_dir, tiny_tokenizer, tmp_path, seed
):
    copied = recorded(built, tmp_path / "copy", tiny_teacher_dir, seed)
    example = json.loads((copied / "verification.json").read_text())["example"]
    line, found = example["line"], 0
    for path in sorted((copied / "data").iterdir()):
        for row in pq.read_table(path).to_pylist():
            texts = [*pieces(tiny_tokenizer, row["input_ids"]), line["tokens"][-1]]  # what follows
            nats = [None, *(round(-float(v), 3) for v in row["target_logprob"])]
            for start in range(len(texts)):
                stop = start + len(line["tokens"])
                if texts[start:stop] == line["tokens"] and nats[start:stop] == line["surprises"]:
                    t = start + line["followed"] - 1
                    assert round(row["entropy"][t], 3) == example["entropy"]
                    assert np.exp(row["target_logprob"][t]) == pytest.approx(example["following_probability"], abs=1e-4)  # fmt: skip
                    assert line["is_cut"] == (start > 0)
                    found += 1
    assert found >= 1  # texts of the fixture repeat
    svg = (copied / "assets" / "line.svg").read_text()
    assert svg == line_svg(line)
    seen, _ = drawn(svg)
    colours = {
        text: LIGHT[sum((nats or 0) > bound for bound in SURPRISE_BOUNDS)].ground
        for text, nats in zip(line["tokens"], line["surprises"], strict=True)
        if line["tokens"].count(text) == 1 and text.isalpha()
    }
    assert len(colours) >= 3
    for text, colour in colours.items():
        assert (text, {"transparent": "none"}.get(colour, colour)) in seen or (
            text,
            "white",
        ) in seen
    assert svg.count('stroke-width="2"') == 1
    card = (copied / "README.md").read_text()
    assert f"![{words_of(line)}](assets/line.svg)" in card
    assert verify(copied).notices == []


def test_an_altered_or_missing_picture_is_said(built, tiny_teacher_dir, tmp_path):
    copied = recorded(built, tmp_path / "copy", tiny_teacher_dir)
    picture = copied / "assets" / "line.svg"
    good = picture.read_text()
    picture.write_text(good.replace("</svg>", "<script>alert(1)</script></svg>"))
    assert any("line.svg: holds <script>" in line for line in verify(copied).problems)
    picture.write_text(good.replace("</svg>", "<text>x</text></svg>"))
    assert any(line.startswith("assets/line.svg: is not the picture") for line in verify(copied).notices)  # fmt: skip
    picture.unlink()
    assert any(line.startswith("assets/line.svg: is missing") for line in verify(copied).notices)


def test_a_record_of_older_code_has_no_picture_and_leaves_none(built, tiny_teacher_dir, tmp_path):
    copied = recorded(built, tmp_path / "copy", tiny_teacher_dir)
    values = json.loads((copied / "verification.json").read_text())
    del values["example"]["line"]
    (copied / "verification.json").write_text(json.dumps(values))
    write_card(copied, read_manifest(copied))
    assert not (copied / "assets" / "line.svg").exists()
    card = (copied / "README.md").read_text()
    assert "## One position\n\nAfter “" in card
    assert "line.svg" not in card
    report = verify(copied)
    assert (report.problems, report.notices) == ([], [])


@pytest.mark.parametrize(
    "change",
    [{"followed": 999}, {"surprises": [1.0]}, {"tokens": []}, {"surprises": None}],
    ids=str,
)
def test_a_damaged_line_is_refused(built, tiny_teacher_dir, tmp_path, change):
    copied = recorded(built, tmp_path / "copy", tiny_teacher_dir)
    values = json.loads((copied / "verification.json").read_text())
    values["example"]["line"] |= change
    (copied / "verification.json").write_text(json.dumps(values))
    assert any("verification.json is damaged" in line for line in verify(copied).problems)


def test_a_dataset_without_texts_shows_none(make_recipe, tiny_teacher_dir, built, tmp_path):
    """Neither is any recorded, nor is what older code recorded shown, or published."""
    recipe = make_recipe(output="text = false", corpus='license = "mit"', teacher_options='license = "mit"')  # fmt: skip
    build(load_recipe(recipe), recipe.parent, tmp_path / "out")
    copied = recorded(tmp_path / "out", tmp_path / "copy", tiny_teacher_dir)
    values = json.loads((copied / "verification.json").read_text())
    assert "example" not in values
    with_text = recorded(built, tmp_path / "with-text", tiny_teacher_dir)
    values["example"] = json.loads((with_text / "verification.json").read_text())["example"]
    (copied / "verification.json").write_text(json.dumps(values))
    manifest = read_manifest(copied)
    write_card(copied, manifest)
    release = {"repo": "org/set", "version": "1.0.0", "changelog": []}
    sent = local_files(copied, manifest, release)
    for card in ((copied / "README.md").read_bytes(), sent["README.md"].content):
        assert b"One position" not in card
    assert "assets/line.svg" not in sent
    assert not (copied / "assets" / "line.svg").exists()
    assert values["example"]["context"].encode() not in sent["verification.json"].content
    assert json.loads(sent["verification.json"].content)["seed"] == 11


@pytest.mark.parametrize(
    "text",
    [
        *HOSTILE,
        "x" * 500,
        "漢字かな交じり文" * 40,
        "👩‍👩‍👧‍👦" * 30,
        "\u0301" * 300,
        "\ufffe\uffff",
        "\U000e0041",
        "",
        " " * 90,
        "\n\t\r",
    ],
)
@pytest.mark.parametrize("number", [1, 7, 211])
def test_any_text_stays_text_within_the_frame(text, number):
    line = line_of(*[text] * number, followed=number // 2, is_cut=number > 1)
    svg = line_svg(line)
    _check_drawing(svg.encode())
    _, boxes = drawn(svg)
    height = int(re.search(r'height="(\d+)"', svg)[1])
    assert 110 <= height <= 170
    for x, width, bottom in boxes:
        assert 0 <= x <= x + width <= 640
        assert bottom <= height
    steering = re.compile("[\x00-\x09\x0b-\x1f\u200b\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe]")
    assert not steering.search(svg)
    words = MARKDOWN.render(f"![{words_of(line)}](assets/line.svg)")
    assert re.fullmatch(r'<p><img src="assets/line.svg" alt="[^"]*" /></p>\n', words), words


def test_tokens_stand_side_by_side_and_lines_break_between_words():
    rng = random.Random(3)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 11))) for _ in range(40)]
    tokens = [part for word in words for part in (f" {word[:4]}", word[4:]) if part]
    svg = line_svg(line_of(*tokens))
    root = ElementTree.fromstring(svg)
    lines: dict[float, list[tuple[float, float, str]]] = {}
    for element in root.iter(f"{SVG}text"):
        if length := element.get("textLength"):
            x, y = float(element.get("x")), float(element.get("y"))
            lines.setdefault(y, []).append((x, float(length), element.text))
    assert len(lines) == 3
    for parts in lines.values():
        x = LEFT
        for start, width, text in parts:
            assert start == pytest.approx(x, abs=0.06)
            assert width == pytest.approx(len(text) * CELL, abs=0.06)
            x = start + width
    shown = ["".join(text for _, _, text in parts) for parts in lines.values()]
    assert all(text.startswith("\xa0") for text in shown)
    assert "".join(tokens).replace(" ", "\xa0").startswith("".join(shown))


def test_text_from_right_to_left_begins_at_the_right():
    left, right = line_of("שלום", " עולם"), line_of("peace", " world")
    starts = [
        [
            float(e.get("x"))
            for e in ElementTree.fromstring(line_svg(line)).iter(f"{SVG}text")
            if e.get("textLength")
        ]
        for line in (left, right)
    ]
    assert starts[0][0] > starts[0][1]
    assert starts[1][0] < starts[1][1]


def test_signs_stand_for_what_cannot_be_seen():
    shown, _ = drawn(line_svg(line_of("a\u202eb", "\n", "\x1b", "<&>")))
    assert [text for text, _ in shown] == ["a\\u202eb", "↵", "\\x1b", "<&>"]
    assert "".join(signs("\n")).strip() == "↵"
