"""`inspect weak`."""

from pathlib import Path
from typing import Annotated

import typer
from rollsight.inspect.errors import USAGE, UserError
from rollsight.jobs.commands.options import MAX_SEED, Json


def weak(
    data: Annotated[
        Path, typer.Argument(help="Folder with classes.json and manifest.csv; its `mask` may be empty.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder of labelled data to make, for `inspect train`.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 900,
    refine: Annotated[str, typer.Option(help="Edges of the pseudo-masks: crf, guided or none.")] = "crf",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of every random choice.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores.")] = None,
    as_json: Json = False,
) -> None:
    """Make masks from image labels: the manifest's `classes` says what an image holds, a mask may be missing.

    Images with a mask keep it and teach what a defect looks like. What is doubtful in a pseudo-mask is 255,
    ignored in training. Interrupted, the same command goes on.
    """
    import shutil

    import torch
    from rollsight.inspect.refine import REFINERS
    from rollsight.inspect.weak import learn, open_weak, write_pseudo
    from rollsight.jobs import console
    from rollsight.jobs.cluster import slots

    if refine not in ("none", *REFINERS):
        raise UserError(f"--refine {refine}: it is none, {' or '.join(REFINERS)}", USAGE)
    if out.exists():
        raise UserError(f"{out} is there already: give the name of a new folder", USAGE)
    torch.set_num_threads(threads or slots())
    found = open_weak(data)
    run = out.with_name(f".{out.name}.weak")
    with console.count_progress("learn from image labels", "steps") as on_step:
        net = learn(found.of_split("train"), run, steps=steps, seed=seed, on_step=on_step)
    with console.count_progress("write pseudo-masks", "images") as on_image:
        written = write_pseudo(
            net, found, out, f"{steps} steps, seed {seed}", refinement=refine, on_image=on_image
        )
    shutil.rmtree(run)
    if as_json:
        console.emit({"data": str(out), "counts": written.counts})
        return
    classes = list(dict.fromkeys(name for of_split in written.counts.values() for name in of_split))
    rows = [(split, *(of.get(name, 0) for name in classes)) for split, of in written.counts.items()]
    console.show_table(f"{out}: images that hold a class", ("split", *classes), rows)
