"""The reader, installed from its wheel beside the oldest libraries that it claims, gives what it gives beside the newest.

`make test-reader` copies this file, the loopback Hub and docs/training.md beside the environment, so that nothing of the checkout is
imported. `python reader_check.py`, with the newest libraries, writes what is expected; `pytest reader_check.py` compares. With
`tokenizers`, projections onto another tokenizer are compared too.
"""

import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for tensors this small, a second thread only waits

import loopback_hub as stand_in
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from logit_dataset import (
    FrequentTokens,
    TokenizerProjection,
    distillation_loss,
    distillation_loss_from_hidden,
    load_logits,
)
from logit_dataset.divergences import LOSSES

HERE = Path(__file__).parent
DATASETS = Path(os.environ.get("READER_DATASETS", HERE / "datasets"))
REFERENCE = Path(os.environ.get("READER_REFERENCE", HERE / "reference"))
NAMES = sorted(path.parent.name for path in DATASETS.glob("*/manifest.json"))
SHAPES = {
    "padded": {"batch_size": 3},
    "packed": {"batch_size": 2, "length": 200, "packed": True},
    "split": {"batch_size": 2, "length": 7, "packed": True, "split_long": True, "seed": 5},
}
HAS_TOKENIZERS = importlib.util.find_spec("tokenizers") is not None


def shape_of(name, shape):
    options = dict(SHAPES[shape])
    if "length" in options and name in ("written", "chats", "chats_kept"):
        options["length"] *= 8
    return options


# All that a file holds, by two ways that have nothing in common with the loader's


def flat(column):
    """Lengths of the lists of each level, and the values, of a column."""
    array, parts = column.combine_chunks(), []
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    while pa.types.is_list(array.type):
        parts.append(np.asarray(array.value_lengths()).astype(np.int32))
        array = array.flatten()
    assert array.null_count == 0
    if pa.types.is_string(array.type):
        return [*parts, np.frombuffer("\0".join(array.to_pylist()).encode(), np.uint8)]
    return [*parts, array.to_numpy(zero_copy_only=False)]


def plain(value):
    if isinstance(value, list):
        return [plain(part) for part in value]
    return float(value) if isinstance(value, (np.floating, float)) else value


def digest(*arrays):
    found = hashlib.sha256()
    for array in arrays:
        found.update(
            f"{array.dtype.str} {array.shape}".encode() + np.ascontiguousarray(array).tobytes()
        )
    return found.hexdigest()


def stored(name):
    found = {}
    for path in sorted((DATASETS / name / "data").glob("*.parquet")):
        # As the reader opens it: with footer, page index and checksums of pages, where there are any.
        tables = [pq.read_table(path), pq.ParquetFile(path, page_checksum_verification=True).read()]
        for column in tables[0].column_names:
            digests = {digest(*flat(table[column])) for table in tables}
            assert len(digests) == 1
            found[f"{path.name} {column}"] = digests.pop()
        rows = json.dumps(plain_rows(tables[0]), sort_keys=True)
        found[f"{path.name} as Python"] = hashlib.sha256(rows.encode()).hexdigest()
    return found


def plain_rows(table):
    return [{k: plain(v) for k, v in row.items()} for row in table.to_pylist()]


# Batches


def tokenizer(which):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(DATASETS / f"{which}.tokenizer.json"))


class WithEnd:
    def __init__(self, backend, eos_token_id=0):
        self.backend_tokenizer, self.eos_token_id = backend, eos_token_id


@cache
def loaded(name, projection=None):
    data = load_logits(DATASETS / name)
    if projection == "frequent":
        return data.project(FrequentTokens.of(data, 200, always_keep=[3]))
    if projection == "tokenizer":
        return data.project(
            TokenizerProjection(WithEnd(tokenizer("teacher")), WithEnd(tokenizer("student")))
        )
    return data


def projections(name):
    can = name in ("plain", "everything", "compact") and HAS_TOKENIZERS
    return [None, "frequent", *(["tokenizer"] if can else [])]


def batches(name, shape, projection):
    """Two epochs, as arrays by names."""
    found, which = [], loaded(name, projection).batches(**shape_of(name, shape))
    for _ in range(2):
        found += [{k: v.numpy() for k, v in batch.items()} for batch in which]
    assert found
    return found


EXACT = {
    None: None,
    "frequent": ("other_logprob", "logprobs"),
    "tokenizer": ("topk_logprobs", "tail_logprob"),
}
"""Columns that a projection computes: they may differ by a rounding."""


