"""A position that was recomputed → lines of a table."""

from typing import Any

from builder.card.markdown import plain


def context_of(example: dict[str, Any]) -> str:
    """The text before what is expected, in quotation marks."""
    return f"“{'…' if example['is_cut'] else ''}{plain(_visible(example['context']))}”"


def table_of(example: dict[str, Any]) -> list[tuple[str, str]]:
    """Tokens and their probabilities, most probable first, the one that followed marked."""
    pairs = zip(example["tokens"], example["probabilities"], strict=False)
    lines = []
    for rank, (token, probability) in enumerate(pairs):
        mark = " ← followed" if rank == example["rank"] else ""
        lines.append((f"{token_text(token)}{mark}", f"{probability:.1%}"))
    shown, listed, rank = len(lines), example["listed"], example["rank"]
    is_below = rank is not None and rank >= shown
    if listed > shown:
        lines.append((f"the next {listed - shown:,}", f"{example['rest']:.1%}"))
    if example["tail"] > 0:
        drawn = ", ".join(map(token_text, example["draws"]))
        lines.append(
            (f"all others{f', such as {drawn}' if drawn else ''}", f"{example['tail']:.1%}")
        )
    if (is_below or rank is None) and example["following_probability"] is not None:
        place = f"among the next {listed - shown:,}" if is_below else "among all others"
        token = token_text(example["following"]) if example["following"] else "what"
        share = f"{example['following_probability']:.1%}"
        lines.append((f"{token} ← followed, {place}", share))
    return lines


def token_text(text: str) -> str:
    """A token in quotation marks, as Markdown."""
    return f"“{plain(_visible(text))}”"


def _visible(text: str) -> str:
    """Spaces at the ends, and ends of lines, as signs."""
    text = text.replace("\n", "↵").replace("\t", "⇥")
    start, stop = len(text) - len(text.lstrip(" ")), len(text.rstrip(" "))
    inner = text[start:stop] if stop > start else ""
    return "␣" * start + inner + "␣" * (len(text) - max(stop, start))
