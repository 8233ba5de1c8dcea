"""Corpus and teacher from the Hub, with stock client libraries and real HTTP, against a stand-in on this machine."""

import io
import json
import re
import socket
import tomllib
from pathlib import Path
from time import monotonic

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder.build.build import build
from builder.dataset.manifest import read_manifest
from builder.recipe.file import load_recipe
from tests import loopback_hub as stand_in
from tests.conftest import REPOSITORY, recipe_text, run_cli, sample_documents
from tests.loopback_hub import TOKEN, Client, Hub
from tests.teacher.test_model import make_model, save

DOCUMENTS = sample_documents()
NO_COMMIT = "0" * 40
CONFIGURATIONS = b"""---
configs:
- config_name: en
  data_files: en/*.parquet
- config_name: de
  data_files: de/*.parquet
---
"""


def parquet(rows: list[dict]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=4)
    return sink.getvalue()


def corpus_files(documents: list[dict]) -> stand_in.Files:
    """A dataset repository: two files, and row groups within them."""
    half = len(documents) // 2
    return {
        "README.md": b"---\nlicense: cc0-1.0\n---\n# A corpus\n",
        "data/train-00000-of-00002.parquet": parquet(documents[:half]),
        "data/train-00001-of-00002.parquet": parquet(documents[half:]),
    }


@pytest.fixture(scope="module")
def hub(tiny_teacher_dir):
    with stand_in.serve() as running:
        running.commit("dataset", "org/corpus", corpus_files(DOCUMENTS))
        running.tag("dataset", "org/corpus", "v1.0.0")
        running.commit("model", "org/tiny", stand_in.directory_files(tiny_teacher_dir))
        yield running


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    running = Client(hub.endpoint, tmp_path_factory.mktemp("home"))
    yield running
    running.close()


@pytest.fixture
def hub_recipe(tmp_path):
    """Write a recipe whose corpus and teacher are on the Hub."""

    def write(corpus: str = "", teacher: str = "") -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(hub_recipe_text(corpus=corpus, teacher=teacher))
        return path

    return write


def hub_recipe_text(corpus: str = "", teacher: str = "") -> str:
    text = recipe_text(Path("…"), "…", corpus=corpus, teacher=teacher)
    for section, absent, given in (
        ("corpus", "files", corpus),
        ("teacher", "path", teacher),
    ):
        if re.search(f"^{absent} =", given, flags=re.MULTILINE):
            continue
        text = re.sub(rf"^{absent} = .*\n", "", text, flags=re.MULTILINE)
        if not re.search("^repo =", given, flags=re.MULTILINE):
            name = {"corpus": "org/corpus", "teacher": "org/tiny"}[section]
            text = text.replace(f"[{section}]\n", f'[{section}]\nrepo = "{name}"\n')
    return text


def data_bytes(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "data").iterdir())}


def tables(output: Path) -> list[pa.Table]:
    return [
        pq.read_table(path).replace_schema_metadata(None)
        for path in sorted((output / "data").iterdir())
    ]


@pytest.fixture(scope="module")
def hub_build(hub, tmp_path_factory):
    """A build from the Hub in a process of its own, with nothing cached: (directory, what it printed)."""
    base = tmp_path_factory.mktemp("hub-build")
    (base / "recipe.toml").write_text(hub_recipe_text())
    environment = stand_in.environment(hub.endpoint, base / "home")
    result = run_cli("build", base / "recipe.toml", "--output", base / "out", **environment)
    assert result.returncode == 0, result.stderr
    return base / "out", result


def test_rows_from_the_hub_equal_those_from_the_same_files_on_disk(
    hub_build, tiny_teacher_dir, tmp_path
):
    for name, content in corpus_files(DOCUMENTS).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe_text(tiny_teacher_dir, "data/*.parquet"))
    build(load_recipe(recipe), tmp_path, tmp_path / "out")
    assert len(tables(tmp_path / "out")) > 4
    assert tables(hub_build[0]) == tables(tmp_path / "out")


