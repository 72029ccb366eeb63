"""The jobs that inspect nothing: a model trained on by night, and synthetic data of a rare class.

Both are safe to run again: a slot's data has a name of its own and takes it whole, and a retrained model is
called by what it was made of. So a slot that was killed makes what it would have made, once.
"""

import hashlib
import json
import shutil
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from rollsight.inspect.errors import CONFIG, USAGE, UserError
from rollsight.inspect.rolls import write_durably
from rollsight.jobs.ledger.claims import Lease, finish, note
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.heartbeat import Heartbeat
from rollsight.jobs.ledger.schema import Slot
from rollsight.jobs.night_file import made_file, report_of, write_night
from rollsight.jobs.nightly import give_back
from rollsight.jobs.schedule import Retrain, Synthetic
from rollsight.jobs.sites import Site
from sqlalchemy.orm import Session

FOLDER = "labels/synthetic"  # in the plant folder


def run_making(site: Site, entry: Retrain | Synthetic, slot: Lease) -> str:
    """Do what the job says, holding `slot`, and end the slot; one line that tells what was made.

    What was made stands in night.json as well, with its slot, and in an event. Raises LeaseLostError where
    another process took the slot over, and StoppedError at SIGTERM, with the lease given back; UserError 78
    where the set-up is at fault.
    """
    with site.ledger.read() as session:
        row = session.get_one(Slot, slot.id)
        report, at = report_of(site, row), row.scheduled_for
        beside = site.plant.home / made_file(report, row)
    site.ledger.keep(lambda session: note(session, slot, report=report))
    try:
        with Heartbeat(site.ledger, site.clock, slot) as beat:

            def on_done(done: int, of: int) -> None:
                beat.check()

            if isinstance(entry, Retrain):
                made, line = _retrain(site, entry, on_done)
            else:
                made, line = _synthetic(site, entry, at, on_done)
            beat.check()
    except BaseException as told:
        # Told to stop: the lease goes back. A fault: the slot stays, to be failed by it.
        if not isinstance(told, Exception):
            with suppress(UserError):
                give_back(site, [slot])
        raise
    beside.parent.mkdir(parents=True, exist_ok=True)
    write_durably(beside, json.dumps(made, indent=1).encode())
    kind = "model.retrained" if isinstance(entry, Retrain) else "data.made"

    def end(session: Session) -> None:
        if finish(session, slot, site.clock(), "done", error=None, exit_code=0):
            add_event(session, site.clock(), kind, slot_id=slot.id, detail=json.dumps(made))

    site.ledger.keep(end)
    write_night(site, report)
    return line


def _retrain(site: Site, entry: Retrain, on_done: Any) -> tuple[dict[str, Any], str]:
    import torch
    from rollsight.inspect.recipe import Recipe
    from rollsight.jobs.cluster import slots
    from rollsight.jobs.retrain_job import LEARNING_RATE, retrain

    plant, paths = site.plant, _paths(site, entry.data, "data")
    try:
        plant.model(entry.model)
    except UserError as fault:
        raise UserError(str(fault), CONFIG) from None
    recipe = Recipe(steps=entry.steps, seed=entry.seed, learning_rate=LEARNING_RATE)
    before = torch.get_num_threads()  # of this process, which inspects afterwards
    torch.set_num_threads(entry.threads or slots())
    try:
        told = retrain(
            plant, paths, recipe, at=site.clock(), start=entry.model, on_step=on_done, on_image=on_done
        )
    except UserError as fault:
        if fault.exit_code != USAGE:
            raise
        raise UserError(str(fault), CONFIG) from None  # a wrong option of the command is a wrong key here
    finally:
        torch.set_num_threads(before)
    made = {
        "model": told.name,
        "is_new": told.is_new,
        "is_default": told.is_default,
        "thresholds": told.thresholds,
        "passed": None if told.verdicts is None else told.passed,
        "promoted": False,
        "report": site.relative(told.report),
    }
    gates = "no gates.yaml says whether it is good enough"
    if told.is_default:
        gates = "the default already and not judged again"
    elif told.verdicts is not None:
        gates = "every gate is open" if told.passed else "a gate is shut"
    return made, f"{told.name}: {'trained' if told.is_new else 'learned before'}, {gates}: {told.report}"


def _synthetic(site: Site, entry: Synthetic, at: datetime, on_done: Any) -> tuple[dict[str, Any], str]:
    from rollsight.synth.compose import Order, make_data
    from rollsight.synth.data_card import DATASET

    out = site.plant.home / FOLDER / f"{entry.name}-{at:%Y-%m-%dT%H%MZ}"
    if not out.exists():
        try:
            generator, steel = _sources(site, entry)
        except UserError as fault:
            raise UserError(f"job {entry.name}: {fault}", CONFIG) from None
        for left in out.parent.glob(f".{out.name}-*"):  # of a process that was killed at this slot
            shutil.rmtree(left)
        make_data(generator, steel, Order(seed=seed_of(entry.seed, at)), entry.n, out, on_image=on_done)
    elif not (out / DATASET).is_file():
        raise UserError(f"{out} is there and holds no synthetic data: move it away", CONFIG)
    card = json.loads((out / DATASET).read_bytes())
    made = {
        "data": site.relative(out),
        "class": entry.defect_class,
        "generator": card["generator"],
        "seed": card["order"]["seed"],
        "samples": card["samples"],
        "marks": card["marks"],
        "reject_rate": card["reject_rate"],
    }
    return made, f"{card['samples']} samples with {card['marks']} new {entry.defect_class}: {out}"


def _sources(site: Site, entry: Synthetic) -> tuple[Any, Any]:
    """The generator of a job and its steel; UserError where one is not there or they do not fit."""
    from rollsight.synth.backgrounds import open_backgrounds
    from rollsight.synth.generator import open_generator

    generator = open_generator(site.plant.generator_path(entry.generator or entry.defect_class))
    card = generator.card
    if card.defect_class != entry.defect_class:
        raise UserError(
            f"generator {card.name} makes {card.defect_class}, not {entry.defect_class}: name another"
        )
    paths = _paths(site, entry.labels, "labels")
    return generator, open_backgrounds(paths, card.data_classes, card.held_groups)


def seed_of(seed: int, at: datetime) -> int:
    """The seed of a slot's data: the job's and the moment, so that every night draws other samples."""
    digest = hashlib.sha256(f"{seed}/{at.isoformat()}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _paths(site: Site, named: tuple[str, ...], key: str) -> list[Path]:
    """The paths of a key, from the plant folder; UserError 78 for one that is not there."""
    paths = [site.plant.home / name for name in named]
    for path in paths:
        if not path.exists():
            raise UserError(f"{key}: {path} is not there: name labelled data of the plant folder", CONFIG)
    return paths
