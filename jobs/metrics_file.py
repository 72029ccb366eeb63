"""Metrics for Prometheus, made of the ledger at the moment they are asked for.

As a file for node_exporter's textfile collector, or over HTTP. No label holds the id of a roll: series would
grow without end.
"""

import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from rollsight.inspect.errors import CONFIG, UserError
from rollsight.inspect.rolls import write_durably
from rollsight.jobs import alerts
from rollsight.jobs.channels import listed
from rollsight.jobs.lateness import worst_check
from rollsight.jobs.ledger.schema import Alert, Band, Hold, Run, Slot
from rollsight.jobs.ledger.success import last_success
from rollsight.jobs.sites import Site
from sqlalchemy import func, select

LOCALHOST = "127.0.0.1"
RUN_STATES = ("due", "running", "retry", "done", "failed", "dead", "gone")
SLOT_STATES = ("due", "running", "retry", "done", "partial", "failed", "dead", "skipped")

Family = GaugeMetricFamily | CounterMetricFamily


class LedgerMetrics(Collector):
    """What the ledger says, asked anew at each scrape; nothing is remembered between them."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def collect(self) -> Iterator[Family]:
        yield from families(self._site)


def families(site: Site) -> Iterator[Family]:
    """All metrics; UserError 75 where the ledger is away."""
    now = site.clock()
    with site.ledger.read() as session:

        def count(table: Any, by: Any) -> dict[Any, int]:
            return dict(session.execute(select(by, func.count()).select_from(table).group_by(by)).all())

        runs, slots = count(Run, Run.state), count(Slot, Slot.state)
        oldest = session.scalar(select(func.min(Run.created_at)).where(Run.state.in_(("due", "retry"))))
        attempts = session.scalar(select(func.coalesce(func.sum(Run.attempt), 0)))
        metres, seconds = session.execute(
            select(func.coalesce(func.sum(Run.length_m), 0), func.coalesce(func.sum(Run.seconds), 0))
        ).one()
        bands, band_s = session.execute(
            select(func.count(), func.coalesce(func.sum(Band.seconds), 0)).select_from(Band)
        ).one()
        defects: Counter[str] = Counter()
        for told in session.scalars(select(Run.by_class).where(Run.by_class.is_not(None))):
            defects.update(json.loads(told or "{}"))
        last = last_success(session, now)
        sent = session.scalar(select(func.count()).where(Alert.sent_at.is_not(None)))
        unsent = alerts.overdue(session, now, listed(site.line))
        holds = session.scalar(select(func.count()).select_from(Hold).where(Hold.released_at.is_(None)))
        worst = worst_check(site.line, session, now)
        stable = None if worst is None else (worst[0].in_band, worst[0].at)
    yield _gauge("runs", "Rolls to be inspected or inspected, by state", runs, "state", RUN_STATES)
    yield _gauge("slots", "Moments of jobs, by state", slots, "state", SLOT_STATES)
    lag = 0.0 if oldest is None else (now - oldest).total_seconds()
    yield GaugeMetricFamily("rollsight_ledger_lag_seconds", "Age of the oldest run that is due", value=lag)
    yield CounterMetricFamily("rollsight_retries", "Attempts that failed", value=float(attempts or 0))
    yield CounterMetricFamily("rollsight_strip_metres", "Strip inspected, m", value=float(metres or 0))
    yield CounterMetricFamily(
        "rollsight_scan_seconds", "Time of finished scans, s", value=float(seconds or 0)
    )
    yield CounterMetricFamily("rollsight_strip_bands", "Bands committed", value=float(bands))
    yield CounterMetricFamily("rollsight_band_seconds", "Time of committed bands, s", value=float(band_s))
    found = CounterMetricFamily("rollsight_defects", "Defects found, by class", labels=("class",))
    for name, n in sorted(defects.items()):
        found.add_metric((name,), n)
    yield found
    success = GaugeMetricFamily(
        "rollsight_last_success_timestamp_seconds", "When a job last ended well, 0: never", labels=("job",)
    )
    for job in sorted({entry.name for entry in site.line.jobs} | last.keys()):
        success.add_metric((job,), last[job].timestamp() if job in last else 0)
    yield success
    yield GaugeMetricFamily("rollsight_alerts_waiting", "Alerts that should have gone out", value=unsent)
    yield CounterMetricFamily("rollsight_alerts_sent", "Alerts that went out", value=float(sent or 0))
    yield GaugeMetricFamily("rollsight_rolls_on_hold", "Rolls of which nothing is deleted", value=holds or 0)
    if stable is not None:
        yield GaugeMetricFamily(
            "rollsight_stability_in_band", "1: the last checks were", value=int(stable[0])
        )
        yield GaugeMetricFamily(
            "rollsight_stability_timestamp_seconds", "When the worst of them was", value=stable[1].timestamp()
        )
    disk = shutil.disk_usage(site.plant.home)
    yield GaugeMetricFamily("rollsight_disk_free_bytes", "Free on the disk of the plant", value=disk.free)
    reserve = site.line.disk_reserve_gb * 1e9
    yield GaugeMetricFamily("rollsight_disk_reserve_bytes", "Below it no roll is begun", value=reserve)


def text(site: Site) -> bytes:
    """The metrics in Prometheus' text format."""
    return generate_latest(_registry(site))


def write_metrics(site: Site, path: Path) -> None:
    """Write the metrics to a file *.prom, whole or not at all, as node_exporter wants it.

    UserError 78 for another name: node_exporter reads no other files.
    """
    if path.suffix != ".prom":
        raise UserError(f"{path}: node_exporter reads files that end in .prom", CONFIG)
    write_durably(path, text(site))
    path.chmod(0o644)  # another user reads it


def serve_metrics(site: Site, port: int) -> tuple[Any, threading.Thread]:
    """Serve the metrics at 127.0.0.1:PORT/metrics; server and thread. UserError 78 for a taken port."""
    try:
        return start_http_server(port, addr=LOCALHOST, registry=_registry(site))
    except OSError as error:
        raise UserError(f"port {port}: {error.strerror}: choose another with --http", CONFIG) from None


def _registry(site: Site) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(LedgerMetrics(site))
    return registry


def _gauge(
    name: str, said: str, counts: dict[str, int], label: str, values: tuple[str, ...]
) -> GaugeMetricFamily:
    """A gauge per value, 0 included: an alert on a series that is not there never fires."""
    family = GaugeMetricFamily(f"rollsight_{name}", said, labels=(label,))
    for value in values:
        family.add_metric((value,), counts.get(value, 0))
    return family
