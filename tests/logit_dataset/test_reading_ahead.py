"""Row groups that are decoded ahead: in their order, no more than may be, and what goes wrong when its turn has come."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from logit_dataset import batches as module
from logit_dataset.batches import Batches
from logit_dataset.rows import RowGroup, Rows

BUFFER = 400


class Reader:
    """Decodes row groups, and notes which."""

    def __init__(self, groups: list[RowGroup], *, fails_at: int | None = None) -> None:
        self.groups, self.fails_at = groups, fails_at
        self.begun: list[int] = []
        self._lock = threading.Lock()

    def __call__(self, group: RowGroup) -> Rows:
        with self._lock:
            self.begun.append(group.index)
        if group.index == self.fails_at:
            raise ValueError("a null")
        ids = np.arange(group.num_tokens, dtype=np.int32) + 1000 * group.index
        lengths_R = np.array([group.num_tokens // 2, group.num_tokens - group.num_tokens // 2])
        return Rows(lengths_R=lengths_R, columns={"input_ids": ids, "target_ids": ids})

    def settled(self) -> list[int]:
        """Which were begun, once no more are for a while."""
        before = -1
        while before != len(self.begun):
            before = len(self.begun)
            time.sleep(0.05)
        return sorted(self.begun)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Batches, Reader]]:
    monkeypatch.setattr(module, "BUFFER_TOKENS", BUFFER)

    def made(sizes: list[int], **options: int | None) -> tuple[Batches, Reader]:
        groups = [
            RowGroup(file="a", index=i, num_rows=2, num_tokens=n) for i, n in enumerate(sizes)
        ]
        reader = Reader(groups, fails_at=options.pop("fails_at", None))
        settings = {"seed": None, "rank": 0, "world_size": 1, "widest": 1, "identity": {}, **options}  # fmt: skip
        shape = {"batch_size": 1, "length": None, "packed": False, "split_long": False}
        return Batches(row_groups=groups, read=reader, **shape, **settings), reader  # type: ignore[arg-type]

    return made


def test_as_many_are_decoded_ahead_as_may_be(make):
    batches, reader = make([100] * 30)
    rows = iter(batches)
    next(rows)
    # A batch is handed out when the first row that is not in it has come: of the first row group. Behind it, three of 100 tokens.
    assert reader.settled() == list(range(4))
    batches, reader = make([100] * 30, seed=1)
    rows = iter(batches)
    next(rows)
    # Of the block of four, whose rows are shuffled together. Behind it, six of 100 tokens.
    assert len(reader.settled()) == 10


def test_small_row_groups_do_not_let_large_ones_all_be_decoded(make):
    """It is tokens that are limited: a block of forty small row groups is no leave for thirty large ones."""
    batches, reader = make([10] * 40 + [200] * 30)
    rows = iter(batches)
    next(rows)
    assert reader.settled() == list(range(31))
    for _ in range(2 * 38):
        next(rows)
    assert reader.settled() == list(range(41))


def test_a_row_group_that_is_larger_than_all_that_may_be_ahead_is_decoded_alone(make):
    batches, reader = make([900] * 4)
    rows = iter(batches)
    next(rows)
    assert reader.settled() == [0, 1]
    assert len(list(rows)) == 7
    assert reader.begun == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("sizes", [[100] * 9, [2], [10] * 50 + [900, 2, 399, 400, 401]])
def test_batches_are_the_same_however_far_is_decoded_ahead(make, monkeypatch, sizes, seed):
    found = []
    for ahead, readers in [(0, 1), (1.5, 2), (9, 5)]:
        monkeypatch.setattr(module, "AHEAD", ahead)
        monkeypatch.setattr(module, "STORED_AHEAD", ahead)
        monkeypatch.setattr(module, "READERS", readers)
        batches, _ = make(sizes, seed=seed)
        found.append([(batch["input_ids"].tolist(), batches.state_dict()) for batch in batches])
    assert len(found[0]) == 2 * len(sizes)
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_what_cannot_be_read_is_raised_in_its_turn(make):
    batches, _ = make([100] * 9, fails_at=5)
    rows = iter(batches)
    assert [next(rows)["input_ids"][0, 0].item() for _ in range(9)] == [0, 50, 1000, 1050, 2000, 2050, 3000, 3050, 4000]  # fmt: skip
    with pytest.raises(ValueError, match="a null"):
        next(rows)
    assert not [t for t in threading.enumerate() if t.name.startswith("logit-dataset")]
