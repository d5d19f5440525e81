"""Nobody gets in: tokens and their rights, tenants that cannot reach each other, limits of each, the audit. TLS is in test_tls.py."""

from __future__ import annotations

import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.protobuf import message_factory
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from engram.v1 import memory_pb2 as mem
from engram.v1 import service_pb2, stream_pb2
from engram.v1 import session_pb2 as pb
from engram_models import LSTM, NTM, RBM, Hopfield, write_bundle
from engram_service.auth.access import RIGHT_OF
from engram_service.auth.tenants import id_of, key_of, tenant_of
from engram_service.auth.tokens import RIGHTS, TokensError, digest_of, read_book
from engram_service.protocols.engram.confine import ID_FIELDS
from engram_service.settings import Settings
from engram_service.store.keys import session_tag

SERVICE = service_pb2.DESCRIPTOR.services_by_name["EngramService"]
METHODS = [method.name for method in SERVICE.methods]
WAIT_S = 20.0
SOON_S = 5.0  # several looks at the tokens file
QUICK = ("--shipped-models", "false", "--batch-rows-max", "32", "--tokens-poll-s", "0.1")
ALL = ("read", "step", "manage", "operate")
HERE = "seen"  # a session of acme's in every test that looks for one

LSTM_MODEL, NET, TURING, MACHINE = "lstm", "net", "turing", "machine"
OPERATION = bytes(range(16))
ONE = np.ones(16, np.float32).tobytes()


# Tokens files


class TokensFile:
    """A tokens file that grows by hand; its tokens by name."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.tokens: dict[str, str] = {}
        self._tables: dict[str, str] = {}
        self.limits = ""

    def add(self, name: str, tenant: str, *rights: str, expires: str = "") -> str:
        """A token from the command that people use."""
        done = tokens_command("new", "--tenant", tenant, "--rights", ",".join(rights), "--name", name, "--json")
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)
        self.tokens[name] = made["token"]
        self._tables[name] = made["table"] + (f"\nexpires = {expires}" if expires else "")
        return str(made["token"])

    def remove(self, name: str) -> None:
        del self._tables[name]

    def write(self) -> None:
        """Puts a new file in the old one's place, as a careful operator does."""
        new = self.path.with_suffix(".new")
        new.write_text("\n\n".join([self.limits, *self._tables.values()]))
        new.replace(self.path)


def tokens_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`engram tokens`, also where the installed distribution does not know the command yet."""
    code = "import argparse, sys; from engram_service.commands import tokens as t; p = argparse.ArgumentParser();"
    code += "t.configure(p); sys.exit(t.run(p.parse_args()))"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


# A client that speaks by hand


class Peer:
    """Calls a server with a token, or without."""

    def __init__(self, server: Any, token: str | None = None) -> None:
        self.channel = server.channel()
        self.metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self.call: Any = None
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._responses: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.call is not None:
            self.call.cancel()
        self.channel.close()

    def unary(self, request: Any, timeout_s: float = WAIT_S) -> Any:
        method = type(request).DESCRIPTOR.name.removesuffix("Request")
        response = message_factory.GetMessageClass(SERVICE.methods_by_name[method].output_type)
        call = self.channel.unary_unary(
            f"/{SERVICE.full_name}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        return call(request, timeout=timeout_s, metadata=self.metadata)

    def stream(self) -> Peer:
        multi = self.channel.stream_stream(
            f"/{SERVICE.full_name}/Stream", response_deserializer=stream_pb2.StreamResponse.FromString
        )
        self.call = multi(iter(self._requests.get, None), metadata=self.metadata)
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def _read(self) -> None:
        try:
            for response in self.call:
                self._responses.put(response)
            self._responses.put(None)
        except grpc.RpcError as error:
            self._responses.put(error)

    def next(self, timeout_s: float = WAIT_S) -> Any:
        found = self._responses.get(timeout=timeout_s)
        if isinstance(found, grpc.RpcError):
            raise found
        return found

    def send(self, **frame: Any) -> None:
        self._requests.put(stream_pb2.StreamRequest(**frame).SerializeToString())

    def open(self, *ids: str, model: str = LSTM_MODEL, attach: bool = False, client_id: int = 7) -> Any:
        frame: Any = stream_pb2.AttachFrame if attach else stream_pb2.OpenFrame
        fields = frame(request_id=1, model=model, session_ids=ids, client_id=client_id)
        self.send(**{"attach" if attach else "open": fields})
        return self.next().opened

    def step(self, handle: int, first: int = 1, rows: int = 1, width: int = 3) -> Any:
        self.send(
            steps=stream_pb2.StepsFrame(
                handles=np.full(rows, handle, np.uint32).tobytes(),
                seqs=np.arange(first, first + rows, dtype=np.uint64).tobytes(),
                inputs=np.ones((rows, width), np.float32).tobytes(),
            )
        )
        return self.next()


def refusal(error: grpc.RpcError) -> tuple[grpc.StatusCode, str, dict[str, str], bool]:
    """Code, reason, metadata, and whether there is a time to retry after."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    told = False
    for detail in status.details:
        detail.Unpack(info) if detail.Is(info.DESCRIPTOR) else None
        told = told or detail.Unpack(retry)
    assert info.domain == "engram"
    return error.code(), info.reason, dict(info.metadata), told


