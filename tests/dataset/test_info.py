"""What `info` says of a dataset, a row and a position is what stands in the files."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from builder.build.build import build
from builder.dataset import info
from builder.dataset.info import (
    MAX_POSITIONS,
    alternatives,
    describe,
    describe_position,
    describe_row,
    spell_token,
    summarize,
)
from builder.dataset.manifest import read_manifest
from builder.recipe.file import load_recipe
from tests.conftest import TINY_VOCAB_SIZE
from tests.corpus.test_sequences import MAKERS


def stored_rows(directory: Path) -> list[dict]:
    files = sorted((directory / "data").glob("*.parquet"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


def test_the_summary_is_the_manifest_without_shards_and_plain_json(built):
    manifest = read_manifest(built)
    summary = summarize(built)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    for key in ("totals", "teacher", "corpus", "fingerprint"):
        assert summary[key] == manifest[key]
    assert summary["shards"] == len(manifest["shards"])
    assert (summary["name"], summary["top_k"], summary["max_length"]) == ("tiny", 20, 64)


def test_the_description_has_the_totals(built):
    text = describe(built)
    manifest = read_manifest(built)
    totals = manifest["totals"]
    for part in (
        f"fingerprint {manifest['fingerprint'][:12]}",
        f"tiny @ {manifest['teacher']['sha256'][:12]}, {manifest['teacher']['parameters']:,} param",
        f"local files (1) @ {manifest['corpus']['files'][0]['sha256'][:12]}",
        f"{totals['tokens']:,} tokens in {totals['rows']} rows of 24 documents\n",
        f"in {len(manifest['shards'])} files, {totals['bytes_per_token']} bytes per token",
        f"top 20     {totals['mean_topk_mass']:.1%} of the probability",
        f"entropy    {totals['mean_entropy']:.3f} nats",
        f"perplexity {totals['teacher_perplexity']} of",
    ):
        assert part in text
    assert len({line[:11].rstrip() for line in text.splitlines()}) == 10


def test_blank_documents_are_mentioned(built, tmp_path):
    manifest = read_manifest(built)
    manifest["totals"]["documents_skipped"] = 1234
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert "rows of 24 documents, 1,234 blank ones skipped\n" in describe(tmp_path)


def test_alternatives_are_the_stored_values_at_every_position(
    built, tiny_teacher_dir, tiny_tokenizer
):
    rows = stored_rows(built)
    numbers = [0, 1, 5, len(rows) - 1]
    assert max(len(rows[number]["input_ids"]) for number in numbers) == 64
    for number in numbers:
        row, following_row = rows[number], rows[(number + 1) % len(rows)]
        is_cut = following_row["id"] == row["id"]
        last = following_row["input_ids"][0] if is_cut else tiny_tokenizer.eos_token_id
        targets = [*row["input_ids"][1:], last]
        for position in {0, 7, len(targets) - 2, len(targets) - 1} & set(range(len(targets))):
            found = alternatives(built, number, position, teacher_path=tiny_teacher_dir)
            indices = row["topk_indices"][position]
            assert found.tokens == [spell_token(tiny_tokenizer, token) for token in indices]
            np.testing.assert_allclose(found.probabilities, np.exp(row["topk_logprobs"][position]))
            assert found.tail == pytest.approx(np.exp(row["tail_logprob"][position]))
            assert found.entropy == row["entropy"][position]
            target = targets[position]
            assert found.following == spell_token(tiny_tokenizer, target)
            assert found.rank == (indices.index(target) if target in indices else None)
            assert found.following_probability == pytest.approx(
                np.exp(row["target_logprob"][position])
            )
            if found.rank is not None:
                assert found.probabilities[found.rank] == found.following_probability


def test_what_follows_the_last_token_of_a_row(built, tiny_teacher_dir, tiny_tokenizer):
    """The next chunk's first token inside a document, end-of-sequence at its end."""
    rows = stored_rows(built)
    ends = set()
    for number, row in enumerate(rows):
        last = len(row["input_ids"]) - 1
        following = alternatives(built, number, last, teacher_path=tiny_teacher_dir).following
        is_cut = number + 1 < len(rows) and rows[number + 1]["chunk_index"] > 0
        ends.add(is_cut)
        if is_cut:
            assert following == spell_token(tiny_tokenizer, rows[number + 1]["input_ids"][0])
        else:
            assert following == "<eos>"
    assert ends == {True, False}


