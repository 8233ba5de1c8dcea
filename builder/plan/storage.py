"""A recipe and a number of tokens → bytes per token and files, and whether the Hub takes so many of that size.

In:   a recipe, a number of tokens, the sizes of the teacher's vocabulary and hidden states.
Out:  numbers, and a line of advice where the Hub's limits (`limits`) do not allow them.

How:  bytes per token as measured of the embedded dataset (`bytes_per_token`); files as the recipe cuts them.

Cost: none; all are formulas.
"""

import math

from builder.dataset.printable import as_size
from builder.hub.limits import MAX_FILE_BYTES, MAX_FILES
from builder.recipe.recipe import Recipe


def count_shards(recipe: Recipe, tokens: int) -> int:
    """Of a build of `tokens` tokens: no more, for a shard ends with the document that reaches its number of tokens."""
    held_out = round(tokens * (recipe.output.validation or 0))
    return _count(recipe, tokens - held_out) + (_count(recipe, held_out) if held_out else 0)


def _count(recipe: Recipe, tokens: int) -> int:
    """Of one split."""
    partitions, shard_tokens = recipe.output.partitions, recipe.output.shard_tokens
    share, rest = divmod(tokens, partitions)
    larger, smaller = (max(1, math.ceil(n / shard_tokens)) for n in (share + 1, share))
    return rest * larger + (partitions - rest) * smaller


def too_many_files(recipe: Recipe, tokens: int) -> str | None:
    """Why the Hub does not take a build of `tokens` tokens, and what would do; None if its files are not too many."""
    shards, partitions = count_shards(recipe, tokens), recipe.output.partitions
    if shards <= MAX_FILES:
        return None
    if partitions > MAX_FILES:
        what = f"output.partitions must be {MAX_FILES:_} or less"
    else:
        least = math.ceil(math.ceil(tokens / partitions) / (MAX_FILES // partitions) / 1e6)
        what = f"output.shard_tokens must be {least * 1_000_000:_} or more"
    return f"the Hub takes {MAX_FILES:,} files, not {shards:,}: {what}"


def too_large_files(recipe: Recipe, tokens: int | None, per_token: float) -> str | None:
    """The same of files that are too large.

    Args:
        recipe: what is built.
        tokens: that are built; None if that is not known.
        per_token: bytes of each.
    """
    output = recipe.output
    shard_tokens = min(output.shard_tokens, (tokens or math.inf) / output.partitions)
    if shard_tokens * per_token <= MAX_FILE_BYTES:
        return None
    limit = f"the Hub takes files of up to {MAX_FILE_BYTES / 1e9:.0f} GB"
    if (tokens or 0) * per_token > (all_bytes := MAX_FILES * MAX_FILE_BYTES):
        return f"{limit}, so {MAX_FILES:,} of them hold {all_bytes / 1e12:.0f} TB"
    most = int(MAX_FILE_BYTES / per_token)
    return (
        f"{limit}, not {as_size(shard_tokens * per_token)}: output.shard_tokens must be "
        f"{most // 1000 * 1000 or most:_} or less"
    )


def bytes_per_token(
    recipe: Recipe, *, vocab_size: int = 0, hidden_size: int = 0, kept_share: float = 1.0
) -> float:
    """What a token takes on disk, of a teacher whose vocabulary needs two bytes.

    Those of the embedded dataset (README): an entry of the top K takes 3.0 and the rest of a token 12.

    Args:
        recipe: the recipe.
        vocab_size: of the teacher; needed where all log-probabilities are kept.
        hidden_size: of the teacher; needed where hidden states are kept.
        kept_share: share of the positions of which the columns of several values are kept.
    """
    output, per_entry = recipe.output, 2.8 if recipe.output.profile == "compact" else 3.0
    size = 10.0 + 3.5 * len(output.temperatures) + (2 if output.text else 0)
    wide = 1.8 * hidden_size if output.hidden_states else 0.0
    if output.top_k == "all":
        wide += 1.5 * vocab_size
    else:
        per_draw = 3.5 if output.tail_logprobs else 1.8
        wide += per_entry * output.top_k + per_draw * output.tail_samples
    return size + kept_share * wide
