"""The last layer of a teacher → `teacher_head.safetensors` beside the data, what the manifest says of it, and whether the data are of it.

Out:  the same bytes for the same weights, whole or not at all.

Cost: to compare, a product of POSITIONS rows with the head.

Shape suffixes: P positions, E entries that are stored of each, V vocabulary, D hidden.
"""

import secrets
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import save
from torch import Tensor

from builder.dataset.shards import atomic_file, file_sha256, nested_values
from logit_dataset.hidden.head import TeacherHead, head_tensors, parse_head, read_head
from logit_dataset.schema import FLOAT16_MIN, HEAD_FILE

POSITIONS, FILES = 64, 4
"""That are compared, in all."""
WIDE = ("hidden_states", "logprobs", "topk_indices", "topk_logprobs")


def write_head(output: Path, head: TeacherHead) -> None:
    """Write the file into a dataset's directory. Several processes may do so at once."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in head_tensors(head).items()}
    with atomic_file(output / HEAD_FILE, writer=secrets.token_hex(4)) as sink:
        sink.write(save(tensors))


def describe(head: TeacherHead) -> dict[str, Any]:
    """What the manifest says of a head."""
    return {
        "dtype": str(head.weight_VD.dtype).removeprefix("torch."),
        "has_bias": head.bias_V is not None,
        "scale": head.scale,
        "softcap": head.softcap,
    }


def head_record(output: Path, licence: str | None) -> dict[str, Any]:
    """What a manifest says of the file in a directory; {} where there is none.

    Args:
        output: the directory of the dataset.
        licence: of the teacher.

    Raises:
        ValueError: the file is no head.
    """
    path = output / HEAD_FILE
    if not path.exists():
        return {}
    record = {"file": HEAD_FILE, "sha256": file_sha256(path), "bytes": path.stat().st_size}
    return {"teacher_head": {**record, **describe(parse_head(path)), "license": licence}}


def open_head(directory: Path, record: dict[str, Any]) -> TeacherHead:
    """The head in a directory, if it is the one that the manifest records.

    Raises:
        ValueError: it is another file, or not a head.
        OSError: it cannot be read.
    """
    return read_head(directory / HEAD_FILE, record)


def mean_divergence(head: TeacherHead, files: list[Path]) -> float:
    """Mean KL in nats from stored distributions, whose rest is one entry, to what a head makes of the hidden states beside them.

    Args:
        head: of the dataset.
        files: of its data, that can be read. The first positions of a few are compared; 0 where there are none.
    """
    parts: list[Tensor] = []
    for path in files[:: max(1, len(files) // FILES)][:FILES]:
        file, wanted = pq.ParquetFile(path), POSITIONS // FILES
        names = [name for name in WIDE if name in file.schema_arrow.names]
        for row in file.iter_batches(batch_size=1, columns=names):
            columns = {name: nested_values(row.column(name))[:wanted] for name in names}
            if not len(columns["hidden_states"]):
                continue
            parts.append(_divergence(head, {n: torch.tensor(v) for n, v in columns.items()}))
            wanted -= len(parts[-1])
            if not wanted:
                break
    return float(torch.cat(parts).mean()) if parts else 0.0


def _divergence(head: TeacherHead, columns: dict[str, Tensor]) -> Tensor:
    """[P]: Σ p log(p/q) − p + q, which rounding moves in second order only."""
    logq_PE = head(columns["hidden_states"]).double().log_softmax(-1)
    logp_PE = columns.get("logprobs", columns.get("topk_logprobs"))
    assert logp_PE is not None
    logp_PE = logp_PE.double()
    if "topk_indices" in columns:
        logq_PE = logq_PE.gather(1, columns["topk_indices"].long())
    rest = [(1 - one.exp().sum(-1, keepdim=True)).clamp(min=1e-9).log() for one in (logp_PE, logq_PE)]  # fmt: skip
    logp_PE, logq_PE = (torch.cat(pair, -1) for pair in zip((logp_PE, logq_PE), rest, strict=True))
    difference_PE = logp_PE - logq_PE.clamp(min=FLOAT16_MIN)
    return (logp_PE.exp() * difference_PE - logp_PE.exp() + logq_PE.exp()).sum(-1)
