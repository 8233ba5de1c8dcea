"""A hold-out from the recipe to the trainers: the same documents whatever interrupts or divides the build, in files of their own."""

import copy
import random
import re
import shutil
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset
from torch.utils.data import DataLoader

from builder.dataset.manifest import read_manifest, records_of
from builder.sources.holdout import document_of, split_of
from logit_dataset import LogitCollator, load_logits
from logit_dataset.schema import SPLITS, TRAIN, VALIDATION
from tests.build.test_build import data_bytes, run
from tests.chats import chatty_teacher, sample_chats
from tests.conftest import recipe_text, sample_documents, write_jsonl
from tests.end_to_end.test_kill import Killer, check_kept, finished_shards
from tests.end_to_end.test_outbox import assert_delivered
from tests.hub.test_publish import LICENSED, assert_published, dataset_files
from tests.verify.forging import lie, read_json, refit, rows_of, write_rows

SHARE = 0.25
PARTITIONS = 2


def split(document_id: str, seed: int = 0) -> str:
    return split_of(document_id, share=SHARE, seed=seed)


LONG = next(f"long-{i}" for i in range(100) if split(f"long-{i}") == VALIDATION)
"""A held-out document that goes on in several shards."""
DOCUMENTS = [
    *sample_documents(60),
    {"id": LONG, "text": "The quick brown fox jumps over the lazy dog. " * 40},
    *[{**document, "id": f"more-{i}"} for i, document in enumerate(sample_documents(60))],
    {"id": "blank", "text": " "},
]


def write_recipe(base: Path, teacher_dir: Path, **changes: str) -> Path:
    """Two partitions of several shards each."""
    base.mkdir(exist_ok=True)
    for part in range(PARTITIONS):
        write_jsonl(base / f"part-{part}.jsonl", DOCUMENTS[part::PARTITIONS])
    output = f"shard_tokens = 200\npartitions = {PARTITIONS}\nvalidation = {SHARE}"
    sections = {**LICENSED, "output": output, **changes}
    (base / "recipe.toml").write_text(recipe_text(teacher_dir, "part-*.jsonl", **sections))
    return base / "recipe.toml"


