"""What a recipe may add to the row, end to end: right values, the same bytes after a stop, verified, loaded, shown."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

from builder.card.charts import measure
from builder.dataset.manifest import read_manifest
from builder.plan import fit
from builder.recipe.file import load_recipe
from builder.recipe.recipe import Recipe
from builder.verify.comparison import _best
from builder.verify.verify import verify
from logit_dataset import FrequentTokens, distillation_loss, load_logits
from logit_dataset.schema import FLOAT16_MIN, arrow_schema, columns
from logit_dataset.schema import Layout as RowLayout
from tests.build.test_build import data_bytes, read_rows, run
from tests.conftest import TINY_VOCAB_SIZE
from tests.loopback_hub import card_errors
from tests.verify.forging import Row, forge, refit
from tests.verify.test_verify import problems

EVERYTHING = "tail_samples = 6\nseed = 3\ntemperatures = [2.0, 0.5]\nhidden_states = true"
WHOLE = 'top_k = "all"\ntemperatures = [3]\nhidden_states = true'

CHOICES = {
    "nothing": "tail_samples = 0",
    "everything": EVERYTHING,
    "everything, compact and without text": f'{EVERYTHING}\nprofile = "compact"\ntext = false',
    "temperatures alone": "tail_samples = 0\ntemperatures = [1.5]",
    "hidden states alone": "tail_samples = 0\nhidden_states = true",
    "top 1": "top_k = 1\ntail_samples = 1",
    "more draws than top k": "top_k = 2\ntail_samples = 30",
    "draws without log-probabilities": "top_k = 3\ntail_samples = 12\ntail_logprobs = false",
    "a top 1 and draws without log-probabilities, of all kinds": (
        f'top_k = 1\n{EVERYTHING}\ntail_logprobs = false\nprofile = "compact"\ntext = false'
    ),
    "all but one, and draws without log-probabilities": (
        f"top_k = {TINY_VOCAB_SIZE}\ntail_samples = 2\ntail_logprobs = false"
    ),
    "all but one": f"top_k = {TINY_VOCAB_SIZE - 1}",
    "top k is all": f"top_k = {TINY_VOCAB_SIZE}\ntemperatures = [2]",
    "all": 'top_k = "all"',
    "all and everything": WHOLE,
    "all, compact": f'{WHOLE}\nprofile = "compact"',
}


def layout_of(output: Path) -> RowLayout:
    manifest = read_manifest(output)
    return RowLayout.of(manifest["recipe"], manifest["teacher"])


def students_can_learn(dataset):
    """The loader gives every column of values a token as it is stored; all of it, and a small vocabulary, give a gradient."""
    data = load_logits(dataset)
    batch = next(iter(data.batches(batch_size=2, seed=None)))
    row = pq.read_table(dataset / "data").slice(0, 1)
    length = len(row["input_ids"][0])
    for name in data.columns:
        stored = np.array(row[name][0].as_py(), dtype=batch[name].numpy().dtype)
        np.testing.assert_array_equal(batch[name][0, :length].numpy(), stored)
    small = data.project(FrequentTokens(data.token_counts(), 20))
    few = next(iter(small.batches(batch_size=2, seed=None)))
    for given, width in ((batch, data.vocab_size), (few, 21)):
        logits = torch.zeros(*given["input_ids"].shape, width).requires_grad_()
        distillation_loss(logits, given).backward()
        assert logits.grad.isfinite().all()
        assert logits.grad.any()


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_builds_resumes_to_the_same_bytes_verifies_and_loads(
    choice, make_recipe, tmp_path, tiny_teacher_dir
):
    recipe = make_recipe(corpus="max_documents = 8", output=CHOICES[choice])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(recipe, whole)
    while run(recipe, parts, max_shards=1).status == "stopped early":
        pass
    assert data_bytes(parts) == data_bytes(whole)
    assert len(data_bytes(whole)) > 1

    report = verify(whole, recompute=6, teacher_path=tiny_teacher_dir, seed=0)
    assert report.problems == []
    assert report.recomputed["top1_agreement"] == 1
    assert report.recomputed["mean_abs_error"] < 2e-3

    students_can_learn(whole)
    layout = layout_of(whole)
    for path in (whole / "data").glob("*.parquet"):
        assert pq.read_schema(path).equals(arrow_schema(layout))
    cache = str(tmp_path / "cache")
    dataset = load_dataset(str(whole), split="train", cache_dir=cache).with_format("torch")
    streamed = load_dataset(str(whole), split="train", streaming=True).with_format("torch")
    for row in (dataset[0], next(iter(streamed))):
        assert list(row) == [column.name for column in columns(layout)]
        for column in columns(layout):
            if column.shape:
                shape = row[column.name].shape
                width = (layout.width(column),) if "," in column.shape else ()
                assert shape == (len(row["input_ids"]), *width), column.name


@pytest.fixture(scope="module")
def everything(tiny_teacher_dir, tmp_path_factory) -> Path:
    return _built(tiny_teacher_dir, tmp_path_factory.mktemp("everything"), EVERYTHING)


@pytest.fixture(scope="module")
def whole(tiny_teacher_dir, tmp_path_factory) -> Path:
    return _built(tiny_teacher_dir, tmp_path_factory.mktemp("whole"), WHOLE)


def _built(teacher: Path, base: Path, output: str) -> Path:
    from tests.conftest import recipe_text, sample_documents, write_jsonl

    write_jsonl(base / "corpus.jsonl", sample_documents())
    text = recipe_text(teacher, "corpus.jsonl", output=output)
    (base / "recipe.toml").write_text(text, encoding="utf-8")
    run(base / "recipe.toml", base / "out")
    return base / "out"


@pytest.fixture
def copy(everything: Path, tmp_path: Path) -> Path:
    shutil.copytree(everything, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def whole_copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def reference(model, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Raw logits and last hidden states of one sequence alone, in float64."""
    with torch.inference_mode():
        output = model(torch.tensor([ids]), output_hidden_states=True)
    return output.logits[0].double().numpy(), output.hidden_states[-1][0].double().numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def log_partition(logits: np.ndarray) -> np.ndarray:
    return np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)


