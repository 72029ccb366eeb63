"""Alerts on their way to people: the outbox of the ledger, by webhook and by e-mail.

An alert is claimed before it is sent and written off afterwards, so a sender that dies in between sends it
again: at least once. Every time it carries the same key, in the headers Idempotency-Key and webhook-id and as
the Message-ID of a mail, by which a receiver sees it once. What one channel has taken is not sent there again
because another one failed. A webhook is signed as Standard Webhooks says (standardwebhooks.com, 1.0.0).
"""

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import random
import smtplib
import ssl
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.errors import MessageError
from email.message import EmailMessage
from email.utils import format_datetime
from typing import Any
from urllib.error import HTTPError, URLError

from rollsight.jobs.channels import Channels, Mail, Webhook, all_kinds, channels_of, secret_of
from rollsight.jobs.ledger.claims import wait_s
from rollsight.jobs.ledger.events import add_event
from rollsight.jobs.ledger.schema import Alert, Event
from rollsight.jobs.sites import Site
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

CLAIMED_S = 120.0  # nobody else sends an alert for so long after one process took it
TIMEOUT_S = 10.0  # of one delivery, per answer of the other side
MAX_ATTEMPT = 6  # of the wait: from the sixth failure on up to half an hour
MAX_AGE = timedelta(days=3)  # older ones are not sent any more: a new channel does not begin with a flood
OVERDUE = timedelta(minutes=15)  # a tick may come only so often
# The last three come of a set-up that the mail or HTTP library cannot put into its protocol.
_FAULTS = (
    OSError,
    smtplib.SMTPException,
    http.client.HTTPException,
    MessageError,
    ValueError,
    AttributeError,
)
SENT = "alert.sent"  # event of one channel that took an alert; detail: {"key", "channel", "refused"}


@dataclass(frozen=True, slots=True)
class Message:
    """An alert as it goes out."""

    id: int
    key: str  # the same at every attempt
    kind: str
    subject: str
    body: str
    roll_id: str | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Sent:
    """What one round did."""

    sent: int
    failed: dict[str, str]  # key of the alert -> one line
    refused: dict[str, str] = field(default_factory=dict)  # the same of those sent, but not to all


def send_due(site: Site, channels: Channels | None = None) -> Sent:
    """Send what is due, oldest first; each alert is claimed by one process at a time.

    Nothing is done where line.yaml has no channel. An alert whose delivery fails is due again after a drawn
    wait, up to half an hour, until it is 3 days old; one that a mail server took for some of the addresses is
    sent. UserError 78 where the channels are not as they must be.
    """
    channels = channels_of(site.line) if channels is None else channels
    kinds = {kind for channel in channels.all for kind in (channel.kinds or all_kinds())}
    sent, failed, refused, tried = 0, dict[str, str](), dict[str, str](), set[int]()
    while channels.all and (
        due := site.ledger.keep(lambda session: _take(session, site.clock(), kinds, tried))
    ):
        message, attempt, there = due
        tried.add(message.id)
        faults, refusals = list[str](), list[str]()
        for channel in channels.all:
            if not channel.takes(message.kind) or channel.name in there:
                continue
            taken, fault = deliver(channel, message, site.clock())
            if fault is not None:
                (refusals if taken else faults).append(f"{channel.name}: {fault}")
            if taken:
                site.ledger.keep(lambda session: _took(session, site.clock(), message, channel.name, fault))  # noqa: B023
        told = "; ".join([*faults, *refusals])[:1000] or None
        is_sent = not faults
        site.ledger.keep(
            lambda session: _end(session, site.clock(), message, told, attempt, site.draw, is_sent=is_sent)  # noqa: B023
        )
        sent += is_sent
        if told is not None:
            (refused if is_sent else failed)[message.key] = told
    return Sent(sent, failed, refused)


def waiting(session: Session, now: datetime) -> Sequence[Alert]:
    """Alerts that no one was told of yet and that are young enough to be sent, oldest first."""
    query = select(Alert).where(Alert.sent_at.is_(None), Alert.created_at > now - MAX_AGE)
    return session.scalars(query.order_by(Alert.created_at, Alert.id)).all()


def overdue(session: Session, now: datetime, channels: Channels) -> int:
    """How many alerts should have gone out by now and did not."""
    kinds = {kind for channel in channels.all for kind in (channel.kinds or all_kinds())}
    return sum(row.kind in kinds and now - row.created_at > OVERDUE for row in waiting(session, now))


def deliver(channel: Webhook | Mail, message: Message, now: datetime) -> tuple[bool, str | None]:
    """Send a message by one channel: whether it was taken, and in one line why not, or by whom not."""
    refused = None
    try:
        if isinstance(channel, Webhook):
            post(channel, message, now)
        else:
            refused = send_mail(channel, message, now)
    except HTTPError as error:
        error.close()
        return False, f"{error.code} {error.reason}"[:300]
    except _FAULTS as error:
        reason = error.reason if isinstance(error, URLError) else error
        return False, " ".join(f"{type(reason).__name__}: {reason}".split())[:300]
    return True, refused


