"""Token ids are those of tokenizer.json, whatever class a config names; and what else decides what a teacher's tokenizer is."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as AsItIs

from builder.corpus.encoder import Encoder, backend_copy
from builder.dataset.manifest import read_manifest, write_json
from builder.teacher import loading
from builder.teacher.loading import load_teacher, load_tokenizer
from builder.tokenizer.rules import differing_parts
from logit_dataset import load_logits
from tests.conftest import write_jsonl
from tests.teacher.test_model import make_model, write_gguf
from tests.teacher.test_ranks import split_teacher
from tests.tokenizer_files import (
    BOS,
    EOS,
    HARD_DOCUMENTS,
    KINDS,
    around,
    content,
    write_tokenizer,
)

CLASSES = (
    *(None, "PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", "LlamaTokenizerFast"),
    *("GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "CohereTokenizer"),
    *("CodeLlamaTokenizer", "T5Tokenizer", "BertTokenizer", "CTRLTokenizer", "NoSuchTokenizer"),
)
"""Rebuilt by other rules, taken as they are, not to be loaded with any of the files, written in Python, unknown."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for all kinds of tokenizers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=900, num_attention_heads=2, num_key_value_heads=2, **sizes)
    directory = tmp_path_factory.mktemp("weights")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def make_teacher(weights: Path, tmp_path: Path) -> Any:
    def make(kind: str, class_name: str | None = None, /, **config: Any) -> Path:
        directory = tmp_path / "teacher"
        write_tokenizer(directory, kind, class_name, **config)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(weights / name, directory)
        return directory

    return make


RECIPE = """
name = "hard"
[corpus]
files = ["hard.jsonl"]
[teacher]
path = "teacher"
dtype = "float32"
[sequences]
max_length = 512
{sequences}
[output]
top_k = 2
"""


@pytest.fixture
def build(cli: Any, tmp_path: Path) -> Any:
    """Build the page of hard texts by the command: rows, manifest, and what was said."""
    import pyarrow.parquet as pq

    number = iter(range(10**6))

    def run(sequences: str = "") -> tuple[list[dict[str, Any]], dict[str, Any], str]:
        write_jsonl(tmp_path / "hard.jsonl", [{"text": text} for text in HARD_DOCUMENTS])
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(RECIPE.format(sequences=sequences), encoding="utf-8")
        output = tmp_path / f"out{next(number)}"
        status, _, said = cli("build", recipe, "--output", output, "--device", "cpu")
        assert status == 0, said
        table = pq.read_table(output / "data", columns=["input_ids", "text"])
        return table.to_pylist(), read_manifest(output), said

    return run


def ids_by_the_file(directory: Path) -> list[list[int]]:
    """What the `tokenizers` library makes of the page by tokenizer.json alone; what looks like special tokens is text."""
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.encode_special_tokens = True
    return [backend.encode(text).ids for text in HARD_DOCUMENTS]


@pytest.mark.parametrize("kind", KINDS)
def test_stored_ids_are_those_of_the_file_whatever_class_is_named(make_teacher, build, kind):
    for class_name in CLASSES:
        directory = make_teacher(kind, class_name)
        rows, manifest, _ = build()
        assert [row["text"] for row in rows] == HARD_DOCUMENTS
        assert [row["input_ids"] for row in rows] == ids_by_the_file(directory), class_name
        assert manifest["teacher"]["tokenizer_source"] == "tokenizer.json"


