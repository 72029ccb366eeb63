"""The ledger on SQLite and PostgreSQL: its schema, its claims, its events; every fault is one line."""

import random
import subprocess
import sys
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from rollsight.inspect.errors import CONFIG, FAILED, LOCKED, USAGE, UserError
from rollsight.inspect.plant import Plant
from rollsight.jobs.ledger.claims import (
    FIRST_RETRY_S,
    LAST_RETRY_S,
    LEASE_S,
    MAX_ATTEMPTS,
    LeaseLostError,
    claim,
    fail,
    finish,
    is_gone,
    lease_of,
    note,
    release,
    renew,
    this_process,
    wait_s,
)
from rollsight.jobs.ledger.database import (
    Ledger,
    LedgerAwayError,
    check_disk,
    open_ledger,
    revisions,
    schema_version,
    upgrade,
)
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.outbox import inserted, put_alert, put_held_back
from rollsight.jobs.ledger.schema import Alert, Event, Run, Slot, Table
from sqlalchemy import create_engine, delete, func, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

NOW = datetime(2026, 11, 24, 1, 30, tzinfo=UTC)
LATER = NOW + timedelta(seconds=LEASE_S + 1)
ELSEWHERE = "another:1/77/0.00"  # a process of another machine, whose end nobody here can see


def add_slot(ledger: Ledger, job: str = "nightly", at: datetime = NOW, **columns: Any) -> int:
    with ledger.write() as session:
        slot = Slot(job=job, scheduled_for=at, state="due", created_at=NOW, **columns)
        session.add(slot)
        session.flush()
        return slot.id


def add_run(ledger: Ledger, roll_id: str, closed_at: datetime = NOW, **columns: Any) -> int:
    with ledger.write() as session:
        facts = {"model": "m", "model_hash": "0", "state": "due", "created_at": NOW}
        run = Run(roll_id=roll_id, closed_at=closed_at, **facts, **columns)
        session.add(run)
        session.flush()
        return run.id


def test_the_migrations_make_what_the_tables_say(ledger: Ledger) -> None:
    with ledger.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
        assert schema_version(connection) == revisions()[-1]


def test_a_ledger_of_each_released_schema_is_brought_up_to_date(ledger_address: str, tmp_path: Path) -> None:
    """From every version to the newest; what was in it stays."""
    for revision in revisions():
        engine = create_engine(ledger_address)
        with engine.begin() as connection:
            upgrade(connection, revision)
            connection.execute(
                text("INSERT INTO event (id, at, kind, detail) VALUES (1, :at, 'slot.made', :said)"),
                {"at": "2026-11-24 01:30:00.000000", "said": revision},
            )
        engine.dispose()
        opened = open_ledger(ledger_address, Plant(tmp_path))
        with opened.read() as session:
            assert [row.detail for row in session.scalars(select(Event))] == [revision]
        with opened.engine.begin() as connection:
            assert schema_version(connection) == revisions()[-1]
            for name in (*Table.metadata.tables, "alembic_version"):
                cascade = " CASCADE" if opened.backend == "postgresql" else ""
                connection.execute(text(f'DROP TABLE "{name}"{cascade}'))
            if opened.backend == "postgresql":
                connection.execute(text("DROP FUNCTION event_is_append_only"))
        opened.close()


def test_times_come_back_in_utc_and_one_without_a_zone_is_refused(ledger: Ledger) -> None:
    berlin = datetime.fromisoformat("2026-11-24T02:30:00.123456+01:00")
    key = add_slot(ledger, at=berlin)
    with ledger.read() as session:
        slot = session.get_one(Slot, key)
        assert slot.scheduled_for == berlin
        assert slot.scheduled_for.utcoffset() == timedelta(0)
    with pytest.raises(Exception, match="has no zone"), ledger.write() as session:
        session.add(Slot(job="x", scheduled_for=datetime(2026, 1, 1), state="due", created_at=NOW))


