"""A stranger's model, from its own package to a served session: `engram models import`, `engram serve`, `engram stream --wav`.

The model is the speech-activity graph that the PyPI package silero-vad ships (MIT), found without importing the package; the speech is
espeak-ng's. What the sessions answer is compared with the package's own wrapper, in a process of its own, and with the loop
that the package documents, written anew here.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

import engram

Floats = NDArray[np.float32]
RATE, FRAME, CONTEXT = 16000, 512, 64
TOLERANCE = 1e-4
FLAGS = ("--constant", f"sr={RATE}", "--context", f"input={CONTEXT}", "--shape", f"input={FRAME}")
TEXT = (
    "It was late when the last train left the station. Nobody spoke. <break time='2500ms'/> The lamps went out, one after "
    "the other, and a door was closed. <break time='4s'/> Who is there? <break time='1500ms'/> "
)
WRAPPER = """
import sys, wave, numpy, torch
from silero_vad.utils_vad import OnnxWrapper
with wave.open(sys.argv[2]) as file:
    samples = numpy.frombuffer(file.readframes(file.getnframes()), "<i2") / numpy.float32(32768)
wrapper = OnnxWrapper(sys.argv[1], force_onnx_cpu=True)
frames = torch.from_numpy(samples.astype("float32")).split(512)
print(*(float(wrapper(torch.nn.functional.pad(frame, (0, 512 - len(frame))), 16000)) for frame in frames))
"""


@pytest.fixture(scope="module")
def graph() -> Path:
    """silero_vad.onnx of the package."""
    try:
        files = importlib.metadata.files("silero-vad") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(
            "the model comes with the package silero-vad, which is not installed: pip install --no-deps silero-vad"
        )
    return next(Path(str(file.locate())) for file in files if file.name == "silero_vad.onnx")


@dataclass(frozen=True)
class Recording:
    path: Path
    samples: NDArray[np.int16]

    def frames(self) -> Floats:
        """[steps, FRAME], the last one filled up with zeros."""
        padded = np.pad(self.samples, (0, -len(self.samples) % FRAME))
        return (padded / np.float32(32768)).astype(np.float32).reshape(-1, FRAME)

    def at(self, rate: int, path: Path) -> Path:
        """The same sound at another rate."""
        count = len(self.samples) * rate // RATE
        times = np.arange(count) * (RATE / rate)
        write_wav(path, rate, np.interp(times, np.arange(len(self.samples)), self.samples).astype(np.int16))
        return path


def write_wav(path: Path, rate: int, samples: NDArray[np.int16]) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """A minute of speech with pauses."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("the speech is made by espeak-ng, which is not here: apt-get install espeak-ng")
    folder = tmp_path_factory.mktemp("speech")
    spoken = folder / "spoken.wav"
    subprocess.run(["espeak-ng", "-m", "-w", str(spoken), TEXT * 5], check=True, timeout=30)
    with wave.open(str(spoken)) as file:
        rate = file.getframerate()
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32)
    times = np.arange(60 * RATE) * (rate / RATE)
    assert len(samples) > times[-1], "espeak-ng spoke for less than a minute"
    recording = Recording(folder / "speech.wav", np.interp(times, np.arange(len(samples)), samples).astype(np.int16))
    write_wav(recording.path, RATE, recording.samples)
    return recording


def documented(graph: Path, frames: Floats) -> Floats:
    """The loop around the graph: 64 samples of before, 512 new ones, the state of before, the sample rate."""
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    state, past, found = np.zeros((2, 1, 128), np.float32), np.zeros(CONTEXT, np.float32), []
    for frame in frames:
        x = np.concatenate([past, frame])[None]
        y, state = session.run(None, {"input": x, "state": state, "sr": np.array(RATE, np.int64)})
        past = frame[-CONTEXT:]
        found.append(y[0, 0])
    return np.array(found, np.float32)


@pytest.fixture(scope="module")
def reference(graph: Path, speech: Recording) -> Floats:
    return documented(graph, speech.frames())


