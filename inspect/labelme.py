"""Labelme files in and out: one JSON per image, as Labelme 5 and newer read and write them.

In: shapes are drawn as Labelme's own converter draws them: polygons, rectangles and circles with all pixels
of their outline, lines of a width that the file does not hold, masks pixel by pixel. Where shapes overlap,
the later one in the file wins, so a hole in a polygon is a later `_background_` shape; `__ignore__` is what
nobody labelled. Shapes of one `group_id` are drawn like any: a defect is what hangs together in the mask.

Out: one `mask` shape per component, which loses no pixel and keeps holes, and the fields `group`, `split`,
`source` and `proposal` beside Labelme's own, which Labelme keeps when it saves.
"""

import base64
import binascii
import hashlib
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
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
    plain_name,
    read_inside,
    shapes_of,
    size_of,
    split_said,
    values_of,
    whole_folder,
)
from rollsight.inspect.labels import IMAGE_FORMATS, LabelledData, check_classes, open_image

VERSION = "5.5.0"  # of Labelme: the first files with `mask` shapes and `description`
LABELS = "labels.txt"  # as for `labelme --labels`: one name a line
LINE_PX = 10  # width of a line, and across a point: what Labelme's converter takes
MAX_JSON_BYTES = 2**28  # the image may be inside
MAX_POINTS = 100_000  # of one shape
REVIEWED = "reviewed"  # the flag of an image that a person has checked
# Points that a shape has, at least and at most.
POINTS = {
    "polygon": (3, MAX_POINTS),
    "rectangle": (2, 2),
    "oriented_rectangle": (4, 4),
    "circle": (2, 2),
    "line": (2, 2),
    "linestrip": (2, MAX_POINTS),
    "point": (1, 1),
    "mask": (2, 2),
}
# By Pillow's name of the format; MPO is a JPEG with further pictures behind the first, as cameras write it.
_SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "BMP": ".bmp"}


class Proposal(BaseModel):
    """What a file says that a model proposed: which, how and when."""

    model: str = Field(max_length=64)
    model_hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    engine: str = Field(max_length=64)
    refine: str = Field(max_length=64)
    code_version: str = Field(max_length=64)
    made_at: str = Field(max_length=64)  # ISO 8601, UTC
    image: str  # the image it was made for, in its folder
    uncertainty: float
    mask_digest: str = Field(pattern=r"^[0-9a-f]{64}$")  # of what was proposed: see `digest_of`


class _Shape(BaseModel):
    label: str = Field(min_length=1, max_length=256)
    points: list[tuple[FiniteFloat, FiniteFloat]] = Field(max_length=MAX_POINTS)
    shape_type: str | None = None
    mask: str | None = None
    group_id: int | None = None


class _File(BaseModel):
    shapes: list[_Shape]
    image_path: str = Field(alias="imagePath", min_length=1)
    image_data: str | None = Field(None, alias="imageData")
    height: int | None = Field(None, alias="imageHeight")
    width: int | None = Field(None, alias="imageWidth")
    flags: dict[str, bool] | None = None
    group: str = Field("", max_length=256)
    split: Literal["", "train", "val", "test"] = ""
    source: str = Field("", max_length=256)
    proposal: Proposal | None = None


