"""How a client behaves. Each default is written here and nowhere else."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Final

from engram._errors import InvalidInputError

if TYPE_CHECKING:
    import grpc

UNSET: Final = -1.0  # a timeout that was not given: the client's default

_SECONDS_MAX = 100 * 365 * 86_400  # a hundred years: the longest time to live that a server takes
_WHOLE_MAX = (1 << 31) - 1
_TTL_MIN_S = 0.001
_MAY_BE_NONE = ("timeout_s", "ttl_s")


def checked_seconds(name: str, seconds: float | None) -> float | None:
    """A timeout as a caller gave it. Raises InvalidInputError for what is no time: NaN, infinity, what is negative or no number."""
    try:
        if seconds is None or 0 <= seconds <= _SECONDS_MAX:
            return seconds
    except TypeError:
        pass
    message = f"{name} = {seconds!r}: give seconds, from 0 to {_SECONDS_MAX}, or None for no limit"
    raise InvalidInputError(message, reason="INVALID_ARGUMENT")


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Options of a client; all have defaults that suit most."""

    timeout_s: float | None = 60.0
    """For every call that names no timeout of its own; None: wait as long as it takes. For `run`, `prefill` and `generate` it
    is the time in which not one of their steps is answered; a timeout that is given is for the whole call."""

    connect_timeout_s: float = 10.0
    """How long the first connection may take, over all addresses."""

    reconnect_timeout_s: float = 60.0
    """How long calls wait for a lost connection to come back before they fail with UnavailableError."""

    backoff_initial_s: float = 0.05
    """The wait before the second attempt to connect; doubles, with jitter, up to backoff_max_s."""

    backoff_max_s: float = 2.0

    attempt_timeout_s: float = 5.0
    """How long one attempt to connect to one address may take."""

    follow: bool = True
    """Look for a lost server first at the address that it gave of itself (its setting `advertise`), where the sessions still
    are; for servers behind one name. It is tried once, for a second."""

    keepalive_s: float = 20.0
    """A silent connection is probed after so long, and given up after half of that without an answer."""

    acknowledge_idle_s: float = 1.0
    """Outputs of a session that sends nothing more are acknowledged after so long."""

    buffer_bytes_max: int = 64 << 20
    """Inputs kept for a resend or a replay. When full, further steps wait."""

    frame_rows_max: int = 4096
    """Most rows in one frame; the server's own limit applies too."""

    frame_bytes_max: int = 2 << 20
    """Most input bytes in one frame."""

    message_bytes_max: int = 256 << 20
    """Largest message accepted from the server."""

    ttl_s: float | None = None
    """How long an unused session lives on; None: the server's default."""

    metadata: Sequence[tuple[str, str]] = field(default=(), repr=False)
    """Sent with every call: traceparent and the like."""

    token: str | Callable[[], str] | None = field(default=None, repr=False)
    """Says who calls. A callable is asked before every call and every connection, so that a token can be replaced while the
    client lives; it must not block."""

    token_in_plain_text: bool = False
    """Lets a token go without TLS to another machine, where everybody between can read it."""

    proxy: bool = False
    """Go through the HTTP proxy that the environment names (grpc_proxy, https_proxy or http_proxy, and no_proxy), except to
    this machine. A token goes through one over TLS alone."""

    tls: bool = False
    """Speak TLS, and trust the system's CAs; a ca_file or a cert_file means it too."""

    ca_file: str | None = None
    """PEM certificates that sign the server's; None: the system's CAs."""

    cert_file: str | None = None
    """PEM certificate that this client shows to a server which asks for one. Files are read at every connection."""

    key_file: str | None = None
    """Its PEM key."""

    credentials: grpc.ChannelCredentials | None = None
    """Channel credentials made elsewhere, instead of the TLS options above."""

    @property
    def encrypted(self) -> bool:
        """Whether connections are TLS."""
        return bool(self.tls or self.ca_file or self.cert_file or self.credentials is not None)

    def check(self, addresses: Sequence[str]) -> None:
        """Raises InvalidInputError for options that are no numbers, do not fit each other, or would give a token away."""
        self._check_numbers()
        if bool(self.cert_file) != bool(self.key_file):
            raise InvalidInputError("cert_file and key_file: give both or neither", reason="INVALID_ARGUMENT")
        for address in addresses:
            if self.token is not None and not self.encrypted and self.proxied(address):
                message = (
                    f"a token would pass a proxy on its way to {address} in plain text; give tls=True or a ca_file"
                )
                raise InvalidInputError(message, reason="TOKEN_IN_PLAIN_TEXT")
            if not self.may_go_to(address):
                message = (
                    f"a token would cross the network to {address} in plain text; give tls=True or a ca_file"
                    " (or the option token_in_plain_text, where the network is one that you trust)"
                )
                raise InvalidInputError(message, reason="TOKEN_IN_PLAIN_TEXT")

    def _check_numbers(self) -> None:
        for item in fields(self):
            name, value = item.name, getattr(self, item.name)
            if name.endswith("_s"):
                if value is None and name not in _MAY_BE_NONE:
                    raise InvalidInputError(f"{name} = None: give seconds", reason="INVALID_ARGUMENT")
                checked_seconds(name, value)
            elif name.endswith("_max") and (type(value) is not int or not 1 <= value <= _WHOLE_MAX):
                message = f"{name} = {value!r}: give a whole number from 1 to {_WHOLE_MAX}"
                raise InvalidInputError(message, reason="INVALID_ARGUMENT")
        if self.ttl_s is not None and 0 < self.ttl_s < _TTL_MIN_S:
            raise InvalidInputError(f"ttl_s = {self.ttl_s!r}: at least a millisecond", reason="INVALID_ARGUMENT")

    def may_go_to(self, address: str) -> bool:
        """Whether a token that goes there cannot be read on the way, or there is none."""
        if self.token is None or self.encrypted:
            return True
        return stays_here(address) or (self.token_in_plain_text and not self.proxy)

    def proxied(self, address: str) -> bool:
        """Whether a proxy of the environment is used on the way there."""
        return self.proxy and not stays_here(address)


def stays_here(address: str) -> bool:
    """Whether an address is on this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    rest = address.partition("/")[2].rpartition("/")[2] if address.startswith("dns://") else address
    for scheme in ("dns:", "ipv4:", "ipv6:"):
        rest = rest.removeprefix(scheme)
    if rest.startswith("["):
        host = rest[1:].partition("]")[0]
    else:
        host = rest.partition(":")[0] if rest.count(":") == 1 else rest
    host = host.rstrip(".").lower()
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host == "localhost"
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback
