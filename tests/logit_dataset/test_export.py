"""What other trainers read out of an exported dataset is what ours has, at the place where they look for it."""

import json
import math
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import load_dataset
from transformers import AutoModelForCausalLM

from builder.build.build import build
from builder.recipe.file import load_recipe
from logit_dataset import load_logits
from logit_dataset.export.array_record import example_bytes
from logit_dataset.export.export import export
from tests import loopback_hub as stand_in
from tests.chats import chatty_teacher, sample_chats
from tests.conftest import TRAINING_TEXT, recipe_text, run_cli, write_jsonl

CHATS = {"corpus": 'messages_column = "messages"'}
DATASETS = {
    "drawn": ("top_k = 8\ntail_samples = 8", {}),
    "plain": ("top_k = 8\ntail_samples = 0", {}),
    "chats": ("top_k = 8\ntail_samples = 8", CHATS),
    "kept": ("top_k = 8\ntail_samples = 8\ncompletions_only = true", CHATS),
    "whole": ('top_k = "all"\ntail_samples = 0', {}),
}


@pytest.fixture(scope="module")
def teacher_dir(tiny_tokenizer, tiny_model, tmp_path_factory):
    return chatty_teacher(tiny_tokenizer, tiny_model, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def sources(teacher_dir, tmp_path_factory):
    base, found = tmp_path_factory.mktemp("exported"), {}
    words = " ".join(TRAINING_TEXT).split()
    texts = [{"id": f"d{i}", "text": " ".join(words[i : i + 3 + i * 5 % 30])} for i in range(17)]
    for name, (output, changes) in DATASETS.items():
        write_jsonl(base / "corpus.jsonl", sample_chats(14) if changes else texts)
        text = recipe_text(
            teacher_dir,
            "corpus.jsonl",
            output=f"{output}\nshard_tokens = 300",
            sequences="max_length = 96",
            **changes,
        )
        (base / "recipe.toml").write_text(text)
        build(load_recipe(base / "recipe.toml"), base, base / name)
        found[name] = base / name
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def exported(sources, tmp_path, cache):
    def made(name, to, **options):
        line = export(sources[name], tmp_path / "out", to=to, **options)
        assert f"{load_logits(sources[name]).num_tokens:,} tokens for {to}" in line
        if to == "maxtext":
            return tmp_path / "out"
        return load_dataset(str(tmp_path / "out"), split="train", cache_dir=cache)

    return made


def ours(source):
    """Every row of a dataset as flat arrays, by the reader."""
    for batch in load_logits(source).batches(batch_size=1, seed=None):
        yield {name: values[0].numpy() for name, values in batch.items()}


def assert_distribution(row, t, ids, weights, tail):
    """The listed ids with their probabilities; behind them the draws, with equal shares of the tail."""
    ids, weights = np.array(ids), np.array(weights)
    assert ids.min() >= 0
    assert np.isfinite(weights).all()
    expected = row["topk_logprobs"][t].astype(np.float64)
    assert (ids[:8] == row["topk_indices"][t]).all()
    if tail == "bucket":
        mass = math.exp(row["tail_logprob"][t])
        np.testing.assert_allclose(weights, expected - np.log(np.exp(expected).sum() + mass), atol=1e-5)  # fmt: skip
        assert math.exp(row["tail_logprob"][t]) == pytest.approx(1 - np.exp(weights).sum(), abs=2e-3)  # fmt: skip
        return
    np.testing.assert_allclose(weights[:8], expected, rtol=1e-6)
    assert len(ids) == (16 if tail == "draws" else 8)
    if tail == "draws":
        assert (ids[8:] == row["tail_indices"][t]).all()
        share = float(row["tail_logprob"][t]) - math.log(8)
        np.testing.assert_allclose(weights[8:], share, rtol=1e-5)
        assert np.exp(weights).sum() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "tail"), [("drawn", "draws"), ("drawn", "none"), ("plain", "none"), ("chats", "draws"), ("kept", "draws")]
)  # fmt: skip
def test_axolotl_reads_what_ours_has(exported, sources, name, tail):
    rows = exported(name, "axolotl", tail=tail)
    assert rows.column_names == ["input_ids", "attention_mask", "labels", "position_ids", "target_token_ids", "target_logprobs", "target_mask"]  # fmt: skip
    expected = list(ours(sources[name]))
    assert len(rows) == len(expected)
    learned = 0
    for row, own in zip(rows, expected, strict=True):
        length = len(own["input_ids"])
        assert row["input_ids"] == own["input_ids"].tolist()
        assert row["attention_mask"] == [1] * length
        assert row["position_ids"] == list(range(length))
        assert row["labels"][0] == -100
        for t in range(length):
            is_learned = bool(own["mask"][t]) and t + 1 < length
            assert set(row["target_mask"][t]) == {int(is_learned)}
            if is_learned:
                assert row["labels"][t + 1] == own["input_ids"][t + 1]
                assert_distribution(own, t, row["target_token_ids"][t], row["target_logprobs"][t], tail)  # fmt: skip
                learned += 1
            elif t + 1 < length:
                assert row["labels"][t + 1] == -100
        assert np.isfinite(row["target_logprobs"]).all()
    assert learned > 100


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "tail"), [("drawn", "draws"), ("drawn", "bucket"), ("plain", "none"), ("kept", "draws")])  # fmt: skip
def test_distillkit_reads_what_ours_has(exported, sources, name, tail, packed):
    rows = exported(name, "distillkit", tail=tail, length=128, packed=packed)
    expected = {tuple(own["input_ids"]): own for own in ours(sources[name])}
    seen = 0
    for row in rows:
        assert {len(values) for values in row.values()} == {128}  # rows are stacked as they are
        segments = np.array(row["attention_mask"])
        for segment in range(1, segments.max() + 1):
            where = np.flatnonzero(segments == segment)
            own = expected[tuple(np.array(row["input_ids"])[where])]
            for t, place in enumerate(where):
                is_learned = t > 0 and own["mask"][t]
                assert row["labels"][place] == (own["input_ids"][t] if is_learned else -100)
                if own["mask"][t]:
                    assert_distribution(own, t, row["token_ids"][place], row["top_values"][place], tail)  # fmt: skip
            seen += 1
        assert {row["labels"][place] for place in np.flatnonzero(segments == 0)} <= {-100}
        assert np.isfinite(row["top_values"]).all()
    assert seen == len(list(ours(sources[name])))
    assert packed == (max(max(mask) for mask in rows["attention_mask"]) > 1)


