"""The command `inspect`: each sub-command parses and calls; heavy imports stay inside them."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rollsight.inspect.errors import FAILED, PARTIAL, USAGE, UserError

if TYPE_CHECKING:
    from rollsight.inspect.plant import Plant
    from rollsight.jobs.scan_job import Run

INTERRUPTED = 130  # 128 + SIGINT, as a shell counts it

app = typer.Typer(
    help="Find and measure surface defects on whole rolls of steel strip.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Home = Annotated[
    Path | None,
    typer.Option(help="Plant folder with rolls, models and runs. Default: $ROLLSIGHT_HOME, else ./plant."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per line instead of text.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a roll of the same id.")]


@app.command()
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
    from rollsight.synth.strip import TRUTH_FILE

    plant, roll_id = open_plant(home), f"demo-{length_m:g}m-{seed}"
    if not plant.roll_path(roll_id).exists():
        console.say(f"simulating {length_m:g} m of hot-rolled strip with planted defects (seed {seed})")
        _simulate(plant, roll_id, length_m, seed)
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


@app.command()
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


@app.command()
def simulate(
    roll_id: Annotated[str, typer.Argument(help="Id of the roll to make.")],
    length_m: Annotated[float, typer.Option(help="Length of the strip in m.")] = 30.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    width_px: Annotated[int, typer.Option(help="Pixels across, strip and background.")] = 1250,
    mm_per_px_x: Annotated[float, typer.Option(help="mm per pixel across the strip.")] = 0.8,
    mm_per_line: Annotated[float, typer.Option(help="mm per line along the strip.")] = 1.0,
    density: Annotated[float, typer.Option(help="Planted defects relative to the usual number.")] = 1.0,
    clean: Annotated[bool, typer.Option("--clean", help="Plant no defect.")] = False,
    lamp_failure: Annotated[
        bool, typer.Option(help="A short dark stretch on strips of 20,000 lines and more.")
    ] = True,
    overwrite: Overwrite = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make a simulated coil with known truth: class mask and defect table in mm."""
    from rollsight.inspect.plant import open_plant
    from rollsight.jobs import console

    plant = open_plant(home)
    plan = {
        "width_px": width_px,
        "mm_per_px_x": mm_per_px_x,
        "mm_per_line": mm_per_line,
        "density": density,
        "clean": clean,
        "blackouts": None if lamp_failure else (),
    }
    path, planted = _simulate(plant, roll_id, length_m, seed, overwrite=overwrite, **plan)
    lines = plant.roll(roll_id).lines
    if as_json:
        console.emit(
            {"roll_id": roll_id, "path": str(path), "lines": lines, "seed": seed, "planted": planted}
        )
    else:
        console.say(f"{path}: {lines} lines, {length_m:g} m, {sum(planted.values())} planted defects")


