"""`line.yaml`: what runs when on a line; and the moments that its cron expressions mean.

    line: CGL2
    zone: Europe/Berlin
    stability: {roll: reference, counts: 0.1, gray: 0.05}
    jobs:
      - {name: nightly, cron: "30 1 * * *", rolls: due, model: default, catch_up: latest, deadline_h: 8}
      - {name: learn, kind: retrain, cron: "0 4 * * 6", data: labels/reviewed, threads: 4}
      - {name: rare, kind: synthetic, cron: "0 3 * * 6", defect_class: pit, labels: labels/reviewed, n: 200}

A moment is kept in UTC; the expression is read in the plant's zone. Where the clock is put forward, a moment
that does not exist comes right after the gap; where it is put back, a moment that exists twice comes once
(cronsim, after Debian's cron). A job with * in its minute or hour follows the clock as it goes instead.
"""

import hashlib
import zoneinfo
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from cronsim import CronSim, CronSimError
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from rollsight.inspect.errors import CONFIG, USAGE, UserError
from rollsight.inspect.plant import Plant, read_yaml

LINE_FILE = "line.yaml"
ON_TIME = timedelta(minutes=15)  # later than this a slot was missed: a ticker by cron may come only so often
BY_HAND = "by-hand"  # the job of `inspect jobs nightly`, which stands in no file
RETRAIN_STEPS = 600
LATE_H = 2.0  # a job is late when it has not succeeded for its usual distance and this

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


# One path or several, relative to the plant folder.
Paths = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(min_length=1),
]


class Scheduled(BaseModel):
    """What every entry of `jobs` has, of whatever kind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    cron: str  # five fields, in the zone
    zone: str | None = None  # else that of the file
    priority: int = Field(default=0, ge=-1000, le=1000)  # higher first
    catch_up: Literal["latest", "all", "none"] = "latest"
    deadline_h: float = Field(default=12.0, gt=0, le=168)  # after it nothing further is begun
    max_age_h: float = Field(default=72.0, gt=0, le=8760)  # older missed moments are left out
    # Alert after so long without success; default: see late_after.
    late_h: float | None = Field(default=None, gt=0, le=8760)

    @model_validator(mode="before")
    @classmethod
    def _of_its_kind(cls, data: Any) -> Any:
        """A key of another kind is refused by name: `extra` alone would say that there is no such key."""
        own = cls.model_fields
        for key in data if isinstance(data, dict) else ():
            if key not in own and (kinds := [kind for kind, of in KINDS.items() if key in of.model_fields]):
                mine = next(kind for kind, of in KINDS.items() if of is cls)
                raise ValueError(
                    f"{key} is a key of kind {' or '.join(kinds)}, but this job is of kind {mine}"
                )
        return data

    @field_validator("cron")
    @classmethod
    def _readable(cls, value: str) -> str:
        try:
            next(CronSim(value, datetime(2026, 1, 1, tzinfo=UTC)))
        except (CronSimError, StopIteration):
            raise ValueError(
                f"cron {value!r} is no cron expression of five fields, such as '30 1 * * *'"
            ) from None
        return value

    @field_validator("zone")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return value if value is None else known_zone(value)


class Job(Scheduled):
    """Inspect rolls."""

    kind: Literal["inspect"] = "inspect"
    rolls: Literal["due"] | tuple[str, ...] = "due"  # all that are due, or those of these ids or patterns
    line: str | None = None  # only rolls of this line
    # Only rolls closed so lately; without it a new model makes every roll due that the plant still has.
    closed_within_h: float | None = Field(default=None, gt=0, le=876_000)
    model: str = "default"
    rules: str | None = None  # a file, relative to the plant folder
    workers: int = Field(default=0, ge=0, le=1024)  # as --workers; 0: threads


class Retrain(Scheduled):
    """Train a model on with labelled data, as `inspect jobs retrain`; nothing is promoted."""

    kind: Literal["retrain"]
    data: Paths
    model: str = "default"  # to begin from
    steps: int = Field(default=RETRAIN_STEPS, ge=1)
    seed: int = Field(default=0, ge=0)
    threads: int | None = Field(default=None, ge=1, le=1024)  # default: all cores


class Synthetic(Scheduled):
    """Make labelled data with defects of a rare class on clean steel, as `inspect synth make`."""

    kind: Literal["synthetic"]
    defect_class: str = Field(min_length=1, max_length=64)
    generator: Name | None = None  # in the plant's generators; default: that of the class
    labels: Paths  # the steel: labelled data (its train split), clean images or rolls
    n: int = Field(default=100, ge=1, le=1_000_000)  # samples
    seed: int = Field(default=0, ge=0)  # with the moment it decides what is drawn


KINDS: dict[str, type[Scheduled]] = {"inspect": Job, "retrain": Retrain, "synthetic": Synthetic}


def _kind(value: Any) -> str | None:
    kind = value.get("kind", "inspect") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) else None


AnyJob = Job | Retrain | Synthetic
Listed = Annotated[
    Annotated[Job, Tag("inspect")]
    | Annotated[Retrain, Tag("retrain")]
    | Annotated[Synthetic, Tag("synthetic")],
    Discriminator(
        _kind,
        custom_error_type="kind",
        custom_error_message=f"a job has keys, and its kind is one of {', '.join(KINDS)}",
    ),
]


class StabilityCheck(BaseModel):
    """The check on the reference strip before each night, and how wide its band is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    roll: Name = "reference"  # ROLL.zarr in the plant folder
    counts: float = Field(
        default=0.1, gt=0, le=1
    )  # share of the number of defects per class, at least 2 of them
    gray: float = Field(default=0.05, gt=0, le=1)  # share of the mean gray per lighting mode
    required: bool = False  # a night without a reference strip is a fault of the configuration


