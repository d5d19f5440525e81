"""A TCP proxy that cuts, delays, holds back and refuses: every wire of the campaign goes through one."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future

_CHUNK = 1 << 16
_FLUSH_S = 0.002  # for the last bytes to leave before a reset


class Wires:
    """The event loop of all proxies, in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="wires", daemon=True)
        self._thread.start()

    def proxy(self, listen: int, target: int) -> Proxy:
        """A proxy on 127.0.0.1, listening when this returns."""
        made = Proxy(self.loop, target)
        asyncio.run_coroutine_threadsafe(made.start(listen), self.loop).result(10)
        return made

    def stop(self) -> None:
        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        self.loop.close()


class Proxy:
    """One port in front of another. The methods without an underscore may be called from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: int) -> None:
        self._loop = loop
        self._target = target
        self._delay_s = 0.0
        self._left: int | None = None  # bytes that may still pass
        self._lags: random.Random | None = None
        self._lag_s = 0.0
        self._refusing = False
        self._open = asyncio.Event()  # clear while what arrives is held back
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self, listen: int) -> None:
        """Port 0: any that is free."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", listen, limit=_CHUNK)

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    def cut(self) -> None:
        """Every connection ends with a reset; what was under way is lost."""
        self._post(self._cut)

    def break_after(self, nbytes: int) -> None:
        """So many bytes still pass, in both directions together; then every connection ends with a reset."""
        self._post(lambda: setattr(self, "_left", nbytes))

    def mend(self) -> bool:
        """What is left of the last `break_after` is forgotten; whether it had not come about."""
        unbroken: Future[bool] = Future()

        def change() -> None:
            unbroken.set_result(self._left is not None)
            self._left = None

        self._post(change)
        return unbroken.result(10)

    def delay(self, seconds: float) -> None:
        """From now on whatever passes takes so much longer, in either direction."""
        self._post(lambda: setattr(self, "_delay_s", seconds))

    def lag(self, longest_s: float, seed: int = 0) -> None:
        """From now on each answer takes longer by a time of its own: mostly little, seldom almost `longest_s`."""
        lags = random.Random(seed) if longest_s else None
        self._post(lambda: (setattr(self, "_lags", lags), setattr(self, "_lag_s", longest_s)))

    def hold(self, held: bool) -> None:
        """While held, nothing passes and nothing is lost: it arrives late."""
        self._post(self._open.clear if held else self._open.set)

    def refuse(self, refusing: bool) -> None:
        """While refusing, new connections are closed at once."""
        self._post(lambda: setattr(self, "_refusing", refusing))

    def retarget(self, target: int) -> None:
        """New connections go to another port; the old ones are cut."""

        def change() -> None:
            self._target = target
            self._cut()

        self._post(change)

    def heal(self) -> None:
        """As if nothing had ever been."""
        self.mend()
        self.delay(0.0)
        self.lag(0.0)
        self.refuse(False)
        self.hold(False)

    def close(self) -> None:
        def end() -> None:
            if self._server is not None:
                self._server.close()
            self._cut()

        self._post(end)

    def _post(self, work: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(work)

    def _cut(self) -> None:
        for writer in self._writers:
            _reset(writer)
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        self._writers.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target, limit=_CHUNK)
        except OSError:
            writer.transport.abort()
            self._writers.discard(writer)
            return
        self._writers.add(far_writer)
        pumps = [
            asyncio.create_task(self._pump(reader, far_writer)),
            asyncio.create_task(self._pump(far_reader, writer, answers=True)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pass  # all proxies end; the stream's own callback takes no cancelled task
        finally:
            for task in pumps:
                task.cancel()
            for one in (writer, far_writer):
                self._writers.discard(one)
                one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                await self._open.wait()
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                if answers and self._lags is not None:
                    await asyncio.sleep(self._lag_s * self._lags.random() ** 3)
                if self._left is not None:
                    data, self._left = data[: self._left], max(0, self._left - len(data))
                writer.write(data)
                await writer.drain()
                if self._left == 0:
                    self._left = None
                    await asyncio.sleep(_FLUSH_S)
                    self._cut()


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):  # it may just have ended by itself
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
