"""Counts of tokens → a bar on a terminal, or plain lines in the log of a batch job.

In:   a stage, such as `build`, its total where one is known, and tokens as they are done.
Out:  on stderr. On a terminal, a bar whose clock ticks. Elsewhere, a line when the stage has taken START_SECONDS, one every LOG_SECONDS, and one at its end.

How:  a thread of its own writes, so that a line comes while the teacher is at a long batch, too. Rate and time left are those since the first
      tokens came, so that loading is in neither.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from builder.dataset.printable import counted, duration

START_SECONDS = 2.0
"""From the beginning of a stage to its first line: what takes less needs none."""
LOG_SECONDS = 60.0
"""Between two lines of a log."""
TICK_SECONDS = 1.0
"""Between two looks of a bar at the clock."""


class Progress:
    """How far a stage has come."""

    def __init__(self, label: str, total: int | None, *, is_quiet: bool = False) -> None:
        """Begin a stage.

        Args:
            label: of the stage.
            total: tokens; None where that is not known.
            is_quiet: show nothing.
        """
        from tqdm import tqdm

        self._label, self._total = label, total
        self._tokens = self._before = 0
        self._detail = ""
        self._begun = time.monotonic()
        self._first: float | None = None
        is_off = True if is_quiet else None  # None: where there is no terminal
        self._bar = tqdm(
            desc=label, total=total, unit="tok", unit_scale=True, disable=is_off, leave=False
        )
        self._has_written = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        if not is_quiet:
            self._thread.start()

    def update(self, tokens: int) -> None:
        """Count tokens as done."""
        if self._first is None:
            self._first = time.monotonic()
            if not self._bar.disable:
                self._bar.start_t = self._bar.last_print_t = self._bar._time()
        self._tokens += tokens
        self._bar.update(tokens)

    def start_from(self, tokens: int) -> None:
        """Count tokens as done before this run, so that rate and time left are those of this run."""
        self._before += tokens
        if not self._bar.disable:
            self._bar.initial += tokens
            self._bar.n += tokens
            self._bar.refresh()

    def tell(self, detail: str) -> None:
        """Say something beside the numbers, such as what each worker does."""
        self._detail = detail
        self._bar.set_postfix_str(detail)

    def close(self, *, has_failed: bool) -> None:
        """End the stage."""
        self._ended.set()
        if self._thread.ident:
            self._thread.join()
        self._bar.close()
        if self._has_written and not has_failed:
            self._write(is_end=True)

    def _tick(self) -> None:
        wait = START_SECONDS if self._bar.disable else TICK_SECONDS
        while not self._ended.wait(wait):
            if self._bar.disable:
                self._write()
                wait = LOG_SECONDS
            else:
                self._bar.refresh()

    def _write(self, *, is_end: bool = False) -> None:
        now, done = time.monotonic(), self._tokens + self._before
        # A limit of tokens is passed by the rest of a document.
        share = f" of {self._total:,} ({done / self._total:.0%})" if self._total and done <= self._total else ""  # fmt: skip
        parts = [f"{counted(done, 'token')}{share}" if done else "no tokens yet"]
        if self._tokens and self._first is not None and now > self._first and not is_end:
            rate = self._tokens / (now - self._first)
            parts.append(f"{rate:,.0f} tokens/s")
            if self._total and self._total > done:
                parts.append(f"{duration((self._total - done) / rate)} left")
        parts.append(f"after {duration(now - self._begun)}")
        if self._detail and not is_end:
            parts.append(self._detail)
        self._has_written = True
        print(f"{self._label}: {', '.join(parts)}", file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int | None, *, is_quiet: bool = False) -> Iterator[Progress]:
    """A stage, which has failed if an exception ends it; arguments as of `Progress`."""
    shown = Progress(label, total, is_quiet=is_quiet)
    try:
        yield shown
    except BaseException:
        shown.close(has_failed=True)
        raise
    shown.close(has_failed=False)
