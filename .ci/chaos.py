"""Runs the real program between mixed clients and a Z.ai that does every bad thing; fails where one of them notices.

python .ci/chaos.py [SECONDS [SEED]]       20 seconds; the same seed asks the same
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

import aiohttp
from aiohttp import web

PROGRAM = Path(__file__).parent.parent / "ztoapi.py"
KEY, CLIENTS, HANG = "sk-chaos", 200, 5
HEADERS = {"Authorization": f"Bearer {KEY}"}


def text_of(number: int) -> str:
    """What the fake answers to a prompt of this number: long enough to be cut, with characters of several bytes."""
    return " ".join(f"{number}·词{i}😀" for i in range(number % 90 + 3))


def chunk(**delta: object) -> dict:
    return {"id": "c", "created": 1, "model": "glm", "choices": [{"index": 0, "delta": delta}]}


def frames(text: str) -> list[bytes]:
    """A streamed answer, a word in each frame."""
    chunks = [
        chunk(role="assistant", reasoning_content="想"),
        *(chunk(content=word) for word in re.findall(r"\s?\S+", text)),
    ]
    finish = {"index": 0, "finish_reason": "stop", "delta": {"role": "assistant", "content": ""}}
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    last = {"id": "c", "created": 1, "choices": [finish], "usage": usage}
    return [
        b"data: " + json.dumps(c, ensure_ascii=False).encode() + b"\n\n" for c in (*chunks, last)
    ] + [b"data: [DONE]\n\n"]


def cut(random: Random, data: bytes) -> list[bytes]:
    cuts = sorted(random.sample(range(len(data)), min(6, len(data))))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def refusal(code: int) -> bytes:
    return json.dumps({"error": {"code": str(code), "message": "no"}}).encode()


class BadZai:
    """Answers well half of the time; otherwise as a network, a gateway or an overloaded model does."""

    MOODS = ("busy", "overloaded", "html", "junk", "empty", "reset", "torn", "breaks off", "error later", "silent",
             "silent later", "no end", "stalled refusal", "half a document", "drip", "comments", "odd", "1234")  # fmt: skip

    def __init__(self, random: Random) -> None:
        self.random, self.met = random, Counter()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**30)
        app.router.add_get("/{path:.*models}", self.models)
        app.router.add_post("/{path:.*}", self.answer)
        return app

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "glm-9", "created": 10**30}, {"id": None}, 7]})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        mood = self.random.choice(self.MOODS) if self.random.random() < 0.5 else "well"
        if request.headers["Authorization"] == "Bearer dead":
            mood = "dead"
        self.met[mood] += 1
        body = await request.read()
        if not request.path.endswith("chat/completions"):
            return await self.pass_on(request, b'{"size":%d}' % len(body), mood)
        asked = json.loads(body)
        said = text_of(int(re.findall(r"#(\d+)", str(asked["messages"]))[-1]))
        parts = frames(said)
        if not asked.get("stream"):
            message = {"role": "assistant", "content": said}
            parts = [
                json.dumps(
                    {
                        "id": "c",
                        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                    }
                ).encode()
            ]
        return await self.send(request, 200, self.parts(mood, parts), mood)

    async def pass_on(self, request: web.Request, body: bytes, mood: str) -> web.StreamResponse:
        kind = "text/event-stream" if b"event" in body else "application/json"
        return await self.send(
            request, 200, cut(self.random, body) if mood != "reset" else ["reset"], mood, kind
        )

    def parts(self, mood: str, parts: list[bytes]) -> list[bytes | str | float]:
        half, words = parts[: len(parts) // 2], b"".join(parts)
        return {
            "html": [b"<html>Bad Gateway</html>"],
            "junk": [b"junk \xff"],
            "empty": [],
            "reset": ["reset"],
            "torn": [half[0][:-30] if half else b"", *parts],
            "breaks off": [*half, "reset"],
            "error later": [*half, b'data: {"error":{"code":"1301","message":"no"}}\n\n'],
            "silent": ["hang"],
            "silent later": [*half, "hang"],
            "no end": [*parts[:-1], "hang"],
            "half a document": [words[: len(words) // 2]],
            "drip": [part for piece in cut(self.random, words) for part in (piece, 0.05)],
            "comments": [piece for part in parts for piece in (b": x\n\n" * 9, part)]
            if len(parts) > 1
            else parts,
            "odd": [
                b'data: {"choices":[{"delta":{"content":null,"tool_calls":[null,{"index":-1}]}}],"usage":[]}\n\n',
                *parts,
            ]
            if len(parts) > 1
            else [b'{"choices":[null]}'],
        }.get(mood, [*cut(self.random, words)])

    async def send(
        self, request: web.Request, status: int, parts: list, mood: str, kind: str = "x/y"
    ) -> web.StreamResponse:
        refused = {
            "busy": 1302,
            "overloaded": 1305,
            "1234": 1234,
            "dead": 1113,
            "stalled refusal": 1302,
        }.get(mood)
        if refused:
            status, parts = (
                429,
                [refusal(refused)] if mood != "stalled refusal" else [b'{"error"', "hang"],
            )
        response = web.StreamResponse(
            status=502 if mood == "html" else status, headers={"Content-Type": kind}
        )
        with contextlib.suppress(ConnectionError):  # the program has left
            await response.prepare(request)
            for part in parts:
                if isinstance(part, float):
                    await asyncio.sleep(part)
                elif part == "hang":
                    await asyncio.sleep(HANG)
                elif part == "reset":
                    request.transport.abort()
                else:
                    await response.write(part)
        return response


class Crowd:
    """Clients of every kind, each asking one thing after the other until the time is over."""

    def __init__(self, url: str, port: int, random: Random) -> None:
        self.url, self.port, self.random = url, port, random
        self.outcomes: Counter[str] = Counter()
        self.complaints: list[str] = []
        self.numbers = iter(range(10**9))

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        async with aiohttp.ClientSession(
            self.url, connector=aiohttp.TCPConnector(limit=0)
        ) as session:
            await asyncio.gather(*(self.client(session, end) for _ in range(CLIENTS)))

    async def client(self, session: aiohttp.ClientSession, end: float) -> None:
        kinds = (self.chat,) * 8 + (
            self.responses,
            self.messages,
            self.upload,
            self.pages,
            self.hang_up,
            self.slow,
            self.raw,
        )
        while time.monotonic() < end:
            kind = self.random.choice(kinds)
            try:
                await asyncio.wait_for(kind(session, next(self.numbers)), 90)
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                self.complain(f"{kind.__name__}: {error!r}")

    def complain(self, words: str) -> None:
        self.complaints.append(words[:400])

    def judge(self, what: str, status: int, text: str, wanted: str) -> None:
        """A refusal says why in JSON; an answer ends, and has its text whole unless an error says otherwise."""
        self.outcomes[f"{what} {status}"] += 1
        if status != 200:
            if not json.loads(text)["error"]["message"] or status == 500:
                self.complain(f"{what}: {status} {text}")
        elif wanted not in text and '"error"' not in text:
            self.complain(f"{what}: not whole: {text[-300:]}")

    async def chat(self, session: aiohttp.ClientSession, number: int) -> None:
        stream, n = self.random.random() < 0.7, self.random.choice((1, 1, 1, 2))
        body = {
            "model": "glm-4.6",
            "messages": [{"role": "user", "content": f"#{number}"}],
            "stream": stream,
            "n": n,
        }
        if self.random.random() < 0.1:
            body |= {"fallbacks": ["glm-5"], "metadata": {"x": "y" * 2**20}}
        async with session.post("/v1/chat/completions", json=body, headers=HEADERS) as response:
            text = await response.text()
        if not stream or response.status != 200:
            return self.judge("chat", response.status, text, text_of(number))
        broken_off, texts = '"error"' in text, [""] * n
        self.outcomes[f"chat streamed{', broken off' * broken_off}"] += 1
        for frame in re.findall(r"(?m)^data: (\{.*)$", text):
            for choice in json.loads(frame)["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
        if not text.endswith("data: [DONE]\n\n") or not (
            broken_off or texts == [text_of(number)] * n
        ):
            self.complain(f"chat: not whole: {text[-300:]}")
        return None

    async def responses(self, session: aiohttp.ClientSession, number: int) -> None:
        body = {"model": "glm-4.6", "input": f"#{number}", "stream": self.random.random() < 0.5}
        async with session.post("/v1/responses", json=body, headers=HEADERS) as response:
            text = await response.text()
        self.judge(
            "responses", response.status, text, json.dumps(text_of(number), ensure_ascii=False)
        )
        if (
            body["stream"]
            and response.status == 200
            and not re.search(r"event: (response\.(completed|failed)|error)\n.*\n\n$", text)
        ):
            self.complain(f"responses: no end: {text[-300:]}")

    async def messages(self, session: aiohttp.ClientSession, number: int) -> None:
        stream = self.random.random() < 0.7
        body = {
            "model": "glm-4.6",
            "max_tokens": 9000,
            "messages": [{"role": "user", "content": f"#{number}"}],
            "stream": stream,
        }
        wanted = "event: message_stop" if stream else text_of(number)
        async with session.post("/v1/messages", json=body, headers=HEADERS) as response:
            self.judge("messages", response.status, await response.text(), wanted)

    async def upload(self, session: aiohttp.ClientSession, number: int) -> None:
        size = self.random.choice((10, 10**5, 3 * 10**6))
        async with session.post("/v1/files", data=os.urandom(size), headers=HEADERS) as response:
            self.judge("files", response.status, await response.text(), f'"size":{size}')

    async def pages(self, session: aiohttp.ClientSession, _: int) -> None:
        path = self.random.choice(
            (
                "/docs",
                "/dashboard",
                "/v1/models",
                "/dashboard/stats",
                "/health",
                "/metrics",
                "/v1/" + "/" * 8000,
            )
        )
        async with session.get(path, headers=HEADERS) as response:
            self.outcomes[f"pages {response.status}"] += 1
            if response.status not in (200, 404):
                self.complain(f"{path[:20]}: {response.status}")

    async def hang_up(self, session: aiohttp.ClientSession, number: int) -> None:
        """Leaves at some moment: in the queue, in silence, or in mid-stream."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.chat(session, number), self.random.random())

    async def slow(self, session: aiohttp.ClientSession, number: int) -> None:
        body = {
            "model": "glm-4.6",
            "messages": [{"role": "user", "content": f"#{number}"}],
            "stream": True,
        }
        async with session.post("/v1/chat/completions", json=body, headers=HEADERS) as response:
            await asyncio.sleep(self.random.random() * 3)
            text = await response.text()
        if response.status == 200 and not text.endswith("data: [DONE]\n\n"):
            self.complain(f"slow: no [DONE]: {text[-300:]}")

    async def raw(self, _: aiohttp.ClientSession, __: int) -> None:
        """Says nothing, half a head, no HTTP, or a broken body."""
        post = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nx-api-key: sk-chaos\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = self.random.choice((
            b"", b"GET /hea", b"\x16\x03\x01 junk\r\n\r\n", post + b"Content-Length: 9\r\n\r\nabc",
            post + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\njunk\r\n",
            post + b"Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\nnot gzip!",
            post + b"Expect: miracles\r\n\r\n", b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n",
        ))  # fmt: skip
        writer.write(data)
        with contextlib.suppress(asyncio.TimeoutError, ConnectionError):
            answer = await asyncio.wait_for(reader.read(100), self.random.random() * 2)
            if answer and not re.match(rb"HTTP/1\.[01] 4\d\d ", answer):
                self.complain(f"raw: {data[:60]!r} {answer!r}")
        writer.close()