def digests_of_batches(name, shape, projection):
    inexact = EXACT[projection] or ()
    exact, sums = hashlib.sha256(), {}
    for batch in batches(name, shape, projection):
        for column, values in sorted(batch.items()):
            if column in inexact and values.dtype == np.float32:
                exact.update(f"{column} {values.shape}".encode())
                finite = values[values > -65000].astype(np.float64)
                sums.setdefault(column, []).append([finite.size, finite.sum(), (finite**2).sum()])
            else:
                exact.update(f"{column} {digest(values)}".encode())
    return {"exact": exact.hexdigest(), "sums": sums}


# Losses


CASES = [
    *[
        (name, kind, 1.0)
        for name in ("plain", "everything", "whole", "chats_kept", "masks")
        for kind in LOSSES
    ],
    *[(name, kind, 2.0) for name in ("everything", "chats_kept", "whole") for kind in LOSSES],
]


def cases():
    for name, kind, temperature in CASES:
        if name not in NAMES:
            continue
        for projection in (None, "frequent"):
            if kind == "tail_draws" and (temperature != 1 or name not in ("everything", "masks")):
                continue
            if projection and temperature != 1:
                continue
            if projection == "frequent" and name == "whole" and temperature != 1:
                continue
            yield name, kind, temperature, projection


def losses(name, kind, temperature, projection):
    """Value and gradient, in several types and ways, of the first batch."""
    data = loaded(name, projection)
    batch = next(iter(data.batches(batch_size=3, seed=None)))
    rng = np.random.default_rng(0)
    shape = (*batch["input_ids"].shape, data.vocab_size)
    raw = torch.from_numpy(2 * rng.standard_normal(shape)).float()
    options = {"loss": kind, "temperature": temperature, "text_weight": 0.25}
    found = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        logits = raw.to(dtype, copy=True).requires_grad_()
        loss = distillation_loss(logits, batch, **options)
        loss.backward()
        found[str(dtype)] = loss.detach().double().numpy()
        found[f"{dtype} gradient"] = logits.grad.float().numpy()
    width = 16
    hidden = torch.from_numpy(rng.standard_normal((*shape[:2], width))).float().requires_grad_()
    head = torch.nn.Linear(width, shape[2], bias=False)
    head.weight.data = torch.from_numpy(rng.standard_normal((shape[2], width))).float()
    loss = distillation_loss_from_hidden(hidden, head, batch, **options)
    loss.backward()
    found["hidden"] = loss.detach().numpy()
    found["hidden gradient"] = hidden.grad.numpy()
    found["head gradient"] = head.weight.grad.numpy()
    return {key: thin(value) for key, value in found.items()}