def parse(content):
    """A tf.train.Example, by protobuf itself."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto
    for name, fields in {
        "FloatList": [("value", 1, field.TYPE_FLOAT, None, True)],
        "Int64List": [("value", 1, field.TYPE_INT64, None, True)],
        "Feature": [
            ("float_list", 2, field.TYPE_MESSAGE, ".t.FloatList", False),
            ("int64_list", 3, field.TYPE_MESSAGE, ".t.Int64List", False),
        ],
        "Entry": [
            ("key", 1, field.TYPE_STRING, None, False),
            ("value", 2, field.TYPE_MESSAGE, ".t.Feature", False),
        ],
        "Features": [("feature", 1, field.TYPE_MESSAGE, ".t.Entry", True)],
        "Example": [("features", 1, field.TYPE_MESSAGE, ".t.Features", False)],
    }.items():
        message = file.message_type.add(name=name)
        for title, number, kind, type_name, repeated in fields:
            message.field.add(
                name=title,
                number=number,
                type=kind,
                type_name=type_name,
                label=field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    example = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))()
    example.ParseFromString(content)
    return {
        entry.key: np.array(entry.value.float_list.value or entry.value.int64_list.value)
        for entry in example.features.feature
    }


def test_examples_are_those_of_protobuf():
    pytest.importorskip("google.protobuf")
    integers = np.array([0, 1, 127, 128, 16383, 16384, 2**21, 2**28 - 1, 2**31 - 1])
    floats = np.array([0.0, -1e9, -2.5], np.float32)
    found = parse(example_bytes({"a": integers, "bé": floats, "long": np.arange(300)}))
    assert found["a"].tolist() == integers.tolist()
    assert found["bé"].tolist() == floats.tolist()
    assert found["long"].tolist() == list(range(300))


@pytest.mark.parametrize("name", ["drawn", "kept"])
def test_maxtext_reads_what_ours_has(exported, sources, name):
    module = pytest.importorskip(
        "array_record.python.array_record_module", reason="array_record is not installed"
    )
    (file,) = exported(name, "maxtext", length=128).glob("*.array_record")
    assert file.name == "teacher_top_k_part_00000.array_record"
    reader = module.ArrayRecordReader(str(file))
    expected = {tuple(own["input_ids"]): own for own in ours(sources[name])}
    seen = 0
    for content in reader.read_all():
        record = parse(content)
        for column in ("inputs", "inputs_position", "inputs_segmentation", "targets", "targets_position", "targets_segmentation"):  # fmt: skip
            assert record[column].shape == (128,)
        ids, logits = (record[f"top_k_{kind}"].reshape(128, 8) for kind in ("indices", "logits"))
        for segment in range(1, record["inputs_segmentation"].max() + 1):
            where = np.flatnonzero(record["inputs_segmentation"] == segment)
            own = expected[tuple(record["inputs"][where])]
            assert record["inputs_position"][where].tolist() == list(range(len(where)))
            for t, place in enumerate(where):
                is_learned = own["mask"][t] and own["target_ids"][t] >= 0
                assert record["targets_segmentation"][place] == (segment if is_learned else 0)
                if is_learned:
                    assert record["targets"][place] == own["target_ids"][t]
                    assert_distribution(own, t, ids[place], logits[place], "none")
            seen += 1
    assert seen == len(expected)


def their_loss(logits, ids, weights, mask):
    """What axolotl's and DistillKit's losses sum up: w (log w − log q) over the listed ids of the positions that count."""
    logq = logits.log_softmax(-1).gather(-1, torch.tensor(ids))
    weights = torch.tensor(weights, dtype=logits.dtype)
    terms = (weights.exp() * (weights - logq))[torch.tensor(mask) > 0]
    return terms.sum() / (torch.tensor(mask)[:, 0] > 0).sum()


def test_the_teacher_is_its_own_best_student_in_their_loss(exported, teacher_dir):
    """Aligned, nothing is to be learned; one position off, much. With draws, the tail is pushed nowhere."""
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir).double()
    rows, losses, shifted = exported("drawn", "axolotl"), [], []
    gradients = {"draws": 0.0, "none": 0.0}
    for row in rows:
        with torch.no_grad():
            logits = teacher(torch.tensor([row["input_ids"]])).logits[0]
        ids, weights, mask = (row[f"target_{what}"] for what in ("token_ids", "logprobs", "mask"))
        head = [[w[:8] for w in what] for what in (ids, weights, mask)]
        losses.append(their_loss(logits, *head))
        shifted.append(their_loss(logits.roll(1, 0), *head))
        outside = torch.ones_like(logits).scatter_(1, torch.tensor(head[0]), 0)
        for kind, listed in (("draws", (ids, weights, mask)), ("none", head)):
            z = logits.clone().requires_grad_()
            their_loss(z, *listed).backward()
            gradients[kind] += (z.grad * outside).sum().item() / len(rows)
    assert abs(np.mean(losses)) < 0.005
    assert np.mean(shifted) > 0.5
    assert gradients["none"] > 0.05  # the student is taught that there is no tail
    assert abs(gradients["draws"]) < 0.001


def test_with_draws_their_loss_is_the_whole_cross_entropy_but_for_a_constant(
    exported, sources, teacher_dir
):
    """Which no student changes: between two students, it differs as the true KL does."""
    rows = exported("drawn", "axolotl")
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir).double()
    found, expected, generator = [], [], torch.Generator().manual_seed(0)
    for row in rows:
        with torch.no_grad():
            logits = teacher(torch.tensor([row["input_ids"]])).logits[0]
        other = logits + torch.randn(logits.shape, generator=generator).double()
        listed = [row[f"target_{what}"] for what in ("token_ids", "logprobs", "mask")]
        found.append(their_loss(other, *listed) - their_loss(logits, *listed))
        logp, logq = logits.log_softmax(-1), other.log_softmax(-1)
        expected.append((logp.exp() * (logp - logq)).sum(-1)[:-1].mean())
    assert np.mean(found) == pytest.approx(np.mean(expected), rel=0.1)


@pytest.mark.parametrize(("to", "options"), [("axolotl", {}), ("distillkit", {}), ("distillkit", {"tail": "bucket"}), ("distillkit", {"packed": True}), ("maxtext", {})])  # fmt: skip
def test_the_readme_has_the_configuration_and_what_is_lost(sources, tmp_path, to, options):
    if to == "maxtext":
        pytest.importorskip("array_record", reason="array_record is not installed")
    output = tmp_path / "for-them"
    export(sources["drawn"], output, to=to, **options)
    text = (output / "README.md").read_text(encoding="utf-8")
    config = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert str(tmp_path) not in text
    assert load_logits(sources["drawn"]).manifest["fingerprint"][:12] in text
    assert "`entropy`" in text.split("## What is lost")[1]
    of_tail = text.split("## The tail")[1]
    if to == "axolotl":
        assert config["kd_normalize_topk"] is False
        assert config["remove_unused_columns"] is False
        assert config["datasets"] == [{"path": "for-them", "split": "train"}]
        assert "8 ids drawn" in of_tail
    elif to == "distillkit":
        compressor = config["teacher"]["logprob_compressor"]
        k = 8 if options.get("tail") == "bucket" else 16
        assert compressor == {"d": 448, "k": k, "exact_k": k, "residual_bins": []}
        assert config["dataset"]["prepacked"] is True
        handling = config["loss_functions"][0]["missing_probability_handling"]
        assert handling == ("symmetric_uniform" if options.get("tail") == "bucket" else "zero")
        assert config["functionary_packing"] == config["use_flash_attention"] == ("packed" in options)  # fmt: skip
        assert config["sequence_length"] == 96
    else:
        assert config["max_target_length"] == 96
        assert "is lost" in of_tail


@pytest.mark.parametrize(
    ("name", "to", "options", "message"),
    [
        ("plain", "axolotl", {"tail": "draws"}, "has no draws from the tail"),
        ("drawn", "axolotl", {"tail": "bucket"}, "axolotl cannot be told of the tail by 'bucket'"),
        ("drawn", "maxtext", {"tail": "draws"}, "maxtext cannot be told of the tail by 'draws'"),
        ("whole", "axolotl", {}, "has whole distributions"),
        ("drawn", "axolotl", {"length": 50}, "leave length out"),
        ("drawn", "maxtext", {"packed": True}, "packed is only for DistillKit"),
        ("drawn", "megatron", {}, "to is 'megatron', expected one of axolotl"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    sources, tmp_path, name, to, options, message
):
    with pytest.raises(ValueError, match=message):
        export(sources[name], tmp_path / "out", to=to, **options)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing_and_an_output_is_never_overwritten(
    sources, tmp_path, monkeypatch
):
    monkeypatch.setattr("logit_dataset.export.parquet.FILE_TOKENS", 1)  # a file a row group
    export(sources["drawn"], tmp_path / "out", to="axolotl")
    assert len(list((tmp_path / "out" / "data").iterdir())) > 1
    with pytest.raises(ValueError, match="out exists; remove it"):
        export(sources["drawn"], tmp_path / "out", to="axolotl")
    damaged = tmp_path / "damaged"
    import shutil

    shutil.copytree(sources["drawn"], damaged)
    file = next((damaged / "data").glob("*.parquet"))
    content = bytearray(file.read_bytes())
    content[100] ^= 255
    file.write_bytes(content)
    with pytest.raises(ValueError, match="verify the dataset"):
        export(damaged, tmp_path / "other", to="axolotl")
    assert not list(tmp_path.glob("other*"))


def test_files_of_many_row_groups_are_read_as_one(exported, sources, monkeypatch):
    monkeypatch.setattr("logit_dataset.export.parquet.FILE_TOKENS", 300)
    rows = exported("drawn", "axolotl")
    assert rows["input_ids"][:] == [own["input_ids"].tolist() for own in ours(sources["drawn"])]


def test_longer_sequences_are_cut(exported, sources):
    rows = exported("drawn", "distillkit", length=16)
    assert {len(ids) for ids in rows["input_ids"]} == {16}
    kept = sum(np.count_nonzero(mask) for mask in rows["attention_mask"])
    assert kept == load_logits(sources["drawn"]).num_tokens


def test_the_commands(sources, tmp_path):
    done = run_cli("export", sources["drawn"], "--to", "axolotl", "--output", tmp_path / "a", "--tail", "none")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "for axolotl, tail none" in done.stdout
    code = [sys.executable, "-m", "logit_dataset.export", str(sources["drawn"]), "--to", "axolotl", "--tail", "none"]  # fmt: skip
    alone = subprocess.run([*code, "--output", str(tmp_path / "b")], capture_output=True, text=True, check=True)  # fmt: skip
    assert alone.stdout.replace(str(tmp_path / "b"), str(tmp_path / "a")) == done.stdout
    files = [sorted((tmp_path / n / "data").iterdir()) for n in ("a", "b")]
    for one, other in zip(*files, strict=True):
        assert pq.read_table(one).equals(pq.read_table(other))
    again = subprocess.run([*code, "--output", str(tmp_path / "b")], capture_output=True, text=True, check=False)  # fmt: skip
    assert again.returncode == 1
    assert again.stderr == f"error: {tmp_path / 'b'} exists; remove it, or choose another output\n"


def test_export_needs_no_builder(sources, tmp_path):
    """`logit-dataset export` works where only the reader is installed."""
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("transformers", "datasets", "pydantic", "typer", "tqdm", "array_record"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import builder.cli.entry as entry
entry.find_spec = lambda name: None
sys.argv = ["logit-dataset", "export", {str(sources["drawn"])!r}, "--to", sys.argv[1], "--output", {str(tmp_path / "out")!r}]
entry.main()
"""
    done = subprocess.run([sys.executable, "-c", code, "maxtext"], capture_output=True, text=True, check=False)  # fmt: skip
    assert "MaxText's files need the package array_record" in done.stderr
    done = subprocess.run([sys.executable, "-c", code, "axolotl"], capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(json.dumps((tmp_path / "out" / "README.md").read_text())).startswith("# tiny for axolotl")  # fmt: skip


def test_datasets_on_the_hub_are_exported_as_they_are_streamed(sources, tmp_path):
    code = (
        "from pathlib import Path\nfrom logit_dataset.export.export import export\n"
        f"export('org/logits', Path({str(tmp_path / 'out')!r}), to='axolotl', revision='v1')"
    )
    with stand_in.serve() as hub:
        hub.commit("dataset", "org/logits", stand_in.directory_files(sources["kept"]))
        hub.tag("dataset", "org/logits", "v1")
        client = stand_in.Client(hub.endpoint, tmp_path / "home")
        try:
            done = client.python(code)
        finally:
            client.close()
    assert done.returncode == 0, done.stderr
    export(sources["kept"], tmp_path / "local", to="axolotl")
    for file in (tmp_path / "local" / "data").iterdir():
        assert pq.read_table(file).equals(pq.read_table(tmp_path / "out" / "data" / file.name))
    assert not list((tmp_path / "home").rglob("*.parquet"))