class Program:
    """ztoapi.py as a process of its own; its log goes to a file, or to a pipe that nobody reads."""

    async def start(self, limits: str, stderr: object, *flags: str, **variables: str) -> Program:
        self.process = await asyncio.create_subprocess_exec(
            "sh", "-c", f'{limits} exec "$@"', "sh", sys.executable, PROGRAM, "--port", "0", *flags,
            env={"PATH": os.environ["PATH"], "NO_PROXY": "127.0.0.1", "DATABASE_URL": "memory", **variables},
            stdout=asyncio.subprocess.PIPE, stderr=stderr,
        )  # fmt: skip
        while not (
            line := re.search(rb"http://localhost:(\d+)", await self.process.stdout.readline())
        ):
            pass
        self.port = int(line[1])
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def size(self) -> tuple[int, int]:
        """Open descriptors, and resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return len(os.listdir(f"/proc/{self.process.pid}/fd")), int(
            re.search(r"VmRSS:\s+(\d+)", status)[1]
        ) // 1024

    async def health(self) -> float:
        """Seconds until a new connection is answered."""
        started = time.monotonic()
        async with (
            aiohttp.ClientSession() as session,
            session.get(self.url + "/health") as response,
        ):
            assert response.status == 200
        return time.monotonic() - started

    async def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(self.process.wait(), 40)
        assert self.process.returncode == 0, self.process.returncode


async def chaos(seconds: float, seed: int) -> None:
    """Every request is answered, every text whole, every stream ended; and afterwards nothing is left of it."""
    random, log = Random(seed), tempfile.TemporaryFile("w+")
    fake = BadZai(random)
    runner = web.AppRunner(fake.app(), access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    base = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/api/paas/v4"
    program = await Program().start(
        "",
        log,
        ZAI_BASE_URL=base,
        ZAI_API_KEY="a,b,dead",
        DEFAULT_KEY=KEY,
        UPSTREAM_TIMEOUT="2",
        HOST="localhost",
    )
    crowd = Crowd(program.url, program.port, random)
    await crowd.run(seconds / 2)
    before = program.size()  # what the first half took is needed for such a crowd
    await crowd.run(seconds / 2)
    left = await nothing_left(program, before)
    print(
        f"{sum(crowd.outcomes.values())} outcomes {dict(sorted(crowd.outcomes.items()))}\nZ.ai was {dict(fake.met.most_common())}"
    )
    print(f"descriptors and MB before {before}, after {program.size()}; left: {left}")
    await program.stop()
    await runner.cleanup()
    log.seek(0)
    written = log.read()
    assert "Traceback" not in written, written[written.index("Traceback") - 500 :][:3000]
    assert not crowd.complaints, "\n".join(
        [f"{len(crowd.complaints)} complaints", *crowd.complaints[:10]]
    )
    assert not left, left


async def nothing_left(program: Program, before: tuple[int, int]) -> str:
    """What is still there half a minute later; "" as soon as it is nothing."""
    for _ in range(60):
        await asyncio.sleep(0.5)
        async with (
            aiohttp.ClientSession() as session,
            session.get(program.url + "/dashboard/stats", headers=HEADERS) as response,
        ):
            stats = await response.json()
        queues = [queue for queue in stats["queues"] if queue["in_flight"] or queue["waiting"]]
        descriptors, memory = program.size()
        if not queues and not stats["in_flight"] and descriptors <= 40 and memory <= before[1] + 20:
            return ""
    return f"{stats['in_flight']} in flight, {queues}, {descriptors} descriptors, {memory} MB"


async def silence() -> None:
    """With 128 descriptors and 200 connections that say nothing, others are answered within a second."""
    log = tempfile.TemporaryFile()
    program = await Program().start("ulimit -n 128;", log, "--demo")
    _, before = program.size()
    silent = [await asyncio.open_connection("127.0.0.1", program.port) for _ in range(200)]
    waits = []
    for _ in range(10):
        waits.append(await program.health())
        await asyncio.sleep(0.2)
    print(
        f"200 silent connections: answered after {max(waits):.3f} s, {program.size()[1] - before} MB, {log.tell()} bytes of log"
    )
    assert max(waits) < 1
    assert program.size()[1] < before + 5
    assert log.tell() < 10_000
    for _, writer in silent:
        writer.close()
    await program.stop()


async def stalled_log() -> None:
    """1,000 requests are answered while nobody reads the log."""
    program = await Program().start("", asyncio.subprocess.PIPE, "--demo", DEBUG_MODE="true")
    program.process.stderr._transport.pause_reading()
    async with aiohttp.ClientSession() as session:
        body = {"model": "glm-4.6", "messages": [{"role": "user", "content": "x" * 500}]}
        for start in range(0, 1000, 50):
            asking = (
                session.post(
                    program.url + "/v1/chat/completions",
                    json=body,
                    headers={"x-api-key": "sk-your-key"},
                )
                for _ in range(50)
            )
            assert {response.status for response in await asyncio.gather(*asking)} == {200}, start
    program.process.stderr._transport.resume_reading()
    await asyncio.gather(program.stop(), program.process.stderr.read())
    print("1,000 requests answered while nobody read the log")


async def main(seconds: float = 20, seed: int = 1) -> None:
    await silence()
    await stalled_log()
    await chaos(seconds, seed)


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:3])))
