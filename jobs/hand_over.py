"""Hand-over: thin files by which another scheduler calls the same command.

systemd, cron and Kubernetes call `inspect jobs tick` every few minutes: what is due, and in which zone, stays
in line.yaml, so a changed expression needs no new file, and retries, catch-up and the dead man's switch come
with it. Airflow, Dagster and Prefect keep moments of their own, so each job of line.yaml becomes a flow there
that calls `inspect jobs run-slot JOB --at MOMENT`. All may run beside each other: a moment is claimed once.
"""

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rollsight.inspect.errors import CONFIG, USAGE, UserError
from rollsight.jobs import flow_files
from rollsight.jobs.schedule import LINE_FILE, ON_TIME, LineFile

EVERY_MIN = 5
STOP_S = 15  # a tick ends within 10 s of SIGTERM
CLAIM = "rollsight-plant"  # the volume claim in Kubernetes
WORKSPACE = "/plant"  # where a container has the plant folder
_PLAIN = re.compile(r"[^\x00-\x1f\x7f{}]+")  # of paths and words: no line breaks, nothing that Jinja reads
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}")


@dataclass(frozen=True, slots=True)
class HandOver:
    """What is handed over: the jobs of a plant, and how the command is called there."""

    line: LineFile
    home: Path  # absolute
    command: tuple[str, ...]  # words before `jobs`
    every_min: int = EVERY_MIN
    user: str | None = None  # who runs it; systemd and cron
    image: str | None = None  # container image; kubernetes

    @property
    def name(self) -> str:
        """Of units and flows: rollsight, with the line where one is named; lower case, [a-z0-9-]."""
        line = re.sub(r"[^a-z0-9]+", "-", (self.line.line or "").lower()).strip("-")[:30].rstrip("-")
        return f"rollsight-{line}" if line else "rollsight"

    @property
    def about(self) -> str:
        """One plain line for a person."""
        line = re.sub(r"[^\w .-]+", " ", self.line.line or "").strip()
        return f"Rollsight: what is due by {LINE_FILE}" + (f" of {line}" if line else "")

    @property
    def tick(self) -> tuple[str, ...]:
        return (*self.command, "jobs", "tick", "--home", str(self.home))