def engram_command(*arguments: object, given: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engram", *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def served(
    graph: Path, speech: Recording, reference: Floats, server_type: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A server of what the command made of the file, and compared with a recorded run."""
    folder = tmp_path_factory.mktemp("served")
    np.savez(folder / "run.npz", input=speech.frames()[:50], output=reference[:50, None])
    told = ("--models", folder / "mine", "--name", "vad", *FLAGS, "--verify", folder / "run.npz")
    done = engram_command("models", "import", graph, *told)
    assert done.returncode == 0 and "any batch: same bits" in done.stdout, done.stdout + done.stderr
    assert "verified: 50 steps of 1 row came out as recorded" in done.stdout
    with server_type(folder, "--models", str(folder / "mine")) as server:
        yield server


def test_a_minute_of_speech_as_the_package_hears_it(
    graph: Path, served: Any, speech: Recording, reference: Floats
) -> None:
    wrapper = subprocess.Popen(
        [sys.executable, "-c", WRAPPER, str(graph), str(speech.path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    done = engram_command("stream", "vad", "--wav", speech.path, "--address", served.address)
    assert done.returncode == 0, done.stderr
    begins, heard = np.array([line.split(",") for line in done.stdout.splitlines()], np.float64).T
    assert len(heard) == len(reference) == 60 * RATE / FRAME and np.allclose(
        begins, np.arange(len(heard)) * FRAME / RATE
    )
    assert np.abs(heard - reference).max() < TOLERANCE
    assert (heard > 0.5).mean() > 0.2 and (heard < 0.1).mean() > 0.2  # there is speech, and there are pauses
    said, why = wrapper.communicate(timeout=60)
    if wrapper.returncode:
        print(f"not compared with the package's wrapper, which does not run here: {why.strip().splitlines()[-1]}")
    else:
        assert np.abs(heard - np.array(said.split(), np.float64)).max() < TOLERANCE


def test_sessions_together_answer_as_alone(served: Any, speech: Recording, reference: Floats) -> None:
    frames = speech.frames()[:200]
    starts = [0, 7, 31, 64]
    with engram.Client(served.address) as client:
        together = client.open_many("vad", len(starts))
        found = [client.step_many(together, frames[[start + step for start in starts]]) for step in range(100)]
        for place, start in enumerate(starts):
            alone = client.open("vad").run(frames[start : start + 100])
            assert np.array_equal(alone, [row[place] for row in found])
    assert np.abs(np.ravel(found)[:: len(starts)] - reference[:100]).max() < TOLERANCE


def test_frames_of_another_size_are_refused(served: Any) -> None:
    with engram.Client(served.address) as client:
        session = client.open("vad")
        with pytest.raises(engram.InvalidInputError, match=r"must be float32\[512\]; got float32\[256\]"):
            session.step(np.zeros(256, np.float32))
        assert session.seq == 0
    done = engram_command("stream", "vad", "--address", served.address, given="1,2,3\n")
    assert done.returncode == 1 and "line 1: 3 values, but the model takes 512" in done.stderr


def test_a_file_of_another_rate_is_refused(served: Any, speech: Recording, tmp_path: Path) -> None:
    slow = speech.at(8000, tmp_path / "slow.wav")
    done = engram_command("stream", "vad", "--wav", slow, "--address", served.address)
    assert done.returncode == 1 and not done.stdout
    assert "8000 samples a second, but sr of the session is 16000" in done.stderr
    assert f"sox {slow} -r 16000 out.wav" in done.stderr and "--constant sr=8000" in done.stderr


def test_the_readme_says_these_flags() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    assert f"engram models import silero_vad.onnx --models mine --name vad {' '.join(FLAGS)}\n" in readme


def test_the_import_names_the_flags_that_it_lacks(graph: Path, tmp_path: Path) -> None:
    done = engram_command("models", "import", graph, "--models", tmp_path / "mine", "--name", "vad")
    assert done.returncode == 1 and "--constant sr=16000" in done.stderr and not (tmp_path / "mine").exists()
    done = engram_command("models", "import", graph, "--models", tmp_path / "mine", *FLAGS[:2])
    assert done.returncode == 1 and "--shape input=SIZE" in done.stderr and not (tmp_path / "mine").exists()


def test_a_context_that_was_forgotten_is_found_by_a_recorded_run(
    graph: Path, speech: Recording, reference: Floats, tmp_path: Path
) -> None:
    """The graph takes frames without the samples of before too, and answers something else."""
    np.savez(tmp_path / "run.npz", input=speech.frames()[:50], output=reference[:50, None])
    told = (*FLAGS[:2], *FLAGS[4:], "--verify", tmp_path / "run.npz")
    done = engram_command("models", "import", graph, "--models", tmp_path / "mine", *told)
    assert done.returncode == 1 and not (tmp_path / "mine").exists(), done.stdout
    assert "first differs from the recorded run at step 0 of 50" in done.stderr and "--context" in done.stderr