def encoded(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """The ids of one text as rows get them."""
    from builder.corpus.documents import Document

    encoder = Encoder(tokenizer, max_length=500, long_documents="chunk", **options)
    return encoder.encode(Document(id="", text=text))[0].token_ids


def notices(directory: Path) -> str:
    return "\n".join(load_tokenizer(str(directory)).logit_dataset_origin.notices)


@pytest.mark.parametrize(
    "model_type",
    ["qwen3", "gpt_neox", "deepseek_v3", "gemma2", "mistral", "cohere", "phi3", "gpt2"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_the_model_type_names_changes_no_id(make_teacher, kind, model_type):
    directory = make_teacher(kind)
    (directory / "config.json").unlink()
    AutoConfig.for_model(model_type).save_pretrained(directory)
    tokenizer = load_tokenizer(str(directory))
    assert [encoded(tokenizer, text) for text in HARD_DOCUMENTS] == ids_by_the_file(directory)


def test_the_user_is_told_of_another_tokenizer_and_how_to_get_at_the_right_one(
    make_teacher, build, tmp_path
):
    directory = make_teacher("llama3", "GPT2Tokenizer")
    _, manifest, said = build()
    line = (
        r"transformers loads this tokenizer as GPT2Tokenizer with other rules than tokenizer\.json has \(pre_tokenizer; "
        r"'2023' is 20 23 there, .* here\); token ids are those of tokenizer\.json, which PreTrainedTokenizerFast"
    )
    assert len(re.findall(line, said)) == 1
    content_sha256 = hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest()
    assert manifest["teacher"]["tokenizer_file_sha256"] == content_sha256
    as_it_is = AsItIs.from_pretrained(directory).backend_tokenizer.to_str()
    expected = hashlib.sha256(as_it_is.encode()).hexdigest()
    assert manifest["teacher"]["tokenizer_sha256"] == expected
    card = (tmp_path / "out0" / "README.md").read_text(encoding="utf-8")
    assert f"the tokenizer (tokenizer.json, SHA-256 `{expected[:16]}`) has 700 tokens" in card
    assert notices(make_teacher("gpt2", "GPT2Tokenizer")) == ""


def added(*contents: str, first: int, **flags: Any) -> dict[str, Any]:
    """`added_tokens_decoder` of a config."""
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, **flags}
    return {
        str(first + i): {"content": text, "single_word": False, **flags}
        for i, text in enumerate(contents)
    }


@pytest.mark.parametrize(
    ("kind", "class_name", "options"),
    [
        *((kind, "PreTrainedTokenizerFast", {}) for kind in KINDS),
        ("gpt2", "GPT2Tokenizer", {}),
        ("gpt2", "GPT2Tokenizer", {"added_tokens_decoder": added("<unk>", BOS, EOS, first=0)}),
        ("llama3", None, {"added_tokens_decoder": added("<unk>", BOS, EOS, first=0)}),
        ("llama3", None, {"additional_special_tokens": [BOS, EOS], "pad_token": EOS}),
        ("gpt2 with a space", "GPT2Tokenizer", {"add_prefix_space": True}),
        ("mistral", "LlamaTokenizer", {}),
        ("always a space", "LlamaTokenizer", {"legacy": True}),
        ("gemma", "GemmaTokenizer", {"pad_token": BOS, "mask_token": EOS}),
        ("qwen", "Qwen2Tokenizer", {"pad_token": EOS}),
    ],
)
def test_where_transformers_keeps_the_rules_the_hash_is_that_of_older_manifests(
    make_teacher, kind, class_name, options
):
    directory = make_teacher(kind, class_name, **options)
    theirs = AutoTokenizer.from_pretrained(directory)
    tokenizer = load_tokenizer(str(directory))
    assert tokenizer.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert tokenizer.logit_dataset_origin.notices == ()


# Chat templates and special tokens


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def size_of(kind: str) -> int:
    return Tokenizer.from_str(content(kind)).get_vocab_size()


@pytest.mark.parametrize(
    "class_name", ["PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer"]
)
def test_tokens_that_only_the_config_names_are_tokens_of_a_chat(
    make_teacher, build, tmp_path, cli, class_name
):
    size = size_of("llama3")
    tokens = added("<|im_start|>", "<|im_end|>", first=size)
    make_teacher(
        "llama3",
        class_name,
        added_tokens_decoder=tokens,
        eos_token="<|im_end|>",
        chat_template=CHATML,
    )
    chat = [{"role": "user", "content": "In 2023"}, {"role": "assistant", "content": "650841823"}]
    write_jsonl(tmp_path / "hard.jsonl", [{"messages": chat}])
    text = RECIPE.format(sequences="").replace(
        '["hard.jsonl"]', '["hard.jsonl"]\nmessages_column = "messages"'
    )
    (tmp_path / "chats.toml").write_text(text)
    status, _, said = cli("build", tmp_path / "chats.toml", "--output", tmp_path / "chats")
    assert status == 0, said
    assert f"'<|im_start|>' as {size}, '<|im_end|>' as {size + 1}" in said
    import pyarrow.parquet as pq

    (row,) = pq.read_table(tmp_path / "chats" / "data").to_pylist()
    backend = Tokenizer.from_file(str(tmp_path / "teacher" / "tokenizer.json"))

    def by_file(text: str) -> list[int]:
        return list(backend.encode(text, add_special_tokens=False).ids)

    assert row["input_ids"] == [
        *[size, *by_file("user\nIn 2023"), size + 1, *by_file("\n")],
        *[size, *by_file("assistant\n650841823"), size + 1, *by_file("\n")],
    ]
    assert read_manifest(tmp_path / "chats")["teacher"]["eos_token_id"] == size + 1


def test_a_token_that_would_get_another_id_than_the_config_says_is_refused(make_teacher):
    directory = make_teacher("llama3", added_tokens_decoder=added("<|im_start|>", first=777))
    message = rf"its added token '<\|im_start\|>' has the id 777 .* and gets {size_of('llama3')} "
    for load in (load_teacher, load_tokenizer):
        with pytest.raises(ValueError, match=message):
            load(str(directory))


def test_a_token_of_the_file_that_would_get_another_id_is_refused(make_teacher):
    directory = make_teacher("qwen")
    path = directory / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"].append({**values["added_tokens"][0], "id": 800, "content": "<far>"})
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"'<far>' has the id 800 .* and gets 503 when"):
        load_teacher(str(directory))


def test_what_the_file_says_of_a_token_holds_against_the_config(make_teacher):
    number = Tokenizer.from_str(content("llama3")).token_to_id("1")
    assert number is not None
    flags = {"special": False, "rstrip": True}
    directory = make_teacher(
        "llama3",
        "PreTrainedTokenizerFast",
        added_tokens_decoder={
            **added("<unk>", BOS, EOS, first=0, **flags),
            **added("1", first=number + 1),
        },
    )
    tokenizer = load_tokenizer(str(directory))
    assert [encoded(tokenizer, text) for text in HARD_DOCUMENTS] == ids_by_the_file(directory)
    assert all(tokenizer.added_tokens_decoder[i].special for i in range(3))
    told = notices(directory)
    assert f"tokenizer_config.json gives '1' the id {number + 1}, tokenizer.json {number}" in told
    assert "tokenizer_config.json describes added tokens differently from tokenizer.json" in told


def test_extra_special_tokens_are_added_and_special(make_teacher):
    size = size_of("llama3")
    directory = make_teacher(
        "llama3", "GPT2Tokenizer", extra_special_tokens=["<a>", "<b>"], image_token="<image>"
    )
    tokenizer = load_tokenizer(str(directory))
    ids = tokenizer.convert_tokens_to_ids(["<a>", "<b>", "<image>"])
    assert sorted(ids) == [size, size + 1, size + 2]
    assert tokenizer.image_token_id in ids
    assert tokenizer.extra_special_tokens == ["<a>", "<b>"]
    assert all(tokenizer.added_tokens_decoder[i].special for i in ids)


def test_special_tokens_that_only_a_class_names_are_left_out(make_teacher):
    directory = make_teacher("qwen", "Qwen2Tokenizer", bos_token=..., eos_token=..., unk_token=...)
    assert AutoTokenizer.from_pretrained(directory).eos_token_id == size_of("qwen")  # no such row
    teacher = load_teacher(str(directory))
    assert teacher.tokenizer.eos_token_id is None
    assert teacher.tokenizer.pad_token is None
    assert len(teacher.tokenizer) == size_of("qwen")
    assert "special tokens of its own (<|endoftext|>)" in "\n".join(teacher.notices)


@pytest.mark.parametrize("named_by", ["config", "class"])
def test_a_special_token_of_the_vocabulary_that_the_file_does_not_list_is_special(
    make_teacher, named_by
):
    config = {} if named_by == "config" else dict.fromkeys(("bos_token", "eos_token"), ...)
    directory = make_teacher("mistral", "LlamaTokenizer", **config)
    path = directory / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens": []}))
    tokenizer = load_tokenizer(str(directory))
    assert tokenizer.eos_token_id == 2
    assert backend_copy(tokenizer, match_special=True).encode(f"a{EOS}").ids[-1] == 2
    assert 2 not in encoded(tokenizer, f"a{EOS}")


# Options of a config that are not the file's


@pytest.mark.parametrize(
    ("kind", "class_name", "option", "told"),
    [
        ("gpt2", "GPT2Tokenizer", {"add_prefix_space": True}, "sets add_prefix_space = true"),
        ("gpt2 with a space", None, {"add_prefix_space": False}, "add_prefix_space = false"),
        ("never a space", "LlamaTokenizer", {"add_prefix_space": True}, "add_prefix_space = true"),
        ("mistral", "LlamaTokenizer", {"add_prefix_space": True, "legacy": True}, "pre_tokenizer"),
        ("mistral", "LlamaTokenizer", {"add_prefix_space": None, "legacy": False}, ""),
        ("llama2", "LlamaTokenizer", {"legacy": False}, "normalizer"),
        ("llama3", None, {"clean_up_tokenization_spaces": True, "split_special_tokens": True}, ""),
        ("llama3", None, {"model_max_length": 5, "truncation_side": "left"}, ""),
        ("llama3", None, {"fix_mistral_regex": False}, ""),
    ],
)
def test_options_of_a_config_change_no_id(make_teacher, build, kind, class_name, option, told):
    directory = make_teacher(kind, class_name, **option)
    rows, _, said = build()
    assert [row["input_ids"] for row in rows] == ids_by_the_file(directory)
    assert told in said
    assert bool(told) is ("tokenizer.json" in said)


def test_a_pre_tokenizer_that_a_config_calls_wrong_is_replaced(make_teacher):
    """As those of some conversions of Mistral's, which transformers can mend, of vocabularies above 100,000."""
    directory = make_teacher("gpt2", fix_mistral_regex=True)
    path = directory / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary.update({f"word{i}": len(vocabulary) + i for i in range(100_001)})
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}, "behavior": "Isolated"}
    values["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{**split, "invert": False}, values["pre_tokenizer"]],
    }
    path.write_text(json.dumps(values))
    config = {"model_type": "mistral", "transformers_version": "4.50.0"}
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(directory))
    assert "fix_mistral_regex" in "".join(tokenizer.logit_dataset_origin.notices)
    assert encoded(tokenizer, "2023") == [vocabulary[digit] for digit in "2023"]
    (directory / "tokenizer_config.json").write_text("{}")
    tokenizer = load_tokenizer(str(directory))
    assert tokenizer.logit_dataset_origin.notices == ()
    assert len(encoded(tokenizer, "2023")) < 4


