"""The whole session API against a model of it: any calls in any order, two servers on one Redis, and the cell itself beside them.

After every call the outputs have the cell's own bits; whatever was done to one session, no other one has moved. Long runs:
ENGRAM_FUZZ_EXAMPLES and ENGRAM_FUZZ_STEPS, as `make test-all` sets them.
"""

from __future__ import annotations

import os
import pathlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import engram
from engram.v1 import session_pb2
from engram_models import LSTM, Bundle, GraphStep, Hopfield, PatternMemory, load_bundle, write_bundle
from engram_models.batching import Batching
from engram_models.inspection import checked_step
from engram_models.patterns import own_memory

SIZE, OWN = 20, 3
ROWS = 32  # of the reference's batch: every floor's multiple, as the servers' largest one
QUICK = ("--shipped-models", "false", "--batch-rows-max", str(ROWS))
PATIENT = engram.ClientOptions(backoff_initial_s=0.02, backoff_max_s=0.3)
EXAMPLES = int(os.environ.get("ENGRAM_FUZZ_EXAMPLES", "3"))
STEPS = int(os.environ.get("ENGRAM_FUZZ_STEPS", "20"))

SEEDS = st.integers(0, 2**32 - 1)
SERVERS = st.integers(0, 1)


@dataclass(slots=True)
class Pair:
    """Two servers on one Redis, a client of each, and the steps that they serve."""

    servers: list[Any]
    clients: list[engram.Client]
    steps: dict[str, GraphStep]
    bundles: dict[str, Bundle]


def _values(bundle: Bundle) -> dict[str, np.ndarray]:
    return {name: tensor.values for name, tensor in bundle.read_weights().items()}


@dataclass(slots=True)
class Expected:
    """What a session must be. `patterns`: of a memory, by label in their order, -1 and +1."""

    model: str
    state: list[np.ndarray]  # [1, ...] each
    last: np.ndarray  # [1, output]
    seq: int = 0
    patterns: dict[str, np.ndarray] = field(default_factory=dict)
    handle: tuple[int, engram.BlockingSession] | None = None  # the client that has it open, and its session

    def copy(self) -> Expected:
        return replace(self, patterns=dict(self.patterns), handle=None)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, module_redis: Any, server_type: type) -> Iterator[Pair]:
    torch.manual_seed(5)
    models = tmp_path_factory.mktemp("models")
    own = np.random.default_rng(3).choice([-1, 1], (OWN, SIZE))
    made = {"lstm": LSTM(4, 6, output_size=4), "hopfield": Hopfield.of(own, [f"own{row}" for row in range(OWN)])}
    bundles = {name: load_bundle(write_bundle(models, name, "1", cell)) for name, cell in made.items()}
    steps = {name: checked_step(bundle, Batching()) for name, bundle in bundles.items()}
    flags = ("--models", str(models), "--redis-url", module_redis.url, *QUICK)
    paths: list[pathlib.Path] = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    one, two = (server_type(path, *flags) for path in paths)
    with one, two, engram.Client(one.address, PATIENT) as first, engram.Client(two.address, PATIENT) as second:
        yield Pair([one, two], [first, second], steps, bundles)


