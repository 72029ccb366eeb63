"""The morning page: last night's rolls by what needs a person, and whether the night was like those before.

One HTML file that needs nothing else. It is made of plain facts (`Morning`), wherever they come from.
"""

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from rollsight.inspect.coverage import in_percent
from rollsight.inspect.report.page import COLOURS, FOLDER, environment
from rollsight.inspect.roll_places import write_durably
from rollsight.inspect.trends import SCORE_BINS, Control, Drift, score_drift, u_chart

# What is said of a roll, in the order in which a person is needed.
STATES = {
    "blocked": "blocked",
    "unreadable": "unreadable",
    "missing": "missing",
    "failed": "failed",
    "hold": "on hold",
    "partial": "partial",
    "waiting": "waiting",
    "fine": "fine",
}
BAD = ("blocked", "unreadable", "missing", "failed")
NEEDS_A_PERSON = (*BAD, "hold", "partial")
# What is said of a job that did not do its work, in the order in which it weighs.
TROUBLES = {
    "late": "is late",
    "missed": "was not begun",
    "failed": "cannot run",
    "dead": "was given up",
    "retry": "is tried again",
    "partial": "ended in part",
    "skipped": "was left out",
}
AREA_M2 = 1000.0  # rates are per so much inspected strip
CHART = (38.0, 8.0, 262.0, 84.0)  # of a trend, in its own units: left, top, width, height within the axes
SPARK = (150.0, 26.0)  # of a row of past checks
MAX_REASONS = 3  # per roll; its page has all
MAX_WHY = 140  # characters of a job's fault in the head; the list of jobs has all

_ALARMING = ("above", "risen", "drift")
_NOTED = ("below", "fallen", "watch")


@dataclass(frozen=True, slots=True)
class RollLine:
    """One roll of the night."""

    roll_id: str
    state: str  # a key of STATES
    verdict: str | None = None
    reasons: tuple[str, ...] = ()  # why it needs a person
    line_id: str | None = None
    coverage: float | None = None  # 0 to 1
    length_m: float | None = None
    width_mm: float | None = None
    defects: int | None = None
    by_class: tuple[tuple[str, int], ...] = ()
    inspected_at: datetime | None = None  # in the zone of the plant
    page: str | None = None  # relative to the morning page
    model: str | None = None  # where several models were at work

    @property
    def strip_m2(self) -> float | None:
        """Strip, inspected or not; None where the roll has no scale."""
        if self.length_m is None or self.width_mm is None:
            return None
        return self.length_m * self.width_mm / 1000

    @property
    def area_m2(self) -> float | None:
        """Inspected strip; None where the roll has no scale."""
        if self.strip_m2 is None:
            return None
        return self.strip_m2 * (1.0 if self.coverage is None else self.coverage)


@dataclass(frozen=True, slots=True)
class Night:
    """What was inspected in 24 hours."""

    day: date  # on which they end
    area_m2: float  # of rolls with a scale
    by_class: dict[str, int]  # of the same rolls; classes in the order of the model
    states: dict[str, int]  # rolls by state
    covered_m2: float = 0.0  # strip of these rolls, inspected or not


@dataclass(frozen=True, slots=True)
class Check:
    """One figure of the reference strip: now, its band, and before."""

    name: str
    what: str  # "defects" | "mean gray"
    value: float
    low: float
    high: float
    history: tuple[float, ...]  # oldest first, the last is `value`

    @property
    def in_band(self) -> bool:
        return self.low <= self.value <= self.high


@dataclass(frozen=True, slots=True)
class Stability:
    """The last check on the reference strip; of several models the worst."""

    roll_id: str
    at: datetime
    model: str
    is_baseline: bool
    checks: tuple[Check, ...]
    error: str | None = None  # why it could not be scanned
    is_old: bool = False  # it says nothing of the last night

    @property
    def out(self) -> list[Check]:
        return [check for check in self.checks if not check.in_band]


@dataclass(frozen=True, slots=True)
class Trouble:
    """What a job did not do."""

    job: str
    state: str  # a key of TROUBLES
    since: datetime  # the last success, or the moment that it was to run at
    why: str


