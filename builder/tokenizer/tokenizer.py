"""A teacher's tokenizer, which makes the token ids that its `tokenizer.json` says, whatever class a config names for it.

In:   a directory, or a repository on the Hub at a commit.
Out:  a tokenizer of transformers (chat template, special tokens) with the file's backend; where it comes from, and what of it the
      user should know: `origin_of`.

Why:  transformers 5 rebuilds most tokenizers in the class that tokenizer_config.json or the model type names. From tokenizer.json it
      takes the vocabulary, and leaves the rules by which a text is cut: "2023" becomes 20 23 where the teacher learned 202 3.

How:  transformers loads; then the file is read once more, and where what was loaded follows other rules, the file's take their place.
      Which of several sources decides:

      rules          tokenizer.json, always: normalizer, pre-tokenizer, model, decoder, ids and flags of the added tokens that it lists.
                     So `add_prefix_space`, `legacy` and an `added_tokens_decoder` that says otherwise change nothing. Only
                     `fix_mistral_regex = true` does: by it a config says that its file is wrong.
      tokens that it does not list
                     what the configuration names (`added_tokens_decoder`, special tokens, `extra_special_tokens`) is added, as by
                     every program with which a teacher can have been trained. A class's own special tokens are not, unless the
                     vocabulary has them. A token that would get another id than its file says is refused.
      BOS, EOS       the file's post-processor; the class's, where the config sets `add_bos_token` or `add_eos_token` and the class
                     does what it says.
      no tokenizer.json
                     transformers converts what there is (tokenizer.model; vocab.json and merges.txt) by the class that is named.

      BPE dropout, padding and truncation are switched off: they are for training.

Cost: for 128,000 tokens, 1.1 s of a core more than the 0.7 that transformers takes; 1.7 more than 0.9 where it rebuilds the tokenizer.
"""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from builder.corpus.encoder import added_around
from builder.tokenizer.files import (
    CONFIG,
    FILE,
    TokenizerError,
    as_it_is,
    check_id,
    declared_ids,
    read,
    read_json,
    readable,
    tokenizer_file,
)
from builder.tokenizer.precedence import (
    add_named,
    forget_unknown,
    mistral,
    prefix_space,
    settle_around,
    without_dropout,
)
from builder.tokenizer.rules import (
    at_rest,
    differing_parts,
    example,
    sha256,
    unknown_tokens,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a teacher's tokenizer comes from."""

    source: str
    """`tokenizer.json`, `gguf`, or the class of transformers that has converted other files."""
    file_sha256: str | None = None
    """Of tokenizer.json."""
    notices: tuple[str, ...] = ()
    """What the user should know, a line each."""
    replaced_sha256: str | None = None
    """Of the tokenizer that transformers makes of the files, where another one was taken; older code took it."""
    keeps_ids: bool = False
    """Whether that one makes the same ids of every text."""

    @property
    def provenance(self) -> dict[str, str]:
        """What the manifest says of it."""
        file = {"tokenizer_file_sha256": self.file_sha256} if self.file_sha256 else {}
        return {"tokenizer_source": self.source, **file}


def origin_of(tokenizer: Any) -> Origin | None:
    """Where a tokenizer comes from; None for one that was made in memory."""
    origin: Origin | None = getattr(tokenizer, "logit_dataset_origin", None)
    return origin


def note_origin(tokenizer: Any, origin: Origin) -> Any:
    """A tokenizer that knows where it comes from."""
    tokenizer.logit_dataset_origin = origin
    return tokenizer


def load(location: str, *, commit: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load a teacher's tokenizer.

    Args:
        location: directory, or repository on the Hub.
        commit: of the repository.
        trust_remote_code: whether code of the repository may run.

    Raises:
        TokenizerError: its files contradict each other so that the right ids cannot be had, or are damaged; or it is no fast one.
        ValueError, OSError, ImportError, RuntimeError: transformers cannot load it.
    """
    file = None
    try:
        # Said outright: left open, transformers asks on the terminal whether to run the repo's code.
        loaded = AutoTokenizer.from_pretrained(
            location, revision=commit, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a class fails in its own ways at a file of another kind
        if "trust_remote_code" not in str(error):
            with suppress(ValueError, OSError):
                file = tokenizer_file(location, commit)
        if file is None:
            raise readable(error) from None
        loaded = as_it_is(location, commit)
    file = file or tokenizer_file(location, commit)
    if file is not None:
        return _by_file(loaded, location, commit, file)
    name = type(loaded).__name__
    if not getattr(loaded, "is_fast", False):
        raise TokenizerError(
            f"{name} is not a fast tokenizer, which is needed to know each token's place in the text, and there is no {FILE}; create one with the model's own tools"
        )
    backend = at_rest(loaded.backend_tokenizer)
    replaced, notices = sha256(backend.to_str()), without_dropout(backend)
    for content, index in declared_ids(location, commit).items():
        check_id(backend, content, index)
    return note_origin(
        loaded,
        Origin(
            source=f"{name} of transformers",
            notices=tuple(notices),
            replaced_sha256=replaced if notices else None,
        ),
    )


def _by_file(loaded: Any, location: str, commit: str | None, file: Path) -> Any:
    """What transformers has loaded, with the backend that tokenizer.json describes."""
    config, content = read_json(location, CONFIG, commit), file.read_bytes()
    ours = read(content)
    is_as_it_is = type(loaded) is PreTrainedTokenizerFast
    plain = loaded if is_as_it_is else as_it_is(location, commit)
    if not getattr(loaded, "is_fast", False):
        loaded = as_it_is(location, commit)
    name, theirs = type(loaded).__name__, at_rest(loaded.backend_tokenizer)
    former = theirs.to_str()

    notices = [*without_dropout(ours), *mistral(config, plain, ours)]
    notices += add_named(ours, plain, loaded, declared_ids(location, commit))
    had_dropout = bool(without_dropout(theirs))
    if ours.post_processor is None:
        ours.post_processor = plain.backend_tokenizer.post_processor
    around = added_around(ours), added_around(theirs)
    changes, lost = differing_parts(theirs, ours), unknown_tokens(theirs, ours)
    if changes or lost:
        loaded._tokenizer = ours  # transformers does so where it trains a tokenizer anew
        forget_unknown(loaded)
    if changes:
        shown = "; ".join(filter(None, [", ".join(changes), example(theirs, ours)]))
        notices.append(
            f"{CONFIG} describes added tokens differently from {FILE} ({shown}); token ids are those of {FILE}"
            if is_as_it_is
            else f"transformers loads this tokenizer as {name} with other rules than {FILE} has ({shown}); token ids are those of {FILE}, "
            "which PreTrainedTokenizerFast.from_pretrained reads as it is"
        )
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        notices.append(
            f"{name} of transformers has special tokens of its own ({', '.join(sorted(lost)[:3])}{more}), which {FILE} does not have, so "
            "that the teacher cannot know them; they are left out"
        )
    notices += prefix_space(config, loaded.backend_tokenizer)
    notices += settle_around(loaded, config, around, theirs)
    backend = loaded.backend_tokenizer
    is_same = not set(changes) - {"decoder"} and added_around(backend) == around[1]
    return note_origin(
        loaded,
        Origin(
            source=FILE,
            file_sha256=hashlib.sha256(content).hexdigest(),
            notices=tuple(notices),
            replaced_sha256=sha256(former) if former != backend.to_str() else None,
            keeps_ids=is_same and not had_dropout,
        ),
    )
