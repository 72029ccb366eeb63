"""Alerts over real HTTP and SMTP servers: each is seen once, whatever fails on the way."""

import base64
import email
import hashlib
import hmac
import http.server
import json
import random
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email import policy
from email.message import EmailMessage
from http.client import HTTPMessage
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from rollsight.inspect.errors import CONFIG, UserError
from rollsight.inspect.plant import Plant
from rollsight.jobs.alerts import CLAIMED_S, MAX_AGE, send_due, waiting
from rollsight.jobs.channels import channels_of
from rollsight.jobs.ledger.outbox import put_alert
from rollsight.jobs.ledger.schema import Alert
from rollsight.jobs.schedule import LineFile
from rollsight.jobs.sites import Site
from sqlalchemy import select

NOW = datetime(2026, 11, 24, 6, 30, tzinfo=UTC)


class Receiver:
    """A webhook receiver: keeps what it gets, answers with the codes given, then 204."""

    def __init__(self) -> None:
        self.got: list[tuple[HTTPMessage, bytes]] = []
        self.codes: list[int] = []
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append((self.headers, body))
                code = receiver.codes.pop(0) if receiver.codes else 204
                if code == 0:  # it took it, and the answer is lost
                    self.connection.close()
                    return
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Nothing on the terminal."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def keys(self) -> list[str]:
        return [headers["Idempotency-Key"] for headers, _ in self.got]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


