"""The tokens of a chat → who speaks where.

In:   the texts of a row's tokens, which of them are special, and the completion mask.
Out:  `Turn`s that cover the row.

How:  a manifest keeps no messages, so that only the text can tell. Templates write a role behind a special token (ChatML, Llama 3, Gemma) or
      in it (Phi). Where no role is found, as in Mistral's template or in prompts with their completions, the mask tells the two
      sides apart. This is for the eye: nothing is learned from it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, pairwise, takewhile

ROLES = (
    *("system", "developer", "user", "human", "assistant", "model", "tool", "function"),
    *("ipython", "observation", "environment"),
)
_ROLE = re.compile(rf"\s*(?:<\W*)?({'|'.join(ROLES)})\b", re.IGNORECASE)
MAX_ROLE_TOKENS = 16
"""Behind the special token that opens a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Some tokens of a row, all by one speaker."""

    speaker: str
    start: int
    stop: int


def turns(
    pieces: Sequence[str], special: Sequence[bool], completion: Sequence[bool] | None
) -> list[Turn]:
    """Who speaks where.

    Args:
        pieces: [T] the text of each token.
        special: [T] whether it is a special token.
        completion: [T] whether it is the completion's; None where there are no completions: one turn without a speaker.
    """
    if completion is None:
        return [Turn(speaker="", start=0, stop=len(pieces))]
    starts = dict(_openings(pieces, special))
    if not starts:
        changes = (i for i in range(1, len(pieces)) if completion[i] != completion[i - 1])
        starts = {i: "completion" if completion[i] else "prompt" for i in (0, *changes)}
    elif 0 not in starts:
        starts = {0: "", **starts}
    borders = [*starts, len(pieces)]
    return [
        Turn(speaker=starts[start], start=start, stop=stop) for start, stop in pairwise(borders)
    ]


def _openings(pieces: Sequence[str], special: Sequence[bool]) -> Iterator[tuple[int, str]]:
    """Where messages begin, and whose they are."""
    for i in compress(range(len(pieces)), special):
        after = range(i + 1, min(i + MAX_ROLE_TOKENS, len(pieces)))
        behind = "".join(pieces[k] for k in takewhile(lambda k: not special[k], after))
        if role := _ROLE.match(pieces[i]) or _ROLE.fullmatch(behind.split("\n")[0].rstrip()):
            yield i, role[1].lower()
