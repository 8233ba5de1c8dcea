"""What a row is does not depend on its batch: LongRoPE teachers, read and written; and a build notices a teacher that nobody foresaw."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from builder.capture.decoding import Decoder
from builder.capture.generation import Generator, _Row
from builder.capture.guard import Guard
from builder.corpus.sequences import NO_TOKEN, Sequence
from builder.dataset.manifest import read_manifest
from builder.teacher import lengths
from builder.teacher import model as teacher_module
from builder.verify.verify import verify
from logit_dataset.schema import Layout
from tests.build.test_build import data_bytes, float64_reference, read_rows, run
from tests.capture.test_generation import not_the_captured_choice
from tests.conftest import TINY_VOCAB_SIZE, TRAINING_TEXT, write_jsonl

BORDER = 40
COLUMNS = ("topk_logprobs", "tail_logprob", "target_logprob", "logsumexp", "entropy")


@pytest.fixture(scope="module")
def longrope() -> Any:
    """A random Phi-3 that reads sequences of more than BORDER tokens in another way."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "phi3",
        **{"vocab_size": TINY_VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"max_position_embeddings": 256, "original_max_position_embeddings": BORDER},
        **{"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None},
        rope_parameters={
            **{"rope_type": "longrope", "rope_theta": 1e4},
            **{"short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 6.0, 7.0]},
        },
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.25)
    return model


@pytest.fixture(scope="module")
def longrope_dir(longrope, tiny_tokenizer, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("longrope") / "teacher"
    longrope.save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


def texts(tiny_tokenizer: Any) -> list[dict[str, str]]:
    """Of 1 to 90 tokens, the border and its neighbours among them."""
    ids = tiny_tokenizer.encode(" ".join(TRAINING_TEXT * 3), add_special_tokens=False)
    counts = [BORDER + 1, 3, 90, BORDER, 17, BORDER - 1, 70, 1, 55, 9, BORDER + 2, 30, 28, 27, 24]
    return [{"id": f"{n}", "text": tiny_tokenizer.decode(ids[:n])} for n in counts]


@pytest.fixture
def corpus_file(tmp_path, tiny_tokenizer) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", texts(tiny_tokenizer))


def assert_is_what_the_model_says_alone(model: Any, row: dict[str, Any], next_token: int) -> None:
    expected = float64_reference(model, row["input_ids"], next_token, top_k=20)
    for name in COLUMNS:
        found, wanted = np.array(row[name], float), expected[name]
        known = ~np.isnan(found)
        assert known[:-1].all()
        step = 0 if name == "logsumexp" else np.spacing(np.abs(wanted).astype(np.float16))
        assert (np.abs(found - wanted) <= 1e-3 + step)[known].all(), (row["id"], name)


@pytest.mark.parametrize("batch_tokens", [4096, 256, 1])
def test_rows_of_a_longrope_teacher_are_those_of_each_document_alone(
    make_recipe, tmp_path, longrope, longrope_dir, batch_tokens
):
    recipe = make_recipe(
        teacher=longrope_dir, sequences=f"max_length = 128\nbatch_tokens = {batch_tokens}"
    )
    run(recipe, tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    found = [len(row["input_ids"]) for row in rows]
    assert {BORDER - 1, BORDER, BORDER + 1} <= set(found)
    assert (min(found), max(found)) == (1, 90)
    for row in rows:
        assert_is_what_the_model_says_alone(longrope, row, next_token=0)
    report = verify(tmp_path / "out", recompute=len(rows), teacher_path=longrope_dir)
    assert report.recomputed["rows"] == len(rows)
    assert not report.problems


def test_the_border_matters_to_this_teacher(longrope):
    ids = list(range(1, BORDER + 2))
    with torch.inference_mode():
        short, long = (longrope(torch.tensor([ids[:n]])).logits[0] for n in (BORDER, BORDER + 1))
    assert (short - long[:BORDER]).abs().max() > 1


@pytest.mark.parametrize(
    ("how", "dtype"),
    [("temperature = 0", "float32"), ("temperature = 0", "bfloat16"), ("samples = 2", "float32")],
)
def test_what_a_longrope_teacher_writes_stays_on_one_side_of_the_border(
    make_recipe, tmp_path, longrope, longrope_dir, how, dtype, monkeypatch
):
    new_tokens = 12
    notices: list[str] = []
    ends: list[tuple[int, int]] = []
    decode = Decoder.decode

    def noted(self: Decoder, sequences: list[list[int]], *, num_tokens: int, **options: Any) -> Any:
        found = [len(ids) for ids in sequences]
        ends.append((self.teacher.reach(min(found)), max(found) + num_tokens))
        return decode(self, sequences, num_tokens=num_tokens, **options)

    monkeypatch.setattr(Decoder, "decode", noted)
    recipe = make_recipe(
        teacher=longrope_dir,
        sequences="max_length = 128\nbatch_tokens = 4096",
        generation=f"max_new_tokens = {new_tokens}\n{how}",
    )
    recipe.write_text(recipe.read_text().replace('dtype = "float32"', f'dtype = "{dtype}"'))
    run(recipe, tmp_path / "out", notice=notices.append)
    rows = read_rows(tmp_path / "out")
    prompts = {int(row["id"].partition("/")[0]) for row in rows}
    short = {1, 3, 9, 17, 24, 27, 28}  # and not 30, 39 and 40
    assert prompts == {*short, BORDER + 1, BORDER + 2, 55, 70, 90}
    assert all(end <= reach for reach, end in ends)
    assert {reach for reach, _ in ends} == {BORDER, lengths.ANY}
    totals = read_manifest(tmp_path / "out")["totals"]["completions"]
    assert totals["prompts_too_long"] == 3
    (line,) = notices
    assert (
        "its completion would go beyond position 40, where this teacher changes how it reads"
        in line
    )
    assert "such documents are skipped and counted" in line
    if dtype == "float32":
        for row in rows:
            assert_is_what_the_model_says_alone(longrope, row, next_token=0)
    if how == "temperature = 0":
        assert not_the_captured_choice(tmp_path / "out") == []
    report = verify(tmp_path / "out", recompute=len(rows), teacher_path=longrope_dir)
    assert not report.problems


def test_a_draft_that_is_at_its_end_does_not_lead_the_others_of_its_batch_across_the_border():
    steps: list[int] = []

    def decode(sequences: list[list[int]], *, num_tokens: int, uniforms_BS: Any) -> list[list[int]]:
        steps.append(num_tokens)
        return [[7] * num_tokens for _ in sequences]

    teacher = SimpleNamespace(reach=lengths.Reach(borders=(BORDER,)))
    generator = Generator(
        SimpleNamespace(teacher=teacher, decode=decode),
        SimpleNamespace(halved_batches=0),
        **{"layout": Layout(), "is_greedy": True, "max_new_tokens": 20, "samples": 1, "seed": 0},
        batch_tokens=4096,
    )

    def row(prompt: int, written: int) -> Any:
        ids = list(range(prompt))
        sequence = Sequence(
            document_id="x", chunk_index=0, text="", token_ids=ids, next_token=NO_TOKEN
        )
        return _Row(prompt=sequence, sample=0, token_ids=[*ids, *[5] * written])

    generator._write_batch([row(20, 18), row(5, 1)], draft_tokens=16)
    generator._write_batch([row(50, 18), row(45, 1)], draft_tokens=16)
    assert steps == [2, 16]


def test_drawn_completions_of_a_longrope_teacher_do_not_depend_on_their_batch(
    make_recipe, tmp_path, longrope_dir
):
    written = []
    for batch_tokens in (4096, 1):
        recipe = make_recipe(
            teacher=longrope_dir,
            sequences="max_length = 128",
            generation=f"max_new_tokens = 12\nbatch_tokens = {batch_tokens}",
        )
        run(recipe, tmp_path / f"{batch_tokens}", notice=lambda _: None)
        rows = read_rows(tmp_path / f"{batch_tokens}")
        written.append({row["id"]: row["input_ids"] for row in rows})
    assert written[0] == written[1]


def test_a_corpus_of_prompts_across_the_border_says_what_to_do(make_recipe, tmp_path, longrope_dir):
    (tmp_path / "corpus.jsonl").write_text(
        "".join(line for line in (tmp_path / "corpus.jsonl").open() if '"id": "39"' in line)
    )
    recipe = make_recipe(
        teacher=longrope_dir, sequences="max_length = 128", generation="max_new_tokens = 12"
    )
    with pytest.raises(ValueError, match=r"no prompt that leaves room .* or a smaller max_new_tok"):
        run(recipe, tmp_path / "out", notice=lambda _: None)


def test_a_split_longrope_teacher_agrees_with_one_that_is_not(make_recipe, tmp_path, longrope_dir):
    """With a row that the guard runs alone, so that all ranks have to run it."""
    outputs = []
    for options in ("", "tensor_parallel = 2"):
        recipe = make_recipe(
            teacher=longrope_dir,
            teacher_options=options,
            sequences="max_length = 128\nbatch_tokens = 4096",
        )
        run(recipe, tmp_path / f"out{len(outputs)}")
        outputs.append(read_rows(tmp_path / f"out{len(outputs)}"))
    for row, other in zip(*outputs, strict=True):
        assert row["input_ids"] == other["input_ids"]
        found, wanted = (np.array(r["logsumexp"]) for r in (row, other))
        np.testing.assert_allclose(found, wanted, atol=1e-4)


# A teacher that is not known to depend on its batch


@pytest.fixture
def unforeseen(monkeypatch) -> None:
    """As if nothing were known of LongRoPE."""
    monkeypatch.setattr(teacher_module, "reach_of", lambda _: lengths.ANYWHERE)


@pytest.mark.usefixtures("unforeseen")
@pytest.mark.parametrize("output", ["top_k = 20", 'top_k = "all"', "hidden_states = true"])
def test_a_build_stops_where_a_row_depends_on_its_batch(
    make_recipe, tmp_path, longrope_dir, cli, output
):
    recipe = make_recipe(
        teacher=longrope_dir, sequences="max_length = 128\nbatch_tokens = 4096", output=output
    )
    status, out, err = cli("build", recipe, "--output", tmp_path / "out")
    assert status == 1
    assert out == ""
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert (
        "document '17' (chunk 0): its log-probabilities in a batch differ from those alone by "
        in line
    )
    assert " nats on average (noise: " in line
    assert re.search(r"; 17\d* tokens, beside sequences of up to 90\); set", line)
    assert "set sequences.batch_tokens = 1" in line
    assert not list((tmp_path / "out" / "data").glob("*.parquet"))
    remedy = make_recipe(
        teacher=longrope_dir, sequences="max_length = 128\nbatch_tokens = 1", output=output
    )
    status, _, err = cli("build", remedy, "--output", tmp_path / "alone")
    assert status == 0, err
    report = verify(tmp_path / "alone", recompute=15, teacher_path=longrope_dir)
    assert not report.problems


@pytest.mark.usefixtures("unforeseen")
def test_a_build_of_completions_stops_there_too(make_recipe, tmp_path, longrope_dir):
    recipe = make_recipe(
        teacher=longrope_dir,
        sequences="max_length = 128\nbatch_tokens = 4096",
        generation="max_new_tokens = 12",
        output="completions_only = true",
    )
    with pytest.raises(ValueError, match=r"in a batch differ .* beside sequences of up to \d+"):
        run(recipe, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_looking_changes_no_byte(make_recipe, tmp_path, monkeypatch, dtype):
    looked: list[int | None] = []
    choose = Guard.choose

    def noted(self: Guard, sequences: list[Any]) -> int | None:
        looked.append(choose(self, sequences))
        return looked[-1]

    recipe = make_recipe(sequences="max_length = 64\nbatch_tokens = 512")
    recipe.write_text(recipe.read_text().replace('dtype = "float32"', f'dtype = "{dtype}"'))
    monkeypatch.setattr(Guard, "choose", noted)
    run(recipe, tmp_path / "looked")
    monkeypatch.setattr(Guard, "choose", lambda *_: None)
    run(recipe, tmp_path / "not")
    assert sum(chosen is not None for chosen in looked) >= 1
    assert data_bytes(tmp_path / "looked") == data_bytes(tmp_path / "not")


def test_a_teacher_whose_head_cannot_run_alone_is_right_and_its_price_is_said(
    make_recipe, tmp_path, longrope, longrope_dir, monkeypatch
):
    def no_head(_: Any) -> None:
        raise AttributeError

    monkeypatch.setattr(teacher_module, "head_of", no_head)
    notices: list[str] = []
    recipe = make_recipe(teacher=longrope_dir, sequences="max_length = 128\nbatch_tokens = 4096")
    run(recipe, tmp_path / "out", notice=notices.append)
    assert notices == [
        "Phi3ForCausalLM cannot be split into a body and a head: each sequence runs through the whole model by itself, whatever batch_tokens is, and its logits take"
        " 0.00023 GB at sequences.max_length = 128"
    ]
    for row in read_rows(tmp_path / "out"):
        assert_is_what_the_model_says_alone(longrope, row, next_token=0)
