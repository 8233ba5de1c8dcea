"""A built dataset → parts for the students, and what a dataset does not hold: the whole distribution, and samples of it.

In:   a finished dataset, its teacher, and the student's vocabulary.
Out:  in a directory of its own: `whole.npy` [N, n + 1] float16, log-probabilities of all positions over the student's vocabulary; and a
      dataset each for train, quarter, validation and test, with the columns of the built one and two more:

      samples        [T, 50] ids drawn from the teacher, with replacement: what fifty calls of an API give
      position       [T] the row of `whole.npy`, and of the files of `splits.draws`

How:  the teacher runs once more over the rows, in the batches of the build, so that a 16-bit one rounds alike. Every
      value that the dataset stores is compared with it: both must speak of the same distribution. Draws are by the inverse of the
      float64 distribution function, seeded by the shard. A shard is done when its `.npz` stands.

Cost: the teacher's forward pass, and 0.3 ms a position for the draws.

Shape suffixes: N positions of a shard, P those of a piece, V teacher's vocabulary, K top-k, S samples.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from builder.corpus.sequences import length_sorted_batches
from builder.dataset.lookup import teacher_source
from builder.dataset.manifest import read_manifest, write_json
from builder.dataset.shards import atomic_file, file_sha256, footer_sha256, nested_values
from builder.teacher.loading import load_teacher
from builder.teacher.model import Teacher
from examples.experiment.corpus import PARTS, in_quarter, part_of
from examples.experiment.splits.draws import (
    HEADS,
    MOST_DRAWS,
    SplitDraws,
    document_uniforms,
    nested,
    open_whole,
)
from logit_dataset import FrequentTokens
from logit_dataset.schema import FLOAT16_MIN, float16_rounding

SAMPLES = 50
SEED = 20261125
ROW_GROUP_ROWS = 128
PIECE_ROWS = 128
"""Positions whose distributions are worked on at once."""
LAST_PART = "quarter"
"""The part that is written last: where its manifest stands, all is there."""
MAX_ERROR = 0.05
"""Nats. The build makes the best logits right and leaves those of the tail rounded to 16 bits (`capture.rounding`); here all are right, by
which the tail and the log-partition move a little: by 0.003 and 0.002 in the first shard."""
Array = npt.NDArray[Any]


def student_vocabulary(dataset: Path, num_kept: int) -> FrequentTokens:
    """The ids that are most frequent in the training documents, and other."""
    manifest = read_manifest(dataset)
    counts_V = np.zeros(manifest["teacher"]["vocab_size"], dtype=np.int64)
    for shard in manifest["shards"]:
        table = pq.read_table(
            dataset / shard["file"], columns=["id", "input_ids"], page_checksum_verification=True
        )
        table = table.filter([part_of(name) == "train" for name in table["id"].to_pylist()])
        counts_V += np.bincount(nested_values(table["input_ids"]), minlength=len(counts_V))
    return FrequentTokens(counts_V, num_kept, always_keep=[manifest["teacher"]["eos_token_id"]])


def write_truth(
    dataset: Path,
    work: Path,
    *,
    num_kept: int,
    teacher_path: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Run the teacher over the dataset again and write the parts; resumes where it was stopped.

    Args:
        dataset: a finished dataset.
        work: directory of what is written.
        num_kept: n, of the student's vocabulary.
        teacher_path: of the teacher, where the recipe names a directory.
        progress: told of the tokens of each shard.

    Raises:
        ValueError: the teacher does not say what the dataset holds, or `work` is of another dataset.
    """
    manifest = read_manifest(dataset)
    projection = student_vocabulary(dataset, num_kept)
    made_of = {
        "dataset": manifest["fingerprint"],
        "vocabulary": projection.fingerprint,
        "samples": [SAMPLES, SEED],
        "splits": [list(HEADS), MOST_DRAWS],
    }
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "made_of.json").exists():
        write_json(work / "made_of.json", made_of)
    elif json.loads((work / "made_of.json").read_text()) != made_of:
        raise ValueError(
            f"{work} was made of another dataset or vocabulary; remove it, or choose another directory"
        )
    last = work / LAST_PART / "manifest.json"
    # Those of an earlier version say less of their files than is read now: they are written again.
    if last.exists() and "sha256" in json.loads(last.read_text())["shards"][0]:
        return
    num_tokens = sum(shard["tokens"] for shard in manifest["shards"])
    whole = open_whole(work / "whole.npy", (num_tokens, projection.vocab_size), "f2")
    splits = SplitDraws(work, num_tokens)
    teacher, tables, start = None, [], 0
    for number, shard in enumerate(manifest["shards"]):
        table = pq.read_table(dataset / shard["file"], page_checksum_verification=True)
        stop = start + shard["tokens"]
        cache = work / f"{Path(shard['file']).stem}.npz"
        if not cache.exists():
            teacher = teacher or _teacher(manifest, teacher_path)
            uniform = np.random.default_rng((SEED, number)).random((shard["tokens"], SAMPLES))
            samples = _ask(
                teacher,
                table,
                whole[start:stop],
                torch.from_numpy(uniform),
                splits,
                start,
                seed=manifest["recipe"]["output"]["seed"],
                kept=torch.from_numpy(projection.kept),
                batch_tokens=manifest["recipe"]["sequences"]["batch_tokens"],
                where=shard["file"],
            )
            whole.flush()
            splits.flush()
            _save(cache, samples=samples)
            progress(shard["tokens"])
        with np.load(cache) as columns:
            position = np.arange(start, stop, dtype=np.int32)
            tables.append(_extended(table, {**columns, "position": position}))
        start = stop
    _write_parts(pa.concat_tables(tables), manifest, work)