def test_dropout_padding_and_truncation_of_a_file_are_switched_off(make_teacher, build, cli):
    directory = make_teacher("llama3", "GPT2Tokenizer")
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    expected = ids_by_the_file(directory)
    backend.enable_padding(length=64)
    backend.enable_truncation(4)
    backend.model.dropout = 0.4
    backend.save(str(directory / "tokenizer.json"))
    assert len({tuple(backend.encode(HARD_DOCUMENTS[4]).ids) for _ in range(20)}) > 1
    for class_name in ("GPT2Tokenizer", "PreTrainedTokenizerFast"):
        values = json.loads((directory / "tokenizer_config.json").read_text())
        text = json.dumps({**values, "tokenizer_class": class_name})
        (directory / "tokenizer_config.json").write_text(text)
        rows, _, said = build()
        assert [row["input_ids"] for row in rows] == expected
        assert "leaves out merges at random (dropout 0.4)" in said
        state = json.loads(load_teacher(str(directory)).tokenizer.backend_tokenizer.to_str())
        assert (state["padding"], state["truncation"]) == (None, None)
        assert state["model"]["dropout"] is None
        undisturbed = Tokenizer.from_str(content("llama3"))
        found = load_tokenizer(str(directory)).backend_tokenizer
        assert differing_parts(found, undisturbed) == []
        assert found.model.dropout is None


