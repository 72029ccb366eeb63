"""`inspect synth fit`, `generic`, `make`, `check` and `prove`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rollsight.inspect.errors import USAGE, UserError
from rollsight.jobs.commands.options import MAX_SEED, Home, Json, MmPerLine, MmPerPxX, Steel
from rollsight.jobs.commands.synth_make import make

if TYPE_CHECKING:
    from rollsight.synth.fit_recipe import FitRecipe

app = typer.Typer(help="Make labelled defects of a class that is too rare to learn.", no_args_is_help=True)

DefectClass = Annotated[str, typer.Argument(metavar="CLASS", help="Name of the rare class.")]
Labels = Annotated[Path, typer.Option(help="Labelled data that holds the class; its train split is used.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores.")]


@app.command()
def fit(
    defect_class: DefectClass,
    labels: Labels,
    backgrounds: Steel = None,
    name: Annotated[str | None, typer.Option(help="Name of the generator. Default: the class.")] = None,
    preset: Annotated[
        str, typer.Option(help="cpu-64, gpu-128 or gpu-256: patch, nets and steps.")
    ] = "cpu-64",
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps. Default: the preset's, or 500 from the generic generator."),
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Learn from this class only; others help by default.")
    ] = False,
    init: Annotated[
        str | None,
        typer.Option(help="Generator to begin from, of the same preset; default: the one in the package."),
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Do not begin from the generic one, however few there are.")
    ] = False,
    outline_steps: Annotated[
        int,
        typer.Option(min=0, help="Steps of the mask GAN, from 50 marks on; 0: the bank's outlines only."),
    ] = 600,
    whole: Annotated[
        bool, typer.Option("--whole", help="A rival: make whole patches instead of editing clean steel.")
    ] = False,
    free: Annotated[
        bool,
        typer.Option(
            "--free", help="Give the editor half of the defects without their texture: it makes one."
        ),
    ] = False,
    per_pixel: Annotated[
        bool,
        typer.Option("--per-pixel", help="A discriminator that judges each px, not a patch as a whole."),
    ] = False,
    contrast_weight: Annotated[
        float, typer.Option(min=0, help="Weight of the contrast-keeping loss; 0 also lifts its limit.")
    ] = 5.0,
    mm_per_px_x: MmPerPxX = None,
    mm_per_line: MmPerLine = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of every random choice.")] = 0,
    threads: Threads = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Fit a generator of CLASS: an editor that makes a pasted defect belong on the steel it was put on.

    Interrupted, the same command goes on, with the same bits in the end.
    """
    from dataclasses import replace

    import torch
    from rollsight.inspect.labels import open_labels
    from rollsight.inspect.plant import open_plant
    from rollsight.jobs import console
    from rollsight.jobs.cluster import slots
    from rollsight.synth.backgrounds import open_backgrounds
    from rollsight.synth.fit_recipe import FINE_TUNING_STEPS, FREE, PRESETS
    from rollsight.synth.fitting import fit_data, fit_generator
    from rollsight.synth.generator import Generator
    from rollsight.synth.generic import SHIPPED, Generic, open_generic, open_start, shipped, suits
    from rollsight.synth.mask_gan import FEWEST, OutlineRecipe
    from rollsight.synth.patches import pixel_mm

    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: it must be one of {', '.join(PRESETS)}", USAGE)
    if init is not None and from_scratch:
        raise UserError("--from-scratch and --init contradict each other: give one of them", USAGE)
    torch.set_num_threads(threads or slots())
    plant = open_plant(home)
    try:
        folder = plant.generator_path(name or defect_class)
    except UserError as fault:
        raise UserError(f"{fault}: give the generator another --name", USAGE) from None
    recipe = replace(
        PRESETS[preset], whole=whole, per_pixel=per_pixel, contrast_weight=contrast_weight, seed=seed
    )
    if free:
        recipe = replace(recipe, degraded=FREE["degraded"], residual_weight=FREE["residual_weight"])
    mm = pixel_mm(mm_per_px_x, mm_per_line)
    common = None if from_scratch else shipped()
    begun: Generator | Generic | None = None
    if init is not None:
        begun = open_generic(SHIPPED) if init == "default" else open_start(plant.generator_path(init))
    found = fit_data(
        open_labels(labels),
        defect_class,
        alone=alone,
        begun=begun is not None,
        generic=common is not None and suits(common, recipe),
        mm=mm,
    )
    if found.note:
        console.note(found.note)
    if outline_steps and found.components < FEWEST:
        console.note(
            f"{found.components} marks, a mask GAN is fitted from {FEWEST} on: outlines of the bank only"
        )
    if found.from_generic:
        begun = common
    if isinstance(begun, Generic):
        recipe = replace(recipe, steps=FINE_TUNING_STEPS)
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    steel = (
        open_backgrounds(backgrounds, found.data.classes, found.held).clean_scenes() if backgrounds else []
    )
    with console.count_progress(f"fit {name or defect_class}", "steps") as on_done:

        def outlined(step: int, figures: dict[str, float]) -> None:
            if step % 100 == 0 or step == outline_steps:
                told = ", ".join(f"{n} {value:.3f}" for n, value in figures.items())
                console.note(f"outlines, step {step} of {outline_steps}: {told}")

        generator = fit_generator(
            found,
            folder,
            recipe,
            backgrounds=steel,
            init=begun,
            outlines=OutlineRecipe(steps=outline_steps, seed=seed),
            on_step=_told(recipe, on_done),
            on_outline=outlined,
        )
    assert generator is not None  # it was not stopped
    card = generator.card
    if as_json:
        told = card.model_dump(mode="json")
        console.emit({"name": card.name, "path": str(generator.folder), "hash": generator.hash, "card": told})
        return
    rows = [(figure, value) for figure, value in card.fit.items()]
    if "made" in card.outlines:
        rows.append(("outlines refused, share", card.outlines["refused"]))
        rows += [
            (f"IoU with the nearest learned outline, {of}", card.outlines[of]["nearest"])
            for of in ("made", "held")
        ]
    console.show_table(
        f"{card.name}: {card.components} components in {card.scenes} scenes, {recipe.steps} steps",
        ("at the end", "value"),
        rows,
    )
    console.say(f"{generator.folder}: look at fitting/samples-*.png")


