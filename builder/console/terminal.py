"""What the commands have in common at the terminal: progress, notices, the device, datasets by name, and the next command."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from builder.console.options import Device


class UsageError(ValueError):
    """The command line is wrong."""

    exit_code = 2


def local_directory(dataset: str, revision: str | None, *files: str) -> Path:
    """The directory of a dataset; of one on the Hub, what describes it is fetched, and these files."""
    if Path(dataset).exists():
        if revision is not None:
            raise UsageError(
                f"--revision is for datasets on the Hub, but {dataset} is a directory; leave it out"
            )
        return Path(dataset)
    from builder.hub.limits import REPO_ID
    from builder.hub.repository import fetch

    if not REPO_ID.fullmatch(dataset):
        return Path(dataset)  # and let the command say that it is not there
    quiet_libraries()
    return fetch(dataset, revision or "main", *files)


def say(text: object, *, to_stderr: bool = False) -> None:
    """Print lines, in which nothing steers the terminal, wherever it comes from."""
    from builder.dataset.printable import lines

    print(lines(text), file=sys.stderr if to_stderr else sys.stdout)


def say_json(values: Any) -> None:
    """Print JSON whose strings hold no such characters, but escapes of them."""
    import json

    from builder.dataset.printable import json_lines

    print(json_lines(json.dumps(values, indent=1, ensure_ascii=False)))


def say_published(name: str, tag: str, commit: str, is_new: bool) -> None:
    """Name a version on the Hub, and how to load it."""
    say(f"{name} {tag} {'is published' if is_new else 'was published already'}, commit {commit}")
    say(f'next: load_dataset("{name}", revision="{tag}", split="train")')


def notice(message: str) -> None:
    """A line on stderr, above any bar."""
    from tqdm import tqdm

    from builder.dataset.printable import lines

    tqdm.write(lines(message), file=sys.stderr)


def program() -> str:
    """How to call this program again: by its name, or as it was called where the name alone is not found."""
    called = Path(sys.argv[0])
    if called.name != "logit-dataset" or shutil.which(called.name):
        return "logit-dataset"
    return str(called)


def choose_device(device: Device) -> str:
    """The torch device that was asked for.

    Raises:
        ValueError: there is none such.
    """
    import torch

    if device is Device.AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device is Device.CUDA and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda, but torch finds no CUDA device; use --device cpu, or install a CUDA build of torch"
        )
    return device.value


def quiet_libraries() -> None:
    """Leave stderr to our own messages and bars."""
    import logging
    import warnings

    # Texts are tokenized on all cores. Said in so many words, it keeps the library from warning of processes that fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore")
    import datasets
    import huggingface_hub
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    # Retries are announced in two lines each, which name addresses that are signed.
    huggingface_hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    datasets.utils.logging.disable_progress_bar()
