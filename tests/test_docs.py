"""The documentation is true: its snippets run, its links lead somewhere, its tables are what the code says."""

import re
import tomllib

from logit_dataset.schema import LOGPROBS, Layout, columns
from tests.build.test_build import run
from tests.build.test_chat_builds import write_recipe
from tests.chats import chatty_teacher
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "examples").glob("*/README.md"))]
"""Those that people wrote; a card is rendered, and has tests of its own."""


def test_the_row_table_of_the_readme_is_the_schema():
    layout = Layout(tail_samples=4, temperatures=(2.0,), hidden_states=True, completion_mask=True)
    for column in (*columns(layout), LOGPROBS):
        kind = f"{column.dtype} [{column.shape}]" if column.shape else column.dtype
        assert f"| `{column.name}` | {kind} | {column.meaning} |" in README


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
    extras = project["optional-dependencies"]
    for text in project["dependencies"] + extras["build"] + extras["gguf"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), text
