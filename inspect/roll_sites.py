"""A roll under construction: where it is built, who may build it, and the step that makes it whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from rollsight.inspect.errors import LOCKED, USAGE, UserError
from rollsight.inspect.roll_format import SUFFIX, group_attributes, group_json, strip_from
from rollsight.inspect.roll_places import (
    LocalPlace,
    Place,
    RemotePlace,
    claim,
    clear,
    place_of,
    sweep,
    sync,
    sync_tree,
)

FRONTIER = "frontier.json"


class LocalSite:
    """On a local disk: `.<roll-id>.partial.zarr` locks the roll and holds it until it is whole or live."""

    def __init__(self, path: Path, roll_id: str, *, live: bool, durable: bool) -> None:
        self._path = path
        self._live = live
        self._staging = path.with_name(f".{roll_id}.partial{SUFFIX}")
        self._replaced = path.with_name(f".{roll_id}.replaced{SUFFIX}")
        self._lock: int | None = None
        self._attributes: dict[str, Any] = {}
        self.home = LocalPlace(self._staging, durable=durable)

    def begin(self, attributes: dict[str, Any], *, overwrite: bool, resume: bool) -> bool:
        """Claim the roll; True where a killed writer left at `home` what may be gone on with."""
        self._attributes = attributes
        self._lock = claim(self._staging)
        if self._replaced.exists() and not self._path.exists():
            self._replaced.rename(self._path)  # set aside by a `commit` that was killed between its renames
        if self._live:
            if resume and self._grows():
                self.home = LocalPlace(self._path)
                sweep(self._path)
                return True
            check_absent(self._path, overwrite=overwrite)
            clear(self._staging)
            self.home = LocalPlace(self._staging / "roll", durable=False)
            return False
        check_absent(self._path, overwrite=overwrite)
        if resume and (self._staging / "zarr.json").exists():
            sweep(self._staging)
            return True
        clear(self._staging)
        return False

    def _grows(self) -> bool:
        """Whether a live roll stands at the place, left by a writer that was killed."""
        place = LocalPlace(self._path)
        try:
            return not strip_from(group_attributes(place), place).closed
        except UserError:
            return False

    def drop(self, *, overwrite: bool) -> None:
        """Do without what `begin` found."""
        if self._live:
            check_absent(self._path, overwrite=overwrite)
            self.home = LocalPlace(self._staging / "roll", durable=False)
        clear(self._staging)

    def created(self) -> None:
        """The arrays are there, empty: a live roll goes to its place now."""
        self.home.write("zarr.json", group_json(self._attributes))
        if self._live:
            sync_tree(self.home.path)
            self._put(self.home.path)
            self.home = LocalPlace(self._path)
        else:
            sync(self._staging.parent)

    def check(self) -> None:
        """Nobody else can write here: the lock holds until `release`."""

    def commit(self, attributes: dict[str, Any]) -> None:
        """All arrays have their last line: make the roll whole, durably."""
        self.home.write("zarr.json", group_json(attributes))
        (self.home.path / FRONTIER).unlink(missing_ok=True)
        if not self._live:
            sync_tree(self._staging)
            self._put(self._staging)
        self.release()

    def _put(self, built: Path) -> None:
        """Rename what was built to the roll's place, durably; what was there goes aside first."""
        if self._path.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
            self._path.rename(self._replaced)
        built.rename(self._path)
        sync(self._path.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)

    def abort(self) -> None:
        """Leave nothing of an unfinished roll, but let a live one stand."""
        if self._lock is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            self.release()

    def release(self) -> None:
        """Give the lock back and let the site stay as it is."""
        if self._lock is not None:
            if self._live:
                shutil.rmtree(self._staging, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


class RemoteSite:
    """In an object store: built at its place, told from a whole roll by its zarr.json alone, the last PUT.

    There is no lock. The first PUT names this writer; one that comes later puts its own name there, which
    this one sees before its next shard.
    """

    def __init__(self, place: RemotePlace) -> None:
        self.home = place
        self._id = uuid.uuid4().hex
        self._begun = False

    def begin(self, attributes: dict[str, Any], *, overwrite: bool, resume: bool) -> bool:
        """Take the prefix over from an unfinished writer, or with `overwrite` from a whole roll."""
        if resume:
            raise UserError(f"{self.home} is in an object store: a roll there cannot be resumed", USAGE)
        check_absent(self.home, overwrite=overwrite)
        self.home.write("zarr.json", group_json(attributes | {"writer": self._id}))
        self._begun = True
        self.home.clear(keep="zarr.json")
        return False

    def drop(self, *, overwrite: bool) -> None:
        """`begin` found nothing."""

    def created(self) -> None:
        """The first PUT is done already."""

    def check(self) -> None:
        """UserError (exit 75) where another writer has taken the roll over."""
        if group_attributes(self.home).get("writer") != self._id:
            self._begun = False  # what lies there is the other's
            raise UserError(f"{self.home} was taken over by another writer: let one write it", LOCKED)

    def commit(self, attributes: dict[str, Any]) -> None:
        """The last PUT."""
        self.check()
        self.home.write("zarr.json", group_json(attributes))
        self._begun = False

    def abort(self) -> None:
        """Leave nothing of the unfinished roll, as far as the store can still be reached."""
        if self._begun:
            with contextlib.suppress(UserError):
                self.check()
                self.home.clear()
            self._begun = False

    def release(self) -> None:
        """There is no lock to give back."""


Site = LocalSite | RemoteSite


def site_of(place: Place, roll_id: str, *, live: bool, durable: bool) -> Site:
    """The site of a roll that is to stand at `place`; UserError (exit 2) for a live one at a URL."""
    if isinstance(place, LocalPlace):
        return LocalSite(place.path, roll_id, live=live, durable=durable)
    if live:
        raise UserError(f"{place} is in an object store: only a roll on a local disk can grow", USAGE)
    return RemoteSite(place)


def check_absent(location: Path | str | Place, *, overwrite: bool) -> None:
    """UserError with the usage exit code where the roll exists and may not be replaced."""
    place = location if isinstance(location, LocalPlace | RemotePlace) else place_of(location)
    if overwrite:
        return
    if place.path.exists() if isinstance(place, LocalPlace) else not (place.is_empty() or _is_left(place)):
        raise UserError(f"roll {place} exists: choose another id, or say --overwrite", USAGE)


def _is_left(place: RemotePlace) -> bool:
    """Whether what lies under the prefix is of a writer of ours that did not come to its end."""
    try:
        attributes = group_attributes(place)
        return not strip_from(attributes, place).closed and "writer" in attributes
    except UserError:
        return False