@pytest.fixture(scope="module")
def recipe(tiny_teacher_dir, tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny_teacher_dir)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """Read only: copy before changing anything."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run(recipe, output)
    return output


@pytest.fixture
def out(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def by_split(output: Path) -> dict[str, set[str]]:
    """The ids that stock `load_dataset` finds."""
    return {split: set(load_dataset(str(output), split=split)["id"]) for split in SPLITS}


def expected(documents=DOCUMENTS) -> dict[str, set[str]]:
    ids = [d["id"] for d in documents if d["text"].strip()]
    return {name: {i for i in ids if split(i) == name} for name in SPLITS}


def problems(cli, output: Path) -> str:
    status, out, err = cli("verify", output)
    assert status == 1, out
    return out + err


def test_each_split_holds_the_documents_that_their_ids_say(cli, whole):
    assert by_split(whole) == expected()
    assert 15 < len(expected()[VALIDATION]) < 45
    status, out, err = cli("verify", whole)
    assert (status, err) == (0, ""), out + err
    totals = read_manifest(whole)["totals"]
    for name in SPLITS:
        rows = load_dataset(str(whole), split=name)
        found = totals["splits"][name]
        assert found["rows"] == len(rows)
        assert found["tokens"] == sum(map(len, rows["input_ids"]))
        assert found["documents"] == len(expected()[name])
        assert found["bytes"] == sum(p.stat().st_size for p in whole.glob(f"data/{name}-*.parquet"))
    assert (totals["documents"], totals["documents_skipped"]) == (len(DOCUMENTS) - 1, 1)
    long = [r for r in records_of(read_manifest(whole)) if r.ends_within == (LONG, r.index) or r.begins_within]  # fmt: skip
    assert {record.split for record in long} == {VALIDATION}
    card = yaml.safe_load((whole / "README.md").read_text().split("---\n")[1])
    assert [s["name"] for s in card["dataset_info"]["splits"]] == list(SPLITS)


def test_the_card_says_what_is_in_each_split(whole):
    text = (whole / "README.md").read_text()
    found = read_manifest(whole)["totals"]["splits"][VALIDATION]
    assert f"| in `validation` | {found['tokens']:,} tokens in {found['rows']:,} rows" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"output": f"shard_tokens = 1000\nvalidation = {SHARE}"},
        {"output": f"shard_tokens = 200\npartitions = {PARTITIONS}\nvalidation = {SHARE}", "sequences": "max_length = 32"},
    ],
)  # fmt: skip
def test_shards_partitions_and_lengths_do_not_decide_it(changes, tiny_teacher_dir, tmp_path):
    run(write_recipe(tmp_path, tiny_teacher_dir, **changes), tmp_path / "out")
    assert by_split(tmp_path / "out") == expected()


def test_another_seed_holds_out_other_documents_and_a_larger_share_more():
    ids = [document["id"] for document in DOCUMENTS]
    held_out = {i for i in ids if split(i) == VALIDATION}
    assert {i for i in ids if split(i, seed=1) == VALIDATION} != held_out
    assert {i for i in ids if split_of(i, share=0.4, seed=0) == VALIDATION} > held_out
    many = [split_of(str(i), share=0.01, seed=3) for i in range(100_000)]
    assert 850 < many.count(VALIDATION) < 1150


def test_kills_at_random_moments_change_no_byte(recipe, whole, tmp_path):
    killer, rng, kills, attempt = Killer(), random.Random(5), 0, 0
    try:
        duration = killer.build(recipe, tmp_path / "timed")["seconds"]
        while kills < 6:
            output, patience, answer = tmp_path / f"attempt-{attempt}", 1.0, {"killed": True}
            while answer["killed"]:
                before = finished_shards(output)
                moment = rng.uniform(0.1, 0.9 * duration * patience)
                answer = killer.build(recipe, output, after_seconds=moment)
                check_kept(before, output)
                kills += answer["killed"]
                patience *= 1.15
            assert answer["status"] == 0
            assert data_bytes(output) == data_bytes(whole)
            splits = read_manifest(output)["totals"]["splits"]
            assert splits == read_manifest(whole)["totals"]["splits"]
            attempt += 1
    finally:
        killer.process.stdin.close()
        killer.process.wait(timeout=30)


def test_two_workers_make_the_files_of_one(recipe, whole, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from builder.build.task import Pool

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "out"
    run(recipe, output, max_shards=2)
    run(recipe, output, pool=Pool(workers=2))
    assert data_bytes(output) == data_bytes(whole)


def test_limits_are_shared_by_the_splits(tiny_teacher_dir, tmp_path, cli):
    recipe = write_recipe(
        tmp_path,
        tiny_teacher_dir,
        corpus='license = "mit"\nmax_documents = 40',
        output=f"validation = {SHARE}",
    )
    run(recipe, tmp_path / "out")
    found = by_split(tmp_path / "out")
    assert (len(found[TRAIN]), len(found[VALIDATION])) == (30, 10)
    assert all(found[name] <= expected()[name] for name in SPLITS)
    assert cli("verify", tmp_path / "out")[0] == 0
    recipe = write_recipe(
        tmp_path,
        tiny_teacher_dir,
        corpus='license = "mit"\nmax_tokens = 2000',
        output=f"validation = {SHARE}\nshard_tokens = 300",
    )
    run(recipe, tmp_path / "tokens")
    totals = read_manifest(tmp_path / "tokens")["totals"]["splits"]
    longest = 2100  # one document beyond the limit, at most
    assert 1500 <= totals[TRAIN]["tokens"] < 1500 + longest
    assert 500 <= totals[VALIDATION]["tokens"] < 500 + longest


@pytest.mark.parametrize(
    ("output", "corpus", "message"),
    [
        ("validation = 0.5", "", "output.validation: expected less than 0.5 (found 0.5)"),
        ("validation = 0", "", "output.validation: expected more than 0 (found 0)"),
        ("validation = -0.1", "", "output.validation: expected more than 0 (found -0.1)"),
        ('validation = "1%"', "", 'output.validation: expected a number (found "1%")'),
        ("validation = 0.01", "max_documents = 20", "output.validation = 0.01 of the corpus's limit is 0, which leaves nothing to hold out; choose a larger max_documents or max_tokens, or leave out validation"),
        ("validation = 0.1\npartitions = 4", "max_documents = 30", "output.partitions is 4, but the corpus's limit of the split validation is smaller; choose fewer partitions"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(cli, make_recipe, tmp_path, output, corpus, message):
    recipe = make_recipe(output=output, corpus=f'files = ["corpus.jsonl"]\n{corpus}')
    status, _, err = cli("build", recipe, "--output", tmp_path / "out")
    assert status == 1
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_corpus_that_is_too_small_is_refused_before_the_rest_is_computed(
    cli, make_recipe, tmp_path
):
    recipe = make_recipe(output="validation = 0.001\nshard_tokens = 300")
    status, _, err = cli("build", recipe, "--output", tmp_path / "out")
    assert status == 1
    assert (
        "output.validation = 0.001 holds out no document of the corpus, which is too small" in err
    )
    assert not list((tmp_path / "out" / "data").iterdir())


def test_a_partition_may_hold_nothing_out(cli, make_recipe, tmp_path):
    held_out = [d for d in sample_documents(60) if split(d["id"]) == VALIDATION]
    rest = [d for d in sample_documents(60) if split(d["id"]) == TRAIN]
    write_jsonl(tmp_path / "part-0.jsonl", rest[:10])
    write_jsonl(tmp_path / "part-1.jsonl", [*rest[10:20], held_out[0]])
    recipe = make_recipe(
        files="part-*.jsonl", output=f"shard_tokens = 300\npartitions = 2\nvalidation = {SHARE}"
    )
    steps = 0
    # A shard at a time; that there is none in a partition is no shard.
    while (
        "stopped early" in cli("build", recipe, "--output", tmp_path / "out", "--max-shards", 1)[1]
    ):
        assert len(list((tmp_path / "out/data").iterdir())) == (steps := steps + 1)
    assert steps > 3
    status, _, err = cli("build", recipe, "--output", tmp_path / "out")
    assert status == 0, err
    assert by_split(tmp_path / "out")[VALIDATION] == {held_out[0]["id"]}
    assert [p.name for p in sorted((tmp_path / "out/data").glob("val*"))] == [
        "validation-003-00000.parquet"
    ]
    assert cli("verify", tmp_path / "out")[0] == 0
    write_jsonl(tmp_path / "part-0.jsonl", held_out)
    status, _, err = cli("build", recipe, "--output", tmp_path / "other")
    assert status == 1
    assert "the corpus has no document for the split train (" in err


def test_all_turns_of_a_chat_go_together(cli, make_recipe, tmp_path, tiny_tokenizer, tiny_model):
    teacher = chatty_teacher(tiny_tokenizer, tiny_model, tmp_path / "chatty")
    write_jsonl(tmp_path / "chats.jsonl", sample_chats(40))
    recipe = make_recipe(
        files="chats.jsonl",
        teacher=teacher,
        corpus='messages_column = "messages"',
        sequences='max_length = 128\nlearn = "last"',
        output=f"shard_tokens = 300\nvalidation = {SHARE}",
    )
    check_rows(cli, recipe, tmp_path / "out")


def test_all_completions_of_a_prompt_go_together(cli, make_recipe, tmp_path):
    recipe = make_recipe(
        sequences="max_length = 128",
        generation="max_new_tokens = 4\nsamples = 2",
        output=f"shard_tokens = 300\nvalidation = {SHARE}",
    )
    check_rows(cli, recipe, tmp_path / "out")


def check_rows(cli, recipe: Path, output: Path) -> None:
    status, _, err = cli("build", recipe, "--output", output)
    assert status == 0, err
    manifest, found = read_manifest(output)["recipe"], by_split(output)
    documents = {name: {document_of(i, manifest) for i in found[name]} for name in SPLITS}
    assert all(documents.values())
    for name, ids in documents.items():
        assert {split(i) for i in ids} == {name}
        assert len(ids) < len(found[name])  # there are several rows of one
    status, out, err = cli("verify", output)
    assert status == 0, out + err


# --- what is found ---------------------------------------------------------------------------------------------------------


def move(output: Path, source: str, target: str, *, keep: bool = False) -> str:
    """A document of one split, whole in a file, into the last file of another one, and everything else fits."""
    shards = read_json(output)["shards"]
    files = {name: [s["file"] for s in shards if s["split"] == name] for name in SPLITS}
    file, others = files[source][0], rows_of(output, files[target][-1])
    rows = rows_of(output, file)
    moved = [row for row in rows if row["id"] == rows[-1]["id"]]
    assert moved[0]["chunk_index"] == 0
    assert len(moved) < len(rows)
    write_rows(output / files[target][-1], [*others, *moved])
    if not keep:
        write_rows(output / file, rows[: -len(moved)])
    refit(output)
    return moved[0]["id"]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("source", "target"), [SPLITS, SPLITS[::-1]])
def test_a_document_in_the_wrong_split_or_in_both_is_found(cli, out, source, target, keep):
    name = move(out, source, target, keep=keep)
    found = problems(cli, out)
    assert f"'{name}' stands in {target}, but its id is one of {source}" in found


def test_a_file_that_is_listed_in_another_split_is_found(cli, out):
    def change(manifest):
        shard = next(s for s in manifest["shards"] if s["split"] == VALIDATION)
        shard["split"] = TRAIN

    lie(out, change)
    found = problems(cli, out)
    assert "is listed in the split train, but partition 2 is of validation" in found
    assert "whose file is data/train-002-00000.parquet" in found


def test_a_file_of_another_name_is_found(cli, out):
    (out / "data/validation-002-00000.parquet").rename(out / "data/train-002-00000.parquet")
    found = problems(cli, out)
    assert "data/train-002-00000.parquet: is not in the manifest" in found
    assert "data/validation-002-00000.parquet: is missing" in found


def test_another_share_and_missing_totals_are_found(cli, out):
    lie(out, lambda m: m["recipe"]["output"].update(validation=0.4))
    assert "manifest.json: fingerprint is" in problems(cli, out)
    lie(out, lambda m: m["totals"].pop("splits"))
    assert "do not say the same of splits" in problems(cli, out)


# --- readers ---------------------------------------------------------------------------------------------------------------


def test_readers_take_train_unless_they_are_told(whole):
    totals = read_manifest(whole)["totals"]["splits"]
    train, held_out = load_logits(whole), load_logits(whole, split=VALIDATION)
    for data in (train, held_out):
        assert (len(data), data.num_tokens) == (totals[data.split]["rows"], totals[data.split]["tokens"])  # fmt: skip
        assert {group.file.split("-")[0] for group in data.row_groups} == {f"data/{data.split}"}
    with pytest.raises(ValueError, match="has no split 'test', it has train and validation"):
        load_logits(whole, split="test")
    state = held_out.batches(batch_size=2).state_dict()
    with pytest.raises(ValueError, match="split"):
        train.batches(batch_size=2).load_state_dict(state)
    rows = load_dataset(str(whole), split=VALIDATION).with_format("numpy")
    loader = DataLoader(rows, batch_size=4, collate_fn=LogitCollator.of(whole))
    assert sum(int(b["attention_mask"].sum()) for b in loader) == held_out.num_tokens


def test_a_dataset_without_a_hold_out_says_so(built, cli):
    with pytest.raises(ValueError, match="no split 'validation', it has train; a hold-out is made"):
        load_logits(built, split=VALIDATION)
    assert "has no split validation" in cli("info", built, "--row", 0, "--split", VALIDATION)[2]
    assert "splits" not in read_manifest(built)["totals"]


def test_the_distance_to_the_teacher_on_the_hold_out(whole, tiny_model, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from logit_dataset.trainers import DistillationTrainer

    splits = load_dataset(str(whole))
    trainer = DistillationTrainer(
        model=copy.deepcopy(tiny_model),
        args=transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True),
        data_collator=LogitCollator.of(whole),
        train_dataset=splits[TRAIN],
        eval_dataset=splits[VALIDATION],
    )
    assert abs(trainer.evaluate()["eval_kl"]) < 0.01


def test_info_and_view_count_rows_within_a_split(cli, whole, tmp_path, tiny_teacher_dir):
    row = load_dataset(str(whole), split=VALIDATION)[3]
    teacher = ("--teacher", tiny_teacher_dir)
    assert f"row 3: document '{row['id']}'" in cli("info", whole, "--row", 3, "--split", VALIDATION, *teacher)[1]  # fmt: skip
    totals = read_manifest(whole)["totals"]["splits"][VALIDATION]
    assert f"{totals['tokens']:,} tokens in {totals['rows']:,} rows" in cli("info", whole)[1]
    page = tmp_path / "view.html"
    assert cli("view", whole, "--split", VALIDATION, "--output", page, *teacher)[0] == 0
    held_out = set(load_dataset(str(whole), split=VALIDATION)["id"])
    assert any(i in page.read_text() for i in held_out)


@pytest.mark.parametrize("to", ["axolotl", "distillkit"])
def test_exporters_write_both_splits_or_the_one_asked_for(cli, whole, tmp_path, to):
    assert cli("export", whole, "--to", to, "--output", tmp_path / "both")[0] == 0
    both = load_dataset(str(tmp_path / "both"))
    config = (tmp_path / "both/README.md").read_text()
    assert all(f"split: {name}" in config for name in SPLITS)
    yaml.safe_load(config.split("```yaml\n")[1].split("```")[0])
    for name in SPLITS:
        output = tmp_path / name
        assert cli("export", whole, "--to", to, "--output", output, "--split", name)[0] == 0
        alone = load_dataset(str(output))
        assert list(alone) == [name]
        assert alone[name]["input_ids"][:] == both[name]["input_ids"][:]
    if to == "axolotl":
        assert len(both[VALIDATION]) == len(load_logits(whole, split=VALIDATION))


# --- the Hub ---------------------------------------------------------------------------------------------------------------


def test_it_is_published_with_both_splits_and_a_version_without_it_leaves_none(
    hub, client, whole, recipe, tiny_teacher_dir, out, tmp_path
):
    command = ("publish", "org/set", out, "--device", "cpu", "--teacher", tiny_teacher_dir)
    done = client.cli(*command, "--recompute", 2, "--yes")
    assert done.returncode == 0, done.stderr
    assert_published(hub, out, "v1.0.0")
    snippets = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), flags=re.DOTALL)
    assert 'eval_dataset=load_dataset("org/set", revision="v1.0.0", split="validation")' in snippets[-1]  # fmt: skip
    streamed = 'load_logits("org/set", split="validation", streaming=True)'
    fetched = 'load_logits("org/set", split="validation")'
    code = "\n".join(
        [
            *snippets,
            "from logit_dataset import load_logits",
            f"print(len({streamed}), len({fetched}), sum(1 for _ in {streamed}.batches(batch_size=1)))",
        ]
    )
    result = client.python(code)
    assert result.returncode == 0, result.stderr
    rows = len(load_logits(whole, split=VALIDATION))
    assert result.stdout.splitlines()[-1] == f"{rows} {rows} {rows}"
    plain = write_recipe(tmp_path / "plain", tiny_teacher_dir, output="shard_tokens = 2000")
    run(plain, tmp_path / "plain/out")
    done = client.cli("publish", "org/set", tmp_path / "plain/out", "--recompute", 0, "--yes")
    assert done.returncode == 0, done.stderr
    assert not any("validation" in path for path in dataset_files(hub, "v2.0.0"))


def test_shards_of_both_splits_go_to_the_hub_while_they_are_built(
    hub, client, whole, recipe, tmp_path
):
    command = ("build", recipe, "--publish-to", "org/set", "--discard-local", "--device", "cpu")
    stopped = client.cli(*command, "--output", tmp_path / "one", "--max-shards", 12)
    assert stopped.returncode == 0, stopped.stderr
    done = client.cli(*command, "--output", tmp_path / "two")  # another machine
    assert done.returncode == 0, done.stderr
    assert_delivered(hub, whole, tmp_path / "two")
