"""A recipe's sections and its resolved sources → the things themselves, which know nothing of recipes: documents, an encoder, a teacher."""

import datetime
from collections.abc import Callable
from typing import Any

from builder.corpus.chats import ChatTemplate
from builder.corpus.documents import Corpus, Offset, open_hub, open_local
from builder.corpus.encoder import Encoder
from builder.corpus.rows import Columns
from builder.recipe.recipe import Recipe
from builder.recipe.sections import CorpusRecipe, TeacherRecipe
from builder.sources.resolve import CorpusSource, TeacherSource
from builder.teacher import ranks
from builder.teacher.model import Teacher


def open_corpus(
    corpus: CorpusRecipe,
    source: CorpusSource,
    *,
    are_prompts: bool = False,
    partition: int = 0,
    num_partitions: int = 1,
    start: Offset | None = None,
    opening: Callable[[int], None] = lambda _: None,
    keeps: Callable[[str], bool] | None = None,
    counts_blank: bool = True,
) -> Corpus:
    """The documents of one partition of a resolved corpus, from an offset on; see `Corpus`."""
    columns = columns_of(corpus)
    if source.format == "hub":
        assert corpus.repo
        assert source.commit
        rows = open_hub(corpus.repo, commit=source.commit, config=corpus.config, split=corpus.split)
    else:
        rows = open_local(
            source.files,
            format=source.format,
            text_unit=corpus.text_unit,
            columns=columns.all,
        )
    return Corpus(
        rows,
        columns=columns,
        without_last_answer=are_prompts,
        format=source.format,
        file_names=tuple(path.name for path in source.files),
        partition=partition,
        num_partitions=num_partitions,
        start=start,
        opening=opening,
        keeps=keeps,
        counts_blank=counts_blank,
    )


def columns_of(corpus: CorpusRecipe) -> Columns:
    """What the columns of a recipe's corpus mean."""
    return Columns(
        text=corpus.text_column,
        messages=corpus.messages_column,
        prompt=corpus.prompt_column,
        tools=corpus.tools_column,
        documents=corpus.documents_column,
        options=corpus.chat_template_kwargs_column,
        id="id" if corpus.embedded else corpus.id_column,
    )


def make_encoder(
    recipe: Recipe,
    tokenizer: Any,
    template: str | None = None,
    *,
    notice: Callable[[str], None] = lambda _: None,
) -> Encoder:
    """The encoder that a recipe asks for, with the chat template that it names, if any.

    Raises:
        ValueError: as `Encoder` and, where the corpus is one of chats, `ChatTemplate`.
    """
    sequences, is_of_prompts = recipe.sequences, recipe.generation is not None
    chats = None
    if recipe.corpus.messages_column:
        date = sequences.chat_template_date
        chats = ChatTemplate(
            tokenizer,
            template,
            is_of_prompts=is_of_prompts,
            learn=sequences.learn,
            options=sequences.chat_template_kwargs,
            date=datetime.date.fromisoformat(date) if date else None,
            let_go=sequences.drop_unwritten,
        )
    return Encoder(
        tokenizer,
        max_length=sequences.max_length,
        long_documents=sequences.long_documents,
        bos=sequences.bos,
        eos="never" if is_of_prompts else sequences.eos,
        chats=chats,
        notice=notice,
    )


def open_teacher(recipe: TeacherRecipe, source: TeacherSource, *, device: str) -> Teacher:
    """The teacher of a recipe, loaded.

    Raises:
        ValueError: with one line on what is wrong with this teacher or these devices, and what to do.
    """
    return ranks.load(
        location=source.location,
        commit=source.commit,
        tokenizer=source.tokenizer,
        config=source.config,
        weights=source.weights,
        dtype=recipe.dtype,
        head_dtype=recipe.head_dtype,
        attention=source.attention,
        # With a local directory, it is an attention kernel that is trusted.
        trust_remote_code=recipe.trust_remote_code and recipe.repo is not None,
        device=device,
        device_map=recipe.device_map,
        tensor_parallel=recipe.tensor_parallel,
    )
