"""What goes on beside the nights: alerts go out, the morning page is made anew, what has come of age goes.

Beside, not after: a night takes hours, and whoever must act on a blocked roll is told within half a minute.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

from rollsight.inspect.errors import UserError
from rollsight.jobs import alerts
from rollsight.jobs.ledger.database import LedgerAwayError
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.schema import Event
from rollsight.jobs.sites import Site, open_site
from rollsight.jobs.stopping import is_stop
from sqlalchemy import func, or_, select, text
from sqlalchemy.orm import Session

EVERY_S = 20.0
RETAIN_BEGUN, RETAINED, PAGE_MADE = "retention.begun", "retention.ran", "page.made"  # events
RETAIN_EVERY = timedelta(days=1)
RETAIN_CLAIMED = timedelta(hours=1)  # nobody else begins for so long; after a fault it is tried again then
TOLD = ("slot", "run", "stability", "doctor")  # of whose events the page tells
PAGE_EVERY = timedelta(minutes=2)  # while the work goes on: a page of 1000 rolls takes a second of a core


def follow_up(site: Site, *, at_last: bool = True) -> list[str]:
    """Send what is due; make the page where something happened or a day began; once a day, `retention:`.

    at_last: the work is over, so the page is made now, however new it is. Nothing is deleted in a plant whose
    line.yaml says nothing of retention. Returns a line per fault, whatever it is: none of this stops a night
    or another step, and each is tried again the next time, retention after an hour. LedgerAwayError where the
    ledger is.
    """
    faults = []
    steps: list[tuple[str, Callable[[Site], list[str]]]] = [("alerts", _send)]
    steps.append(("morning page", lambda site: _page(site, at_last=at_last)))
    if "retention" in site.line.model_fields_set:
        steps.append(("retention", _retain))
    for what, step in steps:
        try:
            faults += step(site)
        except LedgerAwayError:
            raise
        except UserError as fault:
            faults.append(f"{what}: {fault}")
        except Exception as fault:
            faults.append(f"{what}: {_told_of(fault)}")
    return faults


@contextlib.contextmanager
def followed(
    home: Path | None, ledger: str | None, on_fault: Callable[[str], None], every_s: float = EVERY_S
) -> Iterator[None]:
    """Follow up beside what is done in here, in a thread with a ledger of its own, and once at its end.

    on_fault is told each fault once. Where the work was told to stop, or the ledger is away, there is no last
    round; whatever else ended it, there is. Nothing is said of a plant or ledger that cannot be opened: the
    work itself does.
    """
    stop, last = threading.Event(), threading.Event()
    thread = threading.Thread(target=_follow, args=(home, ledger, on_fault, every_s, stop, last), daemon=True)
    thread.start()
    try:
        yield
    except UserError as fault:
        if isinstance(fault, LedgerAwayError) or is_stop(fault):
            last.set()
        raise
    except BaseException:
        last.set()
        raise
    finally:
        stop.set()
        thread.join(1.0 if last.is_set() else None)


def _follow(
    home: Path | None,
    ledger: str | None,
    on_fault: Callable[[str], None],
    every_s: float,
    stop: threading.Event,
    last: threading.Event,
) -> None:
    told: set[str] = set()
    site = None
    ended = False
    while not ended:
        ended = stop.wait(every_s)
        if last.is_set():
            break
        faults = []
        try:
            site = site or open_site(home, ledger)
            faults = follow_up(site, at_last=ended)
        except UserError:
            pass  # no plant, no ledger: the work itself tells, or it comes back
        except Exception as fault:
            faults = [_told_of(fault)]
        for line in faults:
            if line not in told:
                told.add(line)
                with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
                    on_fault(line)
    if site is not None:
        site.ledger.close()


def _told_of(fault: Exception) -> str:
    from rollsight.jobs.nightly import told_of

    return told_of(fault)[0]


def _send(site: Site) -> list[str]:
    told = alerts.send_due(site)
    return [
        *(f"alert {key} is not sent: {fault}" for key, fault in told.failed.items()),
        *(f"alert {key} is sent, but not to all: {fault}" for key, fault in told.refused.items()),
    ]


def _page(site: Site, *, at_last: bool) -> list[str]:
    now = site.clock()
    with site.ledger.read() as session:
        # The last by its place in the ledger: the time of another may be that of a clock that was ahead.
        pages = select(Event.id, Event.at).where(Event.kind == PAGE_MADE).order_by(Event.id.desc())
        page = session.execute(pages.limit(1)).first()
        key, made = (0, None) if page is None else page
        told = or_(*(Event.kind.startswith(f"{subject}.") for subject in TOLD))
        since = Event.id > key  # or while the page was made
        since = since if made is None else or_(since, Event.at.between(made, now))
        is_news = session.scalar(select(Event.id).where(since, told).limit(1)) is not None
    if made is not None:
        zone = site.line.zone_of(None)
        is_news |= made > now or made.astimezone(zone).date() < now.astimezone(zone).date()
    soon = made is not None and timedelta(0) <= now - made < PAGE_EVERY and not at_last
    if is_news and not soon:
        from rollsight.jobs.morning_job import make_page

        make_page(site)
        site.ledger.keep(lambda session: add_event(session, now, PAGE_MADE))
    return []


def _retain(site: Site) -> list[str]:
    from rollsight.jobs.retention import keep_of, retain

    keep_of(site.line)  # a rule that is wrong claims no hour
    if site.ledger.keep(lambda session: _claim_retention(session, site)):
        steps = retain(site)
        counts = [sum(step.action == action for step in steps) for action in ("mark", "delete")]
        detail = f"{counts[0]} marked, {counts[1]} deleted"
        now = site.clock()
        site.ledger.keep(lambda session: add_event(session, now, RETAINED, detail=detail))
    return []


def _claim_retention(session: Session, site: Site) -> bool:
    """Whether this process is the one that applies the rule today; written down before it begins."""
    if site.ledger.backend == "postgresql":  # SQLite has one writer anyway
        session.execute(text("LOCK TABLE event IN SHARE ROW EXCLUSIVE MODE"))
    now = site.clock()
    for kind, every in ((RETAINED, RETAIN_EVERY), (RETAIN_BEGUN, RETAIN_CLAIMED)):
        last = session.scalar(select(func.max(Event.at)).where(Event.kind == kind))
        if last is not None and timedelta(0) <= now - last < every:
            return False
    add_event(session, now, RETAIN_BEGUN, owner=site.owner)
    return True
