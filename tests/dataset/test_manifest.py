"""The record of a build: round trips, totals, and refusal of what is damaged or hostile."""

import json
import math
import os
from dataclasses import asdict
from typing import Any

import pytest

from builder.dataset.identity import fingerprint
from builder.dataset.manifest import (
    FILE_NAME,
    LIBRARIES,
    ShardRecord,
    Sums,
    environment,
    make_manifest,
    read_manifest,
    records_of,
    write_json,
)
from builder.recipe.recipe import Recipe
from builder.recipe.sections import CorpusRecipe, TeacherRecipe
from logit_dataset.schema import SCHEMA_VERSION

CPU, GPU = {"device": "x86_64 CPU", "threads": 2}, {"device": "H100", "threads": 8}


def record(index: int, partition: int = 0, **changes: Any) -> ShardRecord:
    values: dict[str, Any] = {
        "file": f"data/train-{partition:03d}-{index:05d}.parquet",
        "sha256": "0" * 64,
        "bytes": 1000 + index,
        "rows": 3,
        "tokens": 10,
        "partition": partition,
        "index": index,
        "offset_after": {"file": 0, "row": 5, "documents": 2 * index + 2, "skipped": index},
        "exhausted": False,
        "sums": Sums(entropy=20.0, topk_mass=9.0, target_nll=27.0, targets=9),
        "halved_batches": 0,
        "seconds": 0.5,
        "environment": CPU,
    }
    return ShardRecord(**(values | changes))


RECIPE = Recipe(
    name="x",
    corpus=CorpusRecipe(embedded="python-docs"),
    teacher=TeacherRecipe(embedded="smollm2-135m-instruct", attention="sdpa"),
)
PLAN = {
    "recipe": RECIPE.published(),
    "corpus": {"name": "corpus", "sha256": "c"},
    "teacher": {"name": "teacher", "sha256": "t"},
}
TEACHER = {
    "architecture": "LlamaForCausalLM",
    "parameters": 9,
    "dtype": "bfloat16",
    "attention": "sdpa",
    "vocab_size": 77,
    "hidden_size": 4,
    "tokenizer_vocab_size": 70,
    "tokenizer_sha256": "0" * 64,
    "eos_token_id": 0,
    "prefix_ids": [],
    "suffix_ids": [],
}
RECORDS = [record(0), record(1, environment=GPU), record(0, 1), record(1, 1, environment=GPU)]


def test_a_record_survives_json():
    for original in RECORDS:
        assert ShardRecord.from_json(json.loads(json.dumps(asdict(original)))) == original


def test_a_manifest_holds_every_record_and_each_environment_once(tmp_path):
    manifest = make_manifest(PLAN, TEACHER, RECORDS)
    write_json(tmp_path / FILE_NAME, manifest)
    read = read_manifest(tmp_path)
    assert read == manifest
    assert records_of(read) == RECORDS
    assert read["environments"] == [CPU, GPU]
    assert [shard["environment"] for shard in read["shards"]] == [0, 1, 0, 1]
    assert read["schema_version"] == SCHEMA_VERSION
    assert read["fingerprint"] == fingerprint(PLAN)
    assert read["teacher"] == {"name": "teacher", "sha256": "t", **TEACHER}
    assert Recipe.model_validate_json(json.dumps(read["recipe"])) == RECIPE


def test_totals():
    totals = make_manifest(PLAN, {}, RECORDS)["totals"]
    assert totals == {
        "documents": 4
        + 4,  # of the last position of each partition, which counts from its beginning
        "documents_skipped": 1 + 1,
        "rows": 12,
        "tokens": 40,
        "bytes": 4002,
        "bytes_per_token": 100.05,
        "mean_entropy": 2.0,
        "mean_topk_mass": 0.9,
        "mean_target_nll": 3.0,
        "teacher_perplexity": round(math.exp(3), 3),
        "seconds": 2.0,
        "tokens_per_second": 20.0,
    }


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        ({"sums": Sums(target_nll=65504.0, targets=1)}, "teacher_perplexity", None),
        ({"sums": Sums()}, "mean_target_nll", None),
        ({"sums": Sums()}, "teacher_perplexity", None),
    ],
)
def test_totals_that_do_not_exist_are_null(changes, key, expected):
    """A perplexity beyond float64, and the loss of no target at all."""
    totals = make_manifest(PLAN, {}, [record(0, **changes)])["totals"]
    assert totals[key] == expected
    json.dumps(totals, allow_nan=False)


def test_sums_add_up():
    one = Sums(entropy=1.0, topk_mass=2.0, target_nll=3.0, targets=4)
    assert one + one + Sums() == Sums(entropy=2.0, topk_mass=4.0, target_nll=6.0, targets=8)


