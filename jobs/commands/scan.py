"""`inspect demo` and `inspect scan`: the main job."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rollsight.inspect.errors import PARTIAL, USAGE, UserError
from rollsight.jobs.commands.options import MAX_SEED, MODEL, Home, Json

if TYPE_CHECKING:
    from rollsight.inspect.models import Model
    from rollsight.inspect.plant import Plant
    from rollsight.jobs.cluster import Executor
    from rollsight.jobs.scan_job import Run


def demo(
    home: Annotated[Path, typer.Option(help="Plant folder of the demonstration.")] = Path("demo"),
    length_m: Annotated[float, typer.Option(help="Length of the simulated strip in m.")] = 30.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the simulated strip.")] = 7,
    model: Annotated[str, typer.Option(help=MODEL)] = "default",
) -> None:
    """Simulate a roll, scan it, and hold what was found against what was planted."""
    from dataclasses import astuple

    import pyarrow.parquet
    from rollsight.inspect.plant import open_plant
    from rollsight.inspect.planted import against_truth
    from rollsight.jobs import console
    from rollsight.jobs.commands.rolls import simulate_with_bar
    from rollsight.jobs.executors import open_executor
    from rollsight.synth.strip import TRUTH_FILE

    plant, roll_id = open_plant(home), f"demo-{length_m:g}m-{seed}"
    chosen = plant.model(model)
    if not plant.roll_path(roll_id).exists():
        console.say(f"simulating {length_m:g} m of hot-rolled strip with planted defects (seed {seed})")
        simulate_with_bar(plant, roll_id, length_m, seed)
    told = "" if model == "default" else f" --model {model}"
    console.say(f"scanning roll {roll_id}: the same as  inspect scan {roll_id} --home {home}{told}")
    with open_executor() as executor:
        run = _scan(plant, roll_id, chosen, executor)
    roll = plant.roll(roll_id)
    planted = pyarrow.parquet.read_table(roll.path / TRUTH_FILE)
    found = against_truth(roll, run.table, run.summary["run_id"], planted)
    _tell(run)
    columns = ("class", "planted", "found", "found as another class", "false alarms")
    console.show_table(
        "Found against planted", columns, [(name, *astuple(counts)) for name, counts in found.items()]
    )
    console.say(f"page: {run.folder / 'report.html'}")


def scan(
    rolls: Annotated[
        list[str] | None,
        typer.Argument(help="Ids of the rolls, patterns such as 'CGL2-*', or URLs.", metavar="[ROLL...]"),
    ] = None,
    batch: Annotated[
        Path | None, typer.Option(help="CSV with the column roll_id and, if you like, priority.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Rolls closed since: a date, a moment, or a span like 36h or 3d.")
    ] = None,
    line: Annotated[str | None, typer.Option(help="Rolls of this line.")] = None,
    model: Annotated[str, typer.Option(help=MODEL)] = "default",
    engine: Annotated[str, typer.Option(help="auto, onnx (ONNX Runtime), openvino or torch.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    band_lines: Annotated[
        int | None,
        typer.Option(help="Lines per band, a multiple of 1024. Default by memory; no result depends on it."),
    ] = None,
    along_strip: Annotated[
        str, typer.Option(help="Class whose faint lines are looked for along the strip, such as scratches.")
    ] = "",
    threads: Annotated[int | None, typer.Option(min=1, help="Bands at once. Default: one per core.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Dask processes on this machine; 0: threads.")] = 0,
    scheduler: Annotated[
        str | None, typer.Option(help="Existing Dask scheduler, tcp://HOST:PORT or tls://HOST:PORT.")
    ] = None,
    tls_ca: Annotated[Path | None, typer.Option(help="Authority of a tls:// scheduler, PEM.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="This client's certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Scan a roll that still grows, until it is closed.")
    ] = False,
    patience_s: Annotated[
        float, typer.Option(min=1, help="--live gives up when nothing has come for so long.")
    ] = 600.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell bands, time, memory and disk; scan nothing.")
    ] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Find the defects of rolls and write their tables and pages: the main job.

    A scan that was interrupted goes on where it stopped when the same command is given again.
    """
    from rollsight.inspect.plant import open_plant
    from rollsight.jobs import console
    from rollsight.jobs.batch import choose_rolls
    from rollsight.jobs.cluster import Tls
    from rollsight.jobs.executors import open_executor

    if any((tls_ca, tls_cert, tls_key)) and not all((tls_ca, tls_cert, tls_key)):
        raise UserError("TLS needs all three: --tls-ca, --tls-cert and --tls-key", USAGE)
    tls = Tls(tls_ca, tls_cert, tls_key) if tls_ca and tls_cert and tls_key else None
    if live and dry_run:
        raise UserError("--live with --dry-run: a roll that grows has no length to plan with", USAGE)
    if live and along_strip:
        raise UserError("--live with --along-strip: only a whole roll has such lines; scan it closed", USAGE)
    plant = open_plant(home, standing=not any("://" in roll for roll in rolls or ()))
    chosen = plant.model(model)  # refused before the first roll, not at each
    wanted = choose_rolls(plant, rolls or (), batch=batch, since=since, line=line)
    faults = []
    with open_executor(
        workers=workers, scheduler=scheduler, tls=tls, threads=threads, device=device
    ) as executor:
        how = {"engine": engine, "device": device} | ({"along": along_strip} if along_strip else {})
        for roll_id in wanted:
            try:
                if dry_run:
                    _tell_estimate(plant, roll_id, chosen, executor, band_lines, how, as_json=as_json)
                    continue
                patience = patience_s if live else None
                run = _scan(plant, roll_id, chosen, executor, patience, band_lines=band_lines, **how)
            except UserError as fault:
                if len(wanted) == 1:
                    raise
                console.error(fault)  # one bad roll does not stop the rest
                faults.append(fault)
                continue
            if as_json:
                console.emit(_scan_result(run))
            else:
                _tell(run)
                if band_lines not in (None, run.summary["band_lines"]):
                    console.say(f"kept: the run was begun with bands of {run.summary['band_lines']} lines")
                console.say(f"page: {run.folder / 'report.html'}")
    if faults:
        codes = {fault.exit_code for fault in faults}
        code = codes.pop() if len(faults) == len(wanted) and len(codes) == 1 else PARTIAL
        raise UserError(f"{len(faults)} of {len(wanted)} rolls were not scanned", code)


