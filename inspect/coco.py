"""COCO annotation files in and out: polygons and run lengths, as cocodataset.org/#format-data says.

In: pixels of a polygon are those that pycocotools gives it (about those whose centre it holds; a polygon so
thin that it holds none keeps the pixels of its outline). Where annotations overlap, the later one in the file
wins. `iscrowd` does not matter: some tools set it on every painted mask. `__ignore__` and `_background_` are
categories of pixels that nobody labelled and of background.

Out: one compressed run length per component, which loses no pixel, and the fields `group`, `split` and
`source` of an image, which other readers pass over.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pydantic import BaseModel, Field, FiniteFloat, ValidationError
from rollsight.inspect.errors import UserError
from rollsight.inspect.labelled_folder import (
    BACKGROUND_NAME,
    IGNORE_NAME,
    Grouping,
    Incoming,
    LabelledImage,
    check_outline,
    name_within,
    outgoing,
    read_inside,
    shapes_of,
    size_of,
    split_said,
    values_of,
    whole_folder,
)
from rollsight.inspect.labels import SPLITS, LabelledData, check_classes

MAX_JSON_BYTES = 2**29  # instances_train2017.json of COCO itself has 448 MB


class _RunLengths(BaseModel):
    size: tuple[int, int]  # H, W
    counts: str | list[int]  # column by column, background first


class _Annotation(BaseModel):
    id: int | str = ""
    image_id: int | str
    category_id: int | str
    segmentation: _RunLengths | list[list[FiniteFloat]] = []


class _Image(BaseModel):
    id: int | str
    file_name: str = Field(min_length=1)
    height: int | None = None
    width: int | None = None
    group: str = Field("", max_length=256)
    split: Literal["", "train", "val", "test"] = ""
    source: str = Field("", max_length=256)


class _Category(BaseModel):
    id: int | str
    name: str = Field(min_length=1, max_length=256)


class _File(BaseModel):
    images: list[_Image]
    annotations: list[_Annotation] = []
    categories: list[_Category]


def read_coco(
    source: Path, *, images: Path | None = None, classes: Sequence[str] = (), group_by: str = ""
) -> Incoming:
    """The images of a COCO file, or of all `*.json` in a folder.

    An image lies where its `file_name` says, under `images`, else beside its file or in `images/` there. Its
    split is what the file says of it, else a word in the names of the file and its folders, as in
    `instances_train2017.json`. `classes` are in the order of their mask values; without them, all categories
    by their ids. Raises UserError where a file as a whole is broken; what is wrong with one image comes in
    its place.
    """
    paths = sorted(source.rglob("*.json")) if source.is_dir() else [source]
    files = {path: _parse(path) for path in paths}
    if not files:
        raise UserError(f"{source}: no COCO file there: needed a JSON file, or a folder of them")
    named = {str(category.name): None for file in files.values() for category in _by_id(file.categories)}
    if not classes:
        classes = [name for name in named if name not in (IGNORE_NAME, BACKGROUND_NAME)]
    values = values_of(check_classes(source, list(classes)))
    grouping = Grouping(group_by)

    def read() -> Iterator[LabelledImage | UserError]:
        for path, file in files.items():
            within = path.relative_to(source) if source.is_dir() else Path(path.name)
            said = split_said((*within.parts[:-1], *re.split("[^a-z]+", path.stem.lower())))
            root = images or path.parent
            drawn: dict[int | str, list[_Annotation]] = {}
            for annotation in file.annotations:
                drawn.setdefault(annotation.image_id, []).append(annotation)
            names = {category.id: category.name for category in file.categories}
            for image in file.images:
                try:
                    name, content = _find(root, image.file_name)
                    size = size_of(root / name, content, (image.height, image.width))
                    mask = _draw(size, drawn.get(image.id, ()), names, values)
                    kept = name_within(name)
                    split, group = grouping.place(kept, image.split or said, image.group)
                except UserError as fault:
                    yield UserError(f"{path}: image {image.id}: {fault}")
                else:
                    yield LabelledImage(
                        kept, content, mask, split, group, image.source or f"coco:{path.name}"
                    )

    return Incoming(tuple(classes), sum(len(file.images) for file in files.values()), read())


def _parse(path: Path) -> _File:
    """A COCO file whose ids fit together; UserError in one line else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file: give a COCO JSON file, or a folder of them")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path}: over {MAX_JSON_BYTES >> 20} MiB: cut it into files of fewer images")
    try:
        file = _File.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise UserError(f"{path}: not a COCO file: {where}: {first['msg']}"[:300]) from None
    for kind, entries in (("image", file.images), ("category", file.categories)):
        ids = [entry.id for entry in entries]
        if len(set(ids)) < len(ids):
            raise UserError(f"{path}: two of its entries have one {kind} id: ids must differ")
    images, categories = ({entry.id for entry in part} for part in (file.images, file.categories))
    for annotation in file.annotations:
        if annotation.image_id not in images:
            raise UserError(
                f"{path}: annotation {annotation.id} is of image {annotation.image_id}, which is not listed"
            )
        if annotation.category_id not in categories:
            raise UserError(
                f"{path}: annotation {annotation.id} is of category {annotation.category_id}, "
                "which is not listed"
            )
    return file


