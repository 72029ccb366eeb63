"""`inspect simulate`, `ingest` and `rolls`: how rolls come to be, and which stay as they are."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rollsight.inspect.errors import PARTIAL, USAGE, UserError
from rollsight.jobs.commands.options import MAX_SEED, Home, Json, LedgerUrl, Overwrite

if TYPE_CHECKING:
    from rollsight.inspect.plant import Plant

app = typer.Typer(pretty_exceptions_enable=False)


def simulate(
    roll_id: Annotated[str, typer.Argument(help="Id of the roll to make.")],
    length_m: Annotated[float, typer.Option(help="Length of the strip in m.")] = 30.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="The same seed gives the same bytes.")] = 0,
    width_px: Annotated[int, typer.Option(help="Pixels across, strip and background.")] = 1250,
    mm_per_px_x: Annotated[float, typer.Option(help="mm per pixel across the strip.")] = 0.8,
    mm_per_line: Annotated[float, typer.Option(help="mm per line along the strip.")] = 1.0,
    density: Annotated[float, typer.Option(help="Planted defects relative to the usual number.")] = 1.0,
    clean: Annotated[bool, typer.Option("--clean", help="Plant no defect.")] = False,
    surface: Annotated[str, typer.Option(help="hot-rolled, cold-rolled or galvanised.")] = "hot-rolled",
    lighting: Annotated[str, typer.Option(help="bright, or bright,dark for two modes.")] = "bright",
    effect: Annotated[
        list[str] | None,
        typer.Option(
            help="lamp_drift, speed_ramp, ends, weld, dropped_lines or drops; may be repeated. "
            "Default: none on hot-rolled strip, all on the others."
        ),
    ] = None,
    no_effects: Annotated[bool, typer.Option("--no-effects", help="None of them.")] = False,
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
    from rollsight.synth.strip import MARKERS

    if effect and no_effects:
        raise UserError("--effect with --no-effects: take one of them", USAGE)
    plant = open_plant(home)
    plan = {
        "surface": surface,
        "lighting": tuple(lighting.split(",")),
        "effects": () if no_effects else tuple(effect) if effect else None,
        "width_px": width_px,
        "mm_per_px_x": mm_per_px_x,
        "mm_per_line": mm_per_line,
        "density": density,
        "clean": clean,
        "blackouts": None if lamp_failure else (),
    }
    path, planted = simulate_with_bar(plant, roll_id, length_m, seed, overwrite=overwrite, **plan)
    lines = plant.roll(roll_id).lines
    if as_json:
        console.emit(
            {"roll_id": roll_id, "path": str(path), "lines": lines, "seed": seed, "planted": planted}
        )
    else:
        markers = {name: planted.pop(name) for name in MARKERS if name in planted}
        told = f"{path}: {lines} lines, {length_m:g} m, {sum(planted.values())} planted defects"
        console.say(told + "".join(f", {count} {name}" for name, count in markers.items()))


def ingest(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of image strips (one sub-folder per lighting mode, if several), raw BIL file with a "
            "JSON sidecar, or patch export (CSV and images)."
        ),
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
        list[float] | None,
        typer.Option(help="Raw value that counts as white; once, or for each mode. Default: of the depth."),
    ] = None,
    width_mm: Annotated[float | None, typer.Option(help="Ordered width of the strip.")] = None,
    length_m: Annotated[
        float | None, typer.Option(help="Length of the strip, for a patch export that does not tell it.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="Folder or URL (s3://bucket/rolls) of the roll. Default: the plant.")
    ] = None,
    overwrite: Overwrite = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make a roll of what a camera or an inspection system gives. Interrupted, the same command goes on.

    `strip.json` or `strip.yaml` in the folder, or the sidecar, may give the options.
    """
    from rollsight.inspect.ingest import ingest as make_roll
    from rollsight.inspect.plant import open_plant
    from rollsight.inspect.rolls import Strip, check_roll_id
    from rollsight.jobs import console

    if units not in ("mm", "px"):
        raise UserError(f"--units {units}: it is mm or px", USAGE)
    strip = Strip(
        roll_id=check_roll_id(roll_id),
        side=side,
        lighting=(),
        mm_per_px_x=mm_per_px_x,
        mm_per_line=mm_per_line,
        line_id=line_id,
        heat=heat,
        grade=grade,
        width_mm=width_mm,
        scale=tuple(white) if white else None,
    )
    place = open_plant(home).roll_path(roll_id) if to is None else f"{to.rstrip('/')}/{roll_id}.zarr"
    per_line = None if mm_per_line is None else mm_per_line / 1000
    with console.strip_progress(f"ingest {roll_id}", m_per_line=per_line, px_per_line=0) as on_lines:
        made = make_roll(
            source,
            place,
            strip,
            units=units,  # type: ignore[arg-type]  # checked above
            length_m=length_m,
            overwrite=overwrite,
            on_lines=on_lines,
        )
    roll = made.roll
    if as_json:
        console.emit(
            {
                "roll_id": roll_id,
                "path": str(roll.location),
                "lines": roll.lines,
                "width_px": roll.width,
                "units": roll.strip.units,
                "lighting": list(roll.strip.lighting),
                "notes": list(made.notes),
            }
        )
        return
    modes = f", modes {' '.join(roll.strip.lighting)}" if roll.modes > 1 else ""
    size = f"{roll.lines} lines x {roll.width} px"
    console.say(f"{roll.location}: {size}, {roll.dtype}, units {roll.strip.units}{modes}")
    for note in made.notes:
        console.say(note)


