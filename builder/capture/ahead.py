"""An iterator → the same items in the same order, made on a thread of its own before they are asked for.

In:   an iterator.
Out:  its items, and whatever it raises, when its turn has come.

How:  so many calls of its `next` are under way or done as may be ahead, one after the other, on one thread; taking an item asks for one
      more. So nothing waits for room, what nobody asks for any more ends by itself, and the iterator is never run by two threads at once.

Cost: 30 µs an item. It is only worth while for what lets go of Python's lock, or waits.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Generic, TypeVar

Item = TypeVar("Item")


class _End:
    """What stands for the end."""


END = _End()


class Ahead(Generic[Item]):
    """The items of an iterator, made ahead from the first time that one is asked for."""

    def __init__(self, items: Iterator[Item], *, depth: int, name: str) -> None:
        """Prepare; nothing is made yet.

        Args:
            items: the iterator, which is this one's from now on.
            depth: items that may be ahead.
            name: of the thread.
        """
        self._items, self._depth = items, depth
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._made: deque[Future[Item | _End]] = deque()
        self._is_closed = False
        self._running = Lock()
        """Held by who runs the iterator."""

    def __iter__(self) -> "Ahead[Item]":
        return self

    def __next__(self) -> Item:
        """The next one.

        Raises:
            Exception: what making it has raised; it was the last one.
        """
        if self._is_closed:
            raise StopIteration
        while len(self._made) <= self._depth:
            self._made.append(self._thread.submit(self._make))
        try:
            item = self._made[0].result()
        except BaseException:
            self.close()
            raise
        if isinstance(item, _End):
            self.close()
            raise StopIteration
        self._made.popleft()
        return item

    def close(self) -> None:
        """Make no more; waits for the one that is being made."""
        self._is_closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        # The executor does not know the thread of a `submit` that was interrupted (by Ctrl-C), so that waiting for its threads is not enough.
        with self._running:
            if close := getattr(self._items, "close", None):
                close()
        self._thread.shutdown(wait=True)
        self._made.clear()

    def _make(self) -> Item | _End:
        with self._running:
            return END if self._is_closed else next(self._items, END)
