"""Weak supervision: which classes an image shows, and a few masks, become masks to train on.

Two stages. A segmenter learns from image labels through its pooled logits, and from the masks there are;
then each image without a mask gets a pseudo-mask from what that net sees of the classes the image is known
to hold, with all that is doubtful ignored. `train` takes these as it takes any labelled data.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rollsight.inspect import augment, losses
from rollsight.inspect.allocator import keep_freed_memory
from rollsight.inspect.checkpoints import CHECKPOINT, Progress, resume, save_checkpoint
from rollsight.inspect.errors import UserError
from rollsight.inspect.evaluate import padded_logits, probabilities
from rollsight.inspect.labelled_folder import Incoming, LabelledImage, Written, name_within, write_labels
from rollsight.inspect.labels import (
    IGNORE,
    SPLITS,
    ImageFile,
    check_classes,
    check_values,
    file_within,
    manifest_rows,
    read_gray,
)
from rollsight.inspect.nets import NETS
from rollsight.inspect.refine import refine
from rollsight.inspect.tiles import up_to_cell
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

MAX_SIDE_PX = 768  # an image label is about a whole image: larger ones do not fit into a batch
STEPS = 900
BATCH = 8  # whole images
LEARNING_RATE = 5e-4
EMA_HALF_LIFE = 50  # steps
SAVE_EVERY = 50  # steps
POOL_PX = 4  # logits are averaged over so many px before pooling: one noisy pixel is no defect
SHARPNESS = 1.0  # of the log-sum-exp: 0 is the mean over the image, many is its maximum
RAMP = 0.3  # share of the steps in which image labels come in, where there are masks to begin with
# A pseudo-mask says class from FOREGROUND on and background below BACKGROUND; between, nobody knows.
FOREGROUND = 0.5
BACKGROUND = 0.25
REFINEMENT = "crf"
PEAK = 0.99  # quantile of an image's evidence that counts as 1, where no mask has taught what is enough


@dataclass(frozen=True, slots=True)
class WeakSample:
    """One image whose classes are known, and perhaps its mask."""

    image: Path
    present: tuple[int, ...]  # mask values of the classes it holds; none: it is clean
    mask: Path | None
    split: str
    group: str

    def read(self) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
        """Image (1, H, W) in [0, 1], and its mask where there is one."""
        if self.mask is None:
            return read_gray(self.image)[None], None
        return ImageFile(self.image, self.mask, self.split, self.group).read()


@dataclass(frozen=True, slots=True)
class WeakData:
    """Samples of one folder: some with masks, or none."""

    root: Path
    classes: tuple[str, ...]
    samples: tuple[WeakSample, ...]

    def of_split(self, split: str) -> "WeakData":
        return WeakData(self.root, self.classes, tuple(s for s in self.samples if s.split == split))

    def digest(self) -> str:
        """SHA-256 over files, labels and splits."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for sample in self.samples:
            mask = b"" if sample.mask is None else sample.mask.read_bytes()
            digest.update(sample.image.read_bytes() + mask)
            digest.update(f"{sample.present} {sample.split} {sample.group}".encode())
        return digest.hexdigest()


def open_weak(root: Path) -> WeakData:
    """A folder with classes.json and manifest.csv, whose `mask` may be empty.

    Then its column `classes` says what the image holds: mask values or names, separated by blanks;
    empty for a clean image. UserError names what is missing or contradictory.
    """
    try:
        classes = check_classes(root / "classes.json", json.loads((root / "classes.json").read_bytes()))
    except (OSError, ValueError) as error:
        raise UserError(f"{root / 'classes.json'}: needed a list of class names ({error})") from None
    manifest = root / "manifest.csv"
    if not manifest.is_file():
        raise UserError(
            f"{manifest}: not found: it lists image, mask (may be empty), split, group and classes"
        )
    samples, splits = [], dict[str, str]()
    for number, row in enumerate(manifest_rows(manifest), start=2):
        where = f"{manifest} line {number}"
        image = file_within(root, row["image"] or "")
        mask = file_within(root, row["mask"]) if row["mask"] else None
        if image is None or (row["mask"] and mask is None):
            missing = row["image"] if image is None else row["mask"]
            raise UserError(f"{where}: no file {root / (missing or '')} in the data's folder")
        if row["split"] not in SPLITS or not row["group"]:
            raise UserError(f"{where}: needed a split of {', '.join(SPLITS)} and a group")
        if splits.setdefault(row["group"], row["split"]) != row["split"]:
            raise UserError(
                f"{where}: group {row['group']!r} is in {row['split']} and {splits[row['group']]}"
            )
        if mask is None and row.get("classes") is None:
            raise UserError(f"{where}: no mask, and no column `classes` that says what the image holds")
        present = _values(row.get("classes") or "", classes, where)
        if mask is not None:
            found = ImageFile(image, mask, "", "").read()[1]
            check_values(found, classes, mask, root)
            if not present:  # the mask says it
                present = tuple(value for value in np.unique(found).tolist() if 0 < value < IGNORE)
        samples.append(WeakSample(image, present, mask, row["split"], row["group"]))
    return WeakData(root, classes, tuple(samples))


