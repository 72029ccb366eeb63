"""The ticker with the clock as an argument: what was missed, what is late, who does it; on both databases."""

import random
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rollsight.inspect.errors import CONFIG, FAILED, LOCKED, PARTIAL, USAGE, UserError
from rollsight.inspect.plant import Plant
from rollsight.jobs.ledger.claims import claim, lease_of, note, renew
from rollsight.jobs.ledger.database import Ledger
from rollsight.jobs.ledger.schema import Alert, Event, Run, Slot
from rollsight.jobs.retry import try_again
from rollsight.jobs.schedule import BY_HAND, LineFile
from rollsight.jobs.sites import Site
from rollsight.jobs.ticker import (
    ABANDONED,
    begin_by_hand,
    begin_slot,
    deadline_of,
    ended_with,
    make_slots,
    next_moment,
    run_slot,
    tell_late,
    tick,
)
from sqlalchemy import select

NIGHT = {"name": "nightly", "cron": "30 1 * * *", "zone": "Europe/Berlin"}
START = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


class Wall:
    """A clock that says what it is told."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


def site_of(ledger: Ledger, home: Path, clock: Wall, **job: Any) -> Site:
    """A plant without rolls, so that its nights take no time."""
    line = LineFile(jobs=({**NIGHT, **job},), disk_reserve_gb=0)  # type: ignore[arg-type]
    return Site(Plant(home), ledger, line, clock, random.Random(0))


def slots(ledger: Ledger) -> list[tuple[str, str]]:
    """Local date and state of every slot, in order."""
    with ledger.read() as session:
        rows = session.scalars(select(Slot).order_by(Slot.scheduled_for)).all()
        return [(f"{row.scheduled_for:%d %H:%M}", row.state) for row in rows]


def alerts(ledger: Ledger) -> list[str]:
    with ledger.read() as session:
        return list(session.scalars(select(Alert.subject).order_by(Alert.id)))


def test_a_new_job_begins_now_and_runs_at_its_next_moment_once(ledger: Ledger, tmp_path: Path) -> None:
    clock = Wall(START)
    site = site_of(ledger, tmp_path, clock)
    assert tick(site).ran == []
    clock.now = datetime(2026, 11, 21, 0, 31, tzinfo=UTC)
    [(job, at, code, _)] = tick(site).ran
    assert (job, at, code) == ("nightly", datetime(2026, 11, 21, 0, 30, tzinfo=UTC), 0)
    assert tick(site).ran == []
    assert slots(ledger) == [("21 00:30", "done")]
    assert (tmp_path / "runs/2026-11-21/night.json").is_file()


@pytest.mark.parametrize(
    ("catch_up", "states"),
    [
        ("latest", ["skipped", "skipped", "done"]),
        ("all", ["done", "done", "done"]),
        ("none", ["skipped", "skipped", "skipped"]),
    ],
)
def test_what_a_machine_that_slept_missed_is_caught_up_as_the_job_says(
    ledger: Ledger, tmp_path: Path, catch_up: str, states: list[str]
) -> None:
    clock = Wall(START)
    site = site_of(ledger, tmp_path, clock, catch_up=catch_up, deadline_h=100)
    tick(site)
    clock.now = START + 2 * DAY + 13 * HOUR  # three nights later, half an hour after the last moment
    told = tick(site)
    assert (told.made, told.left_out) == (states.count("done"), states.count("skipped"))
    assert [state for _, state in slots(ledger)] == states
    assert tick(site).ran == []


def test_moments_older_than_their_age_are_left_out_and_one_past_its_deadline_is_not_begun(
    ledger: Ledger, tmp_path: Path
) -> None:
    clock = Wall(START)
    site = site_of(ledger, tmp_path, clock, catch_up="all", max_age_h=48, deadline_h=8)
    tick(site)
    clock.now = START + 30 * DAY
    tick(site)
    assert [state for _, state in slots(ledger)] == ["skipped", "skipped"]


def test_over_both_changes_of_the_clock_each_night_is_one_slot(ledger: Ledger, tmp_path: Path) -> None:
    """Half past two does not exist on one Sunday and exists twice on another; a tick each half hour."""
    for first, days in (
        (datetime(2026, 3, 27, 12, tzinfo=UTC), 3),
        (datetime(2026, 10, 23, 12, tzinfo=UTC), 3),
    ):
        clock = Wall(first)
        site = site_of(ledger, tmp_path, clock, name=f"m{first.month}", cron="30 2 * * *")
        while clock.now < first + days * DAY:
            tick(site)
            clock.now += timedelta(minutes=30)
    assert slots(ledger) == [
        ("28 01:30", "done"), ("29 01:00", "done"), ("30 00:30", "done"),
        ("24 00:30", "done"), ("25 00:30", "done"), ("26 01:30", "done"),
    ]  # fmt: skip


def test_a_clock_that_is_set_back_runs_nothing_twice(ledger: Ledger, tmp_path: Path) -> None:
    clock = Wall(START)
    site = site_of(ledger, tmp_path, clock)
    tick(site)
    clock.now = START + 13 * HOUR
    assert len(tick(site).ran) == 1
    clock.now = START + 10 * HOUR
    for _ in range(8):
        assert tick(site).ran == []
        clock.now += HOUR / 2
    assert slots(ledger) == [("21 00:30", "done")]
    clock.now = START + DAY + 13 * HOUR
    assert len(tick(site).ran) == 1


def test_two_tickers_run_each_slot_once(ledger: Ledger, tmp_path: Path) -> None:
    clock = Wall(START)
    sites = [site_of(ledger, tmp_path, clock, cron="* * * * *", catch_up="all") for _ in range(2)]
    for site in sites:
        tick(site)
    clock.now = START + timedelta(minutes=12)
    ran: list[datetime] = []

    def work(site: Site) -> None:
        ran.extend(at for _, at, code, _ in tick(site).ran)

    threads = [threading.Thread(target=work, args=(site,)) for site in sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ran) == 12
    assert set(Counter(ran).values()) == {1}
    assert {state for _, state in slots(ledger)} == {"done"}


def test_a_night_whose_process_died_until_its_deadline_is_no_success(ledger: Ledger, tmp_path: Path) -> None:
    clock = Wall(START)
    site = site_of(ledger, tmp_path, clock)
    tick(site)
    clock.now = datetime(2026, 11, 21, 0, 31, tzinfo=UTC)
    with ledger.write() as session:
        make_slots(site, session, site.line.jobs[0])
        row = claim(session, Slot, clock.now, "elsewhere:1/1/0")
        assert row is not None
        note(session, lease_of(row), report="runs/2026-11-21/night.json")
    clock.now += 13 * HOUR
    tick(site)
    assert [state for _, state in slots(ledger)] == ["partial"]
    clock.now = START + 27 * HOUR
    tick(site)
    assert alerts(ledger) == ["job nightly is late: no success for more than 26 h"]


def test_a_job_without_success_for_26_hours_is_told_once(ledger: Ledger, tmp_path: Path) -> None:
    clock = Wall(START)
    site = site_of(ledger, tmp_path, clock, catch_up="none", deadline_h=1)
    tick(site)
    clock.now = START + 26 * HOUR
    tick(site)
    assert alerts(ledger) == []
    for _ in range(3):
        clock.now += HOUR
        tick(site)
    assert alerts(ledger) == ["job nightly is late: no success for more than 26 h"]
    clock.now = datetime(2026, 11, 23, 0, 31, tzinfo=UTC)
    assert len(tick(site).ran) == 1
    clock.now += 27 * HOUR
    tick(site)
    assert len(alerts(ledger)) == 2


def test_a_night_at_work_is_waited_for_until_its_deadline_before_it_is_late(
    ledger: Ledger, tmp_path: Path
) -> None:
    """Tonight's slot is running within its lease; then its process dies, and nobody renews that."""
    clock = Wall(START)
    site = site_of(ledger, tmp_path, clock, late_h=13)
    entry = site.line.jobs[0]
    tick(site)
    clock.now = datetime(2026, 11, 21, 0, 31, tzinfo=UTC)
    with ledger.write() as session:
        make_slots(site, session, entry)
        row = claim(session, Slot, clock.now, "elsewhere:1/1/0")
        assert row is not None
        clock.now += 2 * HOUR
        renew(session, lease_of(row), clock.now)
        tell_late(site, session, entry)
    assert alerts(ledger) == []
    clock.now += HOUR
    with ledger.write() as session:
        tell_late(site, session, entry)
    assert alerts(ledger) == ["job nightly is late: no success for more than 13 h"]


