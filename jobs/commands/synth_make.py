"""`inspect synth make`: a folder of labelled data, or a whole roll with truth."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rollsight.inspect.errors import USAGE, UserError
from rollsight.jobs.commands.options import MAX_SEED, Home, Json, MmPerLine, MmPerPxX, Overwrite, Steel

if TYPE_CHECKING:
    from rollsight.inspect.plant import Plant
    from rollsight.synth.compose import Order
    from rollsight.synth.generator import Generator
    from rollsight.synth.patches import PixelMm

SHOWN = 24  # characters of a SHA-256
DEFAULT_N = 100  # samples, or defects of a roll


def make(
    generator: Annotated[
        str, typer.Argument(metavar="CLASS", help="Generator, by default named as its class.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of labelled data to make.")] = None,
    into: Annotated[
        str | None, typer.Option(help="Roll (id or URL) that the defects go into, instead of --out.")
    ] = None,
    new_roll: Annotated[
        str | None, typer.Option("--as", help="Id of the new roll: that of --into with the defects.")
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Samples, or defects of the new roll. Default: 100.")
    ] = None,
    per_m: Annotated[float | None, typer.Option(help="Defects per metre of the roll, instead of -n.")] = None,
    backgrounds: Steel = None,
    method: Annotated[
        Literal["gan", "paste", "poisson"],
        typer.Option(help="gan, or what it has to beat: a plain paste, or one by its gradients."),
    ] = "gan",
    outlines: Annotated[
        Literal["both", "bank", "gan"],
        typer.Option(help="Outlines of labelled defects, of the mask GAN, or both where there is one."),
    ] = "both",
    variety: Annotated[
        float, typer.Option(help="How far defects are varied in size, shape and contrast: 0.5 to 4.")
    ] = 1.0,
    marks: Annotated[
        int | None, typer.Option(min=1, help="New defects on a sample, at most. Default: 2.")
    ] = None,
    place: Annotated[
        Literal["anywhere", "edges", "lane", "periodic"], typer.Option(help="Where on the strip they lie.")
    ] = "anywhere",
    lane: Annotated[
        float,
        typer.Option(min=0, max=1, help="Middle of the lane, a share of the width from the drive side."),
    ] = 0.5,
    pitch_px: Annotated[
        int, typer.Option(min=0, help="Lines from one mark to the next, for --place periodic.")
    ] = 0,
    mm_per_px_x: MmPerPxX = None,
    mm_per_line: MmPerLine = None,
    licence: Annotated[
        str, typer.Option(help="Licence of labels and steel, for the data's card; best the URL of one.")
    ] = "",
    only: Annotated[
        int | None, typer.Option(min=0, help="Make this one again and hold it against --out or --as.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Another seed is another set.")] = 0,
    overwrite: Overwrite = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Write labelled data with new defects of CLASS on clean steel, for `inspect train --data`.

    Either a folder of samples (--out), or a copy of a roll with new defects and their truth (--into, --as).
    Each sample tells in provenance.jsonl what it was made of; the same seed gives the same bits.
    """
    from rollsight.inspect.plant import open_plant
    from rollsight.synth.compose import MOST_MARKS, Order
    from rollsight.synth.generator import open_generator
    from rollsight.synth.patches import pixel_mm
    from rollsight.synth.placing import Density

    mm = pixel_mm(mm_per_px_x, mm_per_line)
    if (into is None) != (new_roll is None):
        raise UserError("--into ROLL and --as NEW-ROLL: the one needs the other", USAGE)
    if (out is None) == (into is None):
        raise UserError("give --out DIR for a folder, or --into ROLL --as NEW-ROLL for a whole roll", USAGE)
    folder_only = {"--backgrounds": backgrounds, "--marks": marks, "--mm-per-px-x": mm}
    roll_only = {"--per-m": per_m, "--overwrite": overwrite or None}
    for name, given in (roll_only if into is None else folder_only).items():
        if given is not None:
            raise UserError(f"{name} goes with {'--into' if into is None else '--out'} only", USAGE)
    if n is not None and per_m is not None:
        raise UserError("-n with --per-m: take one of them", USAGE)
    plant = open_plant(home, standing=True)
    made_by = open_generator(plant.generator_path(generator))
    order = Order(seed, method, marks or MOST_MARKS, Density(place, lane, pitch_px), outlines, variety)
    if out is not None:
        steel = (backgrounds or [], mm)
        _make_folder(made_by, order, steel, n or DEFAULT_N, out, licence, only, as_json=as_json)
    elif into is not None and new_roll is not None:
        count = (n or DEFAULT_N) if per_m is None else per_m
        _make_roll(
            plant,
            made_by,
            order,
            (into, new_roll),
            count,
            licence,
            only,
            overwrite=overwrite,
            as_json=as_json,
        )


