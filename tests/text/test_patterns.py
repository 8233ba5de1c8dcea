"""What a pattern reads ahead of a place does not depend on what is behind it, wherever `reads` says so: asked of the library itself."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from builder.text.patterns import Pattern, literal, parse

ATOMS = [
    *("a", "b", "s", "B", "1", " ", "'", r"\.", r"\n", "字", "ss", r"\x61", r"\x{5B57}"),
    *(r"\s", r"\S", r"\d", r"\w", r"\W", ".", r"\p{L}", r"\P{L}", r"\p{^N}", r"\p{Lu}", r"\p{Han}", r"\p{Alphabetic}"),
    *(r"\s+(?!\S)", "a+(?!b)", "a(?=b1)", r"(?i:ss)"),
    *("[ab]", "[^a]", r"[^\s\p{L}\p{N}]", r"[\r\n]", "[a-c1]", r"[\w&&[^a]]", "[a[.1]]", r"[^\r\n\p{L}\p{N}]", "[-a]", "[a-]"),
]  # fmt: skip
PATTERNS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map("|".join).map("(?:{})".format),
        st.tuples(
            inner, st.sampled_from(["?", "*", "+", "{1,2}", "{2}", "{,2}", "+?", "*+", "??"])
        ).map("(?:{0[0]}){0[1]}".format),
        st.tuples(st.sampled_from(["(?i:{})", "(?={})", "(?!{})", "(?>{})", "({})"]), inner).map(
            lambda pair: pair[0].format(pair[1])
        ),
    ),
    max_leaves=7,
)
TEXTS = st.text(st.sampled_from("aabBsSſ1 2 \n\r.,'-é字京ßK\t"), min_size=2, max_size=14)


def ends(source: str, text: str) -> set[int]:
    """Where the pattern splits a text, with its start and end."""
    splitter = pre_tokenizers.Split(Regex(source), "isolated")
    return {0, *(end for _, (_, end) in splitter.pre_tokenize_str(text))}


@settings(max_examples=300, deadline=None)
@given(source=PATTERNS, text=TEXTS)
def test_what_is_matched_does_not_depend_on_what_no_attempt_reads(source, text):
    pattern = parse(source)
    assume(pattern is not None)
    try:
        whole = ends(source, text)
    except Exception:  # the library refuses the pattern
        assume(False)
    for place in range(1, len(text)):
        if not pattern.reads(text[place - 1], text[place]):
            left, right = ends(source, text[:place]), ends(source, text[place:])
            assert whole | {place} == left | {place + end for end in right}, place


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"


@pytest.mark.parametrize(
    ("source", "apart", "together"),
    [
        (GPT2, ["a ", "1 ", ". ", "。 ", "字 ", "a.", "字。", "a1"], ["ab", "字京", "  ", " a", "\na", "\n\n", "11", "'s"]),
        (LLAMA3, ["a ", "1 ", ". ", "字 ", "a.", "字。", "字1"], ["ab", ".\n", " \n", "\na", "11", ".a", "'S", "'ſ"]),
        (BLOOM, ["a ", "a.", "字。", "。 ", ". "], ["ab", " a", "字京"]),
        (" {2,}", ["a ", " a", "ab"], ["  "]),
    ],
)  # fmt: skip
def test_patterns_that_are_known(source, apart, together):
    """If nothing were apart, the property above would say nothing."""
    pattern = parse(source)
    assert [pair for pair in apart if pattern.reads(*pair)] == []
    assert [pair for pair in together if not pattern.reads(*pair)] == []


@pytest.mark.parametrize(
    "source",
    [
        *(r"\ba", "^a", "a$", "(?<=b)a", "(?<!b)a", r"(a)\1", r"\Aa", r"a\z", r"\Ga", "(?i)a", "(?<n>a)"),
        *(r"\s*", "a?", "", "a|", "[[:alpha:]]", "(a", "[a", "a)", r"\X", r"\R", r"a\K", r"\p{L", "(?m:.)"),
    ],
)  # fmt: skip
def test_patterns_that_look_back_match_nothing_or_are_not_understood_are_none(source):
    assert parse(source) is None


def test_a_text_that_stands_for_itself():
    assert isinstance(pattern := literal("aab"), Pattern)
    assert pattern.reads("a", "a")
    assert pattern.reads("a", "b")
    assert not pattern.reads("b", "a")
    assert pattern.takes("b")
    assert not pattern.takes("c")
