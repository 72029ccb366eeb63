"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

MAX_SEED = 2**32 - 1  # what every generator of random numbers takes

Home = Annotated[
    Path | None,
    typer.Option(help="Plant folder with rolls, models and runs. Default: $ROLLSIGHT_HOME, else ./plant."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per line instead of text.")]
Rules = Annotated[
    str | None,
    typer.Option(help="File in the plant folder whose change makes rolls due; it grades nothing yet."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a roll of the same id.")]
LedgerUrl = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        help="postgresql+psycopg://USER@HOST/NAME or sqlite:///FILE. Default: $ROLLSIGHT_LEDGER, else "
        "`ledger` of line.yaml, else ledger.db in the plant folder.",
    ),
]
Steel = Annotated[
    list[Path] | None,
    typer.Option(help="Clean steel: a folder of clean images, labelled data, or rolls; may be repeated."),
]
MmPerPxX = Annotated[
    float | None, typer.Option(help="mm per pixel across the strip, of image files; a roll knows its own.")
]
MmPerLine = Annotated[float | None, typer.Option(help="mm per line along the strip, of image files.")]
MODEL = "Model name in the plant, a path, `default`, or `fast`."  # what a command says of its model