def hand_over(target: str, work: HandOver) -> dict[str, str]:
    """The files for `target`, {name: text}.

    UserError 2 where the target is unknown or an option does not fit it, 78 where line.yaml has no jobs.
    """
    if target not in TARGETS:
        raise UserError(f"no scheduler {target[:40]!r}: there are {', '.join(TARGETS)}", USAGE)
    if not work.line.jobs:
        raise UserError(f"{work.home / LINE_FILE} has no jobs to hand over: write one under `jobs:`", CONFIG)
    for word in (*work.command, str(work.home)):
        if not _PLAIN.fullmatch(word):
            raise UserError(f"{word!r}: a path handed over has no line breaks and no braces", USAGE)
    if not 1 <= work.every_min <= ON_TIME.total_seconds() // 60:
        most = int(ON_TIME.total_seconds() // 60)
        raise UserError(
            f"--every-min {work.every_min}: needed 1 to {most}, for later a moment counts as missed", USAGE
        )
    if work.user is not None and (target not in ("systemd", "cron") or not _USER.fullmatch(work.user)):
        raise UserError(f"--user {work.user[:40]!r}: a user of this machine, for systemd or cron", USAGE)
    if (work.image is not None) != (target == "kubernetes") or not _IMAGE.fullmatch(work.image or "x"):
        raise UserError("--image: the container image that has `inspect`; kubernetes needs it", USAGE)
    return TARGETS[target](work)


def this_command() -> tuple[str, ...]:
    """How `inspect` is called on this machine, by absolute path."""
    script = Path(sys.executable).parent / "inspect"
    return (str(script),) if script.is_file() else (sys.executable, "-m", "rollsight.jobs")


def systemd(work: HandOver) -> dict[str, str]:
    """A service and its timer. A tick that still runs is not started twice; a missed one is made up for."""
    service = f"""\
# Secrets of alerts and of the ledger: NAME=value lines in the EnvironmentFile.
[Unit]
Description={work.about.replace("%", "%%")}
Wants=network-online.target
After=network-online.target

[Service]
Type=oneshot
ExecStart={" ".join(map(_systemd_word, work.tick))}
{f"User={work.user}" if work.user else "# User=the one who owns the plant folder"}
EnvironmentFile=-/etc/rollsight/{work.name}.env
SuccessExitStatus=75
TimeoutStartSec=infinity
TimeoutStopSec={STOP_S}
KillMode=mixed
NoNewPrivileges=yes
PrivateTmp=yes
"""
    timer = f"""\
[Unit]
Description={work.about.replace("%", "%%")}, every {work.every_min} min

[Timer]
OnCalendar=*-*-* *:0/{work.every_min}:00
Persistent=true
AccuracySec=10s
Unit={work.name}.service

[Install]
WantedBy=timers.target
"""
    return {f"{work.name}.service": service, f"{work.name}.timer": timer}


def cron(work: HandOver) -> dict[str, str]:
    """A line of a crontab; with a user one of /etc/cron.d. What is wrong is mailed, all else is dropped."""
    command = shlex.join(work.tick).replace("%", r"\%") + " > /dev/null"
    who = f" {work.user}" if work.user else ""
    every = f"*/{work.every_min}" if work.every_min > 1 else "*"
    return {work.name: f"# {work.about}\n{every} * * * *{who} {command}\n"}


def kubernetes(work: HandOver) -> dict[str, str]:
    """A CronJob on a volume claim with the plant folder; one tick at a time, retries are the ledger's."""
    # The path on this machine is none in the image: there it is `inspect`, unless another command was given.
    called = ("inspect",) if work.command == this_command() else work.command
    command = [*called, "jobs", "tick", "--home", WORKSPACE]
    container = {
        "name": "tick",
        "image": work.image,
        "command": command,
        "envFrom": [{"secretRef": {"name": work.name, "optional": True}}],
        "volumeMounts": [{"name": "plant", "mountPath": WORKSPACE}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": STOP_S,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [{"name": "plant", "persistentVolumeClaim": {"claimName": CLAIM}}],
    }
    job: dict[str, Any] = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": work.name, "labels": {"app.kubernetes.io/name": "rollsight"}},
        "spec": {
            "schedule": f"*/{work.every_min} * * * *" if work.every_min > 1 else "* * * * *",
            "timeZone": "Etc/UTC",  # the zones of the jobs stand in line.yaml
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": 60 * work.every_min,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 10,
            "jobTemplate": {"spec": {"backoffLimit": 0, "template": {"spec": pod}}},
        },
    }
    return {f"{work.name}.yaml": yaml.safe_dump(job, sort_keys=False)}


def _flows(template: str) -> Callable[[HandOver], dict[str, str]]:
    def made(work: HandOver) -> dict[str, str]:
        jobs = [
            {"name": job.name, "cron": job.cron, "zone": job.zone or work.line.zone} for job in work.line.jobs
        ]
        command = [*work.command, "jobs", "run-slot", "--home", str(work.home)]
        text = flow_files.filled(template, NAME=work.name, COMMAND=command, JOBS=jobs)
        return {f"{work.name.replace('-', '_')}.py": text}

    return made


def _systemd_word(word: str) -> str:
    """A word of ExecStart: specifiers and variables stay as they are written (systemd.service(5))."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if re.fullmatch(r"[\w./:=@%$+-]+", escaped) else f'"{escaped}"'


TARGETS: dict[str, Callable[[HandOver], dict[str, str]]] = {
    "systemd": systemd,
    "cron": cron,
    "airflow": _flows(flow_files.AIRFLOW),
    "kubernetes": kubernetes,
    "dagster": _flows(flow_files.DAGSTER),
    "prefect": _flows(flow_files.PREFECT),
}


def as_text(files: dict[str, str]) -> Sequence[str]:
    """The files for a terminal: each under a comment with its name where there are several."""
    if len(files) == 1:
        return list(files.values())
    return [f"# --- {name}\n{text}" for name, text in files.items()]
