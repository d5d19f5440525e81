"""How a client behaves. Each default is written here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Options of a client; all have defaults that suit most."""

    timeout_s: float | None = 60.0
    """For every call that names no timeout of its own; None: wait as long as it takes. For `run`, `absorb` and `generate` it
    is the time in which not one of their steps is answered; a timeout that is given is for the whole call."""

    connect_timeout_s: float = 10.0
    """How long the first connection may take, over all addresses."""

    reconnect_timeout_s: float = 60.0
    """How long calls wait for a lost connection to come back before they fail with Unavailable."""

    backoff_initial_s: float = 0.05
    """The wait before the second attempt to connect; doubles, with jitter, up to backoff_max_s."""

    backoff_max_s: float = 2.0

    attempt_timeout_s: float = 5.0
    """How long one attempt to connect to one address may take."""

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

    metadata: Sequence[tuple[str, str]] = ()
    """Sent with every call: authorization, traceparent and the like."""

    credentials: grpc.ChannelCredentials | None = None
    """TLS; None: plain text."""