def test_the_manifest_records_the_commits_behind_the_branches(hub, hub_build):
    manifest = read_manifest(hub_build[0])
    corpus, teacher = (hub.repos[key] for key in (("dataset", "org/corpus"), ("model", "org/tiny")))
    assert manifest["corpus"] == {
        "kind": "hub",
        "repo": "org/corpus",
        "commit": corpus.branches["main"],
    }
    found = {key: manifest["teacher"][key] for key in ("kind", "repo", "commit")}
    assert found == {"kind": "hub", "repo": "org/tiny", "commit": teacher.branches["main"]}


def test_no_token_host_or_path_is_written_or_printed(hub, hub_build):
    output, result = hub_build
    assert any(request.authorization == f"Bearer {TOKEN}" for request in hub.requests)
    port = hub.endpoint.rpartition(":")[2]
    secrets = [TOKEN, "127.0.0.1", f":{port}", str(output.parent), str(Path.home())]
    if len(socket.gethostname()) > 4:
        secrets.append(socket.gethostname())
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) > 6
    for path in files:
        content = path.read_bytes()
        assert [s for s in secrets if s.encode() in content] == [], path.name
    assert result.stderr == ""
    assert TOKEN not in result.stdout
    assert port not in result.stdout


def test_an_interrupted_build_goes_on_with_its_commits_after_the_branches_moved(
    hub, client, hub_recipe, tmp_path, tiny_teacher_dir
):
    files = stand_in.directory_files(tiny_teacher_dir)
    old = hub.commit("dataset", "org/moving", corpus_files(DOCUMENTS))
    hub.commit("model", "org/moving", files)
    recipe = hub_recipe(corpus='repo = "org/moving"', teacher='repo = "org/moving"')
    command = ["build", recipe, "--output"]
    assert client.cli(*command, tmp_path / "whole").returncode == 0
    stopped = client.cli(*command, tmp_path / "parts", "--max-shards", "1")
    assert (stopped.returncode, stopped.stdout[:13]) == (0, "stopped early")

    changed = [{**document, "text": "moved " + document["text"]} for document in DOCUMENTS]
    new = hub.commit("dataset", "org/moving", corpus_files(changed))
    hub.commit("model", "org/moving", {**files, "config.json": b"not even JSON"})
    hub.requests.clear()
    resumed = client.cli(*command, tmp_path / "parts")
    assert resumed.returncode == 0, resumed.stderr
    assert [request.path for request in hub.requests if "main" in request.path] == []
    assert read_manifest(tmp_path / "parts")["corpus"]["commit"] == old
    assert len(data_bytes(tmp_path / "whole")) > 4
    assert data_bytes(tmp_path / "parts") == data_bytes(tmp_path / "whole")

    recipe.write_text(recipe.read_text().replace('"org/moving"', '"org/tiny"'))
    recipe.write_text(recipe.read_text().replace('"org/tiny"', '"org/moving"', 1))
    anew = client.cli(*command, tmp_path / "anew", "--max-shards", "1")
    assert anew.returncode == 0, anew.stderr
    known = json.loads((tmp_path / "anew" / ".build" / "plan.json").read_text())
    assert known["corpus"]["commit"] == new
    assert tables(tmp_path / "anew") != tables(tmp_path / "whole")[:1]


def test_a_teacher_on_the_hub_says_which_attention_is_the_best_for_it(
    hub, client, hub_recipe, tmp_path, tiny_tokenizer
):
    directory = save(make_model("gemma2"), tiny_tokenizer, tmp_path / "gemma2")
    hub.commit("model", "org/gemma2", stand_in.directory_files(directory))
    recipe = hub_recipe(teacher='repo = "org/gemma2"\nlicense = "mit"', corpus='license = "mit"')
    done = client.cli("build", recipe, "--output", tmp_path / "out", "--max-shards", "1")
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "out" / ".build" / "plan.json").read_text())
    assert plan["recipe"]["teacher"]["attention"] == "eager"

    # More of the same rows are a minor step, though only the plan says which attention that is.
    deliver = ["--publish-to", "org/eager", "--recompute", "0", "--device", "cpu", "--tag"]
    few = hub_recipe(
        teacher='repo = "org/gemma2"\nlicense = "mit"', corpus='license = "mit"\nmax_documents = 9'
    )
    done = client.cli("build", few, "--output", tmp_path / "few", *deliver, "v1.0.0")
    assert done.returncode == 0, done.stderr
    more = few.with_name("more.toml")
    more.write_text(few.read_text().replace("max_documents = 9", "max_documents = 15"))
    done = client.cli("build", more, "--output", tmp_path / "more", *deliver, "v1.1.0")
    assert done.returncode == 0, done.stderr