def with_rank(built: Path, teacher: Path, wanted: range | None) -> str:
    """The description of a position whose real follower has such a rank (None: is outside)."""
    for number, row in enumerate(stored_rows(built)):
        targets = row["input_ids"][1:]
        for position, (target, indices) in enumerate(
            zip(targets, row["topk_indices"], strict=False)
        ):
            rank = indices.index(target) if target in indices else None
            if rank in wanted if wanted else rank is None:
                return describe_position(
                    alternatives(built, number, position, teacher_path=teacher)
                )
    raise AssertionError("no such position")


@pytest.mark.parametrize(
    ("ranks", "marked_line"), [(range(10), None), (range(10, 20), 10), (None, -2)]
)
def test_the_token_that_really_followed_is_marked_once(built, tiny_teacher_dir, ranks, marked_line):
    text = with_rank(built, tiny_teacher_dir, ranks)
    heading, _, *table = text.splitlines()
    assert heading.endswith("is followed by:")
    marked = [number for number, line in enumerate(table) if "← really followed" in line]
    assert len(marked) == 1
    if marked_line is None:
        assert marked[0] < 10
    else:
        assert table[marked[0]] == table[marked_line]
    assert ("outside the top 20" in text) == (ranks is None)
    if ranks == range(10, 20):  # the eleventh line shows its real rank
        assert int(table[10].split()[0]) > 10
    parts = [*table[:10], *(line for line in table if " together" in line)]
    assert len(parts) == 12
    assert sum(float(re.search(r"\d\.\d{4}", line)[0]) for line in parts) == pytest.approx(
        1, abs=3e-3
    )
    assert re.fullmatch(r"entropy \d\.\d{3} nats", table[-1])


def test_a_row_shows_what_followed_at_each_position_and_at_its_end(
    built, tiny_teacher_dir, tiny_tokenizer
):
    rows = stored_rows(built)
    short = next(number for number, row in enumerate(rows) if 8 < len(row["input_ids"]) < 40)
    ids = rows[short]["input_ids"]
    heading, _, *lines = describe_row(built, short, teacher_path=tiny_teacher_dir).splitlines()
    assert heading == (
        f"row {short}: document {rows[short]['id']!r}, chunk {rows[short]['chunk_index']}, {len(ids)} tokens"
    )
    assert len(lines) == len(ids)
    for position, (line, token) in enumerate(zip(lines, ids, strict=True)):
        assert line.split()[0] == str(position)
        assert line[10:].startswith(repr(spell_token(tiny_tokenizer, token)))
        if position + 1 < len(ids):
            assert line[27:].startswith(repr(spell_token(tiny_tokenizer, ids[position + 1])))
        probability = np.exp(rows[short]["topk_logprobs"][position][0])
        assert f" {probability:.4f} " in line
    assert "'<eos>'" in lines[-1][27:]


def test_a_long_row_is_cut_with_a_hint(built, tiny_teacher_dir):
    number = next(n for n, r in enumerate(stored_rows(built)) if len(r["input_ids"]) == 64)
    lines = describe_row(built, number, teacher_path=tiny_teacher_dir).splitlines()
    assert len(lines) == 2 + MAX_POSITIONS + 1
    assert lines[-1] == f"… and {64 - MAX_POSITIONS} more; --position T shows any of them"


