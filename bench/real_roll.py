"""Claim: a roll made of real images is scanned as well as the single images are evaluated.

The NEU test scenes (`neu_clean`, no scene in training) are laid out as one roll: a mosaic, not a real
coil. Scenes stand at a pitch of 256 px, in the middle of reflections that fill the gaps, as `evaluate` pads
single images; only scene pixels count.
`inspect ingest`, `inspect scan` and `inspect evaluate` are run as a user runs them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from report import write_result
from rollsight.inspect.evaluate import FOREIGN
from rollsight.inspect.labels import open_labels
from rollsight.inspect.metrics import Tally
from rollsight.inspect.plant import Plant
from rollsight.inspect.tiles import cell_margins

PITCH = 256  # px: a multiple of the cell
COLUMNS = 9  # 171 scenes = 9 x 19


def inspect(*arguments: str) -> dict[str, object]:
    """The JSON line of a command."""
    done = subprocess.run(
        [sys.executable, "-m", "rollsight.jobs", *arguments, "--json"], stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("ROLLSIGHT_DATA", "../shared/data")) / "neu_clean"
    )
    parser.add_argument("--model", default="default")
    options = parser.parse_args()
    data = open_labels(options.data).of_split("test")
    with tempfile.TemporaryDirectory() as folder:
        home, strips = Path(folder) / "plant", Path(folder) / "strips"
        strips.mkdir()
        scenes = [sample.read() for sample in data.samples]
        rows = -(-len(scenes) // COLUMNS)
        for row in range(rows):
            strip = np.zeros((PITCH, PITCH * COLUMNS), dtype=np.uint8)
            for column, (image, mask) in enumerate(scenes[row * COLUMNS : (row + 1) * COLUMNS]):
                pad = [cell_margins(side, PITCH) for side in mask.shape]
                scene = np.pad(np.round(image[0] * 255).astype(np.uint8), pad, mode="reflect")
                strip[:, column * PITCH : (column + 1) * PITCH] = scene
            Image.fromarray(strip).save(strips / f"strip{row:03d}.png")
        home_option = ("--home", str(home))
        inspect("ingest", str(strips), "neu-mosaic", "--units", "px", *home_option)
        scan = inspect("scan", "neu-mosaic", "--model", options.model, *home_option)
        images = inspect(
            "evaluate", options.model, "--data", str(options.data), "--split", "test", *home_option
        )

        roll = Plant(home).roll("neu-mosaic")
        names = roll.label_classes(str(scan["run_id"]))
        to_data = np.full(256, FOREIGN, dtype=np.uint8)
        to_data[0], to_data[255] = 0, 255
        for index, name in enumerate(names, start=1):
            if name in data.classes:
                to_data[index] = data.classes.index(name) + 1
        tally = Tally(data.classes)
        for number, ((_, truth), sample) in enumerate(zip(scenes, data.samples, strict=True)):
            height, width = truth.shape
            y = number // COLUMNS * PITCH + cell_margins(height, PITCH)[0]
            x = number % COLUMNS * PITCH + cell_margins(width, PITCH)[0]
            found = roll.read_label(str(scan["run_id"]), y, y + height)[:, x : x + width]
            tally.add(truth, to_data[found], to_data[found], sample.group)
    report, intervals = tally.report(), tally.intervals()
    pixel = images["pixel"]
    assert isinstance(pixel, dict)
    result = {
        "miou_roll": report["pixel"]["miou"],
        "miou_images": pixel["miou"],
        "difference_points": 100 * (report["pixel"]["miou"] - pixel["miou"]),
        "miou_roll_interval": intervals["pixel"]["miou"],
        "miou_images_interval": images["intervals"]["pixel"]["miou"],  # type: ignore[index]
        "iou": report["pixel"]["iou"],
        "iou_images": pixel["iou"],
        "recall_by_size": report["instance"]["recall_by_size"],
        "coverage": scan["coverage"],
        "mpix_s": scan["mpix_s"],
        "scenes": len(scenes),
    }
    write_result("real_roll", result, seed=0)
    print(json.dumps(result, indent=1))
    if abs(result["difference_points"]) > 1:
        raise SystemExit("not shown: roll and images differ by more than 1 point of mIoU")


if __name__ == "__main__":
    main()