def test_resuming_fetches_only_the_file_in_which_it_stopped(hub, client, hub_recipe, tmp_path):
    command = ["build", hub_recipe(), "--output", tmp_path / "out"]
    assert client.cli(*command, "--max-shards", "5").returncode == 0
    last = max((tmp_path / "out" / ".build" / "records").iterdir())
    assert json.loads(last.read_text())["offset_after"]["file"] == 1
    hub.requests.clear()
    assert client.cli(*command).returncode == 0
    fetched = [
        request.path.rpartition("/")[2]
        for request in hub.requests
        if request.method == "GET" and request.path.endswith(".parquet")
    ]
    # `datasets` looks at the beginning of the first file for the types of the columns.
    others = [name for name in fetched if name != "train-00000-of-00002.parquet"]
    assert others
    assert fetched[-len(others) :] == others


def test_a_dry_run_prints_an_estimate_and_writes_nothing(hub, client, hub_recipe, tmp_path):
    recipe = hub_recipe(corpus='revision = "v1.0.0"')
    result = client.cli("build", recipe, "--output", tmp_path / "out", "--dry-run")
    assert result.returncode == 0
    assert not (tmp_path / "out").exists()
    assert re.search(r"^tokens     2,\d\d\d$", result.stderr, flags=re.MULTILINE)
    assert re.search(r"^time       about \d+ s on cpu$", result.stderr, flags=re.MULTILINE)
    resolved = tomllib.loads(result.stdout)
    commit = hub.repos["dataset", "org/corpus"].tags["v1.0.0"]
    assert resolved["corpus"]["revision"] == commit
    # The teacher's size comes from the head of its weights.
    weights = [r for r in hub.requests if r.method == "GET" and "model.safetensors" in r.path]
    assert weights[-1].range