def close(stored: np.ndarray, expected: np.ndarray) -> bool:
    half_step = np.spacing(np.abs(expected).astype(np.float16)).astype(float) / 2
    return bool((np.abs(np.asarray(stored, float) - expected) <= 2e-3 + half_step).all())


def test_every_added_column_equals_the_float64_reference(everything, tiny_model):
    for row in read_rows(everything):
        logits, hidden = reference(tiny_model, row["input_ids"])
        drawn = np.array(row["tail_indices"])
        assert close(row["tail_logprobs"], np.take_along_axis(log_softmax(logits), drawn, -1))
        for name, temperature in (("logsumexp_t2", 2.0), ("logsumexp_t0.5", 0.5)):
            found = np.array(row[name])
            np.testing.assert_allclose(found, log_partition(logits / temperature), atol=2e-3)
        assert close(row["hidden_states"], hidden)
        for head, draws in zip(row["topk_indices"], row["tail_indices"], strict=True):
            assert not set(head) & set(draws)


def test_all_log_probabilities_equal_the_float64_reference(whole, tiny_model):
    for row in read_rows(whole):
        logits, hidden = reference(tiny_model, row["input_ids"])
        assert close(row["logprobs"], log_softmax(logits))
        np.testing.assert_allclose(row["logsumexp_t3"], log_partition(logits / 3), atol=2e-3)
        assert close(row["hidden_states"], hidden)


def test_head_and_draws_of_a_dataset_give_the_entropy_and_other_expectations(
    everything, tiny_model
):
    weight = np.random.default_rng(0).random(TINY_VOCAB_SIZE)
    surplus = []
    for row in read_rows(everything):
        probs = np.exp(log_softmax(reference(tiny_model, row["input_ids"])[0]))
        head = np.exp(np.array(row["topk_logprobs"], float))
        tail = np.exp(np.array(row["tail_logprob"], float))
        sampled = (head * weight[np.array(row["topk_indices"])]).sum(-1)
        sampled += tail * weight[np.array(row["tail_indices"])].mean(-1)
        surplus += list(sampled - probs @ weight)
    error = np.std(surplus) / np.sqrt(len(surplus))
    assert len(surplus) > 1000
    assert abs(np.mean(surplus)) < 4 * error


def draws(output: Path) -> dict[tuple[str, int], list]:
    return {(row["id"], row["chunk_index"]): row["tail_indices"] for row in read_rows(output)}


