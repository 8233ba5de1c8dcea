"""The dataset card: true, valid, and unmoved by what names and descriptions say."""

import copy
import json
import re
import shutil
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import load_dataset
from markdown_it import MarkdownIt

from builder.build.build import build
from builder.card.card import card_files, render_card, write_card
from builder.card.charts import BIN_NATS, Curves, entropy_svg, marks, mass_svg, measure
from builder.card.markdown import plain
from builder.card.recipe_text import recipe_toml
from builder.card.records import read_verification
from builder.dataset.identity import fingerprint, row_fingerprint
from builder.dataset.info import spell_token
from builder.dataset.manifest import read_manifest
from builder.recipe.file import load_recipe
from builder.recipe.recipe import Recipe
from builder.verify.verify import record_recomputation, verify
from logit_dataset import distillation_loss
from logit_dataset.schema import Layout, columns
from tests import loopback_hub as stand_in
from tests.conftest import recipe_text, sample_documents, write_jsonl

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])

HOSTILE = [
    "---\nlicense: mit\n---",
    "</table><script>alert(1)</script><img src=x onerror=alert(1)>",
    "| a | b |\n|---|---|\n# Heading",
    "```\nrm -rf /\n```",
    "[click](javascript:alert(1)) ![x](http://evil/x.png) <http://evil>",
    "{{ 7 * 7 }} {% raw %} ${HOME} $$x$$",
    "yes",
    "null: [1, *anchor, &x]",
    "'\"\\ \u2028 \u202e \x00 \ud800 no: *bold* _it_ ~~s~~ `code`",
    "- item",
    "1. item",
    "=====",
    "%YAML 1.1",
    "<!-- the rest is gone",
    "<?the rest, too",
    "&lt; &amp;amp; &#60;",
]


@pytest.fixture
def manifest(built):
    return copy.deepcopy(read_manifest(built))


@pytest.fixture
def curves(built):
    return measure(sorted((built / "data").iterdir()))


def head_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def text_of(html: str) -> str:
    return "".join(ElementTree.fromstring(f"<p>{html}</p>").itertext())


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_does_nothing(text):
    paragraph = MARKDOWN.render(plain(text))
    shown = " ".join(re.sub(r"[\x00\ud800\u202e]", "", text).split())
    assert re.fullmatch(r"<p>[^<]*</p>\n", paragraph), paragraph
    assert text_of(paragraph.removeprefix("<p>").removesuffix("</p>\n")) == shown
    table = MARKDOWN.render(f"| a |\n|---|\n| {plain(text)} |\n\nafter")
    assert table.count("<td") == 1
    assert table.endswith("</table>\n<p>after</p>\n")
    assert text_of(re.search(r"<td>(.*?)</td>", table)[1]) == shown


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_tokens_of_one_position_do_nothing(manifest, curves, text):
    example = {
        **{"context": "a b", "is_cut": True, "tokens": ["x", "y"], "probabilities": [0.6, 0.2]},
        **{"listed": 9, "rest": 0.1, "tail": 0.1, "draws": ["z"], "following": "f", "rank": None},
        **{"following_probability": 0.01, "entropy": 1.2},
    }
    hostile = example | {"context": text, "tokens": [text, text], "draws": [text, text], "following": text}  # fmt: skip
    outlines = []
    for shown in (example, hostile):
        card = render_card(manifest, curves=curves, verification={**RECORD, "example": shown})
        html = MARKDOWN.render(card.split("---\n", 2)[2])
        outlines.append(re.findall(r"<(?:h\d|table|tr|td|script|img|a |pre|hr|ul|ol)[^>]*>", html))
    assert outlines[0] == outlines[1]


