"""Where a roll lies: a folder of a local disk or, by its URL, a prefix of an object store.

A local folder can be claimed, written durably, and renamed as a whole. An object store promises less: one PUT
is atomic, and that is all. There is no lock, no rename and no order of PUTs after a crash, so a roll there is
whole by its last PUT alone, and what needs more (live append, resume, a class mask beside the image) is
refused. Credentials and the endpoint of an object store come from the environment, as fsspec and boto read
them: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, FSSPEC_S3_KEY ...
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import stat
import struct
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.errors import CONFIG, LOCKED, USAGE, UserError
from zarr.abc.store import RangeByteRequest
from zarr.storage import FsspecStore, LocalStore

MAX_METADATA_BYTES = 2**22
TEMPORARY = ".partial"  # how the name of a file ends that is on its way to its place, ours and zarr's

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_FRAME_HEADER = 18  # bytes: the longest header of a zstd frame
_INDEX_ENTRY, _INDEX_CHECKSUM = 16, 4  # bytes, in the index at the end of a shard
_EMPTY = 2**64 - 1  # offset and length of a chunk that a shard does not hold


@dataclass(frozen=True, slots=True)
class Frames:
    """What the files of an array may hold: zstd frames that decode to `chunk_bytes` each.

    Without the check, numcodecs allocates what the header of a frame claims, and Python what an index claims.
    """

    chunk_bytes: int
    per_shard: int | None  # None where a file is one frame

    @property
    def file_bytes(self) -> int:
        """The most that a file of this array can take: a little over its pixels, noise does not shrink."""
        frame = self.frame_bytes
        return frame if self.per_shard is None else self.per_shard * (frame + _INDEX_ENTRY) + _INDEX_CHECKSUM

    @property
    def frame_bytes(self) -> int:
        return self.chunk_bytes + self.chunk_bytes // 256 + 1024  # over zstd's own bound, ZSTD_compressBound

    def check(self, data: NDArray[np.uint8], request: object) -> None:
        """ValueError where the bytes that a read of a file got, uint8 (n,), are not within these bounds."""
        if isinstance(request, RangeByteRequest) or self.per_shard is None:
            self._check_frame(data)
            return
        entries = self._index(data)
        if request is None:  # the whole shard, else its index alone
            for start, end in entries:
                self._check_frame(data[start:end])

    def _index(self, data: NDArray[np.uint8]) -> list[tuple[int, int]]:
        """Where the frames of a shard are, from the index at its end; zarr compares the index's checksum."""
        size = (self.per_shard or 0) * _INDEX_ENTRY
        entries = data[-size - _INDEX_CHECKSUM : -_INDEX_CHECKSUM].tobytes()
        if len(entries) < size:
            raise ValueError(f"it ends after {len(data)} bytes, within its index")
        found = []
        for start, length in struct.iter_unpack("<QQ", entries):
            if start == length == _EMPTY:
                continue
            if start + length > self.file_bytes or length > self.frame_bytes:
                raise ValueError(f"its index names {length} bytes from {start} on")
            found.append((start, start + length))
        return found

    def _check_frame(self, frame: NDArray[np.uint8]) -> None:
        found = _content_bytes(frame[:_FRAME_HEADER].tobytes())
        if found != self.chunk_bytes:
            raise ValueError(f"a zstd frame claims {found} bytes, a chunk has {self.chunk_bytes}")


def _content_bytes(header: bytes) -> int | None:
    """The decoded size that a zstd frame claims, RFC 8878 3.1.1.1; None where it is no frame or says none."""
    if len(header) < 6 or header[:4] != _ZSTD_MAGIC:
        return None
    descriptor = header[4]
    single = descriptor >> 5 & 1
    at = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    size = (single, 2, 4, 8)[descriptor >> 6]
    if size == 0:
        return None
    return int.from_bytes(header[at : at + size], "little") + (256 if size == 2 else 0)


class _CheckedReads:
    """A zarr store for reading one array of untrusted bytes."""

    frames: Frames

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        if key.endswith("zarr.json"):
            return await super().get(key, prototype, byte_range)  # type: ignore[misc] # of the zarr store
        data = await super().get(key, prototype, byte_range)  # type: ignore[misc]
        if data is None:
            raise FileNotFoundError(f"{key} is missing")  # zarr would read it as black strip
        self.frames.check(data.as_numpy_array(), byte_range)
        return data


class _LocalReads(_CheckedReads, LocalStore):  # type: ignore[misc] # zarr is untyped to mypy
    pass


class _RemoteReads(_CheckedReads, FsspecStore):  # type: ignore[misc]
    pass


class _BlindWrites:
    """A zarr store for a writer of whole shards: blind to what a shard held before.

    zarr reads a shard before each write into it, so one cut short by a power cut could not be written again.
    """

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        if not key.endswith("zarr.json"):
            return None
        return await super().get(key, prototype, byte_range)  # type: ignore[misc]