def test_a_tag_resolves_to_the_commit_behind_it(hub, client, hub_recipe, tmp_path):
    first = hub.commit("dataset", "org/tagged", corpus_files(DOCUMENTS[:6]))
    hub.tag("dataset", "org/tagged", "v1")
    hub.commit("dataset", "org/tagged", corpus_files(DOCUMENTS))
    recipe = hub_recipe(corpus='repo = "org/tagged"\nrevision = "v1"')
    result = client.cli("build", recipe, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(tmp_path / "out")
    assert (manifest["corpus"]["commit"], manifest["totals"]["documents"]) == (first, 6)


def test_a_configuration_of_several_is_read(hub, client, hub_recipe, tmp_path):
    commit_configurations(hub)
    recipe = hub_recipe(corpus='repo = "org/configurations"\nconfig = "de"')
    result = client.cli("build", recipe, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert {id for table in tables(tmp_path / "out") for id in table["id"].to_pylist()} == {"doc-1"}


def commit_configurations(hub: Hub) -> None:
    files = {"en/a.parquet": parquet(DOCUMENTS[:1]), "de/a.parquet": parquet(DOCUMENTS[1:2])}
    hub.commit("dataset", "org/configurations", {"README.md": CONFIGURATIONS, **files})


def test_a_hiccup_of_the_hub_is_survived(hub, client, hub_recipe, tmp_path):
    failed = []

    def once(request: stand_in.Request) -> int | None:
        if request.path.endswith("00001-of-00002.parquet") and not failed:
            failed.append(request)
            return 503
        return None

    hub.faults.append(once)
    try:
        result = client.cli("build", hub_recipe(), "--output", tmp_path / "out")
    finally:
        hub.faults.clear()
    assert failed
    assert result.returncode == 0, result.stderr
    assert read_manifest(tmp_path / "out")["totals"]["documents"] == len(DOCUMENTS)


def test_a_network_that_goes_away_in_mid_build_loses_nothing(hub, client, hub_recipe, tmp_path):
    def drop(request: stand_in.Request) -> None:
        if request.path.endswith("00001-of-00002.parquet"):
            raise ConnectionAbortedError("as the test wants it")  # closes the connection

    command = ["build", str(hub_recipe()), "--output"]
    hub.faults.append(drop)
    try:
        result = client.python(f"""
import sys, time
from builder.cli.main import main
time.sleep = lambda seconds: None  # between the attempts of the client libraries
sys.argv = {["logit-dataset", *command, str(tmp_path / "out")]!r}
main()
""")
    finally:
        hub.faults.clear()
    message = r"corpus file number 1 cannot be read \(Server Disconnected\); check the network, and run the command again"
    assert_one_line(result, message)
    assert data_bytes(tmp_path / "out")
    assert client.cli(*command, tmp_path / "out").returncode == 0
    assert client.cli(*command, tmp_path / "whole").returncode == 0
    assert data_bytes(tmp_path / "out") == data_bytes(tmp_path / "whole")


FAILURES = {
    "no such dataset": (
        {"corpus": 'repo = "org/nothing"'},
        r"the Hub has no dataset 'org/nothing' .*check the name",
    ),
    "no such teacher": (
        {"teacher": 'repo = "org/nothing"'},
        r"the Hub has no model 'org/nothing' .*check the name",
    ),
    "not a repository's name": (
        {"corpus": 'repo = "https://huggingface.co/datasets/org/corpus"'},
        r"'https://huggingface.co/datasets/org/corpus' is not a Hub dataset name; expected ORG/NAME",
    ),
    "no such revision of the dataset": (
        {"corpus": 'revision = "v9"'},
        r"dataset 'org/corpus' has no revision 'v9' on the Hub",
    ),
    "no such revision of the teacher": (
        {"teacher": 'revision = "v9"'},
        r"model 'org/tiny' has no revision 'v9' on the Hub",
    ),
    "no such commit of the dataset": (
        {"corpus": f'revision = "{NO_COMMIT}"'},
        r"corpus org/corpus@00000000",
    ),
    "no such commit of the teacher": (
        {"teacher": f'revision = "{NO_COMMIT}"'},
        r"teacher org/tiny: 0000000\S+ is not a valid git identifier",
    ),
    "no such configuration": (
        {"corpus": 'repo = "org/configurations"\nconfig = "fr"'},
        r"corpus org/configurations@\w{8}: .*'fr' not found.*'en', 'de'",
    ),
    "no configuration chosen": (
        {"corpus": 'repo = "org/configurations"'},
        r"corpus org/configurations@\w{8}: Config name is missing.*'en', 'de'",
    ),
    "no such split": (
        {"corpus": 'split = "validation"'},
        r"corpus org/corpus@\w{8}: Bad split: validation. Available splits: \['train'\]",
    ),
    "no such column": (
        {"corpus": 'text_column = "body"'},
        r"corpus file number 0 has no column 'body'; its columns are id, text; set corpus.text_column",
    ),
    "no data files": (
        {"corpus": 'repo = "org/empty"'},
        r"corpus org/empty@\w{8}: .*doesn't contain any data files",
    ),
    "a damaged data file": (
        {"corpus": 'repo = "org/damaged"'},
        r"corpus org/damaged@\w{8}: .*not a parquet file",
    ),
    "pickled weights only": (
        {"teacher": 'repo = "org/pickled"'},
        r"teacher org/pickled: it has no model\.safetensors, .*save_pretrained",
    ),
}


@pytest.fixture(scope="module")
def failing(hub, client, tiny_teacher_dir):
    """Repositories in which something is wrong."""
    commit_configurations(hub)
    readme = {"README.md": b"---\nlicense: mit\n---\n"}
    hub.commit("dataset", "org/empty", readme)
    hub.commit("dataset", "org/damaged", {**readme, "data/train.parquet": b"PAR1 cut here"})
    files = stand_in.directory_files(tiny_teacher_dir)
    del files["model.safetensors"]
    hub.commit("model", "org/pickled", {**files, "pytorch_model.bin": b"pickle"})
    return client


@pytest.mark.parametrize(("sections", "message"), FAILURES.values(), ids=FAILURES)
def test_what_the_hub_does_not_have_is_one_clear_line(
    failing, hub_recipe, tmp_path, sections, message
):
    started = monotonic()
    result = failing.cli("build", hub_recipe(**sections), "--output", tmp_path / "out")
    assert_one_line(result, message)
    assert monotonic() - started < 20
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert list((tmp_path / "out" / "data").iterdir()) == []


def assert_one_line(result, message: str) -> None:
    assert result.returncode == 1, result.stderr
    lines = result.stderr.splitlines()
    assert [line[:7] for line in lines] == ["error: "], result.stderr
    assert re.search(message, lines[0]), lines[0]
    assert result.stdout == ""
    assert TOKEN not in result.stderr
    assert "127.0.0.1" not in result.stderr


@pytest.fixture
def without_network(client, tmp_path):
    """`logit-dataset build` where every connection is refused: (what it printed, seconds it wanted to wait)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        refusing = f"http://127.0.0.1:{free.getsockname()[1]}"

    def run(recipe: Path) -> tuple:
        slept = tmp_path / "slept"
        slept.touch()
        code = f"""
import os, sys, time
from builder.cli.main import main

del os.environ["NO_PROXY"], os.environ["no_proxy"]
os.environ["HTTP_PROXY"] = os.environ["http_proxy"] = {refusing!r}
log = open({str(slept)!r}, "a")
time.sleep = lambda seconds: print(seconds, file=log, flush=True)  # between the attempts of the client libraries
sys.argv = ["logit-dataset", "build", {str(recipe)!r}, "--output", {str(tmp_path / "out")!r}]
main()
"""
        result = client.python(code)
        return result, sum(map(float, slept.read_text().split()))

    return run


UNREACHABLE = {
    "branches": (
        {},
        r"cannot reach the Hub to resolve dataset org/corpus@main .*refused.*check the network",
    ),
    "a pinned teacher": (
        {"corpus": 'files = ["*.parquet"]', "teacher": f'revision = "{NO_COMMIT}"'},
        r"teacher org/tiny: it is not in the cache, and the Hub cannot be reached; check the network",
    ),
    "a pinned corpus": (
        {"corpus": f'revision = "{NO_COMMIT}"', "teacher": 'path = "TINY"'},
        r"corpus org/corpus@00000000: .*reach",
    ),
}


@pytest.mark.parametrize(("sections", "message"), UNREACHABLE.values(), ids=UNREACHABLE)
def test_without_network_a_build_soon_gives_up_with_one_line(
    without_network, hub_recipe, tmp_path, tiny_teacher_dir, sections, message
):
    (tmp_path / "corpus.parquet").write_bytes(parquet(DOCUMENTS))
    recipe = hub_recipe(**sections)
    recipe.write_text(recipe.read_text().replace("TINY", str(tiny_teacher_dir)))
    result, waited_seconds = without_network(recipe)
    assert_one_line(result, message)
    assert waited_seconds < 60


def test_offline_a_build_says_what_is_needed(cli, hub_recipe, tmp_path):
    # HF_HUB_OFFLINE is set in this process.
    status, out, err = cli("build", hub_recipe(), "--output", tmp_path / "out")
    assert (status, out) == (1, "")
    assert (
        err
        == "error: cannot reach the Hub to resolve dataset org/corpus@main because HF_HUB_OFFLINE is set; unset it, give the full commit of a cached copy, or use local files\n"
    )


def test_with_everything_cached_the_commits_still_come_from_the_build(
    hub, client, hub_recipe, tmp_path
):
    """An unfinished build of local files and a teacher from the Hub goes on without asking the Hub for the branch."""
    (tmp_path / "corpus.parquet").write_bytes(parquet(DOCUMENTS))
    recipe = hub_recipe()
    recipe.write_text(recipe.read_text().replace('repo = "org/corpus"', 'files = ["*.parquet"]'))
    command = ["build", recipe, "--output", tmp_path / "out"]
    assert client.cli(*command, "--max-shards", "1").returncode == 0
    hub.requests.clear()
    assert client.cli(*command).returncode == 0
    assert [request for request in hub.requests if request.path.startswith("/api/models/org/tiny/revision")] == []  # fmt: skip


def test_the_stand_in_answers_the_stock_client_as_the_hub_does(client, hub):
    code = """
import json
from huggingface_hub import HfApi, HfFileSystem, get_safetensors_metadata, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from datasets import load_dataset

api, found = HfApi(), {}
info = api.dataset_info("org/corpus", revision="v1.0.0", files_metadata=True)
found["sizes"] = {s.rfilename: s.size for s in info.siblings}
found["top"] = [e.path for e in api.list_repo_tree("org/corpus", repo_type="dataset")]
found["all"] = [e.path for e in api.list_repo_tree("org/corpus", repo_type="dataset", recursive=True)]
found["paths"] = [e.path for e in api.get_paths_info("org/corpus", ["data", "README.md", "no"], repo_type="dataset")]
found["tags"] = [t.name for t in api.list_repo_refs("org/corpus", repo_type="dataset").tags]
found["parameters"] = get_safetensors_metadata("org/tiny").parameter_count
found["sha256"] = api.get_paths_info("org/tiny", ["model.safetensors"])[0].lfs.sha256
with HfFileSystem().open("datasets/org/corpus@v1.0.0/data/train-00000-of-00002.parquet", block_size=64) as file:
    file.seek(-4, 2)
    found["end"] = file.read().decode()
found["exists"] = [api.file_exists("org/tiny", "no"), api.revision_exists("org/tiny", "no"), api.repo_exists("org/no")]
found["rows"] = load_dataset("org/corpus", split="train", revision="v1.0.0").num_rows
found["errors"] = []
for arguments in (("org/no", "x"), ("org/tiny", "x"), ("org/tiny", "config.json", "no")):
    try:
        hf_hub_download(arguments[0], arguments[1], revision=(*arguments, None)[2])
    except HfHubHTTPError as error:
        found["errors"].append(type(error).__name__)
print(json.dumps(found))
"""
    result = client.python(code)
    assert result.returncode == 0, result.stderr
    files = hub.repos["dataset", "org/corpus"].commits[
        hub.repos["dataset", "org/corpus"].tags["v1.0.0"]
    ]
    weights = next(iter(hub.repos["model", "org/tiny"].commits.values()))["model.safetensors"]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["sizes"] == {name: len(content) for name, content in files.items()}
    assert found["top"] == ["README.md", "data"]
    assert found["all"] == sorted([*files, "data"])
    assert found["paths"] == ["data", "README.md"]
    assert found["tags"] == ["v1.0.0"]
    assert found["parameters"]["F32"] > 10_000
    assert found["sha256"] == stand_in.hashlib.sha256(weights).hexdigest()
    assert found["end"] == "PAR1"
    assert found["exists"] == [False, False, False]
    assert found["rows"] == len(DOCUMENTS)
    assert found["errors"] == [
        "RepositoryNotFoundError",
        "RemoteEntryNotFoundError",
        "RevisionNotFoundError",
    ]


RECIPES = sorted(
    path for folder in ("dataset_cards", "examples") for path in REPOSITORY.glob(f"{folder}/*/recipe.toml")
)  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_every_recipe_in_the_repository_is_valid(path):
    recipe = load_recipe(path)
    assert recipe.name.replace("-", "_") == path.parent.name.replace("-", "_")
    if path.parent.name not in ("experiment", "own_teacher"):  # whose programs write their corpus
        assert all(list(path.parent.glob(pattern)) for pattern in recipe.corpus.files)


def test_there_are_recipes_to_check():
    assert len(RECIPES) >= 4