def thin(values):
    """At most some thousands of an array's values."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return flat[:: max(1, flat.size // 4096)]


def write_reference():
    REFERENCE.mkdir(exist_ok=True)
    found = {
        "stored": {name: stored(name) for name in NAMES},
        "batches": {
            f"{name} {shape} {projection}": digests_of_batches(name, shape, projection)
            for name in NAMES
            for shape in SHAPES
            for projection in projections(name)
        },
    }
    (REFERENCE / "digests.json").write_text(json.dumps(found, indent=1))
    arrays = {}
    for case in cases():
        for key, values in losses(*case).items():
            arrays[" ".join(map(str, (*case, key)))] = values
    np.savez_compressed(REFERENCE / "losses.npz", **arrays)


if __name__ == "__main__":
    write_reference()
    sys.exit()


@cache
def reference():
    return json.loads((REFERENCE / "digests.json").read_text())


@cache
def reference_losses():
    return dict(np.load(REFERENCE / "losses.npz"))


def test_versions(capsys):
    import huggingface_hub

    with capsys.disabled():
        print(
            f"\npython {sys.version.split()[0]}, torch {torch.__version__}, numpy {np.__version__}, "
            f"pyarrow {pa.__version__}, huggingface_hub {huggingface_hub.__version__}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_every_file_is_read_as_it_was_written(name):
    assert stored(name) == reference()["stored"][name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_batches(name, shape):
    for projection in projections(name):
        found = digests_of_batches(name, shape, projection)
        expected = reference()["batches"][f"{name} {shape} {projection}"]
        assert found["exact"] == expected["exact"], projection
        assert found["sums"].keys() == expected["sums"].keys()
        for column, sums in found["sums"].items():
            np.testing.assert_allclose(sums, expected["sums"][column], rtol=1e-6)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_losses_and_gradients(case):
    for key, values in losses(*case).items():
        expected = reference_losses()[" ".join(map(str, (*case, key)))]
        rough = "bfloat16" in key
        np.testing.assert_allclose(
            values,
            expected,
            rtol=1e-2 if rough else 2e-5,
            atol=1e-3 if rough else 2e-6,
            err_msg=key,
        )


def test_nothing_of_the_checkout_or_the_builder_is_imported():
    import logit_dataset

    assert "site-packages" in logit_dataset.__file__
    assert not {"transformers", "datasets", "typer", "pydantic"} & sys.modules.keys()
    assert importlib.util.find_spec("transformers") is None


def test_the_command_says_what_to_install():
    command = Path(sys.executable).with_name("logit-dataset")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert 'pip install "logit-dataset[build]"' in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_command_exports_all_the_same(tmp_path):
    command = Path(sys.executable).with_name("logit-dataset")
    to = ["export", DATASETS / "everything", "--to", "axolotl", "--output", tmp_path / "out"]
    done = subprocess.run([command, *to], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out" / "data").iterdir()
    rows = pq.read_table(file)
    manifest = json.loads((DATASETS / "everything" / "manifest.json").read_text())
    assert len(rows) == manifest["totals"]["rows"]
    assert rows.column_names[-3:] == ["target_token_ids", "target_logprobs", "target_mask"]


def test_the_docs_train_a_student(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "smollm2-135m-python-docs").symlink_to((DATASETS / "plain").resolve())
    monkeypatch.chdir(tmp_path)
    snippets = (HERE / "training.md").read_text(encoding="utf-8").split("```python\n")[1:]
    found = [s.split("```")[0] for s in snippets if "load_logits(" in s]
    assert any("distillation_loss(" in snippet for snippet in found)
    for snippet in found:
        exec(compile(snippet, "training.md", "exec"), {})


def test_it_is_a_torch_dataset_and_it_resumes():
    whole = list(loaded("plain").batches(batch_size=4))
    loader = torch.utils.data.DataLoader(loaded("plain").batches(batch_size=4), batch_size=None)
    for a, b in zip(loader, whole, strict=True):
        assert all(torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in b)
    first = loaded("plain").batches(batch_size=4)
    for _, _ in zip(range(2), first, strict=False):
        state = json.loads(json.dumps(first.state_dict()))
    second = loaded("plain").batches(batch_size=4)
    second.load_state_dict(state)
    rest = list(second)
    assert len(rest) in (len(whole) - 2, len(whole) - 1)
    assert all(
        torch.equal(a["topk_indices"], b["topk_indices"])
        for a, b in zip(rest[::-1], whole[::-1], strict=False)
    )


@pytest.mark.parametrize("kind", LOSSES)
def test_gradcheck(kind):
    batch = next(iter(loaded("everything", "frequent").batches(batch_size=1, seed=None)))
    batch = {name: values[:, :4] for name, values in batch.items()}
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((1, 4, 201))).requires_grad_()
    loss = lambda z: distillation_loss(z, batch, loss=kind, text_weight=0.2)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (logits,))


def test_autocast():
    batch = next(iter(loaded("plain").batches(batch_size=2, seed=None)))
    hidden, head = torch.randn(*batch["input_ids"].shape, 8), torch.nn.Linear(8, 448)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden)
        found = [
            distillation_loss(logits, batch),
            distillation_loss_from_hidden(hidden, head, batch),
        ]
    assert logits.dtype == torch.bfloat16
    expected = distillation_loss(logits.double(), batch)
    assert all(value.dtype == torch.float32 and abs(value - expected) < 1e-5 for value in found)


@pytest.mark.filterwarnings("ignore")
def test_compiled_it_is_the_same():
    batch = next(iter(loaded("plain").batches(batch_size=2, seed=None)))
    logits = torch.randn(*batch["input_ids"].shape, 448, requires_grad=True)
    loss = lambda z: distillation_loss(z, batch, text_weight=0.2)  # noqa: E731
    results = [
        torch.autograd.grad(f(logits), logits)[0]
        for f in (torch.compile(loss, backend="eager"), loss)
    ]
    torch.testing.assert_close(*results)


def test_no_gpu_and_no_position_counts():
    batch = dict(next(iter(loaded("plain").batches(batch_size=2, seed=None))))
    batch["mask"] = torch.zeros_like(batch["mask"])
    hidden, head = (
        torch.randn(*batch["input_ids"].shape, 8, requires_grad=True),
        torch.nn.Linear(8, 448),
    )
    loss = distillation_loss_from_hidden(hidden, head, batch)
    loss.backward()
    assert loss == 0
    assert not any(part.grad.any() for part in (hidden, *head.parameters()))


# What is damaged


def test_a_damaged_page_is_found_by_its_checksum(tmp_path):
    table = pq.read_table(sorted((DATASETS / "plain" / "data").glob("*.parquet"))[0])
    pq.write_table(
        table,
        tmp_path / "x.parquet",
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    column = pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(0)
    at = next(
        c
        for c in map(column.column, range(column.num_columns))
        if c.path_in_schema.startswith("topk_logprobs")
    )
    content[at.data_page_offset + at.total_compressed_size - 5] ^= 1
    (tmp_path / "x.parquet").write_bytes(content)
    unchecked = pq.ParquetFile(tmp_path / "x.parquet").read()
    assert not unchecked.equals(table)
    with pytest.raises((OSError, pa.ArrowException), match=r"(?i)crc|checksum"):
        pq.ParquetFile(tmp_path / "x.parquet", page_checksum_verification=True).read()


def refit(dataset, path):
    """Let the manifest say of a file what it is now."""
    manifest, content = json.loads((dataset / "manifest.json").read_text()), path.read_bytes()
    footer = content[len(content) - 8 - int.from_bytes(content[-8:-4], "little") :]
    for shard in manifest["shards"]:
        if shard["file"] == f"data/{path.name}":
            hashes = {"sha256": content, "footer_sha256": footer}
            shard |= {name: hashlib.sha256(part).hexdigest() for name, part in hashes.items()}
            shard["bytes"] = len(content)
    (dataset / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_damaged_is_a_value_error(tmp_path):
    import shutil

    shutil.copytree(DATASETS / "plain", tmp_path / "x")
    path = sorted((tmp_path / "x" / "data").glob("*.parquet"))[-1]
    whole = path.read_bytes()
    data = load_logits(tmp_path / "x")
    path.write_bytes(whole[:200] + bytes(1800) + whole[2000:])
    with pytest.raises(ValueError, match=f"{path.name}, row group 0: .*; verify the dataset"):
        list(data.batches(batch_size=2))
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"has [\d,]+ bytes, the manifest says"):
        load_logits(tmp_path / "x")
    path.write_bytes(whole[:-100] + bytes(1) + whole[-99:])
    with pytest.raises(ValueError, match="footer has the SHA-256"):
        load_logits(tmp_path / "x")
    path.write_bytes(whole[:-8] + bytes(4) + whole[-4:])
    refit(tmp_path / "x", path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_logits(tmp_path / "x")
    path.unlink()
    with pytest.raises(ValueError, match="is missing"):
        load_logits(tmp_path / "x")


def test_a_column_of_another_type_is_refused(tmp_path):
    import shutil

    shutil.copytree(DATASETS / "plain", tmp_path / "x")
    path = sorted((tmp_path / "x" / "data").glob("*.parquet"))[0]
    table = pq.read_table(path)
    index = table.column_names.index("logsumexp")
    values = table["logsumexp"].cast(pa.list_(pa.float64()))
    pq.write_table(table.set_column(index, "logsumexp", values), path)
    refit(tmp_path / "x", path)
    with pytest.raises(
        ValueError, match=r"column logsumexp is list<.*: double>, expected list<item: float>"
    ):
        load_logits(tmp_path / "x")


# The Hub


READ = """
import hashlib, time
time.sleep = lambda seconds: None  # huggingface_hub waits half a minute in all before it gives up
from logit_dataset import load_logits
data = load_logits({arguments})
found = hashlib.sha256()
for batch in data.batches(batch_size=3, length=150, packed=True):
    for name, values in sorted(batch.items()):
        found.update(name.encode() + values.numpy().tobytes())
