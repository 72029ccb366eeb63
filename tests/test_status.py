"""Status, metrics, log and what follows a tick: made of a real ledger, read by others' own readers."""

import http.server
import json
import random
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rollsight.inspect.errors import CONFIG, LOCKED, UserError
from rollsight.inspect.plant import Plant
from rollsight.inspect.rolls import RollWriter, Strip
from rollsight.jobs.afterwards import PAGE_MADE, RETAINED, follow_up, followed
from rollsight.jobs.cli import main
from rollsight.jobs.commands.jobs import open_at_work
from rollsight.jobs.ledger.claims import claim, lease_of, note
from rollsight.jobs.ledger.database import LedgerAwayError, open_ledger
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.outbox import put_alert
from rollsight.jobs.ledger.schema import Event, Run, Slot, Stability
from rollsight.jobs.logs import log_events
from rollsight.jobs.metrics_file import serve_metrics, text, write_metrics
from rollsight.jobs.schedule import LineFile
from rollsight.jobs.sites import Site
from rollsight.jobs.status import status, tables
from rollsight.jobs.stopping import StoppedError
from sqlalchemy import func, select

NOW = datetime(2026, 11, 24, 5, 30, tzinfo=UTC)
JOBS = [{"name": "nightly", "cron": "30 1 * * *"}]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A plant at work: one roll half done, one given up, one done, an alert that is not out."""
    plant = Plant(tmp_path / "plant")
    ledger = open_ledger(None, plant)
    line = LineFile(line="CGL2", zone="Europe/Berlin", jobs=JOBS, disk_reserve_gb=0)
    site = Site(plant, ledger, line, lambda: NOW, random.Random(1))
    strip = Strip("C1", "top", ("bright",), 0.8, 1.0)
    with RollWriter(plant.roll_path("C1"), strip, 64, np.uint8) as writer:
        writer.append(np.full((1, 4000, 64), 128, np.uint8))
    bands = plant.home / "runs" / "C1" / "ab12" / "bands"
    bands.mkdir(parents=True)
    told = {"run_id": "ab12", "y0": 0, "y1": 1000, "shard_sha256": "0" * 64, "seconds": {"read": 1.5}}
    (bands / "0.json").write_text(json.dumps(told))
    facts = {"model": "default", "model_hash": "0", "created_at": NOW - timedelta(hours=2), "closed_at": NOW}
    with ledger.write() as session:
        session.add(Run(roll_id="C1", state="due", **facts))
        session.add(Run(roll_id="C2", state="dead", attempt=5, error="disk full", **facts))
        done = {"ended_at": NOW, "length_m": 1200.5, "by_class": '{"pit": 3, "scale": 2}', "seconds": 60.0}
        session.add(Run(roll_id="C3", state="done", **facts, **done))
        session.add(Run(roll_id="C4", state="retry", attempt=1, error="x", not_before=NOW, **facts))
        slot = {"job": "nightly", "created_at": NOW, "state": "done"}
        session.add(Slot(scheduled_for=NOW - timedelta(hours=5), ended_at=NOW - timedelta(hours=1), **slot))
        put_alert(session, NOW - timedelta(hours=1), "late:nightly", "late", "job nightly is late")
        row = claim(session, Run, NOW, site.owner, where=(Run.roll_id == "C1",))
        assert row is not None
        note(session, lease_of(row), run_id="ab12", folder="runs/C1/ab12")
    yield site
    ledger.close()


def test_the_status_says_how_far_a_roll_is_by_its_receipts(site):
    told = json.loads(json.dumps(status(site)))

    assert told["rolls"] == {"running": 1, "dead": 1, "done": 1, "retry": 1}
    [run] = told["running"]
    assert (run["roll_id"], run["lines_done"], run["lines"], run["share"]) == ("C1", 1000, 4000, 0.25)
    assert (run["owner"], run["alive"]) == (site.owner, True)
    assert [(row["roll_id"], row["attempt"], row["error"]) for row in told["given_up"]] == [
        ("C2", 5, "disk full")
    ]
    assert [row["roll_id"] for row in told["retries"]] == ["C4"]
    [job] = told["jobs"]
    assert (job["last_success"], job["next"]) == ("2026-11-24T04:30:00+00:00", "2026-11-25T00:30:00+00:00")
    assert job["late"] is False
    assert told["alerts"] == {"unsent": 1, "overdue": 0, "last_error": None}  # there is no channel


def test_a_person_sees_the_same_as_tables(site):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(tables(status(site)))
    seen = console.export_text()

    for words in ("1 dead, 1 done, 1 retry, 1 running", "nightly", "C1", "25%", "C2", "disk full", "C4"):
        assert words in seen, words


def test_prometheus_reads_the_metrics(site):
    """By Prometheus' own parser, from the text and from the file that node_exporter gets."""
    families = {f.name: f for f in text_string_to_metric_families(text(site).decode())}
    values = {(s.name, *s.labels.values()): s.value for f in families.values() for s in f.samples}

    assert values["rollsight_runs", "dead"] == 1
    assert values["rollsight_runs", "failed"] == 0  # a series that is not there would never raise an alarm
    assert values["rollsight_defects_total", "pit"] == 3
    assert values["rollsight_strip_metres_total",] == 1200.5
    assert (
        values["rollsight_last_success_timestamp_seconds", "nightly"]
        == (NOW - timedelta(hours=1)).timestamp()
    )
    assert values["rollsight_ledger_lag_seconds",] == 7200
    assert {label for f in families.values() for s in f.samples for label in s.labels} == {
        "state",
        "class",
        "job",
    }
    path = site.plant.home / "rollsight.prom"
    write_metrics(site, path)
    free = b"rollsight_disk_free_bytes"  # of a disk that others use too
    same = [
        [line for line in each.splitlines() if free not in line] for each in (path.read_bytes(), text(site))
    ]
    assert same[0] == same[1] and len(same[0]) > 40
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(UserError, match=r"\.prom") as fault:
        write_metrics(site, site.plant.home / "metrics.txt")
    assert fault.value.exit_code == CONFIG