class Sessions(RuleBasedStateMachine):
    """One run: sessions of its own on servers that all runs share."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair
        self.prefix = secrets.token_hex(4)
        self.made = 0
        self.restarts = 0
        self.open: dict[str, Expected] = {}
        self.closed: list[str] = []
        self.exports: list[tuple[bytes, Expected]] = []

    # What must be

    def initial(self, model: str) -> Expected:
        bundle = self.pair.bundles[model]
        own = own_memory(bundle.config, _values(bundle)) if model == "hopfield" else None
        rows = {} if own is None else dict(zip(own.labels, PatternMemory.unpack(own.bits, SIZE), strict=True))
        return Expected(
            model, bundle.initial_states(1), np.zeros((1, *bundle.schema.outputs[0].shape), np.float32), 0, rows
        )

    def advance(self, one: Expected, xs: np.ndarray | None, count: int = 0) -> np.ndarray:
        """The model's outputs for these inputs, or for its own outputs; in a batch, as a server would."""
        step = self.pair.steps[one.model]
        outputs = []
        inputs: list[Any] = list(xs) if xs is not None else [None] * count
        for x in inputs:
            row = one.last if x is None else x[None]
            (y,), after = step([np.repeat(row, ROWS, 0)], [np.repeat(tensor, ROWS, 0) for tensor in one.state])
            one.state, one.last = [tensor[:1] for tensor in after], y[:1]
            outputs.append(y[0])
        one.seq += len(inputs)
        return np.array(outputs, np.float32).reshape(len(inputs), *step.schema.outputs[0].shape)

    def inputs(self, one: Expected, seed: int, rows: int) -> np.ndarray:
        return (
            np.random.default_rng(seed)
            .normal(size=(rows, *self.pair.steps[one.model].schema.inputs[0].shape))
            .astype(np.float32)
        )

    # Which session, and who holds it

    def fresh(self) -> str:
        self.made += 1
        return f"{self.prefix}-{self.made}"

    def pick(self, number: int) -> tuple[str, Expected]:
        names = sorted(self.open)
        name = names[number % len(names)]
        return name, self.open[name]

    def held(self, name: str, server: int) -> engram.BlockingSession:
        """The session on that server; whoever had it before is told."""
        one = self.open[name]
        if one.handle is not None and one.handle[0] == server:
            return one.handle[1]
        former = one.handle
        session = self.pair.clients[server].open(one.model, name)
        assert session.seq == one.seq
        one.handle = (server, session)
        self.lost(former, one, engram.TakenOverError)
        return session

    def lost(self, former: Any, one: Expected, error: type[engram.EngramError]) -> None:
        if former is not None:
            with pytest.raises(error):
                former[1].step(self.inputs(one, 0, 1)[0])

    # The calls

    @initialize()
    def begin(self) -> None:
        for model in self.pair.steps:
            self.create(0, model)

    @rule(server=SERVERS, model=st.sampled_from(["lstm", "hopfield"]))
    def create(self, server: int, model: str) -> None:
        name = self.fresh()
        session = self.pair.clients[server].open(model, name)
        assert session.seq == 0
        self.open[name] = self.initial(model)
        self.open[name].handle = (server, session)

    @precondition(lambda self: self.closed)
    @rule(server=SERVERS, model=st.sampled_from(["lstm", "hopfield"]))
    def create_again(self, server: int, model: str) -> None:
        name = self.closed.pop()
        session = self.pair.clients[server].open(model, name)
        assert session.seq == 0, "nothing is left of a closed session"
        self.open[name] = self.initial(model)
        self.open[name].handle = (server, session)

    @rule(number=SEEDS, server=SERVERS, seed=SEEDS)
    def step(self, number: int, server: int, seed: int) -> None:
        name, one = self.pick(number)
        (x,) = self.inputs(one, seed, 1)
        y = self.held(name, server).step(x)
        assert y.tobytes() == self.advance(one, x[None])[0].tobytes()

    @rule(number=SEEDS, server=SERVERS, seed=SEEDS, rows=st.integers(0, 40))
    def run_many(self, number: int, server: int, seed: int, rows: int) -> None:
        name, one = self.pick(number)
        X = self.inputs(one, seed, rows)
        assert self.held(name, server).run(X).tobytes() == self.advance(one, X).tobytes()

    @rule(number=SEEDS, server=SERVERS, seed=SEEDS, rows=st.integers(1, 40))
    def prefill(self, number: int, server: int, seed: int, rows: int) -> None:
        name, one = self.pick(number)
        X = self.inputs(one, seed, rows)
        session = self.held(name, server)
        session.prefill(X)
        self.advance(one, X)
        assert session.seq == one.seq

    @rule(number=SEEDS, server=SERVERS, count=st.integers(1, 20))
    def generate(self, number: int, server: int, count: int) -> None:
        name, one = self.pick(number)
        assert self.held(name, server).generate(count).tobytes() == self.advance(one, None, count).tobytes()

    @rule(number=SEEDS, server=SERVERS, seed=SEEDS, rows=st.integers(1, 5), ahead=st.integers(1, 3))
    def resend(self, number: int, server: int, seed: int, rows: int, ahead: int) -> None:
        """A call of one step, sent twice; and one whose number is ahead of the session's."""
        name, one = self.pick(number)
        X = self.inputs(one, seed, rows)
        former, one.handle = one.handle, None
        first = one.seq + 1
        expected = self.advance(one, X)
        request = session_pb2.StepRequest(session_id=name, model=one.model, seq=first, raw_inputs=X.tobytes(), raw=True)
        for _ in range(2):
            response = self.unary(server, "Step", request, session_pb2.StepResponse)
            assert (response.seq, response.raw_outputs) == (one.seq, expected.tobytes())
        request.seq = one.seq + 1 + ahead
        with pytest.raises(grpc.RpcError) as caught:
            self.unary(server, "Step", request, session_pb2.StepResponse)
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION  # type: ignore[attr-defined]
        self.lost(former, one, engram.TakenOverError)

    @rule(number=SEEDS, server=SERVERS)
    def fork(self, number: int, server: int) -> None:
        name, one = self.pick(number)
        new = self.fresh()
        assert self.pair.clients[server].sessions.fork(name, new).seq == one.seq
        self.open[new] = one.copy()

    @rule(number=SEEDS, server=SERVERS)
    def export(self, number: int, server: int) -> None:
        name, one = self.pick(number)
        self.exports.append((self.pair.clients[server].sessions.export(name), one.copy()))

    @precondition(lambda self: self.exports)
    @rule(number=SEEDS, server=SERVERS)
    def import_it(self, number: int, server: int) -> None:
        data, one = self.exports[number % len(self.exports)]
        sessions = self.pair.clients[server].sessions
        name, _ = self.pick(number)
        with pytest.raises(engram.AlreadyExistsError):
            sessions.import_(data, name)
        at = number % len(data)
        with pytest.raises(engram.InvalidInputError):
            sessions.import_(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], self.fresh())
        new = self.fresh()
        assert sessions.import_(data, new).seq == one.seq
        self.open[new] = one.copy()

    @precondition(lambda self: len(self.open) > 2)
    @rule(number=SEEDS, server=SERVERS, by_name=st.booleans())
    def close(self, number: int, server: int, by_name: bool) -> None:
        name, one = self.pick(number)
        client = self.pair.clients[server]
        if by_name:
            client.sessions.close(name)
            self.lost(one.handle, one, engram.AbortedError)
        else:
            self.held(name, server).close()
        del self.open[name]
        self.closed.append(name)
        for ask in (client.sessions.get, client.sessions.state, client.sessions.export, client.sessions.close):
            with pytest.raises(engram.NotFoundError):
                ask(name)

    # Memories

    def memory(self, number: int) -> tuple[str, Expected]:
        names = sorted(name for name, one in self.open.items() if one.model == "hopfield")
        name = names[number % len(names)]
        return name, self.open[name]

    def has_memory(self) -> bool:
        return any(one.model == "hopfield" for one in self.open.values())

    @precondition(has_memory)
    @rule(number=SEEDS, server=SERVERS, seed=SEEDS, rows=st.integers(1, 4))
    def store(self, number: int, server: int, seed: int, rows: int) -> None:
        name, one = self.memory(number)
        patterns = np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), (rows, SIZE))
        labels = [f"l{self.made}-{row}" for row in range(rows)]
        self.made += 1
        sessions = self.pair.clients[server].sessions
        assert sessions.store(name, patterns, labels).count == len(one.patterns) + rows
        one.patterns.update(zip(labels, patterns, strict=True))
        with pytest.raises(engram.AlreadyExistsError):
            sessions.store(name, patterns, labels)

    @precondition(has_memory)
    @rule(number=SEEDS, server=SERVERS, seed=SEEDS)
    def recall(self, number: int, server: int, seed: int) -> None:
        name, one = self.memory(number)
        sessions = self.pair.clients[server].sessions
        cue = np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), SIZE)
        if not one.patterns:
            with pytest.raises(engram.FailedPreconditionError):
                sessions.recall(name, cue)
            return
        memory = PatternMemory(SIZE)
        rows = np.array(list(one.patterns.values()))
        memory.add(PatternMemory.pack(rows, SIZE), list(one.patterns))
        (expected,) = memory.recall(cue[None])
        hit = sessions.recall(name, cue)
        assert (hit.label, hit.distance) == (expected.label, expected.distance)
        assert hit.pattern.tolist() == expected.pattern.tolist()

    @precondition(has_memory)
    @rule(number=SEEDS, server=SERVERS, all_of_it=st.sampled_from([False, False, False, True]))
    def forget(self, number: int, server: int, all_of_it: bool) -> None:
        name, one = self.memory(number)
        sessions = self.pair.clients[server].sessions
        with pytest.raises(engram.NotFoundError):
            sessions.forget(name, ["never stored"])
        if all_of_it:
            sessions.forget(name, all=True)
            one.patterns.clear()
        elif one.patterns:
            label = sorted(one.patterns)[number % len(one.patterns)]
            sessions.forget(name, [label])
            del one.patterns[label]
        assert sessions.patterns(name).labels == list(one.patterns)

    # Servers

    @precondition(lambda self: self.restarts < 1 and self.made > 6)
    @rule(server=SERVERS)
    def restart(self, server: int) -> None:
        """kill -9: the clients' business is to carry on."""
        self.restarts += 1
        self.pair.servers[server].restart()

    def unary(self, server: int, method: str, request: Any, response: Any) -> Any:
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(self.pair.servers[server].address, options=options) as channel:
            call = channel.unary_unary(
                f"/engram.v1.EngramService/{method}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=response.FromString,
            )
            return call(request, timeout=30, wait_for_ready=True)

    # What holds at any time

    @invariant()
    def nothing_else_has_moved(self) -> None:
        client = self.pair.clients[self.made % 2]
        listed = {info.id: info.seq for info in client.sessions.list() if info.id.startswith(self.prefix)}
        assert listed == {name: one.seq for name, one in self.open.items()}

    def teardown(self) -> None:
        for name, one in self.open.items():
            state = self.pair.clients[0].sessions.state(name)
            names = [spec.name for spec in self.pair.steps[one.model].schema.state]
            assert list(state) == names
            for values, expected in zip(state.values(), one.state, strict=True):
                assert values.tobytes() == expected[0].tobytes(), "every state has the model's own bits"
            if one.model == "hopfield":
                found = self.pair.clients[1].sessions.patterns(name, values=True)
                assert found.labels == list(one.patterns)
                assert np.array_equal(found.patterns, np.array(list(one.patterns.values())).reshape(-1, SIZE))


