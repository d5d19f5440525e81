"""Who may call: the tokens file, read again whenever it changes, and what of it is in force. The file is the manager's; data
processes are told what it says. Used by auth/access.py and by `engram tokens`.

    [limits]                      # of every tenant that has no table of its own; 0 or left out: none
    sessions_max = 1000

    [tenants.acme]                # limits of one tenant
    sessions_max = 20000
    streams_max = 40
    rows_max = 50000
    stored_max = 1000000

    [tokens.acme-cameras]         # the token's name, for logs
    tenant = "acme"
    rights = ["read", "step"]
    sha256 = "..."                # of the token; the token itself is nowhere
    expires = 2027-01-01T00:00:00Z

A token is 256 random bits, so its plain SHA-256 gives nothing away: nobody can try 2^256 tokens, and a slow hash with a salt,
which a password needs because people choose from few, would only cost every call time. It is looked up by its hash, and how
long that takes tells nothing of any token.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engram_models.files import Stamp, is_passing, read_toml, stamp_of
from engram_service.auth.tenants import UNKNOWN, TenantNumbers, usable_tenant
from engram_service.errors import UnauthenticatedError
from engram_service.settings import SettingError

log = logging.getLogger(__name__)

RIGHTS = {
    "read": "list and look at sessions and memories, recall",
    "step": "open and step sessions, store and forget patterns",
    "manage": "fork, move, close, export and import sessions",
    "operate": "what concerns the whole server: reload models, reflection",
}
_POLL_MIN_S = 0.05
_NEVER = float("inf")
_FILE_BYTES_MAX = 16 << 20
_PREFIX = "engram_"  # so that people and secret scanners see what it is
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEYS = {"tenant", "rights", "sha256", "expires"}


class TokensError(Exception):
    """The tokens file cannot be used. The message says where and why, and quotes nothing of it that may be secret.

    `passing`: it could not be read just now, and may be good.
    """

    def __init__(self, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may have at a time, at one server where nothing else is said; 0: as much as the server has."""

    sessions_max: int = 0
    streams_max: int = 0
    rows_max: int = 0
    stored_max: int = 0  # in Redis, whichever servers use it


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and what it may. Without a tokens file everybody is this one."""

    tenant: str = ""
    token: str = ""  # its name
    rights: frozenset[str] = frozenset(RIGHTS)
    expires: float = float("inf")  # seconds since 1970
    digest: str = field(default="", repr=False)
    number: int = -1  # under which the wire knows it


@dataclass(frozen=True, slots=True)
class Book:
    """What a tokens file says."""

    callers: Mapping[str, Caller]  # by hash
    tenants: Mapping[str, Limits]
    limits: Limits  # of the other tenants
    numbers: Mapping[str, int] = field(default_factory=dict)  # of tenants (auth/tenants.py); none: they get some


class Tokens:
    """The tokens in force. Event loop only."""

    def __init__(self, book: Book | None = None) -> None:
        """None: everybody may do everything."""
        self.on_change: Callable[[], None] = lambda: None
        self._numbers: dict[str, int] = {}  # by digest; a number is never given to another token
        self.asked_for = book is not None
        """Whether callers need one."""
        self._tenants = TenantNumbers()
        self._put(book or Book({}, {}, Limits()))

    @property
    def book(self) -> Book | None:
        """What is in force, its callers and tenants with their numbers; None: nobody needs a token."""
        return self._book if self.asked_for else None

    def replace(self, book: Book) -> None:
        """Puts other tokens in force, all at once."""
        self._put(book)
        self.on_change()

    def caller(self, token: str) -> Caller:
        """Whose token this is. Raises UnauthenticatedError."""
        if not self.asked_for:
            return Caller()
        if not token:
            raise missing()
        return self._valid(digest_of(token))

    def numbered(self, number: int) -> Caller | None:
        """The caller whom the wire knows under this number, also one whose token has expired."""
        return self._by_number.get(number)

    def renewed(self, caller: Caller) -> Caller:
        """The caller as it is by now. Raises UnauthenticatedError where its token was revoked or has expired."""
        return self._valid(caller.digest) if self.asked_for else caller

    def limits(self, tenant: str) -> Limits:
        return self._book.tenants.get(tenant, self._book.limits)

    def number_of(self, tenant: str) -> int:
        """Under which it is counted what the tenant has."""
        return self._book.numbers.get(tenant, UNKNOWN)

    async def expire(self, poll_s: float) -> None:
        """Says every so often that a token may have expired; runs until cancelled."""
        while self.asked_for:
            await asyncio.sleep(max(poll_s, _POLL_MIN_S))
            self.on_change()

    def _put(self, book: Book) -> None:
        callers = {digest: self._named(caller) for digest, caller in book.callers.items()}
        numbers = book.numbers or self._tenants.of(caller.tenant for caller in callers.values())
        self._book = replace(book, callers=callers, numbers=numbers)
        self._by_number = {caller.number: caller for caller in callers.values()}

    def _named(self, caller: Caller) -> Caller:
        if caller.number < 0:
            caller = replace(caller, number=self._numbers.setdefault(caller.digest, len(self._numbers)))
        return caller

    def _valid(self, digest: str) -> Caller:
        found = self._book.callers.get(digest)
        if found is None:
            raise unknown()
        if found.expires <= time.time():
            raise UnauthenticatedError("TOKEN_EXPIRED", f"the token {found.token!r} has expired; ask for a new one")
        return found


class TokensFile:
    """The file that the tokens come from. Event loop only."""

    def __init__(self, path: Path | None) -> None:
        """Reads the file; None: everybody may do everything. Raises SettingError."""
        self._path = path
        self._files = [] if path is None else [path]
        self._stamp = stamp_of(*self._files)
        self._told: tuple[Stamp, str] = ((), "")  # why which file cannot be used, as it was logged
        try:
            self.tokens = Tokens(None if path is None else read_book(path))
        except TokensError as error:
            raise SettingError(f"tokens_file = {str(path)!r}: {error}") from error

    async def watch(self, poll_s: float) -> None:
        """Reads the file again when it has changed; runs until cancelled."""
        while self._path is not None:
            await asyncio.sleep(max(poll_s, _POLL_MIN_S))
            await self.reload()

    async def reload(self) -> None:
        """Reads the file if it has changed. A bad one leaves what is in force in force."""
        path = self._path
        stamp = await asyncio.to_thread(stamp_of, *self._files)
        if path is None or stamp == self._stamp:
            return
        try:
            book = await asyncio.to_thread(read_book, path)
        except TokensError as error:
            if not error.passing:  # else it is read again at the next look
                self._stamp = stamp
            if (told := (stamp, str(error))) != self._told:
                self._told = told
                log.error("tokens_file cannot be used, those read before stay in force: %s", error)
                _audit("failed")
        else:
            self._stamp, self._told = stamp, (stamp, "")
            self.tokens.replace(book)
            log.info("%d tokens are in force", len(book.callers))
            _audit("ok")


def told(book: Book | None) -> dict[str, Any] | None:
    """A book as JSON has it, for another process; `heard` makes a book of it."""
    if book is None:
        return None
    callers = [
        [
            one.number,
            one.digest,
            one.tenant,
            one.token,
            sorted(one.rights),
            None if one.expires == _NEVER else one.expires,
        ]
        for one in book.callers.values()
    ]
    return {
        "callers": callers,
        "tenants": {name: asdict(limits) for name, limits in book.tenants.items()},
        "limits": asdict(book.limits),
        "numbers": dict(book.numbers),
    }


def heard(told: dict[str, Any] | None) -> Book | None:
    if told is None:
        return None
    callers = {
        digest: Caller(tenant, token, frozenset(rights), _NEVER if expires is None else expires, digest, number)
        for number, digest, tenant, token, rights, expires in told["callers"]
    }
    tenants = {name: Limits(**limits) for name, limits in told["tenants"].items()}
    return Book(callers, tenants, Limits(**told["limits"]), told["numbers"])


def missing() -> UnauthenticatedError:
    return UnauthenticatedError("TOKEN_MISSING", "this server asks for a token: metadata authorization: Bearer TOKEN")


def unknown() -> UnauthenticatedError:
    return UnauthenticatedError("TOKEN_UNKNOWN", "this token is not known, or was revoked")


def new_token() -> str:
    """A token of 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def usable_name(name: str) -> bool:
    """Whether a token may be called so."""
    return _NAME.fullmatch(name) is not None


