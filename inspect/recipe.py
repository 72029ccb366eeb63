"""How a model is trained: every choice with its default."""

from dataclasses import dataclass

from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.instance_losses import INSTANCE_LOSSES
from rollsight.inspect.losses import FOCAL_GAMMA, LOSSES
from rollsight.inspect.nets import NETS
from rollsight.inspect.tiles import CELL


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained; every field is on its card.

    Shares are of the crops of a batch, drawn at random; what `clean_share`, `small_crops` and `balanced`
    leave is drawn anywhere.
    """

    net: str = "unet_lite"
    attention: str = "cbam"
    steps: int = 2000
    batch: int = 16
    crop_px: int = 192  # a multiple of the cell
    mosaic: int = 2  # crops along each side of a training canvas (`sampling.mosaics`)
    learning_rate: float = 1e-3
    fresh_rate: float = 5.0  # learning rate of what begins from nothing, relative to that of what does not
    weight_decay: float = 1e-2
    warmup: float = 0.05  # share of the steps
    ema_half_life: int = 100  # steps
    loss: str = "dice_focal"  # a name in LOSSES
    focal_gamma: float = FOCAL_GAMMA  # 0: plain cross-entropy
    small_weight: float = 0.1  # of the small-object term, when fully ramped in
    small_ramp: float = 0.3  # share of the steps until it is
    instance: str = "none"  # the loss by component that is added, a name in INSTANCE_LOSSES
    instance_weight: float = 0.5  # its weight: a start, not tuned
    deep_supervision: bool = False  # judge the logits of coarser depths too, where the net gives them
    clean_share: float = 0.0  # of crops without a defect
    small_crops: float = 0.0  # share of crops around a component under 256 px
    balanced: float = 0.0  # share of crops around a component of a class drawn first
    copy_paste: float = 0.0  # share of crops that get a component of another one
    warped: float = 0.5  # share of crops turned, scaled and shifted a little; half as many are bent
    light_gradient: float = 0.0  # share of crops with light that falls off to one side
    padded: bool = False  # image files lie in their padding, as they are judged: crops show their borders
    modality_dropout: float = 0.0  # probability of each lighting mode to be left out of a step
    patience: int = 0  # evaluations on val without a gain before the training ends; 0: it never does
    evaluate_every: int = 100  # steps from one checkpoint, and evaluation, to the next
    fewest: int = 30  # components of a class without which a training from scratch is refused
    frozen_norms: bool = False  # keep the statistics of the norms: for fine-tuning on mixed sources
    seed: int = 0
    init: str = ""  # hash of the model that the training began from, if it did from one
    teacher: str = ""  # hash of the model that it learned from as well, if there was one


def check_recipe(recipe: Recipe, sources: int) -> None:
    """Refuse, as UserError, what cannot be followed with that many sources of data."""
    for name, known in (("net", NETS), ("loss", LOSSES), ("instance", ("none", *INSTANCE_LOSSES))):
        if (chosen := getattr(recipe, name)) not in known:
            raise UserError(f"recipe: {name} is {chosen!r}: it must be one of {', '.join(known)}", USAGE)
    if recipe.crop_px < CELL or recipe.crop_px % CELL:
        raise UserError(f"recipe: a crop of {recipe.crop_px} px: it must be a multiple of {CELL}", USAGE)
    side = recipe.mosaic
    if side < 1 or recipe.batch % side**2 or recipe.batch < side**2 * sources:
        raise UserError(
            f"recipe: a batch of {recipe.batch} crops must be whole mosaics of {side**2}, "
            f"and one for each of {sources} sources",
            USAGE,
        )
    for name in ("learning_rate", "fresh_rate"):
        if not getattr(recipe, name) > 0:
            raise UserError(
                f"recipe: {name} is {getattr(recipe, name):g}: it must be above 0; "
                f"{getattr(Recipe(), name):g} is usual",
                USAGE,
            )
    for name in ("clean_share", "small_crops", "balanced", "copy_paste", "warped", "light_gradient"):
        if not 0 <= getattr(recipe, name) <= 1:
            raise UserError(f"recipe: {name} is {getattr(recipe, name):g}: a share is 0 to 1", USAGE)
    drawn = recipe.clean_share + recipe.small_crops + recipe.balanced
    if drawn > 1:
        raise UserError(
            f"recipe: clean_share, small_crops and balanced are {drawn:g} together: at most 1 is there",
            USAGE,
        )
    if not 0 <= recipe.modality_dropout < 1:
        raise UserError(
            f"recipe: modality_dropout is {recipe.modality_dropout:g}: a probability below 1", USAGE
        )
    if recipe.evaluate_every < 1 or recipe.patience < 0:
        raise UserError(
            f"recipe: patience {recipe.patience}, evaluated every {recipe.evaluate_every} steps: "
            "it needs 0 or more, and 1 or more",
            USAGE,
        )
