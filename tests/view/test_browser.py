"""The page in a real browser: what a reader sees, points at, presses and finds."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from builder.dataset.info import spell_token
from builder.dataset.manifest import read_manifest, records_of
from builder.dataset.spelling import signs
from builder.teacher.loading import load_tokenizer
from logit_dataset.schema import loss_mask
from tests.conftest import recipe_text
from tests.view.browser import browser as open_browser
from tests.view.browser import missing
from tests.view.conftest import build_of

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

PANEL = """
const cells = [...document.querySelectorAll("#bars tbody tr:not(.whole)")].map((row) => {
  const cell = row.children[1].cloneNode(true);
  const came = cell.querySelector("small");
  if (came) came.remove();
  return [row.children[0].textContent, cell.textContent, row.children[2].querySelector("span").textContent, Boolean(came)];
});
return {
  rows: cells, summary: document.getElementById("summary").textContent, place: document.getElementById("place").textContent,
  hidden: document.getElementById("panel").hidden, hash: location.hash, focus: document.activeElement.textContent,
  table: !document.getElementById("bars").hidden,
};
"""
LEFT, RIGHT, UP, DOWN, HOME, END = "\ue012", "\ue014", "\ue013", "\ue015", "\ue011", "\ue010"
PAGE_DOWN, TAB = "\ue00f", "\ue004"


@pytest.fixture(scope="module")
def browser():
    with open_browser() as found:
        yield found


@pytest.fixture(scope="module")
def make_page(tmp_path_factory):
    """A page of a dataset, as the command writes it."""

    made: dict[tuple[object, ...], Path] = {}

    def make(*arguments: object) -> Path:
        if arguments not in made:
            made[arguments] = tmp_path_factory.mktemp("page") / "page.html"
            subprocess.run(
                [
                    *(sys.executable, "-m", "builder.cli", "view", *map(str, arguments)),
                    *("--output", str(made[arguments])),
                ],
                check=True,
                capture_output=True,
            )
        return made[arguments]

    return make


def stored(dataset: Path) -> list[dict]:
    """All rows as pyarrow reads them."""
    files = [dataset / record.file for record in records_of(read_manifest(dataset))]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def shown(tokenizer, token: int) -> str:
    return "".join(signs(spell_token(tokenizer, token), in_line=True))


def percent(text: str) -> float:
    return float(text.replace("< ", "").replace("%", "")) / 100


def check_panel(panel: dict, row: dict, token: int, tokenizer) -> None:
    """The panel shows the very distribution that stands before a token in the Parquet file."""
    t = token - 1
    width = min(20, len(row["topk_indices"][t]))
    head = panel["rows"][:width]
    assert [cells[0] for cells in head] == [str(k + 1) for k in range(width)]
    assert [cells[1] for cells in head] == [shown(tokenizer, i) for i in row["topk_indices"][t]]
    found = [percent(cells[2]) for cells in head]
    np.testing.assert_allclose(found, np.exp(row["topk_logprobs"][t]), atol=6e-4)
    came = [cells for cells in panel["rows"] if cells[3]]
    assert len(came) == 1
    assert came[0][1] == shown(tokenizer, row["input_ids"][token])
    assert percent(came[0][2]) == pytest.approx(np.exp(row["target_logprob"][t]), abs=6e-4)
    assert f"Entropy {row['entropy'][t]:.2f} nats" in panel["summary"]


def test_links_show_the_very_values_of_the_file_and_the_console_stays_silent(
    browser, make_page, built, tiny_teacher_dir
):
    page, rows = make_page(built, "--rows", 8, "--start", 2, "--teacher", tiny_teacher_dir), stored(built)  # fmt: skip
    tokenizer = load_tokenizer(str(tiny_teacher_dir))
    for number, token in ((2, 1), (5, 17), (9, len(rows[9]["input_ids"]) - 1)):
        browser.open(page, f"#row={number}&token={token}")
        panel = browser.run(PANEL)
        assert panel["place"] == f"row {number}, token {token}"
        check_panel(panel, rows[number], token, tokenizer)
        assert browser.log() == []


def test_the_first_token_and_what_follows_a_row(browser, make_page, built, tiny_teacher_dir):
    page, rows = make_page(built, "--rows", 8, "--start", 2, "--teacher", tiny_teacher_dir), stored(built)  # fmt: skip
    browser.open(page, "#row=3&token=0")
    assert browser.run(PANEL)["summary"].startswith("The first token of a row")
    assert not browser.run(PANEL)["table"]
    last = len(rows[3]["input_ids"])
    browser.open(page, f"#row=3&token={last}")
    assert "follows this row: " in browser.run(PANEL)["summary"]
    for fragment in ("#row=3&token=9999", "#row=77&token=1", "#row=x", "#"):
        browser.open(page, fragment)
        assert browser.log() == []


def test_colours_are_what_the_file_says(browser, make_page, built, tiny_teacher_dir):
    page, rows = make_page(built, "--rows", 8, "--start", 2, "--teacher", tiny_teacher_dir), stored(built)  # fmt: skip
    browser.open(page)
    levels = """
    const [measure, row] = arguments, choice = document.getElementById("measure");
    choice.value = measure;
    choice.dispatchEvent(new Event("change"));
    return [...document.querySelectorAll(`[data-row="${row}"] i`)].map((token) => token.dataset.v ?? "none");
    """
    data = json.loads(browser.run('return document.getElementById("data").textContent'))
    row = rows[4]
    rank = [
        ids.index(target) + 1 if target in ids else np.inf
        for ids, target in zip(row["topk_indices"], row["input_ids"][1:], strict=False)
    ]
    expected = {
        "surprise": -np.array(row["target_logprob"], np.float64),
        "entropy": np.array(row["entropy"], np.float64),
        "tail": np.exp(np.array(row["tail_logprob"], np.float64)),
        "rank": np.array(rank),
    }
    for measure, values in expected.items():
        found = browser.run(levels, measure, 4)
        bounds = data["measures"][measure]["bounds"]
        levels_T = (values[:, None] > np.array(bounds)).sum(1)
        assert found[0] == "none"  # nothing was expected before the first token
        assert found[1 : 1 + len(values)] == [str(level) for level in levels_T], measure
    assert browser.log() == []


def test_keys_alone_lead_everywhere(browser, make_page, built, tiny_teacher_dir):
    page, rows = make_page(built, "--rows", 8, "--start", 2, "--teacher", tiny_teacher_dir), stored(built)  # fmt: skip
    tokenizer = load_tokenizer(str(tiny_teacher_dir))
    browser.look(width=1280)
    browser.open(page)
    for _ in range(20):
        browser.press(TAB)
        if browser.run("return document.activeElement.tagName") == "I":
            break
    browser.press(HOME, RIGHT, RIGHT, RIGHT)
    browser.wait("setTimeout(arguments[0], 500)")
    panel = browser.run(PANEL)
    assert (panel["place"], panel["hash"]) == ("row 2, token 3", "#row=2&token=3")
    check_panel(panel, rows[2], 3, tokenizer)
    browser.press(PAGE_DOWN, RIGHT, LEFT, LEFT)
    assert browser.run(PANEL)["place"] == f"row 2, token {len(rows[2]['input_ids'])}"
    browser.press(END, RIGHT)
    assert browser.run(PANEL)["place"] == "row 3, token 0"
    line = "const box = document.activeElement.getClientRects()[0]; return [box.top + scrollY, box.height]"
    first, height = browser.run(line)
    browser.press(DOWN)
    below = browser.run(line)[0]
    assert height < below - first < 2.5 * height
    browser.press(UP)
    assert abs(browser.run(line)[0] - first) < height / 2
    assert browser.log() == []


def test_a_word_and_the_highest_values_are_found(browser, make_page, built, tiny_teacher_dir):
    page, rows = make_page(built, "--rows", 8, "--start", 2, "--teacher", tiny_teacher_dir), stored(built)  # fmt: skip
    browser.open(page)
    find = """
    const [word, done] = arguments, query = document.getElementById("query");
    query.value = word;
    query.dispatchEvent(new Event("input"));
    setTimeout(() => done([document.getElementById("count").textContent,
      [...document.querySelectorAll("#results a")].map((link) => [link.hash, link.textContent])]), 400);
    """
    word = "münchen"
    places = sum(len(re.findall(word, row["text"].lower())) for row in rows[2:10])
    assert places
    count, links = browser.wait(find, word)
    assert (count, len(links)) == (f"{places} place{'s' if places > 1 else ''}", places)
    for fragment, text in links:
        number, token = map(int, re.findall(r"\d+", fragment))
        before = load_tokenizer(str(tiny_teacher_dir)).decode(rows[number]["input_ids"][:token])
        at = rows[number]["text"].lower().index(word, max(0, len(before) - len(word)))
        assert abs(at - len(before)) <= 12
        assert word[:4] in text.lower()
    assert browser.wait(find, "no such word")[0] == "0 places"
    highest = """
    const choice = document.getElementById("measure");
    choice.value = "surprise";
    choice.dispatchEvent(new Event("change"));
    document.getElementById("highest").click();
    return [...document.querySelectorAll("#results a")].map((link) => link.hash);
    """
    values = {
        f"#row={number}&token={t + 1}": -value
        for number in range(2, 10)
        for t, value in enumerate(rows[number]["target_logprob"])
    }
    found = browser.run(highest)
    assert [values[place] for place in found] == sorted(values.values(), reverse=True)[:50]
    assert browser.log() == []


def test_hostile_text_is_text(browser, make_page, hostile, tiny_teacher_dir):
    page = make_page(hostile, "--teacher", tiny_teacher_dir)
    rows = stored(hostile)
    browser.open(page, "#row=0&token=2")
    seen = browser.run("""
      const text = (element) => [...element.querySelectorAll("i:not(.e)")].map((token) =>
        [...token.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data).join("")).join("");
      return {title: document.title, scripts: document.scripts.length, images: document.images.length,
        headings: document.querySelectorAll("h1").length, styles: document.styleSheets.length, all: document.documentElement.textContent,
        texts: [...document.querySelectorAll(".text")].map(text), signs: [...document.querySelectorAll(".text u")].map((sign) => sign.textContent)};
    """)
    assert seen["title"] == "tiny: what the teacher expected"
    assert (seen["scripts"], seen["images"], seen["headings"], seen["styles"]) == (2, 0, 1, 1)
    hidden = re.compile("[\u202e\u2066\u2029\x00\x1b\u200b\ufeff\r]")
    assert seen["texts"] == [hidden.sub("", row["text"]) for row in rows]
    assert not hidden.search(seen["all"])
    for sign in ("\\u202e", "\\u2066", "\\u2029", "\\x00", "\\x1b", "\\u200b", "\\ufeff", "␍", "⇥"):
        assert sign in seen["signs"]
    # Whatever is found and pointed at is text, too.
    for number, row in enumerate(rows):
        for token in range(0, len(row["input_ids"]) + 1, 3):
            browser.run("location.hash = arguments[0]", f"#row={number}&token={token}")
    browser.run("document.getElementById('highest').click()")
    assert browser.run("return [document.title, document.images.length]") == [seen["title"], 0]
    assert browser.log() == []


def test_nothing_but_the_script_of_the_page_can_run(browser, make_page, hostile, tiny_teacher_dir):
    browser.open(make_page(hostile, "--teacher", tiny_teacher_dir))
    browser.run("""
      const script = document.createElement("script");
      script.textContent = "document.title = 'taken'";
      document.body.append(script);
      document.body.insertAdjacentHTML("beforeend", "<img src=x onerror=\\"document.title='taken'\\"><a id=x onclick=\\"document.title='taken'\\">x</a>");
      document.getElementById("x").click();
    """)
    assert browser.run("return document.title") == "tiny: what the teacher expected"
    assert {entry["level"] for entry in browser.log()} == {"SEVERE"}  # the policy's own words


def test_chats_show_who_speaks_and_what_is_learned(browser, make_page, chats, chatty_dir):
    page, rows = make_page(chats, "--rows", 9, "--start", 0, "--teacher", chatty_dir), stored(chats)
    browser.look(width=1280)
    browser.open(page)
    checked = 0
    for number in range(9):
        grey, speakers = browser.run(
            """
            const row = document.querySelector(`[data-row="${arguments[0]}"]`);
            return [[...row.querySelectorAll("i:not(.e)")].map((token) => token.classList.contains("n")),
              [...row.querySelectorAll(".speaker")].map((speaker) => speaker.textContent)];
            """,
            number,
        )
        assert [not learned for learned in rows[number]["completion_mask"]] == grey
        roles = re.findall(r"<\|im_start\|>(\w+)\n", rows[number]["text"])
        if roles:  # else the row is a chunk within one message
            assert [speaker for speaker in speakers if speaker] == roles
            checked += 1
    assert checked >= 6
    looks = browser.run("""
      return [...document.querySelectorAll("i[data-v]:not(.e)")].filter((token) => token.dataset.v > 0).map((token) => {
        const style = getComputedStyle(token);
        return [token.classList.contains("n"), style.color, style.backgroundColor, style.boxShadow];
      });
    """)
    nothing = "rgba(0, 0, 0, 0)"
    grey = browser.run('return getComputedStyle(document.querySelector(".hint")).color')
    assert {is_grey for is_grey, *_ in looks} == {True, False}
    for is_grey, ink, ground, line in looks:  # a colour of its own tells what is learned
        assert is_grey == (ink == grey) == (ground == nothing) == (line != "none")
        assert not is_grey or nothing not in line
    row = rows[0]
    kept = np.flatnonzero(loss_mask(row["completion_mask"]))
    browser.run("location.hash = arguments[0]", f"#row=0&token={kept[2] + 1}")
    panel = browser.run(PANEL)
    tokenizer = load_tokenizer(str(chatty_dir))
    assert panel["rows"][0][1] == shown(tokenizer, row["topk_indices"][2][0])
    browser.run("location.hash = arguments[0]", f"#row=0&token={kept[0]}")
    panel = browser.run(PANEL)
    assert not panel["table"]
    assert panel["summary"].endswith("No distribution is kept here: it is a prompt’s.")
    assert browser.log() == []


def test_two_datasets_beside_each_other(browser, make_page, pair, tiny_teacher_dir):
    arguments = ["--against", pair["other top"], "--teacher", tiny_teacher_dir]
    page = make_page(pair["one top"], *arguments)
    one, other = stored(pair["one top"]), stored(pair["other top"])
    for number, token in ((0, 3), (4, 20)):
        browser.open(page, f"#row={number}&token={token}")
        theirs = browser.run(
            'return [...document.querySelectorAll("#bars tbody tr:not(.whole)")].slice(0, 20).map((row) => row.querySelector(".them-text").textContent)'
        )
        expected = dict(
            zip(
                other[number]["topk_indices"][token - 1],
                np.exp(other[number]["topk_logprobs"][token - 1]),
                strict=True,
            )
        )
        assert len(theirs) == 20
        for text, listed in zip(theirs, one[number]["topk_indices"][token - 1], strict=True):
            if listed in expected:
                assert percent(text) == pytest.approx(expected[listed], abs=6e-4)
            else:
                assert text == "not listed"
        said = browser.run(PANEL)["summary"]
        assert f"There {other[number]['entropy'][token - 1]:.2f} nats; KL at least " in said
    assert browser.log() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_can_be_read(browser, make_page, built, tiny_teacher_dir, scheme):
    """WCAG 2.2, 1.4.3: a contrast of 4.5 at least; and lightness alone tells the colours apart, as for people who see no hues."""
    browser.look(scheme=scheme)
    browser.open(make_page(built, "--rows", 8, "--start", 2, "--teacher", tiny_teacher_dir))
    pairs = browser.run("""
      const holder = document.querySelector(".said");
      return [...Array(8).keys()].map((level) => {
        const token = document.createElement("i");
        token.dataset.v = level;
        holder.append(token);
        const style = getComputedStyle(token);
        return [style.color, level ? style.backgroundColor : getComputedStyle(document.querySelector(".text")).backgroundColor];
      });
    """)

    def luminance(colour: str) -> float:
        parts = np.array([int(part) for part in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for text, ground in pairs:
        high, low = sorted((luminance(text), luminance(ground)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
    steps = np.diff([luminance(ground) for _, ground in pairs])
    assert (steps < 0).all() if scheme == "light" else (steps > 0).all()


def test_the_page_fits_a_phone_and_touch_opens_the_panel(
    browser, make_page, built, tiny_teacher_dir
):
    browser.look(width=390, height=844)
    browser.open(make_page(built, "--rows", 8, "--start", 2, "--teacher", tiny_teacher_dir))
    assert browser.run(PANEL)["hidden"]
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    browser.run('document.querySelector(`[data-row="3"]`).querySelectorAll("i")[4].click()')
    assert browser.run(PANEL)["place"] == "row 3, token 4"
    browser.run('document.getElementById("close").click()')
    assert browser.run(PANEL)["hidden"]
    browser.look()
    assert browser.log() == []


def test_many_rows_stay_usable(browser, tiny_teacher_dir, tmp_path, request, make_page, capsys):
    """200 rows: the time to the first paint is printed, not asserted."""
    texts = [
        {"id": str(i), "text": f"{i} The quick brown fox jumps over the lazy dog. " * 12}
        for i in range(200)
    ]
    recipe = recipe_text(tiny_teacher_dir, "corpus.jsonl", sequences="max_length = 256\nbatch_tokens = 4096", output="shard_tokens = 100_000")  # fmt: skip
    dataset = build_of(tmp_path, recipe, texts)
    page = make_page(dataset, "--rows", 200, "--teacher", tiny_teacher_dir)
    browser.open(page, "#row=150&token=100")
    assert browser.run(PANEL)["place"] == "row 150, token 100"
    paint, ready = browser.run("""
      return [performance.getEntriesByName("first-contentful-paint")[0].startTime,
        performance.getEntriesByType("navigation")[0].domContentLoadedEventEnd];
    """)
    tokens = browser.run('return document.querySelectorAll("i").length')
    with capsys.disabled():
        print(
            f"\n200 rows, {tokens:,} tokens: first paint after {paint / 1000:.2f} s, ready after {ready / 1000:.2f} s"
        )
    browser.press(RIGHT)
    assert browser.run(PANEL)["place"] == "row 150, token 101"
    assert browser.log() == []
