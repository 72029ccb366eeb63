"""`inspect evaluate`, `compare` and `calibrate`."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rollsight.inspect.errors import USAGE, UserError
from rollsight.jobs.commands.options import MODEL, Home, Json

if TYPE_CHECKING:
    from rollsight.inspect.labels import LabelledData

Data = Annotated[Path | None, typer.Option(help="Labelled data or labelled roll. Default: $ROLLSIGHT_DATA.")]
EngineName = Annotated[str, typer.Option("--engine", help="auto, onnx, openvino or torch.")]
EVALUATIONS = "evaluations"  # folder of pages and plots, among the runs


def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL)] = "default",
    data: Data = None,
    split: Annotated[str, typer.Option(help="Split to evaluate.")] = "test",
    engine: EngineName = "auto",
    page: Annotated[
        Path | None, typer.Option(help="Where the page goes. Default: runs/evaluations/ in the plant folder.")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the figures on the model's card.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Tell how a model does on labelled data, with intervals over groups, and write a page of it."""
    from rollsight.inspect.engines import open_engine
    from rollsight.inspect.evaluate import examine, examined
    from rollsight.inspect.models import is_shipped
    from rollsight.inspect.plant import open_plant
    from rollsight.inspect.report.evaluation import write_evaluation
    from rollsight.jobs import console
    from rollsight.jobs.train_job import add_to_card

    chosen, plant = _open_data(data, split), open_plant(home)
    file = plant.model(model)
    if card and is_shipped(file):
        raise UserError(
            f"--card: the card of {file.card.name} belongs to the package; evaluate a model of the plant",
            USAGE,
        )
    source = chosen.root.name.removesuffix(".zarr")
    page = page or plant.home / "runs" / EVALUATIONS / f"{file.card.name}-{source}-{split}.html"
    with console.count_progress(f"evaluate {model}", "images") as on_done:
        told = examine(file, open_engine(file, engine)[1], chosen, on_image=on_done)
    figures = examined(file, chosen, told)
    write_evaluation(page, file, source, split, figures, told)
    if card:
        add_to_card(file, chosen, split, told.tally)
    if as_json:
        console.emit(figures | {"page": str(page)})
    else:
        _tell_figures(f"{file.card.name} on {source} {split}: {figures['n_images']} images", figures)
        console.say(f"page: {page}")