def test_no_event_is_ever_changed_or_taken_away(ledger: Ledger) -> None:
    with ledger.write() as session:
        add_event(session, NOW, "slot.made", detail="as it was")
    for statement in (update(Event).values(detail="other"), delete(Event)):
        with pytest.raises(DBAPIError, match="append-only"), ledger.write() as session:
            session.execute(statement)
    with ledger.read() as session:
        assert [event.detail for event in session.scalars(select(Event))] == ["as it was"]


def test_a_moment_of_a_job_is_one_slot(ledger: Ledger) -> None:
    row = {"job": "nightly", "scheduled_for": NOW, "state": "due", "created_at": NOW, "fencing_token": 0}
    row |= {"attempt": 0, "priority": 0}
    with ledger.write() as session:
        assert [inserted(session, Slot, row) for _ in range(3)] == [True, False, False]
    with pytest.raises(IntegrityError):
        add_slot(ledger)


def test_an_alert_goes_into_the_outbox_once_and_not_without_its_change(ledger: Ledger) -> None:
    with ledger.write() as session:
        assert put_alert(session, NOW, "hold:R1:1", "hold", "roll R1 is on HOLD", roll_id="R1")
        assert not put_alert(session, NOW, "hold:R1:1", "hold", "roll R1 is on HOLD again")
    with pytest.raises(RuntimeError), ledger.write() as session:
        put_alert(session, NOW, "hold:R2:1", "hold", "roll R2 is on HOLD")
        raise RuntimeError("the change did not come about")
    with ledger.read() as session:
        assert session.scalars(select(Alert.subject)).all() == ["roll R1 is on HOLD"]


def test_a_roll_made_again_under_its_id_and_held_again_is_another_alert(ledger: Ledger) -> None:
    """Its run has the same id: that is of the roll's size and how it was scanned."""
    for closed_at in (NOW, NOW, NOW + timedelta(days=1)):
        run = Run(
            roll_id="R1", run_id="a1", closed_at=closed_at, rescan=0, verdict="HOLD", folder="runs/R1/a1"
        )
        with ledger.write() as session:
            put_held_back(session, NOW, run, ["coverage 90% is under 99%"])
    with ledger.read() as session:
        assert len(session.scalars(select(Alert)).all()) == 2


def test_slots_are_claimed_by_priority_then_age_and_each_once(ledger: Ledger) -> None:
    hour = timedelta(hours=1)
    add_slot(ledger, "late", NOW - hour)
    add_slot(ledger, "early", NOW - 2 * hour)
    add_slot(ledger, "first", NOW, priority=5)
    taken = []
    for _ in range(4):
        with ledger.write() as session:
            slot = claim(session, Slot, NOW, ELSEWHERE)
            taken.append(slot and slot.job)
    assert taken == ["first", "early", "late", None]


def test_of_eight_threads_each_slot_goes_to_one(ledger: Ledger) -> None:
    for minute in range(60):
        add_slot(ledger, at=NOW + timedelta(minutes=minute))
    taken: list[int] = []

    def work(number: int) -> None:
        while True:
            with ledger.write() as session:
                slot = claim(session, Slot, NOW, f"another:1/{number}/0.00")
                if slot is None:
                    return
                taken.append(slot.id)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 60
    assert set(Counter(taken).values()) == {1}


def test_who_lost_a_lease_writes_nothing_any_more(ledger: Ledger) -> None:
    add_run(ledger, "R1")
    with ledger.write() as session:
        row = claim(session, Run, NOW, ELSEWHERE)
        assert row is not None
        first = lease_of(row)
        assert claim(session, Run, NOW, "other:1/1/0.00") is None
    with ledger.write() as session:
        row = claim(session, Run, LATER, "other:1/1/0.00")
        assert row is not None and row.attempt == 1
        second = lease_of(row)
    assert second.token == first.token + 1
    draw = random.Random(0)
    for write in (
        lambda session: renew(session, first, LATER),
        lambda session: note(session, first, run_id="abc"),
        lambda session: release(session, first, LATER),
        lambda session: finish(session, first, LATER, "done"),
        lambda session: fail(session, first, LATER, "it broke", FAILED, draw),
    ):
        with pytest.raises(LeaseLostError), ledger.write() as session:
            write(session)
    with ledger.write() as session:
        assert finish(session, second, LATER, "done", defects=3)
        assert not finish(session, second, LATER, "done", defects=3), "said again after a lost answer"
    with ledger.read() as session:
        assert session.scalars(select(Event.kind).order_by(Event.id)).all() == [
            "run.claimed", "run.lost", "run.claimed", "run.done",
        ]  # fmt: skip


