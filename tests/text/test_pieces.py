"""The tokens of a text's pieces are those of the whole text: ids and where they stand, for every kind of tokenizer and any text."""

import re
import sys
import unicodedata
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from builder.corpus.documents import Document
from builder.corpus.encoder import Encoder, backend_copy
from builder.text import pieces
from builder.text.pieces import Pieces
from builder.text.seams import Seams, _stands_alone
from tests.text.kinds_of_tokenizers import CUT, WHOLE

WORDS = [
    *("the", " fox", "  ", "   \t\n", "\n", "\n\n", "\r\n", "\r", "a", "123", "1 2", "'s", "don't", "``", "''", "İ", "ſ"),
    *("。", "東京", "大", "大ab1", "大大the7", "e\u0301", "\u0301", "👩‍👩‍👧‍👦", "é", "ﬁ", "\u200d", "\u0e33", "\u1100", "\u1161", "각", "가", "\u11a8"),
    *("<think>", "fox", "[X]", " [X] ", "[Y]  ", "ab", "a b", "<|endoftext|>", "(", ") ", ". ", ",x", "_", "-", "/", "``` "),
    *("▁", " ▁", "\ufeff", "\x00", "\x04", "a\x04b", "\u3000", "\u2028", "\x85", "http://x.y/z?a=1 ", "x=1;\n    y = 2\n", "Hello, World! ", "and "),
]  # fmt: skip
RUNS = st.tuples(st.sampled_from("x \n\t字é1.\u0301"), st.integers(20, 200)).map(
    lambda run: run[0] * run[1]
)
TEXTS = st.lists(
    st.sampled_from(WORDS) | st.sampled_from([" ", " word", "\n"]) | RUNS | st.text(max_size=3),
    max_size=40,
).map("".join)
any_text = settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PROSE = (
    "The quick brown fox jumps over the lazy dog, and 12345 more.\nNaïve café – 東京 大阪。 " * 30
)


