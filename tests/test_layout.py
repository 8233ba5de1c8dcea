"""Folders and modules import each other one way only, and the tree in docs/architecture.md is what is there."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

ROOMS = [
    *["logit_dataset", "logit_dataset.hidden", "logit_dataset.trainers", "logit_dataset.export"],
    *["builder.recipe", "builder.text", "builder.corpus", "builder.tokenizer"],
    *["builder.checkpoint", "builder.teacher", "builder.sources"],
    *["builder.dataset", "builder.capture", "builder.card", "builder.verify", "builder.view"],
    *["builder.hub", "builder.plan", "builder.build", "builder.console", "builder.cli"],
]
"""In the order of the data: each may import those before it."""
MAX_IMPORTS_BETWEEN_ROOMS = 85
MAX_FILES = 13


def modules() -> dict[str, Path]:
    """Modules of ours by their dotted names, without the packages themselves."""
    found = {}
    for package in ("logit_dataset", "builder"):
        for path in (REPOSITORY / package).rglob("*.py"):
            name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
            if not name.endswith("__") and not name.startswith("builder.student"):
                found[name] = path
    return found


def room_of(module: str) -> str:
    return max((r for r in ROOMS if module == r or module.startswith(f"{r}.")), key=len)


@cache
def imported(module: str) -> frozenset[str]:
    """Modules of ours that one imports, wherever in it: at the top, in a function, or for types only."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(known[module].read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name for name in names if name in known}
    return frozenset(found - {module})


def test_every_module_is_in_a_room_and_no_room_is_a_drawer():
    files: dict[str, int] = {}
    for module in modules():
        files[room_of(module)] = files.get(room_of(module), 0) + 1
    assert set(files) == set(ROOMS)
    assert max(files.values()) <= MAX_FILES, files
    assert not [m for m in modules() if re.search(r"\b(utils?|common|helpers?|misc)$", m)]


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_import_between_rooms_runs_back(module):
    allowed = ROOMS[: ROOMS.index(room_of(module)) + 1]
    assert {room_of(name) for name in imported(module)} <= set(allowed)


def test_imports_between_rooms_are_few():
    pairs = {(room_of(m), room_of(name)) for m in modules() for name in imported(m)}
    assert len([pair for pair in pairs if pair[0] != pair[1]]) <= MAX_IMPORTS_BETWEEN_ROOMS


def test_no_module_imports_itself_by_way_of_others():
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " → ".join([*above, module])
        if module not in done:
            for name in imported(module):
                visit(name, (*above, module))
            done.add(module)

    for module in modules():
        visit(module, ())


def test_stages_are_told_plain_values_and_know_no_recipe():
    """The recipe is known to what resolves it, and to what builds, plans and shows a dataset."""
    knowing = {
        room_of(module)
        for module in modules()
        if any(room_of(name) == "builder.recipe" for name in imported(module))
    }
    assert not knowing & {"logit_dataset", "builder.corpus", "builder.teacher", "builder.capture"}


def test_each_room_says_what_comes_in_what_goes_out_and_what_to_read_first():
    for room in ROOMS:
        init = REPOSITORY.joinpath(*room.split("."), "__init__.py")
        if room == "logit_dataset":
            continue
        tree = ast.parse(init.read_text(encoding="utf-8"))
        text = ast.get_docstring(tree)
        hands_on = room == "logit_dataset.trainers"
        assert hands_on or len(tree.body) == 1, f"{room} hands something on"
        assert re.search(r"\nIn: +\S.*\nOut: +\S[\s\S]*\nFirst: +\S", text), room
        for name in re.findall(r"\b(\w+\.(?:py|md))\b", text):
            assert (init.parent / name).exists(), f"{room}: {name}"


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(name + " must not be imported")
sys.meta_path.insert(0, Blocked())
import logit_dataset
print(*sorted(m for m in sys.modules if m.partition(".")[0] in ("builder", "huggingface_hub")))
"""


def test_importing_the_reader_needs_torch_numpy_and_pyarrow_only():
    blocked = ("transformers", "datasets", "tokenizers", "pydantic", "typer", "tqdm", "builder")
    code = BLOCKED.format(blocked=blocked)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_former_name_of_the_reader_warns_and_works():
    code = (
        "import builder.student, logit_dataset, builder.student.losses as l\n"
        "assert builder.student.load_logits is logit_dataset.load_logits\n"
        "assert l.distillation_loss is logit_dataset.distillation_loss\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "FutureWarning: builder.student is logit_dataset now" in done.stderr


def test_the_file_tree_of_the_docs_is_complete():
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.split("## The files")[1].split("```")[1]
    folder, listed = "", set()
    for line in tree.splitlines():
        if found := re.match(r"(?:(\w+)/|  (\w+)/|    (\w+)\.py|  (\w+)\.py)(?:\s|$)", line):
            top, room, module, single = found.groups()
            if top:
                base = folder = top
            elif room:
                folder = f"{base}.{room}"
            elif module:
                listed.add(f"{folder}.{module}")
            else:
                listed.add(f"{base}.{single}")
    ours = {name for name in listed if name.startswith(("logit_dataset", "builder"))}
    assert ours == set(modules())
