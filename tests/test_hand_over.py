"""Hand-over: each scheduler's own checker takes the file, and names stay data in it."""

import ast
import os
import shlex
import shutil
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from cronsim import CronSim
from rollsight.inspect.errors import CONFIG, USAGE, UserError
from rollsight.jobs.hand_over import CLAIM, TARGETS, HandOver, hand_over, this_command
from rollsight.jobs.schedule import LineFile

JOBS = (
    {"name": "nightly", "cron": "30 1 * * *"},
    {"name": "noon.check", "cron": "0 12 * * 1-5", "zone": "UTC"},
)
LINE = LineFile(line="CGL 2", zone="Europe/Berlin", jobs=JOBS)
HOME = Path("/srv/plant one 100%")
AIRFLOW = os.environ.get("ROLLSIGHT_AIRFLOW")  # the Python of a real Airflow, which is no dependency of ours


def handed(target: str, **options) -> dict[str, str]:
    if target == "kubernetes":
        options = {"image": "registry.example/rollsight:0.1"} | options
    return hand_over(target, HandOver(LINE, HOME, this_command(), **options))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on the PATH")
def test_systemd_takes_the_units(tmp_path):
    """Its own checker finds nothing wrong, and reads the path with blank and per cent as we meant it."""
    for name, text in handed("systemd", user="root").items():
        (tmp_path / name).write_text(text)

    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert '--home "/srv/plant one 100%%"' in (tmp_path / "rollsight-cgl-2.service").read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on the PATH")
def test_systemd_ticks_every_five_minutes():
    timer = handed("systemd")["rollsight-cgl-2.timer"]
    when = next(line.partition("=")[2] for line in timer.splitlines() if line.startswith("OnCalendar="))

    command = ["systemd-analyze", "calendar", "--iterations=3", "--base-time=2026-11-24 10:00:00 UTC", when]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    assert [minute in told for minute in ("10:05:00", "10:10:00", "10:15:00")] == [True] * 3


def test_a_cron_line_runs_the_tick_with_the_path_as_it_is(tmp_path):
    """cron takes % for a line break: undone as cron(8) does, the shell gets the home folder unchanged."""
    [text] = handed("cron").values()
    line = text.splitlines()[-1]
    fields, command = line.split(None, 5)[:5], line.split(None, 5)[5]

    assert str(next(CronSim(" ".join(fields), datetime(2026, 1, 1, 9, 58)))) == "2026-01-01 10:00:00"
    words = shlex.split(command.replace(r"\%", "%"))
    assert words[: len(this_command()) + 4] == [*this_command(), "jobs", "tick", "--home", str(HOME)]
    if shutil.which("crontab") is not None:
        (tmp_path / "crontab").write_text(text)
        done = subprocess.run(
            ["crontab", "-n", str(tmp_path / "crontab")], capture_output=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr


def test_a_line_of_cron_d_names_its_user():
    [text] = handed("cron", user="inspector").values()

    assert text.splitlines()[-1].split()[5:7] == ["inspector", this_command()[0]]


def test_kubernetes_gets_a_cronjob_that_never_runs_twice_at_once():
    [text] = handed("kubernetes").values()
    made = yaml.safe_load(text)

    assert (made["apiVersion"], made["kind"], made["metadata"]["name"]) == (
        "batch/v1",
        "CronJob",
        "rollsight-cgl-2",
    )
    spec = made["spec"]
    assert (spec["schedule"], spec["timeZone"], spec["concurrencyPolicy"]) == (
        "*/5 * * * *",
        "Etc/UTC",
        "Forbid",
    )
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0  # the ledger tries again, not Kubernetes
    [container] = pod["containers"]
    assert container["command"] == ["inspect", "jobs", "tick", "--home", "/plant"]
    assert container["image"] == "registry.example/rollsight:0.1"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == CLAIM
    assert container["volumeMounts"] == [{"name": "plant", "mountPath": "/plant"}]


def test_kubernetes_calls_the_command_that_was_given():
    work = HandOver(LINE, HOME, ("nice", "/opt/rollsight/bin/inspect"), image="rollsight:0.1")
    [text] = hand_over("kubernetes", work).values()
    pod = yaml.safe_load(text)["spec"]["jobTemplate"]["spec"]["template"]["spec"]

    told = ["nice", "/opt/rollsight/bin/inspect", "jobs", "tick", "--home", "/plant"]
    assert pod["containers"][0]["command"] == told


@pytest.mark.parametrize("target", ["airflow", "dagster", "prefect"])
def test_a_flow_file_holds_the_jobs_as_data(target):
    """The file is Python, and names, expressions and paths are nothing but literals in it."""
    [text] = handed(target).values()
    tree = ast.parse(text)
    found = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("JOBS", "COMMAND", "NAME")
    }

    assert found["JOBS"] == [
        {"name": "nightly", "cron": "30 1 * * *", "zone": "Europe/Berlin"},
        {"name": "noon.check", "cron": "0 12 * * 1-5", "zone": "UTC"},
    ]
    assert found["COMMAND"] == [*this_command(), "jobs", "run-slot", "--home", str(HOME)]


@pytest.mark.skipif(AIRFLOW is None, reason="ROLLSIGHT_AIRFLOW names no Python with Airflow 3")
def test_airflow_reads_its_file(tmp_path):
    """Imported under a real Airflow: a flow per job, each with its own expression and zone."""
    for name, text in handed("airflow").items():
        (tmp_path / name).write_text(text)
    code = (
        "import rollsight_cgl_2 as made\n"
        "for name in sorted(vars(made)):\n"
        "    if name.startswith('dag_'): print(vars(made)[name].dag_id, *vars(made)[name].task_ids)\n"
    )
    done = subprocess.run(
        [AIRFLOW, "-c", code],
        cwd=tmp_path,
        env={
            **os.environ,
            "AIRFLOW_HOME": str(tmp_path),
            "PYTHONPATH": "",
            "AIRFLOW__CORE__LOAD_EXAMPLES": "0",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [
        "rollsight-cgl-2-nightly inspect",
        "rollsight-cgl-2-noon.check inspect",
    ]


@pytest.mark.parametrize(
    ("target", "work", "code"),
    [
        ("jenkins", HandOver(LINE, HOME, ("inspect",)), USAGE),
        ("cron", HandOver(LineFile(), HOME, ("inspect",)), CONFIG),
        ("cron", HandOver(LINE, Path("/srv/a\n* * * * * rm"), ("inspect",)), USAGE),
        ("airflow", HandOver(LINE, Path("/srv/{{ macros }}"), ("inspect",)), USAGE),
        ("systemd", HandOver(LINE, HOME, ("inspect",), every_min=60), USAGE),
        ("systemd", HandOver(LINE, HOME, ("inspect",), user="root\nExecStart=x"), USAGE),
        ("airflow", HandOver(LINE, HOME, ("inspect",), user="root"), USAGE),
        ("kubernetes", HandOver(LINE, HOME, ("inspect",)), USAGE),
        ("kubernetes", HandOver(LINE, HOME, ("inspect",), image="x y"), USAGE),
        ("cron", HandOver(LINE, HOME, ("inspect",), image="x"), USAGE),
    ],
)
def test_what_cannot_be_handed_over_is_refused(target, work, code):
    with pytest.raises(UserError) as fault:
        hand_over(target, work)

    assert fault.value.exit_code == code


def test_every_name_of_the_issue_is_there():
    assert sorted(TARGETS) == ["airflow", "cron", "dagster", "kubernetes", "prefect", "systemd"]
