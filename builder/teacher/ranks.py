"""A teacher, loaded: in this process, or split over several, one a device, by transformers' tensor parallelism.

In:   where the teacher is, and over how many devices it is split.
Out:  a Teacher. Who uses it does not notice how it is split.

How:  with `tensor_parallel = n`, this process is rank 0 and starts n − 1 others, which load the same teacher. transformers
      gives each rank a slice of the weights (`tp_plan="auto"`) and sums or gathers what the slices yield, so every forward
      pass must happen on all ranks, in the same order. Rank 0 says over a pipe what it is about to run, and the others run
      it too and drop the result. They end with rank 0, for their pipe then closes; if one of them dies, rank 0 ends, for it
      could wait for ever for an answer.

Cost: a message of some kB a batch. The others need no tokenizer threads and write nothing.
"""

import atexit
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import transformers
from transformers.distributed.configuration_utils import DistributedConfig

from builder.teacher.loading import load_teacher
from builder.teacher.model import Teacher, Together

GRACE_SECONDS = 10
"""So long a rank that fails waits before it says so: what fails on all ranks is rank 0's to say."""


def load(
    *,
    device: str,
    device_map: str | None = None,
    tensor_parallel: int | None = None,
    **options: Any,
) -> Teacher:
    """Load a teacher. One that is split over processes takes the place of any other such one.

    Args:
        device: a torch device.
        device_map: "auto" places its layers on all GPUs that there are.
        tensor_parallel: number of devices over which each of its layers is split; None does not split it.
        options: of `load_teacher`.

    Raises:
        ValueError: with one line on what is wrong with this teacher or these devices, and what to do.
    """
    if tensor_parallel is None:
        spread = device_map is not None and device.startswith("cuda")
        return load_teacher(**options, device=device, spread=spread)
    _check_devices(device, tensor_parallel)
    if _Team.current is not None:
        _Team.current.dismiss()
    team = _Team.current = _Team(tensor_parallel, device, options)
    return team.load()


WATCH_SECONDS = 5
"""So long rank 0 waits after an error: where another rank has died, `_watch` says so meanwhile, and better than the error does."""


class _Team:
    """Ranks 1, 2, … of a teacher, as rank 0 sees them."""

    current: "_Team | None" = None
    """A process can be in one group of `torch.distributed` at a time."""

    def __init__(self, size: int, device: str, options: dict[str, Any]) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="logit-dataset-ranks-")
        self._orders: list[dict[str, Any]] = [
            {
                "rank": rank,
                "size": size,
                "device": device,
                "meeting": str(Path(self._directory.name) / "meeting"),
                "threads": max(1, torch.get_num_threads() // size),
                "options": options,
            }
            for rank in range(size)
        ]
        self._is_over = self._is_in_step = False
        self._processes = [self._start(order) for order in self._orders[1:]]
        atexit.register(self.dismiss)

    def load(self) -> Teacher:
        """The teacher, of which this process holds its part."""
        try:
            teacher = _load_rank(**self._orders[0], together=self.step)
        except BaseException:
            self.dismiss()
            raise
        finally:
            os.environ.pop("LOCAL_RANK", None)
        self._is_in_step = True
        # What runs in this process afterwards, such as a trainer, would wait for the others as a member of their group.
        weakref.finalize(teacher, self.dismiss)
        return teacher

    @contextmanager
    def step(self, name: str, argument: Any) -> Iterator[None]:
        """Around a forward pass here: the others run the same one.

        Raises:
            ValueError: it does not fit a device's memory.
            RuntimeError: an earlier one failed, so that the ranks may be at different places.
        """
        if not self._is_in_step:
            raise RuntimeError("the processes of the teacher are out of step after an error")
        self._is_in_step = False
        message = pickle.dumps((name, argument))
        try:
            for process in self._processes:
                assert process.stdin
                process.stdin.write(message)
                process.stdin.flush()
            yield
        except torch.OutOfMemoryError:
            # One rank alone cannot go on with a smaller batch.
            raise ValueError(
                "a batch does not fit in the memory of the teacher's devices; choose a smaller sequences.batch_tokens, or a "
                "larger teacher.tensor_parallel"
            ) from None
        except (RuntimeError, OSError):
            time.sleep(WATCH_SECONDS)
            raise
        self._is_in_step = True

    def dismiss(self) -> None:
        """End the other ranks, and leave their group."""
        if self._is_over:
            return
        self._is_over = True
        for process in self._processes:
            process.kill()
            process.wait()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._directory.cleanup()

    def _start(self, order: dict[str, Any]) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, "-m", "builder.teacher.ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for rank 0
        )
        assert process.stdin
        process.stdin.write(pickle.dumps(order))
        process.stdin.flush()
        threading.Thread(target=self._watch, args=(process, order["rank"]), daemon=True).start()
        return process

    def _watch(self, process: "subprocess.Popen[bytes]", rank: int) -> None:
        """End this process when a rank has died: whoever waits for an answer of a GPU cannot be woken otherwise."""
        status = process.wait()
        if not self._is_over:
            print(
                f"error: rank {rank} of the teacher ended with status {status}, possibly out of memory; finished shards "
                "are safe: run the same command to resume",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def _load_rank(
    *,
    rank: int,
    size: int,
    device: str,
    meeting: str,
    threads: int,
    options: dict[str, Any],
    together: Together,
) -> Teacher:
    """Meet the other ranks, and load this one's part of the teacher."""
    os.environ["LOCAL_RANK"] = str(rank)  # by which transformers chooses a GPU
    if sys.platform == "linux":
        # All ranks are on this machine, whose name need not lead anywhere.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    is_cuda = device.startswith("cuda")
    here = torch.device("cuda", rank) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(here)
    else:
        torch.set_num_threads(threads)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        device_id=here if is_cuda else None,
    )
    split = DistributedConfig(tp_plan="auto", tp_size=size)
    return load_teacher(**options, device=str(here), split=split, together=together)


def _check_devices(device: str, size: int) -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = accelerator.type if accelerator else "cpu"
    if not device.startswith(found):
        raise ValueError(
            f"teacher.tensor_parallel runs on {found} here, because transformers uses an accelerator if there is one; leave out "
            f"--device {device}, or hide the accelerator from the program"
        )
    if found == "cuda" and (count := torch.cuda.device_count()) < size:
        raise ValueError(
            f"teacher.tensor_parallel is {size}, but the number of available GPUs is {count}; run on a machine with {size}"
        )


def _follow(orders: BinaryIO) -> None:
    """Be a rank other than 0: run what that one runs, until it ends."""
    order = pickle.load(orders)
    messages: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def listen() -> None:
        # When rank 0 has ended, maybe in the middle of a word, whatever this one waits for will not come.
        with suppress(EOFError, pickle.UnpicklingError):
            while True:
                messages.put(pickle.load(orders))
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    teacher = _load_rank(**order, together=lambda *_: nullcontext())
    while True:
        teacher.follow(*messages.get())


def main() -> None:
    """Run a rank that another process has started."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        _follow(sys.stdin.buffer)
    except Exception as error:
        threading.Event().wait(GRACE_SECONDS)
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
    os._exit(1)


if __name__ == "__main__":
    main()
