"""What runs on threads beside the teacher: no byte depends on how far it is ahead, and what fails on one of them fails the build."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from builder.build import stream, worker
from builder.capture import pipeline, windows
from builder.corpus.encoder import Encoder
from builder.corpus.sequences import Chunks
from builder.dataset.manifest import read_manifest
from builder.text import pieces
from tests.build.test_build import data_bytes, run
from tests.chats import chatty_teacher
from tests.conftest import sample_documents, write_jsonl

OURS = ("corpus", "batches", "shard-writer")


def documents() -> list[dict[str, Any]]:
    """With blank ones, short ones and, in windows of 200 characters, long ones."""
    rows = sample_documents(60)
    for number in (0, 7, 8, 30, 59):
        rows[number] = {"id": f"blank-{number}", "text": " \n" * (number % 3)}
    return rows


def records(output: Path) -> list[dict[str, Any]]:
    """What the manifest says of the shards, but for times."""
    shards: list[dict[str, Any]] = read_manifest(output)["shards"]
    return [{k: v for k, v in shard.items() if k != "seconds"} for shard in shards]


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(OURS)]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(pieces, "WINDOW", 200)
    monkeypatch.setattr(pieces, "OVERLAP", 16)
    rows = documents()
    for number in range(3):
        write_jsonl(tmp_path / f"p-{number}.jsonl", rows[20 * number :][:20])
    return "p-*.jsonl"


@pytest.mark.parametrize("limit", ["", "max_documents = 31", "max_tokens = 1500"])
def test_bytes_and_records_do_not_depend_on_how_far_is_read_ahead(
    corpus, make_recipe, tmp_path, monkeypatch, limit
):
    recipe = make_recipe(files=corpus, corpus=limit, output="tail_samples = 3")
    found = []
    for ahead, batch_documents, characters in [(0, 1, 1), (1, 2, 300), (4, 512, 2**17), (9, 3, 64)]:
        monkeypatch.setattr(stream, "AHEAD", ahead)
        monkeypatch.setattr(stream, "BATCH_DOCUMENTS", batch_documents)
        monkeypatch.setattr(stream, "BATCH_CHARACTERS", characters)
        output = tmp_path / f"out-{ahead}"
        run(recipe, output)
        found.append((data_bytes(output), records(output)))
        assert threads() == []
    assert len(found[0][0]) > 3
    assert all(one == found[0] for one in found)


def test_tokens_made_together_are_those_of_each_text_alone(corpus, tiny_tokenizer):
    from builder.corpus.documents import Document

    encoder = Encoder(tiny_tokenizer, max_length=32, long_documents="chunk")
    texts = [Document(id=row["id"], text=row["text"]) for row in documents() if row["text"].strip()]
    whole = encoder.whole(texts)
    assert {piece is None for piece in whole} == {True, False}, "some are longer than a window"
    for text, piece in zip(texts, whole, strict=True):
        assert list(encoder.sequences(text, whole=piece)) == encoder.encode(text)
    chats = [Document(id="c", messages=[{"role": "user", "content": "x"}])]
    encoder.chats = chatty_teacher  # type: ignore[assignment]
    assert encoder.whole([*chats, *texts]) == [None] * (1 + len(texts))


def test_what_is_wrong_behind_the_last_document_is_nobodys_business(make_recipe, corpus_file, tmp_path):  # fmt: skip
    corpus_file.write_text(corpus_file.read_text() + "{no JSON\n")
    run(make_recipe(corpus="max_documents = 24"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"corpus\.jsonl line 25 is not valid JSON"):
        run(make_recipe(), tmp_path / "all")
    assert threads() == []


def test_what_is_wrong_in_the_corpus_counts_in_its_turn(
    make_recipe, corpus_file, tmp_path, monkeypatch
):
    """The shards before it are finished, however far is read ahead."""
    lines = corpus_file.read_text().splitlines(keepends=True)
    corpus_file.write_text("".join([*lines[:15], "[]\n", *lines[15:]]))
    recipe = make_recipe(output="shard_tokens = 200")
    finished = []
    for ahead, batch_documents in [(0, 1), (4, 512), (4, 2)]:
        monkeypatch.setattr(stream, "AHEAD", ahead)
        monkeypatch.setattr(stream, "BATCH_DOCUMENTS", batch_documents)
        output = tmp_path / f"out-{len(finished)}"
        with pytest.raises(ValueError, match="line 16 is a list"):
            run(recipe, output)
        finished.append({p.name: p.read_bytes() for p in (output / "data").iterdir()})
    assert len(finished[0]) > 2
    assert all(one == finished[0] for one in finished)


PLACES = {
    "tokenizing ahead": (Encoder, "whole", 2),
    "cutting": (Chunks, "__next__", 20),
    "preparing a batch": (pipeline.Pipeline, "batch", 3),
    "putting in order": (windows, "_in_order", 2),
    "summing": (worker, "_sums", 2),
}


@pytest.mark.parametrize("error", [ValueError("it went wrong"), OSError(5, "it went wrong")])
@pytest.mark.parametrize("place", PLACES)
def test_a_failure_on_any_thread_fails_the_build_with_its_own_error(
    make_recipe, corpus_file, tmp_path, monkeypatch, cli, place, error
):
    write_jsonl(corpus_file, sample_documents(40))
    recipe = make_recipe(output="shard_tokens = 400")
    run(recipe, tmp_path / "whole")
    monkeypatch.setattr(stream, "BATCH_DOCUMENTS", 8)
    owner, name, number = PLACES[place]
    original, calls = getattr(owner, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(threading.current_thread().name)
        if len(calls) == number:
            raise error
        return original(*args, **kwargs)

    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing)
        status, _, err = cli("build", recipe, "--output", output)
    assert status == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "it went wrong" in line
    assert "Traceback" not in err
    assert calls[-1].startswith(OURS), "not on the thread that launches"
    assert threads() == []
    assert not list(output.rglob("*.partial"))
    kept = [json.loads(p.read_text())["file"] for p in (output / ".build" / "records").glob("[0-9]*.json")]  # fmt: skip
    assert sorted(f"data/{p.name}" for p in (output / "data").iterdir()) == sorted(kept)
    assert cli("build", recipe, "--output", output)[0] == 0
    assert data_bytes(output) == data_bytes(tmp_path / "whole")


def test_a_small_limit_of_tokens_does_not_tokenize_all_of_a_corpus(
    make_recipe, tmp_path, monkeypatch
):
    write_jsonl(tmp_path / "many.jsonl", sample_documents(4000))
    made, whole = [], Encoder.whole

    def count(self: Encoder, some: Any) -> Any:
        found = whole(self, some)
        made.extend(len(piece.ids) for piece in found if piece)
        return found

    monkeypatch.setattr(Encoder, "whole", count)
    run(make_recipe(files="many.jsonl", corpus="max_tokens = 3000"), tmp_path / "out")
    assert sum(made) < 4 * 3000
    assert len(made) < 1000


BESIDE_THE_TEACHER = """
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch

