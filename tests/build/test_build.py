"""End to end with the tiny teacher: rows are right, resume is exact, and nothing depends on how the work was cut."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from builder.build.build import build
from builder.build.worker import Worker
from builder.dataset.manifest import read_manifest
from builder.recipe.file import load_recipe
from builder.text.files import TextFiles
from logit_dataset.schema import Layout, arrow_schema
from tests.conftest import sample_documents, write_jsonl


def run(recipe: Path, output: Path, **options: object):
    return build(load_recipe(recipe), recipe.parent, output, **options)


def data_bytes(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "data").glob("*.parquet"))}


def read_rows(output: Path) -> list[dict]:
    return [
        row
        for path in sorted((output / "data").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def float64_reference(model, ids: list[int], next_token: int, top_k: int) -> dict[str, np.ndarray]:
    """Every column of one row, written for clarity: the whole model on this sequence alone, then float64 throughout."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    logsumexp = np.log(np.exp(shifted).sum(-1)) + logits.max(-1)
    logprobs = logits - logsumexp[:, None]
    order = np.argsort(-logprobs, axis=-1, kind="stable")
    top, rest = order[:, :top_k], order[:, top_k:]
    probs = np.exp(logprobs)
    targets = np.array([*ids[1:], next_token])
    return {
        "topk_indices": top,
        "topk_logprobs": np.take_along_axis(logprobs, top, -1),
        "tail_logprob": np.log(np.take_along_axis(probs, rest, -1).sum(-1)),
        "target_logprob": logprobs[np.arange(len(ids)), targets],
        "logsumexp": logsumexp,
        "entropy": -(probs * logprobs).sum(-1),
    }


def test_every_column_of_every_row_equals_the_float64_reference(built, tiny_model, tiny_tokenizer):
    rows = read_rows(built)
    assert len(rows) > 40
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        continues = following and following["id"] == row["id"]
        next_token = following["input_ids"][0] if continues else tiny_tokenizer.eos_token_id
        expected = float64_reference(tiny_model, row["input_ids"], next_token, top_k=20)
        for name, values in expected.items():
            stored = np.array(row[name], dtype=np.float64)
            assert stored.shape == values.shape, name
            if name == "topk_indices":
                by_rank = np.take_along_axis(
                    expected["topk_logprobs"], np.argsort(stored, -1), -1
                ) - np.take_along_axis(expected["topk_logprobs"], np.argsort(values, -1), -1)
                assert np.array_equal(stored, values) or np.abs(by_rank).max() < 1e-5
            else:
                tolerance = (
                    2e-3
                    if name == "logsumexp"
                    else 2e-3 + np.spacing(np.abs(values).astype(np.float16)) / 2
                )
                assert (np.abs(stored - values) <= tolerance).all(), name


def test_texts_of_a_document_join_to_the_document(built, tiny_tokenizer):
    texts: dict[str, str] = {}
    for row in read_rows(built):
        assert tiny_tokenizer.decode(row["input_ids"]) == row["text"]
        texts[row["id"]] = texts.get(row["id"], "") + row["text"]
    assert texts == {d["id"]: d["text"] for d in sample_documents()}