RECORD = {
    **{"date": "2026-11-26", "environment": {"device": "GPU"}, "rows": 1, "tokens": 1, "seed": 1},
    **{"max_abs_error": 0.3, "mean_abs_error": 0.05, "top1_agreement": 1.0},
    **{"nll_stored": 1.0, "nll_recomputed": 1.0},
}


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        ({}, "and 0.3 at most, the teacher"),
        (
            {
                "floor": {"max_abs_error": 0.5, "mean_abs_error": 0.06},
                "limit": {"max_beyond_rounding": 1.5, "mean_abs_error": 0.12},
            },
            "and 0.3 at most (noise of the teacher itself: 0.06 and 0.5; allowed: 0.12 and 1.5), the teacher",
        ),
        ({"limit": {"max_beyond_rounding": 1.5}}, "and 0.3 at most, the teacher"),
    ],
)
def test_differences_are_shown_beside_what_is_allowed(manifest, curves, more, shown):
    """Records of earlier versions say nothing of that."""
    card = render_card(manifest, curves=curves, verification={**RECORD, **more})
    assert shown in card
    assert "1 random row (1 token, seed 1) was run" in card


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_break_neither_the_yaml_nor_the_page(manifest, curves, text):
    normal = render_card(manifest, curves=curves)
    manifest["recipe"]["description"] = text
    manifest["recipe"]["corpus"] |= {"repo": text, "config": text, "split": text, "files": []}
    manifest["recipe"]["teacher"] |= {"repo": text, "path": None}
    manifest["corpus"] = {"kind": "hub", "repo": text, "commit": "0" * 40}
    manifest["teacher"] |= {"repo": text, "commit": text, "architecture": text, "dtype": text}
    manifest["teacher"] |= {"tokenizer_source": text}
    manifest["environments"][0]["device"] = text
    entry = {"version": text, "date": text, "changes": [text]}
    release = {"repo": "org/set", "version": "1.0.0", "changelog": [entry]}
    card = render_card(manifest, curves=curves, release=release)
    assert head_of(card) == head_of(normal)
    assert stand_in.card_errors(card) == []

    def outline(card: str) -> list[str]:
        html = MARKDOWN.render(card.split("---\n", 2)[2])
        return re.findall(r"<(?:h\d|table|script|img|a |pre|hr|ul|ol)[^>]*>", html)

    assert outline(card) == [*outline(normal), "<h3>", "<ul>"]  # those of the changelog


def test_the_recipe_in_the_card_builds_the_same_data(built, manifest, tmp_path):
    toml = re.search(r"```toml\n(.*?)```", (built / "README.md").read_text(), re.DOTALL)[1]
    recipe = Recipe.model_validate_json(json.dumps(tomllib.loads(toml)))
    plan = {key: manifest[key] for key in ("recipe", "corpus")}
    sources = ("kind", "name", "sha256")
    plan["teacher"] = {key: manifest["teacher"][key] for key in sources}
    assert fingerprint(plan) == manifest["fingerprint"]
    assert fingerprint({**plan, "recipe": recipe.published()}) == manifest["fingerprint"]

    manifest["recipe"]["corpus"] |= {"files": [], "repo": "a/b", "config": 'x"\\\n[output]\n\x7f'}
    manifest["corpus"] = {"kind": "hub", "repo": "a/b", "commit": "1" * 40}
    manifest["recipe"]["description"] = "Two\nlines, 'quotes' \"and\" ``` fences"
    hub_toml = recipe_toml(manifest["recipe"], manifest)
    assert not re.search(r"^ {0,3}```", hub_toml, re.MULTILINE)
    recipe = Recipe.model_validate_json(json.dumps(tomllib.loads(hub_toml)))
    assert recipe.corpus.revision == "1" * 40
    assert recipe.corpus.config == manifest["recipe"]["corpus"]["config"]
    assert recipe.description == manifest["recipe"]["description"]
    moved = {**plan, "corpus": manifest["corpus"], "recipe": manifest["recipe"]}
    assert fingerprint(moved) == fingerprint({**moved, "recipe": recipe.published()})


def test_what_is_said_about_a_dataset_changes_no_fingerprint_and_limits_no_row(manifest):
    plan = {key: manifest[key] for key in ("recipe", "corpus", "teacher")}
    before = fingerprint(plan), row_fingerprint(plan)
    described = copy.deepcopy(plan)
    described["recipe"] |= {"description": "x", "name": "y"}
    described["recipe"]["corpus"] |= {"license": "mit", "language": ["de"]}
    described["recipe"]["teacher"]["license"] = "mit"
    assert (fingerprint(described), row_fingerprint(described)) == before
    limited = copy.deepcopy(plan)
    limited["recipe"]["corpus"]["max_tokens"] = 1_000
    assert fingerprint(limited) != before[0]
    assert row_fingerprint(limited) == before[1]
    other = copy.deepcopy(plan)
    other["recipe"]["output"]["top_k"] = 10
    assert row_fingerprint(other) != before[1]