def test_draws_depend_on_seed_and_document_and_not_on_how_the_work_is_cut(
    everything, make_recipe, tmp_path
):
    run(
        make_recipe(
            output=f"{EVERYTHING}\nshard_tokens = 900",
            sequences="max_length = 64\nbatch_tokens = 64",
        ),
        tmp_path / "cut",
    )
    run(make_recipe(output=EVERYTHING.replace("seed = 3", "seed = 4")), tmp_path / "seed")
    expected, cut, other = draws(everything), draws(tmp_path / "cut"), draws(tmp_path / "seed")
    same = [np.mean(np.equal(expected[key], cut[key])) for key in expected]
    assert list(cut) == list(expected)
    assert np.mean(same) > 0.99  # last bits of the logits may move a draw across a boundary
    assert np.mean([np.mean(np.equal(expected[key], other[key])) for key in expected]) < 0.2


# Recipes


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            "top_k = 0",
            r'output\.top_k: expected a whole number of at least 1, or "all" \(found 0\)',
        ),
        ('top_k = "some"', r"output\.top_k: expected a whole number"),
        ("top_k = true", r"output\.top_k: expected a whole number"),
        ("tail_samples = -1", r"output\.tail_samples: expected at least 0"),
        ('top_k = "all"\ntail_samples = 4', r"leaves no tail to draw from; leave out tail_samples"),
        (
            "tail_samples = 0\nseed = 1",
            "seed is valid only with tail_samples or validation; leave it out",
        ),
        (
            "tail_samples = 0\ntail_logprobs = false",
            "tail_logprobs = false is valid only with tail_samples; leave it out",
        ),
        ('top_k = "all"\ntail_logprobs = false', "is valid only with tail_samples"),
        ("tail_logprobs = 0", r"output\.tail_logprobs: expected true or false"),
        (
            "temperatures = [2, 2.0]",
            r"temperatures are \[2\.0, 2\.0\], expected distinct values other than 1",
        ),
        ("temperatures = [1.0]", r"other than 1, which is always stored"),
        (
            "temperatures = [0.05]",
            r"temperatures\.0: expected at least 0\.1",
        ),
        ("temperatures = [1.2345678]", r"temperature 1\.2345678 has too many digits"),
        ("temperatures = 2.0", r"output\.temperatures: expected a list"),
        ("hidden_states = 1", r"output\.hidden_states: expected true or false"),
    ],
)
def test_a_wrong_option_is_one_line(make_recipe, output, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(make_recipe(output=output))
    assert "\n" not in str(caught.value)


def test_a_build_that_cannot_be_is_refused_before_it_starts(make_recipe, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"output\.top_k is 449, but the teacher's vocabulary has 448"
    ):
        run(make_recipe(output="top_k = 449"), tmp_path / "out")
    monkeypatch.setattr(fit, "MAX_ROW_VALUES", 64 * TINY_VOCAB_SIZE - 1)
    with pytest.raises(ValueError, match=r"64 tokens would hold 28,672 values in one column"):
        run(make_recipe(output='top_k = "all"'), tmp_path / "long")
    from builder.teacher.model import Teacher

    monkeypatch.setattr(Teacher, "_probe", lambda self: (TINY_VOCAB_SIZE, False))
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be split into a body and a head"):
        run(make_recipe(output="hidden_states = true"), tmp_path / "whole")
    assert not list(tmp_path.glob("*/data/*"))


def test_hidden_states_beyond_float16_are_refused(make_recipe, tmp_path, tiny_teacher_dir):
    from safetensors.torch import load_file, save_file

    teacher = tmp_path / "loud-teacher"
    shutil.copytree(tiny_teacher_dir, teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["model.norm.weight"] *= 1e5
    weights["lm_head.weight"] *= 1e-5
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    run(make_recipe(teacher=teacher), tmp_path / "fine")
    with pytest.raises(
        ValueError, match=r"document 'doc-\d+' .* beyond 65504.*hidden_states to false"
    ):
        run(make_recipe(teacher=teacher, output="hidden_states = true"), tmp_path / "out")


# Verification


def change_of(name: str, value: object, position: object = (2,)):
    def change(rows: list[Row]) -> None:
        rows[1][name][position] = value

    return change


def draw_from_the_head(rows: list[Row]) -> None:
    rows[1]["tail_indices"][2, 3] = rows[1]["topk_indices"][2, 5]


def raise_a_draw(rows: list[Row]) -> None:
    rows[1]["tail_logprobs"][2, 3] = rows[1]["topk_logprobs"][2, -1] + np.float16(0.1)


def split_a_draw(rows: list[Row]) -> None:
    rows[1]["tail_indices"][2, :2] = rows[1]["tail_indices"][2, 0]
    rows[1]["tail_logprobs"][2, :2] = rows[1]["tail_logprobs"][2, 0] - np.float16([0, 0.5])


def empty_a_tail(rows: list[Row]) -> None:
    rows[1]["tail_logprob"][2] = -65504


def always_the_best_of_the_tail(rows: list[Row]) -> None:
    for row in rows:
        best = row["tail_logprobs"].argmax(-1)[:, None]
        for name in ("tail_indices", "tail_logprobs"):
            row[name][:] = np.take_along_axis(row[name], best, -1)


def forget_the_target(rows: list[Row]) -> None:
    for row in rows:
        for t, target in enumerate(row["input_ids"][1:]):
            if target not in row["topk_indices"][t]:
                row["tail_indices"][t, 0] = target
                row["tail_logprobs"][t, 0] = row["target_logprob"][t] - np.float16(0.5)


def fewer_draws(rows: list[Row]) -> None:
    for row in rows:
        for name in ("tail_indices", "tail_logprobs"):
            row[name] = row[name][:, 1:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_of("tail_indices", TINY_VOCAB_SIZE, (2, 0)), "tail_indices outside 0 … 447"),
        (draw_from_the_head, "a draw from the tail is in the top K (position 2)"),
        (raise_a_draw, "a draw from the tail is above the K-th (position 2)"),
        (split_a_draw, "an id was drawn twice, with two log-probabilities (position 2)"),
        (empty_a_tail, "a draw has a probability, but the tail has none (position 2)"),
        (forget_the_target, "the target was drawn, but with another log-probability"),
        (always_the_best_of_the_tail, "the draws are not from the tail"),
        (fewer_draws, "tail_indices does not have 6 values a token"),
        (change_of("tail_logprobs", np.nan, (2, 0)), "tail_logprobs is not finite (position 2)"),
        (change_of("hidden_states", np.inf, (2, 7)), "hidden_states is not finite (position 2)"),
        (change_of("logsumexp_t2", np.inf), "logsumexp_t2 is not finite (position 2)"),
        (change_of("logsumexp_t2", 1.0), "logsumexp_t2 does not fit the stored distribution"),
        (change_of("logsumexp_t0.5", 9.0), "logsumexp_t0.5 does not fit the stored distribution"),
    ],
)
def test_a_broken_option_is_found_without_the_teacher(copy, change, message):
    forge(copy, change, all_files=False)
    found = problems(copy)
    assert any(message in p for p in found), found