def test_files_have_the_declared_schema_and_the_manifest_their_totals(built):
    manifest = read_manifest(built)
    files = sorted((built / "data").glob("*.parquet"))
    assert len(files) == len(manifest["shards"]) > 3
    rows = read_rows(built)
    for path in files:
        assert pq.read_schema(path).equals(arrow_schema(Layout(tail_samples=4)))
    totals = manifest["totals"]
    assert totals["rows"] == len(rows)
    assert totals["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert totals["documents"] == 24
    nll = -np.concatenate([row["target_logprob"] for row in rows]).astype(float)
    assert totals["teacher_perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-3)
    mass = np.exp(np.concatenate([row["topk_logprobs"] for row in rows]).astype(float)).sum(-1)
    assert totals["mean_topk_mass"] == pytest.approx(mass.mean(), abs=1e-4)
    assert not (built / ".build").exists()


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_stopping_and_going_on_gives_the_same_bytes(make_recipe, tmp_path, stop_after):
    recipe = make_recipe()
    run(recipe, tmp_path / "whole")
    while run(recipe, tmp_path / "parts", max_shards=stop_after).status == "stopped early":
        assert not (tmp_path / "parts" / "manifest.json").exists()
    assert data_bytes(tmp_path / "parts") == data_bytes(tmp_path / "whole")
    assert len(data_bytes(tmp_path / "whole")) > 4


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_partitions_and_many_files_lose_and_repeat_nothing(make_recipe, tmp_path, suffix):
    documents = sample_documents(30)
    for part in range(5):
        rows = documents[part * 6 : part * 6 + 6]
        if suffix == "jsonl":
            write_jsonl(tmp_path / f"part-{part}.jsonl", rows)
        else:
            import pyarrow as pa

            pq.write_table(
                pa.Table.from_pylist(rows), tmp_path / f"part-{part}.parquet", row_group_size=2
            )
    recipe = make_recipe(files=f"part-*.{suffix}", output="partitions = 2")
    run(recipe, tmp_path / "whole")
    while run(recipe, tmp_path / "parts", max_shards=1).status == "stopped early":
        pass
    assert data_bytes(tmp_path / "parts") == data_bytes(tmp_path / "whole")
    firsts = [row["id"] for row in read_rows(tmp_path / "whole") if row["chunk_index"] == 0]
    assert firsts == [d["id"] for d in documents]


def test_resuming_opens_only_the_file_in_which_it_stopped(make_recipe, tmp_path, monkeypatch):
    for part in range(6):
        write_jsonl(tmp_path / f"part-{part}.jsonl", sample_documents(30)[part * 5 : part * 5 + 5])
    recipe = make_recipe(files="part-*.jsonl")
    run(recipe, tmp_path / "out", max_shards=5)
    last = max((tmp_path / "out" / ".build" / "records").iterdir())
    stopped_in = json.loads(last.read_text())["offset_after"]["file"]
    assert stopped_in >= 2
    opened, original = [], TextFiles.rows

    def spy(self, file):
        opened.append(self.files[file].name)
        return original(self, file)

    monkeypatch.setattr(TextFiles, "rows", spy)
    run(recipe, tmp_path / "out")
    assert opened == [f"part-{i}.jsonl" for i in range(stopped_in, 6)]


@pytest.mark.parametrize(
    ("limit", "expected_documents"), [("max_documents = 7", 7), ("max_tokens = 900", None)]
)
def test_limits(make_recipe, tmp_path, limit, expected_documents):
    run(make_recipe(corpus=limit), tmp_path / "out")
    totals = read_manifest(tmp_path / "out")["totals"]
    if expected_documents:
        assert totals["documents"] == expected_documents
    else:
        assert 900 <= totals["tokens"] < 900 + 400  # the document that reaches it is kept whole


def test_a_finished_build_is_left_alone_and_another_recipe_refused(make_recipe, tmp_path):
    recipe = make_recipe()
    assert run(recipe, tmp_path / "out").status == "complete"
    before = data_bytes(tmp_path / "out")
    assert run(recipe, tmp_path / "out").status == "already complete"
    assert data_bytes(tmp_path / "out") == before
    with pytest.raises(ValueError, match=r"another recipe \(output\.top_k: 20 → 10\)"):
        run(make_recipe(output="top_k = 10"), tmp_path / "out")


def test_a_finished_build_of_other_files_is_refused_and_of_missing_ones_is_finished(
    make_recipe, tmp_path, corpus_file
):
    recipe = make_recipe()
    run(recipe, tmp_path / "out")
    write_jsonl(corpus_file, sample_documents(25))
    with pytest.raises(ValueError, match=r"another recipe \(corpus\.files"):
        run(recipe, tmp_path / "out")
    corpus_file.unlink()
    assert run(recipe, tmp_path / "out").status == "already complete"


def test_tokens_of_finished_shards_are_told_apart_from_new_ones(make_recipe, tmp_path):
    recipe, new, found = make_recipe(), [], []
    run(recipe, tmp_path / "out", max_shards=2, progress=new.append)
    before = sum(new)
    assert before > 0
    new.clear()
    run(recipe, tmp_path / "out", progress=new.append, found=found.append)
    assert sum(found) == before
    assert sum(found) + sum(new) == read_manifest(tmp_path / "out")["totals"]["tokens"]


def test_a_changed_recipe_or_corpus_is_refused_with_the_fields(make_recipe, tmp_path, corpus_file):
    run(make_recipe(), tmp_path / "out", max_shards=1)
    with pytest.raises(ValueError, match=r"recipe\.sequences\.batch_tokens: 256 → 128"):
        run(make_recipe(sequences="batch_tokens = 128"), tmp_path / "out")
    write_jsonl(corpus_file, sample_documents(25))
    with pytest.raises(ValueError, match=r"another plan \(corpus\.files"):
        run(make_recipe(), tmp_path / "out")


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_shard_is_named_and_built_again(make_recipe, tmp_path, damage):
    recipe = make_recipe()
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "out", max_shards=4)
    victim = tmp_path / "out" / "data" / "train-000-00001.parquet"
    content = bytearray(victim.read_bytes())
    if damage == "delete":
        victim.unlink()
    elif damage == "truncate":
        victim.write_bytes(content[:-100])
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    notices: list[str] = []
    run(recipe, tmp_path / "out", notice=notices.append)
    assert len(notices) == 1
    assert "data/train-000-00001.parquet" in notices[0]
    assert "building it again" in notices[0]
    assert data_bytes(tmp_path / "out") == data_bytes(tmp_path / "whole")


def test_blank_documents_are_skipped_and_counted(make_recipe, tmp_path, corpus_file):
    rows = [
        {"id": str(i), "text": text}
        for i, text in enumerate([None, "a b", "", "  \n\t", "c d", None])
    ]
    write_jsonl(corpus_file, rows)
    run(make_recipe(), tmp_path / "out")
    totals = read_manifest(tmp_path / "out")["totals"]
    assert (totals["documents"], totals["documents_skipped"]) == (2, 4)
    assert [row["id"] for row in read_rows(tmp_path / "out")] == ["1", "4"]


def test_values_do_not_depend_on_the_other_documents(make_recipe, tmp_path, corpus_file, built):
    alone = sample_documents()[13]
    write_jsonl(corpus_file, [alone])
    run(make_recipe(), tmp_path / "out")
    together = [row for row in read_rows(built) if row["id"] == alone["id"]]
    assert len(together) > 1
    for row, other in zip(read_rows(tmp_path / "out"), together, strict=True):
        assert row["input_ids"] == other["input_ids"]
        for name in ("topk_logprobs", "target_logprob", "entropy", "logsumexp", "tail_logprob"):
            np.testing.assert_allclose(row[name], other[name], atol=8e-3, rtol=0)


def test_text_can_be_left_out(make_recipe, tmp_path):
    run(make_recipe(output="text = false"), tmp_path / "out")
    path = tmp_path / "out" / "data" / "train-000-00000.parquet"
    assert pq.read_schema(path).equals(arrow_schema(Layout(tail_samples=4, text=False)))
    assert "name: text\n" not in (tmp_path / "out" / "README.md").read_text()


def test_a_nan_names_the_document_and_leaves_no_shard(
    make_recipe, tmp_path, tiny_teacher_dir, tiny_tokenizer, corpus_file, monkeypatch
):
    """As where activations overflow; weights that are NaN themselves are refused when they are loaded."""
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr("builder.checkpoint.arrival.check_values", lambda _: None)
    teacher = tmp_path / "nan-teacher"
    shutil.copytree(tiny_teacher_dir, teacher)
    weights = load_file(teacher / "model.safetensors")
    token = tiny_tokenizer.encode("!")[0]
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    write_jsonl(
        corpus_file, [{"id": "fine", "text": "all is well"}, {"id": "sick", "text": "no! not"}]
    )
    with pytest.raises(ValueError, match="NaN or infinity for document 'sick'"):
        run(make_recipe(teacher=teacher), tmp_path / "out")
    assert not list((tmp_path / "out" / "data").iterdir())


def test_a_shard_that_does_not_follow_the_one_before_is_refused(make_recipe, tmp_path):
    """As where that was built again on other hardware, and ends at another document."""
    recipe, output = make_recipe(), tmp_path / "out"
    assert run(recipe, output, max_shards=2).status == "stopped early"
    path = output / ".build" / "records" / "000-00001.json"
    record = json.loads(path.read_text())
    assert record["offset_before"]["documents"] > 0
    record["offset_before"]["documents"] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="does not start where the shard before it ends"):  # fmt: skip
        run(recipe, output)


def test_a_shard_that_is_not_in_the_directory_does_not_count(make_recipe, tmp_path, monkeypatch):
    """As that of a worker on another machine whose --output is another one."""
    shard = Worker.shard

    def elsewhere(self, output, task):
        record = shard(self, output, task)
        (output / record.file).rename(tmp_path / "elsewhere.parquet")
        return record

    monkeypatch.setattr(Worker, "shard", elsewhere)
    with pytest.raises(ValueError, match=r"train-000-00000\.parquet, but in .* it is not there; --output must"):  # fmt: skip
        run(make_recipe(), tmp_path / "out")
    assert not list((tmp_path / "out" / ".build" / "records").iterdir())


def test_a_build_does_not_go_on_under_another_schema(make_recipe, tmp_path, monkeypatch):
    recipe, output = make_recipe(), tmp_path / "out"
    run(recipe, output, max_shards=1)
    monkeypatch.setattr("builder.build.build.SCHEMA_VERSION", "1.99.0")
    with pytest.raises(ValueError, match=r"another plan \(schema_version: .* → \"1\.99\.0\"\)"):
        run(recipe, output)
