"""A model in, a smaller or faster one out, if it still finds the small defects."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rollsight.inspect.compress import Gate, Judged, judge
from rollsight.inspect.engines import Engine, choose, open_engine
from rollsight.inspect.errors import CONFIG, USAGE, UserError
from rollsight.inspect.evaluate import card_metric
from rollsight.inspect.golden import GOLDEN, golden_windows, write_golden
from rollsight.inspect.labels import LabelledData, is_rolls
from rollsight.inspect.models import GRAPH, WEIGHTS, Model, save_model, sha256_of, update_card
from rollsight.inspect.plant import Plant
from rollsight.inspect.recipe import Recipe
from rollsight.inspect.train import model_classes, train
from rollsight.inspect.windows import cut_windows
from rollsight.jobs.train_job import describe_apart, describe_on_card, learned_from

FINE_TUNING_STEPS = 600
FINE_TUNING_RATE = 5e-4  # half of what a net begins with
BY_SOURCE = ("shares", "exhaustive", "until")  # of a card's recipe: one value for each source learned from

OnDone = Callable[[str, int, int | None], None]  # what is under way, done, total


@dataclass(frozen=True, slots=True)
class Compressed:
    """What came of it: the gate, and the model where it passed."""

    gate: Gate
    about: dict[str, Any]  # as on the card
    model: Model | None


def compress_model(
    plant: Plant,
    original: Model,
    name: str,
    data: Sequence[LabelledData],
    *,
    budget_per_mpx: float,
    prune_share: float | None = None,
    steps: int = FINE_TUNING_STEPS,
    engine: str = "auto",
    on_done: OnDone | None = None,
) -> Compressed:
    """Put `original` in INT8, or without `prune_share` of its channels, into the plant as `models/<name>`.

    All of `data` is learned from (train splits: calibration in INT8, fine-tuning after pruning). The first
    judges: both models' thresholds are fitted on its val split to the same budget, and a model that then
    loses more than one tiny or small defect of its test split is not kept. Interrupted, the same call goes on
    with the fine-tuning. Raises UserError for a name that is taken, data that does not suffice, rolls as the
    first, or a group of its test split that is learned from.
    """
    plant.check_new_model(name)
    if prune_share is not None and not find_spec("torch_pruning"):
        raise UserError("torch-pruning is not installed: pip install 'rollsight[compress]'", CONFIG)
    if original.card.precision == "int8":
        raise UserError(
            f"model {original.card.name} is INT8 already: compress the model that it was made from", USAGE
        )
    engine, device = choose(engine)
    if device != "cpu" or (prune_share is None and engine == "torch"):
        raise UserError("a compressed model is judged on the CPU: take --engine onnx or openvino", USAGE)
    if is_rolls(data[0]):
        raise UserError(
            f"{data[0].root}: rolls have no val and no test split: the first --data judges, give labelled "
            "images with train, val and test there (manifest.csv)",
            USAGE,
        )
    val, test = data[0].of_split("val"), data[0].of_split("test")
    learned = [source.of_split("train") for source in data]
    for source in learned:
        if seen := sorted({*test.groups()} & {*source.groups()}):
            raise UserError(
                f"{source.root}: {len(seen)} groups of its train split are in the test split of {test.root}, "
                f"which judges: {', '.join(seen[:10])}: leave them out of one of the two",
                USAGE,
            )
    told = on_done or (lambda what, done, total: None)

    def judged(model: Model, run: Engine) -> Judged:
        def on_image(done: int, total: int) -> None:
            told(f"judge {model.card.name}", done, total)

        return judge(model, run, val, test, budget_per_mpx, on_image)

    before = judged(original, open_engine(original, engine)[1])
    run = plant.models / f".{name}.compressing"
    run.mkdir(parents=True, exist_ok=True)
    if prune_share is None:
        made = int8_model(original, run / name, learned, told)
    else:
        made = _pruned(original, run / name, learned, prune_share, steps, told)
    try:
        gate = Gate(before, judged(made, open_engine(made, engine)[1]))
    except UserError:  # no threshold keeps the budget, say
        shutil.rmtree(run)
        raise
    about = made.card.compressed | {
        "parent": original.card.name,
        "parent_hash": original.hash,
        "graph_bytes": [model.graph.stat().st_size for model in (original, made)],
        "judged_on": data[0].root.name,
        "engine": engine,
        "not_judged": [name for name in made.card.classes if name not in data[0].classes],
        **gate.figures(),
    }
    if not gate.passed:
        shutil.rmtree(run)
        return Compressed(gate, about, None)
    fitted_on = describe_on_card(made.card, val, "val")
    update_card(
        made,
        **gate.compressed.fitted.card(fitted_on),
        metrics=[
            card_metric(fitted_on["source"], split, tally)
            for split, tally in (("val", gate.compressed.fitted.tally), ("test", gate.compressed.tally))
        ],
        compressed=about,
        notes=[*original.card.notes, _note(about)],
    )
    made.folder.rename(plant.models / name)
    shutil.rmtree(run)
    return Compressed(gate, about, plant.model(name))


def int8_model(original: Model, folder: Path, learned: Sequence[LabelledData], told: OnDone) -> Model:
    """The original with its graph in INT8; its weights stay fp32, for explanations and further training.

    Calibrated on windows of `learned`, written to `folder`, which is made; nobody has judged it yet.
    """
    from rollsight.inspect.engines import onnx_engine
    from rollsight.inspect.quantise import CALIBRATION_PX, CALIBRATION_WINDOWS, quantise

    windows = cut_windows(learned, CALIBRATION_WINDOWS, CALIBRATION_PX)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copyfile(original.folder / WEIGHTS, folder / WEIGHTS)
    in_fp32 = quantise(
        original.graph,
        folder / GRAPH,
        windows,
        on_window=lambda done, total: told(f"calibrate {original.card.name}", done, total),
    )
    model = update_card(
        Model(folder, original.card),
        name=folder.name,
        graph_sha256=sha256_of(folder / GRAPH),
        golden_sha256="",
        precision="int8",
        compressed={
            "method": "int8",
            "calibration_windows": len(windows),
            "convolutions_in_fp32": in_fp32,
        },
        **_made_now(),
    )
    # Of the maker's own engine: INT8 rounds, so the net's logits are not what another engine should give.
    write_golden(folder, golden_windows(learned), onnx_engine(model))
    return update_card(model, golden_sha256=sha256_of(folder / GOLDEN))


def _pruned(
    original: Model, folder: Path, learned: Sequence[LabelledData], share: float, steps: int, told: OnDone
) -> Model:
    """The original without that share of its channels, fine-tuned by its own recipe and taught by it."""
    from rollsight.inspect.prune import multiplications, prune, renew_norms
    from rollsight.inspect.quantise import CALIBRATION_PX, CALIBRATION_WINDOWS

    classes = model_classes(learned)
    if set(classes) != set(original.card.classes):
        raise UserError(
            f"the data labels {', '.join(classes)}; model {original.card.name} knows "
            f"{', '.join(original.card.classes)}: to fine-tune it give --data for each of its classes",
            USAGE,
        )
    whole = original.net()
    net = prune(whole, share)
    renew_norms(net, cut_windows(learned, CALIBRATION_WINDOWS, CALIBRATION_PX))
    recipe = _fine_tuning(original, share, steps)
    described = describe_apart(learned, "train")
    by_source = _in_order(recipe_by_source(original, len(learned))[0], original, described)
    trained = train(
        learned,
        folder.parent,
        recipe,
        shares=by_source.get("shares", ()),
        exhaustive=by_source.get("exhaustive", ()),
        until=by_source.get("until", ()),
        on_step=lambda step, _: told(f"fine-tune {folder.name}", step, steps),
        init=(net, original.card.classes),
        teacher=(whole, original.card.classes),
    )
    kept = ("net", "net_options", "thresholds_basis", "temperature")
    return save_model(
        folder,
        trained,
        {
            **{field: getattr(original.card, field) for field in kept},
            "name": folder.name,
            "classes": classes,
            "thresholds": {name: original.card.thresholds[name] for name in classes},
            "trained_on": learned_from(described, original),
            "recipe": {**asdict(recipe), **by_source},
            "compressed": {
                "method": "pruned",
                "share": share,
                "parameters": [sum(p.numel() for p in each.parameters()) for each in (whole, trained)],
                "multiplications_per_px": [round(multiplications(each)) for each in (whole, trained)],
            },
            **_made_now(),
        },
        golden_windows(learned),
    )


def _fine_tuning(original: Model, share: float, steps: int) -> Recipe:
    """The recipe that the original was trained by, shorter and slower, from its rest towards the whole."""
    known = {field.name for field in fields(Recipe)}
    recipe = Recipe(**{name: value for name, value in original.card.recipe.items() if name in known})
    return replace(
        recipe,
        net=original.card.net,
        attention=original.card.net_options.get("attention", recipe.attention),
        steps=steps,
        learning_rate=FINE_TUNING_RATE,
        patience=0,
        teacher=original.hash,
        init=f"{original.hash} without {share:g}",
    )


def recipe_by_source(original: Model, sources: int) -> tuple[dict[str, list[Any]], list[str]]:
    """What the original's recipe says of each source, as `train` takes it; and the names of what is left out.

    Left out is what was said of another number of sources than are learned from now.
    """
    recipe = original.card.recipe
    told = {name: recipe[name] for name in BY_SOURCE if isinstance(recipe.get(name), list)}
    fits = {name: values for name, values in told.items() if len(values) == sources}
    # Empty, or False for every source, is the default: nothing is lost.
    return fits, [name for name, values in told.items() if name not in fits and any(values)]


def _in_order(
    by_source: dict[str, list[Any]], original: Model, described: Sequence[dict[str, Any]]
) -> dict[str, list[Any]]:
    """The same for the sources as they stand now, where these are the original's own in another order."""
    known = [entry.get("digest") for entry in original.card.trained_on[: len(described)]]
    now = [entry["digest"] for entry in described]
    if len({*now}) < len(now) or {*known} != {*now}:
        return by_source
    return {name: [values[known.index(one)] for one in now] for name, values in by_source.items()}


def _made_now() -> dict[str, str]:
    return {
        "code_version": version("rollsight"),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _note(about: dict[str, Any]) -> str:
    how = "INT8" if about["method"] == "int8" else f"without {about['share']:.0%} of its channels"
    before, after = (about[key] for key in ("original", "compressed"))
    return (
        f"{about['parent']} {how}: finds {after['found_tiny_small']} of {after['n_tiny_small']} tiny and "
        f"small defects of {about['judged_on']} test, {about['parent']} {before['found_tiny_small']}, at the "
        "same budget of false alarms."
    )
