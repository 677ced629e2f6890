"""A few kilobytes of shared memory through which ranks and their supervisor see each other.

Ranks say where they are (:class:`Beat`), how far training is (:class:`Progress`) and why they died
(:class:`Failure`); the supervisor says what it wants (:class:`Order`). The file lives on tmpfs, so
nothing here blocks, and what a rank wrote survives its SIGKILL.

There are no locks, because a rank may die while it holds one. Every record has one writer and two
buffers: the writer fills the buffer nobody is told to read and then flips a counter, so a writer
that dies half-way leaves the previous record in force. A reader that was overtaken by two writes
sees a wrong checksum, or that the counter has moved on, and reads again. The checksum also makes
the order in which a CPU publishes its stores irrelevant.

The trade-off: a record is copied twice and has a fixed capacity. At one beat per step and a few
hundred bytes of progress, both are free.
"""

import mmap
import os
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from pretrain_api.wire import Failure, Order, Phase, Progress

MAGIC = 0x70_72_65_74_72_61_69_6E  # "pretrain"
LAYOUT = 2  # raised when the layout below changes
HEADER = struct.Struct("<QQQQ")  # magic, layout, processes, order
ORDER_OFFSET = 24
RECORD = struct.Struct("<Q")  # number of completed writes; its last bit names the buffer in force
BUFFER = struct.Struct("<II")  # length and CRC-32 of the payload
BEAT = struct.Struct("<qqdq")  # phase, step, time.monotonic(), pid
PROGRESS_BYTES = 16 * 1024
FAILURE_BYTES = 2 * 1024
READ_ATTEMPTS = 100  # a reader is overtaken only by two writes during one copy

PHASES = tuple(Phase)
ORDERS = tuple(Order)


class Beat(NamedTuple):
    """Where one rank was when it last reported; ``at`` is ``time.monotonic()`` of that moment.

    ``step`` counts completed steps. ``pid`` is 0 for a rank that never reported.
    """

    phase: Phase
    step: int
    at: float
    pid: int = 0


@dataclass(frozen=True)
class Record:
    """One single-writer slot of ``memory``: a write counter and two buffers of ``capacity`` bytes.

    An empty payload and a slot never written read the same: ``None``.
    """

    memory: mmap.mmap
    offset: int
    capacity: int

    @property
    def end(self) -> int:
        """The first byte behind this slot."""
        return self.buffer(2)

    def buffer(self, number: int) -> int:
        """Offset of buffer 0 or 1; all offsets stay multiples of eight."""
        return self.offset + RECORD.size + number * (BUFFER.size + self.capacity)

    def write(self, payload: bytes) -> None:
        """Replace the record. Raises ValueError when ``payload`` is over the capacity."""
        if len(payload) > self.capacity:
            raise ValueError(f"{len(payload)} bytes do not fit a record of {self.capacity}")
        (writes,) = RECORD.unpack_from(self.memory, self.offset)
        start = self.buffer((writes + 1) & 1)
        BUFFER.pack_into(self.memory, start, len(payload), zlib.crc32(payload))
        self.memory[start + BUFFER.size : start + BUFFER.size + len(payload)] = payload
        RECORD.pack_into(self.memory, self.offset, writes + 1)

    def read(self) -> bytes | None:
        """The newest complete payload, or None when there is none."""
        for _ in range(READ_ATTEMPTS):
            (writes,) = RECORD.unpack_from(self.memory, self.offset)
            start = self.buffer(writes & 1)
            length, checksum = BUFFER.unpack_from(self.memory, start)
            payload = self.memory[start + BUFFER.size : start + BUFFER.size + length]
            if length > self.capacity or zlib.crc32(payload) != checksum:
                continue
            # A writer may have filled this buffer anew and be about to say so. Believed already, it
            # would be newer than what the next reading finds in force.
            if RECORD.unpack_from(self.memory, self.offset) == (writes,):
                return payload or None
        return None


