"""Rows → one HTML file: the texts and pictures drawn here, what changes under the reader's hand drawn by its script.

In:   what a dataset is, its rows, its tokenizer, and the same rows of another dataset, if there is one.
Out:  the bytes of a page that fetches nothing; the same for the same input.

How:  page.html is the page, page.css its looks (the scale of colours is the card's), page.js what it does. All words, texts and pictures are HTML
      that this module writes, so that the page can be read without its script; colours, the panel and the search are the script's, from numbers in one block
      of JSON: arrays in base64, in the very types of the dataset. Nothing from outside is markup: Jinja escapes it, the JSON holds no `<`, and
      the page's own policy (CSP) lets nothing run but the script whose hash it names.

Cost: 180 bytes per token, 270 with another dataset (SmolLM2, K = 50, 4 draws): 1.9 and 2.8 MB for 20 rows of 512 tokens. 0.6 s for 7,700.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from builder.card.colours import SURPRISE_BOUNDS, style_sheet
from builder.corpus.sequences import NO_TOKEN
from builder.dataset.info import spell_token
from builder.dataset.printable import json_lines
from builder.dataset.spelling import Strings, pieces, signs
from builder.view.charts import draw
from builder.view.comparison import Against
from builder.view.rows import Array, Row
from builder.view.turns import turns

WIDTH = 20
"""Ranks that are shown of a distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Something that tokens are coloured by."""

    name: str
    label: str
    bounds: tuple[float, ...]
    """Of the seven upper ones of eight colours."""
    unit: str = "nats"


SURPRISE = Measure(name="surprise", label="surprise: −log p of the token", bounds=SURPRISE_BOUNDS)
ENTROPY = Measure(
    name="entropy", label="entropy of what was expected", bounds=(0.25, 0.5, 1, 2, 3, 4, 5)
)
RANK = Measure(
    name="rank", label="rank of the token", bounds=(1, 2, 5, 10, 20, 50, 1000), unit="rank"
)
TAIL = Measure(
    name="tail",
    label="mass outside the top {top_k}",
    bounds=(0.001, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6),
    unit="share",
)
DIVERGENCE = Measure(
    name="divergence",
    label="KL to {other}, at least",
    bounds=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1),
)


def render(
    *,
    name: str,
    description: str,
    facts: dict[str, str],
    rows: Sequence[Row],
    tokenizer: Any,
    other: str = "",
    against: Sequence[Against] = (),
) -> bytes:
    """The page.

    Args:
        name: of the dataset.
        description: of it; may be empty.
        facts: what else the dataset is, name → words.
        rows: to show, at least one.
        tokenizer: of the teacher.
        other: name of the dataset to compare with, or "".
        against: what that says of each row; empty without one.
    """
    import jinja2

    whole = rows[0].known_ranks > rows[0].ids.shape[1]
    measures = [SURPRISE, ENTROPY, RANK, *([] if whole else [TAIL])]
    if against:
        measures.insert(0, DIVERGENCE)
    labels = {"top_k": f"{rows[0].known_ranks:,}", "other": other}
    strings = Strings(lambda token: spell_token(tokenizer, token))
    values = _values(rows, against, strings)
    parts = list(strings)
    data = {
        "topK": None if whole else rows[0].known_ranks,
        "other": other,
        "measures": {m.name: {"bounds": m.bounds, "unit": m.unit} for m in measures},
        "rows": [{"number": row.number, "length": len(row.input_ids)} for row in rows],
        "strings": [each[0] if len(each) == 1 else each for each in parts],
        "arrays": {key: [_kind(array), _base64(array)] for key, array in values.items()},
    }
    css, script = _file("page.css") + style_sheet(), _file("page.js")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    text = environment.from_string(_file("page.html")).render(
        policy=_policy(css, script),
        css=Markup(css),
        script=Markup(script),
        data=Markup(_json(data)),
        name=_inline(signs(name, in_line=False)),
        title="".join(signs(name)),
        description=_inline(signs(description)),
        facts={key: _inline(signs(value)) for key, value in facts.items()},
        other=other,
        charts=draw(rows),
        picture=Markup,
        measures=[(m.name, m.label.format(**labels)) for m in measures],
        positions=f"{sum(len(row.input_ids) for row in rows):,}",
        has_mask=rows[0].completion is not None,
        rows=[_shown(row, tokenizer) for row in rows],
    )
    return text.encode()


def _values(rows: Sequence[Row], against: Sequence[Against], strings: Strings) -> dict[str, Array]:
    """[N] or [N, k] arrays over the positions of all rows, one after the other; ids are numbers of spellings."""

    def joined(get: Callable[[Any], Array], of: Sequence[Any] = rows) -> Array:
        return np.concatenate([get(each) for each in of])

    def spelled(ids: Array) -> Array:
        known = {token: strings.number(token) for token in dict.fromkeys(ids.ravel().tolist()) if token != NO_TOKEN}  # fmt: skip
        numbers = [known.get(token, -1) for token in ids.ravel().tolist()]
        return np.array(numbers, np.int64).reshape(ids.shape)

    values = {
        "ids": spelled(joined(lambda row: row.ids[:, :WIDTH])),
        "logprobs": joined(lambda row: row.logprobs[:, :WIDTH]),
        "rest": joined(
            lambda row: np.exp(row.logprobs[:, WIDTH:].astype(np.float64)).sum(1).astype(np.float16)
        ),
        "tail": joined(lambda row: row.tail_logprob),
        "draws": spelled(joined(lambda row: row.draws)),
        "target": spelled(joined(lambda row: row.targets)),
        "targetLogprob": joined(lambda row: row.target_logprob),
        "rank": joined(lambda row: row.ranks).astype(np.uint32),
        "entropy": joined(lambda row: row.entropy),
        "kept": joined(lambda row: row.kept).astype(np.uint8),
        "learned": joined(lambda row: row.learned).astype(np.uint8),
    }
    if against:
        values |= {
            "otherLogprobs": joined(lambda found: found.logprobs[:, :WIDTH], against),
            "otherIds": spelled(joined(lambda found: found.ids, against)),
            "otherOwn": joined(lambda found: found.own_logprobs, against),
            "otherTarget": joined(lambda found: found.target_logprob, against),
            "otherEntropy": joined(lambda found: found.entropy, against),
            "divergence": joined(lambda found: found.divergence, against),
        }
    # The largest number of a type stands for no token.
    narrow = sum(1 for _ in strings) < 2**16 - 1
    return {
        key: array.astype(np.uint16 if narrow else np.uint32) if array.dtype == np.int64 else array
        for key, array in values.items()
    }


def _kind(array: Array) -> str:
    return array.dtype.str[1:]


def _base64(array: Array) -> str:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return base64.b64encode(little.tobytes()).decode()


def _json(values: Any) -> str:
    """JSON that no parser of HTML sees anything in."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return json_lines(text).replace("<", "\\u003c")


