"""The ledger's copy of the receipts on disk."""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from rollsight.jobs.ledger.schema import Band
from sqlalchemy import insert, select
from sqlalchemy.orm import Session


def record_bands(session: Session, folder: Path, roll_id: str, now: datetime) -> int:
    """Copy the receipts of the run in `folder` that the ledger does not have; how many there were."""
    run_id = folder.name
    known = set(session.scalars(select(Band.y0).where(Band.run_id == run_id)))
    rows = [
        {**facts, "run_id": run_id, "roll_id": roll_id, "recorded_at": now}
        for facts in receipts_in(folder)
        if facts["y0"] not in known
    ]
    if rows:
        session.execute(insert(Band), rows)
    return len(rows)


def receipts_in(folder: Path) -> Iterator[dict[str, Any]]:
    """y0, y1, shard_sha256 and seconds of each whole receipt of the run; damaged ones are left out."""
    for path in sorted((folder / "bands").glob("*.json")):
        try:
            told = json.loads(path.read_bytes())
            if told["run_id"] != folder.name:
                continue
            yield {
                "y0": int(told["y0"]),
                "y1": int(told["y1"]),
                "shard_sha256": str(told["shard_sha256"]),
                "seconds": float(sum(told["seconds"].values())),
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
