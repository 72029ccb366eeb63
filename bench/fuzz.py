"""Claim: whatever a file from outside holds, it is read as whole or refused in one line.

Small valid rolls, models, labelled data and exports of other systems are damaged at random, byte by byte
and value by value, and opened as the commands open them. Every case must end in a result or in a
UserError of one line, within the time limit, and leave the folder as it was: no traceback, no hang, no
file half-written.
"""

import argparse
import contextlib
import csv
import json
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from PIL import Image
from report import write_result
from rollsight.inspect.errors import UserError
from rollsight.inspect.ingest import ingest
from rollsight.inspect.labels import open_labels
from rollsight.inspect.models import DEFAULT, open_model, sha256_of
from rollsight.inspect.rolls import LabelWriter, RollWriter, Strip, open_roll

CASES = 10_000
LIMIT_S = 20.0
NASTY: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), "", "../../x", "\x00", "a" * 5000,
    [], {}, [[[]]], {"": {}}, "\ud800",
)  # fmt: skip


class HangError(Exception):
    """A case ran past the time limit."""


@dataclass(frozen=True, slots=True)
class Target:
    """A valid folder, the files in it that are damaged, and how the product reads it."""

    name: str
    folder: Path
    files: tuple[Path, ...]
    read: Callable[[], Any]


def targets(top: Path) -> list[Target]:
    """One small valid thing of each kind that comes from outside."""
    rng = np.random.default_rng(0)
    roll = _roll(top / "rolls" / "R.zarr", rng)
    model = _model(top / "models" / "m")
    labelled = _labelled(top / "labelled", rng)
    strips = _strips(top / "strips", rng)
    raw = _raw(top / "raw", rng)
    patches = _patches(top / "patches", rng)
    return [
        Target("roll", roll, tuple(sorted(roll.rglob("zarr.json"))), lambda: _read_roll(roll)),
        Target("roll-data", roll, _data_files(roll), lambda: _read_roll(roll)),
        Target("model-card", model, (model / "card.json",), lambda: _read_model(model, sealed=False)),
        Target(
            "model-weights", model, (model / "weights.safetensors",), lambda: _read_model(model, sealed=True)
        ),
        Target(
            "labels",
            labelled,
            (labelled / "manifest.csv", labelled / "classes.json"),
            lambda: _read_labels(labelled),
        ),
        Target(
            "label-images", labelled, tuple(sorted(labelled.glob("*.png"))), lambda: _read_labels(labelled)
        ),
        Target("strip-metadata", strips, (strips / "strip.yaml",), lambda: _ingest(strips, top / "made")),
        Target(
            "strip-images", strips, tuple(sorted(strips.glob("*.tif"))), lambda: _ingest(strips, top / "made")
        ),
        Target(
            "raw",
            raw,
            (raw / "coil.json", raw / "lines.csv"),
            lambda: _ingest(raw / "coil.bil", top / "made"),
        ),
        Target(
            "patch-export",
            patches,
            (patches / "events.csv", patches / "strip.yaml"),
            lambda: _ingest(patches, top / "made"),
        ),
    ]


def _roll(path: Path, rng: np.random.Generator) -> Path:
    strip = Strip("R", "top", ("bright",), 0.8, 1.0)
    with RollWriter(path, strip, 96, "uint8", total_lines=128) as writer:
        writer.append(rng.integers(0, 255, (1, 128, 96), dtype=np.uint8))
        writer.close()
    label = LabelWriter.create(path, "truth", ("pit",), lines=128, width=96, shard_lines=1024)
    label.write(0, np.eye(128, 96, dtype=np.uint8))
    label.close()
    return path


def _data_files(roll: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in roll.rglob("*") if path.is_file() and path.name != "zarr.json"))


def _read_roll(path: Path) -> None:
    roll = open_roll(path)
    roll.read_unit(0, min(roll.lines, 4096))
    for name in roll.label_names():
        roll.label_classes(name)
        roll.read_label(name, 0, min(roll.lines, 4096))
    for level in range(1, roll.levels):
        roll.overview(level)


def _model(folder: Path) -> Path:
    shutil.copytree(DEFAULT, folder)
    return folder


def _read_model(folder: Path, *, sealed: bool) -> None:
    if sealed:  # whoever damages the weights on purpose writes their hash on the card too
        card = json.loads((folder / "card.json").read_text())
        card["weights_sha256"] = sha256_of(folder / "weights.safetensors")
        (folder / "card.json").write_text(json.dumps(card))
    open_model("m", folder.parent).net()


def _labelled(root: Path, rng: np.random.Generator) -> Path:
    root.mkdir(parents=True)
    rows = []
    for i, split in enumerate(("train", "val")):
        Image.fromarray(rng.integers(0, 255, (40, 48), dtype=np.uint8)).save(root / f"{i}.png")
        Image.fromarray(np.eye(40, 48, dtype=np.uint8)).save(root / f"{i}_mask.png")
        rows.append((f"{i}.png", f"{i}_mask.png", split, f"piece-{i}"))
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "mask", "split", "group"), *rows])
    (root / "classes.json").write_text(json.dumps(["pit", "scratch"]))
    return root


def _read_labels(root: Path) -> None:
    for sample in open_labels(root).samples:
        sample.read()


