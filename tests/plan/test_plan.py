"""What a build takes on paper, against numbers worked out by hand."""

import inspect
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from builder.cli import plan as cli_plan
from builder.plan.compute import EMBEDDED, GPUS, MEASURED, MEASURED_LENGTH, Shape, teacher_shape
from builder.plan.plan import MBIT, describe, work
from builder.plan.storage import count_shards, too_many_files
from builder.recipe.file import load_recipe
from builder.recipe.recipe import Recipe
from builder.recipe.sections import GenerationRecipe
from tests.conftest import REPOSITORY

EMBEDDED_RECIPE = REPOSITORY / "dataset_cards" / "smollm2-135m-python-docs" / "recipe.toml"


def hub_recipe(**output: object) -> Recipe:
    """Of a teacher on the Hub: nothing of it is here."""
    return Recipe.model_validate(
        {
            "name": "big",
            "corpus": {"repo": "a/b"},
            "teacher": {"repo": "c/d"},
            "sequences": {"max_length": 2048},
            "output": {"shard_tokens": 50_000_000, "partitions": 16, **output},
        }
    )


def planned(recipe: Recipe, tokens: float = 1e12, **options: object):
    return work(recipe, Path(), int(tokens), **options)


def test_a_trillion_tokens_of_an_8b_teacher_by_hand():
    found = planned(hub_recipe(), parameters=8e9, gpu="h100", workers=8)
    # 8e9 = 12 · layers · (128 · layers)²: 34.4 layers of 4,400, and 2 · 34.4 · 2,048 · 4,400 = 0.62e9 for attention
    layers = (8e9 / 196_608) ** (1 / 3)
    assert layers == pytest.approx(34.395, abs=1e-3)
    assert found.flop_per_token == pytest.approx(16e9 + 2 * 34.395 * 2048 * 4402.6, rel=1e-5)
    assert found.attention_share == pytest.approx(0.0373, abs=1e-4)
    # 23,667 tokens/s of 36 layers of 4,096 at lengths up to 1,024, which is 16.3e9 a token: 0.390 of 989e12
    assert found.utilization == pytest.approx(23_667 * (16e9 + 2 * 36 * 1024 * 4096) / 989e12)
    assert found.tokens_per_second == pytest.approx(989e12 * 0.39010 / 16.62e9, rel=1e-3)
    assert found.gpu_hours == pytest.approx(11_966, rel=1e-3)
    # 10 + 2 (text) + 50 · 3.0 + 4 · 3.5 bytes per token
    assert found.bytes_per_token == 176
    assert found.bytes == 176e12
    assert found.shards == 20_000
    assert found.shard_bytes == 8.8e9
    assert found.disk_bytes == (4 + 7) * 8.8e9  # four, and one more for each further worker
    assert found.commits == 10_002  # two shards in each, the card, main
    assert found.commit_hours == 78  # 128 in the first hour, 18 in the last
    assert found.upload_hours == pytest.approx(176e12 * 8 / 1e9 / 3600)
    assert found.hours == pytest.approx(11_966 / 8, rel=1e-3)
    assert found.limit == "computing"
    assert found.advice == [
        "the Hub takes 10,000 files, not 20,000: output.shard_tokens must be 100_000_000 or more"
    ]


@pytest.mark.parametrize(("shape", "rate"), MEASURED)
def test_what_was_measured_comes_out(shape, rate):
    recipe = hub_recipe()
    sequences = recipe.sequences.model_copy(update={"max_length": MEASURED_LENGTH})
    recipe = recipe.model_copy(update={"sequences": sequences})
    found = planned(recipe, parameters=shape.parameters, gpu="h100")
    assert found.utilization_is == "measured"
    # The shape that is guessed of a number of parameters has somewhat more or less attention.
    assert found.tokens_per_second == pytest.approx(rate, rel=0.06)


@pytest.mark.parametrize(
    ("parameters", "low", "high", "said"),
    [
        (1e7, 0.12, 0.13, "as others on an H100"),
        (3e8, 0.15, 0.20, "measured"),
        (3e9, 0.34, 0.38, "measured"),
        (8.2e9, 0.38, 0.40, "measured"),
        (7e10, 0.38, 0.40, "as others on an H100"),
    ],
)
def test_the_share_of_the_peak_grows_with_the_teacher(parameters, low, high, said):
    found = planned(hub_recipe(), parameters=parameters, gpu="h100")
    assert low < found.utilization < high
    assert found.utilization_is == said
    elsewhere = planned(hub_recipe(), parameters=parameters, gpu="h200")
    assert (elsewhere.utilization, elsewhere.utilization_is) == (
        found.utilization,
        "as others on an H100",
    )
    given = planned(hub_recipe(), parameters=parameters, utilization=0.25)
    assert (given.utilization, given.utilization_is) == (0.25, "given")


