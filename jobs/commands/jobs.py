"""`inspect jobs …`: nights that run themselves."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rollsight.inspect.errors import LOCKED, PARTIAL, USAGE, UserError
from rollsight.jobs.commands.options import MAX_SEED, MODEL, Home, Json, LedgerUrl, Rules

if TYPE_CHECKING:
    from rollsight.inspect.rolls import Roll
    from rollsight.jobs.nightly import OnBand
    from rollsight.jobs.sites import Site

MAX_H = 8760.0  # a year

app = typer.Typer(
    help="Run nights by themselves: what is due, when, by whom, and what a person must be told.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def nightly(
    rolls: Annotated[
        list[str] | None,
        typer.Argument(help="Only these rolls or patterns such as 'CGL2-*'. Default: all that are due."),
    ] = None,
    model: Annotated[str, typer.Option(help=MODEL)] = "default",
    rules: Rules = None,
    line: Annotated[str | None, typer.Option(help="Only rolls of this line.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Only rolls closed since: a date, a moment, or a span like 36h or 3d.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Dask processes on this machine; 0: threads.")] = 0,
    priority: Annotated[int, typer.Option(help="Of rolls that become due now; higher first.")] = 0,
    rescan: Annotated[
        bool, typer.Option("--rescan", help="Also rolls that were inspected with this model before.")
    ] = False,
    deadline_h: Annotated[
        float | None, typer.Option(min=0.0, max=MAX_H, help="Begin no further roll after so many hours.")
    ] = None,
    ledger: LedgerUrl = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Inspect every roll that is due: closed, and not yet inspected with this model and these rules."""
    from datetime import timedelta

    from rollsight.jobs.batch import since_of
    from rollsight.jobs.due import Selection
    from rollsight.jobs.nightly import open_job
    from rollsight.jobs.ticker import begin_by_hand, run_slot

    with open_at_work(home, ledger) as site:
        asked: dict[str, Any] = {"model": model, "rules": rules, "workers": workers, "priority": priority}
        start = None if since is None else since_of(site.plant, since, site.clock())
        selection = Selection(tuple(rolls or ()), line, start)
        job = open_job(site, None, selection=selection, rescan=rescan, **asked)
        slot = begin_by_hand(site)
        until = None if deadline_h is None else site.clock() + timedelta(hours=deadline_h)
        code, told = run_slot(site, slot, None, until, job=job, early=True, on_roll=_bar)
        _tell_night(site, slot.id, as_json=as_json)
        _end(code, told, as_json=as_json)


@app.command()
def tick(ledger: LedgerUrl = None, home: Home = None, as_json: Json = False) -> None:
    """Do once what has become due by line.yaml: for a scheduler of your own, every few minutes."""
    from rollsight.jobs.ticker import tick as tick_once

    with open_at_work(home, ledger) as site:
        if not site.line.jobs:
            raise _nothing_scheduled(site)
        told = tick_once(site, on_roll=_bar)
        _tell_tick(told, as_json=as_json)
        if told.exit_code:
            raise UserError(_worst(told.ran), told.exit_code)