def _policy(css: str, script: str) -> str:
    """What the page may do (CSP): run its script, look as it looks, and nothing else; it fetches and sends nothing."""
    sources = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, css)
    ]
    return (
        f"default-src 'none'; script-src 'sha256-{sources[0]}'; style-src 'sha256-{sources[1]}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _file(name: str) -> str:
    return (resources.files("builder.view") / name).read_text(encoding="utf-8")


def _inline(parts: Sequence[str]) -> Markup:
    """Parts (see `signs`) as HTML: <u> is a sign for a character that cannot be seen."""
    return Markup("").join(
        Markup("<u>{}</u>").format(part) if i % 2 else escape(part) for i, part in enumerate(parts)
    )


def _shown(row: Row, tokenizer: Any) -> dict[str, Any]:
    """What the template shows of a row."""
    ids = row.input_ids.tolist()
    special_ids = set(tokenizer.all_special_ids) | {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special
    }
    texts, special = pieces(tokenizer, ids), [token in special_ids for token in ids]
    mask = None if row.completion is None else row.completion.tolist()
    tokens = [
        _token(text, is_special, is_learned=mask is None or mask[i])
        for i, (text, is_special) in enumerate(zip(texts, special, strict=True))
    ]
    nll = -row.target_logprob[row.learned].astype(np.float64)
    nll = nll[~np.isnan(nll)]
    last = int(row.targets[-1])
    return {
        "number": row.number,
        "id": _inline(signs(row.id, in_line=True)),
        "chunk": row.chunk_index,
        "length": len(ids),
        "perplexity": f"{np.exp(nll.mean()):,.2f}" if len(nll) else "",
        "turns": [
            (turn.speaker, Markup("").join(tokens[turn.start : turn.stop]))
            for turn in turns(texts, special, mask)
        ],
        "end": ""
        if last == NO_TOKEN
        else _inline(signs(spell_token(tokenizer, last), in_line=True)),
    }


def _token(text: str, is_special: bool, *, is_learned: bool) -> Markup:
    """A token in its place: <i>, of the class s if it is special, n if it is not to be learned, c if its character began before."""
    classes = f"{'s' if is_special else ''}{'' if is_learned else ' n'}{'' if text else ' c'}"
    tag = f'<i class="{classes.strip()}">' if classes else "<i>"
    return Markup(tag) + _inline(signs(text) if text else ["", "‥", ""]) + Markup("</i>")
