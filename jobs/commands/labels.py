"""`inspect labels check` and `inspect labels split`."""

from pathlib import Path
from typing import Annotated

import typer
from rollsight.inspect.errors import FAILED, USAGE, UserError
from rollsight.jobs.commands.options import Json

app = typer.Typer(help="Check and split labelled data.", no_args_is_help=True)


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
    seed: Annotated[int, typer.Option(help="Another seed is another split.")] = 0,
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
