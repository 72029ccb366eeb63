"""`inspect train`."""

from pathlib import Path
from typing import Annotated

import typer
from rollsight.inspect.errors import USAGE, UserError
from rollsight.jobs.commands.options import MAX_SEED, Home, Json

NET, LOSS, CROPS, COURSE = "Net", "Loss", "Crops", "Course"  # panels of the help


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
    until: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of the steps that each --data is drawn in; synthetic data: 0.9. Default: 1."
        ),
    ] = None,
    net: Annotated[
        str, typer.Option(help="fcn, unet, unet_lite, deeplabv3plus, mobile or fast.", rich_help_panel=NET)
    ] = "unet_lite",
    attention: Annotated[str, typer.Option(help="none, se, eca or cbam.", rich_help_panel=NET)] = "cbam",
    init: Annotated[
        str | None,
        typer.Option(help="Model to begin from; its classes need not be the same.", rich_help_panel=NET),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Model to learn from as well (distillation), of any net.", rich_help_panel=NET),
    ] = None,
    frozen_norms: Annotated[
        bool,
        typer.Option("--frozen-norms", help="Keep the statistics of --init's norms.", rich_help_panel=NET),
    ] = False,
    loss: Annotated[
        str,
        typer.Option(
            help="dice_focal, dice, focal, tversky, lovasz, or boundary (added to dice_focal).",
            rich_help_panel=LOSS,
        ),
    ] = "dice_focal",
    focal_gamma: Annotated[
        float,
        typer.Option(min=0, help="How much easy pixels fade; 0 is cross-entropy.", rich_help_panel=LOSS),
    ] = 1.0,
    small_weight: Annotated[
        float, typer.Option(min=0, help="Weight of the small-object term.", rich_help_panel=LOSS)
    ] = 0.1,
    instance: Annotated[
        str,
        typer.Option(help="Loss by component that is added: none, blob or cc_dice.", rich_help_panel=LOSS),
    ] = "none",
    instance_weight: Annotated[
        float, typer.Option(min=0, help="Weight of the loss by component.", rich_help_panel=LOSS)
    ] = 0.5,
    deep_supervision: Annotated[
        bool,
        typer.Option("--deep-supervision", help="Judge coarser depths too (unet).", rich_help_panel=LOSS),
    ] = False,
    batch: Annotated[int, typer.Option(min=2, help="Crops per step.", rich_help_panel=CROPS)] = 16,
    crop_px: Annotated[
        int, typer.Option(min=64, help="Side of a crop, a multiple of 64 px.", rich_help_panel=CROPS)
    ] = 192,
    mosaic: Annotated[
        int, typer.Option(min=1, help="Crops along each side of a training canvas.", rich_help_panel=CROPS)
    ] = 2,
    clean_share: Annotated[
        float, typer.Option(help="Share of crops without a defect.", rich_help_panel=CROPS)
    ] = 0.0,
    small_crops: Annotated[
        float, typer.Option(help="Share of crops around a defect under 256 px.", rich_help_panel=CROPS)
    ] = 0.0,
    balanced: Annotated[
        float,
        typer.Option(help="Share of crops around a defect, every class alike.", rich_help_panel=CROPS),
    ] = 0.0,
    copy_paste: Annotated[
        float,
        typer.Option(help="Share of crops that get a defect of another one.", rich_help_panel=CROPS),
    ] = 0.0,
    warped: Annotated[
        float,
        typer.Option(
            help="Share of crops turned, scaled and shifted a little; half as many are bent.",
            rich_help_panel=CROPS,
        ),
    ] = 0.5,
    light_gradient: Annotated[
        float,
        typer.Option(help="Share of crops whose light falls off to one side.", rich_help_panel=CROPS),
    ] = 0.0,
    padded: Annotated[
        bool,
        typer.Option(
            "--padded",
            help="Let crops show the borders of images in their padding, as they are judged.",
            rich_help_panel=CROPS,
        ),
    ] = False,
    modality_dropout: Annotated[
        float,
        typer.Option(help="How often each lighting mode is left out of a step.", rich_help_panel=CROPS),
    ] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.", rich_help_panel=COURSE)] = 2000,
    learning_rate: Annotated[
        float, typer.Option(help="Its peak, after the warm-up.", rich_help_panel=COURSE)
    ] = 1e-3,
    fresh_rate: Annotated[
        float,
        typer.Option(
            help="That of layers that begin from nothing, relative to it; with --init none do.",
            rich_help_panel=COURSE,
        ),
    ] = 5.0,
    patience: Annotated[
        int,
        typer.Option(
            min=0,
            help="End after so many evaluations on val without a gain, and keep the best; 0: never.",
            rich_help_panel=COURSE,
        ),
    ] = 0,
    evaluate_every: Annotated[
        int,
        typer.Option(min=1, help="Steps between checkpoints and evaluations.", rich_help_panel=COURSE),
    ] = 100,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of every random choice.", rich_help_panel=COURSE)
    ] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. Default: all cores.", rich_help_panel=COURSE)
    ] = None,
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

    if frozen_norms and init is None:
        raise UserError("--frozen-norms needs --init: a new net's norms have no statistics to keep", USAGE)
    torch.set_num_threads(threads or slots())
    plant = open_plant(home)
    recipe = Recipe(
        net=net,
        attention=attention,
        steps=steps,
        batch=batch,
        crop_px=crop_px,
        mosaic=mosaic,
        learning_rate=learning_rate,
        fresh_rate=fresh_rate,
        loss=loss,
        focal_gamma=focal_gamma,
        small_weight=small_weight,
        instance=instance,
        instance_weight=instance_weight,
        deep_supervision=deep_supervision,
        clean_share=clean_share,
        small_crops=small_crops,
        balanced=balanced,
        copy_paste=copy_paste,
        warped=warped,
        light_gradient=light_gradient,
        padded=padded,
        modality_dropout=modality_dropout,
        patience=patience,
        evaluate_every=evaluate_every,
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
            until=until or (),
            notes=note or (),
            init=None if init is None else plant.model(init),
            teacher=None if teacher is None else plant.model(teacher),
            on_step=lambda step, _: on_done(step, steps),
        )
    if as_json:
        console.emit({"name": name, "path": str(model.folder), "card": model.card.model_dump(mode="json")})
        return
    for metric in model.card.metrics:
        rows = [(figure, *values) for figure, values in metric["figures"].items()]
        console.show_table(f"{metric['data']}, {metric['split']}", ("figure", "value", "low", "high"), rows)
    console.say(
        f"{model.folder}: classes {', '.join(model.card.classes)}; curves and worst images in training/"
    )