def test_a_lease_that_is_renewed_is_kept_beyond_its_first_end(ledger: Ledger) -> None:
    add_slot(ledger)
    with ledger.write() as session:
        slot = claim(session, Slot, NOW, ELSEWHERE)
        assert slot is not None
        lease = lease_of(slot)
        renew(session, lease, LATER - timedelta(seconds=2))
    with ledger.write() as session:
        assert claim(session, Slot, LATER, "other:1/1/0.00") is None
        assert finish(session, lease, LATER, "done")


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="Linux counts a start in ticks since the boot"
)
def test_a_process_is_named_by_a_start_that_no_step_of_the_clock_moves() -> None:
    """Ticks since the boot; seconds of the day, as psutil tells them, made every live lease look dead."""
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    assert this_process().endswith(f":{ticks}")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux names its boots")
def test_a_lease_of_a_machine_with_the_same_name_is_waited_for(ledger: Ledger) -> None:
    """Clones have one host name, and one number for the space of process ids; a boot is of one of them."""
    host, pid, start = this_process().rsplit("/", 2)
    boot, ticks = start.split(":")
    twin = f"{host}/{pid}/00000000:{ticks}"
    assert is_gone(f"{host}/{pid}/{boot}:{int(ticks) + 1}")  # of this machine: its pid is another one's now
    assert not is_gone(twin)
    add_slot(ledger)
    with ledger.write() as session:
        assert claim(session, Slot, NOW, twin) is not None
    with ledger.write() as session:
        assert claim(session, Slot, NOW, this_process()) is None
    with ledger.write() as session:
        assert claim(session, Slot, LATER, this_process()) is not None


def test_the_lease_of_a_process_that_is_gone_from_this_machine_is_taken_at_once(ledger: Ledger) -> None:
    told = [sys.executable, "-c", "from rollsight.jobs.ledger.claims import this_process as p; print(p())"]
    owner = subprocess.run(told, capture_output=True, text=True, check=True).stdout.strip()
    assert is_gone(owner)
    assert not is_gone(this_process())
    assert not is_gone(ELSEWHERE)
    add_slot(ledger)
    with ledger.write() as session:
        assert claim(session, Slot, NOW, owner) is not None
    with ledger.write() as session:
        again = claim(session, Slot, NOW, this_process())
        assert again is not None and again.attempt == 1


def test_a_failure_is_tried_again_after_a_wait_and_the_fifth_is_a_dead_letter_with_one_alert(
    ledger: Ledger,
) -> None:
    add_run(ledger, "R1")
    now, states, draw = NOW, [], random.Random(3)
    for _ in range(MAX_ATTEMPTS):
        with ledger.write() as session:
            row = claim(session, Run, now, ELSEWHERE)
            assert row is not None
            states.append(fail(session, lease_of(row), now, "disk away", FAILED, draw))
            session.refresh(row)
            if row.not_before is not None:
                assert now <= row.not_before <= now + timedelta(seconds=LAST_RETRY_S)
                assert claim(session, Run, row.not_before - timedelta(seconds=1), ELSEWHERE) is None
                now = row.not_before
    assert states == ["retry"] * 4 + ["dead"]
    with ledger.write() as session:
        assert claim(session, Run, now + timedelta(days=9), ELSEWHERE, early=True) is None
        [alert] = session.scalars(select(Alert)).all()
        assert (alert.kind, alert.roll_id) == ("dead", "R1")
        assert "given up after 5 attempts" in alert.subject and "disk away" in alert.body