def test_a_night_that_hangs_is_late_after_its_deadline(ledger: Ledger, tmp_path: Path) -> None:
    clock = Wall(START)
    site = site_of(ledger, tmp_path, clock, late_h=13, deadline_h=2)
    entry = site.line.jobs[0]
    tick(site)
    clock.now = datetime(2026, 11, 21, 0, 31, tzinfo=UTC)
    with ledger.write() as session:
        make_slots(site, session, entry)
        assert claim(session, Slot, clock.now, "elsewhere:1/1/0", lease_s=1e6) is not None
    for hours, told in ((1.5, 0), (2.5, 1)):
        clock.now = datetime(2026, 11, 21, 0, 31, tzinfo=UTC) + hours * HOUR
        with ledger.write() as session:
            tell_late(site, session, entry)
        assert len(alerts(ledger)) == told


def test_a_success_ahead_of_the_clock_does_not_mute_the_alert(ledger: Ledger, tmp_path: Path) -> None:
    """The clock was ten days ahead for one night, and set right."""
    clock = Wall(START)
    site = site_of(ledger, tmp_path, clock)
    tick(site)
    about = {"job": "nightly", "state": "done", "created_at": START}
    with ledger.write() as session:
        session.add(Slot(scheduled_for=START + 10 * DAY, ended_at=START + 10 * DAY, **about))
    clock.now = START + 27 * HOUR
    with ledger.write() as session:
        tell_late(site, session, site.line.jobs[0])
    assert alerts(ledger) == ["job nightly is late: no success for more than 26 h"]


