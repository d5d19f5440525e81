"""Everything that can be set, each default written once. Flags > ENGRAM_* environment > engram.toml > defaults.

`engram serve --help`, docs/operations.md and the parsing of all three sources come from the fields of Settings.
"""

from __future__ import annotations

import argparse
import ipaddress
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from engram_models.files import read_toml


class SettingError(Exception):
    """A setting that cannot be used. The message names the setting, where it came from, and why."""


def _setting(default: Any, help: str, choices: Sequence[str] = ()) -> Any:
    return field(default=default, metadata={"help": help, "choices": tuple(choices)})


def _data_home() -> str:
    return str(Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "engram")


@dataclass(frozen=True, slots=True)
class Settings:
    """The server's settings. Units are last in the names."""

    models: str = _setting("", "directory of bundles, <name>/<version>/; watched for new ones")
    listen: str = _setting("127.0.0.1:50051", "address of the gRPC service, HOST:PORT")
    advertise: str = _setting(
        "", "HOST:PORT at which clients reach this very server, which reconnecting ones then try first; none: not told"
    )
    wire: str = _setting(
        "auto", "who ends clients' connections: the extension engram_native or gRPC; auto: the extension, if it is here",
        ("auto", "native", "python"),
    )  # fmt: skip
    http: str = _setting("127.0.0.1:9464", "address of /metrics, /healthz and /readyz, HOST:PORT")
    http_connections_max: int = _setting(
        128,
        "connections of the HTTP port, and at most an eighth of the descriptors; one more ends the one that idles longest",
    )
    http_request_timeout_s: float = _setting(5.0, "time to send the head of a request to the HTTP port")
    redis_url: str = _setting(
        "",
        "redis://, rediss://, unix://, redis+cluster:// or rediss+cluster:// URL; none: a private Redis in the data directory",
    )
    data_dir: str = _setting("", "directory of the private Redis; none: engram in the user's data home")
    cache_dir: str = _setting(
        "", "what was found out about models on this machine; none: engram in the user's cache home"
    )
    device: str = _setting("auto", "auto, cpu or cuda:N")
    cells: str = _setting(
        "",
        "plug-in cells that models may be of, module:Class or entry points of the group engram.cells, with commas between; their "
        "code runs in the server",
    )
    shipped_models: bool = _setting(True, "serve the bundles that come with the package too")
    models_poll_s: float = _setting(2.0, "seconds between looks at the models directory")

    tls_cert: str = _setting(
        "", "PEM certificate chain of the gRPC service, read again when it changes; none: plain text"
    )
    tls_key: str = _setting("", "its PEM key")
    tls_client_ca: str = _setting(
        "", "PEM certificates that sign clients' certificates; given: nobody gets in without one"
    )
    tokens_file: str = _setting(
        "", "toml file of tenants' tokens, read again when it changes; none: everybody may do everything"
    )
    tokens_poll_s: float = _setting(
        1.0, "seconds between looks at the tokens file; a revoked token's streams end within them"
    )
    redis_tls_ca: str = _setting("", "PEM certificates that sign Redis's, for a rediss:// URL; none: the system's")
    redis_tls_cert: str = _setting("", "PEM certificate that this server shows to Redis")
    redis_tls_key: str = _setting("", "its PEM key")

    durability: str = _setting("step", "default durability of sessions", ("step", "interval"))
    interval_steps: int = _setting(256, "durability interval: commit after so many steps")
    interval_ms: int = _setting(200, "durability interval: commit after so many milliseconds")
    session_ttl_s: int = _setting(604_800, "seconds until a session expires that no stream holds")

    redis_ack: str = _setting("memory", "what a commit waits for", ("memory", "replicated", "disk"))
    redis_replicas: int = _setting(1, "redis_ack = replicated: how many replicas must have a commit")
    redis_ack_timeout_ms: int = _setting(1000, "redis_ack = replicated or disk: how long one wait may take")
    redis_connections: int = _setting(2, "connections that commit side by side")
    require_safe_redis: bool = _setting(
        False,
        "start with no Redis that may lose what it is given (no append-only file, eviction, a replica, a full disk)",
    )
    redis_maxmemory_mb: int = _setting(0, "limit of the private Redis; 0: none")
    redis_appendfsync: str = _setting("everysec", "appendfsync of the private Redis", ("always", "everysec", "no"))

    batch_rows_max: int = _setting(1024, "most rows in one batch")
    batch_run_max: int = _setting(16, "most consecutive steps of one session in one batch")
    arena_mb: int = _setting(256, "memory of one model's arena")
    arena_slots_max: int = _setting(16_384, "most resident sessions of one model")
    resident_idle_s: float = _setting(15.0, "an idle session leaves the arena after so many seconds")

    memory_cache_mb: int = _setting(512, "pattern memories that are kept at hand; one that is larger is kept alone")
    memory_workers: int = _setting(2, "threads that answer store, recall and forget")
    memory_calls_max: int = _setting(
        256, "such calls that may wait before more are refused; one tenant of several may have half of them"
    )

    frame_rows_max: int = _setting(16_384, "most rows in one frame")
    frame_bytes_max: int = _setting(16 << 20, "most bytes in one frame")
    stream_rows_max: int = _setting(32_768, "rows in flight of one stream before it is read no further")
    queue_rows_max: int = _setting(
        262_144, "rows in flight of all streams before those with more than their share are refused"
    )
    queue_s_max: float = _setting(5.0, "the same in seconds, at the rate at which rows are done; 0: no such limit")
    sessions_max: int = _setting(1_000_000, "sessions attached to this server")
    streams_max: int = _setting(
        65_536, "streams of this server; fewer where the limit of open files is too low for them"
    )
    calls_max: int = _setting(
        4096, "calls that are no streams under way at a time; one tenant of several may have half of them"
    )
    connection_calls_max: int = _setting(100, "calls and streams of one connection; a client waits with more of them")
    step_timeout_s: float = _setting(30.0, "time for a step that names none")
    drain_timeout_s: float = _setting(20.0, "time to finish accepted steps after SIGTERM")

    log_level: str = _setting("info", "least level that is logged", ("debug", "info", "warning", "error"))
    log_format: str = _setting("auto", "auto is human on a terminal, else json", ("auto", "human", "json"))

    def __post_init__(self) -> None:
        for item in fields(self):
            choices = item.metadata["choices"]
            value = getattr(self, item.name)
            if choices and value not in choices:
                raise SettingError(f"{item.name} = {value!r}: choose one of {', '.join(choices)}")
            if isinstance(value, int | float):
                _check_number(item.name, value)
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise SettingError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.redis_ack == "replicated" and not self.redis_url:
            raise SettingError("redis_ack = 'replicated': the private Redis has no replicas; give a redis_url")
        self._check_files()
        for name in ("listen", "http"):
            split_address(getattr(self, name), name)
        if self.advertise:
            split_address(self.advertise, "advertise")
        if self.device not in ("auto", "cpu") and not (self.device.startswith("cuda:") and self.device[5:].isdigit()):
            raise SettingError(f"device = {self.device!r}: use auto, cpu or cuda:N")
        if self.models and not Path(self.models).is_dir():
            raise SettingError(f"models = {self.models!r}: no such directory")

    def _check_files(self) -> None:
        for name in _FILES:
            if (path := getattr(self, name)) and not Path(path).is_file():
                raise SettingError(f"{name} = {path!r}: no such file")
        for cert, key in (("tls_cert", "tls_key"), ("redis_tls_cert", "redis_tls_key")):
            if bool(getattr(self, cert)) != bool(getattr(self, key)):
                raise SettingError(f"{cert} and {key}: give both or neither")
        if self.tls_client_ca and not self.tls_cert:
            raise SettingError("tls_client_ca: clients show certificates over TLS alone; give tls_cert and tls_key")
        if (self.redis_tls_ca or self.redis_tls_cert) and not self.redis_url.startswith("rediss"):
            raise SettingError("redis_tls_ca, redis_tls_cert: for a rediss:// or rediss+cluster:// redis_url alone")

    def exposures(self) -> list[str]:
        """What others on the network could do with this server, where that is more than most people want."""
        found = []
        if not is_loopback(split_address(self.listen, "listen")[0]):
            if not self.tokens_file and not self.tls_client_ca:
                found.append(
                    f"listen = {self.listen}: whoever reaches it may do everything; set tokens_file, or tls_client_ca"
                )
            if not self.tls_cert:
                what = "tokens and inputs cross" if self.tokens_file else "inputs cross"
                found.append(f"listen = {self.listen}: {what} the network in plain text; set tls_cert and tls_key")
        if not is_loopback(split_address(self.http, "http")[0]):
            found.append(f"http = {self.http}: whoever reaches it may read the metrics; keep the port inside")
        return found

    def model_directories(self) -> list[Path]:
        """Where bundles are looked for; earlier directories win."""
        from engram_models.bundle import shipped_models_dir

        own = [Path(self.models)] if self.models else []
        return own + ([shipped_models_dir()] if self.shipped_models or not own else [])

    def cell_names(self) -> list[str]:
        """The plug-in cells that the operator turned on."""
        return [name for part in self.cells.split(",") if (name := part.strip())]

    def cache_directory(self) -> Path:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return Path(self.cache_dir) if self.cache_dir else home / "engram"

    def data_directory(self) -> Path:
        return Path(self.data_dir or _data_home())