@app.callback(invoke_without_command=True)
def rolls(context: typer.Context, home: Home = None, as_json: Json = False) -> None:
    """List the rolls of the plant; with `hold`, keep one from being deleted."""
    if context.invoked_subcommand is not None:
        context.obj = home  # `inspect rolls --home DIR hold R1` means the same plant
        return
    from rollsight.inspect.plant import open_plant
    from rollsight.jobs import console

    plant = open_plant(home, standing=True)
    rows: list[dict[str, Any]] = []
    unread = 0
    for roll_id in plant.roll_ids():
        try:
            roll = plant.roll(roll_id, live=True)
        except UserError as fault:
            console.error(fault)
            unread += 1
            continue
        metres = None if roll.strip.mm_per_line is None else roll.lines * roll.strip.mm_per_line / 1000
        pages = sorted(plant.run(roll_id, "").glob("*/report.html"), key=lambda path: path.stat().st_mtime)
        rows.append(
            {
                "roll_id": roll_id,
                "lines": roll.lines,
                "width_px": roll.width,
                "length_m": metres,
                "modes": list(roll.strip.lighting),
                "dtype": str(roll.dtype),
                "runs": [path.parent.name for path in pages],
                "growing": not roll.strip.closed,
            }
        )
    if as_json:
        for row in rows:
            console.emit(row)
    else:
        for row in rows:
            row["roll_id"] += " (growing)" if row.pop("growing") else ""
        cells = [
            [
                "-" if value is None else " ".join(value) if isinstance(value, list) else value
                for value in row.values()
            ]
            for row in rows
        ]
        names = ("roll", "lines", "width px", "length m", "modes", "depth", "runs")
        console.show_table(f"Rolls in {plant.rolls}", names, cells)
    if unread:
        raise typer.Exit(PARTIAL)


@app.command()
def hold(
    context: typer.Context,
    roll_id: Annotated[
        str | None, typer.Argument(help="Roll to keep as it is. Default: list what is on hold.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why, for whoever finds it.")] = "",
    release: Annotated[bool, typer.Option("--release", help="End the hold.")] = False,
    ledger: LedgerUrl = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Put a roll on hold, so that nothing of it is deleted, or release it."""
    from dataclasses import asdict

    from rollsight.jobs import console
    from rollsight.jobs import holds as kept
    from rollsight.jobs.sites import open_site

    if roll_id is None and (release or reason):
        raise UserError("--reason and --release are for a roll: name it", USAGE)
    if release and reason:
        raise UserError("--reason with --release: a release needs no reason", USAGE)
    site = open_site(home or context.obj, ledger)
    try:
        if roll_id is None:
            standing = kept.holds(site)
        elif release:
            kept.release(site, roll_id)
        else:
            kept.hold(site, roll_id, reason or "no reason given")
    finally:
        site.ledger.close()
    if roll_id is not None:
        if as_json:
            console.emit({"roll_id": roll_id, "on_hold": not release})
        else:
            console.say(f"roll {roll_id} is {'released' if release else 'on hold: nothing of it is deleted'}")
    elif as_json:
        for row in standing:
            console.emit(asdict(row) | {"held_at": row.held_at.isoformat()})
    else:
        rows = [(row.roll_id, f"{row.held_at:%Y-%m-%d %H:%M} UTC", row.by, row.reason) for row in standing]
        console.show_table("Rolls on hold", ("roll", "since", "by", "reason"), rows)


def simulate_with_bar(
    plant: "Plant", roll_id: str, length_m: float, seed: int, *, overwrite: bool = False, **plan: Any
) -> tuple[Path, dict[str, int]]:
    """Make a simulated roll with a progress bar; its path and the planted defects per class."""
    from collections import Counter

    from rollsight.jobs import console
    from rollsight.synth.strip import SimulatedStrip, simulate_roll

    path, simulated = plant.roll_path(roll_id), SimulatedStrip(length_m, seed, **plan)
    per_line = simulated.mm_per_line / 1000
    with console.strip_progress(
        f"simulate {roll_id}",
        m_per_line=per_line,
        px_per_line=simulated.width_px * len(simulated.lighting),
    ) as bar:
        simulate_roll(path, simulated, overwrite=overwrite, on_lines=bar)
    counts = Counter(simulated.truth["class"].to_pylist())
    return path, {name: counts[name] for name in simulated.classes}