def _values(told: str, classes: Sequence[str], where: str) -> tuple[int, ...]:
    values = set()
    for word in told.split():
        value = classes.index(word) + 1 if word in classes else int(word) if word.isdecimal() else 0
        if not 0 < value <= len(classes):
            raise UserError(f"{where}: class {word!r}: needed one of {', '.join(classes)}, or its mask value")
        values.add(value)
    return tuple(sorted(values))


def pooled(logits: Tensor, sharpness: float = SHARPNESS) -> Tensor:
    """How surely an image holds each class, as a logit: (N, K + 1, H, W) -> (N, K).

    Log-sum-exp over the image of each class's lead over the background (Pinheiro & Collobert 2015,
    arXiv:1411.6228, eq. 4): between their mean and their maximum, so that every pixel learns, those that
    look like the class most.
    """
    lead = F.avg_pool2d(logits[:, 1:] - logits[:, :1], POOL_PX).flatten(2)
    mean: Tensor = (torch.logsumexp(sharpness * lead, dim=2) - math.log(lead.shape[2])) / sharpness
    return mean


def learn(
    data: WeakData,
    run: Path,
    *,
    steps: int = STEPS,
    seed: int = 0,
    sharpness: float = SHARPNESS,
    on_step: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """A segmenter taught by the image labels of `data`, and by its masks where there are some.

    Binary cross-entropy of the pooled logits, image by image; where an image has a mask, Dice and focal
    loss on it as well. With masks the image labels come in over the first RAMP of the steps, once the net
    knows what a defect looks like (Božič et al. 2021, arXiv:2104.06064, section 3). An image with a mask
    gives no gradient to the pooling, which would pull on pixels whose class is known (their gradient stop).
    `run` keeps the checkpoint: interrupted, the same call goes on. UserError for data that cannot be learned
    from.
    """
    images, masks = _read(data)
    present = np.zeros((len(images), len(data.classes)), dtype=np.float32)
    for row, sample in zip(present, data.samples, strict=True):
        row[[value - 1 for value in sample.present]] = 1
    if absent := [name for name, n in zip(data.classes, present.sum(axis=0), strict=True) if n == 0]:
        raise UserError(f"{data.root}: no image for training holds {absent[0]}: give some, or drop the class")
    masked = np.array([(mask != IGNORE).any() for mask in masks])
    if not masked.any() and (present == present[0]).all():
        raise UserError(f"{data.root}: all images hold the same classes: give clean ones, or some masks")
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    build: Any = NETS["unet_lite"]
    net = build(len(data.classes), pretrained=True).to(device, memory_format=torch.channels_last)
    average = AveragedModel(
        net,
        multi_avg_fn=get_ema_multi_avg_fn(0.5 ** (1 / EMA_HALF_LIFE)),  # type: ignore[no-untyped-call]
        use_buffers=True,
    )
    optimiser = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    identity = json.dumps([data.digest(), steps, seed, sharpness])
    run.mkdir(parents=True, exist_ok=True)
    progress = resume(run / CHECKPOINT, identity, net, average, optimiser)
    pipeline = augment.augmentations()
    for step in range(progress.step, steps):
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50, 0.02 + (steps - step) / (0.5 * steps))
        # Every choice of a step is drawn from (seed, step), so that a run goes on as if it had not stopped.
        rng = np.random.default_rng([seed, step])
        chosen = rng.choice(len(images), BATCH)
        if masked.any() and not masked[chosen].any():
            chosen[0] = rng.choice(np.flatnonzero(masked))
        torch.manual_seed(seed * 1_000_003 + step)
        x, labels = _batch([images[i] for i in chosen], [masks[i] for i in chosen])
        x, labels, *_ = augment.augment(pipeline, x, labels)
        x, labels = x.to(device, memory_format=torch.channels_last), labels.to(device)
        known = torch.from_numpy(present[chosen]).to(device)
        with_mask = torch.from_numpy(masked[chosen]).to(device)
        net.train()
        logits = net(x).float()
        loss = logits.new_zeros(())
        if with_mask.any():
            loss = loss + losses.dice(logits, labels) + losses.focal(logits, labels)
        if not with_mask.all():
            ramp = min(1.0, step / (RAMP * steps)) if masked.any() else 1.0
            loss = loss + ramp * F.binary_cross_entropy_with_logits(
                pooled(logits[~with_mask], sharpness), known[~with_mask]
            )
        if not loss.isfinite():
            raise UserError(f"step {step + 1}: the loss is {loss.item()}; the last checkpoint is in {run}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        average.update_parameters(net)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_checkpoint(run / CHECKPOINT, identity, Progress(step + 1), net, average, optimiser)
        if on_step is not None:
            on_step(step + 1, steps)
    return average.module.cpu().eval()


def _read(data: WeakData) -> tuple[list[NDArray[np.float16]], list[NDArray[np.uint8]]]:
    """Images padded by reflection to one square of whole cells; masks, all ignored where there is none."""
    if not data.samples:
        raise UserError(f"{data.root}: no images of the split train: nothing to learn from")
    read = [sample.read() for sample in data.samples]
    side = up_to_cell(max(max(image.shape) for image, _ in read))
    if side > MAX_SIDE_PX:
        raise UserError(f"{data.root}: an image of {side} px: cut images to at most {MAX_SIDE_PX} px")
    images, masks = [], []
    for image, mask in read:
        pad = [(0, side - size) for size in image.shape[1:]]
        images.append(np.pad(image.astype(np.float16), [(0, 0), *pad], mode="reflect"))
        plane = np.full(image.shape[1:], IGNORE, dtype=np.uint8) if mask is None else mask
        masks.append(np.pad(plane, pad, constant_values=IGNORE))
    return images, masks


def _batch(
    images: Sequence[NDArray[np.float16]], masks: Sequence[NDArray[np.uint8]]
) -> tuple[Tensor, Tensor]:
    return augment.to_batch([image.astype(np.float32) for image in images], list(masks))


def pseudo_mask(
    net: nn.Module,
    image: NDArray[np.float32],
    present: Sequence[int],
    *,
    calibrated: bool,
    foreground: float = FOREGROUND,
    background: float = BACKGROUND,
    refinement: str = REFINEMENT,
) -> NDArray[np.uint8]:
    """The mask of an image (M, H, W) that holds the classes `present` (mask values): (H, W), 255 is ignored.

    Classes that the image does not hold are left out. `calibrated` says that the net has learned from masks
    too, so that its probabilities mean something; else a class's evidence counts as a share of the image's
    largest (as class activation maps do: Zhou et al. 2016, arXiv:1512.04150). Edges are refined, what lies
    between the thresholds is ignored, and so is all background where a class that is there was not found.
    """
    clean: NDArray[np.uint8] = np.zeros(image.shape[1:], dtype=np.uint8)
    if not present:
        return clean
    logits = padded_logits(lambda window: _logits(net, window), image)[[0, *present]]
    if calibrated:
        p = probabilities(logits)
    else:
        lead = np.maximum(logits[1:] - logits[0], 0)
        peaks = np.maximum(np.quantile(lead, PEAK, axis=(1, 2), keepdims=True), 1e-6)
        shares = np.minimum(lead / peaks, 1)
        # The background gets what the strongest class leaves; the others of several share with it.
        p = np.concatenate([1 - shares.max(axis=0, keepdims=True), shares]).astype(np.float32)
        p /= p.sum(axis=0)
    if refinement != "none":
        p = refine(image, p, refinement)
    best = p[1:].argmax(axis=0)
    value = np.array(present, dtype=np.uint8)[best]
    mask = np.where(p[1:].max(axis=0) >= foreground, value, np.uint8(IGNORE))
    if set(np.unique(mask).tolist()) >= set(present):
        mask[1 - p[0] < background] = 0
    return mask


def _logits(net: nn.Module, window: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        return net(torch.from_numpy(np.ascontiguousarray(window))[None])[0].numpy()  # type: ignore[no-any-return]


def write_pseudo(
    net: nn.Module,
    data: WeakData,
    out: Path,
    made_by: str,
    *,
    refinement: str = REFINEMENT,
    on_image: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the labelled folder `out`: masks as they are, pseudo-masks for training images without one.

    The manifest's `source` says which is which: "mask", or "image labels" and `made_by`. Of val and test only
    what has a mask goes along: a pseudo-mask judges nothing. UserError where `out` is there already.
    """
    kept = [sample for sample in data.samples if sample.mask is not None or sample.split == "train"]
    calibrated = any(sample.mask is not None and sample.split == "train" for sample in data.samples)

    def images() -> Iterator[LabelledImage | UserError]:
        for sample in kept:
            image, mask = sample.read()
            source = "mask"
            if mask is None:
                mask = pseudo_mask(net, image, sample.present, calibrated=calibrated, refinement=refinement)
                source = f"image labels ({made_by})"
            name = name_within(PurePosixPath(sample.image.relative_to(data.root).as_posix()))
            yield LabelledImage(name, sample.image.read_bytes(), mask, sample.split, sample.group, source)

    return write_labels(out, Incoming(data.classes, len(kept), images()), on_image=on_image)