@pytest.mark.parametrize(
    ("state", "written", "code"),
    [
        ("done", 0, 0), ("partial", PARTIAL, PARTIAL), ("skipped", None, PARTIAL), ("failed", CONFIG, CONFIG),
        ("dead", None, FAILED), ("dead", LOCKED, LOCKED), ("partial", None, PARTIAL),
    ],
)  # fmt: skip
def test_a_slot_that_has_ended_tells_how_it_ended(
    ledger: Ledger, tmp_path: Path, state: str, written: int | None, code: int
) -> None:
    site = site_of(ledger, tmp_path, Wall(START))
    about = {"state": state, "exit_code": written, "created_at": START}
    with ledger.write() as session:
        session.add(Slot(job="nightly", scheduled_for=START, **about))
    assert begin_slot(site, site.line.job("nightly"), START) == (None, state)
    assert ended_with(site, "nightly", START) == code


def test_a_missing_model_is_one_alert_and_not_tried_again_until_a_person_says_so(
    ledger: Ledger, tmp_path: Path
) -> None:
    clock = Wall(START)
    site = site_of(ledger, tmp_path, clock, model="strip-9")
    tick(site)
    clock.now = START + 13 * HOUR
    told = tick(site)
    assert told.exit_code == CONFIG
    assert "no model 'strip-9'" in told.ran[0][3]
    assert tick(site).ran == []
    assert slots(ledger) == [("21 00:30", "failed")]
    [alert] = alerts(ledger)
    assert "job nightly of 2026-11-21 00:30 UTC cannot run: no model 'strip-9'" in alert
    assert try_again(site, None) == ["job nightly of 2026-11-21 00:30 UTC"]
    assert len(tick(site).ran) == 1


def test_a_disk_below_the_reserve_begins_no_roll_and_is_told_once_a_day(
    ledger: Ledger, tmp_path: Path
) -> None:
    clock = Wall(START)
    site = site_of(ledger, tmp_path, clock)
    full = Site(site.plant, ledger, site.line.model_copy(update={"disk_reserve_gb": 1e9}), clock, site.draw)
    tick(full)
    clock.now = START + 13 * HOUR
    assert [code for _, _, code, _ in tick(full).ran] == [LOCKED]
    clock.now += HOUR
    assert [code for _, _, code, _ in tick(full).ran] == [LOCKED]
    assert len(alerts(ledger)) == 1 and alerts(ledger)[0].startswith("disk below the reserve")
    clock.now += HOUR
    assert [code for _, _, code, _ in tick(site).ran] == [0]


def test_a_slot_that_someone_names_runs_once(ledger: Ledger, tmp_path: Path) -> None:
    clock = Wall(START)
    site = site_of(ledger, tmp_path, clock)
    entry, at = site.line.job("nightly"), START - HOUR
    lease, _ = begin_slot(site, entry, at)
    assert lease is not None
    with pytest.raises(UserError, match="is at work in") as fault:
        begin_slot(site, entry, at)
    assert fault.value.exit_code == LOCKED
    assert run_slot(site, lease, entry, None)[0] == 0
    assert begin_slot(site, entry, at) == (None, "done")


def test_a_slot_ahead_of_the_clock_stops_no_schedule_and_none_is_begun(
    ledger: Ledger, tmp_path: Path
) -> None:
    clock = Wall(START)
    site = site_of(ledger, tmp_path, clock)
    tick(site)
    entry, ahead = site.line.job("nightly"), START + 30 * DAY
    with pytest.raises(UserError, match="is still to come, it is 2026-11-20 12:00 UTC") as fault:
        begin_slot(site, entry, ahead)
    assert (fault.value.exit_code, slots(ledger)) == (USAGE, [])
    clock.now = ahead  # the clock was wrong as someone named the moment
    lease, _ = begin_slot(site, entry, ahead)
    assert lease is not None and run_slot(site, lease, entry, None)[0] == 0
    clock.now = START + 13 * HOUR
    assert len(tick(site).ran) == 1
    assert begin_slot(site, entry, clock.now + timedelta(minutes=4))[1] == "running", "another clock"


