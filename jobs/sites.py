"""A plant at work: its folder, its ledger, its line.yaml, and a clock that tests may set."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rollsight.inspect.plant import Plant, open_plant
from rollsight.jobs.ledger.claims import this_process
from rollsight.jobs.ledger.database import Ledger, open_ledger
from rollsight.jobs.schedule import LineFile, read_line

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
    """The plant with its ledger and line.yaml; UserError as open_plant, open_ledger and read_line."""
    plant = open_plant(home, standing=standing)
    line = read_line(plant)
    return Site(plant, open_ledger(ledger, plant, configured=line.ledger), line)
