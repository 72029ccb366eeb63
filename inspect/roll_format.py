"""The zarr layout of a roll and its class masks: which arrays there are, how each is cut and described.

All metadata is untrusted: an array is opened only after its zarr.json was found to be, in every size, dtype
and codec, what this file would have written. So nothing that metadata claims is allocated. What metadata is
true at the check and another a moment later, in a roll that someone changes on purpose, is not covered.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from rollsight.inspect.errors import CONFIG, UserError
from rollsight.inspect.pyramid import FACTOR, level_count, level_shape
from rollsight.inspect.roll_places import Frames, LocalPlace, Place
from rollsight.inspect.strips import MAX_LINES, Strip, strip_problem
from zarr.codecs import ZstdCodec

CHUNK = 1024  # px, both ways: few and big, since zarr-python pays about one coroutine per chunk
SHARD_LINES = 4096
LINE_CHUNK = 65536  # of the per-line arrays
NOT_INSPECTED = 255  # label value
SCHEMA = 1
SUFFIX = ".zarr"
IMAGE_DTYPES = ("uint8", "uint16")
LINE_ARRAYS = {"encoder": "int64", "t_ns": "int64", "valid": "uint8"}

MAX_WIDTH = 2**17  # px
MAX_LINE_BYTES = 2**20  # all modes: 4 modes of 128k px of uint16
MAX_SHARD_BYTES = MAX_LINE_BYTES * SHARD_LINES

# zarr's default (cpu + 4 threads) is for one reader that has the machine. Here every band has a reader of its
# own, so a small pool is enough and keeps the cores for the nets. A user's own setting stands.
READ_THREADS = 4
if zarr.config.get("threading.max_workers") is None:
    zarr.config.set({"threading.max_workers": READ_THREADS, "async.concurrency": READ_THREADS})

_ARRAY_CONFIG = {"write_empty_chunks": True}  # so a shard that is not there is damage, never black strip


@dataclass(frozen=True, slots=True)
class Layout:
    """How one array is cut. shard is the file's extent; equal to chunk where the array has no shards."""

    shape: tuple[int, ...]
    dtype: str
    shard: tuple[int, ...]
    chunk: tuple[int, ...]
    axes: tuple[str, ...]
    fill: int = 0

    @property
    def frames(self) -> Frames:
        sharded = self.shard != self.chunk or len(self.shape) > 1
        counts = [whole // part for whole, part in zip(self.shard, self.chunk, strict=True)]
        chunk_bytes = math.prod(self.chunk) * np.dtype(self.dtype).itemsize
        return Frames(chunk_bytes, math.prod(counts) if sharded else None)

    def files(self, lines: int) -> Iterator[str]:
        """Names, within the array's folder, of the files that its first `lines` rows take."""
        axis = self.axes.index("y")
        shape = [*self.shape]
        shape[axis] = min(shape[axis], lines)
        counts = [range(-(-size // extent)) for size, extent in zip(shape, self.shard, strict=True)]
        for index in itertools.product(*counts):
            yield "/".join(("c", *map(str, index)))


def image_layout(level: int, modes: int, lines: int, width: int, dtype: str) -> Layout:
    """Array `level` of a roll of `lines` x `width` px."""
    height, across = level_shape(lines, width, level)
    # Levels 1 and 2 go shard by shard with level 0; above, such shards would be slivers.
    rows = SHARD_LINES // FACTOR**level if level <= 2 else SHARD_LINES
    return Layout(
        shape=(modes, height, across),
        dtype=dtype,
        shard=(modes, rows, _padded(across)),
        chunk=(1, min(CHUNK, rows), CHUNK),
        axes=("c", "y", "x"),
    )


def lines_layout(name: str, lines: int) -> Layout:
    """Array `lines/<name>`: one value per line."""
    return Layout((lines,), LINE_ARRAYS[name], (LINE_CHUNK,), (LINE_CHUNK,), ("y",))


def mask_layout(level: int, lines: int, width: int, shard_lines: int) -> Layout:
    """Array `level` of a class mask; above level 0 there is one writer, at close."""
    height, across = level_shape(lines, width, level)
    rows = SHARD_LINES if level else shard_lines
    return Layout(
        shape=(height, across),
        dtype="uint8",
        shard=(rows, _padded(across)),
        chunk=(math.gcd(rows, CHUNK), CHUNK),
        axes=("y", "x"),
        fill=NOT_INSPECTED,
    )


def _padded(width: int) -> int:
    """A shard is a whole number of chunks, so it overhangs the array on the right."""
    return -(-width // CHUNK) * CHUNK


def create_array(place: Place, name: str, layout: Layout) -> None:
    """The empty array."""
    sharded = layout.frames.per_shard is not None
    zarr.create_array(
        store=place.writes(),
        name=name,
        shape=layout.shape,
        shards=layout.shard if sharded else None,
        chunks=layout.chunk,
        dtype=layout.dtype,
        compressors=ZstdCodec(level=1),
        fill_value=layout.fill,
        dimension_names=layout.axes,
    )


def open_for_writing(place: Place, name: str) -> Any:
    """An array that `check_array` has found to be ours, for writing by whole shards."""
    array = zarr.open_array(store=place.writes(), path=name, mode="r+", zarr_format=3)
    return array.with_config(_ARRAY_CONFIG)  # not kept with the array, and open_array drops what it is given


def open_for_reading(place: Place, name: str, layout: Layout) -> Any:
    """An array that `check_array` has found to be ours: indexed, it gives what numpy can take in.

    By tensorstore where it is installed and the roll is local, else by zarr-python: the same bytes.
    ROLLSIGHT_READER=zarr or =tensorstore forces one.
    """
    try:
        if isinstance(place, LocalPlace) and _reader() == "tensorstore":
            return _open_tensorstore(str(place.path / name))
        return zarr.open_array(store=place.reads(name, layout.frames), mode="r", zarr_format=3)
    except UserError:
        raise
    except Exception as error:  # what the checks before did not foresee in foreign metadata
        raise corrupt(f"{place}/{name}", str(error)[:200]) from error


@cache
def _has_tensorstore() -> bool:
    try:
        import tensorstore  # noqa: F401 # a wheel for another machine fails here, not when it is looked for
    except ImportError:
        return False
    return True


def _reader() -> str:
    wish = os.environ.get("ROLLSIGHT_READER", "")
    if wish not in ("", "zarr", "tensorstore"):
        raise UserError(f"ROLLSIGHT_READER is {wish[:40]!r}: it must be zarr or tensorstore", CONFIG)
    if wish == "tensorstore" and not _has_tensorstore():
        raise UserError("ROLLSIGHT_READER is tensorstore: pip install 'rollsight[fast]'", CONFIG)
    return wish or ("tensorstore" if _has_tensorstore() else "zarr")


@cache
def _tensorstore_context() -> Any:
    import tensorstore

    limits = {name: {"limit": READ_THREADS} for name in ("data_copy_concurrency", "file_io_concurrency")}
    return tensorstore.Context(limits)


def _open_tensorstore(path: str) -> Any:
    import tensorstore

    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": path + "/"},
        "fill_missing_data_reads": False,  # else a lost chunk would be black strip
    }
    return tensorstore.open(spec, open=True, read=True, context=_tensorstore_context()).result()


def read_array(array: Any, part: slice | tuple[slice, ...], what: object) -> NDArray[Any]:
    """The part as a numpy array; UserError naming `what` where its files are damaged."""
    try:
        return np.asarray(array[part])
    except MemoryError:
        raise
    except Exception as error:  # the readers raise whatever their codecs do: a bad checksum, a short file
        raise UserError(f"{what} is damaged: it cannot be read ({str(error)[:200]})") from error


def corrupt(where: object, reason: str) -> UserError:
    return UserError(f"{where} is not a readable roll: {reason}")


def read_json(place: Place, name: str = "zarr.json") -> dict[str, Any]:
    """A JSON object from a small file, else UserError."""
    where = f"{place}/{name}"
    data = place.read(name)
    if data is None:
        raise corrupt(where, "No such file")
    return parse_json(data, where)


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object, else UserError."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise corrupt(where, f"the JSON is broken ({str(error)[:200]})") from error
    if not isinstance(found, dict):
        raise corrupt(where, "the JSON is no object")
    return found


def group_attributes(place: Place) -> dict[str, Any]:
    metadata = read_json(place)
    attributes = metadata.get("attributes", {})
    if metadata.get("zarr_format") != 3 or metadata.get("node_type") != "group":
        raise corrupt(f"{place}/zarr.json", "needed a group of Zarr v3")
    if not isinstance(attributes, dict):
        raise corrupt(f"{place}/zarr.json", "attributes is no object")
    return attributes


def group_json(attributes: dict[str, Any]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=2).encode()


def array_shape(place: Place, axes: int) -> tuple[int, ...]:
    """The shape that the array's metadata claims, each size from 1 to MAX_LINES; UserError else."""
    shape = read_json(place).get("shape")
    if not isinstance(shape, list) or len(shape) != axes:
        raise corrupt(f"{place}/zarr.json", f"shape is {str(shape)[:60]}; needed {axes} sizes")
    return _sizes(shape, place, "shape")


def check_array(place: Place, layout: Layout) -> None:
    """UserError where the array's metadata is not that of this layout, in each part that a reader goes by."""
    where = f"{place}/zarr.json"
    metadata = read_json(place)
    if metadata.get("zarr_format") != 3 or metadata.get("node_type") != "array":
        raise corrupt(where, "needed an array of Zarr v3")
    with _complete(where):
        found = Layout(
            _sizes(metadata["shape"], place, "shape"),
            metadata["data_type"],
            _sizes(metadata["chunk_grid"]["configuration"]["chunk_shape"], place, "chunk_shape"),
            _inner_chunk(metadata, place),
            layout.axes,
            layout.fill,
        )
        keys = metadata["chunk_key_encoding"]
        separator = keys.get("configuration", {}).get("separator", "/")
        if metadata["chunk_grid"]["name"] != "regular" or (keys["name"], separator) != ("default", "/"):
            raise corrupt(where, "needed a regular chunk grid with default chunk keys")
        if metadata.get("storage_transformers"):
            raise corrupt(where, "unknown storage transformers")
    if found != layout:
        raise corrupt(
            where,
            f"found {str(found.dtype)[:20]} {found.shape} in shards {found.shard} of chunks {found.chunk},"
            f" needed {layout.dtype} {layout.shape} in {layout.shard} of {layout.chunk}",
        )


@contextlib.contextmanager
def _complete(where: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise corrupt(where, f"the array metadata is incomplete ({str(repr(error))[:80]})") from error


def _inner_chunk(metadata: dict[str, Any], place: Place) -> tuple[int, ...]:
    """The chunk that is decoded at once; UserError for other codecs than ours, which `Frames` bounds."""
    codecs = metadata["codecs"]
    names = _codec_names(codecs)
    chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    if names == ["sharding_indexed"]:
        inner = codecs[0]["configuration"]
        chunk, names = inner["chunk_shape"], _codec_names(inner["codecs"])
        index = _codec_names(inner["index_codecs"])
        if index != ["bytes", "crc32c"] or inner.get("index_location", "end") != "end":
            raise corrupt(f"{place}/zarr.json", f"unknown codec for the index of a shard: {str(index)[:80]}")
    elif len(metadata["shape"]) > 1:
        raise corrupt(f"{place}/zarr.json", f"unknown codec {str(names)[:80]}: needed shards")
    if names != ["bytes", "zstd"]:
        raise corrupt(f"{place}/zarr.json", f"unknown codec {str(names)[:80]}: needed bytes, zstd")
    return _sizes(chunk, place, "chunk_shape")


def _codec_names(codecs: Any) -> list[Any]:
    return [codec["name"] for codec in codecs]


def _sizes(raw: Any, place: Place, what: str) -> tuple[int, ...]:
    if not isinstance(raw, list) or not 1 <= len(raw) <= 3:
        raise corrupt(f"{place}/zarr.json", f"{what} is {str(raw)[:60]}; needed 1 to 3 sizes")
    if any(type(size) is not int or not 0 < size <= MAX_LINES for size in raw):
        raise corrupt(f"{place}/zarr.json", f"{what} is {str(raw)[:60]}; needed sizes from 1 to {MAX_LINES}")
    return tuple(raw)


def check_files(place: Place, layout: Layout, lines: int) -> None:
    """UserError where a file of the array's first `lines` rows is missing, empty or larger than it can be."""
    if (problem := place.unfit(layout.files(lines), layout.frames.file_bytes)) is not None:
        raise UserError(f"roll {place} is damaged: {problem}; make it again")


def set_lines(place: Place, axis: int, lines: int) -> None:
    """Freeze an array's length. By its metadata: zarr's own resize would look for every chunk cut off."""
    metadata = read_json(place)
    metadata["shape"][axis] = lines
    place.write("zarr.json", json.dumps(metadata, indent=2).encode())


def check_levels(attributes: dict[str, Any], width: int, place: Place) -> int:
    """Levels of the pyramid; UserError where the `ome` attribute has other paths than "0", "1", ... of it."""
    try:
        datasets = attributes["ome"]["multiscales"][0]["datasets"]
        paths = [dataset["path"] for dataset in datasets]
    except (KeyError, TypeError, IndexError) as error:
        raise corrupt(f"{place}/zarr.json", "no OME-Zarr 0.5 multiscales") from error
    needed = level_count(width)
    if paths != [str(level) for level in range(needed)]:
        raise corrupt(
            f"{place}/zarr.json", f"multiscales paths are {str(paths)[:60]}; needed 0 to {needed - 1}"
        )
    return needed


def strip_from(attributes: dict[str, Any], place: Place) -> Strip:
    """The Strip of a roll's attributes, each value checked; keys of later versions are left aside."""
    where = f"{place}/zarr.json"
    raw = attributes.get("strip")
    if not isinstance(raw, dict):
        raise corrupt(where, "the attribute strip is missing")
    if raw.get("schema") != SCHEMA:
        raise corrupt(where, f"strip schema is {str(raw.get('schema'))[:20]}; needed {SCHEMA}")
    values: dict[str, Any] = {}
    for name in (entry.name for entry in fields(Strip)):
        value = raw.get(name)
        values[name] = tuple(value) if isinstance(value, list) else value
    closed, lines = values["closed"], values["lines"]
    if type(closed) is not bool or type(lines) is not int or not 0 <= lines <= MAX_LINES:
        raise corrupt(where, f"strip says closed {str(closed)[:20]}, lines {str(lines)[:20]}")
    problem = strip_problem(strip := Strip(**values))
    if problem is not None:
        raise corrupt(where, problem)
    return strip


def roll_attributes(strip: Strip, width: int, **more: Any) -> dict[str, Any]:
    """The attributes of a roll's group."""
    ome = {"version": "0.5", "multiscales": [multiscale(strip, level_count(width), modes=True)]}
    return {"ome": ome, "strip": {"schema": SCHEMA, **asdict(strip)}, **more}


def multiscale(strip: Strip, levels: int, *, modes: bool) -> dict[str, Any]:
    """OME-Zarr 0.5 multiscales entry: y along the strip from its head, x across from the first pixel.

    The mean of 4 x 4 px lies in their middle, hence the translation; a label's level takes the first of four.
    """
    unit = {"unit": "millimeter"} if strip.units == "mm" else {}
    size = (strip.mm_per_line or 1.0, strip.mm_per_px_x or 1.0)
    axes: list[dict[str, str]] = [{"name": "c", "type": "channel"}] if modes else []
    axes += [{"name": "y", "type": "space", **unit}, {"name": "x", "type": "space", **unit}]
    datasets = []
    for level in range(levels):
        step = FACTOR**level
        head = [1.0] if modes else []
        transforms: list[dict[str, Any]] = [{"type": "scale", "scale": head + [step * mm for mm in size]}]
        if modes and level:
            middle = [0.0] + [(step - 1) / 2 * mm for mm in size]
            transforms.append({"type": "translation", "translation": middle})
        datasets.append({"path": str(level), "coordinateTransformations": transforms})
    kind = "mean" if modes else "nearest"
    return {"name": strip.roll_id, "type": kind, "axes": axes, "datasets": datasets}