def test_the_card_says_what_the_manifest_and_the_schema_say(built, manifest):
    card = (built / "README.md").read_text()
    info = head_of(card)["dataset_info"]
    assert info["splits"][0]["num_examples"] == manifest["totals"]["rows"]
    for column in columns(Layout(tail_samples=4)):
        kind = f"{column.dtype} [{column.shape}]" if column.shape else column.dtype
        assert f"| `{column.name}` | {kind} | {column.meaning} |" in card
    assert f"| tokens | {manifest['totals']['tokens']:,} |" in card
    assert manifest["fingerprint"] in card
    assert manifest["teacher"]["sha256"] in card
    features = load_dataset(str(built), split="train", streaming=True).features
    assert features["topk_indices"].shape == (None, 20)


def test_the_card_says_what_each_column_takes(built, manifest, curves):
    """Together with the texts' ids and the footers that is the size of the files."""
    stated = {
        name: float(size)
        for name, size in re.findall(
            r"^\| `(\w+)` \|.*\| ([\d.]+) \|$", (built / "README.md").read_text(), re.M
        )
    }
    assert list(stated) == [
        column.name for column in columns(Layout.of(manifest["recipe"], manifest["teacher"]))
    ]
    tokens, found = manifest["totals"]["tokens"], dict.fromkeys(stated, 0)
    for path in (built / "data").glob("*.parquet"):
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                found[column.path_in_schema.split(".")[0]] += column.total_compressed_size
    assert stated == {name: round(size / tokens, 2) for name, size in found.items()}

    older = copy.deepcopy(manifest)
    for shard in older["shards"]:
        del shard["column_bytes"]
    assert "meaning | bytes per token |" not in render_card(older, curves=curves)


def test_build_and_card_write_the_same_bytes(built, manifest, cli, tmp_path):
    copied = Path(shutil.copytree(built, tmp_path / "copy"))
    for path in ("README.md", "assets/mass.svg", "assets/entropy.svg"):
        (copied / path).unlink()
    assert cli("card", copied) == (
        0,
        f"{copied}/README.md: the card is written, with 2 pictures in {copied}/assets\n",
        "",
    )
    for name, content in card_files(built, manifest).items():
        assert (copied / name).read_bytes() == (built / name).read_bytes() == content


def test_the_pictures_show_the_data(built, manifest, curves):
    rows = [row for p in sorted((built / "data").iterdir()) for row in pq.read_table(p).to_pylist()]
    probabilities = np.exp(np.concatenate([r["topk_logprobs"] for r in rows]).astype(np.float64))
    entropy = np.concatenate([r["entropy"] for r in rows]).astype(np.float64)
    np.testing.assert_allclose(curves.mass, probabilities.cumsum(-1).mean(0), rtol=1e-12)
    assert curves.mass[-1] == pytest.approx(manifest["totals"]["mean_topk_mass"], abs=5e-5)
    assert curves.mean_entropy == pytest.approx(entropy.mean())
    for i, share in enumerate(curves.entropy_shares):
        inside = (entropy >= i * BIN_NATS) & (entropy < (i + 1) * BIN_NATS)
        assert share == pytest.approx(inside.mean())
    assert sum(curves.entropy_shares) == pytest.approx(1)


