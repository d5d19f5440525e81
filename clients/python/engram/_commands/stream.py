"""`engram stream MODEL`: inputs as lines on stdin, one output line for each, as it arrives; or the samples of a WAV file.

A line is CSV, tab-separated or JSON; its output line has the same form, or is a JSON object where the model has several outputs.
What lines may say is in _commands/rows.py. Blank lines are passed over. Ends with 0 at the end of the input or when nobody reads
the output any more, with 130 on Ctrl-C, with 1 on a bad line: what stood before it has been answered. An output that is not
finite is `null` in JSON, and `nan` or `inf` elsewhere.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

from engram._commands.connection import add_address, client_of, explained
from engram._commands.rows import Rows, line_of
from engram._commands.text import TextError, numbered, stdin_blocks
from engram._commands.values import constant_of
from engram._commands.wav import WavError, WavFile, rate_of, taken_by

if TYPE_CHECKING:
    from engram import BlockingSession

HELP = "lines or a WAV file in, one output line for each, as it arrives"
_LONG_S = 10.0  # files from which on a terminal is told how far it is
_TELL_S = 0.25


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="name of the model, or NAME/VERSION")
    parser.add_argument(
        "--session", metavar="ID", default=None, help="carry this session on; none: a new one that is closed at the end"
    )
    parser.add_argument("--durability", choices=("step", "interval"), default=None, help="none: the server's default")
    parser.add_argument(
        "--constant", metavar="NAME=VALUE", action="append", default=[],
        help="of the session, if this creates it, as sr=16000; may be given again",
    )  # fmt: skip
    parser.add_argument("--wav", metavar="FILE", help="PCM samples instead of stdin, in frames of the model's input")
    parser.add_argument("--channel", metavar="N", type=int, default=None, help="of a file with several, from 1")
    parser.add_argument("--json", action="store_true", help='every output line as {"seq": N, "output": [...]}')
    add_address(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; its exit code."""
    if args.channel is not None and args.wav is None:
        return _said("--channel is of a --wav file", 2)
    constants: dict[str, Any] = {}
    for given in args.constant:
        try:
            name, value = constant_of(given)
        except ValueError as error:
            return _said(f"--constant {given}: {error}", 2)
        if name in constants:
            return _said(f"--constant {name} is given twice", 2)
        constants[name] = value
    try:
        with nullcontext() if args.wav is None else closing(WavFile(args.wav, args.channel)) as wav:
            return explained("stream", lambda: _stream(args, constants, wav))
    except WavError as error:
        return _said(str(error), 1)


def _said(what: str, status: int) -> int:
    print(f"engram stream: {what}", file=sys.stderr)
    return status


def _stream(args: argparse.Namespace, constants: dict[str, Any], wav: WavFile | None) -> int:
    name, _, version = args.model.partition("/")
    with client_of(args) as client:
        session = client.open(name, args.session, version=version, durability=args.durability, constants=constants)
        try:
            source = Lines(session) if wav is None else Samples(session, wav)
            seq = session.seq
            for output in session.stream(source.inputs(), timeout=None):
                seq += 1
                sys.stdout.write(source.line(output, seq if args.json else None))
                sys.stdout.flush()
        except KeyboardInterrupt:
            session.detach(timeout=2.0)
            return 130
        except WavError:
            _end(session, args.session)
            raise
        _end(session, args.session)
    return source.end()


def _end(session: BlockingSession, given: str | None) -> None:
    """A session of the user's own stays."""
    if given is None:
        session.close()


class Lines:
    """Inputs that are lines on stdin."""

    def __init__(self, session: BlockingSession) -> None:
        self._rows = Rows(session.model.inputs)
        self._forms: list[str] = []  # of the lines that are not answered yet
        self._failure = ""

    def inputs(self) -> Iterator[Any]:
        """As the lines arrive, up to the first bad one."""
        try:
            for number, text in numbered(stdin_blocks()):
                try:
                    read = self._rows.read(text)
                except TextError as error:
                    raise TextError(f"line {number}, {error}") from error
                except ValueError as error:
                    raise TextError(f"line {number}: {error}") from error
                if read is not None:
                    self._forms.append(read[1])
                    yield read[0]
        except TextError as error:
            self._failure = str(error)

    def line(self, output: Any, seq: int | None) -> str:
        """The next input's output."""
        return line_of(output, self._forms.pop(0), seq)

    def end(self) -> int:
        """After the last output; the exit code."""
        return _said(self._failure, 1) if self._failure else 0


class Samples:
    """Inputs that are frames of a WAV file. Raises WavError where the model is not for it."""

    def __init__(self, session: BlockingSession, wav: WavFile) -> None:
        info = session.model
        self._spec = taken_by(info)
        self._wav = wav
        self._frame = 0
        self._told = time.monotonic() if sys.stderr.isatty() and wav.declared >= _LONG_S * wav.rate else float("inf")
        if (name := rate_of(info)) is not None:
            rate = round(float(session.state()[name].reshape(-1)[0]))
            if rate != wav.rate:
                raise WavError(
                    f"{wav.path}: {wav.rate} samples a second, but {name} of the session is {rate}; convert the file:"
                    f" sox {shlex.quote(wav.path)} -r {rate} out.wav; or open a session with"
                    f" --constant {name}={wav.rate}, if the model knows that rate"
                )

    def inputs(self) -> Iterator[Any]:
        """The frames."""
        return self._wav.frames(self._spec)

    def line(self, output: Any, seq: int | None) -> str:
        """The next frame's output, behind the time at which the frame begins."""
        begins = self._frame * self._spec.size / self._wav.rate
        self._frame += 1
        if time.monotonic() >= self._told + _TELL_S:
            self._told = time.monotonic()
            print(f"\r{begins:.1f} of {self._wav.declared / self._wav.rate:.1f} s", end="", file=sys.stderr, flush=True)
        return line_of(output, ",", seq, begins)

    def end(self) -> int:
        """After the last output; the exit code."""
        wav, size = self._wav, self._spec.size
        if self._told < float("inf"):
            print("\r\x1b[K", end="", file=sys.stderr)
        if not wav.read:
            return _said(f"{wav.path}: there are no samples", 1)
        if wav.read < wav.declared:
            _said(f"{wav.path}: it says that it has {wav.declared} samples, and ends after {wav.read}", 0)
        if left := wav.read % size:
            _said(f"the last frame has {left} of {size} samples; the others are zeros", 0)
        return 0
