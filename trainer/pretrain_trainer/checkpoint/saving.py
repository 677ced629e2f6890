"""Writing one checkpoint: steps 1 to 5 of the protocol in :mod:`.manager`."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed.checkpoint.metadata import Metadata

from . import manifest, metadata, planning, tensors
from .errors import DamagedError, SaveFailedError
from .files import ChunkWriter, FileDigest, Folder, write_durably
from .manifest import FileEntry, Manifest
from .peers import Peers
from .root import Identity, Root

T = TypeVar("T")


@dataclass(frozen=True)
class Save:
    """One save of one step. All methods are collective.

    Attributes:
        peers: the ranks that save together.
        root: where the checkpoint goes.
        identity: what the manifest says about its maker.
        step: number of finished optimizer steps.
        model_only: the state holds only weights.
        chunk_bytes: how much one digest covers.
    """

    peers: Peers
    root: Root
    identity: Identity
    step: int
    model_only: bool
    chunk_bytes: int

    def run(self, state: dict[str, Any], *, replace: bool) -> Manifest:
        """Write, commit and read back.

        Args:
            state: nested dicts of tensors.
            replace: there is a damaged checkpoint of this step, to be deleted at the commit.

        Raises:
            SaveFailedError: nothing was committed, or it reads back wrongly.
            FencedError: a newer generation holds the root.
            TypeError: the state holds something that is no tensor.
        """
        folder = Path(self._on_first(lambda: str(self.root.begin(self.step))))
        try:
            promise = self._write(folder, state, replace)
        except SaveFailedError:
            self._on_first(self.root.check)  # perhaps a newer generation cleared our folder away
            raise
        finally:
            if self.peers.rank == 0:
                self.root.discard(folder)  # after a commit it is gone already
        self._read_back(promise)
        return promise

    def _write(self, folder: Path, state: dict[str, Any], replace: bool) -> Manifest:
        planner, plan, parts = self.peers.everywhere(lambda: planning.propose(state))
        proposals = self.peers.gather(parts) or []
        keep: list[list[int]] = []
        table = Metadata({})

        def choose() -> None:
            nonlocal keep, table
            keep, table = planning.decide(proposals)

        self.peers.first(choose)
        mine = self.peers.scatter(keep)

        def write_own() -> tuple[list[tuple[int, int]], FileDigest | None]:
            if not mine:
                return [], None
            items = [plan.items[position] for position in mine]
            path = folder / planning.data_file(self.peers.rank)
            with self._storage():
                return tensors.write(path, items, planner, self.chunk_bytes, self.peers.alive)

        written = self.peers.gather(self.peers.everywhere(write_own)) or []

        def commit() -> str:
            planning.fill_in(table, proposals, keep, [places for places, _ in written])
            digests = {
                planning.data_file(rank): FileDigest(*found)
                for rank, (_, found) in enumerate(written)
                if found is not None
            }
            promise = self._seal(folder, table, digests)
            if replace:
                self.root.remove(self.step)
            self.root.commit(folder, self.step)
            return promise.decode()

        return manifest.decode(self._on_first(commit).encode())

    def _seal(self, folder: Path, table: Metadata, files: dict[str, FileDigest]) -> bytes:
        """Write the table of contents and, last, the manifest."""
        alive = self.peers.alive
        with ChunkWriter(folder / manifest.METADATA, self.chunk_bytes, alive) as file:
            file.write(metadata.dump(table))
            files = {manifest.METADATA: file.finish(), **files}
        entries = [FileEntry(name=n, bytes=d.bytes, chunks=d.chunks) for n, d in files.items()]
        promise = manifest.encode(
            Manifest(
                step=self.step,
                time=time.time(),
                job_uid=self.identity.job_uid,
                generation=self.identity.generation,
                token=self.identity.token,
                torch=manifest.torch_version(),
                world_size=self.peers.size,
                model_only=self.model_only,
                fingerprint=self.identity.fingerprint,
                chunk_bytes=self.chunk_bytes,
                total_bytes=sum(entry.bytes for entry in entries),
                files=entries,
            )
        )
        write_durably(folder / manifest.NAME, promise)
        return promise

    def _read_back(self, promise: Manifest) -> None:
        path = self.root.step(self.step)

        def check() -> None:
            with self._storage(), Folder.open(path, self.peers.alive) as folder:
                manifest.verify(folder, promise, self.peers.rank, self.peers.size, cold=True)

        try:
            self.peers.everywhere(check)
        except DamagedError as error:
            raise SaveFailedError(f"{path.name} reads back differently: {error}") from error

    def _on_first(self, work: Callable[[], T]) -> T:
        def guarded() -> T:
            with self._storage():
                return work()

        return self.peers.first(guarded)

    @contextmanager
    def _storage(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SaveFailedError(f"step-{self.step} was not saved: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    where = f" ({os.path.basename(str(error.filename))})" if error.filename else ""
    return f"{error.strerror or error}{where}"
