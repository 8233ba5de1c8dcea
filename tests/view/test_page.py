"""What a page holds: the very values of the dataset, nothing to fetch, nothing that runs but its script."""

import base64
import hashlib
import html
import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from builder.dataset.manifest import read_manifest, records_of
from builder.dataset.spelling import pieces, signs
from builder.teacher.loading import load_tokenizer
from builder.view.charts import draw
from builder.view.rows import load_rows
from builder.view.turns import turns
from builder.view.view import Viewed, choose, page
from tests.chats import GEMMA, LLAMA_3, MISTRAL, chatty, sample_chats
from tests.conftest import REPOSITORY, recipe_text, run_cli, sample_documents
from tests.hub.test_publish import build_dataset
from tests.view.conftest import HOSTILE, build_of


def viewed(directory: Path) -> Viewed:
    return Viewed(directory=directory, locate=lambda name: directory / name, is_here=True)


def stored(dataset: Path) -> list[dict[str, Any]]:
    files = [dataset / record.file for record in records_of(read_manifest(dataset))]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def rows_of(dataset: Path, numbers: list[int] | None = None) -> list[Any]:
    manifest = read_manifest(dataset)
    numbers = choose(manifest, 10_000, 0) if numbers is None else numbers
    return list(load_rows(manifest, lambda name: dataset / name, numbers))


