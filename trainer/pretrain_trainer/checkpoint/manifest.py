"""The manifest: the one small file that says which bytes a checkpoint consists of.

It is JSON in one canonical spelling (sorted keys, no blanks) and carries the digest of everything
else in itself, so any changed bit is noticed, be it in the list of files or in the step number. A
digest is no signature: it finds damage and mix-ups. Who can write to the volume can write a
manifest too, which is why nothing that is read afterwards may run code either.

The nonce of a generation opens doors elsewhere, so only a short digest of it (``token``) is stored.
"""

import json
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import DamagedError, UncommittedError
from .files import CHUNK_BYTES, FileDigest, Folder, VerifiedFile, digest

NAME: Final = "manifest.json"
METADATA: Final = ".metadata"

_SIZE_LIMIT = 256 << 20  # of the manifest itself: digests of about 60 TB
_MAX = (1 << 63) - 1
_Count = Annotated[int, Field(ge=0, le=_MAX)]
_Text = Annotated[str, Field(max_length=4096)]
_Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# No separators and no dots to climb: a manifest can't name anything outside its folder. (These are
# Rust's regular expressions, where $ is the very end.)
_FileName = Annotated[str, Field(pattern=r"^(\.metadata|__[0-9]{1,7}_[0-9]{1,4}\.distcp)$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class FileEntry(_Strict):
    """One file: its name, its length and the digest of each chunk."""

    name: _FileName
    bytes: _Count
    chunks: list[_Hex]

    @property
    def expected(self) -> FileDigest:
        """What :class:`VerifiedFile` compares with."""
        return FileDigest(self.bytes, self.chunks)


class Manifest(_Strict):
    """Everything a committed checkpoint promises."""

    version: Literal[1] = 1
    step: _Count
    time: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # seconds since the epoch
    job_uid: _Text
    generation: _Count
    token: _Text
    torch: _Text
    world_size: Annotated[int, Field(ge=1, le=10_000_000)]
    model_only: bool
    fingerprint: dict[_Text, _Text]
    chunk_bytes: Annotated[int, Field(ge=1, le=1 << 30)]
    total_bytes: _Count
    files: list[FileEntry]

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        names = [entry.name for entry in self.files]
        if len(set(names)) != len(names) or METADATA not in names:
            raise ValueError("files are listed twice or .metadata is not listed")
        for entry in self.files:
            if len(entry.chunks) != -(-entry.bytes // self.chunk_bytes):
                raise ValueError(f"{entry.name} has the wrong number of digests")
        if sum(entry.bytes for entry in self.files) != self.total_bytes:
            raise ValueError("total_bytes is not the sum of the files")
        return self

    def entry(self, name: str) -> FileEntry:
        """The entry of a file.

        Raises:
            DamagedError: the manifest doesn't list it.
        """
        for entry in self.files:
            if entry.name == name:
                return entry
        raise DamagedError(f"{name} is not in the manifest")


def encode(manifest: Manifest) -> bytes:
    """The manifest's one spelling, its own digest included."""
    content = manifest.model_dump()
    return _canonical({**content, "digest": digest(_canonical(content))})


def decode(data: bytes) -> Manifest:
    """Parse and check a manifest.

    Raises:
        DamagedError: it is not exactly what :func:`encode` wrote.
    """
    try:
        content = json.loads(data)
        whole = isinstance(content, dict) and _canonical(content) == data
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{NAME} is not valid JSON") from error
    if not whole or content.pop("digest", None) != digest(_canonical(content)):
        raise DamagedError(f"{NAME} doesn't match its own digest")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise DamagedError(f"{NAME}: {where or 'content'}: {problem['msg']}") from error


def read(folder: Folder) -> Manifest:
    """The manifest of an open step folder.

    Raises:
        UncommittedError: there is none.
        DamagedError: it is not valid.
    """
    if not folder.has(NAME):
        raise UncommittedError(f"it has no {NAME}, so it was never committed")
    return decode(folder.small_file(NAME, _SIZE_LIMIT))


def check_sizes(folder: Folder, manifest: Manifest) -> None:
    """Cheap first look: every listed file is a plain file of the right length.

    Raises:
        DamagedError: one is not.
    """
    for entry in manifest.files:
        with folder.file(entry.name) as handle:
            VerifiedFile(handle, entry.name, entry.expected, manifest.chunk_bytes)


def verify(
    folder: Folder, manifest: Manifest, share: int = 0, of: int = 1, *, cold: bool = False
) -> None:
    """Read back this process's share of all chunks.

    Args:
        folder: the open step folder.
        manifest: what it promises.
        share: which share, from 0.
        of: into how many shares the chunks are dealt.
        cold: drop the kernel's copy first, to see what the storage itself holds.

    Raises:
        DamagedError: a chunk differs from its digest, or a file is missing or has another length.
    """
    dealt = 0
    for entry in manifest.files:
        with folder.file(entry.name) as handle:
            file = VerifiedFile(
                handle, entry.name, entry.expected, manifest.chunk_bytes, folder.alive
            )
            if cold:
                file.forget_cached()
            file.verify((share - dealt) % of, of)
        dealt += len(entry.chunks)


def torch_version() -> str:
    """The running torch's version, for the record."""
    return str(torch.__version__)


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


__all__ = [
    "CHUNK_BYTES",
    "METADATA",
    "NAME",
    "FileEntry",
    "Manifest",
    "check_sizes",
    "decode",
    "encode",
    "read",
    "torch_version",
    "verify",
]
