"""How processes that share a key share what Z.ai takes, without knowing of each other.

usage: python .ci/sharing.py [PROCESSES,… [LIMIT,… [SECONDS]]] [--greedy N]      default: 1,4 1,3 12

A stand-in for Z.ai takes LIMIT requests at a time and refuses others with 1302; 24 clients ask
ztoapi, as that many processes, again and again, over a new connection each time.

With --greedy, another program uses the same key: N requests at a time, and each that is refused
asks again after a tenth of a second. It leaves nothing to others but by chance, so nothing is
expected then but that no client of ours is told a refusal.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import aiohttp
from aiohttp import web

PROGRAM = Path(__file__).parent.parent / "ztoapi.py"
ANSWER = 0.5  # seconds
GREEDY_WAIT = 0.1  # seconds
CLIENTS = 24
CHUNK = b'data: {"id":"1","created":1,"choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
END = (
    b'data: {"id":"1","choices":[{"index":0,"finish_reason":"stop","delta":{}}]}\n\n'
    b"data: [DONE]\n\n"
)
ASKED = {"model": "glm-5.3", "messages": [{"role": "user", "content": "hi"}]}


class BusyZai:
    """Takes `limit` requests at a time."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.active = 0
        self.answered = 0
        self.answered_others = 0
        self.refused = 0

    async def chat(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        is_ours = "X-Greedy" not in request.headers
        if self.active >= self.limit:
            self.refused += is_ours
            return web.json_response({"error": {"code": "1302", "message": "slow"}}, status=429)
        self.active += 1
        try:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(CHUNK)
            await asyncio.sleep(ANSWER)
            with suppress(ConnectionError):  # who asked left at the end
                await response.write(END)
        finally:
            self.active -= 1
        self.answered += is_ours
        self.answered_others += not is_ours
        return response


def start_ztoapi(zai_port: int) -> tuple[subprocess.Popen[str], str]:
    settings = {
        "ZAI_API_KEY": "key",
        "ZAI_BASE_URL": f"http://127.0.0.1:{zai_port}/v4",
        "DATABASE_URL": "memory",
        "DEFAULT_KEY": "sk-sharing",
        "PORT": "0",
        "HOST": "127.0.0.1",
    }
    process = subprocess.Popen(
        [sys.executable, PROGRAM],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    for line in process.stdout or ():
        if "clients" in line:
            return process, line.split()[-1]
    raise SystemExit("ztoapi did not start")


async def ask_again_and_again(
    addresses: list[str], waits: list[float], refusals: list[int]
) -> None:
    """Until it is cancelled; what is being waited for then counts as a wait."""
    connector = aiohttp.TCPConnector(force_close=True)
    headers = {"Authorization": "Bearer sk-sharing"}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        while True:
            started = time.monotonic()
            url = random.choice(addresses) + "/chat/completions"
            try:
                async with session.post(url, json=ASKED) as response:
                    await response.read()
            finally:
                waits.append(time.monotonic() - started)
            if response.status != 200:
                refusals.append(response.status)


async def ask_greedily(zai_port: int) -> None:
    """Another program with the same key. Until it is cancelled."""
    url = f"http://127.0.0.1:{zai_port}/v4/chat/completions"
    async with aiohttp.ClientSession(headers={"X-Greedy": "1"}) as session:
        while True:
            async with session.post(url, json=ASKED) as response:
                await response.read()
            if response.status != 200:
                await asyncio.sleep(GREEDY_WAIT)


async def share(processes: int, limit: int, seconds: float, greedy: int) -> float:
    """Prints one line; the share of the best possible answers per second."""
    zai = BusyZai(limit)
    app = web.Application()
    app.router.add_post("/v4/chat/completions", zai.chat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    started = [start_ztoapi(port) for _ in range(processes)]
    addresses = [address for _, address in started]
    waits: list[float] = []
    refusals: list[int] = []
    clients = [
        asyncio.create_task(ask_again_and_again(addresses, waits, refusals)) for _ in range(CLIENTS)
    ]
    others = [asyncio.create_task(ask_greedily(port)) for _ in range(greedy)]
    await asyncio.sleep(seconds)
    answered, refused = zai.answered, zai.refused
    answered_others = zai.answered_others
    asking = [client for client in clients if not client.done()]
    for client in (*asking, *others):
        client.cancel()
    await asyncio.wait([*clients, *others])
    assert len(asking) == CLIENTS, "a client failed"
    for process, _ in started:
        process.send_signal(signal.SIGTERM)
        process.wait(40)
    await runner.cleanup()
    best = min(limit, CLIENTS) / ANSWER
    share = answered / seconds / best
    mean = sum(waits) / len(waits)
    beside = ""
    if greedy:
        beside = f" beside {answered_others / seconds:.2f} of the other program"
    print(
        f"{processes} processes, limit {limit:2}: {answered / seconds:5.2f} answers/s{beside},"
        f" {share:.2f} of the best; told a refusal: {len(refusals)};"
        f" wasted at Z.ai: {refused / max(answered, 1):.2f} for each answer;"
        f" longest wait {max(waits) / mean:.1f} times the mean of {mean:.1f} s",
        flush=True,
    )
    assert not refusals, refusals
    return share


def numbers(words: str) -> list[int]:
    return [int(word) for word in words.split(",")]


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("processes", nargs="?", type=numbers, default=[1, 4])
    parser.add_argument("limits", nargs="?", type=numbers, default=[1, 3])
    parser.add_argument("seconds", nargs="?", type=float, default=12.0)
    parser.add_argument("--greedy", type=int, default=0)
    given = parser.parse_args()
    for limit in given.limits:
        alone = 1.0
        for number in given.processes:
            share_of_best = await share(number, limit, given.seconds, given.greedy)
            if given.greedy:
                continue
            if number == 1:
                alone = share_of_best
            # One process alone also leaves others a turn, so that the best counts too.
            assert share_of_best >= max(0.85 * alone, 0.75), "too much is left unused"


asyncio.run(main())