def data_of(content: bytes) -> dict[str, Any]:
    """The JSON of a page, its arrays decoded."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', content.decode(), re.DOTALL)  # fmt: skip
    assert found
    data: dict[str, Any] = json.loads(found[1])
    data["arrays"] = {
        name: np.frombuffer(base64.b64decode(text), f"<{kind}")
        for name, (kind, text) in data["arrays"].items()
    }
    return data


def test_the_numbers_are_the_files_to_the_bit(built, tiny_teacher_dir):
    tokenizer = load_tokenizer(str(tiny_teacher_dir))
    content = page(viewed(built), rows=7, start=3, teacher_path=tiny_teacher_dir).html
    data, rows = data_of(content), stored(built)[3:10]
    arrays = data["arrays"]

    def flat(name: str) -> np.ndarray:
        return np.array([v for row in rows for v in np.ravel(row[name])], np.float16)

    np.testing.assert_array_equal(arrays["logprobs"].view("u2"), flat("topk_logprobs").view("u2"))
    for name, column in (
        *(("tail", "tail_logprob"), ("entropy", "entropy")),
        *(("targetLogprob", "target_logprob"),),
    ):
        np.testing.assert_array_equal(arrays[name].view("u2"), flat(column).view("u2"))
    ids = [i for row in rows for i in np.ravel(row["topk_indices"])]
    spelled = ["".join(parts) for parts in data["strings"]]
    for number, token in zip(arrays["ids"], ids, strict=True):
        text = tokenizer.decode([token])
        if "\ufffd" not in text and text.isprintable() and " " not in text and token < 400:
            assert spelled[number] == text
    assert [row["number"] for row in data["rows"]] == list(range(3, 10))


def test_the_same_page_again_is_the_same_bytes(built, tiny_teacher_dir):
    one, again = (page(viewed(built), rows=5, teacher_path=tiny_teacher_dir) for _ in range(2))
    assert one.html == again.html


def test_it_fetches_nothing_and_lets_nothing_else_run(hostile, tiny_teacher_dir):
    text = page(viewed(hostile), rows=9, teacher_path=tiny_teacher_dir).html.decode()
    assert set(re.findall(r'\b(?:src|href|action|srcset|data)="([^"#]*)', text)) == {"", "data:,"}
    assert not re.search(r"@import|url\(|https?://", text.split('id="data"')[0])
    assert str(Path.home()) not in text
    assert str(hostile) not in text
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    hashes = [
        base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        for part in (script, style)
    ]
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def test_hostile_text_is_no_markup(hostile, tiny_teacher_dir):
    text = page(viewed(hostile), rows=9, teacher_path=tiny_teacher_dir).html.decode()
    assert len(re.findall(r"<script", text)) == 2
    assert len(re.findall(r"<(?:img|style|h1)\b", text)) == 2  # <style> and <h1> of its own
    assert not re.search("[\x00-\x08\x0b-\x1f\u200b\u2028-\u202e\u2066-\u2069\ufeff]", text)
    spoken = re.sub(r"<u>.*?</u>", "", text)
    shown = [
        html.unescape("".join(re.findall(r"<i(?: class=\"[snc ]*\")?>(.*?)</i>", part, re.DOTALL)))
        for part in spoken.split('class="text"')[1:]
    ]
    hidden = re.compile("[\u202e\u2066\u2029\x00\x1b\u200b\ufeff\r]")
    assert shown == [hidden.sub("", row["text"]) for row in stored(hostile)]
    assert "".join(row["text"] for row in stored(hostile)) == "".join(HOSTILE)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_rows_are_spread_or_follow_each_other(built, rows):
    manifest = read_manifest(built)
    total = manifest["totals"]["rows"]
    spread = choose(manifest, rows, None)
    assert len(spread) == len(set(spread)) == min(rows, total)
    assert spread == sorted(spread)
    assert (spread[0], spread[-1] < total) == (0, True)
    if 1 < rows < total:
        assert max(np.diff(spread)) - min(np.diff(spread)) <= 1
    assert choose(manifest, rows, total - 3) == list(range(total - 3, total))[:rows]
    first = manifest["shards"][0]["rows"]
    assert choose(manifest, 1000, None, first_file_only=True) == list(range(first))


def test_texts_of_tokens_are_the_text(built, tiny_teacher_dir):
    tokenizer = load_tokenizer(str(tiny_teacher_dir))
    for row in stored(built):
        found = pieces(tokenizer, row["input_ids"])
        assert "".join(found) == row["text"]
        assert len(found) == len(row["input_ids"])
    # A character of several tokens stands at its first; what is cut off is spelled by its bytes.
    ids = tokenizer.encode("a龍b")
    assert pieces(tokenizer, ids) == ["a", "龍", "", "", "b"]
    assert pieces(tokenizer, ids[:3]) == ["a", "<0xE9>", "<0xBE>"]
    assert pieces(tokenizer, ids[2:]) == ["<0xBE>", "<0x8D>", "b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", ["plain"]),
        ("a\u202eb", ["a", "\\u202e", "b"]),
        ("a\nb", ["a", "↵", "\nb"]),
        ("\x00", ["", "\\x00", ""]),
        ("👩\u200d👧", ["👩\u200d👧"]),
    ],
)
def test_signs_stand_for_what_cannot_be_seen(text, expected):
    assert signs(text) == expected


def test_signs_in_a_line_count_spaces():
    assert signs(" a\u00a0\n", in_line=True) == ["", "␣", "a", "\\u00a0", "", "↵", ""]


@pytest.mark.parametrize("template", [None, LLAMA_3, GEMMA])
def test_who_speaks_is_read_from_the_text(tiny_tokenizer, template):
    tokenizer = chatty(tiny_tokenizer)
    special = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for chat in sample_chats(8):
        messages = [
            message | {"content": message["content"].replace("<|im_end|>", "").strip() or "fox"}
            for message in chat["messages"]
        ]
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        texts = pieces(tokenizer, ids)
        found = turns(texts, [i in special for i in ids], [False] * len(ids))
        assert found[0].start == 0
        assert all(a.stop == b.start for a, b in pairwise(found))
        assert found[-1].stop == len(ids)
        spoken = [turn for turn in found if turn.speaker]
        roles = [message["role"] for message in messages]
        if template is GEMMA:
            roles = ["model" if role == "assistant" else role for role in roles]
        assert [turn.speaker for turn in spoken] == roles
        for turn, message in zip(spoken, messages, strict=True):
            assert message["content"].strip() in "".join(texts[turn.start : turn.stop])


def test_without_roles_the_mask_tells_who_speaks(tiny_tokenizer):
    tokenizer = chatty(tiny_tokenizer)
    messages = [{"role": "user", "content": "quick?"}, {"role": "assistant", "content": "fox."}]
    text = tokenizer.apply_chat_template(messages, chat_template=MISTRAL, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = pieces(tokenizer, ids)
    start = len(tokenizer.encode(text.split(" fox")[0], add_special_tokens=False))
    found = turns(texts, [False] * len(ids), [i >= start for i in range(len(ids))])
    assert [(t.speaker, t.start, t.stop) for t in found] == [("prompt", 0, start), ("completion", start, len(ids))]  # fmt: skip


def test_the_pictures_say_what_the_files_say(built):
    rows = stored(built)
    entropy = np.concatenate([np.array(row["entropy"], np.float64) for row in rows])
    logprobs = np.concatenate([np.array(row["topk_logprobs"], np.float64) for row in rows])
    first = np.exp(logprobs[:, 0])
    ranks = []
    for row in rows:
        for t, target in enumerate(row["input_ids"][1:]):
            listed = row["topk_indices"][t]
            ranks.append(listed.index(target) + 1 if target in listed else 0)
    charts = draw(rows_of(built))
    assert [chart.title for chart in charts] == ["How sure the teacher is", "What the first tokens hold", "Where the text’s token stands", "Calibration on this text"]  # fmt: skip
    assert charts[0].says.startswith(f"{entropy.mean():.2f} nats of entropy on average")
    assert f"{(entropy < 0.5).mean():.0%} of positions" in charts[0].says
    assert f"first choice holds {first.mean():.0%}" in charts[1].says
    assert f"the first 20 {np.exp(logprobs).sum(1).mean():.1%}" in charts[1].says
    outside = re.search(r"outside the top 20 in ([\d.]+)%", charts[2].says)
    # Positions at the ends of rows have targets, too, which the list above leaves out.
    assert float(outside[1]) / 100 == pytest.approx(np.mean(np.array(ranks) == 0), abs=0.03)
    for chart in charts:
        assert chart.svg.startswith("<svg ")
        assert "nan" not in chart.svg


def reference_divergence(one: dict[str, Any], other: dict[str, Any]) -> np.ndarray:
    """KL(one ‖ other) [T] in float64, of whole distributions."""
    p, q = (np.array(row["logprobs"], np.float64) for row in (one, other))
    return (np.exp(p) * (p - q)).sum(-1)


def divergence_of(pair: dict[str, Path], kind: str, teacher: Path) -> np.ndarray:
    content = page(
        viewed(pair[f"one {kind}"]),
        rows=99,
        start=0,
        against=viewed(pair[f"other {kind}"]),
        teacher_path=teacher,
    ).html
    return data_of(content)["arrays"]["divergence"]


def test_kl_of_whole_distributions_is_exact(pair, tiny_teacher_dir):
    rows = zip(stored(pair["one all"]), stored(pair["other all"]), strict=True)
    expected = np.concatenate([reference_divergence(*both) for both in rows])
    assert expected.mean() > 0.05
    found = divergence_of(pair, "all", tiny_teacher_dir)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-3)


def test_kl_of_top_k_is_a_close_lower_bound(pair, tiny_teacher_dir):
    rows = zip(stored(pair["one all"]), stored(pair["other all"]), strict=True)
    expected = np.concatenate([reference_divergence(*both) for both in rows])
    found = divergence_of(pair, "top", tiny_teacher_dir)
    assert (found <= expected + 2e-3).all()
    assert found.mean() > 0.01
    # By its definition: the tokens that both datasets tell something of, and all others together.
    rows = zip(stored(pair["one top"]), stored(pair["other top"]), strict=True)
    by_hand = [
        by_definition(*both, t) for both in rows for t in range(len(both[0]["input_ids"]) - 1)
    ]
    inner = np.concatenate([np.arange(len(row["input_ids"])) < len(row["input_ids"]) - 1 for row in stored(pair["one top"])])  # fmt: skip
    np.testing.assert_allclose(found[inner], by_hand, atol=3e-3)


def by_definition(one: dict[str, Any], other: dict[str, Any], t: int) -> float:
    known = []
    for row in (one, other):
        listed = dict(zip(row["topk_indices"][t], row["topk_logprobs"][t], strict=True))
        known.append({row["input_ids"][t + 1]: row["target_logprob"][t], **listed})
    p, q = ({i: math.exp(side[i]) for i in known[0].keys() & known[1].keys()} for side in known)
    rests = [1 - sum(side.values()) for side in (p, q)]
    total = sum(p[i] * math.log(p[i] / q[i]) for i in p)
    return total + rests[0] * math.log(rests[0] / rests[1])


def test_a_dataset_differs_from_itself_by_nothing(pair, tiny_teacher_dir):
    one = viewed(pair["one top"])
    arrays = data_of(page(one, rows=99, against=one, teacher_path=tiny_teacher_dir).html)["arrays"]
    assert arrays["divergence"].max() == 0
    np.testing.assert_array_equal(arrays["otherLogprobs"], arrays["logprobs"])


def test_whole_distributions_are_shown_by_rank(pair, tiny_teacher_dir):
    """Of the same teacher, the first ranks, the rest and the ranks of targets are those of its top 20."""
    of_all, of_top = (
        data_of(page(viewed(pair[name]), rows=99, start=0, teacher_path=tiny_teacher_dir).html)
        for name in ("one all", "one top")
    )
    np.testing.assert_array_equal(of_all["arrays"]["logprobs"], of_top["arrays"]["logprobs"])
    ranks, known = (data["arrays"]["rank"].astype(int) for data in (of_all, of_top))
    listed = known > 0
    logprobs = of_top["arrays"]["logprobs"].reshape(len(known), 20)[listed]
    assert (ranks[listed] == known[listed]).mean() > 0.9
    places = np.stack([ranks[listed].clip(max=20), known[listed]], 1) - 1
    assert not np.diff(np.take_along_axis(logprobs, places, 1)).any()  # others tie in float16
    assert (ranks[known == 0][:-1] > 20).mean() > 0.9  # but where nothing is known to follow
    tail = np.exp(of_top["arrays"]["tail"].astype(np.float64))
    np.testing.assert_allclose(of_all["arrays"]["rest"], tail, atol=3e-3)


def test_draws_are_shown_and_are_from_the_tail(pair, tiny_teacher_dir):
    data = data_of(page(viewed(pair["one top"]), rows=99, start=0, teacher_path=tiny_teacher_dir).html)  # fmt: skip
    draws = data["arrays"]["draws"].reshape(-1, 3)
    ids = data["arrays"]["ids"].reshape(len(draws), -1)
    assert (draws < len(data["strings"])).all()
    assert not (draws[:, :, None] == ids[:, None, :]).any()


@pytest.fixture(scope="module")
def others(tiny_teacher_dir, tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("others")
    shorter = recipe_text(tiny_teacher_dir, "corpus.jsonl", sequences="max_length = 40")
    usual = recipe_text(tiny_teacher_dir, "corpus.jsonl")
    return {
        "shorter": build_of(base / "shorter", shorter, sample_documents(9)),
        "fewer": build_of(base / "fewer", usual, sample_documents(4)),
    }


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (
            "shorter",
            r"chunk 0 of document 'doc-\d' has other tokens in the dataset to compare with",
        ),
        ("fewer", "has no chunk 0 of document 'doc-4'; compare datasets of the same corpus"),
    ],
)
def test_datasets_of_other_rows_are_refused(pair, others, tiny_teacher_dir, which, message):
    with pytest.raises(ValueError, match=message):
        page(
            viewed(pair["one top"]),
            rows=99,
            against=viewed(others[which]),
            teacher_path=tiny_teacher_dir,
        )


def test_rows_are_found_wherever_they_stand_and_twice(tiny_teacher_dir, tmp_path):
    """In another order and other files, and with documents of one id."""
    rows = [*sample_documents(7), {"id": "doc-1", "text": "The quick brown fox, once more."}]
    usual = recipe_text(tiny_teacher_dir, "corpus.jsonl")
    one = viewed(build_of(tmp_path / "one", usual, rows))
    turned = recipe_text(tiny_teacher_dir, "corpus.jsonl", output="shard_tokens = 120")
    other = viewed(build_of(tmp_path / "other", turned, rows[6::-1] + rows[7:]))
    numbers = {"start": 0, "rows": 99}
    found = page(one, **numbers, against=one, teacher_path=tiny_teacher_dir)
    assert data_of(found.html)["arrays"]["divergence"].max() == 0
    last = found.rows - 1
    first_seven = page(one, start=0, rows=last, against=other, teacher_path=tiny_teacher_dir)
    arrays = data_of(first_seven.html)["arrays"]
    assert np.nanmax(arrays["divergence"]) < 1e-3  # other batches, so other last bits
    np.testing.assert_allclose(arrays["otherTarget"], arrays["targetLogprob"], atol=5e-3)


def test_names_of_datasets_are_text(hostile, pair, tiny_teacher_dir, tmp_path):
    """Whatever a manifest calls its dataset and its teacher."""
    copies = []
    for name, source in (("<b>one\u202e", pair["one top"]), ("</script><b>other\u202e", pair["other top"])):  # fmt: skip
        copies.append(Path(shutil.copytree(source, tmp_path / str(len(copies)))))
        manifest = json.loads((copies[-1] / "manifest.json").read_text())
        manifest["recipe"] |= {"name": name, "description": name}
        (copies[-1] / "manifest.json").write_text(json.dumps(manifest))
    text = page(viewed(copies[0]), rows=2, against=viewed(copies[1]), teacher_path=tiny_teacher_dir).html.decode()  # fmt: skip
    assert "\u202e" not in text
    assert "<b>o" not in text
    assert len(re.findall("</script>", text)) == 2
    assert text.count("&lt;/script&gt;&lt;b&gt;other\\u202e") >= 2


OLDER = REPOSITORY / "tests" / "fixtures" / "older"


@pytest.mark.parametrize("name", ["text", "chats", "written"])
def test_datasets_of_older_versions_are_shown(name):
    found = page(viewed(OLDER / name), rows=99, start=0, teacher_path=OLDER / "teacher")
    rows = stored(OLDER / name)
    assert (found.rows, found.tokens) == (len(rows), sum(len(row["input_ids"]) for row in rows))


@pytest.mark.parametrize("is_there", [True, False])
def test_the_command_opens_the_page_or_says_how(
    cli, built, tiny_teacher_dir, tmp_path, monkeypatch, is_there
):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or is_there)
    output = tmp_path / "a page.html"
    arguments = ("view", built, "--rows", 2, "--teacher", tiny_teacher_dir, "--output", output)
    status, out, err = cli(*arguments, "--open")
    assert (status, err, opened) == (0, "", [output.as_uri()])
    tokens = sum(row["length"] for row in data_of(output.read_bytes())["rows"])
    size = output.stat().st_size
    what = f"{output}: 2 rows, {tokens:,} tokens, {size / 1e3:.1f} kB"
    following = [] if is_there else [f"next: open {output} in a browser"]
    assert out.splitlines() == [what, *following]
    assert cli(*arguments)[1].splitlines() == [what, f"next: open {output} in a browser"]
    assert len(opened) == 1


def test_one_line_says_what_is_wrong(built, tmp_path, tiny_teacher_dir):
    (tmp_path / "folder.html").mkdir()
    for arguments, message in (
        ((built, "--output", "x.txt"), "--output x.txt is not an HTML file; use a name that ends in .html"),
        ((built, "--output", tmp_path / "no" / "x.html"), f"x.html: there is no directory {tmp_path / 'no'}; create it"),
        ((built, "--output", tmp_path / "folder.html"), "folder.html is not an HTML file; use a name"),
        ((built, "--start", 999, "--teacher", tiny_teacher_dir), "the dataset has rows 0 to"),
        ((tmp_path,), "has no manifest.json: it is not a logit dataset"),
        ((built,), "give it with --teacher PATH"),
        (("org/set@v1", "--revision", "v2"), "org/set@v1 names a revision, and --revision names another"),
    ):  # fmt: skip
        result = run_cli("view", *arguments)
        is_wrong_call = "is not an HTML file; use" in message or "names a revision" in message
        assert result.returncode == (2 if is_wrong_call else 1)
        assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", result.stderr), result.stderr
    assert not Path("view.html").exists()


def test_a_page_that_cannot_be_written_is_refused_before_it_is_made(
    cli, built, tmp_path, monkeypatch
):
    """Root may write everywhere, so that the answer is given in its place."""
    monkeypatch.setattr("os.access", lambda path, _: path != tmp_path)
    status, out, err = cli("view", built, "--output", tmp_path / "x.html")
    assert (status, out) == (1, "")
    assert err == f"error: --output {tmp_path / 'x.html'}: {tmp_path} cannot be written to; name another directory\n"  # fmt: skip


def test_a_dataset_on_the_hub_is_shown_by_one_file_of_one_commit(
    hub, client, tiny_teacher_dir, tmp_path
):
    built = build_dataset(tmp_path / "x", tiny_teacher_dir)
    assert len(read_manifest(built)["shards"]) > 3
    published = client.cli("publish", "org/set", built, "--device", "cpu", "--tag", "v1.0.0", "--recompute", 0)  # fmt: skip
    assert published.returncode == 0, published.stderr
    hub.requests.clear()
    output = tmp_path / "page.html"
    arguments = ("--rows", 3, "--teacher", tiny_teacher_dir, "--output", output)
    result = client.cli("view", "org/set@v1.0.0", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{output}: 3 rows, ")
    fetched = {str(request).split("data/")[1] for request in hub.requests if "data/" in str(request)}  # fmt: skip
    assert (
        len({name.split(".parquet")[0] for name in fetched}) <= 2
    )  # and what follows its last row
    assert [row["number"] for row in data_of(output.read_bytes())["rows"]] == choose(
        read_manifest(built), 3, None, first_file_only=True
    )
