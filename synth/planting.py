"""New defects put into a copy of a roll: a whole roll with truth, every new defect with its provenance.

Two passes over the roll. The first draws the defects one after the other; where two want one place the lower
number has it. What a defect changes waits in a file. The second streams the roll, shard by shard, into the
new one. Neither holds more than a shard: memory grows with the width and, by some kB each, with the defects.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.rolls import (
    CHUNK,
    NOT_INSPECTED,
    SHARD_LINES,
    LabelWriter,
    Roll,
    RollWriter,
    check_absent,
)
from rollsight.synth.backgrounds import made_lines
from rollsight.synth.croissant import roll_card, write_card
from rollsight.synth.data_card import DATASET, PROVENANCE, data_card
from rollsight.synth.ground import read_ground
from rollsight.synth.mask_bank import Bools
from rollsight.synth.new_defect import MOST_DEFECTS, Field, NewDefect, make_defect
from rollsight.synth.strip import TRUTH_FILE, TRUTH_LABEL
from rollsight.synth.truth import found_rows, kept_rows, parts_of, truth_table

LINE_ID = "synthetic"  # of the new roll: it is not to count among the rolls of a real line


class Waiting:
    """New defects on their way into the roll: their boxes at hand, what they change in a file."""

    def __init__(self, file: IO[bytes], n: int) -> None:
        self._file = file
        self._boxes = np.zeros((n, 4), dtype=np.int64)
        self._at: list[int] = []

    def add(self, made: NewDefect) -> None:
        self._boxes[len(self._at)] = made.box
        self._at.append(self._file.tell())
        np.save(self._file, made.change, allow_pickle=False)
        np.save(self._file, made.inside, allow_pickle=False)

    def taken(self, y0: int, x0: int, y1: int, x1: int) -> bool:
        """Whether a box overlaps that of a defect that is there."""
        boxes = self._boxes[: len(self._at)]
        apart = (boxes[:, 0] >= y1) | (boxes[:, 2] <= y0) | (boxes[:, 1] >= x1) | (boxes[:, 3] <= x0)
        return not bool(apart.all())

    def within(self, y0: int, y1: int) -> Iterator[tuple[tuple[int, int], NDArray[np.int32], Bools]]:
        """First line and column, change and px of the defects that lines y0 to y1 hold some of."""
        boxes = self._boxes[: len(self._at)]
        for number in np.flatnonzero((boxes[:, 0] < y1) & (boxes[:, 2] > y0)):
            self._file.seek(self._at[number])
            change = np.load(self._file, allow_pickle=False)
            inside = np.load(self._file, allow_pickle=False)
            yield (int(boxes[number, 0]), int(boxes[number, 1])), change, inside


def plant_roll(
    field: Field,
    path: Path,
    n: int,
    *,
    licence: str = "",
    overwrite: bool = False,
    on_defect: Callable[[int, int], None] | None = None,
    on_lines: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Make the roll `path` (`<roll-id>.zarr`): the field's roll with `n` new defects; its card.

    Outside of the boxes of the new defects it is the source, bit by bit. Beside the image it gets the mask
    `truth` and `truth.parquet` as a simulated roll has them, provenance.jsonl with one line for each defect,
    and the card, dataset.json and croissant.json. What the source's own truth holds is taken over; what a
    scan found on it is marked 255, which nobody learns from. All of it stands at `path` at once, or nothing
    does. UserError as RollWriter.
    """
    roll, order, generator = field.roll, field.order, field.generator
    strip = replace(roll.strip, roll_id=path.name.removesuffix(".zarr"), line_id=LINE_ID)
    if not 1 <= n <= MOST_DEFECTS:
        raise UserError(f"{n} defects: give 1 to {MOST_DEFECTS:,}", USAGE)
    if order.density.kind == "periodic" and n > field.pitches:
        raise UserError(
            f"{n} periodic marks: {roll.lines} lines have {field.pitches} places {order.density.pitch_px} px "
            "apart: ask for fewer or give a smaller --pitch-px",
            USAGE,
        )
    if strip.roll_id == roll.roll_id:
        raise UserError(f"the new roll needs another id than its source {roll.roll_id}", USAGE)
    check_absent(path, overwrite=overwrite)
    has_truth = field.label == TRUTH_LABEL
    classes = roll.label_classes(TRUTH_LABEL) if has_truth else ()
    name = generator.card.defect_class
    if name not in classes:
        classes = (*classes, name)
    if len(classes) >= NOT_INSPECTED:
        raise UserError(f"roll {roll.roll_id}: its truth has {len(classes) - 1} classes, no room for {name}")
    rows = kept_rows(roll, classes) if has_truth else []  # None: there is a mask, but no table of it
    value = classes.index(name) + 1
    group = None
    if order.density.kind == "periodic":  # beside those of other damaged rolls
        group = 1 + max((row["periodic_group"] or 0 for row in rows or ()), default=0)
    lines: list[dict[str, Any]] = []
    with RollWriter(
        path, strip, roll.width, roll.dtype, total_lines=roll.lines, overwrite=overwrite
    ) as writer:
        with tempfile.TemporaryFile(dir=writer.building) as file:
            waiting, new_rows = Waiting(file, n), []
            for number in range(n):
                made = make_defect(field, number, waiting.taken)
                waiting.add(made)
                lines.append({"roll": strip.roll_id, **made.provenance})
                new_rows += parts_of(made.inside, made.y, made.x, name, group, made.left, strip)
                if on_defect is not None:
                    on_defect(number + 1, n)
            label = LabelWriter.create(
                writer.building,
                TRUTH_LABEL,
                classes,
                lines=None,  # the image has none yet
                width=roll.width,
                shard_lines=SHARD_LINES,
            )
            label.freeze(roll.lines)
            for y0 in range(0, roll.lines, SHARD_LINES):
                y1 = min(y0 + SHARD_LINES, roll.lines)
                mask = _known(field, y0, y1)
                for at, _, inside in waiting.within(y0, y1):
                    mine, theirs = _shared(at, inside.shape, y0, y1)
                    mask[theirs][inside[mine]] = value
                for y in range(y0, y1, CHUNK):
                    _append(writer, roll, waiting, y, min(y + CHUNK, y1))
                    if on_lines is not None:
                        on_lines(min(y + CHUNK, y1), roll.lines)
                label.write(y0, mask)
            label.close()
        if rows is None:
            rows = found_rows(roll, classes)
        table = truth_table([*rows, *new_rows])
        pq.write_table(table, writer.building / TRUTH_FILE)
        text = "".join(json.dumps(line) + "\n" for line in (*made_lines(roll), *lines))
        (writer.building / PROVENANCE).write_text(text, encoding="utf-8")
        card = _card(field, strip.roll_id, lines, table.num_rows, licence)
        (writer.building / DATASET).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        write_card(writer.building, roll_card(writer.building, card, classes))
        writer.close()
    return card


