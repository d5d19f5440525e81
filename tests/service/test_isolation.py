"""Each output belongs to who gets it: several tenants do all that can be done to sessions, in any order, and every wait is stretched.

A session's input is a function of tenant, session and seq alone, so that each of its outputs is known beforehand, from the model itself,
whatever was done to the session in between: an output that is any other session's, or of another step, is recognised. Replies of
Redis are held back at random and the arenas are far too small, so that opens, loads, commits and closes wait while everything else
goes on. Longer: ENGRAM_ISOLATION_S=600; again: ENGRAM_ISOLATION_SEED (the timing remains chance's).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import pathlib
import random
import secrets
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from chaos.proxy import Proxy, Wires
from numpy.typing import NDArray

from engram.v1 import error_pb2, service_pb2_grpc
from engram.v1 import session_pb2 as pb
from engram.v1 import stream_pb2 as st
from engram_models import GRU, Bundle, load_bundle, shipped_models_dir, write_bundle
from engram_models.graph_step import GraphStep

SECONDS = float(os.environ.get("ENGRAM_ISOLATION_S", "8"))
SEED = int(os.environ.get("ENGRAM_ISOLATION_SEED") or secrets.randbits(32))
TENANTS = ("a", "b", "c")
TOKENS = {tenant: "engram_" + hashlib.sha256(f"isolation {tenant}".encode()).hexdigest() for tenant in TENANTS}
ACTORS = 2  # of each tenant: they take each other's sessions over
MODELS = ("digits-reader", "narrow")  # of 8 -> 10 and of 3 -> 5 numbers
NAMES = tuple(
    f"s{number}" for number in range(16)
)  # of each tenant, the same ones; in turn of the one and of the other model
STEPS_MAX = 400
TOLERANCE = 2e-6
LAG_S = 0.06  # the longest that a reply of Redis is held back
IDLE_S = 0.3
PATIENCE_S = 20.0  # by when every call is answered
GONE_S = 20.0  # by when nothing is left of streams that have ended
NO_HANDLE = 0xFFFFFFFF
FLAGS = ("--resident-idle-s", str(IDLE_S), "--arena-slots-max", "12", "--batch-rows-max", "32", "--interval-ms", "50")

REASONS = {name.removeprefix("ERROR_REASON_") for name in error_pb2.ErrorReason.DESCRIPTOR.values_by_name}
NEVER = {
    "INTERNAL",
    "UNSPECIFIED",
    "INVALID_FRAME",
    "INVALID_INPUT_WIDTH",
    "RECORD_CORRUPTED",
    "SESSION_OF_OTHER_MODEL",
}
"""Reasons that nothing here gives cause for."""

Floats = NDArray[np.float32]


@dataclass(slots=True)
class World:
    """What all actors share: the outputs that must come, and what was seen."""

    inputs: dict[tuple[str, str], Floats]  # [STEPS_MAX, input] by tenant and session
    outputs: dict[tuple[str, str], Floats]  # [STEPS_MAX, output]
    faults: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    reached: dict[tuple[str, str], int] = field(default_factory=dict)  # about the last seq of each
    end: float = 0.0

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end or bool(self.faults)

    def check(self, tenant: str, name: str, seq: int, row: Floats, where: str) -> None:
        """An output that a tenant was given for a step of one of its sessions."""
        self.seen["outputs"] += 1
        wanted = self.outputs[tenant, name][seq - 1]
        if row.shape == wanted.shape and np.abs(row - wanted).max() <= TOLERANCE:
            self.reached[tenant, name] = max(seq, self.reached.get((tenant, name), 0))
            return
        self.faults.append(f"{where}: {tenant}/{name}, step {seq}: {self._whose(row)}")

    def _whose(self, row: Floats) -> str:
        for (tenant, name), outputs in self.outputs.items():
            if row.shape == outputs.shape[1:]:
                found = np.flatnonzero(np.abs(outputs - row).max(axis=1) <= TOLERANCE)
                if len(found):
                    return f"the output of {tenant}/{name}, step {found[0] + 1}"
        return f"{row.shape[0]} numbers that are nobody's: {row}"

    def check_error(self, reason: str, message: str, where: str) -> None:
        self.seen[reason] += 1
        if reason not in REASONS - NEVER or not message:
            self.faults.append(f"{where}: the error {reason!r}: {message}")


def model_of(name: str) -> str:
    return MODELS[int(name[1:]) % len(MODELS)]


@dataclass(slots=True)
class Held:
    """A session under a handle, as the actor believes it stands."""

    name: str
    next: int
    sent: deque[int] = field(default_factory=lambda: deque(maxlen=8))


class Line:
    """One stream of an actor: it reads what comes in its order, and knows what each handle named when it came."""

    def __init__(self, actor: Actor) -> None:
        self.world, self.tenant, self.rng, self.actor = actor.world, actor.tenant, actor.rng, actor
        self.call = actor.stub.Stream(metadata=actor.metadata)
        self.live: dict[int, Held] = {}
        self.named: dict[int, str] = {}
        self.asked: set[tuple[int, int]] = set()
        self.opens: dict[int, list[str]] = {}
        self.numbers = 0
        self.ended = False
        self.writing = asyncio.Lock()  # gRPC takes one write at a time
        self.reader = asyncio.create_task(self._read())

    async def send(self, **frame: Any) -> None:
        async with self.writing:
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                try:
                    async with asyncio.timeout(PATIENCE_S):
                        await self.call.write(st.StreamRequest(**frame))
                except TimeoutError:
                    self.world.faults.append(f"a stream of {self.tenant} was not read for {PATIENCE_S:g} s")

    async def _read(self) -> None:
        try:
            while (response := await self.call.read()) is not grpc.aio.EOF:
                kind = response.WhichOneof("frame")
                self.world.seen[kind] += 1
                await getattr(self, f"_{kind}")(getattr(response, kind))
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE):
                self.world.faults.append(f"a stream of {self.tenant} ended: {error.code()}: {error.details()}")
        except asyncio.CancelledError:
            pass  # the actor's own
        except Exception as error:
            self.world.faults.append(f"a stream of {self.tenant}: {error!r}")
        self.ended = True

    async def _opened(self, frame: st.OpenedFrame) -> None:
        names = self.opens.pop(frame.request_id)
        handles, seqs = np.frombuffer(frame.handles, np.uint32), np.frombuffer(frame.seqs, np.uint64)
        for error in frame.errors:
            self.world.check_error(error.error.reason, error.error.message, "an open")
        for name, handle, seq in zip(names, handles.tolist(), seqs.tolist(), strict=True):
            if handle == NO_HANDLE:
                continue
            before = self.live.get(handle)
            if before is not None and before.name != name:
                self.world.faults.append(f"the handle {handle} of {self.tenant}/{before.name} is given to {name} too")
            self.named[handle] = name
            self.live[handle] = Held(name, seq + 1)
            self.world.reached[self.tenant, name] = seq

    async def _outputs(self, frame: st.OutputsFrame) -> None:
        handles, seqs = np.frombuffer(frame.handles, np.uint32), np.frombuffer(frame.seqs, np.uint64)
        rows = np.frombuffer(frame.outputs, np.float32).reshape(len(handles), -1)
        for handle, seq, row in zip(handles.tolist(), seqs.tolist(), rows, strict=True):
            if (handle, seq) not in self.asked:
                self.world.faults.append(
                    f"{self.tenant} is answered step {seq} of handle {handle}, which it did not send"
                )
                continue
            self.world.check(self.tenant, self.named[handle], seq, row, "a stream")

    async def _errors(self, frame: st.ErrorsFrame) -> None:
        for error in frame.errors:
            self.world.check_error(error.reason, error.message, "a step")
        handles, seqs = np.frombuffer(frame.handles, np.uint32), np.frombuffer(frame.seqs, np.uint64)
        for handle, seq, index in zip(
            handles.tolist(), seqs.tolist(), np.frombuffer(frame.error_indexes, np.uint32).tolist(), strict=True
        ):
            error, held = frame.errors[index], self.live.get(handle)
            if held is None:
                continue
            if error.reason in ("TAKEN_OVER", "SESSION_CLOSED", "INVALID_HANDLE"):
                del self.live[handle]
            elif error.reason == "SEQ_GAP":
                held.next = int(error.metadata.get("next_seq", seq))
            elif error.reason != "SEQ_ACKNOWLEDGED":
                held.next = min(held.next, seq)

    async def _closed(self, frame: st.ClosedFrame) -> None:
        for error in frame.errors:
            self.world.check_error(error.error.reason, error.error.message, "a close")

    async def _event(self, frame: st.EventFrame) -> None:
        self.world.seen[st.EventFrame.Type.Name(frame.type)] += 1
        for handle in np.frombuffer(frame.handles, np.uint32).tolist():
            self.live.pop(handle, None)

    async def _durable(self, frame: st.DurableFrame) -> None:
        pass

    async def _confirm(self, frame: st.ConfirmFrame) -> None:
        if self.rng.random() < 0.2:
            await asyncio.sleep(self.rng.random() * 0.2)
        await self.send(confirm=frame)

    async def opened(self, longest_s: float) -> None:
        """Returns when no open waits for its answer."""
        end = time.monotonic() + longest_s
        while self.opens and not self.ended and time.monotonic() < end:
            await asyncio.sleep(0.005)

    # What an actor does on it

    def some(self) -> list[int]:
        """Some handles of one model."""
        model = self.rng.choice(MODELS)
        handles = [handle for handle, held in self.live.items() if model_of(held.name) == model]
        return self.rng.sample(handles, self.rng.randint(1, len(handles))) if handles else []

    async def open(self, names: list[str] | None = None) -> None:
        rng = self.rng
        if names is None:
            offset = rng.randrange(len(MODELS))
            names = rng.sample(NAMES[offset :: len(MODELS)], rng.randint(1, 6))
        self.numbers += 1
        self.opens[self.numbers] = names
        self.world.seen["opens"] += 1
        common: dict[str, Any] = {
            "request_id": self.numbers, "model": model_of(names[0]), "session_ids": names, "client_id": self.actor.client_id,
            "durability": rng.choice((st.DURABILITY_STEP, st.DURABILITY_STEP, st.DURABILITY_INTERVAL)),
        }  # fmt: skip
        if rng.random() < 0.25:
            await self.send(attach=st.AttachFrame(**common))
        else:
            await self.send(open=st.OpenFrame(**common, confirms=rng.random() < 0.5))

    async def step(self) -> None:
        """New steps: up to four of each session in a row."""
        rows = []
        for handle in self.some():
            held = self.live[handle]
            held.next += self.rng.random() < 0.03  # a gap, which is refused
            for _ in range(self.rng.randint(1, 4)):
                if held.next > STEPS_MAX:
                    break
                rows.append((handle, held.next))
                held.sent.append(held.next)
                held.next += 1
        await self._steps(rows)

    async def repeat(self) -> None:
        """Steps again that were sent, or that were made before the session was opened here."""
        rows = []
        for handle in self.some():
            held = self.live[handle]
            seqs = sorted({*held.sent, *range(max(1, held.next - 3), held.next)})
            rows += [(handle, seq) for seq in seqs[-self.rng.randint(1, 4) :] if seq <= STEPS_MAX]
        await self._steps(rows)

    async def _steps(self, rows: list[tuple[int, int]]) -> None:
        if not rows:
            return
        self.asked.update(rows)
        self.world.seen["rows"] += len(rows)
        inputs = np.stack([self.world.inputs[self.tenant, self.named[handle]][seq - 1] for handle, seq in rows])
        acks = {}
        if self.rng.random() < 0.3:
            acks["acknowledged_seqs"] = np.array([max(0, seq - 5) for _, seq in rows], np.uint64).tobytes()
        await self.send(
            steps=st.StepsFrame(
                handles=np.array([handle for handle, _ in rows], np.uint32).tobytes(),
                seqs=np.array([seq for _, seq in rows], np.uint64).tobytes(),
                inputs=inputs.tobytes(), timeout_ms=self.rng.choice((0, 0, 0, 40)), **acks,
            )
        )  # fmt: skip

    async def acknowledge(self) -> None:
        handles = self.some()
        seqs = [max(0, self.live[handle].next - self.rng.randint(2, 6)) for handle in handles]
        await self.send(
            acknowledge=st.AcknowledgeFrame(
                handles=np.array(handles, np.uint32).tobytes(), acknowledged_seqs=np.array(seqs, np.uint64).tobytes()
            )
        )

    async def let_go(self, detach: bool) -> None:
        """Detach or close; often with steps or an open right behind, which nothing forbids."""
        handles = self.some()
        names = [self.live[handle].name for handle in handles]
        if self.rng.random() < 0.5:
            await self.repeat()
        self.numbers += 1
        data = np.array(handles, np.uint32).tobytes()
        await self.send(close=st.CloseFrame(request_id=self.numbers, handles=data, detach=detach))
        if self.rng.random() < 0.2:
            await self.repeat()
        for handle in handles:
            self.live.pop(handle, None)
        if names and self.rng.random() < 0.5:
            await self.open(names)


class Actor:
    """A client of one tenant: streams, one after the other, and unary calls beside them."""

    def __init__(self, world: World, address: str, tenant: str, number: int, seed: int) -> None:
        self.world, self.tenant = world, tenant
        self.rng = random.Random(f"{seed} {tenant} {number}")
        self.client_id = self.rng.randrange(2, 2**63)
        self.metadata = (("authorization", f"Bearer {TOKENS[tenant]}"),)
        self.channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.stub: Any = service_pb2_grpc.EngramServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.calls: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        try:
            while not self.world.over:
                await self._stream()
            if self.calls:
                await asyncio.wait(self.calls)
        finally:
            await self.channel.close()

    async def _stream(self) -> None:
        """One stream until it is cancelled, half closed and read to its end, or ended by the server."""
        line, rng = Line(self), self.rng
        last = time.monotonic() + rng.expovariate(1 / 2.0)
        await line.open()
        if rng.random() < 0.9:
            await line.opened(0.5)
        while time.monotonic() < last and not line.ended and not self.world.over:
            await self._act(line)
            if rng.random() < 0.7:
                await asyncio.sleep(rng.choice((0.0, 0.005, 0.02, 0.05, rng.random() * 2 * IDLE_S)))
        if rng.random() < 0.3:
            await line.call.done_writing()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(line.reader), rng.random() * 2)
        line.call.cancel()
        done, _ = await asyncio.wait([line.reader], timeout=PATIENCE_S)
        if not done:
            self.world.faults.append(f"a stream of {self.tenant} did not end when it was cancelled")

    async def _act(self, line: Line) -> None:
        match self.rng.choices(
            ("step", "repeat", "open", "detach", "close", "acknowledge", "unary", "again", "close unary"),
            (12, 8, 3, 3, 2, 2, 1, 1, 1),
        )[0]:
            case "step":
                await line.step()
            case "repeat":
                await line.repeat()
            case "open":
                await line.open()
            case "detach":
                await line.let_go(detach=True)
            case "close":
                await line.let_go(detach=False)
            case "acknowledge":
                await line.acknowledge()
            case "unary":
                self._begin(self._unary(self.rng.choice(NAMES)))
            case "again":
                name = self.rng.choice(NAMES)
                for _ in range(2):
                    self._begin(self._unary(name, repeated=True))
            case "close unary":
                self._begin(self._close(self.rng.choice(NAMES)))

    def _begin(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.calls.add(task)
        task.add_done_callback(self.calls.discard)

    async def _unary(self, name: str, repeated: bool = False) -> None:
        rows = self.rng.randint(1, 4)
        reached = self.world.reached.get((self.tenant, name), 0)
        first = max(1, reached + 1 - (rows if repeated else 0))
        if first + rows > STEPS_MAX:
            return
        inputs = self.world.inputs[self.tenant, name][first - 1 : first - 1 + rows]
        request = pb.StepRequest(session_id=name, model=model_of(name), inputs=inputs.ravel().tolist(), seq=first)
        answer = await self._call(self.stub.Step, request)
        if answer is None:
            return
        self.world.seen["unary"] += 1
        outputs = np.array(answer.outputs, np.float32).reshape(tuple(answer.shape))
        if len(outputs) != rows or answer.seq != first + rows - 1:
            self.world.faults.append(
                f"unary: {self.tenant}/{name}: {list(answer.shape)} and seq {answer.seq} for {rows} from {first}"
            )
            return
        for number, row in enumerate(outputs):
            self.world.check(self.tenant, name, first + number, row, "unary")

    async def _close(self, name: str) -> None:
        if await self._call(self.stub.CloseSession, pb.CloseSessionRequest(session_id=name)) is not None:
            self.world.reached[self.tenant, name] = 0

    async def _call(self, method: Any, request: Any) -> Any:
        """The answer; None where it was refused, or given up."""
        timeout = self.rng.choice((0.05, 0.3, PATIENCE_S, PATIENCE_S, PATIENCE_S))
        try:
            return await method(request, metadata=self.metadata, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            code = error.code()
            self.world.seen[f"unary {code.name}"] += 1
            if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN) or (
                code.name == "DEADLINE_EXCEEDED" and timeout > 5
            ):
                self.world.faults.append(f"a unary call of {self.tenant}: {code}: {error.details()}")
        return None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, pathlib.Path]:
    """Models, and what each session of each tenant answers to its inputs."""
    models = tmp_path_factory.mktemp("isolation-models")
    torch.manual_seed(6)
    write_bundle(models, "narrow", "1", GRU(3, 12, output_size=5))
    (models / "digits-reader").symlink_to(shipped_models_dir() / "digits-reader")
    made = World({}, {})
    for model in MODELS:
        bundle = load_bundle(models / model / "1")
        keys = [(tenant, name) for tenant in TENANTS for name in NAMES if model_of(name) == model]
        shape = (len(keys), STEPS_MAX, *bundle.schema.inputs[0].shape)
        inputs = np.random.default_rng(11).normal(size=shape).astype(np.float32)
        made.outputs.update(zip(keys, _outputs(bundle, inputs), strict=True))
        made.inputs.update(zip(keys, inputs, strict=True))
    return made, models


def _outputs(bundle: Bundle, inputs: Floats) -> Floats:
    """The outputs of sequences, [sequences, steps, output], by the graph that the server runs: in another library's last bits a model
    that magnifies small differences is elsewhere after twenty steps."""
    step, outputs = GraphStep(bundle.read_graph(), bundle.schema), []
    states = [np.repeat(bundle.initial(spec)[None], len(inputs), 0) for spec in bundle.schema.state]
    for number in range(inputs.shape[1]):
        (given,), states = step([inputs[:, number]], states)
        outputs.append(given)
    return np.stack(outputs, 1)


@pytest.fixture
def slow_redis(start_redis: Any) -> Iterator[tuple[str, Proxy]]:
    """The URL of a Redis whose replies may be held back, and what holds them."""
    wires = Wires()
    process = start_redis("--port", str(port := _port()), "--bind", "127.0.0.1")
    proxy = wires.proxy(0, port)
    yield f"redis://127.0.0.1:{proxy.port}/0", proxy
    proxy.close()
    wires.stop()
    process.stop()


def _port() -> int:
    from redises import free_port

    return free_port()


def _tokens_file(path: pathlib.Path) -> pathlib.Path:
    tables = []
    for tenant, token in TOKENS.items():
        digest = hashlib.sha256(token.encode()).hexdigest()
        tables.append(
            f'[tokens.{tenant}]\ntenant = "{tenant}"\nsha256 = "{digest}"\nrights = ["read", "step", "manage"]\n'
        )
    path.write_text("\n".join(tables))
    return path


@pytest.mark.promise(10)
@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.single_redis("its replies go through a proxy")
def test_every_output_belongs_to_who_gets_it(
    world: tuple[World, pathlib.Path], slow_redis: tuple[str, Proxy], server_type: Any, tmp_path: pathlib.Path
) -> None:
    seen, models = world
    url, proxy = slow_redis
    tokens = _tokens_file(tmp_path / "tokens.toml")
    print(f"ENGRAM_ISOLATION_SEED={SEED}")

    async def act(address: str) -> None:
        actors = [Actor(seen, address, tenant, number, SEED) for tenant in TENANTS for number in range(ACTORS)]
        await asyncio.gather(*(actor.run() for actor in actors))

    with server_type(
        tmp_path, "--models", str(models), "--redis-url", url, "--tokens-file", str(tokens), *FLAGS
    ) as server:
        proxy.lag(LAG_S, SEED)
        seen.end = time.monotonic() + SECONDS
        try:
            asyncio.run(act(server.address))
        finally:
            proxy.lag(0.0)
        print(dict(seen.seen))
        errors = _errors_of(server.log)
        assert (seen.faults[:5], errors[:3]) == ([], []), f"seed {SEED}, {dict(seen.seen)}"
        _assert_nothing_is_left(server)
        assert _errors_of(server.log) == []
    for what in ("outputs", "unary", "closed", "TYPE_TAKEN_OVER", "confirm"):
        assert seen.seen[what], f"{what} was never seen: {dict(seen.seen)}"


def _errors_of(log: pathlib.Path) -> list[str]:
    """What the server's log complains of, but for gRPC's own word on a call that its client gave up."""
    lines = log.read_text(errors="replace").splitlines()
    bad = [line for line in lines if "Traceback" in line or _level(line) in ("error", "critical")]
    return [line for line in bad if "ExecuteBatchError raised in core" not in line]


def _level(line: str) -> str:
    try:
        return str(json.loads(line)["level"])
    except (ValueError, KeyError, TypeError):
        return ""


def _assert_nothing_is_left(server: Any) -> None:
    """All streams have ended: soon no row is in flight, and no session known."""
    deadline = time.monotonic() + GONE_S
    while True:
        series = server.series()
        left = {
            name: value
            for name, value in series.items()
            if value
            and name.startswith(("engram_rows_in_flight", "engram_sessions{", "engram_streams", "engram_task_failures"))
        }
        if not left:
            return
        assert time.monotonic() < deadline, f"left over, seed {SEED}: {left}"
        time.sleep(0.1)
