"""The morning page: what needs a person comes first, in words; one file, safe whatever a roll is called."""

import importlib.util
import json
import random
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rollsight.inspect.plant import Plant
from rollsight.inspect.report.morning import Morning, Night, RollLine, Scores, in_order, render, write_morning
from rollsight.inspect.trends import SCORE_BINS
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