@dataclass(frozen=True, slots=True)
class Scores:
    """Histograms (SCORE_BINS,) of the scores of one class: last night, and in the nights before."""

    name: str
    reference: tuple[int, ...]
    now: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Morning:
    """All that the page shows."""

    title: str  # the line, or the plant
    made_at: datetime  # in the zone of the plant, as all times here
    since: datetime
    rolls: tuple[RollLine, ...]
    nights: tuple[Night, ...]  # oldest first; the last is the one that is judged
    stability: Stability | None
    scores: tuple[Scores, ...]
    model: str | None  # whose scores these are
    jobs: tuple[tuple[str, datetime | None], ...] = ()  # job and its last success
    alerts_waiting: int | None = None  # that should have gone out; None: there is no channel
    troubles: tuple[Trouble, ...] = ()
    old_at: datetime | None = None  # from then on another page should be there; a page that is opened says so


def write_morning(path: Path, morning: Morning) -> Path:
    """Write the page, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, render(morning).encode())
    return path


def render(morning: Morning) -> str:
    """The page as HTML. All values are escaped; only our own style and script are not."""
    style = "".join((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "morning.css"))
    script = (FOLDER / "morning.js").read_text(encoding="utf-8")
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    ours = {"style": style, "script": script, "script_hash": script_hash}
    trusted = {name: Markup(text) for name, text in ours.items()}  # noqa: S704 # files of this package
    made = environment()
    made.filters.update(coverage=in_percent, rate=_rate)
    return made.get_template("morning.html").render(_content(morning), **trusted)


def in_order(rolls: Sequence[RollLine]) -> list[RollLine]:
    """The rolls by what needs a person; those that are fine by defects per area, most first."""
    rank = {state: i for i, state in enumerate(STATES)}

    def key(roll: RollLine) -> tuple[int, float, str]:
        if roll.state == "hold":
            return rank[roll.state], roll.coverage if roll.coverage is not None else 0.0, roll.roll_id
        return rank[roll.state], -(_per_area(roll) or 0.0), roll.roll_id

    return sorted(rolls, key=key)


def _content(m: Morning) -> dict[str, Any]:
    """All that the template shows."""
    rolls = in_order(m.rolls)
    troubles = sorted(m.troubles, key=lambda t: list(TROUBLES).index(t.state))
    states = Counter(roll.state for roll in rolls)
    # In the order of the model that is judged: a class has the colour that it has on the pages of its rolls.
    classes = list(dict.fromkeys(name for night in reversed(m.nights) for name in night.by_class))
    classes += sorted({name for roll in rolls for name, _ in roll.by_class} - set(classes))
    kind = {name: i for i, name in enumerate(classes)}
    trends = _trends(m.nights, classes, kind)
    scores = [(s, score_drift(s.reference, s.now)) for s in m.scores]
    inspected = [roll for roll in rolls if roll.coverage is not None]
    area = sum(roll.area_m2 or 0.0 for roll in inspected)
    whole = sum(roll.strip_m2 or 0.0 for roll in inspected)
    return {
        "m": m,
        "states": STATES,
        "troubles": [(trouble, TROUBLES[trouble.state]) for trouble in troubles],
        "counts": {state: states[state] for state in STATES if states[state]},
        "needed": sum(states[state] for state in NEEDS_A_PERSON),
        "urgent": [_row(roll, kind) for roll in rolls if roll.state != "fine"],
        "fine": [_row(roll, kind) for roll in rolls if roll.state == "fine"],
        "inspected": len(inspected),
        "coverage": area / whole if whole else None,
        "length_km": sum(roll.length_m or 0.0 for roll in inspected) / 1000,
        "classes": [{"name": name, "colour": COLOURS[i % len(COLOURS)]} for i, name in enumerate(classes)],
        "trends": trends,
        "nights": _nights(m.nights),
        "scores": [_scores(s, d, kind) for s, d in sorted(scores, key=_by_drift)],
        "checks": [] if m.stability is None else [_check(check) for check in _by_band(m.stability.checks)],
        "warnings": _warnings(m, troubles, trends, scores),
        "chart": CHART,
        "spark": SPARK,
        "area": f"{AREA_M2:,.0f} m²",
        "filterable": states["fine"] > 12,
    }


def _row(roll: RollLine, kind: dict[str, int]) -> dict[str, Any]:
    """A row of a table of rolls, with its defects by class as one bar."""
    total = sum(count for _, count in roll.by_class)
    bars, x = [], 0.0
    for name, count in sorted(roll.by_class, key=lambda item: kind[item[0]]):
        if count:
            bars.append((kind[name], round(x, 1), round(100 * count / total, 1)))
            x += 100 * count / total
    said = ", ".join(f"{name} {count:,}" for name, count in roll.by_class if count)
    return {
        "r": roll,
        "reasons": roll.reasons[:MAX_REASONS],
        "more": max(0, len(roll.reasons) - MAX_REASONS),
        "per_area": _per_area(roll),
        "bars": bars,
        "said": said,
    }


def _per_area(roll: RollLine) -> float | None:
    """Defects per 1000 m² of inspected strip."""
    area = roll.area_m2
    return None if not area or roll.defects is None else roll.defects * AREA_M2 / area


def _trends(nights: Sequence[Night], classes: Sequence[str], kind: dict[str, int]) -> list[dict[str, Any]]:
    """A chart per class, those out of their band first."""
    areas = [night.area_m2 / AREA_M2 for night in nights]
    made = []
    for name in classes:
        counts = [night.by_class.get(name, 0) for night in nights]
        if not any(counts):
            continue
        control = u_chart(counts, areas)
        made.append(_trend(name, COLOURS[kind[name] % len(COLOURS)], control, counts, nights))
    rank = {says: i for i, says in enumerate((*_ALARMING, *_NOTED))}
    return sorted(made, key=lambda t: (rank.get(t["says"], 9), -(t["last"] or 0.0)))


def _trend(
    name: str, colour: str, control: Control, counts: Sequence[int], nights: Sequence[Night]
) -> dict[str, Any]:
    """One chart: the rate night by night over its band, in the chart's units."""
    left, top, width, height = CHART
    shown = np.concatenate([control.rate, control.high])
    ceiling = _nice(float(np.nanmax(shown)) if np.isfinite(shown).any() else 1.0)
    n = len(nights)

    def x(i: float) -> float:
        return round(left + width * (i + 0.5) / max(n, 1), 1)

    def y(value: float) -> float:
        return round(top + height * (1 - min(value, ceiling) / ceiling), 1)

    seen = [i for i in range(n) if np.isfinite(control.rate[i])]
    points = [
        {
            "x": x(i),
            "y": y(control.rate[i]),
            "out": bool(control.rate[i] > control.high[i] or control.rate[i] < control.low[i]),
            "title": f"{nights[i].day:%a %d %b}: {_rate(control.rate[i])}, {counts[i]:,} found",
        }
        for i in seen
    ]
    band = None
    if control.mean is not None:
        inside = [i for i in range(n) if np.isfinite(control.high[i])]
        up = [f"{x(i)} {y(control.high[i])}" for i in inside]
        down = [f"{x(i)} {y(control.low[i])}" for i in reversed(inside)]
        band = "M" + "L".join(up + down) + "Z" if inside else None
    last = float(control.rate[-1]) if n and np.isfinite(control.rate[-1]) else None
    return {
        "name": name,
        "colour": colour,
        "says": control.says,
        "alarm": "bad" if control.says in _ALARMING else "note" if control.says in _NOTED else "",
        "last": last,
        "mean": control.mean,
        "spread": control.spread,
        "band": band,
        "mean_y": None if control.mean is None else y(control.mean),
        "line": _broken(seen, points),
        "points": points,
        "ticks": [(y(value), _rate(value)) for value in (0.0, ceiling / 2, ceiling)],
        "days": [(x(i), f"{nights[i].day:%d %b}") for i in sorted({0, n // 2, n - 1}) if n],
    }


def _broken(at: Sequence[int], points: Sequence[dict[str, Any]]) -> str:
    """A line through the points that breaks where a night is missing."""
    d = ""
    for i, (now, point) in enumerate(zip(at, points, strict=True)):
        d += f"{'L' if i and at[i - 1] == now - 1 else 'M'}{point['x']} {point['y']}"
    return d


def _nights(nights: Sequence[Night]) -> dict[str, Any] | None:
    """Rolls per night by state, and coverage, as bars over one axis of days."""
    tallest = max((sum(night.states.values()) for night in nights), default=0)
    if not tallest:
        return None
    ceiling = _nice(float(tallest))
    groups = {"bad": BAD, "hold": ("hold",), "partial": ("partial", "waiting"), "fine": ("fine",)}
    columns = []
    for i, night in enumerate(nights):
        base, bars = 0.0, []
        for group in ("fine", "partial", "hold", "bad"):
            count = sum(night.states.get(state, 0) for state in groups[group])
            if count:
                bars.append(
                    (group, round(100 - 100 * (base + count) / ceiling, 2), round(100 * count / ceiling, 2))
                )
                base += count
        told = ", ".join(f"{night.states[s]} {STATES[s]}" for s in STATES if night.states.get(s))
        share = night.area_m2 / night.covered_m2 if night.covered_m2 else None
        covered = "" if share is None else f", coverage {in_percent(share)} %"
        columns.append(
            {
                "x": round(100 * i / len(nights), 3),
                "bars": bars,
                "title": f"{night.day:%a %d %b}: {told or 'nothing inspected'}{covered}",
                "label": f"{night.day:%d %b}" if (len(nights) - 1 - i) % 5 == 0 else "",
                "share": share,
            }
        )
    return {"columns": columns, "width": round(100 / len(nights), 3), "ceiling": f"{ceiling:,.0f}"}


def _check(check: Check) -> dict[str, Any]:
    """A figure of the reference strip against its band, and its past as a line."""
    width, height = SPARK
    room = (check.high - check.low) or 1.0
    low, high = check.low - 0.35 * room, check.high + 0.35 * room

    def along(value: float) -> float:
        return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 1)

    def y(value: float) -> float:
        return round(height - height * along(value) / 100, 1)

    n = len(check.history)
    step = width / max(n - 1, 1)
    return {
        "c": check,
        "at": along(check.value),
        "from": along(check.low),
        "span": round(along(check.high) - along(check.low), 1),
        "digits": 0 if check.what == "defects" else 4,
        "line": "M" + "L".join(f"{round(i * step, 1)} {y(v)}" for i, v in enumerate(check.history))
        if n > 1
        else "",
        "band_y": (y(check.high), round(y(check.low) - y(check.high), 1)),
    }


def _scores(scores: Scores, drift: Drift, kind: dict[str, int]) -> dict[str, Any]:
    """The two histograms as shares, one drawn over the other."""
    width, height = SPARK
    shares = [np.asarray(h, dtype=float) / max(sum(h), 1) for h in (scores.reference, scores.now)]
    top = max(float(share.max()) for share in shares) or 1.0
    step = width / SCORE_BINS
    bars = [
        (round(i * step, 1), round(height * (1 - share / top), 1), round(height * share / top, 1))
        for i, share in enumerate(shares[1])
        if share
    ]
    edge = "".join(
        f"V{round(height * (1 - s / top), 1)}H{round((i + 1) * step, 1)}" for i, s in enumerate(shares[0])
    )
    return {
        "name": scores.name,
        "d": drift,
        "alarm": "bad" if drift.says == "drift" else "note" if drift.says == "watch" else "",
        "bars": bars,
        "step": round(step - 0.8, 1),
        "edge": f"M0 {height}{edge}V{height}",
        "colour": COLOURS[kind[scores.name] % len(COLOURS)] if scores.name in kind else "#555",
    }


def _warnings(
    m: Morning,
    troubles: Sequence[Trouble],
    trends: Sequence[dict[str, Any]],
    scores: Sequence[tuple[Scores, Drift]],
) -> list[tuple[str, str, str]]:
    """What the head of the page says beside the rolls: (id of its section, short, longer)."""
    told = []
    for trouble in troubles:
        why = trouble.why if len(trouble.why) <= MAX_WHY else f"{trouble.why[:MAX_WHY]}…"
        told.append(
            ("jobs", f"{trouble.job} {TROUBLES[trouble.state]}", f"{trouble.since:%a %d %b %H:%M}: {why}")
        )
    if m.stability is not None and (m.stability.error or m.stability.out):
        why = m.stability.error or ", ".join(check.name for check in m.stability.out)
        told.append(("stability", "Stability out of band", why))
    up = [t["name"] for t in trends if t["alarm"] == "bad"]
    if up:
        told.append(
            ("trends", f"{len(up)} {'class' if len(up) == 1 else 'classes'} above usual", ", ".join(up))
        )
    moved = [s.name for s, d in scores if d.says == "drift"]
    if moved:
        told.append(("drift", "Scores have drifted", ", ".join(moved)))
    if m.alerts_waiting:
        told.append(("facts", f"Alerts not sent: {m.alerts_waiting}", "inspect jobs alerts"))
    return told


def _by_drift(pair: tuple[Scores, Drift]) -> tuple[bool, float]:
    return pair[1].index is None, -(pair[1].index or 0.0)


def _by_band(checks: Sequence[Check]) -> list[Check]:
    return sorted(checks, key=lambda check: (check.in_band, check.what != "mean gray"))


def _nice(value: float) -> float:
    """The next round number up, whose half is round too."""
    if value <= 0:
        return 1.0
    ten = 10.0 ** math.floor(math.log10(value))
    return next(
        (step * ten for step in (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0) if step * ten >= value * 0.999),
        10 * ten,
    )


def _rate(value: float) -> str:
    """A rate with the digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
