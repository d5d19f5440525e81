"""Servers' /metrics, read over HTTP: which servers there are, and what each says."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from engram_service.protocols.http.get import get
from engram_service.settings import SettingError, split_address

Labels = tuple[tuple[str, str], ...]  # sorted by name

_TIMEOUT_S = 2.0
_AT_ONCE = 32


@dataclass(frozen=True)
class Scrape:
    """What one server said, or why it did not."""

    address: str
    at: float  # seconds, monotonic
    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)
    error: str = ""

    def sum(self, name: str, **labels: str) -> float:
        """Of all series of this name that have these labels."""
        return sum(self.by(name, "", **labels).values())

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """The same, summed by the value of a label."""
        found: dict[str, float] = {}
        for (series, has), value in self.samples.items():
            if series == name and all(pair in has for pair in labels.items()):
                key = dict(has).get(label, "")
                found[key] = found.get(key, 0.0) + value
        return found


def servers_of(addresses: Sequence[str]) -> list[str]:
    """HOST:PORT of every server: a name with several addresses, as a headless Service has, is as many servers.

    Raises ValueError where one is no HOST:PORT. A name that is not known stays, and its scrape says so.
    """
    found: dict[str, None] = {}
    for address in addresses:
        try:
            host, port = split_address(address, "server")
        except SettingError as error:
            raise ValueError(f"{address!r} is not HOST:PORT") from error
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            names = sorted({str(info[4][0]) for info in infos})
        except OSError:
            names = []
        if len(names) < 2:
            found[address] = None
        for name in names if len(names) > 1 else ():
            found[f"[{name}]:{port}" if ":" in name else f"{name}:{port}"] = None
    return list(found)


def scrape(servers: Sequence[str]) -> list[Scrape]:
    """A look at all of them, side by side."""
    with ThreadPoolExecutor(max(1, min(_AT_ONCE, len(servers))), "scrape") as pool:
        return list(pool.map(_scrape, servers))


def _scrape(address: str) -> Scrape:
    try:
        text = get(address, "/metrics", _TIMEOUT_S)
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    except (OSError, ValueError) as error:
        return Scrape(address, time.monotonic(), error=str(getattr(error, "reason", error)) or type(error).__name__)
    if not any(name.startswith("engram_") for name, _ in samples):
        return Scrape(address, time.monotonic(), error="its /metrics is not that of an Engram server")
    return Scrape(address, time.monotonic(), samples)