def _make_folder(
    made_by: "Generator",
    order: "Order",
    steel: "tuple[list[Path], PixelMm | None]",
    n: int,
    out: Path,
    licence: str,
    only: int | None,
    *,
    as_json: bool,
) -> None:
    from rollsight.jobs import console
    from rollsight.synth.backgrounds import open_backgrounds
    from rollsight.synth.compose import make_data, make_sample
    from rollsight.synth.data_card import made_by_masks
    from rollsight.synth.realism import sample_digest

    paths, mm = steel
    masks = None if only is None else made_by_masks(out)
    grounds = open_backgrounds(paths, made_by.card.data_classes, made_by.card.held_groups, mm, masks)
    if only is not None:
        known = _known_line(out, only)
        again = make_sample(made_by, grounds, order, only).provenance["sha256"]
        found = sample_digest(out, known["image"])
        _same_again("sample", only, again, known["sha256"], intact=found == again, as_json=as_json)
        return
    with console.count_progress(f"make {made_by.card.name}", "samples") as on_image:
        written, card = make_data(made_by, grounds, order, n, out, licence=licence, on_image=on_image)
    if as_json:
        console.emit({"data": str(out), "counts": written.counts, "card": card})
        return
    title = f"{out}: {card['samples']} samples, {card['marks']} defects of {made_by.card.defect_class}"
    console.show_table(title, ("attempts rejected", "n"), list(card["rejected"].items()))
    console.say(f"sizes in {card['sizes']}")


def _make_roll(
    plant: "Plant",
    made_by: "Generator",
    order: "Order",
    rolls: tuple[str, str],
    count: float,
    licence: str,
    only: int | None,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    """count: how many defects, or as a float how many per metre."""
    from rollsight.jobs import console
    from rollsight.synth.compose import Rejected
    from rollsight.synth.data_card import made_by_masks
    from rollsight.synth.new_defect import defects_per_m, open_field, remake_defect
    from rollsight.synth.planting import is_on, plant_roll

    into, new_roll = rolls
    path = plant.roll_path(new_roll)
    masks = None if only is None else made_by_masks(path)
    field = open_field(made_by, plant.roll(into), order, masks)
    n = count if isinstance(count, int) else defects_per_m(field.roll, count)
    if only is not None:
        known = _known_line(path, only, new_roll)
        intact = False
        try:
            made = remake_defect(field, only, known["attempt"])
            again, intact = made.provenance["sha256"], is_on(plant.roll(new_roll), field, made)
        except Rejected as reason:
            again = f"none ({reason})"
        _same_again("defect", only, again, known["sha256"], intact=intact, as_json=as_json)
        return
    strip = field.roll.strip
    with (
        console.count_progress(f"defects for {new_roll}", "defects") as on_defect,
        console.strip_progress(
            f"write {new_roll}",
            m_per_line=None if strip.mm_per_line is None else strip.mm_per_line / 1000,
            px_per_line=field.roll.width,
        ) as on_lines,
    ):
        card = plant_roll(
            field,
            path,
            n,
            licence=licence,
            overwrite=overwrite,
            on_defect=on_defect,
            on_lines=on_lines,
        )
    if as_json:
        console.emit({"roll_id": new_roll, "path": str(path), "card": card})
        return
    title = f"{path}: {field.roll.lines} lines of {into}, {n} new {made_by.card.defect_class}"
    console.show_table(title, ("attempts rejected", "n"), list(card["rejected"].items()))
    console.say(f"sizes in {card['sizes']}")


def _known_line(made: Path, index: int, roll: str | None = None) -> dict[str, Any]:
    """What the provenance of a folder or roll says of a sample; UserError where there is none such."""
    from rollsight.synth.data_card import open_provenance

    lines = open_provenance(made, "image" if roll is None else "roll")
    known = {line["index"]: line for line in lines if line.get("roll") == roll}
    if index not in known:
        raise UserError(f"--only {index}: {made} has 0 to {max(known, default=0)}", USAGE)
    return known[index]


def _same_again(what: str, index: int, again: str, known: str, *, intact: bool, as_json: bool) -> None:
    """Say that what was made again is what was made; UserError where it is not, or what lies there is not."""
    from rollsight.jobs import console

    if again != known:
        raise UserError(
            f"{what} {index} is another one: {again[:SHOWN]} instead of {known[:SHOWN]}: give the "
            "options, generator and steel that it was made with"
        )
    if not intact:
        raise UserError(
            f"{what} {index} was changed since it was made: its px are not those of its provenance"
        )
    if as_json:
        console.emit({"index": index, "sha256": again, "same": True})
    else:
        console.say(f"{what} {index}: the same bits again, {again[:SHOWN]}")
