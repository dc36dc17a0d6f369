"""Threads that write tensors to shards: bytes in the order given, their checksums, checkpoints.

A file system lets one thread into a file at a time, so what has many cores and a fast disk writes several shards at
once, each lane its own ones. Not for buffers (writer.py) or files (shards.py).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import xxhash

from mergecore.output.layout import TensorSlot
from mergecore.output.shards import ShardFiles

CHECKPOINT_BYTES = 256 << 20  # a crash costs the tensors at work and at most about this much of a lane's finished ones,
CHECKPOINT_SECONDS = 5.0  # or this much time
SUMMED_LATER = 1  # buffers that may be written and not yet summed: a writer that waits lets the disk wait
SUMMED_AT_ONCE = 1 << 20  # bytes that are summed sooner than another thread has begun with them
WAKING_BYTES = 1 << 20  # queued: less waits for more to come, as switching threads costs more than writing it,
WAKING_SECONDS = 1.0  # but not longer


class Lane:
    """The thread of the shards whose number, divided by the number of lanes, leaves `number`.

    Tasks are queued and `done` is read with `changed` held, which is notified of every task that is done. Who waits for
    one notifies it first, once: while little is queued the thread sleeps. The callbacks are of this thread: `stored` of
    data that is on its way to the disk, `record` of checksums whose tensors are on disk, `failed` of its end by an
    exception.
    """

    def __init__(
        self,
        name: str,
        number: int,
        shards: ShardFiles,
        changed: threading.Condition,
        *,
        stored: Callable[[memoryview], None],
        record: Callable[[Mapping[str, str]], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._number, self._shards, self._changed = number, shards, changed
        self._stored, self._record, self._failed = stored, record, failed

        # Guarded by _changed.
        self._tasks: deque[Callable[[], object]] = deque()  # bounded, since every write in it holds a buffer
        self._submitted = 0
        self._quiet_bytes = 0  # queued since the thread was notified of anything
        self.done = 0
        self._stopping = False

        # Of the thread.
        self._summing = ThreadPoolExecutor(1, f"checksums of {name}")  # in the order given
        self._hashes: dict[str, xxhash.xxh3_128] = {}
        self._written: deque[tuple[memoryview, Future[None]]] = deque()  # perhaps not yet summed
        self._complete: dict[str, xxhash.xxh3_128] = {}  # written, not yet synced and recorded
        self._complete_since = 0.0
        self._since_checkpoint = 0  # bytes

        self._thread = threading.Thread(target=self._run, name=f"writer of {name}", daemon=True)
        self._thread.start()

    def store(self, slot: TensorSlot, begin: int, data: memoryview) -> None:
        """Queues bytes of a tensor; those of each tensor come in order."""
        self._submit(partial(self._store, slot, begin, data), data.nbytes)

    def end(self, name: str) -> None:
        """Queues the end of a tensor: it is recorded as soon as it is on disk."""
        self._submit(partial(self._end, name))

    def forget(self, name: str) -> None:
        """Queues that a tensor starts again."""
        self._submit(partial(self._hashes.pop, name, None))

    def checkpoint(self) -> int:
        """Queues that everything goes to the disk and is recorded; `done` has this value when it is."""
        return self._submit(self._checkpoint)

    def stop(self, keep: bool) -> None:
        """Ends the thread after what is queued and a checkpoint, or, without `keep`, after the task at work."""
        if keep:
            self.checkpoint()
        else:
            self._tasks.clear()
        self._stopping = True
        self._changed.notify_all()

    def join(self) -> None:
        """Returns when the thread has ended. `changed` must not be held."""
        self._thread.join()
        self._summing.shutdown()

    def _submit(self, task: Callable[[], object], nbytes: int = 0) -> int:
        self._tasks.append(task)
        self._submitted += 1
        self._quiet_bytes += nbytes
        if self._quiet_bytes >= WAKING_BYTES:
            self._quiet_bytes = 0
            self._changed.notify_all()
        return self._submitted

    # The thread.

    def _run(self) -> None:
        try:
            while (task := self._next_task()) is not None:
                task()
                del task  # or it would hold its buffer until the next one comes
                if self._checkpoint_wait() == 0:
                    self._checkpoint()
                with self._changed:
                    self.done += 1
                    self._changed.notify_all()
        except BaseException as failure:  # whatever it is: the caller must hear of it and not wait for ever
            self._failed(failure)

    def _next_task(self) -> Callable[[], object] | None:
        while True:
            with self._changed:
                if self._tasks:
                    return self._tasks.popleft()
                if not self._written:
                    if self._stopping:
                        return None
                    wait = self._checkpoint_wait()
                    if wait == 0:
                        self.checkpoint()
                    else:
                        self._changed.wait(WAKING_SECONDS if wait is None else min(wait, WAKING_SECONDS))
                    continue
            self._give_back()  # while there is nothing to write

    def _store(self, slot: TensorSlot, begin: int, data: memoryview) -> None:
        state = self._hashes.get(slot.name)
        if state is None:
            state = self._hashes[slot.name] = xxhash.xxh3_128()
        self._since_checkpoint += data.nbytes
        if data.nbytes <= SUMMED_AT_ONCE and not self._written:
            state.update(data)
            self._shards.write(slot.shard, slot.offset + begin, data)
            self._stored(data)
            return
        summed = self._summing.submit(state.update, data)  # as long as writing takes, and beside it
        self._shards.write(slot.shard, slot.offset + begin, data)
        self._written.append((data, summed))
        while self._written and (len(self._written) > SUMMED_LATER or self._written[0][1].done()):
            self._give_back()

    def _give_back(self) -> None:
        data, summed = self._written.popleft()
        summed.result()
        self._stored(data)

    def _end(self, name: str) -> None:
        if not self._complete:
            self._complete_since = time.monotonic()
        state = self._hashes.pop(name, None)
        self._complete[name] = state or xxhash.xxh3_128()

    def _checkpoint_wait(self) -> float | None:
        """Seconds until the next checkpoint is due; None while there is nothing to record."""
        if not self._complete:
            return None
        if self._since_checkpoint >= CHECKPOINT_BYTES:
            return 0
        return max(0, self._complete_since + CHECKPOINT_SECONDS - time.monotonic())

    def _checkpoint(self) -> None:
        """First the data, then the record that vouches for it."""
        while self._written:
            self._give_back()
        self._shards.sync(self._number)
        self._record({name: state.hexdigest() for name, state in self._complete.items()})
        self._complete.clear()
        self._since_checkpoint = 0
