"""The rules of HTTP/2, as h2spec checks them, against the bare wire: every case, the strict ones too."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from interop.process import InteropServer

native = pytest.importorskip(
    "engram_native", reason="the extension is not built: make install builds it where cargo is"
)
pytestmark = pytest.mark.timeout(900)  # the first of them builds the programs

CASES = 146
# By section and words of the case, why the wire does otherwise. h2spec sends no gRPC, so it is answered in HTTP's words
# (native/src/wire/strangers.rs), and no case is left out.
EXCEPTIONS: dict[tuple[str, str], str] = {}


def check(programs: Path, port: int, report: Path, *flags: str) -> None:
    """Runs every case; those of EXCEPTIONS, and no others, end otherwise."""
    command = [programs / "h2spec", "--strict", "--port", str(port), "--junit-report", report, "--timeout", "5", *flags]
    command += ["--path", "/engram.v1.EngramService/Stream"]
    said = subprocess.run(command, check=False, capture_output=True, text=True, timeout=110).stdout
    cases = list(ElementTree.parse(report).iter("testcase"))
    other = {(case.attrib["package"], case.attrib["classname"]) for case in cases if len(case)}
    assert other == set(EXCEPTIONS), said[said.find("Failures") :]
    assert len(cases) == CASES


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
def test_the_wire_keeps_the_rules(programs: Path, certificates: Any, tmp_path: Path, encrypted: bool) -> None:
    flags = ["--tls", *map(str, certificates.issue("server"))] if encrypted else []
    with InteropServer(*flags) as server:
        check(programs, server.port, tmp_path / "report.xml", *(["--tls", "--insecure"] if encrypted else []))
        server.until(lambda counters: counters["connections"] == 0)


def test_a_server_on_the_wire_keeps_the_rules(
    programs: Path, engram_server: Any, server_wire: str, tmp_path: Path
) -> None:
    if server_wire != "native":
        pytest.skip("gRPC's own server, which the python wire is, does otherwise in more than half of the cases")
    check(programs, engram_server.port, tmp_path / "report.xml")