def test_where_nothing_is_known_to_follow(
    make_recipe, tmp_path, tiny_teacher_dir, tiny_model, tiny_tokenizer
):
    """A document that was cut short has a probability of what followed, but no token; without EOS there is neither."""
    recipe = make_recipe(
        sequences='long_documents = "truncate"\nmax_length = 16', corpus="max_documents = 2"
    )
    build(load_recipe(recipe), tmp_path, tmp_path / "cut")
    found = alternatives(tmp_path / "cut", 0, 15, teacher_path=tiny_teacher_dir)
    assert (found.following, found.rank) == (None, None)
    assert f"{found.following_probability:.4f}  what really followed; " in describe_position(found)
    assert "(not known)" in describe_row(tmp_path / "cut", 0, teacher_path=tiny_teacher_dir)

    teacher = tmp_path / "without-eos"
    shutil.copytree(tiny_teacher_dir, teacher)
    settings = json.loads((teacher / "tokenizer_config.json").read_text())
    settings["eos_token"] = None
    (teacher / "tokenizer_config.json").write_text(json.dumps(settings))
    recipe = make_recipe(teacher=teacher, corpus="max_documents = 1")
    build(load_recipe(recipe), tmp_path, tmp_path / "no-eos")
    last = len(stored_rows(tmp_path / "no-eos")[0]["input_ids"]) - 1
    found = alternatives(tmp_path / "no-eos", 0, last, teacher_path=teacher)
    assert found.following is None
    assert np.isnan(found.following_probability)
    assert "followed;" not in describe_position(found)


@pytest.mark.parametrize("position", [-1, 64, 999])
def test_a_position_that_is_not_there_is_refused(built, tiny_teacher_dir, position):
    length = len(stored_rows(built)[0]["input_ids"])
    with pytest.raises(ValueError, match=rf"row 0 has positions 0 to {length - 1}, not {position}"):
        alternatives(built, 0, position, teacher_path=tiny_teacher_dir)


def test_a_row_of_a_damaged_page_is_refused_in_a_line(built, tiny_teacher_dir, tmp_path):
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    path = sorted((copy / "data").glob("*.parquet"))[0]
    content = bytearray(path.read_bytes())
    text = pq.read_metadata(path).row_group(0).column(2)
    content[text.data_page_offset + text.total_compressed_size - 9] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read \(.*CRC.*; fetch or build") as caught:  # fmt: skip
        describe_row(copy, 0, teacher_path=tiny_teacher_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_every_token_is_spelled_without_a_replacement_character(maker):
    tokenizer = maker()
    for token in range(len(tokenizer)):
        assert "\ufffd" not in spell_token(tokenizer, token)


def test_spelling_by_example(tiny_tokenizer):
    llama = next(maker for maker in MAKERS if maker.__name__ == "llama_metaspace")()
    for tokenizer, text, expected in (
        (tiny_tokenizer, " the", [" the"]),
        (tiny_tokenizer, "é\n", ["é", "\n"]),
        (tiny_tokenizer, "Ω", ["<0xCE>", "<0xA9>"]),
        (tiny_tokenizer, "\ufffd", ["<0xEF>", "<0xBF>", "<0xBD>"]),
        (llama, "é", [" ", "<0xC3>", "<0xA9>"]),
        (llama, "the dog", [" the", " d", "o", "g"]),
    ):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert [spell_token(tokenizer, token) for token in ids] == expected
    assert spell_token(tiny_tokenizer, TINY_VOCAB_SIZE - 1) == f"<id {TINY_VOCAB_SIZE - 1}>"
    assert spell_token(tiny_tokenizer, tiny_tokenizer.eos_token_id) == "<eos>"


def test_a_context_that_ends_inside_a_character_shows_its_bytes(
    make_recipe, tmp_path, corpus_file, tiny_teacher_dir, tiny_tokenizer
):
    corpus_file.write_text('{"id": "a", "text": "a \\ufffd and Ω"}\n')
    build(load_recipe(make_recipe()), tmp_path, tmp_path / "out")
    length = len(stored_rows(tmp_path / "out")[0]["input_ids"])
    contexts = [
        alternatives(tmp_path / "out", 0, position, teacher_path=tiny_teacher_dir).context
        for position in (length - 2, length - 1)
    ]
    assert contexts == ["a \ufffd and <0xCE>", "a \ufffd and Ω"]


def test_a_text_with_ids_that_are_no_tokens_is_spelled(tiny_tokenizer):
    """A teacher whose logits are padded may write them, in the middle of a character, too."""
    ids = tiny_tokenizer.encode("Hi é", add_special_tokens=False)
    beyond = len(tiny_tokenizer) + 5
    spelled = info._spell(tiny_tokenizer, [*ids[:-1], beyond, beyond + 1, ids[-1]])
    assert f"<id {beyond}><id {beyond + 1}>" in spelled
    assert spelled.startswith("Hi")
    assert info._spell(tiny_tokenizer, [beyond]) == f"<id {beyond}>"
