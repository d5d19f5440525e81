"""The gRPC server's certificate, from files that are looked at before each handshake: a new one is in force without a restart.

Connections that are up keep what they were made with. Files that do not fit (a certificate without its key yet, because the
two are written one after the other) leave the former ones in force until they do.
"""

from __future__ import annotations

import base64
import logging
import ssl
import threading
from pathlib import Path
from typing import Any

import grpc

from engram_models.files import Stamp, is_passing, read_file, stamp_of
from engram_service.settings import SettingError, Settings

log = logging.getLogger(__name__)

_FILE_BYTES_MAX = 4 << 20
Pems = tuple[bytes, bytes, bytes | None]
"""Certificate, key, and the CA of clients."""


def told(pems: Pems) -> list[str | None]:
    """As JSON has it, for another process; `heard` reads it."""
    return [None if one is None else base64.b64encode(one).decode() for one in pems]


def heard(told: list[str | None]) -> Pems:
    certificate, key, clients = (None if one is None else base64.b64decode(one) for one in told)
    assert certificate is not None and key is not None
    return certificate, key, clients


class Certificate:
    """The files, and what of them is in force. `fetch` is called by gRPC's threads."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        """Raises SettingError where the files cannot be used."""
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._told: tuple[Stamp, str] = ((), "")  # why which files cannot be used, as it was logged
        try:
            self.configuration = self._read()
        except Exception as error:
            raise SettingError(f"tls_cert, tls_key: {_why(error)}") from error

    @classmethod
    def of(cls, settings: Settings) -> Certificate | None:
        """None: the server speaks plain text."""
        if not settings.tls_cert:
            return None
        client_ca = Path(settings.tls_client_ca) if settings.tls_client_ca else None
        return cls(Path(settings.tls_cert), Path(settings.tls_key), client_ca)

    def credentials(self) -> grpc.ServerCredentials:
        """With a client CA, nobody gets in without a certificate that it has signed."""
        fetch: Any = self.fetch  # may say None, which gRPC's type stubs do not know
        return grpc.dynamic_ssl_server_credentials(
            self.configuration, fetch, require_client_authentication=self._client_ca is not None
        )

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """What is new in the files since the last call; None: nothing that can be used."""
        with self._lock:
            stamp = self._look()
            if stamp == self._stamp:
                return None
            try:
                self.configuration = self._read()
            except Exception as error:  # in a thread of gRPC's, which must not see it
                self._failed(stamp, error)
                return None
            self._stamp = stamp
            log.info("the certificate in %s is in force", self._cert)
            return self.configuration

    def _failed(self, stamp: Stamp, error: Exception) -> None:
        """Keeps what is in force, and says so once."""
        if not isinstance(error, OSError) or isinstance(error, ssl.SSLError) or not is_passing(error):
            self._stamp = stamp  # else they are read again at the next handshake
        if (told := (stamp, _why(error))) != self._told:
            self._told = told
            log.error("tls_cert, tls_key: the former ones stay in force: %s", told[1])

    def _read(self) -> grpc.ServerCertificateConfiguration:
        key, certificate = read_file(self._key, _FILE_BYTES_MAX), read_file(self._cert, _FILE_BYTES_MAX)
        roots = None if self._client_ca is None else read_file(self._client_ca, _FILE_BYTES_MAX)
        # OpenSSL says whether key and certificate belong together; gRPC would find out at the first handshake.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._cert, self._key)
        if self._client_ca is not None:
            context.load_verify_locations(self._client_ca)
        self.pems = (certificate, key, roots)  # what is in force
        return grpc.ssl_server_certificate_configuration([(key, certificate)], roots)

    def _look(self) -> Stamp:
        return stamp_of(*(path for path in (self._cert, self._key, self._client_ca) if path is not None))


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"not a PEM certificate and its key ({error.reason or error})"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return f"{type(error).__name__}: {error}"