from builder.build.worker import _Totals
from builder.capture.pipeline import Pipeline
from builder.capture.windows import Window
from builder.corpus.sequences import Sequence
from logit_dataset.schema import Layout

LENGTH, K, M = 20_000, 50, 4
layout = Layout(top_k=K, tail_samples=M)
teacher = SimpleNamespace(device=torch.device("cpu"))
sequences = [
    Sequence(document_id=str(i), chunk_index=0, text="", token_ids=[1] * LENGTH, next_token=2)
    for i in range(2)
]
columns = {"topk_logprobs": [K], "tail_logprobs": [M], "entropy": [], "target_logprob": [], "logsumexp": []}
found = {name: torch.zeros(2 * LENGTH, *size, dtype=torch.float16) for name, size in columns.items()}


def by_torch():
    return torch.zeros(2**20).exp()


def by_us():
    batch = Pipeline(teacher, layout=layout, batch_tokens=2 * LENGTH).batch(sequences, [1, 0])
    window = Window(sequences=sequences, batches=[], loss_only=False, landed=[(batch.indices, found)])
    totals = _Totals(layout)
    totals.add(window.block())
    assert totals.sums.topk_mass == 2 * LENGTH * K


def threads():
    return len(os.listdir("/proc/self/task"))


def added(call):
    def on_it():
        before = threads()
        call()
        return threads() - before

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(on_it).result()


torch.set_num_threads(2)
by_torch()  # the main thread has its own
print(added(by_us), added(by_torch))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_what_runs_beside_the_teacher_does_not_use_torch_s_threads():
    """They would be more than there are cores, and the teacher's would then sleep between two operations."""
    ended = subprocess.run([sys.executable, "-c", BESIDE_THE_TEACHER], capture_output=True, text=True, check=True)  # fmt: skip
    assert ended.stdout.split() == ["0", "1"]