def swap_temperatures(rows: list[Row]) -> None:
    for row in rows:
        row["logsumexp_t2"], row["logsumexp_t0.5"] = row["logsumexp_t0.5"], row["logsumexp_t2"]


def leave_the_temperature_out(rows: list[Row]) -> None:
    for row in rows:
        row["logsumexp_t2"][:] = row["logsumexp"] / 2


def move_a_log_partition(by: float):
    def change(rows: list[Row]) -> None:
        for row in rows:
            row["logsumexp_t0.5"] += np.float32(by)

    return change


@pytest.mark.parametrize(
    "change",
    [
        swap_temperatures,
        leave_the_temperature_out,
        move_a_log_partition(0.1),
        move_a_log_partition(-0.1),
    ],
)
def test_the_bounds_on_a_log_partition_are_tight(copy, change):
    forge(copy, change, all_files=False)
    assert any("does not fit the stored distribution" in p for p in problems(copy))


def disorder(rows: list[Row]) -> None:
    for row in rows:
        row["logprobs"] = row["logprobs"][:, ::-1]


def renormalise(rows: list[Row]) -> None:
    rows[1]["logprobs"][2] += np.float16(0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (disorder, "target_logprob differs from the target's own entry in logprobs"),
        (renormalise, "probabilities do not sum to 1 (position 2)"),
        (change_of("logprobs", 0.5, (2, 5)), "a log-probability is above 0 (position 2)"),
        (change_of("entropy", 0.0), "entropy does not fit the stored distribution (position 2)"),
        (change_of("logsumexp_t3", 1.0), "logsumexp_t3 does not fit the stored distribution"),
    ],
)
def test_a_broken_whole_distribution_is_found_without_the_teacher(whole_copy, change, message):
    forge(whole_copy, change, all_files=False)
    found = problems(whole_copy)
    assert any(message in p for p in found), found


def shift_hidden_states(rows: list[Row]) -> None:
    for row in rows:
        row["hidden_states"] = np.roll(row["hidden_states"], 1, axis=0)