def test_status_and_metrics_are_the_same_on_both_databases(ledger, tmp_path):
    site = Site(Plant(tmp_path), ledger, LineFile(jobs=JOBS), lambda: NOW, random.Random(1))
    facts = {"model": "m", "model_hash": "0", "created_at": NOW, "closed_at": NOW, "state": "done"}
    with ledger.write() as session:
        session.add(Run(roll_id="C1", length_m=10.5, attempt=2, by_class='{"pit": 1}', ended_at=NOW, **facts))
        session.add(Slot(job="nightly", scheduled_for=NOW, created_at=NOW, state="partial", ended_at=NOW))
        put_alert(session, NOW, "x", "late", "late")
    lines = text(site).decode().splitlines()

    assert {"rollsight_retries_total 2.0", "rollsight_strip_metres_total 10.5"} <= set(lines)
    [last] = [line for line in lines if line.startswith("rollsight_last_success_timestamp_seconds{")]
    assert float(last.split()[-1]) == NOW.timestamp()
    told = status(site)
    assert (told["rolls"], told["alerts"]["unsent"]) == ({"done": 1}, 1)
    assert told["jobs"][0]["last_success"] == NOW.isoformat()


def test_a_job_that_never_succeeded_is_late_once_its_alert_is_due_and_has_a_series(ledger, tmp_path):
    """Seen for 27 h; a slot that is at work is waited for until its deadline, as by the alert."""
    site = Site(Plant(tmp_path), ledger, LineFile(jobs=JOBS), lambda: NOW, random.Random(1))
    with ledger.write() as session:
        add_event(session, NOW - timedelta(hours=27), "job.seen", detail="nightly")

    [job] = status(site)["jobs"]
    assert (job["last_success"], job["late"]) == (None, True)
    assert 'rollsight_last_success_timestamp_seconds{job="nightly"} 0.0' in text(site).decode()
    with ledger.write() as session:
        facts = {"job": "nightly", "scheduled_for": NOW, "created_at": NOW, "state": "running"}
        session.add(Slot(lease_until=NOW, deadline=NOW, **facts))
    assert status(site)["jobs"][0]["late"] is False
    site = replace(site, clock=lambda: NOW - timedelta(hours=2))
    assert status(site)["jobs"][0]["late"] is False  # seen for 25 h


def test_a_roll_that_is_gone_is_among_those_given_up(site):
    with site.ledger.write() as session:
        run = session.scalars(select(Run).where(Run.roll_id == "C4")).one()
        run.state, run.error = "gone", "the roll is no longer there"

    assert {(row["roll_id"], row["state"]) for row in status(site)["given_up"]} == {
        ("C2", "dead"),
        ("C4", "gone"),
    }


