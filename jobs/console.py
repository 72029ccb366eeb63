"""The terminal: progress bars, tables, error lines. On stderr, so that stdout is the result alone."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rollsight.inspect.errors import UserError

OnDone = Callable[[int, int | None], None]


def error(fault: UserError) -> None:
    """The one line of a mistake."""
    print(f"inspect: {fault}", file=sys.stderr)


def note(line: str) -> None:
    """What a user should know and need not act on: on stderr, beside the result."""
    print(f"inspect: {line}", file=sys.stderr, flush=True)


def emit(result: dict[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    print(json.dumps(result, allow_nan=False), flush=True)


def say(line: str = "") -> None:
    """A line of the result, on stdout."""
    print(line, flush=True)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table of the result, on stdout; numbers are set right."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(
            isinstance(row[index], int | float) or row[index] in ("", "-") for row in rows
        )
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


@contextlib.contextmanager
def strip_progress(what: str, *, m_per_line: float | None, px_per_line: int) -> Iterator[OnDone]:
    """A bar in metres of strip (lines where the line is not known in mm), with MPix/s and time left.

    Yields the callback (lines done, lines in all). Quiet without a terminal.
    """
    unit, per_line = ("lines", 1.0) if m_per_line is None else ("m", m_per_line)
    with _bar(
        what, f"{{task.completed:,.0f}} / {{task.total:,.0f}} {unit}  {{task.fields[rate]:.1f}} MPix/s"
    ) as bar:
        started, first = time.perf_counter(), None

        def on_done(done: int, total: int | None) -> None:
            nonlocal first
            first = done if first is None else first
            seconds = max(time.perf_counter() - started, 1e-6)
            bar(
                done * per_line,
                None if total is None else total * per_line,
                (done - first) * px_per_line / 1e6 / seconds,
            )

        yield on_done


@contextlib.contextmanager
def count_progress(what: str, unit: str) -> Iterator[OnDone]:
    """A bar in units of work (steps, images), with units per second and time left."""
    with _bar(
        what, f"{{task.completed:,.0f}} / {{task.total:,.0f}} {unit}  {{task.fields[rate]:.2f}}/s"
    ) as bar:
        started, first = time.perf_counter(), None

        def on_done(done: int, total: int | None) -> None:
            nonlocal first
            first = done - 1 if first is None else first
            bar(done, total, (done - first) / max(time.perf_counter() - started, 1e-6))

        yield on_done


@contextlib.contextmanager
def _bar(what: str, text: str) -> Iterator[Callable[[float, float | None, float], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn(text),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=1.0, rate=0.0)

        def on_done(done: float, total: float | None, rate: float) -> None:
            progress.update(task, completed=done, total=total or max(done, 1.0), rate=rate)

        yield on_done