def digest_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def read_book(path: Path) -> Book:
    """Raises TokensError, whatever is wrong with the file."""
    try:
        content = read_toml(path, _FILE_BYTES_MAX)
    except OSError as error:
        raise TokensError(error.strerror or str(error), is_passing(error)) from error
    except ValueError as error:
        raise TokensError(str(error)) from error
    try:
        return _book(content)
    except TokensError:
        raise
    except Exception as error:  # a file may be wrong in ways that nobody has thought of; its content is not quoted
        raise TokensError(f"it cannot be used: {type(error).__name__}") from error


def _book(content: dict[str, Any]) -> Book:
    if unknown := set(content) - {"limits", "tenants", "tokens"}:
        raise TokensError(f"unknown {', '.join(sorted(unknown))}; there are limits, tenants and tokens")
    tables = {name: _table(content, name) for name in ("limits", "tenants", "tokens")}
    callers: dict[str, Caller] = {}
    for name, values in tables["tokens"].items():
        caller = _caller(name, values)
        if caller.digest in callers:
            raise TokensError(f"tokens.{name} and tokens.{callers[caller.digest].token} have the same hash")
        callers[caller.digest] = caller
    tenants = {}
    for name, values in tables["tenants"].items():
        if not usable_tenant(name):
            raise TokensError(f"tenants.{name}: {_TENANT_RULE}")
        tenants[name] = _limits(f"tenants.{name}", values)
    return Book(callers, tenants, _limits("limits", tables["limits"]))


