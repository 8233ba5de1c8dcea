"""Files that change while a build reads them: one line, nothing mixed, and the bytes of an undisturbed build once they are what they were."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.build import stream, worker
from builder.build.stream import SequenceStream
from builder.build.task import Pool
from builder.dataset.manifest import read_manifest
from builder.sources import changes
from builder.sources.changes import SourceChangedError, hash_file
from builder.sources.known import KnownSources
from tests.build.test_build import data_bytes, read_rows, run
from tests.conftest import sample_documents, write_jsonl

Change = Callable[[Path], object]


def edit(path: Path) -> None:
    """Other content of the same size, the beginning of a row that no shard has read yet."""
    content = path.read_bytes()
    place = content.rindex(b"quick")
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"slick")
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def edit_without_a_trace(path: Path) -> None:
    stat = path.stat()
    edit(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"id": "new", "text": "one more"}\n')


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes().replace(b"lazy", b"dozy"))
    os.replace(other, path)


def replace_by_the_same(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def restore(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.fixture
def recipe(make_recipe: Any, corpus_file: Path) -> Path:
    return make_recipe()


@pytest.fixture
def whole(recipe: Path, tmp_path: Path) -> dict[str, bytes]:
    """Data files of a build that nothing disturbs."""
    run(recipe, tmp_path / "whole")
    return data_bytes(tmp_path / "whole")


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """meanwhile(change, path, document=…): have a file changed while the build reads that document of the corpus."""

    def arrange(change: Change, path: Path, *, document: int = 12) -> None:
        seen, original = [], SequenceStream._next_document

        def spy(self: SequenceStream) -> Any:
            seen.append(1)
            if len(seen) == document:
                change(path)
            return original(self)

        monkeypatch.setattr(SequenceStream, "_next_document", spy)

    return arrange


def finished(output: Path) -> dict[str, bytes]:
    """Files of shards that have a record."""
    records = [json.loads(path.read_text()) for path in (output / ".build" / "records").iterdir()]
    return {Path(r["file"]).name: (output / r["file"]).read_bytes() for r in records}


def assert_one_line(result: tuple[int, str, str], *parts: str) -> None:
    status, _, err = result
    assert status == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "Traceback" not in err
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (edit, "has changed since it was hashed for this build (other content of the same size)"),
        (append, "has changed since it was hashed for this build ("),
        (truncate, " now); restore it and run the same command"),
        (replace, "has changed since it was hashed for this build (other content of the same size)"),
        (Path.unlink, "can no longer be read (No such file or directory)"),
    ],
)  # fmt: skip
def test_a_corpus_that_changes_within_a_shard(recipe, whole, corpus_file, tmp_path, meanwhile, cli, monkeypatch, change, how):  # fmt: skip
    """The shard does not count, those before do; going on with another corpus is refused, and with the former one it is exact."""
    output, content = tmp_path / "out", corpus_file.read_bytes()
    with monkeypatch.context():
        meanwhile(change, corpus_file)
        assert_one_line(cli("build", recipe, "--output", output), "corpus file corpus.jsonl", how)
        monkeypatch.undo()
    assert not (output / "manifest.json").exists()
    assert not list((output / "data").glob(".*.partial"))
    kept = finished(output)
    assert 1 <= len(kept) < len(whole)
    assert all(whole[name] == data for name, data in kept.items())
    again = cli("build", recipe, "--output", output)
    if change is Path.unlink:
        assert_one_line(again, "corpus.files: nothing matches")
    else:
        assert_one_line(again, "holds an unfinished build with another plan (corpus.files: ")
    assert finished(output) == kept
    restore(corpus_file, content)
    assert cli("build", recipe, "--output", output)[0] == 0
    assert data_bytes(output) == whole


@pytest.mark.parametrize("change", [Path.touch, replace_by_the_same])
def test_the_same_content_is_the_same_file(recipe, whole, corpus_file, tmp_path, meanwhile, cli, change):  # fmt: skip
    def later(path: Path) -> None:
        change(path)
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))

    meanwhile(later, corpus_file)
    status, _, err = cli("build", recipe, "--output", tmp_path / "out")
    assert status == 0, err
    assert data_bytes(tmp_path / "out") == whole


@pytest.mark.parametrize("suffix", ["parquet", "txt.gz"])
def test_other_formats(make_recipe, tmp_path, meanwhile, cli, suffix):
    import gzip

    from tests.corpus.test_documents import write_file

    def write(documents: list[dict[str, str]]) -> Path:
        path = tmp_path / f"c.{suffix}"
        if suffix == "parquet":
            write_file(path, documents)
        else:
            path.write_bytes(gzip.compress("\n".join(d["text"] for d in documents).encode()))
        return path

    path = write(sample_documents())
    recipe = make_recipe(files=path.name, corpus='text_unit = "line"')
    if suffix != "parquet":
        recipe.write_text(recipe.read_text().replace('id_column = "id"\n', ""))
    meanwhile(lambda _: write(sample_documents(25)), path)
    assert_one_line(cli("build", recipe, "--output", tmp_path / "out"), f"corpus file {path.name} has changed since")  # fmt: skip


def test_a_file_that_changes_before_it_is_opened(
    make_recipe, tmp_path, meanwhile, cli, monkeypatch
):
    """Its shard is not computed first."""
    for number in range(3):
        write_jsonl(tmp_path / f"p-{number}.jsonl", sample_documents(24)[number * 8 :][:8])
    monkeypatch.setattr(stream, "AHEAD", 0)  # else all of them are open by then
    monkeypatch.setattr(stream, "BATCH_DOCUMENTS", 1)
    recipe = make_recipe(files="p-*.jsonl", output="shard_tokens = 100000")
    meanwhile(append, tmp_path / "p-2.jsonl", document=3)
    documents: list[int] = []
    original = SequenceStream._next_document

    def count(self: SequenceStream) -> Any:
        documents.append(1)
        return original(self)

    monkeypatch.setattr(SequenceStream, "_next_document", count)
    assert_one_line(cli("build", recipe, "--output", tmp_path / "out"), "corpus file p-2.jsonl has changed since")  # fmt: skip
    assert len(documents) == 17


def test_a_file_that_changes_when_its_shards_are_finished(make_recipe, tmp_path, meanwhile, cli, monkeypatch):  # fmt: skip
    """They are of what it was, and stay."""
    for number in range(2):
        write_jsonl(tmp_path / f"p-{number}.jsonl", sample_documents(24)[number * 12 :][:12])
    recipe = make_recipe(files="p-*.jsonl", output="partitions = 2")
    run(recipe, tmp_path / "whole")
    content, output = (tmp_path / "p-0.jsonl").read_bytes(), tmp_path / "out"
    meanwhile(append, tmp_path / "p-0.jsonl", document=16)
    assert_one_line(cli("build", recipe, "--output", output), "corpus file p-0.jsonl has changed")
    monkeypatch.undo()
    assert finished(output) == data_bytes(tmp_path / "whole")
    restore(tmp_path / "p-0.jsonl", content)
    computed: list[int] = []
    run(recipe, output, progress=computed.append)
    assert not computed
    assert data_bytes(output) == data_bytes(tmp_path / "whole")


def test_an_edit_without_a_trace_is_found_at_the_end(recipe, whole, corpus_file, tmp_path, cli):
    """It is not known which shards are of which content: all of that file's are deleted, and what comes next is all of one."""
    output, content = tmp_path / "out", corpus_file.read_bytes()
    assert cli("build", recipe, "--output", output, "--max-shards", 2)[0] == 0
    edit_without_a_trace(corpus_file)
    result = cli("build", recipe, "--output", output)
    assert_one_line(result, "corpus file corpus.jsonl has changed since", "(other content of the same size)")  # fmt: skip
    assert re.search(
        rf"deleting {len(whole)} finished shards?, because a source changed at an", result[2]
    )
    assert not finished(output)
    assert not data_bytes(output)
    restored = tmp_path / "restored"
    shutil.copytree(output, restored)
    # As it is now: from the beginning.
    assert cli("build", recipe, "--output", output)[0] == 0
    assert "slick" in "".join(row["text"] for row in read_rows(output))
    assert read_manifest(output)["corpus"]["files"][0]["sha256"] == hash_file(corpus_file).sha256
    # As it was.
    restore(corpus_file, content)
    assert cli("build", recipe, "--output", restored)[0] == 0
    assert data_bytes(restored) == whole