def test_stability_is_the_worst_of_the_last_checks_and_an_old_one_is_called_so(ledger, tmp_path):
    site = Site(Plant(tmp_path), ledger, LineFile(jobs=JOBS), lambda: NOW, random.Random(1))
    facts = {"roll_id": "reference", "is_baseline": False, "counts": "{}", "gray": "{}", "bands": "{}"}

    def put(hours: float, model: str, *, in_band: bool) -> None:
        with ledger.write() as session:
            told = {"model": model, "model_hash": model, "in_band": in_band, "out": "[]"}
            session.add(Stability(at=NOW - timedelta(hours=hours), **facts, **told))

    def seen() -> str:
        console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
        console.print(tables(status(site)))
        return console.export_text()

    put(600, "default", in_band=True)
    assert "Stability: not checked since 30 Oct 05:30, model default" in seen()
    put(2, "first", in_band=False)
    put(1, "default", in_band=True)
    assert status(site)["stability"] == {
        "at": "2026-11-24T03:30:00+00:00",
        "in_band": False,
        "model": "first",
        "old": False,
    }
    assert "Stability: out of band, 24 Nov 03:30, model first" in seen()
    assert "rollsight_stability_in_band 0.0" in text(site).decode().splitlines()
    put(0.5, "first", in_band=True)
    assert status(site)["stability"]["in_band"] is True


def test_the_metrics_are_served_on_this_machine_alone_and_asked_anew(site):
    server, thread = serve_metrics(site, 0)
    try:
        assert server.server_address[0] == "127.0.0.1"
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        with site.ledger.write() as session:
            session.scalars(select(Run).where(Run.state == "dead")).one().state = "due"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert b'rollsight_runs{state="dead"} 0.0' in answer.read()
        with pytest.raises(UserError, match="--http") as fault:
            serve_metrics(site, server.server_port)
        assert fault.value.exit_code == CONFIG
    finally:
        server.shutdown()
        thread.join()


def test_events_are_lines_once_they_are_committed_and_never_before(site, tmp_path):
    log = tmp_path / "log" / "jobs.jsonl"
    end = log_events(str(log), plant="mill 3")
    try:
        with pytest.raises(RuntimeError), site.ledger.write() as session:
            add_event(session, NOW, "run.failed", roll_id="C9")
            session.flush()
            assert log.read_text() == ""
            raise RuntimeError
        with site.ledger.write() as session:
            run = session.scalars(select(Run).where(Run.roll_id == "C1")).one()
            add_event(session, NOW, "run.dead", run_key=run.id, token=3, detail="gave up\non it")
            add_event(session, NOW, "slot.made", detail="nightly")
    finally:
        end()
    with site.ledger.write() as session:
        add_event(session, NOW, "slot.made", detail="after the end")
    first, second = map(json.loads, log.read_text().splitlines())

    assert first == {
        "timestamp": NOW.isoformat(),
        "level": "error",
        "event": "run.dead",
        "plant": "mill 3",
        "roll": "C1",
        "run_id": "ab12",
        "run": 1,
        "token": 3,
        "detail": "gave up\non it",
    }
    assert (second["event"], second["level"]) == ("slot.made", "info")


def test_a_full_disk_under_the_log_stops_nothing_and_is_told_once(site, capfd):
    """/dev/full takes no byte: what is committed stays committed, and nothing is raised, not at its end."""
    end = log_events("/dev/full")
    try:
        for roll in ("C7", "C8"):
            with site.ledger.write() as session:
                add_event(session, NOW, "run.done", roll_id=roll)
    finally:
        end()

    assert of_kind(site, "run.done") == 2
    assert capfd.readouterr().err == (
        "log /dev/full: No space left on device: lines are lost; the ledger has all of them\n"
    )


def of_kind(site: Site, kind: str) -> int:
    with site.ledger.read() as session:
        return session.scalar(select(func.count()).where(Event.kind == kind))


