"""`inspect jobs …`: what is told of the nights, to people and to other programs; and what is kept."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rollsight.inspect.errors import CONFIG, LOCKED, USAGE, UserError
from rollsight.jobs.commands.jobs import MAX_H
from rollsight.jobs.commands.jobs import app as app  # with these commands it is the whole group
from rollsight.jobs.commands.options import MAX_SEED, Home, Json, LedgerUrl

FOLLOWED = ("nightly", "tick", "run", "run_slot", "watch")  # commands during which alerts go out


def followed(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with alerts, page and retention beside it."""

    @functools.wraps(command)
    def both(*, home: Path | None, ledger: str | None, **options: Any) -> Any:
        from rollsight.jobs import console
        from rollsight.jobs.afterwards import followed as follow

        with follow(home, ledger, lambda fault: console.error(UserError(fault))):
            return command(home=home, ledger=ledger, **options)

    return both


for _command in app.registered_commands:
    if _command.callback is not None and _command.callback.__name__ in FOLLOWED:
        _command.callback = followed(_command.callback)


@app.callback()
def log_to(
    log: Annotated[
        str | None,
        typer.Option(envvar="ROLLSIGHT_LOG", help="Write events as JSON lines to this file; - is stderr."),
    ] = None,
) -> None:
    """Run nights by themselves: what is due, when, by whom, and what a person must be told."""
    if log is not None:
        from rollsight.jobs.logs import log_events

        log_events(log)


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Keep it on the terminal, up to date.")] = False,
    every_s: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks, with --watch.")] = 2.0,
    ledger: LedgerUrl = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Tell what is going on: jobs, rolls at work and how far, what was given up, alerts not sent."""
    import sys
    import time

    from rich.console import Console
    from rich.live import Live
    from rollsight.jobs import console
    from rollsight.jobs.sites import open_site
    from rollsight.jobs.status import status as state_of
    from rollsight.jobs.status import tables

    if watch and not as_json and not sys.stdout.isatty():
        raise UserError("--watch needs a terminal: without one take --json", USAGE)
    site = open_site(home, ledger)
    try:
        if as_json:
            console.emit(state_of(site))
            while watch:
                time.sleep(every_s)
                console.emit(state_of(site))
        elif watch:
            with Live(tables(state_of(site)), refresh_per_second=4) as live:
                while True:
                    time.sleep(every_s)
                    live.update(tables(state_of(site)))
        else:
            Console(width=None if sys.stdout.isatty() else 110).print(tables(state_of(site)))
    finally:
        site.ledger.close()


@app.command()
def page(
    since_h: Annotated[
        float, typer.Option(min=0.1, max=MAX_H, help="Hours back that count as the last night.")
    ] = 24.0,
    ledger: LedgerUrl = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Write the morning page, runs/index.html: what needs a person, trends, stability, drift."""
    from rollsight.jobs import console
    from rollsight.jobs.morning_job import make_page
    from rollsight.jobs.sites import open_site

    site = open_site(home, ledger)
    try:
        path = make_page(site, since_h=since_h)
    finally:
        site.ledger.close()
    if as_json:
        console.emit({"page": str(path)})
    else:
        console.say(f"page: {path}")


@app.command()
def alerts(
    send: Annotated[
        bool, typer.Option("--send", help="Send what is due, by the channels of line.yaml.")
    ] = False,
    ledger: LedgerUrl = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List the alerts that nobody was told of yet, or send them by webhook and mail."""
    from rollsight.jobs import console
    from rollsight.jobs.alerts import send_due, waiting
    from rollsight.jobs.channels import channels_of
    from rollsight.jobs.sites import open_site

    site = open_site(home, ledger)
    try:
        channels = channels_of(site.line)
        if send and not channels.all:
            raise UserError(
                f"{site.plant.home / 'line.yaml'}: alerts: there is no channel to send by", CONFIG
            )
        told = send_due(site, channels) if send else None
        with site.ledger.read() as session:
            rows = [
                {
                    "key": row.dedupe_key,
                    "kind": row.kind,
                    "subject": row.subject,
                    "created_at": row.created_at.isoformat(),
                    "attempts": row.attempts,
                    "last_error": row.last_error,
                }
                for row in waiting(session, site.clock())
            ]
    finally:
        site.ledger.close()
    if as_json:
        console.emit({"sent": told.sent if told else 0, "waiting": rows})
    else:
        if told is not None:
            console.say(f"{told.sent} sent")
            for key, refused in told.refused.items():
                console.note(f"alert {key} is sent, but not to all: {refused}")
        if rows:
            columns = ("kind", "what", "since", "attempts", "last error")
            cells = [
                (row["kind"], row["subject"], row["created_at"], row["attempts"], row["last_error"] or "")
                for row in rows
            ]
            console.show_table("Not sent", columns, cells)
        elif told is None:
            console.say("no alert waits")
    if told is not None and told.failed:
        why = next(iter(told.failed.values()))
        raise UserError(f"{len(told.failed)} alerts could not be sent ({why}): they are tried again", LOCKED)


@app.command()
def retention(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would go, and change nothing.")
    ] = False,
    ledger: LedgerUrl = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Take away what the plant's rule no longer keeps: marked first, gone after a grace."""
    from dataclasses import asdict

    from rollsight.jobs import console
    from rollsight.jobs.retention import retain
    from rollsight.jobs.sites import open_site

    site = open_site(home, ledger)
    try:
        steps = retain(site, dry_run=dry_run)
    finally:
        site.ledger.close()
    if as_json:
        for step in steps:
            console.emit(asdict(step) | {"dry_run": dry_run})
    elif steps:
        rows = [(s.action, s.kind, s.roll_id, s.run_id or "-", s.bytes / 1e6, s.why) for s in steps]
        title = "Would be done" if dry_run else "Done"
        console.show_table(title, ("step", "what", "roll", "run", "MB", "why"), rows)
    else:
        console.say("nothing has come of age")


@app.command()
def metrics(
    out: Annotated[
        Path | None,
        typer.Option(help="Write them to this .prom file, for node_exporter's textfile collector."),
    ] = None,
    http: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Serve them on this port of 127.0.0.1.")
    ] = None,
    ledger: LedgerUrl = None,
    home: Home = None,
) -> None:
    """Print the metrics for Prometheus, write them to a file, or serve them until Ctrl-C."""
    from rollsight.jobs import console
    from rollsight.jobs.metrics_file import serve_metrics, text, write_metrics
    from rollsight.jobs.sites import open_site

    if out is not None and http is not None:
        raise UserError("--out with --http: take one of them", USAGE)
    site = open_site(home, ledger)
    try:
        if out is not None:
            write_metrics(site, out)
        elif http is not None:
            _, thread = serve_metrics(site, http)
            console.say(f"http://127.0.0.1:{http}/metrics")
            thread.join()
        else:
            console.say(text(site).decode().rstrip())
    finally:
        site.ledger.close()


