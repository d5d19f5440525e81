"""Which device the models run on, found out without torch where there can be no GPU. For app.py."""

from __future__ import annotations

import glob
import importlib.util
import re
from dataclasses import dataclass
from typing import Any

from engram_service.settings import SettingError

_INSTALL = "pip install 'engram[server,torch]'"


@dataclass(frozen=True, slots=True)
class Device:
    """`place` is torch's, of a GPU; None: a CPU, for which torch is not needed."""

    name: str
    place: Any = None

    @property
    def is_cpu(self) -> bool:
        return self.place is None

    def memory_allocated(self) -> int:
        import torch

        return 0 if self.is_cpu else int(torch.cuda.memory_allocated(self.place))


CPU = Device("cpu")


def check(name: str) -> None:
    """What can be said of the setting `device` without torch. Raises SettingError."""
    if name in ("cpu", "auto"):
        return
    if not re.fullmatch(r"cuda(:\d{1,4})?", name):
        raise SettingError(f"device = {name!r}: it is auto, cpu, cuda or cuda:N")
    if not _has_torch():
        raise SettingError(
            f'device = {name!r}: a GPU needs torch, which is not installed; {_INSTALL}, or set device = "cpu"'
        )


def device_of(name: str) -> Device:
    """The device of the setting `device`: cpu, cuda, cuda:N or auto. Raises SettingError."""
    check(name)
    if name == "cpu" or (name == "auto" and not (_has_gpu() and _has_torch())):
        return CPU
    import torch

    if name == "auto" and not torch.cuda.is_available():
        return CPU
    place = torch.device("cuda:0" if name in ("auto", "cuda") else name)
    if not torch.cuda.is_available() or (place.index or 0) >= torch.cuda.device_count():
        raise SettingError(f"device = {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return Device(str(place), place)


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _has_gpu() -> bool:
    return bool(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/dxg"))