print(found.hexdigest())
"""


@pytest.fixture(scope="module")
def hub():
    with stand_in.serve() as hub:
        hub.commit("dataset", "org/logits", stand_in.directory_files(DATASETS / "plain"))
        hub.tag("dataset", "org/logits", "v1")
        hub.commit("dataset", "org/logits", {"README.md": b"moved on"})
        yield hub


SERVER = """
import json, os, sys, traceback
import logit_dataset, fsspec
assert "huggingface_hub" not in sys.modules  # which reads the environment when it is imported
for line in sys.stdin:
    command, status = json.loads(line), 0
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1), os.dup2(write, 2)
        os.close(write)  # else the last one to close it is not this process
        os.environ.update(command["environment"])
        try:
            exec(command["code"], {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    os.close(write)
    out = os.fdopen(read, "rb").read().decode()
    os.waitpid(child, 0)
    print(json.dumps(out), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    """A process that has imported what takes long, and forks itself for each call: HF_ENDPOINT is read at an import."""
    own = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=own,
    )
    yield process
    process.communicate(timeout=30)


@pytest.fixture
def call(hub, server, tmp_path):
    """Load, read all and print a digest, as a process of its own would: what it printed, in lines."""

    def run(arguments, home="home", **environment):
        own = {
            **stand_in.environment(hub.endpoint, tmp_path / home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        environment = {**own, **environment}
        command = {"code": READ.format(arguments=arguments), "environment": environment}
        print(json.dumps(command), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline()).strip()

    yield run
    hub.faults.clear()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


NOT_REACHED = "there is no directory 'org/logits', and the Hub cannot be reached"
NO_REPO = "the Hub has no dataset of that name that you can read"
NO_HOST = {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}
SAID = [  # arguments, environment, what is said
    ('"org/none"', {}, NO_REPO),
    ('"org/none", streaming=True', {}, NO_REPO),
    ('"org/logits", revision="v9"', {}, "has no revision 'v9' on the Hub"),
    ('"org/logits", revision="v9", streaming=True', {}, "has no revision 'v9' on the Hub"),
    ('"org/logits"', {}, "org/logits has no manifest.json: it is not a finished logit dataset"),
    (
        '"org/logits", streaming=True',
        {},
        "org/logits has no manifest.json: it is not a finished logit dataset",
    ),
    ('"not a/name/at all"', {}, "is neither a directory nor a Hub dataset name"),
    ('"not a/name/at all", streaming=True', {}, "is neither a directory nor a Hub dataset name"),
    ('"org/logits"', OFFLINE, NOT_REACHED),
    ('"org/logits", streaming=True', OFFLINE, NOT_REACHED),
    ('"org/logits"', NO_HOST, NOT_REACHED),
    ('"org/logits", streaming=True', NO_HOST, NOT_REACHED),
]


def test_a_dataset_of_the_hub_downloaded_or_streamed_is_as_the_directory(hub, call, tmp_path):
    hub.requests.clear()
    at = '"org/logits", revision="v1"'
    streamed = call(f"{at}, streaming=True", "streamed")
    parquet = [request for request in hub.requests if ".parquet" in request.path]
    assert parquet, streamed
    assert all(request.range for request in parquet if request.method == "GET")
    assert not (tmp_path / "streamed" / "hub").exists()
    assert len(streamed) == 64, streamed
    assert call(repr(str(DATASETS / "plain"))) == streamed
    library = importlib.util.find_spec("huggingface_hub").origin
    assert call("print(__import__('huggingface_hub').__file__)").splitlines()[0] == library
    assert call(at, "downloaded") == streamed
    assert call(at, "downloaded", **OFFLINE) == streamed  # a snapshot that is there is enough


@pytest.mark.parametrize(("arguments", "environment", "said"), SAID)
def test_what_goes_wrong_is_said_in_a_line(call, arguments, environment, said):
    printed = call(arguments, **environment)
    last = printed.splitlines()[-1]
    assert last.startswith("ValueError: "), printed
    assert said in last


@pytest.mark.parametrize("arguments", ['"org/logits"', '"org/logits", streaming=True'])
@pytest.mark.parametrize("status", [401, 403, 500, 503, "cut"])
def test_what_the_hub_answers_is_said_in_a_line(hub, call, status, arguments):
    def fault(request):
        if status == "cut":
            raise stand_in.Cut
        return status

    hub.faults.append(fault)
    printed = call(arguments)
    last = printed.splitlines()[-1]
    # A 401 is what strangers are told of a repository that is not theirs.
    known = (NOT_REACHED, NO_REPO) if status == 401 else (NOT_REACHED,)
    assert last.startswith("ValueError: "), printed
    assert any(said in last for said in known)


@pytest.mark.parametrize("status", [500, "cut"])
@pytest.mark.parametrize(
    ("what", "after"), [("manifest.json", 0), (".parquet", 0), (".parquet", 9)]
)
def test_what_goes_wrong_while_streaming_is_said_in_a_line(hub, call, status, what, after):
    seen = []

    def fault(request):
        if what in request.path and request.method == "GET":
            seen.append(request)
            if len(seen) > after:
                if status == "cut":
                    raise stand_in.Cut
                return status

    hub.faults.append(fault)
    printed = call('"org/logits", revision="v1", streaming=True')
    last = printed.splitlines()[-1]
    named = "org/logits@v1: manifest.json" if what == "manifest.json" else "data/train-"
    assert last.startswith(f"ValueError: {named}"), printed
