"""`inspect labels check`, `split`, `import`, `export` and `propose`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rollsight.inspect.errors import FAILED, PARTIAL, USAGE, UserError
from rollsight.jobs.commands.options import MAX_SEED, MODEL, Home, Json

app = typer.Typer(
    help="Check, split and propose labelled data; COCO and Labelme in and out.", no_args_is_help=True
)
Tool = Annotated[Literal["coco", "labelme"], typer.Option("--format", help="Whose files they are.")]
GroupBy = Annotated[
    str,
    typer.Option(
        help="Regular expression on an image's path: what its first bracket, or all of it, matches is the "
        "group. Default: as the file says, else the sub-folder, else the image."
    ),
]


@app.command()
def check(
    data: Annotated[list[Path], typer.Argument(help="Folders of labelled data, read as one body.")],
    as_json: Json = False,
) -> None:
    """Name every leak between splits and every broken mask; exit code 1 where there is one.

    A leak is the same steel in two groups of different splits: the same pixels, turned or flipped, or a
    near-duplicate. Between groups of one split it is told too, as what ought to be one group.
    """
    from dataclasses import asdict

    from rollsight.inspect.label_check import check_labels
    from rollsight.jobs import console

    with (
        console.count_progress("read", "images") as on_image,
        console.count_progress("compare", "pairs") as on_pair,
    ):
        found = check_labels(data, on_image, on_pair)
    if as_json:
        console.emit(asdict(found))
    else:
        classes = list(dict.fromkeys(name for of_split in found.counts.values() for name in of_split))
        rows = [
            (split, *(of_split.get(name, 0) for name in classes)) for split, of_split in found.counts.items()
        ]
        console.show_table(
            f"{found.images} images in {found.groups} groups: images that hold a class",
            ("split", *classes),
            rows,
        )
        for fault in found.faults:
            console.say(f"{fault.kind}: {fault.line}")
        for leak in found.leaks:
            console.say(f"leak: {leak.line()}")
        for leak in found.alike:
            console.say(f"alike: {leak.line()}")
    if found.faults or found.leaks:
        raise UserError(
            f"{len(found.faults)} faults and {len(found.leaks)} leaks between splits: mend them, "
            "or deal the groups anew with `inspect labels split`",
            FAILED,
        )
    if not as_json:
        console.say("no fault, and no leak between splits")


@app.command()
def split(
    data: Annotated[Path, typer.Argument(help="Folder of labelled data.")],
    shares: Annotated[str, typer.Option(help="Of train, val and test.")] = "0.7,0.15,0.15",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Another seed is another split.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the splits of a manifest.csv.")] = False,
    as_json: Json = False,
) -> None:
    """Deal the groups to train, val and test and write `manifest.csv`: no group is cut, classes are balanced.

    Groups that show the same steel are dealt as one.
    """
    from rollsight.inspect.label_check import check_labels
    from rollsight.inspect.split import write_split
    from rollsight.jobs import console

    try:
        wanted = [float(share) for share in shares.split(",")]
    except ValueError:
        raise UserError(f"--shares {shares}: it is three numbers such as 0.7,0.15,0.15", USAGE) from None
    with console.count_progress("read", "images") as on_image:
        checked = check_labels([data], on_image)
        counts = write_split(
            data, wanted, seed, leaks=(*checked.leaks, *checked.alike), overwrite=force, on_image=on_image
        )
    if as_json:
        console.emit({"manifest": str(data / "manifest.csv"), "counts": counts})
        return
    classes = list(dict.fromkeys(name for of_split in counts.values() for name in of_split))
    rows = [(name, *(of_split.get(of, 0) for of in classes)) for name, of_split in counts.items()]
    console.show_table(f"{data / 'manifest.csv'}: images that hold a class", ("split", *classes), rows)


@app.command("import")
def import_labels(
    source: Annotated[Path, typer.Argument(help="A JSON file, or a folder of them.")],
    tool: Tool,
    out: Annotated[Path, typer.Option(help="New folder of labelled data.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images. Default: where the files say.")
    ] = None,
    classes: Annotated[
        str,
        typer.Option(
            help="Class names by mask value from 1, with commas; other labels are refused. Default: COCO's "
            "categories by id; Labelme's labels.txt, else its labels in alphabetical order."
        ),
    ] = "",
    group_by: GroupBy = "",
    line_px: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Width of a Labelme line, which its file does not hold. Default: 10, as Labelme takes.",
        ),
    ] = None,
    untouched: Annotated[
        bool, typer.Option("--untouched", help="Take proposals too that nobody reviewed or changed.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a folder of labelled data of COCO or Labelme files: images, masks, classes and manifest.

    The later of two shapes that overlap wins. Every broken file is named, and then nothing is written.
    """
    from rollsight.inspect.coco import read_coco
    from rollsight.inspect.labelled_folder import write_labels
    from rollsight.inspect.labelme import LINE_PX, read_labelme
    from rollsight.jobs import console

    names = [name.strip() for name in classes.split(",")] if classes else []
    if tool == "coco":
        incoming = read_coco(source, images=images, classes=names, group_by=group_by)
    else:
        incoming = read_labelme(
            source, images=images, classes=names, group_by=group_by, line_px=line_px or LINE_PX
        )
    with console.count_progress("import", "images") as on_image:
        written = write_labels(
            out,
            incoming,
            untouched=untouched,
            on_fault=lambda kind, line: console.error(UserError(f"{kind}: {line}")),
            on_image=on_image,
        )
    if as_json:
        console.emit(
            {
                "data": str(out),
                "classes": list(incoming.classes),
                "counts": written.counts,
                "left_out": written.left_out,
            }
        )
        return
    held = list(dict.fromkeys(name for of_split in written.counts.values() for name in of_split))
    rows = [(name, *(of_split.get(of, 0) for of in held)) for name, of_split in written.counts.items()]
    console.show_table(f"{out}: images that hold a class", ("split", *held), rows)
    if written.left_out:
        console.say(
            f"left out: {written.left_out} proposals that nobody reviewed or changed (--untouched takes them)"
        )