class Board:
    """The shared-memory board of one worker. See the module's docstring for the rules."""

    def __init__(self, memory: mmap.mmap) -> None:
        if len(memory) < HEADER.size:
            raise ValueError("the file is no board: too short")
        magic, layout, processes, _ = HEADER.unpack_from(memory)
        if (magic, layout) != (MAGIC, LAYOUT):
            raise ValueError("the file is no board of this release")
        self.processes: int = processes
        self._memory = memory
        self._progress = Record(memory, HEADER.size, PROGRESS_BYTES)
        self._beats: list[Record] = []
        self._failures: list[Record] = []
        end = self._progress.end
        for _ in range(processes):
            self._beats.append(Record(memory, end, BEAT.size))
            self._failures.append(Record(memory, self._beats[-1].end, FAILURE_BYTES))
            end = self._failures[-1].end
        if len(memory) < end:
            raise ValueError("the file is no board: too short")

    @classmethod
    def create(cls, path: Path, processes: int) -> Self:
        """Make an empty board for ``processes`` local ranks; an existing file is replaced."""
        slot = 2 * RECORD.size + 4 * BUFFER.size + 2 * (BEAT.size + FAILURE_BYTES)
        size = HEADER.size + RECORD.size + 2 * (BUFFER.size + PROGRESS_BYTES) + processes * slot
        path.unlink(missing_ok=True)
        header = HEADER.pack(MAGIC, LAYOUT, processes, ORDERS.index(Order.NONE))
        path.write_bytes(header.ljust(size, b"\0"))
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Attach to an existing board. Raises OSError or ValueError when there is none."""
        with path.open("r+b") as file:
            return cls(mmap.mmap(file.fileno(), 0))

    def publish(self, local_rank: int, phase: Phase, step: int) -> None:
        """Report where this rank is, after ``step`` completed steps; the time of it is noted."""
        beat = BEAT.pack(PHASES.index(phase), step, time.monotonic(), os.getpid())
        self._beats[local_rank].write(beat)

    def read(self, local_rank: int) -> Beat:
        """The newest beat of a rank; WAITING at time 0 when it never reported."""
        payload = self._beats[local_rank].read()
        if payload is None:
            return Beat(Phase.WAITING, 0, 0.0)
        phase, step, at, pid = BEAT.unpack(payload)
        return Beat(PHASES[phase], step, at, pid)

    def beats(self) -> list[Beat]:
        """The newest beat of every local rank, in order."""
        return [self.read(local_rank) for local_rank in range(self.processes)]

    @property
    def order(self) -> Order:
        """What the supervisor wants; it stands until it is changed, so act on the change."""
        return ORDERS[RECORD.unpack_from(self._memory, ORDER_OFFSET)[0]]

    @order.setter
    def order(self, order: Order) -> None:
        RECORD.pack_into(self._memory, ORDER_OFFSET, ORDERS.index(order))

    def put_progress(self, progress: Progress) -> None:
        """Publish how far training is. For global rank 0 only; it stays across restarts.

        A list of skipped checkpoints too long for the record is left out: progress itself matters
        more.
        """
        payload = progress.to_json().encode()
        if len(payload) > PROGRESS_BYTES:
            payload = progress.model_copy(update={"skipped": ()}).to_json().encode()
        self._progress.write(payload)

    def progress(self) -> Progress | None:
        """What global rank 0 published last, or None when it isn't here or has not yet."""
        payload = self._progress.read()
        return None if payload is None else Progress.model_validate_json(payload)

    def forget_progress(self) -> None:
        """For the supervisor, when global rank 0 is no longer here and no local rank runs."""
        self._progress.write(b"")

    def put_failure(self, local_rank: int, failure: Failure) -> None:
        """Leave this rank's last words; a message over the capacity keeps its end."""
        payload = failure.to_json().encode()
        while len(payload) > FAILURE_BYTES:
            failure = failure.model_copy(update={"message": failure.message[FAILURE_BYTES // 8 :]})
            payload = failure.to_json().encode()
        self._failures[local_rank].write(payload)

    def failures(self) -> dict[int, Failure]:
        """Last words by local rank, of those that left any since :meth:`clear`."""
        payloads = {rank: record.read() for rank, record in enumerate(self._failures)}
        return {
            rank: Failure.model_validate_json(payload)
            for rank, payload in payloads.items()
            if payload is not None
        }

    def clear(self) -> None:
        """Forget beats and last words before ranks start again; progress and order stay.

        Only while no local rank runs: this is the one moment when the slots change their writer.
        """
        for record in (*self._beats, *self._failures):
            record.write(b"")
