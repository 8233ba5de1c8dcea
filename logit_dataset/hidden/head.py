"""What a dataset with hidden states holds of its teacher → all of the teacher's logits again.

In:   `teacher_head.safetensors`, which stands beside the data and the manifest's `teacher_head` describes.
Out:  a TeacherHead, which turns stored hidden states into logits over the whole vocabulary.

How:  logits = softcap · tanh(scale · (h Wᵀ + b) / softcap), or scale · (h Wᵀ + b) where the teacher caps nothing. The file has `weight` [V, D]
      and `bias` [V], if there is one, in the teacher's dtype, and `logit_scale` and, if there is one, `logit_softcap` as float64 numbers.
      The builder has compared that formula with the teacher's own code. The file is mapped, not read, and parsed here, for the reader needs no
      safetensors.

Cost: the SHA-256 of the file when it is loaded, a second for 1.8 GB.

Shape suffixes: N positions, C those of a chunk, V vocabulary, D hidden.
"""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from logit_dataset.files import first_line
from logit_dataset.load import http_error, load_manifest
from logit_dataset.schema import HEAD_FILE

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of safetensors, those that are read here."""
MAX_HEADER_BYTES = 2**16
ROWS_AT_ONCE = 16_384
"""Rows of a 16-bit weight that are in float32 at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherHead:
    """The teacher's last layer. Call it with hidden states [N, D] for raw logits [N, V] in float32 (float64 for float64 input)."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """V, the number of logits."""
        return len(self.weight_VD)

    @property
    def hidden_size(self) -> int:
        """D, the width of hidden states."""
        return self.weight_VD.shape[1]

    def to(self, device: Any) -> Self:
        """Return the head on a device. Losses need it on the device of the logits."""
        bias_V = None if self.bias_V is None else self.bias_V.to(device)
        return replace(self, weight_VD=self.weight_VD.to(device), bias_V=bias_V)

    @torch.no_grad()
    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Compute raw logits, as the class says.

        Raises:
            ValueError: the hidden states have another width.
        """
        if hidden_ND.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden states have {hidden_ND.shape[-1]} values, but this head takes {self.hidden_size}; load the head of the same dataset"
            )
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        hidden_ND = hidden_ND.to(dtype)
        if self.weight_VD.dtype == dtype:
            logits_NV = hidden_ND @ self.weight_VD.T
        else:
            logits_NV = hidden_ND.new_empty(len(hidden_ND), self.vocab_size)
            for start in range(0, self.vocab_size, ROWS_AT_ONCE):
                rows = slice(start, start + ROWS_AT_ONCE)
                logits_NV[:, rows] = hidden_ND @ self.weight_VD[rows].to(dtype).T
        if self.bias_V is not None:
            logits_NV += self.bias_V
        if self.scale != 1:
            logits_NV *= self.scale
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV


def load_teacher_head(path_or_repo: str | Path, *, revision: str | None = None) -> TeacherHead:
    """Load the head of a dataset's teacher and check it against the manifest. From the Hub, only this file is downloaded.

    Args:
        path_or_repo: directory of a dataset, or its name on the Hub.
        revision: tag, branch or commit on the Hub; None: the main branch.

    Raises:
        ValueError: the dataset does not exist, has no head, or the head is damaged.
    """
    where = f"{path_or_repo}@{revision}" if revision else str(path_or_repo)
    manifest = load_manifest(path_or_repo, revision=revision)
    record = manifest.get("teacher_head")
    if not isinstance(record, dict):
        raise ValueError(
            f"{where} has no {HEAD_FILE}; it comes with [output] hidden_states = true, where the teacher's head is a linear layer, and not in datasets of before. "
            "A TeacherHead can be made of the teacher's own weights, too"
        )
    try:
        head = read_head(_file(path_or_repo, revision), record)
    except FileNotFoundError:
        raise ValueError(f"{where}: {HEAD_FILE} is missing; fetch it again") from None
    except (ValueError, OSError, http_error()) as error:
        raise ValueError(
            f"{where}: {HEAD_FILE} cannot be used ({first_line(error)}); fetch it again"
        ) from None
    found, expected = (
        (head.vocab_size, head.hidden_size),
        tuple(manifest["teacher"].get(name) for name in ("vocab_size", "hidden_size")),
    )
    if found != expected:
        raise ValueError(
            f"{where}: {HEAD_FILE} is {found[0]} × {found[1]}, the teacher {expected[0]} × {expected[1]}; fetch it again"
        )
    return head