def test_what_takes_longest_is_what_counts():
    fast = {"parameters": 1e8, "workers": 16}
    assert planned(hub_recipe(), mbit=10, **fast).limit == "sending"
    slow = planned(hub_recipe(shard_tokens=100_000), tokens=9e8, mbit=1e5, **fast)
    assert (slow.limit, slow.commits, slow.hours) == ("committing", 4506, 35)
    assert slow.advice == ["128 commits per hour are the Hub's limit: choose a larger output.shard_tokens"]  # fmt: skip


def test_workers_without_a_partition_do_not_count():
    one, many, more = (
        planned(hub_recipe(), parameters=7e10, workers=n, mbit=1e6) for n in (1, 16, 64)
    )
    assert one.hours == pytest.approx(16 * many.hours)
    assert (more.hours, more.workers) == (many.hours, 16)
    assert "output.partitions is 16: 48 of the GPUs have nothing to do" in more.advice


def test_a_copy_that_is_split_takes_its_gpus_together():
    recipe = hub_recipe(partitions=2)
    teacher = recipe.teacher.model_copy(update={"tensor_parallel": 4})
    split = recipe.model_copy(update={"teacher": teacher})
    one = planned(recipe, parameters=7e10, workers=1, mbit=1e6)
    eight = planned(split, parameters=7e10, workers=8, mbit=1e6)
    assert eight.hours == pytest.approx(one.hours / 8)
    assert eight.workers == 8
    assert not any("nothing to do" in line for line in eight.advice)
    assert (
        "6 of the GPUs have nothing to do"
        in planned(split, tokens=1e9, parameters=7e10, workers=14).advice[-1]
    )
    with pytest.raises(ValueError, match="the GPUs of one copy of the teacher; use at least"):
        planned(split, parameters=7e10, workers=3)


def test_what_is_not_counted_is_said():
    writing = hub_recipe().model_copy(update={"generation": GenerationRecipe(max_new_tokens=8)})
    advice = planned(writing, tokens=1e9, parameters=1e9).advice
    assert "the time that the teacher takes to generate is not included" in advice[0]
    recipe = hub_recipe()
    output = recipe.output.model_copy(update={"completions_only": True})
    few = recipe.model_copy(update={"output": output})
    assert (
        "output.completions_only keeps fewer" in planned(few, tokens=1e9, parameters=1e9).advice[0]
    )


@pytest.mark.parametrize("tokens", [1, 300_000, 300_001])
def test_every_partition_has_a_shard_and_a_part_of_one_is_one(tokens):
    found = planned(hub_recipe(shard_tokens=100_000, partitions=3), tokens=tokens, parameters=1e9)
    assert found.shards == max(3, math.ceil(tokens / 100_000))


def test_more_than_the_hub_can_hold():
    found = planned(hub_recipe(shard_tokens=10**9), tokens=1e13, parameters=1e9)
    assert found.shards == 10_000
    assert found.advice == ["the Hub takes files of up to 20 GB, so 10,000 of them hold 200 TB"]


def test_files_that_the_hub_does_not_take():
    large = "the Hub takes files of up to 20 GB, not 176.0 GB: output.shard_tokens must be 113_636_000 or less"
    assert planned(hub_recipe(shard_tokens=10**9), tokens=1e11, parameters=1e9).advice == [large]
    most = hub_recipe(shard_tokens=113_636_000)
    assert planned(most, tokens=1e11, parameters=1e9).shard_bytes < 20e9
    # One shard a partition, of what there is: 6.25 million tokens.
    assert not planned(hub_recipe(shard_tokens=10**9), tokens=1e8, parameters=1e9).advice
    many = hub_recipe(shard_tokens=100, partitions=3)
    found = too_many_files(many, 10**10)
    assert found == "the Hub takes 10,000 files, not 100,000,002: output.shard_tokens must be 2_000_000 or more"  # fmt: skip
    assert count_shards(hub_recipe(shard_tokens=2_000_000, partitions=3), 10**10) <= 10_000
    assert count_shards(hub_recipe(shard_tokens=1_000_000, partitions=3), 10**10) > 10_000
    assert not too_many_files(hub_recipe(partitions=10_000), 10**10)
    assert too_many_files(hub_recipe(partitions=10_001), 10**10) == (
        "the Hub takes 10,000 files, not 10,001: output.partitions must be 10_000 or less"
    )


def test_the_embedded_teacher_is_known():
    recipe = load_recipe(EMBEDDED_RECIPE)
    found = work(recipe, EMBEDDED_RECIPE.parent, None, peak_tflops=0.2, utilization=0.5)
    assert found.tokens == 50_000
    # 2 · 134,515,008 + 2 · 30 layers · 512 tokens · 576
    assert found.flop_per_token == 286_724_736
    assert found.tokens_per_second == pytest.approx(1e11 / 286_724_736)
    assert found.gpu is None