@pytest.mark.promise(1)
def test_single_steps_may_go_to_any_server(pair: Pair) -> None:
    """Found by the runs below: a server that had stepped a session called the right seq a gap once another had gone on with it,
    and answered from a session that was closed and made anew elsewhere."""
    machine = Sessions(pair)
    name = machine.fresh()

    def step(server: int, seq: int, x: float) -> bytes:
        raw = np.full(4, x, np.float32).tobytes()
        request = session_pb2.StepRequest(session_id=name, model="lstm", seq=seq, raw_inputs=raw, raw=True)
        response = machine.unary(server, "Step", request, session_pb2.StepResponse)
        assert response.seq == seq
        return bytes(response.raw_outputs)

    one = machine.initial("lstm")
    for seq, server in enumerate((1, 0, 0, 1, 1, 0), start=1):
        expected = machine.advance(one, np.full((1, 4), seq, np.float32)).tobytes()
        assert step(server, seq, seq) == expected
        assert step(1 - server, seq, seq) == expected, "sent again, to the other server"
    pair.clients[0].sessions.close(name)
    another = machine.advance(machine.initial("lstm"), np.full((1, 4), -1, np.float32)).tobytes()
    assert step(0, 1, -1) == another
    assert step(1, 1, -1) == another


@pytest.mark.promise(5)
def test_any_calls_in_any_order_do_what_the_cell_does(pair: Pair) -> None:
    run_state_machine_as_test(
        lambda: Sessions(pair),
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, database=None, derandomize=EXAMPLES < 10,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