def test_only_the_shards_of_the_edited_file_are_deleted(make_recipe, tmp_path, cli):
    for number in range(4):
        write_jsonl(tmp_path / f"p-{number}.jsonl", sample_documents(24)[number * 6 :][:6])
    recipe = make_recipe(files="p-*.jsonl", output="partitions = 2\nshard_tokens = 100")
    run(recipe, tmp_path / "whole")
    whole, output = data_bytes(tmp_path / "whole"), tmp_path / "out"
    content = (tmp_path / "p-3.jsonl").read_bytes()
    run(recipe, output, max_shards=3)
    edit_without_a_trace(tmp_path / "p-3.jsonl")
    assert_one_line(cli("build", recipe, "--output", output), "corpus file p-3.jsonl has changed")
    kept = finished(output)
    assert {name for name in whole if name.startswith("train-000")} < kept.keys() < whole.keys()
    assert all(whole[name] == data for name, data in kept.items())
    assert_one_line(cli("build", recipe, "--output", output), "with another plan (corpus.files: ")
    restore(tmp_path / "p-3.jsonl", content)
    assert cli("build", recipe, "--output", output)[0] == 0
    assert data_bytes(output) == whole


def test_a_link_that_leads_elsewhere(make_recipe, tmp_path, meanwhile, cli, monkeypatch):
    """The build reads what the link led to when it began; going on with what it leads to later is refused."""
    write_jsonl(tmp_path / "one.jsonl", sample_documents())
    write_jsonl(tmp_path / "two.jsonl", sample_documents(20))
    (tmp_path / "link.jsonl").symlink_to("one.jsonl")
    recipe = make_recipe(files="link.jsonl")
    run(recipe, tmp_path / "whole")

    def lead(path: Path) -> None:
        path.unlink()
        path.symlink_to("two.jsonl")

    run(recipe, tmp_path / "stopped", max_shards=1)
    meanwhile(lead, tmp_path / "link.jsonl")
    assert cli("build", recipe, "--output", tmp_path / "out")[0] == 0
    assert data_bytes(tmp_path / "out") == data_bytes(tmp_path / "whole")
    assert_one_line(cli("build", recipe, "--output", tmp_path / "stopped"), "with another plan (corpus.files: ")  # fmt: skip