def test_a_holder_that_dies_five_times_is_a_dead_letter_too(ledger: Ledger) -> None:
    add_run(ledger, "R1")
    now = NOW
    for _ in range(MAX_ATTEMPTS):
        with ledger.write() as session:
            assert claim(session, Run, now, ELSEWHERE) is not None
        now += timedelta(seconds=LEASE_S + 1)
    with ledger.write() as session:
        assert claim(session, Run, now, ELSEWHERE) is None
    with ledger.read() as session:
        assert session.scalars(select(Run.state)).all() == ["dead"]
        assert session.scalar(select(func.count()).select_from(Alert)) == 1


@pytest.mark.parametrize("exit_code", [CONFIG, USAGE])
def test_a_fault_of_the_configuration_is_not_tried_again(ledger: Ledger, exit_code: int) -> None:
    add_slot(ledger)
    with ledger.write() as session:
        slot = claim(session, Slot, NOW, ELSEWHERE)
        assert slot is not None
        assert fail(session, lease_of(slot), NOW, "no such model", exit_code, random.Random(0)) == "failed"
    with ledger.write() as session:
        assert claim(session, Slot, LATER, ELSEWHERE, early=True) is None


def test_where_something_else_is_at_work_no_attempt_counts(ledger: Ledger) -> None:
    """A scan by hand may hold a roll for hours: that is no dead letter."""
    add_run(ledger, "R1")
    for _ in range(MAX_ATTEMPTS + 2):
        with ledger.write() as session:
            row = claim(session, Run, NOW, ELSEWHERE, early=True)
            assert row is not None
            assert fail(session, lease_of(row), NOW, "is being scanned", LOCKED, random.Random(0)) == "retry"
    with ledger.read() as session:
        assert session.scalars(select(Run.attempt)).all() == [0]


def test_a_ledger_on_a_network_share_is_refused(tmp_path: Path) -> None:
    mounts = [("/", "ext4"), (str(tmp_path), "nfs4"), (str(tmp_path / "local"), "xfs")]
    check_disk(tmp_path / "local" / "ledger.db", mounts)
    check_disk(Path("/ledger.db"), mounts)
    with pytest.raises(UserError, match="on a network share \\(nfs4\\)") as fault:
        check_disk(tmp_path / "ledger.db", mounts)
    assert fault.value.exit_code == CONFIG


def test_waits_are_spread_evenly_below_a_bound_that_doubles() -> None:
    draw = random.Random(1)
    for attempt, bound in ((1, FIRST_RETRY_S), (2, 120), (3, 240), (6, LAST_RETRY_S), (40, LAST_RETRY_S)):
        waits = [wait_s(attempt, draw) for _ in range(2000)]
        assert min(waits) >= 0 and max(waits) <= bound
        assert sum(waits) / len(waits) == pytest.approx(bound / 2, rel=0.06)


def test_stopped_in_order_a_run_is_due_again_without_an_attempt_counted(ledger: Ledger) -> None:
    add_run(ledger, "R1")
    with ledger.write() as session:
        row = claim(session, Run, NOW, ELSEWHERE)
        assert row is not None
        release(session, lease_of(row), NOW)
    with ledger.write() as session:
        again = claim(session, Run, NOW, ELSEWHERE)
        assert again is not None and again.attempt == 0


def newer(home: Path) -> str:
    opened = open_ledger(None, Plant(home))
    with opened.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'v9999'"))
    opened.close()
    return ""


def read_only(home: Path) -> str:
    open_ledger(None, Plant(home)).close()
    return f"sqlite:///file:{home / 'ledger.db'}?mode=ro&uri=true"


def no_database(home: Path) -> str:
    (home / "ledger.db").write_bytes(b"no database at all, but long enough to be one\n" * 40)
    return ""


