"""One band of a roll: lines -> class mask -> components -> receipt. And the plan that makes bands agree."""

import hashlib
import json
import platform
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.along_strip import STRIPE_PX, UNSEEN, cell_evidence, hide
from rollsight.inspect.defects import Components, band_components
from rollsight.inspect.engines import Engine, choose, engine_version, isa, precision, streamed
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.linescan import CellRow, NotInspected, read_row
from rollsight.inspect.models import Model
from rollsight.inspect.rolls import NOT_INSPECTED, LabelWriter, Roll, write_durably
from rollsight.inspect.tiles import CELL, Grid, Window, up_to_cell

CORE_LINES = 1024  # per window; the bands are multiples of it
FULL_WIDTH_PX = 2560  # up to this width one core spans the roll, which needs no halo across
WIDE_CORE_PX = 2048  # above it
A_MIN_PX = 3  # smaller components are fringes of others, not defects: they stay in the mask, not in the table
BAND_SIZES = (4096, 2048, 1024)  # lines: one receipt and one shard of the mask each
CPU_BAND_LINES = 2048  # the largest taken by itself on a CPU; on a GPU a band of 4096 is short work
# Bytes at the peak of one window, per px of it, with one lighting mode; each further mode adds MODE_BYTES.
# Default model, 8 planes of logits, 1536 x 1280 and 1536 x 2560 px: 192 and 319 B/px, 58 more for a mode.
WINDOW_BYTES = {"onnx": 200, "torch": 330, "openvino": 380}
MODE_BYTES = 60
NO_EVIDENCE = np.zeros((0, 0), dtype=np.int16)
BAND_BYTES = 16  # per px of a band: mask, score, components' ids and their scratch


@dataclass(frozen=True, slots=True)
class Facts:
    """What of a process decides the result of a scan: all that share a run must agree in it."""

    code: str  # this package's
    python: str
    engine: str
    engine_version: str
    device: str  # "cpu" | "cuda": which of several decides nothing
    precision: str  # "fp32" | "fp16"
    isa: str

    def differences(self, needed: "Facts") -> str:
        """What is not as needed, with both values; empty where all is."""
        return ", ".join(
            f"{field.name} is {getattr(self, field.name)}, needed {getattr(needed, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(needed, field.name)
        )


