"""Text from outside → Markdown that shows it and does nothing."""

import re
import unicodedata

_BIDI = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def plain(text: object) -> str:
    """Text from outside as Markdown that shows just this text, on one line, in a table cell too."""
    line = " ".join(str(text).split())
    # Without control characters, lone surrogates, and marks that turn the direction of the text around them.
    line = "".join(
        c for c in line if unicodedata.category(c) not in ("Cc", "Cs") and c not in _BIDI
    )
    line = " ".join(line.split())
    line = "".join(_ENTITIES.get(c, f"\\{c}" if c in "\\`*[]|~$@" else c) for c in line)
    # An underscore within a word is only an underscore.
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)
    line = re.sub(r":(?=//)|(?<=www)\.", r"\\\g<0>", line, flags=re.IGNORECASE)  # no autolinks
    return re.sub(r"^(\d*)([-+=#.)])", r"\1\\\2", line)  # no lists, headings or rules