def read_labelme(
    source: Path,
    *,
    images: Path | None = None,
    classes: Sequence[str] = (),
    group_by: str = "",
    line_px: int = LINE_PX,
) -> Incoming:
    """The images of a Labelme file, or of all `*.json` in a folder.

    An image is the one inside the file, else where its `imagePath` says, or, with `images`, of that name in
    the same sub-folder there. Its split is what the file says, else a folder above it named train, val or
    test. `classes` are in the order of their mask values; without them the lines of labels.txt, else all
    labels in alphabetical order. `line_px` is the width of a line. Raises UserError where there is nothing to
    read; what is wrong with one file comes in its place.

    A file that holds a proposal says in its source whether it was `reviewed` (the image's flag), else
    `changed` (other pixels than proposed), else `untouched`.
    """
    paths = sorted(source.rglob("*.json")) if source.is_dir() else [source]
    if not paths:
        raise UserError(f"{source}: no Labelme file there: needed a JSON file, or a folder of them")
    root = source if source.is_dir() else source.parent
    names = check_classes(source, list(classes) or _labels_of(root, paths))
    values, grouping = values_of(names), Grouping(group_by)

    def read_one(path: Path) -> LabelledImage:
        file = _parse(path)
        folder = path.parent.relative_to(root)
        image_name = file.image_path.replace("\\", "/")
        if file.image_data is not None:
            name, content = _embedded(file, folder / path.name)
        elif images is not None:
            name, content = read_inside(images, f"{folder.as_posix()}/{PurePosixPath(image_name).name}")
        else:
            name, content = read_inside(root, f"{folder.as_posix()}/{image_name}")
        size = size_of(name, content, (file.height, file.width))
        mask = _draw(size, file.shapes, values, line_px)
        where, state = file.source or f"labelme:{path.name}", ""
        if file.proposal is not None:
            name = plain_name(file.proposal.image)
            state = _state(file, mask, values)
            where = f"proposal:{file.proposal.model}@{file.proposal.model_hash[:12]}:{state}"
        kept = name_within(PurePosixPath(name))
        split, group = grouping.place(kept, file.split or split_said(folder.parts), file.group)
        return LabelledImage(kept, content, mask, split, group, where, state == "untouched")

    def read() -> Iterator[LabelledImage | UserError]:
        for path in paths:
            try:
                yield read_one(path)
            except UserError as fault:
                yield fault if str(fault).startswith(str(path)) else UserError(f"{path}: {fault}")

    return Incoming(names, len(paths), read())


def _labels_of(root: Path, paths: Sequence[Path]) -> list[str]:
    """The classes, where nobody names them."""
    special = (IGNORE_NAME, BACKGROUND_NAME)
    if (root / LABELS).is_file():
        lines = (root / LABELS).read_text(encoding="utf-8", errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip() and line.strip() not in special]
    found: set[str] = set()
    for path in paths:
        try:
            found |= {shape.label for shape in _parse(path).shapes}
        except UserError:
            continue  # told when its turn comes
    return sorted(found.difference(special))


def _parse(path: Path) -> _File:
    if not path.is_file():
        raise UserError(f"{path}: no such file: give a Labelme JSON file, or a folder of them")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path}: over {MAX_JSON_BYTES >> 20} MiB: save it without the image inside")
    try:
        return _File.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise UserError(f"{path}: not a Labelme file: {where}: {first['msg']}"[:300]) from None


def _embedded(file: _File, path: Path) -> tuple[PurePosixPath, bytes]:
    """The image inside a Labelme file, named as that is, with the suffix of what it is."""
    try:
        content = base64.b64decode(file.image_data or "", validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"imageData is no base64: {error}") from None
    kind = open_image(path, content).format or ""
    if kind not in _SUFFIXES:
        raise UserError(f"imageData is {kind or 'of no known format'}: needed {', '.join(IMAGE_FORMATS)}")
    return PurePosixPath(path.with_suffix(_SUFFIXES[kind]).as_posix()), content


def _draw(
    size: tuple[int, int], shapes: Sequence[_Shape], values: dict[str, int], line_px: int
) -> NDArray[np.uint8]:
    """The class mask (H, W) of the shapes, the later over the earlier."""
    canvas = Image.new("L", (size[1], size[0]))
    for number, shape in enumerate(shapes, start=1):
        try:
            if shape.label not in values:
                raise UserError(f"label {shape.label!r} is none of {', '.join(values)}")
            _draw_shape(canvas, shape, values[shape.label], line_px)
        except UserError as fault:
            raise UserError(f"shape {number}: {fault}") from None
    return np.array(canvas)


def _draw_shape(canvas: Image.Image, shape: _Shape, value: int, line_px: int) -> None:
    kind = shape.shape_type or "polygon"
    fewest, most = POINTS.get(kind, (0, 0))
    if not fewest:
        raise UserError(f"shape_type {kind[:40]!r} is none of {', '.join(POINTS)}")
    points = shape.points
    if not fewest <= len(points) <= most:
        raise UserError(f"a {kind} has {len(points)} points: needed {fewest} to {most}")
    check_outline(np.array(points))
    draw = ImageDraw.Draw(canvas)
    if kind in ("polygon", "oriented_rectangle"):
        draw.polygon(points, fill=value, outline=value)
    elif kind == "rectangle":
        (x0, x1), (y0, y1) = (sorted(c) for c in zip(*points, strict=True))
        draw.rectangle((x0, y0, x1, y1), fill=value, outline=value)
    elif kind == "mask":
        corner, pixels = _mask_of(shape)
        canvas.paste(value, corner, pixels)
    elif kind in ("line", "linestrip"):
        draw.line(points, fill=value, width=line_px, joint="curve")
    else:
        x, y = points[0]
        radius = math.dist(*points) if kind == "circle" else line_px // 2
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=value, outline=value)
        draw.point((x, y), fill=value)  # Pillow draws nothing of an ellipse without extent


