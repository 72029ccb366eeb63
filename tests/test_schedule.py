"""line.yaml and its moments: zones, both changes of the clock, and every mistake in one line."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from rollsight.inspect.errors import CONFIG, USAGE, UserError
from rollsight.inspect.plant import Plant
from rollsight.jobs.channels import channels_of
from rollsight.jobs.retention import Keep, keep_of
from rollsight.jobs.schedule import Job, LineFile, moments, read_line, rules_hash

BERLIN = ZoneInfo("Europe/Berlin")


def local(cron: str, first: str, last: str) -> list[str]:
    """The moments of a cron expression in Berlin, as a clock on the wall shows them."""
    after, until = (datetime.fromisoformat(f"{day}T12:00+00:00") for day in (first, last))
    found = list(moments(Job(name="n", cron=cron), BERLIN, after, until))
    assert found == sorted(set(found))
    return [at.astimezone(BERLIN).strftime("%d %H:%M %z") for at in found]


def test_a_night_at_half_past_one_comes_once_a_day_over_both_changes_of_the_clock() -> None:
    spring = local("30 1 * * *", "2026-03-27", "2026-03-30")
    assert spring == ["28 01:30 +0100", "29 01:30 +0100", "30 01:30 +0200"]
    autumn = local("30 1 * * *", "2026-10-23", "2026-10-26")
    assert autumn == ["24 01:30 +0200", "25 01:30 +0200", "26 01:30 +0100"]


def test_a_moment_in_the_gap_comes_after_it_and_one_that_exists_twice_comes_once() -> None:
    assert local("30 2 * * *", "2026-03-28", "2026-03-30") == ["29 03:00 +0200", "30 02:30 +0200"]
    assert local("30 2 * * *", "2026-10-24", "2026-10-26") == ["25 02:30 +0200", "26 02:30 +0100"]


def test_every_hour_is_every_hour_that_passes() -> None:
    assert len(local("0 * * * *", "2026-03-28", "2026-03-29")) == 24
    assert len(local("0 * * * *", "2026-10-24", "2026-10-25")) == 24


def test_moments_lie_after_the_first_and_up_to_the_last() -> None:
    job, start = Job(name="n", cron="0 0 * * *"), datetime(2026, 1, 1, tzinfo=UTC)
    day = timedelta(days=1)
    assert list(moments(job, ZoneInfo("UTC"), start, start + 2 * day)) == [start + day, start + 2 * day]


def test_a_job_is_late_after_its_longest_usual_distance_and_two_hours() -> None:
    line = LineFile()
    for cron, hours in (
        ("30 1 * * *", 26),
        ("0 3 * * 1-5", 74),
        ("0 */6 * * *", 8),
        ("*/15 6-21 * * *", 8.25 + 2),  # a pause every night
        ("0,30 6-13 * * 1-5", 64.5 + 2),  # and every weekend
    ):
        assert line.late_after(Job(name="n", cron=cron)) == timedelta(hours=hours)
    assert line.late_after(Job(name="n", cron="0 3 * * *", late_h=5)) == timedelta(hours=5)


def test_without_a_file_there_are_no_jobs_and_all_has_a_default(tmp_path: Path) -> None:
    assert read_line(Plant(tmp_path)) == LineFile()
    (tmp_path / "line.yaml").write_text("# nothing yet\n")
    assert read_line(Plant(tmp_path)).jobs == ()


def test_a_key_left_empty_stands_in_the_file_with_all_defaults(tmp_path: Path) -> None:
    """`retention:` says that something may be deleted, empty or not."""
    (tmp_path / "line.yaml").write_text("retention:\nalerts:\n")
    line = read_line(Plant(tmp_path))
    assert (line.retention, line.alerts) == ({}, {})
    assert "retention" in line.model_fields_set
    assert keep_of(line) == Keep()
    assert channels_of(line).all == ()


def test_the_example_of_the_readme_is_read(tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    text = readme.partition("```yaml\n# line.yaml")[2].partition("```")[0]
    (tmp_path / "line.yaml").write_text("#" + text)
    line = read_line(Plant(tmp_path))
    assert (line.line, line.zone, line.jobs[0].deadline_h) == ("CGL2", "Europe/Berlin", 8)


MISTAKES = {
    "a bad cron": ("jobs: [{name: n, cron: '61 1 * * *'}]", "jobs.0.cron: cron '61 1 * * *' is no cron"),
    "six fields too many": ("jobs: [{name: n, cron: '* * * * * * *'}]", "is no cron expression of five"),
    "an unknown zone": ("zone: Europe/Essen", "zone: zone 'Europe/Essen' is not known"),
    "a zone that leaves": ("zone: ../../etc/passwd", "is not known"),
    "an unknown zone of a job": ("jobs: [{name: n, cron: '0 1 * * *', zone: CETT}]", "zone 'CETT' is not"),
    "a key that is none": ("job: []", "job: Extra inputs are not permitted"),
    "a name twice": ("jobs: [{name: n, cron: '0 1 * * *'}, {name: n, cron: '0 2 * * *'}]", "n stands twice"),
    "a name with a path": ("jobs: [{name: ../n, cron: '0 1 * * *'}]", "jobs.0.name: String should match"),
    "an unknown catch-up": ("jobs: [{name: n, cron: '0 1 * * *', catch_up: some}]", "catch_up: Input should"),
    "a deadline of nothing": ("jobs: [{name: n, cron: '0 1 * * *', deadline_h: 0}]", "deadline_h: Input sho"),
    "never late": (
        "jobs: [{name: n, cron: '0 1 * * *', late_h: .inf}]",
        "jobs.0.late_h: Input should be less",
    ),
    "rolls of all times": (
        "jobs: [{name: n, cron: '0 1 * * *', closed_within_h: .inf}]",
        "less than or equal",
    ),
    "no YAML": ("jobs: [", "line.yaml, line 1: not readable as YAML"),
    "a list": ("- jobs", "holds a list: needed keys such as zone and jobs"),
    "code in YAML": ("jobs: !!python/object/apply:os.system ['true']", "not readable as YAML"),
    "a tolerance of nothing": ("stability: {gray: 0}", "stability.gray: Input should be greater than 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_in_line_yaml_is_one_line_with_its_place(name: str, tmp_path: Path) -> None:
    text, told = MISTAKES[name]
    (tmp_path / "line.yaml").write_text(text)
    with pytest.raises(UserError) as fault:
        read_line(Plant(tmp_path))
    assert told in str(fault.value)
    assert str(tmp_path / "line.yaml") in str(fault.value)
    assert fault.value.exit_code == CONFIG


def test_a_job_that_is_not_there_is_refused_with_those_that_are() -> None:
    line = LineFile(jobs=(Job(name="nightly", cron="0 1 * * *"),))
    with pytest.raises(UserError, match=r"no job 'daily' in line\.yaml: there are nightly") as fault:
        line.job("daily")
    assert fault.value.exit_code == USAGE


def test_rules_count_by_their_content(tmp_path: Path) -> None:
    plant = Plant(tmp_path)
    assert rules_hash(plant, None) == ""
    (tmp_path / "r.yaml").write_text("limits: []")
    first = rules_hash(plant, "r.yaml")
    (tmp_path / "r.yaml").write_text("limits: [1]")
    assert rules_hash(plant, "r.yaml") not in (first, "")
    with pytest.raises(UserError, match=r"rules file .*none.yaml: No such file") as fault:
        rules_hash(plant, "none.yaml")
    assert fault.value.exit_code == CONFIG