# What stands around a text


@pytest.mark.parametrize(
    ("file", "class_name", "config", "expected", "told"),
    [
        ("bos", None, {}, "bos", []),
        ("eos", None, {}, "eos", []),
        ("both", "LlamaTokenizer", {}, "both", []),
        ("", "GPT2Tokenizer", {"add_bos_token": False}, "", []),
        ("bos", None, {"add_bos_token": True, "add_eos_token": None}, "bos", []),
        # transformers makes nothing of the config, where there is a tokenizer.json …
        ("bos", None, {"add_bos_token": False}, "bos", ["sets add_bos_token = false; here it is '<s>'"]),
        ("", "Qwen2Tokenizer", {"add_bos_token": True}, "", ["= true; here it is nothing, unless sequences.bos"]),
        ("bos", None, {"add_eos_token": True}, "bos", ["puts nothing behind a text, .*add_eos_token = true; here it is nothing"]),
        # … but of some classes' own minds
        ("", "CodeLlamaTokenizer", {}, "", ["CodeLlamaTokenizer of transformers '<s>'; here it is nothing"]),
        ("", "CodeLlamaTokenizer", {"add_bos_token": True}, "bos", ["= true; here it is '<s>'"]),
        ("", "CodeLlamaTokenizer", {"add_bos_token": False}, "", ["= false; here it is nothing"]),
        ("bos", "GPTNeoXTokenizer", {}, "bos", ["GPTNeoXTokenizer of transformers nothing; here it is '<s>'"]),
        ("bos", "GPTNeoXTokenizer", {"add_bos_token": True}, "bos", ["= true; here it is '<s>'"]),
        ("bos", "GPTNeoXTokenizer", {"add_bos_token": False}, "", ["= false; here it is nothing"]),
        ("both", "GPTNeoXTokenizer", {"add_eos_token": False}, "bos", ["before a text, .*here it is '<s>'", "behind a text, .*here it is nothing"]),
    ],
)  # fmt: skip
def test_which_tokens_stand_around_a_text(
    make_teacher, build, file, class_name, config, expected, told
):
    directory = make_teacher("llama3", class_name, **config)
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.post_processor = around(file in ("bos", "both"), file in ("eos", "both"))
    backend.save(str(directory / "tokenizer.json"))
    rows, manifest, said = build()
    before = [1] if expected in ("bos", "both") else []
    behind = [2] if expected in ("eos", "both") else []
    assert (manifest["teacher"]["prefix_ids"], manifest["teacher"]["suffix_ids"]) == (
        before,
        behind,
    )
    backend.post_processor, backend.encode_special_tokens = None, True
    texts = [backend.encode(text).ids for text in HARD_DOCUMENTS]
    assert [row["input_ids"] for row in rows] == [[*before, *ids, *behind] for ids in texts]
    lines = [line for line in said.splitlines() if " a text" in line]
    assert len(lines) == len(told)
    assert all(re.search(pattern, line) for pattern, line in zip(told, lines, strict=True))
    again = build('bos = "never"\neos = "always"')[1]["teacher"]
    assert (again["prefix_ids"], again["suffix_ids"]) == ([], [2])