def leave_the_head_out(directory: Path) -> None:
    (directory / "teacher_head.safetensors").unlink()
    refit(directory, lambda manifest: manifest.pop("teacher_head"))


def other_draws(rows: list[Row]) -> None:
    """Draws that obey the invariants, of tokens that have other log-probabilities."""
    for row in rows:
        free = np.ones((len(row["input_ids"]), TINY_VOCAB_SIZE), bool)
        np.put_along_axis(free, row["topk_indices"], False, -1)
        targets = np.append(row["input_ids"][1:], 0)
        np.put_along_axis(free, targets[:, None], False, -1)
        for t in range(len(free)):
            row["tail_indices"][t] = np.flatnonzero(free[t])[: row["tail_indices"].shape[1]]


def cool(rows: list[Row]) -> None:
    for row in rows:
        row["logsumexp_t2"] += np.float32(0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shift_hidden_states, "the distribution of hidden_states is"),
        (other_draws, "tail_logprobs is"),
        (cool, "logsumexp_t2 is"),
    ],
)
def test_what_obeys_the_invariants_is_found_by_recomputing(copy, tiny_teacher_dir, change, message):
    forge(copy, change)
    assert bool(problems(copy)) is (change is shift_hidden_states)
    leave_the_head_out(copy)
    assert problems(copy) == []
    found = problems(copy, tiny_teacher_dir, recompute=5)
    drawn = [p for p in found if "draws of tail_indices" in p]
    assert bool(drawn) is (change is other_draws)
    found = [p for p in found if p not in drawn]
    assert len(found) == 5
    assert all(message in p and "nats from the teacher's" in p for p in found), found


def test_a_whole_distribution_of_another_row_is_found_by_recomputing(whole_copy, tiny_teacher_dir):
    def change(rows: list[Row]) -> None:
        for row in rows:
            for name in ("logprobs", "entropy", "logsumexp", "logsumexp_t3"):
                row[name][:-1] = np.roll(row[name][:-1], 1, axis=0)
            targets = row["input_ids"][1:, None]
            row["target_logprob"][:-1] = np.take_along_axis(row["logprobs"][:-1], targets, -1)[:, 0]

    forge(whole_copy, change)
    (found,) = problems(whole_copy)
    assert "teacher_head.safetensors: what it makes of stored hidden states is" in found
    leave_the_head_out(whole_copy)
    assert problems(whole_copy) == []
    found = problems(whole_copy, tiny_teacher_dir, recompute=5)
    assert any("logprobs is" in p and "nats from the teacher's" in p for p in found), found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_teacher_with_everything_verifies(make_recipe, tmp_path, tiny_teacher_dir, dtype):
    recipe = make_recipe(corpus="max_documents = 6", output=EVERYTHING)
    recipe.write_text(recipe.read_text().replace('dtype = "float32"', f'dtype = "{dtype}"'))
    run(recipe, tmp_path / "out")
    report = verify(tmp_path / "out", recompute=6, teacher_path=tiny_teacher_dir, seed=2)
    assert report.problems == []


# Reading


def test_info_says_what_is_stored(cli, everything, whole, built, tiny_teacher_dir):
    stored = "stored     top 20 and tail; 6 draws from the tail; logsumexp at temperature 1, 2, 0.5; hidden states of 32"
    assert stored in cli("info", everything)[1]
    assert "stored     top 20 and tail; 4 draws from the tail\n" in cli("info", built)[1]
    described = cli("info", whole)[1]
    assert "stored     all log-probabilities; logsumexp at temperature 1, 3" in described
    assert "of the probability" not in described


def test_info_shows_positions_of_every_kind(cli, everything, whole, tiny_teacher_dir):
    where = ("--row", 0, "--position", 3, "--teacher", tiny_teacher_dir)
    shown = {path: cli("info", path, *where)[1].splitlines() for path in (everything, whole)}
    assert shown[everything][:12] == shown[whole][:12]
    assert "all other tokens together, such as '" in "\n".join(shown[everything])
    assert "ranks 11 to 448 together" in "\n".join(shown[whole])
    assert "all other tokens" not in "\n".join(shown[whole])
    rows = [cli("info", path, "--row", 0, "--teacher", tiny_teacher_dir)[1] for path in shown]
    assert rows[0] == rows[1]
    assert "teacher expected" in rows[0]


