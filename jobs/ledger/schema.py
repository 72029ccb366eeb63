"""The tables of the ledger, on SQLite and PostgreSQL alike.

Times are aware datetimes in UTC, given by the caller: the ledger has no clock. JSON is text, so that both
databases keep it as it was written. States are words, listed with each table. What is written together is
written in one transaction (`Ledger.write`), an alert with the change that it tells of.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite counts rows by itself only in a column that is called INTEGER.
RowId = BigInteger().with_variant(Integer(), "sqlite")


class Utc(TypeDecorator[datetime]):
    """An aware datetime, kept and returned in UTC; ValueError for one without a zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no zone: the ledger keeps aware times only")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value  # SQLite keeps it as text

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)  # type: ignore[no-any-return]


class Table(DeclarativeBase):
    """What all tables share."""

    type_annotation_map = {datetime: Utc(), str: Text(), float: Float(), bool: Boolean()}  # noqa: RUF012 (SQLAlchemy's own form)


class Leased:
    """What can be claimed: one holder at a time, by a lease that ends unless it is renewed.

    Every claim raises `fencing_token`; a write of a holder names the token it got, and is refused where a
    later claim raised it. `attempt` counts failures, and claims whose holder died.
    """

    state: Mapped[str] = mapped_column(String(16))
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    not_before: Mapped[datetime | None]  # of a retry: when it is due
    lease_owner: Mapped[str | None]  # host/pid/start of the process that holds it
    lease_until: Mapped[datetime | None]
    heartbeat_at: Mapped[datetime | None]
    fencing_token: Mapped[int] = mapped_column(BigInteger, default=0)
    started_at: Mapped[datetime | None]  # of the first attempt
    ended_at: Mapped[datetime | None]
    exit_code: Mapped[int | None]
    error: Mapped[str | None]  # the one line of the last failure


class Slot(Leased, Table):
    """One moment at which a job is to run: at most one row per job and moment, whoever finds it due.

    state: due, running, retry (some rolls are to be tried again at `not_before`), done, partial (ended, but
    not all rolls are inspected), failed (configuration: not tried again), dead (gave up after 5 attempts),
    skipped (catch-up or deadline left it out; `error` says why).
    """

    __tablename__ = "slot"
    __table_args__ = (UniqueConstraint("job", "scheduled_for"), Index("slot_claim", "state", "not_before"))

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    job: Mapped[str] = mapped_column(String(64))  # the name in line.yaml; "nightly" by hand
    scheduled_for: Mapped[datetime]
    priority: Mapped[int] = mapped_column(Integer, default=0)  # higher first
    deadline: Mapped[datetime | None]  # after it the slot is not begun any more
    created_at: Mapped[datetime]
    report: Mapped[str | None]  # night.json of it, relative to the plant folder