# The teacher


@pytest.fixture
def teacher(tiny_teacher_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_teacher_dir, tmp_path / "teacher"))


def spoil(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-64, 2)
        file.write(bytes(64))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_teacher_that_changes_while_it_is_loaded(make_recipe, corpus_file, teacher, tmp_path, cli, monkeypatch, when):  # fmt: skip
    original = worker.open_teacher

    def load(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            spoil(teacher / "model.safetensors")
        loaded = original(*args, **kwargs)
        if when == "after":
            spoil(teacher / "model.safetensors")
        return loaded

    monkeypatch.setattr(worker, "open_teacher", load)
    recipe = make_recipe(teacher=teacher)
    assert_one_line(
        cli("build", recipe, "--output", tmp_path / "out"),
        "teacher file model.safetensors has changed since it was hashed for this build (other content of the same size)",
    )
    assert not finished(tmp_path / "out")


def test_weights_that_change_in_place_while_they_are_used(make_recipe, corpus_file, teacher, tmp_path, cli, meanwhile, monkeypatch):  # fmt: skip
    """On a CPU, they are read from the file for as long as the teacher lives."""
    recipe = make_recipe(teacher=teacher)
    run(recipe, tmp_path / "whole")
    whole, output = data_bytes(tmp_path / "whole"), tmp_path / "out"
    content = (teacher / "model.safetensors").read_bytes()
    meanwhile(spoil, teacher / "model.safetensors")
    assert_one_line(cli("build", recipe, "--output", output), "teacher file model.safetensors has")
    monkeypatch.undo()
    kept = finished(output)
    assert 1 <= len(kept) < len(whole)
    assert all(whole[name] == data for name, data in kept.items())
    assert_one_line(cli("build", recipe, "--output", output), "with another plan (teacher.sha256: ")
    restore(teacher / "model.safetensors", content)
    assert cli("build", recipe, "--output", output)[0] == 0
    assert data_bytes(output) == whole


def test_weights_that_change_without_a_trace(make_recipe, corpus_file, teacher, tmp_path, cli):
    recipe, output = make_recipe(teacher=teacher), tmp_path / "out"
    weights = teacher / "model.safetensors"
    run(recipe, output, max_shards=2)
    stat = weights.stat()
    spoil(weights)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert_one_line(cli("build", recipe, "--output", output), "teacher file model.safetensors has")
    assert not finished(output)
    assert not data_bytes(output)


def test_a_file_that_joins_the_teacher(make_recipe, corpus_file, teacher, tmp_path, cli, monkeypatch):  # fmt: skip
    original = worker.open_teacher

    def load(*args: Any, **kwargs: Any) -> Any:
        (teacher / "notes.json").write_text("{}")
        loaded = original(*args, **kwargs)
        return loaded

    (teacher / "README.md").write_text("this decides nothing")
    monkeypatch.setattr(worker, "open_teacher", load)
    recipe = make_recipe(teacher=teacher)
    assert_one_line(
        cli("build", recipe, "--output", tmp_path / "out"),
        "teacher file notes.json was not there when this build began",
    )


# Several workers, the Hub


def test_several_workers_stop_at_once(make_recipe, tmp_path):
    pytest.importorskip("ray")
    for number in range(2):
        write_jsonl(tmp_path / f"p-{number}.jsonl", sample_documents(48)[number * 24 :][:24])
    recipe = make_recipe(files="p-*.jsonl", output="partitions = 2\nshard_tokens = 100")
    notices: list[str] = []

    def change(tokens: int) -> None:
        if tokens > 0 and (tmp_path / "p-1.jsonl").stat().st_mtime_ns > 1:
            append(tmp_path / "p-1.jsonl")
            os.utime(tmp_path / "p-1.jsonl", ns=(1, 1))

    with pytest.raises(SourceChangedError, match=r"corpus file p-1\.jsonl has changed since"):
        run(recipe, tmp_path / "out", pool=Pool(workers=2), progress=change, notice=notices.append)
    assert not any("trying again" in notice for notice in notices)


def test_on_the_hub_doubtful_shards_are_deleted_too(hub, client, tiny_teacher_dir, tmp_path):
    from tests.end_to_end.test_outbox import assert_delivered, data_files, on_branch, write_recipe

    recipe = write_recipe(tmp_path / "recipe", tiny_teacher_dir)
    corpus = tmp_path / "recipe" / "corpus.jsonl"
    run(recipe, tmp_path / "whole")
    content = corpus.read_bytes()

    def deliver(*options: object) -> Any:
        command = ("build", recipe, "--output", tmp_path / "out", "--publish-to", "org/set", "--discard-local")  # fmt: skip
        return client.cli(*command, "--device", "cpu", *options)

    assert deliver("--max-shards", 3).returncode == 0
    edit_without_a_trace(corpus)
    result = deliver()
    assert result.returncode == 1
    assert "corpus file corpus.jsonl has changed since" in result.stderr
    assert not [path for path in on_branch(hub) if path.startswith("data/")]
    # The branch is of the former content.
    result = deliver()
    assert result.returncode == 1
    assert "holds an unfinished build with another plan (corpus.files: " in result.stderr
    restore(corpus, content)
    assert deliver().returncode == 0
    assert_delivered(hub, tmp_path / "whole", tmp_path / "out")
    assert data_files(tmp_path / "whole")


# Details


def test_hashes_are_of_one_moment(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 1000)
    original = changes.hashlib.file_digest

    def while_it_is_read(file: Any, name: str) -> Any:
        digest = original(file, name)
        with path.open("ab") as other:
            other.write(b"y")
        return digest

    monkeypatch.setattr(changes.hashlib, "file_digest", while_it_is_read)
    with pytest.raises(SourceChangedError, match="a changed while it was read; wait until it is"):
        KnownSources().sha256(path)


def test_each_file_is_read_once_more_and_the_user_is_told_of_many(make_recipe, tmp_path, monkeypatch):  # fmt: skip
    """Also one that several partitions' shards have looked into."""
    for number in range(4):
        write_jsonl(tmp_path / f"p-{number}.jsonl", sample_documents(24)[number * 6 :][:6])
    recipe = make_recipe(files="p-*.jsonl", output="partitions = 2\nshard_tokens = 100")
    monkeypatch.setattr(changes, "LONG_BYTES", 1000)
    read: list[str] = []
    original = changes.hash_file
    monkeypatch.setattr(changes, "hash_file", lambda path: read.append(path.name) or original(path))
    notices: list[str] = []
    run(recipe, tmp_path / "out", notice=notices.append)
    assert sorted(name for name in read if name.startswith("p-")) == [f"p-{i}.jsonl" for i in range(4)]  # fmt: skip
    assert len(read) == len(set(read))
    assert notices == [
        "reading corpus and teacher again (0 GB, about 0 min) to check that they have not changed"
    ]
