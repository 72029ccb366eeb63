"""`inspect compress`."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rollsight.inspect.errors import FAILED, USAGE, UserError
from rollsight.jobs.commands.options import MODEL, Home, Json


def compress(
    model: Annotated[str, typer.Argument(help=MODEL)],
    name: Annotated[str, typer.Argument(help="Name of the model to make.")],
    data: Annotated[
        list[Path],
        typer.Option(
            help="Labelled data with train, val and test; may be given several times: all of it is learned "
            "from, the first judges."
        ),
    ],
    int8: Annotated[bool, typer.Option("--int8", help="Put the graph into INT8.")] = False,
    prune: Annotated[
        float | None,
        typer.Option(help="Take this share of the channels off each layer (0 to 1), then fine-tune."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="False alarms per m2 that both models are judged at, all classes together; per Mpx where "
            "the data has no pixel size. Default: what MODEL's card says."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the fine-tuning. Default: 600.")] = None,
    engine: Annotated[str, typer.Option(help="What both are judged on: auto, onnx or openvino.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the fine-tuning. Default: all cores.")
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make a smaller or faster model of MODEL; one that loses more than one small defect is not kept."""
    if int8 == (prune is not None):
        raise UserError("give one of --int8 and --prune SHARE; INT8 comes last, of the pruned model", USAGE)
    if prune is not None and not 0 < prune < 1:
        raise UserError(f"--prune {prune:g}: a share of the channels is above 0 and below 1", USAGE)
    if budget is not None and not 0 < budget < math.inf:
        raise UserError(f"--budget {budget:g}: it must be a finite number above 0", USAGE)
    if int8 and steps is not None:
        raise UserError("--steps is for --prune: INT8 is calibrated, not trained", USAGE)

    import torch
    from rollsight.inspect.evaluate import m2_per_mpx
    from rollsight.inspect.labels import open_labels
    from rollsight.inspect.plant import open_plant
    from rollsight.jobs import console
    from rollsight.jobs.cluster import slots
    from rollsight.jobs.compress_job import FINE_TUNING_STEPS, compress_model, recipe_by_source

    plant, sources = open_plant(home), [open_labels(path) for path in data]
    original = plant.model(model)
    budget_per_mpx = original.card.budget
    if budget is not None:
        budget_per_mpx = budget * (m2_per_mpx(sources[0]) or 1.0)
    if budget_per_mpx is None:
        raise UserError(
            f"model {original.card.name} has no budget of false alarms on its card: "
            "give --budget, so that both models are judged alike",
            USAGE,
        )
    if prune is not None and (left_out := recipe_by_source(original, len(sources))[1]):
        console.note(
            f"the {' and '.join(left_out)} of {model}'s recipe are of another number of sources than the "
            f"{len(sources)} --data given: fine-tuned without"
        )
    torch.set_num_threads(threads or slots())
    with console.count_progress(f"compress {model}", "steps") as bar:
        made = compress_model(
            plant,
            original,
            name,
            sources,
            budget_per_mpx=budget_per_mpx,
            prune_share=prune,
            steps=steps or FINE_TUNING_STEPS,
            engine=engine,
            on_done=lambda what, done, total: bar(done, total),
        )
    about = made.about
    if as_json:
        path = None if made.model is None else str(made.model.folder)
        console.emit({"name": name, "path": path, **about})
    else:
        _tell(model, name, about)
    if made.model is None:
        raise UserError(
            f"{name} is not kept: it finds {about['lost_tiny_small']} tiny and small defects fewer than "
            f"{model}, one is allowed: "
            + ("keep fp32" if int8 else "take off a smaller share, or fine-tune for more --steps"),
            FAILED,
        )
    if not as_json:
        console.say(f"{made.model.folder}: {about['graph_bytes'][1] / 1e6:.2f} MB")


def _tell(model: str, name: str, about: dict[str, Any]) -> None:
    """The gate's table."""
    from rollsight.jobs import console

    rows = [
        (
            label,
            size / 1e6,
            f"{row['found_tiny_small']} of {row['n_tiny_small']}",
            *("-" if row[key] is None else row[key] for key in ("recall_h", "alarms_per_mpx", "miou")),
        )
        for label, size, row in zip(
            (model, name), about["graph_bytes"], (about["original"], about["compressed"]), strict=True
        )
    ]
    console.show_table(
        f"{about['judged_on']} test at {about['budget_per_mpx']:g} false alarms per Mpx, {about['engine']}",
        ("model", "MB", "tiny + small found", "recall", "alarms per Mpx", "mIoU"),
        rows,
    )
    span = about["recall_difference"]
    if span is not None and span["low"] is not None:
        console.say(
            f"recall of tiny and small, difference: 95 % interval {span['low']:+.3f} to {span['high']:+.3f}"
        )
    if about["not_judged"]:
        console.say(f"classes that the data does not label, so not judged: {', '.join(about['not_judged'])}")
