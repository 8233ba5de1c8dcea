"""The embedded teacher and corpus: the right tokenizer, the right weights, and the README's example."""

import json
import math
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from builder.build.build import build
from builder.corpus.encoder import backend_copy
from builder.dataset.manifest import read_manifest
from builder.recipe.file import load_recipe
from builder.sources import demo
from builder.teacher.loading import load_teacher
from builder.text.pieces import WINDOW, Pieces
from builder.verify.verify import verify
from builder.view.view import Viewed, page
from tests.conftest import REPOSITORY
from tests.test_docs import PAGES

pytestmark = pytest.mark.embedded


@pytest.fixture(scope="module")
def teacher():
    directory, _ = demo.embedded_teacher()
    return load_teacher(str(directory), dtype="float32")


def test_every_digit_is_a_token_of_its_own(teacher):
    """What transformers loses when it rebuilds this tokenizer from the GGUF file."""
    assert teacher.tokenizer.tokenize("In 2024, 3.14") == [
        *["In", "Ġ", "2", "0", "2", "4", ",", "Ġ", "3", ".", "1", "4"]
    ]


def test_no_token_of_the_corpus_holds_a_digit_and_something_else(teacher):
    path, _ = demo.embedded_corpus()
    backend = teacher.tokenizer.backend_tokenizer
    for line in path.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        encoding = backend.encode(text, add_special_tokens=False)
        assert teacher.tokenizer.decode(encoding.ids) == text
        assert not any(
            len(token) > 1 and any(c.isdigit() for c in token) for token in encoding.tokens
        )


def test_a_long_text_is_cut_into_pieces_with_the_tokens_of_the_whole(teacher):
    """Its vocabulary lacks some bytes, which it leaves out without a word."""
    path, _ = demo.embedded_corpus()
    texts = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    text = "\n\x04\x13a\x06b\U00040000 c".join(texts)
    backend = backend_copy(teacher.tokenizer, match_special=True)
    found = list(Pieces(backend).of([text]))
    assert max(len(piece.text) for piece in found) < 2 * WINDOW < len(text) / 3
    ids = [token for piece in found for token in piece.ids]
    assert ids == backend.encode(text, add_special_tokens=False).ids


def test_the_weights_say_paris_and_are_those_of_the_gguf_file(teacher):
    ids = teacher.tokenizer.encode("The capital of France is")
    probs = torch.cat(list(teacher.logits([ids])))[-1].softmax(-1)
    by_word = {
        word: float(probs[teacher.tokenizer.encode(word)[0]]) for word in (" Paris", " London")
    }
    assert by_word[" Paris"] == pytest.approx(0.7725, abs=2e-3)
    assert by_word[" London"] == pytest.approx(0.0125, abs=1e-3)


def test_the_prepared_weights_equal_the_dequantised_blocks_of_the_gguf_file(teacher):
    from gguf import GGUFReader, dequantize

    from builder.sources.demo import gguf_file

    reader = GGUFReader(gguf_file())
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = dict(teacher.model.named_parameters())
    for gguf_name, name in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight"),
        ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ):
        tensor = tensors[gguf_name]
        expected = dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(weights[name].numpy(), expected.reshape(weights[name].shape))


def test_the_embedded_recipe_builds_verifies_and_equals_float64(teacher, tmp_path):
    """The main job, cut to a few thousand tokens; `make build-dataset` runs all of it."""
    path = REPOSITORY / "dataset_cards" / "smollm2-135m-python-docs" / "recipe.toml"
    short = path.read_text().replace("max_tokens = 50_000", "max_tokens = 2_500")
    (tmp_path / "recipe.toml").write_text(
        short.replace("shard_tokens = 10_000", "shard_tokens = 1_500")
    )
    build(load_recipe(tmp_path / "recipe.toml"), tmp_path, tmp_path / "out")
    assert verify(tmp_path / "out").problems == []
    manifest = read_manifest(tmp_path / "out")
    assert manifest["totals"]["tokens"] >= 2_500
    assert manifest["totals"]["bytes_per_token"] < 175  # 163 at full size
    assert manifest["teacher"]["sha256"].startswith("b179c9523d0e")

    row = pq.read_table(tmp_path / "out" / manifest["shards"][0]["file"]).slice(0, 1).to_pylist()[0]
    with torch.inference_mode():
        logits = teacher.model(torch.tensor([row["input_ids"]])).logits[0].double()
    logprobs = logits.log_softmax(-1)
    expected = logprobs.topk(50)
    assert (np.array(row["topk_indices"]) == expected.indices.numpy()).mean() > 0.999  # near ties
    np.testing.assert_allclose(row["topk_logprobs"], expected.values, atol=6e-3, rtol=0)
    target = logprobs[:-1].gather(1, torch.tensor(row["input_ids"])[1:, None])[:, 0]
    np.testing.assert_allclose(row["target_logprob"][:-1], target, atol=1e-2, rtol=0)
    tail = torch.log1p(-expected.values.exp().sum(-1))
    np.testing.assert_allclose(row["tail_logprob"], tail, atol=6e-3, rtol=0)
    assert math.isclose(row["logsumexp"][0], float(logits[0].logsumexp(-1)), rel_tol=1e-5)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    np.testing.assert_allclose(row["entropy"], entropy, atol=4e-3, rtol=0)

    # A page of 20 rows of 512 tokens stays below 3 MB, with another dataset beside it, too.
    dataset = Viewed(
        directory=tmp_path / "out", locate=lambda name: tmp_path / "out" / name, is_here=True
    )
    for against in (None, dataset):
        shown = page(dataset, rows=20, against=against)
        assert len(shown.html) / shown.tokens * 20 * 512 < 3_000_000


