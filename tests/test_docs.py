"""The documentation is true, and the modules import each other one way only."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from logit_dataset.schema import LOGPROBS, Layout, columns
from tests.build.test_build import run
from tests.build.test_chat_builds import write_recipe
from tests.chats import chatty_teacher
from tests.conftest import REPOSITORY

BUILDER, STUDENT = REPOSITORY / "builder", REPOSITORY / "builder" / "student"
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "examples").glob("*/README.md"))]
"""Those that people wrote; a card is rendered, and has tests of its own."""

# A module may import those before it; `demo` prepares a teacher, so it stands after `teacher`.
ORDER = [
    *["schema", "recipe", "messages", "corpus", "sequences", "chats", "teacher", "loading"],
    *["draws", "distribution", "demo", "sources", "ranks", "shards", "pipeline", "decoding"],
    *["generation", "manifest", "charts", "markdown", "licences", "authorship", "card"],
    *["state", "stream", "worker", "actor", "workers", "lookup", "comparison", "recompute"],
    *["invariants", "verify", "remote", "outbox", "build", "versions", "release", "hub", "plan"],
    *["estimate", "delivery", "info", "cli_plan", "cli"],
]
# The package for trainers knows of the others the schema only; its modules have an order of their own.
STUDENT_ORDER = [
    *["rows", "batches", "load", "gather", "divergences", "losses", "vocabulary", "retokenize"],
]


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports: `schema`, or `student.rows`."""
    module, tree = path.stem, ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "builder":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("builder."):
                found.add(node.module.removeprefix("builder."))
            assert node.level == 0, f"{module} has a relative import"
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("builder.") for a in node.names if a.name.startswith("builder.")
            }
    return found


def test_every_module_has_its_place():
    modules = {path.stem for path in BUILDER.glob("*.py")} - {"__init__"}
    assert modules == set(ORDER)
    assert {p.name for p in BUILDER.iterdir() if (p / "__init__.py").exists()} == {"student"}
    assert {path.stem for path in STUDENT.glob("*.py")} - {"__init__"} == set(STUDENT_ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_one_way(module):
    # The type-only imports of `shards` are the names of what flows through it.
    assert imported(BUILDER / f"{module}.py") <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", STUDENT_ORDER)
def test_the_student_imports_the_schema_and_itself_only(module):
    before = STUDENT_ORDER[: STUDENT_ORDER.index(module)]
    assert imported(STUDENT / f"{module}.py") <= {"schema", *(f"student.{name}" for name in before)}


def test_importing_the_student_loads_neither_transformers_nor_the_builder():
    code = (
        "import sys, logit_dataset; print(*sorted(m for m in sys.modules if m in "
        "('transformers', 'pydantic', 'typer') or m.startswith('builder.') and 'student' not in m))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["logit_dataset.schema"]


def test_stages_know_nothing_of_recipes():
    stages = ("schema", "messages", "corpus", "sequences", "chats", "teacher", "draws")
    for stage in (*stages, "distribution", "shards"):
        assert not imported(BUILDER / f"{stage}.py") & {"recipe", "manifest", "build", "cli"}


def test_the_row_table_of_the_readme_is_the_schema():
    layout = Layout(tail_samples=4, temperatures=(2.0,), hidden_states=True, completion_mask=True)
    for column in (*columns(layout), LOGPROBS):
        kind = f"{column.dtype} [{column.shape}]" if column.shape else column.dtype
        assert f"| `{column.name}` | {kind} | {column.meaning} |" in README


def test_the_file_tree_of_the_readme_is_complete():
    tree = README.split("## The files")[1].split("```")[1]
    listed = set(re.findall(r"^\s+(\w+)\.py", tree, flags=re.MULTILINE))
    assert listed == {*ORDER, *STUDENT_ORDER}


def test_the_python_of_all_pages_runs_as_pasted(
    built, tiny_tokenizer, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    teacher = chatty_teacher(tiny_tokenizer, tiny_model, tmp_path / "teacher")
    recipe = write_recipe(tmp_path, teacher, output="completions_only = true")
    run(recipe, tmp_path / "out" / "chats")
    (tmp_path / "out" / "smollm2-135m-python-docs").symlink_to(built)
    snippets = [
        (page, snippet)
        for page in PAGES
        for snippet in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)
    ]
    assert len(snippets) >= 3
    for page, snippet in snippets:
        exec(compile(snippet, str(page), "exec"), {})


def test_recipes_shown_are_those_that_are_there():
    shown = [
        recipe
        for page in PAGES
        for recipe in re.findall(r"```toml\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)
    ]
    there = [path.read_text("utf-8") for path in (REPOSITORY / "examples").glob("*/recipe.toml")]
    assert len(shown) >= 2
    assert set(shown) <= set(there)


def test_links_lead_somewhere():
    anchors = {
        re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)
    }
    for page in PAGES:
        links = re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
        for link in links:
            if link.startswith("#"):
                assert link[1:] in anchors, link
            elif not link.startswith("https:"):
                assert (page.parent / link).exists(), f"{page}: {link}"


def test_make_targets_named_in_the_readme_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z][a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_pins_satisfy_the_declared_dependencies():
    from packaging.requirements import Requirement

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pins = {}
    for line in (REPOSITORY / ".ci" / "constraints.txt").read_text().splitlines():
        if "==" in line:
            name, version = line.split("==")
            pins[name.lower()] = version
    for text in project["dependencies"] + project["optional-dependencies"]["gguf"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), text