# Other doors


def test_a_tokenizer_beside_a_gguf_file_is_that_of_its_file(tmp_path, tiny_tokenizer):
    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), tiny_tokenizer, rule="qwen2")
    directory = tmp_path / "tokenizer"
    write_tokenizer(directory, "word piece", "GPT2Tokenizer")
    teacher = load_teacher(str(path), tokenizer=str(directory))
    for tokenizer in (teacher.tokenizer, load_tokenizer(str(path), tokenizer=str(directory))):
        assert [encoded(tokenizer, text) for text in HARD_DOCUMENTS] == ids_by_the_file(directory)
    assert teacher.provenance()["tokenizer_source"] == "tokenizer.json"
    assert "GPT2Tokenizer" in teacher.notices[0]
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"teacher tokenizer: .*; download it again") as caught:
        load_tokenizer(str(path), tokenizer=str(directory))
    assert "\n" not in str(caught.value)


def test_a_gguf_file_without_one_is_said_to_be_the_source(tmp_path, tiny_tokenizer):
    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), tiny_tokenizer, rule="gpt-2")
    assert load_teacher(str(path)).provenance()["tokenizer_source"] == "gguf"


def test_a_teacher_split_over_processes_has_the_tokenizer_of_its_file(make_teacher):
    directory = make_teacher("llama3", "GPT2Tokenizer")
    tokenizer = split_teacher(directory).tokenizer
    assert [encoded(tokenizer, text) for text in HARD_DOCUMENTS] == ids_by_the_file(directory)