SHOWN = [
    (page, *command)
    for page in PAGES
    for command in re.findall(
        r"^\$ \.venv/bin/logit-dataset (info out/(answers|capitals|chats) .*)\n((?:[^$`].*\n)+)",
        page.read_text("utf-8"),
        re.MULTILINE,
    )
]
NUMBER = re.compile(r"(?<![\w.])\d+\.\d+")


def test_pages_show_positions_of_examples():
    assert {name for _, _, name, _ in SHOWN} == {"answers", "capitals", "chats"}


@pytest.mark.parametrize("name", ["answers", "capitals", "chats"])
def test_pages_show_what_the_examples_print(cli, tmp_path, monkeypatch, name):
    """Line by line, where a page does not leave some out; numbers may differ by what another CPU makes of them."""
    recipe = REPOSITORY / "examples" / name / "recipe.toml"
    build(load_recipe(recipe), recipe.parent, tmp_path / "out" / name)
    monkeypatch.chdir(tmp_path)
    for page_path, command, _, block in [shown for shown in SHOWN if shown[2] == name]:
        status, out, err = cli(*command.split())
        assert (status, err) == (0, "")
        printed = iter(out.splitlines())
        for line in block.splitlines():
            if line.strip() == "…":
                continue
            found = next((p for p in printed if masked(p) == masked(line)), None)
            assert found is not None, f"{page_path.name}: {line!r} is not in\n{out}"
            shown, said = (list(map(float, NUMBER.findall(text))) for text in (line, found))
            assert shown == pytest.approx(said, abs=0.002), page_path.name


def masked(line: str) -> str:
    return NUMBER.sub("#", line).rstrip()


def test_the_dry_run_of_the_docs(cli, tmp_path):
    """All of it but the time, which is this machine's."""
    page = (REPOSITORY / "docs" / "planning.md").read_text(encoding="utf-8")
    block = re.search(r"^\$ logit-dataset build (\S+) .*--dry-run.*\n((?:.+\n)+?)```", page, re.M)
    recipe, lines = block.groups()
    status, out, err = cli("build", REPOSITORY / recipe, "--output", tmp_path / "x", "--dry-run")
    assert status == 0
    assert "max_tokens = 50000" in out
    shown, said = (re.sub(r"about \d+ \w+ on", "about … on", text) for text in (lines, err))
    assert shown.splitlines() == said.splitlines()


def test_pages_show_what_verify_prints(cli, monkeypatch):
    """Of the dataset that `make build-dataset` makes, where it is there; it takes minutes."""
    command = (
        r"^(?:\$ \.venv/bin/logit-dataset|\.venv/bin/logit-dataset) verify .*--recompute 3.*\n"
    )
    blocks = {
        page.name: found[1].splitlines()[:2]
        for page in PAGES
        if (found := re.search(command + r"((?:.+\n)+?)```", page.read_text("utf-8"), re.M))
    }
    assert set(blocks) == {"README.md", "verify.md"}
    lines = blocks["verify.md"]
    assert blocks["README.md"] == lines
    seed = re.search(r"seed (\d+)", lines[0])[1]
    monkeypatch.chdir(REPOSITORY)
    dataset = lines[1].split(":")[0]
    if not (REPOSITORY / dataset / "manifest.json").exists():
        pytest.skip("make build-dataset has not run here")
    status, out, _ = cli("verify", dataset, "--recompute", 3, "--seed", seed)
    assert status == 0
    for line, found in zip(lines, out.splitlines()[:2], strict=True):
        shown, said = (re.sub(r"\d\.\de-\d+", "…", text) for text in (line, found))
        assert masked(shown) == masked(said)
        shown, said = (list(map(float, NUMBER.findall(text))) for text in (shown, said))
        assert shown == pytest.approx(said, abs=0.002)
