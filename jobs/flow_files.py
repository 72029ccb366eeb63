"""Templates of the flow files for schedulers that are written in Python.

Names and paths enter as Python literals only, never as code.
"""

import pprint
from typing import Any

HEAD = '''\
"""Made by `inspect jobs export`: change line.yaml and export again, do not edit.

The ledger claims each moment once and keeps the retries of single rolls. Exit codes 75 and 3 mean that it may
be tried again, 78 and 2 that a person must correct something.
"""

'''

AIRFLOW = (
    HEAD
    + """\
import subprocess
from datetime import datetime, timedelta, timezone

from airflow.sdk import DAG, get_current_context, task
from airflow.sdk.exceptions import AirflowFailException
from airflow.timetables.trigger import CronTriggerTimetable

NAME = $NAME$
COMMAND = $COMMAND$
JOBS = $JOBS$
NEEDS_A_PERSON = (2, 78)


def flow(job):
    @task(task_id="inspect", retries=5, retry_delay=timedelta(minutes=10))
    def inspect():
        context = get_current_context()
        at = context.get("logical_date") or context["dag_run"].run_after
        code = subprocess.run([*COMMAND, job["name"], "--at", at.isoformat()]).returncode
        if code in NEEDS_A_PERSON:
            raise AirflowFailException(f"inspect ended with {code}: its line above says what to correct")
        if code:
            raise RuntimeError(f"inspect ended with {code}")

    with DAG(
        dag_id=f"{NAME}-{job['name']}",
        schedule=CronTriggerTimetable(job["cron"], timezone=job["zone"]),
        start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),
        catchup=False,  # what was missed is due the next time: the ledger knows the rolls
        max_active_runs=1,
        tags=["rollsight"],
    ) as dag:
        inspect()
    return dag


for _job in JOBS:
    globals()[f"dag_{_job['name']}"] = flow(_job)
"""
)

DAGSTER = (
    HEAD
    + '''\
import subprocess

from dagster import Backoff, Definitions, Failure, OpExecutionContext, RetryPolicy, RunRequest
from dagster import job, op, schedule

NAME = $NAME$
COMMAND = $COMMAND$
JOBS = $JOBS$
NEEDS_A_PERSON = (2, 78)


def plain(name):
    """Dagster's names are letters, digits and underscores."""
    return "".join(c if c.isalnum() else "_" for c in f"{NAME}_{name}")


def flow(entry):
    @op(name=plain(entry["name"]) + "_inspect", retry_policy=RetryPolicy(5, 600, Backoff.EXPONENTIAL))
    def inspect(context: OpExecutionContext):
        at = context.run.tags["rollsight/at"]
        code = subprocess.run([*COMMAND, entry["name"], "--at", at]).returncode
        if code:
            raise Failure(f"inspect ended with {code}", allow_retries=code not in NEEDS_A_PERSON)

    @job(name=plain(entry["name"]))
    def work():
        inspect()

    @schedule(
        name=plain(entry["name"]) + "_at",
        job=work,
        cron_schedule=entry["cron"],
        execution_timezone=entry["zone"],
    )
    def when(context):
        at = context.scheduled_execution_time.isoformat()
        return RunRequest(run_key=at, tags={"rollsight/at": at})

    return work, when


_made = [flow(entry) for entry in JOBS]
defs = Definitions(jobs=[work for work, _ in _made], schedules=[when for _, when in _made])
'''
)

PREFECT = (
    HEAD
    + """\
import subprocess
import time
from datetime import datetime, timezone

from prefect import flow, serve
from prefect.runtime import flow_run
from prefect.schedules import Cron

NAME = $NAME$
COMMAND = $COMMAND$
JOBS = $JOBS$
NEEDS_A_PERSON = (2, 78)


@flow(name=NAME, log_prints=True)
def inspect(job: str):
    at = flow_run.scheduled_start_time or datetime.now(timezone.utc)
    command = [*COMMAND, job, "--at", at.isoformat()]
    code = subprocess.run(command).returncode
    for _ in range(5):
        if code == 0 or code in NEEDS_A_PERSON:
            break
        time.sleep(600)
        code = subprocess.run(command).returncode
    if code:
        raise RuntimeError(f"inspect ended with {code}")


def deployments():
    return [
        inspect.to_deployment(
            name=job["name"],
            parameters={"job": job["name"]},
            schedule=Cron(job["cron"], timezone=job["zone"]),
            concurrency_limit=1,
        )
        for job in JOBS
    ]


if __name__ == "__main__":
    serve(*deployments())
"""
)


def filled(template: str, **values: Any) -> str:
    """The template with each $KEY$ a Python literal."""
    for key, value in values.items():
        template = template.replace(f"${key}$", pprint.pformat(value, width=100, sort_dicts=False))
    return template