def test_the_card_says_how_to_use_what_is_there(everything, whole, make_recipe, tmp_path):
    card = (everything / "README.md").read_text()
    assert "the mass of all others, 6 tokens drawn from among these, and" in card
    assert "+ exp(`tail_logprob`) / M · Σ f(`tail_indices`)" in card
    assert "| `logsumexp_t0.5` | float32 [T] |" in card
    card = (whole / "README.md").read_text()
    assert "the log-probabilities of all 448 tokens" in card
    assert "topk" not in card
    assert "tail" not in card.split("## Build it again")[0]


@pytest.mark.parametrize("choice", ["everything", "whole"])
def test_the_recipe_in_a_card_asks_for_the_same(choice, request):
    output = request.getfixturevalue(choice)
    toml = re.search(r"```toml\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)[1]
    recipe = Recipe.model_validate_json(json.dumps(tomllib.loads(toml)))
    assert recipe.published()["output"] == read_manifest(output)["recipe"]["output"]


@pytest.mark.parametrize("choice", ["everything", "whole"])
def test_the_python_of_a_card_runs_as_pasted(choice, request, monkeypatch):
    output = request.getfixturevalue(choice)
    monkeypatch.chdir(output.parent)
    card = (output / "README.md").read_text()
    assert card_errors(card) == []
    names: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        exec(compile(snippet.replace("path/to/this/directory", "out"), "README.md", "exec"), names)
    student = names["student"](names["row"]["input_ids"]).detach().log_softmax(-1).double()
    if choice == "whole":
        teacher = names["row"]["logprobs"].double()
        assert names["loss"].item() > 1
        again = (teacher.exp() * (teacher - student)).sum(-1).mean()
        assert (
            0 < names["loss"].item() - again.item() < 1
        )  # the step has brought the student nearer


def test_the_picture_of_a_whole_distribution_ends_where_nothing_is_left(everything, whole):
    exact, cut = (measure(sorted((path / "data").iterdir())) for path in (whole, everything))
    assert len(exact.mass) == TINY_VOCAB_SIZE
    assert exact.mass[-1] == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(exact.mass[:20], cut.mass, rtol=1e-6)
    assert (whole / "assets" / "mass.svg").exists()


def test_an_estimate_knows_what_options_cost(cli, make_recipe, tmp_path):
    sizes = {}
    for choice in ("nothing", "everything", "all"):
        status, out, err = cli(
            "build",
            make_recipe(output=CHOICES[choice]),
            "--output",
            tmp_path / "x",
            "--dry-run",
            "--json",
        )
        assert status == 0, err
        sizes[choice] = json.loads(out)["bytes"] / 1e6
    run(make_recipe(output=CHOICES["all"]), tmp_path / "out")
    actual = read_manifest(tmp_path / "out")["totals"]["bytes"] / 1e6
    assert sizes["nothing"] < sizes["everything"] < sizes["all"]
    assert sizes["all"] == pytest.approx(actual, rel=0.4)


def test_draws_of_a_peaked_teacher_verify(make_recipe, tmp_path, tiny_teacher_dir):
    """Tails of e^−500: nothing of them is left in float32 beside the head."""
    from safetensors.torch import load_file, save_file

    teacher = tmp_path / "sure-teacher"
    shutil.copytree(tiny_teacher_dir, teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["lm_head.weight"] *= 200
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    run(make_recipe(teacher=teacher, output=EVERYTHING), tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    tails = np.concatenate([row["tail_logprob"] for row in rows]).astype(float)
    assert np.median(tails) < -300
    assert (tails > FLOAT16_MIN).all()
    distinct = np.mean([len(set(d)) for row in rows for d in row["tail_indices"]])
    assert distinct >= 1
    found = verify(tmp_path / "out", recompute=4, teacher_path=teacher, seed=0).problems
    assert [p for p in found if "hidden_states" not in p] == []


def test_a_first_choice_that_rounding_makes_one_of_two_is_not_mistaken_for_another():
    """At −7, float16's steps are 0.004: two tokens can become one, and which was the first is lost."""
    logprobs_TV = torch.tensor([[-7.0015, -7.0011, -8.0]], dtype=torch.float64)
    best_T1, found_T1 = _best({"logprobs": logprobs_TV.half().double()}, logprobs_TV)
    assert torch.equal(best_T1, found_T1)
    assert best_T1.item() == -7.0011
    _, found_T1 = _best({"logprobs": torch.tensor([[-9.0, -9.0, -7.0]]).double()}, logprobs_TV)
    assert found_T1.item() == -8