@app.command()
def export(
    data: Annotated[Path, typer.Argument(help="Folder of labelled data.")],
    tool: Tool,
    out: Annotated[Path, typer.Option(help="New folder for the files and copies of the images.")],
    as_json: Json = False,
) -> None:
    """Write labelled data as COCO files (run lengths) or Labelme files (mask shapes): no pixel is lost."""
    from rollsight.inspect.coco import write_coco
    from rollsight.inspect.labelme import write_labelme
    from rollsight.inspect.labels import open_labels
    from rollsight.jobs import console

    write = write_coco if tool == "coco" else write_labelme
    with console.count_progress("export", "images") as on_image:
        count = write(open_labels(data), out, on_image)
    if as_json:
        console.emit({"out": str(out), "format": tool, "images": count})
    else:
        console.say(f"{out}: {count} images as {tool}")


@app.command()
def propose(
    model: Annotated[str, typer.Argument(help=MODEL)],
    images: Annotated[Path, typer.Option(help="Folder of images to label.")],
    out: Annotated[Path, typer.Option(help="New folder for the Labelme files and copies of the images.")],
    refine: Annotated[str, typer.Option(help="Edges of large defects: none, guided or crf.")] = "none",
    classes: Annotated[
        str,
        typer.Option(help="Those to propose, with commas; the model's others are background. Default: all."),
    ] = "",
    group_by: GroupBy = "",
    engine: Annotated[str, typer.Option(help="auto, onnx, openvino or torch.")] = "auto",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Let MODEL propose labels as Labelme files, the most doubtful first.

    Correct them with `labelme OUT --labels OUT/labels.txt`, set the flag `reviewed`, and take them in with
    `inspect labels import OUT --format labelme`.
    """
    from rollsight.inspect.engines import open_engine
    from rollsight.inspect.plant import open_plant
    from rollsight.inspect.proposals import RANKING
    from rollsight.inspect.proposals import propose as propose_labels
    from rollsight.jobs import console

    file = open_plant(home).model(model)
    left_out: list[str] = []

    def on_fault(kind: str, line: str) -> None:
        left_out.append(line)
        console.error(UserError(f"{kind}: {line}"))

    with console.count_progress("propose", "images") as on_image:
        ranked = propose_labels(
            file,
            open_engine(file, engine),
            images,
            out,
            classes=[name.strip() for name in classes.split(",")] if classes else [],
            refine=refine,
            group_by=group_by,
            on_fault=on_fault,
            on_image=on_image,
        )
    if as_json:
        console.emit(
            {
                "out": str(out),
                "ranking": str(out / RANKING),
                "images": len(ranked),
                "components": sum(entry.components for entry in ranked),
                "left_out": len(left_out),
            }
        )
    else:
        rows = [(r.file, r.image, r.uncertainty, r.components) for r in ranked[:10]]
        console.show_table(
            f"{out / RANKING}: the most doubtful of {len(ranked)} images",
            ("file", "image", "doubt in bits", "components"),
            rows,
        )
    if left_out:
        raise UserError(f"{len(left_out)} images could not be read: the rest is in {out}", PARTIAL)
