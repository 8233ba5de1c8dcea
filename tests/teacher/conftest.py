"""Saved checkpoints that are changed in one way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.teacher.test_model import save

Weights = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def write(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., Path]:
    """Save a model, then change its weights and its config.json."""

    def write(
        model: Any,
        weights: Callable[[Weights], None] | None = None,
        config: dict[str, Any] | None = None,
        name: str = "tiny",
    ) -> Path:
        directory = save(model, tiny_tokenizer, tmp_path / name)
        if weights:
            stored = load_file(directory / "model.safetensors")
            weights(stored)
            save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        if config:
            path = directory / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return directory

    return write