@torch.inference_mode()
def _ask(
    teacher: Teacher,
    table: pa.Table,
    whole_NS: Array,
    uniform_NS: Tensor,
    splits: SplitDraws,
    start: int,
    *,
    seed: int,
    kept: Tensor,
    batch_tokens: int,
    where: str,
) -> Array:
    """What the teacher says at the positions of a shard: fills `whole_NS`, and `splits` from `start` on; returns samples [N, S]."""
    stored = {
        name: np.array(nested_values(table[name]))
        for name in table.column_names
        if pa.types.is_list(table[name].type)
    }
    ids_N = torch.from_numpy(stored["input_ids"]).long()
    lengths = np.asarray(table["input_ids"].combine_chunks().value_lengths())
    # What follows the last position of a row is not in the row; there the target is not compared.
    stored["target_logprob"][lengths.cumsum() - 1] = np.nan
    drawn_NS = np.empty(uniform_NS.shape, dtype=np.int32)
    names, chunks = table["id"].to_pylist(), table["chunk_index"].to_numpy()
    split_NS = document_uniforms(seed, names, chunks, lengths)
    for here, logits_PV in _pieces(teacher, ids_N, lengths, batch_tokens):
        logp_PV = logits_PV.log_softmax(-1)
        top_PK = torch.from_numpy(stored["topk_indices"][here]).long()
        tail_PV = logp_PV.scatter(1, top_PK, -torch.inf)
        next_P1 = ids_N[np.minimum(here + 1, len(ids_N) - 1)][:, None]
        drawn_PM = torch.from_numpy(stored["tail_indices"][here]).long()
        expected = {
            "topk_logprobs": logp_PV.gather(1, top_PK),
            "tail_logprobs": tail_PV.gather(1, drawn_PM),
            "tail_logprob": tail_PV.logsumexp(-1),
            "logsumexp": logits_PV.logsumexp(-1),
            "target_logprob": logp_PV.gather(1, next_P1)[:, 0],
        }
        for name, values in expected.items():
            _compare(stored[name][here], values, f"{where}: {name}")
        whole_NS[here] = project(logp_PV, kept).clamp(min=FLOAT16_MIN).half().numpy()
        drawn_NS[here] = draw(logp_PV, uniform_NS[here])
        splits.fill(start + here, logp_PV, top_PK, split_NS[here])
    return drawn_NS


def _pieces(
    teacher: Teacher, ids_N: Tensor, lengths: Array, batch_tokens: int
) -> Iterator[tuple[Array, Tensor]]:
    """Positions [P], and the teacher's logits there in float32."""
    starts = lengths.cumsum() - lengths
    for rows in length_sorted_batches(lengths.tolist(), batch_tokens):
        sequences = [ids_N[starts[r] : starts[r] + lengths[r]].tolist() for r in rows]
        positions = np.concatenate([np.arange(starts[r], starts[r] + lengths[r]) for r in rows])
        for logits_PV in teacher.logits(sequences):
            for part_PV in logits_PV.split(PIECE_ROWS):
                yield positions[: len(part_PV)], part_PV.float()
                positions = positions[len(part_PV) :]