def _scan(
    plant: "Plant",
    roll_id: str,
    model: "Model",
    executor: "Executor",
    patience_s: float | None = None,
    **options: Any,
) -> "Run":
    """Scan a roll with a progress bar; with a patience, while it grows."""
    from rollsight.jobs import console
    from rollsight.jobs.live_job import scan_live
    from rollsight.jobs.scan_job import scan_roll

    live = patience_s is not None
    roll = plant.roll(roll_id, live=live)
    per_line = None if roll.strip.mm_per_line is None else roll.strip.mm_per_line / 1000
    px_per_line = roll.width * roll.modes
    with console.strip_progress(f"scan {roll_id}", m_per_line=per_line, px_per_line=px_per_line) as bar:
        if patience_s is None:
            return scan_roll(plant, roll, model, executor, on_band=bar, **options)
        return scan_live(plant, roll.path, model, executor, patience_s=patience_s, on_band=bar, **options)


def _tell_estimate(
    plant: "Plant",
    roll_id: str,
    model: "Model",
    executor: "Executor",
    band_lines: int | None,
    how: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """What a scan of the roll would take, before anything starts."""
    import shutil
    from dataclasses import asdict

    from rollsight.jobs import console
    from rollsight.jobs.scan_job import estimate_roll, plan_roll

    roll = plant.roll(roll_id)
    planned = plan_roll(plant, roll, model, executor, **how)
    told = estimate_roll(planned, executor, band_lines)
    free = shutil.disk_usage(plant.home).free
    if as_json:
        console.emit({"roll_id": roll.roll_id, **asdict(told), "disk_free_bytes": free})
        return
    left = told.bands - told.bands_done
    rows = [
        ("run", told.run_id),
        ("bands", f"{told.bands} of {told.band_lines} lines, {told.bands_done} done"),
        ("at once", f"{told.slots} ({executor.name})"),
        (
            "time",
            f"about {_duration(told.seconds)}, from {told.basis}" if left else "none: all bands are done",
        ),
        ("memory", f"{told.memory_bytes / 1e6:,.0f} MB for the bands at work"),
        ("disk", f"{told.disk_bytes / 1e6:,.1f} MB for mask and receipts; {free / 1e9:,.1f} GB free"),
    ]
    console.show_table(f"scan {roll.roll_id}: planned, not started", ("what", "figure"), rows)
    if told.disk_bytes > free:
        console.say("the disk is too small for this scan: make room first")


def _duration(seconds: float) -> str:
    """1 h 05 min, 3 min 20 s, 12 s."""
    whole = max(1, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def _scan_result(run: "Run") -> dict[str, Any]:
    """The JSON line of a scan: keys that others build on."""
    keys = (
        "roll_id",
        "run_id",
        "engine",
        "executor",
        "length_m",
        "width_mm",
        "coverage",
        "defects",
        "by_class",
    )
    result = {key: run.summary[key] for key in keys}
    result |= {key: run.summary[key] for key in ("seconds", "mpix_s")}
    result |= {
        "peak_rss_mb": _peak_rss_mb(),
        "verdict": run.summary["verdict"],
        "reasons": run.summary["reasons"],
    }
    return result | {"table": str(run.folder / "defects.parquet"), "page": str(run.folder / "report.html")}


def _tell(run: "Run") -> None:
    """What a person at the terminal wants to know of a scan."""
    from rollsight.inspect.coverage import in_percent
    from rollsight.jobs import console

    told = run.summary
    size = f"{told['lines']} lines x {told['width_px']} px"
    if told["units"] == "mm":
        size = f"{told['length_m']:,.1f} m x {told['width_mm']:,.0f} mm"
    console.say(
        f"scanned {told['roll_id']}  {size}  {told['seconds']:.1f} s  {told['mpix_s']:.1f} MPix/s  "
        f"coverage {in_percent(told['coverage'])}%"
    )
    by_class = ", ".join(f"{name} {count}" for name, count in told["by_class"].items() if count)
    console.say(f"{told['defects']} defects" + (f": {by_class}" if by_class else ""))
    for line in told.get("faint_lines", ()):
        console.say(
            f"faint line of {line['class']}: lines {line['y0']} to {line['y1']}, "
            f"px {line['x0']} to {line['x1']}, evidence {line['evidence']:.0f}, "
            f"{line['in_table']:.0%} of it in the table"
        )
    console.say(f"VERDICT {told['verdict']}: {'; '.join(told['reasons'])}")


def _peak_rss_mb() -> float:
    """The largest resident memory of this process so far, in MB (10^6 bytes)."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)