def test_the_teacher_of_a_directory_is_seen(make_recipe, tmp_path, tiny_model):
    recipe = load_recipe(make_recipe())
    shape = teacher_shape(recipe, tmp_path)
    count = sum(p.numel() for p in tiny_model.parameters())
    assert shape == Shape(parameters=count, layers=2, width=32, vocab_size=448)
    assert teacher_shape(recipe, tmp_path, 5e9).parameters == 5e9
    whole = load_recipe(make_recipe(output='top_k = "all"\nhidden_states = true'))
    assert work(whole, tmp_path, 1000).bytes_per_token == 12 + 1.8 * 32 + 1.5 * 448


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_peak_is_that_of_the_dtype(make_recipe, tmp_path, dtype):
    recipe = load_recipe(make_recipe(teacher=None).with_name("recipe.toml"))
    teacher = recipe.teacher.model_copy(update={"dtype": dtype})
    found = work(recipe.model_copy(update={"teacher": teacher}), tmp_path, 1000, gpu="a100")
    assert found.peak_flops == (19.5e12 if dtype == "float32" else 312e12)


def test_a_usual_shape_is_near_to_real_ones():
    """Llama 3 8B has 32 layers of 4,096, and Qwen3 32B 64 of 5,120."""
    for parameters, layers, width in ((8.03e9, 32, 4096), (32.8e9, 64, 5120)):
        guessed = Shape.of(parameters)
        assert guessed.layers * guessed.width == pytest.approx(layers * width, rel=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"no corpus\.max_tokens; give the number of tokens, such as --tokens 1e9"),
        (["--tokens", "1e9"], "is unknown without the Hub; give it, such as --parameters 8e9"),
    ],
)
def test_what_is_missing_is_asked_for(cli, tmp_path, arguments, message):
    path = tmp_path / "recipe.toml"
    path.write_text('name = "x"\n[corpus]\nrepo = "a/b"\n[teacher]\nrepo = "c/d"\n')
    status, out, err = cli("plan", path, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert re.search(message, err)


def test_what_depends_on_a_config_is_not_guessed():
    for output in ({"top_k": "all"}, {"hidden_states": True}):
        with pytest.raises(ValueError, match=r"depends on the teacher's config\.json"):
            planned(hub_recipe(**output), parameters=1e9)


def test_the_command_says_it_to_a_person_and_to_a_program(cli):
    status, out, err = cli("plan", EMBEDDED_RECIPE, "--tokens", "1e9", "--gpu", "a100")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "teacher   134,515,008 parameters: 0.287 GFLOP per token, 6% of it for attention",
        "speed     20,611 tokens/s: 30% (as others on an H100) of 19.5 TFLOPS of one a100",
        "compute   13.5 GPU hours for 1,000,000,000 tokens: 13.5 h on 1 GPU",
        "data      162.0 GB, 162 bytes per token, in 100,000 shards of 1.6 MB",
        "the Hub   22 min to send at 1,000 Mbit/s; 50,002 commits, which take at least 16.2 days",
        "disk      6.5 MB with --publish-to ORG/NAME --discard-local",
        "together  16.2 days: all steps run at the same time, and committing takes longest",
        "but       the Hub takes 10,000 files, not 100,000: output.shard_tokens must be 1_000_000 or more",
    ]  # fmt: skip
    status, out, err = cli("plan", EMBEDDED_RECIPE, "--tokens", "1e9", "--gpu", "a100", "--json")
    values = json.loads(out)
    assert values["gpu_hours"] == pytest.approx(1e9 / 20_610.8 / 3600, rel=1e-5)
    assert values["commit_hours"] == 390


def test_the_options_are_those_of_the_module():
    options = {name: option.default for name, option in _parameters().items()}
    assert options["utilization"] is None  # what was measured
    assert options["mbit"] == MBIT
    assert {gpu.value for gpu in cli_plan.Gpu} == GPUS.keys()


def _parameters():
    found = inspect.signature(cli_plan.plan).parameters
    assert all(get_args(parameter.annotation) for parameter in found.values())
    return found


def test_the_embedded_shape_is_that_of_the_published_card():
    card = EMBEDDED_RECIPE.with_name("README.md").read_text()
    assert f"{EMBEDDED.parameters:,} parameters" in card
    assert f"{EMBEDDED.vocab_size:,} logits" in card


def test_the_docs_show_what_the_command_prints(cli):
    page = (REPOSITORY / "docs" / "planning.md").read_text(encoding="utf-8")
    command, *expected = re.search(r"\$ logit-dataset (plan .*(?:\n.+)+?)\n```", page)[1].splitlines()  # fmt: skip
    name, path, *options = shlex.split(command)
    status, out, err = cli(name, REPOSITORY / path, *options)
    assert (status, err) == (0, "")
    assert out.splitlines() == expected


def test_planning_loads_no_torch():
    code = (
        "import sys; from builder.cli.main import main\n"
        f"sys.argv = ['logit-dataset', 'plan', {str(EMBEDDED_RECIPE)!r}]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert describe(work(load_recipe(EMBEDDED_RECIPE), EMBEDDED_RECIPE.parent, None)) in done.stdout
