"""Writes tensors to their planned places: buffers on their way to the threads that write them, and the journal.

Not for deciding where bytes go (layout.py), for the threads and checksums (lanes.py), the files themselves (shards.py),
the folder they grow in and its publishing (staging.py), or what lies beside the weights (manifest.py).
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from mergecore.errors import Interrupted, OutputError, OutputExistsError
from mergecore.output.buffers import Buffer, Ring, address_of, new_buffer
from mergecore.output.lanes import Lane
from mergecore.output.layout import INDEX_NAME, OutputLayout, TensorSlot
from mergecore.output.shards import DiskFull, ShardFiles
from mergecore.output.staging import Staging, reporting
from mergecore.small_files import read_bytes

log = logging.getLogger(__name__)


class OutputWriter:
    """Writes the tensors of `layout` and publishes them as the directory `out`, all or nothing.

    Tensor bytes go through buffers of this writer: `acquire` one, fill it, `write` (the first bytes of) it; a thread
    puts it at its planned offset and reuses it. A tensor's windows come in order and from one thread, tensors in any
    order, from as many threads as there are `rings`: those of each have `buffer_bytes` together, or as many as the
    largest one, in memory that its function makes, so that none waits for a buffer that another holds. Up to `lanes`
    shards are written at once, those of each lane (`lane_of`) by a thread of its own. With
    `direct` they go straight to the disk where the file system can; else `dirty_limit` bytes are in the page cache and
    not on disk at most. `identity` names the merge (spec, inputs, code): with `resume`, the tensors that an interrupted
    run with equal identity and layout has finished are kept (`resumed`, `finished`); otherwise everything starts from
    zero.

    Leaving it as a context manager abandons what was not published. The work is kept for `resume` if the reason was
    Interrupted, or OutputExistsError at the very end; else nothing stays behind.

    Raises OutputExistsError if `out` exists and is not an empty directory; OutputError if another merge writes to it,
    if the disk is too full, and, from whichever method is called next, if writing failed in the background.
    """

    def __init__(
        self,
        out: str | Path,
        layout: OutputLayout,
        identity: str,
        *,
        resume: bool = False,
        direct: bool = True,
        dirty_limit: int = 256 << 20,
        buffer_bytes: int = 64 << 20,
        lanes: int = 1,
        rings: Sequence[Callable[[int], Buffer]] = (new_buffer,),
    ) -> None:
        self.layout = layout
        self.resumed = False
        self.checksums: dict[str, str] = {}  # complete and on disk: name -> xxh3_128, 32 hex digits
        self.written = 0  # tensor bytes written by this process, without what an earlier run had finished

        self._staging = Staging(out)
        self._shards: ShardFiles | None = None
        self._direct, self._dirty_limit = direct, dirty_limit
        self._added: set[str] = set()
        self._closed = False

        # Of all threads, guarded by _changed.
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._rings = [Ring(buffer_bytes, make) for make in rings]
        self._lent: dict[int, tuple[memoryview, Ring]] = {}  # by address: acquired, not yet given to `write`
        self._queued: dict[int, Ring] = {}  # by address: what the lanes have still to write
        self._recording = threading.Lock()  # the journal

        # Of the calling threads, each with tensors of its own.
        self._begun: dict[str, int] = {}  # bytes accepted, per tensor that has no end yet
        self._ended: set[str] = set()
        self._lanes: list[Lane] = []
        self._lane_count = max(1, min(lanes, len(layout.shards)))

        self._staging.enter()
        try:
            shards = self._open(identity, resume)
            for number in range(self._lane_count):
                self._lanes.append(self._lane(number, shards))
        except BaseException:
            self.abandon(keep=self.resumed)
            raise

    @property
    def scratch(self) -> Path:
        """A folder for what a merge keeps until it is published, over interruptions too."""
        return self._staging.scratch()

    @property
    def finished(self) -> frozenset[str]:
        """Names of the tensors that are complete and on disk, those of an earlier run included."""
        return frozenset(self.checksums.copy())

    def lane_of(self, name: str) -> int:
        """The lane that writes a tensor, from 0. Lanes work side by side where tensors of all of them are written."""
        return self.layout.slots[name].shard % self._lane_count

    def acquire(self, name: str, offset_in_tensor: int, nbytes: int, ring: int = 0) -> memoryview:
        """A writable buffer of arbitrary content for these bytes of a tensor; waits until there is room for it in the
        ring of the calling thread.

        It lies in its page as the bytes do in the file. Raises ValueError if the caller holds all room already,
        OutputError if writing has failed.
        """
        slot = self._open_slot(name)
        if nbytes < 0:
            raise ValueError(f"cannot acquire a buffer of {nbytes} bytes")
        with self._changed:
            self._check_usable()
            if nbytes == 0:
                return memoryview(bytearray())
            own, place = self._rings[ring], slot.offset + offset_in_tensor
            buffer = own.lend(nbytes, place)
            if buffer is None:
                self._changed.notify_all()  # lanes that sleep on what is queued
            while buffer is None:
                if own not in self._queued.values():
                    raise ValueError(f"the caller holds all {own.nbytes:,} bytes of output buffers; write them")
                self._changed.wait()
                self._check_usable()
                buffer = own.lend(nbytes, place)
            self._lent[address_of(buffer)] = buffer, own
            return buffer

    def write(self, name: str, offset_in_tensor: int, data: memoryview) -> None:
        """Queues the next bytes of a tensor: an acquired buffer, or its first bytes, not to be touched any more.

        Raises ValueError, and the buffer stays the caller's, if `data` is not the next part of the tensor; OutputError
        if writing has failed.
        """
        slot = self._open_slot(name)
        begun = self._begun.get(name, 0)
        if offset_in_tensor != begun:
            raise ValueError(f"tensor {name!r}: bytes from {offset_in_tensor:,} on were given, but {begun:,} come next")
        if begun + data.nbytes > slot.nbytes:
            raise ValueError(f"tensor {name!r} has {slot.nbytes:,} bytes; {begun:,} + {data.nbytes:,} do not fit")
        if not data.c_contiguous:
            raise ValueError(f"tensor {name!r}: the data is not contiguous")
        with self._changed:
            self._check_usable()
            if data.nbytes:
                data = data.cast("B")
                address = address_of(data)
                if address not in self._lent:
                    raise ValueError(
                        f"tensor {name!r}: the data is not in a buffer from acquire(), or was written already"
                    )
                _, self._queued[address] = self._lent.pop(address)
                self._lanes[self.lane_of(name)].store(slot, begun, data)
        self._begun[name] = begun + data.nbytes

    def finish(self, name: str) -> None:
        """Queues the end of a tensor: its checksum goes to the journal as soon as its bytes are on disk.

        Raises ValueError if bytes are missing, OutputError if writing has failed.
        """
        slot = self._open_slot(name)
        begun = self._begun.get(name, 0)
        if begun != slot.nbytes:
            raise ValueError(f"tensor {name!r} is not complete: {begun:,} of {slot.nbytes:,} bytes were written")
        with self._changed:
            self._check_usable()
            self._lanes[self.lane_of(name)].end(name)
        self._begun.pop(name, None)
        self._ended.add(name)

    def restart(self, name: str, ring: int = 0) -> None:
        """Forgets what was written of a tensor, which comes again from its beginning; takes back what the ring of the
        calling thread has lent.

        Raises ValueError if the tensor is finished, OutputError if writing has failed.
        """
        self._open_slot(name)
        with self._changed:
            self._check_usable()
            own = self._rings[ring]
            for address, (buffer, lender) in list(self._lent.items()):
                if lender is own:
                    own.give_back(buffer)
                    del self._lent[address]
            self._lanes[self.lane_of(name)].forget(name)
        self._begun.pop(name, None)

    def add_file(self, name: str, content: bytes | Path) -> None:
        """Puts a small file beside the shards: these bytes, or a copy of the file at this path.

        Raises ValueError if `name` is no plain file name or is taken, OutputError if it cannot be written.
        """
        with self._changed:
            self._check_usable()
        if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
            raise ValueError(f"{name!r} is not a plain file name")
        if name in self._added or name == INDEX_NAME or any(name == shard.filename for shard in self.layout.shards):
            raise ValueError(f"the output has a file {name!r} already")
        self._put_file(name, content)

    def sync(self) -> None:
        """Returns when all that was written is on disk and every finished tensor is in the journal."""
        with self._changed:
            self._check_usable()
            tickets = [lane.checkpoint() for lane in self._lanes]
            self._changed.notify_all()
            while any(lane.done < ticket for lane, ticket in zip(self._lanes, tickets, strict=True)):
                self._changed.wait()
                self._check_usable()

    def publish(self) -> None:
        """Makes everything durable and gives it its final name. Raises ValueError if a tensor is not finished."""
        self.sync()
        missing = [name for name in self.layout.slots if name not in self.checksums]
        if missing:
            count = len(self.layout.slots)
            raise ValueError(f"{len(missing)} of {count} tensors are not finished, first {missing[0]!r}")
        if self.layout.index is not None and INDEX_NAME not in self._added:
            self._put_file(INDEX_NAME, self.layout.index)
        self._staging.publish()
        self.abandon(keep=False)  # of the staging folder only the journal and the lock are left

    def abandon(self, keep: bool) -> None:
        """Stops writing. `keep`: finished tensors stay, synced and journaled, for `resume`; else nothing stays.

        Does nothing after `publish` or a first `abandon`. Raises nothing: what a failing disk did not take is not in
        the journal, so that it is written again on resume.
        """
        if self._closed:
            return
        with self._changed:
            for lane in self._lanes:
                lane.stop(keep)
        for lane in self._lanes:
            lane.join()
        with self._changed:
            self._closed = True
            self._changed.notify_all()  # who waits for a buffer
        if self._shards is not None:
            self._shards.close()
        self._staging.leave(keep)

    def __enter__(self) -> OutputWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A name that was taken while the merge ran must not cost the work of the merge.
        self.abandon(keep=isinstance(error, (Interrupted, OutputExistsError)))

    # Opening and closing.

    def _lane(self, number: int, shards: ShardFiles) -> Lane:
        name, stored, record, failed = self._staging.out.name, self._stored, self._record, self._failed
        return Lane(name, number, shards, self._changed, stored=stored, record=record, failed=failed)

    def _open(self, identity: str, resume: bool) -> ShardFiles:
        """Opens the journal and all shards, preallocated and with their headers."""
        staging = self._staging
        names = [shard.filename for shard in self.layout.shards]
        head = {"identity": identity, "layout": self.layout.digest()}
        records = staging.journal.read() if resume else []
        self.resumed = records[:1] == [head] and self._have_planned_sizes()
        if records and not self.resumed:
            log.warning(
                "started from zero: the spec, an input or mergecore has changed since %s was begun", staging.out
            )
        with reporting("prepare", staging.folder):
            if self.resumed:
                self.checksums = {record["name"]: record["xxh3_128"] for record in records[1:]}
                # What the earlier run had put beside the shards.
                staging.output.remove(set(staging.output.names()) - set(names))
            else:
                staging.begin()
            free = shutil.disk_usage(staging.output.descriptor).free
        if not self.resumed and free < self.layout.nbytes:
            raise self._disk_full(free)
        self._shards = ShardFiles(
            staging.output,
            self.layout.shards,
            direct=self._direct,
            dirty_limit=self._dirty_limit,
            lanes=self._lane_count,
        )
        try:
            self._shards.open()
        except DiskFull as error:
            raise self._disk_full(free) from error
        with reporting("write", staging.journal.path):
            if self.resumed:
                staging.journal.go_on()
            else:
                staging.journal.start(head)
            staging.output.sync()
            staging.sync()
        return self._shards

    def _have_planned_sizes(self) -> bool:
        with suppress(OSError):
            self._staging.go_on()
            output = self._staging.output
            return all(output.status(shard.filename).st_size == shard.size for shard in self.layout.shards)
        return False

    def _disk_full(self, free: int) -> OutputError:
        out = self._staging.out
        return OutputError(
            f"not enough disk space for {out}: {self.layout.nbytes:,} bytes are needed, {free:,} were free on the file "
            f"system of {out.parent}, less if you have a quota; free some or choose an output elsewhere"
        )

    def _put_file(self, name: str, content: bytes | Path) -> None:
        """On disk when this returns."""
        output = self._staging.output
        data = content if isinstance(content, bytes) else read_bytes(content)
        try:
            with os.fdopen(output.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            output.remove([name])
            source = "" if isinstance(content, bytes) else f", a copy of {content}"
            raise OutputError(f"cannot write {output.path / name}{source}: {error.strerror or error}") from error
        self._added.add(name)

    # Between the threads.

    def _check_usable(self) -> None:
        if self._failure is not None:
            what = str(self._failure) if isinstance(self._failure, OutputError) else repr(self._failure)
            raise OutputError(what) from self._failure
        if self._closed:
            raise ValueError(f"the writer of {self._staging.out} is closed")

    def _open_slot(self, name: str) -> TensorSlot:
        slot = self.layout.slots.get(name)
        if slot is None:
            raise ValueError(f"the layout of {self._staging.out} has no tensor {name!r}")
        if name in self._ended or name in self.checksums:
            raise ValueError(f"tensor {name!r} is finished already")
        return slot

    # Of the lanes' threads.

    def _stored(self, data: memoryview) -> None:
        with self._changed:
            self.written += data.nbytes
            self._queued.pop(address_of(data)).give_back(data)
            self._changed.notify_all()

    def _record(self, complete: Mapping[str, str]) -> None:
        with self._recording:
            with reporting("write", self._staging.journal.path):
                self._staging.journal.append({"name": name, "xxh3_128": value} for name, value in complete.items())
            self.checksums.update(complete)

    def _failed(self, failure: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()
