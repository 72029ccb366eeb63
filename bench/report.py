"""bench/RESULTS.md from bench/results/*.json; and how a benchmark writes its figures there.

A benchmark ends with `write_result("memory", {"rss_mb": {...}}, seed=7)`, or with `write_rows` where its
figures are a table; run as a script, this file makes RESULTS.md from all results that there are.
"""

import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "bench" / "RESULTS.md"
ORIGIN = ("command", "seed", "machine", "date", "seconds")  # where a result comes from


def write_result(name: str, figures: Mapping[str, Any], seed: int | None) -> Path:
    """Write results/NAME.json: the figures, and command, seed, machine, date and seconds so far.

    `seconds` counts from the start of this process. Raises ValueError where a figure takes the name of
    one of those five; NaN and infinity are refused, as JSON has none.
    """
    return _write(name, _with_origin(figures, seed))


def write_rows(name: str, rows: Sequence[Mapping[str, Any]], seed: int | None) -> Path:
    """Write results/NAME.json as a list of rows, each with where it comes from, as `write_result`."""
    return _write(name, [_with_origin(row, seed) for row in rows])


def _with_origin(figures: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
    origin = {
        "command": command(sys.argv),
        "seed": seed,
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.time() - psutil.Process().create_time(), 1),
    }
    # A row may have a seed of its own: that of its training.
    if taken := [key for key in ORIGIN if key in figures and key != "seed"]:
        raise ValueError(f"figures {taken} have names that say where a result comes from: rename them")
    return {**origin, **figures}


def _write(name: str, result: Any) -> Path:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def command(argv: list[str]) -> str:
    """The command as a user types it in the repository's root: never a path of this machine.

    Folders inside the repository and beside it become relative, others are named by their last part.
    """
    parts = ["python", _as_typed(argv[0])]
    for argument in argv[1:]:
        option, sign, value = argument.rpartition("=")
        parts.append(option + sign + (_as_typed(value) if Path(value).is_absolute() else value))
    return shlex.join(parts)


def _as_typed(path: str) -> str:
    relative = os.path.relpath(path, ROOT)
    return relative if not relative.startswith("../..") else f"FOLDER/{Path(path).name}"


def machine() -> str:
    """Processor, cores given to this process, Python, torch and onnxruntime versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (found := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M)):
        model = found[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime"))
    return f"{model}, {cores} cores, Python {platform.python_version()}, {libraries}"


def page(results: Mapping[str, Mapping[str, Any] | list[dict[str, Any]]]) -> str:
    """The Markdown page of all results: name -> what its JSON holds, figures or a table of rows."""
    lines = [
        "# Measured",
        "",
        "Made by `make bench` from `bench/results/*.json`; do not edit. One script per claim.",
    ]
    for name, found in sorted(results.items()):
        lines += ["", f"## {name.replace('_', ' ')}", ""]
        result = found[0] if isinstance(found, list) else found
        lines += [f"- command: `{result['command']}`", f"- seed: {result['seed']}"]
        lines += [f"- machine: {result['machine']}", f"- date: {result['date']}, {result['seconds']} s"]
        if isinstance(found, list):
            lines += _table(found)
            continue
        lines += ["", "| figure | value |", "|---|---:|"]
        told = list(_rows({key: value for key, value in result.items() if key not in ORIGIN}))
        lines += [
            f"| {key} | {_cell(value)} |".replace("\n", " ") for key, value in told if not _is_table(value)
        ]
        for key, value in told:
            if _is_table(value):
                lines += ["", f"{key}:", *_table(value)]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Rows as a Markdown table; a column for each figure that any of them has."""
    own = {"seed"} if len({row.get("seed") for row in rows}) > 1 else set()
    columns = [
        key for key in dict.fromkeys(key for row in rows for key in row) if key not in set(ORIGIN) - own
    ]
    yield from ("", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|")
    for row in rows:
        yield f"| {' | '.join(_cell(row.get(key)) for key in columns)} |"


def _rows(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested figures as dotted names and values."""
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield from _rows(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, Mapping) for part in value)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_cell(part) for part in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(figure)}" for name, figure in value.items())
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "-" if value is None else str(value).replace("|", "\\|")


if __name__ == "__main__":
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}
    PAGE.write_text(page(found), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(found)} results")
