"""Claim under test: attention and small-object weighting raise the F1 of small defects by 12 % relative.

    python bench/trainings.py      first: it trains what this reads
    python bench/small_object.py

F1 by match H of tiny and small defects on the test split, at thresholds from val and one budget of false
alarms, of the net `fast` in arms that differ in one thing from `plain` (no attention, cross-entropy and
Dice). `effect` is relative to plain, 0.12 is the claim; `shown` where its interval over seeds and groups
holds no 0; `claim` where it lies above 0.12 as a whole. Where plain finds nothing there is no share of it.
"""

from _counts import counts_of, difference, figures_of, mean_figure
from report import write_rows
from rollsight.inspect.metrics import alarms_per_mpx, mean_iou, tiny_small_f1, tiny_small_recall

CLAIM = 0.12


def main() -> None:
    trained = [row for row in figures_of() if row["arm"] not in ("net", "from_steel")]
    rows = []
    for data in sorted({row["data"] for row in trained}, reverse=True):
        arms: dict[str, list[str]] = {}
        for row in trained:
            if row["data"] == data:
                arms.setdefault(row["arm"], []).append(row["name"])
        counts = {arm: [counts_of(name) for name in names] for arm, names in arms.items()}
        if "plain" not in counts:
            raise SystemExit(
                f"{data}: the arm `plain` has not been trained: python bench/trainings.py does so"
            )
        for arm, runs in counts.items():
            row = {"data": data, "arm": arm, "seeds": len(runs)}
            row |= {
                "f1_tiny_small": mean_figure(runs, tiny_small_f1),
                "recall_tiny_small": mean_figure(runs, tiny_small_recall),
                "fa_per_mpx": mean_figure(runs, alarms_per_mpx),
                "miou": mean_figure(runs, mean_iou),
            }
            if arm != "plain" and mean_figure(counts["plain"], tiny_small_f1) > 0:
                effect, low, high = difference(counts["plain"], runs, tiny_small_f1, relative=True)
                row |= {"effect": effect, "low": low, "high": high}
                row |= {"shown": low > 0 or high < 0, "claim": low > CLAIM}
            rows.append(row)
            print(row)
    write_rows("small_object", rows, seed=0)


if __name__ == "__main__":
    main()
