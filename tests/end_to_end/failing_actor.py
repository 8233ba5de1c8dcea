"""A worker for test_workers that dies or fails in the middle of some shards; workers import it, so it stands alone."""

import os
import signal

from builder.build.workers import Actor


class FailingActor(Actor):
    """Is killed in shard 1 of partition 0 once and of partition 2 always; fails in that of partition 1 once."""

    def shard(self, task):
        self.task = task
        return super().shard(task)

    def _count(self, tokens):
        super()._count(tokens)
        if self.task.index != 1 or self.task.partition > 2:
            return
        log = self._order.output.parent / f"failures-{self.task.partition}"
        if log.exists() and self.task.partition != 2:
            return
        with log.open("a") as file:
            file.write("failed\n")
        if self.task.partition == 1:
            raise OSError("the network is down")
        os.kill(os.getpid(), signal.SIGKILL)