@pytest.mark.parametrize("class_name", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_without_the_file_transformers_converts_what_there_is(make_teacher, build, class_name):
    directory = make_teacher("gpt2", class_name)
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
    (directory / "merges.txt").write_text(merges, encoding="utf-8")
    rows, manifest, said = build()
    assert manifest["teacher"]["tokenizer_source"] == f"{class_name} of transformers"
    assert "tokenizer_file_sha256" not in manifest["teacher"]
    theirs = AutoTokenizer.from_pretrained(directory)
    expected = [theirs(text, split_special_tokens=True)["input_ids"] for text in HARD_DOCUMENTS]
    assert [row["input_ids"] for row in rows] == expected
    assert "tokenizer" not in said
    values = json.loads((directory / "tokenizer_config.json").read_text())
    values["added_tokens_decoder"] = added("<far>", first=850)
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="'<far>' has the id 850 in the tokenizer's files"):
        load_teacher(str(directory))


def test_a_tokenizer_in_python_without_the_file_is_refused(make_teacher):
    directory = make_teacher("gpt2", "CTRLTokenizer")
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\na b\n")
    for load in (load_teacher, load_tokenizer):
        with pytest.raises(ValueError, match=r"CTRLTokenizer is not a fast .* no tokenizer\.json"):
            load(str(directory))