def _file(path_or_repo: str | Path, revision: str | None) -> Path:
    if Path(path_or_repo).is_dir():
        return Path(path_or_repo) / HEAD_FILE
    from huggingface_hub import hf_hub_download

    repo = str(path_or_repo)
    return Path(hf_hub_download(repo, HEAD_FILE, repo_type="dataset", revision=revision))


def read_head(path: Path, record: dict[str, Any]) -> TeacherHead:
    """Read the head from a file that has the size and hash of its record.

    Args:
        path: of the file.
        record: `teacher_head` of the manifest.

    Raises:
        ValueError: the file is another one, or holds no head.
        OSError: the file cannot be read.
    """
    if (size := path.stat().st_size) != record.get("bytes"):
        raise ValueError(f"it has {size:,} bytes, the manifest says {record.get('bytes')}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != record.get("sha256"):
            raise ValueError("its content does not have the hash in the manifest")
    return parse_head(path)


def parse_head(path: Path) -> TeacherHead:
    """Read the head from a file.

    Raises:
        ValueError: the file holds no head.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError("it is not a safetensors file of a head")
        try:
            header = json.loads(file.read(length))
            entries = {name: header[name] for name in header if name != "__metadata__"}
            found = {name: _Entry.of(entry) for name, entry in entries.items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"its header is damaged ({first_line(error)})") from None
    start = 8 + length
    if max((entry.end for entry in found.values()), default=0) != size - start:
        raise ValueError("its header does not describe all of it")
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    tensors = {name: entry.of_content(content[start:]) for name, entry in found.items()}
    return _head_of(tensors)


def head_tensors(head: TeacherHead) -> dict[str, Tensor]:
    """What stands in the file of a head."""
    tensors = {
        "weight": head.weight_VD,
        "logit_scale": torch.tensor(head.scale, dtype=torch.float64),
    }
    if head.bias_V is not None:
        tensors["bias"] = head.bias_V
    if head.softcap is not None:
        tensors["logit_softcap"] = torch.tensor(head.softcap, dtype=torch.float64)
    return tensors


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Self:
        dtype, shape, (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        numbers = (*shape, start, end)
        if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
            raise ValueError("a shape or an offset is not a whole number")
        if end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"a tensor of {end - start} bytes cannot be {entry['dtype']} {shape}")
        return cls(dtype, tuple(shape), start, end)

    def of_content(self, content: Tensor) -> Tensor:
        part = content[self.start : self.end]
        if part.data_ptr() % self.dtype.itemsize:
            part = part.clone()
        return part.view(self.dtype).view(self.shape)


def _head_of(tensors: dict[str, Tensor]) -> TeacherHead:
    known = {"weight", "bias", "logit_scale", "logit_softcap"}
    if unknown := sorted(tensors.keys() - known):
        raise ValueError(f"it holds {unknown[0]!r}, which this version does not know")
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.ndim != 2 or not weight.numel():
        raise ValueError("it holds no weight [V, D]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"it holds a bias {tuple(bias.shape)} for {len(weight)} ids")
    numbers: dict[str, float | None] = {}
    for name in ("logit_scale", "logit_softcap"):
        number = tensors.get(name)
        if number is not None and (number.numel() != 1 or not 0 < abs(float(number)) < math.inf):
            raise ValueError(f"its {name} is not a number other than 0")
        numbers[name] = None if number is None else float(number)
    if (scale := numbers["logit_scale"]) is None:
        raise ValueError("it holds no logit_scale")
    return TeacherHead(weight_VD=weight, bias_V=bias, scale=scale, softcap=numbers["logit_softcap"])