def test_alerts_page_and_once_a_day_retention_follow(site, monkeypatch):
    """A channel without its secret is told in a line and stops neither page nor retention."""
    hook = {"name": "shift", "url": "http://127.0.0.1:1/x", "secret_env": "NOT_SET_HERE"}
    line = LineFile(jobs=JOBS, retention={"masks_d": 90}, alerts={"webhooks": [hook]})
    site = replace(site, line=line, clock=lambda: NOW + timedelta(minutes=1))
    page = site.plant.home / "runs" / "index.html"

    [fault] = follow_up(site)
    assert "NOT_SET_HERE" in fault
    assert "C2" in page.read_text()
    monkeypatch.setenv("NOT_SET_HERE", "secret")
    [fault] = follow_up(site)
    assert fault.startswith("alert late:nightly is not sent: shift: ConnectionRefusedError")
    assert (of_kind(site, PAGE_MADE), of_kind(site, RETAINED)) == (
        1,
        1,
    )  # nothing ended since, the day is young
    with site.ledger.write() as session:
        add_event(session, NOW + timedelta(minutes=2), "run.done", roll_id="C4")
    follow_up(replace(site, clock=lambda: NOW + timedelta(minutes=2, seconds=30)), at_last=False)
    assert of_kind(site, PAGE_MADE) == 1  # a roll ended, but the page is not two minutes old
    follow_up(replace(site, clock=lambda: NOW + timedelta(minutes=5)))
    assert of_kind(site, PAGE_MADE) == 2
    follow_up(replace(site, clock=lambda: NOW + timedelta(days=1, minutes=1)))
    assert (of_kind(site, PAGE_MADE), of_kind(site, RETAINED)) == (3, 2)


def pages(site: Site, at: datetime) -> int:
    """How many pages there were after a round at that moment."""
    assert follow_up(replace(site, clock=lambda: at)) == []
    return of_kind(site, PAGE_MADE)


def test_a_night_that_is_put_off_makes_the_page_anew_and_so_does_a_new_day(site):
    """A slot that waits for its retry has no end; and where nothing happens at all the page is of today."""
    minute = timedelta(minutes=1)
    assert [pages(site, NOW + n * minute) for n in (1, 4)] == [1, 1]
    with site.ledger.write() as session:
        add_event(session, NOW + 5 * minute, "slot.retry", detail="1.2 GB are free")
    assert [pages(site, NOW + n * minute) for n in (6, 9)] == [2, 2]
    midnight = datetime(2026, 11, 24, 23, tzinfo=UTC)  # in Berlin
    assert [pages(site, at) for at in (midnight - minute, midnight + minute, midnight + 4 * minute)] == [
        2,
        3,
        3,
    ]


def test_a_clock_that_was_ahead_makes_no_page_for_ever(site):
    """The page of a moment that is still to come is made anew once, with no other news."""
    ahead, minute = NOW + timedelta(days=9), timedelta(minutes=1)
    with site.ledger.write() as session:
        add_event(session, ahead, "slot.done")

    assert [pages(site, at) for at in (ahead, NOW + minute, NOW + 4 * minute)] == [1, 2, 2]
    with site.ledger.write() as session:
        add_event(session, NOW + 5 * minute, "slot.failed", detail="no model")
    assert pages(site, NOW + 6 * minute) == 3


def test_what_happens_while_the_page_is_made_is_on_the_next_one(site):
    """An event stands before that of the page, and of a later moment than the page's look at the ledger."""
    ticks = iter([NOW, NOW + timedelta(seconds=1)])

    def clock() -> datetime:
        at = next(ticks, NOW + timedelta(seconds=1))
        with site.ledger.write() as session:
            add_event(session, at, "slot.failed")
        return at

    follow_up(replace(site, clock=clock))
    assert pages(site, NOW + timedelta(minutes=3)) == 2


def test_a_fault_of_one_step_is_a_line_and_the_others_go_on(site):
    """A file has the name of the page's folder: no UserError. Retention is applied anyway."""
    runs = site.plant.home / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    runs.write_text("no folder")
    site = replace(site, line=LineFile(jobs=JOBS, retention={"masks_d": 90}))

    [fault] = follow_up(site)
    assert fault.startswith("morning page: ") and "\n" not in fault
    assert of_kind(site, RETAINED) == 1


def test_the_thread_goes_on_after_a_fault_of_any_kind(site):
    """A fault of a step, told on a terminal that is gone: when its cause is mended the page is made."""
    runs = site.plant.home / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    runs.write_text("no folder")
    told: list[str] = []

    def on_fault(line: str) -> None:
        told.append(line)
        raise BrokenPipeError

    def until(happens: Callable[[], bool]) -> bool:
        end = time.monotonic() + 20
        while not happens() and time.monotonic() < end:
            time.sleep(0.02)
        return happens()

    with followed(site.plant.home, None, on_fault, every_s=0.05):
        assert until(lambda: len(told) > 0)
        runs.unlink()
        assert until((runs / "index.html").is_file)
    assert [line.partition(":")[0] for line in told] == ["morning page"]


