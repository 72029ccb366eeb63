"""Where alerts go: `alerts:` of line.yaml, checked before anything is sent.

    alerts:
      webhooks:
        - {name: shift, url: https://hooks.mill.example/x, secret_env: SHIFT_SECRET, kinds: [blocked, late]}
      mail: {host: mail.mill.example, from: rollsight@mill.example, to: [quality@mill.example]}

Secrets stand in environment variables, named there, never in the file.
"""

import base64
import binascii
import contextlib
import os
import re
import urllib.parse
from collections.abc import Mapping
from email.errors import MessageError, NonASCIILocalPartDefect
from email.headerregistry import Address
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from rollsight.inspect.errors import CONFIG, UserError
from rollsight.jobs.schedule import LINE_FILE, LineFile, Name

Kind = Literal["blocked", "hold", "stability", "missing", "unreadable", "late", "disk", "dead"]
M = TypeVar("M", bound=BaseModel)

_ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ADDRESS = re.compile(r"[^@\s<>,;:\"]+@[^@\s<>,;:\"]+")


def _env_name(value: str | None) -> str | None:
    if value is not None and not _ENV.fullmatch(value):
        raise ValueError("it names an environment variable; the secret itself never stands in the file")
    return value


def _is_address(address: str) -> bool:
    """Whether a mail header can hold it; `a@[1.2.3` ends the library's parser by an AttributeError."""
    try:
        Address(addr_spec=address)
    except NonASCIILocalPartDefect:
        return True  # servers with SMTPUTF8 take it
    except (ValueError, AttributeError, IndexError, MessageError):
        return False
    return True


class Channel(BaseModel):
    """What webhooks and mail share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kinds: tuple[Kind, ...] | None = None  # None: all

    def takes(self, kind: str) -> bool:
        return self.kinds is None or kind in self.kinds


class Webhook(Channel):
    """One receiver of HTTP POST with JSON."""

    name: Name
    url: str
    secret_env: str | None = None  # environment variable with the key of the signature; None: unsigned

    _secret = field_validator("secret_env")(_env_name)

    @field_validator("url")
    @classmethod
    def _reachable(cls, value: str) -> str:
        try:
            parts = urllib.parse.urlsplit(value)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            known = False
        if not known or re.search(r"[\s\x00-\x1f]", value) or not value.isascii():
            raise ValueError(f"{value[:80]!r} is no URL of a webhook: it is one like https://HOST/PATH")
        if parts.username or parts.password:
            raise ValueError("no user or password in the URL: sign with secret_env")
        return value


class Mail(Channel):
    """A mail server and who gets the mails."""

    name: Name = "mail"
    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9.:_-]{1,253}$")]
    port: int = Field(default=25, ge=1, le=65535)
    security: Literal["none", "starttls", "tls"] = "none"
    sender: str = Field(alias="from")
    to: tuple[str, ...] = Field(min_length=1, max_length=50)
    user_env: str | None = None  # environment variables with user and password
    password_env: str | None = None

    _secrets = field_validator("user_env", "password_env")(_env_name)

    @field_validator("sender", "to")
    @classmethod
    def _addresses(cls, value: Any) -> Any:
        for address in [value] if isinstance(value, str) else value:
            if not _ADDRESS.fullmatch(address) or not _is_address(address):
                raise ValueError(f"{address[:80]!r} is no mail address")
        return value

    @model_validator(mode="after")
    def _secret_is_kept(self) -> "Mail":
        if (self.user_env is None) != (self.password_env is None):
            raise ValueError("user_env and password_env go together")
        if self.user_env is not None and self.security == "none":
            raise ValueError("a password is not sent in clear: set security to starttls or tls")
        return self


class Channels(BaseModel):
    """`alerts:` of line.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    webhooks: tuple[Webhook, ...] = ()
    mail: Mail | None = None

    @model_validator(mode="after")
    def _unique(self) -> "Channels":
        names = [channel.name for channel in self.all]
        if len(set(names)) < len(names):
            raise ValueError("two channels have the same name")
        return self

    @property
    def all(self) -> tuple[Webhook | Mail, ...]:
        return (*self.webhooks, *([self.mail] if self.mail else []))


def channels_of(line: LineFile) -> Channels:
    """The channels of line.yaml; UserError 78 that names what is wrong, also a secret that is not set."""
    channels = listed(line)
    for channel in channels.all:
        names = (
            [channel.secret_env] if isinstance(channel, Webhook) else [channel.user_env, channel.password_env]
        )
        for name in names:
            if name is not None and not os.environ.get(name):
                raise UserError(
                    f"{LINE_FILE}: alerts: {channel.name} needs the environment variable {name}: set it",
                    CONFIG,
                )
        if isinstance(channel, Webhook) and channel.secret_env is not None:
            secret_of(channel)
    return channels


def listed(line: LineFile) -> Channels:
    """The channels of line.yaml, whether or not their secrets are at hand here; UserError 78."""
    return part_of_line(Channels, "alerts", line.alerts)


def part_of_line(model: type[M], part: str, told: Mapping[str, Any]) -> M:
    """A part of line.yaml that belongs to one module; UserError 78 that names the field."""
    try:
        return model(**{str(key): value for key, value in told.items()})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in (part, *first["loc"]))
        raise UserError(
            f"{LINE_FILE}: {where}: {first['msg'].removeprefix('Value error, ')}", CONFIG
        ) from None


def all_kinds() -> tuple[str, ...]:
    """Every kind of alert there is."""
    return Kind.__args__  # type: ignore[attr-defined,no-any-return]


def secret_of(hook: Webhook) -> bytes:
    """The key of the signature: bytes of the secret, or those that whsec_BASE64 stands for."""
    secret = os.environ.get(hook.secret_env or "", "")
    if not secret.startswith("whsec_"):
        return secret.encode()
    with contextlib.suppress(binascii.Error, ValueError):
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    raise UserError(f"environment variable {hook.secret_env}: what follows whsec_ is not base64", CONFIG)
