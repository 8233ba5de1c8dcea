"""The documentation is true, and the modules import each other one way only."""

import ast
import re
import tomllib

import pytest
from conftest import REPOSITORY

from builder.schema import columns

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

# A module may import those before it; `demo` prepares a teacher, so it stands after `teacher`.
ORDER = [
    *["schema", "recipe", "corpus", "sequences", "teacher", "distribution", "demo", "sources"],
    *["shards", "manifest", "charts", "markdown", "licences", "card", "state", "stream", "build"],
    *["recompute", "verify", "versions", "remote", "release", "hub", "info", "estimate", "cli"],
]


def imported(module: str) -> set[str]:
    tree = ast.parse((REPOSITORY / "builder" / f"{module}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "builder":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("builder."):
                found.add(node.module.split(".")[1])
            assert node.level == 0, f"{module} has a relative import"
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("builder.")}
    return found


def test_every_module_has_its_place():
    modules = {path.stem for path in (REPOSITORY / "builder").glob("*.py")} - {"__init__"}
    assert modules == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_one_way(module):
    # The type-only imports of `shards` are the names of what flows through it.
    allowed = set(ORDER[: ORDER.index(module)]) | ({"recompute"} if module == "verify" else set())
    assert imported(module) <= allowed


def test_stages_know_nothing_of_recipes():
    for stage in ("schema", "corpus", "sequences", "teacher", "distribution", "shards"):
        assert not imported(stage) & {"recipe", "manifest", "build", "cli"}


def test_the_row_table_of_the_readme_is_the_schema():
    for column in columns(with_text=True):
        kind = f"{column.dtype} [{column.shape}]" if column.shape else column.dtype
        assert f"| `{column.name}` | {kind} | {column.meaning} |" in README


def test_the_file_tree_of_the_readme_is_complete():
    tree = README.split("## The files")[1].split("```")[1]
    listed = set(re.findall(r"^\s+(\w+)\.py", tree, flags=re.MULTILINE))
    assert listed == set(ORDER)


def test_the_python_of_the_readme_runs_as_pasted(built, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "smollm2-135m-python-docs").symlink_to(built)
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


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
