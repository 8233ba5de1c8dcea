"""The documentation is true: its snippets run, its links lead somewhere, its tables are what the code says."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

import logit_dataset
from docs import reference
from logit_dataset.schema import LOGPROBS, Layout, columns
from tests.build.test_build import run
from tests.build.test_chat_builds import write_recipe
from tests.chats import chatty_teacher
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [
    *sorted(REPOSITORY.glob("*.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted((REPOSITORY / "examples").glob("*/README.md")),
]
"""Those that people wrote; a card is rendered, and has tests of its own."""


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(README.splitlines()) <= 200
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", README))
    assert linked == {page.name for page in (REPOSITORY / "docs").glob("*.md")}


@pytest.mark.parametrize("name", reference.PAGES)
def test_generated_pages_are_current(name):
    written = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
    assert written == reference.PAGES[name](), "run make docs"


@pytest.mark.parametrize("name", ["dense_kl", "distillation_loss", "load_logits"])
def test_defaults_in_the_api_are_those_of_the_code(name):
    page = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
    shown = page.split(f"```text\n{name}(")[1].split("\n```")[0]
    function = ast.parse(f"def {name}({shown}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    defaults = [ast.literal_eval(value) for value in function.args.kw_defaults if value]
    assert defaults == list(getattr(logit_dataset, name).__kwdefaults__.values())


def test_messages_that_are_explained_exist():
    page = (REPOSITORY / "docs" / "faq.md").read_text(encoding="utf-8")
    source = "".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text("utf-8"))
        for room in ("builder", "logit_dataset")
        for path in (REPOSITORY / room).rglob("*.py")
    )
    messages = re.findall(r"^\| `([^`]+)` \|", page.split("## Messages")[1], flags=re.MULTILINE)
    assert len(messages) >= 20
    for message in messages:
        assert message in source, message


def test_the_row_table_of_the_docs_is_the_schema():
    page = (REPOSITORY / "docs" / "columns.md").read_text(encoding="utf-8")
    layout = Layout(tail_samples=4, temperatures=(2.0,), hidden_states=True, completion_mask=True)
    for column in (*columns(layout), LOGPROBS):
        kind = f"{column.dtype} [{column.shape}]" if column.shape else column.dtype
        assert f"| `{column.name}` | {kind} | {column.meaning} |" in page


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
    for page in PAGES:
        links = re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
        for link in links:
            if link.startswith("https:"):
                continue
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page}: {link}"
            assert not anchor or anchor in anchors(target), f"{page}: {link}"


def anchors(page: Path) -> set[str]:
    """What a link into a page can name."""
    return {
        re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", page.read_text("utf-8"), flags=re.MULTILINE)
    }


def test_make_targets_that_are_named_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in {
        name
        for page in PAGES
        for name in re.findall(
            r"(?:^|`|\$ )make ([a-z][a-z-]+)", page.read_text("utf-8"), re.MULTILINE
        )
    }:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_pins_satisfy_the_declared_dependencies():
    from packaging.requirements import Requirement

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pins = {}
    for line in (REPOSITORY / ".ci" / "constraints.txt").read_text().splitlines():
        if "==" in line:
            name, version = line.split("==")
            pins[name.lower()] = version
    extras = project["optional-dependencies"]
    for text in project["dependencies"] + extras["build"] + extras["gguf"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), text