@pytest.mark.parametrize(
    "curves",
    [
        Curves(mass=[0.4], entropy_shares=[1.0], mean_entropy=0.0),
        Curves(mass=[0.999] + [1.0] * 49, entropy_shares=[0.99, 0.01], mean_entropy=0.1),
        Curves(mass=list(np.linspace(0.01, 0.3, 1000)), entropy_shares=[0.0] * 22 + [0.3, 0.7], mean_entropy=11.5),
    ],
    ids=["k 1, certain", "k 50, nearly certain", "k 1000, no idea"],
)  # fmt: skip
def test_pictures_of_extreme_teachers_stay_within_their_frame(curves):
    for svg in (mass_svg(curves), entropy_svg(curves)):
        root = ElementTree.fromstring(svg)
        for element in root.iter():
            at = {k: float(v) for k, v in element.attrib.items() if k in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy")}  # fmt: skip
            assert all(0 <= value <= 640 for value in at.values())
            assert all(v <= 300 for k, v in at.items() if k.endswith("y") or k in ("y1", "y2"))
            if "height" in element.attrib and "x" in at:
                assert float(element.attrib["height"]) >= 0
                assert at["y"] + float(element.attrib["height"]) <= 250.05
                assert at["x"] + float(element.attrib["width"]) <= 640
    assert marks(50) == [1, 2, 5, 10, 20, 50]


def assert_one_position(card, dataset, example, tokenizer):
    """The table is what a row of the dataset holds, most probable first, and sums to 1."""
    section = card.split("## One position\n")[1].split("## Load it")[0]
    (table,) = re.findall(r"<tbody>.*?</tbody>", MARKDOWN.render(section), re.DOTALL)
    cells = re.findall(r"<td>(.*?)</td>", table)
    shares = {text_of(name): float(share.rstrip("%")) / 100 for name, share in zip(cells[::2], cells[1::2], strict=True)}  # fmt: skip
    followed = [name for name in shares if "← followed" in name]
    assert len(followed) == 1
    assert sum(p for name, p in shares.items() if "followed, among" not in name) == pytest.approx(1, abs=0.004)  # fmt: skip
    assert [*example["probabilities"]] == sorted(example["probabilities"], reverse=True)
    found = 0
    for path in sorted((dataset / "data").iterdir()):
        for row in pq.read_table(path).to_pylist():
            for t, logprobs in enumerate(row["topk_logprobs"]):
                here = [round(float(np.exp(np.float64(p))), 4) for p in logprobs[:5]]
                if here == example["probabilities"] and round(row["entropy"][t], 3) == example["entropy"]:  # fmt: skip
                    assert tokenizer.decode(row["input_ids"][: t + 1])[-100:] == example["context"]
                    assert [spell_token(tokenizer, i) for i in row["topk_indices"][t][:5]] == example["tokens"]  # fmt: skip
                    found += 1
    assert found >= 1


def test_a_recorded_recomputation_is_shown_as_it_was(
    built, manifest, tiny_teacher_dir, tiny_tokenizer, tmp_path
):
    copied = Path(shutil.copytree(built, tmp_path / "copy"))
    report = verify(copied, recompute=4, seed=11, teacher_path=tiny_teacher_dir)
    record_recomputation(copied, report, "cpu")
    write_card(copied, manifest)
    card = (copied / "README.md").read_text()
    assert "4 random rows" in card
    assert "seed 11" in card
    assert_one_position(card, copied, report.recomputed["example"], tiny_tokenizer)
    beyond = report.recomputed["max_beyond_rounding"]
    assert beyond < 1e-3 < report.recomputed["max_abs_error"]
    assert (
        f"{report.recomputed['max_abs_error']:.2g} at most (beyond rounding to float16 {beyond:.2g}, allowed 0.002), "
        in card
    )
    manifest["shards"][0]["sha256"] = "0"
    assert read_verification(copied, manifest) is None  # of other data
    assert "No result of the latter was recorded" in (built / "README.md").read_text()


LICENCES = {
    ("apache-2.0", "Apache-2.0"): {"license": "apache-2.0"},
    ("cc-by-sa-3.0", "apache-2.0"): {
        "license": "other",
        "license_name": "cc-by-sa-3.0-and-apache-2.0",
        "license_details": "texts: cc-by-sa-3.0; teacher: apache-2.0",
    },
    ("psf-2.0", "psf-2.0"): {
        "license": "other",
        "license_name": "psf-2.0",
        "license_details": "texts: psf-2.0; teacher: psf-2.0",
    },
    ("mit", None): {},
}


@pytest.mark.parametrize(("names", "expected"), LICENCES.items(), ids=map(str, LICENCES))
def test_licences_of_corpus_and_teacher(manifest, names, expected):
    manifest["recipe"]["corpus"]["license"], manifest["recipe"]["teacher"]["license"] = names
    card = render_card(manifest)
    found = {key: value for key, value in head_of(card).items() if key.startswith("license")}
    assert found == expected
    assert stand_in.card_errors(card) == []
    assert f"**{names[0]}**" in card
    assert f"**{names[1] or 'not stated'}**" in card


def test_norwegian_is_a_language(manifest):
    manifest["recipe"]["corpus"]["language"] = ["no", "code"]
    assert head_of(render_card(manifest))["language"] == ["no", "code"]


@pytest.mark.parametrize(
    ("rows", "category"), [(1, "n<1K"), (999, "n<1K"), (1_000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**12, "n>1T")]
)  # fmt: skip
def test_size_categories(manifest, rows, category):
    manifest["totals"]["rows"] = rows
    assert head_of(render_card(manifest))["size_categories"] == [category]


def test_a_new_description_rewrites_the_card_and_nothing_else(tiny_teacher_dir, tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", sample_documents(6))
    path, out = tmp_path / "recipe.toml", tmp_path / "out"

    def run(**changes: str) -> str:
        path.write_text(recipe_text(tiny_teacher_dir, "corpus.jsonl", **changes))
        return build(load_recipe(path), tmp_path, out).status

    def data() -> dict:
        return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (out / "data").iterdir()}

    assert run() == "complete"
    before = data()
    changes = {"corpus": 'license = "mit"', "teacher": 'license = "mit"'}
    assert run(**changes) == "already complete, with a new description"
    assert run(**changes) == "already complete"
    assert data() == before
    assert head_of((out / "README.md").read_text())["license"] == "mit"
    assert read_manifest(out)["recipe"]["corpus"]["license"] == "mit"
    assert verify(out).problems == []


@pytest.mark.parametrize(
    "line", ['license = "two words"', 'license = "a\\nb: c"', 'language = ["English"]']
)
def test_licences_and_languages_are_identifiers(tiny_teacher_dir, tmp_path, line):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_text(tiny_teacher_dir, "x.jsonl", corpus=line))
    with pytest.raises(ValueError, match=rf"corpus\.{line.split()[0]}"):
        load_recipe(path)