class Mailbox:
    """An SMTP server that keeps its mails."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        self.refuse = 0
        self.unknown: set[str] = set()
        self.good_bye = "221 bye"

    async def handle_RCPT(  # noqa: N802
        self, server: Any, session: Any, envelope: Any, address: str, options: list[str]
    ) -> str:
        if address in self.unknown:
            return "550 no such user"
        envelope.rcpt_tos.append(address)
        return "250 known"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 (aiosmtpd asks for it)
        if self.refuse:
            self.refuse -= 1
            return "451 try again later"
        self.mails.append(email.message_from_bytes(envelope.content, policy=policy.default))
        return "250 taken"

    async def handle_QUIT(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        return self.good_bye


@pytest.fixture
def mailbox() -> Iterator[tuple[Mailbox, int]]:
    box = Mailbox()
    with socket.socket() as free:  # aiosmtpd asks for the port's number before it opens it
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    controller = Controller(box, hostname="127.0.0.1", port=port)
    controller.start()
    yield box, port
    controller.stop()


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


def site_with(ledger, tmp_path, **alerts) -> Site:
    return Site(Plant(tmp_path), ledger, LineFile(alerts=alerts), Clock(), random.Random(1))


def put(site: Site, key: str, kind: str = "blocked", at: datetime = NOW) -> None:
    with site.ledger.write() as session:
        assert put_alert(session, at, key, kind, f"roll {key} is blocked", "Why.\nMore.", roll_id="C1")


def test_a_webhook_gets_each_alert_once_signed_and_with_its_key(ledger, tmp_path, receiver, monkeypatch):
    """The signature is what Standard Webhooks asks for, computed here anew."""
    monkeypatch.setenv("HOOK_SECRET", "whsec_" + base64.b64encode(b"of the mill").decode())
    hook = {"name": "shift", "url": receiver.url, "secret_env": "HOOK_SECRET"}
    site = site_with(ledger, tmp_path, webhooks=[hook])
    put(site, "blocked:C1:ab:0")
    put(site, "blocked:C2:ab:0")

    assert [send_due(site).sent for _ in range(3)] == [2, 0, 0]
    assert receiver.keys == ["blocked:C1:ab:0", "blocked:C2:ab:0"]
    headers, body = receiver.got[0]
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    told = base64.b64encode(hmac.new(b"of the mill", signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{told}"
    assert headers["webhook-timestamp"] == str(int(NOW.timestamp()))
    assert json.loads(body)["data"] == {
        "key": "blocked:C1:ab:0",
        "kind": "blocked",
        "subject": "roll blocked:C1:ab:0 is blocked",
        "body": "Why.\nMore.",
        "roll_id": "C1",
    }


def test_what_fails_is_sent_again_later_under_the_same_key(ledger, tmp_path, receiver):
    """A refusal, a redirect and an answer that is lost; each time it waits, and then it is taken once."""
    receiver.codes = [503, 302, 0]
    site = site_with(ledger, tmp_path, webhooks=[{"name": "shift", "url": receiver.url}])
    put(site, "blocked:C1:ab:0")
    faults = []
    for _ in range(4):
        told = send_due(site)
        faults += told.failed.values()
        assert send_due(site).sent == 0  # not before its wait is over
        site.clock.now += timedelta(hours=1)

    assert told.sent == 1
    assert [fault.split(":")[1].split()[0] for fault in faults] == ["503", "302", "RemoteDisconnected"]
    assert receiver.keys == ["blocked:C1:ab:0"] * 4
    with ledger.read() as session:
        row = session.scalars(select(Alert)).one()
        assert (row.attempts, row.last_error, row.sent_at) == (4, None, NOW + timedelta(hours=3))


def test_a_mail_is_plain_text_with_a_message_id_that_stays(ledger, tmp_path, mailbox):
    box, port = mailbox
    box.refuse = 1
    mail = {"host": "127.0.0.1", "port": port, "from": "rollsight@mill.example", "to": ["qe@mill.example"]}
    site = site_with(ledger, tmp_path, mail=mail)
    put(site, "blocked:C1:ab:0")

    assert "451" in send_due(site).failed["blocked:C1:ab:0"]
    site.clock.now += timedelta(hours=1)
    assert send_due(site).sent == 1
    [got] = box.mails
    assert got["Subject"] == "[rollsight] roll blocked:C1:ab:0 is blocked"
    assert (got["From"], got["To"]) == ("rollsight@mill.example", "qe@mill.example")
    assert got.get_content().splitlines() == ["Why.", "More."]
    key = hashlib.sha256(b"blocked:C1:ab:0").hexdigest()[:32]
    assert got["Message-ID"] == f"<{key}@mill.example>"


def test_a_mail_that_one_of_several_addresses_refuses_is_sent_once_and_the_refusal_is_told(
    ledger, tmp_path, mailbox
):
    box, port = mailbox
    box.unknown = {"left@mill.example"}
    mail = {"host": "127.0.0.1", "port": port, "from": "a@b.example", "to": ["qe@mill.example"]}
    mail["to"].append("left@mill.example")
    site = site_with(ledger, tmp_path, mail=mail)
    put(site, "blocked:C1")

    told = send_due(site)
    refusal = "mail: refused left@mill.example (550 no such user)"
    assert (told.sent, told.failed, told.refused) == (1, {}, {"blocked:C1": refusal})
    site.clock.now += timedelta(hours=1)
    assert send_due(site).sent == 0
    assert len(box.mails) == 1
    with ledger.read() as session:
        row = session.scalars(select(Alert)).one()
        assert (row.sent_at, row.last_error) == (NOW, refusal)


@pytest.mark.parametrize("answer", ["250 bye", "421 closing", "what?"])
def test_a_mail_that_was_taken_is_sent_once_however_the_server_says_good_bye(
    ledger, tmp_path, mailbox, answer
):
    box, port = mailbox
    box.good_bye = answer
    mail = {"host": "127.0.0.1", "port": port, "from": "a@b.example", "to": ["qe@mill.example"]}
    site = site_with(ledger, tmp_path, mail=mail)
    put(site, "blocked:C1")

    told = send_due(site)
    assert (told.sent, told.failed) == (1, {})
    site.clock.now += timedelta(hours=1)
    assert send_due(site).sent == 0
    assert len(box.mails) == 1


def test_a_mail_that_every_address_refuses_is_not_sent(ledger, tmp_path, mailbox):
    box, port = mailbox
    box.unknown = {"left@mill.example"}
    mail = {"host": "127.0.0.1", "port": port, "from": "a@b.example", "to": ["left@mill.example"]}
    site = site_with(ledger, tmp_path, mail=mail)
    put(site, "blocked:C1")

    told = send_due(site)
    assert (told.sent, told.refused) == (0, {})
    assert "550" in told.failed["blocked:C1"]


def test_a_channel_that_took_an_alert_does_not_get_it_again_for_another_ones_fault(
    ledger, tmp_path, receiver, mailbox
):
    box, port = mailbox
    box.refuse = 1
    mail = {"host": "127.0.0.1", "port": port, "from": "a@b.example", "to": ["qe@mill.example"]}
    site = site_with(ledger, tmp_path, mail=mail, webhooks=[{"name": "shift", "url": receiver.url}])
    put(site, "blocked:C1:ab:0")
    send_due(site)
    site.clock.now += timedelta(hours=1)

    assert send_due(site).sent == 1
    assert (len(receiver.got), len(box.mails)) == (1, 1)


def test_a_password_that_no_login_carries_is_told_in_one_line_and_stops_no_other_channel(
    ledger, tmp_path, receiver, monkeypatch
):
    monkeypatch.setenv("MAIL_USER", "rollsight")
    monkeypatch.setenv("MAIL_PASSWORD", "gehe\u00edm")
    mail = {"host": "127.0.0.1", "port": 1, "from": "a@b.c", "to": ["d@e.f"], "security": "starttls"}
    mail |= {"user_env": "MAIL_USER", "password_env": "MAIL_PASSWORD"}
    site = site_with(ledger, tmp_path, webhooks=[{"name": "shift", "url": receiver.url}], mail=mail)
    put(site, "blocked:C1")

    [told] = send_due(site).failed.values()
    assert told == "mail: ValueError: environment variable MAIL_PASSWORD holds more than ASCII, " + (
        "which no login carries"
    )
    assert receiver.keys == ["blocked:C1"]


def test_two_senders_at_once_send_each_alert_once(ledger, tmp_path, receiver):
    site = site_with(ledger, tmp_path, webhooks=[{"name": "shift", "url": receiver.url}])
    for number in range(20):
        put(site, f"blocked:C{number}")
    threads = [threading.Thread(target=send_due, args=(site,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(receiver.keys) == sorted(f"blocked:C{number}" for number in range(20))


def test_a_sender_that_died_after_its_claim_is_made_up_for(ledger, tmp_path, receiver):
    """The claim ends by itself: nothing is lost, and the key tells the receiver that it knows it."""
    site = site_with(ledger, tmp_path, webhooks=[{"name": "shift", "url": receiver.url}])
    put(site, "late:nightly")
    with ledger.write() as session:
        row = session.scalars(select(Alert)).one()
        row.attempts, row.next_attempt_at = 1, NOW + timedelta(seconds=CLAIMED_S)

    assert send_due(site).sent == 0
    site.clock.now += timedelta(seconds=CLAIMED_S)
    assert send_due(site).sent == 1


def test_a_channel_gets_the_kinds_it_asked_for_and_nothing_old(ledger, tmp_path, receiver):
    hook = {"name": "shift", "url": receiver.url, "kinds": ["late", "disk"]}
    site = site_with(ledger, tmp_path, webhooks=[hook])
    put(site, "hold:C1", "hold")
    put(site, "late:nightly", "late")
    put(site, "late:old", "late", NOW - MAX_AGE - timedelta(seconds=1))

    assert send_due(site).sent == 1
    assert receiver.keys == ["late:nightly"]
    with ledger.read() as session:
        assert [row.dedupe_key for row in waiting(session, NOW)] == ["hold:C1"]


@pytest.mark.parametrize(
    ("alerts", "told"),
    [
        (
            {"webhooks": [{"name": "shift", "url": "htps://x/y"}]},
            "alerts.webhooks.0.url: 'htps://x/y' is no URL",
        ),
        ({"webhooks": [{"name": "shift", "url": "http://"}]}, "is no URL of a webhook"),
        ({"webhooks": [{"name": "shift", "url": "file:///etc/passwd"}]}, "is no URL of a webhook"),
        ({"webhooks": [{"name": "shift", "url": "https://a:b@h/x"}]}, "no user or password in the URL"),
        (
            {"webhooks": [{"name": "s", "url": "http://h/x", "secret_env": "no secret!"}]},
            "names an environment",
        ),
        (
            {"webhooks": [{"name": "s", "url": "http://h/x", "secret_env": "NOT_SET_HERE"}]},
            "NOT_SET_HERE: set it",
        ),
        (
            {"webhooks": [{"name": "s", "url": "http://h/x", "kinds": ["blokked"]}]},
            "alerts.webhooks.0.kinds.0",
        ),
        (
            {"webhooks": [{"name": "s", "url": "http://h/x", "kinds": ["dead", "partial"]}]},
            "alerts.webhooks.0.kinds.1",  # of which no alert was ever put
        ),
        ({"webhooks": [{"name": "s", "url": "http://h/x"}] * 2}, "two channels have the same name"),
        ({"mail": {"host": "h", "from": "nobody", "to": ["a@b.c"]}}, "'nobody' is no mail address"),
        ({"mail": {"host": "h", "from": "a@b.c", "to": []}}, "alerts.mail.to"),
        (
            {"mail": {"host": "h", "from": "a@b.c", "to": ["a@b.c"], "user_env": "U", "password_env": "P"}},
            "not sent in clear",
        ),
        ({"mail": {"host": "h", "from": "a@[1.2.3", "to": ["a@b.c"]}}, "'a@[1.2.3' is no mail address"),
        ({"mail": {"host": "h", "from": "a@b.c", "to": ["a..b@c"]}}, "'a..b@c' is no mail address"),
        ({"sms": {}}, "alerts.sms: Extra inputs"),
    ],
)
def test_a_channel_that_cannot_work_is_one_line_before_anything_is_sent(alerts, told):
    with pytest.raises(UserError) as fault:
        channels_of(LineFile(alerts=alerts))

    assert told in str(fault.value)
    assert fault.value.exit_code == CONFIG


def test_a_receiver_that_is_not_there_is_told_in_one_line(ledger, tmp_path):
    site = site_with(ledger, tmp_path, webhooks=[{"name": "shift", "url": "http://127.0.0.1:1/x"}])
    put(site, "late:nightly", "late")

    [told] = send_due(site).failed.values()
    assert told.startswith("shift: ConnectionRefusedError") and "\n" not in told