def _told(
    recipe: "FitRecipe", on_done: Callable[[int, int], None]
) -> Callable[[int, dict[str, float]], None]:
    """What a fit calls after each step: the bar goes on, and each checkpoint is a line."""
    from rollsight.jobs import console

    at = 0

    def tell(step: int, figures: dict[str, float]) -> None:
        nonlocal at
        if step > at + 1:
            console.note(f"goes on after step {step - 1} of {recipe.steps}")
        at = step
        on_done(step, recipe.steps)
        if step % recipe.checkpoint_every == 0:
            names = ("d_loss", "g_loss", "gap", "overfit", "gamma")
            console.note(f"step {step}: " + ", ".join(f"{n} {figures[n]:.3f}" for n in names))

    return tell


@app.command()
def generic(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new generic generator.")],
    labels: Annotated[list[Path], typer.Option(help="Labelled data with many defects; may be repeated.")],
    preset: Annotated[
        str, typer.Option(help="cpu-64, gpu-128 or gpu-256: patch, nets and steps.")
    ] = "cpu-64",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps. Default: the preset's.")] = None,
    notes: Annotated[
        list[str] | None, typer.Option("--note", help="A sentence for the card, such as a licence.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of every random choice.")] = 0,
    threads: Threads = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Fit a generator of all classes alike, without marks, for `inspect synth fit --init` to begin from.

    Interrupted, the same command goes on, with the same bits in the end.
    """
    from dataclasses import replace

    import torch
    from rollsight.inspect.labels import open_labels
    from rollsight.inspect.plant import open_plant
    from rollsight.jobs import console
    from rollsight.jobs.cluster import slots
    from rollsight.synth.fit_recipe import PRESETS
    from rollsight.synth.generator import unfinished
    from rollsight.synth.generic import fit_generic, generic_data, save_generic

    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: it must be one of {', '.join(PRESETS)}", USAGE)
    torch.set_num_threads(threads or slots())
    recipe = replace(PRESETS[preset], seed=seed)
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    folder = open_plant(home).generator_path(name)
    if folder.exists():
        raise UserError(f"{folder} is there already: choose another NAME", USAGE)
    found = generic_data([open_labels(path) for path in labels], recipe.size_px)
    for left_out, why in found.left_out.items():
        console.note(f"class {left_out!r} is not learned: {why}")
    run = unfinished(folder)
    with console.count_progress(f"fit {name}", "steps") as on_done:
        adversary = fit_generic(found, run, recipe, on_step=_told(recipe, on_done))
    made = save_generic(
        folder, found, adversary, run, notes or (), on_class=lambda of: console.note(f"checked: {of}")
    )
    if as_json:
        told = made.card.model_dump(mode="json")
        console.emit({"name": made.card.name, "path": str(folder), "hash": made.hash, "card": told})
        return
    rows = [
        (one["source"], one["class"], *(one[n]["mean"] for n in ("made", "paste", "floor", "ceiling")))
        for one in made.card.checks
    ]
    console.show_table(
        f"{name}: {len(made.card.classes)} classes, {recipe.steps} steps; KID to held-out defects",
        ("data", "class", "made", "paste", "floor", "ceiling"),
        [tuple("-" if value is None else value for value in row) for row in rows],
    )
    console.say(f"{folder}: look at fitting/samples-*.png")


app.command()(make)


@app.command()
def check(
    made: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `inspect synth make` wrote.")],
    labels: Annotated[Path, typer.Option(help="The labelled data that its defects come from.")],
    steps: Annotated[
        int,
        typer.Option(min=0, help="Steps of the net two cross-fitted segmenters begin from; 0: without them."),
    ] = 1200,
    keep: Annotated[
        Path | None, typer.Option(help="New folder for the samples that the check does not drop.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="The page. Default: DIR.check.html.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of every random choice.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Look for labels that do not hold, for copies and for sameness in DIR; writes a page with a blind test.

    The segmenters are cross-fitted: each sample is judged by one that never saw the defects it is made of.
    """
    import os
    import tempfile

    import torch
    from rollsight.inspect.labels import open_labels
    from rollsight.jobs import console
    from rollsight.jobs.cluster import slots
    from rollsight.synth.check_page import told, write_page
    from rollsight.synth.data_card import checked_card, open_provenance
    from rollsight.synth.realism import check_set, write_kept

    if keep is not None and keep.exists():
        raise UserError(f"{keep} is there already: give the name of a new folder", USAGE)
    folder = made.resolve()  # "." has no name
    page = page or folder.with_name(f"{folder.name}.check.html")
    for option, path in (("--page", page), ("--keep", keep)):  # said before the segmenters are trained
        if path is None:
            continue
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if path.is_dir() or not (above.is_dir() and os.access(above, os.W_OK)):
            raise UserError(f"{option} {path}: it cannot be written there: give a place of yours", USAGE)
    checked_card(made, open_provenance(made), {})
    page.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads or slots())
    with (
        tempfile.TemporaryDirectory() as run,
        console.count_progress("cross-fitted segmenters", "steps") as on_step,
    ):
        found = check_set(made, open_labels(labels), Path(run), steps=steps, seed=seed, on_step=on_step)
    write_page(page, found, f"Check of {folder.name}", seed)
    kept = write_kept(made, found, keep) if keep is not None else None
    if as_json:
        console.emit({**found.figures, "page": str(page), "written": kept})
        return
    console.show_table(f"{made}", ("figure", "value"), told(found.figures))
    console.say(f"page: {page}")