class _LocalWrites(_BlindWrites, LocalStore):  # type: ignore[misc]
    pass


class _RemoteWrites(_BlindWrites, FsspecStore):  # type: ignore[misc]
    pass


class _DurableWrites(_LocalWrites):
    """The same, and what was set survives a power cut: LocalStore renames into place but never syncs."""

    async def set(self, key: str, value: Any) -> None:
        # In a thread: all arrays of the process share this one event loop, and a sync may take its time.
        await asyncio.to_thread(_write_with_folders, Path(self.root) / key, value.as_buffer_like())


class LocalPlace:
    """A folder of a local disk, that need not exist yet."""

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        """durable: what was written survives a power cut when the call returns."""
        self.path = path
        self._durable = durable

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> LocalPlace:
        return LocalPlace(self.path / name, durable=self._durable)

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, name: str) -> bytes | None:
        """A small file whole, or None where there is none; UserError over MAX_METADATA_BYTES."""
        path = self.path / name
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path} is no plain file")  # a pipe would never end
            if status.st_size > MAX_METADATA_BYTES:
                raise _too_large(path)
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error

    def write(self, name: str, data: bytes) -> None:
        """A small file; where durable, readers see the old one or the new one."""
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if self._durable:
                write_durably(self.path / name, data)
            else:
                (self.path / name).write_bytes(data)

    def version(self, name: str) -> str | None:
        """What changes when a file is written anew: its size and time; None where there is none."""
        with disk_errors(self.path):
            try:
                status = (self.path / name).stat()
            except FileNotFoundError:
                return None
        return f"{status.st_size} {status.st_mtime_ns}"

    def unfit(self, names: Iterable[str], most: int) -> str | None:
        """The first file that is missing, empty or over `most` bytes, in words; None where all are fit."""
        for name in names:
            try:
                size = (self.path / name).stat().st_size
            except OSError:
                size = None
            if (problem := _unfit(self.path / name, size, most)) is not None:
                return problem
        return None

    def reads(self, name: str, frames: Frames) -> Any:
        """A zarr store whose root is `name`, for reading one array."""
        store = _LocalReads(self.path / name, read_only=True)
        store.frames = frames
        return store

    def writes(self) -> Any:
        """A zarr store for writing whole shards."""
        return (_DurableWrites if self._durable else _LocalWrites)(self.path)

    def errors(self) -> contextlib.AbstractContextManager[None]:
        return disk_errors(self.path)


class RemotePlace:
    """A prefix of an object store, by its URL. UserError where its fsspec package is missing."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            # No cache of listings: what another process has written since must be seen.
            self._fs, root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            raise UserError(
                f"{url} needs a package that is not installed ({error}): pip install 'rollsight[remote]' for"
                " s3://, else the fsspec package of that store",
                CONFIG,
            ) from error
        except ValueError as error:
            raise UserError(f"{url} is no place for a roll ({error})", USAGE) from error
        self._root = str(root).rstrip("/")

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePlace:
        return RemotePlace(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def path(self) -> Path:
        raise UserError(f"{self.url} is in an object store: this needs a roll on a local disk")

    def read(self, name: str) -> bytes | None:
        """A small object whole, or None where there is none; UserError over MAX_METADATA_BYTES."""
        with self.errors():
            try:
                data = bytes(self._fs.cat_file(f"{self._root}/{name}", start=0, end=MAX_METADATA_BYTES + 1))
            except (FileNotFoundError, IsADirectoryError):
                return None
        if len(data) > MAX_METADATA_BYTES:
            raise _too_large(f"{self.url}/{name}")
        return data

    def write(self, name: str, data: bytes) -> None:
        """A small object in one PUT: readers see the old one or the new one."""
        with self.errors():
            self._fs.pipe_file(f"{self._root}/{name}", data)

    def version(self, name: str) -> str | None:
        """What changes when an object is written anew, as the store tells it; None where there is none."""
        key = f"{self._root}/{name}"
        with self.errors():
            try:
                told = [str(self._fs.checksum(key))]
            except FileNotFoundError:
                return None
            with contextlib.suppress(NotImplementedError):  # a store without times, as over HTTP
                told.append(self._fs.modified(key).isoformat())
        return " ".join(told)

    def unfit(self, names: Iterable[str], most: int) -> str | None:
        """The first object that is missing, empty or over `most` bytes, in words; None where all are fit."""
        sizes = self._sizes()
        for name in names:
            if (problem := _unfit(f"{self.url}/{name}", sizes.get(name), most)) is not None:
                return problem
        return None

    def is_empty(self) -> bool:
        return not self._sizes()

    def clear(self, keep: str | None = None) -> None:
        """Remove all objects under the prefix but `keep`."""
        keys = [f"{self._root}/{name}" for name in self._sizes() if name != keep]
        if keys:
            with self.errors():
                self._fs.rm(keys)

    def _sizes(self) -> dict[str, int]:
        with self.errors():
            found = self._fs.find(self._root, detail=True)
        return {
            str(key).lstrip("/").removeprefix(self._root.lstrip("/") + "/"): int(entry["size"])
            for key, entry in found.items()
        }

    def reads(self, name: str, frames: Frames) -> Any:
        """A zarr store whose root is `name`, for reading one array."""
        options = {"use_listings_cache": False}
        store = _RemoteReads.from_url(f"{self.url}/{name}", storage_options=options, read_only=True)
        store.frames = frames
        return store

    def writes(self) -> Any:
        """A zarr store for writing whole shards."""
        return _RemoteWrites.from_url(self.url, storage_options={"use_listings_cache": False})

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """What the store refuses becomes one line: each fsspec package has exceptions of its own."""
        try:
            yield
        except (UserError, MemoryError):
            raise
        except Exception as error:
            raise UserError(
                f"{self.url} cannot be reached or used ({str(error)[:200] or type(error).__name__}):"
                " check the URL, the credentials and the endpoint"
            ) from error


Place = LocalPlace | RemotePlace


def place_of(location: Path | str) -> Place:
    """The place of a path or a URL; file:// is a path."""
    text = str(location)
    for scheme in ("file://", "local://"):
        text = text.removeprefix(scheme)
    if isinstance(location, Path) or "://" not in text:
        return LocalPlace(Path(text))
    if "::" in text:
        raise UserError(
            f"{text[:80]} chains stores: a roll has one plain URL such as s3://bucket/id.zarr", USAGE
        )
    return RemotePlace(text)


