"""The plant folder: everything a site owns, under one roof."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rollsight.inspect.errors import CONFIG, USAGE, UserError
from rollsight.inspect.models import SHIPPED, Model, open_model
from rollsight.inspect.rolls import Roll, open_roll, roll_path
from rollsight.inspect.strips import check_name, is_plain_name

MAX_YAML_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Plant:
    """`home/rolls`, `home/models`, `home/generators`, `home/runs`; made on first use."""

    home: Path

    @property
    def rolls(self) -> Path:
        return self._folder("rolls")

    @property
    def models(self) -> Path:
        return self._folder("models")

    def generator_path(self, name: str) -> Path:
        """Where the generator of synthetic defects is, or would be; UserError for a name that leaves it."""
        return self._folder("generators") / check_name(name, "generator name")

    def roll_path(self, roll_id: str) -> Path:
        """Where the roll is, or would be; UserError for an id that could leave the folder."""
        return roll_path(self.rolls, roll_id)

    def roll(self, roll: str, *, live: bool = False) -> Roll:
        """The roll of that id, or at that URL; with `live` also one that still grows.

        UserError names the rolls there are where the id is unknown.
        """
        if "://" in roll:
            return open_roll(roll, live=live)
        path = self.roll_path(roll)
        if not path.is_dir():
            known = (
                ", ".join(self.roll_ids()[:10])
                or "none yet: make one with `inspect ingest` or `inspect simulate`"
            )
            raise UserError(f"no roll {roll!r} in {self.rolls}: there are {known}")
        return open_roll(path, live=live)

    def roll_ids(self) -> list[str]:
        """The rolls there are; what lies beside them under a name that is no roll id is none."""
        return sorted(path.stem for path in self.rolls.glob("[!.]*.zarr") if is_plain_name(path.stem))

    def check_new_model(self, name: str) -> None:
        """Raise UserError where no model of that name can be put into the plant."""
        check_name(name, "model name")
        if name in SHIPPED or (self.models / name).exists():
            raise UserError(f"model {name!r} exists: choose another name", USAGE)

    def model(self, name: str) -> Model:
        return open_model(name, self.models)

    def run(self, roll_id: str, run_id: str) -> Path:
        """The folder of a run; not made here."""
        return self._folder("runs") / roll_id / run_id

    def _folder(self, name: str) -> Path:
        folder = self.home / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make {folder} ({error.strerror}): choose another plant folder with --home", CONFIG
            ) from None
        return folder


def open_plant(home: Path | None = None, *, standing: bool = False) -> Plant:
    """The plant folder: `home`, else $ROLLSIGHT_HOME, else ./plant.

    With `standing`, for what works on rolls that are there: UserError 78 where there is no such folder, since
    a night in a plant that was only misspelt finds nothing due, and nobody is told.
    """
    plant = Plant(home or Path(os.environ.get("ROLLSIGHT_HOME") or "plant"))
    if standing and not plant.home.is_dir():
        raise UserError(
            f"no plant folder at {plant.home}: name one with --home or $ROLLSIGHT_HOME; "
            "`inspect ingest` or `inspect simulate` makes one",
            CONFIG,
        )
    return plant


def read_yaml(path: Path) -> Any:
    """What a file of the plant that a person wrote holds; None where it is empty.

    UserError 78 where it is larger than 1 MiB or not YAML, with the line; FileNotFoundError without one.
    """
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise UserError(f"{path} is larger than {MAX_YAML_BYTES} bytes: it is no {path.name}", CONFIG)
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}{where}: not readable as YAML: correct it", CONFIG) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: check disk and rights", CONFIG) from None