def _mask_of(shape: _Shape) -> tuple[tuple[int, int], Image.Image]:
    """Where a `mask` shape lies, and its pixels, from the PNG in it."""
    try:
        content = base64.b64decode(shape.mask or "", validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"its mask is no base64: {error}") from None
    pixels = np.asarray(open_image(Path("mask"), content))
    (x0, y0), (x1, y1) = shape.points
    # Whole numbers are the first and last pixel; of others Labelme takes the first one, rounded.
    whole = all(c == int(c) for c in (x0, y0, x1, y1))
    if pixels.ndim != 2 or (whole and pixels.shape != (y1 - y0 + 1, x1 - x0 + 1)):
        raise UserError(
            f"its mask is {' x '.join(map(str, pixels.shape[1::-1]))} px, its box "
            f"{x1 - x0 + 1:g} x {y1 - y0 + 1:g} px: they must be equal"
        )
    return (round(x0), round(y0)), Image.fromarray(pixels.astype(bool))


def _state(file: _File, mask: NDArray[np.uint8], values: dict[str, int]) -> str:
    """What became of a proposal: "reviewed" by its flag, else "changed" or "untouched"."""
    if file.flags and file.flags.get(REVIEWED):
        return "reviewed"
    if file.proposal is not None and digest_of(mask, values) == file.proposal.mask_digest:
        return "untouched"
    return "changed"


def digest_of(mask: NDArray[np.uint8], values: dict[str, int]) -> str:
    """SHA-256, hex, of the pixels of each label in a mask (H, W), whatever the order of the classes."""
    digest = hashlib.sha256(str(mask.shape).encode())
    held = set(np.unique(mask).tolist()) - {0}
    for name in sorted(name for name, value in values.items() if value in held):
        digest.update(name.encode() + b"\0" + np.packbits(mask == values[name]).tobytes())
    return digest.hexdigest()


def write_labelme(data: LabelledData, out: Path, on_image: Callable[[int, int], None] | None = None) -> int:
    """Write the new folder `out`: each image file under `<split>/` with its JSON beside it, and labels.txt.

    Returns the number of images. UserError for rolls, for masks that are broken, and where `out` is there
    already.
    """
    count = 0
    with whole_folder(out) as staging:
        for image in outgoing(data, on_image):
            copy = staging / image.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image.sample.image, copy)
            sample = image.sample
            document = document_of(image.mask, data.classes) | {
                "imagePath": copy.name,
                **{"group": sample.group, "split": sample.split, "source": sample.source},
            }
            copy.with_suffix(".json").write_text(json.dumps(document), encoding="utf-8")
            count += 1
        write_label_names(staging, data.classes)
    return count


def write_label_names(folder: Path, classes: Sequence[str]) -> None:
    """labels.txt in `folder`, for `labelme --labels`."""
    lines = "\n".join((IGNORE_NAME, BACKGROUND_NAME, *classes))
    (folder / LABELS).write_text(f"{lines}\n", encoding="utf-8")


def document_of(
    mask: NDArray[np.uint8], classes: tuple[str, ...], score: NDArray[np.float32] | None = None
) -> dict[str, Any]:
    """The Labelme file of a mask (H, W), but for `imagePath`: a `mask` shape for each component.

    With `score` (H, W), the probability of each pixel's class, a shape says the largest within it.
    """
    shapes = []
    for name, x, y, inside in shapes_of(mask, classes):
        png = io.BytesIO()
        Image.fromarray(inside).save(png, "PNG", optimize=True)
        height, width = inside.shape
        shape: dict[str, Any] = {
            **{"label": name, "points": [[x, y], [x + width - 1, y + height - 1]]},
            **{"group_id": None, "description": "", "shape_type": "mask", "flags": {}},
            "mask": base64.b64encode(png.getvalue()).decode(),
        }
        if score is not None:
            largest = round(float(score[y : y + height, x : x + width][inside].max()), 4)
            shape |= {"description": f"score {largest:.2f}", "score": largest}
        shapes.append(shape)
    return {
        **{"version": VERSION, "flags": {}, "shapes": shapes, "imageData": None},
        **{"imageHeight": mask.shape[0], "imageWidth": mask.shape[1]},
    }
