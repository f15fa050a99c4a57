"""What tests cannot do in seconds: two servers on one database under load, PostgreSQL away for a while, kill -9.

usage: PYTHONPATH=. python .ci/database.py [REQUESTS] [SECONDS that PostgreSQL is away]
"""

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

import aiohttp
from aiohttp import web

from test_ztoapi import PostgreSQL
from ztoapi import Account, Database, hash_key

ROOT = Path(__file__).parent.parent

KEYS = [f"sk-load-{i}" for i in range(6)]
USAGE = {"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
CHOICE = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "ok"}}
FIGURES = [1, 0, 10, 4, 3]  # of one request, as the usage has them


async def chat(_: web.Request) -> web.Response:
    return web.json_response(
        {"id": "1", "created": 1, "model": "glm-4.6", "choices": [CHOICE], "usage": USAGE}
    )


async def start_zai() -> str:
    app = web.Application()
    app.router.add_post("/v4/chat/completions", chat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v4"


def start_server(zai: str, database: str, log: Path) -> tuple[subprocess.Popen, str]:
    env = os.environ | {
        "ZAI_BASE_URL": zai,
        "ZAI_API_KEY": "k",
        "DATABASE_URL": database,
        "DEFAULT_KEY": "sk-operator",
    }
    command = [sys.executable, ROOT / "ztoapi.py", "--port", "0", "--host", "127.0.0.1"]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=log.open("a"), text=True
    )
    while "http://" not in (line := process.stdout.readline()):
        assert line, log.read_text()
    return process, line.split()[-1]


async def ask(session: aiohttp.ClientSession, url: str, key: str) -> int:
    body = {"model": "glm-4.6", "messages": [{"role": "user", "content": "hi"}]}
    async with session.post(
        f"{url}/chat/completions", json=body, headers={"x-api-key": key}
    ) as response:
        await response.read()
        return response.status


async def load(
    urls: list[str], requests: int, meanwhile
) -> tuple[Counter, list[tuple[float, str]]]:
    """Statuses of the answers, and when each key had its answers."""
    turns, statuses, answered = iter(range(requests)), Counter(), []

    async def worker(session: aiohttp.ClientSession) -> None:
        for _ in turns:
            key = random.choice(KEYS)
            try:
                statuses[await ask(session, random.choice(urls), key)] += 1
            except aiohttp.ClientError:  # the server was killed
                return
            answered.append((time.monotonic(), key))

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(
            meanwhile(lambda: len(answered)), *(worker(session) for _ in range(32))
        )
    return statuses, answered


def make_keys(url: str) -> None:
    database = Database(url, time.time)
    for key in KEYS:
        account = Account(key, key.removeprefix("sk-"), hash=hash_key(key))
        database.transact(database.put_account, account)
    database.thread.submit(database.close).result()


def read_usage(url: str) -> dict[str, list[int]]:
    database = Database(url, time.time)
    rows = database.transact(database.list_usage, date.min)
    database.thread.submit(database.close).result()
    return {name: list(figures) for _, name, _, _, *figures in rows}


async def two_servers(url: str, folder: Path, requests: int, meanwhile) -> None:
    zai, log = await start_zai(), folder / "log"
    make_keys(url)
    servers = [start_server(zai, url, log) for _ in range(2)]
    started = time.monotonic()
    statuses, answered = await load([url for _, url in servers], requests, meanwhile)
    took = time.monotonic() - started
    for process, _ in servers:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    wanted = {
        key.removeprefix("sk-"): [n * f for f in FIGURES]
        for key, n in Counter(key for _, key in answered).items()
    }
    assert statuses == {200: requests}, statuses
    assert read_usage(url) == wanted, (read_usage(url), wanted)
    assert "locked" not in log.read_text()
    print(
        f"{requests} requests in {took:.0f} s, every count exact; {log.read_text().count('database cannot')} complaints"
    )


async def nothing(_) -> None:
    pass


async def killed(folder: Path) -> None:
    url, zai = f"sqlite:///{folder}/killed.db", await start_zai()
    make_keys(url)
    process, address = start_server(zai, url, folder / "log")

    async def kill(_) -> None:
        await asyncio.sleep(6)
        process.kill()

    _, answered = await load([address], 10**6, kill)
    process.wait()
    at = time.monotonic()
    kept = sum(figures[0] for figures in read_usage(url).values())
    owed = sum(when < max(when for when, _ in answered) - 2 for when, _ in answered)
    assert owed <= kept <= len(answered) + 32, (owed, kept, len(answered))
    with sqlite3.connect(folder / "killed.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    print(
        f"kill -9: {kept} of {len(answered)} kept, {owed} were older than 2 s; the file is sound ({time.monotonic() - at:.1f} s)"
    )


async def main(requests: int, outage: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("SQLite, two servers:", end=" ", flush=True)
        await two_servers(f"sqlite:///{folder}/two.db", folder, requests, nothing)
        await killed(folder)
        server = PostgreSQL()

        async def away(count) -> None:
            while count() < requests / 5:
                await asyncio.sleep(0.05)
            await asyncio.to_thread(server.stop)
            await asyncio.sleep(outage)
            await asyncio.to_thread(server.start)

        try:
            print(f"PostgreSQL, away for {outage:g} s:", end=" ", flush=True)
            await two_servers(server.url, folder, requests, away)
        finally:
            server.stop()


asyncio.run(main(int((sys.argv[1:2] or [10_000])[0]), float((sys.argv[2:3] or [20])[0])))