@pytest.mark.parametrize(
    "name",
    [
        *["../x.parquet", "data/../x.parquet", "data/../../x.parquet", "/data/x.parquet", "x.parquet"],
        *["data/x.json", "data/a/x.parquet", "data\\x.parquet", "data/\\..\\x.parquet", "data//x.parquet"],
        *["data/.x.parquet", "data/.parquet", "data/-x.parquet", "./data/x.parquet", "DATA/x.parquet"],
        *["data/x.parquet\n", "data/x\0.parquet", "data/x.parquet/", "data/ .parquet", "C:data/x.parquet"],
        *["", 5, None, ["data/x.parquet"], "https://example.org/data/x.parquet", "data/ä.parquet"],
    ],
    ids=repr,
)  # fmt: skip
def test_file_names_that_lead_out_of_the_dataset_are_refused(name):
    manifest = make_manifest(PLAN, {}, RECORDS)
    manifest["shards"][1]["file"] = name
    with pytest.raises(ValueError, match=r"shard record names .*, expected data/\*\.parquet"):
        records_of(manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shard: shard.pop("sums"), r"not a shard record: no 'shards\[0\]\.sums'"),
        (lambda shard: shard["sums"].pop("entropy"), r"no 'shards\[0\]\.sums\.entropy'"),
        (lambda shard: shard.pop("rows"), r"no 'shards\[0\]\.rows'"),
        (
            lambda shard: shard.update(rows="3"),
            r'shards\[0\]\.rows: expected a whole number, found "3"',
        ),
        (
            lambda shard: shard.update(environment=2),
            r"shards\[0\]\.environment is 2, expected a pl",
        ),
        (lambda shard: shard.update(environment="x"), r"\.environment is 'x', expected a place"),
        (lambda shard: shard.update(environment=True), r"\.environment is True, expected a place"),
        (lambda shard: shard.pop("environment"), r"\.environment is None, expected a place"),
    ],
)
def test_damaged_records_are_refused(change, message):
    manifest = json.loads(json.dumps(make_manifest(PLAN, {}, RECORDS)))
    change(manifest["shards"][0])
    with pytest.raises(ValueError, match=message):
        records_of(manifest)


def test_what_a_later_version_adds_to_a_record_is_left_out():
    manifest = json.loads(json.dumps(make_manifest(PLAN, {}, RECORDS)))
    manifest["shards"][0] |= {"more": 1}
    manifest["shards"][0]["sums"] |= {"more": 1}
    assert records_of(manifest) == RECORDS


GOOD = make_manifest(PLAN, TEACHER, RECORDS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"is damaged \(Expecting value.*\); fetch or build the dataset again"),
        ("[]", "is damaged"),
        ("{}", r"is damaged \(no 'schema_version'\)"),
        (json.dumps({"schema_version": SCHEMA_VERSION}), r"is damaged \(no 'fingerprint'\)"),
        (json.dumps(GOOD | {"shards": []}), r"is damaged \(no shards\)"),
        (json.dumps(GOOD | {"totals": {}}), r"is damaged \(no 'totals\.documents'\)"),
        (
            json.dumps(GOOD | {"schema_version": "2.0.0"}),
            "has schema version 2.0.0, but this program",
        ),
        (
            json.dumps(GOOD | {"schema_version": 2}),
            "has schema version 2, but this program reads 1",
        ),
        (json.dumps(GOOD)[:-9], "is damaged"),
        ("[" * 100_000 + "]" * 100_000, r"is damaged \(its values are nested too deeply\)"),
        (json.dumps(GOOD | {"new": "\ud800"}), r"is damaged \(it holds half of a surrogate pair"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, content, message):
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(ValueError, match=rf"manifest\.json {message}"):
        read_manifest(tmp_path)


def test_a_later_minor_version_is_read(tmp_path):
    major = SCHEMA_VERSION.split(".")[0]
    write_json(tmp_path / FILE_NAME, GOOD | {"schema_version": f"{major}.99.0", "new": 1})
    assert read_manifest(tmp_path)["totals"] == GOOD["totals"]


def test_a_directory_without_a_manifest_says_what_it_is(tmp_path):
    with pytest.raises(ValueError, match=r"has no manifest\.json: it is not a logit dataset"):
        read_manifest(tmp_path)
    (tmp_path / ".build").mkdir()
    with pytest.raises(
        ValueError, match="an unfinished build; run the same build command to resume"
    ):
        read_manifest(tmp_path)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "x.json", {"a": "ü"})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": 1, "b": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": "ü"}
    write_json(tmp_path / "x.json", [1])
    assert json.loads((tmp_path / "x.json").read_text()) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_the_environment_names_libraries_and_hardware_but_no_host_or_user():
    found = environment("cpu")
    assert set(found) == {"device", "threads", "python", *LIBRARIES}
    assert found["device"].endswith(" CPU")
    assert os.uname().nodename not in json.dumps(found).split('"')
