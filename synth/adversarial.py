"""How the editor learns: losses, the controller of the penalty, and one loop that resumes bit by bit.

Every random choice of step n is drawn from (seed, n), so a fit that was killed goes on as if it had not been.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rollsight.inspect.allocator import keep_freed_memory
from rollsight.inspect.checkpoints import CURVE, add_to_curve, forget_after, save_tensors
from rollsight.inspect.errors import USAGE, UserError
from rollsight.synth.fit_recipe import FitRecipe, check_fit_recipe
from rollsight.synth.gan import LATENT, Editor, Judge, PixelJudge, Widths, gate
from rollsight.synth.gan_losses import contrast_loss, editor_loss, judge_loss, penalty
from rollsight.synth.patch_batches import Batch, PatchSampler
from rollsight.synth.shaking import Shake, shake
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

STATE = "state.safetensors"
FIGURES = ("d_loss", "g_loss", "r1", "r2", "change", "contrast", "gap", "overfit", "gamma", "chance")
# Weights that hold one row or column for each class: axis, and what stands before the first.
BY_CLASS = {
    "by_class.weight": (0, 0),
    "style.0.weight": (1, LATENT),
    "head.weight": (0, PixelJudge.FIRST_CLASS),
}
LARGEST_CHANCE = 0.8  # of an augmentation; ADA without a limit ran to 34 (stylegan3-fun #5)


@dataclass(slots=True)
class Control:
    """What the controller knows: the penalty's weight, the chance of an augmentation, how D does."""

    step: int = 0
    gamma: float = 0.1
    chance: float = 0.1  # of each augmentation
    overfit: float = 0.0  # (E D(train) - E D(held)) / (E D(train) - E D(fake)), averaged
    gap: float = 0.0  # E D(real) - E D(fake), averaged
    quiet: int = 0  # steps for which the gap was under QUIET_GAP


SMOOTH = 0.9  # of the running means, by measurement
QUIET_GAP = 0.05  # below it D learns nothing
WIDE_GAP = 1.5  # above it the editor learns little
MEASURE_EVERY = 10  # steps
DECIDE_EVERY = 50