def post(hook: Webhook, message: Message, now: datetime) -> None:
    """POST the message as JSON, signed where the hook has a secret; OSError where it is not taken (2xx)."""
    body = json.dumps(
        {
            "type": f"rollsight.{message.kind}",
            "timestamp": message.created_at.astimezone(UTC).isoformat(),
            "data": {
                "key": message.key,
                "kind": message.kind,
                "subject": message.subject,
                "body": message.body,
                "roll_id": message.roll_id,
            },
        }
    ).encode()
    key = header_key(message.key)
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "rollsight",
        "Idempotency-Key": key,
        "webhook-id": key,
        "webhook-timestamp": str(int(now.timestamp())),
    }
    if hook.secret_env is not None:
        headers["webhook-signature"] = signature(secret_of(hook), key, int(now.timestamp()), body)
    request = urllib.request.Request(hook.url, data=body, headers=headers, method="POST")  # noqa: S310 # http(s) only, see Webhook
    with _OPENER.open(request, timeout=TIMEOUT_S) as answer:
        answer.read(1024)


def signature(key: bytes, message_id: str, at: int, body: bytes) -> str:
    """The value of `webhook-signature`: v1 and HMAC-SHA256 over "id.seconds.body", in base64."""
    signed = b".".join((message_id.encode(), str(at).encode(), body))
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


def send_mail(mail: Mail, message: Message, now: datetime) -> str | None:
    """Send the message as plain text to all that are named; the addresses that the server refused, if any.

    OSError or SMTPException where it takes none.
    """
    made = EmailMessage()
    made["Subject"] = " ".join(f"[rollsight] {message.subject}".split())[:200]
    made["From"], made["To"] = mail.sender, ", ".join(mail.to)
    made["Date"] = format_datetime(now)
    made["Auto-Submitted"] = "auto-generated"  # RFC 3834: no absence note comes back
    name = hashlib.sha256(message.key.encode()).hexdigest()[:32]
    made["Message-ID"] = f"<{name}@{mail.sender.rpartition('@')[2]}>"
    made["X-Rollsight-Key"] = header_key(message.key)
    made.set_content(message.body.rstrip() + "\n")
    login = [_said_to_server(name) for name in (mail.user_env, mail.password_env) if name is not None]
    secure = ssl.create_default_context()
    smtp = (
        smtplib.SMTP_SSL(mail.host, mail.port, timeout=TIMEOUT_S, context=secure)
        if mail.security == "tls"
        else smtplib.SMTP(mail.host, mail.port, timeout=TIMEOUT_S)
    )
    with contextlib.closing(smtp):
        if mail.security == "starttls":
            smtp.starttls(context=secure)
        if login:
            smtp.login(*login)
        refused = smtp.send_message(made)
        # The mail is taken, however the server says good-bye (`with smtp` raises at any answer but 221): it
        # must not be sent again. An SMTPException is an OSError.
        with contextlib.suppress(OSError):
            smtp.quit()
    told = [
        f"{address} ({code} {words.decode('utf-8', 'replace')})"
        for address, (code, words) in sorted(refused.items())
    ]
    return " ".join(f"refused {', '.join(told)}".split())[:300] if told else None


def _said_to_server(name: str) -> str:
    """User or password as SMTP can carry it; ValueError, without the secret, where it cannot."""
    if not (secret := os.environ.get(name, "")).isascii():
        raise ValueError(f"environment variable {name} holds more than ASCII, which no login carries")
    return secret


def header_key(key: str) -> str:
    """The key as a header may hold it."""
    return urllib.parse.quote(key, safe=":/+@,.-_ ")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST becomes a GET: the alert would be gone without a word."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _take(
    session: Session, now: datetime, kinds: set[str], tried: set[int]
) -> tuple[Message, int, set[str]] | None:
    """Claim the oldest alert that is due: it, which attempt it is, and which channels have it already."""
    due = (
        select(Alert)
        .where(
            Alert.sent_at.is_(None),
            or_(Alert.next_attempt_at.is_(None), Alert.next_attempt_at <= now),
            Alert.created_at > now - MAX_AGE,
            Alert.kind.in_(kinds),
            Alert.id.not_in(tried),
        )
        .order_by(Alert.created_at, Alert.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    row = session.scalars(due).first()
    if row is None:
        return None
    row.attempts += 1
    row.next_attempt_at = now + timedelta(seconds=CLAIMED_S)
    there = set()
    if row.attempts > 1:
        events = select(Event.detail).where(Event.kind == SENT, Event.at >= row.created_at)
        told = [json.loads(detail or "{}") for detail in session.scalars(events)]
        there = {entry["channel"] for entry in told if entry.get("key") == row.dedupe_key}
    message = Message(row.id, row.dedupe_key, row.kind, row.subject, row.body, row.roll_id, row.created_at)
    return message, row.attempts, there


def _took(session: Session, now: datetime, message: Message, channel: str, refused: str | None) -> None:
    detail = {"key": message.key, "channel": channel} | ({"refused": refused} if refused else {})
    add_event(session, now, SENT, roll_id=message.roll_id, detail=json.dumps(detail))


def _end(
    session: Session,
    now: datetime,
    message: Message,
    told: str | None,
    attempt: int,
    draw: random.Random,
    *,
    is_sent: bool,
) -> None:
    row = session.get_one(Alert, message.id)
    if row.attempts != attempt:  # another process claimed it since: its word counts
        return
    row.last_error = told
    if is_sent:
        row.sent_at, row.next_attempt_at = now, None
    else:
        row.next_attempt_at = now + timedelta(seconds=wait_s(min(attempt, MAX_ATTEMPT), draw))
