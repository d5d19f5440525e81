"""A WAV file as inputs of a model that takes audio in frames. `engram stream --wav` reads files through this.

Samples are PCM of 8, 16, 24 or 32 bits, one channel of them. A model of floats gets them as -1 to 1, one of int16 as they are
in 16 bits. Nothing is resampled.
"""

from __future__ import annotations

import os
import shlex
import stat
import wave
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engram import ModelInfo, TensorSpec

_RATES = ("sr", "sample_rate", "sampling_rate")  # what constants with a sample rate are called
_FLOATS = ("float16", "float32", "float64", "bfloat16")
_WIDTH_MAX = 4
_FULL = 2.0**31  # samples are 32 bits here, whatever the file has


class WavError(ValueError):
    """What a person can mend, with the file's name."""


class WavFile:
    """An open file.

    Attributes:
        rate: samples a second.
        declared: samples that the file says it has.
        read: samples read so far.
    """

    def __init__(self, path: str, channel: int | None) -> None:
        """channel: from 1; None: the only one. Raises WavError."""
        self.path = path
        self.read = 0
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise WavError(f"{path}: not a regular file")
            self._file = wave.open(path, "rb")  # noqa: SIM115  # closed by `close`
        except OSError as error:
            raise WavError(f"{path}: {error.strerror}") from error
        except EOFError as error:
            raise WavError(f"{path}: not a WAV file: it ends within its header") from error
        except wave.Error as error:
            mend = (
                f"; convert it: sox {shlex.quote(path)} -e signed-integer -b 16 out.wav"
                if "format" in str(error)
                else ""
            )
            raise WavError(f"{path}: no WAV file of PCM samples: {error}{mend}") from error
        self.rate, self.declared = self._file.getframerate(), self._file.getnframes()
        self._width, self._channels = self._file.getsampwidth(), self._file.getnchannels()
        if self._width > _WIDTH_MAX or self.rate < 1:
            raise WavError(f"{path}: {8 * self._width} bits a sample, {self.rate} samples a second: not known here")
        self._channel = self._chosen(channel)

    def _chosen(self, channel: int | None) -> int:
        if channel is None and self._channels > 1:
            raise WavError(
                f"{self.path}: {self._channels} channels; choose one with --channel 1 to {self._channels}, or mix them:"
                f" sox {shlex.quote(self.path)} -c 1 out.wav"
            )
        if channel is not None and not 1 <= channel <= self._channels:
            raise WavError(f"{self.path}: there is no channel {channel}; the file has 1 to {self._channels}")
        return (channel or 1) - 1

    def close(self) -> None:
        """Closes it."""
        self._file.close()

    def frames(self, spec: TensorSpec) -> Iterator[NDArray[Any]]:
        """The model's inputs; the last one is filled up with zeros. Raises WavError."""
        import numpy as np

        dtype = np.dtype("float32" if spec.dtype == "bfloat16" else spec.dtype)
        while len(samples := self._samples(spec.size)):
            self.read += len(samples)
            frame = np.zeros(spec.size, dtype)
            frame[: len(samples)] = samples / _FULL if dtype.kind == "f" else samples >> 16
            yield frame.reshape(spec.shape)
            if len(samples) < spec.size:
                return

    def _samples(self, count: int) -> NDArray[Any]:
        """The next ones, int32, the file's highest bit first; fewer at the end."""
        import numpy as np

        try:
            data = self._file.readframes(count)
        except (OSError, EOFError, wave.Error) as error:
            raise WavError(f"{self.path}: could not be read on: {error}") from error
        whole = len(data) // (self._width * self._channels)
        octets = np.frombuffer(data, np.uint8, whole * self._width * self._channels)
        octets = octets.reshape(whole, self._channels, self._width)[:, self._channel]
        wide = np.zeros((whole, _WIDTH_MAX), np.uint8)
        wide[:, _WIDTH_MAX - self._width :] = octets if self._width > 1 else octets ^ 0x80  # 8 bits have no sign
        return wide.view("<i4")[:, 0]


def taken_by(info: ModelInfo) -> TensorSpec:
    """The input of a model that takes audio. Raises WavError."""
    spec = info.inputs[0]
    line = sum(size > 1 for size in spec.shape) <= 1 and len(spec.shape) > 0
    if len(info.inputs) > 1 or not line or spec.dtype not in (*_FLOATS, "int16"):
        takes = ", ".join(f"{one.name} {one}" for one in info.inputs)
        raise WavError(f"model {info.name} takes {takes}; --wav is for models of one input, floats or int16 in one row")
    return spec


def rate_of(info: ModelInfo) -> str | None:
    """Which of a model's constants is its sample rate."""
    names = {spec.name for spec in info.constants if spec.size == 1}
    return next((name for name in _RATES if name in names), None)
