"""A document that is longer than a shard: it is cut, goes on in the next one, and every reader knows what follows; small ones are as ever."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.build.stream import LONG_DOCUMENT
from builder.dataset.lookup import read_row, what_follows
from builder.dataset.manifest import read_manifest, records_of
from builder.hub.versions import compare
from builder.text import pieces
from builder.verify.verify import verify
from logit_dataset.load import load_logits
from tests.build.test_build import data_bytes, read_rows, run
from tests.conftest import TRAINING_TEXT, sample_documents, write_jsonl

LONG = " ".join(TRAINING_TEXT[i % 3] for i in range(72))
"""About 1,800 tokens: six shards of 300, which a document is cut by where shards are of 150."""
SHARD_TOKENS = 300 // LONG_DOCUMENT
DOCUMENTS = [
    *sample_documents(3),
    {"id": "long", "text": LONG},
    *sample_documents(6)[3:],
    {"id": "last", "text": LONG[:5000]},
]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "WINDOW", 256)
    monkeypatch.setattr(pieces, "OVERLAP", 32)


@pytest.fixture
def make_recipe(make_recipe: Any) -> Any:
    """Recipes with small shards."""

    def make(output: str = "", **options: Any) -> Path:
        if "shard_tokens" not in output:
            output = f"{output}\nshard_tokens = {SHARD_TOKENS}"
        path: Path = make_recipe(output=output, **options)
        return path

    return make


@pytest.fixture
def recipe(make_recipe: Any, corpus_file: Path) -> Path:
    write_jsonl(corpus_file, DOCUMENTS)
    return make_recipe()


@pytest.fixture
def whole(recipe: Path, tmp_path: Path) -> Path:
    """Built without a stop."""
    run(recipe, tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def problems(tiny_teacher_dir: Path) -> Any:
    """What is wrong with a dataset, all of its rows run through the teacher again."""
    return lambda output: verify(output, recompute=1000, teacher_path=tiny_teacher_dir).problems


def records(output: Path) -> list[Any]:
    return records_of(read_manifest(output))


def test_no_shard_has_more_than_three_of_its_limit_and_a_row(whole, tiny_tokenizer):
    found = records(whole)
    assert len(found) > 8
    assert all(record.tokens < 3 * SHARD_TOKENS + 64 for record in found)
    cut = [record for record in found if record.ends_within]
    assert [record.ends_within[0] for record in cut].count("long") >= 5
    # A document of less than the limit is never cut.
    assert {record.ends_within[0] for record in cut} == {"long", "last"}
    rows = read_rows(whole)
    ids = [token for row in rows if row["id"] == "long" for token in row["input_ids"]]
    assert ids == tiny_tokenizer.encode(LONG)
    assert [row["chunk_index"] for row in rows if row["id"] == "long"] == list(range(len(ids) // 60 + 1))[: sum(r["id"] == "long" for r in rows)]  # fmt: skip
    totals = read_manifest(whole)["totals"]
    assert totals["documents"] == len(DOCUMENTS) == len({row["id"] for row in rows})


def test_a_shard_that_cuts_a_document_holds_its_limit_of_it(whole):
    rows = read_rows(whole)
    lengths = {(row["id"], row["chunk_index"]): len(row["input_ids"]) for row in rows}
    for record in records(whole):
        if record.ends_within:
            document, chunk = record.ends_within
            first = record.begins_within[1] if record.begins_within else 0
            held = [lengths[document, number] for number in range(first, chunk)]
            assert sum(held) >= 300
            assert sum(held[:-1]) < 300


@pytest.mark.parametrize("suffix", ["jsonl", "txt", "txt.gz", "parquet"])
def test_a_build_that_stops_anywhere_ends_with_the_same_bytes(suffix, make_recipe, corpus_file, tmp_path, monkeypatch, problems):  # fmt: skip
    from builder.text import files
    from tests.corpus.test_documents import COMPRESS, write_file

    monkeypatch.setattr(files, "HELD_CHARACTERS", 3000)
    corpus = 'id_column = "id"'
    if suffix == "jsonl":
        write_jsonl(tmp_path / "c.jsonl", DOCUMENTS)
    elif suffix == "parquet":
        write_file(tmp_path / "c.parquet", DOCUMENTS)
    else:
        for number, document in enumerate(DOCUMENTS):
            content = document["text"].replace(". ", ".\r\n").encode()
            (tmp_path / f"c-{number}.{suffix}").write_bytes(COMPRESS[suffix[3:]](content))
        corpus = 'text_unit = "file"'
    recipe = make_recipe(corpus=f'files = ["c*.{suffix}"]\n{corpus}')
    if suffix.startswith("txt"):
        recipe.write_text(recipe.read_text().replace('id_column = "id"\n', ""))
    run(recipe, tmp_path / "whole")
    assert sum(bool(record.ends_within) for record in records(tmp_path / "whole")) >= 6
    stops = 0
    while run(recipe, tmp_path / "parts", max_shards=1).status == "stopped early":
        stops += 1
    assert stops > 8
    assert data_bytes(tmp_path / "parts") == data_bytes(tmp_path / "whole")
    one, other = (read_manifest(tmp_path / name) for name in ("whole", "parts"))
    offsets = [[shard["offset_after"] for shard in manifest["shards"]] for manifest in (one, other)]
    assert offsets[0] == offsets[1]
    assert problems(tmp_path / "parts") == []


def test_a_damaged_shard_within_a_document_is_built_again(recipe, whole, tmp_path):
    output = tmp_path / "out"
    run(recipe, output, max_shards=6)
    damaged = output / records(whole)[3].file
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    notices: list[str] = []
    run(recipe, output, notice=notices.append)
    assert any("building it again" in notice for notice in notices)
    assert data_bytes(output) == data_bytes(whole)


def test_every_target_across_files_is_known_to_what_recomputes(whole, tiny_model, problems):
    """The last row of a file is about the first token of the next file."""
    manifest = read_manifest(whole)
    rows = read_rows(whole)
    following = {(row["id"], row["chunk_index"]): row["input_ids"][0] for row in rows}
    seen = 0
    for record in records(whole):
        number = record.rows - 1
        row = read_row(whole / record.file, number)
        token, is_end = what_follows(manifest, record.file, number, row, lambda name: whole / name)
        assert is_end is not bool(record.ends_within)
        assert token == following.get(record.ends_within, 0)
        seen += bool(record.ends_within)
        target = row["target_logprob"][-1]
        import torch

        with torch.inference_mode():
            logits = tiny_model(torch.tensor([row["input_ids"]])).logits[0, -1].double()
        assert np.isclose(target, float(logits.log_softmax(-1)[token]), atol=2e-2)
    assert seen >= 6
    assert problems(whole) == []


def test_readers_do_not_take_the_end_of_a_file_for_the_end_of_a_document(whole):
    data = load_logits(whole)
    counts = 0
    for group in data.row_groups:
        rows = data.read(group)
        last = rows.columns["target_ids"][rows.lengths_R.cumsum() - 1]
        assert last[-1] == -100
        counts += int((last == -100).sum())
    assert counts == len(data.row_groups)


def test_info_shows_what_follows_in_the_next_file(whole, tiny_teacher_dir, cli):
    found = records(whole)
    row = sum(record.rows for record in found[:2]) - 1
    rows = read_rows(whole)
    assert found[1].ends_within == (rows[row]["id"], rows[row]["chunk_index"] + 1)
    position = len(rows[row]["input_ids"]) - 1
    status, out, _ = cli("info", whole, "--row", row, "--position", position, "--teacher", tiny_teacher_dir)  # fmt: skip
    assert status == 0
    assert "← really followed" in out


def damage(whole: Path, change: Any) -> list[str]:
    """What `verify` says once the manifest, or a file with its hash, was changed."""
    manifest = read_manifest(whole)
    change(manifest)
    (whole / "manifest.json").write_text(json.dumps(manifest))
    return verify(whole).problems


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("document", "other", r"train-000-00001.parquet: does not end with chunk \d of 'other'"),
        ("chunk", 3, r"train-000-00001.parquet: does not end with chunk 2 of 'long'"),
    ],
)
def test_verify_compares_where_files_end_with_the_manifest(whole, key, value, problem):
    def change(manifest: dict[str, Any]) -> None:
        manifest["shards"][1]["offset_after"][key] = value
        manifest["shards"][2]["offset_before"][key] = value

    found = damage(whole, change)
    assert any(re.search(problem, line) for line in found)
    assert any("data/train-000-00002.parquet row 0: is not chunk" in line for line in found)


def test_verify_compares_where_files_begin_with_the_manifest(whole):
    found = damage(whole, lambda m: m["shards"][2]["offset_before"].update(document="other"))
    assert any("starts elsewhere in the corpus than" in line for line in found)
    assert any("train-000-00002.parquet row 0: is not chunk" in line for line in found)


def test_shards_in_another_order_are_noticed(whole):
    """Each with its own hash, counts and sums."""

    def swap(manifest: dict[str, Any]) -> None:
        one, other = (manifest["shards"][number] for number in (2, 3))
        paths = [whole / shard["file"] for shard in (one, other)]
        contents = [path.read_bytes() for path in paths]
        for path, content in zip(paths, reversed(contents), strict=True):
            path.write_bytes(content)
        stay = ("file", "partition", "index", "offset_before", "offset_after", "exhausted")
        for key in one.keys() - set(stay):
            one[key], other[key] = other[key], one[key]

    found = damage(whole, swap)
    for file in (2, 3):
        assert any(f"train-000-0000{file}.parquet row 0: is not chunk" in line for line in found)


# Limits


def test_max_tokens_ends_within_a_long_document(make_recipe, corpus_file, tmp_path, problems):
    """At the end of a shard; what follows is not there, and is known to nobody."""
    write_jsonl(corpus_file, DOCUMENTS)
    recipe = make_recipe(corpus='max_tokens = 900')  # fmt: skip
    result = run(recipe, tmp_path / "out")
    assert 900 <= result.manifest["totals"]["tokens"] < 900 + 2 * 300
    last = records(tmp_path / "out")[-1]
    assert last.exhausted
    assert last.ends_within[0] == "long"
    rows = read_rows(tmp_path / "out")
    assert result.manifest["totals"]["documents"] == len({row["id"] for row in rows}) == 4
    row = read_row(tmp_path / "out" / last.file, last.rows - 1)
    found = what_follows(result.manifest, last.file, last.rows - 1, row, lambda name: tmp_path / "out" / name)  # fmt: skip
    assert found == (-1, False)
    assert np.isfinite(row["target_logprob"][-1])
    assert problems(tmp_path / "out") == []


def test_a_larger_limit_goes_on_where_the_smaller_one_ended(make_recipe, corpus_file, tmp_path):
    write_jsonl(corpus_file, DOCUMENTS)
    small = run(make_recipe(corpus="max_tokens = 900"), tmp_path / "small").manifest
    large = run(make_recipe(corpus="max_tokens = 1800"), tmp_path / "large").manifest
    assert compare(small, large)[0] == "minor"
    ours, theirs = data_bytes(tmp_path / "small"), data_bytes(tmp_path / "large")
    assert all(theirs[name] == content for name, content in ours.items())


def test_max_documents_takes_the_last_document_whole(make_recipe, corpus_file, tmp_path):
    write_jsonl(corpus_file, DOCUMENTS)
    recipe = make_recipe(corpus="max_documents = 4")
    whole = run(recipe, tmp_path / "whole").manifest
    assert whole["totals"]["documents"] == 4
    rows = read_rows(tmp_path / "whole")
    assert "".join(row["text"] for row in rows if row["id"] == "long") == LONG
    while run(recipe, tmp_path / "parts", max_shards=1).status == "stopped early":
        pass
    assert data_bytes(tmp_path / "parts") == data_bytes(tmp_path / "whole")


def test_truncating_keeps_the_first_rows_only(make_recipe, corpus_file, tmp_path, problems):
    write_jsonl(corpus_file, DOCUMENTS)
    recipe = make_recipe(sequences='long_documents = "truncate"')
    run(recipe, tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    assert len(rows) == len(DOCUMENTS)
    assert {row["chunk_index"] for row in rows} == {0}
    assert not any(record.ends_within for record in records(tmp_path / "out"))
    assert problems(tmp_path / "out") == []


def test_a_long_chat_is_cut_too(make_recipe, tmp_path, problems):
    """With its mask, from the same template; the first row of the next shard is in the middle of an answer."""
    from tests.chats import CHATML

    (tmp_path / "template.jinja").write_text(CHATML)
    chat = {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": LONG}]}  # fmt: skip
    short = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}  # fmt: skip
    write_jsonl(tmp_path / "chats.jsonl", [short, chat, short])
    recipe = make_recipe(
        files="chats.jsonl",
        corpus='files = ["chats.jsonl"]\nmessages_column = "messages"',
        sequences='chat_template = "template.jinja"',
        output="completions_only = true",
    )
    recipe.write_text(recipe.read_text().replace('id_column = "id"\n', ""))
    run(recipe, tmp_path / "whole")
    assert sum(bool(record.ends_within) for record in records(tmp_path / "whole")) >= 5
    while run(recipe, tmp_path / "parts", max_shards=1).status == "stopped early":
        pass
    assert data_bytes(tmp_path / "parts") == data_bytes(tmp_path / "whole")
    assert problems(tmp_path / "whole") == []


def test_partitions_with_long_documents(make_recipe, tmp_path, problems):
    for number in range(4):
        write_jsonl(tmp_path / f"p-{number}.jsonl", [{"id": f"{number}", "text": LONG[number:]}])
    recipe = make_recipe(files="p-*.jsonl", output="partitions = 2")
    run(recipe, tmp_path / "whole")
    while run(recipe, tmp_path / "parts", max_shards=1).status == "stopped early":
        pass
    assert data_bytes(tmp_path / "parts") == data_bytes(tmp_path / "whole")
    assert problems(tmp_path / "whole") == []


def test_a_corpus_that_has_another_document_at_the_place_is_refused(recipe, corpus_file, tmp_path):
    output = tmp_path / "out"
    run(recipe, output, max_shards=3)
    last = json.loads(max((output / ".build" / "records").iterdir()).read_text())
    assert last["offset_after"]["document"] == "long"
    known = output / ".build" / "known.json"
    stat, content = corpus_file.stat(), corpus_file.read_bytes().replace(b'"long"', b'"lung"')
    corpus_file.write_bytes(content)
    import os

    os.utime(corpus_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert json.loads(known.read_text())["hashes"]
    with pytest.raises(ValueError, match=r"document 'long' no longer has chunk \d+; the corpus"):
        run(recipe, output)


# Memory


MEASURE = """
import sys
from pathlib import Path
from builder.build.build import build
from builder.recipe.file import load_recipe
from builder.teacher import ranks

