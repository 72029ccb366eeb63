"""`inspect models`, `train` and `evaluate`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rollsight.inspect.errors import USAGE, UserError
from rollsight.jobs.commands.options import Home, Json


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
    crop_px: Annotated[int, typer.Option(min=64, help="Side of a crop, a multiple of 64 px.")] = 192,
    mosaic: Annotated[int, typer.Option(min=1, help="Crops along each side of a training canvas.")] = 2,
    learning_rate: Annotated[float, typer.Option(help="Its peak, after the warm-up.")] = 1e-3,
    init: Annotated[
        str | None, typer.Option(help="Model to begin from; its classes need not be the same.")
    ] = None,
    attention: Annotated[str, typer.Option(help="cbam or none.")] = "cbam",
    focal_gamma: Annotated[
        float, typer.Option(min=0, help="How much easy pixels fade; 0 is cross-entropy.")
    ] = 1.0,
    small_weight: Annotated[float, typer.Option(min=0, help="Weight of the small-object term.")] = 0.1,
    frozen_norms: Annotated[
        bool, typer.Option("--frozen-norms", help="Keep the statistics of --init's norms.")
    ] = False,
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
    if frozen_norms and init is None:
        raise UserError("--frozen-norms needs --init: a new net's norms have no statistics to keep", USAGE)
    torch.set_num_threads(threads or slots())
    plant = open_plant(home)
    recipe = Recipe(
        steps=steps,
        batch=batch,
        crop_px=crop_px,
        mosaic=mosaic,
        learning_rate=learning_rate,
        attention=attention,
        focal_gamma=focal_gamma,
        small_weight=small_weight,
        frozen_norms=frozen_norms,
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