@app.command()
def export(
    scheduler: Annotated[str, typer.Argument(help="systemd, cron, airflow, kubernetes, dagster or prefect.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the files. Default: print them.")] = None,
    every_min: Annotated[
        int, typer.Option(help="Minutes between two ticks; systemd, cron and kubernetes.")
    ] = 5,
    user: Annotated[str | None, typer.Option(help="Who runs it; systemd, and cron in /etc/cron.d.")] = None,
    image: Annotated[str | None, typer.Option(help="Container image with `inspect`; kubernetes.")] = None,
    command: Annotated[
        str | None, typer.Option(help="How `inspect` is called there. Default: as installed here.")
    ] = None,
    home: Home = None,
) -> None:
    """Write thin files by which another scheduler runs the jobs of line.yaml."""
    import shlex

    from rollsight.inspect.plant import open_plant
    from rollsight.inspect.rolls import write_durably
    from rollsight.jobs import console
    from rollsight.jobs.hand_over import HandOver, as_text, hand_over, this_command
    from rollsight.jobs.schedule import read_line

    plant = open_plant(home, standing=True)
    try:
        called = this_command() if command is None else tuple(shlex.split(command))
    except ValueError as error:
        raise UserError(f"--command {command!r}: {error}", USAGE) from None
    work = HandOver(read_line(plant), plant.home.resolve(), called, every_min, user, image)
    files = hand_over(scheduler, work)
    if out is None:
        for text in as_text(files):
            console.say(text.rstrip())
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make {out} ({error.strerror}): choose another folder with --out", CONFIG
        ) from None
    for name, text in files.items():
        write_durably(out / name, text.encode())
        console.say(str(out / name))


@app.command()
def retrain(
    data: Annotated[list[Path], typer.Option(help="Labelled data with what was reviewed; may be repeated.")],
    start: Annotated[str, typer.Option("--from", help="The model to begin from.")] = "default",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps. Default: 600.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of every random choice.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Train the default model on with reviewed labels and ask the gates; a person promotes, or nobody."""
    from dataclasses import asdict
    from datetime import UTC, datetime

    import torch
    from rollsight.inspect.plant import open_plant
    from rollsight.inspect.recipe import Recipe
    from rollsight.jobs import console
    from rollsight.jobs.cluster import slots
    from rollsight.jobs.retrain_job import LEARNING_RATE
    from rollsight.jobs.retrain_job import retrain as train_on
    from rollsight.jobs.schedule import RETRAIN_STEPS

    torch.set_num_threads(threads or slots())
    plant = open_plant(home)
    recipe = Recipe(steps=steps or RETRAIN_STEPS, seed=seed, learning_rate=LEARNING_RATE)
    with console.count_progress("retrain", "steps") as on_done:
        told = train_on(plant, data, recipe, at=datetime.now(UTC), start=start, on_step=on_done)
    verdicts = told.verdicts or ()
    if as_json:
        gates = None if told.verdicts is None else [asdict(verdict) for verdict in verdicts]
        facts = {"model": told.name, "is_new": told.is_new, "is_default": told.is_default}
        facts |= {"thresholds": told.thresholds, "gates": gates, "passed": told.passed}
        console.emit(facts | {"report": str(told.report)})
        return
    console.say(f"{told.name}: {'trained' if told.is_new else 'these labels were learned before'}")
    console.say(f"thresholds: {told.thresholds}")
    if told.is_default:
        console.say("it is the plant's default already: the gates were not asked again")
        return
    if told.verdicts is None:
        console.say("no gates.yaml in the plant folder: nothing says whether it is good enough")
        return
    rows = [(v.data, v.gate, v.found, "open" if v.passed else "SHUT") for v in verdicts]
    console.show_table(f"Gates of {told.name}", ("data", "gate", "found", ""), rows)
    if told.passed:
        console.say(f"every gate is open: inspect models promote {told.name}")
