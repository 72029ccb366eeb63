"""The card of a synthetic set for machines: MLCommons Croissant 1.0 as JSON-LD, with its terms on limits.

The specification, https://docs.mlcommons.org/croissant/docs/croissant-spec.html, and the one on responsible
AI beside it (croissant-rai-spec.html). A set on a disk has neither address nor a paper, so `url` and `citeAs`
are left out: who publishes it adds them.
"""

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rollsight.synth.data_card import DATASET, PROVENANCE

CROISSANT = "croissant.json"
SPEC = "http://mlcommons.org/croissant/1.0"
RAI_SPEC = "http://mlcommons.org/croissant/RAI/1.0"

CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
FORMATS = {
    ".csv": "text/csv",
    ".json": "application/json",
    ".jsonl": "application/jsonlines",
    ".parquet": "application/x-parquet",
}
TEXT, WHOLE, NUMBER = "sc:Text", "sc:Integer", "sc:Float"
OF_PROVENANCE = {
    "index": (WHOLE, "Number of the sample; with the seed it decides all of it."),
    "attempt": (WHOLE, "Attempts before it that came to nothing."),
    "class": (TEXT, "Class of the new defects."),
    "generator": (TEXT, "SHA-256 of the generator: weights, marks, recipe."),
    "config": (TEXT, "SHA-256 of the recipe."),
    "sha256": (TEXT, "Of what was made."),
    "order.seed": (WHOLE, "Seed of the set."),
    "order.method": (TEXT, "gan, paste, poisson or degraded."),
    "order.variety": (NUMBER, "How far its defects are varied, of what is usual."),
    "background.name": (TEXT, "Image or roll that the steel is of."),
    "background.group": (TEXT, "Its group."),
    "background.y": (WHOLE, "First line of the steel in it."),
    "background.x": (WHOLE, "First column."),
    "marks.source": (TEXT, "Of each defect: the labelled image it comes from."),
    "marks.group": (TEXT, "Of each defect: the group of that image."),
    "marks.area_px": (WHOLE, "Of each defect: px of its mask."),
    "marks.contrast_kept": (NUMBER, "Of each defect: share of the paste's contrast that the editor left."),
}
REPEATED = "marks."  # fields that have a value for each defect of a sample