_AT_LEAST_ONE = (
    "interval_steps", "interval_ms", "session_ttl_s", "redis_connections", "batch_rows_max", "batch_run_max", "arena_mb",
    "arena_slots_max", "frame_rows_max", "frame_bytes_max", "stream_rows_max", "queue_rows_max", "sessions_max",
    "streams_max", "calls_max", "connection_calls_max", "redis_replicas", "redis_ack_timeout_ms",
    "memory_cache_mb", "memory_workers", "memory_calls_max", "http_connections_max",
)  # fmt: skip


_AT_MOST = {
    "frame_bytes_max": 1 << 29,  # a quarter of what gRPC can be told
}
_SECONDS_MAX = 1e9
_WHOLE_MAX = (1 << 31) - 1

_FILES = ("tls_cert", "tls_key", "tls_client_ca", "tokens_file", "redis_tls_ca", "redis_tls_cert", "redis_tls_key")


_PORT_DIGITS, _PORT_MAX = 5, 65535


def _check_number(name: str, value: int | float) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingError(f"{name} = {value}: must be a finite number")
    if value < 0:
        raise SettingError(f"{name} = {_short(str(value))}: must not be negative")
    most = _AT_MOST.get(name, _WHOLE_MAX if isinstance(value, int) else _SECONDS_MAX)
    if value > most:
        raise SettingError(f"{name} is too large: at most {most:.0f}")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def split_address(address: str, name: str) -> tuple[str, int]:
    """HOST:PORT as a pair; [IPv6]:PORT too. Raises SettingError."""
    host, colon, port = address.rpartition(":")
    named = host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= _PORT_DIGITS else -1
    if not colon or not named or set(named) & set("[]/@ ") or not 0 <= number <= _PORT_MAX:
        raise SettingError(f"{name} = {address!r}: give HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051")
    return named, number


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting, and --config."""
    parser.add_argument("--config", metavar="FILE", help="engram.toml with settings by name")
    for item in fields(Settings):
        shown = "" if item.default == "" else f" (default: {item.default})"
        choices = f"; one of {', '.join(item.metadata['choices'])}" if item.metadata["choices"] else ""
        parser.add_argument(
            "--" + item.name.replace("_", "-"),
            dest=item.name,
            metavar="VALUE",
            help=item.metadata["help"] + choices + shown,
        )


def read_settings(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """The settings from all sources. Raises SettingError for a value or a name that cannot be used."""
    kinds = get_type_hints(Settings)
    values: dict[str, Any] = {}
    config = flags.get("config") or environment.get("ENGRAM_CONFIG")
    if config:
        for name, value in _read_file(Path(config)).items():
            if name not in kinds:
                raise SettingError(f"{name} in {config}: there is no such setting")
            values[name] = _convert(name, _text(name, value, config), kinds[name], config)
    for name, kind in kinds.items():
        variable = "ENGRAM_" + name.upper()
        if variable in environment:
            values[name] = _convert(name, environment[variable], kind, variable)
        if flags.get(name) is not None:
            values[name] = _convert(name, flags[name], kind, "--" + name.replace("_", "-"))
    return Settings(**values)


def _read_file(path: Path) -> dict[str, Any]:
    """The settings of a file, by name: at its top, or in a table [server]."""
    try:
        content = read_toml(path)
    except OSError as error:
        raise SettingError(f"config = {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise SettingError(f"config = {str(path)!r}: {error}") from error
    table = content.pop("server", {})
    if not isinstance(table, dict):
        raise SettingError(f"server in {path}: a table of settings, [server]")
    if twice := sorted(set(table) & set(content)):
        raise SettingError(f"{twice[0]} in {path}: it is there twice, in [server] and before any table")
    return content | table


def _text(name: str, value: Any, source: str) -> str:
    if name == "cells" and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ",".join(value)
    if not isinstance(value, str | int | float):
        raise SettingError(f"{name} (from {source}): not a string, a number, true or false")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _convert(name: str, text: str, kind: type, source: str) -> Any:
    if kind is bool:
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise SettingError(f"{name} = {_short(text)!r} (from {source}): use true or false")
    try:
        return kind(text)
    except ValueError as error:
        raise SettingError(
            f"{name} = {_short(text)!r} (from {source}): not {'a whole number' if kind is int else 'a number'}"
        ) from error


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "..."
