"""A model that transformers does not know: trained, captured, verified by a stranger, distilled. And what is refused of such code."""

import hashlib
import importlib.util
import json
import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from builder.recipe.file import load_recipe
from builder.teacher.loading import load_teacher
from tests.conftest import REPOSITORY
from tests.examples.test_students import example

EXAMPLE = REPOSITORY / "examples" / "own_teacher"
FEW = "\nmax_documents = 4\n"


def module(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What train_teacher.py writes, after a few steps."""
    directory = tmp_path_factory.mktemp("own") / "teacher"
    sys.path.insert(0, str(EXAMPLE))
    try:
        losses = module("train_teacher").main(["--output", str(directory), "--steps", "12"])
    finally:
        sys.path.remove(str(EXAMPLE))
        sys.modules.pop("my_teacher", None)
    assert losses[-1] < losses[0] - 0.5
    recipe = directory / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("[teacher]", f"{FEW}\n[teacher]"))
    return directory


@pytest.fixture
def own(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "own")


@pytest.fixture(scope="module")
def dataset(trained, tmp_path_factory):
    from builder.build.build import build

    output = tmp_path_factory.mktemp("built") / "out"
    build(load_recipe(trained / "recipe.toml"), trained, output)
    return output


def alone(directory):
    """The model by no code of the builder's."""
    code = module("my_teacher")
    return code.load_teacher(directory / "model.pt", directory / "tokenizer.json")


def test_the_example_from_training_to_a_student(own, cli, tmp_path):
    out = tmp_path / "out"
    status, _, said = cli("build", own / "recipe.toml", "--output", out, "--device", "cpu")
    assert status == 0, said
    assert f"--teacher {own / 'my_teacher.py'}" in said + _
    status, told, said = cli(
        "verify", out, "--recompute", 1000, "--teacher", own / "my_teacher.py", "--device", "cpu"
    )
    assert status == 0, told + said
    assert "top-1 agreement 100.00%" in told
    model, tokenizer = alone(own)
    (path,) = (out / "data").glob("*.parquet")
    rows = pq.read_table(path).to_pylist()
    assert {row["id"] for row in rows} == set(list(sorted_topics())[:4])
    for row in rows:
        with torch.inference_mode():
            expected_TV = model(torch.tensor([row["input_ids"]]))[0].double().log_softmax(-1)
        top = expected_TV.topk(20)
        found_TK = torch.tensor(row["topk_logprobs"], dtype=torch.float64)
        torch.testing.assert_close(found_TK, top.values, atol=4e-3, rtol=1e-3)
    text = "".join(row["text"] for row in rows if row["id"] == rows[0]["id"])
    ids = [i for row in rows if row["id"] == rows[0]["id"] for i in row["input_ids"]]
    assert tokenizer.encode(text).ids == ids
    losses = example("train_plain").main(
        [str(out), "--steps", "30", "--length", "64", "--vocabulary", "300"]
    )
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def sorted_topics():
    from pydoc_data.topics import topics

    return sorted(topics)


def test_in_16_bits_it_is_its_own_measure(own, cli, tmp_path):
    recipe = own / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("python =", 'dtype = "bfloat16"\npython ='))
    out, code = tmp_path / "out", own / "my_teacher.py"
    status, _, said = cli("build", recipe, "--output", out, "--device", "cpu")
    assert status == 0, said
    status, told, said = cli("verify", out, "--recompute", 9, "--teacher", code, "--device", "cpu")
    assert status == 0, told + said
    assert "(noise floor " in told
    assert json.loads((out / "manifest.json").read_text())["teacher"]["dtype"] == "bfloat16"


