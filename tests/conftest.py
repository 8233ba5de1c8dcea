"""A tiny random teacher with a real tokenizer, small corpora, and the command line as a function."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["PYTHONPATH"] = str(
    Path(__file__).parents[1]
)  # child processes run this checkout's builder, too
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach beyond this machine
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-")  # nor write to, or find, what the user keeps
os.environ["LOGIT_DATASET_QUIET"] = "1"  # progress would stand between what tests compare
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for models this tiny, a second thread only waits

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the GPU's kernels run on the CPU, step by step

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.loopback_hub import Client, Hub, serve

REPOSITORY = Path(__file__).parents[1]

TINY_VOCAB_SIZE = 448
"""Of the tiny teacher's logits; its tokenizer has fewer, as Qwen's."""

TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog. A dataset of distributions, token by token.",
    "Position t holds the distribution for the token that follows. Nothing is shifted on disk.",
    "Grüße aus München – naïve café, 東京 and Москва; שלום عالم 👩‍👩‍👧‍👦🙂 12345 67890",
]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without BOS, with <eos>: 400 ids."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING_TEXT * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture(scope="session")
def tiny_model() -> LlamaForCausalLM:
    """A random Llama whose distributions are neither flat nor one-hot."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TINY_VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.25)
    return model


@pytest.fixture(scope="session")
def tiny_teacher_dir(
    tiny_tokenizer: Any, tiny_model: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny teacher as `save_pretrained` writes it."""
    directory = tmp_path_factory.mktemp("teacher") / "tiny"
    tiny_model.save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sample_documents(count: int = 24) -> list[dict[str, Any]]:
    """Documents of very different lengths, with every script that the tokenizer has to cut."""
    return [
        {"id": f"doc-{i}", "text": " ".join(TRAINING_TEXT[(i + j) % 3] for j in range(1 + i % 5))}
        for i in range(count)
    ]


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", sample_documents())


def recipe_text(teacher_dir: Path, files: str, /, **changes: str) -> str:
    """A recipe for the tiny teacher; `changes` maps a section to TOML lines that are added to it."""
    sections = {
        "corpus": f'files = ["{files}"]\nid_column = "id"',
        "teacher": f'path = "{teacher_dir}"\ndtype = "float32"',
        "sequences": "max_length = 64\nbatch_tokens = 256",
        "output": "top_k = 20\nshard_tokens = 300",
    }
    for section, lines in changes.items():
        keys = {line.split("=")[0].strip() for line in lines.splitlines()}
        kept = [
            line
            for line in sections.get(section, "").splitlines()
            if line.split("=")[0].strip() not in keys
        ]
        sections[section] = "\n".join([*kept, lines])
    body = "\n\n".join(f"[{name}]\n{lines}" for name, lines in sections.items())
    return f'name = "tiny"\n\n{body}\n'


@pytest.fixture
def make_recipe(tiny_teacher_dir: Path, corpus_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe file: make_recipe(corpus="…" sections as in recipe_text, files="other.jsonl")."""

    def make(
        files: str | None = None,
        teacher: Path | None = None,
        teacher_options: str = "",
        **changes: str,
    ) -> Path:
        path = tmp_path / "recipe.toml"
        text = recipe_text(teacher or tiny_teacher_dir, files or corpus_file.name, **changes)
        text = text.replace("\n\n[sequences]", f"\n{teacher_options}\n\n[sequences]")
        path.write_text(text, encoding="utf-8")
        return path

    return make


def refit(dataset: Path) -> None:
    """Let a manifest say of its files what they are now, as somebody does who has changed them on purpose."""
    manifest = json.loads((dataset / "manifest.json").read_text(encoding="utf-8"))
    for shard in manifest["shards"]:
        content = (dataset / shard["file"]).read_bytes()
        shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        footer = pq.read_metadata(pa.BufferReader(content))
        groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
        columns = [g.column(i) for g in groups for i in range(g.num_columns)]
        tokens = sum(c.num_values for c in columns if c.path_in_schema.startswith("input_ids."))
        shard |= {"rows": footer.num_rows, "tokens": tokens}
        if "footer_sha256" in shard:
            start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
            shard["footer_sha256"] = hashlib.sha256(content[start:]).hexdigest()
    for name in ("rows", "tokens", "bytes"):
        manifest["totals"][name] = sum(shard[name] for shard in manifest["shards"])
    (dataset / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def run_cli(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`logit-dataset …` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "builder.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=300,
    )


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`logit-dataset …` in this process: (exit status, stdout, stderr)."""
    from builder.cli.main import main

    def call(*arguments: object) -> tuple[int, str, str]:
        before, status = sys.argv, 0
        sys.argv = ["logit-dataset", *map(str, arguments)]
        try:
            main()
        except SystemExit as stop:
            if isinstance(stop.code, str):  # what Python itself does with sys.exit("message")
                print(stop.code, file=sys.stderr)
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            sys.argv = before
        out, err = capfd.readouterr()
        return status, out, err

    return call


@pytest.fixture(scope="module")
def running() -> Iterator[Hub]:
    """A stand-in of the Hub on this machine."""
    with serve() as hub:
        yield hub


@pytest.fixture
def hub(running: Hub) -> Iterator[Hub]:
    """The Hub, empty and in good health."""
    running.repos.clear()
    for events in (running.requests, running.arrived):
        events.clear()
    yield running
    for troubles in (running.faults, running.losses, running.damage):
        troubles.clear()
    running.part_bytes, running.is_token_valid = None, True


@pytest.fixture(scope="module")
def client(running: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A process that knows this Hub only, and runs commands."""
    client = Client(running.endpoint, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


@pytest.fixture(scope="session")
def built(tiny_teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dataset by the tiny teacher, with several shards. Read only: copy before changing anything."""
    from builder.build.build import build
    from builder.recipe.file import load_recipe

    base = tmp_path_factory.mktemp("built")
    write_jsonl(base / "corpus.jsonl", sample_documents())
    (base / "recipe.toml").write_text(
        recipe_text(tiny_teacher_dir, "corpus.jsonl"), encoding="utf-8"
    )
    build(load_recipe(base / "recipe.toml"), base, base / "out")
    return base / "out"


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> Iterator[None]:
    from builder.console.terminal import quiet_libraries

    quiet_libraries()
    yield
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