def _strips(folder: Path, rng: np.random.Generator) -> Path:
    folder.mkdir(parents=True)
    for i in range(2):
        Image.fromarray(rng.integers(0, 255, (32, 64), dtype=np.uint8)).save(folder / f"{i}.tif")
    (folder / "strip.yaml").write_text("side: top\nmm_per_px_x: 0.8\nmm_per_line: 1.0\nwidth_mm: 1000\n")
    return folder


def _raw(folder: Path, rng: np.random.Generator) -> Path:
    folder.mkdir(parents=True)
    (folder / "coil.bil").write_bytes(rng.integers(0, 255, (32, 2, 64), dtype=np.uint8).tobytes())
    said = {"lines": 32, "width_px": 64, "bits": 8, "lighting": ["bright", "dark"], "line_table": "lines.csv"}
    said |= {"side": "top", "mm_per_px_x": 0.8, "mm_per_line": 1.0}
    (folder / "coil.json").write_text(json.dumps(said))
    rows = "".join(f"{7 * y},{1000 * y},{int(y != 5)}\n" for y in range(32))
    (folder / "lines.csv").write_text("encoder,t_ns,valid\n" + rows)
    return folder


def _patches(folder: Path, rng: np.random.Generator) -> Path:
    folder.mkdir(parents=True)
    rows = ["id,class,x_mm,y_m,width_mm,length_mm,image"]
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i},scratch,{10 + 20 * i},{0.02 * i},8,12,{i}.png")
    (folder / "events.csv").write_text("\n".join(rows) + "\n")
    (folder / "strip.yaml").write_text(
        "side: top\nmm_per_px_x: 1.0\nmm_per_line: 1.0\nwidth_mm: 96\nlength_m: 0.128\n"
    )
    return folder


def _ingest(source: Path, made: Path) -> None:
    """Ingest; whatever happens, a roll that stands under its name opens, and nothing else is left."""
    shutil.rmtree(made, ignore_errors=True)
    try:
        ingest(source, made / "I.zarr", Strip("I", None, (), None, None))
    finally:
        left = sorted(path.name for path in made.glob("*")) if made.exists() else []
        if left not in ([], ["I.zarr"], ["I.events.parquet", "I.zarr"]):
            raise AssertionError(f"left behind: {left}")
        if left:
            open_roll(made / "I.zarr")


def damage(data: bytes, rng: random.Random) -> bytes:
    """Another file: a few bytes changed, a part lost or doubled, or, of JSON, one value replaced."""
    if data[:1] in (b"{", b"[") and rng.random() < 0.7:
        return _other_value(data, rng)
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(5)
        if kind == 0 and found:
            found[min(at, len(found) - 1)] = rng.randrange(256)
        elif kind == 1:
            del found[at : at + rng.choice((1, 4, 64, 10**6))]
        elif kind == 2:
            found[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
        elif kind == 3:
            found[at:at] = found[at : at + rng.choice((4, 64))] * rng.choice((1, 50))
        else:
            found[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\xff\xff\xff\x7f"))
    return bytes(found)


def _other_value(data: bytes, rng: random.Random) -> bytes:
    document = json.loads(data)
    places = list(_places(document))
    if not places:
        return json.dumps(rng.choice(NASTY)).encode()
    holder, key = rng.choice(places)
    action = rng.random()
    if action < 0.2 and isinstance(holder, dict):
        del holder[key]
    elif action < 0.3 and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    else:
        holder[key] = rng.choice(NASTY)
    return json.dumps(document).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON document."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(target: Target) -> str:
    """What came of reading it: "read", "refused", or what must not be."""
    try:
        with time_limit(LIMIT_S):
            target.read()
    except UserError as fault:
        return "refused" if "\n" not in str(fault) else "not one line"
    except HangError:
        return "hang"
    except Exception as fault:
        return f"traceback {type(fault).__name__}: {fault}"[:200]
    return "read"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-result", action="store_true", help="do not write bench/results/fuzz.json")
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    counts: dict[str, Counter[str]] = {}
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        found = targets(Path(folder))
        for target in found:
            target.read()  # undamaged, each is read
        for case in range(asked.cases):
            target = found[case % len(found)]
            path = rng.choice(target.files)
            before = {file: file.read_bytes() for file in target.folder.rglob("*") if file.is_file()}
            path.write_bytes(damage(before[path], rng))
            start = time.perf_counter()
            result = outcome(target)
            slowest = max(slowest, time.perf_counter() - start)
            after = {file for file in target.folder.rglob("*") if file.is_file()}
            if after != set(before):
                result = f"files left behind: {sorted(str(f.name) for f in after - set(before))}"
            if result not in ("read", "refused"):
                print(f"case {case} ({target.name}, {path.name}): {result}", flush=True)
            counts.setdefault(target.name, Counter())[result.split(":")[0]] += 1
            for file in after:  # as it was, for the next case
                if file not in before:
                    file.unlink()
            for file, data in before.items():
                if not file.is_file() or file.stat().st_size != len(data) or file.read_bytes() != data:
                    file.write_bytes(data)
    bad = sum(n for kind in counts.values() for what, n in kind.items() if what not in ("read", "refused"))
    figures = {
        "cases": asked.cases,
        "bad": bad,
        "slowest_s": round(slowest, 2),
        "by_target": {name: dict(kind) for name, kind in counts.items()},
    }
    print(json.dumps(figures))
    if not asked.no_result:
        write_result("fuzz", figures, seed=asked.seed)
    if bad:
        raise SystemExit(
            f"not shown: {bad} of {asked.cases} cases ended in something else than a result or one line"
        )


if __name__ == "__main__":
    main()