def test_manifest_card_and_info_say_what_it_is(dataset, trained, cli):
    manifest = json.loads((dataset / "manifest.json").read_text())
    found = manifest["teacher"]
    sha256 = {
        name: hashlib.sha256((trained / name).read_bytes()).hexdigest()
        for name in ("my_teacher.py", "model.pt", "tokenizer.json")
    }
    assert found["kind"] == "python"
    assert (found["name"], found["sha256"]) == ("my_teacher.py", sha256["my_teacher.py"])
    assert found["weights_sha256"] == [sha256["model.pt"], sha256["tokenizer.json"]]
    assert (found["architecture"], found["attention"]) == ("SmallModel", "own")
    assert (found["vocab_size"], found["dtype"], found["hidden_size"]) == (2000, "float32", None)
    assert found["parameters"] == sum(p.numel() for p in alone(trained)[0].parameters())
    assert len(found["state_sha256"]) == 64
    recipe = manifest["recipe"]["teacher"]
    assert recipe["python"] == "my_teacher.py"
    assert recipe["weights"] == ["model.pt", "tokenizer.json"]
    assert str(trained) not in (dataset / "manifest.json").read_text()
    card = (dataset / "README.md").read_text()
    for digest in sha256.values():
        assert digest in card
    assert "--teacher my_teacher.py" in card
    assert "SmallModel" in card
    assert "attention =" not in card
    assert "is not in this dataset" in " ".join(card.split())
    status, told, said = cli("info", dataset)
    assert status == 0, said
    assert "my_teacher.py" in told
    status, told, said = cli("verify", dataset)
    assert status == 0, told + said


def test_no_code_is_run_that_a_dataset_names(dataset, own, cli, tmp_path, monkeypatch):
    """Not even the right one, where it lies in the working directory or the dataset."""
    here = shutil.copytree(dataset, tmp_path / "here")
    for name in ("my_teacher.py", "model.pt", "tokenizer.json"):
        shutil.copy(own / name, here)
    monkeypatch.chdir(here)
    for arguments in (["verify", here, "--recompute", 1], ["info", here, "--row", 0]):
        status, _, said = cli(*arguments)
        assert status == 1
        assert (
            "which is never run from a dataset: get 'my_teacher.py' and 'model.pt', 'tokenizer.json'"
            in said
        )
        assert "give its path with --teacher PATH" in said


def test_a_stranger_needs_the_same_file_and_weights(dataset, own, cli, tmp_path):
    def verify():
        code = own / "my_teacher.py"
        return cli("verify", dataset, "--recompute", 1, "--teacher", code, "--device", "cpu")

    status, told, said = verify()
    assert status == 0, told + said
    ran = tmp_path / "ran"
    code, model = own / "my_teacher.py", own / "model.pt"
    before = code.read_text()
    code.write_text(f"open({str(ran)!r}, 'w')\n{before}")
    status, _, said = verify()
    assert status == 1
    assert "the teacher at hand is not the dataset's: teacher.sha256:" in said
    assert not ran.exists()  # it was not even run
    code.write_text(before)
    state = torch.load(model, weights_only=True)
    state["norm.weight"][0] += 1e-3
    torch.save(state, model)
    status, _, said = verify()
    assert status == 1
    assert "teacher.weights_sha256:" in said
    model.unlink()
    status, _, said = verify()
    assert status == 1
    assert "teacher.weights: 'model.pt' does not exist" in said


def test_a_manifest_cannot_name_weights_elsewhere(dataset, own, cli, tmp_path):
    forged = shutil.copytree(dataset, tmp_path / "forged")
    path = forged / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["recipe"]["teacher"]["weights"] = ["../evil.pt", "tokenizer.json"]
    path.write_text(json.dumps(manifest))
    status, _, said = cli("verify", forged, "--recompute", 1, "--teacher", own / "my_teacher.py")
    assert status == 1
    assert "names files outside of its directory" in said


def test_what_else_the_code_reads_is_seen(own, cli, tmp_path, dataset):
    """Weights that no recipe lists are other weights all the same."""
    (own / "shift.txt").write_text("0")
    code = own / "my_teacher.py"
    code.write_text(
        code.read_text().replace(
            "    return model, Tok",
            "    model.norm.weight.data += float(Path(__file__).with_name('shift.txt').read_text())\n    return model, Tok",
        )
    )
    out = tmp_path / "out"
    arguments = ("build", own / "recipe.toml", "--output", out, "--device", "cpu")
    recipe = own / "recipe.toml"
    recipe.write_text(recipe.read_text() + "shard_tokens = 500\n")
    status, _, said = cli(*arguments, "--max-shards", 1)
    assert status == 0, said
    (own / "shift.txt").write_text("0.5")
    status, _, said = cli(*arguments)
    assert status == 1
    assert "state_sha256" in said


def teacher_of(tmp_path, body, weights=()):
    path = tmp_path / "odd_teacher.py"
    path.write_text(body)
    return load_teacher(str(path), weights=list(weights))


