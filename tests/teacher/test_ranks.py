"""Teachers that are spread over devices or split over processes: the same logits, and no process left behind."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from builder.dataset.identity import fingerprint
from builder.recipe.file import load_recipe
from builder.recipe.sections import TeacherRecipe
from builder.sources.known import KnownSources
from builder.sources.opening import open_teacher
from builder.sources.resolve import resolve_teacher
from builder.teacher.loading import load_teacher
from builder.teacher.model import Teacher, is_spread
from builder.verify.verify import verify
from tests.build.test_build import data_bytes, read_rows, run
from tests.conftest import sample_documents, write_jsonl

SEQUENCES = [[5, 9, 300, 17, 2, 44], [8], list(range(1, 60))]

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")


def split_teacher(directory: Path, size: int = 2, dtype: str = "float32") -> Teacher:
    recipe = TeacherRecipe(path=str(directory), dtype=dtype, tensor_parallel=size)
    source = resolve_teacher(recipe, Path(), KnownSources())
    return open_teacher(recipe, source, device="cpu")


def rank_processes(parent: int) -> list[int]:
    """Process ids of the ranks that a process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if is_child and b"builder.teacher.ranks" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:  # it has just ended
            continue
    return found


def test_a_teacher_on_several_devices_is_headed_right(tiny_teacher_dir, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher_dir, dtype=torch.float32)
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]  # fmt: skip
    # All are the same device here, but accelerate's hooks are those of several.
    spread = dispatch_model(model, dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)
    assert is_spread(spread)
    teacher = Teacher(spread, tiny_tokenizer, device=torch.device("cpu"))
    assert teacher.head_only
    plain = load_teacher(str(tiny_teacher_dir))
    assert not is_spread(plain.model)
    assert torch.equal(
        torch.cat(list(teacher.logits(SEQUENCES))), torch.cat(list(plain.logits(SEQUENCES)))
    )


def test_parts_that_are_not_on_a_gpu_are_refused(tiny_teacher_dir, monkeypatch):
    original = AutoModelForCausalLM.from_pretrained

    def with_the_last_layer_elsewhere(*args, device_map, **kwargs):
        assert device_map == "auto"
        model, report = original(*args, **kwargs)
        places = {"model.embed_tokens": "meta", "model.layers.1": "cpu"}
        model.hf_device_map, model._hf_hook = places, None
        return model, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", with_the_last_layer_elsewhere)
    with pytest.raises(ValueError, match=r"no room for 1 of its parts, such as model\.layers\.1"):
        load_teacher(str(tiny_teacher_dir), spread=True)


def test_two_processes_agree_with_one(tiny_teacher_dir):
    plain, split = load_teacher(str(tiny_teacher_dir)), split_teacher(tiny_teacher_dir)
    assert split.head_only
    assert split.provenance() == plain.provenance()
    weight = split.model.model.layers[0].self_attn.q_proj.weight
    assert weight.to_local().shape[0] == weight.shape[0] // 2  # it really is split

    def check(found, expected):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)

    expected = torch.cat(list(plain.logits(SEQUENCES)))
    check(torch.cat(list(split.logits(SEQUENCES))), expected)
    hidden = plain.hidden(SEQUENCES)
    check(split.hidden(SEQUENCES), hidden)
    # Two generators at once, one of them for hidden states that the other process has not: as `recompute` does it.
    pairs = zip(split.logits(SEQUENCES), split.head(hidden + 1.0), strict=True)
    both = [torch.cat(parts) for parts in zip(*pairs, strict=True)]
    check(both[0], expected)
    check(both[1], torch.cat(list(plain.head(hidden + 1.0))))
    split.head_only = False
    check(torch.cat(list(split.logits(SEQUENCES))), expected)
    split.head_only = True

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError

    forward, split.model.base_model.forward = split.model.base_model.forward, out_of_memory
    with pytest.raises(ValueError, match=r"does not fit in the memory of the teacher's devices"):
        split.hidden(SEQUENCES)
    split.model.base_model.forward = forward
    with pytest.raises(RuntimeError, match="out of step"):
        split.hidden(SEQUENCES)


def test_a_number_of_processes_that_does_not_divide_the_heads_is_refused(
    tiny_teacher_dir, monkeypatch
):
    original = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, distributed_config, **kwargs: original(*args, **kwargs),
    )
    with pytest.raises(
        ValueError,
        match=r"^teacher tiny: teacher\.tensor_parallel is 4, which does not divide the model's num_key_value_heads = 2",
    ):
        load_teacher(str(tiny_teacher_dir), split=DistributedConfig(tp_size=4))