def refused(work: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        work()
    return refusal(caught.value)[:2]


def eventually(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SOON_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("models")
    write_bundle(path, LSTM_MODEL, "1", LSTM(3, 4))
    write_bundle(path, NET, "1", Hopfield(16, "hebb"))
    write_bundle(path, TURING, "1", NTM(3, 2, 8, slots=8, width=4))
    write_bundle(path, MACHINE, "1", RBM(6, 4))
    return path


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokensFile:
    found = TokensFile(tmp_path_factory.mktemp("tokens") / "tokens.toml")
    for tenant in ("acme", "globex"):
        found.add(tenant, tenant, *ALL)
    for right in RIGHTS:
        found.add(f"only-{right}", "acme", right)
    found.add("old", "acme", *ALL, expires="2020-01-01T00:00:00Z")
    found.add("narrow", "narrow", *ALL)
    found.limits = "[tenants.narrow]\nstored_max = 3"
    found.write()
    return found


@pytest.fixture(scope="module")
def guarded(
    server_type: Any, models: pathlib.Path, tokens: TokensFile, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A server that wants tokens."""
    flags = ("--models", str(models), "--tokens-file", str(tokens.path), *QUICK)
    with server_type(tmp_path_factory.mktemp("guarded"), *flags) as server:
        yield server


@pytest.fixture
def acme(guarded: Any, tokens: TokensFile) -> Iterator[Peer]:
    with Peer(guarded, tokens.tokens["acme"]) as peer:
        yield peer


@pytest.fixture
def globex(guarded: Any, tokens: TokensFile) -> Iterator[Peer]:
    with Peer(guarded, tokens.tokens["globex"]) as peer:
        yield peer


@pytest.fixture
def own_guarded(server_type: Any, models: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[tuple[Any, TokensFile]]:
    """A server and a tokens file for a test that changes it."""
    mine = TokensFile(tmp_path / "tokens.toml")
    mine.add("first", "acme", *ALL)
    mine.write()
    flags = ("--models", str(models), "--tokens-file", str(mine.path), *QUICK)
    with server_type(tmp_path, *flags) as server:
        yield server, mine


# Every method, by name: a new one must be entered here, and fails until it keeps to its tenant

STEP = pb.StepRequest(inputs=[1, 1, 1])
PATTERN = {"size": 16, "operation_id": OPERATION}
ASKED: dict[str, tuple[str, Any]] = {
    # method: (model of the session, request without its id)
    "Step": (LSTM_MODEL, STEP),
    "GetSession": (LSTM_MODEL, pb.GetSessionRequest()),
    "GetSessionState": (LSTM_MODEL, pb.GetSessionStateRequest()),
    "ForkSession": (LSTM_MODEL, pb.ForkSessionRequest()),
    "CloseSession": (LSTM_MODEL, pb.CloseSessionRequest()),
    "MoveSession": (LSTM_MODEL, pb.MoveSessionRequest(version="1")),
    "ExportSession": (LSTM_MODEL, pb.ExportSessionRequest()),
    "StorePatterns": (NET, mem.StorePatternsRequest(patterns=b"\x0f\xf0", labels=["mine"], **PATTERN)),
    "ForgetPatterns": (NET, mem.ForgetPatternsRequest(operation_id=OPERATION, all=True)),
    "Recall": (NET, mem.RecallRequest(cues=b"\x0f\xf0", size=16)),
    "ListPatterns": (NET, mem.ListPatternsRequest()),
    "AddressMemory": (TURING, mem.AddressMemoryRequest(keys=np.ones(4, "<f4").tobytes(), strengths=np.ones(1, "<f4").tobytes())),
    "Recreate": (MACHINE, mem.RecreateRequest(inputs=np.ones(6, "<f4").tobytes())),
}  # fmt: skip
APART = {"Stream", "ListSessions", "ImportSession"}  # they have tests of their own below
OF_THE_SERVER = {"ListModels", "GetModel", "ReloadModels", "GetServer"}  # no session is in them


def asked(method: str, session_id: str) -> Any:
    request = type(ASKED[method][1])()
    request.CopyFrom(ASKED[method][1])
    request.session_id = session_id
    return request


def test_every_method_is_known_here() -> None:
    assert set(METHODS) == set(ASKED) | APART | OF_THE_SERVER
    assert set(RIGHT_OF) == set(METHODS), "each needs a right, or says that any token will do"
    assert set(RIGHT_OF.values()) <= {*RIGHTS, ""}


def test_no_request_has_a_session_id_that_is_not_confined() -> None:
    for method in SERVICE.methods:
        named = {field.name for field in method.input_type.fields if "session" in field.name}
        assert named <= set(ID_FIELDS), (
            f"{method.name}: protocols/engram/confine.py does not know {named - set(ID_FIELDS)}"
        )
        if method.name in OF_THE_SERVER:
            assert not named


@pytest.mark.promise(10)
@pytest.mark.parametrize("method", sorted(ASKED))
def test_another_tenants_session_is_not_found(method: str, acme: Peer, globex: Peer) -> None:
    session_id, missing = f"{HERE}-{method}", f"gone-{method}"
    acme.stream().open(session_id, model=ASKED[method][0])
    with pytest.raises(grpc.RpcError) as foreign:
        globex.unary(asked(method, session_id))
    with pytest.raises(grpc.RpcError) as nothing:
        globex.unary(asked(method, missing))
    code, reason, metadata, _ = refusal(foreign.value)
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
    assert metadata == {"session": session_id}
    assert (code, reason) == refusal(nothing.value)[:2]
    assert foreign.value.details() == str(nothing.value.details()).replace(missing, session_id), "nobody can tell which"
    if ASKED[method][0] == NET and method != "StorePatterns":
        acme.unary(asked("StorePatterns", session_id))
    acme.unary(asked(method, session_id))  # while its own tenant finds it


@pytest.mark.promise(10)
def test_two_tenants_have_a_session_of_the_same_id(acme: Peer, globex: Peer) -> None:
    ours, theirs = acme.stream().open("cam-7"), globex.stream().open("cam-7")
    assert ours.created == theirs.created == b"\1"
    for seq in (1, 2):
        acme.step(0, seq)
    globex.step(0)
    found = [peer.unary(pb.GetSessionRequest(session_id="cam-7")).session for peer in (acme, globex)]
    assert [(session.id, session.seq, session.epoch) for session in found] == [("cam-7", 2, 1), ("cam-7", 1, 1)]
    globex.unary(pb.CloseSessionRequest(session_id="cam-7"))
    assert globex.next().event.type == stream_pb2.EventFrame.TYPE_CLOSED
    assert acme.step(0, 3).WhichOneof("frame") == "outputs", "neither taken over nor closed"


@pytest.mark.promise(10)
def test_an_attach_does_not_reach_another_tenant(acme: Peer, globex: Peer) -> None:
    acme.stream().open("attached", client_id=99)
    refused_row = globex.stream().open("attached", attach=True, client_id=99).errors
    assert [row.error.reason for row in refused_row] == ["SESSION_NOT_FOUND"]
    errors = globex.step(0).errors
    assert [detail.reason for detail in errors.errors] == ["INVALID_HANDLE"], "handles are a stream's own"


@pytest.mark.promise(10)
@pytest.mark.parametrize("tenant", ["acme", ""])
def test_no_id_spells_another_tenants_key(tenant: str, globex: Peer, acme: Peer) -> None:
    acme.stream().open("spelt")
    spelt = key_of(tenant, "spelt") if tenant else "\x1fspelt"
    assert refused(lambda: globex.unary(pb.GetSessionRequest(session_id=spelt)))[1] == "INVALID_SESSION_ID"
    assert [row.error.reason for row in globex.stream().open(spelt).errors] == ["INVALID_SESSION_ID"]


@pytest.mark.promise(10)
def test_a_list_has_the_callers_sessions_alone(acme: Peer, globex: Peer) -> None:
    acme.stream().open(*(f"listed-a{i}" for i in range(30)))
    globex.stream().open(*(f"listed-g{i}" for i in range(30)))

    def listed(peer: Peer) -> set[str]:
        found: set[str] = set()
        token = ""
        while True:
            page = peer.unary(pb.ListSessionsRequest(page_size=10, page_token=token))
            found |= {session.id for session in page.sessions}
            token = page.next_page_token
            if not token:
                return {session_id for session_id in found if session_id.startswith("listed")}

    assert listed(acme) == {f"listed-a{i}" for i in range(30)}
    assert listed(globex) == {f"listed-g{i}" for i in range(30)}


@pytest.mark.promise(10)
def test_an_export_is_imported_into_the_callers_tenant(acme: Peer, globex: Peer) -> None:
    acme.stream().open("travels", "left-alone")
    acme.step(0)
    data = acme.unary(pb.ExportSessionRequest(session_id="travels")).data
    assert b"acme" not in data
    assert globex.unary(pb.ImportSessionRequest(data=data)).session.id == "travels"
    assert globex.unary(pb.ImportSessionRequest(data=data, session_id="left-alone")).session.seq == 1
    assert refused(lambda: globex.unary(pb.ImportSessionRequest(data=data))) == (
        grpc.StatusCode.ALREADY_EXISTS,
        "SESSION_EXISTS",
    )
    assert acme.unary(pb.GetSessionRequest(session_id="left-alone")).session.seq == 0


def test_a_fork_stays_in_its_tenant(acme: Peer, globex: Peer) -> None:
    acme.stream().open("root", "branch")
    globex.stream().open("root")
    globex.step(0)
    assert globex.unary(pb.ForkSessionRequest(session_id="root", new_session_id="branch")).session.seq == 1
    made = globex.unary(pb.ForkSessionRequest(session_id="root")).session.id
    assert acme.unary(pb.GetSessionRequest(session_id="branch")).session.seq == 0
    assert refused(lambda: acme.unary(pb.GetSessionRequest(session_id=made)))[1] == "SESSION_NOT_FOUND"


@pytest.mark.promise(10)
def test_a_unary_step_makes_a_session_of_the_callers_own(acme: Peer, globex: Peer) -> None:
    step = pb.StepRequest(session_id="unary", model=LSTM_MODEL, inputs=[1, 1, 1])
    assert [acme.unary(step).seq, acme.unary(step).seq, globex.unary(step).seq] == [1, 2, 1]


@given(
    st.text(max_size=8), st.sampled_from(["", "a", "ab", "acme"]), st.text(max_size=8), st.sampled_from(["", "a", "ab"])
)
def test_no_two_sessions_have_one_key(one: str, tenant: str, two: str, other: str) -> None:
    key = key_of(tenant, one)
    assert (tenant_of(key), id_of(key)) == (tenant, one)
    assert (key == key_of(other, two)) == ((tenant, one) == (other, two))


def test_a_server_without_tokens_keeps_the_keys_that_it_had() -> None:
    assert key_of("", "cam-7") == "cam-7"
    assert session_tag(key_of("acme", "cam-7")) != session_tag("cam-7")


# Tokens


@pytest.mark.promise(10)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("token", "reason"), [(None, "TOKEN_MISSING"), ("engram_nonsense", "TOKEN_UNKNOWN"), ("old", "TOKEN_EXPIRED")]
)
def test_nothing_is_done_without_a_good_token(
    method: str, token: str | None, reason: str, guarded: Any, tokens: TokensFile
) -> None:
    with Peer(guarded, tokens.tokens.get(token or "", token)) as peer:
        if method == "Stream":
            done = refused(lambda: peer.stream().next())
        else:
            request = message_factory.GetMessageClass(SERVICE.methods_by_name[method].input_type)()
            done = refused(lambda: peer.unary(request))
    assert done == (grpc.StatusCode.UNAUTHENTICATED, reason)


@pytest.mark.parametrize("right", RIGHTS)
def test_a_right_is_for_its_methods_alone(right: str, guarded: Any, tokens: TokensFile) -> None:
    with Peer(guarded, tokens.tokens[f"only-{right}"]) as peer:
        for method in SERVICE.methods:
            may = RIGHT_OF[method.name] in (right, "")
            if method.name == "Stream":
                if not may:
                    assert refused(lambda: peer.stream().next()) == (grpc.StatusCode.PERMISSION_DENIED, "RIGHT_MISSING")
                continue
            request = message_factory.GetMessageClass(method.input_type)()
            try:
                peer.unary(request)
                code = grpc.StatusCode.OK
            except grpc.RpcError as error:
                code, _, metadata, _ = refusal(error)
                if not may:
                    assert metadata == {"right": RIGHT_OF[method.name]}
            assert (code is grpc.StatusCode.PERMISSION_DENIED) == (not may), method.name


def test_health_is_open_and_reflection_is_not(guarded: Any, tokens: TokensFile) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with Peer(guarded) as peer:
        health = health_pb2_grpc.HealthStub(peer.channel).Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(peer.channel)
        ask = stub.ServerReflectionInfo
        assert refused(lambda: list(ask(iter([request]), timeout=WAIT_S)))[1] == "TOKEN_MISSING"
        for name, code in (("only-read", grpc.StatusCode.PERMISSION_DENIED), ("only-operate", None)):
            metadata = (("authorization", f"Bearer {tokens.tokens[name]}"),)
            if code is not None:
                assert refused(lambda m=metadata: list(ask(iter([request]), timeout=WAIT_S, metadata=m)))[0] is code
            else:
                answer = list(ask(iter([request]), timeout=WAIT_S, metadata=metadata))
                assert SERVICE.full_name in {one.name for one in answer[0].list_services_response.service}
    with urllib.request.urlopen(f"http://127.0.0.1:{guarded.http_port}/metrics") as response:
        text = response.read().decode()
    assert 'engram_calls_denied_total{reason="TOKEN_MISSING"}' in text
    assert "acme" not in text and "globex" not in text, "no label grows with users"


def test_tokens_come_and_go_while_it_runs(own_guarded: tuple[Any, TokensFile]) -> None:
    server, mine = own_guarded
    ask = pb.GetServerRequest()
    second = mine.add("second", "acme", *ALL)
    with Peer(server, mine.tokens["first"]) as old, Peer(server, second) as new:
        assert refused(lambda: new.unary(ask))[1] == "TOKEN_UNKNOWN"
        old.stream().open("kept")
        old.step(0)
        mine.write()
        eventually(lambda: allowed(new), "a new token is taken up")
        new.stream().open("other")
        (bad := mine.path.with_suffix(".bad")).write_text("[tokens.first]\nnonsense")
        bad.replace(mine.path)
        eventually(lambda: "stay in force" in server.log.read_text(), "a bad file is reported")
        for put, words in bad_files(mine.path):
            put()
            eventually(lambda words=words: words in server.log.read_text(), f"a file is refused: {words}")
            mine.path.rmdir() if mine.path.is_dir() else mine.path.unlink()
        assert old.step(0, 2).WhichOneof("frame") == "outputs", "and what was in force stays in force"
        mine.remove("first")
        mine.write()
        with pytest.raises(grpc.RpcError) as ended:
            old.next(SOON_S)
        assert refusal(ended.value)[:2] == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_UNKNOWN")
        assert refused(lambda: old.unary(ask))[1] == "TOKEN_UNKNOWN"
        assert new.step(0).WhichOneof("frame") == "outputs", "the other token's stream goes on"
        assert new.unary(pb.GetSessionRequest(session_id="kept")).session.seq == 2, "what was answered is kept"
        mine.path.unlink()
        time.sleep(0.5)
        assert allowed(new), "a file that is away revokes nobody"


def bad_files(path: pathlib.Path) -> list[tuple[Callable[[], object], str]]:
    """What somebody may put in the place of a file, and what is said of it."""
    return [
        (lambda: path.write_text("[limits]\nsessions_max = " + "9" * 5000), "value has 5000 digits"),
        (lambda: path.write_text("[limits]\nsessions_max = 0x" + "f" * 5000), "more than 64 bits"),
        (lambda: path.write_text("x = " + "[" * 50_000), "nested too deep"),
        (lambda: os.mkfifo(path), "a named pipe, not a regular file"),
        (path.mkdir, "a directory, not a regular file"),
        (lambda: path.symlink_to("/dev/zero"), "a device, not a regular file"),
        (lambda: (path.touch(), os.truncate(path, 1 << 30)), "at most 16777216 are read"),
    ]


@pytest.mark.promise(10)
def test_a_stream_ends_when_its_token_expires_or_loses_the_right(own_guarded: tuple[Any, TokensFile]) -> None:
    server, mine = own_guarded
    soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 4))
    brief, weak = mine.add("brief", "acme", "step", expires=soon), mine.add("weak", "acme", "step")
    mine.write()
    with Peer(server, brief) as one, Peer(server, weak) as two:
        eventually(lambda: allowed(one) and allowed(two), "taken up")
        one.stream().open("a")
        two.stream().open("b")
        with pytest.raises(grpc.RpcError) as ended:
            one.next(4 + SOON_S)
        assert refusal(ended.value)[1] == "TOKEN_EXPIRED"
        table = mine._tables["weak"]
        mine._tables["weak"] = table.replace('["step"]', '["read"]')
        mine.write()
        with pytest.raises(grpc.RpcError) as denied:
            two.next(SOON_S)
        assert refusal(denied.value)[:2] == (grpc.StatusCode.PERMISSION_DENIED, "RIGHT_MISSING")


def allowed(peer: Peer) -> bool:
    try:
        peer.unary(pb.GetServerRequest())
    except grpc.RpcError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tokens.a]\n", "tokens.a: tenant"),
        ("tokens = 1\n", "not a table"),
        ("[token.a]\n", "unknown token"),
        ('[tokens.a]\ntenant = "a b"\nrights = ["read"]\nsha256 = "%s"\n', "tokens.a: tenant"),
        ('[tokens.a]\ntenant = "t"\nrights = ["fly"]\nsha256 = "%s"\n', "rights is a list"),
        ('[tokens.a]\ntenant = "t"\nrights = []\nsha256 = "%s"\n', "rights is a list"),
        ('[tokens.a]\ntenant = "t"\nrights = ["read"]\nsha256 = "hunter2"\n', "64 hexadecimal digits"),
        ('[tokens.a]\ntenant = "t"\nrights = ["read"]\nsha256 = "%s"\npassword = "hunter2"\n', "unknown password"),
        ('[tokens.a]\ntenant = "t"\nrights = ["read"]\nsha256 = "%s"\nexpires = 2027-01-01\n', "a time with its zone"),
        ('[tokens.a]\ntenant = "t"\nrights = ["read"]\nsha256 = "%s"\n' * 1 + '[tokens.b]\ntenant = "t"\nrights = ["read"]\nsha256 = "%s"\n', "same hash"),
        ("[tenants.t]\nsessions_max = -1\n", "whole number"),
        ("[tenants.t]\nsessions_max = nan\n", "whole number"),
        ("[tenants.t]\nsessions_max = 9223372036854775808\n", "more than 64 bits"),
        ('[tokens.a]\ntenant = "t"\nrights = ["read"]\nsha256 = "%s"\nexpires = 0001-01-01T00:00:00+14:00\n', "beyond the years"),
        ("[limits]\nsteps_max = 1\n", "there are sessions_max"),
        ("= nonsense", "not toml"),
    ],
)  # fmt: skip
def test_a_bad_tokens_file_is_explained(text: str, words: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(text.replace("%s", digest_of("x")))
    with pytest.raises(TokensError, match=words) as caught:
        read_book(path)
    assert "hunter2" not in str(caught.value)
    done = tokens_command("check", str(path))
    assert done.returncode == 1 and words in done.stderr
    start = subprocess.run(
        [sys.executable, "-m", "engram", "serve", "--tokens-file", str(tmp_path / "none.toml")],
        capture_output=True, text=True, check=False,
    ) if words == "not toml" else None  # fmt: skip
    assert start is None or (start.returncode == 2 and "tokens_file" in start.stderr)


def test_a_token_is_made_and_checked_by_the_command(tmp_path: pathlib.Path) -> None:
    done = tokens_command("new", "--tenant", "acme", "--rights", "read,step", "--days", "30")
    token = next(line for line in done.stdout.splitlines() if line.startswith("engram_"))
    assert len(token) == len("engram_") + 43, "256 bits"
    path = tmp_path / "tokens.toml"
    path.write_text(done.stdout.partition("# append")[2].partition("\n")[2])
    assert token not in path.read_text() and digest_of(token) in path.read_text()
    checked = tokens_command("check", str(path), "--json")
    assert checked.returncode == 0, checked.stderr
    (row,) = json.loads(checked.stdout)
    assert (row["tenant"], row["rights"]) == ("acme", ["read", "step"]) and row["expires"]
    assert tokens_command("new", "--tenant", "a b").returncode == 2
    assert tokens_command("new", "--tenant", "acme", "--rights", "fly").returncode == 2


# Limits


def test_limits_are_each_tenants_own(own_guarded: tuple[Any, TokensFile]) -> None:
    server, mine = own_guarded
    other = mine.add("other", "globex", *ALL)
    mine.limits = "[tenants.acme]\nsessions_max = 3\nstreams_max = 2\nrows_max = 8\n[tenants.globex]\nstreams_max = 5"
    mine.write()
    with (
        Peer(server, mine.tokens["first"]) as one,
        Peer(server, mine.tokens["first"]) as two,
        Peer(server, other) as theirs,
    ):
        eventually(lambda: allowed(theirs), "taken up")
        opened = one.stream().open("a", "b", "c")
        assert not opened.errors
        two.stream()
        for opening in (("d",), ("a", "b", "c", "d")):
            errors = two.open(*opening).errors
            assert {row.error.reason for row in errors} == {"TENANT_LIMIT"} and len(errors) == len(opening)
            assert dict(errors[0].error.metadata) == {"limit": "sessions_max", "value": "3"}
            assert errors[0].error.retry_after_ms
        step = pb.StepRequest(session_id="e", model=LSTM_MODEL, inputs=[1, 1, 1])
        assert refused(lambda: one.unary(step)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TENANT_LIMIT")
        assert not theirs.stream().open(*(f"g{i}" for i in range(8))).errors, "another tenant has limits of its own"
        with Peer(server, mine.tokens["first"]) as three, pytest.raises(grpc.RpcError) as full:
            three.stream().next()
        code, reason, metadata, told = refusal(full.value)
        assert (code, reason, metadata["limit"], told) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "TENANT_LIMIT",
            "streams_max",
            True,
        )
        details = one.step(0, 1, rows=9).errors.errors
        assert [detail.reason for detail in details] == ["TENANT_LIMIT"]
        assert details[0].metadata["limit"] == "rows_max"
        assert len(one.step(0, 1, rows=8).outputs.seqs) == 64
        for seq in range(9, 30):
            assert one.step(0, seq).WhichOneof("frame") == "outputs", "room comes back with the answers"
            if seq % 4 == 0:
                acknowledged = stream_pb2.AcknowledgeFrame(
                    handles=bytes(4), acknowledged_seqs=np.array([seq], "<u8").tobytes()
                )
                one.send(acknowledge=acknowledged)
        assert not two.open("a").errors, "a session of its own is taken over, not counted twice"
        one.unary(pb.CloseSessionRequest(session_id="b"))
        assert not two.open("d").errors


def test_stored_sessions_are_limited(guarded: Any, tokens: TokensFile, globex: Peer) -> None:
    full = (grpc.StatusCode.RESOURCE_EXHAUSTED, "TENANT_LIMIT")
    with Peer(guarded, tokens.tokens["narrow"]) as one:
        assert not one.stream().open("a", "b", "c").errors
        one.step(0)
        data = one.unary(pb.ExportSessionRequest(session_id="a")).data
        one.send(close=stream_pb2.CloseFrame(request_id=2, handles=np.array([0, 1], np.uint32).tobytes(), detach=True))
        one.next()
        errors = one.open("a", "d", "b").errors
        assert [error.row for error in errors] == [1], "those that there are can be opened"
        assert dict(errors[0].error.metadata) == {"limit": "stored_max", "value": "3"}
        assert "close some" in errors[0].error.message
        assert refused(lambda: one.unary(pb.StepRequest(session_id="e", model=LSTM_MODEL, inputs=[1, 1, 1]))) == full
        assert refused(lambda: one.unary(pb.ForkSessionRequest(session_id="a", new_session_id="e"))) == full
        assert refused(lambda: one.unary(pb.ImportSessionRequest(session_id="e", data=data))) == full
        assert refused(lambda: one.unary(pb.ImportSessionRequest(session_id="b", data=data)))[1] == "SESSION_EXISTS"
        assert {info.id for info in one.unary(pb.ListSessionsRequest()).sessions} == {"a", "b", "c"}
        assert not globex.stream().open(*(f"g{i}" for i in range(8))).errors, "another tenant has limits of its own"
        one.unary(pb.CloseSessionRequest(session_id="c"))
        one.unary(pb.ForkSessionRequest(session_id="a", new_session_id="e"))
        assert refused(lambda: one.unary(pb.ForkSessionRequest(session_id="a", new_session_id="f"))) == full


# The audit, and what is not in it


def test_management_is_audited_and_secrets_are_not_logged(own_guarded: tuple[Any, TokensFile]) -> None:
    server, mine = own_guarded
    weak = mine.add("weak", "globex", "read")
    mine.write()
    with Peer(server, mine.tokens["first"]) as peer, Peer(server, weak) as other, Peer(server) as nobody:
        eventually(lambda: allowed(other), "taken up")
        peer.stream().open("a", "b")
        peer.step(0)
        data = peer.unary(pb.ExportSessionRequest(session_id="a")).data
        peer.unary(pb.ImportSessionRequest(data=data, session_id="c"))
        peer.unary(pb.ForkSessionRequest(session_id="a", new_session_id="d"))
        peer.unary(pb.CloseSessionRequest(session_id="d"))
        peer.unary(pb.ListSessionsRequest())
        refused(lambda: peer.unary(pb.CloseSessionRequest(session_id="d")))
        peer.send(close=stream_pb2.CloseFrame(request_id=2, handles=np.array([0, 1], np.uint32).tobytes()))
        peer.next()
        refused(lambda: other.unary(pb.CloseSessionRequest(session_id="c")))
        for _ in range(5):
            refused(lambda: nobody.unary(pb.GetServerRequest()))
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    audit = [line for line in lines if line["logger"] == "engram.audit"]
    told = [(line["method"], line.get("token", ""), line.get("session", ""), line["outcome"]) for line in audit]
    assert ("tokens reload", "", "", "ok") in told
    assert [row for row in told if row[1]] == [
        ("ExportSession", "first", "a", "ok"),
        ("ImportSession", "first", "c", "ok"),
        ("ForkSession", "first", ["a", "d"], "ok"),
        ("CloseSession", "first", "d", "ok"),
        ("ListSessions", "first", "", "ok"),
        ("CloseSession", "first", "d", "SESSION_NOT_FOUND"),
        ("Stream close", "first", ["a", "b"], "ok"),
        ("CloseSession", "weak", "", "RIGHT_MISSING"),
    ]
    asking = [row for row in told if row[3] == "TOKEN_MISSING"]
    assert 1 <= len(asking) < 5, "those without a token cannot fill the disk"
    assert all(line["tenant"] == "acme" for line in audit if line.get("token") == "first")
    assert all(line["peer"].startswith("ipv4:127.0.0.1") for line in audit if "token" in line)
    assert not any("inputs" in line for line in lines)
    text = server.log.read_text()
    for token in mine.tokens.values():
        assert token not in text and digest_of(token) not in text


def test_an_open_door_is_said_aloud(server_type: Any, models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    server = server_type(tmp_path, "--models", str(models), *QUICK)
    server.flags = (*server.flags, "--listen", f"0.0.0.0:{server.port}")
    with server:
        lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    warned = " ".join(line["message"] for line in lines if line["level"] == "warning")
    assert "set tokens_file" in warned and "plain text" in warned


def test_what_is_exposed() -> None:
    assert Settings().exposures() == []
    assert Settings(listen="[::1]:1", http="localhost:1").exposures() == []
    assert len(Settings(listen="0.0.0.0:1", http="[::]:2").exposures()) == 3
    here = __file__
    assert len(Settings(listen="0.0.0.0:1", tokens_file=here).exposures()) == 1
    assert Settings(listen="0.0.0.0:1", tokens_file=here, tls_cert=here, tls_key=here).exposures() == []
    assert Settings(listen="0.0.0.0:1", tls_client_ca=here, tls_cert=here, tls_key=here).exposures() == []
