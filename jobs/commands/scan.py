"""`inspect demo` and `inspect scan`: the main job."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rollsight.inspect.errors import PARTIAL, UserError
from rollsight.jobs.commands.options import Home, Json

if TYPE_CHECKING:
    from rollsight.inspect.plant import Plant
    from rollsight.jobs.scan_job import Run


def demo(
    home: Annotated[Path, typer.Option(help="Plant folder of the demonstration.")] = Path("demo"),
    length_m: Annotated[float, typer.Option(help="Length of the simulated strip in m.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Seed of the simulated strip.")] = 7,
) -> None:
    """Simulate a roll, scan it, and hold what was found against what was planted."""
    from dataclasses import astuple

    import pyarrow.parquet
    from rollsight.inspect.plant import open_plant
    from rollsight.inspect.planted import against_truth
    from rollsight.jobs import console
    from rollsight.jobs.commands.rolls import simulate_with_bar
    from rollsight.synth.strip import TRUTH_FILE

    plant, roll_id = open_plant(home), f"demo-{length_m:g}m-{seed}"
    if not plant.roll_path(roll_id).exists():
        console.say(f"simulating {length_m:g} m of hot-rolled strip with planted defects (seed {seed})")
        simulate_with_bar(plant, roll_id, length_m, seed)
    console.say(f"scanning roll {roll_id}: the same as  inspect scan {roll_id} --home {home}")
    run = _scan(plant, roll_id, "default", "auto", None, None)
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
    rolls: Annotated[list[str], typer.Argument(help="Ids of the rolls to scan.", metavar="ROLL...")],
    model: Annotated[
        str, typer.Option(help="Model name in the plant, a path, or `default`, the shipped one.")
    ] = "default",
    engine: Annotated[str, typer.Option(help="auto, onnx (ONNX Runtime) or torch.")] = "auto",
    band_lines: Annotated[
        int | None,
        typer.Option(help="Lines per band, a multiple of 1024. Default 2048; no result depends on it."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Bands at once. Default: one per core.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Find the defects of rolls and write their tables and pages: the main job.

    A scan that was interrupted goes on where it stopped when the same command is given again.
    """
    from rollsight.inspect.plant import open_plant
    from rollsight.jobs import console

    plant = open_plant(home)
    plant.model(model)  # refused before the first roll, not at each
    faults = []
    for roll_id in rolls:
        try:
            run = _scan(plant, roll_id, model, engine, band_lines, threads)
        except UserError as fault:
            if len(rolls) == 1:
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
        code = codes.pop() if len(faults) == len(rolls) and len(codes) == 1 else PARTIAL
        raise UserError(f"{len(faults)} of {len(rolls)} rolls were not scanned", code)


def _scan(
    plant: "Plant", roll_id: str, model: str, engine: str, band_lines: int | None, threads: int | None
) -> "Run":
    """Scan a roll with a progress bar."""
    from rollsight.jobs import console
    from rollsight.jobs.scan_job import scan_roll

    roll = plant.roll(roll_id)
    per_line = None if roll.strip.mm_per_line is None else roll.strip.mm_per_line / 1000
    px_per_line = roll.width * roll.modes
    with console.strip_progress(f"scan {roll_id}", m_per_line=per_line, px_per_line=px_per_line) as bar:
        return scan_roll(
            plant,
            roll,
            plant.model(model),
            engine=engine,
            band_lines=band_lines,
            threads=threads,
            on_band=bar,
        )


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
    result |= {"peak_rss_mb": _peak_rss_mb(), "verdict": run.summary["verdict"]}
    return result | {"table": str(run.folder / "defects.parquet"), "page": str(run.folder / "report.html")}


def _tell(run: "Run") -> None:
    """What a person at the terminal wants to know of a scan."""
    from rollsight.jobs import console

    told = run.summary
    size = f"{told['lines']} lines x {told['width_px']} px"
    if told["units"] == "mm":
        size = f"{told['length_m']:,.1f} m x {told['width_mm']:,.0f} mm"
    console.say(
        f"scanned {told['roll_id']}  {size}  {told['seconds']:.1f} s  {told['mpix_s']:.1f} MPix/s  "
        f"coverage {told['coverage']:.2%}"
    )
    by_class = ", ".join(f"{name} {count}" for name, count in told["by_class"].items() if count)
    console.say(f"{told['defects']} defects" + (f": {by_class}" if by_class else ""))
    console.say(f"VERDICT {told['verdict']}: {'; '.join(told['reasons'])}")


def _peak_rss_mb() -> float:
    """The largest resident memory of this process so far, in MB (10^6 bytes)."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)
