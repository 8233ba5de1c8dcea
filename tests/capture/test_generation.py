"""Completions by the teacher itself, end to end: right numbers, greedy and drawn, cut and resumed, verified, loaded, published."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset

from builder.capture import generation
from builder.capture.decoding import Decoder, Drafter
from builder.dataset.identity import fingerprint
from builder.dataset.info import describe, describe_row
from builder.dataset.manifest import read_manifest, records_of
from builder.plan.estimate import estimate
from builder.recipe.file import load_recipe
from builder.verify.verify import verify
from logit_dataset import load_logits
from tests.build.test_build import data_bytes, float64_reference, read_rows, run
from tests.conftest import REPOSITORY, TRAINING_TEXT, write_jsonl
from tests.end_to_end.test_kill import check_kept, finished_shards, killer  # noqa: F401
from tests.hub.test_publish import build_dataset
from tests.loopback_hub import Client, serve
from tests.verify.forging import Row, forge
from tests.verify.test_verify import problems

GREEDY = "temperature = 0\nmax_new_tokens = 24"
DRAWN = "max_new_tokens = 24"


def prompts(count: int = 14) -> list[dict]:
    return [{"id": f"p-{i}", "text": TRAINING_TEXT[i % 3][: 7 + 5 * (i % 9)]} for i in range(count)]


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", prompts())


def completions(row: dict) -> list[int]:
    return [
        token
        for token, is_written in zip(row["input_ids"], row["completion_mask"], strict=True)
        if is_written
    ]


def written(output: Path) -> dict[str, list[int]]:
    return {row["id"]: completions(row) for row in read_rows(output)}


def not_the_captured_choice(output: Path) -> list[tuple[str, int]]:
    """Rows and positions at which what was written is not the first of what is stored."""
    found = []
    for row in read_rows(output):
        mask, first = row["completion_mask"], row["completion_mask"].index(True)
        for t in range(first - 1, len(mask) - 1):
            if "topk_indices" in row:
                # Where only completions are kept, their distributions begin at the prompt's last token.
                is_cut = len(row["topk_indices"]) < len(mask)
                choice = row["topk_indices"][t - (first - 1) * is_cut][0]
                if choice != row["input_ids"][t + 1]:
                    found.append((row["id"], t))
            elif row["logprobs"][t][row["input_ids"][t + 1]] < max(row["logprobs"][t]):
                found.append((row["id"], t))
    return found


# What is stored


def test_what_is_stored_are_the_teachers_distributions_of_prompt_and_completion(
    make_recipe, tmp_path, tiny_model, tiny_tokenizer
):
    run(make_recipe(generation=f"{DRAWN}\ntemperature = 0.7\ntop_p = 0.8"), tmp_path / "out")
    texts = {prompt["id"]: prompt["text"] for prompt in prompts()}
    rows = read_rows(tmp_path / "out")
    assert [row["id"] for row in rows] == list(texts)
    for row in rows:
        ids, prompt = row["input_ids"], texts[row["id"]]
        prompt_ids = tiny_tokenizer.encode(prompt)
        assert ids[: len(prompt_ids)] == prompt_ids
        assert row["completion_mask"] == [t >= len(prompt_ids) for t in range(len(ids))]
        assert row["chunk_index"] == 0
        assert row["text"] == tiny_tokenizer.decode(ids)
        assert row["text"].startswith(prompt)
        expected = float64_reference(tiny_model, ids, 0, top_k=20)
        assert np.isnan(row["target_logprob"][-1])  # nothing is known to follow
        for name in ("topk_logprobs", "tail_logprob", "target_logprob", "logsumexp", "entropy"):
            found, wanted = np.array(row[name], float), expected[name]
            if name == "target_logprob":
                found, wanted = found[:-1], wanted[:-1]
            step = 0 if name == "logsumexp" else np.spacing(np.abs(wanted).astype(np.float16)) / 2
            assert (np.abs(found - wanted) <= 2e-3 + step).all(), name


def test_a_completion_ends_with_the_token_that_ends_it_or_at_max_new_tokens(make_recipe, tmp_path):
    recipe = make_recipe(generation="max_new_tokens = 40\nsamples = 6", sequences="max_length = 80")
    run(recipe, tmp_path / "out")
    manifest, rows = read_manifest(tmp_path / "out"), read_rows(tmp_path / "out")
    eos = manifest["teacher"]["generation_eos_ids"]
    assert eos == [0]
    ended = 0
    for row in rows:
        ids = completions(row)
        assert 0 < len(ids) <= 40
        assert not set(ids[:-1]) & set(eos)
        assert len(ids) == 40 or ids[-1] in eos
        ended += ids[-1] in eos
    assert 0 < ended < len(rows)
    assert manifest["totals"]["completions"] == {
        "prompts": 14,
        "prompts_too_long": 0,
        "completions": len(rows),
        "tokens": sum(len(completions(row)) for row in rows),
        "ended": ended,
        "corrected": 0,
    }
    assert manifest["totals"]["documents"] == 14


def test_a_list_of_ends_is_respected_and_recorded(make_recipe, tmp_path, tiny_teacher_dir):
    run(make_recipe(generation=DRAWN), tmp_path / "plain")
    ends = sorted({ids[3] for ids in written(tmp_path / "plain").values() if len(ids) > 3})[:3]
    teacher = tmp_path / "chatty"
    shutil.copytree(tiny_teacher_dir, teacher)
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    run(make_recipe(teacher=teacher, generation=DRAWN), tmp_path / "out")
    assert read_manifest(tmp_path / "out")["teacher"]["generation_eos_ids"] == sorted({0, *ends})
    for name, ids in written(tmp_path / "plain").items():
        end = next((i + 1 for i, token in enumerate(ids) if token in {0, *ends}), len(ids))
        assert written(tmp_path / "out")[name] == ids[:end]


# Greedy


def write_others(monkeypatch) -> None:
    """Have drafts go wrong at every fifth step, wherever their attention happens to be that of the forward pass to the bit."""
    logits, calls = Drafter.logits, iter(range(10**9))

    def wrong(self, sequences, numbers=None):
        found_BV = logits(self, sequences, numbers)
        if next(calls) % 5 == 4:
            found_BV = found_BV.scatter(1, found_BV.argmax(-1, keepdim=True), -torch.inf)
        return found_BV

    monkeypatch.setattr(Drafter, "logits", wrong)


@pytest.mark.parametrize("writer", ["float32", "drafter", "wrong drafter", "generate"])
@pytest.mark.parametrize(
    "output", ["", 'top_k = "all"', "completions_only = true\nhidden_states = true"]
)
def test_every_greedy_token_is_the_first_of_what_is_stored(
    writer, output, make_recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(generation, "FIRST_DRAFT_TOKENS", 7)
    monkeypatch.setattr(generation, "SHORTEST_DRAFT_TOKENS", 5)
    monkeypatch.setattr(generation, "CAPTURE_SHARE", {"cpu": 1e-4})
    if writer == "wrong drafter":
        write_others(monkeypatch)
    elif writer == "generate":
        monkeypatch.setattr(Decoder, "_can_draft", lambda self: False)
    write_jsonl(tmp_path / "corpus.jsonl", prompts(30))
    recipe = make_recipe(generation=f"{GREEDY}\nbatch_tokens = 300", output=output or "top_k = 20")
    if writer != "float32":
        recipe.write_text(recipe.read_text().replace('"float32"', '"bfloat16"'))
    run(recipe, tmp_path / "out")
    assert not_the_captured_choice(tmp_path / "out") == []
    assert problems(tmp_path / "out") == []  # target_logprob of a corrected token, too
    corrected = read_manifest(tmp_path / "out")["totals"]["completions"]["corrected"]
    if writer == "float32":
        assert corrected == 0
    elif writer != "drafter":
        assert corrected > 3


def test_a_draft_ends_with_the_text_and_later_ones_go_on_from_what_counts(
    make_recipe, tmp_path, monkeypatch, tiny_teacher_dir
):
    """Ends that come in the middle of drafts; the same completions, however long drafts are and wherever they go wrong."""
    teacher = tmp_path / "chatty"
    shutil.copytree(tiny_teacher_dir, teacher)
    recipe = make_recipe(teacher=teacher, generation=GREEDY)
    recipe.write_text(recipe.read_text().replace('"float32"', '"bfloat16"'))
    run(recipe, tmp_path / "plain")
    ends = sorted({ids[9] for ids in written(tmp_path / "plain").values() if len(ids) > 9})[:3]
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    run(recipe, tmp_path / "whole")
    lengths = {len(ids) for ids in written(tmp_path / "whole").values()}
    assert len(lengths) > 2
    write_others(monkeypatch)
    run(recipe, tmp_path / "wrong")
    monkeypatch.setattr(generation, "CAPTURE_SHARE", {"cpu": 1e-4})
    monkeypatch.setattr(generation, "SHORTEST_DRAFT_TOKENS", 4)
    run(recipe, tmp_path / "short")
    for name in ("wrong", "short"):
        assert written(tmp_path / name) == written(tmp_path / "whole")
        assert problems(tmp_path / name, teacher, recompute=30) == []


def test_a_verifier_that_looks_away_would_let_wrong_tokens_pass(make_recipe, tmp_path, monkeypatch):
    """So that the test above shows that the capture pass decides, and not that nothing is ever in doubt."""
    monkeypatch.setattr(generation, "_choices", lambda found, following: following)
    write_others(monkeypatch)
    write_jsonl(tmp_path / "corpus.jsonl", prompts(30))
    recipe = make_recipe(generation=GREEDY)
    recipe.write_text(recipe.read_text().replace('"float32"', '"bfloat16"'))
    run(recipe, tmp_path / "out")
    assert not_the_captured_choice(tmp_path / "out")
    found = problems(tmp_path / "out")
    assert any("was written greedily, but not with the most probable token" in p for p in found)


CHOICES = {
    "greedy": (GREEDY, "tail_samples = 0"),
    "greedy, everything": (
        GREEDY,
        "tail_samples = 3\nseed = 2\ntemperatures = [2.0]\nhidden_states = true",
    ),
    "greedy, all": (GREEDY, 'top_k = "all"'),
    "drawn": (DRAWN, ""),
    "drawn, everything": (
        f"{DRAWN}\ntemperature = 0.8\ntop_p = 0.9\nseed = 5\nsamples = 3",
        'tail_samples = 3\ntemperatures = [2.0]\nhidden_states = true\nprofile = "compact"\ntext = false',
    ),
    "drawn, all": (f"{DRAWN}\nsamples = 2", 'top_k = "all"\nhidden_states = true'),
    "greedy, completions only": (
        GREEDY,
        "completions_only = true\ntail_samples = 2\nhidden_states = true",
    ),
    "drawn, all, completions only": (DRAWN, 'top_k = "all"\ncompletions_only = true'),
    "one token": ("max_new_tokens = 1\nsamples = 2", ""),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_builds_resumes_to_the_same_bytes_verifies_and_loads(
    choice, make_recipe, tmp_path, tiny_teacher_dir
):
    how, output = CHOICES[choice]
    output = f"shard_tokens = 90\n{output}"
    recipe = make_recipe(generation=f"{how}\nbatch_tokens = 150", output=output)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(recipe, whole)
    while run(recipe, parts, max_shards=1).status == "stopped early":
        pass
    assert data_bytes(parts) == data_bytes(whole)
    assert len(data_bytes(whole)) > 1
    report = verify(whole, recompute=8, teacher_path=tiny_teacher_dir, seed=0)
    assert report.problems == []
    assert report.recomputed["mean_abs_error"] < 2e-3
    dataset = load_dataset(str(whole), split="train", cache_dir=str(tmp_path / "cache"))
    row = dataset.with_format("torch")[0]
    assert row["completion_mask"].dtype == torch.bool
    assert row["completion_mask"].shape == row["input_ids"].shape


# Drawn


def test_what_is_written_depends_on_seed_and_document_and_not_on_how_the_work_is_cut(
    make_recipe, tmp_path
):
    def build(name: str, how: str, **changes: str) -> dict[str, list[int]]:
        run(make_recipe(generation=f"{DRAWN}\n{how}", **changes), tmp_path / name)
        return written(tmp_path / name)

    expected = build("whole", "samples = 2")
    assert build("narrow", "samples = 2\nbatch_tokens = 40") == expected
    cut = build("cut", "samples = 2", output="shard_tokens = 50", sequences="batch_tokens = 64")
    assert cut == expected
    assert len(data_bytes(tmp_path / "cut")) > 3
    write_jsonl(tmp_path / "corpus.jsonl", prompts()[::-1])
    assert build("backwards", "samples = 2") == expected
    other = build("seed", "samples = 2\nseed = 1")
    assert sum(other[name] == expected[name] for name in expected) < 3


def test_samples_of_a_prompt_are_different_rows_with_different_ids(make_recipe, tmp_path):
    run(make_recipe(generation=f"{DRAWN}\nsamples = 3"), tmp_path / "out")
    found = written(tmp_path / "out")
    assert list(found) == [f"p-{i}/{sample}" for i in range(14) for sample in range(3)]
    distinct = {tuple(ids) for ids in found.values()}
    assert len(distinct) > 0.9 * len(found)
    run(make_recipe(generation=DRAWN), tmp_path / "one")
    # The first of several is the one of a single.
    assert written(tmp_path / "one") == {f"p-{i}": found[f"p-{i}/0"] for i in range(14)}


def test_draws_of_completions_and_draws_from_the_tail_use_different_numbers(make_recipe, tmp_path):
    """With the same seed; otherwise a drawn token would tell what was drawn from the tail behind it."""
    from builder.capture.draws import uniforms

    used = {"generation": defaultdict(int), "pipeline": defaultdict(int)}

    def spy_on(module):
        def spying(seed, document_id, chunk_index, **sizes):
            used[module][seed, document_id, chunk_index] += 1
            return uniforms(seed, document_id, chunk_index, **sizes)

        return spying

    with pytest.MonkeyPatch.context() as patch:
        for module in used:
            patch.setattr(f"builder.capture.{module}.uniforms", spy_on(module))
        run(make_recipe(generation=DRAWN), tmp_path / "out")
    written, captured = used.values()
    assert len(written) == len(captured) == 14
    assert not written.keys() & captured.keys()
    assert set(written.values()) == {1}
    assert set(captured.values()) <= {1, 2}  # a row that is run alone, too, is drawn for again


def test_only_completions_that_were_drawn_from_what_is_stored_are_as_surprising_as_it_says(
    make_recipe, tmp_path, monkeypatch
):
    run(make_recipe(generation=f"{DRAWN}\nsamples = 20"), tmp_path / "fair")
    assert problems(tmp_path / "fair") == []
    init = Decoder.__init__

    def warmer(self, teacher, *, temperature, **options):
        init(self, teacher, temperature=1.3, **options)

    monkeypatch.setattr(Decoder, "__init__", warmer)
    run(make_recipe(generation=f"{DRAWN}\nsamples = 20"), tmp_path / "warm")
    found = problems(tmp_path / "warm")
    assert found
    assert all("the completions were not drawn from the stored distributions" in p for p in found)


# Chats

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_chat_is_completed_where_the_assistant_is_asked(
    make_recipe, tmp_path, tiny_teacher_dir, tiny_tokenizer
):
    user, answer = (
        {"role": "user", "content": "Hi <eos> fox"},
        {"role": "assistant", "content": "Yes."},
    )
    again = {"role": "user", "content": "lazy dog"}
    write_jsonl(
        tmp_path / "corpus.jsonl",
        [
            {"id": "asked", "messages": [user]},
            {"id": "answered", "messages": [user, answer]},
            {"id": "longer", "messages": [user, answer, again]},
            {"id": "nothing", "messages": [answer]},
        ],
    )
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    recipe = make_recipe(
        corpus='messages_column = "messages"',
        sequences='chat_template = "chat.jinja"\nmax_length = 120',
        generation=GREEDY,
    )
    run(recipe, tmp_path / "out")
    asked, answered, longer = read_rows(tmp_path / "out")
    first = "[user]Hi <eos> fox<eos>[assistant]"
    assert asked["text"].startswith(first)
    # An answer that is there gives way to the teacher's own, and earlier ones belong to the prompt.
    assert asked["input_ids"] == answered["input_ids"]
    assert longer["text"].startswith(f"{first}Yes.<eos>[user]lazy dog<eos>[assistant]")
    for row, ends in ((asked, 1), (longer, 3)):
        num_prompt = row["completion_mask"].index(True)
        assert all(row["completion_mask"][num_prompt:])
        assert tiny_tokenizer.decode(row["input_ids"][:num_prompt]).endswith("[assistant]")
        # Only the template's are special tokens.
        assert row["input_ids"][:num_prompt].count(tiny_tokenizer.eos_token_id) == ends
    totals = read_manifest(tmp_path / "out")["totals"]
    assert (totals["documents"], totals["documents_skipped"]) == (3, 1)
    assert not_the_captured_choice(tmp_path / "out") == []
    report = verify(tmp_path / "out", recompute=9, teacher_path=tiny_teacher_dir, seed=0)
    assert report.problems == []


# Limits


def test_limits_mean_what_they_say(make_recipe, tmp_path):
    run(make_recipe(generation=f"{DRAWN}\nsamples = 2"), tmp_path / "all")
    rows = read_rows(tmp_path / "all")
    run(
        make_recipe(generation=f"{DRAWN}\nsamples = 2", corpus="max_documents = 5"),
        tmp_path / "documents",
    )
    assert [row["id"] for row in read_rows(tmp_path / "documents")] == [r["id"] for r in rows[:10]]
    assert read_manifest(tmp_path / "documents")["totals"]["documents"] == 5

    recipe = make_recipe(
        generation=f"{DRAWN}\nsamples = 2",
        corpus="max_tokens = 250",
        output="shard_tokens = 90",
    )
    run(recipe, tmp_path / "tokens")
    found = read_rows(tmp_path / "tokens")
    assert [row["id"] for row in found] == [row["id"] for row in rows[: len(found)]]
    lengths = [len(row["input_ids"]) for row in found]
    assert len(found) % 2 == 0
    assert sum(lengths) >= 250 > sum(lengths[:-2])
    totals = read_manifest(tmp_path / "tokens")["totals"]
    assert totals["documents"] == totals["completions"]["prompts"] == len(found) / 2
    # A build that was stopped ends with the same.
    while run(recipe, tmp_path / "parts", max_shards=1).status == "stopped early":
        pass
    assert data_bytes(tmp_path / "parts") == data_bytes(tmp_path / "tokens")


def test_prompts_that_leave_no_room_are_skipped_counted_and_named_once(make_recipe, tmp_path):
    long = {"text": " ".join(TRAINING_TEXT)}
    rows = prompts(6)
    rows[2:2] = [{"id": "long-0", **long}]
    rows += [{"id": f"long-{i}", **long} for i in (1, 2)]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    recipe = make_recipe(generation=DRAWN, output="shard_tokens = 60")
    notices: list[str] = []
    run(recipe, tmp_path / "out", notice=notices.append)
    assert len(notices) == 1
    assert "document 'long-0' has" in notices[0]
    assert "a prompt can have at most 40: such documents are skipped and counted" in notices[0]
    assert list(written(tmp_path / "out")) == [f"p-{i}" for i in range(6)]
    totals = read_manifest(tmp_path / "out")["totals"]
    assert totals["completions"]["prompts_too_long"] == 3
    assert (totals["documents"], totals["documents_skipped"]) == (6, 3)
    while run(recipe, tmp_path / "parts", max_shards=1).status == "stopped early":
        pass
    assert data_bytes(tmp_path / "parts") == data_bytes(tmp_path / "out")
    assert read_manifest(tmp_path / "parts")["totals"]["completions"] == totals["completions"]

    write_jsonl(tmp_path / "corpus.jsonl", [{"id": "long", **long}])
    with pytest.raises(
        ValueError, match=r"no prompt that leaves room for generation\.max_new_tokens \(1 too long"
    ):
        run(recipe, tmp_path / "none")


def test_a_batch_that_does_not_fit_is_halved(make_recipe, tmp_path, monkeypatch):
    run(make_recipe(generation=DRAWN), tmp_path / "whole")
    decode = Decoder.decode

    def small(self, sequences, **options):
        if len(sequences) > 3:
            raise torch.OutOfMemoryError
        return decode(self, sequences, **options)

    monkeypatch.setattr(Decoder, "decode", small)
    notices: list[str] = []
    run(make_recipe(generation=DRAWN), tmp_path / "out", notice=notices.append)
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert "while writing 8 completions of up to" in notices[0]
    assert "a smaller generation.batch_tokens avoids this" in notices[0]
    assert sum(r.halved_batches for r in records_of(read_manifest(tmp_path / "out"))) == len(
        notices
    )

    def never(self, sequences, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Decoder, "decode", never)
    with pytest.raises(ValueError, match=r"writing a single sequence of \d+ tokens does not fit"):
        run(make_recipe(generation=DRAWN), tmp_path / "never")


def test_drafts_that_do_not_fit_are_halved_and_go_on_from_what_is_settled(
    make_recipe, tmp_path, monkeypatch
):
    """Memory that ends after some drafts were settled, others begun: the same completions, and none is captured twice."""
    write_others(monkeypatch)
    monkeypatch.setattr(generation, "CAPTURE_SHARE", {"cpu": 1e-4})
    monkeypatch.setattr(generation, "SHORTEST_DRAFT_TOKENS", 4)
    recipe = make_recipe(generation=GREEDY)
    recipe.write_text(recipe.read_text().replace('"float32"', '"bfloat16"'))
    run(recipe, tmp_path / "whole")
    run_model, calls = Drafter._run, iter(range(10**9))

    def small(self, ids, starts):
        if len(ids) > 3 and next(calls) > 9:
            raise torch.OutOfMemoryError
        return run_model(self, ids, starts)

    monkeypatch.setattr(Drafter, "_run", small)
    notices: list[str] = []
    steps: list[int] = []
    run(recipe, tmp_path / "out", notice=notices.append, progress=steps.append)
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert problems(tmp_path / "out") == []
    assert not_the_captured_choice(tmp_path / "out") == []
    manifest = read_manifest(tmp_path / "out")
    assert sum(steps) == manifest["totals"]["tokens"]
    assert len(notices) > 1
    assert all("continuing with half as many" in notice for notice in notices)
    assert sum(record.halved_batches for record in records_of(manifest)) == len(notices)


def test_what_a_teacher_can_do_does_not_depend_on_the_memory_that_is_free(
    make_recipe, tmp_path, monkeypatch
):
    def never(*arguments, **options):
        raise torch.OutOfMemoryError

    recipe = make_recipe(generation=GREEDY)
    recipe.write_text(recipe.read_text().replace('"float32"', '"bfloat16"'))
    for door, name in ((Drafter, "_run"), (Decoder, "_generate")):
        with monkeypatch.context() as patch:
            patch.setattr(door, name, never)
            with pytest.raises(torch.OutOfMemoryError):
                run(recipe, tmp_path / name)


def test_no_token_is_run_again_that_is_still_in_its_place(make_recipe, tmp_path, monkeypatch):
    """Positions that the writing model is run over: each once, but for the last before every step, and what follows a correction."""
    write_others(monkeypatch)
    monkeypatch.setattr(generation, "CAPTURE_SHARE", {"cpu": 1e-4})
    monkeypatch.setattr(generation, "SHORTEST_DRAFT_TOKENS", 8)
    recipe = make_recipe(generation=GREEDY)
    recipe.write_text(recipe.read_text().replace('"float32"', '"bfloat16"'))
    run_model, made, found = Drafter._run, Drafter.__init__, []

    def make(self, *arguments, **options):
        made(self, *arguments, **options)
        found.append(self)
        self.positions = self.steps = 0

    def count(self, ids, starts):
        self.positions += sum(map(len, ids))
        return run_model(self, ids, starts)

    extend = Drafter.extend

    def write(self, sequences, counts):
        drafts = extend(self, sequences, counts)
        self.steps += sum(map(len, drafts))
        return drafts

    monkeypatch.setattr(Drafter, "__init__", make)
    monkeypatch.setattr(Drafter, "_run", count)
    monkeypatch.setattr(Drafter, "extend", write)
    run(recipe, tmp_path / "out")
    totals = read_manifest(tmp_path / "out")["totals"]
    corrected = totals["completions"]["corrected"]
    assert corrected > 20
    drafters = [drafter for drafter in found if drafter.steps]
    steps = sum(drafter.steps for drafter in drafters)
    prompt_tokens = totals["tokens"] - totals["completions"]["tokens"]
    # Each step runs one token; the prompts but for their last tokens are run once; a draft's last token, or the one before a
    # correction, at most once more for each capture of its row.
    rest = sum(drafter.positions for drafter in drafters) - steps - (prompt_tokens - 14)
    assert 0 <= rest <= corrected + totals["completions"]["tokens"] // 8


def test_a_teacher_that_yields_nan_while_it_writes_names_the_document(
    make_recipe, tmp_path, monkeypatch
):
    decode = Decoder.decode

    def broken(self, sequences, **options):
        return [None, *decode(self, sequences, **options)[1:]]

    monkeypatch.setattr(Decoder, "decode", broken)
    with pytest.raises(ValueError, match="NaN or infinity while it completes document 'p-"):
        run(make_recipe(generation=DRAWN), tmp_path / "out")


def test_progress_counts_every_token_once(make_recipe, tmp_path):
    recipe = make_recipe(generation=GREEDY)
    recipe.write_text(recipe.read_text().replace('"float32"', '"bfloat16"'))
    steps: list[int] = []
    run(recipe, tmp_path / "out", progress=steps.append)
    assert sum(steps) == read_manifest(tmp_path / "out")["totals"]["tokens"]


# Stopping and going on


@pytest.mark.parametrize(
    "how", [f"{GREEDY}\nbatch_tokens = 64", f"{DRAWN}\nsamples = 2\nbatch_tokens = 64"]
)
def test_a_killed_build_ends_with_the_same_bytes(how, make_recipe, tmp_path, killer):  # noqa: F811
    recipe = make_recipe(generation=how, output="shard_tokens = 60\ntail_samples = 3")
    recipe.write_text(recipe.read_text().replace('"float32"', '"bfloat16"'))
    killer.build(recipe, tmp_path / "whole")
    for step in ("os.replace#4:after", "os.replace#7:before"):
        output = tmp_path / step[:12]
        assert killer.build(recipe, output, at_step=step)["killed"]
        before = finished_shards(output)
        assert killer.build(recipe, output)["status"] == 0
        check_kept(before, output)
        assert data_bytes(output) == data_bytes(tmp_path / "whole")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_unfinished_build_of_older_code_is_refused_where_its_drafts_were_rounded_otherwise(
    make_recipe, tmp_path, dtype
):
    recipe = make_recipe(generation=f"{GREEDY}\nbatch_tokens = 64", output="shard_tokens = 60")
    recipe.write_text(recipe.read_text().replace('"float32"', f'"{dtype}"'))
    output = tmp_path / "out"
    run(recipe, output, max_shards=1)
    settled = output / ".build" / "teacher.json"
    teacher = json.loads(settled.read_text())
    assert teacher.pop("greedy_drafts", None) == ("cached" if dtype == "bfloat16" else None)
    settled.write_text(json.dumps(teacher))
    if dtype == "bfloat16":
        with pytest.raises(ValueError, match=r'another teacher \(greedy_drafts: null → "cached"\)'):
            run(recipe, output)
        return
    run(recipe, output)
    manifest = read_manifest(output)
    assert "greedy_drafts" not in manifest["teacher"]
    assert problems(output) == []


# Verification


def other_token(rows: list[Row]) -> None:
    rows[1]["input_ids"][-2] = 200


def shift_the_mask(rows: list[Row]) -> None:
    rows[1]["completion_mask"][:-1] = rows[1]["completion_mask"][1:]


def interrupt(rows: list[Row]) -> None:
    rows[1]["completion_mask"][-3] = False


def all_completion(rows: list[Row]) -> None:
    rows[1]["completion_mask"][:] = True


def no_end(rows: list[Row]) -> None:
    rows[1]["completion_mask"][-1] = False


def go_on(rows: list[Row]) -> None:
    rows[1]["input_ids"][-3] = 0


def cut(rows: list[Row]) -> None:
    for name, values in rows[1].items():
        if isinstance(values, np.ndarray):
            rows[1][name] = values[:-2]
    rows[1]["target_logprob"][-1] = np.nan


def know_what_follows(rows: list[Row]) -> None:
    rows[1]["target_logprob"][-1] = -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_token, "was written greedily, but not with the most probable token"),
        (interrupt, "the completion is interrupted"),
        (all_completion, "the row begins with its completion"),
        (no_end, "the row does not end with its completion"),
        (go_on, "the completion goes on after the token that ends it"),
        (cut, "the completion ends before 24 tokens, and with none that ends it"),
        (shift_the_mask, "the completion is longer than 24 tokens"),
        (know_what_follows, "target_logprob is there, but nothing follows a completion"),
    ],
)
def test_a_forged_completion_is_found_without_the_teacher(change, message, make_recipe, tmp_path):
    run(make_recipe(generation=GREEDY), tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    assert len(completions(rows[1])) == 24
    forge(tmp_path / "out", lambda rows: None)
    assert problems(tmp_path / "out") == []
    forge(tmp_path / "out", change, all_files=False)
    assert any(message in problem for problem in problems(tmp_path / "out"))


def other_text(rows: list[Row]) -> None:
    rows[1]["text"] = rows[1]["text"][:-1] + "!"


def other_prompt(rows: list[Row]) -> None:
    rows[1]["text"] = "What? " + rows[1]["text"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_text, "the text does not end with what the completion's tokens spell"),
        (other_prompt, "input_ids are not what the teacher's tokenizer makes of the prompt"),
    ],
)
def test_a_text_that_is_not_that_of_the_tokens_is_found_with_the_teacher(
    change, message, make_recipe, tmp_path, tiny_teacher_dir
):
    run(make_recipe(generation=GREEDY), tmp_path / "out")
    forge(tmp_path / "out", change, all_files=False)
    found = problems(tmp_path / "out", tiny_teacher_dir, recompute=100)
    assert len(found) == 1
    assert message in found[0]


# Recipes


def test_a_recipe_without_it_is_the_same_as_ever(make_recipe):
    assert "generation" not in load_recipe(make_recipe()).published()
    recipe = load_recipe(make_recipe(generation=GREEDY)).published()
    assert recipe["generation"] == {
        "max_new_tokens": 24,
        "temperature": 0.0,
        "top_p": 1.0,
        "samples": 1,
        "seed": 0,
        "batch_tokens": 16_384,
    }
    plan = {"recipe": recipe, "corpus": {}, "teacher": {}}
    other = {**plan, "recipe": {**recipe, "generation": {**recipe["generation"], "seed": 1}}}
    assert fingerprint(plan) != fingerprint(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation": "temperature = 1.0"}, r"'generation\.max_new_tokens' is missing"),
        (
            {"generation": "max_new_tokens = 9\ntopp = 0.9"},
            r"unknown key 'generation\.topp'; did you mean 'top_p'",
        ),
        (
            {"generation": "max_new_tokens = 0"},
            r"generation\.max_new_tokens: expected more than 0",
        ),
        (
            {"generation": "max_new_tokens = 64"},
            r"max_new_tokens is 64, which leaves no room for a prompt in sequences\.max_length = 64",
        ),
        ({"generation": f"{DRAWN}\ntop_p = 0.0"}, r"generation\.top_p: expected more than 0"),
        ({"generation": f"{DRAWN}\ntop_p = 1.5"}, r"generation\.top_p: expected at most 1"),
        (
            {"generation": f"{DRAWN}\ntemperature = -1"},
            r"generation\.temperature: expected at least 0",
        ),
        ({"generation": f"{DRAWN}\ntemperature = 0.001"}, r"expected at least 0\.01, or 0 for"),
        (
            {"generation": f"{GREEDY}\nseed = 1"},
            "seed applies only to sampling, but temperature is 0",
        ),
        ({"generation": f"{GREEDY}\ntop_p = 0.9"}, "top_p applies only to sampling"),
        ({"generation": f"{GREEDY}\nsamples = 2"}, "samples applies only to sampling"),
        (
            {"generation": DRAWN, "sequences": 'long_documents = "truncate"'},
            r"sequences\.long_documents is 'truncate', but prompts are neither truncated nor ended with a token",
        ),
        (
            {"generation": DRAWN, "sequences": 'eos = "always"'},
            r"sequences\.eos is 'always', but prompts are neither",
        ),
    ],
)
def test_a_wrong_setting_is_one_line(changes, message, make_recipe):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(make_recipe(**changes))
    assert "\n" not in str(caught.value)


def test_an_unfinished_build_goes_on_with_its_own_settings_only(make_recipe, tmp_path):
    run(make_recipe(generation=DRAWN, output="shard_tokens = 60"), tmp_path / "out", max_shards=1)
    with pytest.raises(ValueError, match=r"recipe\.generation\.temperature: 1\.0 → 0\.5"):
        run(
            make_recipe(generation=f"{DRAWN}\ntemperature = 0.5", output="shard_tokens = 60"),
            tmp_path / "out",
        )
    with pytest.raises(ValueError, match=r"recipe\.generation: .* → null"):
        run(make_recipe(output="shard_tokens = 60"), tmp_path / "out")


# What is said of it


def test_card_and_info_say_who_wrote_what_and_how(
    make_recipe, tmp_path, tiny_teacher_dir, monkeypatch
):
    write_jsonl(
        tmp_path / "corpus.jsonl", [*prompts(), {"id": "long", "text": " ".join(TRAINING_TEXT)}]
    )
    recipe = make_recipe(
        generation=f"{DRAWN}\ntemperature = 0.8\ntop_p = 0.9\nsamples = 2\nseed = 7"
    )
    run(recipe, tmp_path / "drawn")
    counts = read_manifest(tmp_path / "drawn")["totals"]["completions"]
    card = " ".join((tmp_path / "drawn" / "README.md").read_text().split())
    for sentence in (
        "tokens of prompts from 1 local file and of completions by the teacher itself, each with",
        "The teacher wrote 28 completions of 14 prompts, 2 for each: it drew tokens at temperature 0.8 from as few of the most "
        "probable ones as have a probability of 0.9 together (top_p), with seed 7.",
        f"{counts['ended']} of them {'ends' if counts['ended'] == 1 else 'end'} with a token that ends a text (id 0); the others "
        "were cut after 24 tokens.",
        "The `id` of a row is that of its prompt with /0, /1, … behind it.",
        "Without room for a completion, and so not in it: 1 prompt.",
        "the stored distributions are those of the teacher at temperature 1 over its whole vocabulary",
        "The token that would follow the last one of a row is unknown, and `target_logprob` is NaN there.",
        f"28 of {counts['tokens'] / 28:.1f} tokens on average",
        "from 14 prompts",
        "[generation] max_new_tokens = 24 temperature = 0.8 top_p = 0.9 samples = 2 seed = 7",
    ):
        assert sentence in card
    text = describe(tmp_path / "drawn")
    assert f"28 completions of 14 prompts, temperature 0.8, top_p 0.9; {counts['ended']} en" in text
    assert "of 14 documents, 1 too long or blank ones skipped" in text

    recipe = make_recipe(generation=GREEDY)
    recipe.write_text(recipe.read_text().replace('"float32"', '"bfloat16"'))
    write_others(monkeypatch)
    run(recipe, tmp_path / "greedy")
    card = " ".join((tmp_path / "greedy" / "README.md").read_text().split())
    assert "14 completions of 14 prompts: it always took the most probable token, the first" in card
    corrected = read_manifest(tmp_path / "greedy")["totals"]["completions"]["corrected"]
    assert corrected > 1
    assert f"(at {corrected} near-ties it had rounded the other way" in card
    assert "14 prompts, greedily; " in describe(tmp_path / "greedy")
    shown = describe_row(tmp_path / "greedy", 0, teacher_path=tiny_teacher_dir)
    assert "(not known)" in shown.splitlines()[-1]


@pytest.mark.parametrize("output", ["", "completions_only = true", 'top_k = "all"'])
def test_the_python_of_the_card_runs_as_pasted(output, make_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(make_recipe(generation=DRAWN, output=output), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    snippets = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    assert len(snippets) == 3
    code = "\n".join(snippets).replace("path/to/this/directory", str(tmp_path / "out"))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    row = names["row"]
    assert len(names["kept"]) == row["completion_mask"].sum()
    assert torch.isfinite(names["loss"])


def test_the_recipe_in_the_card_builds_the_same(make_recipe, tmp_path):
    run(make_recipe(generation=f"{DRAWN}\ntemperature = 0.5\nsamples = 2"), tmp_path / "out")
    toml = (tmp_path / "out" / "README.md").read_text().split("```toml\n")[1].split("```")[0]
    original = load_recipe(tmp_path / "recipe.toml")
    (tmp_path / "again.toml").write_text(toml)
    assert load_recipe(tmp_path / "again.toml").generation == original.generation


def test_a_dry_run_says_what_it_takes_at_most(make_recipe, tmp_path, cli):
    rows = [*prompts(), {"id": "long", "text": " ".join(TRAINING_TEXT)}]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    path = make_recipe(generation=f"{DRAWN}\nsamples = 3")
    found = estimate(load_recipe(path), tmp_path, device="cpu")
    run(path, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    missing = 24 * 14 * 3 - manifest["totals"]["completions"]["tokens"]
    assert found.tokens == manifest["totals"]["tokens"] + missing
    status, _, err = cli("build", path, "--output", tmp_path / "none", "--dry-run")
    assert status == 0
    assert "documents  all 15: 1 skipped (blank, or too long to be completed)\n" in err
    assert f"tokens     at most {found.tokens:,}\n" in err
    assert "time       unknown" in err


# Readers


def test_a_student_learns_from_the_completions_only(make_recipe, tmp_path):
    run(make_recipe(generation=DRAWN), tmp_path / "out")
    rows = {tuple(row["input_ids"]): row["completion_mask"] for row in read_rows(tmp_path / "out")}
    batches = load_logits(tmp_path / "out").batches(batch_size=1, seed=None)
    seen = 0
    for batch in batches:
        ids = batch["input_ids"][0].tolist()
        learned = [*rows[tuple(ids)][1:], False]
        assert batch["mask"][0].tolist() == learned
        targets = [*ids[1:], -100]
        assert batch["target_ids"][0].tolist() == [
            target if is_learned else -100
            for target, is_learned in zip(targets, learned, strict=True)
        ]
        seen += 1
    assert seen == 14


def test_a_dataset_of_completions_is_published_and_loaded(tmp_path, tiny_teacher_dir):
    output = build_dataset(
        tmp_path / "x",
        tiny_teacher_dir,
        corpus="max_documents = 6",
        sequences="max_length = 250",
        generation=f"{GREEDY}\nbatch_tokens = 1000",
    )
    with serve() as hub:
        client = Client(hub.endpoint, tmp_path / "home")
        done = client.cli("publish", "org/set", output, "--teacher", tiny_teacher_dir)
        assert done.returncode == 0, done.stderr
        loaded = client.python(
            "from logit_dataset import load_logits\n"
            "from datasets import load_dataset\n"
            "rows = load_dataset('org/set', revision='v1.0.0', split='train', streaming=True)\n"
            "print(sum(sum(row['completion_mask']) for row in rows))\n"
            "batches = load_logits('org/set', revision='v1.0.0').batches(batch_size=2)\n"
            "print(sum(int(batch['mask'].sum()) for batch in batches))\n"
        )
        client.close()
    assert loaded.returncode == 0, loaded.stderr
    tokens = read_manifest(output)["totals"]["completions"]["tokens"]
    assert loaded.stdout.split() == [str(tokens)] * 2


def test_the_recipe_of_the_example():
    recipe = load_recipe(REPOSITORY / "examples" / "answers" / "recipe.toml")
    assert recipe.generation.samples == 2
    assert recipe.corpus.files == ("questions.jsonl",)