_TENANT_RULE = "a tenant has 1 to 64 letters, digits, dots, dashes and underscores"


def _table(content: dict[str, Any], name: str) -> dict[str, Any]:
    values = content.get(name, {})
    if not isinstance(values, dict):
        raise TokensError(f"{name}: not a table")
    return values


def _caller(name: str, values: Any) -> Caller:
    where = f"tokens.{name}"
    if not isinstance(values, dict):
        raise TokensError(f"{where}: not a table")
    if unknown := set(values) - _KEYS:
        raise TokensError(f"{where}: unknown {', '.join(sorted(unknown))}; there are {', '.join(sorted(_KEYS))}")
    if not usable_name(name):
        raise TokensError(f"{where}: a token's name is made of letters, digits, dots, dashes and underscores")
    tenant, rights, digest = values.get("tenant"), values.get("rights"), values.get("sha256")
    if not isinstance(tenant, str) or not usable_tenant(tenant):
        raise TokensError(f"{where}: tenant: {_TENANT_RULE}")
    if not isinstance(rights, list) or not rights or not all(isinstance(r, str) and r in RIGHTS for r in rights):
        raise TokensError(f"{where}: rights is a list of one or more of {', '.join(RIGHTS)}")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise TokensError(f"{where}: sha256 is 64 hexadecimal digits, as `engram tokens new` prints them")
    expires = values.get("expires")
    if expires is None:
        return Caller(tenant, name, frozenset(rights), digest=digest)
    if not isinstance(expires, datetime) or expires.tzinfo is None:
        raise TokensError(f"{where}: expires is a time with its zone, such as 2027-01-01T00:00:00Z")
    try:
        until = expires.astimezone(UTC).timestamp()
    except OverflowError as error:
        raise TokensError(f"{where}: expires is beyond the years that there are") from error
    return Caller(tenant, name, frozenset(rights), until, digest)


def _limits(where: str, values: Any) -> Limits:
    names = [item.name for item in fields(Limits)]
    if not isinstance(values, dict) or set(values) - set(names):
        raise TokensError(f"{where}: there are {', '.join(names)}")
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise TokensError(f"{where}: {name} is a whole number, 0 for no limit")
    return Limits(**values)


def _audit(outcome: str) -> None:
    logging.getLogger("engram.audit").info("audit", extra={"method": "tokens reload", "outcome": outcome})