def test_a_slot_has_a_deadline_until_a_person_tries_it_again(ledger: Ledger, tmp_path: Path) -> None:
    clock = Wall(START)
    site = site_of(ledger, tmp_path, clock, deadline_h=2, model="strip-9")
    entry, at = site.line.job("nightly"), START - HOUR
    lease, _ = begin_slot(site, entry, at)
    assert lease is not None and deadline_of(site, lease) == START + HOUR
    assert run_slot(site, lease, entry, START + HOUR)[0] == CONFIG
    try_again(site, None)
    lease, _ = begin_slot(site, entry, at)
    assert lease is not None and deadline_of(site, lease) is None


def waiting_run(roll_id: str, state: str, model: str, rules: str | None = None) -> Run:
    about = {"roll_id": roll_id, "model": model, "model_hash": f"hash of {model}", "rules": rules}
    return Run(**about, rules_hash=rules or "", closed_at=START, created_at=START, state=state)


def states(ledger: Ledger) -> dict[str, str]:
    with ledger.read() as session:
        return {run.roll_id: run.state for run in session.scalars(select(Run).order_by(Run.id))}


def test_what_waits_for_a_model_that_no_job_names_any_more_is_ended(ledger: Ledger, tmp_path: Path) -> None:
    clock = Wall(START)
    site = site_of(ledger, tmp_path, clock, model="strip-2", catch_up="none")
    with ledger.write() as session:
        session.add_all(
            [
                waiting_run("R1", "due", "strip-1"),
                waiting_run("R2", "retry", "strip-2", "old.yaml"),
                waiting_run("R3", "due", "strip-2"),
                waiting_run("R4", "dead", "strip-1"),
            ]
        )
    clock.now = START + ABANDONED
    tick(site)
    assert set(states(ledger).values()) == {"due", "retry", "dead"}
    clock.now += HOUR
    tick(site)
    assert states(ledger) == {"R1": "replaced", "R2": "replaced", "R3": "due", "R4": "dead"}
    with ledger.read() as session:
        told = session.execute(select(Event.roll_id, Event.detail).where(Event.kind == "run.replaced")).all()
    assert [tuple(line) for line in told] == [
        ("R1", "no job inspects with strip-1 any more, and no night by hand did so for 8 days"),
        ("R2", "no job inspects with strip-2 with old.yaml any more, and no night by hand did so for 8 days"),
    ]


def test_what_a_night_by_hand_or_a_watch_still_works_on_is_not_ended(ledger: Ledger, tmp_path: Path) -> None:
    """One claimed its roll within eight days; another is at work, and has not come to its rolls yet."""
    clock = Wall(START)
    site = site_of(ledger, tmp_path, clock, catch_up="none")
    with ledger.write() as session:
        session.add_all([waiting_run("R1", "due", "strip-1"), waiting_run("R2", "due", "strip-1")])
        clock.now = START + 7 * DAY
        first = claim(session, Run, clock.now, site.owner, where=(Run.roll_id == "R1",))
        assert first is not None
        first.state = "retry"
    clock.now = START + 9 * DAY
    begin_by_hand(site)
    tick(site)
    assert states(ledger) == {"R1": "retry", "R2": "due"}
    clock.now += HOUR  # it died: its lease ran out
    tick(site)
    assert states(ledger) == {"R1": "retry", "R2": "replaced"}
    with ledger.read() as session:
        assert session.scalars(select(Slot.state).where(Slot.job == BY_HAND)).all() == ["running"]


def test_the_next_moment_is_that_of_the_schedule_or_of_a_retry(ledger: Ledger, tmp_path: Path) -> None:
    site = site_of(ledger, tmp_path, Wall(START))
    assert next_moment(site, START) == datetime(2026, 11, 21, 0, 30, tzinfo=UTC)
    with ledger.write() as session:
        session.add(
            Slot(job="nightly", scheduled_for=START, state="retry", not_before=START + HOUR, created_at=START)
        )
    assert next_moment(site, START) == START + HOUR


def test_to_try_again_what_was_not_given_up_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    site = site_of(ledger, tmp_path, Wall(START))
    with pytest.raises(UserError, match="roll 'R9' has nothing that was given up"):
        try_again(site, ["R9"])
    assert try_again(site, None) == []
    with ledger.write() as session:
        assert claim(session, Slot, START, site.owner) is None