class LineFile(BaseModel):
    """line.yaml, all of it with a default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    line: str | None = None
    zone: str = "UTC"
    ledger: str | None = None  # URL; default: ledger.db in the plant folder
    disk_reserve_gb: float = Field(default=2.0, ge=0)  # below it no roll is begun
    stability: StabilityCheck = StabilityCheck()
    jobs: tuple[Listed, ...] = ()
    alerts: dict[str, Any] = {}  # read by alerts.py
    retention: dict[str, Any] = {}  # read by retention.py

    @field_validator("alerts", "retention", mode="before")
    @classmethod
    def _may_be_empty(cls, value: Any) -> Any:
        """A key with nothing behind it stands in the file all the same: all below it has a default."""
        return {} if value is None else value

    @field_validator("zone")
    @classmethod
    def _known(cls, value: str) -> str:
        return known_zone(value)

    @model_validator(mode="after")
    def _unique(self) -> "LineFile":
        names = [job.name for job in self.jobs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"jobs: the name {twice[0]} stands twice")
        if BY_HAND in names:
            raise ValueError(f"jobs: the name {BY_HAND} is that of `inspect jobs nightly`")
        return self

    def job(self, name: str) -> AnyJob:
        """The job of that name; UserError where there is none."""
        found = next((job for job in self.jobs if job.name == name), None)
        if found is None:
            known = ", ".join(job.name for job in self.jobs) or "none"
            raise UserError(f"no job {name[:64]!r} in {LINE_FILE}: there are {known}", USAGE)
        return found

    def zone_of(self, job: Scheduled | None) -> zoneinfo.ZoneInfo:
        return zoneinfo.ZoneInfo((job and job.zone) or self.zone)

    def late_after(self, job: Scheduled) -> timedelta:
        """How long the job may be without success: by default the longest of its usual distances and 2 h."""
        if job.late_h is not None:
            return timedelta(hours=job.late_h)
        # UTC, so that no change of the clock counts; more than a week shows nights and weekends left out.
        moments = CronSim(job.cron, datetime(2026, 1, 1, tzinfo=UTC))
        distances: list[timedelta] = []
        first = before = next(moments)
        for moment in moments:
            distances.append(moment - before)
            before = moment
            if len(distances) >= 60 and moment - first > timedelta(days=8):
                break
        return max(distances) + timedelta(hours=LATE_H)


def known_zone(name: str) -> str:
    """The zone's name; ValueError where no such zone is known."""
    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"zone {name[:60]!r} is not known: it is one like Europe/Berlin") from None
    return name


def read_line(plant: Plant) -> LineFile:
    """The plant's line.yaml, or its defaults where there is none; UserError 78 that names what is wrong."""
    path = plant.home / LINE_FILE
    try:
        data = read_yaml(path)
    except FileNotFoundError:
        return LineFile()
    if data is None:
        return LineFile()
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}: needed keys such as zone and jobs", CONFIG)
    try:
        return LineFile(**{str(key): value for key, value in data.items()})
    except ValidationError as error:
        first = error.errors()[0]
        # Below a job pydantic names the kind that it was read as, which is no part of the file.
        at = [part for nth, part in enumerate(first["loc"]) if nth != 2 or first["loc"][0] != "jobs"]
        where = ".".join(str(part) for part in at) or "file"
        said = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {where}: {said}", CONFIG) from None


def moments(job: Scheduled, zone: zoneinfo.ZoneInfo, after: datetime, until: datetime) -> Iterator[datetime]:
    """The moments of a job in (after, until], in UTC, each once."""
    last = None
    for moment in CronSim(job.cron, after.astimezone(zone)):
        at = moment.astimezone(UTC)
        if at > until:
            return
        if at > after and at != last:
            yield at
        last = at


def rules_hash(plant: Plant, rules: str | None) -> str:
    """SHA-256 of the rules file; "" without one. UserError 78 where it is not there."""
    if rules is None:
        return ""
    path = plant.home / rules
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"rules file {path}: {error.strerror}: name one that is there", CONFIG) from None