def test_a_build_with_a_split_teacher_is_verified_with_it(make_recipe, tmp_path):
    plain, split = tmp_path / "plain", tmp_path / "split"
    options = {"output": "hidden_states = true", "corpus": "max_documents = 8"}
    run(make_recipe(**options), plain)
    recipe = make_recipe(teacher_options="tensor_parallel = 2", **options)
    run(recipe, split)
    assert data_bytes(plain) != data_bytes(split)
    for row, other in zip(read_rows(plain), read_rows(split), strict=True):
        assert row["input_ids"] == other["input_ids"]
        assert torch.allclose(*(torch.tensor(r["logsumexp"]) for r in (row, other)), atol=1e-4)
    teacher = Path(load_recipe(recipe).teacher.path)
    report = verify(split, recompute=4, device="cpu", teacher_path=teacher)
    assert report.recomputed["rows"] == 4
    assert not report.problems
    # What this process does next is not that group's.
    assert not dist.is_initialized()
    assert "LOCAL_RANK" not in os.environ


def test_a_failed_shard_lets_a_split_teacher_go_before_it_is_loaded_anew(
    make_recipe, tmp_path, monkeypatch
):
    """Two of them do not fit the memory, and the error is kept until the other partitions are finished."""
    teachers, alive = [], []

    def load_one(recipe, source, *, device):
        alive.append(sum(teacher() is not None for teacher in teachers))
        teacher = load_teacher(source.location, device=device)
        teachers.append(weakref.ref(teacher))
        return teacher

    monkeypatch.setattr("builder.build.worker.open_teacher", load_one)
    documents = sample_documents(48)
    for part in range(2):
        write_jsonl(tmp_path / f"part-{part}.jsonl", documents[part::2])
    with (tmp_path / "part-0.jsonl").open("a") as file:
        file.write("{")
    recipe = make_recipe(
        files="part-*.jsonl", output="partitions = 2", teacher_options="tensor_parallel = 2"
    )
    with pytest.raises(ValueError, match=r"part-0\.jsonl line 25 is not valid JSON"):
        run(recipe, tmp_path / "out", notice=lambda _: None)
    assert alive == [0, 0]
    records = [json.loads(p.read_text()) for p in (tmp_path / "out/.build/records").iterdir()]
    assert any(record["exhausted"] for record in records)


def test_a_rank_ends_with_rank_0_that_died_in_the_middle_of_a_word(tmp_path):
    order = {
        **{"rank": 1, "size": 2, "device": "cpu", "meeting": str(tmp_path / "meeting")},
        **{"threads": 1, "options": {"location": "none"}},
    }
    rank = subprocess.Popen([sys.executable, "-m", "builder.teacher.ranks"], stdin=subprocess.PIPE)
    try:
        message = pickle.dumps(("hidden", [list(range(1000))]))
        rank.stdin.write(pickle.dumps(order) + message[:-500])
        rank.stdin.close()
        assert rank.wait(timeout=60) == 0  # else it would wait for the others for ever
    finally:
        rank.kill()


PATIENT = """
from pathlib import Path
from builder.recipe.sections import TeacherRecipe
from builder.sources.opening import open_teacher
from builder.sources.known import KnownSources
from builder.sources.resolve import resolve_teacher
recipe = TeacherRecipe(path={directory!r}, dtype="float32", tensor_parallel=2)
teacher = open_teacher(recipe, resolve_teacher(recipe, Path(), KnownSources()), device="cpu")
print("ready", flush=True)
while True:
    teacher.hidden([[1, 2, 3]])
"""


@needs_proc
@pytest.mark.parametrize("victim", ["rank 0", "rank 1"])
def test_all_processes_of_a_teacher_end_with_any_of_them(tiny_teacher_dir, victim):
    code = PATIENT.format(directory=str(tiny_teacher_dir))
    leader = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert leader.stdout.readline() == "ready\n"
    (other,) = rank_processes(leader.pid)
    os.kill(leader.pid if victim == "rank 0" else other, signal.SIGKILL)
    _, err = leader.communicate(timeout=60)
    if victim == "rank 1":
        assert leader.returncode == 1
        assert "rank 1 of the teacher ended with status -9" in err
    deadline = time.monotonic() + 30
    while Path(f"/proc/{other}/cmdline").exists() and time.monotonic() < deadline:
        if not Path(f"/proc/{other}/cmdline").read_bytes():
            break  # ended, and not yet waited for
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{other}").exists(), "rank 1 outlived rank 0"


def test_recipes(make_recipe):
    plain = load_recipe(make_recipe()).published()
    assert not {"device_map", "tensor_parallel"} & set(plain["teacher"])
    plans = [
        {"recipe": load_recipe(make_recipe(teacher_options=line)).published(), "corpus": {}, "teacher": {}}
        for line in ("", 'device_map = "auto"', "tensor_parallel = 2", "tensor_parallel = 4")
    ]  # fmt: skip
    assert len({fingerprint(plan) for plan in plans}) == 4
    with pytest.raises(ValueError, match="cannot be combined"):
        load_recipe(make_recipe(teacher_options='device_map = "auto"\ntensor_parallel = 2'))
    with pytest.raises(ValueError, match="a GGUF teacher runs on one device"):
        TeacherRecipe(gguf="x.gguf", device_map="auto")
    recipe = make_recipe(teacher_options="tensor_parallel = 2")
    with recipe.open("a") as file:
        file.write("\n[generation]\nmax_new_tokens = 8\n")
    with pytest.raises(ValueError, match=r"split over processes .* cannot generate"):
        load_recipe(recipe)