def _by_id(categories: list[_Category]) -> list[_Category]:
    return sorted(categories, key=lambda category: (isinstance(category.id, str), category.id))


def _find(root: Path, file_name: str) -> tuple[PurePosixPath, bytes]:
    """The image under `root`, or under `images/` there."""
    try:
        return read_inside(root, file_name)
    except UserError as fault:
        try:
            return read_inside(root, f"images/{file_name}")
        except UserError:
            raise fault from None


def _draw(
    size: tuple[int, int],
    annotations: Sequence[_Annotation],
    names: dict[int | str, str],
    values: dict[str, int],
) -> NDArray[np.uint8]:
    """The class mask (H, W) of one image's annotations, the later over the earlier."""
    columns = np.zeros((size[1], size[0]), np.uint8)  # run lengths go down the columns
    flat = columns.reshape(-1)
    for annotation in annotations:
        name = names[annotation.category_id]
        if name not in values:
            raise UserError(f"annotation {annotation.id}: label {name!r} is none of {', '.join(values)}")
        try:
            for counts in _runs(annotation.segmentation, size):
                for start, end in list(pairwise(np.cumsum(counts)))[::2]:
                    flat[start:end] = values[name]
        except UserError as fault:
            raise UserError(f"annotation {annotation.id}: {fault}") from None
    return np.ascontiguousarray(columns.T)


def _runs(
    segmentation: _RunLengths | list[list[float]], size: tuple[int, int]
) -> Iterator[NDArray[np.int64]]:
    """The run lengths of each part of a segmentation: they add up to H x W, background first."""
    if not segmentation:
        raise UserError("it has no segmentation: a box is no mask")
    if isinstance(segmentation, list):
        yield from (_runs_of_polygon(polygon, size) for polygon in segmentation)
        return
    if segmentation.size != size:
        raise UserError(f"its run lengths are for {segmentation.size}, the image is {size} (H, W)")
    given = segmentation.counts
    # pycocotools would read and write out of bounds for counts that do not add up (cocoapi#362).
    counts = decode_counts(given).tolist() if isinstance(given, str) else given
    if any(count < 0 for count in counts) or sum(counts) != size[0] * size[1]:
        raise UserError("its run lengths do not add up to the image")
    yield np.array(counts, np.int64)


