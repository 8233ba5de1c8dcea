"""The command line: what it prints and where, its exit status, and that it says what to do next."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main
from datasets import load_dataset

from builder.cli.main import EXAMPLES, app
from builder.dataset import info as information
from tests.conftest import REPOSITORY, recipe_text, run_cli, sample_documents, write_jsonl
from tests.loopback_hub import WRITABLE

COMMANDS = typer.main.get_command(app).commands
EVERY_COMMAND = pytest.mark.parametrize("name", COMMANDS)

HEAVY = {"torch", "transformers", "datasets", "pyarrow", "numpy", "pandas", "huggingface_hub"}


@EVERY_COMMAND
def test_every_help_has_an_example_that_is_not_wrapped(cli, name):
    status, out, err = cli(name, "--help")
    assert (status, err) == (0, "")
    examples = {command.__name__: example for command, example in EXAMPLES.items()}
    assert out.splitlines()[-1] == f"  Example: logit-dataset {examples[name]}"


def test_every_example_runs_as_pasted(hub, client, tmp_path, tiny_teacher_dir):
    """Where there is what its names stand for."""
    shutil.copytree(tiny_teacher_dir, tmp_path / "tiny")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("One text.")
    write_jsonl(tmp_path / "corpus.jsonl", sample_documents())
    licences = {"corpus": 'license = "mit"', "teacher": 'license = "mit"'}
    text = recipe_text(Path("tiny"), "corpus.jsonl", **licences)
    (tmp_path / "recipe.toml").write_text(text)

    def run(line: str) -> None:
        program, *arguments = shlex.split(line.replace("ORG", WRITABLE[0]))
        assert program == "logit-dataset"
        code = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.argv = ['logit-dataset', *{arguments!r}]\n"
        result = client.python(f"{code}from builder.cli.main import main; main()")
        assert result.returncode == 0, f"{line}: {result.stderr}"
        assert result.stdout

    run(typer.main.get_command(app).epilog.split("Example: ")[1])
    shutil.copytree(tmp_path / "out" / "mine", tmp_path / "out" / "other")
    run("logit-dataset publish ORG/NAME out/other --yes --recompute 1 --tag v1.0.0")
    for example in EXAMPLES.values():
        run(f"logit-dataset {example}")


@EVERY_COMMAND
def test_every_option_is_explained(name):
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name


@EVERY_COMMAND
def test_every_command_is_shown_in_the_docs(name):
    pages = [*(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "README.md"]
    shown = [
        path for path in pages if re.search(rf"logit-dataset {name}\b", path.read_text("utf-8"))
    ]
    assert {path.name for path in shown} > {"cli.md"}


def test_the_general_help_names_every_command(cli):
    status, out, err = cli("--help")
    assert (status, err) == (0, "")
    for name, command in COMMANDS.items():
        # Not cut at the edge of a terminal.
        summary = command.help.split("\n")[0]
        assert re.search(rf"^  {name} +{re.escape(summary)}$", out, flags=re.MULTILINE)
    assert "Example: logit-dataset build " in out


def test_help_loads_nothing_heavy():
    program = (
        "import sys\nfrom builder.cli.main import main\n"
        f"for name in {list(COMMANDS)}:\n"
        "    sys.argv = ['logit-dataset', name, '--help']\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.count("Usage: ") == len(COMMANDS)
    loaded = set(result.stderr.split())
    assert "typer" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["biuld"], "No such command 'biuld'"),
        (["build", "recipe.toml"], "Missing option '--output'"),
        (["build", "--output", "x"], "Missing argument 'recipe'"),
        (
            ["build", "recipe.toml", "--output", "x", "--max-shards", "-1"],
            "--max-shards: expected at least 0",
        ),
        (["build", "recipe.toml", "--output", "x", "--devcie", "cpu"], "No such option.*--device"),
        (["verify", "x", "--recompute", "some"], "--recompute: expected a whole number"),
        (
            ["info", "x", "--format", "xml"],
            "--format: expected one of 'human', 'json', found 'xml'",
        ),
    ],
)
def test_a_wrong_command_line_is_status_2_and_one_line_that_names_the_help(cli, arguments, message):
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"error: .*{message}.*(; see|\? See) logit-dataset .*--help\n", err)


def test_no_arguments_print_the_help(cli):
    status, out, err = cli()
    assert status == 0
    assert "Commands:" in out
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "none.toml", "--output", "x"], r"no recipe at none\.toml; name a \.toml file"),
        (["verify", "{empty}"], r"has no manifest\.json: it is not a logit dataset"),
        (["info", "{empty}"], r"has no manifest\.json: it is not a logit dataset"),

        (["info", "{built}", "--row", "999"], r"has rows 0 to \d+, not 999"),
        (["info", "{built}", "--row", "0"], r"'tiny' does not exist .*; check the path, or give it with --teacher PATH"),
    ],
)  # fmt: skip
def test_a_failure_is_status_1_and_one_line(cli, tmp_path, built, arguments, message):
    places = {"empty": tmp_path, "built": built}
    status, out, err = cli(*(argument.format(**places) for argument in arguments))
    assert (status, out) == (1, "")
    assert re.fullmatch(rf"error: .*{message}.*\n", err)


def test_problems_are_status_1_and_data(cli, built, tmp_path):
    (tmp_path / "dataset").mkdir()
    for path in built.iterdir():
        (tmp_path / "dataset" / path.name).symlink_to(path)
    (tmp_path / "dataset" / "README.md").unlink()
    status, out, err = cli("verify", tmp_path / "dataset")
    assert (status, err) == (1, "")
    assert out.splitlines()[0].startswith("README.md: is missing")
    assert out.splitlines()[-1] == f"{tmp_path / 'dataset'}: 1 problem"


def test_ctrl_c_is_status_130_and_says_how_to_go_on(cli, monkeypatch):
    def interrupted(_: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(information, "describe", interrupted)
    status, out, err = cli("info", "anything")
    assert (status, out) == (130, "")
    assert err == "interrupted: finished shards are safe; run the same command to resume\n"


@pytest.mark.parametrize("error", [ValueError("what\n  happened"), OSError("no\nway")])
def test_a_traceback_only_on_request(cli, monkeypatch, error):
    def fail(_: Path) -> str:
        raise error

    monkeypatch.setattr(information, "describe", fail)
    status, _, err = cli("info", "anything")
    assert status == 1
    assert err == f"error: {' '.join(str(error).split())}\n"
    monkeypatch.setenv("LOGIT_DATASET_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli("info", "anything")


def test_each_step_prints_the_next_one(cli, make_recipe, tmp_path, monkeypatch):
    """As a user pastes them, in a directory whose name needs quotes."""
    output = tmp_path / "my dataset"
    stopped = cli("build", make_recipe(), "--output", output, "--max-shards", 1)
    assert stopped == (0, "stopped early after 1 new shard; run the same command to resume\n", "")

    # In a process of its own, which has everything to import, nothing is on stderr either: it is not a terminal.
    built = run_cli("build", make_recipe(), "--output", output)
    assert (built.returncode, built.stderr) == (0, "")
    totals = json.loads((output / "manifest.json").read_text())["totals"]
    what, following, or_view = built.stdout.splitlines()
    assert what == (
        f"{output}: complete, {totals['tokens']:,} tokens in {totals['rows']} rows, "
        f"{totals['bytes_per_token']} bytes per token"
    )
    assert following.startswith("next: logit-dataset verify ")
    assert or_view.startswith("or:   logit-dataset view ")
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: not opened.append(address))
    monkeypatch.chdir(tmp_path)
    status, _, err = cli(*shlex.split(or_view)[2:])
    assert (status, err, opened) == (0, "", [(tmp_path / "view.html").as_uri()])

    status, out, err = cli(*shlex.split(following)[2:])
    assert (status, err) == (0, "")
    recomputed, what, following = out.splitlines()
    assert re.fullmatch(
        r"recomputed 5 rows, [\d,]+ tokens \(seed \d+\): \|Δ log-prob\| max 0\.\d+, mean 0\.\d+, beyond float16 rounding \S+ "
        r"\(limit 0\.002\); top-1 agreement [\d.]+%; [\d.]+% of draws agree \(limit 99\.8%\); NLL stored \S+, recomputed \S+",
        recomputed,
    )
    assert what.endswith(f"{totals['rows']} rows, {totals['tokens']:,} tokens, no problems")
    dataset = eval(following.removeprefix("next: "), {"load_dataset": cached_load(tmp_path)})
    assert len(dataset) == totals["rows"]

    status, out, err = cli("info", output, "--format", "json")
    assert (status, err) == (0, "")
    assert json.loads(out)["totals"] == totals


def cached_load(tmp_path: Path):
    return lambda *args, **kwargs: load_dataset(*args, cache_dir=str(tmp_path / "cache"), **kwargs)


def test_a_finished_build_says_so_again(cli, make_recipe, tmp_path, corpus_file):
    write_jsonl(corpus_file, sample_documents(2))
    for status in ("complete", "already complete"):
        _, out, err = cli("build", make_recipe(), "--output", tmp_path / "out")
        assert err == ""
        assert out.startswith(f"{tmp_path / 'out'}: {status}, ")


def test_a_damaged_shard_is_a_notice_on_stderr(cli, make_recipe, tmp_path):
    cli("build", make_recipe(), "--output", tmp_path / "out", "--max-shards", 2)
    (tmp_path / "out" / "data" / "train-000-00000.parquet").unlink()
    status, out, err = cli("build", make_recipe(), "--output", tmp_path / "out", "--max-shards", 1)
    assert status == 0
    assert out.startswith("stopped early after 1 new shard")
    assert err == "data/train-000-00000.parquet is missing: building it again\n"


def test_a_dry_run_prints_the_resolved_recipe_and_writes_nothing(cli, make_recipe, tmp_path):
    recipe = make_recipe()

    def listing() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = listing()
    status, out, err = cli("build", recipe, "--output", tmp_path / "out", "--dry-run")
    assert status == 0
    assert listing() == before
    assert tomllib.loads(out)["output"]["top_k"] == 20
    documents, tokens, disk, time, last = err.splitlines()
    assert re.fullmatch(r"documents  all 24: none skipped, \d+ cut into chunks at sequences.max_length = 64", documents)  # fmt: skip
    assert re.fullmatch(r"tokens     [\d,]+", tokens)
    assert re.fullmatch(r"disk       about [\d.]+ [kM]B", disk)
    assert re.fullmatch(r"time       about \d+ s on cpu", time)
    assert last == "nothing was written; run the command without --dry-run to build"


def test_a_dry_run_for_a_program_is_json_alone(cli, make_recipe, tmp_path):
    status, out, err = cli("build", make_recipe(), "-o", tmp_path / "out", "--dry-run", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["plan"]["corpus"]["files"][0]["file"] == "corpus.jsonl"
    assert tomllib.loads(found["recipe"])["output"]["top_k"] == 20
    assert (found["sample"]["documents"], found["sample"]["skipped"]) == (24, 0)
    assert found["tokens"] > 0


def test_cuda_where_there_is_none_is_refused(cli, make_recipe, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = cli("build", make_recipe(), "--output", tmp_path / "out", "--device", "cuda")
    assert status == 1
    assert err.startswith("error: --device cuda, but torch finds no CUDA device; use --device cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("is_terminal", "variables", "is_red"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {"TERM": "xterm"}, False),
    ],
)
def test_errors_are_red_on_a_terminal_only_and_not_with_no_color(
    cli, monkeypatch, is_terminal, variables, is_red
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    status, _, err = cli("biuld")
    assert status == 2
    word = "\x1b[31m\x1b[1merror:\x1b[0m" if is_red else "error:"
    assert err.startswith(f"{word} No such command")