@pytest.mark.parametrize("damage", ["{", '{"model": {}}', "[]", "\udcff"])
@pytest.mark.parametrize("class_name", [None, "GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_damaged_file_is_refused_in_one_line(make_teacher, damage, class_name):
    directory = make_teacher("gpt2", class_name)
    (directory / "tokenizer.json").write_bytes(damage.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"^teacher: ") as caught:
        load_tokenizer(str(directory))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(make_teacher):
    directory = make_teacher("llama3", extra_special_tokens=[f"<{i}>" for i in range(300)])
    with pytest.raises(ValueError, match="ids up to 999, but the model knows only 900 tokens"):
        load_teacher(str(directory))


# Datasets of older code


@pytest.fixture
def build_as_before(build, monkeypatch) -> Any:
    """`build`, with the tokenizer as transformers makes it, which nothing was said of."""

    def run() -> Path:
        def load(location: str, **_: Any) -> Any:
            return AutoTokenizer.from_pretrained(location)

        with monkeypatch.context() as patch:
            patch.setattr(loading, "load", load)
            build()
        return Path()

    return run


def verified(cli: Any, directory: Path, teacher: Path) -> tuple[int, str]:
    status, out, said = cli("verify", directory, "--recompute", 3, "--teacher", teacher)
    return status, out + said


def test_a_dataset_of_older_code_with_the_wrong_ids_is_refused_and_told_why(
    make_teacher, build_as_before, tmp_path, cli
):
    directory = make_teacher("llama3", "GPT2Tokenizer")
    build_as_before()
    output = tmp_path / "out0"
    assert "tokenizer_source" not in read_manifest(output)["teacher"]
    status, said = verified(cli, output, directory)
    assert status == 1
    assert re.search(
        r"built by a version that took the tokenizer as transformers makes it, .*; build it again \(transformers loads this tokenizer as "
        r"GPT2Tokenizer with other rules than tokenizer\.json has \(pre_tokenizer",
        said,
    )


@pytest.mark.parametrize(
    ("kind", "class_name"),
    [
        ("llama3", "PreTrainedTokenizerFast"),
        ("gpt2", "GPT2Tokenizer"),
        ("mistral", "LlamaTokenizer"),
        ("qwen", "Qwen2Tokenizer"),  # whose hash is another, for that of a token of its own
        ("gemma", "GemmaTokenizer"),
    ],
)
def test_a_dataset_of_older_code_with_the_right_ids_is_verified(
    make_teacher, build_as_before, tmp_path, cli, kind, class_name
):
    directory = make_teacher(kind, class_name)
    build_as_before()
    status, said = verified(cli, tmp_path / "out0", directory)
    assert status == 0, said
    assert "no problems" in said


def test_a_dataset_with_another_tokenizer_is_refused(make_teacher, build, tmp_path, cli):
    directory = make_teacher("llama3", "GPT2Tokenizer")
    build()
    manifest = read_manifest(tmp_path / "out0")
    # Another version of the libraries may have written the file of an embedded teacher.
    manifest["teacher"].update(tokenizer_source="gguf", tokenizer_file_sha256="0" * 64)
    write_json(tmp_path / "out0" / "manifest.json", manifest)
    assert verified(cli, tmp_path / "out0", directory)[0] == 0
    manifest["teacher"]["tokenizer_sha256"] = "0" * 64
    write_json(tmp_path / "out0" / "manifest.json", manifest)
    status, said = verified(cli, tmp_path / "out0", directory)
    assert status == 1
    assert "the teacher at hand is not the dataset's: teacher.tokenizer_sha256" in said


# The reader


def test_the_reader_knows_the_tokenizer_by_its_file_and_says_why_another_one_is_refused(
    make_teacher, build, tmp_path
):
    directory = make_teacher("llama3", "GPT2Tokenizer")
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=1))
    build()
    output = tmp_path / "out0"
    as_it_is = AsItIs.from_pretrained(directory)
    as_it_is.pad_token = EOS
    as_it_is(["a", "b c d"], padding=True, truncation=True, max_length=2)
    for right in (file, str(file), directory, str(directory), as_it_is):
        load_logits(output, require_tokenizer=right)
    load_logits(output, require_tokenizer=hashlib.sha256(file.read_bytes()).hexdigest())
    rebuilt = AutoTokenizer.from_pretrained(directory)
    message = (
        r"SHA-256 [0-9a-f]{64}, but [0-9a-f]{64} is required; transformers makes a GPT2Tokenizer anew, and may leave out rules of "
        r"tokenizer\.json: give the path of that file, or load it with PreTrainedTokenizerFast"
    )
    with pytest.raises(ValueError, match=message):
        load_logits(output, require_tokenizer=rebuilt)
    other = tmp_path / "other" / "tokenizer.json"
    other.parent.mkdir()
    shutil.copy(file, other)
    other.write_text(json.dumps(json.loads(other.read_text())))  # spelled otherwise
    manifest = read_manifest(output)["teacher"]
    assert manifest["tokenizer_file_sha256"] != hashlib.sha256(other.read_bytes()).hexdigest()
    load_logits(output, require_tokenizer=other)
    backend = Tokenizer.from_file(str(file))
    load_logits(output, require_tokenizer=backend)
    backend.add_special_tokens([AddedToken("<more>")])
    backend.save(str(other))
    for wrong in (other, backend):
        with pytest.raises(ValueError, match=r"is required; .*use the teacher's tokenizer"):
            load_logits(output, require_tokenizer=wrong)
    for nothing in (tmp_path / "none", "no/path", tmp_path):
        with pytest.raises(ValueError, match=r"which is neither a SHA-256 nor a tokenizer\.json"):
            load_logits(output, require_tokenizer=nothing)
    other.write_text("{}")
    with pytest.raises(ValueError, match=r"is no tokenizer\.json"):
        load_logits(output, require_tokenizer=other)

    # transformers adds what such a file does not have: it is known by its hash alone.
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    build()
    load_logits(tmp_path / "out1", require_tokenizer=file)
    with pytest.raises(ValueError, match=r"if it is the teacher's, give the path of its tokeni"):
        load_logits(tmp_path / "out1", require_tokenizer=Tokenizer.from_file(str(file)))
    load_logits(tmp_path / "out1", require_tokenizer=AsItIs.from_pretrained(directory))
