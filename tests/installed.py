"""Programs that tests of files run on them: from this Python's environment, else from PATH."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import pytest


def run(tool: str, *arguments: str | pathlib.Path, hint: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs it, or skips the test where it is not installed; `hint` says where it comes from."""
    path = shutil.which(tool, path=str(pathlib.Path(sys.executable).parent)) or shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not here: {hint}")
    return subprocess.run([path, *arguments], check=False, capture_output=True, text=True, input=stdin)
