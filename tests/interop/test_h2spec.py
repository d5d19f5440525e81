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


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
def test_http2_is_spoken_by_its_rules(programs: Path, certificates: Any, tmp_path: Path, encrypted: bool) -> None:
    flags = ["--tls", *map(str, certificates.issue("server"))] if encrypted else []
    with InteropServer(*flags) as server:
        report = tmp_path / "report.xml"
        command = [programs / "h2spec", "--strict", "--port", str(server.port), "--junit-report", report]
        command += ["--path", "/engram.v1.EngramService/Stream", "--timeout", "5"]
        command += ["--tls", "--insecure"] if encrypted else []
        said = subprocess.run(command, check=False, capture_output=True, text=True, timeout=110).stdout
        server.until(lambda counters: counters["connections"] == 0)
    cases = list(ElementTree.parse(report).iter("testcase"))
    other = {(case.attrib["package"], case.attrib["classname"]) for case in cases if len(case)}
    assert other == set(EXCEPTIONS), said[said.find("Failures") :]
    assert len(cases) == CASES
