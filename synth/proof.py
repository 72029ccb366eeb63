"""The proof that synthetic defects help, or that they do not: arms, draws and fits as a queue of short runs.

Each finished run is one small JSON file, so a queue goes on where it stopped, and several processes may work
on one: a run, a base net and a fit each have a lock. Nets, generators and sets are named with a hash of all
that decides them, so that none of another recipe is taken for them.
"""

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from rollsight.inspect.checkpoints import load_weights, save_weights
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import LabelledData, Sample
from rollsight.inspect.models import open_model
from rollsight.inspect.nets import NETS
from rollsight.inspect.recipe import Recipe
from rollsight.inspect.roll_places import write_durably
from rollsight.synth.arms import (
    ARMS,
    BASE,
    BASE_CROPS,
    CHOICES,
    FINE_TUNING,
    GENERATORS,
    HARD,
    OWN_STEEL,
    RARE_CROPS,
    RATIO,
    RATIOS,
    SAMPLES,
    SETTLING,
    UNTIL,
    VARIED,
    VARIETY,
    Thresholds,
    Trained,
    base_net,
    best_thresholds,
    crops_of,
    generator_of,
    is_edited,
    judged,
    ladder,
    needs_generator,
    run_arm,
    synthetic,
)
from rollsight.synth.draws import Draws, PieceOut
from rollsight.synth.fit_recipe import PRESETS, FitRecipe
from rollsight.synth.fitting import fit_data, fit_generator
from rollsight.synth.generator import Generator, open_generator, recipe_json
from rollsight.synth.generic import Generic, shipped, suits
from rollsight.synth.hard import CANDIDATES, hard_samples
from rollsight.synth.mask_bank import marks_of
from rollsight.synth.patches import class_value, read_scenes
from rollsight.synth.realism import sees
from torch import nn