FAULTS = {
    "a newer schema": (newer, CONFIG, "schema v9999 of a newer version; this one knows v0001: install"),
    "a file that is no database": (no_database, CONFIG, "is no ledger or is damaged"),
    "a read-only database": (read_only, CONFIG, "may not be written"),
    "no server": (lambda _: "postgresql+psycopg://u@127.0.0.1:1/x", LOCKED, "does not answer"),
    "another database": (lambda _: "mysql://u@h/x", CONFIG, "it is postgresql+psycopg://USER@HOST/NAME or"),
    "no URL": (lambda _: "ledger", USAGE, "it is postgresql+psycopg://USER@HOST/NAME or"),
    "no folder": (lambda home: f"sqlite:///{home}/file/x/l.db", CONFIG, "choose another plant folder"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_of_the_database_is_one_line_and_its_exit_code(name: str, tmp_path: Path) -> None:
    make, exit_code, told = FAULTS[name]
    (tmp_path / "file").touch()
    url = make(tmp_path)
    with pytest.raises(UserError) as fault:
        opened = open_ledger(url or None, Plant(tmp_path))
        with opened.write() as session:
            add_event(session, NOW, "slot.made")
    assert told in str(fault.value)
    assert "\n" not in str(fault.value)
    assert fault.value.exit_code == exit_code


def test_a_disk_that_is_full_is_waited_for(tmp_path: Path) -> None:
    """SQLite says so too where the file may have no more pages."""
    opened = open_ledger(None, Plant(tmp_path))

    def limit(pages: int) -> None:
        with opened.engine.begin() as connection:
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    def fill(session: Session) -> None:
        add_event(session, NOW, "slot.made", detail="x" * 100_000)
        if pages := waits.pop(0) if waits else None:
            session.connection().exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    waits = [1]
    with pytest.raises(LedgerAwayError, match="full: make room on its disk") as fault:
        opened.keep(fill, 0.0)
    assert fault.value.exit_code == LOCKED
    limit(1_000_000)
    waits = [1, 1_000_000]
    opened.keep(fill, 10.0)
    with opened.read() as session:
        assert session.scalar(select(func.count()).select_from(Event)) == 1
    opened.close()


def test_a_server_that_falls_silent_is_given_up_after_a_minute(postgresql, tmp_path: Path) -> None:
    opened = open_ledger(postgresql.database("silent"), Plant(tmp_path))
    with opened.engine.connect() as connection:
        told = connection.connection.dbapi_connection.info.get_parameters()
    opened.close()
    names = ("keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout")
    assert [told[name] for name in names] == ["30", "10", "3", "60000"]


def test_postgresql_without_its_driver_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "psycopg"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError, match=r"pip install 'rollsight\[postgresql\]'") as fault:
        open_ledger("postgresql://u@h/x", Plant(tmp_path))
    assert fault.value.exit_code == CONFIG


def test_an_option_that_the_server_does_not_know_is_a_fault_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="check the URL") as fault:
        open_ledger("postgresql://u@127.0.0.1:1/x?colour=red", Plant(tmp_path))
    assert fault.value.exit_code == CONFIG


def test_a_database_that_is_unknown_to_the_server_is_a_fault_of_the_configuration(postgresql) -> None:
    with pytest.raises(UserError, match="check the URL") as fault:
        open_ledger(postgresql.url("nowhere"), Plant(Path("plant")))
    assert fault.value.exit_code == CONFIG


def test_a_server_that_was_started_anew_is_written_to_again(postgresql, tmp_path: Path) -> None:
    opened = open_ledger(postgresql.database("restarted"), Plant(tmp_path))
    with opened.write() as session:
        add_event(session, NOW, "slot.made")
    postgresql.stop("fast")
    with pytest.raises(UserError) as fault, opened.write() as session:
        add_event(session, NOW, "slot.made")
    assert fault.value.exit_code == LOCKED
    postgresql.start()
    with opened.write() as session:
        add_event(session, NOW, "slot.made")
        assert session.scalar(select(func.count()).select_from(Event)) == 2
    opened.close()