@pytest.mark.parametrize("options", ["tail_samples = 0", "tail_samples = 3"])
def test_the_plain_loss_of_the_card_is_that_of_the_package(
    tiny_teacher_dir, tmp_path, monkeypatch, options
):
    """And its trainer trains, on what its collator makes of the same rows."""
    write_jsonl(tmp_path / "corpus.jsonl", sample_documents(4))
    (tmp_path / "recipe.toml").write_text(
        recipe_text(tiny_teacher_dir, "corpus.jsonl", output=f"top_k = 5\n{options}")
    )
    build(load_recipe(tmp_path / "recipe.toml"), tmp_path, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    card = (tmp_path / "out" / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet.replace("path/to/this/directory", "out"), "README.md", "exec"), names)
    assert len(snippets) == 3
    assert max(len(snippet.splitlines()) for snippet in snippets) <= 18
    batch = names["LogitCollator"].of("out")([names["row"]])
    names = {}
    torch.manual_seed(0)
    for snippet in snippets[:2]:
        text = snippet.replace("path/to/this/directory", "out").replace("optimizer.step()", "")
        exec(compile(text, "README.md", "exec"), names)
    loss = "tail_draws" if "3" in options else "tail_bucket"
    expected = distillation_loss(names["student"](batch["input_ids"]), batch, loss=loss)
    assert names["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_card_says_how_to_cite_it_and_what_not_to_train_with(manifest, curves):
    card = render_card(manifest, curves=curves)
    assert (
        "**A plain `SFTTrainer` trains on the text of these rows only, and gives no warning.**"
        in card
    )
    assert "pip install logit-dataset" in card
    assert "Published by" not in card
    assert "@misc{tiny,\n  title = {{tiny: distributions of tiny}},\n" in card
    assert f"fingerprint {manifest['fingerprint'][:12]}}}" in card
    entry = {"version": "1.0.0", "date": "2026-11-26", "changes": ["x"]}
    release = {"repo": "some-org/set", "version": "1.0.0", "changelog": [entry]}
    card = render_card(manifest, curves=curves, release=release)
    assert "\nPublished by some-org.\n" in card
    assert "  author = {{some-org}},\n  year = {2026},\n  version = {1.0.0},\n  url = {https://huggingface.co/datasets/some-org/set},\n}\n```" in card  # fmt: skip
    assert 'LogitCollator.of("some-org/set", revision="v1.0.0")' in card