# What a table of runs shows; a run's file has more, the counts among it.
ROW = (
    *("data", "rare_class", "k", "arm", "draw", "gan_seed", "iou", "f1_h", "recall_by_size", "fa_per_mpx"),
    *("iou_by_class", "f1_h_by_class"),
)
DESIGN = 2  # to be raised where code, and not a recipe, changes what a run finds: all is then made anew
JUDGING = 2  # as DESIGN, of the judging alone: runs are made anew, and nothing that they are made of
TUNING_DRAW = 1000  # the draw on which the mixing ratio is chosen; no result is of it
Tell = Callable[[str, int, int], None]  # what is being done, step, steps


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be proven, and how long each part of it trains."""

    k: int | None = 10  # scenes of the class; None: all there are, in one draw but where a piece is left out
    draws: tuple[int, ...] = (0, 1, 2, 3)
    arms: tuple[str, ...] = ("real", "paste", "poisson", "gan", "both")
    gan_seeds: Mapping[int, int] = field(default_factory=dict)  # draw -> fits of its generator, 1 by default
    refitted: tuple[str, ...] = ("gan",)  # arms that have more than one; the others have the first fit
    ratio: float = RATIO  # synthetic crops per real one
    steps: int = FINE_TUNING.steps  # of each arm
    base_steps: int = BASE.steps
    fit_steps: int = 500  # of a draw's generator, from the generic one
    generic_steps: int = 1500  # of that one, on the other classes
    samples: int = SAMPLES
    fit: FitRecipe = PRESETS["cpu-64"]
    arm: Recipe = FINE_TUNING  # of each arm, but for its steps
    base: Recipe = BASE  # of the net all arms begin from, but for its steps
    begin: str = ""  # shipped model or folder of one, which never saw the class: what that net begins from

    def __post_init__(self) -> None:
        for arm in self.arms:
            needs_generator(arm)
            crops_of(len(ARMS[arm]), self.ratio)
        if plain := [arm for arm in self.refitted if not needs_generator(arm)]:
            raise UserError(f"arm {plain[0]} has no generator of its own to fit again", USAGE)
        if not self.draws or len(set(self.draws)) != len(self.draws) or min(self.draws) < 0:
            raise UserError(f"draws {self.draws}: give different whole numbers from 0", USAGE)
        if min(self.steps, self.base_steps, self.fit_steps, self.generic_steps, self.samples) < 1:
            raise UserError("every part of a proof needs at least one step, and a set one sample", USAGE)

    def runs(self) -> Iterator[tuple[str, int, int]]:
        """Arm, draw and seed of the fit of all its runs, draw by draw."""
        for draw in self.draws:
            for arm in self.arms:
                for seed in range(self.gan_seeds.get(draw, 1) if arm in self.refitted else 1):
                    yield arm, draw, seed


@dataclass(frozen=True, slots=True)
class Proof:
    """A plan on its data: `work` holds nets, generators and synthetic sets, `out` one JSON per run."""

    found: Draws
    plan: Plan
    work: Path
    out: Path

    def __post_init__(self) -> None:
        draws = len(self.plan.draws)
        if self.plan.k is None and draws > 1 and not isinstance(self.found, PieceOut):
            raise UserError(
                f"all scenes of {self.rare} are one draw, {draws} were asked for: give a k, or one draw",
                USAGE,
            )

    @property
    def rare(self) -> str:
        return self.found.defect_class

    @property
    def title(self) -> str:
        return f"{self.found.data.root.name}-{self.rare}"

    def check(self, split: str) -> None:
        """UserError where there are too few scenes, or no image of a split has the class to judge by."""
        self.found.drawn(self.plan.k, self.plan.draws[0])
        held = self.found.held(split, self.plan.draws[0])
        if not self._shown_by(held):
            raise UserError(f"{held.root}: no {split} image holds {self.rare}: nothing to judge by", USAGE)

    def results(self, tell: Tell, on_run: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
        """All runs of the plan, made where they are not there.

        What another process works on is waited for, after all others are made.
        """
        self.check("test")
        done: dict[tuple[str, int, int], dict[str, Any]] = {}
        for wait in (False, True):
            for run in self.plan.runs():
                if run in done:
                    continue
                one = self.result(*run, tell, wait=wait)
                if one is not None:
                    done[run] = one
                    on_run(one)
        return [done[run] for run in self.plan.runs()]

    def choose_ratio(self, tell: Tell) -> dict[str, Any]:
        """The ratio with the highest mean IoU of the class on val over some arms, on a draw of its own.

        These are *paste* and *gan*, as far as the plan has them, else all that add anything. What another
        process works on is waited for, after all others are made. UserError where no arm adds anything.
        """
        self.check("val")
        added = [arm for arm in self.plan.arms if ARMS[arm]]
        if not added:
            raise UserError(f"arms {', '.join(self.plan.arms)}: none adds samples: no ratio to choose", USAGE)
        methods = [arm for arm in added if arm in ("paste", "gan")] or added
        asked = [(ratio, method) for ratio in RATIOS for method in methods]
        made: dict[tuple[float, str], dict[str, Any]] = {}
        for wait in (False, True):
            for ratio, method in asked:
                trial = replace(self, plan=replace(self.plan, ratio=ratio))
                one = trial.result(method, TUNING_DRAW, 0, tell, split="val", wait=wait)
                if one is not None:
                    made[ratio, method] = one
        trials = [{"ratio": r, "arm": method, "iou": made[r, method]["iou"]} for r, method in asked]
        means = {r: float(np.mean([t["iou"] for t in trials if t["ratio"] == r])) for r in RATIOS}
        return {"ratio": max(means, key=lambda r: means[r]), "trials": trials}

    def result(
        self, arm: str, draw: int, seed: int, tell: Tell, split: str = "test", *, wait: bool = False
    ) -> dict[str, Any] | None:
        """One run; None where another process works on it, unless that is waited for."""
        plan = self.plan
        k = "all" if plan.k is None else plan.k
        name = f"{self.title}-k{k}-{arm}-d{draw}-s{seed}" + (
            "" if split == "test" else f"-{split}-r{plan.ratio:g}"
        )
        path = self.out / f"{name}.json"
        if (known := self._known(path, arm)) is not None:
            return known
        with _held(self.work / name, wait=wait) as mine:
            if not mine:
                return None
            if (known := self._known(path, arm)) is not None:
                return known
            started = time.monotonic()
            base, rare = self.found.drawn(plan.k, draw)
            added = [self._synthetic(method, base, rare, draw, seed, tell) for method in ARMS[arm]]
            settings = self.settings(arm)
            if arm == "real":
                net = self._real(base, rare, draw, tell)
            else:
                run = self.work / f"{name}-{settings['design']}"
                net = self._trained(name, run, base, rare, [data for data, _ in added], draw, tell)
            thresholds = self._thresholds(net)
            held = self.found.held(split, draw)
            told = judged(net, held, self.rare, thresholds)
            one = {
                "data": self.found.data.root.name,
                "rare_class": self.rare,
                "k": plan.k,
                "arm": arm,
                "draw": draw,
                "gan_seed": seed if needs_generator(arm) else None,
                "split": split,
                "thresholds": asdict(thresholds),
                "settings": settings,
                "made_of": [made_of for _, made_of in added],
                **told["figures"],
                "scenes": [sample.group for sample in rare.samples],
                "groups": told["groups"],
                "counts": told["counts"],
                **({"ladder": ladder(net, held, self.rare)} if isinstance(self.found, PieceOut) else {}),
                "seconds": round(time.monotonic() - started, 1),
            }
            _put(path, one)
            return one

    def _thresholds(self, net: nn.Module) -> Thresholds:
        """Those of the rare class, from val; EVEN where no val image holds it.

        EVEN too where a piece is left out, of val or not: others tell its thresholds (`folds`).
        """
        data = self.found.data
        val = replace(data, samples=tuple(sample for sample in data.samples if sample.split == "val"))
        if isinstance(self.found, PieceOut) or not self._shown_by(val):
            return Thresholds()
        return best_thresholds(net, val, self.rare)

    def _shown_by(self, data: LabelledData) -> bool:
        """Whether any image holds the rare class."""
        value = class_value(data.classes, self.rare, data.root)
        return any((sample.read()[1] == value).any() for sample in data.samples)

    def _trained(
        self,
        name: str,
        run: Path,
        base: LabelledData,
        rare: LabelledData,
        added: Sequence[LabelledData],
        draw: int,
        tell: Tell,
    ) -> nn.Module:
        """The net of an arm, without the checkpoints of its training in `run`."""
        plan, init = self.plan, self._base(base, tell)
        recipe = replace(plan.arm, steps=plan.steps, seed=draw)
        net = run_arm(
            base,
            rare,
            added,
            init,
            run,
            ratio=plan.ratio,
            recipe=recipe,
            on_step=lambda step, _: tell(name, step, plan.steps),
        )
        shutil.rmtree(run)
        return net

    def _real(self, base: LabelledData, rare: LabelledData, draw: int, tell: Tell) -> nn.Module:
        """The net of *real* of a draw; kept, for what it finds hard is asked of it."""
        plan = self.plan
        k = "all" if plan.k is None else plan.k
        run = self.work / f"{self.title}-k{k}-real-d{draw}-{self.settings('real')['design']}"
        path = run.with_name(f"{run.name}.safetensors")
        with _held(path, wait=True):
            if not path.is_file():
                save_weights(path, self._trained(run.name, run, base, rare, [], draw, tell))
        build: Any = NETS[plan.arm.net]
        net: nn.Module = build(len(base.classes), attention=plan.arm.attention)
        load_weights(path, net)
        return net.eval()

    def settings(self, arm: str) -> dict[str, Any]:
        """What decides a result beside its data, draw and seed; `design` is a hash of all of it."""
        plan = self.plan
        told: dict[str, Any] = {"steps": plan.steps, "base_steps": plan.base_steps}
        if ARMS[arm]:
            told |= {"ratio": plan.ratio, "samples": plan.samples}
        if needs_generator(arm):
            told |= {"fit_steps": plan.fit_steps, "generic_steps": plan.generic_steps}
        kinds = sorted({generator_of(method) for method in ARMS[arm]})
        fixed = [JUDGING, CHOICES, BASE_CROPS, RARE_CROPS, UNTIL, SETTLING, OWN_STEEL, CANDIDATES]
        parts: list[Any] = [told, fixed, asdict(plan.arm), self._base_key()]
        parts += [self._generator_key(kind) for kind in kinds]
        if any(method.endswith(HARD) for method in ARMS[arm]):
            parts.append(self.settings("real"))
        if any(VARIED in method for method in ARMS[arm]):
            parts.append(VARIETY)
        return told | {"design": short_hash(*parts)}

    def _base_key(self) -> str:
        plan = self.plan
        begun = open_model(plan.begin, Path()).hash if plan.begin else ""
        kind = type(self.found).__name__  # which scenes are without the class depends on it
        return short_hash(asdict(plan.base), plan.base_steps, begun, kind, _digest(self.found.data))

    def _generic_key(self, kind: str) -> str:
        common = shipped() if len(self.found.data.classes) == 1 else None
        begun = common.hash if common is not None else ""
        recipe = recipe_json(self._recipe(kind))
        return short_hash(recipe, self.plan.generic_steps, _digest(self.found.data), begun)

    def _generator_key(self, kind: str) -> str:
        return short_hash(self._generic_key(kind), recipe_json(self._recipe(kind)), self.plan.fit_steps)

    def _known(self, path: Path, arm: str) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        try:
            one: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            same = one["settings"] == self.settings(arm)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: damaged: remove it, and it is made again") from None
        if not same:
            raise UserError(
                f"{path}: made with {one['settings']}: choose another folder, or remove it", USAGE
            )
        return one

    def _base(self, base: LabelledData, tell: Tell) -> Trained:
        """The base net, the same for all draws and arms."""
        plan, path = self.plan, self.work / f"{self.title}-base-{self._base_key()}.safetensors"
        classes = tuple("(never seen)" if name == self.rare else name for name in base.classes)
        with _held(path, wait=True):
            if not path.is_file():
                trained = base_net(
                    base,
                    self.rare,
                    path.with_name(path.name.removesuffix(".safetensors")),
                    replace(plan.base, steps=plan.base_steps),
                    begin=_model(plan.begin, self.rare) if plan.begin else None,
                    on_step=lambda step, _: tell(f"{self.title}-base", step, plan.base_steps),
                )
                save_weights(path, trained.net)
        build: Any = NETS[plan.base.net]
        net = build(len(classes), attention=plan.base.attention)
        load_weights(path, net)
        return Trained(net, classes)

    def _synthetic(
        self, method: str, base: LabelledData, rare: LabelledData, draw: int, seed: int, tell: Tell
    ) -> tuple[LabelledData, dict[str, str]]:
        """The set of a method for a draw; and what it is: the method, hashes of its generator and itself."""
        kind, samples = generator_of(method), self.plan.samples
        generator = self._generator(kind, base, rare, draw, seed if is_edited(method) else 0, tell)
        folder, choose = self.work / f"{generator.folder.name}-{method}-{samples}", None
        if method.endswith(HARD):
            folder = folder.with_name(f"{folder.name}-{self.settings('real')['design']}")
            if not folder.is_dir():
                value = class_value(base.classes, self.rare, base.root)
                choose = partial(hard_samples, sees=partial(sees, self._real(base, rare, draw, tell), value))
        with _held(folder, wait=True):
            made = synthetic(method, generator, base, rare, folder, seed=draw, samples=samples, choose=choose)
        return made, {"method": method, "generator": generator.hash[:16], "set": made.digest()[:16]}

    def _generator(
        self, kind: str, base: LabelledData, rare: LabelledData, draw: int, seed: int, tell: Tell
    ) -> Generator:
        """The generator of a draw, fine-tuned from the generic one."""
        plan = self.plan
        k = "all" if plan.k is None else plan.k
        folder = self.work / f"{self.title}-k{k}-{kind}-d{draw}-s{seed}-{self._generator_key(kind)}"
        with _held(folder, wait=True):
            if folder.is_dir():
                return open_generator(folder)
            generic = self._generic(kind, base, tell)
            taught = (*base.samples, *rare.samples)
            held = self._held({sample.group for sample in taught})
            labels = LabelledData(base.root, base.classes, (*taught, *held))
            recipe = replace(self._recipe(kind), steps=plan.fit_steps, seed=seed)
            made = fit_generator(
                fit_data(labels, self.rare, begun=True),
                folder,
                recipe,
                init=generic,
                on_step=lambda step, _: tell(folder.name, step, plan.fit_steps),
            )
            assert made is not None  # it was not stopped
            return made

    def _held(self, taught: set[str]) -> list[Sample]:
        """What is of val and test and of no group that is learned from."""
        samples = self.found.data.samples
        return [one for one in samples if one.split in ("val", "test") and one.group not in taught]

    def _generic(self, kind: str, base: LabelledData, tell: Tell) -> Generator | Generic | None:
        """A generator of the other classes: it never saw the rare one.

        Where no other class is labelled, the shipped one if it suits and knows none of that name; else None.
        """
        plan = self.plan
        folder = self.work / f"{self.title}-generic-{kind}-{self._generic_key(kind)}"
        with _held(folder, wait=True):
            if folder.is_dir():
                return open_generator(folder)
            taught = {mark.defect_class for mark in marks_of(read_scenes(base), base.classes)}
            others = [name for name in base.classes if name in taught]
            recipe = replace(self._recipe(kind), steps=plan.generic_steps, elsewhere=0.0)
            if not others:
                common = shipped()
                suited = common is not None and suits(common, recipe) and self.rare not in common.card.classes
                return common if suited else None
            recipe = replace(recipe, rare_share=1 / len(others))
            made = fit_generator(
                fit_data(base, others[0], fewest=1),
                folder,
                recipe,
                on_step=lambda step, _: tell(folder.name, step, plan.generic_steps),
            )
            assert made is not None  # it was not stopped
            return made

    def _recipe(self, kind: str) -> FitRecipe:
        return replace(self.plan.fit, **GENERATORS[kind])


def of_plan(told: Sequence[dict[str, Any]], proof: Proof) -> list[dict[str, Any]]:
    """Of many runs those of a plan on its data; UserError for one of them that was made otherwise."""
    plan, wanted = proof.plan, set(proof.plan.runs())
    settings = {arm: proof.settings(arm) for arm in plan.arms}
    found = [
        one
        for one in told
        if (one["data"], one["rare_class"], one["k"]) == (proof.found.data.root.name, proof.rare, plan.k)
        and (one["arm"], one["draw"], one["gan_seed"] or 0) in wanted
    ]
    for one in found:
        if one["settings"] != settings[one["arm"]]:
            title = f"{proof.title}-k{plan.k}-{one['arm']}-d{one['draw']}"
            raise UserError(f"{title}: made with {one['settings']}: remove it, and it is made again", USAGE)
    return found


def short_hash(*parts: Any) -> str:
    """Eight hex digits of what decides something, DESIGN among it."""
    return hashlib.sha256(json.dumps([DESIGN, *parts], sort_keys=True).encode()).hexdigest()[:8]


@lru_cache(maxsize=4)
def _digest(data: LabelledData) -> str:
    return data.digest()


def _model(name: str, rare: str) -> Trained:
    """A model that never saw the class; UserError for one that knows it."""
    model = open_model(name, Path())
    if rare in model.card.classes:
        raise UserError(f"model {name} knows {rare}: a proof begins from a net that never saw it", USAGE)
    return Trained(model.net(), model.card.classes)


def _put(path: Path, one: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, (json.dumps(one, allow_nan=False, separators=(",", ":")) + "\n").encode())


@contextmanager
def _held(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process holds the lock of what is to be at `path`; with `wait` it does in the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Added to the whole name: after a dot in that of the data, one lock would stand for all, and for itself.
    with path.with_name(f"{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def write_summary(
    folder: Path,
    plan: Plan,
    results: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    gains: Sequence[Mapping[str, Any]],
) -> None:
    """summary.json: the plan, the runs without their counts, and what is shown."""
    told = {
        "plan": json.loads(json.dumps(asdict(plan))),
        "rows": [{name: one[name] for name in ROW} for one in results],
        "summary": list(rows),
        "over_real": list(gains),
    }
    _put(folder / "summary.json", told)