@app.command()
def ingest(
    folder: Annotated[
        Path, typer.Argument(help="Folder of TIFF, PNG or JPG strips, in the order of their names.")
    ],
    roll_id: Annotated[str, typer.Argument(help="Id of the roll to make.")],
    mm_per_px_x: Annotated[float | None, typer.Option(help="mm per pixel across the strip.")] = None,
    mm_per_line: Annotated[float | None, typer.Option(help="mm per line along the strip.")] = None,
    side: Annotated[str | None, typer.Option(help="Side of the strip: top or bottom.")] = None,
    units: Annotated[
        str, typer.Option(help="mm, or px where no pixel size is known: then nothing is in mm.")
    ] = "mm",
    line_id: Annotated[str | None, typer.Option(help="Production line.")] = None,
    heat: Annotated[str | None, typer.Option(help="Heat of the steel.")] = None,
    grade: Annotated[str | None, typer.Option(help="Steel grade.")] = None,
    white: Annotated[
        float | None, typer.Option(help="Raw value that counts as white. Default 255 or 65535.")
    ] = None,
    overwrite: Overwrite = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Stack a folder of image strips into a roll. `strip.json` or `strip.yaml` there may give the options."""
    from rollsight.inspect.ingest import ingest_strips
    from rollsight.inspect.plant import open_plant
    from rollsight.inspect.rolls import Strip
    from rollsight.jobs import console

    if units not in ("mm", "px"):
        raise UserError(f"--units {units}: it is mm or px", USAGE)
    strip = Strip(
        roll_id=roll_id,
        side=side,
        lighting=(),
        mm_per_px_x=mm_per_px_x,
        mm_per_line=mm_per_line,
        line_id=line_id,
        heat=heat,
        grade=grade,
        scale=None if white is None else (white,),
    )
    path = open_plant(home).roll_path(roll_id)
    per_line = None if mm_per_line is None else mm_per_line / 1000
    with console.strip_progress(f"ingest {roll_id}", m_per_line=per_line, px_per_line=0) as on_lines:
        roll = ingest_strips(folder, path, strip, units=units, overwrite=overwrite, on_lines=on_lines)  # type: ignore[arg-type]
    if as_json:
        console.emit(
            {
                "roll_id": roll_id,
                "path": str(path),
                "lines": roll.lines,
                "width_px": roll.width,
                "units": roll.strip.units,
            }
        )
    else:
        console.say(f"{path}: {roll.lines} lines x {roll.width} px, {roll.dtype}, units {roll.strip.units}")


@app.command()
def rolls(home: Home = None, as_json: Json = False) -> None:
    """List the rolls of the plant."""
    from rollsight.inspect.plant import open_plant
    from rollsight.jobs import console

    plant = open_plant(home)
    rows: list[dict[str, Any]] = []
    for roll_id in plant.roll_ids():
        try:
            roll = plant.roll(roll_id)
        except UserError as fault:
            console.error(fault)
            continue
        metres = None if roll.strip.mm_per_line is None else roll.lines * roll.strip.mm_per_line / 1000
        runs = [path.parent.name for path in sorted(plant.run(roll_id, "").glob("*/report.html"))]
        rows.append(
            {
                "roll_id": roll_id,
                "lines": roll.lines,
                "width_px": roll.width,
                "length_m": metres,
                "modes": list(roll.strip.lighting),
                "dtype": str(roll.dtype),
                "runs": runs,
            }
        )
    if as_json:
        for row in rows:
            console.emit(row)
        return
    cells = [
        [
            "-" if value is None else " ".join(value) if isinstance(value, list) else value
            for value in row.values()
        ]
        for row in rows
    ]
    console.show_table(
        f"Rolls in {plant.rolls}", ("roll", "lines", "width px", "length m", "modes", "depth", "runs"), cells
    )


@app.command()
def models(home: Home = None, as_json: Json = False) -> None:
    """List the models: the shipped one and those of the plant."""
    from rollsight.inspect.models import CARD
    from rollsight.inspect.plant import open_plant
    from rollsight.jobs import console

    plant = open_plant(home)
    names = ["default", *sorted(path.parent.name for path in plant.models.glob(f"[!.]*/{CARD}"))]
    found = []
    for name in names:
        try:
            found.append((name, plant.model(name)))
        except UserError as fault:
            console.error(fault)  # one damaged model does not hide the others
    if as_json:
        for name, model in found:
            console.emit({"name": name, "card": model.card.model_dump(mode="json")})
        return
    rows = [(name, model.card.net, " ".join(model.card.classes), model.hash[:12]) for name, model in found]
    console.show_table("Models", ("name", "net", "classes", "hash"), rows)


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="Name of the model to make.")],
    data: Annotated[
        list[Path], typer.Option(help="Labelled data or labelled roll; may be given several times.")
    ],
    share: Annotated[
        list[float] | None, typer.Option(help="Share of each --data in a batch. Default: equal.")
    ] = None,
    exhaustive: Annotated[
        list[Path] | None,
        typer.Option(help="A --data whose background is free of the other sources' classes too."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 2000,
    batch: Annotated[int, typer.Option(min=2, help="Crops per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Its peak, after the warm-up.")] = 1e-3,
    init: Annotated[str | None, typer.Option(help="Model of the same classes to begin from.")] = None,
    attention: Annotated[str, typer.Option(help="cbam or none.")] = "cbam",
    small_weight: Annotated[float, typer.Option(min=0, help="Weight of the small-object term.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores.")] = None,
    note: Annotated[
        list[str] | None, typer.Option(help="A line for the model's card; may be repeated.")
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Train a segmenter on labelled data. Interrupted, the same command goes on from the last checkpoint."""
    import torch
    from rollsight.inspect.labels import open_labels
    from rollsight.inspect.plant import open_plant
    from rollsight.inspect.train import Recipe
    from rollsight.jobs import console
    from rollsight.jobs.cluster import slots
    from rollsight.jobs.train_job import train_model

    if attention not in ("cbam", "none"):
        raise UserError(f"--attention {attention}: it is cbam or none", USAGE)
    if learning_rate <= 0:
        raise UserError(f"--learning-rate {learning_rate}: it must be above 0; 0.001 is usual", USAGE)
    torch.set_num_threads(threads or slots())
    plant = open_plant(home)
    recipe = Recipe(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        attention=attention,
        small_weight=small_weight,
        seed=seed,
    )
    if unknown := [path for path in exhaustive or () if path not in data]:
        raise UserError(f"--exhaustive {unknown[0]}: it must be one of the --data", USAGE)
    sources = [open_labels(path) for path in data]
    with console.count_progress(f"train {name}", "steps") as on_done:
        model = train_model(
            plant,
            name,
            sources,
            recipe,
            shares=share or (),
            exhaustive=[path in (exhaustive or ()) for path in data],
            notes=note or (),
            init=None if init is None else plant.model(init),
            on_step=lambda step, _: on_done(step, steps),
        )
    if as_json:
        console.emit({"name": name, "path": str(model.folder), "card": model.card.model_dump(mode="json")})
        return
    for metric in model.card.metrics:
        rows = [(figure, *values) for figure, values in metric["figures"].items()]
        console.show_table(f"{metric['data']}, {metric['split']}", ("figure", "value", "low", "high"), rows)
    console.say(f"{model.folder}: classes {', '.join(model.card.classes)}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model name in the plant, a path, or `default`.")] = "default",
    data: Annotated[
        Path | None, typer.Option(help="Labelled data or labelled roll. Default: $ROLLSIGHT_DATA.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split to evaluate.")] = "test",
    engine: Annotated[str, typer.Option(help="auto, onnx or torch.")] = "auto",
    card: Annotated[bool, typer.Option("--card", help="Write the figures on the model's card.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Tell how a model does on labelled data: pixel and instance figures with intervals over groups."""
    from rollsight.inspect.engines import open_engine
    from rollsight.inspect.evaluate import evaluate as count
    from rollsight.inspect.evaluate import report
    from rollsight.inspect.labels import open_labels
    from rollsight.inspect.plant import open_plant
    from rollsight.jobs import console
    from rollsight.jobs.train_job import add_to_card

    root = data or (Path(os.environ["ROLLSIGHT_DATA"]) if os.environ.get("ROLLSIGHT_DATA") else None)
    if root is None:
        raise UserError("no data given: use --data DIR or set ROLLSIGHT_DATA", USAGE)
    chosen, file = open_labels(root).of_split(split), open_plant(home).model(model)
    if card and model == "default":
        raise UserError(
            "--card: the shipped model's card belongs to the package; evaluate a model of the plant", USAGE
        )
    with console.count_progress(f"evaluate {model}", "images") as on_done:
        tally = count(file, open_engine(file, engine)[1], chosen, on_image=on_done)
    figures = report(file, chosen, tally)
    if card:
        add_to_card(file, chosen, split, tally)
    if as_json:
        console.emit(figures)
    else:
        _tell_figures(f"{file.card.name} on {root.name} {split}: {figures['n_images']} images", figures)


def _tell_figures(title: str, figures: dict[str, Any]) -> None:
    from rollsight.jobs import console

    pixel, instance, intervals = figures["pixel"], figures["instance"], figures["intervals"]
    rows: list[tuple[Any, ...]] = [("mIoU", pixel["miou"], intervals["pixel"]["miou"])]
    rows += [(f"IoU {name}", value, intervals["pixel"]["iou"][name]) for name, value in pixel["iou"].items()]
    rows += [(key, instance[key], intervals["instance"][key]) for key in ("recall_h", "precision_h", "f1_h")]
    rows += [
        (f"recall {size} (n={b['n']})", b["recall"], b) for size, b in instance["recall_by_size"].items()
    ]
    console.show_table(
        title,
        ("figure", "value", "low", "high"),
        [
            (name, *("-" if x is None else x for x in (value, span["low"], span["high"])))
            for name, value, span in rows
        ],
    )
    alarms = figures["false_alarms"]
    console.say(f"false alarms {alarms['per_mpx']:.2f} per Mpx; thresholds {figures['thresholds']}")
    for name, key in (
        ("classes the model does not know", "unknown_classes"),
        ("groups it was trained on", "groups_trained_on"),
    ):
        if figures[key]:
            console.say(f"{name}: {', '.join(figures[key][:10])}")


def _simulate(
    plant: "Plant", roll_id: str, length_m: float, seed: int, *, overwrite: bool = False, **plan: Any
) -> tuple[Path, dict[str, int]]:
    """Make a simulated roll with a progress bar; its path and the planted defects per class."""
    from collections import Counter

    from rollsight.jobs import console
    from rollsight.synth.strip import CLASSES, SimulatedStrip, simulate_roll

    path, simulated = plant.roll_path(roll_id), SimulatedStrip(length_m, seed, **plan)
    per_line = simulated.mm_per_line / 1000
    with console.strip_progress(
        f"simulate {roll_id}", m_per_line=per_line, px_per_line=simulated.width_px
    ) as bar:
        simulate_roll(path, simulated, overwrite=overwrite, on_lines=bar)
    counts = Counter(simulated.truth["class"].to_pylist())
    return path, {name: counts[name] for name in CLASSES}


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


def main() -> None:
    """Run the command: a user's mistake is one line and an exit code, never a traceback."""
    try:
        code = app(standalone_mode=False)
    except UserError as fault:
        print(f"inspect: {fault}", file=sys.stderr)
        code = fault.exit_code
    except typer.TyperException as fault:  # a command line that cannot be parsed
        # Without any argument the help was shown, and nothing is left to say.
        if message := " ".join(fault.format_message().split()).rstrip("."):
            print(f"inspect: {message}: see inspect --help", file=sys.stderr)
        code = USAGE
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except OSError as fault:  # disk full, permission: the system's own words say what to do
        print(f"inspect: {fault.strerror or fault}: {fault.filename or 'no file named'}", file=sys.stderr)
        code = FAILED
    if code == INTERRUPTED:
        print(
            "inspect: interrupted; the same command again goes on (scan, train) or starts over (others)",
            file=sys.stderr,
        )
    sys.exit(code or 0)
