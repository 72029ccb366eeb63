"""`inspect simulate`, `ingest` and `rolls`: how rolls come to be."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rollsight.inspect.errors import USAGE, UserError
from rollsight.jobs.commands.options import Home, Json, Overwrite

if TYPE_CHECKING:
    from rollsight.inspect.plant import Plant


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
    path, planted = simulate_with_bar(plant, roll_id, length_m, seed, overwrite=overwrite, **plan)
    lines = plant.roll(roll_id).lines
    if as_json:
        console.emit(
            {"roll_id": roll_id, "path": str(path), "lines": lines, "seed": seed, "planted": planted}
        )
    else:
        console.say(f"{path}: {lines} lines, {length_m:g} m, {sum(planted.values())} planted defects")


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


def simulate_with_bar(
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