def _too_large(what: Path | str) -> UserError:
    return UserError(f"{what} is not a readable roll: metadata over {MAX_METADATA_BYTES} bytes")


def _unfit(path: Path | str, size: int | None, most: int) -> str | None:
    if not size:
        return f"{path} is missing"
    return f"{path} has {size} bytes, over the {most} it can have" if size > most else None


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the system refuses while `path` is written becomes one line for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free the disk or choose another place"
        ) from error


def write_durably(path: Path, data: Any) -> None:
    """The file holds either what it held or all of data (bytes), also after a power cut.

    UserError where the disk is full or the folder not writable.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def _write_with_folders(path: Path, data: Any) -> None:
    """write_durably, with the folders above that are new: their entries are lost in a power cut as well."""
    new = []
    for folder in path.parents:
        if folder.exists():
            break
        new.append(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, data)
    for folder in new:
        sync(folder.parent)


def sync(path: Path) -> None:
    """Make the bytes of a file, or the entries of a folder, durable: a rename may be lost in a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(top: Path) -> None:
    """Make all files and folders under `top` durable. One pass at the end: each sync waits for the disk."""
    for folder, _, names in os.walk(top):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def claim(folder: Path) -> int:
    """Make the folder, or take over what a killed owner left, and lock it: the descriptor to close.

    A kill gives the lock back. UserError (exit 75) where the owner lives.
    """
    for _ in range(3):
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # its owner removed it just now
            handle = lock(folder)
            if folder.exists() and os.fstat(handle).st_ino == folder.stat().st_ino:
                return handle
            os.close(handle)
    raise _locked(folder)


def lock(folder: Path) -> int:
    """The lock on a folder, to be given back by os.close; UserError (exit 75) where another has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise _locked(folder) from error
    return handle


def _locked(folder: Path) -> UserError:
    return UserError(f"{folder} is being written by another process: wait for it", LOCKED)


def clear(folder: Path) -> None:
    """Remove all that is in the folder, but not the folder, which holds a lock."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextlib.contextmanager
def shared(folder: Path) -> Iterator[None]:
    """While files are on their way into the folder: nobody sweeps."""
    with _held(folder, fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no file is on its way into the folder, and let none begin."""
    with _held(folder, fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def _held(folder: Path, how: int) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)


def sweep(top: Path) -> None:
    """Remove the temporary files under `top`; for who holds the lock that every writer there takes."""
    for folder, _, names in os.walk(top):
        for name in names:
            if name.endswith(TEMPORARY):
                Path(folder, name).unlink(missing_ok=True)


def sweep_claims(folder: Path, stem: str) -> None:
    """Remove the folders `.<stem>.*.partial` that a killed `claim` left: the lock on them can be had."""
    for staging in folder.glob(f".{stem}.*{TEMPORARY}"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, UserError):
            handle = lock(staging)
            try:
                shutil.rmtree(staging, ignore_errors=True)
            finally:
                os.close(handle)