def test_a_plant_that_says_nothing_of_retention_loses_nothing(site):
    assert follow_up(site) == []
    assert of_kind(site, RETAINED) == 0


def test_alerts_go_out_while_the_work_goes_on(site):
    """Within the work, not after it; and one that comes at its very end goes out too."""
    got: list[str] = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            got.append(self.headers["Idempotency-Key"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    def put(key: str) -> None:
        with site.ledger.write() as session:
            put_alert(session, datetime.now(UTC), key, "blocked", "roll C9 is blocked")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x"
        home = site.plant.home
        (home / "line.yaml").write_text(f"alerts: {{webhooks: [{{name: shift, url: '{url}'}}]}}")
        faults: list[str] = []
        put("first")
        with followed(home, None, faults.append, every_s=0.1):
            until = time.monotonic() + 20
            while "first" not in got and time.monotonic() < until:
                time.sleep(0.02)
            during = list(got)
            put("second")
        server.shutdown()

    assert "first" in during and "second" not in during
    assert [key for key in got if key in ("first", "second")] == ["first", "second"]
    assert faults == []
    assert (home / "runs" / "index.html").is_file()


def test_work_that_is_told_to_stop_is_not_held_up(site):
    """No last round: the page is not made, and what was raised comes out."""
    home = site.plant.home
    begun = time.monotonic()
    with (
        pytest.raises(UserError, match="told to stop") as fault,
        followed(home, None, print, every_s=60),
        open_at_work(home, None),
    ):
        raise StoppedError

    assert fault.value.exit_code == LOCKED
    assert time.monotonic() - begun < 5
    assert not (home / "runs" / "index.html").exists()


def test_where_the_ledger_is_away_there_is_no_last_round(site):
    with pytest.raises(LedgerAwayError), followed(site.plant.home, None, print, every_s=60):
        raise LedgerAwayError("ledger ledger.db is held by another process: try again later")

    assert not (site.plant.home / "runs" / "index.html").exists()


def test_a_night_that_is_to_be_tried_again_later_is_followed_up(site):
    """The disk is below the reserve or a lease was lost: the page is made at the end, the alerts are sent."""
    with pytest.raises(UserError, match="ended with 75"), followed(site.plant.home, None, print, every_s=60):
        raise UserError("nightly of 2026-11-24T01:30:00+00:00 ended with 75", LOCKED)

    assert (site.plant.home / "runs" / "index.html").is_file()


def inspect(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rollsight.jobs", "jobs", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("line", "command", "code"),
    [
        ("jobs: [{name: nightly, cron: '30 1 * * *'}]", ["status", "--json"], 0),
        ("jobs: [{name: nightly, cron: '30 1 * * *'}]", ["export", "cron"], 0),
        ("jobs: [{name: nightly, cron: '30 1 * * *'}]", ["alerts", "--send"], 78),
        ("alerts: {webhooks: [{name: a, url: mail.example}]}", ["alerts"], 78),
        ("retention: {masks_d: never}", ["retention", "--dry-run"], 78),
        ("zone: UTC", ["page", "--json"], 0),
        ("zone: UTC", ["export", "systemd"], 78),
        ("zone: UTC", ["metrics", "--out", "x.txt"], 78),
        ("zone: UTC", ["status", "--watch"], 2),
    ],
)
def test_each_command_ends_with_its_code_and_a_mistake_is_one_line(
    tmp_path, monkeypatch, capsys, line, command, code
):
    (tmp_path / "line.yaml").write_text(line)
    monkeypatch.setattr(sys, "argv", ["inspect", "jobs", *command, "--home", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == code
    assert len(capsys.readouterr().err.splitlines()) == (1 if code else 0)


def test_the_log_is_written_by_the_command(tmp_path):
    (tmp_path / "line.yaml").write_text("jobs: [{name: nightly, cron: '30 1 * * *'}]")
    log = tmp_path / "jobs.jsonl"

    assert inspect("--log", str(log), "tick", "--home", str(tmp_path)).returncode == 0
    assert [json.loads(line)["event"] for line in log.read_text().splitlines()] == ["job.seen"]