def decode_counts(text: str) -> NDArray[np.int64]:
    """Run lengths of COCO's compressed form; UserError for a text that is none.

    6 bits per character from 48 on, of which one says that more follow, lowest first, signed; from the
    fourth on each number is the difference to the one before the last (rleToString of pycocotools).
    """
    codes = np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)
    if not codes.size or codes.min() < 0 or codes.max() > 63 or not ends.size or ends[-1] != codes.size - 1:
        raise UserError("its run lengths are damaged: no compressed counts of COCO")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        raise UserError("its run lengths are damaged: a count has over 35 bits")
    place = np.arange(codes.size) - np.repeat(starts, lengths)
    counts = np.add.reduceat((codes & 31) << (5 * place), starts)
    counts -= (codes[ends] >> 4 & 1) << (5 * lengths)
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts


def _runs_of_polygon(polygon: list[float], size: tuple[int, int]) -> NDArray[np.int64]:
    """The run lengths of the pixels in a polygon x, y, x, y, …"""
    height, width = size
    if len(polygon) < 6 or len(polygon) % 2:
        raise UserError(f"a polygon of {len(polygon)} numbers: needed x and y of three points or more")
    points = np.array(polygon).reshape(-1, 2)
    check_outline(points)
    counts = decode_counts(coco_mask.frPyObjects([polygon], height, width)[0]["counts"].decode())
    if counts.size > 1:
        return counts
    outline_only = Image.new("1", (width, height))
    ImageDraw.Draw(outline_only).polygon([*map(tuple, np.floor(points))], outline=1)
    inside = np.flatnonzero(np.asarray(outline_only).T)
    if not inside.size:
        raise UserError("its polygon covers no pixel of the image")
    return _counts_of(inside, height * width)


def _counts_of(inside: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Run lengths of sorted pixel numbers out of `total`."""
    breaks = np.flatnonzero(np.diff(inside, prepend=-2, append=total + 2) != 1)
    edges = np.stack([inside[breaks[:-1]], inside[breaks[1:] - 1] + 1], axis=1).ravel()
    counts = np.diff(edges, prepend=0, append=total)
    return counts if counts[-1] else counts[:-1]


def write_coco(data: LabelledData, out: Path, on_image: Callable[[int, int], None] | None = None) -> int:
    """Write the new folder `out`: `<split>.json` for each split, and all image files under `images/`.

    Category ids are the mask values. Returns the number of images. UserError for rolls, for masks that are
    broken, and where `out` is there already.
    """
    categories = [
        {"id": value, "name": name}
        for name, value in values_of(data.classes).items()
        if name != BACKGROUND_NAME
    ]
    files: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with whole_folder(out) as staging:
        for image in outgoing(data, on_image):
            file = files.setdefault(
                image.sample.split, {"images": [], "annotations": [], "categories": categories}
            )
            height, width = image.mask.shape
            number = len(file["images"]) + 1
            file["images"].append(
                {
                    **{"id": number, "file_name": f"images/{image.name}", "width": width, "height": height},
                    **{"group": image.sample.group, "split": image.sample.split},
                    "source": image.sample.source,
                }
            )
            for name, x, y, inside in shapes_of(image.mask, data.classes):
                file["annotations"].append(
                    {
                        **{"id": len(file["annotations"]) + 1, "image_id": number},
                        "category_id": values_of(data.classes)[name],
                        **{"iscrowd": int(name == IGNORE_NAME), "area": int(inside.sum())},
                        "bbox": [x, y, inside.shape[1], inside.shape[0]],
                        "segmentation": encode(inside, x, y, (height, width)),
                    }
                )
            copy = staging / "images" / image.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image.sample.image, copy)
        for split in SPLITS:
            if split in files:
                (staging / f"{split}.json").write_text(json.dumps(files[split]), encoding="utf-8")
    return sum(len(file["images"]) for file in files.values())


def encode(inside: NDArray[np.bool_], x: int, y: int, size: tuple[int, int]) -> dict[str, Any]:
    """Compressed run lengths, over an image of `size` (H, W), of the pixels (h, w) at x, y."""
    height, width = size
    xs, ys = np.nonzero(inside.T)
    counts = _counts_of((xs + x) * height + ys + y, height * width)
    # A component's runs alone: a mask of the whole image for each would cost its area every time.
    packed = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": packed["counts"].decode()}
