"""A dataset in the teacher's tokens → rows in the tokens of a student with another tokenizer, by bytes.

In:   the teacher's and the student's fast tokenizers, and rows as they are read.
Out:  rows of other lengths: the same texts in the student's tokens, with the teacher's mass on them as far as it can be told.

Cost: a second or two to map 49,152 tokens; then about as much as tokenizing the texts anew.

Shape suffixes: R rows, T positions of one, N of all, M positions of the student, K top-k, V teacher's vocabulary.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from logit_dataset.rows import EMPTY, NO_TARGET, Array, Rows
from logit_dataset.schema import FLOAT16_MIN
from logit_dataset.tokenizer_check import plain_tokenizer
from logit_dataset.vocabulary import add_mass


class TokenizerProjection:
    """Project onto the vocabulary of another tokenizer by the bytes of tokens. With the same tokenizer, this is the identity.

    Positions. The student's tokenizer splits each row's text anew. Where one of its tokens ends at the same byte as a teacher's token, the
    teacher's distribution predicts what the student has to predict next. At the student's other positions `mask` is False; their text can
    still be learned.

    Mass. Let b(i) be the bytes of a listed teacher token i, and f(i) the first token of the student's split of b(i). The mass of i goes to
    f(i) if the bytes of f(i) are a prefix of b(i); several i can share one f(i). If b(i) is not text (half a character) or the student's
    tokenizer puts a space before a text, f(i) is the longest token that is a prefix of b(i). For some i, the student's first token is
    undetermined: the student has a token that is longer than b(i), is not a teacher token, and that the teacher would begin with i ("·the",
    if only the student has "·thexy"). The mass of such i joins the tail, as does that of tokens without bytes (special tokens, except
    the end of a sequence, which becomes the student's). Where that mass belongs is unknown; some of it may belong to a listed token. This
    costs much if the student has many words that the teacher lacks: on Python's documentation, with a student tokenizer of 4,096
    tokens, the tail grows from 11 % to 32 %. With strict=False, such i give their mass to f(i), as if the student never used the longer token.

    Limits. The projection is exact if a tokenizer's split does not depend on the text behind it, and if the teacher gives no mass to
    spellings that its own tokenizer would not choose. (An alternative that would have moved the student's last boundary, "re" after "The"
    for a student that has "There", counts as if it had not.) Sampled tail tokens are dropped. Rows that are not UTF-8, because they end
    within a character, are left out. Byte-level and SentencePiece vocabularies are supported.

    Completions. A student's token belongs to the completion if one of its bytes does, and `mask` is True where the teacher's distribution
    predicts a completion token. Special tokens have no bytes: rows with special tokens in between are left out. If every row has some
    (chats, between turns), the dataset is refused.
    """

    def __init__(
        self, teacher_tokenizer: Any, student_tokenizer: Any, *, strict: bool = True
    ) -> None:
        """Map every teacher token. This takes a second or two for 49,152 tokens.

        Args:
            teacher_tokenizer: the dataset's fast tokenizer. Let `load_logits` check it with require_tokenizer. If that refuses the tokenizer
                that AutoTokenizer makes, `PreTrainedTokenizerFast.from_pretrained` takes tokenizer.json as it is.
            student_tokenizer: the student's fast tokenizer.
            strict: add the mass of a token to the tail if the student's first token is undetermined.

        Raises:
            ValueError: a tokenizer is not a fast one, or the bytes of its tokens cannot be determined.
        """
        teacher, student = _Vocabulary(teacher_tokenizer), _Vocabulary(student_tokenizer)
        self._teacher, self._student = teacher, student
        self._map_V = np.full(len(teacher.bytes), EMPTY, dtype=np.int32)
        spelled = [token for token, content in enumerate(teacher.bytes) if content]
        self._map_V[spelled] = student.first(teacher.bytes[token] for token in spelled)
        if strict:
            known = set(teacher.bytes)
            longer = [content for content in student.bytes if content and content not in known]
            beginnings = teacher.first(longer)
            self._map_V[[token for token in beginnings if token != EMPTY]] = EMPTY
        self._ends = (teacher.eos, student.eos)
        if teacher.eos is not None and student.eos is not None:
            self._map_V[teacher.eos] = student.eos
        self.vocab_size = len(student.bytes)
        self.coverage: float = float((self._map_V[spelled] != EMPTY).mean())
        """Share of the teacher's tokens whose mass finds a token of the student."""
        self.fingerprint = hashlib.sha256(self._map_V.tobytes()).hexdigest()

    def __call__(self, rows: Rows) -> Rows:
        """Return rows in the student's tokens.

        Raises:
            ValueError: the student's tokenizer changes the text (lower-cases it, say), so that bytes cannot be compared; the rows hold whole
                distributions; or completions are known, and every row has special tokens in between.
        """
        if "logprobs" in rows.columns:
            raise ValueError(
                "whole distributions are not projected onto another tokenizer; build the dataset with a top_k, or use FrequentTokens"
            )
        teacher = self._teacher
        ids_N = rows.columns["input_ids"]
        stops_R = rows.lengths_R.cumsum()
        starts_R, kept_R, texts = stops_R - rows.lengths_R, [], []
        left_out_R = np.zeros(len(starts_R), np.bool_)
        if "completion_mask" in rows.columns:
            left_out_R = self._has_turns(ids_N, starts_R, stops_R)
        for row, (start, stop) in enumerate(zip(starts_R, stops_R, strict=True)):
            if left_out_R[row]:
                continue
            try:
                texts.append(b"".join(teacher.bytes[i] for i in ids_N[start:stop]).decode())
                kept_R.append(row)
            except (UnicodeDecodeError, IndexError):  # or an id of a logit that is no token's
                continue
        parts = [
            self._align(rows, slice(starts_R[row], stops_R[row]), text, ids)
            for row, text, ids in zip(kept_R, texts, self._student.encode(texts), strict=True)
        ]
        source_M, ids_M, targets_M, completion_M = (
            np.concatenate([part[i] for part in parts]) if parts else np.zeros(0, np.int32)
            for i in range(4)
        )
        mask_M = source_M >= 0
        columns = {"input_ids": ids_M, "target_ids": targets_M, "mask": mask_M}
        if "completion_mask" in rows.columns:
            mask_M &= rows.columns["mask"][source_M]
            columns["completion_mask"] = completion_M
        topk_ids_NK, topk_logprobs_NK, tail_N = self._merge(rows)
        for name, values, nothing in (
            ("topk_indices", topk_ids_NK, EMPTY),
            ("topk_logprobs", topk_logprobs_NK, FLOAT16_MIN),
            ("tail_logprob", tail_N, FLOAT16_MIN),
            ("entropy", rows.columns["entropy"], 0.0),
        ):
            columns[name] = values[source_M]
            columns[name][~mask_M] = nothing
        lengths = np.array([len(part[1]) for part in parts], dtype=np.int64)
        return Rows(lengths_R=lengths, columns=columns)

    def _align(
        self, rows: Rows, where: slice, text: str, ids: list[int]
    ) -> tuple[Array, Array, Array, Array]:
        """For each of the student's positions in a row: the teacher's position that ends at the same byte, or −1; its id; its target;
        whether it is the completion's."""
        teacher, student = self._teacher, self._student
        content = text.encode()
        spelled = b"".join(student.bytes[i] for i in ids)
        lead = len(spelled) - len(content)  # sentencepiece puts a space before a text
        if lead not in (0, 1) or spelled[lead:] != content:
            raise ValueError(
                "the student's tokenizer does not spell a text as it is (it normalises it, or has no token for some bytes); "
                "use one without normalisation and with all bytes"
            )
        teacher_ends_T = teacher.num_bytes[rows.columns["input_ids"][where]].cumsum()
        ids_M = np.array(ids, dtype=np.int32)
        ends_M = student.num_bytes[ids_M].cumsum() - lead
        # The first of those that end there: a special token behind it has no bytes.
        found_M = np.minimum(np.searchsorted(teacher_ends_T, ends_M), len(teacher_ends_T) - 1)
        matches_M = teacher_ends_T[found_M] == ends_M
        targets_M = np.full(len(ids), NO_TARGET, dtype=np.int32)
        targets_M[:-1] = ids_M[1:]
        teacher_eos, student_eos = self._ends
        if len(ids) and matches_M[-1] and student_eos is not None:
            is_end = rows.columns["target_ids"][where][found_M[-1]] == teacher_eos
            targets_M[-1] = student_eos if is_end else NO_TARGET
        completion_M = np.zeros(len(ids), np.bool_)
        if len(ids) and "completion_mask" in rows.columns:
            mask_T, known_T = (
                rows.columns["completion_mask"][where],
                rows.columns["target_ids"][where] != NO_TARGET,
            )
            # Of each token itself, as a target. The first is none; as text of a prompt it is known where others are.
            of_prompts = (known_T & ~rows.columns["mask"][where])[:-1].any()
            known_T = np.append(mask_T[:1] | of_prompts, known_T[:-1])
            sizes_T, starts_M = np.diff(teacher_ends_T, prepend=0), np.append(0, ends_M[:-1])
            completion_M = _shares_bytes(mask_T, sizes_T, starts_M, ends_M)
            is_target_M = _shares_bytes(known_T, sizes_T, starts_M, ends_M)
            targets_M[:-1][~is_target_M[1:]] = NO_TARGET
        return np.where(matches_M, found_M + where.start, -1), ids_M, targets_M, completion_M

    def _has_turns(self, ids_N: Array, starts_R: Array, stops_R: Array) -> npt.NDArray[np.bool_]:
        """[R]: whether special tokens stand between tokens with bytes.

        Raises:
            ValueError: in every row, as in a corpus of chats; of a row that a teacher has written, it is an accident.
        """
        num_bytes = self._teacher.num_bytes
        # An id of a logit that is no token's is for `__call__` to leave out.
        is_known_N = ids_N < len(num_bytes)
        has_bytes_N = ~is_known_N | (num_bytes[np.where(is_known_N, ids_N, 0)] > 0)
        has_turns_R = np.zeros(len(starts_R), np.bool_)
        for row, (start, stop) in enumerate(zip(starts_R, stops_R, strict=True)):
            spelled = np.flatnonzero(has_bytes_N[start:stop])
            if len(spelled):
                has_turns_R[row] = not has_bytes_N[start + spelled[0] : start + spelled[-1]].all()
        if len(has_turns_R) and has_turns_R.all():
            raise ValueError(
                "the rows hold special tokens between others, as the turns of a chat do, and these have no bytes by which another "
                "tokenizer could be told of them; use FrequentTokens, or a teacher with the student's tokenizer"
            )
        return has_turns_R

    def _merge(self, rows: Rows) -> tuple[Array, Array, Array]:
        """Listed ids in the student's vocabulary, by falling probability; their log-probs; the tail with all that found no place."""
        ids_NK = rows.columns["topk_indices"]
        # Some teachers have more logits than tokens; some places are EMPTY.
        is_token_NK = (ids_NK >= 0) & (ids_NK < len(self._map_V))
        mapped_NK = np.where(is_token_NK, self._map_V[np.where(is_token_NK, ids_NK, 0)], EMPTY)
        mass_NK = np.exp(rows.columns["topk_logprobs"].astype(np.float64))
        lost_N = np.where(mapped_NK == EMPTY, mass_NK, 0).sum(-1)
        order_NK = np.argsort(mapped_NK, axis=-1, kind="stable")
        ids_NK, mass_NK = (np.take_along_axis(a, order_NK, -1) for a in (mapped_NK, mass_NK))
        # Equal ids stand together now; group g of a position sums into its place g. Ids 3 3 7 → groups 0 0 1.
        begins_NK = np.ones(ids_NK.shape, dtype=bool)
        begins_NK[:, 1:] = ids_NK[:, 1:] != ids_NK[:, :-1]
        num_positions, k = ids_NK.shape
        groups_NK = begins_NK.cumsum(-1) - 1 + k * np.arange(num_positions)[:, None]
        sums_NK = np.bincount(groups_NK.ravel(), mass_NK.ravel(), minlength=num_positions * k)
        merged_NK = np.full(num_positions * k, EMPTY, dtype=np.int32)
        merged_NK[groups_NK.ravel()] = ids_NK.ravel()
        sums_NK = np.where(merged_NK == EMPTY, 0, sums_NK).reshape(ids_NK.shape)
        merged_NK = np.where(sums_NK > 0, merged_NK.reshape(ids_NK.shape), np.int32(EMPTY))
        falling_NK = np.argsort(-sums_NK, axis=-1, kind="stable")
        merged_NK, sums_NK = (np.take_along_axis(a, falling_NK, -1) for a in (merged_NK, sums_NK))
        logprobs_NK = np.log(sums_NK, where=sums_NK > 0, out=np.full(sums_NK.shape, FLOAT16_MIN))
        tail_N = add_mass(rows.columns["tail_logprob"], lost_N)
        return merged_NK, logprobs_NK.astype(np.float32), tail_N


def _shares_bytes(flags_T: Array, sizes_T: Array, starts_M: Array, ends_M: Array) -> Array:
    """[M] bool: whether a token of the student has a byte of one of the teacher's tokens that are flagged."""
    marked = np.append(0, np.repeat(flags_T, sizes_T).cumsum())
    shared: Array = marked[ends_M] > marked[starts_M]
    return shared


class _Vocabulary:
    """The bytes of a tokenizer's tokens, and the tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = plain_tokenizer(tokenizer)
        self._backend.encode_special_tokens = True
        self.eos: int | None = getattr(tokenizer, "eos_token_id", None)
        self.bytes = _token_bytes(self._backend)
        """Of each id; empty for special tokens."""
        self.num_bytes = np.array([len(content) for content in self.bytes], dtype=np.int64)
        self._by_bytes = {content: token for token, content in enumerate(self.bytes) if content}
        self._longest = max(map(len, self.bytes), default=0)
        probe = b"".join(self.bytes[i] for i in self.encode(["a"])[0])
        self._cuts_as_written = probe == b"a"

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._backend.encode_special_tokens = True  # a pickled tokenizer forgets it

    def encode(self, texts: list[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def first(self, contents: Iterable[bytes]) -> list[int]:
        """The token with which the tokenizer begins each of these byte strings; EMPTY where none is a prefix."""
        contents = list(contents)
        texts = [_text(content) if self._cuts_as_written else None for content in contents]
        encoded = iter(self.encode([text for text in texts if text is not None]))
        found = []
        for content, text in zip(contents, texts, strict=True):
            ids = next(encoded) if text is not None else []
            begins = (
                bool(ids) and bool(self.bytes[ids[0]]) and content.startswith(self.bytes[ids[0]])
            )
            found.append(ids[0] if begins else self._longest_prefix(content))
        return found

    def _longest_prefix(self, content: bytes) -> int:
        for length in range(min(len(content), self._longest), 0, -1):
            if content[:length] in self._by_bytes:
                return self._by_bytes[content[:length]]
        return EMPTY


def _token_bytes(backend: Any) -> list[bytes]:
    """The bytes for which each id stands; empty for special tokens and for ids without a token.

    Raises:
        ValueError: the tokenizer is neither byte-level nor of the sentencepiece kind.
    """
    description = json.loads(backend.to_str())
    kinds = {
        node["type"] for part in ("pre_tokenizer", "decoder") for node in _nodes(description[part])
    }
    vocabulary = backend.get_vocab(with_added_tokens=True)
    contents = [b""] * (max(vocabulary.values()) + 1)
    if "ByteLevel" in kinds:
        alphabet = _byte_alphabet()
        for token, index in backend.get_vocab(with_added_tokens=False).items():
            contents[index] = bytes(
                alphabet[character] for character in token if character in alphabet
            )
    elif kinds & {"Metaspace", "ByteFallback"}:
        for token, index in backend.get_vocab(with_added_tokens=False).items():
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            contents[index] = bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
    else:
        raise ValueError(
            f"cannot tell the bytes of this tokenizer's tokens (it has {', '.join(sorted(kinds)) or 'no decoder'}; "
            "expected ByteLevel, Metaspace or ByteFallback)"
        )
    for index, token in backend.get_added_tokens_decoder().items():
        contents[index] = b"" if token.special else token.content.encode()
    return contents


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes (Radford et al. 2019): printable ones as they are, the rest from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(rest)
    }


def _nodes(node: Any) -> Iterable[dict[str, Any]]:
    """All typed parts of a tokenizer's description."""
    if isinstance(node, dict):
        if "type" in node:
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _nodes(child)


def _text(content: bytes) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None
