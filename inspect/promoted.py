"""Which model of a plant `default` means: the shipped one until another is promoted; and which did before."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rollsight.inspect.errors import CONFIG, UserError
from rollsight.inspect.roll_places import write_durably

POINTER = "default.json"  # in `models/` of the plant
SHIPPED = "shipped"  # how the model of the package is called in lines to a person
MAX_BYTES = 4 << 20


class Step(BaseModel):
    """One change of the default model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")  # None: the shipped one
    model_hash: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    decides: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")  # SHA-256 of thresholds and temperature
    at: str  # ISO 8601
    by: str
    why: str  # "promoted" | "rolled back"
    gates: tuple[dict[str, Any], ...] = ()  # what it passed


class Pointer(BaseModel):
    """`models/default.json`: every change, oldest first; the last one holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = Field(default=1, ge=1, le=1)
    history: tuple[Step, ...] = ()

    @property
    def now(self) -> Step | None:
        """The step that holds; None where nothing was ever promoted."""
        return self.history[-1] if self.history else None


def read_pointer(models: Path) -> Pointer:
    """What the plant says of its default model; UserError 78 where the file is damaged."""
    path = models / POINTER
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES} bytes: it is no list of promotions", CONFIG)
        return Pointer.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Pointer()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise UserError(
            f"{path}: {where}: {first['msg']}: correct it, or take it away to return to the shipped model",
            CONFIG,
        ) from None


def add_step(models: Path, step: Step) -> Pointer:
    """Write the next step; the file holds the old history or all of the new one."""
    pointer = Pointer(history=(*read_pointer(models).history, step))
    write_durably(models / POINTER, (json.dumps(pointer.model_dump(mode="json"), indent=1) + "\n").encode())
    return pointer
