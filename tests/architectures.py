"""Every causal and every multimodal type that transformers maps, tiny and random: is a row of a mixed batch what the model says of it alone?

In:   `python -m tests.architectures [--csv FILE] [--only NAME …]`
Out:  one line a type: right, refused (with the line that a user would see), wrong, crash, or cannot be made tiny (with the reason);
      the same as CSV. It exits with 1 if any is wrong or crashes.

How:  the default configuration of a type is made tiny (`tiny_models`), and random weights are saved with `save_pretrained`, together
      with a small tokenizer. `load_teacher` loads that with a recipe's defaults, and the pipeline of a build captures documents of very
      different lengths in as few batches as it may. The truth is the model's own class, on one document at a time, by no code of ours,
      in float32. Each type has a process of its own, so one that dies is only one.

Cost: about two seconds a type on one core: eight minutes for all.
"""

import argparse
import copy
import csv
import os
import signal
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from builder.capture.guard import Guard
from builder.capture.pipeline import Pipeline
from builder.corpus.sequences import NO_TOKEN, Sequence
from builder.teacher.loading import load_teacher
from logit_dataset.schema import FLOAT16_MIN, Layout, float16_rounding
from tests.tiny_models import VARIANTS, small_tokenizer, tiny_config, tiny_model

LENGTHS = (40, 13, 5, 1, 33, 21)
"""Of the documents: beyond every window and chunk of the tiny models, on both sides of their borders, and down to a single token."""
MAX_ERROR = 5e-4
"""Nats beyond the rounding of float16. Right ones are below 1e-4."""
MIN_SPREAD = 0.1
"""Standard deviation of log-probabilities, so that MAX_ERROR is little of it."""
TIMEOUT_SECONDS = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How it went with one type."""

    name: str
    verdict: str
    """`right`, `refused`, `wrong`, `crash` or `not tiny`."""
    architecture: str = ""
    attention: str = ""
    head: str = ""
    """`alone`, or `whole` where every sequence runs alone, through the whole model."""
    batches: str = ""
    """How many documents shared each batch."""
    error: str = ""
    """Largest |Δ log-probability| beyond float16 rounding, in nats."""
    line: str = ""
    """Why, where it is not right."""


WHOLE = "+whole"
"""At the end of a name: the type's class with its towers, where there is one for text alone, too."""
MULTIMODAL = [
    name + WHOLE * (name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for name, whole in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.items()
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name) != whole
]
"""Types that read pictures or sound, too."""
NAMES = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS, *MULTIMODAL]
COLUMNS = [field.name for field in fields(Result)]


def documents() -> list[list[int]]:
    """Token ids of some documents."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in LENGTHS]


def check(name: str, directory: Path) -> Result:
    """Build, save and load a tiny model of a type (or variant), and compare."""
    model_type, changes = VARIANTS.get(name, (name.removesuffix(WHOLE), {}))
    try:
        config = tiny_config(model_type, **changes)
        family = AutoModelForMultimodalLM if name in MULTIMODAL else AutoModelForCausalLM
        model = tiny_model(config, family)
        expected, why_not = _expected(model)
        model.save_pretrained(directory)
        config.save_pretrained(directory)  # of the whole, where the model is a part of it
        small_tokenizer().save_pretrained(directory)
    except Exception as error:
        return Result(name=name, verdict="not tiny", line=_line(error))
    found = {"name": name, "architecture": type(model).__name__}
    try:
        teacher = load_teacher(str(directory))
        found["attention"] = teacher.provenance()["attention"]
        found["head"] = "alone" if teacher.head_only else "whole"
        sizes, logprobs_NV = _captured(teacher)
        found["batches"] = " ".join(map(str, sizes))
    except ValueError as error:
        return Result(**found, verdict="refused", line=_line(error))
    except Exception as error:
        return Result(**found, verdict="crash", line=f"{type(error).__name__}: {_line(error)}")
    if not expected:
        return Result(**found, verdict="not tiny", line=why_not)
    expected_NV = torch.cat(expected).double().log_softmax(-1).clamp(min=FLOAT16_MIN)
    if (spread := float(expected_NV.std())) < MIN_SPREAD:
        why = f"its log-probabilities are all the same ± {spread:.2g}, so that nothing would be noticed"
        return Result(**found, verdict="not tiny", line=why)
    rounding = torch.from_numpy(float16_rounding(expected_NV.numpy()))
    error = float(((logprobs_NV.double() - expected_NV).abs() - rounding).max())
    verdict = "right" if error <= MAX_ERROR else "wrong"
    return Result(**found, verdict=verdict, error=f"{max(error, 0):.1g}")


def _expected(model: Any) -> tuple[list[torch.Tensor], str]:
    """[T, V] of each document, or why the model has none."""
    if type(model).__name__ == "Llama4ForConditionalGeneration":
        model = model.language_model  # without a picture, its own forward method fails
    try:
        with torch.inference_mode():
            return [_alone(model, ids) for ids in documents()], ""
    except Exception as error:
        return [], _line(error)


def _alone(model: Any, ids: list[int]) -> torch.Tensor:
    """[T, V] of one document, of a model that has seen no other, called as anyone would."""
    try:
        output = copy.deepcopy(model)(torch.tensor([ids]))
    except (AttributeError, RuntimeError, ValueError):  # some cannot make the cache for themselves
        output = copy.deepcopy(model)(torch.tensor([ids]), use_cache=False)
    logits: torch.Tensor = output.logits[0]
    return logits


def _captured(teacher: Any) -> tuple[list[int], torch.Tensor]:
    """What a build keeps of the documents: how many shared each batch, and all log-probabilities."""
    layout = Layout(top_k="all", vocab_size=teacher.vocab_size)
    guard = Guard()
    pipeline = Pipeline(teacher, layout=layout, batch_tokens=4096, guard=guard)
    sequences = [
        Sequence(document_id=str(i), chunk_index=0, text="", token_ids=ids, next_token=NO_TOKEN)
        for i, ids in enumerate(documents())
    ]
    sizes: list[int] = []
    guard.choose = lambda batch: sizes.append(len(batch))  # the truth is looked at below
    blocks = list(pipeline.blocks(iter(sequences)))
    return sizes, torch.cat([block.distribution["logprobs"] for block in blocks])


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def in_a_process(name: str) -> Result:
    """`check` in a fork of this process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(TIMEOUT_SECONDS)
        status = 1
        try:
            with tempfile.TemporaryDirectory() as directory, os.fdopen(write, "w") as pipe:
                result = check(name, Path(directory) / "teacher")
                csv.writer(pipe).writerow(asdict(result).values())
            status = 0
        finally:
            os._exit(status)  # nothing else of this process happens twice
    os.close(write)
    with os.fdopen(read) as pipe:
        rows = list(csv.reader(pipe))
    _, status = os.waitpid(child, 0)
    if not rows:
        return Result(name=name, verdict="crash", line=f"its process ended with status {status}")
    return Result(**dict(zip(COLUMNS, rows[0], strict=True)))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write all results there")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these types, rather than all")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    names = arguments.only or NAMES
    results = []
    for name in names:
        results.append(result := in_a_process(name))
        print(
            f"{result.name:28}{result.verdict:9}{result.attention:6}{result.head:6}{result.batches:13}{result.error:9}{result.line}",
            flush=True,
        )
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            file.write(f"# transformers {transformers.__version__}, torch {torch.__version__}\n")
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(result) for result in results)
    counts = Counter(result.verdict for result in results)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    return int(bool(counts["wrong"] + counts["crash"]))


if __name__ == "__main__":
    sys.exit(main())
