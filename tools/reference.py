"""Writes docs/errors.md and docs/proto.md from the protos, their comments and the SDK's errors. `make docs` runs it."""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto

import engram
from engram import _errors
from engram._errors import make_error

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
ORDER = ("service", "stream", "session", "model", "memory", "error")
_MESSAGE, _ENUM, _SERVICE, _FIELD, _VALUE, _METHOD = 4, 5, 6, 2, 2, 2  # numbers of fields, in a descriptor's paths
_PREFIX = "ERROR_REASON_"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if what is there differs")
    args = parser.parse_args()
    files = described()
    pages = {"errors.md": errors_page(files["error"]), "proto.md": proto_page(files)}
    stale = [
        name
        for name, text in pages.items()
        if not (ROOT / "docs" / name).exists() or (ROOT / "docs" / name).read_text() != text
    ]
    if args.check:
        for name in stale:
            print(f"docs/{name} is not what the protos say: run make docs", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (ROOT / "docs" / name).write_text(pages[name])
    return 0


def described() -> dict[str, FileDescriptorProto]:
    """The protos by their names, with comments."""
    names = [f"engram/v1/{name}.proto" for name in ORDER]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "set"
        command = [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{PROTO}",
            "--include_source_info",
            f"--descriptor_set_out={out}",
        ]
        subprocess.run([*command, *names], check=True)
        found = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    return {Path(file.name).stem: file for file in found.file}


class Comments:
    """What stands before and behind each thing of a file, by its path."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._before = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        self._behind = {tuple(place.path): place.trailing_comments for place in file.source_code_info.location}

    def of(self, *path: int) -> str:
        return " ".join(f"{self._before.get(path, '')} {self._behind.get(path, '')}".split())

    def before(self, *path: int) -> str:
        return " ".join(self._before.get(path, "").split())

    def behind(self, *path: int) -> str:
        return " ".join(self._behind.get(path, "").split())


def errors_page(file: FileDescriptorProto) -> str:
    lines = [
        "# Errors", "",
        "Written by `make docs` from `proto/engram/v1/error.proto` and the SDK's errors.", "",
        "Every refusal has a gRPC code, a reason and a message that says what was wrong, where, and what to do. A call that fails",
        "has them in its status (`google.rpc.ErrorInfo`, domain `engram`, and `RetryInfo`); a row of a stream in its",
        "`ErrorDetail`.",
        "In Python each is an exception with `reason`, `code`, `retry_after` and `metadata`; one of a step also says, with",
        "`seq` and `applied`, whether that step was applied (see [the SDK](sdk.md)):", "",
        "```", *_tree(), "```", "",
        "The SDK itself tries again, until the call's timeout, where it says so below. A step that is repeated has",
        "the same seq, and",
        "is applied once.", "",
        "| reason | code | exception | SDK | what it says |", "|---|---|---|---|---|",
        *_reasons(file), "",
        "Reasons of the SDK's own: `CONNECTION_LOST` (UnavailableError; no server was reached in time), `CLIENT_CLOSED`,",
        "`CLOSE_INCOMPLETE` (the client was closed, and not all was done before), `STATE_REWOUND`",
        "(DataLossError: the session stands before a step that was answered, so the store has lost it),",
        "`TOKEN_IN_PLAIN_TEXT` (a token is not",
        "sent without TLS except to this machine), `TOKEN_UNAVAILABLE` (the function that gives tokens failed), and",
        "FailedPreconditionError for clients that cannot work where they are: `FORKED`, `OTHER_EVENT_LOOP` and",
        "`PATCHED_THREADS` ([sdk](sdk.md#processes-threads-and-event-loops)).", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _tree() -> Iterator[str]:
    def below(kind: type[engram.EngramError], depth: int) -> Iterator[str]:
        text = (inspect.getdoc(kind) or "").splitlines()[0]
        yield f"{'  ' * depth + kind.__name__:<26}{text}"
        for child in sorted(kind.__subclasses__(), key=lambda one: list(vars(_errors)).index(one.__name__)):
            yield from below(child, depth + 1)

    return below(engram.EngramError, 0)


def _reasons(file: FileDescriptorProto) -> Iterator[str]:
    comments = Comments(file)
    enum = next(index for index, one in enumerate(file.enum_type) if one.name == "ErrorReason")
    code = ""
    for number, value in enumerate(file.enum_type[enum].value):
        path = (_ENUM, enum, _VALUE, number)
        code = comments.before(*path).split(",")[0] or code
        if value.number:
            reason = value.name.removeprefix(_PREFIX)
            kind = type(make_error(int(grpc.StatusCode[code].value[0]), "", reason))
            again = "tries again" if code in _errors.RETRYABLE else ""
            again = "sends in order again" if reason == "SEQ_GAP" else again
            yield f"| `{reason}` | {code} | `{kind.__name__}` | {again} | {comments.behind(*path)} |"


def proto_page(files: dict[str, FileDescriptorProto]) -> str:
    lines = [
        "# The protocol", "",
        "Written by `make docs` from `proto/engram/v1`. Columns are `bytes`: little-endian numbers of the width that",
        "is given, one for",
        "each row. A client in another language needs the protos alone: [clients/node](../clients/node) is one.", "",
    ]  # fmt: skip
    for name in ORDER:
        file, comments = files[name], Comments(files[name])
        lines += [f"## {name}.proto", ""]
        for index, service in enumerate(file.service):
            lines += [
                f"### service {service.name}",
                "",
                comments.of(_SERVICE, index),
                "",
                "| method | request | response | |",
                "|---|---|---|---|",
            ]
            for number, method in enumerate(service.method):
                asked, told = (_short(kind) for kind in (method.input_type, method.output_type))
                streams = ("stream " if method.client_streaming else "", "stream " if method.server_streaming else "")
                text = comments.of(_SERVICE, index, _METHOD, number)
                lines.append(f"| `{method.name}` | {streams[0]}`{asked}` | {streams[1]}`{told}` | {_cell(text)} |")
            lines.append("")
        for index, message in enumerate(file.message_type):
            lines += [f"### {message.name}", "", *_paragraph(comments.of(_MESSAGE, index))]
            if message.field:
                lines += ["| field | type | |", "|---|---|---|"]
                for number, one in enumerate(message.field):
                    lines.append(
                        f"| `{one.name}` = {one.number} | {_type(one)} | {_cell(comments.of(_MESSAGE, index, _FIELD, number))} |"
                    )
                lines.append("")
        for index, enum in enumerate(file.enum_type):
            if enum.name == "ErrorReason":
                lines += ["The reasons are in [errors](errors.md).", ""]
                continue
            lines += [f"### enum {enum.name}", "", *_paragraph(comments.of(_ENUM, index))]
            lines += [
                f"- `{one.name}` = {one.number} {comments.of(_ENUM, index, _VALUE, at)}".rstrip()
                for at, one in enumerate(enum.value)
            ]
            lines.append("")
    return "\n".join(lines)


def _paragraph(text: str) -> Sequence[str]:
    return (text, "") if text else ()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _type(one: FieldDescriptorProto) -> str:
    name = (
        _short(one.type_name)
        if one.type_name
        else FieldDescriptorProto.Type.Name(one.type).removeprefix("TYPE_").lower()
    )
    return f"repeated {name}" if one.label == FieldDescriptorProto.LABEL_REPEATED else name


if __name__ == "__main__":
    sys.exit(main())