class Run(Leased, Table):
    """One roll to be inspected with one model and one set of rules: the unit of "exactly once".

    Unique by roll, when it was closed, model, rules and `rescan` (0; one more each time that `--rescan` asks
    for it again), whatever version of the code does it. state: due, running, retry, done, failed (not tried
    again), dead (5 attempts), gone (the roll is no longer there; due again when it is back), replaced (the
    roll, the model of that name or its rules became another before its turn, and it is due anew, or no job
    names them). The columns from `run_id` on are known once it was planned, those from `lines` on once it is
    done.
    """

    __tablename__ = "run"
    __table_args__ = (
        UniqueConstraint("roll_id", "closed_at", "model_hash", "rules_hash", "rescan"),
        Index("run_claim", "state", "not_before"),
        Index("run_ended", "ended_at"),
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    slot_id: Mapped[int | None] = mapped_column(ForeignKey("slot.id"))  # that last worked on it
    roll_id: Mapped[str] = mapped_column(String(64))
    closed_at: Mapped[datetime]  # of the roll: the time of its zarr.json
    model: Mapped[str]  # as asked for
    model_hash: Mapped[str] = mapped_column(String(64))
    rules: Mapped[str | None]  # file as asked for
    rules_hash: Mapped[str] = mapped_column(String(64), default="")  # SHA-256 of it; "" without rules
    rescan: Mapped[int] = mapped_column(Integer, default=0)
    priority: Mapped[int] = mapped_column(Integer, default=0)
    created_at: Mapped[datetime]
    run_id: Mapped[str | None] = mapped_column(String(32), index=True)  # hash of the plan: the folder's name
    folder: Mapped[str | None]  # runs/<roll>/<run_id>, relative to the plant folder
    code: Mapped[str | None]  # version that scanned it
    line_id: Mapped[str | None]  # "" of no line; None where it could not be read
    lines: Mapped[int | None] = mapped_column(BigInteger)
    length_m: Mapped[float | None]  # None where units are px
    width_mm: Mapped[float | None]
    coverage: Mapped[float | None]  # share of the strip that was inspected, 0 to 1
    verdict: Mapped[str | None] = mapped_column(
        String(16)
    )  # as in summary.json: HOLD, UNGRADED, BLOCKED, ...
    reasons: Mapped[str | None]  # JSON list of lines
    defects: Mapped[int | None] = mapped_column(BigInteger)
    by_class: Mapped[str | None]  # JSON: class -> number of defects
    seconds: Mapped[float | None]


class Band(Table):
    """One committed band of a run, as its receipt on disk says; receipts are the truth, this is the copy."""

    __tablename__ = "band"

    run_id: Mapped[str] = mapped_column(String(32), primary_key=True)  # hash of the plan
    y0: Mapped[int] = mapped_column(BigInteger, primary_key=True)  # lines y0 to y1, half-open
    y1: Mapped[int] = mapped_column(BigInteger)
    roll_id: Mapped[str] = mapped_column(String(64))
    shard_sha256: Mapped[str] = mapped_column(String(64))
    seconds: Mapped[float]  # read, net, mask and write together
    recorded_at: Mapped[datetime]


class Event(Table):
    """What happened, in order: append-only, triggers refuse UPDATE and DELETE.

    kind is SUBJECT.VERB: slot.made|claimed|done|partial|retry|failed|dead|skipped|again, run.made|claimed|
    planned|done|retry|failed|dead|gone|replaced|again|lost, job.seen, roll.held|released|ingested,
    stability.ok|out|baseline, alert.sent, artifact.marked|deleted, retention.begun|ran, page.made,
    disk.low, model.retrained, data.made, doctor.*
    """

    __tablename__ = "event"
    __table_args__ = (Index("event_roll", "roll_id"), Index("event_at", "at"))

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    at: Mapped[datetime]
    kind: Mapped[str] = mapped_column(String(32))
    slot_id: Mapped[int | None] = mapped_column(BigInteger)
    run_key: Mapped[int | None] = mapped_column(BigInteger)  # Run.id
    roll_id: Mapped[str | None] = mapped_column(String(64))
    owner: Mapped[str | None]
    token: Mapped[int | None] = mapped_column(BigInteger)
    detail: Mapped[str | None]  # one line, or JSON


class Alert(Table):
    """The outbox: what a person must be told, written with the change that it tells of, sent by alerts.py.

    One row per `dedupe_key`, which goes out as the idempotency key. kind: blocked, hold, stability, missing,
    unreadable, late, disk, dead.
    """

    __tablename__ = "alert"
    __table_args__ = (Index("alert_unsent", "sent_at", "next_attempt_at"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    dedupe_key: Mapped[str] = mapped_column(String(200), unique=True)
    kind: Mapped[str] = mapped_column(String(16))
    subject: Mapped[str]  # one line
    body: Mapped[str]  # plain text
    roll_id: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime]
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    next_attempt_at: Mapped[datetime | None]  # None: at once
    sent_at: Mapped[datetime | None]
    last_error: Mapped[str | None]


class Artifact(Table):
    """A file or folder that takes room, and how long it is kept.

    Deleted in two phases: `marked_at`, and after a grace `deleted_at`; a row is never taken away.
    """

    __tablename__ = "artifact"
    __table_args__ = (
        Index("artifact_expires", "deleted_at", "expires_at"),
        Index("artifact_roll", "roll_id"),
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    path: Mapped[str] = mapped_column(Text, unique=True)  # relative to the plant folder where it lies in it
    kind: Mapped[str] = mapped_column(String(16))  # mask, components, raw, page
    roll_id: Mapped[str] = mapped_column(String(64))
    run_id: Mapped[str | None] = mapped_column(String(32))  # hash of the plan; None for raw
    sha256: Mapped[str | None] = mapped_column(String(64))  # of a single file
    bytes: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]  # None: kept for ever
    marked_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]


class Review(Table):
    """What a person said of a defect or of a whole roll; a later row on the same thing takes its place."""

    __tablename__ = "review"
    __table_args__ = (Index("review_roll", "roll_id"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    roll_id: Mapped[str] = mapped_column(String(64))
    run_id: Mapped[str] = mapped_column(String(32))
    defect_id: Mapped[str | None] = mapped_column(String(64))  # None: the roll
    said: Mapped[str] = mapped_column(String(16))  # confirm, reclass, pseudo, unsure, release, block
    defect_class: Mapped[str | None] = mapped_column(String(64))  # of a reclass
    by: Mapped[str]
    at: Mapped[datetime]
    note: Mapped[str | None]


class Hold(Table):
    """A roll of which nothing is deleted until it is released: `released_at` is None while it holds."""

    __tablename__ = "hold"
    __table_args__ = (Index("hold_roll", "roll_id", "released_at"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    roll_id: Mapped[str] = mapped_column(String(64))
    reason: Mapped[str]
    by: Mapped[str]
    held_at: Mapped[datetime]
    released_at: Mapped[datetime | None]
    released_by: Mapped[str | None]


class Stability(Table):
    """One check on the reference strip: what was counted and measured, and the band it is held against."""

    __tablename__ = "stability"
    __table_args__ = (Index("stability_at", "at"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    at: Mapped[datetime]
    slot_id: Mapped[int | None] = mapped_column(ForeignKey("slot.id"))
    roll_id: Mapped[str] = mapped_column(String(64))  # of the reference strip
    model: Mapped[str]
    model_hash: Mapped[str] = mapped_column(String(64))
    in_band: Mapped[bool]
    is_baseline: Mapped[bool]  # the first with this model: it made the band
    counts: Mapped[str]  # JSON: class -> number of defects
    gray: Mapped[str]  # JSON: lighting mode -> mean gray, 0 to 1
    bands: Mapped[str]  # JSON: {"counts": {class: [low, high]}, "gray": {mode: [low, high]}}
    out: Mapped[str]  # JSON list of lines, one per figure out of its band
