"""Every Python example of the documents runs, as it is written, against a server; only the server's address is another. It serves
the shipped models, and `arm`, a model of several inputs."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from bundles import write_arm

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/quickstart.md", "docs/sdk.md")


def examples() -> list[Any]:
    """Whole programs: those that begin with an import."""
    found = []
    for page in PAGES:
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)):
            if code.startswith(("import", "from")):
                found.append(pytest.param(code, id=f"{pathlib.Path(page).stem}-{number}"))
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, server_type: Any) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("guide")
    write_arm(path / "models")
    with server_type(path, "--models", str(path / "models"), "--shipped-models", "true") as one:
        yield one


@pytest.mark.parametrize("code", examples())
def test_examples_run(code: str, server: Any) -> None:
    program = code.replace("127.0.0.1:50051", server.address)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{done.stderr}\n{program}"