@app.command()
def run(
    every_s: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks at the clock.")] = 30.0,
    ledger: LedgerUrl = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Tick until SIGTERM or Ctrl-C: the embedded scheduler. Any number of them may run on one ledger."""
    import time

    from rollsight.jobs import console
    from rollsight.jobs.ticker import next_moment
    from rollsight.jobs.ticker import tick as tick_once

    with open_at_work(home, ledger) as site:
        if not site.line.jobs:
            raise _nothing_scheduled(site)
        at = next_moment(site, site.clock())
        if not as_json:
            names = ", ".join(job.name for job in site.line.jobs)
            console.say(f"running {names}; next at {at:%Y-%m-%d %H:%M} UTC" if at else f"running {names}")
        while True:
            try:
                told = tick_once(site, on_roll=_bar)
                if told.ran or told.made or told.left_out:
                    _tell_tick(told, as_json=as_json)
            except UserError as fault:
                if fault.exit_code != LOCKED:
                    raise
                console.error(fault)  # the ledger is away: the next tick tries again
            time.sleep(every_s)


@app.command("run-slot")
def run_slot(
    job: Annotated[str, typer.Argument(help="Name of the job in line.yaml.")],
    at: Annotated[
        str, typer.Option(help="The moment it is for, ISO 8601 with zone: 2026-11-24T01:30+01:00.")
    ],
    ledger: LedgerUrl = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Run one moment of a job, once, however often it is asked for: for a scheduler that counts moments."""
    from rollsight.jobs import console
    from rollsight.jobs.ticker import begin_slot, deadline_of, ended_with
    from rollsight.jobs.ticker import run_slot as run_held

    moment = _moment(at)
    with open_at_work(home, ledger) as site:
        entry = site.line.job(job)
        slot, state = begin_slot(site, entry, moment)
        if slot is None:
            if as_json:
                console.emit({"job": job, "at": moment.isoformat(), "state": state})
            told = f"job {job} of {moment.isoformat()} has ended before: {state}"
            _end(ended_with(site, job, moment), told, as_json=as_json)
            return
        until = deadline_of(site, slot)
        code, told = run_held(site, slot, entry, until, early=True, on_roll=_bar)
        if as_json or entry.kind == "inspect":
            _tell_night(site, slot.id, as_json=as_json)
        _end(code, told, as_json=as_json)


@app.command()
def retry(
    rolls: Annotated[list[str] | None, typer.Argument(help="Rolls to try again.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that was given up or failed.")] = False,
    ledger: LedgerUrl = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make due again what was given up or waits for a retry; the next night or tick takes it."""
    from rollsight.jobs import console
    from rollsight.jobs.retry import try_again

    if bool(rolls) == everything:
        raise UserError("inspect jobs retry: name rolls, or say --all: one of them", USAGE)
    with open_at_work(home, ledger) as site:
        again = try_again(site, None if everything else rolls)
    if as_json:
        console.emit({"again": again})
    else:
        console.say(f"due again: {', '.join(again)}" if again else "nothing to try again")


@app.command()
def doctor(
    look: Annotated[bool, typer.Option("--look", help="Tell differences only; change nothing.")] = False,
    ledger: LedgerUrl = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Hold receipts on disk and the ledger against each other, both ways, and put right what can be."""
    from dataclasses import asdict

    from rollsight.jobs import console
    from rollsight.jobs.doctor import examine

    with open_at_work(home, ledger) as site:
        found = examine(site, mend=not look)
    if as_json:
        for finding in found:
            console.emit(asdict(finding))
    elif found:
        rows = [(f.roll_id, f.run_id, f.told, "yes" if f.mended else "no") for f in found]
        console.show_table("Receipts and ledger", ("roll", "run", "difference", "put right"), rows)
    else:
        console.say("receipts and ledger agree")
    left = sum(not finding.mended for finding in found)
    if left:
        raise UserError(f"{left} of {len(found)} differences are left", PARTIAL)


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="Folder that rolls are dropped into, one entry each.")],
    model: Annotated[str, typer.Option(help=MODEL)] = "default",
    rules: Rules = None,
    settle_s: Annotated[
        float, typer.Option(min=0.0, help="An entry without .done is complete after so long without change.")
    ] = 30.0,
    every_s: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 5.0,
    live: Annotated[
        bool, typer.Option("--live", help="Scan rolls of the plant while they grow, band by band.")
    ] = False,
    no_scan: Annotated[bool, typer.Option("--no-scan", help="Ingest only; a night scans.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    ledger: LedgerUrl = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Ingest what is dropped into FOLDER as soon as it is complete, and inspect it at once."""
    import time
    from dataclasses import asdict

    from rollsight.jobs import console
    from rollsight.jobs.executors import open_executor
    from rollsight.jobs.watch import Watched, look_on

    if live and no_scan:
        raise UserError("--live with --no-scan: take one of them", USAGE)
    with open_at_work(home, ledger, standing=False) as site, contextlib.ExitStack() as stack:
        executor = stack.enter_context(open_executor()) if live else None
        watched = Watched()
        while True:
            seen = look_on(
                site,
                folder,
                watched,
                model=None if no_scan else model,
                rules=rules,
                settle_s=settle_s,
                live=executor,
                on_roll=_bar,
            )
            for fault in seen.faults:
                console.error(UserError(fault))
            for name, told in seen.refused:
                console.error(UserError(f"{name}: {told}"))
            if as_json and (once or seen.ingested or seen.refused or seen.told):
                console.emit(asdict(seen))
            elif not as_json:
                for roll_id in seen.ingested:
                    console.say(f"ingested {roll_id}")
                if seen.told:
                    console.say(seen.told)
            if once and (seen.refused or seen.exit_code):
                raise UserError(
                    f"{len(seen.refused)} entries refused; the scans ended with {seen.exit_code}", PARTIAL
                )
            if once:
                return
            time.sleep(every_s)


@app.command()
def reference(
    length_m: Annotated[float, typer.Option(min=0.5, help="Length of the simulated strip in m.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Another seed is another strip.")] = 2632,
    width_px: Annotated[int, typer.Option(min=64, help="Pixels across.")] = 1250,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the strip there is.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Simulate a reference strip for the check before each night; a real one may lie in its place."""
    from rollsight.inspect.plant import open_plant
    from rollsight.jobs import console
    from rollsight.jobs.schedule import read_line
    from rollsight.jobs.stability import forget_bands, reference_path
    from rollsight.synth.strip import SimulatedStrip, simulate_roll

    plant = open_plant(home)
    path = reference_path(plant, read_line(plant))
    strip = SimulatedStrip(length_m, seed, width_px=width_px, blackouts=())
    simulate_roll(path, strip, overwrite=overwrite)
    forget_bands(plant)
    if as_json:
        console.emit({"path": str(path), "length_m": length_m, "seed": seed})
    else:
        console.say(f"{path}: {length_m:g} m; the first check with each model makes its band")


@contextlib.contextmanager
def open_at_work(home: Path | None, ledger: str | None, *, standing: bool = True) -> Iterator["Site"]:
    """The plant at work: at SIGTERM it gives back what it holds; its ledger is closed at the end."""
    from rollsight.jobs.sites import open_site
    from rollsight.jobs.stopping import StoppedError, stopping

    site = open_site(home, ledger, standing=standing)
    try:
        with stopping(lambda: _give_all_back(site)):
            yield site
    except StoppedError:
        # Also what was claimed a moment before, and the caller did not know of yet.
        with contextlib.suppress(UserError):
            _give_all_back(site)
        raise UserError("told to stop: what is left is due, the next night or tick goes on", LOCKED) from None
    finally:
        site.ledger.close()


def _give_all_back(site: "Site") -> None:
    from rollsight.jobs.ledger.claims import held_by
    from rollsight.jobs.nightly import give_back

    give_back(site, held_by(site.ledger, site.owner))


def _bar(roll: "Roll", nth: int, of: int) -> AbstractContextManager["OnBand"]:
    """A bar in metres of strip for each roll in turn; quiet without a terminal."""
    from rollsight.jobs import console

    per_line = None if roll.strip.mm_per_line is None else roll.strip.mm_per_line / 1000
    px = roll.width * roll.modes
    return console.strip_progress(f"{nth}/{of} {roll.roll_id}", m_per_line=per_line, px_per_line=px)


def _moment(told: str) -> datetime:
    try:
        at = datetime.fromisoformat(told)
    except ValueError:
        raise UserError(f"--at {told[:60]!r}: it is a moment like 2026-11-24T01:30+01:00", USAGE) from None
    if at.tzinfo is None:
        raise UserError(f"--at {told}: it has no zone: write it like {told}+01:00", USAGE)
    return at


def _nothing_scheduled(site: "Site") -> UserError:
    from rollsight.inspect.errors import CONFIG
    from rollsight.jobs.schedule import LINE_FILE

    return UserError(f"{site.plant.home / LINE_FILE} has no jobs: write one under `jobs:`", CONFIG)


def _tell_night(site: "Site", slot_id: int, *, as_json: bool) -> None:
    """The table of a night, or night.json on one line."""
    import json

    from rollsight.inspect.coverage import in_percent
    from rollsight.jobs import console
    from rollsight.jobs.ledger.schema import Slot

    with site.ledger.read() as session:
        report = session.get_one(Slot, slot_id).report
    path = None if report is None else site.plant.home / report
    if path is None or not path.is_file():
        return
    told = json.loads(path.read_bytes())
    if as_json:
        console.emit(told)
        return
    rows = [
        (
            roll["roll_id"],
            roll["state"],
            roll["verdict"] or "-",
            "-" if roll["coverage"] is None else f"{in_percent(roll['coverage'])}%",
            "-" if roll["defects"] is None else roll["defects"],
            "-" if roll["seconds"] is None else round(roll["seconds"], 1),
            roll["error"] or "",
        )
        for roll in told["rolls"]
    ]
    columns = ("roll", "state", "verdict", "coverage", "defects", "s", "why not")
    console.show_table(f"Night of {told['date']}", columns, rows)
    stability = told["stability"]
    if stability is not None:
        console.say("stability: " + ("in band" if stability["in_band"] else "; ".join(stability["out"])))


def _end(code: int, told: str, *, as_json: bool) -> None:
    from rollsight.jobs import console

    if code:
        raise UserError(told, code)
    if not as_json:
        console.say(told)


def _tell_tick(told: Any, *, as_json: bool) -> None:
    from rollsight.jobs import console

    ran = [
        {"job": job, "at": at.isoformat(), "exit_code": code, "told": line}
        for job, at, code, line in told.ran
    ]
    if as_json:
        console.emit({"made": told.made, "left_out": told.left_out, "ran": ran})
        return
    for slot in ran:
        console.say(f"{slot['job']} of {slot['at']}: {slot['told']}")
    if told.left_out:
        console.say(f"left out, as catch_up, max_age_h or deadline_h say: {told.left_out} moments")
    elif not ran:
        console.say("nothing was due")


def _worst(ran: list[tuple[str, datetime, int, str]]) -> str:
    bad = [f"{job} of {at.isoformat()} ended with {code}" for job, at, code, _ in ran if code]
    return "; ".join(bad)
