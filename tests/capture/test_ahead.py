"""Items made ahead: the same ones in the same order, no more than may be, and what goes wrong when its turn has come."""

import threading
import time
from collections.abc import Iterator

import pytest

from builder.capture.ahead import Ahead

NAME = "ahead-of-test"


class Source:
    """Counts what was made of it."""

    def __init__(self, count: int, *, fails_at: int | None = None, seconds: float = 0.0) -> None:
        self.count, self.fails_at, self.seconds = count, fails_at, seconds
        self.made: list[int] = []
        self.threads: set[str] = set()
        self.is_closed = False

    def items(self) -> Iterator[int]:
        try:
            for item in range(self.count):
                self.threads.add(threading.current_thread().name)
                time.sleep(self.seconds)
                if item == self.fails_at:
                    raise OSError(28, "no space left")
                self.made.append(item)
                yield item
        finally:
            self.is_closed = True


def settled(source: Source, count: int) -> list[int]:
    """What was made, once it is so many items and nothing more comes for a while."""
    deadline = time.monotonic() + 10
    while len(source.made) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    return source.made


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(NAME)]


@pytest.mark.parametrize("depth", [0, 1, 7])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_same_items_in_the_same_order(count, depth):
    source = Source(count)
    assert list(Ahead(source.items(), depth=depth, name=NAME)) == list(range(count))
    assert source.is_closed
    assert all(name.startswith(NAME) for name in source.threads)
    assert threads() == []


def test_no_more_is_made_than_may_be_ahead_and_nothing_before_it_is_wanted():
    source = Source(100)
    ahead = Ahead(source.items(), depth=3, name=NAME)
    assert settled(source, 0) == []
    assert next(ahead) == 0
    assert settled(source, 4) == [0, 1, 2, 3]
    assert next(ahead) == 1
    assert settled(source, 5) == [0, 1, 2, 3, 4]
    ahead.close()
    assert source.is_closed
    assert list(ahead) == []
    assert threads() == []


def test_what_goes_wrong_is_raised_in_its_turn_and_ends_it():
    source = Source(9, fails_at=3)
    ahead = Ahead(source.items(), depth=7, name=NAME)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="no space left"):
        next(ahead)
    assert list(ahead) == []
    assert threads() == []


def test_closing_waits_for_the_item_that_is_being_made():
    source = Source(9, seconds=0.05)
    ahead = Ahead(source.items(), depth=5, name=NAME)
    assert next(ahead) == 0
    ahead.close()
    assert source.is_closed
    assert len(source.made) < 5
    assert threads() == []