def is_on(roll: Roll, field: Field, made: NewDefect) -> bool:
    """Whether a roll of `plant_roll` still has the px and the truth of one of its new defects."""
    y0, x0, y1, x1 = made.box
    box = (slice(None), slice(x0, x1))
    steel, found = (one.read(y0, y1)[0][box] for one in (field.roll, roll))
    expected = (steel.astype(np.int64) + made.change).clip(0, np.iinfo(found.dtype).max)
    value = roll.label_classes(TRUTH_LABEL).index(field.generator.card.defect_class) + 1
    truth = roll.read_label(TRUTH_LABEL, y0, y1)[box]
    return bool((found == expected).all() and (truth[made.inside] == value).all())


def _known(field: Field, y0: int, y1: int) -> NDArray[np.uint8]:
    """The truth of lines y0 to y1 before anything is planted: (y1 - y0, W)."""
    roll = field.roll
    if field.label is not None:
        mask = roll.read_label(field.label, y0, y1).copy()
        if field.label != TRUTH_LABEL:
            mask[mask > 0] = NOT_INSPECTED  # found by a model: neither clean nor truth
        return mask
    mask = np.zeros((y1 - y0, roll.width), dtype=np.uint8)
    for y in range(y0, y1, CHUNK):
        for row in read_ground(roll, None, y, min(y + CHUNK, y1)).rows:
            for lost in row.not_inspected:
                mask[lost.y0 - y0 : lost.y1 - y0, lost.x0 : lost.x1] = NOT_INSPECTED
    return mask


def _append(writer: RollWriter, roll: Roll, waiting: Waiting, y0: int, y1: int) -> None:
    """Lines y0 to y1 of the roll, with what the new defects change, to the new roll."""
    block = roll.read(y0, y1).copy()
    for at, change, _ in waiting.within(y0, y1):
        mine, theirs = _shared(at, change.shape, y0, y1)
        changed = block[0][theirs].astype(np.int64) + change[mine]
        block[0][theirs] = changed.clip(0, np.iinfo(block.dtype).max)
    known = roll.read_lines(y0, y1)
    writer.append(block, encoder=known.encoder, t_ns=known.t_ns, valid=known.valid)


def _shared(
    at: tuple[int, int], size: tuple[int, ...], y0: int, y1: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """What of a box at line and column `at` lies on lines y0 to y1: its window in the box, and on them."""
    (y, x), (height, width) = at, size
    a, b = max(y, y0), min(y + height, y1)
    return (slice(a - y, b - y), slice(0, width)), (slice(a - y0, b - y0), slice(x, x + width))


def _card(field: Field, roll_id: str, lines: list[dict[str, Any]], rows: int, licence: str) -> dict[str, Any]:
    """The card of the new roll."""
    bank, roll = field.generator.bank, field.roll
    origins = {(mark.source, tuple(mark.origin)): mark for mark in bank.marks}
    cut = sum(any(origins[m["source"], tuple(m["origin"])].cut) for line in lines for m in line["marks"])
    failures = [f"Its steel is that of roll {roll.roll_id}: both belong to one split."]
    if cut:
        failures.append(f"{cut} of its new defects were cut off by the border of their scene, and end there.")
    card = data_card(
        field.generator, field.order.to_json(), lines, {field.roll.roll_id: field.label}, licence, failures
    )
    return card | {"roll": roll_id, "into": roll.roll_id, "lines": roll.lines, "truth_rows": rows}
