"""A manifest → who wrote the texts of a dataset, in words: for its card and for a terminal."""

from typing import Any

from builder.dataset.printable import counted


def sentences(manifest: dict[str, Any]) -> list[str]:
    """How the teacher wrote completions; nothing where it did not."""
    how = manifest["recipe"].get("generation")
    if not how:
        return []
    counts = manifest["totals"]["completions"]
    eos_ids = manifest["teacher"]["generation_eos_ids"]
    each = f", {how['samples']:,} for each" if how["samples"] > 1 else ""
    with_id = f" (id {' or '.join(f'{token:d}' for token in eos_ids)})" if eos_ids else ""
    found = [
        f"The teacher wrote {counted(counts['completions'], 'completion')} of {counted(counts['prompts'], 'prompt')}{each}: it "
        f"{_manner(how, counts['corrected'])}.",
        f"{counts['ended']:,} of them {'end' if counts['ended'] != 1 else 'ends'} with a token that ends a text{with_id}; the others "
        f"were cut after {counted(how['max_new_tokens'], 'token')}.",
    ]
    if how["samples"] > 1:
        found.append("The `id` of a row is that of its prompt with /0, /1, … behind it.")
    if too_long := counts["prompts_too_long"]:
        found.append(
            f"Without room for a completion, and so not in it: {counted(too_long, 'prompt')}."
        )
    found.append(
        "However tokens were chosen, the stored distributions are those of the teacher at temperature 1 over its whole vocabulary, "
        "from a forward pass over prompt and completion as over any other text."
    )
    return found


def line(manifest: dict[str, Any]) -> str | None:
    """The same in a line; None where the teacher wrote nothing."""
    how = manifest["recipe"].get("generation")
    if not how:
        return None
    counts = manifest["totals"]["completions"]
    manner = f"temperature {how['temperature']:g}" if how["temperature"] else "greedily"
    if how["top_p"] < 1:
        manner += f", top_p {how['top_p']:g}"
    return (
        f"{counted(counts['completions'], 'completion')} of {counted(counts['prompts'], 'prompt')}, {manner}; {counts['ended']:,} "
        f"ended, the others were cut after {counted(how['max_new_tokens'], 'token')}"
    )


def _manner(how: dict[str, Any], corrected: int) -> str:
    """How tokens were chosen, behind “it”."""
    if how["temperature"] == 0:
        manner = "always took the most probable token, the first of the stored ones at its position"
        if corrected:
            manner += (
                f" (at {counted(corrected, 'near-tie')} it had rounded the other way while writing, and the stored distribution "
                "decided)"
            )
        return manner
    among = "all"
    if how["top_p"] < 1:
        among = f"as few of the most probable ones as have a probability of {how['top_p']:g} together (top_p)"
    return f"drew tokens at temperature {how['temperature']:g} from {among}, with seed {how['seed']:d}"  # fmt: skip
