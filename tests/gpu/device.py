"""Where the tests of this folder run: on a GPU, or, to see that they are right themselves, on what GPU_TEST_DEVICE names.

They need a checkout, torch, transformers, datasets and pytest, and neither the network nor `make`:

    python -m pytest -m gpu tests/gpu
"""

import os

import pytest

DEVICE = os.environ.get("GPU_TEST_DEVICE", "cuda")
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="about CUDA alone")