def folder_card(folder: Path, card: dict[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """The Croissant card of a folder of samples, whose files are all there; card: its dataset.json."""
    files = [
        *(_file(folder, name) for name in ("manifest.csv", "classes.json", PROVENANCE, DATASET)),
        _files("image-files", "image/png", "train/images/*.png"),
        _files("mask-files", "image/png", "train/masks/*.png"),
    ]
    manifest = {
        "image": (TEXT, "The image file."),
        "mask": (TEXT, "The mask file: 0 background, k class k, 255 nobody knows."),
        "split": (TEXT, "train, for all of them."),
        "group": (TEXT, "What must not be cut by a split: that of the steel."),
        "classes": (TEXT, "Mask values that it holds."),
        "width": (WHOLE, "px"),
        "height": (WHOLE, "px"),
        "sha256_16": (TEXT, "Of the image file, its first 16 digits."),
        "source": (TEXT, "Method and generator."),
    }
    records = [
        _pictures("images", "image-files", "Gray images."),
        _pictures("masks", "mask-files", "One mask per image, of the same name."),
        _table("samples", "manifest.csv", "One line per sample.", manifest),
        _provenance("How each sample was made.", "image", "Its image file."),
        _classes(classes),
    ]
    return _whole(card, f"{card['samples']} gray images with masks", files, records)


def roll_card(folder: Path, card: dict[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """The Croissant card of a roll with new defects, whose files are all there; card: its dataset.json."""
    files = [
        *(_file(folder, name) for name in ("truth.parquet", PROVENANCE, DATASET)),
        _files("image-chunks", "application/vnd.zarr", "0/**"),
        _files("mask-chunks", "application/vnd.zarr", "labels/truth/0/**"),
    ]
    truth = {
        "defect_id": (WHOLE, "In the order of first lines."),
        "class": (TEXT, "Class."),
        **dict.fromkeys(("x_mm", "width_mm", "length_mm"), (NUMBER, "mm; x from the drive-side edge")),
        "y_m": (NUMBER, "m from the head"),
        "area_mm2": (NUMBER, "mm2"),
        **dict.fromkeys(("area_px", "x0", "y0", "x1", "y1"), (WHOLE, "px; the box is half-open")),
    }
    records = [
        _table("truth", "truth.parquet", "Every defect that is known, new ones and those before.", truth),
        _provenance("How each new defect was made.", "roll", "The roll it was made for."),
        _classes(classes),
    ]
    told = (
        f"a roll of {card['lines']} lines (OME-Zarr 0.5): {card['into']} with {card['samples']} new defects"
    )
    return _whole(card, told, files, records)


def write_card(folder: Path, card: dict[str, Any]) -> None:
    (folder / CROISSANT).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def _whole(
    card: dict[str, Any], what: str, files: list[dict[str, Any]], records: list[dict[str, Any]]
) -> dict[str, Any]:
    order, made_by = card["order"], card["generator"]
    name = f"synthetic {card['name'].removeprefix('synthetic ')} {made_by['name']} seed {order['seed']}"
    rejected = ", ".join(f"{why} {n}" for why, n in card["rejected"].items()) or "none"
    checked = [
        f"Of what was made `inspect synth check` dropped {n}: {why}."
        for why, n in card.get("dropped_by_check", {}).items()
    ]
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": [SPEC, RAI_SPEC],
        "name": name.replace(" ", "-"),
        "description": f"{what}, {card['marks']} new defects, made by `inspect synth make`.",
        "license": card["licence"],
        "creator": {"@type": "sc:Organization", "name": f"Rollsight {version('rollsight')}"},
        "datePublished": datetime.now(UTC).date().isoformat(),
        "version": "1.0.0",
        "isLiveDataset": False,
        "keywords": ["synthetic", "steel strip", "surface defects", "segmentation"],
        "rai:dataCollection": (
            f"Synthetic, by generator {made_by['name']} ({made_by['hash']}), {made_by['method']}, from "
            f"{len(card['sources'])} labelled images of {card['fitted_on']} in {len(card['source_groups'])} "
            f"groups, on {card['backgrounds']} pieces of steel."
        ),
        "rai:dataCollectionType": ["Synthetic"],
        "rai:dataPreprocessingProtocol": [
            f"{card['attempts']} attempts, {card['reject_rate']:.1%} rejected ({rejected}).",
            f"Contrast kept by the editor: median {card['contrast_kept']['median']:.2f}, least "
            f"{card['contrast_kept']['smallest']:.2f}.",
            f"Sizes in {card['sizes']}.",
            *checked,
        ],
        "rai:dataAnnotationProtocol": ["Masks are those that the defects were made with: nobody drew them."],
        "rai:dataLimitations": card["known_failures"],
        "rai:dataUseCases": ["To be added to real training data of the class. Never to test with."],
        "distribution": files,
        "recordSet": records,
    }


def _file(folder: Path, name: str) -> dict[str, Any]:
    with (folder / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "encodingFormat": FORMATS[Path(name).suffix],
        "sha256": digest,
    }


def _files(name: str, encoding: str, pattern: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "encodingFormat": encoding,
        "includes": pattern,
    }


def _pictures(name: str, files: str, what: str) -> dict[str, Any]:
    """The record set of a set of image files: name and content of each."""
    fields = [
        ("filename", TEXT, "Its name within the folder.", "filename"),
        ("content", "sc:ImageObject", "Its content.", "content"),
    ]
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": what,
        "key": {"@id": f"{name}/filename"},
        "field": [
            _field(name, field, kind, told, {"fileSet": {"@id": files}, "extract": {"fileProperty": prop}})
            for field, kind, told, prop in fields
        ],
    }


def _table(name: str, file: str, what: str, columns: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """The record set of a table; a column `a.b` is what stands under b in column a."""
    fields = []
    for column, (kind, told) in columns.items():
        outer, _, inner = column.partition(".")
        source: dict[str, Any] = {"fileObject": {"@id": file}, "extract": {"column": outer}}
        if inner:
            source["transform"] = {"jsonPath": f"$.{inner}"}
        fields.append(_field(name, column, kind, told, source))
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": what,
        "field": fields,
    }


def _provenance(what: str, of: str, told: str) -> dict[str, Any]:
    """The record set of provenance.jsonl; of: the column that says which image or roll a line is of."""
    return _table("provenance", PROVENANCE, what, {of: (TEXT, told), **OF_PROVENANCE})


def _field(of: str, name: str, kind: str, what: str, source: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"{of}/{name}",
        "name": name,
        "description": what,
        "dataType": kind,
        **({"source": source} if source else {}),
        **({"repeated": True} if name.startswith(REPEATED) else {}),
    }


def _classes(classes: Sequence[str]) -> dict[str, Any]:
    """The record set of what the mask values mean."""
    fields = {"value": (WHOLE, "Mask value."), "name": (TEXT, "Class.")}
    return {
        "@type": "cr:RecordSet",
        "@id": "classes",
        "name": "classes",
        "description": "What the mask values mean, beside 0 background and 255 unknown.",
        "key": {"@id": "classes/value"},
        "field": [_field("classes", name, kind, what) for name, (kind, what) in fields.items()],
        "data": [
            {"classes/value": value, "classes/name": name} for value, name in enumerate(classes, start=1)
        ],
    }
