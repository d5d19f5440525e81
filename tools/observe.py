"""`make observe`: two servers under a real Prometheus; docs/results/observability.json, and dashboard.png, drawn by matplotlib from
what Prometheus gave for the dashboard's queries.

Every query of the dashboard must give data, and every alert must fire by a real fault and end when the fault does. The rules are
those of deploy/observability with shorter times (`for`, and the windows of rates), so that this takes minutes. Needs prometheus on
PATH (Debian's package prometheus).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import engram
from engram._json import json_text
from engram_models import LSTM, Hopfield, write_bundle
from engram_service.bench.report import machine
from engram_service.local import LocalServer
from engram_service.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
FOLDER, RESULT = ROOT / "deploy" / "observability", ROOT / "docs" / "results" / "observability.json"

HEAVY, LIGHT, WORDS = "heavy", "light", "words"
FIRES_S, ENDS_S = 90.0, 120.0
OPTIONS = engram.ClientOptions(timeout_s=None, backoff_max_s=0.3, reconnect_timeout_s=600.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--only", nargs="+", default=(), help="these alerts; writes nothing")
    args = parser.parse_args()
    if shutil.which("prometheus") is None:
        print("make observe: prometheus is not on PATH (Debian's package prometheus has it)", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="engram-observe-") as scratch:
        found = asyncio.run(Scene(Path(scratch)).play(args.only))
    drawn = found["panels"].pop("drawn")
    if not args.only:
        args.out.write_text(json_text(found, indent=1) + "\n")
        args.out.with_name("dashboard.png").write_bytes(picture(drawn))
    bad = [name for name, one in found["alerts"].items() if not one["ended"]] + found["panels"]["empty"]
    say(f"{len(found['alerts'])} alerts, {found['panels']['queries']} queries; wrong: {bad or 'nothing'}")
    return 1 if bad else 0


class Scene:
    """Redis, two servers, Prometheus, and some traffic; then one fault after the other."""

    def __init__(self, directory: Path) -> None:
        from redises import RedisProcess

        self.directory = directory
        (directory / "redis").mkdir()
        self.redis = RedisProcess(directory / "redis")
        self.models = directory / "models"
        write_bundle(self.models, LIGHT, "1", LSTM(8, 32, output_size=8))
        write_bundle(self.models, HEAVY, "1", LSTM(8, 2048, output_size=8))
        write_bundle(self.models, WORDS, "1", Hopfield.of(_bits(3), ["a", "b", "c"]))
        tokens = directory / "tokens.toml"
        command = [
            sys.executable,
            "-m",
            "engram",
            "tokens",
            "new",
            "--tenant",
            "watch",
            "--rights",
            "read,step,manage",
            "--json",
        ]
        made = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        self.token = made["token"]
        tokens.write_text(made["table"])
        flags = ("--redis-url", self.redis.url, "--tokens-file", str(tokens), "--shipped-models", "false", "--models-poll-s", "1",
                 "--queue-rows-max", "2048", "--resident-idle-s", "2", "--log-level", "error")  # fmt: skip
        self.servers = [LocalServer(directory / name, self.models, flags) for name in ("one", "two")]
        self.port = free_port()

    async def play(self, only: Sequence[str]) -> dict[str, Any]:
        self.redis.start()
        prometheus: subprocess.Popen[bytes] | None = None
        try:
            for server in self.servers:
                await asyncio.to_thread(server.start)
            prometheus = self._prometheus()
            started = time.time()
            async with self.client(0) as client, self.client(1) as other:
                traffic = [asyncio.create_task(self._traffic(one, n)) for n, one in enumerate((client, other))]
                await asyncio.sleep(15)
                chosen = {name: fault for name, fault in self._faults().items() if not only or name in only}
                alerts = {name: await self._fault(name, fault) for name, fault in chosen.items()}
                for task in traffic:
                    task.cancel()
                await asyncio.gather(*traffic, return_exceptions=True)
            panels = self._panels(started)
        finally:
            if prometheus is not None:
                prometheus.kill()
            for server in self.servers:
                await asyncio.to_thread(server.stop)
            self.redis.stop()
        return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "alerts": alerts, "panels": panels}

    def client(self, number: int, token: str = "") -> engram.AsyncClient:
        return engram.AsyncClient(self.servers[number].address, OPTIONS, token=token or self.token)

    # Prometheus

    def _prometheus(self) -> subprocess.Popen[bytes]:
        rules = (FOLDER / "rules.yml").read_text()
        rules = (
            re.sub(r"for: \w+", "for: 2s", rules)
            .replace("[1m]", "[10s]")
            .replace("[5m]", "[10s]")
            .replace("[10m]", "[15s]")
        )
        (self.directory / "rules.yml").write_text(rules)
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [server.http for server in self.servers]
        (self.directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        return subprocess.Popen(
            ["prometheus", f"--config.file={self.directory}/prometheus.yml", f"--storage.tsdb.path={self.directory}/tsdb",
             f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=error"],
        )  # fmt: skip

    def _ask(self, path: str, **query: object) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def _firing(self) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self._ask("alerts")["alerts"] if alert["state"] == "firing"}

    def _panels(self, started: float) -> dict[str, Any]:
        """What each panel of the dashboard shows, and the queries that had no data at any time."""
        board = json.loads((FOLDER / "grafana" / "engram.json").read_text())
        times = {"start": started, "end": time.time(), "step": 5}
        drawn: dict[str, list[Any]] = {}
        empty: list[str] = []
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                result = self._ask("query_range", query=target["expr"].replace("[1m]", "[10s]"), **times)["result"]
                drawn.setdefault(panel["title"], []).extend(
                    (
                        _legend(target.get("legendFormat", ""), one["metric"]),
                        [(float(at) - started, float(value)) for at, value in one["values"]],
                    )
                    for one in result
                )
                if not result:
                    empty.append(target["expr"])
        return {
            "queries": sum(len(panel.get("targets", ())) for panel in board["panels"]),
            "empty": empty,
            "drawn": drawn,
        }

    # Traffic and faults

    async def _traffic(self, client: engram.AsyncClient, number: int) -> None:
        sessions = await client.open_many(LIGHT, [f"light-{number}-{at}" for at in range(32)])
        words = await client.open(WORDS, f"words-{number}")
        sleeper = await client.open(LIGHT, f"sleeper-{number}")  # leaves the arena in between, and is loaded again
        slept = time.monotonic()
        while True:
            with contextlib.suppress(engram.EngramError):
                await client.step_many(sessions, np.ones((32, 8), np.float32))
                await words.recall(_bits(1)[0])
                await (await client.open(LIGHT)).close()
                if time.monotonic() - slept > 6.0:
                    await sleeper.step(np.ones(8, np.float32))
                    slept = time.monotonic()
            await asyncio.sleep(0.1)

    async def _fault(self, name: str, fault: Callable[[], Any]) -> dict[str, Any]:
        quiet = await self._until(
            lambda: name not in self._firing(), ENDS_S
        )  # an earlier fault may have been one for it too
        assert quiet, f"{name} fires without its fault"
        begun = time.monotonic()
        async with fault():
            fired = await self._until(lambda: name in self._firing(), FIRES_S)
            fired_s = time.monotonic() - begun
        begun = time.monotonic()
        ended = fired and await self._until(lambda: name not in self._firing(), ENDS_S)
        found = {
            "fired": fired,
            "fired_s": round(fired_s, 1),
            "ended": ended,
            "ended_s": round(time.monotonic() - begun, 1),
        }
        say(f"{name}: {found}")
        return found

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if await asyncio.to_thread(condition):
                return True
            await asyncio.sleep(0.5)
        return False

    def _faults(self) -> dict[str, Callable[[], Any]]:
        return {
            "EngramServerDown": lambda: self._killed(1),
            "EngramNoServer": lambda: self._killed(0, 1),
            "EngramStoreDown": self._store_paused,
            "EngramRedisUnsafe": self._evicting,
            "EngramModelRefused": self._bad_bundle,
            "EngramDenied": lambda: self._repeated(self._denied),
            "EngramSaturated": lambda: self._repeated(self._heavy),
            "EngramSlowSteps": lambda: self._repeated(self._heavy),
            "EngramSlowCommits": lambda: self._repeated(self._stuttering),
            "EngramRefusing": lambda: self._repeated(self._greedy),
            "EngramFencing": lambda: self._repeated(self._stolen),
        }

    @contextlib.asynccontextmanager
    async def _killed(self, *numbers: int) -> AsyncIterator[None]:
        for number in numbers:
            self.servers[number].kill()
        yield
        for number in numbers:
            await asyncio.to_thread(self.servers[number].start)

    @contextlib.asynccontextmanager
    async def _store_paused(self) -> AsyncIterator[None]:
        self.redis.pause()
        yield
        self.redis.go_on()

    @contextlib.asynccontextmanager
    async def _evicting(self) -> AsyncIterator[None]:
        self.redis.client.config_set("maxmemory-policy", "volatile-lru")
        yield
        self.redis.client.config_set("maxmemory-policy", "noeviction")

    @contextlib.asynccontextmanager
    async def _bad_bundle(self) -> AsyncIterator[None]:
        folder = self.models / "bad" / "1"
        folder.mkdir(parents=True)
        (folder / "model.toml").write_text("kind = 'lstm'\n")
        yield
        shutil.rmtree(folder.parent)

    @contextlib.asynccontextmanager
    async def _repeated(self, once: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
        async def again() -> None:
            while True:
                with contextlib.suppress(engram.EngramError):
                    await once()

        task = asyncio.create_task(again())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _denied(self) -> None:
        with contextlib.suppress(engram.EngramError):
            async with self.client(0, token="nobody-knows-this-token"):
                pass
        await asyncio.sleep(0.1)

    async def _heavy(self) -> None:
        """Clients of a model that is all computation; with one alone, the engine would wait for it between two steps."""

        async def one(number: int) -> None:
            async with self.client(0) as client:
                sessions = await client.open_many(HEAVY, [f"heavy-{number}-{at}" for at in range(500)])
                while True:
                    await client.step_many(sessions, np.ones((500, 8), np.float32))

        await asyncio.gather(*(one(number) for number in range(4)))

    async def _stuttering(self) -> None:
        self.redis.pause()
        try:
            await asyncio.sleep(0.3)
        finally:
            self.redis.go_on()
        await asyncio.sleep(0.5)

    async def _greedy(self) -> None:
        async with self.client(0) as client, self.client(0) as other:
            for number, one in enumerate((client, other)):
                sessions = await one.open_many(LIGHT, [f"greedy-{number}-{at}" for at in range(1000)])
                runs = [session.run(np.ones((64, 8), np.float32)) for session in sessions]
                await asyncio.gather(*runs)

    async def _stolen(self) -> None:
        """Two clients at two servers open the same sessions in turns, with steps on their way."""
        async with self.client(0) as client, self.client(1) as other:
            names = [f"stolen-{at}" for at in range(64)]
            for one in (client, other, client, other):
                for session in await one.open_many(LIGHT, names):
                    asyncio.ensure_future(session.run(np.ones((400, 8), np.float32))).add_done_callback(
                        lambda run: run.exception()
                    )
                await asyncio.sleep(0.2)


def _legend(form: str, labels: dict[str, str]) -> str:
    """Grafana's {{label}} in a legend."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda hit: labels.get(hit[1], ""), form)


def picture(drawn: dict[str, list[Any]]) -> bytes:
    from engram_models.training.pictures import figure, png

    columns = 3
    board = figure(13, 2.1 * -(-len(drawn) // columns))
    board.suptitle("The dashboard's queries during make observe, drawn by matplotlib; seconds", fontsize=10)
    for axes, (title, lines) in zip(
        board.subplots(-(-len(drawn) // columns), columns).flat, drawn.items(), strict=False
    ):
        for name, points in lines:
            axes.plot(*zip(*points, strict=True), linewidth=0.8, label=name[:24])
        axes.set_title(title, fontsize=8, loc="left")
        axes.tick_params(labelsize=6)
        if 0 < len(lines) <= 6:
            axes.legend(fontsize=5)
    return png(board)


def _bits(rows: int) -> Any:
    return np.random.default_rng(1).choice([-1, 1], (rows, 20))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
