"""`inspect explain`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rollsight.inspect.errors import USAGE, UserError
from rollsight.jobs.commands.options import Home, Json

if TYPE_CHECKING:
    from rollsight.inspect.explain import Explanation
    from rollsight.inspect.models import Model
    from rollsight.inspect.plant import Plant

ROWS = 6  # defects of an image in its picture: the likeliest


def explain(
    roll: Annotated[str | None, typer.Argument(help="Id or URL of a scanned roll.")] = None,
    run: Annotated[str | None, typer.Argument(help="Id of the run that scanned it.")] = None,
    defects: Annotated[
        list[int] | None, typer.Argument(help="Ids of defects in its table.", metavar="DEFECT...")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="An image file instead of a roll.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="PNG to write for --image. Default: IMAGE-explained.png.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model name in the plant, or a path. Default: the run's, or the shipped."),
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show where the net saw a defect: its crop and, beside it, the evidence for its class (Grad-CAM).

    The pictures of a roll's defects are put into the folder of the run, as explained/DEFECT.png.
    """
    from rollsight.inspect.plant import open_plant
    from rollsight.jobs import console

    plant = open_plant(home)
    if image is not None:
        if roll is not None:
            raise UserError("--image with a roll: give one or the other", USAGE)
        written = [_explain_image(plant.model(model or "default"), image, out)]
    elif roll is None or run is None or not defects:
        raise UserError("needed: a roll, a run and defects of its table, or --image FILE", USAGE)
    elif out is not None:
        raise UserError("--out is for --image: pictures of a roll go into the folder of the run", USAGE)
    else:
        written = _explain_defects(plant, roll, run, defects, model)
    for path in written:
        if as_json:
            console.emit({"picture": str(path)})
        else:
            console.say(str(path))


def _explain_defects(
    plant: "Plant", roll_id: str, run_id: str, defects: list[int], name: str | None
) -> list[Path]:
    """A picture of each defect in the folder of the run; UserError where there is no such run or defect."""
    import json

    import pyarrow.parquet
    from rollsight.inspect.explain import explain_defect, picture
    from rollsight.inspect.rolls import write_durably
    from rollsight.inspect.strips import check_name

    check_name(run_id, "run id")
    roll = plant.roll(roll_id)
    folder = plant.run(roll.roll_id, run_id)
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
        table = pyarrow.parquet.read_table(folder / "defects.parquet")
        classes, made_by, model_hash = summary["classes"], summary["model"], summary["model_hash"]
    except (OSError, ValueError, KeyError):
        known = ", ".join(sorted(path.parent.name for path in folder.parent.glob("*/summary.json"))[:10])
        raise UserError(
            f"no finished run {run_id!r} of roll {roll.roll_id}: there are {known or 'none'}"
        ) from None
    model = _model_of_run(plant, name, made_by, model_hash)
    rows = {row["defect_id"]: row for row in table.to_pylist()}
    if missing := [defect for defect in defects if defect not in rows]:
        some = ", ".join(map(str, [*rows][:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
        table_path = folder / "defects.csv"
        raise UserError(f"run {run_id} has no defect {missing[0]}: {table_path} has {some or 'none'}")
    net, own_mask = model.net(), folder / "mask.zarr"
    read_mask = partial(roll.read_label, run_id, folder=own_mask if own_mask.is_dir() else None)
    strip = roll.strip
    aspect = (strip.mm_per_line or 1.0) / (strip.mm_per_px_x or 1.0)
    (folder / "explained").mkdir(exist_ok=True)
    written = []
    for defect in defects:
        row = rows[defect]
        where = "" if row["x_mm"] is None else f", {row['y_m']:.2f} m, {row['x_mm']:.0f} mm"
        told = explain_defect(
            net,
            model.card.halo_px,
            (roll.lines, roll.width),
            roll.read_unit,
            read_mask,
            (row["x0"], row["y0"], row["x1"], row["y1"]),
            classes.index(row["class"]) + 1,
            f"{row['class']} {row['score']:.2f}{where} (defect {defect})",
        )
        written.append(folder / "explained" / f"{defect}.png")
        write_durably(written[-1], picture([told], aspect))
    return written


def _model_of_run(plant: "Plant", name: str | None, made_by: str, model_hash: str) -> "Model":
    """The model that made a run: another would be explained for what it did not do."""
    for candidate in [name] if name else ["default", made_by]:
        try:
            model = plant.model(candidate)
        except UserError:
            if name:
                raise
            continue
        if model.hash == model_hash:
            return model
    raise UserError(
        f"the run was made by model {made_by} {model_hash[:12]}, which is not "
        f"{name or 'here under that name'}: name it with --model"
    )


def _explain_image(model: "Model", path: Path, out: Path | None) -> Path:
    """A picture with a row for each of the likeliest defects of an image; UserError where it has none."""
    import numpy as np
    from rollsight.inspect.defects import at_least, band_components
    from rollsight.inspect.engines import open_engine
    from rollsight.inspect.evaluate import padded_logits
    from rollsight.inspect.explain import explain_defect, picture
    from rollsight.inspect.labels import read_gray
    from rollsight.inspect.rolls import write_durably
    from rollsight.inspect.scan import A_MIN_PX, decide

    gray = read_gray(path)[None]
    logits = padded_logits(open_engine(model, "torch")[1], gray)
    mask, score = decide(logits, model.thresholds, model.card.temperature)
    found = at_least(band_components(mask, score, np.zeros(len(mask), dtype=np.int64), 0), A_MIN_PX)
    rows = np.argsort(-found.score, kind="stable")[:ROWS]
    if not rows.size:
        raise UserError(f"{path}: model {model.card.name} finds no defect in it: nothing to explain")
    net = model.net()
    told: list[Explanation] = []
    for i in rows:
        x0, y0, x1, y1 = (int(found.facts[name][i]) for name in ("x0", "y0", "x1", "y1"))
        kind = int(found.classes[i])
        told.append(
            explain_defect(
                net,
                model.card.halo_px,
                (gray.shape[1], gray.shape[2]),
                lambda a, b: gray[:, a:b],
                lambda a, b: mask[a:b],
                (x0, y0, x1, y1),
                kind,
                f"{model.card.classes[kind - 1]} {found.score[i]:.2f}, line {y0}, px {x0}",
            )
        )
    target = out or Path(f"{path.stem}-explained.png")
    write_durably(target, picture(told))
    return target