@app.command()
def prove(
    defect_class: DefectClass,
    labels: Labels,
    out: Annotated[Path, typer.Option(help="Folder for one JSON per run, and summary.json.")],
    k: Annotated[
        int, typer.Option(min=0, help="Scenes of the class in a draw; 0: all there are, with --draws 1.")
    ] = 10,
    draws: Annotated[int, typer.Option(min=1, help="Draws of these scenes; 3 or more give intervals.")] = 4,
    fits: Annotated[
        int,
        typer.Option(min=1, help="Fits of each draw's generator; with 2 the interval covers their chance."),
    ] = 1,
    arms: Annotated[
        str,
        typer.Option(
            help="Of real, paste, poisson, gan, both, whole, no_contrast, free, degraded, paste_hard, "
            "free_hard, pixel, paste_varied, gan_varied."
        ),
    ] = "real,paste,poisson,gan,both",
    ratio: Annotated[
        float | None,
        typer.Option(help="Synthetic crops per real one. Default: the best of 0.2, 0.5 and 1 on val."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each arm.")] = 600,
    base_steps: Annotated[int, typer.Option(min=1, help="Steps of the net all arms begin from.")] = 4000,
    fit_steps: Annotated[int, typer.Option(min=1, help="Steps of each draw's generator.")] = 500,
    generic_steps: Annotated[
        int, typer.Option(min=1, help="Steps of the generator of the other classes that it begins from.")
    ] = 1500,
    samples: Annotated[int, typer.Option(min=1, help="Of each synthetic set.")] = 480,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show whether synthetic defects of CLASS help, on real held-out images, or that nothing is shown.

    Every arm begins from one net that never saw the class, takes equal steps and has all real crops. Draws
    are paired. Interrupted, the same command goes on with the runs that are missing.
    """
    from dataclasses import replace

    import torch
    from rollsight.inspect.labels import open_labels
    from rollsight.jobs import console
    from rollsight.jobs.cluster import slots
    from rollsight.synth.arms import ARMS, RATIO, WITHOUT_GAN, needs_generator
    from rollsight.synth.draws import rarity
    from rollsight.synth.lift import over_real, summary
    from rollsight.synth.proof import Plan, Proof, write_summary

    torch.set_num_threads(threads or slots())
    names = tuple(name.strip() for name in arms.split(","))
    plan = Plan(
        k=k or None,
        draws=tuple(range(draws)),
        arms=names,
        gan_seeds=dict.fromkeys(range(draws), fits),
        refitted=tuple(name for name in names if needs_generator(name)),
        ratio=RATIO if ratio is None else ratio,
        steps=steps,
        base_steps=base_steps,
        fit_steps=fit_steps,
        generic_steps=generic_steps,
        samples=samples,
    )
    proof = Proof(rarity(open_labels(labels), defect_class), plan, out / "work", out / "runs")
    proof.check("test")  # all that is missing is said before hours of work
    added = any(ARMS[arm] for arm in plan.arms)
    if ratio is None and added:
        if not any(sample.split == "val" for sample in proof.found.data.samples):
            raise UserError(f"{labels}: no val split to choose the ratio on: give --ratio", USAGE)
        proof.check("val")
    (out / "runs").mkdir(parents=True, exist_ok=True)
    total = sum(1 for _ in plan.runs())
    with console.count_progress(f"prove {defect_class}", "runs") as on_run:
        counted = [0]

        def tell(what: str, step: int, of: int) -> None:
            if step in (1, of) or step % 100 == 0:
                console.note(f"{what}: step {step} of {of}")

        def ran(_: object) -> None:
            counted[0] += 1
            on_run(counted[0], total)

        on_run(0, total)
        if ratio is None:
            ratio = float(proof.choose_ratio(tell)["ratio"]) if added else RATIO
        proof = replace(proof, plan=replace(plan, ratio=ratio))
        results = proof.results(tell, ran)
    rows = summary(results, proof.plan)
    gains = over_real(results, proof.plan)
    write_summary(out, proof.plan, results, rows, gains)
    if as_json:
        told = {"out": str(out), "ratio": ratio, "runs": len(results), "summary": rows, "over_real": gains}
        console.emit(told)
        return
    kept = [(one["arm"], one["draw"], one["iou"], one["f1_h"], one["fa_per_mpx"]) for one in results]
    found = [tuple("-" if value is None else value for value in row) for row in kept]
    console.show_table(f"{defect_class}, ratio {ratio:g}", ("arm", "draw", "IoU", "F1_H", "FA/Mpx"), found)
    if not rows:
        kinds = ("an arm without a GAN", "an arm with one")
        lacking = kinds[any(arm in WITHOUT_GAN for arm in plan.arms)]
        console.say(f"nothing is shown: --arms {arms} has not {lacking} to hold the others against")
    lines = [
        _compared(row["arm"], of["best_without_gan"], figure, of)
        for row in rows
        for figure, of in (("IoU", row), ("F1_H", row["f1_h"]))
    ]
    lines += [
        _compared(row["arm"], "real", figure, row[key])
        for row in gains
        for figure, key in (("IoU", "iou"), ("F1_H", "f1_h"))
    ]
    for line in dict.fromkeys(lines):  # where *real* is the best arm without a GAN, both say the same
        console.say(line)


def _compared(arm: str, other: str, figure: str, of: dict[str, Any]) -> str:
    span = "no interval" if of["low"] is None else f"{of['low']:+.3f} to {of['high']:+.3f}"
    return (
        f"{arm} against {other}: {figure} {of['difference']:+.3f} ({span}), "
        f"{of['draws']} draws: {'shown' if of['shown'] else 'not shown'}"
    )