class Adversary:
    """Editor, its average, discriminator and their optimisers, at one step of a fit."""

    def __init__(self, recipe: FitRecipe, classes: tuple[str, ...]) -> None:
        check_fit_recipe(recipe)
        torch.manual_seed(recipe.seed)
        widths = Widths(recipe.editor, recipe.judge)
        self.recipe, self.classes = recipe, classes
        keep_freed_memory()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.editor = Editor(len(classes), widths, recipe.whole)
        self.average = Editor(len(classes), widths, recipe.whole)
        self.average.load_state_dict(self.editor.state_dict())
        self.judge: Judge | PixelJudge = (
            PixelJudge(len(classes), widths)
            if recipe.per_pixel
            else Judge(len(classes), widths, recipe.size_px)
        )
        for net in self._nets().values():
            net.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimisers = {
            name: torch.optim.Adam(net.parameters(), lr=recipe.learning_rate[0], betas=(0.0, 0.9))
            for name, net in (("editor", self.editor), ("judge", self.judge))
        }
        self.control = Control(gamma=recipe.gamma * (recipe.size_px / 64) ** 2)

    def begin_from(self, nets: dict[str, dict[str, Tensor]], known: tuple[str, ...]) -> None:
        """Take over the weights of another fit; a class new to it begins as the mean of those it knows.

        A discriminator of the other kind (`per_pixel`) is not taken over: it begins anew.
        """
        for name, net in self._nets().items():
            own, theirs = net.state_dict(), dict(nets["average" if name == "editor" else name])
            if name == "judge" and ("head.weight" in own) != ("head.weight" in theirs):
                continue
            for key, value in own.items():
                if key in BY_CLASS and key in theirs:
                    theirs[key] = _with_classes(key, value, theirs[key], known, self.classes)
                if key not in theirs or theirs[key].shape != value.shape:
                    raise UserError(
                        f"the generator to begin from has other nets ({key}): give the --preset it was "
                        "fitted with",
                        USAGE,
                    )
            net.load_state_dict(theirs)

    def step(self, sampler: PatchSampler) -> dict[str, float]:
        """One step of both nets; the figures of it. UserError where a loss is not finite."""
        recipe, step = self.recipe, self.control.step
        rate, beta = self._schedule(step)
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = rate * (recipe.editor_rate if name == "editor" else 1.0)
                group["betas"] = (0.0, beta)
        batch = sampler.batch(step).to(self.device)
        draws = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        noise, latent = self._noise(batch.start, draws), self._latent(len(batch.start), draws)
        shaken = shake(len(batch.start), self.control.chance, draws, self.device)
        figures = self._judge_step(batch, noise, latent, shaken)
        figures |= self._editor_step(batch, noise, latent, shaken, draws)
        decay = 0.5 ** (1 / min(recipe.ema_half_life, max(1, step // 4)))
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.editor.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        self.control.step = step + 1
        if (step + 1) % MEASURE_EVERY == 0:
            self._measure(sampler, step)
        return figures | {
            "gap": self.control.gap,
            "overfit": self.control.overfit,
            "gamma": self.control.gamma,
            "chance": self.control.chance,
        }

    def _judge_step(self, batch: Batch, noise: Tensor, latent: Tensor, shaken: Shake) -> dict[str, float]:
        recipe, step = self.recipe, self.control.step
        with torch.no_grad():
            made = self.editor(batch.start, batch.mask, noise, latent, batch.classes)
        penalised = step % recipe.penalty_every == 0
        # The penalty is on the gradient at the images as they are, before they are shaken (R3GAN's code).
        real = [t.detach().requires_grad_(penalised) for t in (batch.real, batch.real_mask)]
        fake = [t.detach().requires_grad_(penalised) for t in (made, batch.mask)]
        loss, d_real, d_fake = judge_loss(
            self.judge, shaken(real[0], real[1]), shaken(fake[0], fake[1]), batch.classes
        )
        figures = {"d_loss": loss.item()}
        if penalised:
            r1, r2 = penalty(d_real, real[0]), penalty(d_fake, fake[0])
            loss = loss + self.control.gamma / 2 * (r1 + r2) * recipe.penalty_every
            figures |= {"r1": r1.item(), "r2": r2.item()}
        self._descend(loss, "judge", self.judge)
        return figures

    def _editor_step(
        self, batch: Batch, noise: Tensor, latent: Tensor, shaken: Shake, draws: torch.Generator
    ) -> dict[str, float]:
        recipe, step = self.recipe, self.control.step
        self.judge.requires_grad_(False)
        made = self.editor(batch.start, batch.mask, noise, latent, batch.classes)
        adversarial = editor_loss(
            self.judge, shaken(batch.real, batch.real_mask), shaken(made, batch.mask), batch.classes
        )
        loss, figures = adversarial, {"g_loss": adversarial.item()}
        if not recipe.whole:
            opened = gate(batch.mask)
            change = ((made - batch.start).abs() * opened).sum() / opened.sum().clamp(min=1)
            loss = loss + recipe.residual_weight * change
            kept = contrast_loss(batch.start, made, batch.mask, recipe.contrast_keep)
            loss = loss + recipe.contrast_weight * kept
            figures |= {"change": change.item(), "contrast": kept.item()}
            if step % recipe.variety_every == 0:
                # With the same noise: else grain would be the cheapest difference (looked at).
                apart_from = self._latent(len(batch.start), draws)
                other = self.editor(batch.start, batch.mask, noise, apart_from, batch.classes)
                apart = ((made - other).abs() * opened).sum() / opened.sum().clamp(min=1)
                loss = loss + recipe.variety_weight * F.relu(recipe.variety - apart)
        self._descend(loss, "editor", self.editor)
        self.judge.requires_grad_(True)
        return figures

    def _descend(self, loss: Tensor, name: str, net: nn.Module) -> None:
        if not loss.isfinite():
            raise UserError(
                f"step {self.control.step + 1}: the loss of the {name} is {loss.item()}: fit anew with "
                "another --seed, under another --name"
            )
        optimiser = self.optimisers[name]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimiser.step()

    def _measure(self, sampler: PatchSampler, step: int) -> None:
        """How much better D knows its training patches than held-back ones, and what follows from it."""
        control, recipe = self.control, self.recipe
        held = sampler.held(step).to(self.device)
        batch = sampler.batch(step).to(self.device)
        draws = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        with torch.no_grad():
            made = self.editor(
                batch.start,
                batch.mask,
                self._noise(batch.start, draws),
                self._latent(len(batch.start), draws),
                batch.classes,
            )
            train = self.judge(batch.real, batch.real_mask, batch.classes).mean().item()
            fake = self.judge(made, batch.mask, batch.classes).mean().item()
            unseen = self.judge(held.real, held.real_mask, held.classes).mean().item()
        share = (train - unseen) / max(train - fake, QUIET_GAP)
        control.gap = SMOOTH * control.gap + (1 - SMOOTH) * (train - fake)
        control.overfit = SMOOTH * control.overfit + (1 - SMOOTH) * min(max(share, -2.0), 2.0)
        control.quiet = control.quiet + MEASURE_EVERY if control.gap < QUIET_GAP else 0
        if (step + 1) % DECIDE_EVERY:
            return
        if control.overfit > 0.5 or control.gap > WIDE_GAP:
            control.gamma = min(control.gamma * 1.3, 100.0)
            control.chance = min(control.chance + 0.05, LARGEST_CHANCE)
        elif control.quiet >= 200:
            control.gamma, control.quiet = max(control.gamma / 1.5, 1e-3), 0

    def _noise(self, like: Tensor, draws: torch.Generator) -> Tensor:
        return torch.randn(like.shape, generator=draws).to(self.device)

    def _latent(self, n: int, draws: torch.Generator) -> Tensor:
        return torch.randn(n, LATENT, generator=draws).to(self.device)

    def _schedule(self, step: int) -> tuple[float, float]:
        """Learning rate and Adam's beta 2 of a step: cosine from the first to the last."""
        way = 0.5 * (1 - math.cos(math.pi * min(1.0, step / max(1, self.recipe.steps - 1))))
        (a, b), (c, d) = self.recipe.learning_rate, self.recipe.second_moment
        return a + way * (b - a), c + way * (d - c)

    # -- what a fit under way leaves on disk ----------------------------------------------------------------

    def _nets(self) -> dict[str, nn.Module]:
        return {"editor": self.editor, "average": self.average, "judge": self.judge}

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """All that a resumed fit needs, in one file put in place by rename."""
        tensors = {
            f"{name}/{key}": t for name, net in self._nets().items() for key, t in net.state_dict().items()
        }
        for name, optimiser in self.optimisers.items():
            for index, values in optimiser.state_dict()["state"].items():
                tensors |= {f"adam-{name}/{index}/{key}": torch.as_tensor(t) for key, t in values.items()}
        told = {"identity": json.dumps(identity), "control": json.dumps(asdict(self.control))}
        save_tensors(path, tensors, told)

    def resume(self, path: Path, identity: dict[str, Any]) -> None:
        """Go on from a file of `save`, if there is one; UserError where it is damaged or of another fit."""
        if not path.is_file():
            return
        parts, told = read_state(path)
        if told.get("identity") != json.dumps(identity):
            raise UserError(
                f"{path}: of a fit with other options or data: choose another --name, or remove its folder",
                USAGE,
            )
        try:
            for name, net in self._nets().items():
                net.load_state_dict(parts[name])
            for name, optimiser in self.optimisers.items():
                state: dict[int, dict[str, Tensor]] = {}
                for key, t in parts[f"adam-{name}"].items():
                    index, _, field = key.partition("/")
                    state.setdefault(int(index), {})[field] = t
                optimiser.load_state_dict(
                    {"state": state, "param_groups": optimiser.state_dict()["param_groups"]}
                )
            self.control = Control(**json.loads(told["control"]))
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise _damaged(path, error) from None


def read_state(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """The tensors of a file of `Adversary.save` by part, and its texts; UserError where it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            parts: dict[str, dict[str, Tensor]] = {}
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part, _, rest = name.partition("/")
                parts.setdefault(part, {})[rest] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None
    return parts, told


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not a checkpoint of a fit ({error}): remove it and fit from the start"[:300])


def _with_classes(
    key: str, own: Tensor, theirs: Tensor, known: tuple[str, ...], classes: tuple[str, ...]
) -> Tensor:
    """Weights by class for other classes: taken over by name, the mean of all for a name that is new."""
    axis, shift = BY_CLASS[key]
    out = own.clone()
    if theirs.shape[1 - axis] != own.shape[1 - axis]:
        return theirs  # another net, which the caller sees
    out.narrow(axis, 0, shift).copy_(theirs.narrow(axis, 0, shift))
    rows = theirs.narrow(axis, shift, len(known))
    for index, name in enumerate(classes):
        row = rows.select(axis, known.index(name)) if name in known else rows.mean(dim=axis)
        out.select(axis, shift + index).copy_(row)
    return out


def fit(
    adversary: Adversary,
    sampler: PatchSampler,
    run: Path,
    identity: dict[str, Any],
    *,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    on_stage: Callable[[int], None] | None = None,
    stop_after: int | None = None,
) -> Editor:
    """Train to the recipe's steps and return the averaged editor.

    `run` is the folder of the checkpoint and the curve; what is there is gone on with. on_stage is called
    after each checkpoint. `stop_after` ends at a step, as a kill would, with its checkpoint.
    """
    recipe = adversary.recipe
    run.mkdir(parents=True, exist_ok=True)
    adversary.resume(run / STATE, identity)
    forget_after(run, adversary.control.step)
    last = recipe.steps if stop_after is None else min(stop_after, recipe.steps)
    rows: list[dict[str, float]] = []
    for step in range(adversary.control.step, last):
        rows.append(adversary.step(sampler))
        if on_step is not None:
            on_step(step + 1, rows[-1])
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == last:
            adversary.save(run / STATE, identity)
            add_to_curve(run / CURVE, step + 1, {name: _mean(rows, name) for name in FIGURES})
            rows = []
            if on_stage is not None:
                on_stage(step + 1)
    return adversary.average.cpu().eval()


def _mean(rows: list[dict[str, float]], name: str) -> float:
    """Of the steps that have the figure; nan where none has."""
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else math.nan