@pytest.fixture(scope="module")
def backends() -> dict[str, Tokenizer]:
    found = {}
    for name, make in [*CUT.items(), *((name, make) for name, (make, _) in WHOLE.items())]:
        found[name] = backend_copy(SimpleNamespace(backend_tokenizer=make()), match_special=False)
    return found


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Small windows, so that small texts are cut often; the list says whether windows agreed."""
    for name, value in (("WINDOW", 24), ("LEAD", 4), ("OVERLAP", 6)):
        monkeypatch.setattr(pieces, name, value)
    agreed: list[bool] = []
    agree = pieces._agree
    monkeypatch.setattr(pieces, "_agree", lambda *args: agreed.append(agree(*args)) or agreed[-1])
    return agreed


def parts(text: str, size: int = 7) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def check(backend: Tokenizer, text: str) -> list[pieces.Piece]:
    """Compare with the tokens of the whole."""
    found = list(Pieces(backend).of(parts(text)))
    whole = backend.encode(text, add_special_tokens=False)
    assert [token for piece in found for token in piece.ids] == whole.ids
    assert [start for piece in found for start in piece.starts] == [s for s, _ in whole.offsets]
    furthest, ends = 0, []
    for _, end in whole.offsets:
        ends.append(furthest := max(furthest, end))
    assert [end for piece in found for end in piece.ends] == ends
    assert "".join(piece.text for piece in found) == text
    return found


@pytest.mark.parametrize("name", CUT)
@any_text
@given(text=TEXTS)
def test_tokens_of_pieces_are_those_of_the_whole(backends, name, text, small):
    check(backends[name], text)
    assert all(small), "two windows differ: what `seams` says of this tokenizer is wrong"
    small.clear()


@pytest.mark.parametrize("name", CUT)
def test_ordinary_text_is_cut_often(backends, name, small):
    """If nothing were cut, the property above would say nothing."""
    assert len(check(backends[name], PROSE)) > len(PROSE) / 60
    assert all(small)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2, Prepend", "t5", "bert"])
def test_what_cannot_be_cut_is_tokenized_at_once(backends, name, small):
    for text in (f"a b{'x' * 500} c d", "   " * 200, "\n" * 300, "👩‍👩‍👧‍👦" * 60, "x\u0301" * 150):
        check(backends[name], text)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2, Prepend", "bert", "xlm-r"])
@pytest.mark.parametrize("repeated", ["x", " ", "字", "\n ", "\u0301", "a b"])
def test_long_words_and_runs(backends, name, repeated, monkeypatch):
    monkeypatch.setattr(pieces, "WINDOW", 2**10)
    found = check(backends[name], f"{PROSE}{repeated * 5000}{PROSE}")
    assert len(found) > 3


@pytest.mark.parametrize("name", WHOLE)
def test_a_tokenizer_that_cannot_be_cut_gets_the_whole_and_says_why(backends, name, small, monkeypatch):  # fmt: skip
    monkeypatch.setattr(pieces, "LARGE_WINDOW", 1000)
    notices: list[str] = []
    tokenizer = Pieces(backends[name], notice=notices.append)
    (piece,) = tokenizer.of(parts(PROSE), name="document 'x'")
    assert piece.text == PROSE
    if name != "dropout":
        assert piece.ids.tolist() == backends[name].encode(PROSE, add_special_tokens=False).ids
    assert tokenizer.seams.obstacle is not None
    (notice,) = notices
    assert notice.startswith(
        f"document 'x' is tokenized {len(PROSE):,} characters at a time, as a whole, because it is unknown where a text can be cut"
    )
    assert re.search(WHOLE[name][1], notice)
    list(tokenizer.of(parts(PROSE)))
    assert len(notices) == 1


def test_a_large_window_is_told_of(backends, small, monkeypatch):
    monkeypatch.setattr(pieces, "LARGE_WINDOW", 100)
    notices: list[str] = []
    list(Pieces(backends["gpt2"], notice=notices.append).of(parts("x" * 3000), name="document 'x'"))
    assert notices == [
        f"document 'x' is tokenized {size:,} characters at a time, because they contain no place to cut: that takes 0 GB of memory or more"
        for size in (192,)
    ]


def test_windows_that_differ_are_joined(backends, small, monkeypatch):
    """If `seams` were wrong, it would be noticed."""
    monkeypatch.setattr(Seams, "is_seam", lambda self, around, *, is_between_words: True)
    for size in range(1, 30):
        check(backends["gpt2"], "the quick\n\n\n   \n\n  brown    fox" * size)
    assert not all(small)
    assert any(small)


def test_a_text_without_tokens(backends, small):
    (piece,) = check(backends["bert"], " \n\t\x00")
    assert len(piece.ids) == 0
    assert check(backends["gpt2"], "")[0].text == ""
    found = check(backends["bert"], "a b c" + " " * 100)
    assert "".join(piece.text for piece in found).endswith(" " * 100)


def test_no_character_that_joins_another_stands_alone():
    """Whatever a normalizer puts together with the character before it cannot be what follows a cut."""
    everything = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
    joining = {c for one in everything for c in unicodedata.normalize("NFD", one)[1:]}
    assert len(joining) > 100
    assert not [c for c in joining if _stands_alone(c)]
    alone = [c for c in everything if _stands_alone(c)]
    assert len(alone) > 50_000
    for form in ("NFC", "NFKC"):
        for before in ("가", "\u1100", "ﾊ"):
            one_by_one = [unicodedata.normalize(form, f"{before}\n{c}\n") for c in alone]
            joined = unicodedata.normalize(form, "".join(f"{before}{c}\n" for c in alone))
            assert joined == "".join(text.replace("\n", "", 1) for text in one_by_one)


@pytest.mark.parametrize(
    ("name", "seams", "no_seams"),
    [
        ("gpt2", ["ab| cd", "1.| cd", "字京|。大", "ab|\ncd", "ab|, c"],
         ["a | cd", "ab\n|cd", "a\n|\ncd", "ae\u0301| cd", "a👩| cd", "a\r|\ncd", "ab| \u0301c", "b| cd", "ab| ", "ab|cd", "가|\u11a8ab"]),
        ("llama3", ["ab| cd", "1.| cd", "字京|。大", "ab|\ncd"], ["a.|\ncd", "a.|bcd", "a | cd", "ab|cd"]),
        ("added tokens", ["xy| cd"], ["xa|b c", "nk>| cd", "xy|[Xa", "Y]| cd", "fox| cd", "xy|foxy", "x |ycd"]),
        ("added spaces", ["xy| cd", "xy|.  "], ["xy|  cd"]),
        ("llama2, Prepend", ["ab| cd"], ["xt|hex", "x |the"]),
        ("albert", ["ab| cd", "ab|`cd"], ["a`|`cd", "a'|'cd", "a |bcd"]),
        ("xlm-r", ["ab| cd"], ["a | cd", "a |cde"]),
    ],
)  # fmt: skip
def test_places_that_are_known(backends, name, seams, no_seams):
    found = Seams(backends[name])
    assert found.obstacle is None

    def is_seam(text: str) -> bool:
        before, behind = text.split("|")
        is_of_words = not name.startswith("llama2")
        return found.is_seam(before[-2:] + behind[:2], is_between_words=is_of_words)

    assert [text for text in seams if not is_seam(text)] == []
    assert [text for text in no_seams if is_seam(text)] == []


# Sequences from any place of a document


def encoder_of(backend: Tokenizer, max_length: int) -> Encoder:
    tokenizer = SimpleNamespace(
        backend_tokenizer=backend,
        bos_token_id=None,
        eos_token_id=None,
        encode=lambda text, add_special_tokens: backend.encode(text, add_special_tokens=False).ids,
    )
    return Encoder(
        tokenizer, max_length=max_length, long_documents="chunk", bos="never", eos="never"
    )


@pytest.mark.parametrize("name", [*CUT, "scripts"])
@any_text
@given(text=TEXTS, max_length=st.integers(2, 30))
def test_sequences_go_on_from_any_place(backends, name, text, max_length, small):
    """As they would have without a stop, whatever was read before, and each time with the same place."""
    document = Document(id="x", text=text)
    whole = encoder_of(backends[name], max_length).sequences(document)
    steps = [(sequence, whole.place) for sequence in whole]
    if steps:
        assert [place for _, place in steps].index(None) == len(steps) - 1
    for number in range(0, len(steps) - 1, 1 + len(steps) // 6):
        place = steps[number][1]
        assert place.chunk == number + 1
        rest = encoder_of(backends[name], max_length).sequences(document, place)
        assert [(sequence, rest.place) for sequence in rest] == steps[number + 1 :]


def test_a_place_is_near_its_sequence(backends):
    """So that going on tokenizes little again."""
    chunks = encoder_of(backends["llama3"], 20).sequences(Document(id="x", text=PROSE))
    places: list[Any] = [chunks.place for _ in chunks][:-1]
    assert len(places) > 20
    assert max(place.token for place in places) < 20
    assert places[-1].character > len(PROSE) - 100


def test_a_place_that_is_none_any_more_is_refused(backends):
    encoder = encoder_of(backends["gpt2"], 20)
    chunks = encoder.sequences(Document(id="x", text=PROSE))
    places = [chunks.place for _ in chunks]
    with pytest.raises(
        ValueError, match=r"document 'x' no longer has .*start again in another directory"
    ):
        encoder.sequences(Document(id="x", text="fox" * 10), places[5])
    with pytest.raises(ValueError, match=r"no longer has a token boundary at character 602"):
        encoder.sequences(
            Document(id="x", text=" quick" * 500), replace(places[5], character=602, token=0)
        )