def kernel_says(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) // 1024

loaded, load = [], ranks.load_teacher
def look(*args, **kwargs):
    teacher = load(*args, **kwargs)
    loaded.append(kernel_says("VmRSS"))
    return teacher
ranks.load_teacher = look
recipe = Path(sys.argv[1])
build(load_recipe(recipe), recipe.parent, Path(sys.argv[2]), max_shards=2)
print(kernel_says("VmHWM") - loaded[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell")
def test_memory_does_not_grow_with_a_document(make_recipe, tmp_path):
    """4 MB at once took 600 MB; here, two shards of it take what those of small documents do."""
    lines = f"{LONG}\n" * (4_000_000 // len(LONG.encode()))
    (tmp_path / "large.txt").write_text(lines)
    (tmp_path / "small").mkdir()
    for number in range(40):
        (tmp_path / "small" / f"{number:03}.txt").write_text(lines[: 2 * len(LONG)])
    peaks = {}
    for files in ("large.txt", "small/*.txt"):
        recipe = make_recipe(files=files, output="shard_tokens = 2000")
        recipe.write_text(recipe.read_text().replace('id_column = "id"\n', ""))
        output = tmp_path / f"out-{files[:5]}"
        ended = subprocess.run([sys.executable, "-c", MEASURE, str(recipe), str(output)], capture_output=True, text=True, check=True)  # fmt: skip
        peaks[files] = int(ended.stdout)
        shutil.rmtree(output)
    assert peaks["large.txt"] < peaks["small/*.txt"] + 100