HEAD = """
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, decoders
def tok():
    vocab = {"<eos>": 0} | {c: i + 1 for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    t = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return t
class M(torch.nn.Module):
    def __init__(self, size=300):
        super().__init__()
        torch.manual_seed(0)
        self.e, self.h = torch.nn.Embedding(size, 16), torch.nn.Linear(16, size)
    def body(self, ids):
        return self.e(ids).cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None] ** 0.5
    def forward(self, ids):
        return self.h(self.body(ids))
"""
LOAD = "\ndef load_teacher():\n    return M(), tok()\n"


def test_a_small_one_is_a_teacher(tmp_path):
    teacher = teacher_of(tmp_path, HEAD + LOAD)
    assert (teacher.vocab_size, teacher.head_only, teacher.max_length) == (300, False, None)
    assert teacher.tokenizer.decode(teacher.tokenizer("a b")["input_ids"]) == "a b"


def test_the_directory_of_a_tokenizer_will_do(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path / "tok")
    teacher = teacher_of(tmp_path, HEAD + "\ndef load_teacher():\n    return M(448), 'tok'\n")
    assert teacher.tokenizer.eos_token_id == 0
    assert teacher.tokenizer("quick")["input_ids"] == tiny_tokenizer("quick")["input_ids"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1", r"it has no function load_teacher\(\*weights\); define one that returns"),
        ("import nothing_of_the_kind", r"line 1: ModuleNotFoundError: No module named 'nothing"),
        ("def load_teacher():\n    return 1 / 0", "line 2: ZeroDivisionError"),
        ("def load_teacher():\n    return 5", "load_teacher returns int, expected a module and"),
        ("def load_teacher():\n    return 5, 6", "returns int first, expected a torch.nn.Module"),
        (f"{HEAD}def load_teacher():\n    return M(), 6", "returns int second, expected a tokeniz"),
        (f"{HEAD}def load_teacher():\n    return M(), 'no'", "no as the directory of its tokenizer"),
        (HEAD.replace("self.h(self.body(ids))", "5") + LOAD, "M returns int for ids of shape"),
        (HEAD.replace("self.body(ids))", "self.body(ids)[:, 0])") + LOAD, r"returns the shape \(1, 300\) for"),
        (HEAD.replace("self.e(ids).cumsum", "self.e(ids).wrong") + LOAD, "M fails on ids of shape .*AttributeError"),
        (HEAD.replace(".cumsum(1)", ".flip(1).cumsum(1).flip(1)") + LOAD, "M is not a causal language model"),
        (HEAD.replace("self.h(self.body(ids))", "self.h(self.body(ids)) * float('nan')") + LOAD, "logits are NaN"),
        (HEAD.replace("size=300", "size=200") + LOAD, "the tokenizer has ids up to 256, but the model knows only 200"),
        (HEAD + "import beside_it\n" + LOAD, "it imports beside_it from beside it, which is not recorded"),
    ],
)  # fmt: skip
def test_code_that_is_no_teacher_is_refused_in_a_line(tmp_path, monkeypatch, body, message):
    (tmp_path / "beside_it.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(ValueError, match=rf"^teacher odd_teacher\.py: .*{message}") as caught:
            teacher_of(tmp_path, body)
    finally:
        sys.modules.pop("beside_it", None)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('path = "x"\npython = "a.py"', "exactly one of repo, path, gguf, python, embedded"),
        ('path = "x"\nweights = "a.pt"', "weights is valid only with python"),
        ('python = "a.py"\nattention = "eager"', "attention has no effect with python"),
        ('python = "a.py"\ntensor_parallel = 2', "tensor_parallel has no effect with python"),
        ('python = "a.py"\n[generation]\nmax_new_tokens = 5', "cannot generate"),
    ],
)
def test_keys_that_mean_nothing_with_it_are_refused(tmp_path, lines, message):
    path = tmp_path / "recipe.toml"
    path.write_text(f'name = "x"\n[corpus]\nfiles = "a"\n[teacher]\n{lines}\n')
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_its_dtype_is_float32_unless_it_is_named(tmp_path):
    path = tmp_path / "recipe.toml"
    start = 'name = "x"\n[corpus]\nfiles = "a"\n[teacher]\n'
    path.write_text(f'{start}python = "a.py"\n')
    assert load_recipe(path).teacher.dtype == "float32"
    path.write_text(f'{start}python = "a.py"\ndtype = "bfloat16"\n')
    assert load_recipe(path).teacher.dtype == "bfloat16"
    path.write_text(f'{start}path = "a"\n')
    assert load_recipe(path).teacher.dtype == "bfloat16"