def facts_here(engine: str = "auto", device: str = "cpu") -> Facts:
    """The facts of this process with the engine and device that it would choose; UserError: see `choose`."""
    engine, device = choose(engine, device)
    return Facts(
        code_version(),
        ".".join(platform.python_version_tuple()[:2]),
        engine,
        engine_version(engine),
        device.partition(":")[0],
        precision(device),
        isa(device),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """All that decides the result of a scan, and nothing else: its hash is the run's id.

    The number of lines, the band size and the workers are not in it.
    """

    roll_id: str
    width: int
    white: tuple[float, ...]  # per lighting mode
    mm_per_px_x: float | None
    mm_per_line: float | None
    core_lines: int
    core_px: int
    halo: int
    a_min_px: int
    model_hash: str
    classes: tuple[str, ...]
    thresholds: tuple[float, ...]
    temperature: float
    engine: str
    engine_version: str
    device: str
    precision: str
    threads: int
    isa: str
    code: str
    along: str = ""  # class whose evidence is summed along the strip; "": none

    @property
    def run_id(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def grid(self, lines: int) -> Grid:
        return Grid(lines, self.width, self.core_lines, self.core_px, self.halo)


def plan_scan(
    roll: Roll,
    model: Model,
    facts: Facts,
    *,
    core_lines: int = CORE_LINES,
    core_px: int | None = None,
    halo: int | None = None,
    along: str = "",
) -> Plan:
    """The plan of scanning `roll` with `model` on processes that are as `facts` says.

    `along` is a class whose evidence is summed along the strip (along_strip.py). core_lines, core_px and halo
    default to what suits the roll's width and the model. Raises ValueError where one is off the cell grid or
    the halo is less than the model's, UserError where the model does not know the class.
    """
    if along and along not in model.card.classes:
        raise UserError(
            f"--along-strip {along}: model {model.card.name} knows {', '.join(model.card.classes)}", USAGE
        )
    if core_px is None:
        full = up_to_cell(roll.width)
        core_px = full if full <= FULL_WIDTH_PX else WIDE_CORE_PX
    if halo is None:
        halo = model.card.halo_px
    if halo < model.card.halo_px:
        raise ValueError(
            f"halo is {halo} px but the net sees {model.card.halo_px} px: halo must be at least that"
        )
    Grid(roll.lines, roll.width, core_lines, core_px, halo)  # refuses sizes off the cell grid
    return Plan(
        roll.roll_id,
        roll.width,
        roll.white,
        roll.strip.mm_per_px_x,
        roll.strip.mm_per_line,
        core_lines,
        core_px,
        halo,
        A_MIN_PX,
        model.hash,
        model.card.classes,
        model.thresholds,
        model.card.temperature,
        facts.engine,
        facts.engine_version,
        facts.device,
        facts.precision,
        1,
        facts.isa,
        facts.code,
        along,
    )


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one committed band says; readers trust receipts only."""

    run_id: str
    y0: int
    y1: int
    components: Components
    rows: tuple[CellRow, ...]
    shard_sha256: str
    seconds: dict[str, float]  # read, net, mask, write
    evidence: NDArray[np.int16]  # (rows of cells, stripes) along the strip; (0, 0) where none was asked for

    def write(self, folder: Path) -> None:
        """Durable, and whole or absent: temp, fsync, rename, fsync of the folder."""
        data = {
            "run_id": self.run_id,
            "y0": self.y0,
            "y1": self.y1,
            "components": self.components.to_json(),
            "rows": [asdict(row) for row in self.rows],
            "shard_sha256": self.shard_sha256,
            "seconds": self.seconds,
        }
        if self.evidence.size:
            data["evidence"] = self.evidence.tolist()
        write_durably(receipt_path(folder, self.y0), json.dumps(data).encode())

    @classmethod
    def read(cls, path: Path) -> "Receipt":
        """Raises ValueError or KeyError where the file is not a whole receipt."""
        data = json.loads(path.read_bytes())
        rows = tuple(
            CellRow(**{**row, "not_inspected": tuple(NotInspected(**part) for part in row["not_inspected"])})
            for row in data["rows"]
        )
        return cls(
            data["run_id"],
            data["y0"],
            data["y1"],
            Components.from_json(data["components"]),
            rows,
            data["shard_sha256"],
            data["seconds"],
            np.array(data["evidence"], dtype=np.int16) if "evidence" in data else NO_EVIDENCE,
        )


def receipt_path(folder: Path, y0: int) -> Path:
    return folder / f"{y0:010d}.json"


@dataclass(frozen=True, slots=True)
class Scanned:
    """What scanning a band gives, before anything is written."""

    mask: NDArray[np.uint8]  # (y1 - y0, W)
    components: Components
    rows: tuple[CellRow, ...]
    seconds: dict[str, float]  # read, net, mask
    evidence: NDArray[np.int16]  # as Receipt.evidence


def scan_band(
    plan: Plan, roll: Roll, engine: Engine, y0: int, y1: int, label: LabelWriter, receipts: Path
) -> None:
    """Scan the lines y0 to y1, whole rows of cores: write their shard of the mask, then the receipt."""
    band = scan_lines(plan, roll, engine, y0, y1)
    start = time.perf_counter()
    label.write(y0, band.mask)
    seconds = band.seconds | {"write": time.perf_counter() - start}
    checksum = label.shard_checksum(y0)
    receipt = Receipt(plan.run_id, y0, y1, band.components, band.rows, checksum, seconds, band.evidence)
    receipt.write(receipts)


def scan_lines(plan: Plan, roll: Roll, engine: Engine, y0: int, y1: int) -> Scanned:
    """The mask and the components of the lines y0 to y1, whole rows of cores; nothing is written."""
    grid = plan.grid(roll.lines)
    seconds = dict.fromkeys(("read", "net", "mask"), 0.0)
    mask = np.empty((y1 - y0, roll.width), dtype=np.uint8)
    score = np.zeros((y1 - y0, roll.width), dtype=np.float32)
    left = np.zeros(y1 - y0, dtype=np.int64)
    rows: list[CellRow] = []
    evidence = NO_EVIDENCE
    if plan.along:
        evidence = np.full((-(-(y1 - y0) // CELL), -(-roll.width // STRIPE_PX)), UNSEEN, dtype=np.int16)
    at: deque[tuple[Window, NDArray[np.float32], int]] = deque()  # where the windows under way come from

    def cuts() -> Iterator[NDArray[np.float32]]:
        for row in range(y0 // plan.core_lines, -(-y1 // plan.core_lines)):
            start = time.perf_counter()
            gray, top = read_canvas(roll, grid, row)
            seconds["read"] += time.perf_counter() - start
            for window in grid.windows(row):
                at.append((window, gray, top))
                yield _cut(gray, grid, window, top)

    logits_of = streamed(engine, cuts())
    start, read = time.perf_counter(), 0.0
    for logits in logits_of:
        seconds["net"] += time.perf_counter() - start - (seconds["read"] - read)
        start = time.perf_counter()
        window, gray, top = at.popleft()
        core_y0, core_y1 = window.core_y0, min(window.core_y1, roll.lines)
        lines = slice(core_y0 - y0, core_y1 - y0)
        across = slice(window.core_x0, min(window.core_x1, roll.width))
        core = _core(logits, window, core_y1, roll.width)
        mask[lines, across], score[lines, across] = decide(core, plan.thresholds, plan.temperature)
        if plan.along:
            here = cell_evidence(core, plan.classes.index(plan.along) + 1)
            cell, stripe = lines.start // CELL, across.start // STRIPE_PX
            evidence[cell : cell + here.shape[0], stripe : stripe + here.shape[1]] = here
        if window.core_x1 == grid.canvas_px:  # the last of its row: all of it is decided
            found = list(_cell_rows(roll, gray[:, : core_y1 - top, : roll.width], core_y0, top))
            for cell_row in found:
                blank(mask[cell_row.y0 - y0 : cell_row.y1 - y0], cell_row)
                left[cell_row.y0 - y0 : cell_row.y1 - y0] = cell_row.left or 0
                if plan.along:
                    hide(evidence[(cell_row.y0 - y0) // CELL], cell_row)
            rows += found
        seconds["mask"] += time.perf_counter() - start
        start, read = time.perf_counter(), seconds["read"]
    start = time.perf_counter()
    components = band_components(mask, score, left, y0)
    seconds["mask"] += time.perf_counter() - start
    return Scanned(mask, components, tuple(rows), seconds, evidence)


def decide(
    logits: NDArray[np.float32], thresholds: tuple[float, ...], temperature: float = 1.0
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Class and its probability: logits (K + 1, H, W), background first -> (H, W) uint8, (H, W) float32.

    Class = argmax over (logit p_c - logit t_c) among those >= 0, ties to the lower index, else background
    (metrics.md). p_c >= t_c needs z_c - z_0 >= logit t_c, since p_0 <= 1 - p_c: most pixels of a strip fail
    that cheap test, and only the others need the softmax. Probabilities, so thresholds and scores too, are
    the calibrated ones: the softmax of logits / temperature.
    """
    if temperature != 1:
        logits = logits / np.float32(temperature)
    offset = np.log(np.array(thresholds) / (1 - np.array(thresholds))).astype(np.float32)
    margin = np.max(logits[1:] - offset[:, None, None], axis=0) - logits[0]
    ys, xs = np.nonzero(margin >= 0)
    z = logits[:, ys, xs].astype(np.float64)  # (K + 1, n)
    z -= z.max(axis=0)
    odds_part = np.exp(z)
    p = odds_part / odds_part.sum(axis=0)
    lead = _logit(p[1:]) - offset[:, None].astype(np.float64)
    best = lead.argmax(axis=0)  # the first of equals
    passed = lead[best, np.arange(best.size)] >= 0
    mask = np.zeros(logits.shape[1:], dtype=np.uint8)
    score = np.zeros(logits.shape[1:], dtype=np.float32)
    mask[ys[passed], xs[passed]] = best[passed] + 1
    score[ys[passed], xs[passed]] = p[1:][best, np.arange(best.size)][passed]
    return mask, score


def blank(mask: NDArray[np.uint8], row: CellRow) -> None:
    """Clear the mask of a row of cells beside the strip, and mark what was not inspected, in place."""
    if row.left is not None and row.right is not None:
        mask[:, : row.left] = 0
        mask[:, row.right :] = 0
    for part in row.not_inspected:
        mask[part.y0 - row.y0 : part.y1 - row.y0, part.x0 : part.x1] = NOT_INSPECTED


def read_canvas(roll: Roll, grid: Grid, row: int) -> tuple[NDArray[np.float32], int]:
    """The lines of the canvas that a row of windows reads, (M, window_lines, canvas_px), and the first line.

    Outside the roll the canvas repeats its last line and its last column.
    """
    top, bottom = grid.read_lines(row)
    gray = roll.read_unit(top, min(bottom, roll.lines))
    below, beside = bottom - top - gray.shape[1], grid.canvas_px - gray.shape[2]
    if below or beside:
        gray = np.pad(gray, ((0, 0), (0, below), (0, beside)), mode="edge")
    return gray, top


def _cut(gray: NDArray[np.float32], grid: Grid, window: Window, top: int) -> NDArray[np.float32]:
    lines = slice(window.y - top, window.y - top + grid.window_lines)
    return np.ascontiguousarray(gray[:, lines, window.x : window.x + grid.window_px])


def _core(logits: NDArray[np.float32], window: Window, y1: int, width: int) -> NDArray[np.float32]:
    """The part of a window's logits that its core answers for, within the roll."""
    lines = slice(window.core_y0 - window.y, min(window.core_y1, y1) - window.y)
    return logits[:, lines, window.core_x0 - window.x : min(window.core_x1, width) - window.x]


def _cell_rows(roll: Roll, gray: NDArray[np.float32], core_y0: int, top: int) -> Iterator[CellRow]:
    """The rows of cells of a row of cores from line core_y0; gray (M, h, W) starts at line top, above it."""
    end = top + gray.shape[1]
    valid = roll.read_lines(core_y0, end).valid
    for y0 in range(core_y0, end, CELL):
        y1 = min(y0 + CELL, end)
        above = gray[:, y0 - top - 1] if y0 > top else None
        yield read_row(gray[:, y0 - top : y1 - top], valid[y0 - core_y0 : y1 - core_y0], y0, above)


def _logit(p: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return np.log(p) - np.log1p(-p)


@cache
def code_version() -> str:
    """The package's version and a digest of the files that decide a scan's result."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    read = ("tiles", "rolls", "roll_format", "masks", "linescan")
    for name in (*read, "defects", "along_strip", "scan", "engines"):
        digest.update((here / f"{name}.py").read_bytes())
    for path in sorted((here / "nets").glob("*.py")):
        digest.update(path.read_bytes())
    return f"{version('rollsight')}+{digest.hexdigest()[:8]}"


def check_bands(lines: int, band_lines: int, core_lines: int) -> list[tuple[int, int]]:
    """The bands of a roll, [y0, y1) each: whole rows of cores; UserError for a size that cuts one."""
    if band_lines < core_lines or band_lines % core_lines:
        raise UserError(
            f"a band of {band_lines} lines cuts a window's core: it must be a multiple of {core_lines}", USAGE
        )
    return [(y0, min(y0 + band_lines, lines)) for y0 in range(0, lines, band_lines)]


def slot_bytes(plan: Plan, modes: int, band_lines: int) -> int:
    """Memory that one band at work takes at its peak, in bytes, beside what the process takes anyway."""
    grid = plan.grid(band_lines)
    window_px = grid.window_lines * grid.window_px
    planes = len(plan.classes) + 1
    net = 8 * planes  # the logits and their copies
    if plan.device == "cpu":
        net += WINDOW_BYTES[plan.engine] + MODE_BYTES * (modes - 1)
    canvas = 12 * modes * grid.window_lines * grid.canvas_px  # as read, as float32, padded
    return window_px * net + canvas + BAND_BYTES * band_lines * plan.width
