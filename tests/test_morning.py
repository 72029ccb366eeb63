"""The morning page: what needs a person comes first, in words; one file, safe whatever a roll is called."""

import importlib.util
import json
import random
import re
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rollsight.inspect.plant import Plant
from rollsight.inspect.report.morning import (
    Morning,
    Night,
    RollLine,
    Scores,
    Trouble,
    in_order,
    render,
    write_morning,
)
from rollsight.inspect.report.page import COLOURS
from rollsight.inspect.trends import SCORE_BINS
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.outbox import put_alert
from rollsight.jobs.ledger.schema import Run, Slot, Stability
from rollsight.jobs.morning_job import SCORES_FILE, gather, histograms, make_page
from rollsight.jobs.schedule import LineFile
from rollsight.jobs.sites import Site

BENCH = Path(__file__).parent.parent / "bench"
NOW = datetime(2026, 11, 24, 5, 30, tzinfo=UTC)
BERLIN = ZoneInfo("Europe/Berlin")


def browser() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_browser", BENCH / "_browser.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fine(name: str, defects: int = 10, **facts) -> RollLine:
    made = {"coverage": 0.999, "length_m": 1000.0, "width_mm": 1000.0, "verdict": "UNGRADED"}
    by_class = (("pit", defects - defects // 3), ("scratch", defects // 3))
    return RollLine(name, "fine", defects=defects, by_class=by_class, **(made | facts))


def morning(*rolls: RollLine, nights: tuple[Night, ...] = (), **facts) -> Morning:
    at = NOW.astimezone(BERLIN)
    made = {"stability": None, "scores": (), "model": "default"} | facts
    return Morning("CGL2", at, at - timedelta(days=1), rolls, nights, **made)


def shown(html: str) -> list[str]:
    """The rolls in the order in which the page has them."""
    return re.findall(r'<th scope="row">(?:<a href="[^"]*">)?([A-Z0-9-]+)(?:</a>)?</th>', html)


def test_rolls_come_by_what_needs_a_person_and_fine_ones_by_defects_per_area():
    rolls = [
        fine("F1", 5),
        fine("F2", 50),
        RollLine("W", "waiting"),
        RollLine("P", "partial", reasons=("3 bands are missing",)),
        RollLine("H2", "hold", coverage=0.98),
        RollLine("H1", "hold", coverage=0.5),
        RollLine("X", "failed"),
        RollLine("M", "missing"),
        RollLine("U", "unreadable"),
        RollLine("B", "blocked", verdict="BLOCKED", reasons=("scratches: 2 in 100 m",)),
    ]
    html = render(morning(*rolls))

    assert [roll.roll_id for roll in in_order(rolls)] == [
        "B",
        "U",
        "M",
        "X",
        "H1",
        "H2",
        "P",
        "W",
        "F2",
        "F1",
    ]
    assert shown(html) == ["B", "U", "M", "X", "H1", "H2", "P", "W", "F2", "F1"]
    assert "<strong>7</strong>" in html and "rolls need a person" in html
    assert "scratches: 2 in 100 m" in html


def test_a_quiet_night_says_so():
    html = render(morning(fine("F1")))

    assert "All fine" in html and 'header class="calm"' in html
    assert "none is held" in html


def heading(html: str) -> tuple[str, str, str]:
    """Title, class of the header, and the largest words of the page."""
    found = [
        re.search(p, html) for p in ("<title>(.*?) · ", '<header class="(.*?)"', "<strong>(.*?)</strong>")
    ]
    return tuple(match[1] if match else "" for match in found)


def test_a_job_that_did_not_do_its_work_stands_in_the_head_with_when_and_why():
    """In place of "All fine"; where rolls need a person they are counted as ever."""
    at = datetime(2026, 11, 24, 1, 30, tzinfo=BERLIN)
    trouble = Trouble("nightly", "failed", at, "no model 'hot-strip-9' " + "x" * 200)
    alone, beside = (
        render(morning(roll, troubles=(trouble,))) for roll in (fine("F"), RollLine("X", "failed"))
    )

    assert heading(alone) == ("nightly cannot run", "hold", "nightly cannot run")
    assert heading(beside) == ("1 to look at", "hold", "1")
    for html in (alone, beside):
        assert "All fine" not in html
        assert "<b>nightly cannot run</b> Tue 24 Nov 01:30: no model &#39;hot-strip-9&#39; xxx" in html
        assert f"{'x' * 200}</td>" in html  # the whole of it in the list of jobs


def test_the_page_asks_for_nothing_outside_and_escapes_what_a_roll_says():
    bad = "</td><script>alert(1)</script>"
    html = render(morning(fine(bad, page='x" onclick="alert(1)'), RollLine("A", "failed", reasons=(bad,))))

    assert "<script>alert" not in html and 'onclick="alert' not in html
    assert re.findall(r"(?:src|href)=\"(?!data:|#|x&#34;)[^\"]*\"", html) == []
    assert "default-src 'none'" in html
    assert "http://" not in html and "https://" not in html


def test_alerts_that_are_stuck_stand_in_the_head():
    assert "Alerts not sent: 2" in render(morning(fine("F1"), alerts_waiting=2))
    assert "no channel is set" in render(morning(fine("F1")))


def test_coverage_is_never_rounded_up():
    assert "99.99 %" in render(morning(fine("F1", coverage=0.99999)))


def test_the_coverage_of_a_night_counts_rolls_that_were_not_seen_at_all():
    """1000 m at 100 % and 1000 m at 0 %: half of the strip. A roll without a scale has no area."""
    seen, unseen = fine("F1", coverage=1.0), replace(fine("H1", coverage=0.0), state="hold")
    no_scale = fine("F2", coverage=0.2, length_m=None, width_mm=None)

    for rolls in ((seen, unseen), (seen, unseen, no_scale)):
        assert "<b>50.00 %</b><span>of their strip inspected" in render(morning(*rolls))
    assert "<b>0.00 %</b>" in render(morning(unseen))
    assert "<b>–</b><span>of their strip inspected" in render(morning(no_scale))


def test_a_class_has_the_colour_of_its_place_in_the_model_as_on_the_page_of_a_roll():
    """The model's order is not that of the alphabet; a class of another model comes after."""
    night = Night(NOW.date(), 1000.0, {"scale": 0, "pit": 4, "crack": 1}, {"fine": 1})
    other = replace(fine("F1"), by_class=(("blister", 1), ("pit", 2)))
    html = render(morning(other, nights=(night,)))

    named = re.findall(r'<i class="key k(\d+)"></i>(\w+)</span>', html)
    assert named == [("0", "scale"), ("1", "pit"), ("2", "crack"), ("3", "blister")]
    assert f".k1{{fill:{COLOURS[1]};" in html


def nights(counts: list[int], **classes: list[int]) -> tuple[Night, ...]:
    first = NOW.date() - timedelta(days=len(counts) - 1)
    return tuple(
        Night(
            first + timedelta(days=i),
            20_000.0,
            {"pit": count} | {k: v[i] for k, v in classes.items()},
            {"fine": 26},
        )
        for i, count in enumerate(counts)
    )


def test_a_class_that_leaves_its_band_comes_first_and_stands_in_the_head():
    steady = [40, 44, 36, 41, 39, 43, 38, 40, 42, 37] * 2
    html = render(morning(fine("F1"), nights=nights([*steady, 40], scale=[*steady, 90])))

    assert "1 class above usual" in html
    charts = re.findall(r'<figure class="trend ([a-z]*)">.*?<b>(\w+)</b>', html, flags=re.DOTALL)
    assert charts == [("bad", "scale"), ("", "pit")]
    assert html.count('class="out"') == 1


def test_scores_that_moved_are_told():
    old, new = np.zeros(SCORE_BINS, int), np.zeros(SCORE_BINS, int)
    old[18], old[12], new[12], new[18] = 900, 100, 400, 100
    scores = (
        Scores("pit", tuple(old.tolist()), tuple(new.tolist())),
        Scores("scratch", (9,) * 20, (9,) * 20),
    )
    html = render(morning(fine("F1"), scores=scores))

    assert "Scores have drifted" in html
    assert re.findall(r'<td class="left">(drift|alike|watch)</td>', html) == ["drift", "alike"]


@pytest.mark.skipif(browser().CHROMIUM is None, reason="no Chromium on the PATH")
def test_a_browser_opens_a_thousand_rolls_finds_one_and_sorts(tmp_path):
    rng = np.random.default_rng(0)
    rolls = [
        fine(f"C{i:04d}-02", int(rng.integers(1, 300)), page=f"C{i:04d}-02/8f31/report.html")
        for i in range(1000)
    ]
    counts = rng.poisson(40, 30).tolist()
    path = write_morning(
        tmp_path / "page" / "index.html", morning(*rolls, nights=nights(counts, scale=counts))
    )
    script = """
      const input = page.querySelector(".filter input");
      const rows = () => [...page.querySelectorAll(".sortable tbody tr")];
      input.value = "c0042"; input.dispatchEvent(new view.Event("input"));
      found.shown = rows().filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
      found.told = page.querySelector(".filter [role=status]").textContent;
      input.value = ""; input.dispatchEvent(new view.Event("input"));
      page.querySelectorAll(".sortable th[scope=col]")[5].click();
      found.defects = rows().map((row) => parseInt(row.cells[5].textContent));
      page.querySelectorAll(".sortable th[scope=col]")[0].click();
      found.first = rows()[0].cells[0].textContent;
      found.link = page.querySelector("tbody a").href;
    """
    found = browser().opened(path.parent, script)

    assert path.stat().st_size < 3_000_000
    assert (found["complaints"], found.get("error"), found["wide"]) == ([], None, 0)
    assert (found["shown"], found["told"]) == (["C0042-02"], "1 of 1000")
    assert found["defects"] == sorted(found["defects"], reverse=True)
    assert found["first"] == "C0000-02"
    assert found["link"].endswith("/C0000-02/8f31/report.html")


@pytest.mark.skipif(browser().CHROMIUM is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize(("hours", "told"), [(31, "made 31 hours ago: the page is old"), (20, "")])
def test_a_page_that_stands_too_long_says_so_in_a_browser(tmp_path, hours, told):
    made = datetime.fromtimestamp(time.time() - hours * 3600 - 60, BERLIN)
    path = write_morning(
        tmp_path / "page" / "index.html", Morning("CGL2", made, made, (fine("F1"),), (), None, (), None)
    )
    found = browser().opened(
        path.parent,
        """
        const old = page.querySelector(".old");
        found.told = old.hidden ? "" : old.textContent;
        found.fine = page.querySelector("header.calm strong")?.textContent ?? "";
        found.title = page.title.slice(0, 8);
        """,
    )

    assert (found["complaints"], found.get("error")) == ([], None)
    assert (found["told"], found["fine"]) == (told, "" if told else "All fine")
    assert found["title"] == ("Old page" if told else "All fine")


# From the ledger


def put_run(site: Site, roll_id: str, at: datetime, scores: list[float] | None = None, **facts) -> None:
    """A run as a night leaves it: its row, and where it is done its folder with defect table and page."""
    row = {"model": "default", "model_hash": "0" * 64, "state": "done", "created_at": at, "closed_at": at}
    if facts.get("state", "done") == "done":
        run_id = f"{roll_id.lower()}f00"
        folder = site.plant.home / "runs" / roll_id / run_id
        folder.mkdir(parents=True)
        (folder / "report.html").write_text("<html></html>")
        values = scores or []
        table = pa.table({"class": ["pit"] * len(values), "score": np.asarray(values, dtype=np.float32)})
        pq.write_table(table, folder / "defects.parquet")
        row |= {"run_id": run_id, "folder": f"runs/{roll_id}/{run_id}", "ended_at": at, "coverage": 0.999}
        row |= {"length_m": 2000.0, "width_mm": 1000.0, "verdict": "UNGRADED", "defects": len(values)}
        row |= {"by_class": json.dumps({"pit": len(values)}), "reasons": '["not graded"]'}
    with site.ledger.write() as session:
        session.add(Run(roll_id=roll_id, **(row | facts)))


@pytest.fixture
def site(ledger, tmp_path) -> Site:
    jobs = [{"name": "nightly", "cron": "30 1 * * *"}]
    line = LineFile(line="CGL2", zone="Europe/Berlin", jobs=jobs)
    return Site(Plant(tmp_path), ledger, line, lambda: NOW, random.Random(1))


def test_the_ledger_says_what_each_roll_is(site):
    """Every state of a run as the page has it; a failure of a roll that was inspected since is history."""
    hour = timedelta(hours=1)
    put_run(site, "OK", NOW - hour, [0.9] * 3)
    put_run(
        site, "HELD", NOW - hour, verdict="HOLD", reasons='["coverage 97.10% is under 99%"]', coverage=0.971
    )
    put_run(site, "STOP", NOW - hour, verdict="BLOCKED", reasons='["limit #2"]')
    put_run(site, "OLD", NOW - 40 * hour)
    put_run(site, "BAD", NOW - hour, state="failed", error="zarr.json: not JSON")
    put_run(site, "DEAD", NOW - hour, state="dead", error="disk", attempt=5, run_id="d")
    put_run(
        site, "HALF", NOW - hour, state="retry", error="2 bands", attempt=1, run_id="h", not_before=NOW + hour
    )
    put_run(site, "NEXT", NOW - hour, state="due")
    put_run(site, "GONE", NOW - hour, state="gone", ended_at=NOW - hour, error="no longer there")
    put_run(site, "AGAIN", NOW - 3 * hour, state="failed", error="was damaged")
    put_run(site, "AGAIN", NOW - hour)
    with site.ledger.write() as session:
        put_alert(
            session, NOW - hour, "missing:NAMED", "missing", "roll NAMED is not there", "Why", roll_id="NAMED"
        )
    told = {roll.roll_id: roll for roll in gather(site).rolls}

    assert {name: roll.state for name, roll in told.items()} == {
        "OK": "fine",
        "HELD": "hold",
        "STOP": "blocked",
        "BAD": "unreadable",
        "DEAD": "failed",
        "HALF": "partial",
        "NEXT": "waiting",
        "GONE": "missing",
        "AGAIN": "fine",
        "NAMED": "missing",
    }
    assert told["HELD"].reasons == ("coverage 97.10% is under 99%",)
    assert told["HALF"].reasons == ("2 bands", "attempt 1 failed, tried again at Tue 07:30")
    assert told["DEAD"].reasons[-1] == "given up after 5 attempts; inspect jobs retry DEAD"
    assert (told["OK"].page, told["BAD"].page) == ("OK/okf00/report.html", None)
    html = make_page(site).read_text()
    assert (site.plant.home / "runs" / "OK/okf00/report.html").is_file()
    assert 'href="OK/okf00/report.html"' in html


def put_slot(site: Site, at: datetime, state: str, job: str = "nightly", **facts) -> None:
    with site.ledger.write() as session:
        session.add(Slot(job=job, scheduled_for=at, created_at=at, state=state, **facts))


NIGHT = datetime(2026, 11, 24, 0, 30, tzinfo=UTC)  # half past one in Berlin
DAY = timedelta(days=1)


@pytest.mark.parametrize(
    ("state", "error", "told"),
    [
        ("failed", "no model 'hot-strip-9'", "nightly cannot run"),
        ("dead", "OSError: EIO", "nightly was given up"),
        ("retry", "1.2 GB are free, under the reserve of 2 GB", "nightly is tried again"),
        ("partial", "2 rolls are not inspected", "nightly ended in part"),
        ("skipped", "missed, and catch_up is none", "nightly was left out"),
    ],
)
def test_a_night_that_did_not_end_well_is_never_all_fine(site, state, error, told):
    put_slot(site, NIGHT - DAY, "done", ended_at=NIGHT - DAY + timedelta(hours=4))
    put_slot(site, NIGHT, state, error=error, not_before=NOW if state == "retry" else None)
    html = make_page(site).read_text()

    assert heading(html) == (told, "hold", told)
    assert re.search(r"<b>nightly [a-z ]+</b> Tue 24 Nov 01:30: (.*?)</a>", html)[1].startswith(
        error.replace("'", "&#39;")
    )


def test_without_a_success_for_days_or_a_tick_at_all_the_page_is_not_calm(site):
    """The last success three days ago: late. A job seen yesterday whose moment nobody began: not late yet."""
    with site.ledger.write() as session:
        add_event(session, NOW - 4 * DAY, "job.seen", detail="nightly")
    put_slot(site, NIGHT - 3 * DAY, "done", ended_at=NIGHT - 3 * DAY + timedelta(minutes=1))
    late, missed = gather(site).troubles

    assert (late.state, late.since.isoformat()) == ("late", "2026-11-21T01:31:00+01:00")
    assert (missed.state, missed.since.isoformat()) == ("missed", "2026-11-24T01:30:00+01:00")
    assert heading(make_page(site).read_text())[:2] == ("nightly is late", "hold")
    put_slot(site, NIGHT - DAY, "done", ended_at=NIGHT - DAY + timedelta(hours=4))
    assert [trouble.state for trouble in gather(site).troubles] == ["missed"]
    put_slot(site, NIGHT, "running", lease_until=NOW)
    assert gather(site).troubles == ()


def test_a_page_is_old_after_26_hours_or_where_it_outlives_a_night(site):
    """The page is made anew as a night begins: two hours after its moment another should be there."""
    assert gather(site).old_at == NIGHT + DAY + timedelta(hours=2)
    weekly = LineFile(zone="Europe/Berlin", jobs=[{"name": "nightly", "cron": "30 1 * * 6"}])
    assert gather(replace(site, line=weekly)).old_at == NOW + timedelta(hours=26)


def test_a_job_that_never_succeeded_is_late_on_the_page(site):
    with site.ledger.write() as session:
        add_event(session, NOW - 2 * DAY, "job.seen", detail="nightly")
    late = gather(site).troubles[0]

    assert (late.state, late.why) == ("late", "it never succeeded; late after 26 h")


def test_what_a_later_slot_made_good_or_happened_long_ago_is_no_trouble(site):
    """And what was left out of an old moment tonight is one, told once for all such moments."""
    put_slot(site, NIGHT - 9 * DAY, "failed", error="old", ended_at=NIGHT - 9 * DAY)
    put_slot(site, NIGHT - timedelta(hours=1), "failed", error="no model", ended_at=NIGHT)
    put_slot(site, NIGHT + 9 * DAY, "done", ended_at=NIGHT + 9 * DAY)  # by a clock that was ahead
    assert [trouble.state for trouble in gather(site).troubles] == ["late", "missed", "failed"]
    put_slot(site, NIGHT, "done", ended_at=NIGHT + timedelta(minutes=5))
    put_slot(site, NIGHT - 2 * DAY, "retry", job="by-hand", error="1.2 GB are free")
    assert gather(site).troubles == ()

    for days in (3, 2):
        put_slot(site, NIGHT - days * DAY, "skipped", job="rare", error="missed, and catch_up is none")
    with site.ledger.write() as session:
        for slot in session.query(Slot).where(Slot.job == "rare"):
            add_event(session, NOW, "slot.skipped", slot_id=slot.id)
    [trouble] = gather(site).troubles
    assert (trouble.job, trouble.why) == (
        "rare",
        "missed, and catch_up is none; 1 more since Sat 21 Nov 01:30",
    )


def test_a_replaced_run_is_on_the_page_no_more(site):
    put_run(site, "C1", NOW - DAY, state="replaced", error="the model is another", model_hash="1" * 64)
    put_run(site, "C1", NOW - timedelta(hours=1))

    assert [(roll.roll_id, roll.state) for roll in gather(site).rolls] == [("C1", "fine")]


def put_check(site: Site, at: datetime, model: str, count: int, **facts) -> None:
    """A check on the reference strip whose band is 8 to 12 pits."""
    told = {"counts": json.dumps({"pit": count}), "gray": "{}", "out": "[]", "is_baseline": False}
    told["bands"] = json.dumps({"counts": {"pit": [8, 12]}, "gray": {}})
    with site.ledger.write() as session:
        in_band = 8 <= count <= 12
        session.add(
            Stability(
                at=at, roll_id="reference", model=model, model_hash=model, in_band=in_band, **told | facts
            )
        )


def test_of_the_last_checks_with_each_model_the_worst_is_shown(site):
    """One out of band that a check in band with another model came after; it counts until its own is well."""
    put_check(site, NOW - timedelta(minutes=20), "first", 50)
    put_check(site, NOW - timedelta(minutes=10), "second", 10)
    page = gather(site)

    assert (page.stability.model, [check.value for check in page.stability.out]) == ("first", [50.0])
    assert "Stability out of band" in render(page)
    put_check(site, NOW - timedelta(minutes=5), "first", 9)
    assert gather(site).stability.out == []


def test_an_old_check_in_band_says_since_when_there_was_none(site):
    """A model that no job names counts only where it is the last one."""
    put_check(site, NOW - 25 * DAY, "default", 10)
    html = render(gather(site))

    assert "not checked since 30 Oct 06:30" in html and "in band</dd>" not in html
    put_check(site, NOW - 20 * DAY, "was-default", 50)
    assert "not checked since 30 Oct 06:30" in render(gather(site))
    put_check(site, NIGHT, "default", 10)
    assert "<dd>in band</dd>" in render(gather(site))


def test_a_check_that_failed_counts_until_its_job_has_made_one(site):
    put_slot(site, NIGHT, "done", ended_at=NIGHT)
    put_slot(site, NIGHT, "done", job="other", ended_at=NIGHT)
    with site.ledger.write() as session:
        slots = {slot.job: slot.id for slot in session.query(Slot)}
        key = f"stability:{slots['nightly']}"
        put_alert(session, NIGHT, key, "stability", "the reference strip cannot be checked", "EIO")
    put_check(site, NIGHT + timedelta(minutes=1), "default", 10, slot_id=slots["other"])
    assert gather(site).stability.error == "the reference strip cannot be checked: EIO"

    put_check(site, NIGHT + timedelta(minutes=2), "default", 10, slot_id=slots["nightly"])
    assert gather(site).stability.error is None

    put_slot(site, NIGHT, "done", job="by-hand", ended_at=NIGHT)
    with site.ledger.write() as session:
        by_hand = session.query(Slot.id).where(Slot.job == "by-hand").scalar()
        at = NIGHT + timedelta(minutes=3)
        put_alert(
            session, at, f"stability:{by_hand}", "stability", "the reference strip cannot be checked", "EIO"
        )
    assert gather(site).stability.error is not None
    put_check(site, NIGHT + timedelta(minutes=4), "default", 10, slot_id=slots["other"])
    assert gather(site).stability.error is None


def test_trends_stability_drift_and_the_last_success_come_from_the_ledger(site):
    rng = np.random.default_rng(5)
    for night in range(29, -1, -1):
        beta = (8, 2) if night else (3, 3)
        for i in range(2):
            count = rng.poisson(80 if night else 200)
            put_run(
                site,
                f"N{night}-{i}",
                NOW - timedelta(days=night, hours=i + 1),
                rng.beta(*beta, count).tolist(),
            )
    with site.ledger.write() as session:
        for night in range(3):
            session.add(
                Stability(
                    at=NOW - timedelta(days=3 - night),
                    roll_id="reference",
                    model="default",
                    model_hash="0",
                    in_band=night < 2,
                    is_baseline=night == 0,
                    counts=json.dumps({"pit": 20 + night}),
                    gray=json.dumps({"bright": 0.5 - 0.05 * night}),
                    bands=json.dumps({"counts": {"pit": [18, 24]}, "gray": {"bright": [0.45, 0.55]}}),
                    out="[]",
                )
            )
        slot = {"job": "nightly", "created_at": NOW, "ended_at": NOW - timedelta(hours=2), "state": "done"}
        session.add(Slot(scheduled_for=NOW - timedelta(hours=4), **slot))
    page = gather(site)
    html = render(page)

    assert [night.area_m2 for night in page.nights] == pytest.approx([2 * 2000 * 0.999] * 30)
    assert page.nights[-1].day.isoformat() == "2026-11-24"
    assert "1 class above usual" in html and "Scores have drifted" in html
    assert page.stability is not None
    assert [(c.name, c.value, c.in_band) for c in page.stability.checks] == [
        ("bright", 0.4, False),
        ("pit", 22.0, True),
    ]
    assert page.stability.checks[1].history == (20.0, 21.0, 22.0)
    assert "Stability out of band" in html
    assert [(job, str(at)) for job, at in page.jobs] == [("nightly", "2026-11-24 04:30:00+01:00")]


def test_each_defect_table_is_read_once_and_a_damaged_memory_is_made_again(site):
    put_run(site, "A", NOW - timedelta(hours=1), [0.91, 0.11])
    before = gather(site).scores
    memory = site.plant.home / "runs" / SCORES_FILE
    next(site.plant.home.glob("runs/A/*/defects.parquet")).unlink()

    assert gather(site).scores == before
    assert before[0].now[18] == before[0].now[2] == 1
    memory.write_text('{"bins": 20, "runs": {"af00": {"pit": ["x"]}}}')
    assert gather(site).scores == ()


def test_scores_at_the_ends_have_a_bin(tmp_path):
    pq.write_table(
        pa.table({"class": ["b", "a", "a"], "score": np.float32([1.0, 0.0, 0.999])}), tmp_path / "t.parquet"
    )
    told = histograms(tmp_path / "t.parquet")

    assert (told["a"][0], told["a"][19], told["b"][19]) == (1, 1, 1)


def test_an_empty_plant_has_a_page_too(site):
    html = make_page(site).read_text()

    assert "No roll without a question was inspected" in html
    assert "No reference strip was scanned" in html
