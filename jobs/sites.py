"""A plant at work: its folder, its ledger, its line.yaml, and a clock that tests may set."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rollsight.inspect.errors import CONFIG, UserError
from rollsight.inspect.plant import Plant, open_plant
from rollsight.jobs.ledger.claims import this_process
from rollsight.jobs.ledger.database import Ledger, open_ledger
from rollsight.jobs.schedule import LINE_FILE, LineFile, read_line

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Site:
    """What every job needs to know of where it runs."""

    plant: Plant
    ledger: Ledger
    line: LineFile
    clock: Clock = utc_now
    draw: random.Random = field(default_factory=random.SystemRandom)  # of the waits before retries
    owner: str = field(default_factory=this_process)

    def relative(self, path: Path) -> str:
        """The path as the ledger keeps it: relative to the plant folder where it lies in it."""
        home = self.plant.home
        return path.relative_to(home).as_posix() if path.is_relative_to(home) else str(path)


def open_site(home: Path | None = None, ledger: str | None = None, *, standing: bool = True) -> Site:
    """The plant with its ledger and line.yaml; UserError as open_plant, open_ledger and read_line.

    With `standing`, 78 too for a folder without rolls and line.yaml: where the plant's disk is not mounted, a
    new ledger would say that nothing was due.
    """
    plant = open_plant(home, standing=standing)
    if standing and not any((plant.home / name).exists() for name in ("rolls", LINE_FILE)):
        raise UserError(
            f"{plant.home} holds neither rolls nor {LINE_FILE}: check whether its disk is mounted, or name "
            "the plant folder with --home",
            CONFIG,
        )
    line = read_line(plant)
    return Site(plant, open_ledger(ledger, plant, configured=line.ledger), line)