def project(logp_PV: Tensor, kept: Tensor) -> Tensor:
    """[P, n + 1]: log-probabilities of the kept ids, and of all others together."""
    other_P = logp_PV.index_fill(1, kept, -torch.inf).logsumexp(-1)
    return torch.cat([logp_PV.index_select(1, kept), other_P[:, None]], dim=1)


def draw(logp_PV: Tensor, uniform_PS: Tensor) -> Array:
    """[P, S] int32: ids in proportion to exp(logp), which need not sum to 1, for numbers from 0 to 1 in float64."""
    cumulated_PV = (logp_PV - logp_PV.amax(-1, keepdim=True)).exp().double().cumsum(-1)
    # The first id whose cumulated mass exceeds u: one of mass 0 never does so first.
    ids_PS = torch.searchsorted(cumulated_PV, uniform_PS * cumulated_PV[:, -1:], right=True)
    return ids_PS.clamp(max=logp_PV.shape[1] - 1).int().numpy()


def _compare(stored: Array, expected: Tensor, what: str) -> None:
    values = expected.double().clamp(min=FLOAT16_MIN).numpy()
    error = np.abs(stored.astype(np.float64) - values) - float16_rounding(values)
    worst = error[~np.isnan(stored)].max(initial=0.0)
    if not worst <= MAX_ERROR:
        raise ValueError(
            f"{what} is {worst:.3g} nats beyond rounding from what the teacher says now, more than "
            f"{MAX_ERROR:g}; build the dataset again on this machine"
        )


def _teacher(manifest: dict[str, Any], path: Path | None) -> Teacher:
    source, recipe = teacher_source(manifest, path), manifest["recipe"]["teacher"]
    return load_teacher(
        source.location,
        dtype=recipe["dtype"],
        attention=recipe["attention"],
        head_dtype="float32" if manifest["teacher"].get("head_dtype") else "teacher",
    )


def _extended(table: pa.Table, columns: dict[str, Array]) -> pa.Table:
    lengths = np.asarray(table["input_ids"].combine_chunks().value_lengths())
    for name, values in columns.items():
        table = table.append_column(name, nested(values, lengths))
    return table


def _write_parts(table: pa.Table, manifest: dict[str, Any], work: Path) -> None:
    """A dataset a part, that `load_logits` reads like any other."""
    ids = table["id"].to_pylist()
    chosen = {part: [part_of(name) == part for name in ids] for part in PARTS}
    chosen[LAST_PART] = [part_of(name) == "train" and in_quarter(name) for name in ids]
    file = "data/train-000-00000.parquet"
    for part, rows in chosen.items():
        if not any(rows):
            raise ValueError(f"no document is in the part {part!r}; take a longer corpus")
        (work / part / "data").mkdir(parents=True, exist_ok=True)
        here = table.filter(rows)
        with atomic_file(work / part / file) as sink:
            pq.write_table(
                here,
                sink,
                row_group_size=ROW_GROUP_ROWS,
                compression="zstd",
                use_dictionary=False,
                write_page_checksum=True,
                column_encoding={
                    f"{name}.list.element.list.element": "BYTE_STREAM_SPLIT"
                    for name in ("topk_indices", "samples", "tail_indices")
                },
            )
        size = {"rows": len(here), "tokens": len(nested_values(here["input_ids"]))}
        record = {
            "file": file,
            "sha256": file_sha256(work / part / file),
            "footer_sha256": footer_sha256(work / part / file),
            "bytes": (work / part / file).stat().st_size,
            **size,
        }
        described = {**manifest, "totals": {**manifest["totals"], **size}, "shards": [record]}
        write_json(work / part / "manifest.json", described)


def _save(path: Path, **arrays: Array) -> None:
    partial = path.with_name(f".{path.name}")  # np.savez would put .npz behind another ending
    np.savez(partial, **arrays)
    os.replace(partial, path)