def compare(
    models: Annotated[list[str], typer.Argument(help="Two models or more: names, paths, or `default`.")],
    data: Data = None,
    split: Annotated[str, typer.Option(help="Split to compare them on.")] = "test",
    engine: EngineName = "auto",
    plot: Annotated[
        Path | None, typer.Option(help="Where the PNG goes. Default: runs/evaluations/ in the plant folder.")
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Compare models with the first one on the same images: differences paired by group, shown or not."""
    from rollsight.inspect.compare import TITLES, draw, in_words
    from rollsight.inspect.compare import compare as against_first
    from rollsight.inspect.engines import open_engine
    from rollsight.inspect.evaluate import evaluate as count
    from rollsight.inspect.plant import open_plant
    from rollsight.jobs import console

    if len(models) < 2 or len(set(models)) < len(models):
        raise UserError(f"compare {' '.join(models)}: give two or more different models", USAGE)
    chosen, plant = _open_data(data, split), open_plant(home)
    files = {name: plant.model(name) for name in models}
    tallies = {}
    for name, file in files.items():
        with console.count_progress(f"evaluate {name}", "images") as on_done:
            tallies[name] = count(file, open_engine(file, engine)[1], chosen, on_image=on_done)
    told = against_first(tallies)
    source = chosen.root.name.removesuffix(".zarr")
    title = f"{source} {split}, {len(chosen.samples)} images: difference to {models[0]}, 95 % interval"
    names = "-".join(file.card.name for file in files.values())
    plot = plot or plant.home / "runs" / EVALUATIONS / f"compare-{names[:80]}-{source}-{split}.png"
    draw(told, title, plot)
    words = [in_words(difference) for difference in told["differences"]]
    budgets = {name: file.card.budget for name, file in files.items()}
    if as_json:
        about = {"data": source, "split": split, "n_images": len(chosen.samples)}
        console.emit(about | told | {"budgets": budgets, "words": words, "plot": str(plot)})
        return
    rows = [(row["name"], *(_span(row[key]) for key in TITLES)) for row in told["models"]]
    console.show_table(f"{source} {split}: {len(chosen.samples)} images", ("model", *TITLES.values()), rows)
    rows = [
        (row["name"], *(f"{_span(row[key], sign='+')} {row[key]['says']}" for key in TITLES))
        for row in told["differences"]
    ]
    console.show_table(f"Difference to {models[0]}", ("model", *TITLES.values()), rows)
    for line in words:
        console.say(line)
    if len(set(budgets.values())) > 1:
        said = (f"{name} {'none' if b is None else f'{b:g} per Mpx'}" for name, b in budgets.items())
        console.say(f"Their thresholds were fitted to different false-alarm budgets: {', '.join(said)}")
    console.say(f"plot: {plot}")


def calibrate(
    model: Annotated[str, typer.Argument(help="Model name in the plant, or a path.")],
    data: Data = None,
    split: Annotated[str, typer.Option(help="Split to fit on; never test.")] = "val",
    budget: Annotated[
        float | None,
        typer.Option(
            help="False alarms per m2 that are allowed, all classes together; per Mpx where the data has no "
            "pixel size. Default: what the card says, else no more than now."
        ),
    ] = None,
    engine: EngineName = "auto",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Fit a model's thresholds to a false-alarm budget, calibrate its probabilities, and keep both in it."""
    from rollsight.inspect.calibrate import fit_thresholds
    from rollsight.inspect.engines import open_engine
    from rollsight.inspect.evaluate import card_metric, m2_per_mpx
    from rollsight.inspect.models import decides, is_shipped, update_card
    from rollsight.inspect.plant import open_plant
    from rollsight.inspect.promoted import read_pointer
    from rollsight.jobs import console
    from rollsight.jobs.train_job import describe_on_card

    if split == "test":
        raise UserError("--split test: what is fitted on it cannot be tested on it; use val", USAGE)
    if budget is not None and not 0 < budget < math.inf:
        raise UserError(f"--budget {budget:g}: it must be a finite number above 0", USAGE)
    plant = open_plant(home)
    file = plant.model(model)
    if is_shipped(file):
        raise UserError(
            f"calibrate {model}: the card of {file.card.name} belongs to the package; "
            f"copy its folder into {plant.models} first",
            USAGE,
        )
    chosen = _open_data(data, split)
    scale = m2_per_mpx(chosen)
    with console.count_progress(f"calibrate {model}", "images") as on_done:
        fitted = fit_thresholds(
            file,
            open_engine(file, engine)[1],
            chosen,
            budget_per_mpx=None if budget is None else budget * (scale or 1.0),
            on_image=on_done,
        )
    about = describe_on_card(file.card, chosen, split)
    fields = fitted.card(about)
    stale = [
        f"{m['data']} {m['split']}"
        for m in file.card.metrics
        if (m["data"], m["split"]) != (about["source"], split)
    ]
    fields["metrics"] = [card_metric(about["source"], split, fitted.tally)]
    changed = update_card(file, **fields)
    step = read_pointer(plant.models).now
    if (
        step is not None
        and step.model is not None
        and file.folder.resolve() == (plant.models / step.model).resolve()
        and step.decides != decides(changed.card)
    ):
        console.note(
            f"{step.model} is the default and was promoted with other thresholds: as `default` nothing opens "
            f"it until `inspect models promote {step.model}`; where a gate has no_worse that needs a default "
            "to compare with: `inspect models rollback` first"
        )
    if as_json:
        console.emit({"name": file.card.name, "path": str(file.folder), **fields, "taken_off_card": stale})
        return
    rows = [
        (name, file.card.thresholds[name], new, "fitted" if name in chosen.classes else "kept")
        for name, new in changed.card.thresholds.items()
    ]
    console.show_table(f"Thresholds of {file.card.name}", ("class", "before", "now", ""), rows)
    console.say(fitted.basis)
    before, after = fitted.ece
    console.say(
        f"temperature {fitted.temperature:.2f}: calibration error {before:.4f} before, {after:.4f} now"
    )
    if leaked := sorted(file.card.groups() & set(chosen.groups())):
        console.say(f"groups it was trained on, so both are too hopeful: {', '.join(leaked[:10])}")
    if stale:
        console.say(
            f"taken off the card, as made with other thresholds: {', '.join(stale)}; "
            "`inspect evaluate --card` puts them back"
        )


def _open_data(data: Path | None, split: str) -> "LabelledData":
    from rollsight.inspect.labels import open_labels

    root = data or (Path(os.environ["ROLLSIGHT_DATA"]) if os.environ.get("ROLLSIGHT_DATA") else None)
    if root is None:
        raise UserError("no data given: use --data DIR or set ROLLSIGHT_DATA", USAGE)
    return open_labels(root).of_split(split)


def _span(figure: dict[str, float | None], sign: str = "") -> str:
    """A figure with its interval."""
    value, low, high = (figure[key] for key in ("value", "low", "high"))
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" + ("" if low is None else f" ({low:{sign}.3f} to {high:{sign}.3f})")


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
    per_m2 = "" if alarms["per_m2"] is None else f", {alarms['per_m2']:.2f} per m2"
    per_mpx = "-" if alarms["per_mpx"] is None else f"{alarms['per_mpx']:.2f}"
    console.say(f"false alarms {per_mpx} per Mpx{per_m2}; thresholds {figures['thresholds']}")
    for name, value in (
        ("boundary F1 at 2 px", pixel["mean_boundary_f1"]),
        ("area under PRO to 5 % FPR", figures["aupro"]["value"]),
        ("mean recall of FROC", figures["froc"]["score"]),
        ("calibration error", figures["calibration"]["ece"]),
    ):
        console.say(f"{name}: {'-' if value is None else f'{value:.3f}'}")
    for name, key in (
        ("classes the model does not know", "unknown_classes"),
        ("groups it was trained on", "groups_trained_on"),
    ):
        if figures[key]:
            console.say(f"{name}: {', '.join(figures[key][:10])}")
