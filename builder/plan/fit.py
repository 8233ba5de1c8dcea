"""A recipe, and what is known of its teacher → whether one fits the other.

In:   a recipe, and numbers of a loaded teacher, or of its configuration alone.
Out:  nothing, or the reason why no dataset can be built.

Cost: none. A dry run asks before any weight is loaded, and a build once more, with the numbers of the loaded teacher.
"""

from builder.dataset.shards import MAX_ROW_VALUES
from builder.recipe.recipe import Recipe
from logit_dataset.schema import Layout


def check_fit(
    recipe: Recipe,
    *,
    vocab_size: int,
    hidden_size: int | None,
    max_length: int | None,
) -> None:
    """See that a teacher can give what a recipe asks for.

    Args:
        recipe: what is to be built.
        vocab_size: of the teacher's logits.
        hidden_size: of its hidden states; None if it has none.
        max_length: its longest sequence, in tokens; None if it does not say.

    Raises:
        ValueError: it cannot.
    """
    output, wanted = recipe.output, recipe.sequences.max_length
    if output.top_k != "all" and output.top_k > vocab_size:
        raise ValueError(
            f"output.top_k is {output.top_k}, but the teacher's vocabulary has {vocab_size} tokens; "
            "choose a smaller top_k"
        )
    if max_length and wanted > max_length:
        raise ValueError(
            f"sequences.max_length is {wanted}, but the teacher was made for {max_length} "
            "positions; choose a smaller max_length"
        )
    teacher = {"vocab_size": vocab_size, "hidden_size": hidden_size}
    values = wanted * Layout.of(recipe.published(), teacher).widest
    if values > MAX_ROW_VALUES:
        raise ValueError(
            f"a row of sequences.max_length = {wanted} tokens would hold {values:,} values in one column, more "
            f"than the {MAX_ROW_VALUES:,} that Arrow's lists can; choose a smaller max_length or top_k"
        )
