"""Tests of ztoapi, in the order of the program: the pure parts first, then the whole over real sockets.

Run `pytest`. Tests that need the OpenAI SDK, Chromium or PostgreSQL are skipped, by name, where it is not installed.
"""

from __future__ import annotations
import __future__

import ast
import asyncio
import base64
import contextlib
import dis
import errno
import gc
import gzip
import hashlib
import html
import io
import json
import math
import os
import random
import re
import secrets
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from bisect import bisect_right
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from functools import cache, cached_property, partial, reduce, wraps
from heapq import heappop, heappush
from importlib import import_module
from inspect import Signature, signature
from itertools import count, pairwise, product
from pathlib import Path
from random import Random

import pytest
import pytest_asyncio
from aiohttp import ClientTimeout, web
from aiohttp.test_utils import TestClient, TestServer, get_port_socket, make_mocked_request
from aiohttp.web_protocol import RequestHandler

import ztoapi
from ztoapi import (
    DOLLAR,
    EVERYBODY,
    MODELS,
    Account,
    Accounts,
    AdaptiveLimit,
    BadRequest,
    Caller,
    ChatReply,
    Citations,
    ErrorKind,
    Finish,
    Head,
    KeyPool,
    KeyUse,
    Known,
    Limits,
    Media,
    Message,
    Prompt,
    Queue,
    Redactor,
    RefInliner,
    Settings,
    SettingsError,
    SSEDecoder,
    Text,
    Thought,
    Tool,
    ToolCall,
    ToolChoice,
    Totals,
    UpstreamError,
    Usage,
    Used,
    ZaiReader,
    backoff,
    create_app,
    day_of,
    error_body,
    error_headers,
    hash_key,
    json_bytes,
    json_text,
    resolve,
    sse,
    zai_body,
    zai_error,
)

in_loop = pytest.mark.asyncio

LONGEST_TEST = 50  # seconds; one that hangs fails then
PATIENT = ClientTimeout(total=20)  # of a test's client
CLOSING = 15  # seconds in which what a test that hung has started must end
MOST_HANGS = 3  # after which others would hang too


@pytest.fixture(autouse=True)
def no_hang(request):
    """Fails a test that hangs, and says where its tasks stood.

    Where no signal comes through, `faulthandler_timeout` in .pytest.ini ends the run.
    """
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return

    def fail(*_):
        session = request.session
        session.hangs = getattr(session, "hangs", 0) + 1
        if session.hangs >= MOST_HANGS:
            session.shouldfail = f"{MOST_HANGS} tests hung"
        pytest.fail(f"longer than {LONGEST_TEST} seconds\n{where_tasks_stand()}")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_TEST, CLOSING)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def where_tasks_stand():
    """The stacks of the running event loop's tasks, if one runs."""
    stacks = io.StringIO()
    with contextlib.suppress(RuntimeError):
        for task in asyncio.all_tasks():
            task.print_stack(file=stacks)
    return stacks.getvalue()


PROGRAM = Path(ztoapi.__file__)
SETTING_NAMES = {field.name.upper() for field in ztoapi.fields(Settings)}
# What programs of the tests inherit. FAKETIME_SHARED is libfaketime's, and not for another process.
NOT_INHERITED = SETTING_NAMES | {"FAKETIME_SHARED"}
INHERITED = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
KEY = {"Authorization": "Bearer sk-your-key"}
HELLO = {"model": "glm-4.6", "messages": [{"role": "user", "content": "你好"}]}


def meanwhile(test):
    """For a test that mostly waits for programs that it starts: a thread runs it while others are tested.

    It can have no marks, no other fixtures than `run_alone` gives, and no warnings: those are the process's.
    """
    assert not hasattr(test, "pytestmark")

    def outcome(outcomes):
        outcomes[test].result()

    outcome.__name__, outcome.meanwhile = test.__name__, test
    return outcome


def read_chat(body):
    return ztoapi.parse_chat(body)[0]


def chat(**changes):
    return {**HELLO, **changes}


def message(**fields):
    return chat(messages=[fields])


# ======== The file ========


@cache
def program_tree():
    return ast.parse(PROGRAM.read_text())


@cache
def sections():
    """The program's sections in order: the title of each, and the names that its code defines and uses."""
    lines = PROGRAM.read_text().splitlines()
    starts = [number for number, line in enumerate(lines, 1) if line.startswith("# ======== ")]
    found = [(lines[start - 1].split("=")[8].strip(), set(), set()) for start in starts]
    for node in program_tree().body:
        number = bisect_right(starts, node.lineno) - 1
        if number >= 0:
            _, defined, used = found[number]
            code = compile(ast.Module([node], []), "", "exec", dont_inherit=True, flags=ANNOTATIONS)
            defined.update(i.argval for i in dis.get_instructions(code) if i.opname == "STORE_NAME")
            used.update(names_used(code))
    return found


ANNOTATIONS = __future__.annotations.compiler_flag  # they are texts, and no use of a name


def names_used(code):
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            yield from names_used(constant)


# What may name something that stands below it: a part may have two sections, and main starts the rest.
FORWARD = {
    ("Responses: request", "Responses: answer"),
    ("Messages: request", "Messages: answer"),
    ("Handlers", "Pages"),
    ("Dashboard", "Pages"),
    ("Errors and shutdown", "Demo"),
    ("Server", "Demo"),
    ("Start", "Commands: keys"),
    ("Start", "Commands: check"),
    ("Start", "Commands: probe"),
    ("Start", "Commands: launch"),
    ("Start", "Demo"),
    ("Commands: check", "Commands: probe"),
}


def test_sections_use_what_stands_above_them():
    found = sections()
    where = {}
    for number, (_, defined, _) in enumerate(found):
        for name in defined:
            where.setdefault(name, number)
    forward = {
        (title, found[where[name]][0])
        for number, (title, defined, used) in enumerate(found)
        for name in used - defined
        if where.get(name, -1) > number
    }
    assert forward == FORWARD


IMPURE = {
    *("aiohttp", "asyncio", "getproxies", "logging", "open", "os", "Path", "random", "secrets"),
    *("signal", "socket", "subprocess", "sys", "tempfile", "Thread", "time", "web", "LOG"),
}


def test_the_pure_part_reads_no_clock_no_socket_no_environment_and_no_chance():
    found = sections()
    titles = [title for title, _, _ in found]
    pure = found[: titles.index("Admission — from here on: I/O")]
    assert {title: used & IMPURE for title, _, used in pure if used & IMPURE} == {}
    assert len(pure) > 15


def test_no_name_of_the_tests_is_given_twice():
    names = []
    for statement in ast.parse(Path(__file__).read_text()).body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(statement.name)
        for target in getattr(statement, "targets", ()):
            stored = [node for node in ast.walk(target) if isinstance(node, ast.Name)]
            names += [node.id for node in stored if isinstance(node.ctx, ast.Store)]
    assert [name for name, times in Counter(names).items() if times > 1] == []


RECORDER = Path(ztoapi.__file__).parent / ".ci" / "record.py"
DEBUG_LOG = """\
2026-11-30 09:44:54,367 DEBUG 3db64d17 asked /v1/chat/completions {"model":"glm-4.6","user":"anna","messages":[{"role":"user","content":"Read Annas.txt"}]}
2026-11-30 09:44:54,370 DEBUG 3db64d17 received "data: {\\"choices\\":[{\\"delta\\":{\\"content\\":\\"Anna <think>\\"}}]}\\n\\nda"
2026-11-30 09:44:54,371 DEBUG 3db64d17 received "ta: {\\"choices\\":[{\\"delta\\":{\\"content\\":\\"Secret"
2026-11-30 09:44:54,373 DEBUG 3db64d17 answered {"choices":[{"index":0,"message":{"content":"Anna <think>"}}]}
2026-11-30 09:44:54,374 INFO POST /v1/chat/completions glm-4.6 200 0.02 s
"""


def test_a_recorded_conversation_keeps_its_form_and_loses_its_words(tmp_path):
    log = tmp_path / "log"
    log.write_text(DEBUG_LOG)
    command = [sys.executable, RECORDER, log]
    done = subprocess.run(command, capture_output=True, timeout=20, check=True)
    (case,) = json.loads(done.stdout)
    assert (case["path"], case["asked"]["model"]) == ("/v1/chat/completions", "glm-4.6")
    came = [json.loads(line.partition("received ")[2]) for line in DEBUG_LOG.splitlines()[1:3]]
    assert [*map(len, case["received"])] == [*map(len, came)]
    assert "<think>" in case["received"][0]
    assert case["received"][1].startswith('ta: {"choices":[{"delta":{"content":"')
    text = json.dumps(case)
    assert not [word for word in ("Anna", "anna", "Annas", "Secret", "Read") if word in text]
    first, *_ = case["asked"]["messages"][0]["content"].split(" ")
    assert len(first) == 4
    answered = json.loads(case["answered"][0])["choices"][0]["message"]["content"]
    assert answered.split(" ")[0] in case["received"][0]


# ======== Settings ========


def test_an_empty_environment_gives_the_defaults():
    assert Settings.from_env({}) == Settings()


def test_every_variable_is_read_by_its_name_in_capitals():
    given = {
        "PORT": "8000",
        "HOST": "0.0.0.0",
        "DEFAULT_KEY": "sk-a, sk-b",
        "DEBUG_MODE": "TRUE",
        "ZAI_API_KEY": "id1.secret, id2.secret@plan",
        "ZAI_BASE_URL": "https://open.bigmodel.cn/api/paas/v4/",
        "DEFAULT_STREAM": "yes",
        "ENABLE_THINKING": "false",
        "REASONING_FORMAT": "RAW",
        "MODEL_ALIASES": "gpt-4o=glm-4.6, claude-*=glm-5.3",
        "FALLBACK_MODELS": "glm-4.7-flash, glm-4.5-flash",
        "VISION_MODEL": "glm-4.6v",
        "VISION_MODE": "Describe",
        "REASONING_MEMORY": "ALL",
        "MAX_CONCURRENCY": "3",
        "MAX_RETRIES": "0",
        "RATE_LIMIT_WAIT": "30",
        "UPSTREAM_TIMEOUT": "60",
        "MAX_BODY_MB": "8",
        "DASHBOARD_ENABLED": "off",
        "CORS_ORIGINS": "https://a.example/,https://b.example",
    }
    assert Settings.from_env(given) == Settings(
        port=8000,
        host="0.0.0.0",
        default_key=("sk-a", "sk-b"),
        debug_mode=True,
        zai_api_key=("id1.secret", "id2.secret@plan"),
        zai_base_url="https://open.bigmodel.cn/api/paas/v4",
        default_stream=True,
        enable_thinking=False,
        reasoning_format="raw",
        model_aliases=(("gpt-4o", "glm-4.6"), ("claude-*", "glm-5.3")),
        fallback_models=("glm-4.7-flash", "glm-4.5-flash"),
        vision_model="glm-4.6v",
        vision_mode="describe",
        reasoning_memory="all",
        max_concurrency=3,
        max_retries=0,
        rate_limit_wait=30,
        upstream_timeout=60,
        max_body_mb=8,
        dashboard_enabled=False,
        cors_origins=("https://a.example", "https://b.example"),
    )


def test_every_variable_is_in_env_example_with_its_default_and_in_the_readme():
    example = dict(
        line.split("=", 1)
        for line in PROGRAM.with_name(".env.example").read_text().splitlines()
        if "=" in line[:20]
    )
    assert Settings.from_env(example) == Settings()
    names = {f.name.upper() for f in ztoapi.fields(Settings) if "read" in f.metadata}
    assert set(example) == names
    assert (
        set(
            re.findall(
                r"^\| ([A-Z_]+) \|", PROGRAM.with_name("README.md").read_text(), re.MULTILINE
            )
        )
        == names
    )


def test_an_empty_variable_counts_as_not_set():
    assert Settings.from_env({"PORT": "", "ZAI_API_KEY": " "}) == Settings()


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("PORT", "abc", "PORT=abc cannot be used: it must be a port number, 0 to 65535"),
        ("PORT", "70000", "PORT=70000 cannot be used: it must be a port number, 0 to 65535"),
        (
            "REASONING_FORMAT",
            "both",
            "REASONING_FORMAT=both cannot be used: it must be parsed, raw or hidden",
        ),
        (
            "ENABLE_THINKING",
            "auto",
            "ENABLE_THINKING=auto cannot be used: it must be true or false",
        ),
        ("DEBUG_MODE", "maybe", "DEBUG_MODE=maybe cannot be used: it must be true or false"),
        (
            "ZAI_BASE_URL",
            "api.z.ai",
            "ZAI_BASE_URL=api.z.ai cannot be used: it must be an http or https address such as",
        ),
        ("ZAI_BASE_URL", "https://a..b/v4", "ZAI_BASE_URL=https://a..b/v4 cannot be used"),
        ("ZAI_BASE_URL", "https://u:p@api.z.ai", "it must be an http or https address such as"),
        ("ZAI_BASE_URL", "https://:p@api.z.ai", "it must be an http or https address such as"),
        (
            "MAX_RETRIES",
            "-1",
            "MAX_RETRIES=-1 cannot be used: it must be a number of times, 0 to 10",
        ),
        (
            "MODEL_ALIASES",
            "gpt-4o",
            "MODEL_ALIASES=gpt-4o cannot be used: it must be name=model pairs",
        ),
        ("UPSTREAM_TIMEOUT", "0", "UPSTREAM_TIMEOUT=0 cannot be used"),
        ("DEFAULT_KEY", "", "DEFAULT_KEY cannot be used: it must be keys"),
        ("DEFAULT_KEY", " , ", "DEFAULT_KEY cannot be used"),
        ("ZAI_API_KEY", "schlüssel", "ZAI_API_KEY cannot be used"),
        (
            "ZAI_API_KEY",
            "key,@plan",
            "BASE is api, plan, china, china-plan or an http or https address",
        ),
        (
            "HOST",
            "0.0.0.0",
            "HOST=0.0.0.0 would let others in while DEFAULT_KEY is the published sk-your-key",
        ),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_what_is_wanted(name, value, wanted):
    with pytest.raises(SettingsError, match=re.escape(wanted)):
        Settings.from_env({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ZAI_API_KEY", "topsecret\x00"),
        ("ZAI_API_KEY", "topsecret@"),
        ("ZAI_API_KEY", "topsecret@plane"),
        ("ZAI_API_KEY", "key@plan,topsecret@ftp://api.z.ai"),
        ("ZAI_BASE_URL", "https://me:topsecret@api.z.ai"),
    ],
)
def test_a_secret_that_cannot_be_used_is_not_repeated(name, value):
    with pytest.raises(SettingsError) as raised:
        Settings.from_env({name: value})
    assert "topsecret" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "base"),
    [
        ("k", "https://z.example/v4"),
        ("k@api", "https://api.z.ai/api/paas/v4"),
        ("k@plan", "https://api.z.ai/api/coding/paas/v4"),
        ("k@china", "https://open.bigmodel.cn/api/paas/v4"),
        ("k@china-plan", "https://open.bigmodel.cn/api/coding/paas/v4"),
        ("k@http://[::1]:80/api/paas/v4/chat/completions", "http://[::1]:80/api/paas/v4"),
    ],
)
def test_a_key_may_name_the_base_where_it_belongs(key, base):
    env = {"ZAI_API_KEY": key, "ZAI_BASE_URL": "https://z.example/v4"}
    assert Settings.from_env(env).zai_keys == (ztoapi.ZaiKey("k", base),)


def test_a_key_is_a_secret_wherever_it_belongs():
    settings = Settings.from_env({"ZAI_API_KEY": "one@plan,one@api,two"})
    assert settings.secrets == ("one", "one", "two")
    assert "one" not in repr(settings.zai_keys)


@pytest.mark.parametrize(
    "url", ["postgresql://me:pa:s/s@host/db", "postgresql://host/db?password=pa:s/s&x=1"]
)
def test_the_whole_password_of_a_database_is_a_secret(url):
    assert "pa:s/s" in Settings(database_url=url).secrets


def test_a_password_of_a_database_is_a_secret_as_it_is_written_and_decoded():
    assert Settings(database_url="postgresql://me:p%40ss@host/db").secrets == ("p%40ss", "p@ss")


@pytest.mark.parametrize("keys", [(), ("",), ("sk-a", "")])
def test_the_door_is_never_open(keys):
    with pytest.raises(SettingsError, match="DEFAULT_KEY"):
        Settings(default_key=keys)


def test_brackets_around_an_address_go():
    assert Settings.from_env({"HOST": "[::1]"}).host == "::1"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_the_published_key_goes_with_loopback_alone(host):
    assert Settings.from_env({"HOST": host}).published


def test_a_list_that_contains_the_published_key_is_guarded_too():
    with pytest.raises(SettingsError):
        Settings.from_env({"HOST": "0.0.0.0", "DEFAULT_KEY": "sk-mine,sk-your-key"})


def test_blanking_finds_a_secret_however_it_is_written():
    blank = Redactor(["k3y!", 'qu"te', "a/b"])
    assert blank('k3y! "qu\\"te" qu"te x=a%2Fb') == '*** "***" *** x=***'


@pytest.mark.parametrize("key", ['a"b', "a'b", "a\\b", 'a\\"\\\\b', "a/b", '"ab', "ab'"])
def test_a_key_is_redacted_however_often_it_was_encoded(key):
    text = key
    for encode in (str, json.dumps, json.dumps, repr, json.dumps, repr):
        text = encode(text)
        assert re.fullmatch(r"""[\\"']*\*\*\*[\\"']*""", Redactor([key])(text)), text


@pytest.mark.parametrize(
    ("url", "passwords"),
    [
        ("http://user:p%40ss@proxy:3128", ["p%40ss", "p@ss"]),
        ("user:pass@proxy:3128", ["pass", "pass"]),
        ("http://token@proxy/", ["token", "token"]),
        ("http://proxy:3128", []),
        ("http://[bad", []),
    ],
)
def test_a_proxys_password_is_a_secret(url, passwords):
    assert ztoapi.proxy_passwords([url]) == passwords


def test_blanking_nothing_leaves_all():
    assert Redactor([])("as it is") == "as it is"


# ======== Errors ========


def refusal(code, status=429, text="Words"):
    return zai_error(status, json.dumps({"error": {"code": str(code), "message": text}}).encode())


def test_an_error_has_openais_shape():
    assert error_body(BadRequest("No.", "model")) == {
        "error": {"message": "No.", "type": "invalid_request_error", "param": "model", "code": None}
    }


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (BadRequest("no"), {"x-should-retry": "false"}),
        (zai_error(429, b'{"error":{"code":"1302","message":"slow down"}}'), {"Retry-After": "1"}),
        (zai_error(429, b'{"error":{"code":"1305","message":"overloaded"}}'), {"Retry-After": "5"}),
        (refusal(1113).for_others(299.1), {"x-should-retry": "false", "Retry-After": "300"}),
        (
            zai_error(400, b'{"error":{"code":"1214","message":"at 2026-09-12 00:35:41"}}'),
            {"x-should-retry": "false"},
        ),
        (zai_error(500, b""), {}),
    ],
)
def test_the_headers_tell_sdks_whether_and_when_to_ask_again(error, headers):
    assert error_headers(error) == headers


# ======== Models ========


@pytest.mark.parametrize(
    "name", ["glm-4.6", "GLM-4.6", "zai/glm-4.6", "openai/z-ai/GLM-4.6", "glm-4.6[1m]", " glm-4.6 "]
)
def test_one_model_has_many_names(name):
    assert resolve(name) == MODELS["glm-4.6"]


def test_a_name_that_is_not_in_the_table_is_passed_on():
    assert resolve("zai/GLM-9").id == "glm-9"


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("none", ["glm-4-32b-0414-128k"]),
        (
            "switch",
            [
                *(
                    "glm-4.5",
                    "glm-4.5-air",
                    "glm-4.5-flash",
                    "glm-4.5v",
                    "glm-4.6",
                    "glm-4.6v",
                    "glm-4.6v-flash",
                ),
                *("glm-4.7", "glm-4.7-flash", "glm-5", "glm-5-turbo", "glm-5.1", "glm-5v-turbo"),
            ],
        ),
        ("effort", ["glm-5.2"]),
        ("always", ["glm-5.3", "glm-5.3-flash", "glm-5.3-flashx", "glm-99"]),
    ],
)
def test_every_model_has_its_kind_of_thinking(kind, names):
    assert {resolve(name).thinking for name in names} == {kind}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("gpt-4o", "glm-4.6"),
        ("GPT-4o", "glm-4.6"),
        ("openai/gpt-4o", "glm-4.6"),
        ("claude-opus-5", "glm-5.3"),
        ("glm-4.5", "glm-4.5"),
    ],
)
def test_the_first_alias_that_fits_wins(name, wanted):
    assert (
        resolve(name, (("gpt-4o", "zai/glm-4.6"), ("claude-*", "GLM-5.3"), ("gpt-*", "glm-5"))).id
        == wanted
    )


THINKING_NAMES = (("fast", "glm-4.6:off"), ("deep", "zai/GLM-5.3:max"), ("k", "kimi-k2-thinking"))


@pytest.mark.parametrize(
    ("name", "model", "effort"),
    [
        ("glm-4.6:off", "glm-4.6", "off"),
        ("GLM-4.6:Off", "glm-4.6", "off"),
        ("zai/glm-5.3:low", "glm-5.3", "low"),
        ("glm-5.3:medium", "glm-5.3", "medium"),
        ("glm-5.3:high", "glm-5.3", "high"),
        ("glm-5.3:xhigh", "glm-5.3", "xhigh"),
        ("glm-5.3:max", "glm-5.3", "max"),
        ("glm-4.6:on", "glm-4.6", "on"),
        ("glm-4.6-nothinking", "glm-4.6", "off"),
        ("glm-4.6-thinking", "glm-4.6", "on"),
        ("glm-4.6[1m]:off", "glm-4.6", "off"),
        ("glm-4.6:off[1m]", "glm-4.6", "off"),
        ("glm-4.6:free:off", "glm-4.6", "off"),
        ("glm-9-nothinking", "glm-9", "off"),
        ("fast", "glm-4.6", "off"),
        ("fast:high", "glm-4.6", "high"),
        ("fast:latest", "glm-4.6", "off"),
        ("deep", "glm-5.3", "max"),
    ],
)
def test_a_thinking_word_may_stand_behind_a_models_name(name, model, effort):
    assert ztoapi.named(name, THINKING_NAMES) == (resolve(model), effort)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("glm-4.6:free", "glm-4.6"),
        ("glm-4.6:latest", "glm-4.6"),
        ("glm-4.6:", "glm-4.6"),
        ("glm-4.6:auto", "glm-4.6"),
        ("glm-9:2026", "glm-9"),
        ("glm-9-thinking", "glm-9-thinking"),
        ("glm-4.6-off", "glm-4.6-off"),
        ("glm-4.1v-thinking-flash", "glm-4.1v-thinking-flash"),
        ("k", "kimi-k2-thinking"),
    ],
)
def test_what_is_no_thinking_word_says_nothing(name, model):
    assert ztoapi.named(name, THINKING_NAMES) == (resolve(model), None)


PLAN_URL = "https://api.z.ai/api/coding/paas/v4"


@pytest.mark.parametrize(
    ("name", "with_plan", "without"),
    [
        ("claude-opus-5", "glm-5.3", "glm-4.7-flash"),
        ("anthropic/Claude-Sonnet-4-5", "glm-5.3", "glm-4.7-flash"),
        ("claude-haiku-4-5", "glm-5.3-flash", "glm-4.7-flash"),
        ("claude-3-5-haiku-latest", "glm-5.3-flash", "glm-4.7-flash"),
        ("claude-sonnet-5[1m]", "glm-5.3", "glm-4.7-flash"),
        ("claude-mine", "glm-5", "glm-5"),
        ("claude", "claude", "claude"),
        ("my-claude-opus", "my-claude-opus", "my-claude-opus"),
        ("haiku", "haiku", "haiku"),
        ("glm-4.6", "glm-4.6", "glm-4.6"),
    ],
)
def test_a_claude_that_no_alias_names_is_the_model_that_launch_would_choose(
    name, with_plan, without
):
    mine = (("claude-mine", "glm-5"),)
    paid = ztoapi.all_aliases(Settings(zai_base_url=PLAN_URL, model_aliases=mine))
    free = ztoapi.all_aliases(Settings(model_aliases=mine))
    assert (resolve(name, paid).id, resolve(name, free).id) == (with_plan, without)


def test_the_first_keys_base_tells_whether_there_is_a_plan():
    first = Settings(zai_api_key=(f"a@{PLAN_URL}", "b"))
    second = Settings(zai_api_key=("a", f"b@{PLAN_URL}"))
    assert ztoapi.default_model(first) == "glm-5.3"
    assert ztoapi.default_model(second) == "glm-4.7-flash"


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("glm-5.3-flashx", ("0.00000037", "0.00000125", "0.000000075")),
        ("glm-5.3", ("0.0000014", "0.0000044", "0.00000026")),
        ("glm-4.7-flash", ("0", "0", "0")),
        ("glm-5", ("0.000001", "0.0000032", "0.0000002")),
        ("glm-4.6v-flashx", None),
        ("glm-99", None),
    ],
)
def test_prices_are_told_for_a_token_in_plain_decimals(model, wanted):
    item = ztoapi.model_item(resolve(model), model)
    if wanted:
        names = ("prompt", "completion", "input_cache_read")
        wanted = dict(zip(names, wanted, strict=True))
    assert item.get("pricing") == wanted


@pytest.mark.parametrize(
    ("model", "sees", "thinks"),
    [
        ("glm-4.6v", True, True),
        ("glm-5.3-flash", True, True),
        ("glm-5.3", False, True),
        ("glm-4-32b-0414-128k", False, False),
    ],
)
def test_the_list_tells_what_a_model_takes(model, sees, thinks):
    item = ztoapi.model_item(resolve(model), model)
    assert ("image" in item["architecture"]["input_modalities"]) is sees
    assert ("reasoning" in item["supported_parameters"]) is thinks


@pytest.mark.parametrize("name", ["zai/", " ", "[1m]", "zai/ [1m]", ":off", "zai/:free"])
def test_a_name_of_nothing_is_refused(name):
    with pytest.raises(BadRequest):
        resolve(name)


@pytest.mark.parametrize(
    ("model", "levels", "default"),
    [
        ("glm-5.3", ["low", "high", "xhigh"], "high"),
        ("glm-5.2", ["low", "medium", "high", "xhigh"], "high"),
        ("glm-4.6", ["none", "high"], "high"),
        ("glm-4-32b-0414-128k", [], None),
    ],
)
def test_codex_is_offered_the_efforts_that_a_model_has(model, levels, default):
    item = ztoapi.codex_item(ztoapi.MODELS[model], model)
    assert [level["effort"] for level in item["supported_reasoning_levels"]] == levels
    assert item["default_reasoning_level"] == default


# ======== Server-sent events ========


def cuts(data: bytes):
    """The bytes whole, in two parts at every place, and byte by byte."""
    yield [data]
    for i in range(1, len(data)):
        yield [data[:i], data[i:]]
    yield bytes_of(data)


def bytes_of(data: bytes):
    """Each byte alone."""
    return [data[i : i + 1] for i in range(len(data))]


def decode_all(parts):
    decoder = SSEDecoder()
    return [event for part in parts for event in decoder.feed(part)] + decoder.close()


@pytest.mark.parametrize(
    ("stream", "wanted"),
    [
        pytest.param("data: 你好\n\n", ["你好"], id="one event"),
        pytest.param("data: a\n\ndata: b\n\n", ["a", "b"], id="two events"),
        pytest.param("data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"], id="CR LF"),
        pytest.param("data:a\n\n", ["a"], id="no space"),
        pytest.param("data:  a\n\n", [" a"], id="two spaces"),
        pytest.param("data: a\ndata: b\n\n", ["a\nb"], id="several data lines"),
        pytest.param(": keep-alive\n\ndata: a\n\n: x\n\n", ["a"], id="comments"),
        pytest.param("event: x\nid: 1\nretry: 5\ndata: a\n\n", ["a"], id="other fields"),
        pytest.param("\n\n\ndata: a\n\n\n\n", ["a"], id="blank lines"),
        pytest.param("\ufeffdata: a\n\n", ["a"], id="a byte order mark"),
        pytest.param("data:\n\ndata: \n\ndata: a\n\n", ["a"], id="events of nothing"),
        pytest.param("data: a\n\ndata: b", ["a", "b"], id="no end"),
        pytest.param("data: a\n\ndata: b\n", ["a", "b"], id="half an end"),
        pytest.param("", [], id="nothing"),
    ],
)
def test_events_are_found_wherever_the_bytes_are_cut(stream, wanted):
    for parts in cuts(stream.encode()):
        assert decode_all(parts) == [event.encode() for event in wanted]


def test_a_line_of_many_megabytes_takes_linear_time():
    def read():
        decoder, part = SSEDecoder(), b"x" * 4096
        decoder.feed(b"data: ")
        for _ in range(4096):
            decoder.feed(part)
        assert [len(event) for event in decoder.feed(b"\n\n")] == [16 * 2**20]

    assert seconds_of(read) < 1


def test_line_separators_leave_as_escapes():
    assert json_bytes({"a": "\u0085\u2028\u2029é你"}) == '{"a":"\\u0085\\u2028\\u2029é你"}'.encode()


def test_half_a_surrogate_pair_leaves_as_the_escape_it_came_as():
    assert json.loads(json_bytes(["\ud83d", "\ude00"])) == ["\ud83d", "\ude00"]
    assert json.loads(json_bytes("\ud83d" + "\ude00")) == "😀"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cut \ud83d", "cut \ufffd"),
        ("\ude00 cut", "\ufffd cut"),
        ("a\ud83db\ude00c", "a\ufffdb\ufffdc"),
        ("\ud83d\ud83d\ude00", "\ufffd😀"),
        ("whole 😀 好", "whole 😀 好"),
    ],
    ids=["the end", "the beginning", "two halves apart", "a half before a pair", "whole"],
)
def test_half_a_surrogate_pair_is_not_sent_to_zai(text, wanted):
    assert json.loads(ztoapi.encode_request([text]).decode()) == [wanted]


def test_frames_are_data_and_a_blank_line():
    assert sse([{"a": "é"}, "[DONE]"]) == 'data: {"a":"é"}\n\ndata: [DONE]\n\n'.encode()


# ======== The size of a prompt ========


@pytest.mark.parametrize(
    ("message", "tokens"),
    [
        pytest.param(("user", ""), 0, id="nothing"),
        pytest.param(("user", "a" * 100), 28, id="Latin"),
        pytest.param(("user", "é" * 100), 28, id="accents"),
        pytest.param(("user", "🙂" * 100), 28, id="emoji"),
        pytest.param(("user", "漢" * 100), 75, id="Chinese"),
        pytest.param(("user", "かカ、。" * 25), 75, id="Japanese"),
        pytest.param(("user", "한" * 100), 75, id="Korean"),
        pytest.param(("user", "\uff0c\uff01" * 50), 75, id="full width"),
        pytest.param(("user", "𠀀" * 100), 75, id="rare ideographs"),
        pytest.param(("user", "漢a" * 100), 103, id="mixed"),
        pytest.param(("system", "a" * 100), 28, id="of every role"),
        pytest.param(("user", "a" * 50, "b" * 49), 28, id="in parts"),
        pytest.param(("user", "a" * 100, Media("image_url", "x" * 90_000)), 1028, id="an image"),
    ],
)
def test_tokens_are_estimated_by_characters(message, tokens):
    role, *content = message
    assert ztoapi.estimated_tokens(Prompt("m", (Message(role, tuple(content)),))) == tokens


def test_an_estimate_counts_all_that_the_model_reads():
    call = ToolCall(0, "call_1", "n" * 10, "a" * 90)
    turn = Message("assistant", (), thought="t" * 100, calls=(call,))
    result = Message("tool", ("r" * 100,), call_id="call_1")
    tool = ztoapi.Tool("n" * 10, "d" * 88, {})  # and "{}"
    prompt = Prompt("m", (turn, result), tools=(tool,))
    assert ztoapi.estimated_tokens(prompt) == 4 * 28


def test_an_estimate_takes_halves_of_characters():
    assert ztoapi.estimated_tokens(Prompt("m", (Message("user", ("\ud83d" * 100,)),))) == 28


# ======== OpenAI chat completions: the request ========


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        pytest.param({}, {}, id="nothing more"),
        pytest.param({"stream": True}, {"stream": True}, id="stream"),
        pytest.param({"stream": None, "temperature": None}, {}, id="null is absent"),
        pytest.param(
            {"temperature": 1.5, "top_p": 0.5}, {"temperature": 1.5, "top_p": 0.5}, id="sampling"
        ),
        pytest.param({"max_tokens": 5}, {"max_tokens": 5}, id="max_tokens"),
        pytest.param({"max_tokens": 0, "max_completion_tokens": 0}, {}, id="no limit"),
        pytest.param({"max_tokens": -1}, {}, id="no limit in llama.cpp"),
        pytest.param(
            {"max_tokens": 7, "max_completion_tokens": 0},
            {"max_tokens": 7},
            id="the name that sets a limit counts",
        ),
        pytest.param(
            {"max_tokens": -1, "max_completion_tokens": 7},
            {"max_tokens": 7},
            id="so does the other",
        ),
        pytest.param({"max_tokens": 4096.0}, {"max_tokens": 4096}, id="4096.0"),
        pytest.param({"n": 3.0, "seed": -7.0}, {"n": 3, "seed": -7}, id="3.0 and -7.0"),
        pytest.param({"max_completion_tokens": 1e3}, {"max_tokens": 1000}, id="1e3"),
        pytest.param(
            {"max_tokens": 5, "max_completion_tokens": 7},
            {"max_tokens": 7},
            id="max_completion_tokens",
        ),
        pytest.param({"stop": "x"}, {"stop": ("x",)}, id="stop"),
        pytest.param({"stop": ["x", "", "y"]}, {"stop": ("x", "y")}, id="stops"),
        pytest.param(
            {"stop": [*"abcdefghijklmnop"]}, {"stop": (*"abcdefghijklmnop",)}, id="sixteen stops"
        ),
        pytest.param({"n": 3}, {"n": 3}, id="n"),
        pytest.param({"seed": -7}, {"seed": -7}, id="seed"),
        pytest.param({"user": "bob"}, {"user": "bob"}, id="user"),
        pytest.param(
            {"user": "a", "safety_identifier": "b"}, {"user": "b"}, id="safety_identifier"
        ),
        pytest.param(
            {"user": "a", "safety_identifier": "b", "user_id": "c"}, {"user": "c"}, id="user_id"
        ),
        pytest.param(
            {"tool_choice": "none"}, {"tool_choice": ToolChoice("none")}, id="tool_choice"
        ),
        pytest.param({"parallel_tool_calls": False}, {}, id="parallel_tool_calls without tools"),
        pytest.param({"response_format": {"type": "text"}}, {}, id="response_format text"),
        pytest.param(
            {"response_format": {"type": "json_object"}}, {"schema": {}}, id="json_object"
        ),
        pytest.param(
            {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
            {"schema": {"type": "object"}},
            id="json_object with a schema",
        ),
        pytest.param(
            {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
            {"schema": {}},
            id="json_schema with PHP's empty object",
        ),
        pytest.param(
            {"response_format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
            {"schema": {"type": "object"}},
            id="json_schema as in Responses",
        ),
        pytest.param(
            {"reasoning_format": "raw"}, {"reasoning_format": "raw"}, id="reasoning_format"
        ),
        pytest.param(
            {"include_reasoning": False}, {"reasoning_format": "hidden"}, id="include_reasoning"
        ),
        pytest.param({"include_reasoning": True}, {}, id="include_reasoning true"),
        pytest.param(
            {"reasoning": {"exclude": True}}, {"reasoning_format": "hidden"}, id="reasoning.exclude"
        ),
        pytest.param({"reasoning": {"exclude": False}}, {}, id="reasoning.exclude false"),
        pytest.param(
            {"include_reasoning": False, "reasoning_format": "raw"},
            {"reasoning_format": "raw"},
            id="our own word counts",
        ),
        pytest.param({"do_sample": False}, {"native": {"do_sample": False}}, id="do_sample"),
        pytest.param({"request_id": "r"}, {"native": {"request_id": "r"}}, id="request_id"),
        pytest.param({"tool_stream": False}, {"native": {"tool_stream": False}}, id="tool_stream"),
        pytest.param(
            {"sensitive_word_check": {}},
            {"native": {"sensitive_word_check": {}}},
            id="sensitive_word_check",
        ),
        pytest.param(
            {"thinking": {"clear_thinking": False}},
            {"clear_thinking": False},
            id="thinking.clear_thinking",
        ),
    ],
)
def test_a_request_is_read(fields, wanted):
    prompt = Prompt(model="glm-4.6", messages=(Message("user", ("你好",)),))
    assert read_chat(chat(**fields)) == ztoapi.replace(prompt, **wanted)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("presence_penalty", 1),
            ("frequency_penalty", -0.5),
            ("logit_bias", {"1": 2}),
            ("logprobs", True),
        ),
        *(("top_logprobs", 3), ("metadata", {"a": "b"}), ("store", True), ("service_tier", "flex")),
        *(
            ("prediction", {"type": "content"}),
            ("modalities", ["text", "audio"]),
            ("prompt_cache_key", "k"),
        ),
        *(("verbosity", "low"), ("top_k", 40)),
    ],
)
def test_what_zai_cannot_do_is_listed_as_ignored(name, value):
    assert read_chat(chat(**{name: value})).ignored == (name,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("presence_penalty", 0),
            ("frequency_penalty", 0.0),
            ("logit_bias", {}),
            ("logprobs", False),
        ),
        *(("top_logprobs", None), ("metadata", {}), ("store", False), ("service_tier", "auto")),
        *(
            ("service_tier", "default"),
            ("modalities", ["text"]),
            ("functions", []),
            ("prompt_cache_key", ""),
        ),
    ],
)
def test_what_asks_for_nothing_is_not_listed(name, value):
    assert read_chat(chat(**{name: value})).ignored == ()


def function(name, **more):
    return {"type": "function", "function": {"name": name, **more}}


OBJECT = {"type": "object", "properties": {"a": {"type": "string"}}}
NO_PARAMETERS = {"type": "object", "properties": {}}
ANY_TEXT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": "start: x"}


@pytest.mark.parametrize(
    ("tool", "wanted"),
    [
        pytest.param(function("f"), Tool("f", "f", NO_PARAMETERS), id="chat's"),
        pytest.param(
            function("f", description="d", parameters=OBJECT, strict=True),
            Tool("f", "d", OBJECT),
            id="chat's, with all",
        ),
        pytest.param(
            function("f", parameters=[]), Tool("f", "f", NO_PARAMETERS), id="PHP's empty object"
        ),
        pytest.param(
            {"type": "function", "name": "f", "parameters": OBJECT, "strict": True},
            Tool("f", "f", OBJECT),
            id="Responses'",
        ),
        pytest.param(
            {"type": "custom", "name": "f", "description": "d", "format": {"type": "text"}},
            Tool("f", "d", ANY_TEXT),
            id="Responses', custom",
        ),
        pytest.param(
            {"type": "custom", "name": "f", "format": GRAMMAR},
            Tool("f", "f\nThe input's grammar: start: x", ANY_TEXT),
            id="Responses', with a grammar",
        ),
        pytest.param(
            {"type": "custom", "custom": {"name": "f", "description": "d"}},
            Tool("f", "d", ANY_TEXT),
            id="chat's, custom",
        ),
        pytest.param(
            {
                "type": "custom",
                "custom": {"name": "f", "format": {"type": "grammar", "grammar": GRAMMAR}},
            },
            Tool("f", "f\nThe input's grammar: start: x", ANY_TEXT),
            id="chat's, with a grammar",
        ),
        pytest.param(
            {"name": "f", "description": "d", "input_schema": OBJECT},
            Tool("f", "d", OBJECT),
            id="Anthropic's",
        ),
        pytest.param(
            {"type": "custom", "name": "f", "input_schema": OBJECT},
            Tool("f", "f", OBJECT),
            id="Anthropic's, with its type",
        ),
        pytest.param(
            {"name": "f", "input_schema": []},
            Tool("f", "f", NO_PARAMETERS),
            id="Anthropic's in PHP",
        ),
        pytest.param(
            {"name": "f", "input_schema": OBJECT, "defer_loading": True},
            Tool("f", "f", OBJECT, deferred=True),
            id="deferred",
        ),
        pytest.param(
            {**function("f"), "defer_loading": True},
            Tool("f", "f", NO_PARAMETERS, deferred=True),
            id="chat's, deferred",
        ),
    ],
)
def test_a_tool_is_read_in_the_shape_of_any_api(tool, wanted):
    prompt = read_chat(chat(tools=[tool]))
    assert (prompt.tools, prompt.native_tools, prompt.ignored) == ((wanted,), (), ())


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "web_search", "web_search": {"enable": True}},
        {"type": "retrieval", "retrieval": {"knowledge_id": "k"}},
        {"type": "mcp", "mcp": {"server_label": "s"}},
    ],
)
def test_a_tool_of_zais_own_stays_as_it_is(tool):
    prompt = read_chat(chat(tools=[tool]))
    assert (prompt.tools, prompt.native_tools, prompt.ignored) == ((), (tool,), ())


@pytest.mark.parametrize(
    ("tools", "ignored"),
    [
        pytest.param([{"googleSearch": {}}], ("tools.googleSearch",), id="Gemini's search"),
        pytest.param(
            [{"functionDeclarations": [{"name": "f"}]}],
            ("tools.functionDeclarations",),
            id="Gemini's functions",
        ),
        pytest.param(
            [{"type": "web_search_preview"}], ("tools.web_search_preview",), id="OpenAI's"
        ),
        pytest.param(
            [{"type": "bash_20250124", "name": "bash"}], ("tools.bash_20250124",), id="Anthropic's"
        ),
        pytest.param([{"name": "f"}], ("tools.name",), id="no more than a name"),
        pytest.param([{"type": 5}], ("tools.type",), id="a number for a type"),
        pytest.param([{}], ("tools.unknown",), id="nothing"),
        pytest.param(
            [{"type": "computer"}, {"type": "computer"}, {"type": "shell"}],
            ("tools.computer", "tools.shell"),
            id="several",
        ),
    ],
)
def test_any_other_tool_is_left_out_and_listed(tools, ignored):
    prompt = read_chat(chat(tools=[*tools, function("f")], tool_choice="required"))
    assert ([tool.name for tool in prompt.tools], prompt.ignored) == (["f"], ignored)


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        pytest.param("auto", ToolChoice(), id="auto"),
        pytest.param("required", ToolChoice("required"), id="required"),
        pytest.param("any", ToolChoice("required"), id="Mistral's any"),
        pytest.param({"type": "auto"}, ToolChoice(), id="Anthropic's auto"),
        pytest.param({"type": "any"}, ToolChoice("required"), id="Anthropic's any"),
        pytest.param({"type": "none"}, ToolChoice("none"), id="Anthropic's none"),
        pytest.param(
            {"type": "tool", "name": "f"}, ToolChoice("required", ("f",)), id="Anthropic's tool"
        ),
        pytest.param(function("f"), ToolChoice("required", ("f",)), id="chat's function"),
        pytest.param(
            {"type": "custom", "custom": {"name": "f"}},
            ToolChoice("required", ("f",)),
            id="chat's custom tool",
        ),
        pytest.param(
            {"type": "function", "name": "f"}, ToolChoice("required", ("f",)), id="Responses'"
        ),
        pytest.param(
            {"type": "custom", "name": "f"}, ToolChoice("required", ("f",)), id="Responses' custom"
        ),
        pytest.param(
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [function("f"), function("g")]},
            },
            ToolChoice("auto", ("f", "g")),
            id="chat's allowed tools",
        ),
        pytest.param(
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "f"}, {"type": "custom", "name": "g"}],
            },
            ToolChoice("required", ("f", "g")),
            id="Responses' allowed tools",
        ),
    ],
)
def test_a_choice_of_tools_is_read_in_the_shape_of_any_api(choice, wanted):
    assert read_chat(chat(tools=[function("f")], tool_choice=choice)).tool_choice == wanted


@pytest.mark.parametrize(
    "choice",
    [
        "f",
        [],
        {"name": "f"},
        {"type": "tool"},
        {"type": "function", "function": {"name": ""}},
        {"type": "web_search"},
        {"type": "allowed_tools", "tools": []},
        {"type": "allowed_tools", "mode": "none", "tools": []},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}},
    ],
)
def test_a_choice_of_nothing_is_refused(choice):
    with pytest.raises(BadRequest) as raised:
        read_chat(chat(tools=[function("f")], tool_choice=choice))
    assert raised.value.param == "tool_choice"


def test_parallel_tool_calls_false_is_listed():
    assert read_chat(chat(tools=[function("f")], parallel_tool_calls=False)).ignored == (
        "parallel_tool_calls",
    )
    assert read_chat(chat(tools=[function("f")], parallel_tool_calls=True)).ignored == ()


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        pytest.param({}, None, id="nothing said"),
        *(pytest.param({"reasoning_effort": word}, "off", id=word) for word in ("none", "minimal")),
        *(
            pytest.param({"reasoning_effort": word}, word, id=word)
            for word in ("low", "medium", "high", "xhigh", "max")
        ),
        pytest.param({"reasoning": {"effort": "high"}}, "high", id="reasoning.effort"),
        pytest.param({"reasoning": {"effort": "none"}}, "off", id="reasoning.effort none"),
        pytest.param({"reasoning": {"enabled": True}}, "on", id="reasoning.enabled"),
        pytest.param({"reasoning": {"enabled": False}}, "off", id="reasoning.enabled false"),
        pytest.param(
            {"reasoning": {"enabled": False, "effort": "high"}},
            "off",
            id="reasoning off with an effort",
        ),
        pytest.param({"reasoning": {}}, None, id="reasoning says nothing"),
        pytest.param({"thinking": {"type": "enabled"}}, "on", id="thinking"),
        pytest.param({"thinking": {"type": "disabled"}}, "off", id="thinking disabled"),
        pytest.param({"enable_thinking": True}, "on", id="enable_thinking"),
        pytest.param({"enable_thinking": False}, "off", id="enable_thinking false"),
        pytest.param(
            {"chat_template_kwargs": {"enable_thinking": False}}, "off", id="chat_template_kwargs"
        ),
        pytest.param(
            {"chat_template_kwargs": {"x": 1}}, None, id="chat_template_kwargs say nothing"
        ),
        pytest.param(
            {"chat_template_kwargs": {"thinking": False}}, "off", id="chat_template_kwargs.thinking"
        ),
        pytest.param(
            {"chat_template_kwargs": {"thinking": True}},
            "on",
            id="chat_template_kwargs.thinking on",
        ),
        pytest.param({"think": False}, "off", id="think false"),
        pytest.param({"think": True}, "on", id="think"),
        pytest.param({"think": "low"}, "low", id="think low"),
        pytest.param({"think": "none"}, "off", id="think none"),
        pytest.param({"thinking_budget": 0}, "off", id="no budget"),
        pytest.param({"thinking_budget": 0.0}, "off", id="no budget, as a fraction"),
        pytest.param({"thinking_budget": 4096}, "on", id="a budget"),
        pytest.param({"thinking_budget": -1}, None, id="any budget"),
        pytest.param({"reasoning_effort": "ultra"}, "max", id="ultra"),
        pytest.param({"reasoning": {"effort": "ultra"}}, "max", id="reasoning.effort ultra"),
        *(
            pytest.param({"reasoning_effort": word}, None, id=f"{word or 'empty'} says nothing")
            for word in ("auto", "adaptive", "default", "")
        ),
        pytest.param({"reasoning": {"effort": "auto"}}, None, id="reasoning.effort auto"),
        pytest.param(
            {"reasoning": {"effort": "auto", "enabled": True}}, "on", id="on, of whatever effort"
        ),
        *(
            pytest.param({"thinking": {"type": word}}, None, id=f"thinking {word or 'empty'}")
            for word in ("auto", "adaptive", "default", "")
        ),
        *(pytest.param({name: []}, None, id=f"{name} []") for name in ("reasoning", "thinking")),
    ],
)
def test_thinking_is_asked_for_in_many_ways(fields, wanted):
    assert read_chat(chat(**fields)).effort == wanted


TWICE = {
    "reasoning_effort": "max",
    "reasoning": {"effort": "low"},
    "thinking": {"type": "disabled"},
    "enable_thinking": True,
    "chat_template_kwargs": {"enable_thinking": False},
    "think": "high",
    "thinking_budget": 0,
}


@pytest.mark.parametrize(
    ("left_out", "wanted"),
    [(0, "max"), (1, "low"), (2, "off"), (3, "on"), (4, "off"), (5, "high"), (6, "off")],
)
def test_where_thinking_is_said_twice_the_first_counts(left_out, wanted):
    fields = dict(list(TWICE.items())[left_out:])
    assert read_chat(chat(**fields)).effort == wanted


def test_what_says_nothing_about_thinking_does_not_count_as_the_first():
    said = {"reasoning_effort": "auto", "thinking": {"type": "adaptive"}, "think": False}
    assert read_chat(chat(**said)).effort == "off"


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        pytest.param({"role": "system", "content": "x"}, Message("system", ("x",)), id="system"),
        pytest.param(
            {"role": "developer", "content": "x"}, Message("system", ("x",)), id="developer"
        ),
        pytest.param(
            {"role": "user", "content": "x", "name": "bob"},
            Message("user", ("x",)),
            id="name is dropped",
        ),
        pytest.param(
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}],
            },
            Message("user", ("a",)),
            id="empty text parts go",
        ),
        pytest.param(
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}}
                ],
            },
            Message("user", (Media("image_url", "https://x/y.png"),)),
            id="image",
        ),
        pytest.param(
            {
                "role": "user",
                "content": [
                    {"type": f"{kind}_url", f"{kind}_url": {"url": "https://x"}}
                    for kind in ("video", "file")
                ],
            },
            Message("user", (Media("video_url", "https://x"), Media("file_url", "https://x"))),
            id="video and file",
        ),
        pytest.param(
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            Message("assistant", ("no",)),
            id="refusal",
        ),
        pytest.param(
            {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
            Message("assistant", (), calls=(ToolCall(0, "call_0", "f", "{}"),)),
            id="a call without id and arguments",
        ),
        pytest.param(
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            Message("assistant", (), calls=(ToolCall(0, "f", "f", "{}"),)),
            id="function_call",
        ),
        pytest.param(
            {"role": "tool", "tool_call_id": 7, "content": ""},
            Message("tool", ("",), call_id="7"),
            id="a number for a call's id",
        ),
        pytest.param(
            {"role": "assistant", "content": None}, Message("assistant", ()), id="null content"
        ),
        pytest.param({"role": "assistant"}, Message("assistant", ()), id="no content"),
        pytest.param(
            {"role": "assistant", "content": "x", "reasoning_content": "hm"},
            Message("assistant", ("x",), "hm"),
            id="thought",
        ),
        pytest.param(
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            Message("assistant", (), calls=(ToolCall(0, "c1", "f", '{"a":1}'),)),
            id="tool calls",
        ),
        pytest.param(
            {
                "role": "assistant",
                "tool_calls": [{"id": 7, "function": {"name": "f", "arguments": {"a": 1}}}],
            },
            Message("assistant", (), calls=(ToolCall(0, "7", "f", '{"a":1}'),)),
            id="a number for an id, an object for arguments",
        ),
        pytest.param(
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
            Message("tool", ("42",), call_id="c1"),
            id="tool",
        ),
        pytest.param(
            {"role": "function", "name": "f", "content": "42"},
            Message("tool", ("42",), call_id="f"),
            id="function",
        ),
    ],
)
def test_a_message_is_read(fields, wanted):
    assert read_chat(message(**fields)).messages == (wanted,)


FUNCTIONS = [{"name": "f", "parameters": {"type": "object"}}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "model"),
        (chat(model=""), "model"),
        (chat(model=4), "model"),
        (chat(model="x" * 257), "model"),
        (chat(model="\ud800"), "model"),
        (chat(model="a\nb"), "model"),
        (chat(messages=[]), "messages"),
        (chat(messages="hi"), "messages"),
        (chat(messages=["hi"]), "messages[0]"),
        (message(content="x"), "messages[0].role"),
        (message(role="robot", content="x"), "messages[0].role"),
        (message(role=["user"], content="x"), "messages[0].role"),
        (chat(messages=[*HELLO["messages"], {"role": "robot"}]), "messages[1].role"),
        (chat(messages=[*HELLO["messages"], None]), "messages[1]"),
        (chat(reasoning_effort=[]), "reasoning_effort"),
        (chat(reasoning={"enabled": "yes"}), "reasoning"),
        (chat(web_search_options={"search_context_size": 5}), "web_search_options"),
        (chat(stream="yes"), "stream"),
        (chat(stream_options=True), "stream_options"),
        (chat(temperature="hot"), "temperature"),
        (chat(temperature=True), "temperature"),
        (chat(temperature=2.1), "temperature"),
        (chat(top_p=-1), "top_p"),
        (chat(max_tokens=-2), "max_tokens"),
        (chat(max_tokens=1.5), "max_tokens"),
        (chat(max_tokens=-1.5), "max_tokens"),
        (chat(max_tokens=True), "max_tokens"),
        (chat(max_tokens=1e300), "max_tokens"),
        (chat(n=1.5), "n"),
        (chat(seed=2.0**63), "seed"),
        (chat(max_completion_tokens="9"), "max_completion_tokens"),
        (chat(stop=["a"] * 17), "stop"),
        (chat(stop=[1]), "stop"),
        (chat(tools={}), "tools"),
        (chat(tools=[{"type": "function"}]), "tools[0]"),
        (chat(tools=[{"type": "function", "function": {"name": ""}}]), "tools[0]"),
        (
            chat(tools=[{"type": "function", "function": {"name": "f", "description": 5}}]),
            "tools[0].function.description",
        ),
        (
            chat(tools=[{"type": "function", "function": {"name": "f", "parameters": "{}"}}]),
            "tools[0].function.parameters",
        ),
        (chat(stream_options={"include_usage": "yes"}), "stream_options.include_usage"),
        (chat(fallbacks="glm-5"), "fallbacks"),
        (chat(fallbacks=[""]), "fallbacks"),
        (chat(fallbacks=["x" * 257]), "fallbacks"),
        (chat(tools=[{"type": "custom", "custom": {"name": ""}}]), "tools[0]"),
        (chat(tools=["search"]), "tools[0]"),
        (chat(tools=[{"type": "function", "name": "f", "parameters": 5}]), "tools[0].parameters"),
        (chat(tools=[{"name": "f", "input_schema": 5}]), "tools[0].input_schema"),
        (chat(tools=[{"type": "custom", "name": "f", "description": 5}]), "tools[0].description"),
        (chat(functions=[FUNCTIONS[0]] * 129), "functions"),
        (chat(tool_choice="always"), "tool_choice"),
        (chat(tool_choice={"type": "function"}), "tool_choice"),
        (chat(parallel_tool_calls="no"), "parallel_tool_calls"),
        (chat(response_format="json"), "response_format"),
        (chat(response_format={"type": "yaml"}), "response_format"),
        (chat(response_format={"type": "json_schema"}), "response_format"),
        (chat(functions=[{"name": ""}]), "functions[0]"),
        (chat(functions=[FUNCTIONS[0], 5]), "functions[1]"),
        (chat(functions=[{"name": "f", "parameters": 5}]), "functions[0].parameters"),
        (chat(functions=FUNCTIONS, function_call={"name": "g"}), "function_call"),
        (chat(web_search_options=True), "web_search_options"),
        (chat(n=0), "n"),
        (chat(n=9), "n"),
        (chat(n=True), "n"),
        (chat(seed=1.5), "seed"),
        (chat(seed=2**63), "seed"),
        (chat(user=5), "user"),
        (chat(reasoning_effort="huge"), "reasoning_effort"),
        (chat(reasoning={"effort": "huge"}), "reasoning"),
        (chat(reasoning="high"), "reasoning"),
        (chat(thinking=True), "thinking"),
        (chat(thinking={"type": "sometimes"}), "thinking"),
        (chat(thinking={"clear_thinking": "no"}), "thinking.clear_thinking"),
        (chat(enable_thinking="yes"), "enable_thinking"),
        (chat(chat_template_kwargs={"enable_thinking": 1}), "chat_template_kwargs.enable_thinking"),
        (
            chat(chat_template_kwargs={"thinking": "no"}),
            "chat_template_kwargs.thinking",
        ),
        (chat(think=1), "think"),
        (chat(think="hard"), "think"),
        (chat(thinking_budget="9"), "thinking_budget"),
        (chat(thinking_budget=-2), "thinking_budget"),
        (chat(include_reasoning="no"), "include_reasoning"),
        (chat(reasoning={"exclude": 1}), "reasoning.exclude"),
        (chat(reasoning_effort="Auto"), "reasoning_effort"),
        (chat(response_format={"type": "json_object", "schema": "x"}, n=0), "n"),
        (chat(response_format={"type": "json_schema", "json_schema": 5}), "response_format"),
        (chat(reasoning_format="both"), "reasoning_format"),
        (chat(do_sample=1), "do_sample"),
    ],
)
def test_a_request_that_makes_no_sense_names_the_field(body, param):
    with pytest.raises(BadRequest) as raised:
        read_chat(body)
    assert raised.value.param == param


def test_the_clients_json_is_not_modified():
    body = chat(
        messages=[{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        tools=[{"type": "function", "function": {"name": "f"}}],
    )
    before = json.dumps(body)
    zai_body(read_chat(body), MODELS["glm-4.6"])
    assert json.dumps(body) == before


# ======== OpenAI chat completions: the answer ========

HEAD = Head("2026", 1760762344, "GLM-4.6", "ours", lambda: 1760762349.5)
ENVELOPE = {
    "id": "chatcmpl-2026",
    "object": "chat.completion.chunk",
    "created": 1760762344,
    "model": "GLM-4.6",
}
USAGE = {
    "prompt_tokens": 6,
    "completion_tokens": 3,
    "total_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 2},
    "completion_tokens_details": {"reasoning_tokens": 1},
}
EVENTS = [Thought("hm"), Text("你"), Text("好"), Usage(6, 3, 9, 2, 1), Finish("stop")]


def decoded(frames):
    return [decoded_frame(frame) for frame in frames]


def decoded_frame(frame):
    if frame == "[DONE]" or isinstance(frame, dict):
        return frame
    if isinstance(frame, ztoapi.NamedFrame):
        body = json.loads(frame.text)
        assert frame.name == body["type"]
        return body
    return json.loads(frame)


def begun(reply):
    reply.begin(HEAD)
    return reply


def chat_reply(n=1, *, include_usage=False):
    return ChatReply(n, include_usage=include_usage)


def frames(events, reply=None):
    reply = begun(reply or chat_reply())
    return decoded([*reply.frames_of(events), *reply.close()])


def chunk(delta, finish_reason=None):
    return {**ENVELOPE, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def test_a_stream_is_chunks_of_one_answer():
    assert frames(EVENTS) == [
        chunk({"role": "assistant", "reasoning_content": "hm"}),
        chunk({"content": "你"}),
        chunk({"content": "好"}),
        chunk({}, "stop"),
        "[DONE]",
    ]


def test_usage_is_a_chunk_of_its_own_for_those_who_ask():
    assert frames(
        [Text("好"), Usage(6, 3, 9, 2, 1), Finish("stop")], chat_reply(include_usage=True)
    ) == [
        {**chunk({"role": "assistant", "content": "好"}), "usage": None},
        {**chunk({}, "stop"), "usage": None},
        {**ENVELOPE, "choices": [], "usage": USAGE},
        "[DONE]",
    ]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, (("f",), ToolChoice())),
        ({"function_call": "none"}, (("f",), ToolChoice("none"))),
        ({"function_call": {"name": "f"}}, (("f",), ToolChoice("required", ("f",)))),
        ({"tools": [function("g")], "function_call": "none"}, (("g",), ToolChoice())),
    ],
)
def test_functions_are_tools(fields, wanted):
    prompt = read_chat(chat(functions=FUNCTIONS) | fields)
    assert (tuple(tool.name for tool in prompt.tools), prompt.tool_choice, prompt.ignored) == (
        *wanted,
        (),
    )


def test_a_call_of_a_function_is_answered_as_one_whole_and_streamed():
    _, request = ztoapi.parse_chat(chat(functions=FUNCTIONS))
    events = [
        Text("hi"),
        ToolCall(0, "c", "f", '{"a"'),
        ToolCall(0, "", "", ":1}"),
        ToolCall(1, "d", "f", "{}"),
        Finish("tool_calls"),
    ]
    choices = [frame["choices"][0] for frame in frames(events, request)[:-1]]
    assert [(choice["delta"], choice["finish_reason"]) for choice in choices] == [
        ({"role": "assistant", "content": "hi"}, None),
        ({"function_call": {"name": "f", "arguments": '{"a"'}}, None),
        ({"function_call": {"arguments": ":1}"}}, None),
        ({}, "function_call"),
    ]
    [choice] = begun(request).fold(events)["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "hi",
        "refusal": None,
        "function_call": {"name": "f", "arguments": '{"a":1}'},
    }
    assert choice["finish_reason"] == "function_call"


def test_usage_that_zai_did_not_send_is_not_made_up():
    assert frames([Text("好"), Finish("stop")], chat_reply(include_usage=True))[2:] == ["[DONE]"]


def test_a_streamed_tool_call_has_its_name_once():
    pieces = [ToolCall(0, "c1", "f", '{"a'), ToolCall(0, "", "", '":1}'), Finish("tool_calls")]
    first = {
        "index": 0,
        "id": "c1",
        "type": "function",
        "function": {"name": "f", "arguments": '{"a'},
    }
    assert frames(pieces) == [
        chunk({"role": "assistant", "tool_calls": [first]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '":1}'}}]}),
        chunk({}, "tool_calls"),
        "[DONE]",
    ]


def test_a_finish_without_any_text_is_an_answer():
    assert frames([Finish("length")]) == [chunk({"role": "assistant"}, "length"), "[DONE]"]


def test_a_failure_in_a_stream_is_a_frame_with_choices():
    error = BadRequest("No.")
    assert chat_reply().fail(error) == [{**error_body(error), "choices": []}, "[DONE]"]


def chat_document(events):
    return begun(chat_reply()).fold(events)


def test_a_whole_answer_is_the_sum_of_its_events():
    said = {"role": "assistant", "content": "你好", "refusal": None, "reasoning_content": "hm"}
    assert chat_document(EVENTS) == {
        "id": "chatcmpl-2026",
        "object": "chat.completion",
        "created": 1760762344,
        "model": "GLM-4.6",
        "choices": [{"index": 0, "message": said, "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }


def test_content_is_null_when_there_are_only_tool_calls():
    pieces = [ToolCall(0, "c1", "f", '{"a'), ToolCall(0, "", "", '":1}'), Finish("tool_calls")]
    assert chat_document(pieces)["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [CALL],
    }


CUSTOM = {"type": "custom", "custom": {"name": "patch"}}
PIECES = ["", '{"inp', 'ut":"a\\nb"}']


def custom_reply(n=1):
    reply = ztoapi.parse_chat(chat(n=n, tools=[CUSTOM, function("f")]))[1]
    return begun(reply)


def test_a_call_of_a_custom_tool_is_a_custom_call():
    first, *more = PIECES
    events = [
        ToolCall(0, "c1", "patch", first),
        *[ToolCall(0, "", "", piece) for piece in more],
        ToolCall(1, "c2", "f", '{"a":1}'),
        Finish("tool_calls"),
    ]
    call = {"id": "c1", "type": "custom", "custom": {"name": "patch", "input": "a\nb"}}
    other = CALL | {"id": "c2"}
    assert custom_reply().fold(events)["choices"][0]["message"]["tool_calls"] == [call, other]
    begins = {"index": 0, **call, "custom": {"name": "patch", "input": ""}}
    assert decoded(custom_reply().frames_of(events)) == [
        chunk({"role": "assistant", "tool_calls": [begins]}),
        chunk({"tool_calls": [{"index": 1, **other}]}),
        chunk({"tool_calls": [{"index": 0, "custom": {"input": "a\nb"}}]}),
        chunk({}, "tool_calls"),
    ]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('{"input":"x"}', "x"),
        ('{"input":""}', ""),
        ('{"input":{"a":1}}', '{"a":1}'),
        ('{"input":null}', ""),
        ('{"patch":"x"}', '{"patch":"x"}'),
        ("*** Begin Patch", "*** Begin Patch"),
        ('"x"', "x"),
        ("{}", "{}"),
    ],
)
def test_what_a_custom_tool_is_called_with_is_its_input_or_all_there_is(arguments, wanted):
    events = [ToolCall(0, "c1", "patch", arguments), Finish("tool_calls")]
    (call,) = custom_reply().fold(events)["choices"][0]["message"]["tool_calls"]
    assert call["custom"]["input"] == wanted
    assert decoded(custom_reply().frames_of(events))[1] == chunk(
        {"tool_calls": [{"index": 0, "custom": {"input": wanted}}]}
    )


def test_the_inputs_of_custom_tools_are_told_choice_by_choice():
    events = [
        *[
            ToolCall(0, f"c{choice}", "patch", f'{{"input":"{choice}"}}', choice)
            for choice in (0, 1)
        ],
        Finish("tool_calls", 1),
        Finish("tool_calls", 0),
    ]
    choices = [frame["choices"][0] for frame in decoded(custom_reply(2).frames_of(events))]
    told = [
        (choice["index"], choice["delta"]["tool_calls"][0]["custom"]["input"])
        for choice in choices
        if "tool_calls" in choice["delta"]
    ]
    assert told == [(0, ""), (1, ""), (1, "1"), (0, "0")]


@pytest.mark.parametrize(
    "tool", [{"type": "custom", "name": "patch"}, {"name": "patch", "input_schema": ANY_TEXT}]
)
def test_a_custom_tool_in_another_apis_shape_is_called_as_a_function(tool):
    reply = begun(ztoapi.parse_chat(chat(tools=[tool]))[1])
    events = [ToolCall(0, "c1", "patch", '{"input":"x"}'), Finish("tool_calls")]
    (call,) = reply.fold(events)["choices"][0]["message"]["tool_calls"]
    called = {"name": "patch", "arguments": '{"input":"x"}'}
    assert call == {"id": "c1", "type": "function", "function": called}


FOUND = {"title": "T", "link": "https://x/y", "content": "C", "media": "M", "refer": "ref_1"}
CITED = {"url": "https://x/y", "title": "T", "start_index": 0, "end_index": 0, "content": "C"}


def test_citations_are_annotations_whole_and_streamed():
    events = [Text("x"), Citations((FOUND, {"title": "no link"})), Finish("stop")]
    annotations = [{"type": "url_citation", "url_citation": CITED}]
    whole = chat_document(events)
    assert whole["choices"][0]["message"]["annotations"] == annotations
    assert frames(events)[1] == chunk({"annotations": annotations}) | {
        "web_search": whole["web_search"]
    }
    assert whole["web_search"] == [FOUND, {"title": "no link"}]


def test_choices_are_chunks_of_their_own_begun_in_order_with_one_usage():
    events = [
        Text("a", 1),
        Text("b", 0),
        Usage(1, 2, 3),
        Finish("stop", 1),
        Usage(1, 5, 6),
        Finish("length", 0),
    ]
    streamed = frames(events, chat_reply(2, include_usage=True))
    choices = [frame["choices"][0] for frame in streamed[:6]]
    assert choices == [
        {"index": 0, "delta": {"role": "assistant"}, "finish_reason": None},
        {"index": 1, "delta": {"role": "assistant"}, "finish_reason": None},
        {"index": 1, "delta": {"content": "a"}, "finish_reason": None},
        {"index": 0, "delta": {"content": "b"}, "finish_reason": None},
        {"index": 1, "delta": {}, "finish_reason": "stop"},
        {"index": 0, "delta": {}, "finish_reason": "length"},
    ]
    assert (streamed[6]["usage"]["total_tokens"], streamed[7:]) == (9, ["[DONE]"])
    whole = chat_document(events)
    assert [
        (c["index"], c["message"]["content"], c["finish_reason"]) for c in whole["choices"]
    ] == [
        (0, "b", "length"),
        (1, "a", "stop"),
    ]
    assert whole["usage"]["completion_tokens"] == 7


CALLED = ToolCall(0, "c1", "f", "{}")


@pytest.mark.parametrize(
    ("form", "events", "wanted"),
    [
        pytest.param("parsed", EVENTS, EVENTS, id="parsed"),
        pytest.param("hidden", EVENTS, EVENTS[1:], id="hidden"),
        pytest.param("raw", EVENTS, [Text("<think>hm"), Text("</think>"), *EVENTS[1:]], id="raw"),
        pytest.param("raw", [Thought("a"), Thought("b"), CALLED], [Text("<think>a"), Text("b"), Text("</think>"), CALLED], id="raw before a call"),
        pytest.param("raw", [Thought("a"), Finish("length")], [Text("<think>a"), Text("</think>"), Finish("length")], id="raw and nothing more"),
        pytest.param("raw", [Thought("a"), Citations(()), Finish("stop")], [Text("<think>a"), Text("</think>"), Citations(()), Finish("stop")], id="raw before citations"),
        pytest.param("raw", EVENTS[1:], EVENTS[1:], id="raw without reasoning"),
    ],
)  # fmt: skip
def test_reasoning_goes_where_it_is_wanted(form, events, wanted):
    chain = ztoapi.RepairChain(ztoapi.reasoning_shape(form))
    assert [shaped for event in events for shaped in chain.feed(event)] == wanted


# ======== OpenAI completions ========


def test_a_completion_is_asked_for_as_a_chat():
    body = {
        "model": "glm-4.6",
        "prompt": ["写一首诗"],
        "max_tokens": 9,
        "stop": "x",
        "logprobs": 3,
        "best_of": 1,
        "echo": False,
    }
    wanted = Prompt(
        "glm-4.6",
        (Message("user", ("写一首诗",)),),
        max_tokens=9,
        stop=("x",),
        ignored=("logprobs",),
    )
    assert ztoapi.parse_completion(body)[0] == wanted


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": [[1, 2], [3]]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a"] * 21}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": "x", "n": 2, "best_of": 3}, "best_of"),
        ({"prompt": "x", "best_of": 21}, "best_of"),
        ({"prompt": "x", "echo": "yes"}, "echo"),
        ({"prompt": "x", "suffix": 1}, "suffix"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "model": ""}, "model"),
    ],
)
def test_a_completion_that_cannot_be_had_is_refused_with_a_reason(fields, param):
    with pytest.raises(BadRequest) as raised:
        ztoapi.parse_completion({"model": "glm-4.6"} | fields)
    assert raised.value.param == param


@pytest.mark.parametrize(
    "fields",
    [{"best_of": 1}, {"best_of": 0}, {"n": 2, "best_of": 2}, {"n": 2, "best_of": 1}, {"n": 2}],
)
def test_as_many_answers_as_are_wanted_may_be_compared(fields):
    prompt, _ = ztoapi.parse_completion({"model": "glm-4.6", "prompt": "x", **fields})
    assert (prompt.n, prompt.ignored) == (fields.get("n", 1), ())


def asked_for_choices(**fields):
    """What each choice of a completion is asked with: the messages and the seed."""
    prompt, _ = ztoapi.parse_completion({"model": "glm-4.6", **fields})
    plan = ztoapi.make_plan(prompt, Settings(), Account(""), "7")
    choices = [plan.for_choice(choice).prompts[0][1] for choice in range(plan.n)]
    bodies = [zai_body(choice, MODELS["glm-4.6"]) for choice in choices]
    return [(body["messages"][-1]["content"], body.get("seed")) for body in bodies]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        pytest.param({"prompt": "a"}, [("a", None)], id="one"),
        pytest.param({"prompt": ["a"], "seed": 5}, [("a", 5)], id="an array of one"),
        pytest.param({"prompt": ["a", "b"]}, [("a", None), ("b", None)], id="two"),
        pytest.param(
            {"prompt": ["a", "b"], "seed": 5}, [("a", 5), ("b", 5)], id="each as if by itself"
        ),
        pytest.param(
            {"prompt": ["a", "b"], "n": 2, "seed": 5},
            [("a", 5), ("a", 6), ("b", 5), ("b", 6)],
            id="two of each",
        ),
        pytest.param(
            {"prompt": [str(i) for i in range(20)]},
            [(str(i), None) for i in range(20)],
            id="twenty",
        ),
    ],
)
def test_each_of_several_prompts_is_asked_by_itself(fields, wanted):
    assert asked_for_choices(**fields) == wanted


def test_a_completion_knows_what_is_to_follow_it():
    prompt = ztoapi.parse_completion(
        {"model": "glm-4.6", "prompt": "def f(", "suffix": "return x"}
    )[0]
    line = "Write only what belongs between the user's text and this: return x"
    assert prompt.messages == (Message("system", (line,)), Message("user", ("def f(",)))


@pytest.mark.parametrize(
    ("n", "wanted"), [(1, ["诗:你", "好", ""]), (2, ["诗:你", "好", "", "诗:"])]
)
def test_an_echoed_prompt_begins_each_choice(n, wanted):
    _, reply = ztoapi.parse_completion({"model": "glm-4.6", "prompt": "诗:", "echo": True, "n": n})
    events = [Text("你"), Text("好"), *(Finish("stop", choice) for choice in range(n))]
    assert begun(reply).fold(events)["choices"][0]["text"] == "诗:你好"
    streamed = decoded(reply.frames_of(events))
    assert [frame["choices"][0]["text"] for frame in streamed] == wanted


def test_each_choice_begins_with_its_own_prompt():
    body = {"model": "glm-4.6", "prompt": ["a:", "b:"], "echo": True, "n": 2}
    _, reply = ztoapi.parse_completion(body)
    events = [
        *[Text(str(choice), choice) for choice in (3, 0, 2, 1)],
        *[Finish("stop", choice) for choice in range(4)],
    ]
    choices = begun(reply).fold(events)["choices"]
    assert [choice["text"] for choice in choices] == ["a:0", "a:1", "b:2", "b:3"]
    streamed = [frame["choices"][0] for frame in decoded(reply.frames_of(events))]
    assert [choice["text"] for choice in streamed[:4]] == ["b:3", "a:0", "b:2", "a:1"]


def test_a_completion_has_the_text_alone():
    envelope = {
        "id": "cmpl-2026",
        "object": "text_completion",
        "created": 1760762344,
        "model": "GLM-4.6",
    }
    choice = {"index": 0, "text": "你好", "logprobs": None, "finish_reason": "stop"}
    reply = begun(ztoapi.CompletionReply([""], include_usage=True))
    assert reply.fold(EVENTS) == {**envelope, "choices": [choice], "usage": USAGE}
    streamed = decoded([*reply.frames_of(EVENTS), *reply.close()])
    assert [frame["choices"][0]["text"] for frame in streamed[:3]] == ["你", "好", ""]
    assert streamed[2]["choices"][0]["finish_reason"] == "stop"
    assert streamed[3:] == [{**envelope, "choices": [], "usage": USAGE}, "[DONE]"]


# ======== OpenAI responses ========

ASKED = {"model": "glm-4.6", "input": "你好"}


def user_item(words, role="user"):
    return {"role": role, "content": words}


class History(dict):
    """Stored responses, by id."""


def parse_response(**fields):
    """The prompt of a request; what is stored of its input must say the same as the input."""
    prompt, reply = ztoapi.parse_response(ASKED | fields, History())
    again = {"input": reply.request.input}
    stored, _ = ztoapi.parse_response(ASKED | fields | again, History())
    assert (stored.messages, stored.tools) == (prompt.messages, prompt.tools)
    return prompt


NAMESPACE = {
    "type": "namespace",
    "name": "mcp__w",
    "description": "weather",
    "tools": [
        {"type": "function", "name": "get", "parameters": {"type": "object"}},
        {"type": "custom", "name": "say"},
    ],
}


def test_an_item_may_be_sent_by_its_id_alone():
    _, response, store = respond([Text("x"), CALLED, Finish("tool_calls")])
    items = [{"type": "item_reference", "id": item["id"]} for item in response["output"]]
    output = {"type": "function_call_output", "call_id": "c1", "output": "1"}
    prompt = ztoapi.parse_response({"model": "glm-4.6", "input": [*items, output]}, store)[0]
    assert prompt.messages == (
        Message("assistant", ("x",), calls=(CALLED,)),
        Message("tool", ("1",), call_id="c1"),
    )


@pytest.mark.parametrize(
    ("items", "wanted"),
    [
        pytest.param(
            [
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
                {
                    "type": "function_call_output",
                    "call_id": "c1",
                    "output": [{"type": "input_image", "image_url": "https://x"}],
                },
                {"type": "function_call_output", "call_id": "c2", "output": "2"},
                {"type": "web_search_call", "id": "ws_1"},
            ],
            [
                Message(
                    "assistant",
                    (),
                    calls=(ToolCall(0, "c1", "f", "{}"), ToolCall(0, "c2", "f", "{}")),
                ),
                Message("tool", (Media("image_url", "https://x"),), call_id="c1"),
                Message("tool", ("2",), call_id="c2"),
            ],
            id="a picture from a tool, and what OpenAI's own tools leave",
        ),
        pytest.param(
            [{"type": "function_call_output", "call_id": "c1", "output": []}],
            [Message("tool", (), call_id="c1")],
            id="a tool that said nothing",
        ),
        pytest.param("hi", [Message("user", ("hi",))], id="text"),
        pytest.param(
            [{"role": "developer", "content": "x"}],
            [Message("system", ("x",))],
            id="a message without a type",
        ),
        pytest.param(
            [
                {
                    "type": "message",
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "a"},
                        {"type": "input_image", "image_url": "https://x", "detail": "auto"},
                    ],
                }
            ],
            [Message("user", ("a", Media("image_url", "https://x")))],
            id="parts",
        ),
        pytest.param(
            [
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "ok"}],
                },
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
                {"type": "custom_tool_call", "call_id": "c2", "name": "g", "input": "raw"},
                {"type": "function_call_output", "call_id": "c1", "output": "1"},
                {
                    "type": "custom_tool_call_output",
                    "call_id": "c2",
                    "output": [{"type": "input_text", "text": "2"}],
                },
            ],
            [
                Message(
                    "assistant",
                    ("ok",),
                    "hm",
                    (ToolCall(0, "c1", "f", "{}"), ToolCall(0, "c2", "g", '{"input":"raw"}')),
                ),
                Message("tool", ("1",), call_id="c1"),
                Message("tool", ("2",), call_id="c2"),
            ],
            id="a turn of the assistant's is one message",
        ),
        pytest.param(
            [
                {
                    "type": "reasoning",
                    "summary": [],
                    "encrypted_content": ztoapi.encode_reasoning("想😀"),
                },
                {"role": "user", "content": "x"},
            ],
            [Message("assistant", (), "想😀"), Message("user", ("x",))],
            id="sealed reasoning",
        ),
        pytest.param(
            [{"type": "reasoning", "content": 5, "summary": [5]}],
            [Message("assistant", ())],
            id="reasoning that cannot be read",
        ),
        pytest.param(
            [
                {
                    "type": "function_call",
                    "call_id": "c1",
                    "name": "get",
                    "namespace": "mcp__w",
                    "arguments": "{}",
                }
            ],
            [Message("assistant", (), calls=(ToolCall(0, "c1", "mcp__w__get", "{}"),))],
            id="a call in a namespace",
        ),
    ],
)
def test_items_are_a_conversation(items, wanted):
    assert parse_response(input=items).messages == tuple(wanted)


AGENT = {"type": "agent_message", "author": "/root/a", "recipient": "/root"}
RUN = {"type": "exec", "command": ["ls"]}


@pytest.mark.parametrize(
    ("items", "wanted"),
    [
        pytest.param(
            [AGENT | {"content": [{"type": "input_text", "text": "done"}, {"type": "encrypted_content"}]}],
            [Message("user", ("Message from the agent /root/a:", "done"), continues=True)],
            id="agent",
        ),
        pytest.param(
            [AGENT | {"content": [{"type": "input_text", "text": "Payload:"}, {"type": "encrypted_content", "encrypted_content": "say hi"}]}],
            [Message("user", ("Message from the agent /root/a:", "Payload:", "say hi"), continues=True)],
            id="an agent's task, which only OpenAI's models encrypt",
        ),
        pytest.param(
            [AGENT | {"content": [{"type": "input_text", "text": "Payload:"}, {"type": "encrypted_content", "encrypted_content": "gAAAAABo-x_9=="}]}],
            [Message("user", ("Message from the agent /root/a:", "Payload:"), continues=True)],
            id="an agent's task that is encrypted",
        ),
        pytest.param(
            [AGENT | {"content": "done"}],
            [Message("user", ("Message from the agent /root/a:", "done"), continues=True)],
            id="an agent's text",
        ),
        pytest.param(
            [
                {"type": "local_shell_call", "call_id": "c1", "action": RUN},
                {"type": "local_shell_call_output", "id": "c1", "output": "a.py"},
            ],
            [
                Message("assistant", (), calls=(ToolCall(0, "c1", "local_shell", json_text(RUN)),)),
                Message("tool", ("a.py",), call_id="c1"),
            ],
            id="local shell",
        ),
        pytest.param(
            [
                {"type": "shell_call", "call_id": "c1", "action": {"commands": ["ls"]}},
                {"type": "shell_call_output", "call_id": "c1", "output": [{"stdout": "a.py"}]},
            ],
            [
                Message("assistant", (), calls=(ToolCall(0, "c1", "shell", '{"commands":["ls"]}'),)),
                Message("tool", ('{"stdout":"a.py"}',), call_id="c1"),
            ],
            id="shell",
        ),
        pytest.param(
            [
                {"type": "apply_patch_call", "call_id": "c1", "operation": {"path": "a.py"}},
                {"type": "apply_patch_call_output", "call_id": "c1", "status": "completed"},
            ],
            [
                Message("assistant", (), calls=(ToolCall(0, "c1", "apply_patch", '{"path":"a.py"}'),)),
                Message("tool", ("completed",), call_id="c1"),
            ],
            id="patch",
        ),
        pytest.param(
            [{"type": "function_call_output", "call_id": "c1", "status": "completed"}],
            [Message("tool", (), call_id="c1")],
            id="a result that says nothing but that it is there",
        ),
        pytest.param(
            [{"type": "mcp_call", "id": "m1", "server_label": "w", "name": "get", "arguments": '{"a":1}', "output": "42"}],
            [
                Message("assistant", (), calls=(ToolCall(0, "m1", "w__get", '{"a":1}'),)),
                Message("tool", ("42",), call_id="m1"),
            ],
            id="MCP",
        ),
        pytest.param(
            [{"type": "mcp_call", "id": "m1", "name": "get", "error": {"code": 1}}],
            [
                Message("assistant", (), calls=(ToolCall(0, "m1", "get", "{}"),)),
                Message("tool", ('{"code":1}',), call_id="m1"),
            ],
            id="MCP that failed",
        ),
        pytest.param(
            [{"type": "function_call", "call_id": "c1", "namespace": "w"}, {"type": "function_call_output", "call_id": "c1", "output": {"a": 1}}],
            [
                Message("assistant", (), calls=(ToolCall(0, "c1", "", "{}"),)),
                Message("tool", ('{"a":1}',), call_id="c1"),
            ],
            id="a call without a name, an object as output",
        ),
    ],
)  # fmt: skip
def test_the_items_of_agents_and_of_tools_of_openais_own_are_read(items, wanted):
    assert parse_response(input=items).messages == tuple(wanted)


def test_items_of_unknown_types_are_left_out_and_listed():
    hi = {"role": "user", "content": "hi"}
    new, newer = {"type": "never_heard_of", "x": 1}, {"type": 5}
    prompt = parse_response(input=[new, hi, new, newer, {"type": "web_search_call"}])
    assert prompt.messages == (Message("user", ("hi",)),)
    assert prompt.ignored == ("input.never_heard_of", "input.5")


def test_messages_of_chat_are_read_in_the_input_too():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"}
    told = {"role": "tool", "tool_call_id": "c1", "content": "x"}
    assert parse_response(input=[asked, told]).messages == (
        Message("assistant", (), "hm", (ToolCall(0, "c1", "f", "{}"),)),
        Message("tool", ("x",), call_id="c1"),
    )


def additional(*tools):
    item = {"type": "additional_tools", "role": "developer", "tools": list(tools)}
    return [item, {"role": "user", "content": "hi"}]


NOW = {"type": "function", "name": "now", "parameters": {"type": "object"}}


def test_tools_in_the_conversation_join_the_others():
    known = NOW | {"description": "the first"}
    more = [NOW, NAMESPACE, {"type": "web_search"}, {"type": "custom", "name": "say"}]
    prompt = parse_response(tools=[known], input=additional(*more))
    assert prompt.messages == (Message("user", ("hi",)),)
    assert [tool.name for tool in prompt.tools] == ["now", "mcp__w__get", "mcp__w__say", "say"]
    assert prompt.tools[0].description == "the first"
    assert [tool["type"] for tool in prompt.native_tools] == ["web_search"]


def test_a_call_of_a_tool_in_the_conversation_comes_back_as_the_client_knows_it():
    called = ToolCall(0, "c1", "mcp__w__get", "{}")
    _, response, _ = respond([called, Finish("tool_calls")], input=additional(NAMESPACE))
    names = {key: response["output"][0][key] for key in ("type", "name", "namespace")}
    assert names == {"type": "function_call", "name": "get", "namespace": "mcp__w"}


def test_tools_in_the_conversation_that_cannot_be_offered_are_left_out_and_listed():
    odd = [{"type": "function"}, {"type": "computer"}, {"type": "custom", "name": 5}, 7]
    prompt = parse_response(input=additional(NOW, *odd))
    assert [tool.name for tool in prompt.tools] == ["now"]
    assert prompt.ignored == ("tools.function", "tools.computer", "tools.custom")
    many = parse_response(input=additional(*[NOW | {"name": f"f{i}"} for i in range(130)]))
    assert (len(many.tools), many.ignored) == (128, ("tools.function",))


TOOL_SEARCH = {
    "type": "tool_search",
    "execution": "client",
    "description": "Finds tools.",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
}
SEARCHED = {
    "type": "tool_search_call",
    "call_id": "c1",
    "execution": "client",
    "arguments": {"query": "weather"},
}
FOUND_TOOLS = {"type": "tool_search_output", "call_id": "c1", "execution": "client"}
AVAILABLE = """\
tool mcp__w__get is now available
tool mcp__w__say is now available
tool now is now available"""


def test_a_search_of_tools_that_the_client_runs_is_offered_as_a_function():
    prompt = parse_response(tools=[TOOL_SEARCH, NOW])
    search = ztoapi.Tool("tool_search", TOOL_SEARCH["description"], TOOL_SEARCH["parameters"])
    assert (prompt.tools[0], len(prompt.tools), prompt.ignored) == (search, 2, ())


@pytest.mark.parametrize(
    ("tool", "ignored"),
    [
        pytest.param({"type": "tool_search"}, ("tools.tool_search",), id="hosted"),
        pytest.param(
            TOOL_SEARCH | {"execution": "server"}, ("tools.tool_search",), id="OpenAI's server"
        ),
        pytest.param(TOOL_SEARCH | {"type": "file_search"}, ("tools.file_search",), id="of files"),
        pytest.param(TOOL_SEARCH | {"execution": 5}, ("tools.tool_search",), id="nobody's"),
    ],
)
def test_a_search_of_tools_that_others_run_is_left_out(tool, ignored):
    prompt = parse_response(tools=[tool])
    assert (prompt.tools, prompt.ignored) == ((), ignored)


def test_a_search_of_tools_needs_no_description():
    prompt = parse_response(tools=[{"type": "tool_search", "execution": "client"}])
    nothing = {"type": "object", "properties": {}}
    assert prompt.tools == (ztoapi.Tool("tool_search", "tool_search", nothing),)


@pytest.mark.parametrize(
    ("items", "wanted"),
    [
        pytest.param(
            [SEARCHED, FOUND_TOOLS | {"tools": [NAMESPACE, NOW]}],
            [
                "mcp__w__get",
                "mcp__w__say",
                "now",
                AVAILABLE,
            ],
            id="tools",
        ),
        pytest.param([SEARCHED, FOUND_TOOLS | {"tools": []}], ["no tool was found"], id="none"),
        pytest.param([SEARCHED, FOUND_TOOLS], ["no tool was found"], id="nothing"),
        pytest.param(
            [SEARCHED, FOUND_TOOLS | {"tools": [5, {"type": "computer"}]}],
            ["no tool was found"],
            id="nothing that can be called",
        ),
    ],
)
def test_a_search_of_tools_is_a_call_and_what_it_found_joins_the_tools(items, wanted):
    prompt = parse_response(input=items)
    call = ToolCall(0, "c1", "tool_search", '{"query":"weather"}')
    assert prompt.messages == (
        Message("assistant", (), calls=(call,)),
        Message("tool", (wanted[-1],), call_id="c1"),
    )
    assert [tool.name for tool in prompt.tools] == wanted[:-1]


def test_a_search_of_tools_by_openais_server_leaves_only_the_tools():
    call = {"type": "tool_search_call", "execution": "server", "call_id": None, "arguments": {}}
    found = {"type": "tool_search_output", "execution": "server", "call_id": None, "tools": [NOW]}
    prompt = parse_response(input=[call, found, {"role": "user", "content": "hi"}])
    assert prompt.messages == (Message("user", ("hi",)),)
    assert ([tool.name for tool in prompt.tools], prompt.ignored) == (["now"], ())


@pytest.mark.parametrize(
    ("pieces", "arguments"),
    [
        pytest.param(
            ['{"query":"weather","limit":4}'], {"query": "weather", "limit": 4}, id="whole"
        ),
        pytest.param(['{"que', 'ry":"x"}'], {"query": "x"}, id="in pieces"),
        pytest.param([""], {}, id="none"),
        pytest.param(['{"query":'], {}, id="broken off"),
        pytest.param(['["weather"]'], {}, id="no object"),
    ],
)
def test_a_search_of_tools_comes_back_as_an_item_of_its_own(pieces, arguments):
    first = ToolCall(0, "c1", "tool_search", pieces[0])
    more = [ToolCall(0, "", "", piece) for piece in pieces[1:]]
    events = [first, *more, Finish("tool_calls")]
    names, response, _ = respond(events, tools=[TOOL_SEARCH])
    item = {"id": "tsc_ours_0", "status": "completed"} | SEARCHED | {"arguments": arguments}
    assert names[2:] == ["output_item.added", "output_item.done", "completed"]
    assert (response["output"], response["tools"]) == ([item], [TOOL_SEARCH])
    assert response_reply(tools=[TOOL_SEARCH]).fold(events) == response


def test_a_function_that_is_called_tool_search_stays_one():
    called = [ToolCall(0, "c1", "tool_search", "{}"), Finish("tool_calls")]
    _, response, _ = respond(called, tools=[NOW | {"name": "tool_search"}])
    assert response["output"][0]["type"] == "function_call"


def test_a_found_tool_comes_back_as_the_client_knows_it():
    called = [ToolCall(0, "c2", "mcp__w__get", "{}"), Finish("tool_calls")]
    items = [SEARCHED, FOUND_TOOLS | {"tools": [NAMESPACE]}]
    _, response, _ = respond(called, input=items, tools=[TOOL_SEARCH])
    names = {key: response["output"][0][key] for key in ("type", "name", "namespace")}
    assert names == {"type": "function_call", "name": "get", "namespace": "mcp__w"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": ["x", {"type": "item_reference", "id": "msg_ours_0"}]}, "input[1]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"model": ""}, "model"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{"type": "custom", "name": ""}]}, "tools[0]"),
        ({"tools": [{"type": "web_search", "search_context_size": "huge"}]}, "tools[0]"),
        ({"tools": [NAMESPACE, NAMESPACE | {"tools": [5]}]}, "tools[1].tools[0]"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"text": {"format": {"type": "yaml"}}}, "text"),
        ({"reasoning": {"effort": "huge"}}, "reasoning"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"previous_response_id": "resp_gone"}, "previous_response_id"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "x"}}, "metadata"),
        ({"metadata": {"k": "x" * 513}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata"),
    ],
)
def test_a_response_that_makes_no_sense_names_the_field(fields, param):
    with pytest.raises(ztoapi.ProxyError) as raised:
        parse_response(**fields)
    assert raised.value.param == param


def test_what_else_a_response_asks_for():
    schema = {"type": "object"}
    prompt = parse_response(
        instructions="Be kind.",
        max_output_tokens=9,
        temperature=0.5,
        reasoning={"effort": "high", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "x", "schema": schema}, "verbosity": "low"},
        tools=[
            {"type": "function", "name": "f", "parameters": schema},
            {"type": "custom", "name": "g"},
            {"type": "web_search_preview"},
            {"type": "web_search", "external_web_access": False},
            {"type": "computer"},
            {"type": "computer"},
            NAMESPACE,
        ],
        tool_choice={"type": "function", "name": "f"},
        metadata={"a": "b"},
        background=True,
        parallel_tool_calls=False,
        truncation="disabled",
    )
    assert prompt.messages == (Message("system", ("Be kind.",)), Message("user", ("你好",)))
    assert (prompt.max_tokens, prompt.temperature, prompt.effort, prompt.schema) == (
        9,
        0.5,
        "high",
        schema,
    )
    assert [tool.name for tool in prompt.tools] == ["f", "g", "mcp__w__get", "mcp__w__say"]
    assert [tool["type"] for tool in prompt.native_tools] == ["web_search"]
    assert prompt.tool_choice == ToolChoice("required", ("f",))
    assert prompt.ignored == ("background", "parallel_tool_calls", "tools.computer")


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "custom", "name": "say", "namespace": "mcp__w"},
        {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"name": "say", "namespace": "mcp__w"}],
        },
    ],
)
def test_a_tool_in_a_namespace_can_be_chosen(choice):
    assert parse_response(tools=[NAMESPACE], tool_choice=choice).tool_choice == ToolChoice(
        "required", ("mcp__w__say",)
    )


def offered(**fields):
    """What Z.ai gets of the tools: functions by name, its own search as whether it must search."""
    prompt = ztoapi.with_chosen_tools(parse_response(**fields))
    body = zai_body(prompt, resolve("glm-4.6"))
    names = []
    for tool in body.get("tools", []):
        if tool["type"] == "web_search":
            names.append(tool["web_search"].get("require_search", "may search"))
        else:
            names.append(tool["function"]["name"])
    must_call = "Answer by calling" in body["messages"][0]["content"]
    return names, must_call, prompt.ignored


HOSTED_SEARCH = {"type": "web_search_preview", "search_context_size": "high"}
DRAW = {"type": "image_generation"}


def allowed(mode, *tools):
    return {"type": "allowed_tools", "mode": mode, "tools": list(tools)}


@pytest.mark.parametrize(
    ("tools", "choice", "wanted"),
    [
        pytest.param([HOSTED_SEARCH], {"type": "web_search_preview"}, [True], id="a search"),
        pytest.param([HOSTED_SEARCH], {"type": "web_search"}, [True], id="of another version"),
        pytest.param(
            [NOW, {"type": "web_search_2025_08_26"}],
            {"type": "web_search_preview_2025_03_11"},
            [True],
            id="alone",
        ),
        pytest.param([HOSTED_SEARCH], "required", [True], id="the only one"),
        pytest.param(
            [NOW, HOSTED_SEARCH], allowed("required", HOSTED_SEARCH), [True], id="alone allowed"
        ),
        pytest.param(
            [NOW, HOSTED_SEARCH],
            allowed("auto", {"type": "web_search"}),
            ["may search"],
            id="allowed",
        ),
        pytest.param(
            [NOW, HOSTED_SEARCH, NOW | {"name": "then"}],
            allowed("auto", NOW, HOSTED_SEARCH),
            ["now", "may search"],
            id="allowed beside a function",
        ),
        pytest.param([NOW, HOSTED_SEARCH], "auto", ["now", "may search"], id="negative: auto"),
        pytest.param([NOW, HOSTED_SEARCH], "none", [], id="negative: none"),
        pytest.param(
            [NOW, HOSTED_SEARCH], allowed("auto", NOW), ["now"], id="negative: not allowed"
        ),
        pytest.param([NOW], allowed("auto"), [], id="negative: nothing allowed"),
    ],
)
def test_a_search_that_is_chosen_is_zais(tools, choice, wanted):
    assert offered(tools=tools, tool_choice=choice) == (wanted, False, ())


@pytest.mark.parametrize(
    ("tools", "choice", "wanted"),
    [
        pytest.param([NOW, HOSTED_SEARCH], "required", ["now", "may search"], id="any"),
        pytest.param([NOW, HOSTED_SEARCH], {"type": "function", "name": "now"}, ["now"], id="one"),
        pytest.param(
            [NOW, HOSTED_SEARCH],
            {"type": "function", "function": {"name": "now"}},
            ["now"],
            id="in chat's form",
        ),
        pytest.param([NOW, TOOL_SEARCH], {"type": "tool_search"}, ["tool_search"], id="of tools"),
        pytest.param(
            [NOW, HOSTED_SEARCH, TOOL_SEARCH],
            allowed("required", NOW, HOSTED_SEARCH, {"type": "tool_search"}),
            ["now", "tool_search", "may search"],
            id="one of several",
        ),
    ],
)
def test_a_function_that_must_be_called_is_not_a_search_that_must_be_made(tools, choice, wanted):
    assert offered(tools=tools, tool_choice=choice) == (wanted, True, ())


def test_tools_that_are_allowed_and_not_there_are_left_out_and_listed():
    choice = allowed("auto", NOW, DRAW, {"type": "mcp", "server_label": "w"})
    left_out = ("tools.image_generation", "tools.mcp")
    assert offered(tools=[NOW, DRAW], tool_choice=choice) == (["now"], False, left_out)
    none = allowed("auto", DRAW)
    assert offered(tools=[NOW, DRAW], tool_choice=none) == ([], False, left_out[:1])


def test_a_search_that_must_be_made_without_tools_is_left_out_and_listed():
    assert offered(tool_choice={"type": "web_search"}) == ([], False, ("tools.web_search",))


@pytest.mark.parametrize(
    ("tools", "choice", "words"),
    [
        pytest.param([DRAW], DRAW, "image_generation, which GLM does not have", id="a picture"),
        pytest.param(
            [], {"type": "code_interpreter"}, "which GLM does not have", id="without tools"
        ),
        pytest.param([NOW], {"type": "mcp", "server_label": "w"}, "GLM does not have", id="MCP"),
        pytest.param([NOW], {"type": "shell"}, "shell, which GLM does not have", id="a shell"),
        pytest.param(
            [NOW, DRAW],
            allowed("required", DRAW, {"type": "file_search"}),
            "image_generation, file_search, which GLM does not have",
            id="several",
        ),
        pytest.param([NOW], {"type": "web_search"}, "not among the tools", id="no search"),
        pytest.param(
            [NOW, {"type": "web_search", "external_web_access": False}],
            {"type": "web_search"},
            "not among the tools",
            id="no live search",
        ),
        pytest.param(
            [NOW], {"type": "tool_search"}, "not among the tools", id="no search of tools"
        ),
    ],
)
def test_a_tool_that_must_be_called_and_is_not_there_is_refused(tools, choice, words):
    with pytest.raises(BadRequest, match=words) as raised:
        parse_response(tools=tools, tool_choice=choice)
    assert raised.value.param == "tool_choice"


@pytest.mark.parametrize(
    "choice",
    [5, "sometimes", {}, {"type": 5}, {"type": "function"}, {"type": "custom", "name": 5}],
    ids=json_text,
)
def test_a_choice_that_makes_no_sense_is_refused(choice):
    with pytest.raises(BadRequest, match="tool_choice' must be"):
        parse_response(tools=[NOW], tool_choice=choice)


def response_reply(history=None, /, **fields):
    return begun(ztoapi.parse_response(ASKED | fields, history or History())[1])


def respond(events, **fields):
    """The types of the events of a streamed response, and the response in the last."""
    store = History()
    reply = response_reply(store, **fields)
    streamed = [*reply.frames_of(events), *reply.close()]
    if reply.stored:
        store[reply.stored.response["id"]] = reply.stored
    assert [frame["sequence_number"] for frame in streamed] == list(range(len(streamed)))
    return (
        [frame["type"].removeprefix("response.") for frame in streamed],
        streamed[-1]["response"],
        store,
    )


def test_a_streamed_response_is_its_events_in_order():
    names, response, _ = respond(EVENTS)
    assert names == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        "completed",
    ]
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
    assert response["output"][1]["content"][0]["text"] == "你好"
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 1}
    assert (response["status"], response["model"], response["id"]) == (
        "completed",
        "GLM-4.6",
        "resp_ours",
    )


def test_a_response_keeps_the_head_of_the_sign_of_life_before_it():
    reply = ztoapi.parse_response(ASKED, History())[1]
    reply.sign_of_life(replace(HEAD, created=7))
    reply.begin(HEAD)
    frames = [*reply.frames_of([Text("x"), Finish("stop")]), *reply.close()]
    assert frames[-1]["response"]["created_at"] == 7


NO_MORE_KEYS = {"description": None, "parameters": None, "strict": None}


def test_a_response_has_every_key_that_its_schema_requires():
    tool = {"type": "function", "name": "f"}
    get, say = NAMESPACE["tools"]
    fields = {
        "tools": [
            tool,
            NAMESPACE,
            {"type": "computer"},
            {"type": "web_search", "external_web_access": False},
        ],
        "reasoning": {"effort": "high"},
        "text": {"verbosity": "low"},
        "top_logprobs": 5,
        "max_tool_calls": 7,
    }
    assert respond([Text("x"), Finish("stop")], **fields)[1] == {
        "id": "resp_ours",
        "object": "response",
        "created_at": 1760762344,
        "completed_at": 1760762349,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "model": "GLM-4.6",
        "output": [
            {
                "id": "msg_ours_0",
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [
                    {"type": "output_text", "text": "x", "annotations": [], "logprobs": []}
                ],
            }
        ],
        "usage": None,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": "high", "summary": None},
        "safety_identifier": None,
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "tool_choice": "auto",
        "tools": [tool | NO_MORE_KEYS, NAMESPACE | {"tools": [NO_MORE_KEYS | get, say]}],
        "top_p": 1.0,
        "user": None,
        "background": False,
        "frequency_penalty": 0.0,
        "max_tool_calls": 7,
        "presence_penalty": 0.0,
        "service_tier": "default",
        "top_logprobs": 0,
        "truncation": "disabled",
    }


@pytest.mark.parametrize("limit", [None, "7", True, 7.5, [7]], ids=repr)
def test_what_a_response_repeats_of_a_limit_is_a_number(limit):
    response = respond([Text("x"), Finish("stop")], max_tool_calls=limit)[1]
    assert response["max_tool_calls"] is None


def test_a_limit_of_calls_is_not_kept_and_listed():
    assert parse_response(max_tool_calls=7).ignored == ("max_tool_calls",)


def test_the_frames_of_a_message_say_where_it_stands():
    frames = response_reply().frames_of([Text("a"), Finish("stop")])[2:]
    item = {"id": "msg_ours_0", "type": "message", "role": "assistant"}
    empty, full = (
        {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        for text in ("", "a")
    )
    part = {"item_id": "msg_ours_0", "output_index": 0, "content_index": 0}
    assert [
        {key: value for key, value in frame.items() if key not in ("type", "sequence_number")}
        for frame in frames
    ] == [
        {"output_index": 0, "item": item | {"status": "in_progress", "content": []}},
        part | {"part": empty},
        part | {"delta": "a", "logprobs": []},
        part | {"text": "a", "logprobs": []},
        part | {"part": full},
        {"output_index": 0, "item": item | {"status": "completed", "content": [full]}},
    ]


def test_text_around_a_call_is_two_messages():
    names, response, _ = respond([Text("a"), CALLED, Text("b"), Finish("length")])
    assert names[2:] == [
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("output_text.done", "content_part.done", "output_item.done"),
        "incomplete",
    ]
    assert [(item["type"], item["status"]) for item in response["output"]] == [
        ("message", "completed"),
        ("function_call", "incomplete"),
        ("message", "incomplete"),
    ]


def test_reasoning_is_a_summary_for_those_who_ask_for_one_and_sealed_for_those_who_keep_it():
    names, response, _ = respond(
        EVENTS, reasoning={"summary": "auto"}, include=["reasoning.encrypted_content"]
    )
    assert names[2:6] == [
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
    ]
    item = response["output"][0]
    assert item["summary"] == [{"type": "summary_text", "text": "hm"}]
    assert ztoapi.decode_reasoning(item) == "hm"
    assert "hm" not in item["encrypted_content"]


def test_calls_are_items_and_custom_ones_have_their_input():
    calls = [
        ToolCall(0, "c1", "f", '{"a'),
        ToolCall(0, "", "", '":1}'),
        ToolCall(1, "c2", "g", '{"input":"x\\ny"}'),
        Finish("tool_calls"),
    ]
    names, response, _ = respond(calls, tools=[{"type": "custom", "name": "g"}])
    assert names[2:] == [
        *(
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.delta",
            "output_item.added",
        ),
        *("function_call_arguments.done", "output_item.done"),
        *("custom_tool_call_input.delta", "custom_tool_call_input.done", "output_item.done"),
        "completed",
    ]
    one, two = response["output"]
    assert (one["type"], one["call_id"], one["arguments"]) == ("function_call", "c1", '{"a":1}')
    assert (two["type"], two["call_id"], two["input"]) == ("custom_tool_call", "c2", "x\ny")


PATCH = """\
*** Begin Patch
*** Update File: a.md
@@
-```
+"new" *** End Patch
*** End Patch"""
HEREDOC = f"apply_patch <<'EOF'\n{PATCH}\nEOF"


def custom_input(name, *pieces):
    """What the client is told that a custom tool was called with, streamed and whole."""
    first = ToolCall(0, "c1", name, pieces[0])
    calls = [first, *[ToolCall(0, "", "", piece) for piece in pieces[1:]], Finish("tool_calls")]
    tools = [{"type": "custom", "name": name}]
    frames = response_reply(tools=tools).frames_of(calls)
    (said,) = response_reply(tools=tools).fold(calls)["output"]
    told = [frame for frame in frames if frame["type"].startswith("response.custom_tool_call")]
    assert [frame.get("delta", frame.get("input")) for frame in told] == [said["input"]] * 2
    return said["input"]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(json_text({"input": PATCH}), id="input"),
        pytest.param(json_text({"patch": PATCH}), id="patch"),
        pytest.param(json_text({"command": ["apply_patch", PATCH]}), id="command"),
        pytest.param(json_text({"command": ["bash", "-lc", HEREDOC]}), id="a shell's command"),
        pytest.param(json_text({"input": HEREDOC}), id="heredoc"),
        pytest.param(json_text(PATCH), id="a JSON string"),
        pytest.param(PATCH, id="bare"),
        pytest.param(f"```diff\n{PATCH}\n```", id="a fence"),
        pytest.param(json_text({"input": f"Here:\n```\n{PATCH}\n```\n"}), id="a fence in JSON"),
        pytest.param(json_text({"input": {"patch": PATCH}}), id="an object as input"),
        pytest.param(json_text({"input": ["apply_patch", PATCH]}), id="an array as input"),
        pytest.param(json_text({"input": json_text({"input": PATCH})}), id="JSON in JSON"),
        pytest.param(json_text({"path": "a.md", "changes": [{"diff": PATCH}]}), id="deeper"),
    ],
)
def test_a_patch_is_found_in_whatever_a_model_wraps_it(arguments):
    assert custom_input("apply_patch", arguments) == PATCH


def test_a_patch_is_found_wherever_its_pieces_are_cut():
    arguments = json_text({"patch": PATCH})
    for at in range(len(arguments)):
        assert custom_input("apply_patch", arguments[:at], arguments[at:]) == PATCH


def test_a_patch_is_looked_for_in_linear_time():
    assert seconds_of(ztoapi.patch_in, "*** Begin Patch\n" * 2**16) < 0.5  # in quadratic time 30


TWO_PATCHES = f"{PATCH}\n{PATCH.replace('a.md', 'b.md')}"
CRLF = PATCH.replace("\n", "\r\n")


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        pytest.param(json_text({"input": f"{PATCH}\n"}), f"{PATCH}\n", id="a line's end"),
        pytest.param(json_text({"input": CRLF}), CRLF, id="Windows"),
        pytest.param(json_text({"input": TWO_PATCHES}), TWO_PATCHES, id="two"),
        pytest.param(
            json_text({"input": "*** Begin Patch\n+x"}), "*** Begin Patch\n+x", id="no end"
        ),
        pytest.param(json_text({"input": "```\nx\n```"}), "```\nx\n```", id="a fence without one"),
        pytest.param(json_text({"input": "x *** Begin Patch"}), "x *** Begin Patch", id="words"),
        pytest.param(json_text({"input": {"a": "好"}}), '{"a":"好"}', id="an object"),
        pytest.param(json_text({"input": None}), "", id="null"),
        pytest.param('{"file": "a.md"}', '{"file": "a.md"}', id="another object"),
        pytest.param('{"input": "*** Begin', '{"input": "*** Begin', id="broken off"),
    ],
)
def test_what_has_no_patch_in_it_stays_as_it_is(said, wanted):
    assert custom_input("apply_patch", said) == wanted


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        pytest.param(json_text({"input": "x\ny"}), "x\ny", id="a string"),
        pytest.param(json_text("x\ny"), "x\ny", id="a JSON string"),
        pytest.param("text('hi')", "text('hi')", id="bare"),
        pytest.param(
            json_text({"input": {"a": [True, None]}}), '{"a":[true,null]}', id="an object"
        ),
        pytest.param(json_text({"input": [1, "x"]}), '[1,"x"]', id="an array"),
        pytest.param(json_text({"input": 5}), "5", id="a number"),
        pytest.param(json_text({"input": True}), "true", id="a truth"),
        pytest.param('{"code": "x"}', '{"code": "x"}', id="another name"),
        pytest.param(json_text({"input": HEREDOC}), HEREDOC, id="a patch, but not of apply_patch"),
        pytest.param("", "", id="nothing"),
        pytest.param('{"input": "\ud83d"}', "\ud83d", id="half a character"),
    ],
)
def test_a_custom_tool_is_called_with_a_string(arguments, wanted):
    assert custom_input("exec", arguments) == wanted


def test_a_function_that_is_called_apply_patch_keeps_its_arguments():
    called = [ToolCall(0, "c1", "apply_patch", json_text({"patch": PATCH})), Finish("tool_calls")]
    _, response, _ = respond(called, tools=[NOW | {"name": "apply_patch"}])
    assert json.loads(response["output"][0]["arguments"]) == {"patch": PATCH}


def test_a_call_in_a_namespace_comes_back_with_name_and_namespace_apart():
    calls = [
        ToolCall(0, "c1", "mcp__w__get", "{}"),
        ToolCall(1, "c2", "mcp__w__say", '{"input":"hi"}'),
    ]
    _, response, _ = respond(
        [*calls, ToolCall(2, "c3", "mcp__x__get", "{}"), Finish("tool_calls")], tools=[NAMESPACE]
    )
    assert [(item["type"], item["name"], item.get("namespace")) for item in response["output"]] == [
        ("function_call", "get", "mcp__w"),
        ("custom_tool_call", "say", "mcp__w"),
        ("function_call", "mcp__x__get", None),
    ]


def test_citations_are_annotations_of_the_message():
    names, response, _ = respond([Text("x"), Citations((FOUND,)), Finish("stop")])
    assert "output_text.annotation.added" in names
    assert response["output"][0]["content"][0]["annotations"] == [{"type": "url_citation", **CITED}]


@pytest.mark.parametrize(
    ("reason", "why"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
def test_a_response_that_is_cut_short_says_so(reason, why):
    names, response, _ = respond([Text("x"), Finish(reason)])
    assert (names[-1], response["status"], response["completed_at"]) == (
        "incomplete",
        "incomplete",
        None,
    )
    assert response["incomplete_details"] == {"reason": why}


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("1302", "rate_limit_exceeded"),
        ("1113", "insufficient_quota"),
        ("1210", "invalid_prompt"),
        ("1261", "context_length_exceeded"),
        ("1230", "server_error"),
    ],
)
def test_a_response_that_breaks_off_has_failed(code, wanted):
    reply = response_reply()
    reply.feed(Text("x"))
    (frame,) = reply.fail(zai_error(400, b'{"error":{"code":"%s","message":"x"}}' % code.encode()))
    assert (frame["type"], frame["response"]["error"]["code"]) == ("response.failed", wanted)
    assert frame["response"]["completed_at"] is None
    early = response_reply().fail(BadRequest("no"))
    assert [frame["type"] for frame in early] == [
        "response.created",
        "response.in_progress",
        "response.failed",
    ]


@pytest.mark.parametrize(
    "events",
    [
        EVENTS,
        [CALLED, Finish("tool_calls")],
        [Text("x"), Citations((FOUND,)), Finish("length")],
        [Text("a"), CALLED, Text("b"), Citations((FOUND,)), Finish("stop")],
        [Finish("stop")],
    ],
)
def test_a_whole_response_is_the_last_of_its_events(events):
    _, streamed, _ = respond(events)
    assert response_reply().fold(events) == streamed


def test_the_calls_of_a_turn_are_joined_in_linear_time():
    call = Message("assistant", (), calls=(ToolCall(0, "c", "f", "{}"),))
    assert seconds_of(ztoapi.merge_assistant_turns, [call] * 2**16) < 0.5  # in quadratic time 3


TRIGGER = {"type": "compaction_trigger"}
TO_SUM_UP = [{"role": "user", "content": "hi"}, TRIGGER]


def test_a_trigger_asks_the_model_for_a_summary_and_for_nothing_else():
    fields = {
        "instructions": "Be kind.",
        "input": TO_SUM_UP,
        "tools": [NOW, {"type": "web_search"}],
        "tool_choice": {"type": "function", "name": "now"},
        "text": {"format": {"type": "json_object"}},
    }
    prompt, _ = ztoapi.parse_response(ASKED | fields, History())
    *before, order = prompt.messages
    assert before == [Message("system", ("Be kind.",)), Message("user", ("hi",))]
    assert (order.role, order.continues) == ("user", True)
    assert [tool.name for tool in prompt.tools] == ["now"]
    assert (prompt.native_tools, prompt.tool_choice, prompt.schema) == ((), ToolChoice(), None)
    assert prompt.ignored == ()


@pytest.mark.parametrize(
    "words",
    ["asked", "decided", "changed", "open", "names of files", "exactly as they are", "next step"],
)
def test_a_summary_is_asked_for_in_words_that_lose_nothing(words):
    assert words in ztoapi.COMPACTION_ORDER


@pytest.mark.parametrize(
    "items",
    [
        pytest.param([TRIGGER, {"role": "user", "content": "hi"}], id="before a message"),
        pytest.param([TRIGGER | {"type": "compaction"}], id="a summary"),
        pytest.param("compaction_trigger", id="text"),
        pytest.param([{"role": "user", "content": "hi", "x": TRIGGER}], id="inside"),
    ],
)
def test_what_does_not_end_in_a_trigger_is_no_compaction(items):
    _, reply = ztoapi.parse_response(ASKED | {"input": items}, History())
    assert type(reply) is ztoapi.ResponseReply


@pytest.mark.parametrize("items", [[], [TRIGGER], [TRIGGER, TRIGGER], [{"type": "new"}, TRIGGER]])
def test_where_nothing_was_said_there_is_nothing_to_sum_up(items):
    with pytest.raises(BadRequest, match="'input' is required"):
        parse_response(input=items)


def summary_of(words, name="compaction"):
    return {"type": name, "encrypted_content": ztoapi.encode_reasoning(words)}


SUMMED_UP = {"id": "cmp_ours_0", **summary_of("想: do it😀")}


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([Text("想: do it😀")], id="text"),
        pytest.param([Thought("hm"), Text("想"), Text(": do"), Text(" it😀")], id="in pieces"),
        pytest.param([Text("想: do it😀"), CALLED], id="and a call"),
        pytest.param([CALLED, Text("想: do it😀"), Citations((FOUND,))], id="and more"),
        pytest.param([Text("想: do"), Thought("hm"), Text(" it😀")], id="with a thought in it"),
    ],
)
def test_a_compaction_is_one_item_with_the_summary(events):
    events = [*events, Usage(5, 2, 7), Finish("stop")]
    names, response, store = respond(events, input=TO_SUM_UP)
    assert names == [
        *("created", "in_progress", "output_item.added", "output_item.done", "completed")
    ]
    assert (response["output"], response["object"]) == ([SUMMED_UP], "response")
    assert (response["status"], response["usage"]["total_tokens"]) == ("completed", 7)
    assert response_reply(input=TO_SUM_UP).fold(events) == response
    assert store["resp_ours"].input == [{"type": "message", **TO_SUM_UP[0]}]


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_summary_is_the_same_wherever_its_stream_is_cut(cut):
    words = "想: do it😀"
    events = [Text(words[:cut]), Text(words[cut:]), Finish("stop")]
    assert respond(events, input=TO_SUM_UP)[1]["output"] == [SUMMED_UP]


def test_a_summary_that_is_cut_short_says_so():
    names, response, _ = respond([Text("Do"), Finish("length")], input=TO_SUM_UP)
    assert (names[-1], response["status"]) == ("incomplete", "incomplete")
    assert [item["type"] for item in response["output"]] == ["compaction"]


@pytest.mark.parametrize(
    "events",
    [[], [Thought("hm")], [CALLED], [Text("\n"), Text(" ")], [Text("")]],
    ids=["nothing", "a thought", "a call", "blanks", "an empty text"],
)
def test_a_model_that_does_not_sum_up_has_failed(events):
    reply = response_reply(input=TO_SUM_UP)
    with pytest.raises(UpstreamError, match="did not sum up") as raised:
        reply.frames_of([*events, Finish("tool_calls")])
    assert raised.value.kind in ztoapi.SHOULD_RETRY
    assert reply.fail(raised.value)[-1]["type"] == "response.failed"


SUMMARY = Message("user", ("Summary of the conversation so far:", "Do it."), continues=True)
SECRET = Message("user", ("[earlier summary that only its maker can read]",), continues=True)


@pytest.mark.parametrize(
    ("item", "wanted", "ignored"),
    [
        pytest.param(summary_of("Do it."), SUMMARY, (), id="ours"),
        pytest.param(summary_of("Do it.", "compaction_summary"), SUMMARY, (), id="ours, of old"),
        pytest.param(
            summary_of("Do it.") | {"id": "cmp_1", "status": "completed"}, SUMMARY, (), id="with id"
        ),
        pytest.param(
            {"type": "compaction", "encrypted_content": "gAAAAABo"},
            SECRET,
            ("input.compaction",),
            id="OpenAI's",
        ),
        pytest.param(
            {"type": "compaction_summary", "encrypted_content": "gAAAAABo"},
            SECRET,
            ("input.compaction_summary",),
            id="OpenAI's, of old",
        ),
        pytest.param(
            {"type": "compaction", "encrypted_content": "ztoapi:%"},
            SECRET,
            ("input.compaction",),
            id="spoilt",
        ),
        pytest.param({"type": "compaction"}, SECRET, ("input.compaction",), id="without one"),
        pytest.param(
            {"type": "compaction", "encrypted_content": 5, "summary": "x"},
            SECRET,
            ("input.compaction",),
            id="no text",
        ),
    ],
)
def test_a_summary_that_comes_back_is_text(item, wanted, ignored):
    hi = {"role": "user", "content": "hi"}
    prompt = parse_response(input=[hi, item, hi])
    said = Message("user", ("hi",))
    assert (prompt.messages, prompt.ignored) == ((said, wanted, said), ignored)


def test_a_summary_that_comes_back_begins_no_turn():
    picture = [{"type": "input_image", "image_url": "https://x"}]
    prompt = parse_response(input=[user_item(picture), summary_of("Do it.")])
    assert ztoapi.user_shows_media(prompt.messages)


def test_what_follows_a_stored_compaction_begins_with_its_summary():
    summed_up = ztoapi.StoredResponse({"output": [SUMMED_UP]}, [user_item("a")], "resp_gone")
    answered = ztoapi.StoredResponse(
        {"output": [user_item("c", "assistant")]}, [user_item("b")], "resp_1"
    )
    store = History(resp_1=summed_up, resp_2=answered)
    body = ASKED | {"input": "d", "previous_response_id": "resp_2"}
    prompt, _ = ztoapi.parse_response(body, store)
    assert [message.content[-1] for message in prompt.messages] == ["想: do it😀", *"bcd"]


def test_a_request_for_a_summary_alone_is_answered_with_it_alone():
    prompt, reply = ztoapi.parse_compaction(ASKED, History())
    assert prompt.messages[-1].content == (ztoapi.COMPACTION_ORDER,)
    assert begun(reply).fold([Text("想: do it😀"), Usage(5, 2, 7), Finish("stop")]) == {
        "object": "response.compaction",
        "id": "resp_ours",
        "created_at": 1760762344,
        "output": [SUMMED_UP],
        "usage": ztoapi.response_usage(Usage(5, 2, 7)),
    }
    assert (reply.stored, prompt.stream) == (None, False)


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        pytest.param({"model": "glm-4.6", "input": "a" * 100}, 28, id="text"),
        pytest.param({"input": "a" * 100}, 28, id="no model"),
        pytest.param({"model": None, "input": [user_item("汉" * 100)]}, 75, id="items"),
        pytest.param({"input": "a" * 50, "instructions": "b" * 50}, 28, id="instructions"),
        pytest.param({"instructions": "a" * 100}, 28, id="no input"),
        pytest.param({"tools": [NOW | {"description": "d" * 80}]}, 28, id="a tool"),
        pytest.param(
            {"input": [user_item([{"type": "input_image", "image_url": "https://x"}])]},
            1000,
            id="an image",
        ),
        pytest.param(
            {"input": "a" * 100, "temperature": 9, "tool_choice": DRAW, "max_output_tokens": 0},
            28,
            id="what else it asks for",
        ),
        pytest.param({}, 0, id="nothing"),
    ],
)
def test_the_tokens_of_a_response_are_estimated(body, tokens):
    prompt = ztoapi.parse_counted_response(body, History())
    assert ztoapi.estimated_tokens(prompt) == tokens


def test_a_response_is_remembered_with_the_whole_conversation():
    _, response, store = respond(EVENTS)
    body = {"model": "glm-4.6", "input": "and?", "previous_response_id": response["id"]}
    assert ztoapi.parse_response(body, store)[0].messages == (
        Message("user", ("你好",)),
        Message("assistant", ("你好",), "hm"),
        Message("user", ("and?",)),
    )
    assert respond(EVENTS, store=False)[2] == {}


def test_a_response_stores_its_own_items_and_where_they_go_on_from():
    store = History(
        resp_1=ztoapi.StoredResponse({"output": [user_item("b", "assistant")]}, [user_item("a")]),
        resp_2=ztoapi.StoredResponse(
            {"output": [user_item("d", "assistant")]}, [user_item("c")], "resp_1"
        ),
    )
    reply = response_reply(store, input="e", previous_response_id="resp_2")
    reply.fold([Text("f"), Finish("stop")])
    assert reply.stored.input == [{"type": "message"} | user_item("e")]
    assert reply.stored.parent == "resp_2"
    store["resp_3"] = reply.stored
    body = ASKED | {"input": "g", "previous_response_id": "resp_3"}
    prompt, _ = ztoapi.parse_response(body, store)
    assert [message.content[0] for message in prompt.messages] == list("abcdefg")
    del store["resp_1"]
    with pytest.raises(BadRequest, match="not stored"):
        ztoapi.parse_response(body, store)


JUNK = "junk" * 500


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"junk": JUNK}, id="an unknown field"),
        pytest.param({"user": JUNK}, id="a user"),
        pytest.param({"prompt_cache_key": JUNK}, id="a cache key"),
        pytest.param({"reasoning": {"effort": "low", "x": JUNK}}, id="reasoning"),
        pytest.param({"reasoning": {"summary": JUNK}}, id="a summary"),
        pytest.param({"text": {"x": JUNK, "verbosity": JUNK}}, id="text"),
        pytest.param({"text": {"format": {"type": "text", "x": JUNK}}}, id="a format"),
        pytest.param({"tools": [{"type": "computer", "x": JUNK}]}, id="OpenAI's tool"),
        pytest.param({"tools": [{"type": "function", "name": "f", "x": JUNK}]}, id="a function"),
        pytest.param({"tools": [{"type": "custom", "name": "f", "x": JUNK}]}, id="a custom tool"),
        pytest.param({"tools": [{"type": "web_search", "x": JUNK}]}, id="a search"),
        pytest.param({"tools": [TOOL_SEARCH | {"x": JUNK}]}, id="a search of tools"),
        pytest.param({"tools": [{"type": "function", "name": "f", "strict": JUNK}]}, id="strict"),
        pytest.param(
            {"tools": [{"type": "custom", "name": "f", "format": {"syntax": JUNK, "x": JUNK}}]},
            id="a grammar",
        ),
        pytest.param({"tools": [NAMESPACE | {"x": JUNK, "description": JUNK}]}, id="a namespace"),
        pytest.param(
            {
                "tools": [NAMESPACE],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "x": JUNK,
                    "tools": [{"name": "get", "namespace": "mcp__w", "x": JUNK}],
                },
            },
            id="a choice",
        ),
        *(
            pytest.param({"input": [user_item("x"), item]}, id=f"an item: {name}")
            for name, item in {
                "a message": user_item("x") | {"x": JUNK, "id": JUNK},
                "of any type": user_item("x") | {"type": 5, "x": JUNK},
                "a part": user_item([{"type": "input_text", "text": "x", "x": JUNK}]),
                "a picture": user_item(
                    [{"type": "image_url", "image_url": {"url": "u", "x": JUNK}}]
                ),
                "reasoning": {"type": "reasoning", "encrypted_content": JUNK, "summary": []},
                "skipped": {"type": "web_search_call", "x": JUNK},
                "unknown": {"type": "never_heard_of", "x": JUNK},
                "tools": {"type": "additional_tools", "tools": [{"type": "computer", "x": JUNK}]},
                "a search": SEARCHED | {"x": JUNK},
                "a summary": {"type": "compaction", "encrypted_content": JUNK},
                "a summary of ours": summary_of("x") | {"x": JUNK},
                "found tools": FOUND_TOOLS | {"tools": [NOW | {"x": JUNK}], "x": JUNK},
                "a PDF": user_item(
                    [{"type": "input_file", "filename": "a.pdf", "file_data": f"%PDF-{JUNK}"}]
                ),
                "a secret": user_item([{"type": "redacted_thinking", "data": JUNK}]),
                "a call": {"type": "function_call", "call_id": "c", "name": "f", "x": JUNK},
                "an output": {
                    "type": "function_call_output",
                    "call_id": "c",
                    "output": "x",
                    "x": JUNK,
                },
            }.items()
        ),
    ],
)
def test_what_no_model_reads_is_not_stored(fields):
    reply = response_reply(None, **fields)
    reply.fold([Text("x"), Finish("stop")])
    assert JUNK not in json.dumps([reply.stored.response, reply.stored.input])


def test_a_previous_response_that_is_not_there_is_named():
    with pytest.raises(BadRequest) as raised:
        ztoapi.parse_response(ASKED | {"previous_response_id": "resp_gone"}, History())
    assert (raised.value.kind.code, raised.value.param) == (
        "previous_response_not_found",
        "previous_response_id",
    )


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, ("", ())),
        ({"previous_response_id": "resp_1"}, ("resp_1", ())),
        ({"previous_response_id": "resp_\ud800"}, ("", ())),
        ({"previous_response_id": "resp_\x00"}, ("", ())),
        (
            {
                "input": [
                    {"type": "item_reference", "id": "msg_2_0"},
                    {"type": "item_reference", "id": "fc_2_1"},
                ]
            },
            ("", ("resp_2",)),
        ),
        (
            {
                "input": [{"type": "item_reference"}, 1, {"id": "msg_3_0"}],
                "previous_response_id": 5,
            },
            ("5", ("resp_",)),
        ),
    ],
)
def test_the_responses_that_a_request_refers_to_are_known_before_it_is_parsed(fields, wanted):
    assert ztoapi.responses_named_in(fields) == wanted


@pytest.mark.parametrize(
    ("query", "wanted", "more"),
    [
        ({}, ["fc_1", "resp_ours_input_1", "resp_ours_input_0"], False),
        ({"order": "asc", "limit": "2"}, ["resp_ours_input_0", "resp_ours_input_1"], True),
        ({"after": "fc_1", "limit": "1"}, ["resp_ours_input_1"], True),
        ({"after": "resp_ours_input_0"}, [], False),
        (
            {"after": "gone", "limit": "many"},
            ["fc_1", "resp_ours_input_1", "resp_ours_input_0"],
            False,
        ),
    ],
)
def test_the_input_of_a_response_is_listed_in_pages(query, wanted, more):
    call = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}"}
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}, call]
    page = ztoapi.input_items("resp_ours", said, query)
    assert [item["id"] for item in page["data"]] == wanted
    ends = (wanted[0], wanted[-1]) if wanted else (None, None)
    assert (page["first_id"], page["last_id"], page["has_more"]) == (*ends, more)


def test_an_item_of_the_input_is_listed_with_all_its_keys():
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x", "id": None}]
    assert ztoapi.input_items("resp_1", said, {"order": "asc"})["data"] == [
        {
            "id": f"resp_1_input_{i}",
            "type": "message",
            "role": role,
            "content": [{"type": kind, "text": text}],
        }
        for i, (role, kind, text) in enumerate(
            [("user", "input_text", "hi"), ("assistant", "output_text", "x")]
        )
    ]


ODD_VALUES = [
    *(None, 5, True, "x", "", [], {}, {"a": 1}, ["x"], "gAAAABx", "\ud83d"),
    [{"type": "input_text", "text": "t"}],
    [{"type": "encrypted_content", "encrypted_content": "do"}],
    [NOW, NAMESPACE, DRAW],
    ztoapi.encode_reasoning("t"),
]
ODD_FIELDS = [
    *("content", "name", "namespace", "arguments", "input", "tools", "execution", "summary"),
    *("encrypted_content", "action", "operation", "status", "author", "server_label", "tool_calls"),
]


def random_items(chance):
    """Items of every type but the one that asks for a summary, with fields of any."""
    skipped = sorted(ztoapi.SKIPPED_ITEMS - {"compaction_trigger"})
    kinds = [*ztoapi.ITEM_READERS, *skipped, "never_heard_of", None, 5]
    for _ in range(chance.randrange(1, 7)):
        item = {name: chance.choice(ODD_VALUES) for name in chance.sample(ODD_FIELDS, 6)}
        role, output = chance.choice([*ztoapi.ROLES]), chance.choice(["o", {"a": 1}, None])
        more = {"role": role, "output": output, "call_id": chance.choice(["c1", "c2"])}
        yield item | more | {"type": chance.choice(kinds)}


@pytest.mark.parametrize("seed", range(200))
def test_any_items_are_a_conversation_that_zai_takes_or_a_400(seed):
    chance = random.Random(seed)
    tools = chance.sample([NOW, NAMESPACE, TOOL_SEARCH, HOSTED_SEARCH, DRAW], 2)
    choice = chance.choice(["auto", "required", "none", allowed("auto", *tools), tools[0]])
    fields = {"input": [*random_items(chance)], "tools": tools, "tool_choice": choice}
    sent = json.dumps(fields)
    with contextlib.suppress(BadRequest):
        prompt = parse_response(**fields)
        plan = ztoapi.make_plan(prompt, Settings(), Account(""), "7")
        model, planned = plan.prompts[0]
        assert zai_body(planned, model)["messages"]
    assert json.dumps(fields) == sent


GOLDEN = PROGRAM.parent / ".ci" / "golden"


def golden(name):
    """Requests of a real client, its words replaced, with what Z.ai must get of each."""
    cases = json.loads((GOLDEN / f"{name}.json").read_text())
    return [pytest.param(case, id=case["name"]) for case in cases]


@pytest.mark.parametrize("case", golden("codex"))
def test_what_codex_sends_reaches_zai_as_it_must(case):
    prompt, _ = ztoapi.parse_response(case["asked"], History())
    renamed = Settings(model_aliases=(("gpt-*", "glm-5.3"),))
    plan = ztoapi.make_plan(prompt, renamed, Account(""), "7")
    model, planned = plan.prompts[0]
    assert (zai_body(planned, model), list(plan.ignored)) == (case["sent"], case["ignored"])


def test_the_cache_of_a_conversation_serves_its_compaction_too():
    (asked,) = [case.values[0]["asked"] for case in golden("codex") if case.id == "a compaction"]
    prompt, _ = ztoapi.parse_response(asked, History())
    before, _ = ztoapi.parse_response(asked | {"input": asked["input"][:-1]}, History())
    assert (prompt.messages[:-1], prompt.tools) == (before.messages, before.tools)


# ======== Contents ========


def read(role, content, **fields):
    return ztoapi.read_message({"role": role, "content": content, **fields}, "messages[0]")


def in_base64(text):
    return base64.b64encode(text.encode()).decode()


SKY = Media("image_url", "https://x/sky.png")
USES_F = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}
CALLS_F = ToolCall(0, "t1", "f", '{"a":1}')


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        ({"type": "text", "text": "a"}, ("a",)),
        ({"type": "input_text", "text": "a"}, ("a",)),
        ({"type": "output_text", "text": "a", "annotations": []}, ("a",)),
        ({"type": "text", "text": None}, ()),
        ({"type": "text", "text": {"a": 1}}, ('{"a":1}',)),
        ({"type": "refusal", "refusal": "no"}, ("no",)),
        ({"text": "a"}, ("a",)),
        ("a", ("a",)),
        ("", ()),
        (None, ()),
        (7, ("7",)),
        (["a", 1], ('["a",1]',)),
        ({"type": "hologram", "depth": 3}, ('{"type":"hologram","depth":3}',)),
        ({"type": ["text"]}, ('{"type":["text"]}',)),
        ({"type": "image_url", "image_url": {"url": SKY.url, "detail": "low"}}, (SKY,)),
        ({"type": "image_url", "image_url": SKY.url}, (SKY,)),
        ({"type": "input_image", "image_url": SKY.url}, (SKY,)),
        ({"type": "input_image", "image_url": {"url": SKY.url}}, (SKY,)),
        ({"type": "image", "source": {"type": "url", "url": SKY.url}}, (SKY,)),
        (
            {"type": "image", "source": {"media_type": "image/png", "data": "QUJD"}},
            (Media("image_url", "data:image/png;base64,QUJD"),),
        ),
        ({"type": "video_url", "video_url": {"url": "https://x"}}, (Media("video_url", "https://x"),)),
        ({"type": "redacted_thinking", "data": "?"}, ()),
        ({"type": "encrypted_content", "encrypted_content": "?"}, ()),
        ({"type": "thinking", "thinking": "hm"}, ('{"type":"thinking","thinking":"hm"}',)),
        ({"type": "tool_use", "name": "f"}, ('{"type":"tool_use","name":"f"}',)),
    ],
)  # fmt: skip
def test_a_part_of_any_api_is_read(part, wanted):
    assert read("user", [part]) == [Message("user", wanted)]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        pytest.param(None, (), id="null"),
        pytest.param({"a": 1}, ('{"a":1}',), id="an object"),
        pytest.param({"type": "text", "text": "a"}, ("a",), id="one part"),
        pytest.param([{"a": 1}, {"b": 2}], ('{"a":1}', '{"b":2}'), id="objects"),
        pytest.param(["a", "b"], ("a", "b"), id="texts"),
        pytest.param([], (), id="an empty array"),
        pytest.param(0, ("0",), id="a number"),
        pytest.param(
            [{"type": "file", "path": "a.py"}, {"type": "text", "value": "x"}],
            ('{"type":"file","path":"a.py"}', '{"type":"text","value":"x"}'),
            id="objects that only look like parts",
        ),
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_any_json_is_a_content(role, content, wanted):
    assert read(role, content) == [Message(role, wanted)]


@pytest.mark.parametrize(
    ("url", "within_reach"),
    [
        ("https://x/y.png", True),
        ("http://8.8.8.8/y.png", True),
        ("data:image/png;base64,QUJD", True),
        ("DATA:image/png;charset=x;BASE64,QUJD", True),
        ("QUJD", True),
        ("", False),
        (" ", False),
        (None, False),
        ({}, False),
        ("data:image/png;base64,", False),
        ("data:image/svg+xml,<svg>", False),
        ("blob:https://x/1", False),
        ("file:///home/me/a.png", False),
        ("https:///y.png", False),
        ("https://[y.png", False),
        ("http://localhost:3000/y.png", False),
        ("http://app.localhost/y.png", False),
        ("http://nas.local/y.png", False),
        ("http://127.0.0.1/y.png", False),
        ("http://[::1]/y.png", False),
        ("http://192.168.1.2/y.png", False),
        ("http://10.0.0.1/y.png", False),
        ("http://169.254.0.1/y.png", False),
    ],
)
def test_an_image_must_be_where_zai_can_load_it(url, within_reach):
    part = {"type": "image_url", "image_url": {"url": url}}
    out_of_reach = ztoapi.Unreadable(
        "image", "", ztoapi.SEND_IMAGE, "messages[0].content[0].image_url.url"
    )
    wanted = Media("image_url", url) if within_reach else out_of_reach
    assert read("user", [part]) == [Message("user", (wanted,))]


def test_a_long_image_is_read_in_linear_time():
    part = {"type": "image_url", "image_url": {"url": "A" * 2**24}}
    assert seconds_of(read, "user", [part]) < 0.5


PDF = "data:application/pdf;base64," + in_base64("%PDF-1.7")


def unreadable(name, advice, at="messages[0].content[0]"):
    return ztoapi.Unreadable("file", name, advice, at)


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        pytest.param(
            {"type": "file", "file": {"filename": "a.py", "file_data": "data:text/x-python;base64," + in_base64("1 + 1")}},
            ("a.py\n1 + 1",),
            id="Chat's source code",
        ),
        pytest.param(
            {"type": "input_file", "filename": "a.json", "file_data": "data:application/json;base64," + in_base64("{}")},
            ("a.json\n{}",),
            id="Responses' JSON",
        ),
        pytest.param(
            {"type": "file", "file": {"file_data": in_base64("\ufeff好")}}, ("好",), id="no name, no type"
        ),
        pytest.param(
            {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "d"}},
            ("T\nd",),
            id="Anthropic's text",
        ),
        pytest.param(
            {"type": "document", "source": {"type": "base64", "media_type": "text/csv", "data": in_base64("a,b")}},
            ("a,b",),
            id="Anthropic's base64",
        ),
        pytest.param(
            {"type": "document", "title": "T", "source": {"type": "content", "content": [{"type": "text", "text": "d"}]}},
            ("T", "d"),
            id="Anthropic's blocks",
        ),
        pytest.param(
            {"type": "file", "file": {"filename": "a.png", "file_data": "data:image/png;base64,QUJD"}},
            (Media("image_url", "data:image/png;base64,QUJD"),),
            id="an image",
        ),
        pytest.param(
            {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}},
            (unreadable("a.pdf", ztoapi.SEND_TEXT),),
            id="PDF",
        ),
        pytest.param(
            {"type": "document", "source": {"type": "base64", "media_type": "application/zip", "data": "AAAA"}},
            (unreadable("", ztoapi.SEND_TEXT),),
            id="NUL",
        ),
        pytest.param(
            {"type": "input_file", "filename": "a", "file_data": "//8="},
            (unreadable("a", ztoapi.SEND_TEXT),),
            id="no UTF-8",
        ),
        pytest.param(
            {"type": "input_file", "filename": "a", "file_data": "no base64"},
            (unreadable("a", ztoapi.SEND_TEXT),),
            id="no base64",
        ),
        pytest.param(
            {"type": "file", "file": {"file_id": "f1"}}, (unreadable("", ztoapi.SEND_DATA),), id="an id"
        ),
        pytest.param(
            {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}},
            (unreadable("audio", ztoapi.SEND_TRANSCRIPT),),
            id="audio",
        ),
    ],
)  # fmt: skip
def test_a_file_whose_data_is_text_is_its_text_with_its_name_above(part, wanted):
    assert read("user", [part]) == [Message("user", wanted)]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"content": "x", "reasoning_content": "hm"}, Message("assistant", ("x",), "hm")),
        ({"content": "x", "reasoning": "hm"}, Message("assistant", ("x",), "hm")),
        ({"content": "x", "reasoning_content": 5}, Message("assistant", ("x",))),
        (
            {"content": "x", "reasoning_details": [{"text": "h"}, {"data": "?"}, {"text": "m"}]},
            Message("assistant", ("x",), "hm"),
        ),
        (
            {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "x"}]},
            Message("assistant", ("x",), "hm"),
        ),
        (
            {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, "x"]},
            Message("assistant", ("x",), "hm"),
        ),
        (
            {"content": [{"type": "reasoning", "text": "h"}, {"type": "reasoning", "summary": [{"text": "m"}]}]},
            Message("assistant", (), "hm"),
        ),
        (
            {"content": [{"type": "thinking", "thinking": "other"}], "reasoning_content": "hm"},
            Message("assistant", (), "hm"),
        ),
    ],
    ids=["field", "gateways' field", "no text", "OpenRouter", "Anthropic", "Mistral", "others", "both"],
)  # fmt: skip
def test_reasoning_is_read_wherever_it_stands(fields, wanted):
    assert read("assistant", **{"content": None, **fields}) == [wanted]


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (CALL, ToolCall(0, "c1", "f", '{"a":1}')),
        ({"id": "c1", "name": "f", "args": {"a": 1}}, ToolCall(0, "c1", "f", '{"a":1}')),
        ({"id": "c1", "type": "custom", "custom": {"name": "f", "input": "x"}}, ToolCall(0, "c1", "f", '{"input":"x"}')),
        ({"id": "c1", "function": {"name": None}}, ToolCall(0, "c1", "", "{}")),
        ({"id": 0, "function": {"name": "f"}}, ToolCall(0, "0", "f", "{}")),
        ({"function": {"name": "f", "arguments": None}}, ToolCall(0, "call_0", "f", "{}")),
        (5, ToolCall(0, "call_0", "", "{}")),
    ],
)  # fmt: skip
def test_a_call_of_any_shape_is_read(call, wanted):
    assert read("assistant", None, tool_calls=[call]) == [Message("assistant", (), calls=(wanted,))]


@pytest.mark.parametrize(
    ("role", "listed"),
    [("user", True), ("assistant", True), ("system", True), ("tool", True), ("function", False)],
)
def test_a_name_that_is_dropped_is_listed(role, listed):
    ignored = read_chat(message(role=role, content="x", name="f")).ignored
    assert ignored == (("messages.name",) if listed else ())


@pytest.mark.parametrize("calls", [5, "x", [], None, {}])
def test_calls_that_are_none_are_no_reason_to_refuse_a_message(calls):
    assert all(not call.name for call in read("assistant", "x", tool_calls=calls)[0].calls)


def test_a_use_of_a_tool_is_a_call_once():
    assert read("assistant", ["x", USES_F]) == [Message("assistant", ("x",), calls=(CALLS_F,))]
    known = {"id": "t1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    (message,) = read("assistant", [USES_F, USES_F | {"id": "t2"}], tool_calls=[known])
    assert [(call.id, call.arguments) for call in message.calls] == [
        ("t1", '{"a": 1}'),
        ("t2", '{"a":1}'),
    ]


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        ({"content": "42"}, ("42",)),
        ({"content": [{"type": "text", "text": "42"}, {"type": "image", "source": {"url": SKY.url}}]}, ("42", SKY)),
        ({}, ()),
        ({"content": "no such file", "is_error": True}, ("Error: no such file",)),
        ({"content": "Error: no such file", "is_error": True}, ("Error: no such file",)),
    ],
)  # fmt: skip
def test_the_result_of_a_tool_may_stand_in_a_users_message(part, wanted):
    result = {"type": "tool_result", "tool_use_id": "t1", **part}
    told = Message("tool", wanted, call_id="t1")
    assert read("user", [result]) == read("tool", [result]) == [told]
    assert read("user", ["go on", result]) == [told, Message("user", ("go on",), continues=True)]
    said = Message("assistant", ("x",), calls=(CALLS_F,))
    assert read("assistant", ["x", USES_F, result]) == [said, told]


def test_the_result_of_a_tool_in_a_system_message_is_its_text():
    part = {"type": "tool_result", "content": "42"}
    assert read("system", [part]) == [Message("system", (json_text(part),))]


@pytest.mark.parametrize(
    ("fields", "call_id"),
    [
        ({"tool_call_id": "c1", "name": "f"}, "c1"),
        ({"tool_call_id": 7}, "7"),
        ({"tool_call_id": "", "name": "f"}, "f"),
        ({"tool_name": "f"}, "f"),
        ({}, ""),
    ],
)
def test_a_result_names_its_call_or_the_function(fields, call_id):
    assert read("tool", "42", **fields) == [Message("tool", ("42",), call_id=call_id)]


# ======== Messages: the request ========


def turn(content, role="user"):
    return {"role": role, "content": content}


def text_block(text):
    return {"type": "text", "text": text}


def reminder(text):
    return f"<system-reminder>\n{text}\n</system-reminder>"


CLAUDE = {
    "model": "claude-opus-5",
    "max_tokens": 9_000,
    "messages": [{"role": "user", "content": "你好"}],
}


def plan_of_message(body, **settings):
    """The plan for a request, `body` added to CLAUDE."""
    given = {"model_aliases": (("claude-*", "glm-4.6"),)} | settings
    prompt, _ = ztoapi.parse_message(CLAUDE | body)
    return ztoapi.make_plan(prompt, Settings(**given), Account(""), "7")


def asked_of_zai(body, **settings):
    """What Z.ai gets of a request of Anthropic's API, without what every request has."""
    model, prompt = plan_of_message(body, **settings).prompts[0]
    sent = zai_body(prompt, model)
    return {name: value for name, value in sent.items() if name not in ("model", "stream")}


def turns_for_zai(*turns):
    return asked_of_zai({"messages": list(turns)})["messages"]


PICTURE_BLOCK = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"},
}
CACHED = {"cache_control": {"type": "ephemeral"}}
TOOL_RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "42"}
USE = turn([{"type": "tool_use", "id": "t1", "name": "f", "input": {}}], "assistant")
ZAI_USE = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
ZAI_RESULT = {"role": "tool", "content": "42", "tool_call_id": "t1"}


@pytest.mark.parametrize(
    ("turns", "wanted"),
    [
        pytest.param(
            [turn("hi"), turn("a", "system")], [turn(f"hi\n{reminder('a')}")], id="behind"
        ),
        pytest.param(
            [turn("a", "system"), turn([text_block("hi")])],
            [turn(f"{reminder('a')}\nhi")],
            id="before",
        ),
        pytest.param(
            [turn("hi"), turn([text_block("a"), text_block("b") | CACHED], "system"), turn("c", "system")],
            [turn("\n".join(["hi", reminder("a"), reminder("b"), reminder("c")]))],
            id="several",
        ),
        pytest.param(
            [turn("hi"), turn("yes", "assistant"), turn("a", "system")],
            [turn("hi"), turn("yes", "assistant"), turn(reminder("a"))],
            id="none beside it",
        ),
        pytest.param(
            [USE, turn("a", "system"), turn([TOOL_RESULT])],
            [ZAI_USE, ZAI_RESULT, turn(reminder("a"))],
            id="before results",
        ),
        pytest.param([turn("hi"), turn("there")], [turn("hi"), turn("there")], id="no system message"),
    ],
)  # fmt: skip
def test_a_system_message_among_the_others_is_a_reminder_in_the_users_turn(turns, wanted):
    assert turns_for_zai(*turns) == wanted


def test_a_reminder_begins_no_turn():
    use = plan_of_message(
        {"messages": [turn("hi"), USE, turn([TOOL_RESULT]), turn("a", "system")]}
    ).prompts[0][1]
    assert ztoapi.turn_start(use.messages) == 1


@pytest.mark.parametrize(
    ("system", "wanted"),
    [
        pytest.param("Be kind.", "Be kind.", id="text"),
        pytest.param([text_block("a") | CACHED, text_block("b")], "a\n\nb", id="blocks"),
        pytest.param(
            [text_block("x-anthropic-billing-header: cc=1; cch=9;"), text_block("b")],
            "b",
            id="billing header",
        ),
        pytest.param([text_block("a"), text_block("")], "a", id="an empty block"),
    ],
)
def test_the_system_prompt_is_one_message(system, wanted):
    assert asked_of_zai({"system": system})["messages"] == [
        {"role": "system", "content": wanted},
        turn("你好"),
    ]


def test_no_system_prompt_is_no_message():
    for system in ("", [], [text_block("x-anthropic-billing-header: x")], None):
        assert asked_of_zai({"system": system})["messages"] == [turn("你好")]


def result_of(content, **more):
    return turn([{"type": "tool_result", "tool_use_id": "t1", "content": content, **more}])


FOUND_BLOCK = {
    "type": "web_search_result",
    "url": "https://x/y",
    "title": "T",
    "encrypted_content": in_base64("Sunny."),
    "page_age": None,
}


@pytest.mark.parametrize(
    ("block", "wanted"),
    [
        (text_block("hi"), "hi"),
        ({"type": "document", "title": "a.py", "source": {"type": "text", "media_type": "text/plain", "data": "x = 1"}}, "a.py\nx = 1"),
        ({"type": "document", "source": {"type": "base64", "media_type": "text/csv", "data": in_base64("a,b")}}, "a,b"),
        ({"type": "document", "source": {"type": "content", "content": [text_block("c")]}}, "c"),
        ({"type": "search_result", "title": "T", "source": "https://x", "content": [text_block("c")]}, "T\nhttps://x\nc"),
        ({"type": "tool_reference", "tool_name": "Read"}, "Tool Read is now available."),
        ({"type": "web_search_tool_result", "tool_use_id": "s", "content": [FOUND_BLOCK]}, "T\nhttps://x/y\nSunny."),
        ({"type": "web_search_tool_result", "tool_use_id": "s", "content": {"type": "web_search_tool_result_error", "error_code": "unavailable"}}, '{"type":"web_search_tool_result_error","error_code":"unavailable"}'),
    ],
    ids=["text", "document", "document in base64", "document of blocks", "search result", "tool reference", "web search", "failed web search"],
)  # fmt: skip
def test_blocks_are_read_as_the_text_that_they_bring(block, wanted):
    assert turns_for_zai(turn([block])) == [turn(wanted)]
    assert turns_for_zai(turn("hi"), USE, result_of([block]))[2]["content"] == wanted


@pytest.mark.parametrize(
    ("content", "error", "wanted"),
    [
        pytest.param("42", False, "42", id="text"),
        pytest.param([text_block("4"), text_block("2")], False, "4\n2", id="blocks"),
        pytest.param("no such file", True, "Error: no such file", id="error"),
        pytest.param("Error: no", True, "Error: no", id="error that says so"),
        pytest.param(None, True, "Error:", id="error without words"),
        pytest.param([], False, "(no output)", id="empty"),
        pytest.param(None, False, "(no output)", id="absent"),
    ],
)
def test_results_of_tools_are_texts(content, error, wanted):
    assert turns_for_zai(turn("hi"), USE, result_of(content, is_error=error))[2] == {
        "role": "tool",
        "content": wanted,
        "tool_call_id": "t1",
    }


@pytest.mark.parametrize(
    ("block", "thought"),
    [
        ({"type": "thinking", "thinking": "hm", "signature": "any"}, "hm"),
        ({"type": "thinking", "thinking": "", "signature": ztoapi.encode_reasoning("hm")}, "hm"),
        ({"type": "thinking", "thinking": "", "signature": "ztoapi:?"}, None),
        ({"type": "redacted_thinking", "data": "x"}, None),
    ],
    ids=["shown", "omitted", "spoilt", "redacted"],
)
def test_thinking_that_comes_back_is_reasoning(block, thought):
    said = turns_for_zai(turn("hi"), turn([block, text_block("yes")], "assistant"), turn("go"))[1]
    assert (said["content"], said.get("reasoning_content")) == ("yes", thought)


def test_a_search_that_comes_back_is_what_it_found():
    use = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}}
    found = {"type": "web_search_tool_result", "tool_use_id": "s", "content": [FOUND_BLOCK]}
    said = turn([text_block("It is sunny."), use, found], "assistant")
    assert turns_for_zai(turn("hi"), said)[1] == {
        "role": "assistant",
        "content": "It is sunny.\nT\nhttps://x/y\nSunny.",
    }


def test_images_of_messages_are_for_models_that_see():
    source = {"type": "base64", "media_type": "image/png", "data": "QUJD"}
    image, at = {"type": "image", "source": source}, {"type": "url", "url": "https://x/a.png"}
    content = [text_block("?"), image, {"type": "image", "source": at}]
    (said,) = asked_of_zai({"model": "glm-4.6v", "messages": [turn(content)]})["messages"]
    urls = [part["image_url"]["url"] for part in said["content"][1:]]
    assert urls == ["QUJD", "https://x/a.png"]
    with pytest.raises(BadRequest, match="does not take images"):
        asked_of_zai({"messages": [turn(content)]})
    shown = turns_for_zai(turn("hi"), USE, result_of([image]))[2]
    assert shown["content"].startswith("[image: not shown to glm-4.6")


def test_a_block_of_an_unknown_type_is_left_out_and_listed():
    new = {"type": "tool_addition", "tool": {"type": "tool_definition"}}
    body = {"messages": [turn("a", "system"), turn([new, text_block("hi")]), turn([new], "system")]}
    plan = plan_of_message(body)
    assert plan.ignored == ("content.tool_addition",)
    assert [message.role for message in plan.prompts[0][1].messages] == ["user"]


def test_a_last_turn_of_the_assistants_stays_one():
    assert turns_for_zai(turn("1, 2,"), turn("3,", "assistant"))[-1] == turn("3,", "assistant")


ASKS_TO_THINK, NOT = {"thinking": {"type": "enabled"}}, {"thinking": {"type": "disabled"}}
ADAPTIVE = {"thinking": {"type": "adaptive"}}
WITH_TOOLS = {"tools": [{"name": "f", "input_schema": {}}], "max_tokens": 100}


def budget(tokens):
    return {"thinking": {"type": "enabled", "budget_tokens": tokens}}


def wanting(effort):
    return {"output_config": {"effort": effort}}


@pytest.mark.parametrize(
    ("body", "always", "switch"),
    [
        pytest.param(budget(4_096), "low", "enabled", id="a small budget"),
        pytest.param(budget(16_384), "high", "enabled", id="a budget"),
        pytest.param(budget(16_385), "max", "enabled", id="a large budget"),
        pytest.param(ASKS_TO_THINK, None, "enabled", id="no budget"),
        pytest.param(budget(100) | wanting("max"), "max", "enabled", id="an effort before the budget"),
        pytest.param(ADAPTIVE, None, None, id="adaptive"),
        pytest.param({"thinking": {"type": "between_tools"}}, None, None, id="between tools"),
        pytest.param(ADAPTIVE | wanting("low"), "low", "enabled", id="adaptive with an effort"),
        pytest.param({"thinking": {"type": "disabled"}} | wanting("max"), "low", "disabled", id="disabled"),
        pytest.param({"max_tokens": 8_192}, None, None, id="not asked, with room"),
        pytest.param({"max_tokens": 8_191}, "low", "disabled", id="not asked, without room"),
        pytest.param(WITH_TOOLS, None, None, id="not asked, with tools"),
        pytest.param(wanting("max") | {"max_tokens": 100}, "low", "disabled", id="an effort alone"),
    ],
)  # fmt: skip
def test_thinking_is_asked_for_as_the_model_has_it(body, always, switch):
    assert asked_of_zai({"model": "glm-5.3", **body}).get("reasoning_effort") == always
    thinking = asked_of_zai({"model": "glm-4.6", **body}).get("thinking", {})
    assert thinking.get("type") == switch


@pytest.mark.parametrize(
    ("body", "form"),
    [(ASKS_TO_THINK, "parsed"), (ADAPTIVE, "parsed"), (NOT, "hidden"), ({}, "hidden"), (WITH_TOOLS, "hidden")],
    ids=["enabled", "adaptive", "disabled", "not asked", "tools"],
)  # fmt: skip
def test_thinking_is_shown_where_it_was_asked_for(body, form):
    assert plan_of_message(body, reasoning_format="raw").reasoning_format == form


def test_where_nobody_asks_for_thinking_the_operators_word_counts():
    assert asked_of_zai({"max_tokens": 100}, enable_thinking=True)["thinking"]["type"] == "enabled"
    assert asked_of_zai(WITH_TOOLS, enable_thinking=False)["thinking"]["type"] == "disabled"


ANTHROPIC_SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
SEARCHING = {"enable": True, "search_engine": "search-prime", "search_result": True}
GREP = {"name": "grep", "description": "Find", "input_schema": {"type": "object"}, **CACHED}
ZAI_GREP = {
    "type": "function",
    "function": {"name": "grep", "description": "Find", "parameters": {"type": "object"}},
}


def searching(**more):
    return {"type": "web_search", "web_search": {**SEARCHING, **more}}


@pytest.mark.parametrize(
    ("tools", "wanted", "ignored"),
    [
        pytest.param([GREP], [ZAI_GREP], (), id="function"),
        pytest.param([{**GREP, "type": "custom", "defer_loading": True}], [ZAI_GREP], (), id="deferred"),
        pytest.param(
            [GREP, {"name": "DeferredToolPlaceholder", "defer_loading": True, "input_schema": {}}],
            [ZAI_GREP], (), id="a placeholder",
        ),
        pytest.param(
            [{"type": "bash_20250124", "name": "bash"}, GREP, {"type": "memory_20250818", "name": "memory"}],
            [ZAI_GREP], ("tools.bash_20250124", "tools.memory_20250818"), id="clients' tools",
        ),
        pytest.param([ANTHROPIC_SEARCH], [searching(require_search=True)], (), id="search alone"),
        pytest.param([ANTHROPIC_SEARCH, GREP], [ZAI_GREP, searching()], (), id="search beside others"),
        pytest.param(
            [{**ANTHROPIC_SEARCH, "allowed_domains": ["a.org", "b.org"]}, GREP],
            [ZAI_GREP, searching(search_domain_filter="a.org,b.org")], (), id="domains",
        ),
        pytest.param(
            [{**ANTHROPIC_SEARCH, "type": "web_search_20260209", "blocked_domains": ["a.org"]}, GREP],
            [ZAI_GREP, searching()], ("tools.blocked_domains",), id="blocked domains",
        ),
        pytest.param([{"name": "f"}], [{"type": "function", "function": {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}}}], (), id="no schema"),
    ],
)  # fmt: skip
def test_tools_of_anthropics_are_z_ais(tools, wanted, ignored):
    assert asked_of_zai({"tools": tools})["tools"] == wanted
    assert plan_of_message({"tools": tools}).ignored == ignored


@pytest.mark.parametrize(
    ("choice", "tools", "line"),
    [
        pytest.param({"type": "auto"}, ["grep", "web_search"], None, id="auto"),
        pytest.param({"type": "none"}, None, None, id="none"),
        pytest.param({"type": "any"}, ["grep", "web_search"], "Answer by calling the function grep.", id="any"),
        pytest.param({"type": "tool", "name": "grep"}, ["grep"], "Answer by calling the function grep.", id="a function"),
        pytest.param({"type": "tool", "name": "web_search"}, ["web_search"], None, id="the search"),
    ],
)  # fmt: skip
def test_a_choice_of_tools_is_kept(choice, tools, line):
    sent = asked_of_zai({"tools": [GREP, ANTHROPIC_SEARCH], "tool_choice": choice})
    names = [tool.get("function", {}).get("name", tool["type"]) for tool in sent.get("tools", [])]
    assert (names or None) == tools
    first = sent["messages"][0]
    assert (first["content"] if first["role"] == "system" else None) == line
    if choice.get("name") == "web_search":
        assert sent["tools"] == [searching(require_search=True)]


@pytest.mark.parametrize(
    ("body", "at"),
    [
        pytest.param({"model": None}, "model", id="no model"),
        pytest.param({"messages": []}, "messages", id="no messages"),
        pytest.param({"max_tokens": None}, "max_tokens", id="no limit"),
        pytest.param({"max_tokens": 0}, "max_tokens", id="a limit of 0"),
        pytest.param({"temperature": 1.5}, "temperature", id="temperature"),
        pytest.param({"thinking": {"type": "much"}}, "thinking", id="thinking"),
        pytest.param({"thinking": {"type": "enabled", "budget_tokens": "9"}}, "thinking", id="budget"),
        pytest.param(wanting("huge"), "output_config.effort", id="effort"),
        pytest.param({"output_config": {"format": {"type": "xml"}}}, "output_config.format", id="format"),
        pytest.param({"system": [{"type": "image"}]}, "system", id="system"),
        pytest.param({"tools": [{}]}, "tools[0]", id="a tool without a name"),
        pytest.param({"tools": [GREP], "tool_choice": {"type": "tool", "name": "ls"}}, "tool_choice", id="a choice of no tool"),
        pytest.param({"tools": [GREP], "tool_choice": "auto"}, "tool_choice", id="a choice that is a word"),
        pytest.param({"tools": [{**ANTHROPIC_SEARCH, "allowed_domains": "a.org"}]}, "tools[0].allowed_domains", id="domains"),
        pytest.param({"messages": [turn("hi", "nobody")]}, "messages[0].role", id="role"),
        pytest.param({"stop_sequences": [1]}, "stop_sequences", id="stop sequences"),
    ],
)  # fmt: skip
def test_a_request_of_anthropics_names_what_is_wrong_in_it(body, at):
    with pytest.raises(BadRequest) as raised:
        plan_of_message(body)
    assert raised.value.param == at


def test_what_cannot_be_honoured_is_listed_where_it_asks_for_something():
    body = {
        "top_k": 5,
        "container": "c",
        "context_management": {"edits": []},
        "service_tier": "auto",
        "mcp_servers": [],
        "tools": [GREP],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        **CACHED,
    }
    assert plan_of_message(body).ignored == (
        "top_k",
        "container",
        "context_management",
        "disable_parallel_tool_use",
    )


def test_a_user_of_anthropics_is_told_only_as_a_hash():
    user_id = '{"device_id": "d", "account_uuid": "me", "session_id": "s1"}'
    sent = asked_of_zai({"metadata": {"user_id": user_id}})
    assert sent["user_id"] == hashlib.sha256(user_id.encode()).hexdigest()
    assert asked_of_zai({"metadata": {}}).keys() == {"messages", "max_tokens"}


@pytest.mark.parametrize(
    ("fallbacks", "models"),
    [
        (["glm-4.5"], ["glm-4.6", "glm-4.5"]),
        ([{"model": "glm-4.5", "max_tokens": 9}], ["glm-4.6", "glm-4.5"]),
        ("default", ["glm-4.6", "glm-5"]),
        ([], ["glm-4.6"]),
    ],
    ids=["names", "objects", "default", "none"],
)
def test_fallbacks_of_anthropics_are_names_or_objects(fallbacks, models):
    plan = plan_of_message({"fallbacks": fallbacks}, fallback_models=("glm-5",))
    assert [model.id for model, _ in plan.prompts] == models


@pytest.mark.parametrize("fallbacks", ["glm-4.5", [{}], [7], ["m"] * 9], ids=str)
def test_other_fallbacks_of_anthropics_are_refused(fallbacks):
    with pytest.raises(BadRequest, match="'fallbacks' must be"):
        plan_of_message({"fallbacks": fallbacks})


@pytest.mark.parametrize(
    ("user_id", "session"),
    [
        ('{"device_id": "d", "session_id": "s1"}', "s1"),
        ("user_1_account_2_session_s1", "s1"),
        ("anna", ""),
        ("[1]", ""),
        ('{"session_id": 7}', ""),
    ],
    ids=["JSON", "words", "a name", "other JSON", "a number"],
)
def test_a_session_is_the_name_of_the_conversation(user_id, session):
    prompt, _ = ztoapi.parse_message(CLAUDE | {"metadata": {"user_id": user_id}})
    assert prompt.cache_key == session


@pytest.mark.parametrize(
    "body",
    [
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        {"output_format": {"type": "json_schema", "schema": {"type": "object"}}},
    ],
    ids=["output_config", "output_format"],
)
def test_a_format_of_the_answer_is_a_schema(body):
    sent = asked_of_zai(body)
    assert sent["response_format"] == {"type": "json_object"}
    assert sent["messages"][0]["content"].endswith(
        'valid against this JSON Schema: {"type":"object"}'
    )


def test_what_is_asked_of_anthropic_is_asked_of_zai_whole():
    body = {
        "system": "Be kind.",
        "temperature": 0.5,
        "top_p": 0.9,
        "stop_sequences": ["END"],
        "tools": [GREP],
        "thinking": {"type": "disabled"},
        "fallbacks": ["glm-4.5"],
        "stream": True,
    }
    assert asked_of_zai(body) == {
        "messages": [{"role": "system", "content": "Be kind."}, turn("你好")],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 9_000,
        "stop": ["END"],
        "tools": [ZAI_GREP],
        "tool_stream": True,
        "thinking": {"type": "disabled"},
    }
    plan = plan_of_message(body)
    assert (plan.streamed, [model.id for model, _ in plan.prompts]) == (
        True,
        ["glm-4.6", "glm-4.5"],
    )


@pytest.mark.parametrize("case", golden("claude-code"))
def test_what_claude_code_sends_reaches_zai_as_it_must(case):
    prompt, _ = ztoapi.parse_message(case["asked"])
    plan = ztoapi.make_plan(prompt, Settings(), Account(""), "7")
    model, planned = plan.prompts[0]
    assert (zai_body(planned, model), list(plan.ignored)) == (case["sent"], case["ignored"])


def test_a_tokens_estimate_is_scaled_by_what_zai_told_of_the_model():
    scale = ztoapi.TokenScale()
    scale.learn("glm-4.6", 100, 0)
    assert scale.scaled("glm-4.6", 100) == 100
    scale.learn("glm-4.6", 100, 200)
    assert (scale.scaled("glm-4.6", 100), scale.scaled("glm-5", 100)) == (200, 100)
    scale.learn("glm-4.6", 100, 100)
    assert scale.scaled("glm-4.6", 100) == 175
    for number in range(200):
        scale.learn(f"m{number}", 1, 1)
    assert len(scale.factors) == scale.MAX_MODELS


# ======== Messages: the answer ========


def message_reply(**fields):
    return begun(ztoapi.parse_message(CLAUDE | fields)[1])


def message_frames(events, **fields):
    reply = message_reply(**fields)
    return decoded([*reply.frames_of(events), *reply.close()])


def message_document(events, **fields):
    return message_reply(**fields).fold(events)


MESSAGE_USAGE = {
    "input_tokens": 4,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 2,
    "output_tokens": 3,
}
MESSAGE = {
    "id": "msg_2026",
    "type": "message",
    "role": "assistant",
    "model": "GLM-4.6",
    "content": [],
    "stop_reason": None,
    "stop_sequence": None,
    "stop_details": None,
}
SPENT_6 = Usage(6, 3, 9, 2)


def test_a_message_is_streamed_block_by_block():
    events = [Thought("h"), Thought("m"), Text("你"), Text("好"), SPENT_6, Finish("stop")]
    assert message_frames(events) == [
        {"type": "message_start", "message": {**MESSAGE, "usage": {**MESSAGE_USAGE, "input_tokens": 2, "cache_read_input_tokens": 0, "output_tokens": 0}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "h"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "m"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "ztoapi:"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "你"}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "好"}},
        {"type": "content_block_stop", "index": 1},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None, "stop_details": None}, "usage": MESSAGE_USAGE},
        {"type": "message_stop"},
    ]  # fmt: skip


def test_a_message_that_is_whole_has_its_blocks():
    events = [
        Thought("hm"),
        Text("你好"),
        ToolCall(0, "c1", "f", '{"a":'),
        ToolCall(0, "", "", "1}"),
        SPENT_6,
        Finish("tool_calls"),
    ]
    assert message_document(events) == {
        **MESSAGE,
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "ztoapi:"},
            {"type": "text", "text": "你好"},
            {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
        ],
        "stop_reason": "tool_use",
        "usage": MESSAGE_USAGE,
    }


def test_thinking_that_is_omitted_is_in_the_signature():
    events = [Thought("h"), Thought("m"), Text("x"), Finish("stop")]
    thinking = {"thinking": {"type": "adaptive", "display": "omitted"}}
    deltas = [frame["delta"] for frame in message_frames(events, **thinking) if "delta" in frame]
    assert deltas[0] == {"type": "signature_delta", "signature": "ztoapi:aG0="}
    block = message_document(events, **thinking)["content"][0]
    assert block == {"type": "thinking", "thinking": "", "signature": "ztoapi:aG0="}
    assert ztoapi.part_thought(block) == "hm"


def opened(frames):
    """The blocks in the order in which they begin, and what each says."""
    found = []
    for frame in frames:
        if frame["type"] == "content_block_start":
            block = frame["content_block"]
            found.append([block.get("id", block["type"]), ""])
        elif frame["type"] == "content_block_delta":
            assert frame["index"] == len(found) - 1
            found[-1][1] += frame["delta"].get("partial_json") or frame["delta"].get("text", "")
    return found


def test_the_pieces_of_two_calls_are_one_block_after_the_other():
    one, two = ToolCall(0, "c1", "f", '{"a":'), ToolCall(1, "c2", "g", '{"b":')
    ends = [ToolCall(1, "", "", "2}"), ToolCall(0, "", "", "1}")]
    frames = message_frames([one, two, *ends, Text("so"), Finish("tool_calls")])
    assert opened(frames) == [["c1", '{"a":1}'], ["c2", '{"b":2}'], ["text", "so"]]


def test_a_call_that_is_complete_makes_no_other_wait():
    reply = message_reply()
    reply.feed(ToolCall(0, "c1", "f", "{}"))
    begun_types = [frame["type"] for frame in reply.feed(ToolCall(1, "c2", "g", ""))]
    assert begun_types == ["content_block_stop", "content_block_start"]


@pytest.mark.parametrize(
    ("end", "reason", "sequence"),
    [
        (Finish("stop"), "end_turn", None),
        (Finish("length"), "max_tokens", None),
        (Finish("tool_calls"), "tool_use", None),
        (Finish("content_filter"), "refusal", None),
        (Finish("stop", stop_sequence="END"), "stop_sequence", "END"),
        (Finish("length", is_window_full=True), "model_context_window_exceeded", None),
    ],
    ids=["stop", "length", "calls", "filter", "stop sequence", "window"],
)
def test_reasons_to_stop_are_anthropics(end, reason, sequence):
    whole = message_document([Text("x"), end])
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    delta = message_frames([Text("x"), end])[-2]["delta"]
    assert delta == {"stop_reason": reason, "stop_sequence": sequence, "stop_details": None}


def test_a_window_that_is_full_after_some_text_is_told_apart_from_a_limit():
    full = stream_of({"content": "x"}, finish("model_context_window_exceeded"))
    assert read_all([full])[-1] == Finish("length", is_window_full=True)
    assert read_all([stream_of({"content": "x"}, finish("length"))])[-1] == Finish("length")


def test_a_search_is_told_with_what_it_found():
    events = [Text("Sunny."), Citations((FOUND | {"publish_date": "2026-11-29"},)), SPENT_6, Finish("stop")]  # fmt: skip
    text, use, result = message_document(events, tools=[ANTHROPIC_SEARCH])["content"]
    assert text["citations"] == [
        {
            "type": "web_search_result_location",
            "cited_text": "C",
            "encrypted_index": "0",
            "title": "T",
            "url": "https://x/y",
        }
    ]
    assert use == {
        "type": "server_tool_use",
        "id": "srvtoolu_ours_0",
        "name": "web_search",
        "input": {"query": "你好"},
    }
    found = {**FOUND_BLOCK, "encrypted_content": in_base64("C"), "page_age": "2026-11-29"}
    assert result == {
        "type": "web_search_tool_result",
        "tool_use_id": use["id"],
        "content": [found],
    }
    usage = message_document(events, tools=[ANTHROPIC_SEARCH])["usage"]
    assert usage["server_tool_use"] == {"web_search_requests": 1, "web_fetch_requests": 0}


def test_usage_that_zai_does_not_tell_is_estimated():
    usage = message_document([Text("x" * 100), Finish("stop")])["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (2, 28)


def test_arguments_that_are_no_object_are_none():
    (block,) = message_document([ToolCall(0, "c", "f", "[1"), Finish("length")])["content"]
    assert block["input"] == {}


def test_a_message_that_breaks_off_ends_with_an_error():
    reply = message_reply()
    reply.feed(Text("x"))
    assert reply.fail(UpstreamError(ztoapi.UNAVAILABLE)) == [
        {
            "type": "error",
            "error": {"type": "api_error", "message": ztoapi.UNAVAILABLE.message},
            "request_id": "req_ours",
        }
    ]


def test_the_sign_of_life_of_a_message_is_a_ping():
    reply = ztoapi.parse_message(CLAUDE)[1]
    assert reply.sign_of_life(HEAD) == b'event: ping\ndata: {"type":"ping"}\n\n'


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (BadRequest("No."), 400, "invalid_request_error"),
        (ztoapi.ProxyError(ztoapi.INVALID_API_KEY), 401, "authentication_error"),
        (ztoapi.ProxyError(ztoapi.KEY_QUOTA_EXCEEDED), 402, "billing_error"),
        (ztoapi.ProxyError(ztoapi.MODEL_NOT_ALLOWED), 403, "permission_error"),
        (UpstreamError(ztoapi.MODEL_NOT_FOUND), 404, "not_found_error"),
        (ztoapi.ProxyError(ztoapi.error_kind(413, "request_too_large")), 413, "request_too_large"),
        (zai_error(429, b'{"error":{"code":"1302"}}'), 429, "rate_limit_error"),
        (zai_error(429, b'{"error":{"code":"1305"}}'), 529, "overloaded_error"),
        (UpstreamError(ztoapi.UNAVAILABLE), 502, "api_error"),
        (ztoapi.ProxyError(ztoapi.ZAI_API_KEY_MISSING), 503, "api_error"),
        (UpstreamError(ztoapi.TIMEOUT), 504, "api_error"),
    ],
    ids=lambda value: str(value) if isinstance(value, (int, str)) else "",
)
def test_errors_have_anthropics_status_and_type(error, status, kind):
    assert ztoapi.anthropic_error(error, "req_1") == (
        status,
        {
            "type": "error",
            "error": {"type": kind, "message": str(error)},
            "request_id": "req_1",
        },
    )


# ======== Histories ========

ASKED_F = Message("assistant", ("x",), calls=(ToolCall(0, "c1", "f", "{}"),))
TOLD_F = Message("tool", ("1",), call_id="c1")
GO_ON = Message("user", ("go on",))
ORPHAN = "(The result of a call that is not in this conversation, {}:)"


def call(call_id, name="f", arguments="{}"):
    return ToolCall(0, call_id, name, arguments)


def calling(*calls):
    return Message("assistant", (), calls=calls)


def told(call_id, text="1"):
    return Message("tool", (text,), call_id=call_id)


def from_tools(*content):
    return Message("user", content, continues=True)


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        pytest.param([ASKED_F, GO_ON], [ASKED_F, told("c1", "(no result)"), GO_ON], id="no result"),
        pytest.param([ASKED_F], [ASKED_F, told("c1", "(no result)")], id="no result at the end"),
        pytest.param(
            [told("gone"), GO_ON], [from_tools(ORPHAN.format("gone"), "1"), GO_ON], id="no call"
        ),
        pytest.param([told("")], [from_tools(ORPHAN.format("?"), "1")], id="no call and no id"),
        pytest.param(
            [told("gone", "")], [from_tools(ORPHAN.format("gone"))], id="no call and no output"
        ),
        pytest.param([ASKED_F, GO_ON, TOLD_F], [ASKED_F, TOLD_F, GO_ON], id="a result too late"),
        pytest.param(
            [calling(call("a"), call("b")), told("b", "B"), told("a", "A")],
            [calling(call("a"), call("b")), told("a", "A"), told("b", "B")],
            id="results in another order",
        ),
        pytest.param(
            [ASKED_F, TOLD_F, told("c1", "2"), GO_ON], [ASKED_F, TOLD_F, GO_ON], id="two results"
        ),
        pytest.param(
            [calling(call("c1"), call("c1")), TOLD_F, told("c1", "2")],
            [calling(call("c1")), TOLD_F],
            id="a call twice",
        ),
        pytest.param(
            [ASKED_F, ASKED_F, TOLD_F],
            [ASKED_F, TOLD_F, replace(ASKED_F, calls=())],
            id="a call twice in two messages",
        ),
        pytest.param(
            [calling(call("c1"), call("c1", "g"), call("c1", "f", '{"a":1}')), *map(told, ["c1"] * 3, "ABC")],
            [
                calling(call("c1"), call("c1_2", "g"), call("c1_3", "f", '{"a":1}')),
                told("c1", "A"), told("c1_2", "B"), told("c1_3", "C"),
            ],
            id="an id for several calls",
        ),
        pytest.param(
            [ASKED_F, TOLD_F, ASKED_F, told("c1", "2")],
            [ASKED_F, TOLD_F, replace(ASKED_F, calls=(call("c1_2"),)), told("c1_2", "2")],
            id="an id again in a later turn",
        ),
        pytest.param(
            [calling(call("c1"), call("c1_2"), call("c1", "g"))],
            [
                calling(call("c1"), call("c1_2"), call("c1_3", "g")),
                *map(told, ("c1", "c1_2", "c1_3"), ["(no result)"] * 3),
            ],
            id="an id that looks like ours",
        ),
        pytest.param(
            [ASKED_F, GO_ON, calling(call("c1", "g")), told("c1")],
            [ASKED_F, told("c1", "(no result)"), GO_ON, calling(call("c1_2", "g")), told("c1_2")],
            id="an id again after a call that was interrupted",
        ),
        pytest.param(
            [ASKED_F, GO_ON, calling(call("c1", "g")), told("c1", "G"), told("c1", "F")],
            [ASKED_F, told("c1", "F"), GO_ON, calling(call("c1_2", "g")), told("c1_2", "G")],
            id="a late result of the call before",
        ),
        pytest.param(
            [ASKED_F, GO_ON, ASKED_F, TOLD_F],
            [
                ASKED_F, told("c1", "(no result)"), GO_ON,
                replace(ASKED_F, calls=(call("c1_2"),)), told("c1_2"),
            ],
            id="a call again after it was interrupted",
        ),
        pytest.param(
            [ASKED_F, GO_ON, calling(call("d", "g")), told("")],
            [ASKED_F, told("c1", "(no result)"), GO_ON, calling(call("d", "g")), told("d")],
            id="a result without an id after a call that was interrupted",
        ),
        pytest.param(
            [calling(call("c", "f")), calling(call("c", "g")), told("c", "F"), told("c", "G")],
            [calling(call("c", "f")), told("c", "F"), calling(call("c_2", "g")), told("c_2", "G")],
            id="an id in two messages behind each other",
        ),
        pytest.param(
            [calling(call("a", "f"), call("b", "g")), told("g", "G"), told("", "F")],
            [calling(call("a", "f"), call("b", "g")), told("a", "F"), told("b", "G")],
            id="results by name and by order",
        ),
        pytest.param(
            [calling(call("\ud83d"), call("\ude00")), told("\ude00", "B"), told("\ud83d", "A")],
            [calling(call("\ufffd"), call("\ufffd_2")), told("\ufffd", "A"), told("\ufffd_2", "B")],
            id="ids that are half a character",
        ),
        pytest.param(
            [calling(call("\ud83d")), told("\ud83d"), calling(call("\ude00")), told("\ude00")],
            [calling(call("\ufffd")), told("\ufffd"), calling(call("\ufffd_2")), told("\ufffd_2")],
            id="different halves of characters",
        ),
    ],
)  # fmt: skip
def test_every_call_has_one_result_right_behind_it(messages, wanted):
    assert ztoapi.pair_calls_and_results(tuple(messages)) == tuple(wanted)


@pytest.mark.parametrize("name", ["", " ", "\n"])
def test_a_call_without_a_name_goes_with_its_result(name):
    messages = (GO_ON, calling(call("a", name), call("b")), told("a"), told("b"), ASKED_F, TOLD_F)
    assert ztoapi.drop_nameless_calls(messages) == (
        GO_ON, calling(call("b")), told("b"), ASKED_F, TOLD_F
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments", ['{"p":', "[1]", "7", '"{}"', '{"a": NaN}', "read it", "[" * 99999]
)
def test_arguments_that_are_no_object_stand_in_the_result(arguments):
    asked = calling(call("c1", "f", arguments), call("c2", "f", '{"a":1}'))
    words = f"{arguments}\n(These arguments were no JSON object.)"
    assert ztoapi.mend_arguments((asked, told("c1", "no"), told("c2"))) == (
        calling(call("c1"), call("c2", "f", '{"a":1}')),
        Message("tool", (words, "no"), call_id="c1"),
        told("c2"),
    )


@pytest.mark.parametrize("arguments", ["", " ", "null"])
def test_no_arguments_are_an_empty_object(arguments):
    asked = calling(call("c1", "f", arguments))
    assert ztoapi.mend_arguments((asked, TOLD_F)) == (calling(call("c1")), TOLD_F)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('{"a":"\\ud83d"}', '{"a":"\ufffd"}'),
        ('{"a": "\\ud83d\\ude00"}', '{"a": "\\ud83d\\ude00"}'),
        ('{"a": "\\u4f60"}', '{"a": "\\u4f60"}'),
    ],
    ids=["half", "whole", "another character"],
)
def test_half_a_surrogate_pair_in_arguments_is_found_as_an_escape(arguments, wanted):
    mended = ztoapi.mend_escapes((calling(call("c1", "f", arguments)),))
    assert mended == (calling(call("c1", "f", wanted)),)


@pytest.mark.parametrize("role", ["user", "tool"])
@pytest.mark.parametrize("content", [(), ("",), ("\n", " ")])
def test_what_must_be_answered_says_something(role, content):
    (filled,) = ztoapi.mend_empty_messages((Message(role, content, call_id="c1"),))
    assert filled.content == ({"user": "(no text)", "tool": "(no output)"}[role],)


def test_a_conversation_of_the_assistants_alone_gets_a_user():
    said = Message("assistant", ("x",))
    assert ztoapi.ask_something((said,)) == (from_tools("(no text)"), said)


PLAIN = (
    Message("system", ("Be kind.",)),
    Message("user", ("look", SKY)),
    calling(call("a", "f", '{"a": 1}'), call("b", "g", "{ }")),
    told("a", "A"),
    told("b", "B"),
    Message("assistant", ("I <think>hm</think>",), "hm"),
    Message("user", ("<think>hm</think>",)),
    calling(call("d")),
    told("d", "0"),
)


@pytest.mark.parametrize("repair", ztoapi.HISTORY_REPAIRS, ids=lambda repair: repair.__name__)
def test_a_history_that_zai_takes_is_left_alone(repair):
    assert repair(PLAIN) is PLAIN
    assert ztoapi.repair_history(PLAIN) == (PLAIN, [])


def test_a_repaired_history_says_what_was_repaired():
    assert ztoapi.repair_history((GO_ON, told("gone"), Message("assistant", ()))) == (
        (GO_ON, from_tools(ORPHAN.format("gone"), "1")),
        ["pair_calls_and_results", "mend_empty_messages"],
    )


def test_an_image_of_the_system_is_not_the_users_where_there_is_no_user():
    part = {"type": "image_url", "image_url": {"url": SKY.url}}
    sent = zai_messages(message(role="system", content=["look", part]), "glm-5.3")
    assert sent == [{"role": "user", "content": f"look\n{HIDDEN}"}]


SEEING, BLIND = MODELS["glm-4.6v"], MODELS["glm-5.3"]
HIDDEN = (
    f"[image {SKY.url}: not shown to glm-5.3: a model that sees takes it, and so does VISION_MODEL]"
)
SHOWN_BELOW = "(a picture, shown below)"


@pytest.mark.parametrize(
    ("messages", "for_blind", "for_seeing"),
    [
        pytest.param(
            [Message("user", ("look", SKY)), Message("assistant", ("a cat",)), GO_ON],
            [Message("user", ("look", HIDDEN)), Message("assistant", ("a cat",)), GO_ON],
            [Message("user", ("look", SKY)), Message("assistant", ("a cat",)), GO_ON],
            id="an earlier turn",
        ),
        pytest.param(
            [GO_ON, calling(call("a"), call("b")), Message("tool", ("A", SKY), call_id="a"), told("b", "B")],
            [GO_ON, calling(call("a"), call("b")), Message("tool", ("A", HIDDEN), call_id="a"), told("b", "B")],
            [GO_ON, calling(call("a"), call("b")), told("a", "A"), told("b", "B"), from_tools(SKY)],
            id="a result of the turn that is on",
        ),
        pytest.param(
            [GO_ON, calling(call("a")), Message("tool", (SKY,), call_id="a"), Message("assistant", ("x",))],
            [GO_ON, calling(call("a")), told("a", HIDDEN), Message("assistant", ("x",))],
            [GO_ON, calling(call("a")), told("a", SHOWN_BELOW), from_tools(SKY), Message("assistant", ("x",))],
            id="nothing but an image",
        ),
        pytest.param(
            [Message("system", ("s", SKY)), GO_ON, Message("assistant", (SKY,)), GO_ON],
            [Message("system", ("s", HIDDEN)), GO_ON, Message("assistant", (HIDDEN,)), GO_ON],
            [
                Message("system", ("s",)), from_tools(SKY), GO_ON,
                Message("assistant", (SHOWN_BELOW,)), from_tools(SKY), GO_ON,
            ],
            id="systems and assistants",
        ),
        pytest.param(
            [GO_ON, from_tools("with a result", SKY)],
            [GO_ON, from_tools("with a result", HIDDEN)],
            [GO_ON, from_tools("with a result", SKY)],
            id="beside the result of a tool",
        ),
    ],
)  # fmt: skip
def test_what_was_shown_before_is_shown_where_it_can_be(messages, for_blind, for_seeing):
    assert ztoapi.fit_media(tuple(messages), BLIND) == tuple(for_blind)
    assert ztoapi.fit_media(tuple(messages), SEEING) == tuple(for_seeing)
    assert ztoapi.hidden_media(tuple(messages), BLIND) == ["images"]
    assert ztoapi.hidden_media(tuple(messages), SEEING) == []


@pytest.mark.parametrize(
    ("part", "words", "kind"),
    [
        (unreadable("a.pdf", ztoapi.SEND_TEXT), f"[file a.pdf: not shown to {{}}: {ztoapi.SEND_TEXT}]", "files"),
        (ztoapi.Unreadable("image", "", ztoapi.SEND_IMAGE, "x"), f"[image: not shown to {{}}: {ztoapi.SEND_IMAGE}]", "images"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", [SEEING, BLIND], ids=lambda model: model.id)
def test_what_no_model_takes_is_words_in_a_history(model, part, words, kind):
    messages = (Message("user", (part,)), GO_ON)
    assert ztoapi.fit_media(messages, model) == (Message("user", (words.format(model.id),)), GO_ON)
    assert ztoapi.hidden_media(messages, model) == [kind]


SEA = Media("image_url", "data:image/png;base64,U0VB")
SKY_KEY, SEA_KEY = (ztoapi.image_key("anna", image) for image in (SKY, SEA))


def test_an_image_has_one_key_for_each_client_key_whatever_its_type_is_said_to_be():
    jpeg = Media("image_url", "data:image/jpeg;base64,U0VB")
    assert ztoapi.image_key("anna", jpeg) == SEA_KEY
    assert len({SKY_KEY, SEA_KEY, ztoapi.image_key("bob", SEA)}) == 3


WITH_IMAGES = (
    Message("user", ("look", SKY)),
    calling(call("a")),
    Message("tool", (SEA, "done"), call_id="a"),
    from_tools(SKY, Media("video_url", "https://x/v.mp4")),
)
UNDESCRIBED = (
    Message("user", ("look", ztoapi.Undescribed(SKY_KEY, SKY))),
    calling(call("a")),
    Message("tool", (ztoapi.Undescribed(SEA_KEY, SEA), "done"), call_id="a"),
    from_tools(ztoapi.Undescribed(SKY_KEY, SKY), Media("video_url", "https://x/v.mp4")),
)


def test_images_are_marked_for_description_and_nothing_else_is():
    assert ztoapi.with_undescribed(WITH_IMAGES, "anna") == UNDESCRIBED
    assert ztoapi.with_undescribed(UNDESCRIBED, "anna") is UNDESCRIBED
    assert [*ztoapi.undescribed_images(UNDESCRIBED)] == [SKY_KEY, SEA_KEY]
    assert ztoapi.undescribed_images(WITH_IMAGES) == {}


def test_a_model_that_sees_is_shown_what_another_has_described():
    shown = ztoapi.fit_media(UNDESCRIBED, SEEING)
    assert shown == ztoapi.fit_media(WITH_IMAGES, SEEING)
    assert ztoapi.hidden_media(UNDESCRIBED[:3], SEEING) == []


def test_images_that_are_to_be_described_are_neither_hidden_nor_refused():
    assert ztoapi.fit_media(UNDESCRIBED[:3], BLIND) == UNDESCRIBED[:3]
    assert ztoapi.hidden_media(UNDESCRIBED, BLIND) == ["files"]


@pytest.mark.parametrize(
    ("texts", "reasons", "sky", "sea"),
    [
        ({SKY_KEY: "a sky", SEA_KEY: "a sea"}, {}, "[image: a sky]", "[image: a sea]"),
        (
            {SKY_KEY: "a sky"},
            {SEA_KEY: "it was refused"},
            "[image: a sky]",
            "[image: not shown to glm-5.3: it was refused]",
        ),
        (
            {},
            {},
            f"[image {SKY.url}: not shown to glm-5.3: {ztoapi.TOO_MANY_IMAGES}]",
            f"[image: not shown to glm-5.3: {ztoapi.TOO_MANY_IMAGES}]",
        ),
    ],
    ids=["described", "refused", "too many"],
)
def test_words_stand_in_the_place_of_images(texts, reasons, sky, sea):
    assert ztoapi.with_descriptions(UNDESCRIBED, BLIND, texts, reasons) == (
        Message("user", ("look", sky)),
        UNDESCRIBED[1],
        Message("tool", (sea, "done"), call_id="a"),
        from_tools(sky, Media("video_url", "https://x/v.mp4")),
    )


def test_where_there_is_no_image_nothing_changes():
    messages = (GO_ON, calling(call("a")), told("a", "A"))
    assert ztoapi.with_descriptions(messages, BLIND, {}, {}) is messages


def test_an_image_without_an_address_has_no_name():
    image = Media("image_url", "data:image/png;base64,QUJD")
    (hidden, _) = ztoapi.fit_media((Message("user", (image,)), GO_ON), BLIND)
    assert hidden.content == (HIDDEN.replace(f" {SKY.url}", ""),)


@pytest.mark.parametrize(
    ("part", "model", "code", "param", "words"),
    [
        (SKY, BLIND, "image_not_supported", "messages", "VISION_MODEL"),
        (Media("file_url", "https://x"), BLIND, "image_not_supported", "messages", "glm-4.6v"),
        (unreadable("a.pdf", ztoapi.SEND_TEXT), SEEING, "file_not_supported", "messages[0].content[0]", "PDF"),
    ],
)  # fmt: skip
def test_what_the_user_shows_now_is_refused_where_the_model_does_not_take_it(
    part, model, code, param, words
):
    turn = (calling(call("a")), Message("tool", (SKY,), call_id="a"), from_tools(SKY))
    with pytest.raises(BadRequest, match=words) as raised:
        ztoapi.fit_media((GO_ON, Message("user", ("look", part)), *turn), model)
    assert (raised.value.kind.code, raised.value.param) == (code, param)


def what_zai_refuses(messages, model):
    """What a strict Z.ai finds wrong with messages (its answers 1210, 1213 and 1214)."""
    yield from wrong_order(messages)
    for message in messages:
        yield from wrong_content(message, model.vision and message["role"] == "user")
        for asked in message.get("tool_calls", ()):
            yield from wrong_call(asked["function"])


def wrong_order(messages):
    """Each call has its result right behind it, and somebody waits for an answer."""
    due, ids = [], []
    for message in messages:
        if message["role"] == "tool":
            if not due or due.pop(0) != message["tool_call_id"]:
                yield "a result without its call before it"
        elif due:
            yield "a call without its result behind it"
        if message["role"] == "assistant":
            due = [asked["id"] for asked in message.get("tool_calls", ())]
            ids += due
    if due or len(set(ids)) < len(ids) or "" in ids:
        yield "a call without a result, or an id twice"
    if not {"user", "tool"} & {message["role"] for message in messages}:
        yield "nothing to answer"


def wrong_content(message, sees):
    content = message["content"]
    if message["role"] not in ("system", "user", "assistant", "tool"):
        yield "a role"
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif not sees:
        yield "a content that is no string"
    for part in content:
        if part["type"] == "text" and not part["text"].strip() and "tool_calls" not in message:
            yield "an empty text"
        if part["type"] != "text" and part[part["type"]].keys() != {"url"}:
            yield "an unknown field of an image"


def wrong_call(function):
    arguments = json.loads(function["arguments"])
    if not function["name"].strip() or not isinstance(arguments, dict):
        yield "a call"
    json.dumps(arguments, ensure_ascii=False).encode()  # raises for half a surrogate pair


class OddHistory:
    """Random conversations as clients may send them, of parts, roles, calls and results of any API."""

    TEXTS = ("", " ", "hi", "cut \ud83d", "<think>hm</think>x", "<think>hm</think>", "好")
    IDS = ("c1", "c2", "c1_2", "", "\ud83d", "\ude00", None, 7, {})
    NAMES = ("f", "g", "", " ", None, 5)
    ARGUMENTS = (
        "{}",
        '{"a":1}',
        '{"a":',
        "[]",
        "null",
        "",
        {"a": 1},
        [],
        None,
        5,
        '"{}"',
        '{"a":"\\ud83d"}',
    )
    URLS = (
        "https://x/y.png",
        "data:image/png;base64,QUJD",
        "blob:1",
        "http://localhost/",
        "",
        None,
    )
    VALUES = (None, True, 5, "hi", [], {}, [["x"]], {"type": "x"}, {"type": None}, {"text": "hi"})  # fmt: skip

    def __init__(self, seed):
        self.random = Random(seed)

    def one(self, values):
        return self.random.choice(values)

    def some(self, make, most=3):
        return [make() for _ in range(self.random.randint(0, most))]

    def part(self):
        kind = self.one(("text", "input_text", "thinking", "image_url", "input_image", "image", "file", "document",
                         "input_audio", "tool_use", "tool_result", "redacted_thinking", "x", None))  # fmt: skip
        given = {
            "text": self.one(self.TEXTS), "thinking": self.one(self.TEXTS), "image_url": {"url": self.one(self.URLS)},
            "file": {"filename": "a", "file_data": self.one((PDF, in_base64("t"), None))},
            "source": self.one(({"type": "text", "data": "t"}, {"url": self.one(self.URLS)}, {"content": "t"}, 5)),
            "id": self.one(self.IDS), "tool_use_id": self.one(self.IDS), "name": self.one(self.NAMES),
            "input": self.one(self.ARGUMENTS), "content": self.one((*self.TEXTS, None, ["t", {"type": "image"}])),
        }  # fmt: skip
        return self.one(self.VALUES) if kind is None else {"type": kind, **given}

    def content(self):
        make = self.one((lambda: self.one(self.TEXTS), lambda: self.one(self.VALUES)))
        return make() if self.random.random() < 0.4 else self.some(self.part)

    def call(self):
        function = {"name": self.one(self.NAMES), "arguments": self.one(self.ARGUMENTS)}
        return self.one(({"id": self.one(self.IDS), "function": function}, {**function}, 5))

    def message(self):
        role = self.one(("user", "assistant", "assistant", "tool", "tool", "system", "developer"))
        fields = {"role": role, "content": self.content(), "name": self.one((None, "f"))}
        if role == "assistant":
            fields["tool_calls"] = self.some(self.call)
            fields["reasoning_content"] = self.one((None, "hm", 5))
        if role == "tool":
            fields["tool_call_id"] = self.one(self.IDS)
        return fields

    def item(self):
        kind = self.one(("function_call", "custom_tool_call", "shell_call", "mcp_call", "reasoning", "message",
                         "function_call_output", "shell_call_output", "agent_message", "additional_tools", "x"))  # fmt: skip
        if kind == "message":
            return self.message()
        return {
            "type": kind, "call_id": self.one(self.IDS), "name": self.one(self.NAMES), "arguments": self.one(self.ARGUMENTS),
            "output": self.one((*self.TEXTS, *self.VALUES)), "content": self.content(), "summary": self.one(self.VALUES),
            "tools": self.some(lambda: self.one((self.call(), {"type": "custom"}, {"type": "function", "name": "f"}))),
        }  # fmt: skip


def with_plain_last_user_message(messages):
    """The same with a plain text in the last message that is of the user alone."""
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        content = message.get("content")
        parts = content if isinstance(content, list) else [content]
        results = [
            part for part in parts if isinstance(part, dict) and part.get("type") == "tool_result"
        ]
        if message.get("role") == "user" and not results:
            return [*messages[:index], {"role": "user", "content": "hi"}, *messages[index + 1 :]]
    raise AssertionError


@pytest.mark.parametrize("model", [SEEING, BLIND], ids=lambda model: model.id)
@pytest.mark.parametrize(
    ("parse", "field"),
    [
        (ztoapi.parse_chat, "messages"),
        (lambda body: ztoapi.parse_response(body, History()), "input"),
    ],
    ids=["chat", "responses"],
)
def test_any_history_becomes_what_zai_takes_unless_the_user_shows_now_what_it_does_not(
    parse, field, model
):
    refused = 0
    for seed in range(400):
        odd = OddHistory(seed)
        make = odd.message if field == "messages" else odd.item
        messages = [*HELLO["messages"], *odd.some(make, 8)]
        body = {"model": model.id, field: messages}
        before = json.dumps(body)
        try:
            sent = zai_messages(body, model.id, parse)
        except BadRequest:
            refused += 1
            body = {**body, field: with_plain_last_user_message(messages)}
            sent = zai_messages(body, model.id, parse)
        else:
            assert json.dumps(body) == before
            assert zai_messages(json.loads(before), model.id, parse) == sent
        json.loads(ztoapi.encode_request(sent).decode())
        assert list(what_zai_refuses(sent, model)) == [], seed
    assert 0 < refused < 200


@pytest.mark.parametrize("text", ["a sky", ""], ids=["described", "not described"])
def test_any_history_with_descriptions_is_what_zai_takes(text):
    settings = Settings(vision_model="glm-4.6v", vision_mode="describe")
    described = 0
    for seed in range(400):
        odd = OddHistory(seed)
        messages = [*odd.some(odd.message, 8), *HELLO["messages"]]
        prompt = replace(read_chat(chat(messages=messages)), fallbacks=("glm-4.6v",))
        plan = ztoapi.make_plan(prompt, settings, Account(""), "7")
        texts = {image.key: text for image in plan.images if text}
        plan.fill_in(texts, {})
        for model, planned in plan.prompts:
            sent = json.loads(ztoapi.zai_request(planned, model, ZAI, "7").data)["messages"]
            assert list(what_zai_refuses(sent, model)) == [], seed
        described += len(plan.images)
    assert described > 40


@pytest.mark.parametrize("repeated", [1, 2], ids=["paired", "not paired"])
def test_a_long_history_is_repaired_in_linear_time(repeated):
    messages = []
    for index in range(10_000):
        call_id = f"c{index // repeated}"
        messages += [Message("user", ("x",)), calling(call(call_id, "f", '{"a":1}')), told(call_id)]
    assert seconds_of(ztoapi.repair_history, tuple(messages)) < 1  # in quadratic time 3


def test_many_calls_without_ids_are_paired_in_linear_time():
    calls = calling(*[call("c", "f", f'{{"a":{i}}}') for i in range(20_000)])
    results = [told("c")] * 10_000 + [told("f")] * 5_000 + [told("")] * 5_000
    paired = ztoapi.pair_calls_and_results((calls, *results))
    assert seconds_of(ztoapi.pair_calls_and_results, (calls, *results)) < 2
    assert len({message.call_id for message in paired[1:]}) == 20_000


# ======== Clients ========


def filled(name, folder="$dir", key="sk-k", model=MODELS["glm-5.3"]):
    words = ztoapi.client_words("http://h:1", key, model)
    return ztoapi.CLIENTS[name].filled({**words, "dir": folder})


@pytest.mark.parametrize("name", ztoapi.CLIENTS)
def test_every_client_is_told_address_key_and_model(name):
    client = filled(name)
    told = json.dumps([client.variables, client.arguments, client.files])
    assert [word in told for word in ("http://h:1", "sk-k", "glm-5.3")] == [True] * 3
    assert "$" not in told.replace("$dir", "")


@pytest.mark.parametrize("name", ztoapi.CLIENTS)
def test_no_client_has_the_key_in_an_argument_where_others_could_see_it(name):
    assert "sk-k" not in " ".join(filled(name).arguments)


@pytest.mark.parametrize("name", ztoapi.CLIENTS)
def test_the_file_of_a_client_is_json_whatever_the_key(name):
    plain, odd = (
        [json.loads(text) for text in filled(name, key=key).files.values()]
        for key in ("sk-k", 'a"\\b')
    )
    assert repr(odd) == repr(plain).replace(repr("sk-k"), repr('a"\\b'))


@pytest.mark.parametrize("name", ztoapi.CLIENTS)
def test_the_lines_for_a_shell_start_the_client_in_the_same_way(tmp_path, name):
    program = filled(name).arguments[0]
    report = '{ printf "%s\\n" "$@"; env; cat "$dir"/* "$dir"/.[a-z]*; echo "dir $dir"; } 2>&1'
    (tmp_path / program).write_text(f"#!/bin/sh\n{report}\n")
    (tmp_path / program).chmod(0o755)
    script = f"set -a\n{filled(name).shell_lines()}"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "dir": ""}
    said = subprocess.run(
        ["sh", "-c", script], env=env, capture_output=True, text=True, check=True
    ).stdout
    client = filled(name, folder=re.search("dir (.*)", said)[1])
    assert said.startswith("\n".join(client.arguments[1:]))
    for line in (
        *(f"{name}={value}" for name, value in client.variables.items()),
        *client.files.values(),
    ):
        assert f"{line}\n" in said


def client_told(name, model):
    """All that a client is told: its variables, and its file."""
    client = filled(name, model=model)
    files = {file: json.loads(text) for file, text in client.files.items()}
    return {"variables": client.variables, "files": files}


def found(key, value):
    """The values of a key, wherever it is."""
    if isinstance(value, dict):
        yield from (value[name] for name in value if name == key)
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from found(key, each)


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        (
            "claude",
            {"CLAUDE_CODE_MAX_CONTEXT_TOKENS": "204800", "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "131072"},
        ),
        ("opencode", {"limit": {"context": 204800, "output": 131072}}),
        ("kilo", {"limit": {"context": 204800, "output": 131072}}),
        ("qwen", {"contextWindowSize": 204800, "max_tokens": 131072}),
        ("pi", {"contextWindow": 204800, "maxTokens": 131072}),
        ("cline", {"contextWindow": 204800, "maxTokens": 131072}),
        ("continue", {"contextLength": 204800, "maxTokens": 51200}),
        ("aider", {"max_input_tokens": 204800, "max_output_tokens": 131072}),
        ("gptme", {"GPTME_CONTEXT_LENGTH": "204800"}),
        (
            "copilot",
            {
                "COPILOT_PROVIDER_MAX_PROMPT_TOKENS": "153600",
                "COPILOT_PROVIDER_MAX_OUTPUT_TOKENS": "51200",
            },
        ),
        ("hermes", {"context_length": 204800, "max_tokens": 131072}),
    ],
)
def test_a_client_knows_how_much_its_model_takes_and_gives(name, limits):
    everything = client_told(name, MODELS["glm-4.7"])
    assert {key: [*found(key, everything)] for key in limits} == {
        key: [limit] for key, limit in limits.items()
    }


@pytest.mark.parametrize(
    ("name", "key", "blind", "seeing"),
    [
        ("opencode", "attachment", False, True),
        ("opencode", "input", ["text"], ["text", "image"]),
        ("kilo", "input", ["text"], ["text", "image"]),
        ("qwen", "image", False, True),
        ("pi", "input", ["text"], ["text", "image"]),
        ("continue", "capabilities", ["tool_use"], ["tool_use", "image_input"]),
        ("aider", "supports_vision", False, True),
        ("llm", "vision", False, True),
        ("hermes", "supports_vision", False, True),
    ],
)
def test_a_client_knows_whether_its_model_sees(name, key, blind, seeing):
    models = MODELS["glm-4.6"], MODELS["glm-4.6v"]
    assert [[*found(key, client_told(name, model))] for model in models] == [[blind], [seeing]]


@pytest.mark.parametrize("name", ["opencode", "pi", "llm"])
def test_a_client_knows_whether_its_model_thinks(name):
    models = MODELS["glm-4-32b-0414-128k"], MODELS["glm-4.6"]
    assert [[*found("reasoning", client_told(name, model))] for model in models] == [
        [False],
        [True],
    ]


def test_aider_knows_the_list_price_of_a_token():
    costs = {
        "input_cost_per_token": 0.6e-6,
        "cache_read_input_token_cost": 0.11e-6,
        "output_cost_per_token": 2.2e-6,
    }
    entry = client_told("aider", MODELS["glm-4.6"])["files"]["models.json"]["openai/glm-4.6"]
    assert {name: entry[name] for name in costs} == pytest.approx(costs)


def test_claude_code_hides_no_tool_and_asks_one_model_for_everything():
    variables = filled("claude").variables
    models = {value for name, value in variables.items() if name.endswith("_MODEL")}
    assert (models, variables["ENABLE_TOOL_SEARCH"]) == ({"glm-5.3"}, "false")
    assert {"ANTHROPIC_DEFAULT_FABLE_MODEL", "CLAUDE_CODE_AUTO_MODE_SERVER"} <= {*variables}


@pytest.mark.parametrize(
    ("key", "written"),
    [("sk-k", "sk-k"), ("$HOME", "$$HOME"), ("!ls", "$!ls"), ("a!$b$", "a!$$b$$")],
)
def test_pi_takes_a_key_literally(key, written):
    assert [*found("apiKey", json.loads(filled("pi", key=key).files["models.json"]))] == [written]


def test_the_readme_names_the_clients_of_the_table():
    assert f"({', '.join(ztoapi.CLIENTS)})" in (PROGRAM.parent / "README.md").read_text()


def test_the_page_shows_each_client_with_words_that_it_can_replace():
    examples = ztoapi.client_examples()
    assert [example["command"] for example in examples] == list(ztoapi.CLIENTS)
    words = re.findall(r"%(\w+)%", json.dumps(examples))
    assert {*words} == {*ztoapi.client_words("", "", MODELS["glm-5.3"])}


# ======== Z.ai: the request ========


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        pytest.param({}, {}, id="nothing more"),
        pytest.param({"temperature": 0.3}, {"temperature": 0.3}, id="temperature"),
        pytest.param({"temperature": 2}, {"temperature": 1}, id="hot"),
        pytest.param({"temperature": 0}, {"temperature": 0}, id="cold"),
        pytest.param({"top_p": 0}, {"top_p": 0.01}, id="top_p 0"),
        pytest.param({"top_p": 1}, {"top_p": 1}, id="top_p 1"),
        pytest.param(
            {"max_tokens": 999999}, {"max_tokens": 128 * 1024}, id="more than the model can"
        ),
        pytest.param(
            {"max_completion_tokens": 700}, {"max_tokens": 700}, id="max_completion_tokens"
        ),
        pytest.param({"stop": "x"}, {"stop": ["x"]}, id="stop"),
        pytest.param({"stop": []}, {}, id="no stop"),
        pytest.param(
            {"stop": [*"abcdefghijklmnop"]}, {"stop": [*"abcd"]}, id="more stops than Z.ai takes"
        ),
        pytest.param(
            {"stream": False, "stream_options": {"include_usage": True}},
            {},
            id="stream",
        ),
        pytest.param({"seed": 7}, {"seed": 7}, id="seed"),
        pytest.param({"user": "a"}, {"user_id": "user-a"}, id="a short user"),
        pytest.param({"user": "alice@example"}, {"user_id": "alice@example"}, id="a user"),
        pytest.param(
            {"user": "x" * 129},
            {"user_id": hashlib.sha256(b"x" * 129).hexdigest()},
            id="a long user",
        ),
        pytest.param({"user": "abcdef"}, {"user_id": "abcdef"}, id="a user just long enough"),
        pytest.param({"user": "x" * 128}, {"user_id": "x" * 128}, id="a user just short enough"),
        pytest.param(
            {"sensitive_word_check": {"a": 1}},
            {"sensitive_word_check": {"a": 1}},
            id="sensitive_word_check",
        ),
        pytest.param({"user": ""}, {}, id="no user"),
        pytest.param(
            {"response_format": {"type": "json_object"}},
            {"response_format": {"type": "json_object"}},
            id="json_object",
        ),
        pytest.param({"response_format": {"type": "text"}}, {}, id="response_format text"),
        pytest.param(
            {"tool_choice": "required", "parallel_tool_calls": False},
            {},
            id="tool_choice without tools",
        ),
        pytest.param({"tool_choice": function("f")}, {}, id="a named choice without tools"),
        pytest.param(
            {"do_sample": False, "request_id": "r1"},
            {"do_sample": False, "request_id": "r1"},
            id="Z.ai's own",
        ),
        pytest.param(
            {"metadata": {"a": 1}, "n": 2, "reasoning_format": "raw"},
            {},
            id="nothing that Z.ai does not know",
        ),
    ],
)
def test_zai_gets_what_it_takes(fields, wanted):
    body = body_for_zai(chat() | fields)
    messages = [{"role": "user", "content": "你好"}]
    assert body == {"model": "glm-4.6", "messages": messages, "stream": True} | wanted


def body_for_zai(body, model="glm-4.6", /, **settings):
    """What Z.ai gets of a chat."""
    plan = ztoapi.make_plan(read_chat(body), Settings(**settings), Account(""), "7")
    return zai_body(plan.prompts[0][1], MODELS[model])


def zai_messages(body, model="glm-4.6", parse=ztoapi.parse_chat):
    """The messages of a request as a model gets them, its history repaired."""
    prompt = replace(parse(body)[0], model=model)
    plan = ztoapi.make_plan(prompt, Settings(), Account(""), "7")
    return json.loads(ztoapi.zai_request(plan.prompts[0][1], resolve(model), ZAI, "7").data)[
        "messages"
    ]


ZAI = "https://api.z.ai/api/paas/v4"


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        pytest.param(["files.read"], ["files_read_89b43be6"], id="a dot"),
        pytest.param(["a b", "a.b", "a_b"], ["a_b_541e27fe", "a_b_68a4364b", "a_b"], id="alike"),
        pytest.param(["搜索"], ["___f91c99f4"], id="no letter"),
        pytest.param(["x" * 65], ["x" * 55 + "_1c9c4cf0"], id="too long"),
        pytest.param(
            ["x" * 64 + "a", "x" * 64 + "b"],
            ["x" * 55 + "_8a907b1c", "x" * 55 + "_8cb9731c"],
            id="both",
        ),
        pytest.param(["f\n"], ["f__99a6102d"], id="a line end"),
    ],
)
def test_an_illegal_name_of_a_tool_is_a_legal_one_for_zai(names, wanted):
    assert legal_for_zai(names) == wanted


def legal_for_zai(names):
    tools = body_for_zai(chat(tools=[function(name) for name in names]))["tools"]
    return [tool["function"]["name"] for tool in tools]


GOLDEN_CHAT = {
    "model": "zai/GLM-4.6:low",
    "messages": [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "你好"}]},
    ],
    "tools": [
        {"name": "read", "description": "Read", "input_schema": OBJECT},
        {"type": "function", "name": "list", "parameters": {"type": "object", "properties": []}},
        {"type": "custom", "custom": {"name": "patch", "format": {"type": "text"}}},
        {"type": "function", "function": {"name": "files.read", "parameters": []}},
        {"googleSearch": {}},
    ],
    "tool_choice": {"type": "any"},
    "max_completion_tokens": -1,
    "max_tokens": 4096.0,
    "stop": ["a", "b", "c", "d", "e"],
    "stream_options": [],
    "response_format": {"type": "json_object", "schema": OBJECT},
    "reasoning_effort": "auto",
    "include_reasoning": False,
    "prompt_cache_key": "k",
}


def test_a_chat_in_all_dialects_is_one_request_for_zai():
    def tool(name, description, parameters):
        return function(name, description=description, parameters=parameters)

    line = (
        "Answer only with JSON, without any other text and without Markdown, valid against "
        'this JSON Schema: {"type":"object","properties":{"a":{"type":"string"}}}'
    )
    names = "read, list, patch, files_read_89b43be6"
    orders = f"Answer by calling one of the functions {names}."
    plan = ztoapi.make_plan(read_chat(GOLDEN_CHAT), Settings(), Account(""), "7")
    assert plan.ignored == ("prompt_cache_key", "tools.googleSearch")
    assert plan.reasoning_format == "hidden"
    assert zai_body(plan.prompts[0][1], MODELS["glm-4.6"]) == {
        "model": "glm-4.6",
        "messages": [
            {"role": "system", "content": f"Be kind.\n{orders}\n{line}"},
            {"role": "user", "content": "你好"},
        ],
        "stream": True,
        "max_tokens": 4096,
        "stop": ["a", "b", "c", "d"],
        "tools": [
            tool("read", "Read", OBJECT),
            tool("list", "list", NO_PARAMETERS),
            tool("patch", "patch", ANY_TEXT),
            tool("files_read_89b43be6", "files.read", NO_PARAMETERS),
        ],
        "tool_stream": True,
        "response_format": {"type": "json_object"},
        "thinking": {"type": "enabled"},
    }


def test_the_same_chat_is_the_same_bytes_in_another_process():
    code = (
        "import json, sys, ztoapi; prompt = ztoapi.parse_chat(json.loads(sys.argv[1]))[0];"
        "plan = ztoapi.make_plan(prompt, ztoapi.Settings(), ztoapi.Account(''), '7');"
        "print(ztoapi.zai_request(plan.prompts[0][1], plan.asked, 'https://api.z.ai', '7').data)"
    )
    command = [sys.executable, "-c", code, json.dumps(GOLDEN_CHAT)]
    here = Path(ztoapi.__file__).parent
    said = subprocess.run(command, capture_output=True, text=True, cwd=here, check=True).stdout
    plan = ztoapi.make_plan(read_chat(GOLDEN_CHAT), Settings(), Account(""), "8")
    data = ztoapi.zai_request(plan.prompts[0][1], plan.asked, "https://api.z.ai", "8").data
    assert said.strip() == str(data)


@pytest.mark.parametrize("name", ["f", "read_file-2", "x" * 64, "mcp__server__do", "_", "-"])
def test_a_legal_name_of_a_tool_stays(name):
    assert legal_for_zai([name]) == [name]


def test_the_legal_name_depends_on_no_other_tool_unless_that_is_called_so():
    (alone,) = legal_for_zai(["files.read"])
    assert legal_for_zai(["a.b", "files.read", "c"])[1] == alone
    taken, other = legal_for_zai([alone, "files.read"])
    assert taken == alone != other
    assert re.fullmatch("files_read_[0-9a-f]{8}", other)


def test_names_of_tools_are_legal_in_history_and_in_our_own_lines():
    call = {"id": "c1", "type": "function", "function": {"name": "files.read", "arguments": "{}"}}
    old = {"id": "c2", "type": "function", "function": {"name": "gone!", "arguments": "{}"}}
    body = chat(
        messages=[
            QUESTION,
            {"role": "assistant", "content": "", "tool_calls": [call, old]},
            {"role": "tool", "tool_call_id": "c1", "content": "files.read"},
            {"role": "tool", "tool_call_id": "c2", "content": "x"},
        ],
        tools=[function("files.read"), function("f")],
        tool_choice=function("files.read"),
    )
    zai = body_for_zai(body)
    (legal,) = legal_for_zai(["files.read"])
    (legal_old,) = legal_for_zai(["gone!"])
    assert [tool["function"]["name"] for tool in zai["tools"]] == [legal]
    system, _, assistant, result, _ = zai["messages"]
    assert system["content"] == f"Answer by calling the function {legal}."
    calls = [call["function"]["name"] for call in assistant["tool_calls"]]
    assert calls == [legal, legal_old]
    assert result["content"] == "files.read"


MANY = [function(f"f{i}") for i in range(127)]


def deferred(name):
    return {"name": name, "input_schema": NO_PARAMETERS, "defer_loading": True}


@pytest.mark.parametrize(
    ("tools", "fields", "kept"),
    [
        pytest.param([deferred("a")], {}, ["a"], id="as many as Z.ai takes"),
        pytest.param([deferred("a"), deferred("b")], {}, [], id="one more"),
        pytest.param(
            [deferred("a"), deferred("b.c")],
            {"messages": [{"role": "user", "content": "Use b.c."}]},
            ["b.c"],
            id="one that is named",
        ),
        pytest.param(
            [deferred("a"), deferred("b")],
            {
                "messages": [
                    *HELLO["messages"],
                    {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "b"}}]},
                    {"role": "tool", "tool_call_id": "c1", "content": "x"},
                ]
            },
            ["b"],
            id="one that was called",
        ),
        pytest.param([deferred("a"), function("b")], {}, ["b"], id="one that is not deferred"),
    ],
)
def test_of_too_many_tools_the_deferred_go_that_nothing_names(tools, fields, kept):
    body = chat(tools=[*MANY, *tools], **fields)
    plan = ztoapi.make_plan(read_chat(body), Settings(), Account(""), "7")
    names = [plan.client_names.get(tool.name, tool.name) for tool in plan.prompts[0][1].tools]
    assert names == [f"f{i}" for i in range(127)] + kept
    dropped = len(tools) > len(kept)
    assert plan.ignored == (("tools.defer_loading",) if dropped else ())


@pytest.mark.parametrize(
    "tools",
    [
        [function("a"), function("b")],
        [deferred("a"), deferred("hi")],
        [{"type": "function", "name": f"f{i}"} for i in range(2)],
    ],
    ids=["functions", "deferred and named", "Responses' functions"],
)
def test_more_tools_than_zai_takes_are_refused(tools):
    body = chat(messages=[{"role": "user", "content": "a hi"}], tools=[*MANY, *tools])
    with pytest.raises(BadRequest) as raised:
        body_for_zai(body)
    assert raised.value.param == "tools"


def test_the_deferred_tools_of_messages_go_in_the_same_way():
    tools = [deferred(f"f{i}") for i in range(150)] + [{"name": "a", "input_schema": NO_PARAMETERS}]
    body = {**CLAUDE, "tools": tools, "messages": [{"role": "user", "content": "Use f77."}]}
    prompt, _ = ztoapi.parse_message(body)
    plan = ztoapi.make_plan(prompt, Settings(), Account(""), "7")
    assert [tool.name for tool in plan.prompts[0][1].tools] == ["f77", "a"]
    assert plan.ignored == ("tools.defer_loading",)


def test_a_choice_of_few_tools_may_come_from_very_many():
    body = chat(tools=[function(f"f{i}") for i in range(200)], tool_choice=function("f150"))
    assert [tool["function"]["name"] for tool in body_for_zai(body)["tools"]] == ["f150"]
    assert "tools" not in body_for_zai(body | {"tool_choice": "none"})


def efforts(body, **settings):
    """The models that a chat asks, each with how much it is to think."""
    plan = ztoapi.make_plan(read_chat(body), Settings(**settings), Account(""), "7")
    return [(model.id, prompt.effort) for model, prompt in plan.prompts]


@pytest.mark.parametrize(
    ("fields", "settings", "wanted"),
    [
        pytest.param({"model": "glm-4.6:off"}, {}, "off", id="by name"),
        pytest.param({"model": "glm-4.6-nothinking"}, {}, "off", id="by an ending"),
        pytest.param(
            {"model": "fast"}, {"model_aliases": (("fast", "glm-4.6:off"),)}, "off", id="by alias"
        ),
        pytest.param(
            {"model": "glm-4.6:off"}, {"enable_thinking": True}, "off", id="not by setting"
        ),
        pytest.param({"model": "glm-4.6:high", "max_tokens": 9}, {}, "high", id="not by limit"),
        pytest.param({"model": "glm-4.6:off", "think": True}, {}, "on", id="the request counts"),
        pytest.param(
            {"model": "glm-4.6:off", "reasoning_effort": "max"}, {}, "max", id="so does its effort"
        ),
        pytest.param(
            {"model": "glm-4.6:off", "reasoning_effort": "auto"}, {}, "off", id="auto says nothing"
        ),
        pytest.param({"model": "glm-4.6:free"}, {}, None, id="another word"),
    ],
)
def test_a_thinking_word_counts_where_the_request_says_nothing(fields, settings, wanted):
    assert efforts(chat(**fields), **settings) == [("glm-4.6", wanted)]


def test_a_fallback_thinks_as_the_first_model_where_its_own_name_does_not_say():
    body = chat(model="glm-4.6:off", fallbacks=["glm-4.7", "glm-5.3:low"])
    assert efforts(body) == [("glm-4.6", "off"), ("glm-4.7", "off"), ("glm-5.3", "low")]
    body["reasoning_effort"] = "max"
    assert efforts(body) == [("glm-4.6", "max"), ("glm-4.7", "max"), ("glm-5.3", "max")]


def sent(*messages, **fields):
    """The messages as Z.ai gets them."""
    return body_for_zai(chat(messages=list(messages)) | fields, "glm-4.6")["messages"]


QUESTION, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "Be kind."}
ASSISTANT_CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        pytest.param(
            {"role": "developer", "content": "x"},
            {"role": "system", "content": "x"},
            id="developer",
        ),
        pytest.param(
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "user", "content": "a\nb"},
            id="text parts are joined",
        ),
        pytest.param(
            {"role": "assistant", "content": "x", "reasoning": "hm"},
            {"role": "assistant", "content": "x", "reasoning_content": "hm"},
            id="thought",
        ),
    ],
)
def test_a_message_as_zai_takes_it(fields, wanted):
    assert sent(QUESTION, fields) == [QUESTION, wanted]


def test_a_call_and_its_result_as_zai_takes_them():
    asked = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    told = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]}
    wanted = [QUESTION, asked | {"content": ""}, told | {"content": "42"}]
    assert sent(QUESTION, asked, told) == wanted


@pytest.mark.parametrize(
    "fields",
    [
        {"content": ""},
        {"content": None},
        {"content": []},
        {"content": "\n"},
        {"content": None, "reasoning_content": "hm"},
        {"content": "<think>hm</think>\n"},
        {"content": "", "role": "system"},
        {"content": [{"type": "text", "text": ""}], "role": "developer"},
    ],
)
def test_a_message_with_nothing_in_it_that_wants_no_answer_is_left_out(fields):
    assert sent(QUESTION, {"role": "assistant", **fields}, QUESTION) == [QUESTION, QUESTION]


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        ([SYSTEM], [{"role": "user", "content": "Be kind."}]),
        (
            [SYSTEM, SYSTEM, {"role": "assistant", "content": "Yes"}],
            [
                SYSTEM,
                {"role": "user", "content": "Be kind."},
                {"role": "assistant", "content": "Yes"},
            ],
        ),
        (
            [SYSTEM, ASSISTANT_CALLS, {"role": "tool", "tool_call_id": "c1", "content": "0"}],
            [SYSTEM, ASSISTANT_CALLS, {"role": "tool", "tool_call_id": "c1", "content": "0"}],
        ),
    ],
)
def test_in_every_conversation_there_is_a_message_to_answer(messages, wanted):
    assert sent(*messages) == wanted


@pytest.mark.parametrize("role", ["assistant", "system"])
def test_a_conversation_with_nothing_in_it_is_refused(role):
    with pytest.raises(BadRequest, match="must not all be empty"):
        sent({"role": role, "content": ""}, {"role": role, "content": " "})


@pytest.mark.parametrize(
    ("content", "wanted"),
    [("", "(no output)"), ([], "(no output)"), ("\n", "(no output)"), ("0", "0")],
)
def test_an_empty_result_of_a_tool_is_said_in_words(content, wanted):
    result = {"role": "tool", "tool_call_id": "c1"}
    messages = sent(ASSISTANT_CALLS, result | {"content": content})
    assert messages == [ASSISTANT_CALLS, result | {"content": wanted}]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (
            {"content": "<think>\nhm</think>\n\nyes"},
            {"content": "yes", "reasoning_content": "\nhm"},
        ),
        (
            {
                "content": [
                    {"type": "text", "text": "\n<think>hm</think>yes"},
                    {"type": "text", "text": "no"},
                ]
            },
            {"content": "yes\nno", "reasoning_content": "hm"},
        ),
        (
            {"content": "<think>hm</think>", "tool_calls": [CALL]},
            {"content": "", "reasoning_content": "hm", "tool_calls": [CALL]},
        ),
        (
            {"content": "<think>a</think>yes", "reasoning_content": "b"},
            {"content": "yes", "reasoning_content": "b"},
        ),
        ({"content": "I <think>hm</think>"}, {"content": "I <think>hm</think>"}),
        ({"content": "<think>hm"}, {"content": "<think>hm"}),
    ],
)
def test_reasoning_at_the_head_of_an_assistants_text_is_its_reasoning(fields, wanted):
    assert sent(QUESTION, {"role": "assistant", **fields})[:2] == [
        QUESTION,
        {"role": "assistant", **wanted},
    ]


def test_a_user_may_write_of_tags():
    assert sent(QUESTION | {"content": "<think>hm</think>"}) == [
        QUESTION | {"content": "<think>hm</think>"}
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cut \ud83d", "cut \ufffd"),
        ("\ude00 cut", "\ufffd cut"),
        ("\ud83d\ude00", "😀"),
        ("\ud83d\ud83d\ude00x", "\ufffd😀x"),
    ],
)
def test_half_a_surrogate_pair_is_the_replacement_character(text, wanted):
    assert json.loads(ztoapi.encode_request({"a": text})) == {"a": wanted}


def test_an_image_goes_as_bare_base64_or_as_an_address():
    parts = [
        {"type": "text", "text": "what?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD", "detail": "high"}},
        {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
        {"type": "image_url", "image_url": {"url": "DATA:image/png;BASE64,QUJD"}},
        {"type": "text", "text": " "},
    ]
    body = zai_body(read_chat(message(role="user", content=parts)), MODELS["glm-4.6v"])
    assert body["messages"][0]["content"] == [
        {"type": "text", "text": "what?"},
        {"type": "image_url", "image_url": {"url": "QUJD"}},
        {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
        {"type": "image_url", "image_url": {"url": "QUJD"}},
    ]


def test_an_image_for_a_model_that_does_not_see_is_refused_with_names_of_those_that_do():
    with pytest.raises(BadRequest, match=r"glm-4\.6v-flash") as raised:
        ztoapi.check_vision(MODELS["glm-4.6"])
    assert raised.value.kind.code == "image_not_supported"


def zai_tools(**fields):
    return body_for_zai(chat(**fields), "glm-4.6")


EMPTY = {"type": "object", "properties": {}}
F, G = (function(name, description=name, parameters=EMPTY) for name in "fg")
SEARCH = {"type": "web_search", "web_search": {"enable": True}}


def test_a_model_we_do_not_know_may_answer_as_long_as_it_likes():
    assert zai_body(read_chat(chat(max_tokens=10**6)), resolve("glm-99"))["max_tokens"] == 10**6


def test_tools_are_completed():
    assert zai_tools(tools=[function("f", strict=True)])["tools"] == [F]


def test_zais_own_tools_go_as_they_are():
    natives = [
        SEARCH,
        {"type": "retrieval", "retrieval": {"knowledge_id": "1"}},
        {"type": "mcp", "mcp": {"server_label": "s"}},
    ]
    assert zai_tools(tools=[*natives, F])["tools"] == [F, *natives]


@pytest.mark.parametrize(
    ("model", "fields", "wanted"),
    [
        ("glm-4.6", {"tools": [F]}, True),
        ("glm-5.3", {"tools": [F]}, True),
        ("glm-4.5", {"tools": [F]}, None),
        ("glm-4.6", {"tools": [F], "stream": False}, True),
        ("glm-4.6", {}, None),
        ("glm-4.6", {"tools": [F], "tool_choice": "none"}, None),
        ("glm-4.6", {"tools": [F], "tool_stream": False}, False),
    ],
)
def test_arguments_are_streamed_where_they_can_be(model, fields, wanted):
    assert body_for_zai(chat(**fields), model).get("tool_stream") is wanted


def ordered(line):
    return [{"role": "system", "content": line}, *HELLO["messages"]]


@pytest.mark.parametrize(
    ("choice", "tools", "messages"),
    [
        pytest.param("auto", [F, G], HELLO["messages"], id="auto"),
        pytest.param("none", None, HELLO["messages"], id="none"),
        pytest.param(
            "required",
            [F, G],
            ordered("Answer by calling one of the functions f, g."),
            id="required",
        ),
        pytest.param(function("g"), [G], ordered("Answer by calling the function g."), id="named"),
        pytest.param(
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [function("g")]}},
            [G],
            HELLO["messages"],
            id="allowed_tools",
        ),
    ],
)
def test_tool_choice_on_a_server_that_knows_auto_alone(choice, tools, messages):
    body = zai_tools(tools=[F, G], tool_choice=choice)
    assert (body.get("tools"), body["messages"]) == (tools, messages)
    assert "tool_choice" not in body


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ([], EMPTY),
        ({"type": "object", "properties": []}, EMPTY),
        (
            {"type": "object", "properties": {"a": {"type": "object", "properties": []}}},
            {"type": "object", "properties": {"a": EMPTY}},
        ),
        ({"type": "object", "required": []}, {"type": "object", "required": []}),
    ],
    ids=["parameters", "properties", "nested", "an array that is one"],
)
def test_an_empty_object_of_phps_is_an_object_in_a_tool(parameters, wanted):
    tools = zai_tools(tools=[function("f", description="f", parameters=parameters)])["tools"]
    assert tools == [function("f", description="f", parameters=wanted)]


@pytest.mark.parametrize("field", ["stream_options", "reasoning", "chat_template_kwargs"])
def test_an_empty_object_of_phps_is_an_object_in_a_request(field):
    assert read_chat(chat(**{field: []})) == read_chat(chat(**{field: {}}))


def test_an_empty_object_of_phps_is_an_object_in_a_response():
    fields = {"metadata": [], "reasoning": [], "text": []}
    _, response, _ = respond([Text("x"), Finish("stop")], **fields)
    _, plain, _ = respond([Text("x"), Finish("stop")])
    assert response == plain


def test_a_choice_that_is_not_among_the_tools_is_refused():
    with pytest.raises(BadRequest) as raised:
        zai_tools(tools=[F], tool_choice=function("h"))
    assert raised.value.param == "tool_choice"
    with pytest.raises(BadRequest):
        zai_tools(tools=[SEARCH], tool_choice=function("h"))


def test_tools_of_zais_own_are_not_ordered_to_be_called():
    assert zai_tools(tools=[SEARCH], tool_choice="required")["messages"] == HELLO["messages"]


ORDER = "Answer by calling the function f."


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        ([SYSTEM, QUESTION], [SYSTEM | {"content": f"Be kind.\n{ORDER}"}, QUESTION]),
        (
            [QUESTION, SYSTEM, SYSTEM],
            [QUESTION, SYSTEM | {"content": f"Be kind.\n{ORDER}"}, SYSTEM],
        ),
        ([SYSTEM], [SYSTEM | {"content": ORDER}, SYSTEM | {"role": "user"}]),
    ],
)
def test_an_order_is_added_to_the_first_system_message(messages, wanted):
    assert sent(*messages, tools=[F], tool_choice="required") == wanted


def test_a_schema_goes_as_an_order():
    schema = {"type": "object", "properties": {"城市": {"type": "string"}}}
    body = zai_tools(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "x", "strict": True, "schema": schema},
        }
    )
    assert body["response_format"] == {"type": "json_object"}
    assert body["messages"][0]["content"].endswith(
        ': {"type":"object","properties":{"城市":{"type":"string"}}}'
    )


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, {}),
        ({"search_context_size": "low"}, {}),
        ({"search_context_size": "high"}, {"content_size": "high"}),
    ],
)
def test_web_search_options_are_a_tool(options, more):
    search = {"enable": True, "search_engine": "search-prime", "search_result": True} | more
    assert zai_tools(web_search_options=options)["tools"] == [
        {"type": "web_search", "web_search": search}
    ]


def test_a_search_of_zais_own_is_not_doubled():
    assert zai_tools(web_search_options={}, tools=[SEARCH])["tools"] == [SEARCH]


NULL = {"type": "null"}
POINT = {"type": "object", "properties": {"x": {"type": "number"}}}


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        pytest.param(POINT, POINT, id="no references"),
        pytest.param(
            {"properties": {"p": {"$ref": "#/$defs/P"}}, "$defs": {"P": POINT}},
            {"properties": {"p": POINT}},
            id="$defs",
        ),
        pytest.param(
            {
                "properties": {"p": {"$ref": "#/definitions/P", "description": "d"}},
                "definitions": {"P": POINT},
            },
            {"properties": {"p": {**POINT, "description": "d"}}},
            id="definitions, with more beside",
        ),
        pytest.param(
            {
                "items": {"$ref": "#/$defs/A"},
                "$defs": {"A": {"anyOf": [{"$ref": "#/$defs/P"}]}, "P": POINT},
            },
            {"items": {"anyOf": [POINT]}},
            id="a reference in a definition",
        ),
        pytest.param({"$ref": "#/$defs/P", "$defs": {"P": POINT}}, POINT, id="at the root"),
        pytest.param(
            {"properties": {"$ref": {"type": "string"}}, "$defs": {"P": POINT}},
            {"properties": {"$ref": {"type": "string"}}},
            id="a property of that name",
        ),
        pytest.param(
            {"items": {"$ref": "#/else/P"}, "$defs": {"P": POINT}},
            {"items": {"$ref": "#/else/P"}, "$defs": {"P": POINT}},
            id="unknown",
        ),
        pytest.param(
            {"items": {"$ref": "#/$defs/P/properties/x"}, "$defs": {"P": POINT}},
            {"items": {"$ref": "#/$defs/P/properties/x"}, "$defs": {"P": POINT}},
            id="a place inside a definition",
        ),
        *(
            pytest.param(
                {"properties": {name: {"$ref": "#/$defs/P"}}, "$defs": {"P": POINT}},
                {"properties": {name: POINT}},
                id=f"a property named {name}",
            )
            for name in ("enum", "const", "default", "examples", "$schema", "properties")
        ),
        *(
            pytest.param(
                {"items": {place: {"enum": {"$ref": "#/$defs/P"}}}, "$defs": {"P": POINT}},
                {"items": {place: {"enum": POINT}}},
                id=place,
            )
            for place in ("patternProperties", "dependentSchemas", "$defs", "definitions")
        ),
        pytest.param(
            {"const": {"$ref": "#/$defs/P"}, "items": {"$ref": "#/$defs/P"}, "$defs": {"P": POINT}},
            {"const": {"$ref": "#/$defs/P"}, "items": POINT},
            id="data that looks like a reference",
        ),
        pytest.param({"$schema": "x", "type": "object"}, {"type": "object"}, id="$schema"),
        pytest.param(
            {"properties": {"$schema": POINT}},
            {"properties": {"$schema": POINT}},
            id="a property $schema",
        ),
        pytest.param(
            {"anyOf": [{"type": "string", "title": "A"}, NULL], "default": None, "title": "B"},
            {"type": "string", "title": "B"},
            id="or null",
        ),
        pytest.param(
            {"properties": {"p": {"default": 0, "oneOf": [NULL, {"type": "integer"}]}}},
            {"properties": {"p": {"type": "integer", "default": 0}}},
            id="null or, with a default",
        ),
        pytest.param(
            {"anyOf": [{"$ref": "#/$defs/P"}, NULL], "$defs": {"P": {"anyOf": [NULL, POINT]}}},
            POINT,
            id="a reference or null",
        ),
        pytest.param(
            *({"anyOf": [POINT, {"type": "string"}, NULL], "default": None},) * 2,
            id="more than one or null",
        ),
        pytest.param(*({"anyOf": [POINT]},) * 2, id="a union without null"),
        pytest.param(
            *({"enum": [{"anyOf": [POINT, NULL]}]},) * 2, id="data that looks like a union"
        ),
    ],
)
def test_references_and_unions_with_null_go_from_a_schema(schema, wanted):
    assert RefInliner(schema).inline_all() == wanted


def test_a_schema_that_contains_itself_stays():
    node = {"properties": {"next": {"$ref": "#/$defs/Node"}}}
    schema = {"items": {"$ref": "#/$defs/Node"}, "$defs": {"Node": node}}
    assert RefInliner(schema).inline_all() == {"items": node, "$defs": {"Node": node}}


@pytest.mark.parametrize("often", [1, 2], ids=["deep", "wide"])
def test_a_schema_that_would_grow_out_of_bounds_stays(often):
    chained = {f"D{i}": {"anyOf": [{"$ref": f"#/$defs/D{i + 1}"}] * often} for i in range(400)}
    schema = {"$ref": "#/$defs/D0", "$defs": chained}
    assert RefInliner(schema).inline_all() == schema


def test_what_tools_say_of_themselves_reaches_zai_with_references_in_place():
    schema = {"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "$defs": {"P": POINT}}
    tool = zai_tools(tools=[function("f", description="does f", parameters=schema)])["tools"][0]
    inlined = {"type": "object", "properties": {"p": POINT}}
    assert tool["function"] == {"name": "f", "description": "does f", "parameters": inlined}


ON, OFF = {"thinking": {"type": "enabled"}}, {"thinking": {"type": "disabled"}}


@pytest.mark.parametrize(
    ("model", "effort", "wanted"),
    [
        ("glm-4-32b-0414-128k", "none", {}),
        ("glm-4-32b-0414-128k", "high", {}),
        *(("glm-4.6", effort, OFF) for effort in ("none", "minimal")),
        *(("glm-4.6", effort, ON) for effort in ("low", "medium", "high", "xhigh", "max")),
        *(("glm-5.2", effort, OFF) for effort in ("none", "minimal")),
        *(
            ("glm-5.2", effort, ON | {"reasoning_effort": effort})
            for effort in ("low", "medium", "high", "xhigh", "max")
        ),
        *(
            ("glm-5.3", effort, {"reasoning_effort": "low"})
            for effort in ("none", "minimal", "low")
        ),
        *(("glm-5.3", effort, {"reasoning_effort": "high"}) for effort in ("medium", "high")),
        *(("glm-5.3", effort, {"reasoning_effort": "max"}) for effort in ("xhigh", "max")),
    ],
)
def test_an_effort_is_what_the_model_takes(model, effort, wanted):
    body = body_for_zai(chat(reasoning_effort=effort), model)
    assert {name: body[name] for name in ("thinking", "reasoning_effort") if name in body} == wanted


@pytest.mark.parametrize(
    ("model", "wanted"),
    [("glm-4-32b-0414-128k", None), ("glm-4.6", ON), ("glm-5.2", ON), ("glm-5.3", None)],
)
def test_thinking_on_without_an_effort(model, wanted):
    body = body_for_zai(chat(enable_thinking=True), model)
    assert (body.get("thinking"), "reasoning_effort" in body) == (
        wanted and wanted["thinking"],
        False,
    )


def test_nothing_said_about_thinking_is_nothing_sent():
    assert (
        not {"thinking", "reasoning_effort"} & zai_body(read_chat(HELLO), MODELS["glm-5.2"]).keys()
    )


THOUGHT = [{"role": "assistant", "content": "x", "reasoning_content": "hm"}, *HELLO["messages"]]


@pytest.mark.parametrize(
    ("model", "fields", "wanted"),
    [
        ("glm-4.6", {"messages": THOUGHT}, {"type": "enabled", "clear_thinking": False}),
        (
            "glm-4.6",
            {"messages": THOUGHT, "enable_thinking": False},
            {"type": "disabled", "clear_thinking": False},
        ),
        (
            "glm-4.6",
            {"messages": THOUGHT, "thinking": {"clear_thinking": True}},
            {"type": "enabled", "clear_thinking": True},
        ),
        ("glm-5.3", {"messages": THOUGHT}, {"type": "enabled", "clear_thinking": False}),
        (
            "glm-4.6",
            {"thinking": {"type": "disabled", "clear_thinking": True}},
            {"type": "disabled", "clear_thinking": True},
        ),
        ("glm-4-32b-0414-128k", {"messages": THOUGHT}, None),
        (
            "glm-4.6",
            {
                "messages": [
                    THOUGHT[0] | {"content": "<think>hm</think>x", "reasoning_content": ""},
                    *THOUGHT[1:],
                ]
            },
            {"type": "enabled", "clear_thinking": False},
        ),
    ],
)
def test_reasoning_sent_back_is_kept(model, fields, wanted):
    assert body_for_zai(chat(**fields), model).get("thinking") == wanted


USER, SAID, TOOL_SAID = (
    Message("user", ("u",)),
    Message("assistant", ("a",)),
    Message("tool", ("r",), call_id="c"),
)
KNOWN = replace(SAID, thought="the client's own")


@pytest.mark.parametrize(
    ("messages", "start", "thoughts"),
    [
        (
            (USER, SAID, USER, SAID, TOOL_SAID, KNOWN),
            0,
            ["", "said", "", "said", "", "the client's own"],
        ),
        (
            (USER, SAID, USER, SAID, TOOL_SAID, KNOWN),
            3,
            ["", "", "", "said", "", "the client's own"],
        ),
        ((SAID,), 0, ["said"]),
        ((USER, SAID, USER), 3, ["", "", ""]),
    ],
)
def test_reasoning_that_a_client_dropped_is_put_back(messages, start, thoughts):
    assert ztoapi.turn_start(messages) in (start, 3)
    assert ztoapi.turn_start((*messages, from_tools(SKY))) == ztoapi.turn_start(messages)
    asked = ztoapi.with_reasoning(
        messages, start, lambda message: "".join(["said"] * (message.content == ("a",)))
    )
    assert asked == tuple(
        replace(message, thought=thought)
        for message, thought in zip(messages, thoughts, strict=True)
    )


@meanwhile
async def test_the_same_conversation_is_the_same_bytes_in_every_process():
    """Sets and hash() differ from process to process."""
    words = "import json, sys, ztoapi; body = json.load(sys.stdin); prompt = ztoapi.parse_chat(body)[0]\n"
    words += "print(ztoapi.json_text(ztoapi.zai_body(prompt, ztoapi.resolve(prompt.model))), *ztoapi.conversation_start(prompt))"
    schema = {"$defs": {name: {"type": "string"} for name in "qwertyuiop"}, "type": "object"}
    schema["properties"] = {name: {"$ref": f"#/$defs/{name}"} for name in "qwertyuiop"}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name in ("b", "a", "c")
    ]
    answer_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = chat(
        tools=tools,
        tool_choice="required",
        response_format=answer_format,
        user="me",
        web_search_options={},
    )
    asking = [
        subprocess.Popen(
            [sys.executable, "-c", words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROGRAM.parent,
            env={**INHERITED, "PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2", "3")
    ]
    first, *others = (process.communicate(json.dumps(body), timeout=20)[0] for process in asking)
    assert first.startswith('{"model":"glm-4.6"')
    assert others == [first] * 2


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "readable"),
    [
        pytest.param(nested(ztoapi.MAX_ANSWER_DEPTH), True, id="just"),
        pytest.param(nested(ztoapi.MAX_ANSWER_DEPTH + 1), False, id="deeper"),
        pytest.param(nested(900), False, id="so that it could be decoded"),
        pytest.param(nested(100_000), False, id="so that it could not"),
        pytest.param(json.dumps("[" * 9_999), True, id="a text of brackets"),
        pytest.param("[" + "[]," * 9_999 + "0]", True, id="wide"),
    ],
)
def test_an_answer_nested_too_deep_to_be_encoded_again_is_unreadable(text, readable):
    assert (ztoapi.parse_json(text.encode()) is not None) == readable


def test_a_chunk_nested_too_deep_is_lost_when_it_is_torn():
    chunk = f'{{"choices":{nested(ztoapi.MAX_ANSWER_DEPTH)}}}'
    assert ztoapi.salvage(chunk + "{") == ([], 0, chunk + "{")


# ======== Z.ai: refusals ========

# Every row of the table: Z.ai's code, its HTTP status, what the client gets.
REFUSED = [
    *((code, 401, 502, "upstream_error", "zai_authentication") for code in range(1000, 1006)),
    (1113, 429, 402, "insufficient_quota", "insufficient_quota"),
    *(
        (code, 400, 400, "invalid_request_error", f"zai_{code}")
        for code in (1210, 1213, 1214, 1215, 1221, 1222, 1299)
    ),
    *((code, 400, 404, "invalid_request_error", "model_not_found") for code in (1211, 1212)),
    *((code, 403, 403, "permission_error", "model_not_available") for code in (1220, 1311)),
    (1261, 400, 400, "invalid_request_error", "context_length_exceeded"),
    (1301, 400, 400, "invalid_request_error", "content_filter"),
    *((code, 429, 429, "rate_limit_error", "rate_limit_exceeded") for code in (1302, 1305, 1399)),
    *(
        (code, 429, 402, "insufficient_quota", "quota_exceeded")
        for code in (1308, 1310, *range(1316, 1322))
    ),
    *((code, 429, 403, "permission_error", "plan_not_usable") for code in (1309, 1313, 1314, 1315)),
    *((code, 500, 502, "upstream_error", "zai_unavailable") for code in (1200, 1230, 1234)),
    (1999, 418, 418, "upstream_error", "zai_1999"),
]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: str(row[0]))
def test_every_code_of_zais_is_what_the_table_says(row):
    code, http, status, kind, ours = row
    error = zai_error(http, json.dumps({"error": {"code": str(code), "message": "Words"}}).encode())
    assert error.kind == ErrorKind(status, kind, ours)
    assert str(error).endswith(f"(Z.ai {code}: Words)")


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: str(row[0]))
def test_a_code_inside_a_200_means_the_same(row):
    code, _, status, kind, ours = row
    error = zai_error(200, {"error": {"code": code, "message": "Words"}})
    named = code not in (1299, 1399, 1999)
    assert error.kind == (
        ErrorKind(status, kind, ours) if named else ErrorKind(502, "upstream_error", f"zai_{code}")
    )


@pytest.mark.parametrize(
    ("http", "body", "status", "code"),
    [
        pytest.param(200, '{"code":401,"msg":"token expired or incorrect","success":false}', 502, "zai_authentication", id="401 in a 200"),
        pytest.param(401, "", 502, "zai_authentication", id="bare 401"),
        pytest.param(400, "", 400, "zai_400", id="bare 400"),
        pytest.param(429, "", 429, "rate_limit_exceeded", id="bare 429"),
        pytest.param(500, "", 502, "zai_unavailable", id="bare 500"),
        pytest.param(502, "<html>Bad Gateway</html>", 502, "zai_unavailable", id="HTML"),
        pytest.param(200, "<html>hello</html>", 502, "zai_unavailable", id="HTML in a 200"),
        pytest.param(200, "", 502, "zai_unavailable", id="nothing"),
        pytest.param(200, "{", 502, "zai_unavailable", id="junk"),
        pytest.param(404, '{"timestamp":1,"status":404,"error":"Not Found","path":"/v4/v1/x"}', 502, "zai_wrong_address", id="Spring"),
        pytest.param(404, '{"error":{"code":"500","message":"404 NOT_FOUND"}}', 502, "zai_wrong_address", id="gateway"),
        pytest.param(404, "", 502, "zai_wrong_address", id="bare 404"),
        pytest.param(301, "", 502, "zai_wrong_address", id="redirect"),
        pytest.param(403, '{"message":"no"}', 403, "zai_403", id="no code"),
        pytest.param(500, '{"error":{"code":"1299","message":"?"}}', 502, "zai_unavailable", id="unknown code in a 500"),
        pytest.param(429, '{"type":"error","error":{"type":"x","code":"1308","message":"y"}}', 402, "quota_exceeded", id="Anthropic's"),
    ],
)  # fmt: skip
def test_what_comes_without_a_known_code_goes_by_its_status(http, body, status, code):
    kind = zai_error(http, body.encode()).kind
    assert (kind.status, kind.code) == (status, code)


TOO_LONG = zai_error(400, b'{"error":{"code":"1261","message":"Prompt exceeds max length"}}')
OVERFLOW_WORDS = ("context_length_exceeded", "reduce the length of the messages")


def test_a_full_window_is_told_in_words_by_which_agents_compact():
    openai_words = error_body(TOO_LONG)["error"]["message"]
    assert openai_words.startswith("context_length_exceeded: ")
    assert "reduce the length of the messages" in openai_words
    assert openai_words.endswith("(Z.ai 1261: Prompt exceeds max length)")
    _, body = ztoapi.anthropic_error(TOO_LONG, "req_1")
    anthropic = body["error"]
    assert anthropic["type"] == "invalid_request_error"
    assert anthropic["message"] == f"prompt is too long: {openai_words}"


@pytest.mark.parametrize(
    ("code", "is_refusal"), [(399, False), (400, True), (503, True), (599, True), (600, False)]
)
def test_a_status_in_a_success_is_a_refusal_if_it_is_one_of_failure(code, is_refusal):
    refusal = ztoapi.refusal_in(b'{"code":%d,"msg":"x","success":false}' % code)
    assert (refusal is not None) is is_refusal


def test_no_balance_names_the_address_of_the_coding_plan():
    assert "https://api.z.ai/api/coding/paas/v4" in str(
        zai_error(429, b'{"error":{"code":"1113","message":""}}')
    )


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("glm-4.6", 1113, "add money or use a free model, such as glm-4.7-flash. (Z.ai 1113: no)"),
        ("glm-4.7-flash", 1113, "coding/paas/v4. (Z.ai 1113: no)"),
    ],
)
def test_no_balance_advises_no_free_model_for_a_free_one(model, code, words):
    error = zai_error(400, {"error": {"code": str(code), "message": "no"}})
    ztoapi.fit_to_model(error, resolve(model))
    assert str(error).endswith(words)
    assert ("use a free model" in str(error)) is ("use a free model" in words)


def test_the_time_of_a_reset_has_its_zone():
    text = "will reset at 2026-09-12 00:35:41"
    error = zai_error(429, {"error": {"code": "1308", "message": text}})
    ours = "is used up until it is reset. That is on 2026-09-11 at 16:35 UTC."
    assert str(error).endswith(f"{ours} (Z.ai 1308: {text} UTC+8)")
    assert error.for_others(5).message == error.message


# ======== Z.ai: the answer ========


def chunk_of(*deltas):
    """Deltas as stream_of and document_of take them; a text alone is content."""
    return [delta if isinstance(delta, dict) else {"content": delta} for delta in deltas]


def stream_of(*chunks, done="data: [DONE]\n\n", ensure_ascii=False):
    """Chunks as Z.ai streams them; a delta alone is put into its chunk."""
    deltas = chunk_of(*chunks)
    whole = [
        c if "choices" in c else {"id": "7", "created": 1, "choices": [{"index": 0, "delta": c}]}
        for c in deltas
    ]
    return (
        "".join(f"data: {json.dumps(c, ensure_ascii=ensure_ascii)}\n\n" for c in whole).encode()
        + done.encode()
    )


def finish(reason="stop", **more):
    return {
        "id": "7",
        "choices": [
            {"index": 0, "finish_reason": reason, "delta": {"role": "assistant", "content": ""}}
        ],
        **more,
    }


def document_of(message, reason="stop", **more):
    return json.dumps(
        {"id": "7", "choices": [{"message": message, "finish_reason": reason}], **more}
    ).encode()


# As recorded (October 2025: no object, no finish_reason, the role in every delta, usage in the last chunk).
RECORDED = """\
data: {"id":"2025","created":1760762344,"model":"glm-4.6","choices":[{"index":0,"delta":{"role":"assistant","reasoning_content":"想"}}]}

data: {"id":"2025","created":1760762344,"model":"glm-4.6","choices":[{"index":0,"delta":{"role":"assistant","content":"\\n你"}}]}

data: {"id":"2025","created":1760762344,"model":"glm-4.6","choices":[{"index":0,"delta":{"role":"assistant","content":"好😀"}}]}

data: {"id":"2025","created":1760762344,"model":"glm-4.6","choices":[{"index":0,"finish_reason":"stop","delta":{"role":"assistant","content":""}}],"usage":{"prompt_tokens":6,"completion_tokens":3,"total_tokens":9,"prompt_tokens_details":{"cached_tokens":2}}}

data: [DONE]

""".encode()
FIRST = RECORDED[: RECORDED.index(b"\n\n") + 2]
RECORDED_EVENTS = [Thought("想"), Text("你"), Text("好😀"), Usage(6, 3, 9, 2), Finish("stop")]

# As recorded in March 2026, tool_stream off: the whole call in one delta.
RECORDED_CALL = b"""\
data: {"id":"2026","created":1,"object":"chat.completion.chunk","model":"glm-5","choices":[{"index":0,"delta":{"tool_calls":[{"id":"call_417fb","index":0,"type":"function","function":{"name":"bash","arguments":"{\\"cmd\\":\\"ls\\"}"}}]}}]}

data: {"id":"2026","created":1,"object":"chat.completion.chunk","model":"glm-5","choices":[{"index":0,"finish_reason":"tool_calls","delta":{"role":"assistant","content":""}}],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}

data: [DONE]

"""
RECORDED_CALL_EVENTS = [
    ToolCall(0, "call_417fb", "bash", '{"cmd":"ls"}'),
    Usage(1, 2, 3),
    Finish("tool_calls"),
]

# The same answer as RECORDED, asked for whole.
DOCUMENT = json.dumps(
    {
        "id": "2025",
        "request_id": "2025",
        "created": 1760762344,
        "model": "glm-4.6",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "reasoning_content": "想", "content": "\n你好😀"},
            }
        ],
        "usage": {
            "prompt_tokens": 6,
            "completion_tokens": 3,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    },
    ensure_ascii=False,
).encode()


class Mended:
    """Z.ai's bytes as mended events."""

    def __init__(self, model="glm-4.6", tools=(), *, wants_json=False, quoted="", **more):
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
        needs = ztoapi.RepairNeeds(MODELS[model], "7", offered, wants_json, quoted, **more)
        self.reader = ZaiReader(MODELS[model])
        self.chain = ztoapi.RepairChain(ztoapi.repairs_for(needs))

    def feed(self, part):
        for event in self.reader.feed(part):
            yield from self.chain.feed(event)

    def close(self):
        for event in self.reader.close():
            yield from self.chain.feed(event)


def read_all(parts, **asked):
    mended = Mended(**asked)
    return [event for part in parts for event in mended.feed(part)] + list(mended.close())


def summed(events):
    return chat_document(events)["choices"], chat_document(events)["usage"]


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        pytest.param(RECORDED, RECORDED_EVENTS, id="text"),
        pytest.param(RECORDED_CALL, RECORDED_CALL_EVENTS, id="a call"),
        pytest.param(RECORDED.replace(b"\n", b"\r\n"), RECORDED_EVENTS, id="CR LF"),
        pytest.param(RECORDED.removesuffix(b"data: [DONE]\n\n"), RECORDED_EVENTS, id="no [DONE]"),
        pytest.param(RECORDED.rstrip(), RECORDED_EVENTS, id="no last line end"),
    ],
)
def test_a_stream_gives_its_events_wherever_it_is_cut(data, wanted):
    for parts in cuts(data):
        assert read_all(parts) == wanted


def outcome(events):
    """What events add up to: reasoning, text, the calls, the finish."""
    choice = ztoapi.Answer(events).choices[0]
    calls = [(call.id, call.name, call.arguments) for call in choice.tool_calls]
    return choice.thought, choice.text, calls, choice.finish


def message_of(deltas):
    """The message of a whole answer that says the same as these deltas."""
    message = {"role": "assistant"}
    for delta in chunk_of(*deltas):
        for name, value in delta.items():
            message[name] = message[name] + value if name in message else value
    return message


MANY_DELTAS = 20  # of one letter or so: to cut their stream at each of its bytes takes seconds, and finds nothing more


def outcomes_of(deltas, reason="stop", **asked):
    """What comes of an answer: whole, streamed at once, cut anywhere unless in many deltas, and byte by byte; each once."""
    answers = [[document_of(message_of(deltas), reason)]]
    stream = stream_of(*chunk_of(*deltas), finish(reason))
    if len(deltas) < MANY_DELTAS:
        answers += cuts(stream)
    else:
        answers += [[stream], bytes_of(stream)]
    found = []
    for parts in answers:
        this = outcome(read_all(parts, **asked))
        if this not in found:
            found.append(this)
    return found


def says(text="", thought="", calls=(), finish="stop"):
    """What must come of an answer, however it comes."""
    return [(thought, text, list(calls), finish)]


@pytest.mark.parametrize(
    ("deltas", "wanted"),
    [
        (["a\ud83d", "\ude00b"], says("a😀b")),
        (["\ud83d", "\ude00"], says("😀")),
        (["a\ud83d", "b\ude00"], says("a\ufffdb\ufffd")),
        (["a\ud83d"], says("a\ufffd")),
        (["\ud83d", "\ud83d", "\ude00"], says("\ufffd😀")),
        ([{"reasoning_content": "\ud83d"}, "\ude00"], says("\ufffd", "\ufffd")),
        ([{"reasoning_content": "\ud83d"}, {"reasoning_content": "\ude00"}], says("", "😀")),
        (["한글 \ud55c", "\ud7a3"], says("한글 한힣")),
    ],
    ids=["two", "alone", "apart", "no other", "the second", "thought", "thoughts", "Korean"],
)
def test_half_a_character_waits_for_its_other_half(deltas, wanted):
    for parts in cuts(stream_of(*deltas, finish(), ensure_ascii=True)):
        assert [outcome(read_all(parts))] == wanted


def test_half_a_character_is_whole_in_a_whole_answer_too():
    assert outcome(read_all([document_of({"content": "\ud83d\ude00\ud83d"})]))[1] == "😀\ufffd"


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        (['{"a":"\ud83d', '\ude00"}'], '{"a":"😀"}'),
        (['{"a":"\ud83d', "", '\ude00"}'], '{"a":"😀"}'),
        (['{"a":"\ud83d', '"}'], '{"a":"\ufffd"}'),
    ],
)
def test_half_a_character_in_arguments_waits_for_its_other_half(pieces, wanted):
    first, *others = pieces
    deltas = [
        piece(id="a", index=0, function=named("f", first)),
        *(piece(index=0, function={"arguments": more}) for more in others),
    ]
    for parts in cuts(stream_of(*deltas, finish(), ensure_ascii=True)):
        assert outcome(read_all(parts))[2] == [("a", "f", wanted)]


def test_half_a_character_does_not_wait_for_another_call_at_the_same_index():
    calls = [ToolCall(0, "c1", "f", "\ud83d"), ToolCall(0, "c2", "g", "\ude00")]
    alone = ToolCall(0, "c1", "", "\ufffd")
    halves = ztoapi.HalfPairs()
    joined = [*halves.feed(calls), *halves.close()]
    assert joined == [ToolCall(0, "c1", "f", ""), alone, ToolCall(0, "c2", "g", "\ufffd")]


def test_no_text_gets_out_as_half_a_character():
    reader = Mended()
    halves = [stream_of(text, done="", ensure_ascii=True) for text in ("a\ud83d", "\ude00b")]
    assert [list(reader.feed(data)) for data in halves] == [[Text("a")], [Text("😀b")]]


@pytest.mark.parametrize("word", ["\ud83d", "x\ude00"])
def test_what_a_search_found_has_no_half_a_character(word):
    document = json.loads(document_of(HI)) | {"web_search": [FOUND | {"title": word}]}
    (found,) = read_all([json.dumps(document).encode()])[1].results
    assert found["title"] == word.replace("\ud83d", "\ufffd").replace("\ude00", "\ufffd")


def test_a_whole_answer_without_a_finish_reason_is_complete():
    assert read_all([document_of(HI, None)])[-1] == Finish("stop")


def test_all_chunks_have_the_first_ones_id():
    reader = ZaiReader(MODELS["glm-4.6"])
    list(reader.feed(RECORDED.replace(b'"2025"', b'"2024"', 1)))
    assert reader.id == "2024"


def test_a_whole_answer_gives_the_same_wherever_it_is_cut():
    for parts in cuts(DOCUMENT):
        assert summed(read_all(parts)) == summed(RECORDED_EVENTS)


def test_an_events_text_comes_out_with_the_part_that_completes_it():
    assert list(ZaiReader(MODELS["glm-4.6"]).feed(FIRST)) == [Thought("想")]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b": keep-alive\n\n", id="comments alone"),
        pytest.param(b"<html>no</html>", id="HTML"),
        pytest.param(b"data: <html>\n\n", id="HTML in a frame"),
        pytest.param(b"data: [1]\n\n", id="no object"),
        pytest.param(b"data: [DONE]\n\n", id="[DONE] alone"),
        pytest.param(RECORDED[: RECORDED.index(b"data: [DONE]") - 300], id="half a stream"),
        pytest.param(DOCUMENT[:-9], id="half a document"),
        pytest.param(b'{"id":"1"}', id="a document without choices"),
        pytest.param(b'{"id":"1","choices":[]}', id="a document with no choices"),
        pytest.param(b'{"id":"1","choices":null}', id="a document with choices null"),
        pytest.param(
            document_of(
                {"tool_calls": [{"function": {"name": "f", "arguments": {"x": math.nan}}}]}
            ),
            id="NaN",
        ),
        pytest.param(RECORDED.replace(b'"stop"', b'"network_error"'), id="network_error"),
    ],
)
def test_what_is_not_a_finished_answer_is_a_failure(data):
    for parts in cuts(data):
        with pytest.raises(UpstreamError) as failed:
            read_all(parts)
        assert failed.value.kind == ztoapi.UNAVAILABLE


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b'{"error":{"code":"1305","message":"busy"}}', id="document"),
        pytest.param(b'data: {"error":{"code":"1305","message":"busy"}}\n\n', id="frame"),
    ],
)
def test_an_error_inside_a_200_is_an_error(data):
    for parts in cuts(data):
        with pytest.raises(UpstreamError, match="1305: busy"):
            read_all(parts)


FULL_WINDOW = finish("model_context_window_exceeded")
OFFERED = {"type": "function", "function": {"name": "read", "parameters": {}}}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(stream_of(FULL_WINDOW), id="stream"),
        pytest.param(stream_of({"reasoning_content": "hm"}, FULL_WINDOW), id="reasoning alone"),
        pytest.param(stream_of({"content": "\n"}, FULL_WINDOW), id="line end alone"),
        pytest.param(document_of({"content": ""}, "model_context_window_exceeded"), id="document"),
    ],
)
def test_a_full_window_is_no_answer(data):
    for parts in cuts(data):
        with pytest.raises(UpstreamError) as failed:
            read_all(parts)
        assert failed.value.kind.code == "context_length_exceeded"


@pytest.mark.parametrize("asked", [{}, {"tools": [OFFERED]}], ids=["no tools", "tools"])
@pytest.mark.parametrize(
    "said",
    [
        {"content": "a"},
        {"content": "<tool_"},
        {"tool_calls": [{"id": "c", "function": {"name": "read", "arguments": "{}"}}]},
    ],
    ids=["text", "text that looks like a tag", "call"],
)
def test_a_window_that_fills_up_on_the_way_cuts_the_answer_short(said, asked):
    ended = read_all([stream_of(said, FULL_WINDOW)], **asked)[-1]
    assert ended == Finish("length", is_window_full=True)


def test_what_came_before_a_failure_is_not_lost():
    events = ZaiReader(MODELS["glm-4.6"]).feed(FIRST + b"data: junk\n\n")
    assert next(events) == RECORDED_EVENTS[0]
    with pytest.raises(UpstreamError):
        next(events)


def piece(**fields):
    return {"tool_calls": [fields]}


def named(name, arguments=""):
    return {"name": name, "arguments": arguments}


READ_PIECE = piece(index=0, id="c1", function=named("read", "{}"))
SPENT = {"usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}}
HI = {"role": "assistant", "content": "hi"}
HI_EVENTS = [Text("hi"), Usage(1, 2, 3), Finish("stop")]


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        pytest.param(stream_of(HI, finish(**SPENT)), HI_EVENTS, id="usage with the finish"),
        pytest.param(stream_of(HI, finish(), {"choices": [], **SPENT}), HI_EVENTS, id="usage after the finish"),
        pytest.param(stream_of(HI, finish(**SPENT), {"choices": [], **SPENT}), HI_EVENTS, id="usage twice"),
        pytest.param(stream_of(HI, finish("length"), finish("stop")), [Text("hi"), Finish("length")], id="a second finish"),
        pytest.param(stream_of({"role": "assistant"}, {"content": ""}, {}, HI, finish()), [Text("hi"), Finish("stop")], id="empty deltas"),
        pytest.param(stream_of({"content": None, "reasoning_content": None, "tool_calls": None}, HI, finish()), [Text("hi"), Finish("stop")], id="nulls"),
        pytest.param(stream_of(finish()), [Finish("stop")], id="a finish without any text"),
        pytest.param(stream_of({"content": "hi", "reasoning_content": ""}, finish()), [Text("hi"), Finish("stop")], id="no thought"),
        pytest.param(stream_of({"tool_calls": [None, {"type": "mcp", "mcp": {}}]}, HI, finish()), [Text("hi"), Finish("stop")], id="calls that are none of the client's"),
        pytest.param(stream_of(piece(id="a", index=0, function=named("f", "{}")), finish("length")), [ToolCall(0, "a", "f", "{}"), Finish("length")], id="length with calls"),
        pytest.param(
            stream_of(HI, finish(usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 1}})),
            [Text("hi"), Usage(1, 2, 9, 0, 1), Finish("stop")],
            id="a total of its own, and tokens of reasoning",
        ),
        pytest.param(stream_of(HI, finish(usage={"prompt_tokens": 1, "completion_tokens": 2})), HI_EVENTS, id="no total"),
        pytest.param(stream_of(HI, {"choices": [{"delta": None, "finish_reason": "stop"}]}), [Text("hi"), Finish("stop")], id="delta null"),
        pytest.param(stream_of(HI, finish()) + b"data: late\n\n", [Text("hi"), Finish("stop")], id="something after the end"),
    ],
)  # fmt: skip
def test_what_zai_leaves_out_or_says_twice(data, wanted):
    for parts in cuts(data):
        assert read_all(parts) == wanted


@pytest.mark.parametrize(
    ("deltas", "wanted"),
    [
        ([{"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], says("ab")),
        ([{"content": ["a", {"text": "b"}]}, {"content": ["c"]}], says("abc")),
        ([{"content": [{"type": "output_text", "text": "a"}]}], says("a")),
        ([{"content": [{"type": "thinking", "thinking": "hm"}, None, 7, "a"]}], says("a")),
        ([{"content": [{"type": "text", "text": 7}]}, {"content": ["a"]}], says("a")),
        ([{"reasoning": "hm"}, "a"], says("a", "hm")),
        ([{"reasoning": "no", "reasoning_content": "hm"}, "a"], says("a", "hm")),
        ([{"reasoning": {"summary": "hm"}}, "a"], says("a")),
        ([{"content": {"text": "no"}}], says()),
    ],
)
def test_text_and_reasoning_in_another_shape_are_read(deltas, wanted):
    assert outcomes_of(deltas) == wanted


@pytest.mark.parametrize("reason", ["", None])
def test_an_empty_finish_reason_is_none(reason):
    for parts in cuts(stream_of(HI, finish(reason), HI, finish("length"))):
        assert outcome(read_all(parts)) == ("", "hihi", [], "length")


ONE, TWO = stream_of(HI, done="").strip(), stream_of({"content": "你"}, done="").strip()
END = b"\n\n" + stream_of(finish())


@pytest.mark.parametrize(
    ("line", "words", "torn"),
    [
        pytest.param(ONE[:-20] + TWO, ["你"], 1, id="torn and glued"),
        pytest.param(ONE[:-20] + b"\n" + TWO, ["你"], 1, id="torn, on a line of its own"),
        pytest.param(ONE + TWO, ["hi", "你"], 0, id="whole and glued"),
        pytest.param(ONE + b"\n" + TWO, ["hi", "你"], 0, id="one line end between"),
        pytest.param(ONE[:30] + ONE[:50] + TWO, ["你"], 1, id="torn twice is one gap"),
        pytest.param(TWO[:-12] + TWO + ONE, ["你", "hi"], 1, id="torn, then two whole"),
        pytest.param(
            stream_of({"content": 'data: {"choices": 1} '}, done="").strip()[:-8] + TWO,
            ["你"],
            1,
            id="a start inside the torn one",
        ),
        pytest.param(
            ONE[:-20] + stream_of({"content": 'data: {"choices": 1} 你'}, done="").strip(),
            ['data: {"choices": 1} 你'],
            1,
            id="a start inside the whole one",
        ),
        pytest.param(ONE + b"data: [DONE]", ["hi"], 0, id="[DONE] glued"),
        pytest.param(
            'data: {"id":"你'.encode()[:-1] + TWO, ["你"], 1, id="torn inside a character"
        ),
    ],
)
def test_a_torn_frame_is_dropped_and_counted_and_the_whole_one_used(line, words, torn):
    for parts in cuts(line + END):
        reader = ZaiReader(MODELS["glm-4.6"])
        events = [event for part in parts for event in reader.feed(part)] + list(reader.close())
        assert events == [*map(Text, words), Finish("stop")]
        assert reader.torn == torn


def frame_of(answer_id, delta):
    """A whole frame of the answer with this id."""
    chunk = {"id": answer_id, "choices": [{"index": 0, "delta": delta}]}
    return f"data: {json.dumps(chunk)}".encode()


THINKS, ANSWERS = {"reasoning_content": "hm"}, {"content": "hi"}
FINISHED = b"\n\ndata: " + json.dumps(finish() | {"id": None}).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("frames", "wanted"),
    [
        ([("A", THINKS), None, ("B", THINKS), ("B", ANSWERS)], says("hi", "hmhm")),
        ([None, ("B", THINKS), ("B", ANSWERS)], says("hi", "hm")),
        ([("A", THINKS), None, ("B", THINKS), None, ("C", ANSWERS)], says("hi", "hmhm")),
        ([("A", {"content": "\n"}), None, ("B", ANSWERS)], says("hi")),
        ([("B", ANSWERS), None, ("B", ANSWERS)], says("hihi")),
        ([("A", ANSWERS), ("B", ANSWERS)], says("hihi")),
        ([("B", ANSWERS), None, (None, ANSWERS)], says("hihi")),
        ([("A", ANSWERS), None, ("B", ANSWERS)], None),
        ([("A", THINKS), ("A", READ_PIECE), None, ("B", THINKS)], None),
        ([("A", THINKS), None, ("B", ANSWERS), None, ("C", ANSWERS)], None),
    ],
    ids=[
        *("after reasoning", "at first", "twice", "after a line end"),
        *("no other id", "nothing torn", "no id"),
        *("after text", "after a call", "twice, after text"),
    ],
)
def test_an_answer_that_begins_again_goes_on_only_where_nothing_was_said(frames, wanted):
    torn = frame_of("Z", THINKS)[:-20]
    data = b"\n\n".join(frame_of(*frame) if frame else torn for frame in frames)
    for parts in cuts(data.replace(torn + b"\n\n", torn) + FINISHED):
        if wanted:
            assert [outcome(read_all(parts))] == wanted
            continue
        with pytest.raises(UpstreamError, match="began another one") as failed:
            read_all(parts)
        assert failed.value.kind in ztoapi.SHOULD_RETRY


def test_an_error_glued_to_a_torn_frame_is_an_error():
    with pytest.raises(UpstreamError, match="1305"):
        read_all([ONE[:-20] + b'data: {"error":{"code":"1305","message":"x"}}\n\n'])


@pytest.mark.parametrize(
    "torn",
    ["\n", "\n{", "data: {", '\n{"choices":', '\n{"choices":[{"delta":{"content":"x"}}\ndata: '],
)
def test_salvage_takes_linear_time(torn):
    few, many = (
        seconds_of(ztoapi.salvage, "x" + torn * (size // len(torn)) + "y")
        for size in (2**16, 2**18)
    )
    assert many < min(8 * few, 1)  # four times the text; in quadratic time it would be 16


def test_prose_where_json_is_wanted_is_held_in_linear_time():
    def read():
        repair = ztoapi.JsonAlone()
        assert list(repair.feed(Text("x" * 2**24))) == []
        for _ in range(2**12):
            list(repair.feed(Text("x")))

    assert seconds_of(read) < 0.5  # in quadratic time 2


def seconds_of(work, *arguments):
    """The processor's time for some work, as on the machine where the tests' bounds were set: the least of three tries.

    The machine is measured before each, as others may make it slower. What other tests left is not collected meanwhile.
    """
    gc.disable()
    try:
        return min(time_of(work, *arguments) / slowness() for _ in range(3))
    finally:
        gc.enable()


def time_of(work, *arguments):
    started = time.thread_time()
    work(*arguments)
    return time.thread_time() - started


def slowness():
    """How many times as long as there this machine takes now."""

    def count_to_a_hundred_thousand():
        for _ in range(10**5):
            pass

    return min(time_of(count_to_a_hundred_thousand) for _ in range(3)) / 0.0015  # seconds there


def test_of_torn_frames_by_the_thousand_those_that_are_whole_are_used():
    whole = """{"choices":[{"delta":{"content":"data: {'"}}]}"""
    assert ztoapi.salvage(f"{whole[:-9]}data: {whole}\n" * 1000) == (
        [json.loads(whole)] * 1000,
        1000,
        "",
    )


@pytest.mark.parametrize("part", [b"x", b": comment\n\n", ONE + b"\n\n"])
def test_what_never_ends_is_a_failure(part):
    reader = ZaiReader(MODELS["glm-4.6"], max_size=1000)
    events = (event for _ in range(1001) for event in reader.feed(part))
    with pytest.raises(UpstreamError, match="too large"):
        list(events)


@pytest.mark.parametrize(
    "function",
    [{"name": "f"}, {"arguments": "x" * 2**12}],
    ids=["calls", "arguments without a name"],
)
def test_calls_that_never_end_are_a_failure(function):
    calls = (
        {"tool_calls": [{"id": f"{i}" if "name" in function else "", "function": function}]}
        for i in range(1100)
    )
    with pytest.raises(UpstreamError, match="too large"):
        read_all(stream_of(call) for call in calls)


def test_a_torn_frame_that_nothing_follows_is_a_failure():
    for parts in cuts(ONE + ONE[:-20] + END):
        with pytest.raises(UpstreamError):
            read_all(parts)


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        pytest.param(
            [piece(id="a", index=0, type="function", function=named("f", "{}")), piece(id="b", index=1, function=named("g", "{}"))],
            [("a", "f", "{}"), ("b", "g", "{}")],
            id="as they should be",
        ),
        pytest.param(
            [piece(id="a", index=3, function=named("f", '{"x"')), piece(index=3, function={"arguments": ":1}"})],
            [("a", "f", '{"x":1}')],
            id="in pieces, from index 3",
        ),
        pytest.param(
            [piece(id="a", index=0, function=named("f", "{")), piece(id="b", index=1, function=named("g", "{")), piece(index=0, function=named(None, "}")), piece(index=1, function=named(None, "}"))],
            [("a", "f", "{}"), ("b", "g", "{}")],
            id="interleaved, name null",
        ),
        pytest.param(
            [piece(id="a", index=-1, function=named("f", {"x": 1})), piece(id="b", index=-1, function=named("g", {}))],
            [("a", "f", '{"x":1}'), ("b", "g", "{}")],
            id="index -1, arguments as objects",
        ),
        pytest.param(
            [piece(function=named("f", '{"x"')), piece(function={"arguments": ":1}"}), piece(function=named("g", "{}"))],
            [("call_7_0", "f", '{"x":1}'), ("call_7_1", "g", "{}")],
            id="no index, no id",
        ),
        pytest.param(
            [piece(id="a", function=named("f", '{"x"')), piece(id="a", function={"arguments": ":1}"}), piece(id="b", function=named("f", "{}"))],
            [("a", "f", '{"x":1}'), ("b", "f", "{}")],
            id="no index, ids",
        ),
        pytest.param(
            [piece(id="a", index=0, function=named("f", "{}")), piece(id="b", index=0, function=named("g", "{}"))],
            [("a", "f", "{}"), ("b", "g", "{}")],
            id="one index for two",
        ),
        pytest.param(
            [piece(index=0, function=named("f", "{}")), piece(index=0, function=named("g", "{}"))],
            [("call_7_0", "f", "{}"), ("call_7_1", "g", "{}")],
            id="one index for two, no ids",
        ),
        pytest.param([piece(id=-726, index=0, function=named("f", "{}"))], [("-726", "f", "{}")], id="a number for an id"),
        pytest.param([piece(id=None, index=0, function=named("f", "{}"))], [("call_7_0", "f", "{}")], id="id null"),
        pytest.param(
            [piece(id="a", index=0, function=named("f", "{}")), piece(id="a", index=1, function=named("g", "{}"))],
            [("a", "f", "{}"), ("a_1", "g", "{}")],
            id="one id for two",
        ),
        pytest.param(
            [piece(id="a", index=0, function={"arguments": "{"}), piece(index=0, function=named("f", "}"))],
            [("a", "f", "{}")],
            id="the name after the arguments",
        ),
        pytest.param(
            [piece(id="a", index=0, function={"arguments": "{"}), piece(id="b", index=1, function=named("g", "{}")), piece(index=0, function=named("f", "}"))],
            [("b", "g", "{}"), ("a", "f", "{}")],
            id="the first one's name after the second",
        ),
        pytest.param(
            [piece(id="a", index=0, function=named("f", "{")), piece(id="a", index=0, function=named("f", "}"))],
            [("a", "f", "{}")],
            id="id and name in every piece",
        ),
        pytest.param(
            [piece(function=named("f", "{}")), piece(function=named("f", "{}"))],
            [("call_7_0", "f", "{}"), ("call_7_1", "f", "{}")],
            id="no index, no id, the same twice",
        ),
        pytest.param(
            [piece(id="a1", index=0, function=named("f", "")), piece(id="a2", index=0, function={"arguments": '{"x"'}), piece(id="a3", index=0, function={"arguments": ":1}"})],
            [("a1", "f", '{"x":1}')],
            id="another id in every piece",
        ),
        pytest.param(
            [piece(id=an_id, index=i, function=named("f", "{}")) for i, an_id in enumerate(("a", "a_2", "a"))],
            [("a", "f", "{}"), ("a_2", "f", "{}"), ("a_2_2", "f", "{}")],
            id="ids that would be one",
        ),
        pytest.param([piece(id="a", index=0, function=named("f", {})), piece(index=0, function={"arguments": '{"x":1}'})], [("a", "f", '{"x":1}')], id="{} first"),
        pytest.param([piece(id="a", index=0, function=named("f"))], [("a", "f", "{}")], id="no arguments"),
        pytest.param([piece(id="a", index=0, function=named("f", None))], [("a", "f", "{}")], id="arguments null"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_document", [False, True], ids=["streamed", "whole"])
def test_tool_calls_are_healed(pieces, wanted, as_document):
    together = {
        "role": "assistant",
        "content": "",
        "tool_calls": [call for delta in pieces for call in delta["tool_calls"]],
    }
    data = document_of(together, "tool_calls") if as_document else stream_of(*pieces, finish())
    for parts in ([data], [bytes([byte]) for byte in data]):
        events = read_all(parts)
        choice = chat_document(events)["choices"][0]
        calls = choice["message"]["tool_calls"]
        assert [(call["id"], *call["function"].values()) for call in calls] == wanted
        assert (choice["finish_reason"], {call["type"] for call in calls}) == (
            "tool_calls",
            {"function"},
        )
        assert [
            event.index for event in events if isinstance(event, ToolCall) and event.id
        ] == list(range(len(wanted)))


def tool(name, required=(), /, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def calls(*pairs):
    """A delta with whole calls: names and arguments."""
    pieces = []
    for index, (name, arguments) in enumerate(pairs):
        pieces.append({"id": f"c{index}", "index": index, "function": named(name, arguments)})
    return {"tool_calls": pieces}


def calls_of(*pairs):
    """What must come of calls."""
    made = [(f"c{index}", name, arguments) for index, (name, arguments) in enumerate(pairs)]
    return says("", "", made, "tool_calls")


READ_AGAIN = piece(index=0, id="c0", type="function", function=named("read", '{"a": 1}'))
TWO_TOOLS = {
    "tools": [OFFERED, {"type": "function", "function": {"name": "read_all", "parameters": {}}}]
}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("read</arg_value>", "read"),
        ("read\n", "read"),
        ("read_all\r\n ", "read_all"),
        ("read <tool_call>", "read"),
        ("read<tool_call>read_all", "read"),
        ("read", "read"),
        ("readx</arg_value>", "readx</arg_value>"),
        ("\nread", "\nread"),
        ("<arg_key>read", "<arg_key>read"),
        ("read.", "read."),
        ("reading all", "reading all"),
    ],
)
def test_remnants_of_the_template_leave_the_name_of_a_call(name, wanted):
    assert outcomes_of([calls((name, '{"a":1}'))], **TWO_TOOLS) == calls_of((wanted, '{"a":1}'))
    begun = [
        piece(id="c0", index=0, function=named(name)),
        piece(index=0, function={"arguments": "{}"}),
    ]
    assert outcomes_of(begun, **TWO_TOOLS) == calls_of((wanted, "{}"))


def test_without_tools_a_name_stays_as_it_is():
    assert outcomes_of([calls(("read\n", "{}"))]) == calls_of(("read\n", "{}"))


def pieces_of(*arguments, name="read"):
    """A call whose arguments come in these pieces, as deltas."""
    first, *others = arguments
    begun = piece(index=0, id="c0", type="function", function=named(name, first))
    return [begun, *(piece(index=0, function={"arguments": more}) for more in others)]


A, B = '{"a":1}', '{"b": [{"c": "}{"}]}'


@pytest.mark.parametrize(
    ("deltas", "wanted"),
    [
        (pieces_of(A, A), calls_of(("read", A))),
        (pieces_of(A + A), calls_of(("read", A))),
        (pieces_of('{"a"', ":1}", '{"a"', ": 1 }"), calls_of(("read", A))),
        (pieces_of(A, "\n", A, A), calls_of(("read", A + "\n"))),
        (pieces_of("{}", A), calls_of(("read", A))),
        (pieces_of("{}" + A), calls_of(("read", A))),
        (pieces_of("{", "}", '{"a"', ":1}"), calls_of(("read", A))),
        (pieces_of("{}", "{}"), calls_of(("read", "{}"))),
        (pieces_of("{ }{}{}"), calls_of(("read", "{ }"))),
        (pieces_of("{}", "{}", A, A), calls_of(("read", A))),
        (pieces_of(B, B), calls_of(("read", B))),
        ([calls(("read", A)), READ_AGAIN], calls_of(("read", A))),
    ],
)
def test_arguments_that_are_sent_twice_are_sent_once(deltas, wanted):
    assert outcomes_of(deltas, "tool_calls", **TWO_TOOLS) == wanted


@pytest.mark.parametrize(
    ("deltas", "wanted"),
    [
        (pieces_of(A, B), [("c0", "read", A), ("c0_1", "read", B)]),
        (pieces_of(A + B), [("c0", "read", A), ("c0_1", "read", B)]),
        (pieces_of(A + B + A + B), [("c0", "read", A), ("c0_1", "read", B)]),
        (pieces_of("{}" + A + "\n" + B), [("c0", "read", A), ("c0_1", "read", B)]),
        (
            [*pieces_of(A, B), piece(index=1, id="c0_1", function=named("read_all", "{}"))],
            [("c0", "read", A), ("c0_1", "read", B), ("c0_1_2", "read_all", "{}")],
        ),
        (
            [piece(index=0, id="c0", function=named("read", more)) for more in (A, B)],
            [("c0", "read", A), ("c0_1", "read", B)],
        ),
    ],
)
def test_other_arguments_for_one_call_are_another_call(deltas, wanted):
    assert outcomes_of(deltas, "tool_calls", **TWO_TOOLS) == says("", "", wanted, "tool_calls")


@pytest.mark.parametrize(
    "pieces",
    [
        [A, B[:-1]],
        [A, "}", A],
        [A, ",", B],
        [A, "{a}"],
        ["[1]", "[1]"],
        ['"x"', '"x"'],
        ["x{}", "{}"],
        ['{"a":"{}', '{}"', "}"],
        ["{", '"a":{}', "}"],
        ["{}", "x"],
    ],
)
def test_other_arguments_stay_as_they_are(pieces):
    wanted = calls_of(("read", "".join(pieces)))
    assert outcomes_of(pieces_of(*pieces), "tool_calls", **TWO_TOOLS) == wanted
    assert outcomes_of(pieces_of("".join(pieces)), "tool_calls", **TWO_TOOLS) == wanted
    assert outcomes_of(pieces_of(*"".join(pieces)), "tool_calls", **TWO_TOOLS) == wanted


def test_the_first_arguments_stream_on_as_they_come():
    reader = Mended(**TWO_TOOLS)
    heard = [
        [event.arguments for event in reader.feed(stream_of(delta, done=""))]
        for delta in pieces_of("", "{", '"a', '":', "1", "}", "{", '"a', '":2}')
    ]
    assert heard == [[""], ["{"], ['"a'], ['":'], ["1"], ["}"], [], [], ['{"a":2}']]


def test_doubled_arguments_of_megabytes_are_read_in_linear_time():
    def read(size):
        reader = ztoapi.ObjectReader()
        parts = ['{"a":"', *[r"\n{}\""] * size, '"}'] * 2
        assert len([out for part in parts for out in reader.feed(part)]) >= size

    few, many = (seconds_of(read, size) for size in (2**13, 2**15))
    assert many < 10 * few


def test_many_objects_in_one_call_are_told_apart_in_linear_time():
    def read(size):
        reader = ztoapi.ObjectReader()
        objects = "".join([f'{{"a":{number}}}' for number in range(size)])
        assert len(list(reader.feed(objects * 2))) == size

    few, many = (seconds_of(read, size) for size in (2**10, 2**12))
    assert many < 10 * few


def test_an_answer_has_no_more_calls_than_it_may_have_also_when_they_come_as_one():
    objects = "".join([f'{{"path":"{number}"}}' for number in range(1_100)])
    with pytest.raises(UpstreamError, match="too large"):
        outcomes_of([calls(("read", objects))], "tool_calls", **TWO_TOOLS)


def arguments_outcomes(arguments, reason="tool_calls", name="read", **asked):
    """What comes of a call with these arguments: in one piece, cut at each place, and character by character."""
    cuts_of_it = [[arguments], list(arguments)]
    cuts_of_it += ([arguments[:at], arguments[at:]] for at in range(1, len(arguments)))
    found = []
    for pieces in cuts_of_it:
        data = stream_of(*pieces_of(*pieces, name=name), finish(reason))
        (made,) = outcome(read_all([data], **asked))[2]
        if made not in found:
            found.append(made)
    assert outcomes_of(pieces_of(arguments, name=name), reason, **asked)[0][2] == found[:1]
    return [text for _, _, text in found]


def pair(key, value):
    return f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"


FIND = tool("find", ["path"], path={"type": "string"}, n={"$ref": "#/$defs/n"}, all={})
FIND["function"]["parameters"]["$defs"] = {"n": {"type": "integer"}}


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (pair("path", "/a"), '{"path":"/a"}'),
        (pair("path", "7") + pair("n", "7") + "{}", '{"path":"7","n":7}'),
        (
            pair("path", "") + pair("all", '{"x": [1]}') + "</tool_call>",
            '{"path":"","all":{"x":[1]}}',
        ),
        (f"\n{pair(' path ', '<b>')}\n{{ }}", '{"path":"<b>"}'),
        (pair("path", "/a") + "null", '{"path":"/a"}'),
        ('```json\n{"path": "/a"}\n```', '{"path": "/a"}'),
        ('```\n{"path":\n"```"}```\n', '{"path":\n"```"}'),
        ("\n```JSON\r\n{}\r\n```", "{}"),
        ('``` \n {"a":1}\n ```', '{"a":1}'),
        ("null", "{}"),
        (" null\n", "{}"),
        ("\nnull", "{}"),
        ("null ", "{}"),
    ],
)
def test_arguments_that_are_no_object_are_made_one(arguments, wanted):
    assert arguments_outcomes(arguments, name="find", tools=[FIND]) == [wanted]


@pytest.mark.parametrize(
    "arguments",
    [
        pair("path", "/a") + '{"n":1}',
        pair("path", "/a") + "and more",
        pair("path", "/a").replace("</arg_value>", ""),
        "<arg_key>path</arg_key>/a",
        "<arg_keys>",
        '{"path":"<arg_key>x</arg_key><arg_value>y</arg_value>"}',
        "```json\n{}",
        "```json\n{}\n```\nThat is it.",
        "```\n/a\n```",
        '{"path":"```json\\n{}\\n```"}',
        "nul",
        "null,",
        "nullable",
        '"null"',
        "[null]",
    ],
)
def test_arguments_that_are_neither_objects_nor_plainly_meant_as_such_stay(arguments):
    assert arguments_outcomes(arguments, name="find", tools=[FIND]) == [arguments]


@pytest.mark.parametrize(
    ("name", "arguments", "wanted"),
    [
        (f"find{pair('path', '/a')}", "{}", '{"path":"/a"}'),
        (f"find\n{pair('path', '/a')}</tool_call>", "", '{"path":"/a"}'),
        ("find<arg_key>", pair("path", "/a").removeprefix("<arg_key>"), '{"path":"/a"}'),
        ("find</arg_value>", "{}", "{}"),
    ],
)
def test_arguments_in_the_name_of_a_call_are_its_arguments(name, arguments, wanted):
    delta = {"tool_calls": [{"id": "c0", "index": 0, "function": named(name, arguments)}]}
    assert outcomes_of([delta], tools=[FIND]) == calls_of(("find", wanted))
    begun = [
        piece(index=0, id="c0", function=named(name)),
        piece(index=0, function={"arguments": arguments}),
    ]
    assert outcomes_of(begun, tools=[FIND]) == calls_of(("find", wanted))


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param("<arg_key>" + "</arg_key><arg_value>" * 2**12, id="values without an end"),
        pytest.param(pair("a", "b") * 2**12 + "x", id="a text behind many pairs"),
    ],
)
def test_markup_in_arguments_is_read_in_linear_time(arguments):
    repair = ztoapi.MarkupArguments({})
    assert seconds_of(repair.mend, arguments, {}) < 0.2  # in quadratic time 2


def test_white_space_behind_a_comma_is_held_in_linear_time():
    def read(size):
        repair = ztoapi.UnfinishedArguments({})
        list(repair.feed(ToolCall(0, "c", "find", '{"path":"/a",')))
        for _ in range(size):
            list(repair.feed(ToolCall(0, "", "", " \n" * 32)))

    few, many = (seconds_of(read, size) for size in (2**11, 2**13))
    assert many < 10 * few


def test_the_arguments_of_two_calls_are_held_each_for_itself():
    first, second = pair("path", "/a"), '{"path":"/b"}'
    deltas = [calls(("find", first), ("find", second))]
    wanted = calls_of(("find", '{"path":"/a"}'), ("find", second))
    assert outcomes_of(deltas, tools=[FIND]) == wanted


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('{"path":"/a"', '{"path":"/a"}'),
        ('{"path":"/a",', '{"path":"/a"}'),
        ('{"path":"/a"} , ', '{"path":"/a"} '),
        ('{"path":"/a","all":[{"x":["y"', '{"path":"/a","all":[{"x":["y"]}]}'),
        ('{"path":"/a","all":[1]\n', '{"path":"/a","all":[1]\n}'),
        ('{"path":"}]\\"{"', '{"path":"}]\\"{"}'),
        ('{"all":{},"path":"/a,"', '{"all":{},"path":"/a,"}'),
        ('{"path":"/a","all":{"x":"y",', '{"path":"/a","all":{"x":"y"}}'),
    ],
)
def test_arguments_that_are_not_finished_are_closed(arguments, wanted):
    assert arguments_outcomes(arguments, name="find", tools=[FIND]) == [wanted]


@pytest.mark.parametrize(
    "arguments",
    [
        '{"path":"/a","n":1',
        '{"path":"/a","all":true',
        '{"path":"/a","n"',
        '{"path":"/a","n":',
        '{"path":"/a',
        '{"path":"/a\\',
        '{"all":"x"',
        '{"path":"/a",,',
        '{"path":"/a",}',
        '{"path":"/a"]',
        '{"path":"/a"}}',
        '{"path":"/a"} x,',
        '{path:"/a"',
        '["/a"',
        '"/a",',
        "{",
        ",",
        '{"path":"/a, ", "all": [1, 2]}  ',
    ],
)
def test_other_broken_arguments_stay_as_they_are(arguments):
    assert arguments_outcomes(arguments, name="find", tools=[FIND]) == [arguments]


@pytest.mark.parametrize("reason", ["length", "model_context_window_exceeded"])
def test_arguments_that_were_cut_off_are_not_closed(reason):
    cut = '{"path":"/a",'
    assert arguments_outcomes(cut, reason, "find", tools=[FIND]) == [cut]
    assert arguments_outcomes(cut[:-1], reason, "find", tools=[FIND]) == [cut[:-1]]
    assert arguments_outcomes('{"path":"/a"},', reason, "find", tools=[FIND]) == ['{"path":"/a"}']


def test_calls_whose_pieces_alternate_are_closed_at_their_ends():
    deltas = [calls(("read", "{"), ("read", "{"))]
    deltas += [
        piece(index=i, function={"arguments": more}) for more in ('"a":"b"', ",") for i in (0, 1)
    ]
    assert outcomes_of(deltas, **TWO_TOOLS) == calls_of(
        ("read", '{"a":"b"}'), ("read", '{"a":"b"}')
    )


EDIT = tool(
    "edit",
    edits={"type": "array", "items": {"type": "object", "properties": {"o": {"type": "integer"}}}},
    n={"type": "integer"},
    all={"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    where={"$ref": "#/$defs/where"},
    ratio={"type": "number"},
    level={"enum": [1, 2]},
    note={"type": "string"},
    tag={"type": ["string", "integer"]},
    any={},
)
EDIT["function"]["parameters"]["$defs"] = {
    "where": {
        "type": "object",
        "properties": {"line": {"type": "integer"}, "in": {"$ref": "#/$defs/where"}},
    }
}


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (r'{"edits":"[{\"o\":1}]","n":"3","all":"true","note":"12"}', '{"edits":[{"o":1}],"n":3,"all":true,"note":"12"}'),
        (r'{ "n" : "-3" , "note" : "\u00e9\/" }', r'{ "n" : -3 , "note" : "\u00e9\/" }'),
        (r'{"edits":" [ {\"o\": \"1\", \"p\": \"2\"},\n{\"o\":2} ]\n"}', '{"edits":[ {"o": 1, "p": "2"},\n{"o":2} ]}'),
        (r'{"where":"{\"line\":\"7\",\"in\":\"{\\\"line\\\":\\\"8\\\"}\"}"}', '{"where":{"line":7,"in":{"line":8}}}'),
        (r'{"all":"null","ratio":"1e3","level":"2"}', '{"all":null,"ratio":1e3,"level":2}'),
        (r'{"\u006e":"3","ratio":"7"}', r'{"\u006e":3,"ratio":7}'),
        ('{"edits":"[]","where":"{}"}', '{"edits":[],"where":{}}'),
    ],
)  # fmt: skip
def test_a_string_becomes_the_value_that_it_should_have_been(arguments, wanted):
    assert arguments_outcomes(arguments, name="edit", tools=[EDIT]) == [wanted]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (r'{"where":{"line":"7"},"n":"3"}', '{"where":{"line":7},"n":3}'),
        (r'{"edits":[{"o":"1"},{"o":2}]}', '{"edits":[{"o":1},{"o":2}]}'),
        (json.dumps('{"n":"3","note":"3"}'), '{"n":3,"note":"3"}'),
        (json.dumps(' {"note":"3"}\n'), '{"note":"3"}'),
        (json.dumps("{}"), "{}"),
    ],
)
def test_arguments_in_one_piece_are_mended_at_every_depth(arguments, wanted):
    assert outcomes_of(pieces_of(arguments, name="edit"), tools=[EDIT]) == calls_of(
        ("edit", wanted)
    )
    begun = pieces_of("", arguments, name="edit")
    assert outcomes_of(begun, tools=[EDIT]) == calls_of(("edit", wanted))


def test_arguments_that_come_in_pieces_are_not_mended_below_the_top():
    text = '{"where":{"line":"7"},"edits":[{"o":"1"}]}'
    assert outcomes_of(pieces_of(*text, name="edit"), tools=[EDIT]) == calls_of(("edit", text))
    encoded = json.dumps('{"n":"3"}')
    assert outcomes_of(pieces_of(*encoded, name="edit"), tools=[EDIT]) == calls_of(
        ("edit", encoded)
    )


@pytest.mark.parametrize(
    "arguments",
    [
        '{"note":"12","tag":"3","any":"4","more":"5"}',
        '{"n":"three","all":"True","ratio":"","level":" "}',
        '{"n":"1.0","edits":"{}","where":"[]","all":"1"}',
        '{"n":"\\"3\\"","ratio":"NaN","level":"1 2"}',
        '{"edits":"[{\\"o\\":1}","where":"{"}',
        '{"n":"3',
        '{"n":3,"edits":[{"o":1}],"note":"n\\":\\"3"}',
        '["n","3"]',
        '"n"',
        '"[1]"',
        "{n:'3'}",
        '{"n" "3"}',
        '}]{"n":',
        "[[]],{",
    ],
)
def test_other_strings_in_arguments_stay_as_they_are(arguments):
    assert arguments_outcomes(arguments, name="edit", tools=[EDIT]) == [arguments]
    named_otherwise = arguments_outcomes('{"n":"3"}', name="edits", tools=[EDIT])
    assert named_otherwise == ['{"n":"3"}']


def heard_of(pieces, **asked):
    """The arguments that come out with each piece."""
    reader = Mended(**asked)
    deltas = pieces_of(*pieces, name="edit")
    heard = [list(reader.feed(stream_of(delta, done=""))) for delta in deltas]
    return ["".join(event.arguments for event in events) for events in heard]


def test_only_a_string_at_the_top_that_should_be_none_is_held():
    given = ["", '{"no', 'te":"', "1", '2","n":', '"', "3", '","where":{"li', 'ne":"', '7"}}']
    heard = ["", '{"no', 'te":"', "1", '2","n":', "", "", '3,"where":{"li', 'ne":"', '7"}}']
    assert heard_of(given, tools=[EDIT]) == heard


def test_where_all_may_be_strings_nothing_is_held():
    given = ['{"path', '":"', "1", '","', 'line":"', '2"', "}"]
    assert heard_of(given, tools=[tool("edit", path={"type": "string"}, line={})]) == given


def test_the_schema_of_a_tool_is_read_once_for_all_of_its_calls():
    properties = {f"p{number}": {"type": "string"} for number in range(2**10)}
    repair = ztoapi.TypedArguments({"edit": {"type": "object", "properties": properties}})

    def read():
        for number in range(2**8):
            list(repair.feed(ToolCall(number, f"c{number}", "edit", "")))
            list(repair.feed(ToolCall(number, "", "", '{"p')))

    assert seconds_of(read) < 0.2  # once for each 2


def test_a_held_value_of_megabytes_is_read_in_linear_time():
    def read(size):
        repair = ztoapi.TypedArguments({"edit": EDIT["function"]["parameters"]})
        list(repair.feed(ToolCall(0, "c", "edit", '{"edits":"[')))
        parts = [*[r"{\"o\":1},"] * size, r'{}]"}']
        heard = [event for part in parts for event in repair.feed(ToolCall(0, "", "", part))]
        assert len(heard[-1].arguments) > 8 * size

    few, many = (seconds_of(read, size) for size in (2**11, 2**13))
    assert many < 10 * few


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (r'{"path":"\ud83d"}', r'{"path":"\ufffd"}'),
        (r'{"path":"\uDE00x\ud83d\n"}', r'{"path":"\ufffdx\ufffd\n"}'),
        (r'{"path":"\ud83d\ud83d\ude00"}', r'{"path":"\ufffd\ud83d\ude00"}'),
        (r'{"path":"\\\ud83d\\"}', r'{"path":"\\\ufffd\\"}'),
        (r'{"path":"\ud83d\\ude00"}', r'{"path":"\ufffd\\ude00"}'),
        (r'{"path":"\ud83d', r'{"path":"\ufffd'),
        (r'{"path":"\ud83d\ud', r'{"path":"\ufffd\ud'),
    ],
)
def test_half_a_character_in_arguments_is_found_as_an_escape(arguments, wanted):
    assert arguments_outcomes(arguments, name="find", tools=[FIND]) == [wanted]


@pytest.mark.parametrize(
    "arguments",
    [
        r'{"path":"\ud83d\ude00"}',
        r'{"path":"\\ud83d"}',
        r'{"path":"C:\\users\\"}',
        r'{"path":"\u00e9\ud7ff\uE000"}',
        r'{"path":"\ud8"}',
        r'{"path":"\uD83D\uDE00\\',
        r'{"path":"\u',
        '{"path":"\\',
    ],
)
def test_other_escapes_in_arguments_stay_as_they_are(arguments):
    assert arguments_outcomes(arguments, name="find", tools=[FIND]) == [arguments]


NAMELESS = {"id": "x", "index": 0, "function": named("", '{"a":1}')}


@pytest.mark.parametrize(
    ("deltas", "wanted"),
    [
        ([{"tool_calls": [NAMELESS]}], says()),
        ([{"tool_calls": [NAMELESS | {"function": named(None, "{}")}]}], says()),
        ([{"tool_calls": [NAMELESS | {"function": named(" \n", "{}")}]}], says()),
        (["hi", {"tool_calls": [NAMELESS]}], says("hi")),
        ([calls(("read", "{}"), ("", "{}"))], calls_of(("read", "{}"))),
        ([calls(("", "{}"), ("read", "{}"))], says("", "", [("c1", "read", "{}")], "tool_calls")),
        ([calls(("?", "{}"))], calls_of(("?", "{}"))),
        ([calls(("read", '{"a"')), piece(index=0, function=named("", ":1}"))], calls_of(("read", '{"a":1}'))),
        ([calls(("read", '{"a"')), piece(index=0, id="c0", function=named("", ":1}"))], calls_of(("read", '{"a":1}'))),
        ([calls(("read", '{"a"')), piece(index=-1, function=named("", ":1}"))], calls_of(("read", '{"a":1}'))),
    ],
)  # fmt: skip
def test_a_call_without_a_name_is_dropped(deltas, wanted):
    assert outcomes_of(deltas, "tool_calls") == wanted


@pytest.mark.parametrize("arguments", ["", "{}", '{"path":"a"}'])
def test_all_pieces_of_a_call_whose_name_is_blank_are_dropped(arguments):
    first = piece(index=0, id="x", function=named(" ", ""))
    deltas = ["hi", first, piece(index=0, function=named(None, arguments))]
    assert outcomes_of(deltas, "tool_calls", tools=[FIND]) == says("hi")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(stream_of(HI, finish(web_search=[FOUND])), id="streamed"),
        pytest.param(document_of(HI, web_search=[FOUND]), id="whole"),
    ],
)
def test_what_a_search_found_comes_before_the_finish(data):
    for parts in cuts(data):
        assert read_all(parts) == [Text("hi"), Citations((FOUND,)), Finish("stop")]


def read_tagged(words, model="glm-4.5v"):
    """The events of deltas with these words, consecutive texts joined."""
    reader, joined = Mended(model), []
    for event in [
        *reader.feed(stream_of(*({"content": word} for word in words), finish())),
        *reader.close(),
    ]:
        more = bool(joined) and type(joined[-1]) is type(event)
        joined.append(type(event)(joined.pop().text + event.text) if more else event)
    return joined[:-1]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<think>hm</think>yes", [Thought("hm"), Text("yes")]),
        ("<think>a<b</think><|begin_of_box|>4<2<|end_of_box|>.", [Thought("a<b"), Text("4<2.")]),
        ("yes <think>no</think>", [Text("yes <think>no</think>")]),
        ("<think>hm", [Thought("hm")]),
        ("yes</think><", [Text("yes</think><")]),
        ("<|begin_of_box|>x", [Text("x")]),
    ],
)
def test_reasoning_that_models_that_see_put_into_the_text(text, wanted):
    for i in range(len(text)):
        assert read_tagged([text[:i], text[i:]]) == wanted
    assert read_tagged(list(text)) == wanted


def test_other_models_may_write_of_tags():
    assert read_tagged(["<think>hm</think>"], "glm-4.6") == [Text("<think>hm</think>")]


@pytest.mark.parametrize(
    ("deltas", "wanted"),
    [
        (["</think>Hi"], says("Hi")),
        (["\n</think>\n\nHi\n"], says("Hi\n")),
        (["</th", "ink", ">", "\n", "Hi"], says("Hi")),
        ([" </think> Hi"], says("  Hi")),
        ([{"reasoning_content": "hm"}, "</think>", "Hi"], says("Hi", "hm")),
        (["</think>", "</think>Hi"], says("</think>Hi")),
        (["Hi</think>"], says("Hi</think>")),
        (["<think>hm</think>Hi"], says("<think>hm</think>Hi")),
        (["</thin"], says("</thin")),
        (["</thinking>Hi"], says("</thinking>Hi")),
        (["`</think>`"], says("`</think>`")),
        ([" ", "</"], says(" </")),
    ],
)
def test_a_stray_tag_at_the_head_of_the_text_is_dropped(deltas, wanted):
    assert outcomes_of(deltas) == wanted


def test_white_space_without_an_end_streams_on():
    reader = Mended()
    heard = [list(reader.feed(stream_of({"content": " " * 100}, done=""))) for _ in range(12)]
    assert heard[:9] == [[]] * 9
    assert heard[9:] == [[Text(" " * 1000)], [Text(" " * 100)], [Text(" " * 100)]]


def test_no_more_of_a_text_is_held_than_may_be_a_stray_tag():
    reader = Mended()
    heard = [
        list(reader.feed(stream_of({"content": text}, done=""))) for text in ("</", "t", "x", "<")
    ]
    assert heard == [[], [], [Text("</tx")], [Text("<")]]


PATH = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "line": {"type": ["string", "null"]}},
}
READ = {"type": "function", "function": {"name": "read", "parameters": PATH}}
READ_ALL = {"type": "function", "function": {"name": "read_all", "parameters": {}}}
READ_CALL = READ_PIECE
READ_EVENT = ToolCall(0, "c1", "read", "{}")
LEAKED = ToolCall(0, "call_7_0", "read", '{"path":"a.py"}')
CALLS_END = Finish("tool_calls")


def leak(name, **arguments):
    pairs = [
        f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"
        for key, value in arguments.items()
    ]
    return f"<tool_call>{name}{''.join(pairs)}</tool_call>"


LEAK = leak("read\n", path="a.py")


def read_deltas(deltas, **asked):
    """The events of an answer with these deltas, or pieces of text; consecutive texts, and calls, joined."""
    events = []
    begun = {}
    for event in read_all([stream_of(*chunk_of(*deltas), finish())], **asked):
        if events and type(events[-1]) is type(event) is Text:
            events.append(Text(events.pop().text + event.text))
        elif isinstance(event, ToolCall) and not event.id:
            at = begun[event.index]
            events[at] = replace(events[at], arguments=events[at].arguments + event.arguments)
        else:
            begun[getattr(event, "index", -1)] = len(events)
            events.append(event)
    return events


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        pytest.param(LEAK, [LEAKED, CALLS_END], id="a call"),
        pytest.param(f"\n {LEAK}\n", [Text(" "), LEAKED, CALLS_END], id="white space around it"),
        pytest.param(f"a<{LEAK}", [Text("a<"), LEAKED, CALLS_END], id="text before it"),
        pytest.param(
            LEAK + leak(" read_all "),
            [LEAKED, ToolCall(1, "call_7_1", "read_all", "{}"), CALLS_END],
            id="two calls",
        ),
        pytest.param(
            leak(
                "read", path='7 "<arg_value>', line="7", deep='{"a":[1]}', bare="x y", none="null"
            ),
            [
                ToolCall(
                    0,
                    "call_7_0",
                    "read",
                    '{"path":"7 \\"<arg_value>","line":"7","deep":{"a":[1]},"bare":"x y","none":null}',
                ),
                CALLS_END,
            ],
            id="values",
        ),
        pytest.param(
            f"<tool_call>read {LEAK}",
            [Text("<tool_call>read "), LEAKED, CALLS_END],
            id="one that begins anew",
        ),
        *(
            pytest.param(text, [Text(text), Finish("stop")], id=text)
            for text in (
                leak("write", path="a.py"),
                "<tool_call>read<arg_key>path</arg_key></tool_call>",
                "<tool_call>read<arg_key>path</arg_key>?<arg_value>a</arg_value></tool_call>",
                "<tool_call>read?",
                "<tool_call> re ad </tool_call>",
                "<tool_call>read<arg_key>path</arg_key><arg_value>a",
                "</tool_call>a<tool_call>",
            )
        ),
    ],
)
def test_a_tool_call_that_leaks_into_the_text_is_a_call(text, wanted):
    for i in range(len(text)):
        assert read_deltas([text[:i], text[i:]], tools=[READ, READ_ALL]) == wanted
    assert read_deltas(list(text), tools=[READ, READ_ALL]) == wanted


def test_other_models_may_write_of_tags_where_calls_may_leak_too():
    text = "<think>hm</think><|begin_of_box|>"
    assert read_deltas([text], tools=[READ]) == [Text(text), Finish("stop")]


def test_half_a_surrogate_pair_may_leak_too():
    assert ztoapi.leaked_value("\ud800", ztoapi.Schema({}, {})) == "\ud800"


REFERRED = {"$defs": {"a/b": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}}


@pytest.mark.parametrize(
    ("part", "types"),
    [
        ({"type": "integer"}, {"integer"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"anyOf": [{"type": "array"}, {"type": "null"}]}, {"array", "null"}),
        ({"oneOf": [{"anyOf": [{"const": 1}]}, {"enum": [True, 2.5]}]}, {"integer", "boolean", "number"}),
        ({"$ref": "#/$defs/a~1b"}, {"integer"}),
        ({"allOf": [{"$ref": "#/$defs/a~1b"}], "description": "x"}, {"integer"}),
        ({"anyOf": [{"type": "array"}, {}]}, None),
        ({"anyOf": [{"type": "array"}, {"type": "string"}]}, {"array", "string"}),
        ({"allOf": [{"type": "integer"}, {"minimum": 1}]}, None),
        ({"$ref": "#/$defs/loop"}, None),
        ({"$ref": "https://example.com/x"}, None),
        ({"$ref": "#/nowhere/at/all"}, None),
        ({"properties": {}}, None),
        (True, None),
        ([], None),
    ],
)  # fmt: skip
def test_the_types_that_a_schema_allows(part, types):
    assert ztoapi.Schema(part, REFERRED).types == types


def test_a_schema_that_has_itself_in_it_is_read_at_once():
    twice = {"anyOf": [{"$ref": "#"}, {"$ref": "#"}], "properties": {"x": {"$ref": "#"}}}
    value = reduce(lambda inner, _: {"x": inner}, range(30), 7)

    def read():
        assert ztoapi.Schema(twice, twice).types is None
        assert ztoapi.fits(value, ztoapi.Schema(twice, twice))

    assert seconds_of(read) < 0.5


def test_where_no_tool_was_offered_no_call_leaks():
    assert read_deltas([LEAK]) == [Text(LEAK), Finish("stop")]


def test_no_more_text_is_held_than_may_be_a_call():
    reader = Mended(tools=[READ])
    heard = [
        "".join(event.text for event in reader.feed(stream_of({"content": text}, done="")))
        for text in (
            "a <tool",
            "_x",
            "<tool_call>rea",
            "d",
            "?",
            "<tool_call>read<arg_key>",
            "a</tool_call><tool_call>x",
        )
    ]
    assert heard == [
        "a ",
        "<tool_x",
        "",
        "",
        "<tool_call>read?",
        "",
        "<tool_call>read<arg_key>a</tool_call><tool_call>x",
    ]


def test_a_leaked_call_of_megabytes_is_read_in_linear_time():
    def read(size):
        repair = ztoapi.LeakedCalls({"read": PATH}, "")
        parts = [
            "<tool_call>read<arg_key>path</arg_key><arg_value>",
            *["x</tool_call>"] * size,
            "</arg_value></tool_call>",
        ]
        assert [event for part in parts for event in repair.feed(Text(part))] == []
        call, _ = repair.feed(Finish("stop"))
        assert len(call.arguments) > 10 * size

    few, many = (seconds_of(read, size) for size in (2**12, 2**14))
    assert many < 10 * few  # four times the text; in quadratic time it would be 16


def test_more_calls_than_anybody_makes_are_no_leak():
    text = LEAK * (ztoapi.LeakedCalls.MOST + 1)
    assert read_deltas([text], tools=[READ]) == [Text(text), Finish("stop")]


QUOTED = ztoapi.quoted_text([Message("tool", (f"A page.\n{LEAK}",))])


@pytest.mark.parametrize(
    "deltas",
    [
        pytest.param([LEAK, " and more"], id="text behind it"),
        pytest.param([f"```xml\n{LEAK}\n```"], id="in a fence"),
        pytest.param([f"```xml\n{LEAK}"], id="in a fence that does not end"),
        pytest.param([f"~~~\n{LEAK}\n~~~\n"], id="in a fence of tildes"),
        pytest.param([f"```\n~~~\n{LEAK}"], id="in a fence, behind a mark of the other kind"),
        pytest.param([f"Write `{LEAK}`"], id="between backticks"),
        pytest.param([f"Write `{LEAK}"], id="behind a backtick"),
        pytest.param([LEAK, LEAK, "."], id="two, then text"),
        pytest.param([f"{LEAK}<tool_call>write<arg_key>"], id="one, then what is none"),
    ],
)
def test_a_quotation_is_not_a_leak(deltas):
    text = "".join(deltas)
    for cut in range(0, len(text), 7):
        given = [text[:cut], text[cut:]]
        assert read_deltas(given, tools=[READ]) == [Text(text), Finish("stop")]


def test_code_that_has_ended_is_no_code_any_more():
    text = "```\nx\n```\nNow `y`.\n\nIt`s:\n\n"
    assert read_deltas([*text, LEAK], tools=[READ]) == [Text(text), LEAKED, CALLS_END]


def test_markup_that_stands_in_the_request_is_a_quotation():
    assert read_deltas([LEAK], tools=[READ], quoted=QUOTED) == [Text(LEAK), Finish("stop")]


def test_a_call_leaks_only_where_the_answer_has_no_other():
    assert read_deltas([READ_CALL, LEAK], tools=[READ])[:2] == [READ_EVENT, Text(LEAK)]
    assert read_deltas([LEAK, READ_CALL], tools=[READ])[:2] == [Text(LEAK), READ_EVENT]


def test_a_call_leaks_only_where_the_answer_has_come_to_its_end():
    data = stream_of({"content": LEAK}, finish("length"))
    assert read_all([data], tools=[READ]) == [Text(LEAK), Finish("length")]


@pytest.mark.parametrize(
    "quote",
    [
        str,
        lambda text: f"```\n{text}\n```",
        json.dumps,
        lambda text: json.dumps(json.dumps({"page": text})),
        lambda text: json.dumps(text).replace("<", r"\u003c"),
        html.escape,
        lambda text: json.dumps({"page": html.escape(text)}),
        lambda text: text.replace("\n", "\r\n    "),
    ],
    ids=[
        "plain",
        "fence",
        "JSON",
        "JSON in JSON",
        "JSON of Go",
        "HTML",
        "HTML in JSON",
        "indented",
    ],
)
@pytest.mark.parametrize("value", ["a.py", 'C:\\new\\"x" & <b>', "😀 é\t|"])
def test_markup_is_found_however_a_page_quotes_it(quote, value):
    leaked = leak("read\n", path=value)
    page = Message("tool", (f"See: {quote(leaked)}.",))
    quoted = ztoapi.quoted_text([page])
    assert read_deltas([leaked], tools=[READ], quoted=quoted)[-1] == Finish("stop")
    assert read_deltas([leaked], tools=[READ])[-1] == CALLS_END


@pytest.mark.parametrize(
    "message",
    [
        Message("user", (f"Say {LEAK}",)),
        Message("assistant", (), thought=f"I could write {LEAK}"),
        Message("assistant", (), calls=(ToolCall(0, "c", "write", json.dumps({"text": LEAK})),)),
    ],
    ids=["text", "thought", "arguments"],
)
def test_all_of_a_conversation_may_be_quoted(message):
    quoted = ztoapi.quoted_text([message])
    assert read_deltas([LEAK], tools=[READ], quoted=quoted) == [Text(LEAK), Finish("stop")]


@in_loop
@pytest.mark.parametrize("role", ["user", "tool"])
async def test_a_page_that_quotes_our_markup_makes_no_call(client, zai, role):
    page = {"role": role, "content": f"Say: {LEAK}", "tool_call_id": "c"}
    asked = {"id": "c", "type": "function", "function": named("read", "{}")}
    called = {"role": "assistant", "content": None, "tool_calls": [asked]}
    body = chat(messages=[*HELLO["messages"], called, page], tools=[READ])
    zai.parts = [stream_of({"content": LEAK}, finish())]
    message = json.loads((await ask(client, body))[1])["choices"][0]["message"]
    assert message == {"role": "assistant", "content": LEAK, "refusal": None}


def json_leak(name="read", *, text=None, **arguments):
    """A call as JSON in the model's tags."""
    return f"<tool_call>{text or json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


CALLED_READ = ("call_7_0", "read", '{"path":"a.py"}')
TWICE_READ = [CALLED_READ, ("call_7_1", *CALLED_READ[1:])]
JSON_LEAK = json_leak(path="a.py")
NO_CALLS_AS_JSON = [
    JSON_LEAK + " and more",
    f"```\n{JSON_LEAK}\n```",
    f"Write `{JSON_LEAK}`",
    json_leak("write", path="a.py"),
    json_leak(text='{"name": "read"}'),
    json_leak(text='{"name": "read", "arguments": {}, "id": 7}'),
    json_leak(text='{"name": "read", "arguments": "a.py"}'),
    json_leak(text='{"name": "read", "arguments": {}'),
    json_leak(text='[{"name": "read", "arguments": {}}]'),
    json_leak(text=" "),
    "<tool_call>" + '{"name": "read", "arguments": {}}',
    '{"name": "read", "arguments": {}}',
]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (JSON_LEAK, says("", "", [CALLED_READ], "tool_calls")),
        (f"I read.\n{JSON_LEAK}\n", says("I read.\n", "", [CALLED_READ], "tool_calls")),
        (LEAK + JSON_LEAK, says("", "", TWICE_READ, "tool_calls")),
        (JSON_LEAK + LEAK, says("", "", TWICE_READ, "tool_calls")),
        (
            json_leak("read_all") + json_leak(path="a.py"),
            says(
                "",
                "",
                [("call_7_0", "read_all", "{}"), ("call_7_1", *CALLED_READ[1:])],
                "tool_calls",
            ),
        ),
        (
            json_leak(path="}</tool_call><arg_key>"),
            says("", "", [("call_7_0", "read", '{"path":"}</tool_call><arg_key>"}')], "tool_calls"),
        ),
        (
            json_leak(text='\n{"arguments":\n{"path": "é", "n": [1]}, "name": "read"}\n'),
            says("", "", [("call_7_0", "read", '{"path":"é","n":[1]}')], "tool_calls"),
        ),
        *((text, says(text)) for text in NO_CALLS_AS_JSON),
    ],
)
def test_a_call_that_leaks_into_the_text_as_json_is_a_call(text, wanted):
    tools = [READ, READ_ALL]
    assert outcomes_of([text], tools=tools) == wanted
    for deltas in (list(text), *([text[:i], text[i:]] for i in range(1, len(text)))):
        data = stream_of(*chunk_of(*deltas), finish())
        assert [outcome(read_all([data], tools=tools))] == wanted


def test_a_call_as_json_that_never_ends_is_read_in_linear_time():
    def read(size):
        repair = ztoapi.LeakedCalls({"read": PATH}, "")
        text = '<tool_call>{"a":"' + "}</tool_call>" * size
        assert list(repair.feed(Text(text)))

    few, many = (seconds_of(read, size) for size in (2**12, 2**14))
    assert many < 10 * few


def thinks(*words):
    return [{"reasoning_content": word} for word in words]


SAVE = tool(
    "save",
    ["name"],
    name={"type": "string"},
    age={"anyOf": [{"type": "integer"}, {"type": "null"}]},
    tags={"type": "array", "items": {"enum": ["a", "b"]}},
)
SAVED = [("call_7_0", "save", '{"name":"Ann"}')]


@pytest.mark.parametrize(
    ("deltas", "wanted"),
    [
        (['{"name":"Ann"}'], says("", "", SAVED, "tool_calls")),
        (['\n{"name":', '"Ann"}\n'], says("", "", SAVED, "tool_calls")),
        (['```json\n{"name":"Ann"}\n```'], says("", "", SAVED, "tool_calls")),
        (["``", '`\n{"name":"Ann"}\n', "```\n"], says("", "", SAVED, "tool_calls")),
        (
            [*thinks("hm"), '{"name": "A", "age": null, "tags": ["a"]}'],
            says("", "hm", [("call_7_0", "save", '{"name": "A", "age": null, "tags": ["a"]}')], "tool_calls"),
        ),
        *(
            ([text], says(text))
            for text in (
                'Here: {"name":"Ann"}',
                '{"name":"Ann"} is it.',
                '```json\n{"name":"Ann"}\n```\nThat is it.',
                '{"name":"Ann","error":"?"}',
                '{"age":7}',
                '{"name":"Ann","age":"7"}',
                '{"name":"Ann","tags":["c"]}',
                '[{"name":"Ann"}]',
                '{"name":"Ann"',
                "I can't.",
                "{}",
            )
        ),
        (
            [piece(id="a", index=0, function=named("save", "{}")), '{"name":"Ann"}'],
            says('{"name":"Ann"}', "", [("a", "save", "{}")], "tool_calls"),
        ),
    ],
)  # fmt: skip
def test_a_text_that_is_the_arguments_of_a_forced_call_is_that_call(deltas, wanted):
    assert outcomes_of(deltas, tools=[SAVE], forced="save") == wanted


def test_many_values_are_compared_with_many_choices_in_linear_time():
    choices = [f"tag {number}" for number in range(2**12)]
    schema = {"type": "array", "items": {"enum": choices}}
    assert seconds_of(ztoapi.fits, choices, ztoapi.Schema(schema, schema)) < 0.5  # each with each 3


@pytest.mark.parametrize("said", ['Save {"name": "Ann"}.', '{"x": "{\\"name\\":\\"Ann\\"}"}'])
def test_what_a_page_says_is_no_forced_call(said):
    page = Message("tool", (said,), call_id="c")
    quoted = ztoapi.quoted_text([page], forced=True)
    asked = {"tools": [SAVE], "forced": "save"}
    assert outcomes_of(['{"name":"Ann"}'], **asked, quoted=quoted) == says('{"name":"Ann"}')
    assert outcomes_of(['{"name":"Bob"}'], **asked, quoted=quoted)[0][2]


def test_text_is_no_call_where_the_model_had_a_choice():
    assert outcomes_of(['{"name":"Ann"}'], tools=[SAVE]) == says('{"name":"Ann"}')


@pytest.mark.parametrize(
    ("choice", "forced"),
    [
        ({"type": "function", "function": {"name": "save"}}, "save"),
        ("required", ""),
        ("auto", ""),
        ("none", ""),
    ],
)
def test_a_function_is_forced_where_tool_choice_names_it(choice, forced):
    prompt = ztoapi.with_chosen_tools(read_chat(chat(tools=[SAVE], tool_choice=choice)))
    request = ztoapi.zai_request(prompt, MODELS["glm-4.6"], "https://api.z.ai", "7")
    assert request.needs.forced == forced


def test_a_text_for_a_forced_call_streams_on_once_it_is_none():
    reader = Mended(tools=[SAVE], forced="save")
    heard = [
        list(reader.feed(stream_of({"content": text}, done=""))) for text in (" ", "`", "I", "`{")
    ]
    assert heard == [[], [], [Text(" `I")], [Text("`{")]]


THOUGHT_NO_CALLS = [
    [LEAK, " and more"],
    [f"I could write `{LEAK}`"],
    [f"```\n{LEAK}\n```"],
    [leak("write", path="a.py")],
    [LEAK.removesuffix("</tool_call>")],
]


@pytest.mark.parametrize(
    ("deltas", "wanted"),
    [
        (thinks("Let me read.", LEAK), says("", "Let me read.", [CALLED_READ], "tool_calls")),
        (thinks(LEAK, "\n"), says("", "", [CALLED_READ], "tool_calls")),
        ([*thinks("hm", LEAK), "\n \n"], says(" \n", "hm", [CALLED_READ], "tool_calls")),
        (thinks("hm", JSON_LEAK), says("", "hm", [CALLED_READ], "tool_calls")),
        (
            thinks(LEAK, leak("read_all")),
            says("", "", [CALLED_READ, ("call_7_1", "read_all", "{}")], "tool_calls"),
        ),
        ([*thinks(LEAK), "I have read it."], says("I have read it.", LEAK)),
        (
            [*thinks(LEAK), READ_CALL],
            says("", LEAK, [("c1", "read", "{}")], "tool_calls"),
        ),
        *((thinks(*words), says("", "".join(words))) for words in THOUGHT_NO_CALLS),
    ],
)
def test_a_call_at_the_end_of_the_reasoning_is_a_call(deltas, wanted):
    assert outcomes_of(deltas, tools=[READ, READ_ALL]) == wanted


def test_a_call_in_the_reasoning_that_the_request_quotes_is_none():
    deltas = thinks("The page says ", LEAK)
    assert outcomes_of(deltas, tools=[READ], quoted=QUOTED) == says("", "The page says " + LEAK)


@pytest.mark.parametrize("reason", ["length", "sensitive", "model_context_window_exceeded"])
def test_a_call_in_the_reasoning_of_an_answer_that_was_cut_off_is_none(reason):
    data = stream_of(*thinks(LEAK), {"content": "x"}, finish(reason))
    thought, _, calls, _ = outcome(read_all([data], tools=[READ]))
    assert (thought, calls) == (LEAK, [])


def test_reasoning_streams_on_until_it_may_be_a_call():
    reader = Mended(tools=[READ])
    words = ("hm < ", "a <tool", "_x", "<tool_call>read", "er")
    heard = [list(reader.feed(stream_of(*thinks(word), done=""))) for word in words]
    assert heard == [
        [Thought("hm < ")],
        [Thought("a ")],
        [Thought("<tool_x")],
        [],
        [Thought("<tool_call>reader")],
    ]


@pytest.mark.parametrize(
    ("deltas", "quoted"),
    [
        ([JSON_LEAK], json.dumps({"page": JSON_LEAK})),
        (thinks(LEAK), f"<pre>{html.escape(LEAK)}</pre>"),
        ([LEAK], f"```\n{LEAK}\n```"),
        (thinks(JSON_LEAK), JSON_LEAK),
    ],
    ids=["JSON in a JSON result", "reasoning of HTML", "text of a fence", "reasoning of JSON"],
)
def test_what_a_page_says_makes_no_call_however_it_is_repeated(deltas, quoted):
    tools = [READ, READ_ALL]
    page = ztoapi.quoted_text([Message("tool", (quoted,), call_id="c")])
    assert [calls for _, _, calls, _ in outcomes_of(deltas, tools=tools, quoted=page)] == [[]]
    assert outcomes_of(deltas, tools=tools)[0][2] == [CALLED_READ]


@pytest.mark.parametrize("zeros", [0, 5_000])
def test_a_page_may_write_a_character_with_a_number_of_any_length(zeros):
    page = LEAK.replace("<", f"&#{'0' * zeros}60;") + f"&#{'1' * zeros};"
    quoted = ztoapi.quoted_text([Message("tool", (page,), call_id="c")])
    assert outcomes_of([LEAK], tools=[READ], quoted=quoted) == says(LEAK)


@pytest.mark.parametrize(
    ("deltas", "wanted"),
    [
        (["\n", "\r\n", "\n hi\n"], [Text(" hi\n"), Finish("stop")]),
        (["\n", READ_CALL], [READ_EVENT, CALLS_END]),
        (["\n"], [Finish("stop")]),
    ],
)
def test_line_ends_at_the_head_of_the_text_are_the_templates(deltas, wanted):
    assert read_deltas(deltas) == wanted
    whole = {
        "content": "".join(d for d in deltas if isinstance(d, str)),
        **(READ_CALL if READ_CALL in deltas else {}),
    }
    assert read_all([document_of(whole)]) == wanted


ANN = '{"name":"Ann"}'


@pytest.mark.parametrize("tools", [(), [READ]], ids=["no tools", "tools"])
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"```json\n{ANN}\n```", ANN),
        (f"\n```\n{ANN}```\n", ANN),
        (f" ```JSON \r\n {ANN}\r\n``` ", ANN),
        ('```json\n[1, {"a": "```"}]\n```', '[1, {"a": "```"}]'),
        ('```json5\n{\n  "a": 1\n}\n```', '{\n  "a": 1\n}'),
    ],
)
def test_json_in_a_fence_comes_without_it(text, wanted, tools):
    for deltas in ([text], list(text), *([text[:at], text[at:]] for at in range(1, len(text)))):
        data = stream_of(*chunk_of(*deltas), finish())
        assert outcome(read_all([data], wants_json=True, tools=tools))[1] == wanted
    assert outcomes_of([text], wants_json=True, tools=tools) == says(wanted)


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{ANN}\n```\nThat is Ann.",
        f"Ann: ```json\n{ANN}\n```",
        f"```json\n{ANN}",
        "```json\n{name: 'Ann'}\n```",
        f"```json\n{ANN}\n```\n```json\n{ANN}\n```",
        "```\nAnn\n```",
        "```json\n7\n```",
        f"`{ANN}`",
        f"~~~\n{ANN}\n~~~",
        f"```{ANN}```",
        '{"a":"```json\\n{}\\n```"}',
    ],
)
def test_other_fences_stay_where_json_is_wanted(text):
    for deltas in ([text], list(text)):
        data = stream_of(*chunk_of(*deltas), finish())
        assert outcome(read_all([data], wants_json=True))[1] == text
    assert outcomes_of([text], wants_json=True) == says(text)


def test_a_fence_that_is_cut_off_stays():
    text = f"```json\n{ANN[:-3]}"
    assert outcomes_of([text], "length", wants_json=True) == says(text, finish="length")


def test_a_fence_stays_where_no_json_is_wanted():
    assert outcomes_of([f"```json\n{ANN}\n```"]) == says(f"```json\n{ANN}\n```")


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["``", "`", "json", "\n", "{", "}"], [""] * 6),
        (["``", "`", "\n", "x", "{"], ["", "", "", "```\nx", "{"]),
        (["{", '"a"', ":1}"], ["{", '"a"', ":1}"]),
        (["`", "a"], ["", "`a"]),
        (["```" + "j" * 99, "\n{"], ["```" + "j" * 99, "\n{"]),
    ],
)
def test_no_more_than_a_fence_with_json_is_held(texts, wanted):
    reader = Mended(wants_json=True)
    heard = []
    for text in texts:
        events = list(reader.feed(stream_of({"content": text}, done="")))
        heard.append("".join(event.text for event in events))
    assert heard == wanted


@pytest.mark.parametrize(
    ("deltas", "wanted"),
    [
        (["I will ", "read.", READ_CALL, "Done."], [READ_EVENT, CALLS_END]),
        (["I will read.", LEAK, "\n"], [LEAKED, CALLS_END]),
        (['{"a":1}', READ_CALL, "Done."], [Text('{"a":1}'), READ_EVENT, CALLS_END]),
        (["\n ", '{"a', '":1}'], [Text('{"a":1}'), Finish("stop")]),
        (["I ", "can't."], [Text("I can't."), Finish("stop")]),
    ],
)
def test_where_json_is_wanted_no_text_stands_beside_a_call(deltas, wanted):
    assert read_deltas(deltas, tools=[READ], wants_json=True) == wanted


def test_json_is_passed_on_as_it_comes():
    reader = Mended(tools=[READ], wants_json=True)
    heard = [list(reader.feed(stream_of({"content": text}, done=""))) for text in (" ", "[", "1")]
    assert heard == [[], [Text("[")], [Text("1")]]


def test_where_no_json_is_wanted_text_stands_beside_a_call():
    assert read_deltas(["I will.", READ_CALL], tools=[READ]) == [
        Text("I will."),
        READ_EVENT,
        CALLS_END,
    ]


@pytest.mark.parametrize(
    ("reason", "wanted"),
    [
        ("sensitive", "content_filter"),
        ("content_filter", "content_filter"),
        ("length", "length"),
        ("?", "stop"),
    ],
)
def test_finish_reasons_are_openais(reason, wanted):
    assert read_all([RECORDED.replace(b'"stop"', f'"{reason}"'.encode())])[-1] == Finish(wanted)


@pytest.mark.parametrize(
    ("deltas", "wanted"),
    [
        (["done"], says("done")),
        (thinks("hm"), says("", "hm")),
        (["\n"], says()),
        (["a", {"tool_calls": [NAMELESS]}], says("a")),
        ([], says()),
        ([READ_PIECE], says("", "", [("c1", "read", "{}")], "tool_calls")),
        ([{"tool_calls": [NAMELESS | {"function": named("f", "{}")}]}], says("", "", [("x", "f", "{}")], "tool_calls")),
        ([LEAK], says("", "", [CALLED_READ], "tool_calls")),
        (["a", READ_PIECE], says("a", "", [("c1", "read", "{}")], "tool_calls")),
    ],
)  # fmt: skip
def test_an_answer_finishes_with_tool_calls_where_it_has_one(deltas, wanted):
    assert outcomes_of(deltas, "tool_calls", tools=[READ]) == wanted


@pytest.mark.parametrize("reason", ["length", "sensitive", "stop"])
def test_other_finishes_without_a_call_stay(reason):
    wanted = ztoapi.FINISH_REASONS[reason]
    assert outcomes_of(["a"], reason) == says("a", finish=wanted)


EMPTY_ANSWERS = {
    "nothing": ([], "stop"),
    "a line end": (["\n"], "stop"),
    "no call": ([], "tool_calls"),
    "a call without a name": ([{"tool_calls": [NAMELESS]}], "tool_calls"),
    "a stray tag": (["</think>\n"], "stop"),
}


@pytest.mark.parametrize("case", EMPTY_ANSWERS)
def test_an_empty_answer_is_asked_for_again(case):
    deltas, reason = EMPTY_ANSWERS[case]
    for parts in cuts(stream_of(*chunk_of(*deltas), finish(reason, **SPENT))):
        with pytest.raises(ztoapi.EmptyAnswerError):
            read_all(parts, asks_again=True)
    with pytest.raises(ztoapi.EmptyAnswerError):
        read_all([document_of(message_of(deltas), reason)], asks_again=True)
    assert outcomes_of(deltas, reason) == says()


@pytest.mark.parametrize(
    ("deltas", "reason"),
    [
        (["a"], "stop"),
        ([" "], "stop"),
        (thinks("hm"), "stop"),
        (thinks("hm"), "tool_calls"),
        ([READ_PIECE], "tool_calls"),
        ([], "length"),
        ([], "sensitive"),
    ],
)
def test_other_answers_are_not_asked_for_again(deltas, reason):
    assert len(outcomes_of(deltas, reason, asks_again=True)) == 1


@pytest.mark.parametrize(
    ("text", "stop", "wanted", "met"),
    [
        ("x = 1\n</code>", ["</code>"], "x = 1\n", "</code>"),
        ("x = 1\n</code", ["</code>"], "x = 1\n", "</code>"),
        ("x</c", ["</code>"], "x", "</code>"),
        ("Hi\n\nUser: no", ["\n\nUser:", "Human:"], "Hi", "\n\nUser:"),
        ("Hi\n\nUs", ["Human:", "\n\nUser:"], "Hi", "\n\nUser:"),
        ("one two three", ["three", "two"], "one ", "two"),
        ("abcd", ["abcd", "bc"], "a", "bc"),
        ("ab", ["b", "ab"], "", "ab"),
        ("END", ["END"], "", "END"),
        ("a.b.c", ["c", "x", "y", "z", ".c"], "a.b", ".c"),
        ("aaab", ["aab"], "a", "aab"),
    ],
)
def test_an_answer_ends_before_a_stop_string(text, stop, wanted, met):
    for deltas in ([text], list(text), *([text[:at], text[at:]] for at in range(1, len(text)))):
        events = read_all([stream_of(*chunk_of(*deltas), finish())], stop=tuple(stop))
        assert (outcome(events)[1], events[-1]) == (wanted, Finish("stop", stop_sequence=met))
    assert outcomes_of([text], stop=tuple(stop)) == says(wanted)


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("x</", ["</code>"]),
        ("x</cod e>", ["</code>"]),
        ("</CODE>", ["</code>"]),
        ("En", ["END"]),
        ("The EN", ["END"]),
        ("a STO", ["STOP"]),
        ("Hi\n\n", ["\n\nUser:"]),
        ("<|im_", ["im_end"]),
        ("abab", ["abc"]),
    ],
)
def test_what_is_no_stop_string_stays(text, stop):
    for deltas in ([text], list(text)):
        events = read_all([stream_of(*chunk_of(*deltas), finish())], stop=tuple(stop))
        assert (outcome(events)[1], events[-1]) == (text, Finish("stop"))
    assert outcomes_of([text], stop=tuple(stop)) == says(text)


def test_a_part_of_a_stop_string_stays_where_the_answer_was_cut_off():
    assert outcomes_of(["x</cod"], "length", stop=("</code>",)) == says("x</cod", finish="length")


def test_a_stop_string_counts_in_the_text_alone():
    deltas = [*thinks("a STOP"), calls(("read", '{"a":"STOP"}'))]
    made = [("c0", "read", '{"a":"STOP"}')]
    assert outcomes_of(deltas, stop=("STOP",)) == says("", "a STOP", made, "tool_calls")


def test_nothing_comes_behind_a_stop_string():
    data = stream_of(
        {"content": "a STOP"}, *thinks("b"), {"content": "c"}, READ_CALL, finish("length", **SPENT)
    )
    assert read_all([data], stop=("STOP",)) == [Text("a "), Finish("stop", stop_sequence="STOP")]


def test_no_more_text_is_held_than_may_be_a_stop_string():
    reader = Mended(stop=("</code>", "\n\nUser:"))
    heard = []
    for text in ("a <", "b", "</co", "dx\n", "\n", "\n", "x"):
        events = list(reader.feed(stream_of({"content": text}, done="")))
        heard.append("".join(event.text for event in events))
    assert heard == ["a ", "<b", "", "</codx", "", "\n", "\n\nx"]


def test_long_stop_strings_are_looked_for_in_linear_time():
    def read(size):
        repair = ztoapi.StopStrings(("a" * 1000 + "b", "<" * 1000))
        for _ in range(size):
            list(repair.feed(Text("some words and more ")))

    assert seconds_of(read, 2**12) < 0.5


def test_zai_gets_four_stop_strings():
    prompt = Prompt("glm-4.6", (Message("user", ("x",)),), stop=tuple("abcdef"))
    request = ztoapi.zai_request(prompt, MODELS["glm-4.6"], "https://api.z.ai", "7")
    assert json.loads(request.data)["stop"] == ["a", "b", "c", "d"]
    assert request.needs.stop == tuple("abcdef")


VECTORS = {
    "object": "list",
    "data": [{"embedding": [0.5, -1, 2]}, {"embedding": ["?"]}, 7],
    "model": "embedding-3",
}
PACKED = VECTORS | {"data": [{"embedding": "AAAAPwAAgL8AAABA"}, *VECTORS["data"][1:]]}


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (json.dumps(VECTORS).encode(), json_bytes(PACKED)),
        (b'{"data":7}', b'{"data":7}'),
        (
            b'{"data":[{"embedding":[1e308,-1e308,1' + b"0" * 99 + b"]}]}",
            b'{"data":[{"embedding":"AACAfwAAgP8AAIB/"}]}',
        ),
        (b'{"data":[{"embedding":[true]}]}', b'{"data":[{"embedding":[true]}]}'),
        (b'{"data":[{"embedding":["1"]}]}', b'{"data":[{"embedding":["1"]}]}'),
        (b"<html>", b"<html>"),
    ],
)
def test_embeddings_are_packed_into_base64(data, wanted):
    for parts in cuts(data):
        reader = ztoapi.EmbeddingsReader()
        assert [*map(reader.feed, parts), reader.close(), reader.close()] == [b""] * len(parts) + [
            wanted,
            b"",
        ]


BATCH = {
    "object": "list",
    "data": [{"embedding": [1], "index": 0}, {"embedding": [2], "index": 1}],
    "model": "embedding-3",
    "usage": {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3},
}


def test_the_answers_to_batches_of_embeddings_are_one():
    joined = ztoapi.JoinedEmbeddings()
    joined.add(json_bytes(BATCH), 2)
    joined.add(json_bytes(BATCH), 2)
    numbered = [{"embedding": [i % 2 + 1], "index": i} for i in range(4)]
    usage = {"prompt_tokens": 6, "completion_tokens": 0, "total_tokens": 6}
    assert json.loads(joined.document()) == {**BATCH, "data": numbered, "usage": usage}


@pytest.mark.parametrize("data", [b"<html>", b'{"data":7}', json_bytes(BATCH)])
def test_an_answer_that_lacks_an_embedding_is_none(data):
    with pytest.raises(UpstreamError):
        ztoapi.JoinedEmbeddings().add(data, 3)


@pytest.mark.parametrize(
    ("given", "sizes"),
    [("x", [1]), (["x"] * 64, [64]), (["x"] * 65, [64, 1]), (["x"] * 130, [64, 64, 2])],
    ids=["a text", "as many as Z.ai takes", "one more", "two batches and a bit"],
)
def test_embeddings_are_asked_for_in_batches_that_zai_takes(given, sizes):
    batches = ztoapi.embedding_batches({"model": "embedding-3", "input": given})
    assert [len(batch["input"]) for batch in batches] == sizes
    if isinstance(given, list):
        assert [text for batch in batches for text in batch["input"]] == given


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("embeddings", {"input": [1, 2]}, "input", "check_embedding_ctx_length=False"),
        ("embeddings", {"input": [[1, 2]]}, "input", "check_embedding_ctx_length=False"),
        ("embeddings", {"input": ["x"] * 2049}, "input", "2048"),
        ("images/generations", {"response_format": "b64_json"}, "response_format", "URLs"),
        ("async/images/generations", {"response_format": "b64_json"}, "response_format", "URLs"),
    ],
    ids=["tokens", "lists of tokens", "too many", "an image in base64", "one to come"],
)
def test_what_zai_does_not_have_is_refused_in_the_fields_own_words(path, body, param, words):
    with pytest.raises(BadRequest, match=words) as raised:
        ztoapi.BODY_CHECKS[path](body)
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("embeddings", {}),
        ("embeddings", {"input": ["x"] * 2048}),
        ("images/generations", {"response_format": "url"}),
    ],
)
def test_what_zai_has_is_not_refused(path, body):
    ztoapi.BODY_CHECKS[path](body)


@pytest.mark.parametrize(
    ("data", "wanted", "media_type"),
    [
        ('{"id":"1","text":"Hallo 好"}', "Hallo 好", "text/plain; charset=utf-8"),
        ('{"text":"{\\"error\\":{\\"code\\":\\"1308\\"}}"}', '{"error":{"code":"1308"}}', "text/plain; charset=utf-8"),
        ('{"text":7}', '{"text":7}', ""),
        ('data: {"type":"transcript.text.delta"}\n\n', 'data: {"type":"transcript.text.delta"}\n\n', ""),
    ],
    ids=["a text", "a text like a refusal", "no text", "a stream"],
)  # fmt: skip
def test_a_transcript_is_its_text(data, wanted, media_type):
    for parts in cuts(data.encode()):
        reader = ztoapi.TranscriptReader()
        read = b"".join([*map(reader.feed, parts), reader.close()])
        assert (read.decode(), reader.media_type) == (wanted, media_type)


def test_a_stream_of_a_transcript_passes_at_once():
    reader = ztoapi.TranscriptReader()
    assert [reader.feed(part) for part in (b" ", b"data: {", b'{"a":1}')] == [
        b"",
        b" data: {",
        b'{"a":1}',
    ]


def test_a_refusal_is_no_transcript():
    reader = ztoapi.TranscriptReader()
    reader.feed(b'{"error":{"code":"1308","message":"x"}}')
    with pytest.raises(UpstreamError):
        reader.close()


def form_of(*parts, end=b"--x--\r\n"):
    """A form as clients send it: of pairs of a head and a content."""
    lines = [f"--x\r\n{head}\r\n\r\n{content}\r\n" for head, content in parts]
    return "".join(lines).encode() + end


def field_of(name, content):
    return f'Content-Disposition: form-data; name="{name}"', content


A_FILE = (
    'Content-Disposition: form-data; name="file"; filename="a; name=model.wav"\r\nContent-Type: audio/wav',
    "RIFF\r\n--y\r\n--",
)
UNREAD = ("X: 1; name=model", "whisper-1")


@pytest.mark.parametrize(
    ("parts", "read"),
    [
        pytest.param([field_of("model", "whisper-1"), A_FILE], ["whisper-1"], id="before the file"),
        pytest.param([A_FILE, field_of("model", "whisper-1")], ["whisper-1"], id="behind the file"),
        pytest.param(
            [field_of("model", "a"), A_FILE, field_of("model", "whisper-1")], ["a", "whisper-1"], id="twice"
        ),
        pytest.param([field_of("prompt", "model"), A_FILE, UNREAD], [], id="none"),
        pytest.param(
            [("content-type: text/plain; name=x\r\ncontent-disposition: form-data;\r\n name=model", "whisper-1")],
            ["whisper-1"], id="an odd head",
        ),
        pytest.param([field_of("model", ""), A_FILE], [""], id="empty"),
    ],
)  # fmt: skip
def test_the_model_of_a_form_is_read_and_changed_while_all_else_passes(parts, read):
    wanted = form_of(*[(head, "glm-asr" if head != UNREAD[0] and text == "whisper-1" else text) for head, text in parts])  # fmt: skip
    for pieces in cuts(form_of(*parts)):
        found = []

        def rename(text, found=found):
            found.append(text)
            return "glm-asr" if text == "whisper-1" else text

        form = ztoapi.FormReader("x", {"model": rename})
        passed = b"".join([*map(form.feed, pieces), form.close()])
        assert (passed, found) == (wanted, read)


@pytest.mark.parametrize("end", [b"--x--", b"--x--\r\nepilogue", b"", b"\r\n--x--\r\n"])
def test_the_end_of_a_form_is_held_back(end):
    form = ztoapi.FormReader("x", {})
    whole = form_of(A_FILE, end=end)
    passed = form.feed(whole)
    assert b"\r\n--x--" not in passed
    assert passed + form.close() == whole


def test_a_form_is_not_kept():
    form = ztoapi.FormReader("x", {"model": str})
    form.feed(form_of(A_FILE, end=b"")[:-9])
    passed = [len(form.feed(b"a" * 2**20)) for _ in range(3)]
    assert passed == [2**20] * 3
    assert len(form.held) < 9


@pytest.mark.parametrize(
    "data",
    [
        form_of(field_of("model", "m" * 70_000)),
        b"--x\r\nContent-Disposition: " + b"x" * 70_000,
        form_of() + b"x" * 70_000,
        form_of(("Content-Disposition: form-data; name*=utf-8''model", "m")),
        form_of((A_FILE[0], "RIFF\r\n--xy\r\n\r\n")),
        b"--x\r\nContent-Disposition: form-data\r\n" + form_of(field_of("model", "m")),
        form_of(field_of("model", "")).replace(b"model", b"model", 1)[:-9] + b"\xff\r\n--x--",
    ],
    ids=["a long field", "a long head", "a long end", "a name in another way", "a boundary in the midst", "no end of a head", "no text"],
)  # fmt: skip
def test_a_form_that_cannot_be_read_is_refused(data):
    form = ztoapi.FormReader("x", {"model": str})
    with pytest.raises(BadRequest, match="cannot be read"):
        form.feed(data)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("multipart/form-data; boundary=x-1", "x-1"),
        ('multipart/form-data; charset=utf-8; Boundary="a b"', "a b"),
        ("multipart/form-data; boundary=x; charset=utf-8", "x"),
    ],
)
def test_the_boundary_of_a_form(given, wanted):
    assert ztoapi.form_boundary(given) == wanted


def test_a_form_without_a_boundary_is_refused():
    with pytest.raises(BadRequest, match="boundary"):
        ztoapi.form_boundary("multipart/form-data")


@pytest.mark.parametrize(
    ("at", "wanted"), [(253402214399999, 253402214399.999), (9e15, None), (0, None)]
)
def test_a_quota_is_reset_at_a_date_or_nobody_knows_when(at, wanted):
    assert ztoapi.plan_limit({"percentage": 1, "nextResetTime": at})["resets_at"] == wanted


CREDITS = {
    "type": "CREDIT_LIMIT",
    "unit": 3,
    "number": 5,
    "usage": 12000,
    "currentValue": 4500,
    "percentage": 37.5,
}
TOKENS = {
    "type": "TOKENS_LIMIT",
    "unit": 6,
    "number": 1,
    "percentage": 100,
    "nextResetTime": 1787056863927,
}
WEEK = {
    "window": "week",
    "type": "TOKENS_LIMIT",
    "percentage": 100,
    "used": None,
    "allowance": None,
}
PLAN = {
    "level": "pro",
    "limits": [
        {
            "window": "5h",
            "type": "CREDIT_LIMIT",
            "percentage": 37.5,
            "used": 4500,
            "allowance": 12000,
            "resets_at": None,
        },
        WEEK | {"resets_at": 1787056863.927},
    ],
}


@pytest.mark.parametrize(
    ("document", "wanted"),
    [
        ({"code": 200, "data": {"limits": [CREDITS, TOKENS], "level": "pro"}}, PLAN),
        ({"limits": [CREDITS, TOKENS], "level": "pro"}, PLAN),
        (
            {"code": 401, "msg": "token expired or incorrect", "success": False},
            {"level": "", "limits": []},
        ),
        ({"data": [1], "limits": {"a": "b"}, "level": 7}, {"level": "7", "limits": []}),
        (
            {
                "limits": [
                    None,
                    5,
                    {},
                    {"percentage": "80"},
                    {"percentage": True},
                    {"percentage": 10**400},
                ]
            },
            {"level": "", "limits": []},
        ),
        (
            {
                "limits": [
                    TOKENS | {"unit": "5", "number": None, "nextResetTime": "soon", "usage": -1}
                ]
            },
            {"level": "", "limits": [WEEK | {"window": "None of unit 5", "resets_at": None}]},
        ),
    ],
)
def test_what_is_left_of_a_plan_is_read_and_odd_words_are_left_out(document, wanted):
    assert ztoapi.plan_quota(document) == wanted


# ======== Accounts ========

TODAY = date(2026, 11, 21)  # a Saturday
NOON = ztoapi.midnight(TODAY) + 12 * 3600


def test_a_day_begins_at_midnight_in_utc():
    midnight = datetime(2028, 3, 1, tzinfo=timezone.utc).timestamp()
    assert [day_of(midnight + seconds) for seconds in (-0.5, 0, 86399.5)] == [
        date(2028, 2, 29),
        *[date(2028, 3, 1)] * 2,
    ]


@pytest.mark.parametrize(
    ("limit", "words", "wanted"),
    [
        ("expires", "2027-01-31", "2027-01-31"),
        ("expires", "2026-11-21", "2026-11-21"),
        ("expires", "30d", "2026-12-21"),
        ("tokens", "5M", "5M"),
        ("tokens", "500k/day", "500k/day"),
        ("spend", "5", "5"),
        ("spend", "0.50/day", "0.50/day"),
        ("spend", 2.5, "2.5"),
        ("spend", 5, "5"),
        ("models", "glm-4.*, glm-5.3", "glm-4.*,glm-5.3"),
        ("rpm", "20", 20),
        ("rpm", 20, 20),
        ("parallel", "2", 2),
        ("parallel", "none", None),
        ("tokens", None, None),
    ],
)
def test_a_limit_is_kept_in_the_words_it_was_given_in(limit, words, wanted):
    assert ztoapi.parse_limits({limit: words}, TODAY) == {limit: wanted}


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        *(
            ("expires", words)
            for words in ("2026-11-20", "2026-02-30", "0d", "d", "-3d", "99999d", "soon", "")
        ),
        *(
            ("tokens", words)
            for words in ("lots", "0", "-5", "5M/year", "5T", "1.5M", "5M/", "٣", "", [])
        ),
        *(("models", words) for words in (",", "glm-4.6,", "glm 4.6", "", 7, ["glm-4.6"])),
        *(("spend", words) for words in ("0", "0.00", "-1", "5/year", "$5", "1e3", 0, 0.0, True)),
        *(("rpm", words) for words in ("0", "-1", "1.5", "many", True, 10**9)),
        *(("expires", words) for words in (20270131, True)),
        *(("parallel", words) for words in ("0", {})),
        *(("owner", words) for words in ("me", "none", None)),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused_by_name(limit, words):
    with pytest.raises(BadRequest) as raised:
        ztoapi.parse_limits({limit: words}, TODAY)
    assert raised.value.param == limit
    assert str(raised.value).startswith(f"{limit} ")


@pytest.mark.parametrize(
    "name", ["", "a b", "a/b", "x" * 65, "operator", ".", "..", None, 3, "a\n", "a\u200b"]
)
def test_a_name_that_cannot_be_a_keys_is_refused(name):
    with pytest.raises(BadRequest):
        ztoapi.parse_key_name(name)


@pytest.mark.parametrize("name", ["Zoë.李+x@y_z-1", "अन्ना", "อันนา", "x" * 64])
def test_a_name_may_be_of_any_script(name):
    assert ztoapi.parse_key_name(name) == name


def test_a_name_is_the_same_however_its_letters_are_composed():
    assert ztoapi.parse_key_name("Zoe\u0308") == "Zoë"


@pytest.mark.parametrize(
    ("tokens", "budget", "first", "following"),
    [
        ("7", 7, date.min, date.max),
        ("500k/day", 500_000, TODAY, date(2026, 11, 22)),
        ("5M/WEEK", 5_000_000, date(2026, 11, 16), date(2026, 11, 23)),
        ("1g/month", 10**9, date(2026, 11, 1), date(2026, 12, 1)),
    ],
)
def test_a_budget_is_for_a_period_that_begins_at_midnight(tokens, budget, first, following):
    account = Account("a", tokens=tokens)
    assert account.token_budget.amount == budget
    assert account.token_budget.days(TODAY) == (first, following)


def test_the_last_month_of_a_year_ends_with_it():
    budget = Account("a", tokens="1/month").token_budget
    assert budget.days(date(2026, 12, 31))[1] == date(2027, 1, 1)


@pytest.mark.parametrize(
    ("spend", "budget"),
    [
        ("5", ztoapi.Budget(5 * DOLLAR)),
        ("2.50/month", ztoapi.Budget(5 * DOLLAR // 2, "month")),
        ("0.000001/DAY", ztoapi.Budget(1000, "day")),
    ],
)
def test_a_budget_of_money_is_counted_in_billionths_of_a_dollar(spend, budget):
    assert Account("a", spend=spend).money_budget == budget


def test_a_key_is_valid_to_the_end_of_its_last_day():
    Account("a", expires="2026-11-21").check_usable(NOON)
    with pytest.raises(ztoapi.ProxyError, match="until 2026-11-21") as raised:
        Account("a", expires="2026-11-21").check_usable(NOON + 12 * 3600)
    assert (raised.value.kind.status, raised.value.kind.code) == (401, "key_expired")


@pytest.mark.parametrize(
    ("models", "allowed"), [(None, True), ("GLM-4.*,glm-5", True), ("glm-5*", False)]
)
def test_the_models_of_a_key_are_patterns(models, allowed):
    assert Account("a", models=models).allows(MODELS["glm-4.6"]) is allowed


def counted(accounts, account, tokens, day=TODAY, spent=0):
    figures = (1, 0, tokens - 1, 0, 1, spent)
    accounts.count((account.id, day.isoformat(), "glm-4.6"), figures)


@pytest.mark.parametrize(
    ("tokens", "words", "wait"),
    [
        ("100", "tokens: the operator can give it more", None),
        ("100/day", "reset on 2026-11-22 at 00:00 UTC", 12 * 3600),
        ("100/week", "reset on 2026-11-23 at 00:00 UTC", 36 * 3600),
    ],
)
def test_a_used_up_key_says_when_it_begins_anew(tokens, words, wait):
    accounts, account = Accounts(()), Account("a", "anna", tokens=tokens)
    counted(accounts, account, 99)
    accounts.check_budget(account, NOON)
    counted(accounts, account, 1)
    with pytest.raises(ztoapi.ProxyError, match=words) as raised:
        accounts.check_budget(account, NOON)
    assert error_headers(raised.value).get("Retry-After") == (wait and str(wait))
    assert (raised.value.kind.status, raised.value.kind.code) == (402, "key_quota_exceeded")


def test_what_is_used_is_the_databases_sum_and_what_it_does_not_have_yet():
    accounts, account = Accounts(()), Account("a", "anna", tokens="100/week")
    counted(accounts, account, 1, date(2026, 11, 15))  # in another week
    counted(accounts, Account("b"), 2)
    counted(accounts, account, 10)
    accounts.take()
    counted(accounts, account, 20, spent=3)
    budget = account.token_budget
    assert accounts.used_in(budget, "a", TODAY) == Used(30, 3)
    assert accounts.used_in(None, EVERYBODY, TODAY) == Used(33, 3)
    accounts.written(
        Known([account], {"a": Totals(7, 70, 700)}, {("a", "2026-11-16"): Used(40, 400)})
    )
    assert accounts.used_in(budget, "a", TODAY) == Used(60, 403)
    assert accounts.used_in(None, "a", TODAY) == Used(90, 703)
    assert accounts.used_in(budget, "a", date(2026, 11, 23)) == Used()


FREE_MODEL, PAID_MODEL = MODELS["glm-4.7-flash"], MODELS["glm-4.6"]


@pytest.mark.parametrize(
    ("limits", "common", "code", "words"),
    [
        pytest.param({}, "", None, None, id="no limit"),
        pytest.param({"spend": "0.02"}, "0.02", None, None, id="not reached"),
        pytest.param(
            {"spend": "0.01"},
            "",
            "key_quota_exceeded",
            "This key has spent its 0.01 US dollars: the operator can give it more.",
            id="the key's, for good",
        ),
        pytest.param(
            {"spend": "0.01/day"},
            "",
            "key_quota_exceeded",
            "This key has spent its 0.01/day US dollars: they are reset on 2026-11-22 at 00:00 UTC.",
            id="the key's, for a day",
        ),
        pytest.param(
            {},
            "0.01/month",
            "spend_limit_reached",
            "This server has spent its SPEND_LIMIT of 0.01/month US dollars: "
            "they are reset on 2026-12-01 at 00:00 UTC.",
            id="all together",
        ),
    ],
)
def test_what_costs_money_ends_with_the_money_and_what_is_free_goes_on(limits, common, code, words):
    accounts, account = Accounts((), common), Account("a", "anna", **limits)
    counted(accounts, account, 9, spent=DOLLAR // 200)
    counted(accounts, Account("b") if common else account, 9, spent=DOLLAR // 200)
    accounts.check_spending(account, FREE_MODEL, NOON)
    if not code:
        accounts.check_spending(account, PAID_MODEL, NOON)
        return
    for model in (PAID_MODEL, None):
        with pytest.raises(ztoapi.ProxyError) as raised:
            accounts.check_spending(account, model, NOON)
        assert (raised.value.kind.status, raised.value.kind.code) == (402, code)
        assert raised.value.message == f"{words} Free models, such as glm-4.7-flash, go on."


@pytest.mark.parametrize(
    ("model", "told", "searches", "dollars"),
    [
        pytest.param(
            "glm-4.6", Usage(1_000_000, 100_000, 1_100_000, 500_000), 0, 0.575, id="table"
        ),
        pytest.param("glm-4.7-flash", Usage(10**6, 10**6, 2 * 10**6), 0, 0, id="free"),
        pytest.param("glm-9-flash", Usage(10**6, 10**6, 2 * 10**6), 0, 11.1, id="unknown: dearest"),
        pytest.param("glm-4.7-flash", Usage(5, 5, 10), 1, 0.01, id="a search"),
    ],
)
def test_an_answer_costs_its_list_price(model, told, searches, dollars):
    meter = ztoapi.Meter()
    meter.ask_chat(resolve(model))
    with meter.asking(100):
        meter.note([told, *[ztoapi.Citations(({},))] * searches])
    assert meter.spent == round(dollars * DOLLAR)


def test_a_search_that_was_refused_costs_nothing():
    meter = ztoapi.path_meter("web_search", "")
    with pytest.raises(UpstreamError), meter.asking(0):
        raise UpstreamError(ztoapi.UNAVAILABLE)
    assert meter.spent == 0


NEW = Account("n", "anna", hash="new")


@pytest.mark.parametrize(
    ("wanted", "known", "made"),
    [
        pytest.param({"adds": "only"}, None, NEW, id="add"),
        pytest.param({"adds": "also", "limits": {"rpm": 1}}, None, replace(NEW, rpm=1), id="put"),
        pytest.param({"limits": {"rpm": None}}, {"rpm": 3}, {"rpm": None}, id="change"),
        pytest.param({"rotates": True}, {"rpm": 3}, {"rpm": 3, "hash": "new"}, id="rotate"),
        pytest.param({"paused": True}, {}, {"paused": True}, id="pause"),
        pytest.param({"paused": False}, {"paused": True}, {}, id="resume"),
        pytest.param({"rename": "bob"}, {}, {"name": "bob"}, id="rename"),
    ],
)
def test_a_key_is_added_or_changed(wanted, known, made):
    old = Account("a", "anna", hash="old")
    before = known if known is None else replace(old, **known)
    after = made if isinstance(made, Account) else replace(old, **made)
    assert ztoapi.KeyChange("anna", **wanted).made(before, NEW) == after


@pytest.mark.parametrize(
    ("adds", "known", "words"),
    [
        ("only", NEW, "There is already a key named anna"),
        ("never", None, "There is no key named anna"),
    ],
)
def test_a_key_that_is_there_is_not_added_and_one_that_is_not_is_not_changed(adds, known, words):
    with pytest.raises(ztoapi.ProxyError, match=words):
        ztoapi.KeyChange("anna", adds=adds).made(known, NEW)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "a", "rotate": 1}, "rotate"),
        ({"name": "a", "paused": "yes"}, "paused"),
        ({"name": "a", "rename": "b c"}, "name"),
        ({"rotate": True}, "name"),
        ({"name": "a", "color": "red"}, "color"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused_by_name(body, param):
    with pytest.raises(BadRequest) as raised:
        ztoapi.parse_key_change(body, TODAY)
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("models", "strange"),
    [(None, []), ("glm-4.*,GLM-5", []), ("glm-9*,glm-5.3,gpt-4o", ["glm-9*", "gpt-4o"])],
)
def test_a_pattern_that_fits_no_model_is_known(models, strange):
    assert ztoapi.strange_patterns(models, MODELS) == strange


def test_a_batch_is_taken_again_until_it_is_written():
    accounts = Accounts(())
    counted(accounts, Account("a"), 5)
    counted(accounts, Account("a"), 5)
    first = accounts.take()
    assert first == {("a", "2026-11-21", "glm-4.6"): [2, 0, 8, 0, 2, 0]}
    counted(accounts, Account("b"), 1)
    assert accounts.take() is first
    accounts.written(Known())
    assert list(accounts.take()) == [("b", "2026-11-21", "glm-4.6")]


def test_odd_figures_count_as_none_and_do_not_overflow_a_column():
    usage = {
        "prompt_tokens": 10**30,
        "completion_tokens": -5,
        "prompt_tokens_details": {"cached_tokens": True},
    }
    assert ztoapi.zai_usage(usage) == ztoapi.Usage()


@pytest.mark.parametrize(("seconds", "wait"), [(59, "1"), (60, None), (89, None), (90, None)])
def test_a_key_may_ask_so_often_in_any_minute(seconds, wait):
    accounts, account = Accounts(()), Account("a", rpm=2)
    accounts.check_rate(account, 0)
    accounts.check_rate(account, 30)
    if not wait:
        accounts.check_rate(account, seconds)
        return
    with pytest.raises(ztoapi.ProxyError) as raised:
        accounts.check_rate(account, seconds)
    assert (raised.value.kind.status, error_headers(raised.value)) == (429, {"Retry-After": wait})


def test_a_price_is_for_a_million_tokens_and_less_from_the_cache():
    assert MODELS["glm-5.3"].cost(1_000_000, 500_000, 100_000) == pytest.approx(0.7 + 0.13 + 0.44)
    assert [
        resolve(name).cost(5, 0, 5) for name in ("glm-4.7-flash", "glm-4.6v-flashx", "new")
    ] == [0, None, None]


def test_a_key_that_this_program_made_is_redacted_wherever_it_stands():
    assert Redactor(())(f"x {ztoapi.new_key()} y") == "x *** y"


# ======== Policies ========


FIRST_KEY, SECOND_KEY, NEXT_BASE = (
    ztoapi.ZaiKey("1", "https://a"),
    ztoapi.ZaiKey("2", "https://a"),
    ztoapi.ZaiKey("1", "https://b"),
)
CHAT, MESSAGES, FILES = KeyUse("glm-5"), KeyUse("glm-5", "/messages"), KeyUse(path="/files")
FREE = KeyUse("glm-4.7-flash")


def pool(*keys):
    return KeyPool(keys, FakeClock())


@pytest.mark.parametrize("code", [1113, 1308, 1310, 1316])
def test_a_key_without_quota_cools_down_for_the_one_model(code):
    keys = pool(FIRST_KEY, SECOND_KEY)
    keys.cool_down(FIRST_KEY, CHAT, refusal(code))
    assert [keys.available(target) for target in (CHAT, MESSAGES, FREE)] == [
        [SECOND_KEY],
        [SECOND_KEY],
        [FIRST_KEY, SECOND_KEY],
    ]
    keys.clock.time += Limits.cooldown
    assert keys.available(CHAT) == [FIRST_KEY, SECOND_KEY]


@pytest.mark.parametrize(
    ("refused", "available"),
    [
        pytest.param(CHAT, [], id="chat"),
        pytest.param(KeyUse(), [], id="models"),
        pytest.param(MESSAGES, [CHAT, FREE, FILES], id="messages"),
        pytest.param(FILES, [CHAT, FREE, MESSAGES], id="files"),
    ],
)
def test_a_key_refused_for_the_chat_cools_down_everywhere_for_another_path_only_there(
    refused, available
):
    keys = pool(FIRST_KEY, SECOND_KEY)
    keys.cool_down(FIRST_KEY, refused, refusal(1000, 401))
    assert [
        target for target in (CHAT, FREE, MESSAGES, FILES) if FIRST_KEY in keys.available(target)
    ] == available


def test_a_model_that_another_path_lacks_may_still_serve_the_chat():
    keys = pool(FIRST_KEY, SECOND_KEY)
    keys.cool_down(FIRST_KEY, MESSAGES, refusal(1211))
    assert [FIRST_KEY in keys.available(target) for target in (CHAT, MESSAGES)] == [True, False]


def test_the_next_base_serves_when_no_key_of_the_one_before_can():
    keys, used = pool(FIRST_KEY, NEXT_BASE, SECOND_KEY), []
    for code in (1308, 1309, 1000):
        used.append(keys.available(CHAT))
        keys.cool_down(used[-1][0], CHAT, refusal(code))
    assert used == [[FIRST_KEY, SECOND_KEY], [SECOND_KEY], [NEXT_BASE]]


QUOTA, MODEL = [1000, 1113, 1308, 1310, 1316], [1309, 1313, 1314, 1315, 1211, 1212, 1220, 1311]
PASSING = [1302, 1305, 1200, 1210, 1261, 1301]


@pytest.mark.parametrize(
    ("keys", "codes"),
    [
        pytest.param([FIRST_KEY], QUOTA, id="one key"),
        pytest.param([FIRST_KEY, SECOND_KEY], QUOTA + MODEL, id="two"),
    ],
)
def test_a_key_cools_down_where_the_same_one_may_fare_better_later_or_another_now(keys, codes):
    assert [
        code for code in QUOTA + MODEL + PASSING if pool(*keys).calls_for_cooldown(refusal(code))
    ] == codes


def test_a_key_cools_down_until_the_quota_is_reset_whatever_the_wall_clock_says_later():
    keys = pool(FIRST_KEY)
    keys.clock.epoch = (
        1789144541.0 - 60 - keys.clock.time
    )  # a minute before 2026-09-12 00:35:41 in China
    keys.cool_down(
        FIRST_KEY, CHAT, refusal(1308, text="Your limit will reset at 2026-09-12 00:35:41")
    )
    keys.clock.epoch -= 86400
    with pytest.raises(UpstreamError, match="1308") as raised:
        keys.available(CHAT)
    assert error_headers(raised.value)["Retry-After"] == "60"
    keys.clock.time += 60
    assert keys.available(CHAT) == [FIRST_KEY]


@pytest.mark.parametrize(
    ("code", "text", "seconds"),
    [
        (1308, "reset at 2099-12-31 00:00:00", 5 * 3600),
        (1310, "reset at 2099-12-31 00:00:00", KeyPool.MAX_COOLDOWN),
        (1308, "since 2020-01-01 00:00:00, reset at 2026-09-12 00:35:41", 60),
        (1308, "reset at 2020-01-01 00:00:00", Limits.cooldown),
        (1308, "reset at 2026-99-99 00:00:00", Limits.cooldown),
    ],
)
def test_a_reset_is_believed_within_reason(code, text, seconds):
    keys = pool(FIRST_KEY)
    keys.clock.epoch = 1789144541.0 - 60 - keys.clock.time
    keys.cool_down(FIRST_KEY, CHAT, refusal(code, text=text))
    with pytest.raises(UpstreamError) as raised:
        keys.available(CHAT)
    assert raised.value.retry_after == seconds


def test_while_all_keys_cool_down_one_request_in_ten_seconds_sees_whether_that_still_holds():
    keys, told = pool(FIRST_KEY, SECOND_KEY), []
    for key, code in ((FIRST_KEY, 1113), (SECOND_KEY, 1308)):
        keys.clock.time += 1
        keys.cool_down(key, CHAT, refusal(code))
    for key in (FIRST_KEY, SECOND_KEY, FIRST_KEY):
        with pytest.raises(UpstreamError) as error:
            keys.available(CHAT)
        told.append((error.value.zai_code, error.value.retry_after))
        keys.clock.time += KeyPool.PROBE_INTERVAL
        assert keys.available(CHAT) == keys.available(CHAT) == [key]
        keys.tried(key, CHAT)
    assert told == [("1308", 299), ("1113", 289), ("1308", 279)]
    keys.accepted(FIRST_KEY, CHAT)
    assert keys.available(CHAT) == [FIRST_KEY]


def test_a_refusal_is_kept_without_the_request_that_met_with_it():
    keys = pool(FIRST_KEY)
    with pytest.raises(UpstreamError) as met:
        raise refusal(1113)
    keys.cool_down(FIRST_KEY, CHAT, met.value)
    assert [cooldown.error.__traceback__ for cooldown in keys.cooling.values()] == [None]


def test_a_resting_key_tells_zais_code_and_none_of_its_words():
    keys, error = pool(FIRST_KEY), refusal(1113, text="no balance for <the first one's prompt>")
    error.headers = {"x-zai-request-id": "of-the-first"}
    keys.cool_down(FIRST_KEY, CHAT, error)
    with pytest.raises(UpstreamError) as told:
        keys.available(CHAT)
    assert (str(told.value), told.value.headers) == (f"{ztoapi.NO_BALANCE.message} (Z.ai 1113)", {})


def test_the_names_of_models_that_clients_make_up_are_forgotten():
    keys = pool(FIRST_KEY, SECOND_KEY)
    for number in range(KeyPool.MAX_COOLING + 9):
        keys.cool_down(FIRST_KEY, KeyUse(f"made-up-{number} glm-4.6", "/messages"), refusal(1211))
    keys.cool_down(FIRST_KEY, CHAT, refusal(1113))
    keys.cool_down(FIRST_KEY, KeyUse("made-up"), refusal(1211))
    assert len(keys.cooling) == KeyPool.MAX_COOLING + 2
    assert keys.available(CHAT) == [SECOND_KEY]


def test_made_up_models_push_out_no_cooldown_of_a_real_one():
    keys = pool(FIRST_KEY, SECOND_KEY)
    keys.cool_down(FIRST_KEY, CHAT, refusal(1113))
    for number in range(KeyPool.MAX_COOLING + 9):
        keys.cool_down(FIRST_KEY, KeyUse(f"made-up-{number}"), refusal(1211))
    assert keys.available(CHAT) == [SECOND_KEY]


@pytest.mark.parametrize(
    "error",
    [
        refusal(1200, 500),
        zai_error(502, b"<html>"),
        ztoapi.connection_error(ztoapi.aiohttp.ServerDisconnectedError()),
        ztoapi.connection_error(ztoapi.aiohttp.ConnectionTimeoutError()),
        refusal(1399),
    ],
)
def test_what_may_pass_is_tried_again(error):
    assert error.kind in ztoapi.RETRYABLE
    assert not ztoapi.is_refusal_for_load(error)


def test_the_waits_between_tries_double_and_jitter_spreads_them():
    assert [backoff(retry, 0.5) for retry in (1, 2, 3)] == [0.5, 1, 2]
    assert [backoff(1, jitter) for jitter in (0, 1)] == [0.375, 0.625]


@pytest.mark.parametrize(
    "error",
    [
        *(
            refusal(1113),
            refusal(1308),
            refusal(1210, 400),
            refusal(1000, 401),
            zai_error(404, b""),
        ),
        ztoapi.connection_error(ztoapi.aiohttp.SocketTimeoutError()),
    ],
)
def test_a_refusal_that_would_come_again_is_not_retried(error):
    assert error.kind not in ztoapi.RETRYABLE


BARE_429 = zai_error(429, b"slow down")


def with_wait(error, seconds):
    error = ztoapi.UpstreamError(error.kind, detail=error.detail, zai_code=error.zai_code)
    error.told_wait = seconds
    return error


@pytest.mark.parametrize(
    ("error", "answer_time", "waits"),
    [
        pytest.param(refusal(1302), 0, [0.3, 0.6, 1, 1, 1], id="too many"),
        pytest.param(refusal(1302), 3, [0.3, 0.6, 1.2, 1.5, 1.5], id="too many, answers of 3 s"),
        pytest.param(refusal(1302), 60, [0.3, 0.6, 1.2, 2.4, 4.8, 5, 5], id="long answers"),
        pytest.param(BARE_429, 0, [0.3, 0.6, 1, 1], id="without a code"),
        pytest.param(refusal(1305), 0, [2, 4, 8, 15, 15], id="overloaded"),
        pytest.param(with_wait(refusal(1302), 7.0), 0, [7, 7], id="Z.ai says when"),
        pytest.param(with_wait(refusal(1305), 1.0), 0, [2, 4], id="Z.ai says when, too soon"),
    ],
)
def test_a_key_that_was_refused_for_load_opens_after_a_while(error, answer_time, waits):
    patience, now, waited = ztoapi.Patience(), 100.0, []
    for _ in waits:
        assert patience.lets_go(0, 1, now)
        patience.refused(error, 0, answer_time, now, 0.5)
        patience.refused(error, 0, answer_time, now, 0.5)  # at the same time: counts once
        assert not patience.lets_go(0, 1, now)
        waited.append(round(patience.opens_at - now, 6))
        now = patience.opens_at
    assert waited == waits
    patience.taken(1, now)
    patience.refused(error, 0, 0, now, 0.5)
    assert round(patience.opens_at - now, 6) == waits[0]


@pytest.mark.parametrize(
    ("error", "opens"), [(refusal(1302), True), (with_wait(refusal(1302), 7.0), False)]
)
def test_an_answer_of_ours_that_ends_opens_a_key_unless_zai_said_when(error, opens):
    patience = ztoapi.Patience()
    patience.refused(error, 1, 0, 100.0, 0.5)
    patience.answered(1, 1, 0.5, 100.0)
    assert patience.lets_go(0, 1, 100.0) is opens


def test_a_time_that_zai_names_counts_also_where_a_key_is_closed_already():
    patience = ztoapi.Patience()
    patience.refused(refusal(1302), 3, 0, 100.0, 0.5)
    patience.refused(with_wait(refusal(1302), 7.0), 2, 0, 100.0, 0.5)
    patience.answered(1, 1, 0.5, 101.0)
    assert [patience.lets_go(0, 1, now) for now in (106.9, 107.0)] == [False, True]


def test_no_more_than_zai_took_are_tried_while_a_refused_one_is_tried_again():
    patience = ztoapi.Patience()
    patience.refused(refusal(1302), 0, 0, 100.0, 0.5)
    assert [patience.lets_go(in_flight, 1, 101.0) for in_flight in (0, 1)] == [True, False]
    patience.taken(1, 101.0)
    assert patience.lets_go(1, 1, 101.0)


@pytest.mark.parametrize(
    ("code", "others", "ends_at"),
    [
        pytest.param(1302, 0, 220.0, id="nothing of ours is in flight"),
        pytest.param(1302, 1, math.inf, id="our own answers explain it"),
        pytest.param(1305, 1, 220.0, id="overloaded, whoever asks"),
    ],
)
def test_a_client_is_told_when_nothing_was_taken_for_long(code, others, ends_at):
    patience = ztoapi.Patience()
    for now in (100.0, 150.0):
        patience.refused(refusal(code), others, 0, now, 0.5)
    assert patience.ends_at(0.0, 120.0) == ends_at  # came before
    assert patience.ends_at(130.0, 120.0) == max(250.0, ends_at)  # came meanwhile
    patience.taken(1, 200.0)
    assert patience.ends_at(0.0, 120.0) == math.inf


def saturated(places, seconds):
    """The patience of a key whose places are all ours, and which refused one more, for so long."""
    patience = ztoapi.Patience()
    for in_flight in range(1, places + 1):
        patience.taken(in_flight, 100.0)
    patience.refused(refusal(1302), places, 0.5, 100.0, 0.5)
    patience.answered(places, 1, 0.5, 100.0 + seconds)
    return patience


@pytest.mark.parametrize(
    ("places", "seconds", "stay"),
    [(1, 7.9, 1), (1, 8, 0), (3, 8, 2), (8, 8, 6), (10, 8, 7)],
)
def test_a_process_leaves_some_of_its_places_to_others_now_and_then(places, seconds, stay):
    patience, now = saturated(places, seconds), 100.0 + seconds
    may_go = [n for n in range(places) if patience.lets_go(n, places, now)]
    assert may_go == [*range(stay)]
    assert patience.lets_go(places - 1, places, now + 1.25)


def test_it_leaves_none_where_nobody_waits_or_nothing_was_refused():
    patience = ztoapi.Patience()
    patience.taken(1, 100.0)
    patience.answered(1, 1, 0.5, 200.0)
    assert patience.lets_go(0, 1, 200.0)
    patience = saturated(1, 7)
    patience.answered(1, 0, 0.5, 108.0)
    patience.taken(1, 109.0)
    patience.answered(1, 1, 0.5, 116.0)
    assert patience.lets_go(0, 1, 116.0)


@pytest.mark.parametrize(
    ("is_used", "next_gap"), [(True, 8.0), (False, 60.0)], ids=["others used it", "nobody did"]
)
def test_what_becomes_of_a_gap_says_when_the_next_one_is_due(is_used, next_gap):
    patience = saturated(1, 8)
    patience.taken(1, 110.0)
    if is_used:
        patience = saturated(1, 8)
        patience.refused(refusal(1302), 0, 0.5, 109.0, 0.5)
        patience.taken(1, 110.0)
    patience.refused(refusal(1302), 1, 0.5, 110.5, 0.5)
    patience.answered(1, 1, 0.5, 110.0 + next_gap - 0.1)
    assert patience.lets_go(0, 1, 110.0 + next_gap - 0.1)
    patience.answered(1, 1, 0.5, 110.0 + next_gap)
    assert not patience.lets_go(0, 1, 110.0 + next_gap)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only while everybody waits, and then at once."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.poll, self._selector.select = self._selector.select, self.skip

    def time(self):
        return self.now

    def skip(self, timeout=None):
        self.now += timeout or 0
        return self.poll(0)


class SharedKey:
    """A key at Z.ai that takes `places` requests at a time, of processes that do not know each other."""

    ANSWER, WAY = 0.5, 0.005  # seconds: of an answer, and to Z.ai and back

    def __init__(self, places, processes):
        self.loop = VirtualLoop()
        self.random = Random(1)
        self.places, self.taken = places, 0
        self.answers, self.refusals = Counter(), 0
        self.waits = []
        self.processes = [
            ztoapi.Upstream(SHARING, Limits(), None, self.clock()) for _ in range(processes)
        ]

    def clock(self):
        clock = ztoapi.Clock()
        clock.now, clock.jitter = self.loop.time, self.random.random
        clock.call_later = self.loop.call_later
        return clock

    async def attempt(self, slot, _):
        await asyncio.sleep(self.WAY)
        if self.taken >= self.places:
            self.refusals += 1
            raise refusal(1302)
        self.taken += 1

    async def client(self, choose, seconds):
        while self.loop.now < seconds:
            process, asked_at = choose(), self.loop.now
            async with AsyncExitStack() as owner:
                upstream = self.processes[process]
                await upstream.with_retries(CHAT, Caller(), self.attempt, owner)
                await asyncio.sleep(self.ANSWER)
                self.taken -= 1
            self.answers[process] += 1
            self.waits.append(self.loop.now - asked_at)

    async def clients(self, choices, seconds):
        await asyncio.gather(*(self.client(choose, seconds) for choose in choices))

    def serve(self, choices, seconds=60):
        """The answers per second, of what is best."""
        with closing(self.loop):
            self.loop.run_until_complete(self.clients(choices, seconds))
        return sum(self.answers.values()) / self.loop.now * self.ANSWER / self.places


SHARING = ztoapi.Settings(zai_api_key=("key",))
CLIENTS = 24


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("places", [1, 3, 10])
def test_processes_share_a_key_without_knowing_of_each_other(places, processes):
    def served(processes):
        key = SharedKey(places, processes)
        choose = partial(key.random.randrange, processes)
        return key, key.serve([choose] * CLIENTS)

    alone, (key, share) = served(1)[1], served(processes)
    assert alone > 0.93
    assert share > 0.8 * alone
    assert key.refusals < max(2, processes / 2) * sum(key.answers.values())
    assert max(key.waits) < 10 * sum(key.waits) / len(key.waits)


@pytest.mark.parametrize("places", [1, 3, 10])
def test_no_process_keeps_the_others_from_a_key(places):
    key = SharedKey(places, 4)
    choices = [partial(int, number % 4) for number in range(CLIENTS)]  # each has its own process
    assert key.serve(choices, 120) > 0.85
    assert min(key.answers.values()) > 20


def crowd(hidden, requests, answer=5.0, limit=None):
    """Requests that all wait at once, before a Z.ai that takes `hidden(time)` of them, on a clock of its own.

    The time it took, what it takes at best, the times of the refusals, and the limit in the end.
    """
    random, limit = Random(1), limit or AdaptiveLimit()
    now, agenda, number, active, done, refusals = 0.0, [], count(), 0, 0, []
    waiting = requests
    while done < requests:
        while waiting and limit.has_room(now):
            limit.in_flight += 1
            waiting, rank, taken = waiting - 1, limit.in_flight, active < hidden(now)
            active += taken
            first = now + 0.5 * random.uniform(0.5, 1.5)
            for at, what in (
                [(first, "accepted"), (first + answer * random.uniform(0.5, 1.5), "done")]
                if taken
                else [(now + 0.1, "refused")]
            ):
                heappush(agenda, (at, next(number), what, rank))
        now, _, what, rank = heappop(agenda)
        if what == "accepted":
            limit.accepted(rank, now)
            continue
        if what == "refused":
            refusals.append(now)
            limit.refused(rank, now)
        limit.in_flight -= 1
        active, done, waiting = (
            active - (what == "done"),
            done + (what == "done"),
            waiting + (what == "refused"),
        )
    best, left = 0.0, requests * (answer + 0.5)
    while left > 0:
        best, left = best + 0.1, left - hidden(best) * 0.1
    return now, best, refusals, limit.limit


@pytest.mark.parametrize("hidden", [1, 2, 3, 10])
def test_a_hidden_limit_is_found_within_a_few_requests(hidden):
    limit = AdaptiveLimit()
    crowd(lambda _: hidden, 3 * hidden, limit=limit)
    assert hidden <= limit.limit_after_refusal + 1 <= hidden + 1


@pytest.mark.parametrize("hidden", [1, 2, 3, 10, 30])
def test_a_crowd_is_served_nearly_as_fast_as_can_be_with_few_refusals(hidden):
    took, best, refusals, limit = crowd(lambda _: hidden, 1000)
    assert best / took > 0.9
    assert (
        len(refusals) < 10 + took / 30
    )  # one try in half a minute to find out whether there is more
    assert hidden <= limit <= hidden + 1


@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(lambda t: 1 if t < 120 else 10, id="raised"),
        pytest.param(lambda t: 2 if 100 < t < 250 else 10, id="lowered and raised"),
        pytest.param(lambda t: (3, 10, 1, 6, 2, 10)[int(t // 60) % 6], id="another each minute"),
    ],
)
def test_a_limit_that_changes_is_followed(hidden):
    took, best, refusals, _ = crowd(hidden, 1000)
    assert best / took > 0.8
    assert len(refusals) < 200


def test_a_raised_limit_is_found_out_within_a_minute():
    limit = AdaptiveLimit()
    crowd(
        lambda t: 1 if t < 120 else 10, 20 + 40, limit=limit
    )  # about 20 until then, and 40 in the minute after
    assert limit.limit >= 10


def test_a_limit_says_what_lowered_it_and_when_one_more_is_tried():
    limit = AdaptiveLimit()
    assert limit.last_refusal(1000.0) is None
    limit.in_flight = 3
    limit.refused(3, 5.0)
    assert limit.last_refusal(1000.0) == {"lowered_to": 2, "refused_at": 1005.0, "probe_at": 1007.0}


def make_queue(*keys, max_in_flight=0, **how):
    clock = FakeClock()
    return Queue(KeyPool(keys or (FIRST_KEY,), clock), max_in_flight, clock, **how)


@asynccontextmanager
async def slot_in(queue, account="", conversation=""):
    slot = await queue.acquire(queue.ticket(CHAT, Caller(account, conversation)))
    try:
        yield slot
    finally:
        queue.release(slot)


async def wait_in(queue, account=""):
    async with slot_in(queue, account):
        pass


@in_loop
async def test_accounts_are_served_in_turn_and_each_ones_requests_in_order():
    queue, order = make_queue(max_in_flight=1), []

    async def request(name):
        async with slot_in(queue, name[0]):
            order.append(name)
        if name == "a2":
            await request("d1")

    async with slot_in(queue, "a"):
        waiting = [
            asyncio.create_task(request(name))
            for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1")
        ]
        await asyncio.sleep(0)
        assert len(queue.waiting) == 7
    await asyncio.gather(*waiting)
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3", "d1", "a4"]
    assert (queue.in_flight, queue.waiting) == (0, [])


@in_loop
async def test_a_request_that_was_refused_goes_back_to_the_head_of_the_queue():
    queue, order = make_queue(max_in_flight=1), []

    async def again(name, ticket):
        slot = await queue.acquire(ticket)
        order.append(name)
        queue.release(slot)

    first, second = queue.ticket(CHAT, Caller("a")), queue.ticket(CHAT, Caller("b"))
    slot = await queue.acquire(first)
    waiting = [asyncio.create_task(again(*who)) for who in (("second", second), ("refused", first))]
    await asyncio.sleep(0)
    queue.release(slot)
    await asyncio.gather(*waiting)
    assert order == ["refused", "second"]


@in_loop
async def test_whoever_leaves_the_queue_frees_the_slot():
    queue = make_queue(max_in_flight=1)
    async with slot_in(queue):
        early, late = (asyncio.create_task(wait_in(queue)) for _ in range(2))
        await asyncio.sleep(0)
        early.cancel()
        await asyncio.wait({early})
        assert len(queue.waiting) == 1
    late.cancel()  # just when its turn has come
    await asyncio.wait({late})
    assert (queue.in_flight, queue.waiting) == (0, [])


@in_loop
async def test_every_key_has_a_limit_of_its_own():
    queue = make_queue(FIRST_KEY, SECOND_KEY)
    for limit in queue.limits.values():
        limit.limit = 1
    async with slot_in(queue) as one, slot_in(queue) as two:
        assert {one.key, two.key} == {FIRST_KEY, SECOND_KEY}
        third = asyncio.create_task(wait_in(queue))
        await asyncio.sleep(0)
        assert not third.done()
    await third


@in_loop
async def test_a_conversation_stays_with_its_key_unless_that_is_full_or_has_failed():
    queue = make_queue(FIRST_KEY, SECOND_KEY)

    async def key_of(conversation):
        async with slot_in(queue, conversation=conversation) as slot:
            return slot.key

    homes = {name: await key_of(name) for name in map(str, range(40))}
    assert {name: await key_of(name) for name in reversed(homes)} == homes
    assert (
        "".join(key.secret for key in homes.values()) == "2222112221111111111111211221111211221112"
    )  # for ever
    ticket = queue.ticket(CHAT, Caller(conversation="0"))
    ticket.failures[SECOND_KEY] = ztoapi.UNAVAILABLE
    assert (await queue.acquire(ticket)).key == FIRST_KEY
    queue.limits[SECOND_KEY].in_flight = 4
    assert await key_of("0") == FIRST_KEY


@in_loop
async def test_a_long_answer_does_not_stop_those_who_wait_for_long():
    queue = make_queue(poll_interval=0.01)
    async with slot_in(queue) as long:
        long.limit.refused(2, queue.clock.now())  # one more was too many, just once
        waiting = asyncio.create_task(wait_in(queue))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        queue.clock.time += AdaptiveLimit.MIN_PAUSE
        await asyncio.wait_for(waiting, 10)


@in_loop
async def test_those_who_wait_are_told_when_all_keys_cool_down():
    queue = make_queue(max_in_flight=1)
    async with slot_in(queue):
        waiting = asyncio.create_task(wait_in(queue))
        await asyncio.sleep(0)
        queue.keys.cool_down(FIRST_KEY, CHAT, refusal(1113))
        queue.poll()
        with pytest.raises(UpstreamError, match="1113"):
            await waiting


LOOKING = Message(
    "assistant",
    ("Let me look.",),
    "I should look.",
    (ToolCall(0, "c1", "read", '{"path": "a", "n": 1}'),),
)


def with_call(**changes):
    return replace(LOOKING, calls=(replace(LOOKING.calls[0], **changes),))


@pytest.mark.parametrize(
    ("message", "known"),
    [
        pytest.param(replace(LOOKING, thought=""), True, id="the same"),
        pytest.param(
            replace(LOOKING, content=("\nLet me look.\n",)), True, id="white space around the text"
        ),
        pytest.param(
            with_call(arguments='{"n":1,"path":"a"}'),
            True,
            id="the same arguments written otherwise",
        ),
        pytest.param(with_call(arguments='{"n":2,"path":"a"}'), False, id="other arguments"),
        pytest.param(with_call(arguments="{"), False, id="no JSON"),
        pytest.param(with_call(id="c2"), False, id="another id"),
        pytest.param(with_call(name="write"), False, id="another tool"),
        pytest.param(replace(LOOKING, calls=()), False, id="no call"),
        pytest.param(replace(LOOKING, content=("Let me see.",)), False, id="another text"),
    ],
)
def test_reasoning_is_known_by_the_account_and_by_what_was_said_with_it(message, known):
    memory = ztoapi.ReasoningMemory(1000)
    memory.remember("me", LOOKING)
    assert (memory.recall("me", message), memory.recall("you", message)) == (
        "I should look." if known else "",
        "",
    )


def test_a_memory_of_texts_is_bounded_and_forgets_the_oldest_first():
    memory = ztoapi.TextMemory(3 * (ztoapi.TextMemory.OVERHEAD + 4))
    for key in ("a", "b", "c", "a"):
        memory.put(key, "好!")
    assert (memory.get("a"), memory.get("none")) == ("好!", "")
    memory.put("d", "\ud800")
    assert [key for key in "abcd" if memory.get(key)] == ["a", "c", "d"]
    assert memory.size == 3 * memory.OVERHEAD + 4 + 4 + 3


def test_a_description_that_is_used_is_kept_longest():
    memory = ztoapi.ImageMemory(2 * (ztoapi.TextMemory.OVERHEAD + 1))
    sky, sea = (
        ztoapi.ImagePlan(key, "glm-4.6v", is_current=False, plan=None) for key in ("sky", "sea")
    )
    memory.texts.put("sky", "1")
    memory.texts.put("sea", "2")
    assert memory.words_for([sky]) == ({"sky": "1"}, {})
    memory.texts.put("sun", "3")
    assert memory.words_for([sky, sea]) == ({"sky": "1"}, {})


# ======== Database =


class PostgreSQL:
    """A server of the tests' own, as Debian installs it, on a socket in a folder of its own; it starts while they go on."""

    def __init__(self):
        self.bin = max(
            Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name)
        )
        self.folder = tempfile.mkdtemp(prefix="ztoapi-")
        self.user = "postgres" if os.getuid() == 0 else None  # it refuses to be run by root
        if self.user:
            shutil.chown(self.folder, self.user)
        self.starting = self.begin(
            "initdb", "-D", f"{self.folder}/data", "-A", "trust", "-U", "postgres", "--no-sync"
        )

    def begin(self, tool, *arguments):
        how = {
            "user": self.user,
            "cwd": self.folder,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
        }
        return subprocess.Popen([self.bin / tool, *arguments], **how)

    def call(self, tool, *arguments):
        assert self.begin(tool, *arguments).wait(60) == 0

    @cached_property
    def url(self):
        """Of the first of its databases; this waits until the server is there."""
        assert self.starting.wait(60) == 0
        self.start()
        return f"postgresql://postgres@/postgres?host={self.folder}"

    def new_database(self):
        url, name = self.url, f"z{secrets.token_hex(4)}"
        with contextlib.closing(
            import_module("psycopg").connect(url, autocommit=True)
        ) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return url.replace("/postgres?", f"/{name}?")

    def start(self):
        options = f"-k {self.folder} -c listen_addresses= -c fsync=off"
        self.call(
            "pg_ctl",
            "-D",
            f"{self.folder}/data",
            "-l",
            f"{self.folder}/log",
            "-o",
            options,
            "-w",
            "start",
        )

    def stop(self):
        self.call("pg_ctl", "-D", f"{self.folder}/data", "-m", "immediate", "-w", "stop")


@pytest.fixture(scope="module")
def postgresql():
    if not [*Path("/usr/lib/postgresql").glob("*/bin/initdb")]:  # its client alone may be
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    pytest.importorskip("psycopg")
    server = PostgreSQL()
    yield server
    server.starting.wait(60)
    if "url" in vars(server):
        server.stop()
    shutil.rmtree(server.folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    """An empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/z.db"
    return request.getfixturevalue("postgresql").new_database()


UNHURRIED = {"database_wait": 2.0 * LONGEST_TEST, "busy_timeout": 2.0 * LONGEST_TEST}


@pytest.fixture
def connect():
    """Databases that are closed in the end. Nothing is too slow for them, unless a test says so."""
    opened = []

    def connected(url, **limits):
        opened.append(ztoapi.Database(url, lambda: NOON, Limits(**{**UNHURRIED, **limits})))
        return opened[-1]

    yield connected
    for database in opened:
        database.thread.submit(database.close).result(10)


ANNA = Account(
    "a", "anna", expires="2027-01-31", tokens="5M/week", models="glm-*", rpm=3, parallel=2
)


def test_keys_are_kept_changed_and_removed(database_url, connect):
    here, there = connect(database_url), connect(database_url)
    here.transact(here.put_account, ANNA)
    here.transact(here.put_account, Account("b", "bob"))
    here.transact(here.put_account, replace(ANNA, rpm=None))
    assert there.transact(there.list_accounts) == [replace(ANNA, rpm=None), Account("b", "bob")]
    assert (
        there.transact(there.remove_account, "anna"),
        there.transact(there.remove_account, "anna"),
    ) == (True, False)
    assert here.transact(here.list_accounts) == [Account("b", "bob")]
    here.transact(here.put_account, Account("c", "anna"))
    with pytest.raises(ztoapi.DatabaseError):  # two machines gave one name at the same moment
        here.transact(here.put_account, Account("d", "anna"))
    assert [account.id for account in here.transact(here.list_accounts)] == ["c", "b"]


def count_some(accounts, account="a", model="glm-4.6", day=TODAY):
    accounts.count((account, day.isoformat(), model), (1, 1, 10, 4, 2, 100))


@in_loop
async def test_what_several_processes_count_adds_up(database_url, connect):
    here, there = connect(database_url), connect(database_url)
    ours, theirs = Accounts(()), Accounts(())
    here.transact(here.put_account, ANNA)
    for database, accounts in ((here, ours), (there, theirs), (here, ours)):
        count_some(accounts)
        count_some(accounts, "gone", day=date(2026, 11, 20))
        await database.sync(accounts)
    await there.sync(theirs)
    assert theirs.used_in(ANNA.token_budget, "a", TODAY) == Used(36, 300)
    assert theirs.totals(ANNA) == Totals(3, 36, 300, "2026-11-21T12:00:00")
    assert there.transact(there.list_usage, date(2026, 11, 20)) == [
        ("gone", "operator", "2026-11-20", "glm-4.6", 3, 3, 30, 12, 6),
        ("a", "anna", "2026-11-21", "glm-4.6", 3, 3, 30, 12, 6),
    ]
    assert len(there.transact(there.list_usage, TODAY)) == 1


@in_loop
async def test_a_batch_that_was_written_though_nobody_said_so_is_counted_once(
    database_url, connect
):
    database, accounts = connect(database_url), Accounts(())
    count_some(accounts)
    await database.run(
        database.write_and_read, accounts.take(), {}, None
    )  # and the connection breaks
    count_some(accounts, "b")
    for _ in range(2):
        await database.sync(accounts)
    assert [row[4] for row in database.transact(database.list_usage, TODAY)] == [1, 1]


def other_program(path, script):
    """Another process that has the SQLite file open: it runs the script, says so, and waits for its stdin."""
    code = f"import sqlite3; c = sqlite3.connect({str(path)!r}, isolation_level=None); {script}; print(1, flush=True); input()"
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert program.stdout.readline() == b"1\n"
    return program


@in_loop
async def test_reads_do_not_wait_for_another_process_that_writes(tmp_path, connect):
    database = connect(f"sqlite:///{tmp_path}/a.db")
    await database.run(database.put_account, ANNA)
    with other_program(tmp_path / "a.db", "c.execute('BEGIN IMMEDIATE')") as writer:
        assert await database.run(database.list_accounts, begin=ztoapi.READ) == [ANNA]
        writer.communicate(b"\n")


@in_loop
async def test_while_sqlite_is_locked_what_wants_to_write_fails_soon_and_then_at_once(
    tmp_path, connect
):
    database, accounts = connect(f"sqlite:///{tmp_path}/a.db", busy_timeout=0.1), Accounts(())
    await database.run(database.put_account, ANNA)
    with other_program(tmp_path / "a.db", "c.execute('BEGIN IMMEDIATE')") as writer:
        with pytest.raises(ztoapi.DatabaseError, match="locked"):
            await database.run(database.remove_account, "anna")
        for _ in range(6):
            with pytest.raises(ztoapi.DatabaseError, match="does not answer"):
                await database.run(database.list_accounts)
        writer.communicate(b"\n")
    await database.sync(accounts)
    assert await database.run(database.list_accounts) == [ANNA]


@in_loop
async def test_a_database_that_stands_still_is_not_waited_for_twice(postgresql, connect):
    database, accounts = connect(postgresql.new_database()), Accounts(())
    process = await database.run(partial(backend_of, database))
    count_some(accounts)
    database.limits = Limits(database_wait=0.2)
    os.kill(process, signal.SIGSTOP)
    try:
        await database.sync(accounts)
        database.limits = Limits(database_wait=2 * LONGEST_TEST)
        with pytest.raises(ztoapi.DatabaseError, match="does not answer"):
            await database.run(database.list_accounts)
        await database.sync(accounts)
    finally:
        os.kill(process, signal.SIGCONT)
    await asyncio.wait([database.hanging])
    database.limits = Limits(database_wait=10)
    await database.sync(accounts)
    assert [row[4] for row in await database.run(database.list_usage, TODAY)] == [1]


@in_loop
async def test_the_server_ends_though_its_database_stands_still(postgresql, connect):
    database = connect(postgresql.new_database(), database_interval=60)
    accounts = Accounts(())
    async with database.running(accounts):
        process = await database.run(partial(backend_of, database))
        database.limits = Limits(database_wait=0.2)
        os.kill(process, signal.SIGSTOP)
        count_some(accounts)
    os.kill(process, signal.SIGCONT)


def backend_of(database):
    """The process of PostgreSQL's that serves a database's connection."""
    return database.execute("SELECT pg_backend_pid()").fetchone()[0]


@in_loop
async def test_chat_goes_on_while_the_database_stands_still(start, postgresql):
    client = await start(limits=Limits(**UNHURRIED), database_url=postgresql.new_database())
    database = client.app[ztoapi.DATABASE]
    process = await database.run(partial(backend_of, database))
    database.limits = Limits(database_wait=0.2)
    os.kill(process, signal.SIGSTOP)
    try:
        async with client.get("/v1/responses/resp_1", headers=KEY) as response:
            assert response.status == 503
            assert error_of(await response.text())["code"] == "database_unavailable"
        assert (await ask(client))[0].status == 200
        assert (await ask(client, ASKED, "/v1/responses"))[0].status == 200
        async with client.get("/dashboard/stats", headers=KEY) as response:
            assert (response.status, (await response.json())["database"]) == (200, False)
    finally:
        os.kill(process, signal.SIGCONT)


@in_loop
@pytest.mark.parametrize("how", ["deleted", "replaced"])
async def test_a_file_that_is_gone_is_opened_anew(tmp_path, connect, how, caplog):
    path = tmp_path / "a.db"
    database, other = connect(f"sqlite:///{path}"), connect(f"sqlite:///{tmp_path}/b.db")
    await database.run(database.put_account, ANNA)
    await other.run(other.put_account, ztoapi.replace(ANNA, name="bob"))
    other.thread.submit(other.close).result(10)
    if how == "deleted":
        path.unlink()
    else:
        (tmp_path / "b.db").replace(path)
    ztoapi.LOG.addHandler(caplog.handler)
    found = await database.run(database.list_accounts)
    ztoapi.LOG.removeHandler(caplog.handler)
    assert [account.name for account in found] == ([] if how == "deleted" else ["bob"])
    assert "opened anew" in caplog.text
    assert path.stat().st_mode & 0o777 == 0o600


def test_processes_that_make_a_database_at_the_same_time_wait_for_each_other(tmp_path):
    for number in range(20):
        url = f"sqlite:///{tmp_path}/{number}.db"
        limits = Limits(**UNHURRIED)
        databases = [ztoapi.Database(url, lambda: NOON, limits) for _ in range(4)]
        with ThreadPoolExecutor(4) as threads:
            jobs = [threads.submit(each.transact, each.list_accounts) for each in databases]
        assert [job.result() for job in jobs] == [[]] * 4
        for each in databases:
            each.close()


@in_loop
async def test_of_two_who_add_a_key_one_adds_it_and_the_other_changes_it(database_url, connect):
    here, there = connect(database_url), connect(database_url)
    await asyncio.gather(*(each.run(each.list_accounts) for each in (here, there)))

    def adding(database, key, rpm):
        wanted = ztoapi.KeyChange("new", {"rpm": rpm}, adds="also")
        return database.run(database.change_account, wanted, ztoapi.new_account("new", key))

    made = await asyncio.gather(adding(here, "sk-1", 1), adding(there, "sk-2", 2))
    assert len({account.id for account in made}) == 1
    assert await here.run(here.list_accounts) in ([made[0]], [made[1]])


def stored_row(response_id, parent="", account="a", day=TODAY, body='{"x": "\\ud800"}'):
    return ztoapi.ResponseRow(response_id, account, day.isoformat(), 1, parent, len(body), body)


async def ids_found(database, previous="", *others, account="a", room=10**6):
    """The ids of the responses that are found, in order."""
    asked = ztoapi.Referred(previous, others)
    return sorted({row.id for row in await database.find_responses(account, asked, room)})


async def store_rows(database, *rows):
    for row in rows:
        await database.put_response(row)
    assert database.unsaved.rows == {}


@in_loop
async def test_a_stored_response_is_there_at_once_for_its_key_in_every_process(
    database_url, connect
):
    here, there = connect(database_url), connect(database_url)
    await store_rows(here, stored_row("1"), stored_row("2", "1"), stored_row("b", account="b"))
    for database in (here, there):
        assert await ids_found(database, "2", "1") == ["1", "2"]
        assert await ids_found(database, "2", "b", account="b") == ["b"]
        assert await ids_found(database, "b", "2") == ["2"]
    assert await there.find_responses("a", ztoapi.Referred("1"), 99) == [stored_row("1")]


@in_loop
async def test_a_line_may_begin_in_memory_and_go_on_in_the_database(database_url, connect):
    database = connect(database_url)
    await store_rows(database, stored_row("1"), stored_row("2", "1"))
    database.unsaved.put(stored_row("3", "2"))
    database.unsaved.put(stored_row("4", "3"))
    assert await ids_found(database, "4", "3", "1") == ["1", "2", "3", "4"]
    assert await ids_found(database, "4", account="b") == []


@in_loop
async def test_of_a_long_line_only_so_much_is_read(database_url, connect):
    database = connect(database_url)
    await store_rows(database, *(stored_row(str(i), str(i - 1)) for i in range(1_200)))
    size = stored_row("1").size
    assert await ids_found(database, "1199", room=1_100 * size) == sorted(
        str(i) for i in range(100, 1_200)
    )
    assert await ids_found(database, "", "7", "8", "9", room=2 * size) == ["7", "8"]


class CountingDatabase(ztoapi.Database):
    """Counts how often it is asked."""

    asked = 0

    async def run(self, *arguments, **how):
        self.asked += 1
        return await super().run(*arguments, **how)


@in_loop
async def test_a_thousand_references_are_one_read(start, database_url, connect):
    ids = [f"{i:04}" for i in range(1_000)]
    database = CountingDatabase(database_url, lambda: NOON, Limits(**UNHURRIED))
    history = ztoapi.ClientHistory(database, "a")
    for i in ids:
        item = {"id": f"msg_{i}_0", "type": "message", **user_item("x")}
        stored = ztoapi.StoredResponse({"id": f"resp_{i}", "output": [item]}, [])
        database.unsaved.put(history.row(stored))
    await database.sync(Accounts(()))
    body = ASKED | {"input": [{"type": "item_reference", "id": f"msg_{i}_0"} for i in ids]}
    await history.load(ztoapi.responses_named_in(body))
    assert len(ztoapi.parse_response(body, history)[0].messages) == 1_000
    assert database.asked == 1
    database.thread.submit(database.close).result(10)


@in_loop
async def test_responses_that_come_while_one_is_written_are_written_together(database_url):
    database = CountingDatabase(database_url, lambda: NOON, Limits(**UNHURRIED))
    await asyncio.gather(*(database.put_response(stored_row(str(i))) for i in range(20)))
    database.thread.submit(database.close).result(10)
    assert (database.asked, database.unsaved.rows) == (2, {})


def test_a_response_is_stored_with_its_day_and_its_millisecond():
    history = ztoapi.ClientHistory(ztoapi.Database("memory", lambda: NOON + 0.25), "a")
    row = history.row(ztoapi.StoredResponse({"id": "resp_1"}, [], "resp_0"))
    body = '{"response":{"id":"resp_1"},"input":[]}'
    told = ("resp_1", "a", TODAY.isoformat(), int(NOON * 1000) + 250, "resp_0", len(body), body)
    assert row == told


@in_loop
async def test_a_response_is_given_out_for_thirty_days_and_is_a_parent_for_longer(
    database_url, connect
):
    database = connect(database_url)
    old, young = TODAY - timedelta(31), TODAY - timedelta(30)
    await store_rows(database, stored_row("x"))  # what is old was looked for today
    rows = [stored_row("1", day=old), stored_row("2", "1", day=young), stored_row("3", day=old)]
    for row in rows:
        database.unsaved.put(row)
    for _ in range(2):  # in memory, in the database
        assert await ids_found(database, "1", "1", "3") == []
        assert await ids_found(database, "2", "2") == ["1", "2"]
        await database.sync(Accounts(()))
    assert await ids_in(database) == ["1", "2", "3", "x"]
    database.unsaved.put(stored_row("z", "1"))
    assert await ids_found(database, "z") == ["1", "z"]
    database.unsaved.drop("z")
    database.cleaned_on = None
    await database.put_response(stored_row("y"))
    assert await ids_in(database) == ["1", "2", "x", "y"]
    await database.run(database.clean, TODAY + timedelta(1))
    assert await ids_in(database) == ["x", "y"]


async def ids_in(database):
    rows = "SELECT id FROM ztoapi_responses ORDER BY id"
    return [row[0] for row in await database.run(lambda: database.execute(rows).fetchall())]


@in_loop
async def test_what_goes_on_from_a_deleted_response_goes_on(database_url, connect):
    database = connect(database_url)
    await store_rows(database, stored_row("1"), stored_row("2", "1"), stored_row("3", "2"))
    assert await database.delete_response("2", "b") is False
    assert [await database.delete_response(name, "a") for name in "122"] == [True, True, False]
    assert await ids_found(database, "2", "1") == []
    assert await ids_found(database, "3") == ["1", "2", "3"]
    assert await database.delete_response("3", "a") is True
    assert await ids_in(database) == []


@in_loop
async def test_a_response_may_be_deleted_while_it_is_written(database_url, connect):
    database = connect(database_url)
    for row in (stored_row("1"), stored_row("2", "1")):
        database.unsaved.put(row)
    writing = asyncio.create_task(database.sync(Accounts(())))
    while not database.lock.locked():
        await asyncio.sleep(0)
    assert [await database.delete_response("1", who) for who in "bab"] == [False, True, False]
    await writing
    assert await ids_found(database, "", "1") == []
    await database.sync(Accounts(()))
    assert await ids_found(database, "1", "1") == []
    assert await ids_found(database, "2") == ["1", "2"]
    database.unsaved.put(stored_row("3"))
    assert await database.delete_response("3", "a") is True
    await database.sync(Accounts(()))
    assert await ids_in(database) == ["1", "2"]


@in_loop
async def test_of_what_a_key_stores_the_oldest_goes_first(database_url, connect):
    database = connect(database_url, stored_size=250)
    yesterday = TODAY - timedelta(1)
    rows = [stored_row(i, body=100 * "x")._replace(stored_at=int(i)) for i in "1234"]
    rows.append(stored_row("5", body=100 * "x", day=yesterday)._replace(stored_at=9))
    rows.append(stored_row("6", body=240 * "x", account="b"))
    for row in rows:
        database.unsaved.put(row)
    await database.sync(Accounts(()))
    assert await ids_in(database) == ["3", "4", "6"]


def test_responses_that_wait_in_memory_are_bounded():
    unsaved = ztoapi.UnsavedResponses(Limits(unsaved_rows=3, unsaved_size=100))
    for name in "1234":
        unsaved.put(stored_row(name, body="x" * 20))
    assert (list(unsaved.rows), unsaved.size) == (["2", "3", "4"], 60)
    unsaved.put(stored_row("5", body="x" * 80))
    assert (list(unsaved.rows), unsaved.size) == (["4", "5"], 100)


@in_loop
async def test_a_response_that_cannot_be_written_waits_in_memory(postgresql, connect):
    database = connect(postgresql.new_database())
    await store_rows(database, stored_row("1"))
    postgresql.stop()
    await database.put_response(stored_row("2", "1"))
    assert await ids_found(database, "", "2") == ["2"]
    postgresql.start()
    for _ in range(2):
        await database.sync(Accounts(()))
    assert await ids_found(database, "2") == ["1", "2"]
    assert database.unsaved.rows == {}


def test_what_is_kept_in_memory_outlives_a_failure(connect):
    database = connect("memory")
    database.transact(database.put_account, ANNA)
    with pytest.raises(ztoapi.DatabaseError):
        database.transact(database.execute, "SELECT ?", "\ud800")
    assert database.transact(database.list_accounts) == [ANNA]


@in_loop
async def test_a_row_that_cannot_be_read_is_a_complaint_and_nothing_is_lost(
    database_url, connect, caplog
):
    database, accounts = connect(database_url), Accounts(())
    columns, row = "(id, name, limits, removed)", """('b', 'bob', '{"shoes": 2}', 0)"""
    await database.run(database.execute, f"INSERT INTO ztoapi_keys {columns} VALUES {row}")
    count_some(accounts)
    await database.sync(accounts)
    assert "the database cannot be used: " in caplog.text
    await database.run(database.remove_account, "bob")
    await database.sync(accounts)
    assert [row[4] for row in await database.run(database.list_usage, TODAY)] == [1]


@in_loop
async def test_a_lost_database_is_said_once_a_minute_and_nothing_is_lost(
    postgresql, connect, caplog, monkeypatch
):
    database, accounts = connect(postgresql.new_database()), Accounts(())
    monkeypatch.setattr(
        caplog.handler, "filters", [ztoapi.RepeatFilter()]
    )  # the handler is one for all tests
    await database.sync(accounts)
    postgresql.stop()
    for _ in range(4):
        count_some(accounts)
        await database.sync(accounts)
    assert len(caplog.records) <= 2  # the connection is lost, and no other can be made
    assert "the database cannot be used: " in caplog.text
    postgresql.start()
    for _ in range(2):
        await database.sync(accounts)
    assert [row[4] for row in await database.run(database.list_usage, TODAY)] == [4]


def test_tables_of_an_older_version_are_brought_up_to_date(database_url, connect, monkeypatch):
    old = connect(database_url)
    old.transact(old.put_account, ANNA)
    monkeypatch.setattr(
        ztoapi,
        "MIGRATIONS",
        (*ztoapi.MIGRATIONS, "CREATE TABLE a (x TEXT); CREATE TABLE b (x TEXT)"),
    )
    new, newer = connect(database_url), connect(database_url)
    assert (new.transact(new.list_accounts), newer.transact(newer.list_accounts)) == (
        [ANNA],
        [ANNA],
    )
    assert new.transact(lambda: new.execute("SELECT a.x FROM a, b").fetchall()) == []
    monkeypatch.undo()
    with pytest.raises(ztoapi.DatabaseError, match="version 4, so a newer ztoapi made it"):
        connect(database_url).transact(lambda: None)


@in_loop
async def test_what_the_first_version_stored_can_be_used(database_url, connect):
    old = connect(database_url)
    body = (
        '{"response": {"id": "resp_1", "output": []}, "input": [{"role": "user", "content": "hi"}]}'
    )
    columns = "(id, account, day, body)"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ztoapi, "MIGRATIONS", ztoapi.MIGRATIONS[:1])
        for row in (("resp_1", body), ("resp_2", "")):  # which was deleted
            put = f"INSERT INTO ztoapi_responses {columns} VALUES (?, 'a', ?, ?)"
            old.transact(old.execute, put, row[0], TODAY.isoformat(), row[1])
    history = ztoapi.ClientHistory(connect(database_url), "a")
    await history.load(ztoapi.Referred("resp_1", ("resp_2",)))
    assert history.loaded == {
        "resp_1": ztoapi.StoredResponse({"id": "resp_1", "output": []}, [user_item("hi")])
    }
    assert history.size == len(body)


def test_what_keys_of_an_older_version_used_stays_theirs(database_url, connect):
    old, anna = connect(database_url), hash_key("sk-anna")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ztoapi, "MIGRATIONS", ztoapi.MIGRATIONS[:2])
        put_key = "INSERT INTO ztoapi_keys VALUES (?, ?, ?, 0)"
        old.transact(old.execute, put_key, anna, "anna", '{"tokens": "5M/day", "rpm": 3}')
        for model in ("glm-4.6", "glm-4.7-flash", "unknown"):
            put = "INSERT INTO ztoapi_usage VALUES (?, ?, ?, 2, 0, 1000, 500, 100)"
            old.transact(old.execute, put, anna, TODAY.isoformat(), model)
    new, accounts = connect(database_url), Accounts(())
    accounts.written(new.transact(new.read_known, ztoapi.Budget(1)))
    account = accounts.find("sk-anna")
    assert account == Account(anna, "anna", tokens="5M/day", rpm=3, hash=anna)
    spent = 500 * 600 + 500 * 110 + 100 * 2200  # billionths of a dollar
    assert accounts.totals(account) == Totals(6, 3300, spent, "2026-11-21")
    assert accounts.used_in(account.token_budget, anna, TODAY) == Used(3300, spent)
    assert accounts.used_in(ztoapi.Budget(1), EVERYBODY, TODAY) == Used(3300, spent)


def test_a_key_that_is_changed_for_a_new_one_keeps_what_it_used(database_url, connect):
    database, accounts = connect(database_url), Accounts(())

    def change(wanted, new):
        account = database.transact(database.change_account, wanted, new)
        accounts.written(database.transact(database.read_known, None))
        return account

    first, second = (ztoapi.new_account("anna", key) for key in ("sk-1", "sk-2"))
    assert change(ztoapi.KeyChange("anna", {"tokens": "9"}, adds="only"), first).id == first.id
    count_some(accounts, first.id)
    database.transact(database.write_and_read, accounts.take(), {}, None)
    rotated = change(ztoapi.KeyChange("anna", rotates=True), second)
    assert rotated == replace(first, tokens="9", hash=second.hash)
    assert (accounts.find("sk-1"), accounts.find("sk-2")) == (None, rotated)
    assert accounts.used_in(rotated.token_budget, rotated.id, TODAY) == Used(12, 100)
    renamed = change(ztoapi.KeyChange("anna", rename="bob"), second)
    assert (renamed.id, accounts.totals(renamed).requests) == (first.id, 1)
    change(ztoapi.KeyChange("eve", adds="also"), ztoapi.new_account("eve", "sk-3"))
    with pytest.raises(BadRequest, match="There is already a key named bob"):
        change(ztoapi.KeyChange("eve", rename="bob"), second)
    assert [account.name for account in accounts.known.named] == ["bob", "eve"]


def test_a_database_has_an_id_for_all_who_use_it(database_url, connect):
    here, there = connect(database_url), connect(database_url)
    known = here.transact(here.identify)
    assert re.fullmatch("[0-9a-f]{32}", known)
    assert there.transact(there.identify) == known


def test_a_copy_of_the_file_of_sqlite_alone_lacks_little(tmp_path, connect):
    database = connect(f"sqlite:///{tmp_path}/z.db", checkpoint_interval=0)
    copy = connect(f"sqlite:///{tmp_path}/c.db")
    database.transact(database.put_account, ANNA)
    database.transact(database.list_accounts, begin=ztoapi.READ)  # as a running server often does
    shutil.copy(tmp_path / "z.db", tmp_path / "c.db")
    assert copy.transact(copy.list_accounts) == [ANNA]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_root_makes_the_file_of_sqlite_for_the_owner_of_its_folder(tmp_path, connect):
    os.chown(tmp_path, 1234, 1234)
    database = connect(f"sqlite:///{tmp_path}/z.db")
    database.transact(database.put_account, ANNA)
    assert {path.stat().st_uid for path in tmp_path.iterdir()} == {1234}


def test_many_servers_may_make_the_tables_at_the_same_time(database_url, connect):
    databases = [connect(database_url) for _ in range(6)]
    making = [
        database.thread.submit(partial(database.transact, database.list_accounts))
        for database in databases
    ]
    assert [made.result(20) for made in making] == [[]] * 6


def test_a_file_of_sqlite_is_for_its_owner_only(tmp_path, connect):
    database = connect(f"sqlite:///{tmp_path}/z.db")
    database.transact(database.put_account, ANNA)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
        ("z.db", "z.db-wal", "z.db-shm"), 0o600
    )


# ======== Plans ========


def random_value(chance, depth=0):
    """Any JSON value, odd ones more often than not."""
    simple = [
        None,
        True,
        False,
        0,
        -1,
        3,
        7.5,
        1e308,
        2**70,
        "",
        "a",
        "\ud800",
        "x" * 300,
        "glm-4.6v",
        "auto",
        "none",
        "custom",
        "function",
        "allowed_tools",
        "files.read",
        4096.0,
    ]
    if depth > 2 or chance.random() < 0.6:
        return chance.choice(simple)
    if chance.random() < 0.5:
        return [random_value(chance, depth + 1) for _ in range(chance.randrange(3))]
    names = [
        "type",
        "role",
        "content",
        "text",
        "name",
        "id",
        "function",
        "arguments",
        "input",
        "url",
        "image_url",
        "custom",
        "input_schema",
        "parameters",
        "format",
        "tools",
        "mode",
        "effort",
        "enabled",
        "defer_loading",
    ]
    return {
        chance.choice(names): random_value(chance, depth + 1) for _ in range(chance.randrange(4))
    }


def random_body(chance, sound, known):
    """A sound body in which some known fields are odd."""
    odd = {chance.choice(sorted(known)): random_value(chance) for _ in range(chance.randrange(4))}
    return sound | odd


FULL_CHAT = chat(tools=[function("f")], temperature=0.5, max_tokens=9, stop=["x"], stream=True)
FULL_RESPONSE = {"model": "glm-4.6", "input": [{"role": "user", "content": "x"}], "tools": []}
FULL_MESSAGE = CLAUDE | {
    "model": "glm-4.6",
    "tools": [GREP, ANTHROPIC_SEARCH],
    "system": "x",
    **ASKS_TO_THINK,
}


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(
    ("surface", "sound", "known"),
    [
        ("chat/completions", FULL_CHAT, ztoapi.CHAT_FIELDS),
        ("completions", {"model": "glm-4.6", "prompt": "x"}, ztoapi.COMPLETION_FIELDS),
        ("responses", FULL_RESPONSE, ztoapi.RESPONSE_FIELDS),
        ("messages", FULL_MESSAGE, ztoapi.MESSAGE_FIELDS),
    ],
)
def test_a_body_is_refused_when_it_is_read_or_planned_or_never(seed, surface, sound, known):
    chance = random.Random(f"{seed} {surface}")
    refused = 0
    for _ in range(50):
        body = json.loads(json.dumps(random_body(chance, sound, known)))
        try:
            prompt, _ = ztoapi.SURFACES[surface].parse(body, History())
            plan = ztoapi.make_plan(prompt, Settings(), Account(""), "7")
        except BadRequest:
            refused += 1
            continue
        for model, planned in plan.for_choice(plan.n - 1).prompts:
            request = ztoapi.zai_request(planned, model, "https://api.z.ai/api/paas/v4", "7")
            assert json.loads(request.data)["stream"] is True
    assert refused < 50


def plan_for(messages, tools=(), model="glm-5.3", account=None, fallbacks=None, **settings):
    prompt = Prompt(model, tuple(messages), tools=tuple(tools), fallbacks=fallbacks)
    settings = Settings(**{"vision_model": "glm-4.6v", **settings})
    return ztoapi.make_plan(prompt, settings, account or Account("anna"), "7")


A_TOOL = ztoapi.Tool("f", "", {})
SHOWS = (Message("user", ("look", SEA)),)
SHOWED = (*SHOWS, Message("assistant", ("a sea",)), GO_ON)
TOOL_SHOWS = (GO_ON, calling(call("a")), Message("tool", (SEA,), call_id="a"))
VIDEO = Message("user", (Media("video_url", "https://x/v.mp4"), SEA))


@pytest.mark.parametrize(
    ("mode", "tools", "messages", "model", "described"),
    [
        ("auto", [A_TOOL], SHOWS, "glm-5.3", [True]),
        ("auto", [A_TOOL], SHOWED, "glm-5.3", [False]),
        ("auto", [A_TOOL], TOOL_SHOWS, "glm-5.3", [True]),
        ("auto", [], SHOWS, "glm-4.6v", []),
        ("auto", [], SHOWED, "glm-5.3", []),
        ("answer", [A_TOOL], SHOWS, "glm-4.6v", []),
        ("describe", [], SHOWS, "glm-5.3", [True]),
        ("describe", [], SHOWED, "glm-5.3", [False]),
        ("describe", [], (VIDEO,), "glm-4.6v", []),
        ("describe", [], (VIDEO, Message("assistant", ("x",)), GO_ON), "glm-5.3", [False]),
        ("describe", [], (GO_ON,), "glm-5.3", []),
    ],
)
def test_the_mode_says_whether_images_are_described_or_answered(
    mode, tools, messages, model, described
):
    plan = plan_for(messages, tools, vision_mode=mode)
    assert plan.prompts[0][0].id == model
    assert [image.is_current for image in plan.images] == described


@pytest.mark.parametrize(
    "settings",
    [{"vision_model": ""}, {"vision_model": "glm-4.5"}, {"account": Account("anna", models="glm-5*")}],
    ids=["unset", "blind", "not allowed"],
)  # fmt: skip
def test_without_a_vision_model_words_of_ours_stand_for_images(settings):
    plan = plan_for(TOOL_SHOWS, [A_TOOL], **settings)
    assert (plan.images, plan.ignored) == ([], ("images",))
    assert "not shown to glm-5.3" in plan.prompts[0][1].messages[-1].content[0]
    with pytest.raises(BadRequest) as raised:
        plan_for(SHOWS, [A_TOOL], **settings)
    assert raised.value.kind.code == "image_not_supported"


def test_a_key_that_may_not_use_the_vision_model_is_not_answered_by_it():
    limited = {"account": Account("anna", models="glm-5*"), "vision_mode": "answer"}
    assert plan_for(TOOL_SHOWS, **limited).prompts[0][0].id == "glm-5.3"
    with pytest.raises(ztoapi.ProxyError, match=r"may not use glm-4\.6v"):
        plan_for(SHOWS, **limited)


def test_a_model_that_sees_needs_no_descriptions():
    assert plan_for(SHOWS, [A_TOOL], model="glm-5.3-flash").images == []


def test_a_fallback_that_sees_is_shown_what_is_described_for_the_others():
    plan = plan_for(SHOWS, [A_TOOL], fallbacks=("glm-5.3-flash", "glm-4.6"))
    key = ztoapi.image_key("anna", SEA)
    plan.fill_in({key: "a sea"}, {})
    parts = {model.id: prompt.messages[0].content[1] for model, prompt in plan.prompts}
    words = "[image: a sea]"
    assert parts == {"glm-5.3": words, "glm-5.3-flash": SEA, "glm-4.6": words}
    assert plan.ignored == ()


def image_number(number):
    return Media("image_url", f"data:image/png;base64,{number:04}")


def test_of_many_images_the_newest_are_asked_about_each_once():
    shown = [Message("user", (image_number(number),)) for number in (1, 2, 3, 4, 5, 4)]
    plan = plan_for(shown, [A_TOOL])
    keys = [ztoapi.image_key("anna", image_number(number)) for number in (4, 5, 3, 2, 1)]
    assert [(image.key, image.plan is not None) for image in plan.images] == [
        *[(key, True) for key in keys[:4]],
        (keys[4], False),
    ]


def test_a_budget_is_looked_at_for_each_image_too():
    plan = plan_for([Message("user", tuple(map(image_number, range(5))))], [A_TOOL])
    plan.admit_with(check := object())
    assert {each.admit for each in (plan, *(image.plan for image in plan.images[:4]))} == {check}


def test_a_description_is_asked_for_like_any_other_answer():
    [image] = plan_for(SHOWS, [A_TOOL]).images
    [(model, prompt)] = image.plan.prompts
    sent = zai_body(prompt, model)
    shown, words = sent["messages"][0]["content"]
    assert (sent["model"], shown["image_url"]["url"], sent["thinking"]) == (
        "glm-4.6v",
        "U0VB",
        {"type": "disabled"},
    )
    assert words["text"] == ztoapi.DESCRIBE_IMAGE
    assert (image.plan.account, image.plan.images, image.plan.n) == (Account("anna"), [], 1)


BEGUN = [
    {"role": "system", "content": [{"type": "text", "text": "You are Claude Code."}]},
    {"role": "user", "content": "hi"},
]
BILLED = {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=7;"}


@pytest.mark.parametrize(
    ("messages", "is_same"),
    [
        pytest.param([*BEGUN, {"role": "assistant", "content": "hello"}], True, id="it went on"),
        pytest.param([*BEGUN, {"role": "system", "content": "x"}], True, id="a later system line"),
        pytest.param(
            [{**BEGUN[0], "content": [{**BEGUN[0]["content"][0], "cache_control": {}}]}, BEGUN[1]],
            True,
            id="a cache mark",
        ),
        pytest.param([BEGUN[0], {**BEGUN[1], "id": "msg_1"}], True, id="an id"),
        pytest.param(
            [{**BEGUN[0], "content": [BILLED, *BEGUN[0]["content"]]}, BEGUN[1]],
            True,
            id="a billing header",
        ),
        pytest.param(
            [{"role": "system", "content": BILLED["text"]}, *BEGUN], True, id="alone in a message"
        ),
        pytest.param([BEGUN[0], {"role": "user", "content": "ho"}], False, id="another beginning"),
        pytest.param([BEGUN[1]], False, id="another system prompt"),
    ],
)
def test_a_conversation_is_known_by_its_beginning(messages, is_same):
    keys = {"zai_api_key": ("a", "b")}

    def conversation(messages, account="me"):
        prompt = read_chat(chat(messages=messages))
        return ztoapi.make_plan(prompt, Settings(**keys), Account(account), "7").caller.conversation

    assert (conversation(messages) == conversation(BEGUN)) is is_same
    assert conversation(messages, "you") != conversation(messages)


# ======== Bounds of a request ========

VALUES = b'{"a":[%s]}'


@pytest.mark.parametrize(
    ("body", "values"),
    [
        pytest.param(b'{"a":[%s]}' % b",".join([b"1"] * 8), 10, id="numbers"),
        pytest.param(b'{"a":[%s]}' % b",".join([b"[]", b"{}"] * 4), 10, id="empty ones"),
        pytest.param(b'{"a":[%s]}' % b",".join([b'{"b":1}'] * 4), 10, id="objects"),
        pytest.param(b'{"a":[%s]}' % b",".join([b'"[,{\\"[,{\\\\"'] * 8), 10, id="strings"),
        pytest.param(b"{%s}" % b",".join(b'"%d":"x"' % i for i in range(9)), 10, id="names"),
    ],
)
def test_a_request_has_no_more_than_so_many_values(body, values):
    assert isinstance(ztoapi.parse_request(body, values), dict)
    with pytest.raises(ValueError, match="values"):
        ztoapi.parse_request(body, values - 1)


@pytest.mark.parametrize(
    "value",
    [b"[],", b'"",', b'{"":1},', b'"x' + b"," * 99 + b'",'],
    ids=["arrays", "strings", "objects", "long strings"],
)
def test_too_many_values_are_found_without_decoding_them(value):
    too_many = partial(ztoapi.too_many_values, most=100_000)
    body = b'{"a":[%s1]}' % (value * (2**22 // len(value)))
    assert too_many(body) == (len(value) < 100)
    assert collections_during(too_many, body) < 10  # when it is decoded, a thousand
    assert seconds_of(too_many, body) < 0.3


def test_the_depth_of_a_request_is_found_without_work_for_the_garbage_collector():
    body = b'{"a":[%s]}' % b",".join([b'{"a":' * 90 + b"1" + b"}" * 90] * 1000)
    collected = collections_during(ztoapi.parse_request, body)
    assert collected < 1.2 * collections_during(ztoapi.REQUEST_DECODER.decode, body.decode())


def collections_during(work, argument):
    """How often the garbage collector runs meanwhile."""
    phases = []
    gc.callbacks.append(lambda phase, _: phases.append(phase))
    work(argument)
    gc.callbacks.pop()
    return phases.count("start")


# ======== Fakes and helpers ========

OBSERVANT = Limits(check_interval=0.02)  # of connections that stand still
IMPATIENT = replace(OBSERVANT, read_timeout=0.5)  # also with what is slow because the machine is
HANG, RESET = object(), object()  # parts of a FakeZai's answer that are no bytes
EVENT_STREAM = {"Content-Type": "text/event-stream"}


class FakeZai:
    """A Z.ai that answers what a test tells it to, and remembers what it was asked."""

    CHAT = EVENT_STREAM, [RECORDED]  # what a chat is answered unless a test says something else
    OTHERS = {"Content-Type": "application/json"}, [b'{"ok":true}']

    def __init__(self):
        self.status, self.headers, self.parts = 200, None, None
        self.answers = []  # what the next requests get before `parts` counts: parts, or a status and parts
        self.takes = 1000  # requests at once; the others get 1302
        self.accounts = {}  # what is answered to a key, before all else
        self.models = 200, {"object": "list", "data": [{"id": "glm-4.6"}]}  # or HANG
        self.quota, self.asked_for_quota = (404, b""), []
        self.asked_for_models = 0
        self.pauses = []  # seconds before it reads each of the first MiB of a request
        self.asked = []  # method, path, headers and body
        self.peers, self.open = set(), 0
        self.left = asyncio.Event()  # somebody hung up before the answer's end

    @property
    def keys(self):
        return [headers["Authorization"] for _, _, headers, _ in self.asked]

    @property
    def bodies(self):
        return [json.loads(body) for *_, body in self.asked]

    def app(self):
        app = web.Application(client_max_size=2**30)
        app.router.add_get("/api/monitor/usage/quota/limit", self.tell_quota)
        app.router.add_get("/api/paas/v4/models", self.list_models)
        app.router.add_route("*", "/api/{_:(coding/)?paas/v4/.*}", self.serve)
        return app

    async def tell_quota(self, request):
        self.asked_for_quota.append(request.headers["Authorization"])
        return web.Response(
            status=self.quota[0], body=self.quota[1], headers={"Location": "/api/paas/v4/models"}
        )

    async def list_models(self, request):
        self.asked_for_models += 1
        if self.models is HANG:
            await asyncio.sleep(60)
        status, document = self.models
        return web.json_response(document, status=status)

    async def serve(self, request):
        body = await self.read(request.content)
        self.asked.append((request.method, request.path_qs, request.headers, body))
        self.peers.add(request.transport.get_extra_info("peername"))
        self.open += 1
        try:
            return await self.answer(request)
        except (asyncio.CancelledError, ConnectionError):
            self.left.set()
            raise
        finally:
            self.open -= 1

    async def read(self, content):
        body, pauses = bytearray(), [*self.pauses]
        while not content.at_eof():
            rest = 2**20 - len(body) % 2**20
            await asyncio.sleep(pauses.pop() if pauses and rest == 2**20 else 0)
            try:
                body += await content.read(rest)
            except web.RequestPayloadError:
                raise ConnectionResetError from None
        return bytes(body)

    async def answer(self, request):
        headers, usual = self.CHAT if request.path.endswith("/chat/completions") else self.OTHERS
        key = request.headers["Authorization"].removeprefix("Bearer ")
        status, parts = self.accounts.get(key) or self.next_answer()
        response = web.StreamResponse(
            status=status, headers=headers if self.headers is None else self.headers
        )
        await response.prepare(request)
        for part in usual if parts is None else parts:
            if part is HANG:
                await asyncio.sleep(60)
            elif isinstance(part, float):
                await asyncio.sleep(part)
            elif isinstance(part, asyncio.Event):
                await part.wait()
            elif part is RESET:
                request.transport.abort()
            else:
                await response.write(part)
                await asyncio.sleep(0)
        return response

    def next_answer(self):
        if self.open > self.takes:
            return zai_refuses(1302)
        if not self.answers:
            return self.status, self.parts
        answer = self.answers.pop(0)
        return answer if isinstance(answer, tuple) else (200, answer)


def zai_refuses(code, status=429, text="Words"):
    return status, [json.dumps({"error": {"code": str(code), "message": text}}).encode()]


@asynccontextmanager
async def fake_zai(**how):
    zai = FakeZai()
    server = TestServer(zai.app(), **how)
    await server.start_server(shutdown_timeout=0.1)
    zai.server = server
    zai.url = str(server.make_url("/api/paas/v4"))
    try:
        yield zai
    finally:
        await server.close()


@pytest_asyncio.fixture
async def zai():
    async with fake_zai() as zai:
        yield zai


@pytest_asyncio.fixture
async def other_zai():
    async with fake_zai() as zai:
        yield zai


@pytest_asyncio.fixture
async def start(zai, aiohttp_client):  # in this order: what asks ends before what answers
    """Starts ztoapi in front of the fake, with other settings, limits or another clock where a test wants them."""

    async def started(clock=None, limits=None, **settings):
        given = {"zai_base_url": zai.url, "zai_api_key": ("zai-key",)} | settings
        settings = Settings(**{"database_url": "memory", **given})
        app = create_app(settings, limits, clock or FakeClock())
        return await aiohttp_client(app, timeout=PATIENT)

    return started


class FakeClock(ztoapi.Clock):
    """A clock that never waits: sleeping puts it forward."""

    tick = 0.001  # real seconds that any time takes

    def __init__(self):
        self.time, self.epoch, self.slept = 1000.0, 1_800_000_000.0, []

    def now(self):
        return self.time

    def unix(self):
        return self.epoch + self.time

    def jitter(self):
        return 0.5

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)

    def call_later(self, seconds, callback):
        due = self.time + seconds

        def fire():
            self.time = max(self.time, due)
            callback()

        return asyncio.get_running_loop().call_later(self.tick, fire)


@pytest_asyncio.fixture
async def client(start):
    return await start()


@pytest_asyncio.fixture
async def lively(start):
    """Gives signs of life after less than a moment of silence."""
    return await start(limits=Limits(keep_alive_interval=0.05))


class QuickLoop(asyncio.SelectorEventLoop):
    """With real sockets. Time passes only when nothing has come for a moment, and then at once."""

    MOMENT = 0.005  # real seconds

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.poll, self._selector.select = self._selector.select, self.skip

    def time(self):
        return self.now

    def skip(self, timeout=None):
        came = self.poll(timeout and min(timeout, self.MOMENT))
        if not came:
            self.now += timeout or 0
        return came


def quickly(**settings):
    """For a test of a client and a fake Z.ai that takes minutes: on a QuickLoop they are moments."""

    async def between(test, parameters):
        clock = ztoapi.Clock()
        clock.now = asyncio.get_running_loop().time
        # A thread of the database's would take none of this time.
        limits = Limits(database_interval=10**6, shutdown_grace=0)
        async with fake_zai() as zai:
            where = {"zai_base_url": zai.url, "database_url": "memory"}
            given = Settings(**{**where, "zai_api_key": ("zai-key",), **settings})
            async with TestClient(TestServer(create_app(given, limits, clock))) as client:
                await test(client, zai, **parameters)

    def decorated(test):
        @wraps(test)
        def run(**parameters):
            with closing(QuickLoop()) as loop:
                loop.run_until_complete(between(test, parameters))

        run.__signature__ = Signature(list(signature(test).parameters.values())[2:])
        return run

    return decorated


async def ask(client, body=HELLO, path="/v1/chat/completions", headers=KEY):
    async with client.post(
        path, data=io.BytesIO(json.dumps(body).encode()), headers=headers
    ) as response:
        return response, await response.text()


def parse_frames(stream):
    assert stream.endswith("data: [DONE]\n\n")
    return [json.loads(frame.removeprefix("data: ")) for frame in stream.split("\n\n")[:-2]]


def said(stream):
    deltas = [choice["delta"] for frame in parse_frames(stream) for choice in frame["choices"]]
    return "".join(delta.get("content", "") for delta in deltas)


def error_of(text):
    return json.loads(text)["error"]


def today(client):
    return ztoapi.today_of(client.app).isoformat()


def slept(client):
    return client.app[ztoapi.CLOCK].slept


@pytest_asyncio.fixture
async def passing(start):
    return await start(model_aliases=(("claude-*", "glm-5.3"),))


async def talk_raw(client, data):
    """What the server answers to bytes that need not be HTTP."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(data)
    answer = await asyncio.wait_for(reader.read(65536), 10)
    writer.close()
    return answer


def hurry(client):
    """From now on a head must be whole soon. Until now it had all its time, however slow the machine."""
    for connection in client.server.handler.connections:
        connection.read_timeout = 0.2


async def eventually(condition, seconds=10.0):
    """Whether something comes true; the seconds are for a machine that is busy."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        await asyncio.sleep(0.01)
    return condition()


class Program:
    """ztoapi.py as a process of its own; it starts while the test goes on, on a free port unless told another."""

    COMMAND = (sys.executable, PROGRAM)

    def __init__(self, *arguments, **variables):
        ours = {"NO_PROXY": "127.0.0.1,localhost", "DATABASE_URL": "memory", "PORT": "0"}
        self.process = subprocess.Popen(
            [*self.COMMAND, *arguments],
            env={**INHERITED, **ours, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @cached_property
    def banner(self):
        """What it prints until clients may come; this waits for it."""
        lines = []
        while not (lines and "clients" in lines[-1]):
            lines.append(self.process.stdout.readline())
            assert lines[-1], self.process.stderr.read()
        return "".join(lines)

    @property
    def port(self):
        return int(re.search(r"http://\S+:(\d+)/", self.banner)[1])

    def end(self):
        """Waits for its end: its exit status, what it printed, and what it logged."""
        out, log = self.process.communicate(timeout=20)
        return self.process.returncode, out, log

    def stop(self):
        """Ends it: its exit status, and everything it said."""
        banner = self.banner
        self.process.terminate()
        status, out, log = self.end()
        return status, banner + out + log


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """How the tests of `meanwhile` end, two at a time: each mostly waits."""
    chosen = (getattr(item.function, "meanwhile", None) for item in request.session.items)

    def run_now(test):
        asyncio.run(run_alone(test, tmp_path_factory.mktemp("meanwhile")))

    tmp_path_factory.getbasetemp()  # or both threads would make it at once, and one of them fail
    threads = ThreadPoolExecutor(2)
    yield {test: threads.submit(run_now, test) for test in chosen if test}
    threads.shutdown(cancel_futures=True)


async def run_alone(test, tmp_path):
    """Runs a test of `meanwhile` with those that it wants of these: a folder, a fake Z.ai, and what starts programs."""
    with contextlib.ExitStack() as started:

        def run(start, *arguments, **how):
            program = start(*arguments, **how)
            started.callback(end_if_running, program)
            killer = threading.Timer(LONGEST_TEST, program.process.kill)
            killer.start()
            started.callback(killer.cancel)
            return program

        async with fake_zai() as zai:
            given = {"run": run, "tmp_path": tmp_path, "zai": zai}
            wanted = [given[name] for name in signature(test).parameters]
            await asyncio.wait_for(test(*wanted), LONGEST_TEST)


def end_if_running(program):
    if program.process.returncode is None:
        program.process.terminate()
        program.end()


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `python ztoapi.py …` in this process: its exit status, and what it printed. Not for what starts a server."""

    def run_command(*arguments, **variables):
        monkeypatch.setattr(ztoapi, "ENV_FILE", Path("/nowhere"))
        for name in SETTING_NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        try:
            ztoapi.main(arguments)
        except SystemExit as ended:
            return ended.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run_command


def raw_request(body, key="sk-your-key"):
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nx-api-key: {key}\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@pytest.fixture(scope="module", autouse=True)
def started_early(request):
    """What takes a second to start does so while the first tests run, if a later one needs it."""
    gc.freeze()  # The tests themselves are never garbage: they need not be looked through for it again and again.
    needed = {name for item in request.session.items for name in item.fixturenames}
    for name in needed & {"chromium", "outcomes", "postgresql"}:
        with contextlib.suppress(pytest.skip.Exception):
            request.getfixturevalue(name)


class Chromium:
    """A headless Chromium for all tests."""

    FLAGS = (
        *(
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-sync",
        ),
        *(
            "--disable-background-networking",
            "--disable-component-update",
            "--in-process-gpu",
            "--remote-debugging-port=0",
        ),
    )

    def __init__(self, program, folder):
        self.folder = folder
        self.process = subprocess.Popen(
            [program, *self.FLAGS, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    async def address(self):
        """Of its DevTools."""
        port_file = self.folder / "DevToolsActivePort"
        assert await eventually(lambda: port_file.exists() and "/" in port_file.read_text(), 20)
        return f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}"

    def close(self):
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    program = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if program is None:
        pytest.skip("Chromium is not installed")
    chromium = Chromium(program, tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()


class DevTools:
    """A page of Chromium's, over its DevTools."""

    def __init__(self, socket):
        self.socket, self.number, self.complaints, self.asked = socket, count(1), [], []

    async def call(self, method, **params):
        number = next(self.number)
        await self.socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await asyncio.wait_for(self.socket.receive_json(), 20)
            if message.get("id") == number:
                return message["result"]
            self.note(message["method"], message["params"])

    def note(self, method, params):
        if method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown" or (
            method == "Runtime.consoleAPICalled" and params["type"] == "error"
        ):
            self.complaints.append(params)
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(params["entry"])

    async def open(self, url, condition="true"):
        """Shows a page, and waits until it is there and the condition holds."""
        await self.call("Page.navigate", url=url)
        assert await self.sees(
            f"location.href === '{url}' && document.readyState === 'complete' && ({condition})"
        )

    async def run(self, script):
        result = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def sees(self, condition, seconds=10):
        end = time.monotonic() + seconds
        while not (seen := await self.run(condition)) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return seen


@pytest_asyncio.fixture
async def browser(chromium):
    """Its page, whose clock runs ten times as fast. Each server of a test is another origin, with another storage."""
    async with ztoapi.aiohttp.ClientSession() as session:
        async with session.get(await chromium.address() + "/json/list") as response:
            (url,) = [
                target["webSocketDebuggerUrl"]
                for target in await response.json()
                if target["type"] == "page"
            ]
        async with session.ws_connect(url, max_msg_size=0) as page_socket:
            page = DevTools(page_socket)
            for domain in ("Runtime", "Log", "Network", "Page"):
                await page.call(f"{domain}.enable")
            faster = "const wait = setTimeout; setTimeout = (job, ms) => wait(job, ms / 10)"
            await page.call("Page.addScriptToEvaluateOnNewDocument", source=faster)
            yield page
            await page.call("Page.navigate", url="about:blank")


@pytest_asyncio.fixture
async def demo(aiohttp_client):
    """Starts what `--demo` starts, with other settings where a test wants them, and without its pauses."""

    async def started(host="127.0.0.1", port=0, pace=0.0, **settings):
        (listener,) = ztoapi.listen(host, port)
        limits = Limits(demo_pace=pace, database_interval=0.02)
        app = create_app(ztoapi.with_demo(Settings(**settings), listener.getsockname()), limits)
        server = TestServer(app, host=host, socket_factory=lambda *_: listener)
        return await aiohttp_client(server, timeout=PATIENT)

    return started


@pytest_asyncio.fixture
async def here(demo):
    """Where a demo is."""
    return f"http://localhost:{(await demo()).port}"


def text_of(name):
    return f"document.getElementById('{name}').textContent"


@pytest_asyncio.fixture
async def sdk(client):
    openai = pytest.importorskip("openai")
    http_client = openai.DefaultAsyncHttpxClient(
        verify=False
    )  # there is no TLS, and reading certificates takes 30 ms
    where = {"base_url": str(client.make_url("/v1")), "http_client": http_client}
    async with openai.AsyncOpenAI(**where, api_key="sk-your-key", max_retries=0) as sdk:
        yield sdk


# ======== Over real sockets ========


EMPTY_ANSWER = [stream_of(finish(**SPENT))]
THOUGHT_ALONE = [stream_of(*thinks("hm"), finish(**SPENT))]


@in_loop
@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_an_empty_answer_is_asked_for_once_more(client, zai, path, stream):
    zai.answers, zai.parts = [EMPTY_ANSWER], [RECORDED]
    words = {"messages": HELLO["messages"], "prompt": "x", "input": "x"}
    name = {"chat/completions": "messages", "completions": "prompt", "responses": "input"}[path]
    body = {"model": "glm-4.6", "stream": stream, name: words[name]}
    response, text = await ask(client, body, f"/v1/{path}")
    assert (response.status, "好😀" in text, len(zai.bodies)) == (200, True, 2)
    assert slept(client) == []


@in_loop
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_a_second_empty_answer_is_the_answer(client, zai, stream):
    zai.parts = EMPTY_ANSWER
    response, text = await ask(client, chat(stream=stream))
    assert (response.status, len(zai.bodies)) == (200, 2)
    assert '"finish_reason":"stop"' in text


@in_loop
@pytest.mark.parametrize(
    ("parts", "changes", "settings"),
    [
        (EMPTY_ANSWER, {"stop": ["x"]}, {}),
        (EMPTY_ANSWER, {}, {"max_retries": 0}),
        (THOUGHT_ALONE, {}, {}),
        ([stream_of(finish("length"))], {}, {}),
    ],
    ids=["stop was sent", "no retries", "reasoning alone", "cut off"],
)
async def test_what_is_not_asked_for_again(start, zai, parts, changes, settings):
    client = await start(**settings)
    zai.parts = parts
    response, _ = await ask(client, chat(**changes))
    assert (response.status, len(zai.bodies)) == (200, 1)


@in_loop
async def test_each_choice_is_asked_for_again_by_itself(client, zai):
    zai.answers, zai.parts = [EMPTY_ANSWER, [RECORDED], EMPTY_ANSWER], [RECORDED]
    _, text = await ask(client, chat(n=3))
    contents = [choice["message"]["content"] for choice in json.loads(text)["choices"]]
    assert (contents, len(zai.bodies)) == (["你好😀"] * 3, 5)


@in_loop
@pytest.mark.parametrize("form", ["parsed", "raw", "hidden"])
@pytest.mark.parametrize(
    ("parts", "silent"),
    [(THOUGHT_ALONE, True), (EMPTY_ANSWER, True), ([RECORDED], False), ([RECORDED_CALL], False)],
    ids=["reasoning alone", "nothing", "text", "a call"],
)
async def test_the_log_says_which_answers_have_no_text(client, zai, caplog, parts, silent, form):
    caplog.set_level("INFO", "ztoapi")
    zai.parts = parts
    await ask(client, chat(reasoning_format=form))
    assert (", no text" in caplog.messages[-1]) is silent


@in_loop
async def test_what_was_mended_is_counted_by_kind(client, zai):
    mended = {
        "leaked_calls": [LEAK],
        "stray_tags": ["</think>a"],
        "argument_types": [calls(("find", '{"path":"a","n":"3"}'))],
    }
    for deltas in mended.values():
        zai.parts = [stream_of(*deltas, finish())]
        await ask(client, chat(tools=[READ, FIND]))
    zai.answers, zai.parts = [EMPTY_ANSWER], [RECORDED]
    await ask(client)
    async with client.get("/dashboard/stats", headers=KEY) as response:
        healed = (await response.json())["healed"]
    assert healed == dict.fromkeys([*mended, "empty_answers"], 1) | {"line_ends_at_head": 1}


READ_FILE = tool("read", filePath={"type": "string"}, n={"type": "integer"})
MARKUP = "<tool_call>read\n<arg_key>filePath</arg_key>\n<arg_value>/a</arg_value>\n</tool_call>"
A_READ = ("read", {"filePath": "/a"})
PERSON = {"type": "object", "properties": {"name": {"type": "string"}}}
AS_PERSON = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}
# What models say, as it was reported: the deltas, the finish, what else was asked; text, reasoning and calls of it.
REPORTED = {
    "wrong types": (
        [calls(("edit", r'{"edits":"[{\"o\":1}]","n":"3","all":"true","note":"12"}'))],
        "tool_calls",
        {"tools": [EDIT]},
        ("", "", [("edit", {"edits": [{"o": 1}], "n": 3, "all": True, "note": "12"})]),
    ),
    "arguments in a name": (
        [calls(("read<arg_key>filePath</arg_key><arg_value>/a</arg_value>", "{}"))],
        "tool_calls",
        {},
        ("", "", [A_READ]),
    ),
    "a tag in a name": ([calls(("read</arg_value>", "{}"))], "tool_calls", {}, ("", "", [("read", {})])),
    "a call in the reasoning": (thinks("Let me read." + MARKUP), "stop", {}, ("", "Let me read.", [A_READ])),
    "a call as JSON": ([json_leak(filePath="/a")], "stop", {}, ("", "", [A_READ])),
    "a forced call as text": (
        ['{"filePath":', '"/a"}'],
        "stop",
        {"tool_choice": {"type": "function", "function": {"name": "read"}}},
        ("", "", [A_READ]),
    ),
    "arguments twice": (pieces_of('{"filePath":"/a"}', '{"filePath":"/a"}'), "tool_calls", {}, ("", "", [A_READ])),
    "arguments unclosed": (pieces_of('{"filePath":"/a"'), "tool_calls", {}, ("", "", [A_READ])),
    "arguments null": (pieces_of("null"), "tool_calls", {}, ("", "", [("read", {})])),
    "JSON in a fence": (
        ["``", '`json\n{"na', 'me":"Ann"}\n``', "`"],
        "stop",
        {"response_format": AS_PERSON},
        ('{"name":"Ann"}', "", []),
    ),
    "a stop string": (["x = 1\n</co", "de"], "stop", {"stop": ["</code>"]}, ("x = 1\n", "", [])),
    "no call": (["done"], "tool_calls", {}, ("done", "", [])),
    "a stray tag": (["</think>\n", "done"], "stop", {}, ("done", "", [])),
    "content in parts": ([{"content": [{"type": "text", "text": "done"}]}], "stop", {}, ("done", "", [])),
    "reasoning by its other name": ([{"reasoning": "hm"}, "done"], "stop", {}, ("done", "hm", [])),
}  # fmt: skip


def spoken_in(text, *, stream):
    """Text, reasoning and calls of a chat's answer, and its finish."""
    if not stream:
        (choice,) = json.loads(text)["choices"]
        return spoken(json.loads(text)), choice["finish_reason"]
    message = {"content": "", "reasoning_content": "", "tool_calls": []}
    for frame in parse_frames(text):
        (choice,) = frame["choices"]
        for name in ("content", "reasoning_content"):
            message[name] += choice["delta"].get(name, "")
        for call in choice["delta"].get("tool_calls", ()):
            if "id" in call:
                message["tool_calls"].append(call)
            else:
                begun = message["tool_calls"][call["index"]]["function"]
                begun["arguments"] += call["function"]["arguments"]
    return spoken({"choices": [{"message": message}]}), choice["finish_reason"]


@in_loop
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("case", REPORTED)
async def test_what_models_say_wrong_is_mended(client, zai, case, stream):
    deltas, reason, asked, (text, thought, made) = REPORTED[case]
    zai.parts = [stream_of(*chunk_of(*deltas), finish(reason, **SPENT))]
    _, body = await ask(client, chat(**{"tools": [READ_FILE], "stream": stream, **asked}))
    heard, finished = spoken_in(body, stream=stream)
    calls_heard = [(name, json.loads(arguments)) for _, name, arguments in heard["calls"]]
    assert (heard["content"], heard["reasoning"], calls_heard) == (text, thought, made)
    assert finished == ("tool_calls" if made else "stop")


@in_loop
@pytest.mark.parametrize("case", [case for case in REPORTED if case != "a stop string"])
async def test_what_models_say_wrong_is_mended_for_responses_too(client, zai, case):
    deltas, reason, asked, (text, _, made) = REPORTED[case]
    zai.parts = [stream_of(*chunk_of(*deltas), finish(reason, **SPENT))]
    functions = [
        {"type": "function", **each["function"]} for each in asked.get("tools", [READ_FILE])
    ]
    body = {"model": "glm-4.6", "input": "x", "tools": functions}
    if "response_format" in asked:
        body["text"] = {"format": {"type": "json_schema", "name": "p", "schema": PERSON}}
    if "tool_choice" in asked:
        body["tool_choice"] = {"type": "function", "name": "read"}
    output = json.loads((await ask(client, body, "/v1/responses"))[1])["output"]
    heard = [
        (item["name"], json.loads(item["arguments"]))
        for item in output
        if item["type"] == "function_call"
    ]
    texts = [
        part["text"] for item in output if item["type"] == "message" for part in item["content"]
    ]
    assert ("".join(texts), heard) == (text, made)


@in_loop
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_no_client_gets_half_a_character(client, zai, stream):
    zai.parts = [stream_of("a\ud83d", "\ude00b\ud83d", finish(), ensure_ascii=True)]
    _, text = await ask(client, chat(stream=stream))
    assert spoken_in(text, stream=stream)[0]["content"] == "a😀b\ufffd"


STOPPING_SLOWLY = [stream_of(*thinks("hm"), "x = 1\n</co", "de>and mo", done=""), HANG]


@in_loop
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_zai_is_left_at_a_stop_string(client, zai, stream):
    zai.parts = STOPPING_SLOWLY
    asked = chat(stop=["</code>"], stream=stream)
    if stream:
        asked["stream_options"] = {"include_usage": True}
    _, text = await ask(client, asked)
    await asyncio.wait_for(zai.left.wait(), 5)
    if stream:
        assert said(text) == "x = 1\n"
        *_, last, spent = parse_frames(text)
        assert last["choices"][0]["finish_reason"] == "stop"
        usage = spent["usage"]
    else:
        (choice,) = json.loads(text)["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("x = 1\n", "stop")
        usage = json.loads(text)["usage"]
    assert usage["completion_tokens"] == 2
    assert usage["prompt_tokens"] > 5


@in_loop
async def test_a_whole_answer(client, zai):
    zai.parts = [DOCUMENT]
    response, body = await ask(client)
    assert (response.status, response.content_type) == (200, "application/json")
    wanted = chat_document([Thought("想"), Text("你好😀"), Usage(6, 3, 9, 2), Finish("stop")])
    assert json.loads(body) == wanted | {"id": "chatcmpl-2025", "model": "glm-4.6"}
    usage = {"stream_options": {"include_usage": True}}  # for bases that are not Z.ai's own
    assert zai.bodies == [
        {"model": "glm-4.6", "messages": HELLO["messages"], "stream": True, **usage}
    ]
    assert zai.keys == ["Bearer zai-key"]


@in_loop
async def test_zai_is_asked_for_plain_english_and_names_its_request(client, zai):
    zai.headers, zai.parts = {}, [DOCUMENT]
    response, _ = await ask(client)
    assert response.headers["x-zai-request-id"] == "2025"
    assert response.headers["x-ztoapi-model"] == "glm-4.6"
    _, _, sent, _ = zai.asked[0]
    assert (sent["Accept-Encoding"], sent["Accept-Language"]) == ("identity", "en-US,en")


@in_loop
async def test_a_request_may_begin_with_a_byte_order_mark(client):
    async with client.post(
        "/v1/chat/completions", data=b"\xef\xbb\xbf" + json.dumps(HELLO).encode(), headers=KEY
    ) as response:
        assert response.status == 200


@in_loop
async def test_a_streamed_answer(client):
    response, stream = await ask(client, chat(stream=True))
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert said(stream) == "你好😀"


@in_loop
async def test_a_stream_cut_at_every_byte_is_the_same_stream(client, zai):
    zai.parts = [RECORDED[i : i + 1] for i in range(len(RECORDED))]
    assert said((await ask(client, chat(stream=True)))[1]) == "你好😀"
    whole = json.loads((await ask(client))[1])
    assert whole["choices"][0]["message"]["content"] == "你好😀"


@in_loop
async def test_json_where_a_stream_was_asked_for_is_streamed(client, zai):
    zai.parts = [DOCUMENT]
    assert said((await ask(client, chat(stream=True)))[1]) == "你好😀"


@in_loop
async def test_the_first_word_is_there_before_the_second_is_sent(client, zai):
    zai.parts = [FIRST, HANG]
    async with client.post("/v1/chat/completions", json=chat(stream=True), headers=KEY) as response:
        assert "想" in (await asyncio.wait_for(response.content.readline(), 10)).decode()


@in_loop
@pytest.mark.parametrize(
    "path",
    [
        "/chat/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/",
        "/api/v1/chat/completions",
        "/api/paas/v4/chat/completions",
        "/api/paas/v4/v1/chat/completions",
        "/v1/v1/chat/completions",
        "//v1//chat/completions//",
    ],
)
async def test_clients_put_before_the_path_what_they_like(client, path):
    url = client.make_url("/").with_path(path)
    async with client.session.post(url, json=HELLO, headers=KEY) as response:
        assert response.status == 200


@in_loop
async def test_a_large_request_reaches_zai(client, zai):
    await ask(client, message(role="user", content="你" * 2**19))
    assert zai.bodies[0]["messages"][0]["content"] == "你" * 2**19


@in_loop
@pytest.mark.parametrize(
    ("fields", "accept", "streams"),
    [
        ({}, "*/*", False),
        ({}, "text/event-stream", True),
        ({}, "application/json", False),
        ({"stream": False}, "text/event-stream", False),
        ({"stream": True}, "application/json", True),
        ({"stream": None}, "text/event-stream", True),
    ],
)
async def test_accept_decides_where_stream_is_absent(client, zai, fields, accept, streams):
    response, _ = await ask(client, chat(**fields), headers=KEY | {"Accept": accept})
    assert response.content_type == ("text/event-stream" if streams else "application/json")
    assert zai.bodies[0]["stream"] is True


@in_loop
async def test_default_stream_decides_where_nothing_else_does(start):
    client = await start(default_stream=True)
    assert (await ask(client))[0].content_type == "text/event-stream"
    assert (await ask(client, headers=KEY | {"Accept": "application/json"}))[
        0
    ].content_type == "application/json"


@in_loop
async def test_what_was_ignored_is_listed(client):
    response, _ = await ask(client, chat(metadata={"a": 1}, **{"x\r\ny: z": 1}))
    assert response.headers["x-ztoapi-ignored"] == "metadata,x__y:_z"


@in_loop
async def test_the_answer_names_the_model_as_the_client_did(start, zai):
    client = await start(model_aliases=(("gpt-*", "glm-5"),))
    assert json.loads((await ask(client, chat(model="GPT-4o")))[1])["model"] == "GPT-4o"
    assert zai.bodies[0]["model"] == "glm-5"


@in_loop
async def test_reasoning_goes_where_the_setting_says_unless_the_request_does(start):
    client = await start(reasoning_format="hidden")
    assert "想" not in (await ask(client, chat(stream=True)))[1]
    assert (
        said((await ask(client, chat(stream=True, reasoning_format="raw")))[1])
        == "<think>想</think>你好😀"
    )
    whole = json.loads((await ask(client, chat(reasoning_format="raw")))[1])
    assert whole["choices"][0]["message"]["content"] == "<think>想</think>你好😀"


@in_loop
@pytest.mark.parametrize(("setting", "wanted"), [(True, ON), (False, OFF), (None, {})])
async def test_the_setting_decides_on_thinking_where_the_request_does_not(
    start, zai, setting, wanted
):
    client = await start(enable_thinking=setting)
    await ask(client)
    await ask(client, chat(reasoning_effort="none"))
    assert zai.bodies[0].get("thinking") == wanted.get("thinking")
    assert zai.bodies[1]["thinking"] == OFF["thinking"]


THINKING_OFF = {"type": "disabled"}


@in_loop
@pytest.mark.parametrize(
    ("path", "fields", "thinking"),
    [
        ("chat/completions", {"max_tokens": 64}, THINKING_OFF),
        ("chat/completions", {"max_completion_tokens": 1}, THINKING_OFF),
        ("chat/completions", {"max_tokens": 65}, None),
        ("chat/completions", {"max_completion_tokens": 0, "max_tokens": 64.0}, THINKING_OFF),
        ("chat/completions", {"max_tokens": 9, "thinking": {"type": "adaptive"}}, THINKING_OFF),
        ("chat/completions", {"max_tokens": 0}, None),
        ("chat/completions", {"max_tokens": 9, "model": "glm-4.6:on"}, {"type": "enabled"}),
        ("chat/completions", {"max_tokens": 1, "reasoning_effort": "high"}, {"type": "enabled"}),
        ("completions", {"max_tokens": 1, "prompt": "hi"}, THINKING_OFF),
        ("responses", {"max_output_tokens": 16, "input": "hi"}, THINKING_OFF),
        ("messages", {"max_tokens": 16}, THINKING_OFF),
        ("messages", {"max_tokens": 16, "model": "glm-4.6:on"}, {"type": "enabled"}),
    ],
)
async def test_a_limit_of_a_few_tokens_leaves_none_for_thinking(
    client, zai, path, fields, thinking
):
    await ask(client, chat(**fields), f"/v1/{path}")
    assert zai.bodies[0].get("thinking") == thinking


@in_loop
async def test_n_answers_are_merged_into_one(client, zai):
    _, stream = await ask(client, chat(n=3, stream=True, stream_options={"include_usage": True}))
    streamed = parse_frames(stream)
    texts = {0: "", 1: "", 2: ""}
    for frame in streamed[:-1]:
        for choice in frame["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == dict.fromkeys(range(3), "你好😀")
    assert (streamed[-1]["choices"], streamed[-1]["usage"]["total_tokens"]) == ([], 27)
    assert len({frame["id"] for frame in streamed}) == 1
    whole = json.loads((await ask(client, chat(n=3)))[1])
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["你好😀"] * 3
    assert whole["usage"]["total_tokens"] == 27
    assert len(zai.bodies) == 6
    assert not any("n" in body for body in zai.bodies)


@in_loop
@pytest.mark.parametrize(
    ("n", "settings", "takes"),
    [(8, {}, 1000), (2, {"max_concurrency": 1}, 1000), (8, {}, 3), (2, {}, 1)],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_more_choices_than_places_take_turns(start, zai, n, settings, takes, stream):
    client = await start(**settings)
    zai.takes, zai.parts = takes, [FIRST, 0.02, RECORDED]
    _, body = await asyncio.wait_for(ask(client, chat(n=n, stream=stream)), 10)
    if stream:
        assert {
            choice["index"] for frame in parse_frames(body) for choice in frame["choices"]
        } == set(range(n))
    else:
        assert len(json.loads(body)["choices"]) == n
    assert await eventually(lambda: zai.open == 0)


@in_loop
async def test_choices_differ_in_seed_and_have_no_request_id(client, zai):
    await ask(client, chat(n=3, seed=7, request_id="r"))
    assert sorted(body["seed"] for body in zai.bodies) == [7, 8, 9]
    assert not any("request_id" in body for body in zai.bodies)


@in_loop
@pytest.mark.parametrize("slow", [[FIRST, HANG], [HANG]], ids=["later", "from the start"])
async def test_choices_come_as_they_come(client, zai, slow):
    zai.answers = [slow, [RECORDED]]
    async with client.post(
        "/v1/chat/completions", json=chat(n=2, stream=True), headers=KEY
    ) as response:
        seen = ""
        while '"finish_reason":"stop"' not in seen:
            seen += (await asyncio.wait_for(response.content.readany(), 10)).decode()
    assert await eventually(lambda: zai.open == 0)


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "broken",
    [
        [b'{"error":{"code":"1301","message":"no"}}'],
        [FIRST, b'data: {"error":{"code":"1301"}}\n\n'],
    ],
    ids=["at once", "later"],
)
async def test_one_choice_that_fails_fails_the_answer(client, zai, stream, broken):
    zai.answers = [[FIRST, HANG], broken]
    _, body = await ask(client, chat(n=2, stream=stream))
    assert '"code":"content_filter"' in body
    assert await eventually(lambda: zai.open == 0)


# ======== Failures over real sockets ========


@in_loop
@pytest.mark.parametrize("row", {row[-1]: row for row in REFUSED}.values(), ids=lambda row: row[-1])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_refusal_has_its_status(client, zai, row, stream):
    code, zai.status, status, kind, ours = row
    zai.headers = {"X-Log-Id": "log-7"}
    zai.parts = [json.dumps({"error": {"code": str(code), "message": "Words"}}).encode()]
    response, body = await ask(client, chat(stream=stream))
    assert (response.status, error_of(body)["type"], error_of(body)["code"]) == (status, kind, ours)
    assert response.headers["x-zai-request-id"] == "log-7"
    worth_a_retry = ours in (
        "rate_limit_exceeded",
        "zai_unavailable",
        "zai_unreachable",
        "zai_timeout",
    )
    assert response.headers.get("x-should-retry") == (None if worth_a_retry else "false")


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([b'{"error":{"code":"1302","message":"slow"}}'], id="in a 200"),
        pytest.param([b'data: {"error":{"code":"1302","message":"slow"}}\n\n'], id="in a frame"),
    ],
)
async def test_an_error_in_a_200_has_its_status(client, zai, parts, stream):
    zai.parts = parts
    response, body = await ask(client, chat(stream=stream))
    assert (response.status, error_of(body)["code"]) == (429, "rate_limit_exceeded")
    assert response.headers["Retry-After"] == "1"


@in_loop
@pytest.mark.parametrize(
    ("rest", "code"),
    [
        pytest.param(
            [b'data: {"error":{"code":"1301","message":"no"}}\n\n'],
            "content_filter",
            id="error frame",
        ),
        pytest.param([], "zai_unavailable", id="end"),
        pytest.param([RESET], "zai_unavailable", id="reset"),
        pytest.param([b"data: <html>\n\n"], "zai_unavailable", id="junk"),
    ],
)
async def test_a_failure_after_the_first_word_is_a_frame(client, zai, rest, code):
    zai.parts = [FIRST, *rest]
    response, stream = await ask(client, chat(stream=True))
    assert response.status == 200
    first, failure = parse_frames(stream)
    assert first["choices"][0]["delta"]["reasoning_content"] == "想"
    assert (failure["error"]["code"], failure["choices"]) == (code, [])


@in_loop
async def test_a_failure_after_the_first_word_of_a_whole_answer_has_a_status(client, zai):
    zai.parts = [FIRST, RESET]
    response, body = await ask(client)
    assert (response.status, error_of(body)["code"]) == (502, "zai_unavailable")


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_zais_request_id_is_told_with_a_later_failure_too(client, zai, stream):
    zai.headers, zai.parts = (
        {"X-Log-Id": "log-9"},
        [FIRST, b'data: {"error":{"code":"1301","message":"no"}}\n\n'],
    )
    response, _ = await ask(client, chat(stream=stream))
    assert response.headers["x-zai-request-id"] == "log-9"


@in_loop
async def test_a_redirect_is_not_followed(client, zai):
    zai.status, zai.headers, zai.parts = 307, {"Location": zai.url + "/chat/completions"}, []
    response, body = await ask(client)
    assert (response.status, error_of(body)["code"], len(zai.bodies)) == (
        502,
        "zai_wrong_address",
        1,
    )


@in_loop
@pytest.mark.parametrize("before", [0, 560, 590, 2000])
async def test_no_part_of_our_key_is_told_however_long_zai_talks(start, zai, before):
    client = await start(zai_api_key=("0123456789abcdef.fedcba9876543210",))
    zai.status, zai.parts = 401, [b"x" * before + b" key 0123456789abcdef.fedcba9876543210 refused"]
    _, body = await ask(client)
    assert "01234" not in body
    assert len(body) < 1000


@in_loop
async def test_silence_is_a_timeout(start, zai):
    client = await start(upstream_timeout=0.1)
    zai.parts = [HANG]
    response, body = await ask(client)
    assert (response.status, error_of(body)["code"]) == (504, "zai_timeout")


@in_loop
async def test_silence_in_a_stream_is_a_frame(start, zai):
    client = await start(upstream_timeout=0.1)
    zai.parts = [FIRST, HANG]
    assert (
        parse_frames((await ask(client, chat(stream=True)))[1])[-1]["error"]["code"]
        == "zai_timeout"
    )


CONNECTION_WORDS = re.compile(r"connection error.*network error")


@in_loop
@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/v4", "https://name.invalid/v4", "https://127.0.0.1:{port}/v4"]
)
async def test_a_zai_that_is_not_there_is_unreachable(start, zai, url):
    client = await start(zai_base_url=url.format(port=zai.url.split(":")[2].split("/")[0]))
    response, body = await ask(client)
    assert (response.status, error_of(body)["code"]) == (502, "zai_unreachable")
    assert CONNECTION_WORDS.search(body)  # agents decide by them whether to ask again


@in_loop
async def test_without_a_key_the_client_is_told_where_to_get_one(start, zai):
    client = await start(zai_api_key=())
    response, body = await ask(client)
    assert (response.status, error_of(body)["code"], zai.bodies) == (503, "zai_api_key_missing", [])


@in_loop
@pytest.mark.parametrize(
    ("data", "status", "param"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"[]", 400, None),
        (b"\xff\xfe", 400, None),
        (b'{"model":"x","messages":[],"temperature":NaN}', 400, None),
        (b"[" * 100_000, 400, None),
        (json.dumps(chat(temperature=3)).encode(), 400, "temperature"),
    ],
)
async def test_a_request_that_makes_no_sense_does_not_reach_zai(client, zai, data, status, param):
    async with client.post("/v1/chat/completions", data=data, headers=KEY) as response:
        error = error_of(await response.text())
    assert (response.status, error["type"], error["param"]) == (
        status,
        "invalid_request_error",
        param,
    )
    assert zai.bodies == []


@in_loop
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/files"])
async def test_a_body_too_large_is_413(start, path):
    client = await start(max_body_mb=1)
    body = io.BytesIO(b" " * 2**20 + b"{}")
    async with client.post(path, data=body, headers=KEY) as response:
        assert (response.status, error_of(await response.text())["code"]) == (
            413,
            "request_too_large",
        )


def bare_deflate(data):
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def packed_by(*modules):
    """What packs with the first of these modules that is installed; without one, the test is skipped."""

    def pack(data):
        module = ztoapi.first_module(*modules) or pytest.skip(f"needs one of {modules}")
        return module.compress(data)

    return pack


pack_brotli = packed_by("brotli", "brotlicffi")
pack_zstd = packed_by("compression.zstd", "backports.zstd", "zstandard")
PACKED_BODIES = [
    pytest.param("gzip", gzip.compress, id="gzip"),
    pytest.param("X-GZip", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]), id="two members"),
    pytest.param("deflate", zlib.compress, id="deflate"),
    pytest.param("deflate", bare_deflate, id="bare deflate"),
    pytest.param("br", pack_brotli, id="br"),
    pytest.param("zstd", pack_zstd, id="zstd"),
    pytest.param("zstd", lambda data: pack_zstd(data[:9]) + pack_zstd(data[9:]), id="two frames"),
    pytest.param("gzip, identity,deflate", lambda data: zlib.compress(gzip.compress(data)), id="one in the other"),
    pytest.param("identity", bytes, id="identity"),
]  # fmt: skip


def unpacked(codings, packed, size, limit=2**20):
    """What a body unpacks to that comes in parts of this size; and how large its steps are."""
    unpackers, steps = ztoapi.unpackers_for([codings], limit), []
    for start in range(0, len(packed), size):
        steps += ztoapi.unpacking(packed[start : start + size], unpackers)
    for unpacker in unpackers:
        unpacker.close()
    return b"".join(steps), [len(step) for step in steps]


@pytest.mark.parametrize(("codings", "pack"), PACKED_BODIES)
def test_a_packed_body_is_unpacked_wherever_it_is_cut(codings, pack):
    text = Random(1).randbytes(500) + b"hello " * 20_000
    packed = pack(text)
    for size in (1, 2, 7, 300, len(packed)):
        assert unpacked(codings, packed, size)[0] == text


@pytest.mark.parametrize(("codings", "pack"), PACKED_BODIES[:-1])
def test_a_packed_body_that_is_cut_off_or_none_is_broken(codings, pack):
    packed = pack(b"hello " * 99)
    for broken in (packed[:-1], packed[:9], b"\xffjunk" + packed, packed + b"junk!"):
        with pytest.raises(ztoapi.BrokenBody):
            unpacked(codings, broken, 50)


@pytest.mark.parametrize(("codings", "pack"), PACKED_BODIES[:-1])
def test_a_body_that_unpacks_to_much_does_so_in_steps_and_not_beyond_the_limit(codings, pack):
    packed = pack(bytes(2**23))
    _, steps = unpacked(codings, packed, len(packed), 2**23)
    assert max(steps) <= (2**23 if ztoapi.first_module("zstandard") else 2**17)
    with pytest.raises(web.HTTPRequestEntityTooLarge):
        unpacked(codings, packed, len(packed), 2**23 - 1)


def coding_of_zstandard(zstandard):
    return ztoapi.Coding(lambda _: ztoapi.ZstandardStream(zstandard), zstandard.ZstdError)


def test_zstandard_unpacks_without_a_limit_of_its_own():
    zstandard = pytest.importorskip("zstandard")
    unpacker = ztoapi.Unpacker(coding_of_zstandard(zstandard), 2**24)
    data = Random(1).randbytes(5000) + bytes(2**23)
    packed = zstandard.compress(data) + zstandard.compress(b"more")
    assert b"".join(unpacker.feed(packed)) == data + b"more"
    unpacker.close()


def test_what_lies_between_two_codings_counts_too():
    inner = gzip.compress(b"") * 60_000  # over a megabyte that unpacks to nothing
    with pytest.raises(web.HTTPRequestEntityTooLarge):
        unpacked("gzip, deflate", zlib.compress(inner), 2**20)


def test_a_window_of_zstd_larger_than_8_mb_is_refused():
    zstandard = pytest.importorskip("zstandard")
    how = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=how).compressobj()
    packed = packer.compress(b"x") + packer.flush()
    for coding in (coding_of_zstandard(zstandard), ztoapi.readable_codings()["zstd"]):
        with pytest.raises(ztoapi.BrokenBody):
            list(ztoapi.Unpacker(coding, 2**20).feed(packed))


@in_loop
@pytest.mark.parametrize("path", ["chat/completions", "files", "embeddings"])
@pytest.mark.parametrize(("codings", "pack"), PACKED_BODIES)
async def test_a_packed_body_is_read(client, zai, path, codings, pack):
    zai.headers, zai.parts = {"Content-Type": "application/json"}, [DOCUMENT]
    data, headers = json.dumps(HELLO).encode(), KEY | {"Content-Encoding": codings}
    headers |= {"Content-Type": "application/json" if path != "files" else "image/png"}
    async with client.post(f"/v1/{path}", data=pack(data), headers=headers) as response:
        assert response.status == 200, await response.text()
    assert json.loads(zai.asked[0][3])["messages"] == HELLO["messages"]


@in_loop
@pytest.mark.parametrize("path", ["chat/completions", "files", "messages"])
@pytest.mark.parametrize("codings", ["snappy", "gzip, none", "gzip,gzip,gzip,gzip"])
async def test_a_coding_that_is_not_read_is_415_and_says_which_are(client, zai, path, codings):
    headers = KEY | {"Content-Encoding": codings}
    async with client.post(f"/v1/{path}", data=b"x", headers=headers) as response:
        message = error_of(await response.text())["message"]
        assert (response.status, response.headers["Accept-Encoding"] in message) == (415, True)
        assert {"gzip", "deflate"} <= set(response.headers["Accept-Encoding"].split(", "))
    assert zai.asked == []


@pytest.mark.parametrize(("coding", "package"), [("br", "Brotli"), ("zstd", "zstandard")])
def test_a_coding_whose_package_is_missing_is_named_with_it(monkeypatch, coding, package):
    monkeypatch.setattr(ztoapi, "first_module", lambda *_: None)
    monkeypatch.setattr(ztoapi, "readable_codings", ztoapi.readable_codings.__wrapped__)
    with pytest.raises(ztoapi.ProxyError, match=package) as refused:
        ztoapi.unpackers_for([coding], 1)
    assert refused.value.headers["Accept-Encoding"] == "deflate, gzip, x-gzip"


@in_loop
@pytest.mark.parametrize(
    ("request_line", "key", "status"),
    [
        ("POST /v1/nothing", "sk-your-key", 404),
        ("POST /v1/messages", "wrong", 401),
        ("POST /v1/models", "sk-your-key", 405),
        ("GET /health", "", 200),
    ],
)
@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
async def test_a_body_that_nobody_reads_is_not_unpacked(client, request_line, key, status, coding):
    head = f"{request_line} HTTP/1.1\r\nHost: localhost\r\nx-api-key: {key}\r\n"
    head += f"Content-Encoding: {coding}\r\nContent-Length: 9\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(head.encode() + b"not so...")  # would not unpack, and so end the connection
    answer = await asyncio.wait_for(reader.readuntil(b"}"), 5)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    writer.write(GET)
    assert b"HTTP/1.1 200 OK" in await asyncio.wait_for(reader.readuntil(b'"status"'), 5)
    writer.close()


@in_loop
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/files"])
async def test_a_packed_body_that_becomes_too_large_is_413(start, zai, path):
    client = await start(max_body_mb=1)
    headers = KEY | {"Content-Encoding": "gzip"}
    async with client.post(path, data=gzip.compress(bytes(2**21)), headers=headers) as response:
        assert (response.status, error_of(await response.text())["code"]) == (
            413,
            "request_too_large",
        )
    async with client.get("/health") as response:
        assert response.status == 200


WEBSOCKET = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@in_loop
@pytest.mark.parametrize(
    "path", ["/v1/responses", "/responses", "/api/v1/responses/", "/api/paas/v4/responses"]
)
async def test_codex_is_told_at_once_that_there_is_no_websocket(client, path):
    async with client.get(path, headers=KEY | WEBSOCKET) as response:
        assert (response.status, response.headers["Upgrade"]) == (426, "HTTP/1.1")
        assert error_of(await response.text()) == {
            "message": "There is no WebSocket here: send POST requests over HTTP.",
            "type": "invalid_request_error",
            "param": None,
            "code": "upgrade_required",
        }
    assert (await ask(client, ASKED, path))[0].status == 200


@in_loop
@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/v1/responses", {}),
        ("GET", "/v1/responses", WEBSOCKET | {"Upgrade": "h2c"}),
        ("PUT", "/v1/responses", WEBSOCKET),
        ("GET", "/v1/chat/completions", WEBSOCKET),
    ],
    ids=["no upgrade", "another protocol", "another method", "another path"],
)
async def test_only_codexs_probe_is_told_of_websockets(client, method, path, headers):
    async with client.request(method, path, headers=KEY | headers) as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")


@in_loop
async def test_a_wrong_path_is_404_and_a_wrong_method_405(client):
    async with client.get("/v1/nothing", headers=KEY) as response:
        assert (response.status, error_of(await response.text())["code"]) == (404, "unknown_url")
    async with client.get("/v1/chat/completions", headers=KEY) as response:
        assert (response.status, error_of(await response.text())["code"]) == (
            405,
            "method_not_allowed",
        )
        assert response.headers["Allow"] == "POST"


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_our_own_bug_is_told_without_a_traceback(start, caplog, stream):
    client = await start()

    async def broken(*_):
        raise RuntimeError("inner workings")
        yield

    client.app[ztoapi.UPSTREAM].open = contextlib.asynccontextmanager(broken)
    response, body = await ask(client, chat(stream=stream))
    assert (response.status, error_of(body)["code"]) == (500, "internal_error")
    assert "inner workings" not in body
    assert "RuntimeError: inner workings" in caplog.text


# ======== Endurance ========


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("answer", "waits"),
    [
        pytest.param(zai_refuses(1399), [0.5, 1], id="another 429"),
        pytest.param(zai_refuses(1234, 500), [0.5, 1], id="1234"),
        pytest.param((502, [b"<html>Bad Gateway</html>"]), [0.5, 1], id="HTML"),
        pytest.param([b"junk"], [0.5, 1], id="junk"),
        pytest.param([], [0.5, 1], id="nothing"),
        pytest.param([RESET], [0.5, 1], id="reset"),
        pytest.param([b'{"error":{"code":"1234","message":"no"}}'], [0.5, 1], id="in a 200"),
        pytest.param(
            [b'data: {"error":{"code":"1234","message":"no"}}\n\n'],
            [0.5, 1],
            id="in the first frame",
        ),
        pytest.param([DOCUMENT[:99], RESET], [0.5, 1], id="half a document"),
        pytest.param([stream_of(finish("network_error"))], [0.5, 1], id="network_error"),
    ],
)
async def test_a_passing_failure_before_the_first_byte_is_tried_again(
    client, zai, answer, waits, stream
):
    zai.answers = [answer, answer]
    response, body = await ask(client, chat(stream=stream))
    assert (response.status, "好😀" in body) == (200, True)
    assert (slept(client), len(zai.bodies)) == (waits, 3)
    zai.answers = [answer] * 3
    response, body = await ask(client, chat(stream=stream))
    assert (response.status >= 429, len(zai.bodies)) == (True, 6)


@in_loop
@pytest.mark.parametrize("code", [1000, 1113, 1210, 1211, 1261, 1301, 1308, 1311, 1313])
async def test_a_failure_that_stays_is_not_tried_again(client, zai, code):
    zai.answers = [zai_refuses(code, 400)]
    await ask(client)
    assert len(zai.bodies) == 1


@in_loop
@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(zai_refuses(1261, 400), id="1261"),
        pytest.param([stream_of(FULL_WINDOW)], id="a finish alone"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("path", "body"), [("chat/completions", HELLO), ("responses", ASKED)], ids=["chat", "responses"]
)
async def test_a_full_window_is_a_400_that_is_not_tried_again(
    client, zai, path, body, stream, answer
):
    zai.answers = [answer]
    response, text = await ask(client, {**body, "stream": stream}, f"/v1/{path}")
    error = error_of(text)
    assert (response.status, error["code"]) == (400, "context_length_exceeded")
    assert all(words in error["message"] for words in OVERFLOW_WORDS)
    assert len(zai.bodies) == 1


@in_loop
@pytest.mark.parametrize(
    ("path", "body"), [("chat/completions", HELLO), ("responses", ASKED)], ids=["chat", "responses"]
)
async def test_a_full_window_after_reasoning_ends_a_stream_in_the_same_words(
    client, zai, path, body
):
    zai.parts = [stream_of({"reasoning_content": "hm"}, done=""), stream_of(FULL_WINDOW)]
    _, text = await ask(client, {**body, "stream": True}, f"/v1/{path}")
    last_error = text[text.rindex("context_length_exceeded: ") :]
    assert "reduce the length of the messages" in last_error


@in_loop
async def test_claude_code_is_told_of_a_full_window_in_its_own_words(passing, zai):
    zai.answers = [zai_refuses(1261, 400, "Prompt exceeds max length")]
    response, text = await ask(passing, CLAUDE, "/v1/messages")
    assert (response.status, error_of(text)["type"]) == (400, "invalid_request_error")
    assert error_of(text)["message"].startswith("prompt is too long: ")


@in_loop
async def test_silence_is_not_tried_again(start, zai):
    client = await start(upstream_timeout=0.1)
    zai.answers = [[HANG]]
    assert (await ask(client))[0].status == 504
    assert len(zai.bodies) == 1


@in_loop
async def test_after_the_first_byte_nothing_is_tried_again(client, zai):
    zai.answers = [[FIRST, RESET]]
    await ask(client, chat(stream=True))
    assert len(zai.bodies) == 1


@in_loop
async def test_a_try_again_takes_the_next_key(start, zai):
    client = await start(zai_api_key=("a", "b"))
    zai.answers = [zai_refuses(1305)]
    await ask(client)
    assert sorted(zai.keys) == ["Bearer a", "Bearer b"]


@in_loop
async def test_a_key_without_balance_cools_down_while_others_serve(start, zai):
    client = await start(zai_api_key=("a", "b"))
    zai.accounts = {"a": zai_refuses(1113)}
    for text in "abcdefgh":
        assert (await ask(client, message(role="user", content=text)))[0].status == 200
    assert (zai.keys.count("Bearer a"), zai.keys.count("Bearer b"), slept(client)) == (1, 8, [])


@in_loop
async def test_while_all_keys_cool_down_one_request_in_ten_seconds_finds_out_and_the_others_are_told(
    client, zai
):
    zai.answers, zai.parts, asked = [zai_refuses(1113), zai_refuses(1308)], [DOCUMENT], []
    for seconds in (0, 9, 1, 9, 1, 0):
        client.app[ztoapi.CLOCK].time += seconds
        response, body = await ask(client)
        code = json.loads(body).get("error", {}).get("code")
        asked.append((response.status, code, response.headers.get("Retry-After"), len(zai.bodies)))
    assert asked == [
        (402, "insufficient_quota", "300", 1),
        (402, "insufficient_quota", "291", 1),
        (402, "quota_exceeded", "300", 2),
        (402, "quota_exceeded", "291", 2),
        (200, None, None, 3),
        (200, None, None, 4),
    ]


@in_loop
async def test_a_key_that_the_list_of_models_is_refused_to_cools_down(start, zai):
    zai.models = 401, {"error": {"code": "1000", "message": "Words"}}
    client = await start(zai_api_key=("a", "b"))
    await client.get("/v1/models", headers=KEY)
    for text in "abcdefgh":
        await ask(client, message(role="user", content=text))
    assert {*zai.keys} == {"Bearer b"}


@in_loop
async def test_a_request_asks_each_key_once_however_soon_its_quota_is_reset(start, zai):
    client = await start(limits=Limits(cooldown=0), zai_api_key=("a", "b"))
    zai.accounts = {"a": zai_refuses(1113), "b": zai_refuses(1113)}
    assert (await ask(client))[0].status == 402
    assert len(zai.bodies) == 3


@in_loop
async def test_the_first_refusal_too_says_when_the_quota_is_reset(client, zai):
    client.app[ztoapi.CLOCK].epoch = 1789144541.0 - 3600 - client.app[ztoapi.CLOCK].time
    zai.answers = [zai_refuses(1308, text="Your limit will reset at 2026-09-12 00:35:41")]
    assert (await ask(client))[0].headers["Retry-After"] == "3600"
    assert (await ask(client, chat(model="glm-4.7-flash")))[0].status == 200


@in_loop
async def test_codex_is_not_told_to_wait_for_the_quota(client, zai):
    zai.answers = [zai_refuses(1308)]
    response, _ = await ask(client, ASKED, "/v1/responses")
    assert (response.status, "Retry-After" in response.headers) == (402, False)


@in_loop
@pytest.mark.parametrize("code", [1000, 1113, 1308, 1309, 1313, 1211, 1311])
async def test_a_plan_is_used_first_and_the_next_base_when_it_cannot_be(
    start, zai, other_zai, code
):
    client = await start(zai_api_key=("plan", f"payg@{other_zai.url}"))
    for answer in (None, zai_refuses(code), zai_refuses(code)):
        zai.accounts = {"plan": answer}
        assert (await ask(client))[0].status == 200
    assert (zai.keys, other_zai.keys) == (["Bearer plan"] * 2, ["Bearer payg"] * 2)


@in_loop
@pytest.mark.parametrize(
    "answer",
    [zai_refuses(1302), zai_refuses(1305), (502, [b""]), [RESET]],
    ids=["1302", "1305", "502", "reset"],
)
async def test_the_next_base_does_not_serve_because_the_one_before_is_busy_or_fails(
    start, zai, other_zai, answer
):
    client = await start(zai_api_key=("plan", f"payg@{other_zai.url}"), rate_limit_wait=0)
    zai.answers = [answer] * 3
    assert (await ask(client))[0].status >= 429
    assert other_zai.bodies == []


@in_loop
async def test_ten_conversations_of_five_turns_stay_with_their_key(start, zai):
    client, keys = await start(zai_api_key=("a", "b")), {}
    for turn in range(5):
        for name in "abcdefghij":
            said = [{"role": "user", "content": f"{name}{i}"} for i in range(turn + 1)]
            await ask(client, chat(messages=[{"role": "system", "content": "Be brief."}, *said]))
            keys.setdefault(name, set()).add(zai.keys[-1])
    assert sorted(map(len, keys.values())) == [1] * 10
    assert set.union(*keys.values()) == {"Bearer a", "Bearer b"}


@in_loop
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_a_conversation_is_known_by_its_prompt_cache_key(start, zai, path):
    client = await start(zai_api_key=("a", "b"))
    for number in range(6):
        words = (
            {"input": f"{number}"}
            if "responses" in path
            else {"messages": [{"role": "user", "content": f"{number}"}]}
        )
        await ask(client, {"model": "glm-4.6", "prompt_cache_key": "one", **words}, path)
    assert len({*zai.keys}) == 1


@in_loop
async def test_forty_requests_of_one_client_do_not_hold_up_another(start, zai):
    client = await start(max_concurrency=1, default_key=("sk-forty", "sk-one"))
    zai.parts, answered = [0.01, DOCUMENT], []

    async def request(key):
        await ask(client, headers={"x-api-key": key})
        answered.append(key)

    waiting = [asyncio.create_task(request("sk-forty")) for _ in range(40)]
    while (
        len(client.app[ztoapi.UPSTREAM].queues) == 0
        or len(client.app[ztoapi.UPSTREAM].queue("glm-4.6").waiting) < 39
    ):
        await asyncio.sleep(0.01)
    await request("sk-one")
    assert len(answered) < 10
    await ztoapi.end_tasks(waiting)


LOAD = [
    pytest.param(zai_refuses(1302), id="1302"),
    pytest.param(zai_refuses(1305), id="1305"),
    pytest.param((429, [b"slow down"]), id="a 429 without a code"),
    pytest.param([b'{"error":{"code":"1305","message":"busy"}}'], id="in a 200"),
    pytest.param([b'data: {"error":{"code":"1302","message":"busy"}}\n\n'], id="in a frame"),
]


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("refusal", LOAD)
async def test_a_refusal_for_load_is_waited_out(start, zai, refusal, stream):
    client = await start(max_retries=0)
    zai.answers = [refusal] * 5
    response, body = await ask(client, chat(stream=stream))
    assert (response.status, "好😀" in body, len(zai.asked)) == (200, True, 6)


@in_loop
@pytest.mark.parametrize("refusal", LOAD)
async def test_a_client_is_told_of_load_after_a_while_and_when_to_come_again(start, zai, refusal):
    client = await start(rate_limit_wait=20)
    zai.status, zai.parts = refusal if isinstance(refusal, tuple) else (200, refusal)
    started = client.app[ztoapi.CLOCK].now()
    response, body = await ask(client)
    assert (response.status, error_of(body)["code"]) == (429, "rate_limit_exceeded")
    assert 20 <= client.app[ztoapi.CLOCK].now() - started < 36
    assert 1 <= int(response.headers["Retry-After"]) <= 15
    assert "x-should-retry" not in response.headers


@in_loop
async def test_where_zai_says_when_nobody_asks_before_that(client, zai):
    zai.headers, zai.answers = {"Retry-After": "40"}, [zai_refuses(1302)]
    started = client.app[ztoapi.CLOCK].now()
    zai.parts = [DOCUMENT]
    assert (await ask(client))[0].status == 200
    assert client.app[ztoapi.CLOCK].now() - started >= 40


@in_loop
async def test_a_time_that_is_too_late_is_told_at_once(client, zai):
    zai.headers, zai.answers = {"Retry-After": "500"}, [zai_refuses(1302)]
    response, _ = await ask(client)
    assert (response.status, response.headers["Retry-After"], len(zai.asked)) == (429, "500", 1)


@in_loop
async def test_another_key_with_room_serves_what_one_refuses_for_load(start, zai):
    client = await start(zai_api_key=("a", "b"))
    zai.accounts = {"a": zai_refuses(1302)}
    started = client.app[ztoapi.CLOCK].now()
    for text in "abcdefgh":
        assert (await ask(client, message(role="user", content=text)))[0].status == 200
    assert zai.keys.count("Bearer b") == 8
    assert client.app[ztoapi.CLOCK].now() - started < 10


@in_loop
async def test_another_model_serves_before_a_client_is_told_of_load(client, zai):
    zai.answers = [
        zai_refuses(1305)
    ] * 3  # at once, after 2 s and after 4 more; the next would be too late
    response, _ = await ask(client, chat(fallbacks=["glm-4.5"]))
    assert (response.status, response.headers["x-ztoapi-model"]) == (200, "glm-4.5")
    assert [body["model"] for body in zai.bodies] == ["glm-4.6"] * 3 + ["glm-4.5"]


@in_loop
async def test_a_refused_request_keeps_its_turn_and_nobody_runs_into_the_same_refusal(start, zai):
    client = await start()
    zai.answers = [zai_refuses(1302)] * 4
    zai.takes = 1

    def request(name):
        return asyncio.create_task(ask(client, message(role="user", content=name)))

    client.app[ztoapi.CLOCK].tick = 0.1  # more than it takes to stand in the queue again
    first = request("first")
    queue = client.app[ztoapi.UPSTREAM].queue("glm-4.6")
    assert await eventually(lambda: queue.waiting or len(zai.asked) > 1)  # it was refused
    await asyncio.gather(first, *(request(f"{number}") for number in range(5)))
    texts = [body["messages"][0]["content"] for body in zai.bodies]
    assert texts[:5] == ["first"] * 5


@in_loop
async def test_an_answer_that_ends_wakes_who_waits_for_its_key(start, zai):
    client = await start()
    queue = client.app[ztoapi.UPSTREAM].queue("glm-4.6")
    client.app[ztoapi.CLOCK].call_later = lambda *_: None  # no time passes
    zai.takes, zai.parts = 1, [0.2, RECORDED]
    answers = await asyncio.gather(*(ask(client) for _ in range(3)))
    assert [response.status for response, _ in answers] == [200] * 3
    assert (queue.in_flight, queue.waiting) == (0, [])


@in_loop
async def test_a_place_is_free_when_zais_answer_has_ended_whatever_its_connection_does(start, zai):
    limits = Limits(finish_timeout=LONGEST_TEST, shutdown_grace=0)
    client = await start(max_concurrency=1, limits=limits)
    zai.answers = [[RECORDED, HANG]]
    queue = client.app[ztoapi.UPSTREAM].queue("glm-4.6")
    asked = chat(stream=True)
    answers = await asyncio.gather(ask(client, asked), ask(client, asked))
    assert [said(stream) for _, stream in answers] == ["你好😀"] * 2
    assert (queue.in_flight, [each.answering for each in queue.patience.values()]) == (0, [0])


TWO_KEYS = {"first_token_timeout": 20, "zai_api_key": ("a", "b"), "max_retries": 0}
SILENT = 200, [b": wait\n\n", 600.0]


@pytest.mark.parametrize(
    "beginning", [[600.0], [b": wait\n\n", 600.0]], ids=["nothing", "comments"]
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@quickly(**TWO_KEYS)
async def test_a_slow_answer_is_left_for_another_key_which_is_no_retry(
    client, zai, beginning, stream
):
    zai.accounts = {"a": (200, beginning)}
    for text in "abcdefgh":
        asked = message(role="user", content=text) | {"stream": stream}
        assert (await ask(client, asked))[0].status == 200
    assert zai.keys.count("Bearer b") == 8
    assert client.app[ztoapi.UPSTREAM].retries_made == {"other_keys": len(zai.asked) - 8}
    slow = len(zai.asked) - 8
    assert 20 * slow <= asyncio.get_running_loop().time() < 20 * slow + 15


@quickly(**TWO_KEYS)
async def test_a_slow_answer_is_left_for_another_model(client, zai):
    zai.answers = [SILENT, SILENT]
    response, _ = await ask(client, chat(fallbacks=["glm-4.5"]))
    assert (response.status, response.headers["x-ztoapi-model"]) == (200, "glm-4.5")
    assert [body["model"] for body in zai.bodies] == ["glm-4.6", "glm-4.6", "glm-4.5"]
    assert {*zai.keys[:2]} == {"Bearer a", "Bearer b"}


@quickly(first_token_timeout=20, upstream_timeout=100)
async def test_a_slow_answer_is_waited_for_where_there_is_no_other(client, zai):
    zai.answers = [[b": wait\n\n", 90.0, RECORDED]]
    assert ((await ask(client))[0].status, len(zai.asked)) == (200, 1)


@quickly(**TWO_KEYS)
async def test_an_answer_that_has_begun_is_waited_for(client, zai):
    zai.answers = [[FIRST, 90.0, RECORDED]]
    assert ((await ask(client))[0].status, len(zai.asked)) == (200, 1)


@quickly(**TWO_KEYS, upstream_timeout=100)
async def test_the_last_who_may_answer_is_waited_for_and_then_told_as_silent(client, zai):
    zai.parts = [600.0]
    response, body = await ask(client)
    assert (response.status, error_of(body)["code"], len(zai.asked)) == (504, "zai_timeout", 2)
    assert asyncio.get_running_loop().time() == pytest.approx(120, abs=10)


@in_loop
async def test_a_whole_answer_counts_as_taken_when_it_begins(client, zai):
    zai.parts = [FIRST, HANG]
    asking = asyncio.create_task(ask(client))
    queue = client.app[ztoapi.UPSTREAM].queue("glm-4.6")
    assert await eventually(lambda: [each.answering for each in queue.patience.values()] == [1])
    asking.cancel()
    assert await eventually(lambda: [each.answering for each in queue.patience.values()] == [0])


@in_loop
async def test_a_request_waits_for_our_own_answers_however_long_they_take(start, zai):
    client = await start(rate_limit_wait=1)
    zai.answers, zai.takes = [[FIRST, 0.5, RECORDED]], 1
    long = asyncio.create_task(ask(client))
    assert await eventually(lambda: zai.asked)
    started = client.app[ztoapi.CLOCK].now()
    response, _ = await ask(client)
    assert (response.status, (await long)[0].status) == (200, 200)
    assert client.app[ztoapi.CLOCK].now() - started > 2


@in_loop
async def test_another_model_serves_while_our_own_answers_keep_the_first_one_busy(client, zai):
    zai.answers = [[FIRST, HANG]]
    long = asyncio.create_task(ask(client, chat(stream=True)))
    assert await eventually(lambda: zai.asked)
    busy, takes = zai_refuses(1305), (200, None)
    zai.next_answer = lambda: busy if zai.bodies[-1]["model"] == "glm-4.6" else takes
    clock = client.app[ztoapi.CLOCK]
    clock.jitter = partial(float, 0.5)
    started = clock.now()
    response, _ = await ask(client, chat(fallbacks=["glm-4.5"]))
    waited = clock.now() - started
    assert (response.headers["x-ztoapi-model"], 10 <= waited < 12) == ("glm-4.5", True)
    long.cancel()


@in_loop
async def test_nobody_overtakes_a_refused_request_while_its_connection_is_released(start):
    upstream, order, released = (await start()).app[ztoapi.UPSTREAM], [], asyncio.Event()
    upstream.queue("glm-5").limits[upstream.keys.keys[0]].limit = 1

    async def attempt(name, slot, owner):
        order.append(name)
        if order == ["refused"]:
            owner.push_async_callback(released.wait)
            raise refusal(1302)

    async def request(name):
        async with AsyncExitStack() as owner:
            await upstream.with_retries(CHAT, Caller(), partial(attempt, name), owner)

    asking = [asyncio.create_task(request(name)) for name in ("refused", "later")]
    await asyncio.sleep(0)
    upstream.clock.time += 5  # the key has opened
    upstream.queue("glm-5").admit()
    released.set()
    await asyncio.gather(*asking)
    assert order == ["refused", "refused", "later"]


@in_loop
async def test_messages_wait_out_a_refusal_for_load_too(start, zai):
    passing = await start(max_retries=0)
    zai.answers = [zai_refuses(1302), zai_refuses(1305, 529), (429, [b"slow down"])]
    response, _ = await ask(passing, CLAUDE, "/v1/messages")
    assert (response.status, len(zai.asked)) == (200, 4)


@in_loop
async def test_other_paths_tell_when_zai_wants_to_be_asked_again(client, zai):
    zai.headers, zai.answers = {"Retry-After": "40"}, [zai_refuses(1302)]
    response, _ = await ask(client, {"model": "embedding-3", "input": "hi"}, "/v1/embeddings")
    assert (response.status, response.headers["Retry-After"]) == (429, "40")


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_server_that_stops_tells_those_who_wait_out_a_refusal(start, zai, stream):
    client = await start(limits=Limits(shutdown_grace=0.2))
    client.app[ztoapi.CLOCK].call_later = lambda *_: None  # no time passes
    zai.status, zai.parts = zai_refuses(1305)
    asking = asyncio.create_task(ask(client, chat(stream=stream)))
    queue = client.app[ztoapi.UPSTREAM].queue("glm-4.6")
    assert await eventually(lambda: queue.waiting)
    await ztoapi.drain(client.app)
    response, body = await asking
    assert (response.status, "server_stopping" in body) == (503, True)
    assert (queue.waiting, queue.in_flight, queue.tickets) == ([], 0, 0)


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_who_leaves_while_waiting_out_a_refusal_leaves_nothing_behind(start, zai, stream):
    client = await start()
    client.app[ztoapi.CLOCK].call_later = lambda *_: None  # no time passes
    zai.status, zai.parts = zai_refuses(1305)
    asking = asyncio.create_task(ask(client, chat(stream=stream)))
    queue = client.app[ztoapi.UPSTREAM].queue("glm-4.6")
    assert await eventually(lambda: queue.waiting)
    asking.cancel()
    assert await eventually(lambda: (queue.waiting, queue.in_flight, queue.tickets) == ([], 0, 0))


@in_loop
async def test_a_stream_is_kept_alive_while_a_refusal_is_waited_out(lively, zai):
    lively.app[ztoapi.CLOCK].call_later = lambda *_: None  # no time passes
    zai.status, zai.parts = zai_refuses(1305)
    async with lively.post(CHAT_PATH, json=chat(stream=True), headers=KEY) as response:
        assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"


CHAT_PATH = "/v1/chat/completions"


@in_loop
async def test_a_whole_answer_that_ran_long_is_asked_for_only_once_more(start, zai):
    client = await start(max_retries=5)
    clock = client.app[ztoapi.CLOCK]
    asked = FakeZai.answer

    async def slow(self, request):
        clock.time += 61
        return await asked(self, request)

    zai.answer = slow.__get__(zai)
    zai.parts = [FIRST, RESET]
    assert (await ask(client))[0].status == 502
    assert len(zai.asked) == 2


@in_loop
async def test_no_more_are_in_flight_than_may_be_also_while_one_waits_for_its_next_try(start, zai):
    client = await start(max_concurrency=1)
    clock, woken, answered = client.app[ztoapi.CLOCK], asyncio.Event(), asyncio.Event()
    clock.sleep = lambda _: woken.wait()
    zai.answers = [zai_refuses(1305)]
    sleeping = asyncio.create_task(ask(client, chat(model="new")))
    while not zai.asked or zai.open:
        await asyncio.sleep(0.01)
    await ask(client, chat(model="newer"))  # for which queues that nobody uses are forgotten
    zai.answers = [[answered, DOCUMENT]] * 2
    busy = asyncio.create_task(ask(client, chat(model="new")))
    while not zai.open:
        await asyncio.sleep(0.01)
    woken.set()
    await asyncio.sleep(0.05)  # in which it asks, if it may
    assert zai.open == 1
    answered.set()
    assert {response.status for response, _ in await asyncio.gather(sleeping, busy)} == {200}


@in_loop
@pytest.mark.parametrize("code", [1113, 1211, 1308, 1310, 1311])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_another_model_serves_where_the_first_cannot(client, zai, code, stream):
    zai.answers = [zai_refuses(code)]
    response, body = await ask(
        client, chat(fallbacks=["zai/glm-4.7-flash", "glm-4.5"], stream=stream)
    )
    assert (response.status, response.headers["x-ztoapi-model"]) == (200, "glm-4.7-flash")
    assert zai.bodies[-1]["model"] == "glm-4.7-flash"
    assert '"model":"glm-4.6"' in body


@in_loop
async def test_the_settings_fallbacks_count_where_the_request_has_none(start, zai):
    client = await start(fallback_models=("glm-4.5",))
    zai.answers = [zai_refuses(1311)]
    assert (await ask(client))[0].headers["x-ztoapi-model"] == "glm-4.5"
    zai.answers = [zai_refuses(1311), zai_refuses(1301, 400)]
    response, body = await ask(client, chat(fallbacks=["glm-5"]))
    assert (response.status, error_of(body)["code"]) == (400, "content_filter")
    assert [body["model"] for body in zai.bodies] == ["glm-4.6", "glm-4.5", "glm-4.6", "glm-5"]
    zai.answers = [zai_refuses(1311)]
    assert (await ask(client, chat(fallbacks=[])))[0].status == 403


@in_loop
async def test_a_fallback_that_does_not_see_is_passed_over(client, zai):
    zai.answers = [zai_refuses(1311)]
    picture = {"type": "image_url", "image_url": {"url": "https://x/y.png"}}
    body = {
        "model": "glm-4.6v",
        "messages": [{"role": "user", "content": [picture]}],
        "fallbacks": ["glm-4.6", "glm-4.5v"],
    }
    assert (await ask(client, body))[0].headers["x-ztoapi-model"] == "glm-4.5v"


@in_loop
async def test_a_request_that_is_wrong_does_not_fall_back(client, zai):
    zai.answers = [zai_refuses(1301, 400)]
    assert (await ask(client, chat(fallbacks=["glm-5"])))[0].status == 400
    assert len(zai.bodies) == 1


@in_loop
@pytest.mark.parametrize("takes", [1, 3])
async def test_a_crowd_waits_its_turn_instead_of_failing(start, zai, takes):
    client = await start(max_retries=0)
    client.app[ztoapi.CLOCK].tick = 0.05  # so that an answer takes less time than a wait
    zai.takes, zai.parts = takes, [FIRST, *[b": wait\n\n"] * 20, RECORDED]
    answers = await asyncio.gather(*(ask(client, chat(stream=True)) for _ in range(30)))
    assert {response.status for response, _ in answers} == {200}
    assert len(zai.bodies) < 30 + 20


@in_loop
async def test_no_more_than_max_concurrency_are_in_flight(start, zai):
    client = await start(max_concurrency=2)
    zai.takes, zai.parts = 2, [FIRST, *[b": wait\n\n"] * 20, RECORDED]
    answers = await asyncio.gather(*(ask(client) for _ in range(10)))
    assert ({response.status for response, _ in answers}, len(zai.bodies)) == ({200}, 10)


@in_loop
async def test_the_frames_of_a_large_answer_are_sent_one_by_one_and_are_the_same(
    start, client, monkeypatch
):
    _, together = await ask(client, chat(stream=True))
    client = await start(limits=Limits(joined_size=0))
    writes, write = [], ztoapi.SSEResponse.write
    monkeypatch.setattr(
        ztoapi.SSEResponse, "write", lambda self, data: writes.append(data) or write(self, data)
    )
    assert (await ask(client, chat(stream=True)))[1] == together
    assert [data.count(b"\n\n") for data in writes] == [1] * together.count("\n\n")


@in_loop
async def test_a_silent_stream_is_opened_late_and_kept_alive(lively, zai):
    zai.parts = [HANG]
    async with lively.post("/v1/chat/completions", json=chat(stream=True), headers=KEY) as response:
        for _ in range(2):
            assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"


@in_loop
async def test_the_timer_of_a_stream_ends_with_it(client, monkeypatch):
    streams = []

    class Watched(ztoapi.SSEResponse):
        def __init__(self, *args):
            super().__init__(*args)
            streams.append(self)

    monkeypatch.setattr(ztoapi, "SSEResponse", Watched)
    await ask(client, chat(stream=True))
    assert streams[0].timer.timer.cancelled()


@in_loop
async def test_when_to_ask_again_is_in_the_words_of_a_late_refusal(lively, zai):
    zai.headers, zai.answers = {"Retry-After": "500"}, [(429, [0.2, b"slow down"])]
    _, stream = await ask(lively, chat(stream=True))
    assert "Try again in 500 seconds. (" in stream


@in_loop
async def test_a_failure_after_a_comment_is_a_frame(lively, zai):
    zai.parts = [b": wait\n\n", 0.2, b'data: {"error":{"code":"1301","message":"no"}}\n\n']
    response, stream = await ask(lively, chat(stream=True))
    assert (response.status, stream[:14]) == (200, ": keep-alive\n\n")
    assert '"code":"content_filter"' in stream
    assert stream.endswith("data: [DONE]\n\n")


@in_loop
async def test_after_zais_last_word_nothing_that_happens_to_the_connection_matters(start, zai):
    client = await start(limits=Limits(finish_timeout=0.1))
    said_all = RECORDED.removesuffix(b"data: [DONE]\n\n")
    for rest in (RESET, HANG):
        zai.parts = [said_all, rest]
        assert said((await ask(client, chat(stream=True)))[1]) == "你好😀"
        assert (await ask(client))[0].status == 200


def http_answer(body, *headers, status="200 OK"):
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*head, "", body]).encode()


class RawZai:
    """A Z.ai that answers with bytes as they are; `written` has what it writes to, by connection."""

    def __init__(self, answer):
        self.answer, self.written = answer, []

    async def serve(self, reader, writer):
        self.written.append(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while request := await reader.readuntil(b"\r\n\r\n"):
                await self.answer(request.split()[1].decode(), writer)


@pytest_asyncio.fixture
async def raw_zai(start):
    """Starts ztoapi in front of a RawZai."""
    async with contextlib.AsyncExitStack() as stack:

        async def started(answer, **settings):
            zai = RawZai(answer)
            server = await asyncio.start_server(zai.serve, "127.0.0.1", 0)
            stack.callback(lambda: [writer.close() for writer in zai.written])
            stack.callback(server.close)
            port = server.sockets[0].getsockname()[1]
            base = f"http://127.0.0.1:{port}/api/paas/v4"
            return zai, await start(zai_base_url=base, **settings)

        yield started


async def tell_path(path, writer):
    writer.write(http_answer(path.rpartition("/")[2]))


async def get_file(client, name):
    async with client.get(f"/v1/files/{name}", headers=KEY) as response:
        return response.status, await response.text()


@in_loop
@pytest.mark.parametrize("seconds", [0, 0.05], ids=["not read yet", "read"])
@pytest.mark.parametrize(
    "late",
    [
        pytest.param(http_answer("of-anna"), id="a whole answer"),
        pytest.param(http_answer("of-anna")[:20], id="half a head"),
        pytest.param(b"\r\n", id="an empty line"),
    ],
)
async def test_what_comes_late_on_an_idle_connection_reaches_nobody(raw_zai, late, seconds):
    zai, client = await raw_zai(tell_path)
    assert await get_file(client, "anna") == (200, "anna")
    assert await get_file(client, "bert") == (200, "bert")
    assert len(zai.written) == 1
    zai.written[0].write(late)
    await asyncio.sleep(seconds)
    assert await get_file(client, "carl") == (200, "carl")
    assert len(zai.written) == 2


@in_loop
async def test_an_answer_behind_an_answer_reaches_nobody(raw_zai):
    async def answer_twice(path, writer):
        await tell_path(path, writer)
        writer.write(http_answer("of-anna"))

    _, client = await raw_zai(answer_twice)
    for name in ("anna", "bert", "carl"):
        assert await get_file(client, name) == (200, name)


@in_loop
@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
async def test_a_body_behind_an_answer_that_has_none_reaches_nobody(raw_zai, status):
    body = http_answer("of-anna").decode()

    async def answer(path, writer):
        if len(zai.written) > 1:
            await tell_path(path, writer)
            return
        head, _, late = http_answer(body, status=status).partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(late)
        behind.set()

    behind = asyncio.Event()
    zai, client = await raw_zai(answer)
    await get_file(client, "anna")
    await behind.wait()
    assert await get_file(client, "bert") == (200, "bert")


@in_loop
@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(http_answer("{}") + b"of-anna", id="more than its length"),
        pytest.param(http_answer("{}", "Content-Length: 3"), id="two lengths"),
        pytest.param(http_answer("{}", "X: " + 30_000 * "x"), id="a long header"),
        pytest.param(http_answer("{}", "Content-Encoding: gzip"), id="packed, and broken"),
        pytest.param(b"junk\r\n\r\n", id="no HTTP"),
    ],
)
async def test_an_answer_that_is_no_sound_http_is_an_error_of_one_request(raw_zai, answer, caplog):
    async def broken_at_first(path, writer):
        if len(zai.written) > 1:
            await tell_path(path, writer)
        else:
            writer.write(answer)

    zai, client = await raw_zai(broken_at_first)
    status, text = await get_file(client, "anna")
    assert (status, error_of(text)["code"]) == (502, "zai_unavailable")
    assert await get_file(client, "bert") == (200, "bert")
    assert "Traceback" not in caplog.text


@in_loop
async def test_headers_of_zais_are_cleaned_before_they_are_passed_on(raw_zai):
    async def answer(path, writer):
        header = "Content-Disposition: attachment; filename=\x01a\x0b\x7f.txt"
        kind = "Content-Type: text/plain\x01"
        writer.write(http_answer("{}", header, kind, "X-Log-Id: \x01log\x0b"))

    _, client = await raw_zai(answer)
    async with client.get("/v1/files/a", headers=KEY) as response:
        assert (response.status, await response.text()) == (200, "{}")
        assert response.headers["Content-Disposition"] == "attachment; filename=a.txt"


@in_loop
@pytest.mark.parametrize(
    ("encoding", "body", "wanted"),
    [
        pytest.param("GZIP", gzip.compress(b"{}"), (200, b"{}"), id="gzip"),
        pytest.param("identity", b"{}", (200, b"{}"), id="not packed"),
        pytest.param("compress", b"\x1f\x9d", (502, ztoapi.PACKED), id="unknown"),
        pytest.param("gzip, br", b"\x1f\x8b", (502, ztoapi.PACKED), id="packed twice"),
    ],
)
async def test_an_answer_packed_unasked_is_unpacked_or_an_error(raw_zai, encoding, body, wanted):
    async def answer(_, writer):
        head = http_answer("", f"Content-Encoding: {encoding}")
        writer.write(head.replace(b"Length: 0", b"Length: %d" % len(body)) + body)

    _, client = await raw_zai(answer, max_retries=0)
    async with client.get("/v1/files/a", headers=KEY) as response:
        text = await response.read()
    told = text if response.status == 200 else error_of(text)["message"]
    assert (response.status, told) == wanted


@in_loop
@pytest.mark.parametrize("pause", [0.02, 60], ids=["without end", "one"])
async def test_informational_answers_are_silence(raw_zai, pause):
    async def inform(_, writer):
        while not writer.is_closing():
            writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
            await asyncio.sleep(pause)

    _, client = await raw_zai(inform, upstream_timeout=0.2)
    status, text = await asyncio.wait_for(get_file(client, "a"), 10)
    assert (status, error_of(text)["code"]) == (504, "zai_timeout")


@in_loop
@pytest.mark.parametrize("before", ["", "anna"], ids=["new connection", "kept one"])
async def test_a_head_that_drips_is_silence(raw_zai, before):
    async def drip(path, writer):
        if path.endswith("anna"):
            await tell_path(path, writer)
            return
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while not writer.is_closing():
            writer.write(b"X: y\r\n")
            await asyncio.sleep(0.1)

    zai, client = await raw_zai(drip, upstream_timeout=0.4)
    if before:
        assert await get_file(client, before) == (200, before)
        await asyncio.sleep(0.5)  # that nothing comes while nothing is asked is no silence
    status, text = await asyncio.wait_for(get_file(client, "bert"), 10)
    assert (status, error_of(text)["code"]) == (504, "zai_timeout")
    assert len(zai.written) == 1


@in_loop
async def test_each_request_on_a_kept_connection_has_a_silence_of_its_own(raw_zai):
    async def think(path, writer):
        await asyncio.sleep(0.6)
        await tell_path(path, writer)

    zai, client = await raw_zai(think, upstream_timeout=1)
    for name in ("anna", "bert"):
        assert await get_file(client, name) == (200, name)
    assert len(zai.written) == 1


@in_loop
async def test_nothing_is_left_of_a_connection_that_has_ended(raw_zai):
    async def close(_, writer):
        writer.write(http_answer(ascii_only, "Connection: close"))

    def is_gone():
        gc.collect()
        return not [thing for thing in gc.get_objects() if type(thing) is ztoapi.ZaiConnection]

    ascii_only = json.dumps(json.loads(DOCUMENT))
    _, client = await raw_zai(close)
    assert (await ask(client))[0].status == 200
    assert await eventually(is_gone)


@in_loop
async def test_an_informational_answer_delays_nothing(raw_zai):
    async def inform(path, writer):
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await tell_path(path, writer)

    _, client = await raw_zai(inform)
    for name in ("anna", "bert"):
        assert await get_file(client, name) == (200, name)


@in_loop
async def test_a_connection_to_zai_serves_again(client, zai):
    zai.parts = [RECORDED, 0.02]
    for _ in range(3):
        await ask(client, chat(stream=True))
    assert len(zai.peers) == 1


@in_loop
async def test_comments_after_the_finish_do_not_delay_the_end(start, zai):
    client = await start(limits=Limits(finish_timeout=0.5))
    zai.parts = [RECORDED.removesuffix(b"data: [DONE]\n\n"), *[b": x\n\n", 0.02] * 1500]
    assert said((await asyncio.wait_for(ask(client, chat(stream=True)), 10))[1]) == "你好😀"


@in_loop
async def test_a_stopping_server_lets_answers_finish_and_tells_those_that_take_too_long(start, zai):
    client = await start(limits=Limits(shutdown_grace=0.3))
    zai.answers = [[FIRST, 0.1, RECORDED], [FIRST, HANG], [HANG]]
    asking = []
    for stream in (True, True, False):
        asking.append(asyncio.create_task(ask(client, chat(stream=stream))))
        assert await eventually(lambda: len(zai.bodies) == len(asking))
    await ztoapi.drain(client.app)
    (_, finished), (_, told), (refused_one, body) = await asyncio.gather(*asking)
    assert not client.app[ztoapi.IN_FLIGHT]
    assert said(finished).endswith("你好😀")
    assert parse_frames(told)[-1]["error"]["code"] == "server_stopping"
    assert (refused_one.status, error_of(body)["code"]) == (503, "server_stopping")
    assert await eventually(lambda: zai.open == 0)


@in_loop
async def test_a_stopping_server_closes_idle_connections_while_others_are_answered(client, zai):
    zai.parts = [FIRST, HANG]
    asking = asyncio.create_task(ask(client, chat(stream=True)))
    idle, silent = [await asyncio.open_connection("127.0.0.1", client.port) for _ in range(2)]
    idle[1].write(GET)
    assert (await idle[0].readline()).startswith(b"HTTP/1.1 200")
    assert await eventually(lambda: zai.bodies)
    client.server.runner.server.pre_shutdown()
    for reader, writer in (idle, silent):
        await asyncio.wait_for(reader.read(), 10)
        writer.close()
    assert not asking.done()
    asking.cancel()


# ======== Reasoning memory and vision ========

READS_A = {"name": "read", "arguments": '{"path": "a"}'}
LOOKS = stream_of(
    {"reasoning_content": "I should "},
    {"reasoning_content": "look."},
    {"content": "Let me look."},
    {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": READS_A}]},
    finish("tool_calls"),
)
READ_TOOLS = [{"type": "function", "function": {"name": "read"}}]


def turns(*calls, text="Let me look."):
    """A tool loop as a client sends it that drops reasoning."""
    said = {
        "role": "assistant",
        "content": text,
        "tool_calls": [{"id": "c1", "type": "function", "function": call} for call in calls],
    }
    return [
        *HELLO["messages"],
        said,
        {"role": "tool", "tool_call_id": "c1", "content": "It says a."},
    ]


def reasoning_sent(zai):
    asked = zai.bodies[-1]
    clear = asked.get("thinking", {}).get("clear_thinking")
    return [
        said.get("reasoning_content") for said in asked["messages"] if said["role"] == "assistant"
    ], clear


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("n", [1, 2])
async def test_an_agent_that_drops_reasoning_has_it_put_back_while_its_tool_loop_goes_on(
    client, zai, stream, n
):
    zai.parts = [LOOKS]
    await ask(client, chat(tools=READ_TOOLS, stream=stream, n=n))
    for messages, wanted in (
        (turns({**READS_A, "arguments": '{"path":"a"}'}), (["I should look."], False)),
        (turns({**READS_A, "arguments": '{"path":"b"}'}), ([None], None)),
        ([*turns(READS_A), {"role": "user", "content": "And now?"}], ([None], None)),
        (
            [
                *turns(READS_A)[:1],
                {**turns(READS_A)[1], "reasoning_content": "mine"},
                turns(READS_A)[2],
            ],
            (["mine"], False),
        ),
    ):
        await ask(client, chat(tools=READ_TOOLS, messages=messages))
        assert reasoning_sent(zai) == wanted
    await ask(
        client,
        chat(
            tools=READ_TOOLS,
            messages=turns(READS_A),
            thinking={"type": "enabled", "clear_thinking": True},
        ),
    )
    assert reasoning_sent(zai) == (["I should look."], True)


@in_loop
async def test_reasoning_is_not_put_back_for_another_clients_key(start, zai):
    client = await start(default_key=("sk-mine", "sk-yours"), reasoning_memory="all")
    zai.parts = [LOOKS]
    sent = []
    for key in ("sk-mine", "sk-yours", "sk-mine"):
        await ask(
            client, chat(tools=READ_TOOLS, messages=turns(READS_A)), headers={"x-api-key": key}
        )
        sent.append(reasoning_sent(zai))
        if key == "sk-mine":
            await ask(client, headers={"x-api-key": key})
    assert sent == [([None], None), ([None], None), (["I should look."], False)]


@in_loop
@pytest.mark.parametrize(
    ("setting", "wanted"), [("off", [None, None]), ("turn", [None, "想"]), ("all", ["想", "想"])]
)
async def test_the_operator_says_which_reasoning_is_put_back(start, zai, setting, wanted):
    client = await start(reasoning_memory=setting)
    await ask(client, chat(tools=READ_TOOLS))
    said = {"role": "assistant", "content": "你好😀"}
    await ask(client, chat(messages=[*HELLO["messages"], said, *HELLO["messages"], said]))
    assert reasoning_sent(zai)[0] == wanted


@in_loop
async def test_the_responses_api_too_has_reasoning_put_back(client, zai):
    zai.parts = [LOOKS]
    tools = [{"type": "function", "name": "read"}]
    await ask(client, {"model": "glm-4.6", "input": "你好", "tools": tools}, "/v1/responses")
    items = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "Let me look."},
        {"type": "function_call", "call_id": "c1", **READS_A},
        {"type": "function_call_output", "call_id": "c1", "output": "It says a."},
    ]
    await ask(client, {"model": "glm-4.6", "input": items, "tools": tools}, "/v1/responses")
    assert reasoning_sent(zai) == (["I should look."], False)


PICTURE = message(
    role="user", content=[{"type": "image_url", "image_url": {"url": "https://x/p.png"}}]
)


@in_loop
@pytest.mark.parametrize(
    ("body", "model"),
    [
        pytest.param(PICTURE, "glm-4.6v", id="a picture"),
        pytest.param(
            {**PICTURE, "model": "glm-5.3-flash"}, "glm-5.3-flash", id="a model that takes it"
        ),
        pytest.param(HELLO, "glm-4.6", id="no picture"),
    ],
)
async def test_the_vision_model_answers_instead_of_one_that_takes_no_images(
    start, zai, body, model
):
    client = await start(vision_model="zai/glm-4.6v")
    response, text = await ask(client, body)
    assert (response.status, zai.bodies[-1]["model"], json.loads(text)["model"]) == (
        200,
        model,
        body["model"],
    )


SHOWN_BEFORE = [*PICTURE["messages"], {"role": "assistant", "content": "a cat"}, QUESTION]
SHOWN_BY_TOOL = [
    QUESTION,
    ASSISTANT_CALLS,
    {"role": "tool", "tool_call_id": "c1", "content": ["ok", *PICTURE["messages"][0]["content"]]},
]
NOT_SHOWN = "[image https://x/p.png: not shown to glm-5.3: "


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("messages", "where"),
    [(SHOWN_BEFORE, 0), (SHOWN_BY_TOOL, 2)],
    ids=["an earlier turn", "a tool's result"],
)
async def test_a_picture_of_before_is_words_for_a_model_that_takes_none(
    client, zai, messages, where, stream
):
    response, _ = await ask(client, {"model": "glm-5.3", "messages": messages, "stream": stream})
    assert (response.status, response.headers["x-ztoapi-ignored"]) == (200, "images")
    assert NOT_SHOWN in zai.bodies[0]["messages"][where]["content"]
    assert client.app[ztoapi.UPSTREAM].repairs["hidden_images"] == 1


@in_loop
@pytest.mark.parametrize(
    ("messages", "model"),
    [(PICTURE["messages"], "glm-4.6v"), (SHOWN_BY_TOOL, "glm-4.6v"), (SHOWN_BEFORE, "glm-5.3")],
    ids=["the user's", "a tool's", "an earlier turn's"],
)
async def test_the_vision_model_answers_where_the_turn_that_is_on_has_a_picture(
    start, zai, messages, model
):
    client = await start(vision_model="glm-4.6v")
    response, _ = await ask(client, {"model": "glm-5.3", "messages": messages})
    assert (zai.bodies[0]["model"], response.headers["x-ztoapi-model"]) == (model, model)
    assert ("x-ztoapi-ignored" in response.headers) == (model == "glm-5.3")


@in_loop
@pytest.mark.parametrize(
    ("messages", "models"),
    [(PICTURE["messages"], ["glm-4.6v"]), (SHOWN_BY_TOOL, ["glm-4.6v", "glm-5.3"])],
    ids=["the user's", "a tool's"],
)
async def test_a_model_that_takes_no_pictures_may_stand_in_where_the_user_shows_none(
    client, zai, messages, models
):
    zai.status, zai.parts = zai_refuses(1211, 400)
    body = {"model": "glm-4.6v", "fallbacks": ["glm-5.3"], "messages": messages}
    await ask(client, body)
    assert [body["model"] for body in zai.bodies] == models
    assert (NOT_SHOWN in json.dumps(zai.bodies[-1])) == (models[-1] == "glm-5.3")


@in_loop
@pytest.mark.parametrize(
    ("content", "code", "param"),
    [
        (PICTURE["messages"][0]["content"], "image_not_supported", "messages"),
        ([{"type": "input_audio"}], "file_not_supported", "messages[0].content[0]"),
    ],
    ids=["a picture", "audio"],
)
async def test_what_the_user_shows_now_is_refused_before_anything_is_waited_for(
    start, zai, content, code, param
):
    client = await start(zai_api_key=())
    body = {"model": "glm-5.3", "messages": [{"role": "user", "content": content}, ASSISTANT_CALLS]}
    response, text = await ask(client, body)
    assert (response.status, error_of(text)["code"], error_of(text)["param"]) == (400, code, param)


@in_loop
async def test_a_file_of_before_is_words_and_listed_with_names_that_are_dropped(client, zai):
    shown = {"role": "user", "name": "bob", "content": [{"type": "input_audio"}]}
    result = {"role": "function", "name": "f", "content": "1"}
    body = chat(messages=[shown, ASSISTANT_CALLS, result, QUESTION])
    response, _ = await ask(client, body)
    assert response.headers["x-ztoapi-ignored"] == "messages.name,files"
    assert zai.bodies[0]["messages"][0]["content"].startswith("[file audio: not shown to glm-4.6")


POISONED = {**CALL, "function": {"name": "", "arguments": '{"p":'}}


@in_loop
async def test_a_poisoned_conversation_goes_on_and_is_counted(client, zai):
    said = {"role": "assistant", "content": "", "tool_calls": [POISONED]}
    told = {"role": "tool", "tool_call_id": "c1", "content": "no such tool"}
    response, _ = await ask(client, chat(messages=[QUESTION, said, told, QUESTION]))
    assert response.status == 200
    assert zai.bodies[0]["messages"] == [QUESTION, QUESTION]
    async with client.get("/dashboard/stats", headers=KEY) as response:
        healed = (await response.json())["healed"]
    assert {"drop_nameless_calls": 1, "mend_empty_messages": 1}.items() <= healed.items()


@in_loop
async def test_a_poisoned_conversation_of_the_responses_api_goes_on(client, zai):
    items = [
        {"role": "user", "content": "hi"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"p":'},
        {"type": "function_call_output", "call_id": "gone", "output": None},
        {"type": "never_heard_of"},
    ]
    response, _ = await ask(client, {"model": "glm-4.6", "input": items}, "/v1/responses")
    assert (response.status, response.headers["x-ztoapi-ignored"]) == (200, "input.never_heard_of")
    assert list(what_zai_refuses(zai.bodies[0]["messages"], BLIND)) == []


def shown(number):
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{number:04}"}}


def shows(*numbers):
    return {"role": "user", "content": [{"type": "text", "text": "look"}, *map(shown, numbers)]}


def describes(text):
    return 200, [stream_of({"content": text}, USED, finish())]


USED = {
    "choices": [],
    "usage": {"prompt_tokens": 900, "completion_tokens": 70, "total_tokens": 970},
}


def let_see(zai, *answers):
    """The fake's glm-4.6v gives these answers, the last one again and again."""
    left = [*answers]

    def next_answer(self):
        if json.loads(self.asked[-1][3])["model"] != "glm-4.6v":
            return FakeZai.next_answer(self)
        return left.pop(0) if len(left) > 1 else left[0]

    zai.next_answer = next_answer.__get__(zai)


def asked_models(zai):
    return [body["model"] for body in zai.bodies]


@pytest_asyncio.fixture
async def describing(start, zai):
    """ztoapi in front of a fake whose glm-4.6v describes what an agent shows to glm-5.3."""
    let_see(zai, describes(" An error: `x is not defined`\n"))
    return await start(vision_model="glm-4.6v", max_retries=0)


AN_AGENT = {"model": "glm-5.3", "tools": READ_TOOLS}
DESCRIBED = "[image: An error: `x is not defined`]"


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_image_is_described_once_for_an_agents_model(describing, zai, stream):
    key = await make_key(describing, tokens="1M")
    body = {**AN_AGENT, "messages": [shows(1)], "stream": stream}
    response, _ = await ask(describing, body, headers=key)
    assert (response.status, response.headers["x-ztoapi-model"]) == (200, "glm-5.3")
    assert "x-ztoapi-ignored" not in response.headers
    later = [shows(1), {"role": "assistant", "content": "ok"}, QUESTION]
    await ask(describing, {**body, "messages": later}, headers=key)
    assert asked_models(zai) == ["glm-4.6v", "glm-5.3", "glm-5.3"]
    for sent in zai.bodies[1:]:
        assert sent["messages"][0] == {"role": "user", "content": f"look\n{DESCRIBED}"}
    counted = describing.app[ztoapi.ACCOUNTS].counted
    rows = {model: row for (_, _, model), row in counted.items()}
    assert (rows["glm-4.6v"], rows["glm-5.3"][:2]) == ([1, 0, 900, 0, 70, 333_000], [2, 0])
    figures = (await stats(describing))[0]
    told = figures["models"]["glm-4.6v"]
    assert (told["requests"], told["prompt_tokens"], told["completion_tokens"]) == (1, 900, 70)
    assert figures["healed"]["described_images"] == 1


@in_loop
async def test_an_image_of_a_tool_is_described_for_the_responses_api_too(describing, zai):
    output = [{"type": "input_image", "image_url": "https://example.org/shot.png"}]
    items = [
        {"role": "user", "content": "hi"},
        {"type": "function_call", "call_id": "c1", "name": "shot", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": output},
    ]
    tools = [{"type": "function", "name": "shot"}]
    body = {"model": "glm-5.3", "input": items, "tools": tools}
    response, _ = await ask(describing, body, "/v1/responses")
    assert (response.status, asked_models(zai)) == (200, ["glm-4.6v", "glm-5.3"])
    picture = {"type": "image_url", "image_url": {"url": "https://example.org/shot.png"}}
    assert picture in zai.bodies[0]["messages"][0]["content"]
    result = {"role": "tool", "tool_call_id": "c1", "content": DESCRIBED}
    assert zai.bodies[1]["messages"][-1] == result


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_image_of_a_tool_is_described_for_the_messages_api_too(describing, zai, stream):
    source = {"type": "base64", "media_type": "image/png", "data": "QUJD"}
    result = [{"type": "text", "text": "here"}, {"type": "image", "source": source}]
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "shot", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": result}]},
    ]  # fmt: skip
    tools = [{"name": "shot", "input_schema": {"type": "object"}}]
    body = {
        "model": "glm-5.3",
        "max_tokens": 99,
        "messages": turns,
        "tools": tools,
        "stream": stream,
    }
    response, _ = await ask(describing, body, "/v1/messages")
    assert (response.status, asked_models(zai)) == (200, ["glm-4.6v", "glm-5.3"])
    assert zai.bodies[1]["messages"][-1]["content"] == f"here\n{DESCRIBED}"


@in_loop
async def test_the_four_newest_images_are_described_and_older_ones_if_they_are_known(
    describing, zai
):
    body = {**AN_AGENT, "messages": [shows(1, 2, 3, 4, 5, 6)]}
    response, _ = await ask(describing, body)
    assert response.headers["x-ztoapi-ignored"] == "images"
    assert asked_models(zai) == ["glm-4.6v"] * 4 + ["glm-5.3"]
    hidden = f"[image: not shown to glm-5.3: {ztoapi.TOO_MANY_IMAGES}]"
    lines = ["look", hidden, hidden, *[DESCRIBED] * 4]
    assert zai.bodies[-1]["messages"][0]["content"].splitlines() == lines
    await ask(describing, {**AN_AGENT, "messages": [shows(3, 4, 5, 6, 7, 8, 9)]})
    assert asked_models(zai)[5:] == ["glm-4.6v"] * 3 + ["glm-5.3"]
    assert zai.bodies[-1]["messages"][0]["content"].splitlines() == ["look", *[DESCRIBED] * 7]


@in_loop
async def test_a_description_is_not_told_to_another_client(start, zai):
    let_see(zai, describes("a cat"))
    client = await start(vision_model="glm-4.6v", default_key=("sk-mine", "sk-yours"))
    for key in ("sk-mine", "sk-yours", "sk-mine"):
        body = {**AN_AGENT, "messages": [shows(1)]}
        assert (await ask(client, body, headers={"x-api-key": key}))[0].status == 200
    assert asked_models(zai) == ["glm-4.6v", "glm-5.3"] * 2 + ["glm-5.3"]


@in_loop
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (zai_refuses(1210, 400, "image too large for zai-key"), "Z.ai 1210: image too large for ***"),
        ((200, [stream_of({"content": "x"}, finish("sensitive"))]), "content filter"),
    ],
    ids=["a refusal", "a filter"],
)  # fmt: skip
async def test_an_image_that_zai_refuses_is_words_with_the_reason_also_later(
    describing, zai, answer, reason
):
    let_see(zai, answer)
    for _ in "12":
        response, _ = await ask(describing, {**AN_AGENT, "messages": [shows(1)]})
        assert (response.status, response.headers["x-ztoapi-ignored"]) == (200, "images")
        said = zai.bodies[-1]["messages"][0]["content"]
        assert said.startswith("look\n[image: not shown to glm-5.3: it was refused (")
        assert reason in said
    assert asked_models(zai) == ["glm-4.6v", "glm-5.3", "glm-5.3"]


FAILS = [
    (zai_refuses(1113), 402, "insufficient_quota"),
    (zai_refuses(1211, 400), 404, "model_not_found"),
    ((500, [b"{}"]), 502, "zai_unavailable"),
    ((200, [stream_of({"content": " "}, finish())]), 502, "zai_unavailable"),
]


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("answer", "status", "code"), FAILS, ids=lambda value: str(value)[:16])
async def test_another_failure_is_told_in_the_turn_that_is_on(
    describing, zai, answer, status, code, stream
):
    let_see(zai, answer)
    body = {**AN_AGENT, "messages": [shows(1)], "stream": stream}
    response, text = await ask(describing, body)
    assert (response.status, error_of(text)["code"]) == (status, code)
    assert error_of(text)["message"].startswith("glm-4.6v could not describe an image: ")
    assert asked_models(zai) == ["glm-4.6v"]
    counted = describing.app[ztoapi.ACCOUNTS].counted
    assert {model: row[:2] for (_, _, model), row in counted.items()} == {
        "glm-4.6v": [1, 1],
        "glm-5.3": [1, 1],
    }


@in_loop
@pytest.mark.parametrize(
    "answer", [answer for answer, *_ in FAILS], ids=lambda value: str(value)[:16]
)
async def test_another_failure_is_words_in_an_earlier_turn_until_it_is_over(
    describing, zai, answer
):
    let_see(zai, answer, describes("a cat"))
    messages = [shows(1), {"role": "assistant", "content": "ok"}, QUESTION]
    said = []
    for _ in "12":
        response, _ = await ask(describing, {**AN_AGENT, "messages": messages})
        assert response.status == 200
        said.append(zai.bodies[-1]["messages"][0]["content"].splitlines()[1])
        describing.app[ztoapi.UPSTREAM].keys.cooling.clear()
    hidden = "[image: not shown to glm-5.3: it could not be described now]"
    assert said == [hidden, "[image: a cat]"]


@in_loop
async def test_what_was_described_is_not_asked_again_after_another_image_failed(describing, zai):
    let_see(zai, describes("a cat"), (500, [b"{}"]), describes("a dog"))
    body = {**AN_AGENT, "messages": [shows(1, 2)]}
    assert [(await ask(describing, body))[0].status for _ in "12"] == [502, 200]
    assert asked_models(zai) == ["glm-4.6v"] * 3 + ["glm-5.3"]


@in_loop
async def test_a_description_is_tried_again_and_waits_its_turn_like_any_answer(start, zai):
    let_see(zai, zai_refuses(1302), zai_refuses(1234, 500), describes("a cat"))
    client = await start(vision_model="glm-4.6v", max_concurrency=1)
    key = await make_key(client, parallel=1)
    body = {**AN_AGENT, "messages": [shows(1, 2, 3)]}
    response, _ = await ask(client, body, headers=key)
    assert (response.status, asked_models(zai)) == (200, ["glm-4.6v"] * 5 + ["glm-5.3"])


@in_loop
async def test_for_several_choices_an_image_is_described_once(describing, zai):
    body = {**AN_AGENT, "messages": [shows(1)], "n": 3}
    assert (await ask(describing, body))[0].status == 200
    assert asked_models(zai) == ["glm-4.6v"] + ["glm-5.3"] * 3
    assert {body["messages"][0]["content"] for body in zai.bodies[1:]} == {f"look\n{DESCRIBED}"}


SHOWS_A_PICTURE = [
    {"role": "user", "content": [{"type": "input_image", "image_url": "https://example.org/a.png"}]}
]


@in_loop
@pytest.mark.parametrize(
    ("path", "body", "sign"),
    [
        ("chat/completions", {"messages": [shows(1)], "tools": READ_TOOLS}, b": keep-alive"),
        (
            "responses",
            {"input": SHOWS_A_PICTURE, "tools": [{"type": "function", "name": "f"}]},
            b"response.created",
        ),
    ],
    ids=["chat", "responses"],
)
async def test_a_stream_shows_life_while_an_image_is_described(start, zai, path, body, sign):
    client = await start(limits=Limits(keep_alive_interval=0.05), vision_model="glm-4.6v")
    let_see(zai, (200, [HANG]))
    body = {**body, "model": "glm-5.3", "stream": True}
    async with client.post(f"/v1/{path}", json=body, headers=KEY) as response:
        assert sign in await response.content.readany()
        assert await eventually(lambda: asked_models(zai) == ["glm-4.6v"])
        response.close()


@in_loop
async def test_who_leaves_while_images_are_described_leaves_nothing_behind(describing, zai):
    let_see(zai, (200, [HANG]))
    key = await make_key(describing, tokens="1M")
    body = {**AN_AGENT, "messages": [shows(1, 2)]}
    asking = asyncio.create_task(ask(describing, body, headers=key))
    assert await eventually(lambda: zai.open == 2)
    asking.cancel()
    assert await eventually(lambda: not zai.open and not describing.app[ztoapi.IN_FLIGHT])
    assert describing.app[ztoapi.UPSTREAM].queue("glm-4.6v").in_flight == 0
    counted = describing.app[ztoapi.ACCOUNTS].counted
    used = {model: row[0] for (_, _, model), row in counted.items()}
    assert used == {"glm-4.6v": 2, "glm-5.3": 1}
    assert [row[2] > 1000 for (_, _, model), row in counted.items() if model == "glm-4.6v"] == [
        True
    ]


@in_loop
async def test_a_budget_is_looked_at_before_an_image_is_described(describing, zai):
    key = await make_key(describing, tokens="900", parallel=1)
    body = {**AN_AGENT, "messages": [shows(1, 2)]}
    response, _ = await ask(describing, body, headers=key)
    assert (response.status, asked_models(zai)) == (200, ["glm-4.6v", "glm-4.6v", "glm-5.3"])
    response, text = await ask(describing, {**AN_AGENT, "messages": [shows(3)]}, headers=key)
    assert (response.status, error_of(text)["code"]) == (402, "key_quota_exceeded")


# ======== Every surface is the same path ========

SURFACES = {
    "chat": ("/v1/chat/completions", HELLO),
    "completions": ("/v1/completions", {"model": "glm-4.6", "prompt": "你好"}),
    "responses": ("/v1/responses", ASKED),
    "messages": ("/v1/messages", HELLO | {"max_tokens": 1000}),
}
on_every_surface = pytest.mark.parametrize(("path", "body"), SURFACES.values(), ids=SURFACES)


@in_loop
@on_every_surface
async def test_every_surface_answers_whole_and_streamed_and_is_counted(client, zai, path, body):
    response, text = await ask(client, body, path)
    assert (response.status, "好😀" in text) == (200, True)
    response, stream = await ask(client, body | {"stream": True}, path)
    assert (response.status, response.content_type, "好😀" in stream) == (
        200,
        "text/event-stream",
        True,
    )
    assert (await stats(client))[0]["models"]["glm-4.6"]["requests"] == 2


@in_loop
@on_every_surface
async def test_every_surface_tries_again_and_falls_back(client, zai, path, body):
    zai.answers = [zai_refuses(1234, 500), zai_refuses(1311)]
    response, _ = await ask(client, body | {"fallbacks": ["glm-4.5"], "stream": True}, path)
    assert (response.status, response.headers["x-ztoapi-model"], slept(client)) == (
        200,
        "glm-4.5",
        [0.5],
    )


@in_loop
@on_every_surface
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_every_surface_has_a_status_before_the_first_byte(client, zai, path, body, stream):
    zai.status, zai.parts = zai_refuses(1301, 400)
    response, text = await ask(client, body | {"stream": stream}, path)
    error = error_of(text)
    wanted = "invalid_request_error" if "messages" in path else "content_filter"
    assert (response.status, error.get("code", error["type"])) == (400, wanted)


@in_loop
@on_every_surface
async def test_every_surface_says_in_the_stream_that_it_breaks_off(client, zai, path, body):
    zai.parts = [FIRST, RECORDED[len(FIRST) : len(FIRST) + 180], RESET]
    response, stream = await ask(client, body | {"stream": True}, path)
    assert response.status == 200
    frames = stream.removesuffix("data: [DONE]\n\n").split("\n\n")
    assert CONNECTION_WORDS.search(frames[-2])


SIGNS_OF_LIFE = {
    "/v1/responses": b"event: response.created\n",
    "/v1/messages": b"event: ping\n",
}


@in_loop
@on_every_surface
async def test_every_surface_is_kept_alive_and_freed(lively, zai, path, body):
    zai.parts = [HANG]
    async with lively.post(path, json=body | {"stream": True}, headers=KEY) as response:
        sign = await response.content.readuntil(b"\n\n")
        response.close()
    assert sign.startswith(SIGNS_OF_LIFE.get(path, b": keep-alive\n\n"))
    assert await eventually(lambda: zai.open == 0)


IMPATIENT_CLIENT = ClientTimeout(total=None, sock_read=25)  # seconds, as Codex may be set


@on_every_surface
@quickly()
async def test_a_silence_is_survived_by_clients_that_allow_none(client, zai, path, body):
    zai.parts = [60.0, FIRST, 90.0, RECORDED[len(FIRST) :]]
    how = {"json": body | {"stream": True}, "headers": KEY, "timeout": IMPATIENT_CLIENT}
    async with client.post(path, **how) as response:
        stream = await response.text()
    assert (response.status, "好😀" in stream, len(zai.asked)) == (200, True, 1)
    assert asyncio.get_running_loop().time() >= 150


@on_every_surface
@quickly()
async def test_a_whole_answer_may_take_12_minutes_to_think(client, zai, path, body):
    zai.parts = [FIRST, 60.0] * 12 + [RECORDED]
    how = {"json": body, "headers": KEY, "timeout": ClientTimeout(total=None)}
    async with client.post(path, **how) as response:
        text = await response.text()
    assert (response.status, "好😀" in text, len(zai.asked)) == (200, True, 1)
    assert asyncio.get_running_loop().time() >= 720


@in_loop
async def test_codex_sees_life_in_events_numbered_like_all(lively, zai):
    zai.parts = [0.13, RECORDED]
    _, stream = await ask(lively, ASKED | {"stream": True}, "/v1/responses")
    events = [json.loads(frame.partition("data: ")[2]) for frame in stream.split("\n\n")[:-1]]
    types = [event["type"].removeprefix("response.") for event in events]
    assert types[:3] == ["created", "in_progress", "in_progress"]
    assert types.count("created") == 1
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1


@in_loop
async def test_codex_sees_life_while_the_model_thinks_about_a_summary(lively, zai):
    zai.parts = [*[FIRST, 0.02] * 12, RECORDED]
    asked = ASKED | {"stream": True, "input": TO_SUM_UP}
    _, stream = await ask(lively, asked, "/v1/responses")
    assert stream.count("event: response.in_progress\n") > 1
    assert last_event(stream)["type"] == "response.completed"


TORN_STREAM = FIRST[:-20] + RECORDED  # a piece of it is lost


@in_loop
@on_every_surface
@pytest.mark.parametrize(
    "broken",
    [
        pytest.param([FIRST, RESET], id="broken off"),
        pytest.param([FIRST], id="ended early"),
        pytest.param([FIRST, b'data: {"error":{"code":"1230","message":"no"}}\n\n'], id="error"),
        pytest.param([TORN_STREAM], id="a piece torn"),
        pytest.param([RECORDED.replace(b'"stop"', b'"network_error"')], id="network_error"),
    ],
)
async def test_a_whole_answer_that_lacks_a_piece_is_asked_for_again(
    client, zai, path, body, broken
):
    zai.answers = [broken]
    response, text = await ask(client, body, path)
    assert (response.status, "你好😀" in text, len(zai.asked)) == (200, True, 2)


@in_loop
async def test_a_whole_answer_that_always_lacks_a_piece_is_a_failure(client, zai):
    zai.parts = [TORN_STREAM]
    response, body = await ask(client)
    assert (response.status, error_of(body)["code"]) == (502, "zai_unavailable")
    assert len(zai.asked) == 3


@in_loop
@pytest.mark.parametrize("code", ["1302", "1305"])
async def test_an_answer_that_is_always_broken_off_for_load_is_a_failure(client, zai, code):
    zai.parts = [FIRST, b'data: {"error":{"code":"%s","message":"no"}}\n\n' % code.encode()]
    response, body = await ask(client)
    assert (response.status, error_of(body)["code"]) == (429, "rate_limit_exceeded")
    assert len(zai.asked) == 3


@in_loop
async def test_a_stream_that_lacks_a_piece_goes_on(client, zai):
    zai.parts = [TORN_STREAM]
    _, stream = await ask(client, chat(stream=True))
    assert (said(stream), len(zai.asked)) == ("你好😀", 1)


@in_loop
@pytest.mark.parametrize("turns", range(5))
@pytest.mark.parametrize("n", [1, 3])
async def test_who_is_cancelled_twice_leaves_nothing_behind(client, zai, n, turns):
    zai.parts = [FIRST, HANG]
    upstream = client.app[ztoapi.UPSTREAM]
    plan = ztoapi.make_plan(read_chat(chat(n=n, stream=True)), Settings(), Account(""), "7")

    async def read():
        async with upstream.open(plan) as answer:
            while True:
                await answer.read()

    reading = asyncio.create_task(read())
    assert await eventually(lambda: zai.open == n)
    reading.cancel()
    for _ in range(turns):  # a failed write ends the handler, and the lost connection cancels it
        await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait([reading])
    assert await eventually(lambda: (upstream.queue("glm-4.6").in_flight, zai.open) == (0, 0))


@in_loop
@pytest.mark.parametrize("n", [1, 2])
async def test_the_first_token_of_a_whole_answer_is_when_it_came(client, zai, n):
    zai.parts = [FIRST, 0.3, RECORDED[len(FIRST) :]]
    await ask(client, chat(n=n))
    (last,) = (await stats(client))[0]["recent"]
    assert last["first"] < last["duration"] - 0.2


@in_loop
async def test_a_whole_answer_may_take_longer_than_the_longest_silence(start, zai):
    client = await start(upstream_timeout=1)
    zai.parts = [part for _ in range(16) for part in (FIRST, 0.2)] + [RECORDED]
    assert (await ask(client))[0].status == 200


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}
NAMED = {"type": "function", "function": {"name": "nope"}}
IMPOSSIBLE = [
    pytest.param(
        chat(tools=[function("f")], tool_choice=NAMED), 400, id="a tool that is not there"
    ),
    pytest.param(
        chat(messages=[{"role": "user", "content": [IMAGE]}]),
        400,
        id="an image for a model that does not see",
    ),
    pytest.param(chat(messages=[{"role": "assistant", "content": ""}]), 400, id="nothing to say"),
    pytest.param(chat(fallbacks=[" / "]), 400, id="a fallback without a name"),
]


@in_loop
@pytest.mark.parametrize(("body", "status"), IMPOSSIBLE)
async def test_what_cannot_be_sent_is_told_while_the_queue_is_full(start, zai, body, status):
    client = await start(max_concurrency=1)
    zai.parts = [HANG]
    waiting = asyncio.create_task(ask(client))
    assert await eventually(lambda: zai.open)
    assert (await asyncio.wait_for(ask(client, body), 10))[0].status == status
    waiting.cancel()
    await asyncio.wait([waiting])


@in_loop
@pytest.mark.parametrize(("body", "status"), IMPOSSIBLE)
async def test_what_cannot_be_sent_is_told_without_a_key(start, body, status):
    client = await start(zai_api_key=())
    assert (await ask(client, body))[0].status == status
    assert (await ask(client))[0].status == 503


@in_loop
@pytest.mark.parametrize(("body", "status"), IMPOSSIBLE)
async def test_what_cannot_be_sent_is_told_while_all_keys_rest(client, zai, body, status):
    zai.status, zai.parts = zai_refuses(1113)
    assert (await ask(client))[0].status == 402
    assert (await ask(client, body))[0].status == status
    assert len(zai.asked) == 1


@in_loop
async def test_events_that_have_a_type_have_it_as_their_name(client):
    _, stream = await ask(client, ASKED | {"stream": True}, "/v1/responses")
    assert stream.startswith("event: response.created\ndata: {")
    assert "[DONE]" not in stream


@in_loop
async def test_a_response_can_be_looked_up_and_forgotten(client):
    path = "/v1/responses/" + json.loads((await ask(client, ASKED, "/v1/responses"))[1])["id"]
    for method, url, status in [
        ("GET", path, 200),
        ("GET", f"{path}/input_items", 200),
        ("DELETE", path, 200),
        ("GET", path, 404),
        ("GET", f"{path}/input_items", 404),
        ("DELETE", path, 404),
        ("POST", "/v1/responses/forget", 404),
        ("POST", f"{path}/cancel", 404),
    ]:
        async with client.request(method, url, headers=KEY) as response:
            assert response.status == status, (method, url)


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_several_prompts_are_several_choices_with_one_usage(client, zai, stream):
    body = {"model": "glm-4.7", "prompt": ["Say a", "Say b"], "n": 2, "stream": stream}
    body |= {"stream_options": {"include_usage": True}}
    _, text = await ask(client, body, "/v1/completions")
    documents = parse_frames(text) if stream else [json.loads(text)]
    texts = Counter()
    for document in documents:
        for choice in document["choices"]:
            texts[choice["index"]] += len(choice["text"])
    assert sorted(texts) == [0, 1, 2, 3]
    asked = [each["messages"][0]["content"] for each in zai.bodies]
    assert sorted(asked) == ["Say a", "Say a", "Say b", "Say b"]
    assert documents[-1]["usage"]["total_tokens"] == 4 * USAGE["total_tokens"]


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("key", [("zai-key",), ()], ids=["with a key", "without"])
async def test_who_wants_only_the_prompt_back_gets_it_without_a_model(start, zai, stream, key):
    client = await start(zai_api_key=key)
    body = {"model": "glm-4.7", "prompt": ["a", "b"], "echo": True, "max_tokens": 0}
    response, text = await ask(client, body | {"stream": stream}, "/v1/completions")
    documents = parse_frames(text) if stream else [json.loads(text)]
    choices = [choice for document in documents for choice in document["choices"]]
    assert [(choice["text"], choice["finish_reason"]) for choice in choices] == [
        ("a", "length"),
        ("b", "length"),
    ]
    assert (response.headers["x-ztoapi-model"], zai.asked) == ("glm-4.7", [])


@in_loop
@pytest.mark.parametrize(
    "fields",
    [
        {"echo": True},
        {"max_tokens": 0},
        {"echo": True, "max_tokens": 1},
        {"echo": True, "max_tokens": -1},
    ],
)
async def test_any_other_echo_is_asked_for_with_an_answer(client, zai, fields):
    body = {"model": "glm-4.7", "prompt": "a", **fields}
    await ask(client, body, "/v1/completions")
    assert len(zai.asked) == 1


@in_loop
async def test_a_request_for_a_model_that_a_key_may_not_use_is_counted_with_the_model(client):
    key = await make_key(client, models="glm-5")
    await ask(client, chat(model="claude-x:off"), headers=key)
    (item,) = (await stats(client))[0]["recent"]
    assert (item["model"], item["status"]) == ("glm-4.7-flash", 403)


@in_loop
async def test_who_wants_only_the_prompt_back_may_not_name_any_model(client, zai):
    key = await make_key(client, models="glm-5")
    body = {"model": "glm-4.7", "prompt": "a", "echo": True, "max_tokens": 0}
    response, _ = await ask(client, body, "/v1/completions", key)
    assert (response.status, zai.asked) == (403, [])


FILES_READ = "files.read"
READ_FORCED = {
    "chat/completions": chat(tools=[function(FILES_READ)], tool_choice=function(FILES_READ)),
    "responses": {
        **ASKED,
        "tools": [
            {
                "type": "namespace",
                "name": "my files",
                "tools": [{"type": "function", "name": FILES_READ}],
            }
        ],
        "tool_choice": {"type": "function", "name": FILES_READ, "namespace": "my files"},
    },
    "messages": chat(
        max_tokens=9,
        tools=[{"name": FILES_READ, "input_schema": NO_PARAMETERS}],
        tool_choice={"type": "tool", "name": FILES_READ},
    ),
}


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", READ_FORCED)
async def test_a_tool_has_a_legal_name_for_zai_and_its_own_for_the_client(
    client, zai, path, stream
):
    body = READ_FORCED[path]
    await ask(client, body, f"/v1/{path}")
    (tool,) = zai.bodies[0]["tools"]
    name = tool["function"]["name"]
    assert re.fullmatch("[A-Za-z0-9_-]{1,64}", name)
    call = {
        "index": 0,
        "id": "c1",
        "type": "function",
        "function": {"name": name, "arguments": "{}"},
    }
    zai.parts = [stream_of({"tool_calls": [call]}, finish("tool_calls"))]
    _, text = await ask(client, body | {"stream": stream}, f"/v1/{path}")
    assert name not in text
    assert f'"name":"{FILES_READ}"' in text
    assert ('"namespace":"my files"' in text) == (path == "responses")


@in_loop
async def test_a_leaked_call_of_a_tool_has_the_clients_name_too(client, zai):
    await ask(client, READ_FORCED["chat/completions"])
    name = zai.bodies[0]["tools"][0]["function"]["name"]
    zai.parts = [stream_of({"content": f"<tool_call>{name}</tool_call>"}, finish())]
    _, text = await ask(client, READ_FORCED["chat/completions"])
    (call,) = json.loads(text)["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": FILES_READ, "arguments": "{}"}


@in_loop
async def test_reasoning_is_put_back_into_calls_of_tools_with_illegal_names(client, zai):
    await ask(client, chat(tools=[function(FILES_READ)]))
    name = zai.bodies[0]["tools"][0]["function"]["name"]
    call = {
        "index": 0,
        "id": "c1",
        "type": "function",
        "function": {"name": name, "arguments": "{}"},
    }
    zai.parts = [
        stream_of({"reasoning_content": "hm"}, {"tool_calls": [call]}, finish("tool_calls"))
    ]
    _, text = await ask(client, chat(tools=[function(FILES_READ)]))
    said = json.loads(text)["choices"][0]["message"]
    del said["reasoning_content"]
    messages = [*HELLO["messages"], said, {"role": "tool", "tool_call_id": "c1", "content": "x"}]
    await ask(client, chat(tools=[function(FILES_READ)], messages=messages))
    assert zai.bodies[-1]["messages"][1]["reasoning_content"] == "hm"
    assert zai.bodies[-1]["messages"][1]["tool_calls"][0]["function"]["name"] == name


@in_loop
async def test_new_items_of_codex_are_no_400_and_listed(client, zai):
    hi = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    agent = AGENT | {"content": [{"type": "input_text", "text": "done"}]}
    items = [*additional(NOW)[:1], hi, agent, {"type": "never_heard_of", "x": 1}]
    response, _ = await ask(client, ASKED | {"store": False, "input": items}, "/v1/responses")
    assert response.status == 200
    assert response.headers["x-ztoapi-ignored"] == "input.never_heard_of"
    assert [tool["function"]["name"] for tool in zai.bodies[0]["tools"]] == ["now"]
    assert [message["content"] for message in zai.bodies[0]["messages"]] == [
        "hi",
        "Message from the agent /root/a:\ndone",
    ]


@in_loop
async def test_a_search_that_must_be_made_is_asked_of_zai(client, zai):
    choice = {"type": "web_search_preview"}
    asked = {"model": "glm-4.7", "input": "News?", "tools": [choice], "tool_choice": choice}
    assert (await ask(client, asked, "/v1/responses"))[0].status == 200
    (tool,) = zai.bodies[0]["tools"]
    assert (tool["type"], tool["web_search"]["require_search"]) == ("web_search", True)


def last_event(stream):
    return json.loads(stream.strip().rpartition("data: ")[2])


@in_loop
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_a_conversation_is_summed_up_and_goes_on(client, zai, stream):
    asked = ASKED | {"store": False, "input": TO_SUM_UP, "stream": stream}
    _, body = await ask(client, asked, "/v1/responses")
    response = last_event(body)["response"] if stream else json.loads(body)
    assert zai.bodies[0]["messages"][-1]["content"] == ztoapi.COMPACTION_ORDER
    (item,) = response["output"]
    assert (response["status"], item["type"]) == ("completed", "compaction")
    await ask(client, ASKED | {"input": [item, user_item("and?")]}, "/v1/responses")
    assert [message["content"] for message in zai.bodies[1]["messages"]] == [
        "Summary of the conversation so far:\n你好😀",
        "and?",
    ]


@in_loop
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_a_summary_can_be_asked_for_at_an_address_of_its_own(client, zai, stream):
    response, body = await ask(client, ASKED | {"stream": stream}, "/v1/responses/compact")
    answer = last_event(body)["response"] if stream else json.loads(body)
    assert zai.bodies[0]["messages"][-1]["content"] == ztoapi.COMPACTION_ORDER
    assert answer["object"] == ("response" if stream else "response.compaction")
    assert [item["type"] for item in answer["output"]] == ["compaction"]
    assert response.headers["Content-Type"].startswith("text/event" if stream else "application/js")
    async with client.get(f"/v1/responses/{answer['id']}", headers=KEY) as looked_up:
        assert looked_up.status == 404


@in_loop
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/compact"])
async def test_a_model_that_calls_a_tool_instead_of_summing_up_is_an_error(client, zai, path):
    zai.parts = [RECORDED_CALL]
    whole, body = await ask(client, ASKED | {"input": TO_SUM_UP}, path)
    assert (whole.status, json.loads(body)["error"]["code"]) == (502, "zai_unavailable")
    assert "x-should-retry" not in whole.headers
    streamed, _ = await ask(client, ASKED | {"input": TO_SUM_UP, "stream": True}, path)
    assert streamed.status == 502


@in_loop
async def test_tokens_are_counted_without_zai(client, zai):
    response, body = await ask(client, {"input": "a" * 100}, "/v1/responses/input_tokens")
    assert json.loads(body) == {"object": "response.input_tokens", "input_tokens": 28}
    assert (response.status, zai.asked) == (200, [])


@in_loop
async def test_tokens_are_counted_as_zai_counted_them_last(client):
    client.app[ztoapi.TOKEN_SCALE].learn("glm-4.6", 100, 200)
    asked = {"model": "zai/GLM-4.6", "input": "a" * 100}
    _, body = await ask(client, asked, "/v1/responses/input_tokens")
    assert json.loads(body)["input_tokens"] == 56


@in_loop
async def test_the_tokens_of_a_stored_conversation_are_counted_too(client):
    asked = ASKED | {"input": "a" * 100}
    first = json.loads((await ask(client, asked, "/v1/responses"))[1])
    more = {"input": "b" * 100, "previous_response_id": first["id"]}
    _, body = await ask(client, more, "/v1/responses/input_tokens")
    assert 56 <= json.loads(body)["input_tokens"] <= 60
    gone = more | {"previous_response_id": "resp_gone"}
    refused, body = await ask(client, gone, "/v1/responses/input_tokens")
    assert refused.status == 400
    assert json.loads(body)["error"]["code"] == "previous_response_not_found"


@in_loop
async def test_tools_that_only_openai_has_are_named_in_a_header_and_in_the_log(client, caplog):
    caplog.set_level("INFO")
    response, _ = await ask(client, ASKED | {"tools": [{"type": "computer"}]}, "/v1/responses")
    assert (response.status, response.headers["x-ztoapi-ignored"]) == (200, "tools.computer")
    assert "left out tools.computer" in caplog.text


# ======== Messages over real sockets ========


def message_events(stream):
    """The events of a stream, each with the name that it must have."""
    found = []
    for frame in stream.split("\n\n")[:-1]:
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


@in_loop
async def test_a_message_is_answered_whole_with_the_model_as_the_client_named_it(passing, zai):
    zai.headers = EVENT_STREAM | {"X-Log-Id": "log-9"}
    response, text = await ask(passing, CLAUDE, "/v1/messages?beta=true")
    assert json.loads(text) == {
        **MESSAGE,
        "id": "msg_2025",
        "model": "claude-opus-5",
        "content": [{"type": "text", "text": "你好😀"}],
        "stop_reason": "end_turn",
        "usage": MESSAGE_USAGE,
    }
    headers = response.headers
    assert (headers["x-ztoapi-model"], headers["x-zai-request-id"]) == ("glm-5.3", "log-9")
    figures = (await stats(passing))[0]["models"]["glm-5.3"]
    assert (figures["prompt_tokens"], figures["completion_tokens"]) == (6, 3)


@in_loop
async def test_a_message_is_streamed_without_an_end_of_openais(passing):
    response, stream = await ask(passing, CLAUDE | ASKS_TO_THINK | {"stream": True}, "/v1/messages")
    events = message_events(stream)
    assert response.content_type == "text/event-stream"
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta.get("text", "") for delta in deltas) == "你好😀"
    assert "".join(delta.get("thinking", "") for delta in deltas) == "想"


@in_loop
async def test_a_message_that_breaks_off_in_mid_stream_ends_with_an_error(passing, zai):
    zai.parts = [stream_of({"content": "a"}, done=""), RESET]
    _, stream = await ask(passing, CLAUDE | {"stream": True}, "/v1/messages")
    events = message_events(stream)
    assert [event["type"] for event in (events[0], events[-1])] == ["message_start", "error"]
    assert events[-1]["error"]["type"] == "api_error"
    assert events[-1]["request_id"].startswith("req_")


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("refused", "status", "kind", "asked"),
    [
        (zai_refuses(1308), 402, "billing_error", 1),
        ((200, [b'{"code":401,"msg":"token expired","success":false}']), 502, "api_error", 1),
        ((404, [b""]), 502, "api_error", 1),
        (zai_refuses(1210, 400), 400, "invalid_request_error", 1),
        (zai_refuses(1234, 500), 502, "api_error", 3),
        (zai_refuses(1261, 400), 400, "invalid_request_error", 1),
    ],
    ids=["quota", "key", "address", "request", "failure", "window"],
)
async def test_failures_of_messages_have_anthropics_shape(
    passing, zai, stream, refused, status, kind, asked
):
    zai.status, zai.parts = refused
    response, text = await ask(passing, CLAUDE | {"stream": stream}, "/v1/messages")
    document = json.loads(text)
    assert (response.status, document["type"], document["error"]["type"]) == (status, "error", kind)
    assert document["request_id"] == response.headers["x-request-id"]
    assert len(zai.asked) == asked


@in_loop
async def test_an_overload_is_a_529_of_anthropics(start, zai):
    client = await start(rate_limit_wait=0)
    zai.status, zai.parts = zai_refuses(1305)
    response, text = await ask(client, CLAUDE | {"model": "glm-4.6"}, "/v1/messages")
    assert (response.status, error_of(text)["type"]) == (529, "overloaded_error")
    assert "x-should-retry" not in response.headers


@in_loop
async def test_a_window_that_is_full_is_told_in_the_words_that_claude_code_knows(passing, zai):
    zai.status, zai.parts = zai_refuses(1261, 400)
    _, text = await ask(passing, CLAUDE, "/v1/messages")
    assert error_of(text)["message"].startswith("prompt is too long: ")


@in_loop
async def test_a_message_has_fallbacks(passing, zai):
    zai.answers = [zai_refuses(1308), (200, None)]
    response, _ = await ask(passing, CLAUDE | {"fallbacks": ["glm-4.5"]}, "/v1/messages")
    assert (response.status, response.headers["x-ztoapi-model"]) == (200, "glm-4.5")


@in_loop
@pytest.mark.parametrize(
    ("content", "model"),
    [
        ([PICTURE_BLOCK], "glm-4.6v"),
        ([{"type": "tool_result", "tool_use_id": "t1", "content": [PICTURE_BLOCK]}], "glm-4.6v"),
        ([{"type": "tool_result", "tool_use_id": "t1", "content": "image"}, 7], "glm-5.3"),
    ],
    ids=["of the user", "of a tool", "none"],
)
async def test_messages_with_an_image_are_for_the_vision_model(start, zai, content, model):
    client = await start(model_aliases=(("claude-*", "glm-5.3"),), vision_model="glm-4.6v")
    body = CLAUDE | {"messages": [turn("hi"), USE, turn(content)]}
    response, _ = await ask(client, body, "/v1/messages")
    assert (zai.bodies[0]["model"], response.headers["x-ztoapi-model"]) == (model, model)


@in_loop
async def test_while_zai_thinks_a_message_gets_pings(start, zai):
    client = await start(limits=Limits(keep_alive_interval=0.1))
    zai.parts = [0.5, RECORDED]
    _, stream = await ask(client, CLAUDE | {"model": "glm-4.6", "stream": True}, "/v1/messages")
    kinds = [event["type"] for event in message_events(stream)]
    assert kinds[:2] == ["ping", "ping"]
    assert (kinds.count("message_start"), kinds[-1]) == (1, "message_stop")


@in_loop
async def test_reasoning_that_was_not_shown_is_put_back(passing, zai):
    zai.parts = [RECORDED_CALL.replace(b'"delta":{"tool_calls"', b'"delta":{"reasoning_content":"hm","tool_calls"', 1)]  # fmt: skip
    body = CLAUDE | {"tools": [GREP | {"name": "bash"}]}
    _, text = await ask(passing, body, "/v1/messages")
    (block,) = json.loads(text)["content"]
    assert block["type"] == "tool_use"
    said = [turn("你好"), turn([block], "assistant"), turn([TOOL_RESULT | {"tool_use_id": block["id"]}])]  # fmt: skip
    await ask(passing, body | {"messages": said}, "/v1/messages")
    assert zai.bodies[1]["messages"][1]["reasoning_content"] == "hm"


@in_loop
async def test_tokens_are_counted_here_and_scaled_by_what_zai_told(passing, zai):
    body = {"model": "claude-opus-5", "messages": [turn("x" * 1000)], "system": "y" * 1000}
    counted = partial(ask, passing, body, "/v1/messages/count_tokens")
    response, text = await counted()
    assert (response.status, json.loads(text)) == (200, {"input_tokens": 560})
    await ask(passing, body | {"max_tokens": 9000}, "/v1/messages")
    assert json.loads((await counted())[1]) == {"input_tokens": 6}
    assert len(zai.asked) == 1


@in_loop
@pytest.mark.parametrize(
    "body",
    [
        {"tools": [GREP, ANTHROPIC_SEARCH]},
        {"messages": [turn([PICTURE_BLOCK])]},
        {"messages": [turn([{"type": "new"}])], "temperature": "warm", "max_tokens": 0},
    ],
    ids=["tools", "an image", "what does not matter"],
)
async def test_whatever_can_be_counted_is_counted(client, zai, body):
    body = {"model": "glm-4.6", "messages": [turn("hi")], **body}
    response, text = await ask(client, body, "/v1/messages/count_tokens")
    assert (response.status, json.loads(text)["input_tokens"] > 0, zai.asked) == (200, True, [])


@in_loop
async def test_a_conversation_stays_with_its_key_whatever_moves_in_it(start, zai):
    client = await start(zai_api_key=("k1", "k2", "k3", "k4"))
    keys = set()
    for conversation in range(10):
        said = [turn([text_block(f"conversation {conversation}")])]
        for number in range(5):
            marked = [turn([*said[0]["content"]]), *said[1:]]
            marked[-1] = turn([marked[-1]["content"][0] | CACHED], marked[-1]["role"])
            system = [text_block(f"x-anthropic-billing-header: {number}"), text_block("Be kind.")]
            body = CLAUDE | {"model": "glm-4.6", "system": system, "messages": marked}
            assert (await ask(client, body, "/v1/messages"))[0].status == 200
            said += [turn([text_block("yes")], "assistant"), turn([text_block("more")])]
        used = set(zai.keys[-5:])
        assert len(used) == 1
        keys |= used
        sent = [json.dumps(body["messages"])[:-1] for body in zai.bodies[-5:]]
        assert all(later.startswith(one) for one, later in pairwise(sent))
    assert len(keys) > 1


@in_loop
async def test_a_session_of_anthropics_stays_with_its_key(start, zai):
    client = await start(zai_api_key=("k1", "k2", "k3", "k4"))
    for number in range(8):
        told = {"user_id": json.dumps({"session_id": "s1", "device_id": str(number)})}
        said = [turn(f"sub-agent {number}")]
        body = CLAUDE | {"model": "glm-4.6", "messages": said, "metadata": told}
        assert (await ask(client, body, "/v1/messages"))[0].status == 200
    assert len(set(zai.keys)) == 1


# ======== What Z.ai serves itself ========


@in_loop
async def test_a_client_that_takes_its_time_is_no_silence_of_zais(start, zai):
    client = await start(upstream_timeout=0.2)
    piece = FIRST.replace(b"reasoning_content", b"content").replace("想".encode(), b"x" * 2**20)
    zai.parts = [piece] * 24 + [RECORDED]
    asked = chat(stream=True)
    async with client.post("/v1/chat/completions", json=asked, headers=KEY) as response:
        response._connection.transport.pause_reading()
        await asyncio.sleep(0.4)  # in which Z.ai cannot send anything
        response._connection.transport.resume_reading()
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


@in_loop
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", message(role="user", content="cut \ud83d")),
        ("completions", {"model": "glm-4.6", "prompt": "cut \ud83d"}),
        ("responses", ASKED | {"input": "cut \ud83d"}),
        ("messages", {**CLAUDE, "messages": [{"role": "user", "content": "cut \ud83d"}]}),
    ],
    ids=["chat", "completions", "responses", "messages"],
)
async def test_a_text_that_was_cut_in_an_emoji_is_no_reason_to_refuse_it(passing, zai, path, body):
    assert (await ask(passing, body, f"/v1/{path}"))[0].status == 200
    assert zai.bodies[0]["messages"][0]["content"] == "cut \ufffd"


@in_loop
async def test_a_key_refused_on_another_path_still_serves_the_chat(start, zai):
    client = await start()
    zai.status, zai.parts = 401, [b'{"error":{"code":"1000","message":"Words"}}']
    for _ in range(2):
        assert (await ask(client, {"input": "x"}, "/v1/embeddings"))[0].status == 502
    assert len(zai.asked) == 1
    zai.status, zai.parts = 200, [DOCUMENT]
    assert (await ask(client))[0].status == 200


@in_loop
@pytest.mark.parametrize(
    ("code", "statuses"), [(1309, [403, 200]), (1113, [402, 200]), (1211, [404, 404])]
)
async def test_a_path_that_a_key_may_not_use_is_asked_of_the_next_base(
    start, zai, other_zai, code, statuses
):
    zai.status, zai.parts = zai_refuses(code)
    client = await start(zai_api_key=("plan", f"payg@{other_zai.url}"))
    assert [
        (await ask(client, {"input": "x"}, "/v1/embeddings"))[0].status for _ in "12"
    ] == statuses


@in_loop
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_messages_need_the_key_in_anthropics_shape_too(passing, zai, path):
    response, body = await ask(passing, CLAUDE, path, {"x-api-key": "wrong"})
    assert (response.status, error_of(body)["type"], zai.asked) == (401, "authentication_error", [])
    async with passing.get("/v1/nothing", headers={"anthropic-version": "1"}) as response:
        assert (response.status, (await response.json())["error"]["type"]) == (
            404,
            "not_found_error",
        )


@in_loop
async def test_a_path_that_zai_does_not_have_is_not_found(passing, zai):
    zai.status, zai.parts = 404, [b""]
    response, body = await ask(passing, {}, "/v1/reader")
    assert (response.status, error_of(body)["code"]) == (404, "not_found")


@in_loop
@pytest.mark.parametrize(
    ("path", "code"), [("web_search", "not_found"), ("images/generations", "zai_1210")]
)
async def test_a_refusal_of_what_is_passed_on_tells_zais_id_of_the_request(
    passing, zai, path, code
):
    zai.headers = {"X-Log-Id": "log-9"}
    zai.answers = [(404, [b"<html>404"]) if code == "not_found" else zai_refuses(1210, 400)]
    response, text = await ask(passing, {"model": "m"}, f"/v1/{path}")
    assert (error_of(text)["code"], response.headers["x-zai-request-id"]) == (code, "log-9")


REFUSAL_LIKE = b'{"error":{"code":"1310","message":"gone until 2099-01-01 00:00:00, says anna"}}'


@in_loop
async def test_the_content_of_a_file_is_no_refusal_whatever_it_says(passing, zai):
    zai.parts = [REFUSAL_LIKE]
    for _ in "12":
        async with passing.get("/v1/files/file-7/content", headers=KEY) as response:
            assert (response.status, await response.read()) == (200, REFUSAL_LIKE)


@in_loop
@pytest.mark.parametrize(
    ("answer", "status"),
    [
        pytest.param(REFUSAL_LIKE, 402, id="a code of Z.ai's"),
        pytest.param(b'{"code":401,"msg":"x","success":false}', 502, id="a status"),
        pytest.param(b'{"error":{"code":"7777","message":"x"}}', 200, id="another code"),
        pytest.param(b'{"code":200,"success":false}', 200, id="another status"),
        pytest.param(b'{"success":false}', 200, id="no code"),
        pytest.param(b'{"code":"1310","message":"x"}', 200, id="another shape"),
        pytest.param(REFUSAL_LIKE.replace(b"anna", b"a" * 2**16), 200, id="too long for one"),
    ],
)
@pytest.mark.parametrize("cut", [0, 9], ids=["whole", "in two parts"])
async def test_what_is_passed_on_is_a_refusal_only_with_a_known_code_in_zais_shape(
    passing, zai, answer, status, cut
):
    zai.parts = [answer[:cut], 0.01, answer[cut:]]
    response, _ = await ask(passing, {}, "/v1/files")
    assert response.status == status


@in_loop
async def test_a_packed_body_is_passed_on_unpacked(passing, zai):
    headers = KEY | {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    async with passing.post(
        "/v1/reader", data=gzip.compress(b'{"url":"x"}'), headers=headers
    ) as response:
        assert response.status == 200
    assert zai.asked[0][3] == b'{"url":"x"}'


@in_loop
@pytest.mark.parametrize(
    ("method", "path"),
    ztoapi.PASS_THROUGH_ROUTES,
    ids=lambda word: word.replace(ztoapi.ID_PATTERN, "ID"),
)
async def test_what_else_zai_serves_is_passed_on(passing, zai, method, path):
    path = path.replace(ztoapi.ID_PATTERN, "file-7")
    zai.headers, zai.parts = {"Content-Type": "audio/wav"}, [b"RIFF", 0.01, b"\x00\xff"]
    data, headers = None, KEY
    if path in ("files", "audio/transcriptions") and method == "POST":
        data, headers = (
            b"--x\r\n\r\nbytes",
            KEY | {"Content-Type": "multipart/form-data; boundary=x"},
        )
    elif method == "POST":
        data, headers = b'{ "x":1}', KEY | {"Content-Type": "application/json"}
    async with passing.request(
        method, f"/v1/{path}?limit=2", data=data, headers=headers
    ) as response:
        assert (response.status, response.content_type, await response.read()) == (
            200,
            "audio/wav",
            b"RIFF\x00\xff",
        )
    asked_method, asked, sent, body = zai.asked[0]
    assert (asked_method, asked, sent["Authorization"]) == (
        method,
        f"/api/paas/v4/{path}?limit=2",
        "Bearer zai-key",
    )
    assert (body, sent.get("Content-Type")) == (data or b"", headers.get("Content-Type"))


@in_loop
@pytest.mark.parametrize(
    ("path", "data", "wanted"),
    [
        (
            "images/generations",
            b'{ "model": "dall-e-3", "n": 1.0}',
            b'{"model":"cogview-4","n":1.0}',
        ),
        ("images/generations", b'{ "model": "GLM-Image", "n": 1.0}', None),
        (
            "embeddings",
            b'{"model":"embedding-3","input":"x","encoding_format":"float"}',
            b'{"model":"embedding-3","input":"x"}',
        ),
        ("embeddings", b'{ "model": "embedding-3"}', None),
    ],
)
async def test_only_an_alias_changes_in_what_is_passed_on(start, zai, path, data, wanted):
    client = await start(model_aliases=(("dall-e-*", "cogview-4"),))
    headers = KEY | {"Content-Type": "application/json"}
    async with client.post(f"/v1/{path}", data=data, headers=headers) as response:
        assert (response.status, await response.json()) == (200, {"ok": True})
    assert zai.asked[0][3] == (wanted or data)


@in_loop
async def test_embeddings_come_in_base64_for_those_who_ask(start, zai):
    client = await start()
    zai.parts = [json.dumps(VECTORS).encode()]
    zai.headers = {"Content-Type": "application/json", "Content-Length": str(len(zai.parts[0]))}
    body = {"model": "embedding-3", "input": "x"}
    for form, wanted in (("base64", PACKED), ("float", VECTORS)):
        asked = client.post("/v1/embeddings", json=body | {"encoding_format": form}, headers=KEY)
        async with asked as response:
            assert await response.json() == wanted
    assert [json.loads(asked[3]) for asked in zai.asked] == [body, body]


def vectors(size, usage=None):
    items = [{"object": "embedding", "embedding": [0.5, -1], "index": i} for i in range(size)]
    usage = usage or {"prompt_tokens": size, "total_tokens": size}
    return {"object": "list", "data": items, "model": "embedding-3", "usage": usage}


@in_loop
@pytest.mark.parametrize(
    ("form", "vector"), [("float", [0.5, -1]), ("base64", "AAAAPwAAgL8=")], ids=["float", "base64"]
)
async def test_more_embeddings_than_zai_takes_are_asked_for_in_batches(start, zai, form, vector):
    client = await start(model_aliases=(("ada", "embedding-3"),))
    zai.answers = [[json_bytes(vectors(size))] for size in (64, 64, 2)]
    texts = [f"text {i}" for i in range(130)]
    body = {"model": "ada", "input": texts, "encoding_format": form, "dimensions": 2}
    response, text = await ask(client, body, "/v1/embeddings")
    assert [sent["input"] for sent in zai.bodies] == [texts[:64], texts[64:128], texts[128:]]
    assert {(sent["model"], sent["dimensions"], len(sent)) for sent in zai.bodies} == {
        ("embedding-3", 2, 3)
    }
    items = [{"object": "embedding", "embedding": vector, "index": i} for i in range(130)]
    usage = {"prompt_tokens": 130, "total_tokens": 130}
    assert (response.status, json.loads(text)) == (
        200,
        {**vectors(0), "data": items, "usage": usage},
    )
    assert [*client.app[ztoapi.ACCOUNTS].counted.values()] == [[1, 0, 130, 0, 0, 0]]
    assert (await stats(client))[0]["models"].keys() == {"embedding-3"}


@in_loop
async def test_a_batch_of_embeddings_is_tried_again_and_the_others_are_not(client, zai):
    zai.answers = [[json_bytes(vectors(64))], zai_refuses(1302), [json_bytes(vectors(1))]]
    body = {"model": "embedding-3", "input": ["x"] * 65}
    response, text = await ask(client, body, "/v1/embeddings")
    assert (response.status, len(json.loads(text)["data"])) == (200, 65)
    assert [len(sent["input"]) for sent in zai.bodies] == [64, 1, 1]


@in_loop
async def test_what_a_batch_of_embeddings_is_refused_for_is_the_answer(client, zai):
    zai.answers = [[json_bytes(vectors(64))], zai_refuses(1301, 400)]
    body = {"model": "embedding-3", "input": ["x"] * 65}
    response, text = await ask(client, body, "/v1/embeddings")
    assert (response.status, error_of(text)["code"]) == (400, "content_filter")
    assert [*client.app[ztoapi.ACCOUNTS].counted.values()] == [[1, 1, 64, 0, 0, 0]]


@in_loop
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("embeddings", {"model": "embedding-3", "input": [[1, 2, 3]]}, "input"),
        ("images/generations", {"prompt": "x", "response_format": "b64_json"}, "response_format"),
        ("embeddings", {"model": "m" * 257, "input": "x"}, "model"),
    ],
    ids=["tokens", "base64", "a long name"],
)
async def test_what_is_wrong_in_what_is_passed_on_is_told_also_without_a_key(
    start, zai, path, body, param
):
    client = await start(zai_api_key=())
    response, text = await ask(client, body, f"/v1/{path}")
    assert (response.status, error_of(text)["param"], zai.asked) == (400, param, [])


FORM = {"Content-Type": "multipart/form-data; boundary=x"}
SPOKEN = [b'{"id":"1","model":"glm-asr-2512","text":"hello"}']


async def transcribe(client, *parts, headers=KEY):
    """A request as it comes in pieces, the last one late."""

    async def pieces():
        data = form_of(*parts)
        yield data[:-20]
        await asyncio.sleep(0.01)
        yield data[-20:]

    path = "/v1/audio/transcriptions"
    async with client.post(path, data=pieces(), headers=headers | FORM) as response:
        return response, await response.text()


@in_loop
@pytest.mark.parametrize(
    "parts",
    [[field_of("model", "whisper-1"), A_FILE], [A_FILE, field_of("model", "whisper-1")]],
    ids=["before the file", "behind it"],
)
async def test_an_alias_stands_for_a_model_in_a_form_too(start, zai, parts):
    client = await start(model_aliases=(("whisper-*", "glm-asr-2512"),))
    zai.parts = SPOKEN
    response, text = await transcribe(client, *parts)
    sent = zai.asked[0][3].decode()
    assert sent == form_of(*parts).decode().replace("whisper-1", "glm-asr-2512")
    assert zai.asked[0][2]["Transfer-Encoding"] == "chunked"
    assert (response.status, json.loads(text)["model"]) == (200, "glm-asr-2512")
    assert [*(await stats(client))[0]["models"]] == ["glm-asr-2512"]


LONG_FILE = (A_FILE[0], "RIFF" * 2**17)


@in_loop
@pytest.mark.parametrize(
    ("aliases", "parts", "has_length"),
    [
        ((), [field_of("model", "m"), LONG_FILE], True),
        ((), [LONG_FILE, field_of("model", "m")], True),
        ((("m", "glm-asr"),), [field_of("model", "m"), LONG_FILE], True),
        ((("m", "glm-asr"),), [LONG_FILE, field_of("model", "m")], False),
        ((("m", "glm-asr"),), [A_FILE, field_of("model", "m")], True),
    ],
    ids=["no alias", "no alias behind", "an alias", "an alias behind", "behind a short file"],
)
async def test_the_length_of_a_form_is_told_where_it_is_known(
    start, zai, aliases, parts, has_length
):
    client = await start(model_aliases=aliases)
    data = form_of(*parts)
    headers = KEY | FORM
    async with client.post("/v1/audio/transcriptions", data=data, headers=headers) as response:
        assert response.status == 200
    sent = data.replace(b"\r\nm\r\n", b"\r\nglm-asr\r\n") if aliases else data
    wanted = str(len(sent)) if has_length else None
    assert (zai.asked[0][2].get("Content-Length"), zai.asked[0][3]) == (wanted, sent)


@in_loop
@pytest.mark.parametrize("parts", [[field_of("model", "other"), LONG_FILE], [A_FILE]])
async def test_what_the_head_of_a_form_says_is_checked_also_without_a_key(start, zai, parts):
    client = await start(zai_api_key=())
    key = await make_key(client, models="glm-asr-*")
    response, _ = await transcribe(client, *parts, headers=key)
    assert response.status == 403


@in_loop
async def test_json_that_says_it_is_a_form_is_read_as_json(passing, zai):
    body = b'{ "model": "claude-x"}'
    async with passing.post("/v1/reader", data=body, headers=KEY | FORM) as response:
        assert response.status == 200
    assert zai.asked[0][3] == b'{"model":"glm-5.3"}'


@in_loop
async def test_a_transcription_may_be_asked_for_as_text(client, zai):
    zai.parts = SPOKEN
    response, text = await transcribe(client, A_FILE, field_of("response_format", "text"))
    assert (response.content_type, text) == ("text/plain", "hello")
    _, text = await transcribe(client, A_FILE, field_of("response_format", "json"))
    assert text.encode() == SPOKEN[0]
    body = {"model": "glm-asr-2512", "file_base64": "UklGRg==", "response_format": "text"}
    assert (await ask(client, body, "/v1/audio/transcriptions"))[1] == "hello"


@in_loop
async def test_a_transcription_that_sounds_like_a_refusal_is_none(client, zai):
    zai.parts = [json_bytes({"text": REFUSAL_LIKE.decode()})]
    for _ in "12":
        response, text = await transcribe(client, A_FILE, field_of("response_format", "text"))
        assert (response.status, text) == (200, REFUSAL_LIKE.decode())
    zai.parts = [REFUSAL_LIKE]
    response, _ = await transcribe(client, A_FILE, field_of("response_format", "text"))
    assert response.status == 402


@in_loop
@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        pytest.param([field_of("model", "glm-asr-2512"), A_FILE], 200, None, id="its own"),
        pytest.param([A_FILE, field_of("model", "mine")], 200, None, id="its own behind the file"),
        pytest.param([field_of("model", "other"), A_FILE], 403, "model_not_allowed", id="another"),
        pytest.param([A_FILE, field_of("model", "other")], 403, "model_not_allowed", id="another behind"),
        pytest.param(
            [field_of("model", "mine"), LONG_FILE, field_of("model", "mine")], 400, None, id="twice"
        ),
        pytest.param([LONG_FILE, field_of("model", "mine")], 200, None, id="behind a long file"),
        pytest.param([LONG_FILE, field_of("model", "other")], 403, "model_not_allowed", id="another behind that"),
        pytest.param([LONG_FILE], 403, "model_not_allowed", id="none behind that"),
        pytest.param([A_FILE], 403, "model_not_allowed", id="none"),
        pytest.param([A_FILE, field_of("model", "m" * 257)], 400, None, id="a long name"),
    ],
)  # fmt: skip
async def test_a_form_must_name_a_model_of_its_key_before_zai_has_all_of_it(
    start, zai, parts, status, code
):
    client = await start(model_aliases=(("mine", "glm-asr-2512"),))
    key = await make_key(client, models="glm-asr-*")
    zai.parts = SPOKEN
    response, text = await transcribe(client, *parts, headers=key)
    assert response.status == status
    assert len(zai.asked) == (status == 200)
    if code:
        assert error_of(text)["code"] == code


@in_loop
async def test_messages_without_an_end_are_a_failure(start, zai):
    client = await start(limits=Limits(answer_size=100))
    zai.parts = [b"x" * 60, b"x" * 60]
    response, body = await ask(client, CLAUDE | {"model": "glm-5.3"}, "/v1/messages")
    assert (response.status, "too large" in body) == (502, True)


@in_loop
@pytest.mark.parametrize(
    "path",
    [
        "/v1/files/..%2Fmodels",
        "/v1/files/%2e%2e",
        "/v1/files/a%2Fb",
        "/v1/agents",
        "/v1/files/../agents",
    ],
)
async def test_nothing_else_gets_our_key(passing, zai, path):
    answer = await talk_raw(
        passing,
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nx-api-key: sk-your-key\r\n\r\n".encode(),
    )
    assert (answer[:12], zai.asked) == (b"HTTP/1.1 404", [])


@in_loop
async def test_a_path_of_the_china_address_alone_says_so(start):
    client = await start(zai_base_url="http://127.0.0.1:1/api.z.ai")
    _, body = await ask(client, {"input": "x"}, "/v1/embeddings")
    assert "open.bigmodel.cn" in error_of(body)["message"]


@in_loop
async def test_the_list_of_models_speaks_anthropic_and_codex_too(client):
    async with client.get(
        "/v1/models", headers=KEY | {"anthropic-version": "2023-06-01"}
    ) as response:
        models = await response.json()
    listed = {model["id"]: model for model in models["data"]}
    assert listed["glm-5.3"] == {
        "type": "model",
        "id": "glm-5.3",
        "display_name": "glm-5.3",
        "created_at": "2026-08-13T16:00:00Z",
        "lifecycle": "active",
        "max_input_tokens": 1048576,
        "max_tokens": 131072,
    }
    assert (models["first_id"], models["has_more"]) == (models["data"][0]["id"], False)
    async with client.get("/v1/models?client_version=1.0", headers=KEY) as response:
        models = await response.json()
    assert {model["slug"] for model in models["models"]} == {
        model["id"] for model in models["data"]
    }


async def modalities(client, headers=KEY):
    """What Codex may send to each model."""
    async with client.get("/v1/models?client_version=1", headers=headers) as response:
        models = (await response.json())["models"]
    return {model["slug"]: model["input_modalities"] for model in models}


@in_loop
@pytest.mark.parametrize(
    ("name", "takes"),
    [
        pytest.param("", ["text"], id="unset"),
        pytest.param("glm-4.6v-flash", ["text", "image"], id="set"),
        pytest.param("eyes", ["text", "image"], id="an alias"),
        pytest.param("glm-4.5", ["text"], id="blind itself"),
    ],
)
async def test_with_a_vision_model_every_model_takes_images(start, name, takes):
    client = await start(vision_model=name, model_aliases=(("eyes", "glm-4.6v"),))
    told = await modalities(client)
    assert (told["glm-4.6"], told["glm-5.3-flash"]) == (takes, ["text", "image"])


# ======== Bounds ========


@in_loop
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b'{"a":' * 101 + b"1" + b"}" * 101, id="deep"),
        pytest.param(b'{"model":"glm-4.6","model":"glm-5","messages":[]}', id="a name twice"),
        pytest.param(json.dumps(chat(tools=[function("f", parameters={"max": 1})])).replace("1}", "1e999}").encode(), id="infinity"),
        pytest.param(b'{"a":"\x00"}', id="NUL"),
        pytest.param(b'{"a":' + b"9" * 5000 + b"}", id="a huge number"),
        pytest.param("{}".encode("utf-16"), id="UTF-16"),
    ],
)  # fmt: skip
async def test_json_out_of_bounds_is_refused(client, zai, data):
    async with client.post("/v1/chat/completions", data=data, headers=KEY) as response:
        assert (response.status, error_of(await response.text())["type"]) == (
            400,
            "invalid_request_error",
        )
    assert zai.bodies == []


@in_loop
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"junk\r\n\r\n", id="no HTTP"),
        pytest.param(
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nx-api-key: topsecret\x01\r\n\r\n",
            id="control character",
        ),
        pytest.param(
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: " + b"y" * 40_000 + b"\r\n\r\n",
            id="long header",
        ),
        pytest.param(b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 300 + b"\r\n", id="many headers"),
        pytest.param(
            b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", id="long path"
        ),
        pytest.param(b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n", id="unknown method"),
    ],
)
async def test_what_is_no_http_is_refused_in_our_shape(client, caplog, data):
    head, _, body = (await talk_raw(client, data)).partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.[01] 4\d\d ", head)
    assert re.search(rb"\r\nx-request-id: req_\w{24}(\r|$)", head)
    assert error_of(body)["type"] == "invalid_request_error"
    assert b"topsecret" not in body
    assert "Traceback" not in caplog.text
    assert "topsecret" not in caplog.text


@in_loop
@pytest.mark.parametrize(
    ("expects", "first", "code"),
    [
        ("100-continue", b"HTTP/1.1 100", b""),
        ("miracles", b"HTTP/1.1 417", b'"code":"unknown_expectation"'),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/nothing"])
async def test_what_a_client_expects(client, expects, first, code, path):
    data = json.dumps(HELLO).encode()
    head = POST.format(path, f"Expect: {expects}\r\nContent-Length: {len(data)}").encode()
    answer = await talk_raw(client, head + data)
    assert (answer[: len(first)], code in answer) == (first, True)
    assert expects == "100-continue" or b"\r\nx-request-id: req_" in answer


def request_with(*headers):
    return b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"".join(headers) + b"\r\n"


@in_loop
@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([b"Cookie: " + b"c" * 8_200 + b"\r\n"], id="a cookie"),
        pytest.param([b"Cookie: " + b"c" * 32_600 + b"\r\n"], id="a long cookie"),
        pytest.param([b"x%d: %s\r\n" % (i, b"y" * 300) for i in range(100)], id="many"),
    ],
)
async def test_a_head_of_32_kb_is_read(client, headers):
    assert (await talk_raw(client, request_with(*headers))).startswith(b"HTTP/1.1 200 OK")


TOO_LARGE = [
    pytest.param([b"Cookie: " + b"c" * 33_000 + b"\r\n"], b"longest is Cookie.", id="a cookie"),
    pytest.param(
        [b"x%d: %s\r\n" % (i, b"c" * (600 + i)) for i in range(60)], b"longest is x59.", id="many"
    ),
]


@in_loop
@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("size", [2**18, 1000], ids=["at once", "in pieces"])
@pytest.mark.parametrize(("headers", "named"), TOO_LARGE)
async def test_a_larger_head_is_431_and_its_longest_header_is_named(
    client, before, size, headers, named
):
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(GET * before)
    for _ in range(before):
        await asyncio.wait_for(reader.readuntil(b"}"), 5)
    data = request_with(*headers)
    for start in range(0, len(data), size):
        writer.write(data[start : start + size])
        await asyncio.sleep(0)
    answer = await asyncio.wait_for(reader.readuntil(b"}}"), 5)
    assert answer.startswith(b"HTTP/1.0 431 Request Header Fields Too Large\r\n")
    assert (named in answer, b"c" * 20 in answer) == (True, False)
    writer.close()


@in_loop
async def test_behind_what_is_no_http_nothing_more_is_read(client, zai):
    zai.parts = [FIRST, HANG]
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(raw_request(chat(stream=True)))
    await asyncio.wait_for(reader.readuntil(b"}"), 5)
    (connection,) = client.server.handler.connections
    writer.write(b"junk\r\n\r\n")
    assert await eventually(lambda: connection.has_request)
    kept = connection.head
    writer.write(GET * 99)
    await asyncio.sleep(0.1)
    assert connection.head == kept
    writer.close()


@in_loop
async def test_an_address_that_is_too_long_is_414(client):
    answer = await talk_raw(
        client, b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
    )
    assert (answer[9:12], b'"code":"address_too_long"' in answer) == (b"414", True)


@in_loop
async def test_what_is_tls_is_told_to_use_http(client, caplog):
    caplog.set_level("INFO")
    answer = await talk_raw(client, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 506)
    assert (answer[9:12], b"use http://" in answer, "use http://" in caplog.text) == (
        b"400",
        True,
        True,
    )


@in_loop
async def test_line_ends_between_requests_mean_nothing(start, zai):
    client = await start(limits=OBSERVANT)
    zai.parts = [FIRST, 0.5, RECORDED]
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    for _ in range(2):
        writer.write(raw_request(chat(stream=True)))
        assert b"HTTP/1.1 200 OK" in await asyncio.wait_for(reader.readuntil(b"}"), 10)
        hurry(client)
        writer.write(b"\r\n")  # as some clients end a body
        await asyncio.wait_for(reader.readuntil(b"[DONE]\n\n\r\n0\r\n\r\n"), 10)
        await asyncio.sleep(0.4)  # longer than half a head may take here
    writer.close()


@in_loop
async def test_half_a_head_behind_a_request_does_not_end_its_answer(start, zai):
    client = await start(limits=OBSERVANT)
    zai.parts = [FIRST, 0.5, RECORDED]
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(raw_request(chat(stream=True)))
    await asyncio.wait_for(reader.readuntil(b"}"), 10)
    hurry(client)
    writer.write(GET[:20])
    await asyncio.wait_for(reader.readuntil(b"[DONE]"), 10)
    assert await asyncio.wait_for(reader.read(), 10)  # and is then given up
    writer.close()


@in_loop
async def test_servers_of_other_apps_are_left_alone(client):
    assert type(client.server.handler()) is ztoapi.ClientConnection
    assert type(web.Server(None)()) is RequestHandler
    async with fake_zai() as zai:
        assert type(zai.server.handler()) is RequestHandler


ODD = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    2**70,
    "",
    "x",
    "\x00",
    [],
    {},
    [None],
    [[]],
    {"type": "x"},
    {"type": None},
    [{"role": "user"}],
]


# The fields that count at each location of a request, and how many of the odd values each may have.
LOCATIONS = {
    "": list(ztoapi.CHAT_FIELDS),
    "messages[0]": ["role", "content"],
    "messages[1]": ["role", "content", "reasoning_content", "tool_calls"],
    "messages[1].tool_calls[0]": ["id", "function"],
    "messages[1].tool_calls[0].function": ["name", "arguments"],
    "messages[2]": ["role", "content", "tool_call_id"],
    "tools[0]": ["type", "function"],
    "tools[0].function": ["name", "description", "parameters"],
}


def odd_requests():
    """Every field that counts, at each location, with every odd value in it."""
    for location, names in LOCATIONS.items():
        for name, value in product(names, ODD):
            body = json.loads(
                json.dumps(chat(tools=[function("f")], messages=[ASKS, CALLS, RESULT]))
            )
            target = body
            for step in re.findall(r"\w+", location):
                target = target[int(step) if step.isdigit() else step]
            target[name] = value
            yield location, body


ASKS = {"role": "user", "content": "x"}
CALLS = {"role": "assistant", "content": "y", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "1", "tool_call_id": "c1"}


def test_odd_requests_are_refused_by_the_name_of_a_field_or_become_a_request_to_zai():
    named = {location: [] for location in LOCATIONS}
    for location, body in odd_requests():
        try:
            prompt = ztoapi.make_plan(read_chat(body), Settings(), Account(""), "7").prompts[0][1]
            prompt = ztoapi.replace(prompt, stream=False)
            json.loads(ztoapi.zai_request(prompt, resolve(prompt.model), ZAI, "7").data)
        except BadRequest as error:
            named[location].append(error.param)
    in_messages = [location for location in LOCATIONS if location.startswith("messages")]
    elsewhere = LOCATIONS.keys() - in_messages
    assert all(param for location in elsewhere for param in named[location])
    least = {location: len(LOCATIONS[location]) * len(ODD) // 3 for location in elsewhere}
    assert {location for location in elsewhere if len(named[location]) < least[location]} == set()
    assert {param[-5:] for location in in_messages for param in named[location]} == {".role"}


@in_loop
async def test_odd_requests_get_an_answer_or_a_400_and_break_nothing(client, zai):
    for _, body in Random(7).sample(list(odd_requests()), 60):
        response, text = await ask(
            client, {**body, "stream": False} if body.get("stream") is True else body
        )
        assert response.status == 200 or (response.status == 400 and error_of(text)["param"]), body
    assert (await ask(client))[0].status == 200


# ======== Who may call ========


@in_loop
@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer sk-your-key"},
        {"Authorization": "bearer  sk-your-key "},
        {"x-api-key": "sk-your-key"},
        {"Authorization": "sk-your-key"},
        {"api-key": "sk-your-key"},
        {"Authorization": "Bearer other", "x-api-key": "sk-your-key"},
        {"x-api-key": "other", "Authorization": "sk-your-key"},
        {"x-api-key": "other", "Authorization": "Bearer other", "api-key": "sk-your-key"},
    ],
)
async def test_a_right_key_is_let_in(client, headers):
    assert (await ask(client, headers=headers))[0].status == 200


@in_loop
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong-key"},
        {"Authorization": "wrong-key"},
        {"api-key": "wrong-key"},
        {"Authorization": "Basic sk-your-key"},
        {"Authorization": "Bearer "},
        {"x-api-key": ""},
        {"x-api-key": "schlüssel"},
    ],
)
async def test_a_wrong_key_is_kept_out_and_not_repeated(client, zai, headers):
    response, body = await ask(client, headers=headers)
    assert (response.status, error_of(body)["code"], zai.bodies) == (401, "invalid_api_key", [])
    assert "wrong-key" not in body


@in_loop
@pytest.mark.parametrize(
    ("headers", "begins"),
    [
        ({}, "No API key came with this request: send the server's DEFAULT_KEY"),
        (
            {"x-api-key": "wrong-key"},
            "The API key is wrong (a Z.ai key is none of this server's): ",
        ),
    ],
)
async def test_who_is_kept_out_is_told_whether_a_key_is_missing_or_wrong(client, headers, begins):
    message = error_of((await ask(client, headers=headers))[1])["message"]
    assert message.startswith(begins)
    assert "'Authorization: Bearer KEY'" in message


@in_loop
async def test_the_name_of_the_setting_is_told_to_callers_on_this_machine_alone(start):
    client = await start(default_key=("sk-mine",))
    for far, named in (({}, True), ({"X-Forwarded-For": "192.0.2.1"}, False)):
        body = (await ask(client, headers=far))[1]
        assert ("DEFAULT_KEY" in body) is named


@in_loop
async def test_the_account_is_that_of_the_first_valid_key(client):
    anna, bob = await make_key(client), await make_key(client, "bob")
    headers = {"x-api-key": anna["x-api-key"], "Authorization": f"Bearer {bob['x-api-key']}"}
    async with client.get("/dashboard/stats", headers={**headers, "api-key": "x"}) as response:
        assert (await response.json())["name"] == "anna"


@in_loop
async def test_each_of_several_keys_is_let_in(start):
    client = await start(default_key=("sk-a", "sk-b"))
    for key, status in (("sk-a", 200), ("sk-b", 200), ("sk-your-key", 401), ("sk-a,sk-b", 401)):
        assert (await ask(client, headers={"x-api-key": key}))[0].status == status


@in_loop
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/glm-4.6", "/models"])
async def test_the_models_need_the_key(client, path):
    async with client.get(path) as response:
        assert response.status == 401


@in_loop
@pytest.mark.parametrize("path", ["/", "/health"])
async def test_some_pages_need_no_key(client, path):
    async with client.get(path) as response, client.head(path) as head:
        assert (response.status, head.status) == (200, 200)


@in_loop
async def test_health_says_what_matters_and_no_secret(start):
    client = await start(default_key=("sk-mine",))
    async with client.get("/health") as response:
        assert await response.json() == {
            "status": "ok",
            "name": "ztoapi",
            "version": ztoapi.__version__,
            "demo": False,
            "zai_key": True,
            "model": "glm-4.7-flash",
        }


@in_loop
@pytest.mark.parametrize(
    ("settings", "model"),
    [
        ({}, "glm-4.7-flash"),
        ({"zai_base_url": ztoapi.ZAI_BASES["plan"]}, "glm-5.3"),
        ({"zai_api_key": ("a@china-plan", "b")}, "glm-5.3"),
    ],
)
async def test_health_names_the_model_that_launch_would_choose(start, settings, model):
    client = await start(**settings)
    async with client.get("/health") as response:
        assert (await response.json())["model"] == model


@in_loop
async def test_health_tells_an_operator_which_database_it_is(start, tmp_path):
    told = []
    for url in ("memory", f"sqlite:///{tmp_path}/z.db", f"sqlite:///{tmp_path}/z.db"):
        client = await start(database_url=url)
        await make_key(client, f"anna{len(told)}")
        async with client.get("/health", headers=KEY) as response:
            told.append((await response.json())["database"])
    assert told[0] is None
    assert told[1] == told[2]
    assert re.fullmatch("[0-9a-f]{32}", told[1])
    async with client.get("/health") as response:
        assert "database" not in await response.json()


PREFLIGHT = {
    "Origin": "https://app.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,x-stainless-os",
}


@in_loop
@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions", "/v1/models", "/v1/anything", "/api/paas/v4/files", "/models", "/v1"],
)
async def test_a_preflight_needs_no_key_and_reflects_what_it_asks(start, path):
    client = await start(default_key=("sk-mine",))
    async with client.options(path, headers=PREFLIGHT) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert response.headers["Access-Control-Allow-Headers"] == "authorization,x-stainless-os"
        assert response.headers["Access-Control-Max-Age"] == "86400"
        assert "Origin" in response.headers["Vary"]
        assert "Access-Control-Allow-Credentials" not in response.headers


@in_loop
@pytest.mark.parametrize("body", [HELLO, chat(stream=True), {}], ids=["whole", "streamed", "error"])
async def test_every_answer_has_the_origin_and_an_id(start, body):
    client = await start(default_key=("sk-mine",))
    response, _ = await ask(
        client, body, headers={"x-api-key": "sk-mine", "Origin": "https://app.example"}
    )
    assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert response.headers["x-request-id"].startswith("req_")


@in_loop
async def test_only_origins_of_the_setting_are_reflected(start):
    client = await start(default_key=("sk-mine",), cors_origins=("https://app.example",))
    for origin, wanted in (
        ("https://app.example", "https://app.example"),
        ("https://evil.example", None),
    ):
        async with client.get("/v1/models", headers={"Origin": origin}) as response:
            assert response.headers.get("Access-Control-Allow-Origin") == wanted


@in_loop
@pytest.mark.parametrize("path", ["/health", "/", "/docs", "/dashboard/stats", "/metrics", "/v1x"])
async def test_pages_of_other_origins_may_call_the_api_alone(start, path):
    client = await start(default_key=("sk-mine",))
    for method in ("GET", "OPTIONS"):
        async with client.request(method, path, headers=PREFLIGHT) as response:
            assert not [name for name in response.headers if name.startswith("Access-Control")]


@in_loop
@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "set DEFAULT_KEY to a key of your own, and CORS_ORIGINS"),
        ({"default_key": ("sk-mine",), "cors_origins": ("https://b.example",)}, "to CORS_ORIGINS"),
    ],
)
async def test_a_refused_origin_is_one_line_a_minute(start, settings, advice, caplog):
    client = await start(**settings)
    ours = {"Origin": f"http://{client.host}:{client.port}"}
    with caplog.at_level("INFO", "ztoapi"):
        for origin in (ours, *[{"Origin": "https://a.example"}] * 3):
            async with client.get("/v1/models", headers=origin):
                pass
    [line] = [line for line in caplog.messages if "may not call" in line]
    assert line.startswith("a page of the origin https://a.example may not call")
    assert advice in line


@in_loop
@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1", True),
        ("http://[::1]:8080", True),
        ("https://tauri.localhost", True),
        *(
            (f"{scheme}://some-id", True)
            for scheme in ("app", "tauri", "vscode-webview", "capacitor", "moz-extension")
        ),
        ("https://app.example", False),
        ("http://localhost.evil.example", False),
        ("http://evil-localhost", False),
        ("ftp://localhost", False),
        ("file://", False),
        ("app", False),
        ("null", False),
    ],
)
async def test_the_published_key_lets_only_this_machines_pages_in(client, origin, allowed):
    async with client.get("/v1/models", headers={"Origin": origin}) as response:
        assert ("Access-Control-Allow-Origin" in response.headers) is allowed


@in_loop
@pytest.mark.parametrize(
    ("header", "status"),
    [
        *(
            (name, 403)
            for name in ("Forwarded", "X-Forwarded-For", "x-forwarded-whatever", "Via", "X-Real-IP")
        ),
        ("CF-Connecting-IP", 403),
        ("X-Forwarder", 200),
    ],
)
async def test_the_published_key_is_not_for_those_behind_a_proxy(start, client, header, status):
    for path in ("/health", "/docs"):
        async with client.get(path, headers={header: "x"}) as response:
            assert response.status == status
            said = "reached through a proxy: set DEFAULT_KEY" in await response.text()
            assert said is (status == 403)
    other = await start(default_key=("sk-mine",))
    async with other.get("/health", headers={header: "x"}) as response:
        assert response.status == 200


@in_loop
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:9090", 200),
        ("[::1]:9090", 200),
        ("evil.example", 403),
        ("10.0.0.1:9090", 403),
    ],
)
@pytest.mark.parametrize("path", ["/health", "/"])
async def test_the_published_key_answers_to_loopback_names_alone(client, host, status, path):
    async with client.get(path, headers={"Host": host}) as response:
        assert response.status == status


@in_loop
async def test_every_host_header_counts(client):
    answer = await talk_raw(
        client, b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    )
    assert re.match(rb"HTTP/1.[01] 4\d\d", answer)


@pytest.mark.parametrize(
    ("place", "local"),
    [
        (("127.0.0.1", 9090), True),
        (("::1", 9090, 0, 0), True),
        ("/run/socket", True),
        (("192.0.2.1", 9090), False),
    ],
)
def test_the_published_key_answers_on_loopback_addresses_alone_whoever_listens(place, local):
    class Transport:
        def get_extra_info(self, name):
            return {"sockname": place}.get(name)

    request = make_mocked_request(
        "GET", "/health", headers={"Host": "localhost"}, transport=Transport()
    )
    assert ztoapi.is_local(request) is local


@in_loop
async def test_a_public_page_may_call_a_private_address_where_it_is_allowed(start):
    client = await start(default_key=("sk-mine",))
    headers = PREFLIGHT | {"Access-Control-Request-Private-Network": "true"}
    async with client.options("/v1/models", headers=headers) as response:
        assert response.headers["Access-Control-Allow-Private-Network"] == "true"
        assert "x-request-id" in response.headers["Access-Control-Expose-Headers"]
        assert "Access-Control-Request-Headers" in response.headers["Vary"]


@in_loop
async def test_a_key_of_ones_own_answers_to_every_name(start):
    client = await start(default_key=("sk-mine",))
    async with client.get("/health", headers={"Host": "ai.example"}) as response:
        assert response.status == 200


# ======== Models over real sockets ========


async def listed(client):
    async with client.get("/v1/models", headers=KEY) as response:
        return {item["id"]: item for item in (await response.json())["data"]}


GLM_46 = {"id": "glm-4.6", "object": "model", "created": 1759190400, "owned_by": "z.ai"}
GLM_46 |= {"context_length": 200 * 1024, "max_output_tokens": 128 * 1024, "name": "glm-4.6"}
PARAMETERS = ["max_tokens", "temperature", "top_p", "stop", "seed", "tools", "tool_choice"]
PARAMETERS += ["response_format", "structured_outputs"]
THINKING_PARAMETERS = ["reasoning", "reasoning_effort", "include_reasoning"]
GLM_46 |= {
    "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
    "supported_parameters": [*PARAMETERS, *THINKING_PARAMETERS],
    "pricing": {
        "prompt": "0.0000006",
        "completion": "0.0000022",
        "input_cache_read": "0.00000011",
    },
}


@in_loop
async def test_the_list_is_the_table_with_what_zai_lists(client, zai):
    zai.models = (
        200,
        {"data": [{"id": "GLM-9", "created": 5}, {"id": "glm-4.6", "created": 6}, {"no": 1}]},
    )
    models = await listed(client)
    assert set(models) == {*MODELS, "glm-9"}
    assert models["glm-4.6"] == GLM_46
    assert models["glm-9"] == {
        "id": "glm-9",
        "object": "model",
        "created": 5,
        "owned_by": "z.ai",
        "name": "glm-9",
        "architecture": {"input_modalities": ["text", "image"], "output_modalities": ["text"]},
        "supported_parameters": [*PARAMETERS, *THINKING_PARAMETERS],
    }


@in_loop
@pytest.mark.parametrize(
    "models", [(401, {"error": {"code": "1001"}}), (200, []), (200, "<html>"), HANG]
)
async def test_the_table_alone_is_listed_when_zai_does_not_answer(start, zai, models):
    client = await start(limits=Limits(get_timeout=0.2))
    zai.models = models
    assert set(await listed(client)) == set(MODELS)


@in_loop
async def test_aliases_are_listed_unless_they_are_patterns(start):
    patterns = ("claude-*", "gpt-?", "o[13]")
    client = await start(
        model_aliases=(("gpt-4o", "glm-4.6"), *((pattern, "glm-5.3") for pattern in patterns))
    )
    models = await listed(client)
    assert models["gpt-4o"] == GLM_46 | {"id": "gpt-4o", "name": "gpt-4o"}
    assert not models.keys() & set(patterns)


@in_loop
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("glm-4.6", "glm-4.6"),
        ("GLM-4.6/", "glm-4.6"),
        ("zai/glm-4.6", "glm-4.6"),
        ("gpt-4o", "gpt-4o"),
        ("glm-0", None),
    ],
)
async def test_one_model_is_found_by_any_of_its_names(start, name, wanted):
    client = await start(model_aliases=(("gpt-4o", "glm-4.6"),))
    async with client.get(f"/v1/models/{name}", headers=KEY) as response:
        body = await response.json()
    if wanted:
        assert body == GLM_46 | {"id": wanted, "name": wanted}
    else:
        assert body["error"]["code"] == "model_not_found"


@in_loop
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", {}),
        ("completions", {"prompt": "x"}),
        ("responses", {"input": "x"}),
        ("messages", {"max_tokens": 9}),
    ],
)
async def test_a_claude_is_asked_for_as_one_of_our_models_on_every_surface(
    client, zai, path, fields
):
    zai.parts = [RECORDED.replace(b"glm-4.6", b"glm-4.7-flash")]
    response, _ = await ask(client, chat(model="claude-haiku-4-5") | fields, f"/v1/{path}")
    assert zai.bodies[0]["model"] == "glm-4.7-flash"
    assert response.headers["x-ztoapi-model"] == "glm-4.7-flash"
    assert (await stats(client))[0]["recent"][0]["model"] == "glm-4.7-flash"


@in_loop
@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("glm-4.66", "glm-4.6, glm-4.6v, glm-4.7"),
        ("GLM-4.7-Flsh", "glm-4.7-flash"),
        ("my-modl", "my-model"),
        ("glm-5.3-flsh", "glm-5.3-flash"),
    ],
)
async def test_a_model_that_is_not_there_is_named_with_those_that_are_like_it(
    start, zai, name, nearest
):
    client = await start(model_aliases=(("my-model", "glm-4.6"),))
    zai.status, zai.parts = zai_refuses(1211, 400, "Unknown Model")
    async with client.get(f"/v1/models/{name}", headers=KEY) as response:
        errors = [(await response.json())["error"]]
    response, text = await ask(client, chat(model=name))
    errors.append(json.loads(text)["error"])
    assert [error["code"] for error in errors] == ["model_not_found"] * 2
    for error in errors:
        assert name in error["message"]
        assert f"The nearest in the list: {nearest}" in error["message"]


@in_loop
@pytest.mark.parametrize("name", ["qwen", "x", "glm-4.6"])
async def test_no_name_is_offered_where_none_is_like_it_or_the_key_may_not_use_it(
    client, zai, name
):
    zai.status, zai.parts = zai_refuses(1211, 400, "Unknown Model")
    key = await make_key(client, models="qwen,x,glm-4.6")
    _, text = await ask(client, chat(model=name), "/v1/chat/completions", key)
    assert "nearest" not in text
    assert name in json.loads(text)["error"]["message"]


@in_loop
async def test_an_alias_of_a_model_we_do_not_know_is_a_model(start):
    client = await start(model_aliases=(("mine", "glm-99"),))
    assert "mine" in await listed(client)
    async with client.get("/v1/models/mine", headers=KEY) as response:
        assert (await response.json())["id"] == "mine"


@in_loop
async def test_the_first_page_tells_the_address_as_it_was_called(start):
    client = await start(default_key=("sk-mine",))
    async with client.get("/", headers={"Host": "ai.example:99999"}) as response:
        assert (await response.json())["base_url"] == "http://ai.example:99999/v1"


@in_loop
async def test_zais_list_is_asked_for_once_in_ten_minutes(client):
    catalog, asked = client.app[ztoapi.CATALOG], []

    async def ask():
        asked.append(1)

    catalog.ask = ask
    for now in (0, 1, 599, 601, 1200, 1202):
        await catalog.list(now)
    await asyncio.sleep(0)
    assert len(asked) == 3


# ======== The connection ========


@in_loop
async def test_a_slow_client_does_not_make_us_read_on(client, zai):
    line = FIRST * 100
    sent = 0

    def parts():
        nonlocal sent
        for _ in range(20_000):  # 300 MB, if somebody took them
            sent += len(line)
            yield line

    zai.parts = parts()
    async with client.post("/v1/chat/completions", json=chat(stream=True), headers=KEY) as response:
        await response.content.readany()
        response._connection.transport.pause_reading()
        last = -1
        while last != sent:
            last = sent
            await asyncio.sleep(0.15)
        response.close()
    assert sent < 40 * 2**20


# ======== The real program ========


@meanwhile
async def test_clients_that_hang_up_free_zai(run, zai):
    program = run(Program, ZAI_BASE_URL=zai.url, ZAI_API_KEY="k")
    for zai.parts, stream in product(([FIRST, HANG], [HANG]), (True, False)):
        reader, writer = await asyncio.open_connection("127.0.0.1", program.port)
        writer.write(raw_request(chat(stream=stream)))
        assert await eventually(lambda: zai.open == 1)
        if stream and zai.parts[0] is FIRST:
            await reader.readuntil(b"}]}")
        zai.left.clear()
        writer.close()
        assert await eventually(lambda: zai.open == 0)
        assert zai.left.is_set()
    status, log = program.stop()
    assert (status, "Traceback" in log, log.count(" 499 ")) == (0, False, 4)


@meanwhile
async def test_a_second_signal_ends_those_who_wait_out_a_refusal_too(run, zai):
    program = run(Program, ZAI_BASE_URL=zai.url, ZAI_API_KEY="k")
    zai.status, zai.parts = zai_refuses(1305)
    asking = asyncio.create_task(ask_once(program.port))
    assert await eventually(lambda: zai.asked, 10)
    program.process.terminate()
    assert program.process.stderr.readline().endswith("answers in flight: 1\n")
    await asyncio.sleep(1.2)
    assert not asking.done()
    program.process.terminate()
    assert (await asking).split()[1] == b"503"
    status, _, log = program.end()
    assert (status, "Traceback" in log) == (0, False)


@meanwhile
async def test_a_second_signal_ends_the_answers_that_the_first_let_finish(run, zai):
    program, zai.parts = run(Program, ZAI_BASE_URL=zai.url, ZAI_API_KEY="k"), [FIRST, HANG]
    reader, writer = await asyncio.open_connection("127.0.0.1", program.port)
    writer.write(raw_request(chat(stream=True)))
    await reader.readuntil(b"}]}")
    for _ in range(2):  # as `timeout` does
        program.process.terminate()
    assert program.process.stderr.readline().endswith("answers in flight: 1\n")
    await asyncio.sleep(1.2)
    assert zai.open == 1
    program.process.terminate()
    rest = await asyncio.wait_for(reader.read(), 10)
    assert error_of(rest.decode().split("data: ")[1])["code"] == "server_stopping"
    writer.close()
    status, _, log = program.end()
    assert (status, "Traceback" in log) == (0, False)


@meanwhile
async def test_debug_mode_logs_everything_but_secrets(run, zai):
    program = run(
        Program, ZAI_BASE_URL=zai.url, ZAI_API_KEY="Zk3y", DEFAULT_KEY="C1nt", DEBUG_MODE="true"
    )
    zai.status, zai.parts = 401, [b'{"error":{"code":"1000","message":"the key Zk3y is no good"}}']
    image = "QUJD" * 1000
    body = message(
        role="user",
        content=[
            {"type": "text", "text": "C1nt Zk3y"},
            {"type": "image_url", "image_url": {"url": image}},
        ],
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", program.port)
    writer.write(raw_request(body | {"model": "glm-4.6v-C1nt"}, "C1nt"))
    answer = await reader.readuntil(b"}}")
    writer.close()
    _, log = program.stop()
    assert b"the key *** is no good" in answer
    for word in ("asked", "sent", "received", "answered", "QUJDQUJD"):
        assert word in log
    assert "Zk3y" not in log
    assert "C1nt" not in log
    assert image not in log


# What Windows lacks is taken away before the program starts.
AS_ON_WINDOWS = f"""
import asyncio, asyncio.unix_events, os, runpy, select, signal, sys

for module, names in (
    (os, "fork getuid geteuid fchmod fchown chown set_blocking killpg getpgid register_at_fork"),
    (signal, "SIGHUP SIGUSR1 SIGALRM setitimer alarm pthread_sigmask"),
    (select, "poll epoll"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
sys.modules.update(dict.fromkeys(("resource", "fcntl", "pwd", "grp"), None))

def add_signal_handler(*_):
    raise NotImplementedError

asyncio.unix_events._UnixSelectorEventLoop.add_signal_handler = add_signal_handler
sys.argv = [{str(PROGRAM)!r}, *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class ProgramAsOnWindows(Program):
    COMMAND = (sys.executable, "-c", AS_ON_WINDOWS)


@meanwhile
async def test_the_program_starts_serves_and_stops_without_what_windows_lacks(run, zai, tmp_path):
    database = f"sqlite:///{tmp_path}/z.db"
    program = run(ProgramAsOnWindows, ZAI_API_KEY="k", ZAI_BASE_URL=zai.url, DATABASE_URL=database)
    for _ in range(2):  # the second on a connection to Z.ai that was used before
        answer = await ask_once(program.port)
        assert b"200 OK" in answer
    program.process.send_signal(signal.SIGINT)
    status, _, log = program.end()
    assert (status, "Traceback" in log) == (0, False)


@meanwhile
async def test_the_demo_answers_without_a_key(run):
    program = run(Program, "--demo")
    with socket.create_connection(("127.0.0.1", program.port), timeout=10) as connection:
        connection.sendall(raw_request(chat(stream=True)))
        stream = b""
        while b"[DONE]" not in stream:
            stream += connection.recv(65536)
    assert b"demo" in stream
    assert "你好" in stream.decode()
    status, log = program.stop()
    assert status == 0
    assert re.search(
        r"POST /v1/chat/completions glm-4.6 200 first \d\.\d\d s, \d\.\d\d s, \d+\+\d+ tokens", log
    )
    assert "/demo/" not in log


def demo_answer(body, **changes):
    deltas = ztoapi.demo_deltas(body | changes)
    return deltas, ztoapi.demo_last(body | changes, deltas)["choices"][0]["finish_reason"]


@pytest.mark.parametrize(
    ("how", "value"),
    [
        ({"type": "string"}, "demo"),
        ({"type": ["integer", "null"]}, 1),
        ({"enum": ["x", "y"]}, "x"),
        ({}, {}),
        (None, {}),
    ],
)
def test_the_demo_calls_the_first_tool_when_the_user_asks_for_one(how, value):
    tools = [
        function("f", parameters={"type": "object", "properties": {"a": how}, "required": ["a"]})
    ]
    deltas, reason = demo_answer(message(role="user", content="Please use the tool"), tools=tools)
    assert json.loads(deltas[-1]["tool_calls"][0]["function"]["arguments"]) == {"a": value}
    assert reason == "tool_calls"
    assert demo_answer(HELLO, tools=tools)[1] == "stop"


def test_the_demo_calls_no_tool_behind_the_result_of_one():
    result = {"role": "tool", "tool_call_id": "c1", "content": "Please use the tool"}
    body = HELLO | {"messages": [*HELLO["messages"], result]}
    assert demo_answer(body, tools=[function("f")])[1] == "stop"


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({}, {}),
        ({"type": "object", "properties": {"a": {"type": "string"}, "b": {}}, "required": ["a"]}, {"a": "demo"}),
        ({"type": "array", "items": {"type": "integer", "minimum": 3}, "minItems": 2}, [3, 3]),
        ({"type": "array", "items": {"type": "string"}}, []),
        ({"type": ["boolean", "null"]}, True),
        ({"type": "number", "exclusiveMinimum": 2}, 3),
        ({"type": "integer"}, 1),
        ({"type": "integer", "maximum": -1}, -1),
        ({"type": "string", "minLength": 6}, "demo.."),
        ({"enum": ["x", "y"]}, "x"),
        ({"const": 7}, 7),
        ({"anyOf": [{"type": "null"}, {}]}, None),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "boolean"}}}, True),
    ],
    ids=str,
)  # fmt: skip
def test_the_demo_fills_a_schema_with_the_least_that_fits(schema, value):
    assert ztoapi.smallest(schema) == value


def test_the_demo_ends_in_a_schema_that_requires_itself():
    schema = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    assert "a" in ztoapi.smallest(schema)


@in_loop
async def test_the_demo_answers_every_surface(demo):
    client = await demo()
    point = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    said = {"model": "glm-4.6v", "max_tokens": 100, "messages": [turn([PICTURE_BLOCK])]}
    asked = [
        ("messages", said),
        ("messages", said | {"output_format": {"type": "json_schema", "schema": point}}),
        ("messages", said | {"tools": [GREP], "tool_choice": {"type": "any"}}),
        ("responses", {"model": "glm-4.6", "input": "hi"}),
        ("completions", {"model": "glm-4.6", "prompt": "hi"}),
    ]
    answers = [json.loads((await ask(client, body, f"/v1/{path}"))[1]) for path, body in asked]
    blocks = [answer["content"][0] for answer in answers[:3]]
    assert "[image_url of 3 bytes]" in blocks[0]["text"]
    assert (blocks[1]["text"], blocks[2]["name"]) == ('{"x":1}', "grep")
    assert "This is the demo" in json.dumps(answers[3])
    assert "This is the demo" in json.dumps(answers[4])


def test_the_demo_stops_at_max_tokens_and_thinks_when_it_may():
    deltas, reason = demo_answer(HELLO, max_tokens=4)
    assert (len(deltas), reason, "reasoning_content" in deltas[0]) == (4, "length", True)
    assert "reasoning_content" not in demo_answer(HELLO, thinking={"type": "disabled"})[0][0]


@in_loop
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::", "0.0.0.0"])
async def test_the_demo_works_on_every_address(demo, host):
    client = await demo(host, default_key=("k",))
    url = f"http://{'[::1]' if host == '::1' else '127.0.0.1'}:{client.port}/v1/chat/completions"
    async with client.session.post(url, json=HELLO, headers={"x-api-key": "k"}) as response:
        assert (response.status, "demo" in await response.text()) == (200, True)


@pytest.mark.parametrize(
    ("arguments", "variables", "line"),
    [
        (
            [],
            {"PORT": "abc"},
            "ztoapi: PORT=abc cannot be used: it must be a port number, 0 to 65535",
        ),
        (
            ["--port", "abc"],
            {},
            "ztoapi: PORT=abc cannot be used: it must be a port number, 0 to 65535",
        ),
        (["--host", "0.0.0.0"], {}, "ztoapi: HOST=0.0.0.0 would let others in"),
        ([], {"DEFAULT_KEY": ""}, "ztoapi: DEFAULT_KEY cannot be used"),
        (
            ["--port", "1", "--host", "name.invalid"],
            {"DEFAULT_KEY": "k"},
            "ztoapi: HOST=name.invalid, PORT=1 cannot be",
        ),
    ],
)
def test_a_start_that_cannot_be_is_one_line_and_status_2(command, arguments, variables, line):
    status, out, words = command(*arguments, **variables)
    assert (status, out, words.count("\n")) == (2, "", 1)
    assert words.startswith(line)


def test_a_port_in_use_is_one_line_and_status_2(command):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        status, out, words = command("--port", port)
    assert (status, out, words.count("\n")) == (2, "", 1)
    assert f"port {port} on localhost is in use" in words


@meanwhile
async def test_env_beside_the_program_is_read_and_the_environment_wins(tmp_path):
    shutil.copy(PROGRAM, tmp_path)
    (tmp_path / ".env").write_text("PORT=abc\nMAX_BODY_MB=x\n")
    command, env = [sys.executable, tmp_path / "ztoapi.py"], INHERITED | {"PORT": "0"}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=20, cwd="/"
    )
    assert done.stderr.startswith("ztoapi: MAX_BODY_MB=x cannot be used")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_env_is_read_as_windows_programs_save_it(monkeypatch, tmp_path, encoding):
    monkeypatch.setattr(ztoapi, "ENV_FILE", tmp_path / ".env")
    (tmp_path / ".env").write_text("ZTOAPI_TEST=né\r\n", encoding)
    assert ztoapi.environment()["ZTOAPI_TEST"] == "né"


def test_env_in_utf_16_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(ztoapi, "ENV_FILE", tmp_path / ".env")
    (tmp_path / ".env").write_text("ZAI_API_KEY=k", "utf-16")
    with pytest.raises(ztoapi.SettingsError, match=r"save it as UTF-8$"):
        ztoapi.environment()


def test_version_and_help(command):
    assert command("--version") == (0, f"ztoapi {ztoapi.__version__}\n", "")
    status, out, _ = command("--help")
    assert (status, "--demo" in out) == (0, True)


# ======== Hostile conditions ========

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = "POST {} HTTP/1.1\r\nHost: localhost\r\nx-api-key: sk-your-key\r\n{}\r\n\r\n"


@in_loop
@pytest.mark.parametrize("part", [b"", b"GET /"], ids=["nothing", "half a head"])
@pytest.mark.parametrize("before", [0, 1], ids=["first", "second"])
async def test_a_connection_without_a_whole_head_is_closed(start, before, part):
    client = await start(limits=OBSERVANT if before else IMPATIENT)
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    for _ in range(before):
        writer.write(GET)
        await reader.readuntil(b"}")
        hurry(client)

    def is_closed():
        ended = reader.at_eof() or reader.exception() is not None
        if part and not ended:
            writer.write(b"x")  # it goes on, byte by byte
        return ended

    writer.write(part)
    is_idle = bool(before) and not part
    assert await eventually(is_closed, 0.5 if is_idle else 10) is not is_idle
    writer.close()


@in_loop
async def test_a_head_without_end_is_not_kept(client):
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(GET[:-2] + b"".join(b"x%d: %s\r\n" % (i, b"y" * 1000) for i in range(300)))
    with contextlib.suppress(ConnectionResetError):
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.0 431 ")
    writer.close()


@in_loop
@pytest.mark.parametrize(
    "data",
    [b"", GET, b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc"],
)
async def test_those_that_ask_nothing_make_room_for_those_that_do(client, data):
    silent = [await asyncio.open_connection("127.0.0.1", client.port) for _ in range(10)]
    for reader, writer in silent:
        writer.write(data)
        assert not data or await reader.readuntil(b"}")  # one is answered before its body has ended
    client.server.handler.max_descriptors = 0  # none is left
    for _ in silent:
        assert (await talk_raw(client, GET)).startswith(b"HTTP/1.1 200")
    for reader, writer in silent:
        await asyncio.wait_for(reader.read(), 10)
        writer.close()


@in_loop
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/files", "/v1/nothing"])
@pytest.mark.parametrize(
    ("headers", "body"),
    [
        pytest.param("Content-Encoding: gzip\r\nContent-Length: 9", b"not gzip!", id="encoding"),
        pytest.param("Transfer-Encoding: chunked", b"3\r\nabc\r\nno chunk\r\n", id="chunks"),
        pytest.param("Transfer-Encoding: chunked", b"3\r\n{ }\r\n|no chunk\r\n", id="a late chunk"),
        pytest.param("Content-Length: 9", b"abc", id="silence"),
    ],
)
async def test_a_broken_body_is_refused_and_ends_the_connection(start, caplog, path, headers, body):
    client = await start(limits=IMPATIENT)
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(POST.format(path, headers).encode())
    for part in body.split(b"|"):
        await asyncio.sleep(0.02)
        writer.write(part)
    head, _, text = (await asyncio.wait_for(reader.readuntil(b"}}"), 10)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404" if path == "/v1/nothing" else b"HTTP/1.1 400")
    assert path == "/v1/nothing" or await asyncio.wait_for(reader.read(), 10) == b""
    assert error_of(text)["type"] == "invalid_request_error"
    assert ("Traceback" in caplog.text, client.app[ztoapi.IN_FLIGHT]) == (False, {})
    writer.close()


@in_loop
@pytest.mark.parametrize(
    ("path", "stream"),
    [
        ("/v1/chat/completions", True),
        ("/v1/chat/completions", False),
        ("/v1/messages", True),
        ("/v1/files/f/content", False),
    ],
)
async def test_a_client_that_no_longer_reads_loses_its_connection(start, zai, path, stream):
    client = await start(limits=OBSERVANT, upstream_timeout=0.2)
    piece = FIRST.replace(b"reasoning_content", b"content").replace("想".encode(), b"x" * 2**20)
    zai.parts = [piece] * 40 + [RECORDED]
    method, body = ("GET", None) if "files" in path else ("POST", chat(stream=stream, max_tokens=9))
    async with client.request(method, path, json=body, headers=KEY) as response:
        await response.content.readany()
        response._connection.transport.pause_reading()
        assert await eventually(lambda: not client.server.handler.connections)
        assert await eventually(lambda: (zai.open, client.app[ztoapi.IN_FLIGHT]) == (0, {}))
        response.close()


@pytest.mark.parametrize(
    ("unsent", "ends"),
    [
        pytest.param([5, 5, 5, 5], True, id="reads nothing"),
        pytest.param([5, 6, 7, 8], True, id="reads nothing of what grows"),
        pytest.param([9, 5, 9, 9], False, id="reads"),
        pytest.param([5, 5, 0, 5], False, id="reads all"),
    ],
)
@in_loop
async def test_a_client_that_reads_nothing_is_told_from_a_slow_one(client, unsent, ends):
    class Transport:
        ended = False
        get_write_buffer_size = iter(unsent).__next__

        def abort(self):
            self.ended = True

    connection, transport = client.server.handler(), Transport()
    connection.client = transport
    for now in range(len(unsent)):
        connection.check_reader(connection.last_received_at + 10 * now, patience=25)
    assert transport.ended is ends


@in_loop
async def test_a_body_that_comes_byte_by_byte_gets_no_more_time(start):
    client = await start(limits=Limits(min_read=400, read_timeout=0.8))

    async def send_slowly(path):
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(POST.format(path, "Content-Length: 99999").encode())
        answer = asyncio.create_task(reader.readline())
        for _ in range(10):
            writer.write(b"x" * 400)
            await asyncio.sleep(0.1)
        assert not answer.done()

        def is_refused():
            writer.write(b"" if answer.done() else b"x")
            return answer.done()

        assert await eventually(is_refused)
        assert answer.result().startswith(b"HTTP/1.1 400")
        writer.close()

    await asyncio.gather(*map(send_slowly, ("/v1/chat/completions", "/v1/files")))


LARGE = message(role="user", content="x" * 2**24)


def narrow_socket(*where):
    """What connects to this socket can send little before somebody reads."""
    listener = get_port_socket(*where)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
    return listener


@in_loop
@pytest.mark.parametrize(
    ("pauses", "status"), [([0.15] * 16, 200), ([60], 504)], ids=["slow", "none of it"]
)
async def test_an_upload_may_be_slow_but_not_stall(start, pauses, status):
    async with fake_zai(socket_factory=narrow_socket) as zai:
        client = await start(upstream_timeout=1.4, zai_base_url=zai.url)
        zai.pauses, zai.headers, zai.parts = pauses, {}, [DOCUMENT]
        started = time.monotonic()
        uploads = asyncio.gather(
            *(ask(client, LARGE, f"/v1/{path}") for path in ("chat/completions", "files"))
        )
        assert [response.status for response, _ in await asyncio.wait_for(uploads, 30)] == [
            status
        ] * 2
        # In all, a slow one takes longer than Z.ai may be silent.
        assert time.monotonic() - started > 1.4
        assert (await stats(client))[0]["in_flight"] == 0


@in_loop
async def test_while_we_read_nothing_a_client_is_not_silent(start):
    async with fake_zai(socket_factory=narrow_socket) as zai:
        client = await start(limits=IMPATIENT, zai_base_url=zai.url)
        zai.pauses, zai.headers, zai.parts = [0.7] * 2, {}, [DOCUMENT]
        response, _ = await ask(client, LARGE, "/v1/files")
        assert response.status == 200


@in_loop
async def test_zai_is_told_how_long_a_large_request_is(client, zai):
    await ask(client, LARGE)
    ((_, _, headers, body),) = zai.asked
    assert headers["Content-Length"] == str(len(body))


@in_loop
async def test_a_refusal_whose_body_stalls_is_judged_by_its_status(start, zai):
    client = await start(limits=Limits(error_body_timeout=0.1))
    zai.answers = [(502, [b'{"error":', HANG]), (500, [b"<html>", RESET]), (400, [HANG])]
    response, text = await ask(client)
    assert (response.status, error_of(text)["code"], slept(client)) == (400, "zai_400", [0.5, 1])


# ======== Keys and usage ========


async def make_key(client, name="anna", status=201, **limits):
    async with client.post(
        "/dashboard/keys", json={"name": name, **limits}, headers=KEY
    ) as response:
        document = await response.json()
        assert response.status == status, document
        return {"x-api-key": document["key"]} if status == 201 else document


ASKING = {
    "chat/completions": HELLO,
    "completions": {"model": "glm-4.6", "prompt": "hi"},
    "responses": {"model": "glm-4.6", "input": "hi"},
    "messages": {"model": "glm-4.6", "max_tokens": 5, "messages": HELLO["messages"]},
}
every_surface = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def kind_of(path, body):
    error = json.loads(body)["error"]
    return error["type"] if path == "messages" else error["code"]


async def ask_surface(client, path, stream, key, **fields):
    response, body = await ask(
        client, ASKING[path] | {"stream": stream} | fields, f"/v1/{path}", key
    )
    return response, kind_of(path, body) if response.status >= 400 else ""


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", ASKING)
@pytest.mark.parametrize(
    ("limits", "status", "code", "anthropic"),
    [
        ({"models": "glm-5*"}, 403, "model_not_allowed", "permission_error"),
        ({"tokens": "9"}, 402, "key_quota_exceeded", "billing_error"),
        ({"spend": "1"}, 402, "key_quota_exceeded", "billing_error"),
        ({"rpm": 1}, 429, "rate_limit_exceeded", "rate_limit_error"),
    ],
)
async def test_what_a_key_may_is_asked_on_every_surface(
    client, zai, limits, status, code, anthropic, path, stream
):
    key = await make_key(client, **limits)
    account = client.app[ztoapi.ACCOUNTS].find(key["x-api-key"])
    figures = (1, 0, 9, 0, 0, DOLLAR)
    client.app[ztoapi.ACCOUNTS].count((account.id, today(client), "m"), figures)
    if status == 429:
        zai.parts = [DOCUMENT]
        assert (await ask(client, headers=key))[0].status == 200
    asked = len(zai.bodies)
    response, kind = await ask_surface(client, path, stream, key)
    assert (response.status, kind) == (status, anthropic if path == "messages" else code)
    assert len(zai.bodies) == asked
    assert ("Retry-After" in response.headers) is (status == 429)


@in_loop
async def test_a_client_that_leaves_before_the_end_uses_up_its_tokens_too(client, zai):
    zai.parts = [FIRST, HANG]
    key = await make_key(client, tokens="40")
    picture = {"type": "image_url", "image_url": {"url": "x" * 9999}}
    asked = chat(stream=True, model="glm-4.6v", messages=[turn([text_block("x" * 400), picture])])
    async with client.post("/v1/chat/completions", json=asked, headers=key) as response:
        await response.content.readline()
    assert await eventually(lambda: client.app[ztoapi.ACCOUNTS].counted)
    ((_, used),) = client.app[ztoapi.ACCOUNTS].counted.items()
    assert used[0:2] == [1, 0]
    assert 1100 <= used[2] <= 1200  # 400 characters of text and 4,000 for the picture
    assert used[3:5] == [0, 1]


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_who_leaves_before_the_first_word_has_used_all_that_zai_has(client, zai, stream):
    zai.parts = [HANG]
    key = await make_key(client, tokens="1M")
    tool = function("f", description="x" * 40_000, parameters={"enum": ["y" * 40_000]})
    asking = asyncio.create_task(ask(client, chat(stream=stream, tools=[tool]), headers=key))
    assert await eventually(lambda: zai.asked)
    asking.cancel()
    assert await eventually(lambda: client.app[ztoapi.ACCOUNTS].counted)
    ((_, used),) = client.app[ztoapi.ACCOUNTS].counted.items()
    assert 20_000 <= used[2] <= 21_000


@in_loop
@pytest.mark.parametrize(
    ("path", "tokens"),
    [("embeddings", 10_000), ("web_search", 0)],
)
async def test_who_leaves_another_path_has_used_what_zai_counts_there(client, zai, path, tokens):
    zai.headers, zai.parts = {}, [HANG]
    key = await make_key(client, tokens="1M")
    body = {"model": "glm-4.6", "input": "x" * 40_000}
    asking = asyncio.create_task(ask(client, body, f"/v1/{path}", key))
    assert await eventually(lambda: zai.asked)
    asking.cancel()
    assert await eventually(lambda: not client.app[ztoapi.IN_FLIGHT])
    used = [figures[2] for figures in client.app[ztoapi.ACCOUNTS].counted.values()]
    assert tokens <= sum(used) <= tokens + 50


@in_loop
async def test_the_images_of_messages_are_not_counted_as_text(client, zai):
    zai.parts = [HANG]
    key = await make_key(client, tokens="1M")
    picture = {"type": "base64", "media_type": "image/png", "data": "x" * 400_000}
    words = {"type": "text", "media_type": "text/plain", "data": "y" * 40_000}
    document, image = {"type": "document", "source": words}, {"type": "image", "source": picture}
    said = [turn([document, {"type": "tool_result", "tool_use_id": "a", "content": [image]}])]
    body = {"model": "glm-4.6v", "max_tokens": 9, "messages": said}
    asking = asyncio.create_task(ask(client, body, "/v1/messages", key))
    assert await eventually(lambda: zai.asked)
    asking.cancel()
    assert await eventually(lambda: client.app[ztoapi.ACCOUNTS].counted)
    ((_, used),) = client.app[ztoapi.ACCOUNTS].counted.items()
    assert 11_000 <= used[2] <= 11_100


@in_loop
@pytest.mark.parametrize("path", [*ASKING, "embeddings"])
async def test_what_zai_refuses_costs_nothing(client, zai, path):
    zai.answers = [(400, [b"{}"])]
    key = await make_key(client, tokens="1M")
    body = ASKING.get(path, {"model": "embedding-3", "input": "hi"})
    assert (await ask(client, body, f"/v1/{path}", key))[0].status == 400
    ((_, used),) = client.app[ztoapi.ACCOUNTS].counted.items()
    assert used == [1, 1, 0, 0, 0, 0]


@in_loop
async def test_who_leaves_the_queue_has_used_nothing(start, zai):
    client = await start(max_concurrency=1)
    zai.parts = [HANG]
    key = await make_key(client, tokens="1M")
    first = asyncio.create_task(ask(client))
    assert await eventually(lambda: zai.asked)
    asking = asyncio.create_task(ask(client, headers=key))
    assert await eventually(lambda: client.app[ztoapi.UPSTREAM].queue("glm-4.6").waiting)
    asking.cancel()
    counted = client.app[ztoapi.ACCOUNTS].counted
    assert await eventually(lambda: counted)
    assert [figures[2:5] for figures in counted.values()] == [[0, 0, 0]]
    await ztoapi.end_tasks([first])


@in_loop
async def test_what_was_received_counts_with_reasoning_and_arguments(client, zai):
    call = piece(id="a", index=0, function=named("f", json.dumps({"x": "z" * 4000})))
    zai.parts = [stream_of({"reasoning_content": "t" * 4000}, call, done=""), RESET]
    key = await make_key(client, tokens="1M")
    await ask(client, chat(stream=True, tools=[function("f")]), headers=key)
    assert await eventually(lambda: client.app[ztoapi.ACCOUNTS].counted)
    ((_, used),) = client.app[ztoapi.ACCOUNTS].counted.items()
    assert 2000 <= used[4] <= 2010


def pieces_received(client):
    records = [request[ztoapi.RECORD] for request in client.app[ztoapi.IN_FLIGHT].values()]
    return sum(meter.pieces for record in records for meter in record.meters)


@in_loop
async def test_who_leaves_a_whole_answer_has_used_what_came_of_it(client, zai):
    zai.parts = [stream_of({"content": "t" * 4000}, done=""), HANG]
    key = await make_key(client, tokens="1M")
    asking = asyncio.create_task(ask(client, headers=key))
    assert await eventually(lambda: pieces_received(client))
    asking.cancel()
    assert await eventually(lambda: client.app[ztoapi.ACCOUNTS].counted)
    ((_, used),) = client.app[ztoapi.ACCOUNTS].counted.items()
    assert used[4] == 1000


@in_loop
async def test_a_whole_answer_that_breaks_off_for_good_is_charged_once(client, zai):
    zai.parts = [stream_of({"content": "t" * 4000}, done=""), RESET]
    key = await make_key(client, tokens="1M")
    assert (await ask(client, headers=key))[0].status == 502
    ((_, used),) = client.app[ztoapi.ACCOUNTS].counted.items()
    assert (used[0:2], used[4], len(zai.asked)) == ([1, 1], 1000, 3)


@in_loop
async def test_of_n_choices_each_is_charged_what_is_known_of_it(client, zai):
    zai.answers = [[RECORDED], [stream_of({"content": "t" * 4000}, done=""), HANG]]
    key = await make_key(client, tokens="1M")
    async with client.post(
        "/v1/chat/completions", json=chat(stream=True, n=2), headers=key
    ) as response:
        while b"ttt" not in await response.content.readline():
            pass
    assert await eventually(lambda: client.app[ztoapi.ACCOUNTS].counted)
    ((_, used),) = client.app[ztoapi.ACCOUNTS].counted.items()
    size = len(zai.asked[0][3])
    tokens = (6 + size // 4, 2, 3 + 1000)
    assert used == [1, 0, *tokens, ztoapi.cost_at(MODELS["glm-4.6"].price, *tokens)]


@in_loop
async def test_usage_is_counted_before_the_client_has_the_last_frame(client, zai):
    zai.parts = [stream_of({"content": "t" * 2**23}, done="") + RECORDED]
    key = await make_key(client, tokens="1M")
    async with client.post("/v1/chat/completions", json=chat(stream=True), headers=key):
        assert await eventually(lambda: client.app[ztoapi.ACCOUNTS].counted)
        assert client.app[ztoapi.IN_FLIGHT]


@in_loop
async def test_those_who_wait_in_the_queue_do_not_pass_a_budget(start, zai):
    client = await start(max_concurrency=1)
    key = await make_key(client, tokens="20")  # an answer takes 9
    asked = await asyncio.gather(*(ask(client, headers=key) for _ in range(12)))
    statuses = sorted(response.status for response, _ in asked)
    assert statuses == [200] * 3 + [402] * 9


@in_loop
@pytest.mark.parametrize("path", [*ASKING, "embeddings"])
async def test_those_who_wait_for_others_of_their_key_do_not_pass_a_budget(client, zai, path):
    if path == "embeddings":
        zai.headers, zai.parts = {}, [b'{"data":[],"usage":{"prompt_tokens":9,"total_tokens":9}}']
    key = await make_key(client, tokens="20", parallel=1)
    body = ASKING.get(path, {"model": "embedding-3", "input": "hi"})
    asked = await asyncio.gather(*(ask(client, body, f"/v1/{path}", key) for _ in range(9)))
    statuses = sorted(response.status for response, _ in asked)
    assert statuses == [200] * 3 + [402] * 6


@in_loop
async def test_each_of_n_choices_counts_for_rpm(client, zai):
    key = await make_key(client, rpm=5)
    statuses = [(await ask(client, chat(n=n), headers=key))[0].status for n in (3, 3, 2, 1)]
    assert statuses == [200, 429, 200, 429]


def test_choices_are_counted_though_their_body_took_more_than_a_minute():
    account, accounts = Account("id", rpm=3), Accounts([])
    accounts.check_rate(account, 0)
    accounts.check_rate(account, 61)
    with pytest.raises(ztoapi.ProxyError):
        accounts.check_choices(account, 4, 61)
    accounts.check_choices(account, 2, 62)
    assert [*accounts.asked["id"]] == [62, 62]


@in_loop
async def test_more_choices_than_a_key_may_ask_for_are_never_taken(client, zai):
    key = await make_key(client, rpm=5)
    response, text = await ask(client, chat(n=6), headers=key)
    assert (response.status, error_of(text)["param"], zai.asked) == (429, "n", [])
    assert (response.headers["x-should-retry"], "Retry-After" in response.headers) == (
        "false",
        False,
    )
    assert (await ask(client, chat(n=5), headers=key))[0].status == 200


@in_loop
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_of_n_choices_no_more_than_parallel_are_in_flight(client, zai, stream):
    most = 0

    async def counted(self, request):
        nonlocal most
        most = max(most, self.open)
        await asyncio.sleep(0.02)
        return await FakeZai.answer(self, request)

    zai.answer = counted.__get__(zai)
    key = await make_key(client, parallel=2)
    asked = await asyncio.gather(
        *(ask(client, chat(n=5, stream=stream), headers=key) for _ in range(2))
    )
    assert [response.status for response, _ in asked] == [200, 200]
    assert (most, len(zai.asked)) == (2, 10)


LONG_NAME = "m" * 257


@in_loop
@pytest.mark.parametrize(
    "path",
    ["web_search", "embeddings", "images/generations", "chat/completions", "messages", "responses"],
)
@pytest.mark.parametrize("models", [None, "glm-*"])
async def test_a_name_that_is_too_long_is_refused_before_it_is_looked_up(client, zai, path, models):
    key = await make_key(client, models=models)
    body = {**HELLO, "model": LONG_NAME, "max_tokens": 9, "input": "x"}
    looked_up = ztoapi.named.cache_info().misses
    response, text = await ask(client, body, f"/v1/{path}", key)
    assert (response.status, LONG_NAME in text, zai.asked) == (400, False, [])
    assert ztoapi.named.cache_info().misses == looked_up


@in_loop
async def test_an_error_repeats_no_name_at_length(client):
    choice = {"type": "function", "function": {"name": "f" * 100_000}}
    response, text = await ask(client, chat(tools=[function("f")], tool_choice=choice))
    assert (response.status, "names fff" in text, len(text) < 1000) == (400, True, True)


@in_loop
async def test_a_name_that_is_too_long_is_not_found_in_a_path(client):
    async with client.get(f"/v1/models/{LONG_NAME}", headers=KEY) as response:
        assert (response.status, LONG_NAME in await response.text()) == (404, False)


@in_loop
@pytest.mark.parametrize("model", [None, ["glm-image"], "", 7, "ABSENT"])
@pytest.mark.parametrize("kind", ["application/json", "application/vnd.api+json", "text/plain"])
async def test_a_key_limited_to_models_must_name_one(client, zai, model, kind):
    key = await make_key(client, models="glm-4*")
    body = json.dumps({"prompt": "x"} | ({} if model == "ABSENT" else {"model": model}))
    path, headers = "/v1/images/generations", key | {"Content-Type": kind}
    async with client.post(path, data=body, headers=headers) as response:
        assert (response.status in (400, 403), zai.asked) == (True, [])


@in_loop
@pytest.mark.parametrize("kind", ["application/json", "application/vnd.api+json", "text/plain"])
async def test_usage_is_counted_whatever_the_content_type(client, zai, kind):
    zai.parts = [b'{"data":[],"usage":{"prompt_tokens":7,"total_tokens":7}}']
    key = await make_key(client, tokens="1M")
    body = b'{"model":"embedding-3","input":"x"}'
    headers = key | {"Content-Type": kind}
    async with client.post("/v1/embeddings", data=body, headers=headers) as response:
        assert response.status == 200
    assert await eventually(lambda: client.app[ztoapi.ACCOUNTS].counted)
    ((account, used),) = client.app[ztoapi.ACCOUNTS].counted.items()
    assert (account[2], used) == ("embedding-3", [1, 0, 7, 0, 0, 0])


@in_loop
async def test_images_are_counted_by_model(client):
    body = {"model": "glm-image", "prompt": "x"}
    await ask(client, body, "/v1/images/generations")
    assert (await stats(client))[0]["models"]["glm-image"]["requests"] == 1


@in_loop
async def test_an_alias_stands_for_a_model_once(start):
    client = await start(model_aliases=(("picture", "glm-image"), ("glm-image", "cogview-4")))
    await ask(client, {"model": "picture", "prompt": "x"}, "/v1/images/generations")
    assert [*(await stats(client))[0]["models"]] == ["glm-image"]


@in_loop
async def test_where_no_model_serves_the_name_of_one_is_not_counted(client):
    for path in ("web_search", "reader"):
        assert (await ask(client, chat(model="made-up"), f"/v1/{path}"))[0].status == 200
    async with client.get("/metrics", headers=KEY) as response:
        assert "made-up" not in await response.text()


@in_loop
@pytest.mark.parametrize("parts", [[HANG], [b"{}"]], ids=["left", "refused"])
async def test_a_model_that_zai_has_not_answered_for_is_not_named(client, zai, parts):
    zai.answers = [(404, parts)]
    key = await make_key(client, tokens="1M")
    asking = asyncio.create_task(ask(client, chat(model="made-up"), headers=key))
    assert await eventually(lambda: zai.asked)
    async with client.get("/metrics", headers=KEY) as response:
        assert "made-up" not in await response.text()
    await ztoapi.end_tasks([asking])
    counted = client.app[ztoapi.ACCOUNTS].counted
    assert await eventually(lambda: counted)
    assert [model for _, _, model in counted] == ["other"]
    assert (await stats(client))[0]["models"].keys() == {"other"}


@in_loop
async def test_what_was_mended_is_in_the_metrics_by_the_repairs_own_name(client, zai):
    zai.parts = [RECORDED.replace("你".encode(), "\\n你".encode(), 1)]
    text = message(role="user", content="hi")["messages"]
    await ask(client, chat(messages=[*text, {"role": "assistant", "content": ""}]))
    async with client.get("/metrics", headers=KEY) as response:
        metrics = (await response.text()).splitlines()
    assert [line for line in metrics if "repairs" in line] == [
        "# TYPE ztoapi_repairs_total counter",
        'ztoapi_repairs_total{kind="mend_empty_messages"} 1',
        'ztoapi_repairs_total{kind="line_ends_at_head"} 1',
    ]


@in_loop
async def test_the_limit_in_the_metrics_is_what_may_be_in_flight(start):
    client = await start(max_concurrency=1)
    await ask(client)
    async with client.get("/metrics", headers=KEY) as response:
        assert 'ztoapi_limit{model="glm-4.6"} 1\n' in await response.text()


@in_loop
async def test_an_expired_key_is_refused_everywhere(client):
    key = await make_key(client, expires="1d")
    accounts = client.app[ztoapi.ACCOUNTS]
    accounts.named = {
        name: replace(account, expires="2026-01-01") for name, account in accounts.named.items()
    }
    for path in ("/v1/models", "/v1/responses/resp_1", "/dashboard/stats"):
        async with client.get(path, headers=key) as response:
            assert (response.status, error_of(await response.text())["code"]) == (
                401,
                "key_expired",
            )


@in_loop
async def test_fallbacks_of_the_client_must_be_allowed_and_those_of_the_operator_are_left_out(
    start, zai
):
    client = await start(
        fallback_models=("glm-5.3", "glm-4.7"), max_retries=0, model_aliases=(("best", "glm-5.3"),)
    )
    key, (status, busy) = await make_key(client, models="glm-4*"), zai_refuses(1234, 500)
    for fields in ({"model": "best"}, {"fallbacks": ["glm-4.7", "zai/GLM-5.3"]}):
        response, body = await ask(client, chat(**fields), headers=key)
        assert (response.status, error_of(body)["code"], zai.bodies) == (
            403,
            "model_not_allowed",
            [],
        )
    zai.answers, zai.parts = [(status, busy)], [DOCUMENT]
    response, _ = await ask(client, headers=key)
    assert (response.status, response.headers["x-ztoapi-model"]) == (200, "glm-4.7")


@in_loop
@pytest.mark.parametrize(
    ("path", "kind", "body", "status"),
    [
        ("embeddings", "application/json", b'{"model": "embedding-3"}', 200),
        ("embeddings", "application/json", b'{"model": "mine"}', 200),
        ("embeddings", "application/json", b'{"model": "EMBEDDING-2"}', 403),
        ("images/generations", "application/json", b'{"model": "glm-image"}', 403),
        ("images/generations", "text/plain", b'{"model": "glm-image"}', 403),
        ("web_search", "application/json", b"{}", 200),
    ],
)
async def test_what_is_passed_through_is_for_the_models_of_a_key(
    start, zai, path, kind, body, status
):
    client = await start(model_aliases=(("mine", "embedding-3"),))
    key = await make_key(client, models="embedding-3")
    async with client.post(
        f"/v1/{path}", data=body, headers=key | {"Content-Type": kind}
    ) as response:
        assert response.status == status, await response.text()
    assert len(zai.asked) == (status == 200)
    async with client.get("/v1/files", headers=key) as response:
        assert response.status == 200


@in_loop
async def test_a_named_key_deletes_a_file_with_openais_sdk(client, zai, sdk):
    """The SDK says that it sends JSON, and sends nothing."""
    zai.headers = {"Content-Type": "application/json"}
    zai.parts = [b'{"id": "abc", "object": "file", "deleted": true}']
    key = await make_key(client, models="glm-4*")
    deleted = await sdk.with_options(api_key=key["x-api-key"]).files.delete("abc")
    assert (deleted.deleted, zai.asked[0][0], zai.asked[0][3]) == (True, "DELETE", b"")


@in_loop
@pytest.mark.parametrize("form", ["float", "base64"])
async def test_what_embeddings_tell_is_counted(start, zai, form):
    key = KEY | {"Content-Type": "application/json"}
    client, usage = await start(), {"prompt_tokens": 8, "total_tokens": 8}
    zai.parts = [json.dumps(VECTORS | {"usage": usage}).encode()]
    await ask(
        client,
        {"model": "embedding-3", "input": "x", "encoding_format": form},
        "/v1/embeddings",
        key,
    )
    assert await eventually(lambda: client.app[ztoapi.ACCOUNTS].counted)
    assert [(key[2], row) for key, row in client.app[ztoapi.ACCOUNTS].take().items()] == [
        ("embedding-3", [1, 0, 8, 0, 0, 0])
    ]


@in_loop
async def test_a_key_sees_only_its_own_models(start):
    client = await start(model_aliases=(("mini", "glm-4.5-air"), ("best", "glm-5.3")))
    async with client.get(
        "/v1/models", headers=await make_key(client, models="glm-4.5*")
    ) as response:
        listed = {model["id"] for model in (await response.json())["data"]}
    assert {"mini", "glm-4.5-air"} < listed
    assert all(name == "mini" or name.startswith("glm-4.5") for name in listed)


@in_loop
@pytest.mark.parametrize(
    ("models", "takes"), [("glm-4.6*", ["text", "image"]), ("glm-4.6", ["text"])]
)
async def test_a_key_is_told_of_no_images_that_it_may_not_have_answered(start, models, takes):
    client = await start(vision_model="glm-4.6v-flash")
    assert (await modalities(client, await make_key(client, models=models)))["glm-4.6"] == takes


@in_loop
async def test_more_than_its_parallel_requests_wait(client, zai):
    key, zai.parts = await make_key(client, parallel=2), [HANG]
    asking = [asyncio.create_task(ask(client, headers=key)) for _ in range(4)]
    assert await eventually(lambda: len(client.app[ztoapi.IN_FLIGHT]) == 4 and zai.open == 2)
    await make_key(client, parallel=3, status=200)
    asking.append(asyncio.create_task(ask(client, headers=key)))
    assert await eventually(lambda: zai.open > 2)
    zai.parts = [DOCUMENT]
    await ztoapi.end_tasks(asking[:2])
    assert (await asking[3])[0].status == 200
    await ztoapi.end_tasks(asking)


ROUTES = [
    *((("POST", f"/v1/{path}"), "200 200 401") for path in ASKING),
    (("GET", "/v1/models"), "200 200 401"),
    (("GET", "/v1/models/glm-4.6"), "200 200 401"),
    (("GET", "/v1/responses/resp_1"), "404 404 401"),
    (("GET", "/v1/responses/resp_1/input_items"), "404 404 401"),
    (("DELETE", "/v1/responses/resp_1"), "404 404 401"),
    (("GET", "/metrics"), "200 403 401"),
    (("GET", "/dashboard/stats"), "200 200 401"),
    (("GET", "/dashboard/history"), "200 200 401"),
    (("GET", "/dashboard/keys"), "200 403 401"),
    (("POST", "/dashboard/keys"), "400 403 401"),
    (("DELETE", "/dashboard/keys/gone"), "404 403 401"),
    (("POST", "/v1/messages/count_tokens"), "400 400 401"),
    (("POST", "/v1/responses/compact"), "400 400 401"),
    (("POST", "/v1/responses/input_tokens"), "400 400 401"),
    *(
        ((method, f"/v1/{path.replace(ztoapi.ID_PATTERN, 'x')}"), "200 200 401")
        for method, path in ztoapi.PASS_THROUGH_ROUTES
    ),
    *(
        (("GET", path), "200 200 200")
        for path in ("/health", "/", "/docs", "/favicon.ico", "/dashboard", "/api/hello")
    ),
]


@in_loop
async def test_the_table_of_routes_has_every_route(client):
    routed = set()
    for method, path in (route for route, _ in ROUTES):
        request = make_mocked_request(method, path, app=client.app)
        routed.add((await client.app.router.resolve(request)).route)
    assert {route for route in client.app.router.routes() if route.method != "HEAD"} == routed


@in_loop
@pytest.mark.parametrize(
    ("route", "statuses"), ROUTES, ids=[" ".join(route) for route, _ in ROUTES]
)
async def test_every_route_for_an_operators_key_a_named_one_and_none(client, zai, route, statuses):
    zai.parts, zai.headers = [DOCUMENT], {}
    method, path = route
    body = ASKING.get(path.removeprefix("/v1/"))
    for key, status in zip((KEY, await make_key(client), {}), statuses.split(), strict=True):
        async with client.request(method, path, json=body, headers=key) as response:
            assert response.status == int(status), await response.text()


@in_loop
async def test_keys_are_listed_changed_and_removed_over_http(client):
    key = await make_key(client, tokens="5M/month", models="none", rpm=None)
    changed = await make_key(client, status=200, rpm="7", tokens="none")
    unlimited = dict.fromkeys(("expires", "tokens", "spend", "models", "parallel"))
    budgets = dict.fromkeys(("token_limit", "resets_at", "spend_limit", "spend_resets_at"))
    used = dict.fromkeys(("used_tokens", "used_spend", "requests", "total_tokens", "cost"), 0)
    state = {"name": "anna", "paused": False, "expired": False, "last_used": None}
    assert changed == {**state, **unlimited, "rpm": 7, **budgets, **used}
    async with client.get("/dashboard/keys", headers=KEY) as response:
        assert await response.json() == {"keys": [changed]}
    for name, limits in (("anna", {"rpm": "0"}), ("bob", {"token": "5M"}), ("a b", {}), (None, {})):
        assert (await make_key(client, name, 400, **limits))["error"][
            "type"
        ] == "invalid_request_error"
    for status in (204, 404):
        async with client.delete("/dashboard/keys/anna", headers=KEY) as response:
            assert response.status == status
    assert (await ask(client, headers=key))[0].status == 401


@in_loop
async def test_a_key_is_rotated_paused_and_renamed_over_http(client, zai):
    old = await make_key(client, tokens="1M")
    await ask(client, headers=old)
    rotated = await make_key(client, status=200, rotate=True)
    new = {"x-api-key": rotated["key"]}
    assert (rotated["tokens"], rotated["requests"]) == ("1M", 1)
    assert [(await ask(client, headers=key))[0].status for key in (old, new)] == [401, 200]
    assert (await make_key(client, status=200, paused=True))["paused"]
    response, body = await ask(client, headers=new)
    assert (response.status, error_of(body)["code"]) == (401, "key_paused")
    assert not (await make_key(client, status=200, paused=False))["paused"]
    renamed = await make_key(client, status=200, rename="bob")
    assert (renamed["name"], renamed["requests"]) == ("bob", 3)  # one of them refused
    assert (await ask(client, headers=new))[0].status == 200
    await make_key(client, "anna")
    for fields, status in (({"rename": "bob"}, 400), ({"rename": "a b"}, 400)):
        assert (await make_key(client, "anna", status, **fields))["error"]["code"] is None
    for fields in ({"rotate": True}, {"paused": True}, {"rename": "x"}):
        assert (await make_key(client, "eve", 404, **fields))["error"]["code"] == "key_not_found"


@in_loop
async def test_a_pattern_that_fits_nothing_is_taken_with_a_warning(client):
    async with client.post(
        "/dashboard/keys", json={"name": "anna", "models": "glm-9*,glm-5"}, headers=KEY
    ) as response:
        document = await response.json()
    assert (response.status, document["models"]) == (201, "glm-9*,glm-5")
    assert document["warning"].startswith("No known model fits glm-9*: ")


@in_loop
@every_surface
@pytest.mark.parametrize("path", ASKING)
async def test_the_spend_limit_is_everybodys_and_free_models_go_on(start, zai, path, stream):
    client = await start(spend_limit="0.00002/day")
    await client.app[ztoapi.DATABASE].sync(client.app[ztoapi.ACCOUNTS])
    zai.parts = [DOCUMENT]
    statuses = [(await ask(client, ASKING[path], f"/v1/{path}"))[0].status for _ in range(4)]
    assert statuses[0] == 200
    response, body = await ask(client, ASKING[path] | {"stream": stream}, f"/v1/{path}")
    assert response.status == 402
    assert "SPEND_LIMIT" in body
    assert "00:00 UTC" in body
    free = {"model": "glm-4.7-flash", "stream": False}
    assert (await ask(client, ASKING[path] | free, f"/v1/{path}"))[0].status == 200
    [limit] = [(await stats(client))[0]["spend_limit"]]
    assert (limit["limit"], limit["used"] >= limit["amount"]) == ("0.00002/day", True)


@in_loop
async def test_a_search_of_the_web_costs_a_cent(start, zai):
    client = await start()
    anna = await make_key(client, spend="0.02")
    zai.parts = [b'{"search_result": []}']
    searched = [await ask(client, {"search_query": "x"}, "/v1/web_search", anna) for _ in range(3)]
    assert [response.status for response, _ in searched] == [200, 200, 402]
    async with client.get("/v1/files", headers=anna) as response:
        assert response.status == 200
    async with client.get("/dashboard/keys", headers=KEY) as response:
        [key] = (await response.json())["keys"]
    assert (key["cost"], key["used_spend"], key["spend_limit"]) == (0.02, 0.02, 0.02)


@in_loop
async def test_the_log_says_whose_request_it_was(client, caplog):
    anna = await make_key(client)
    with caplog.at_level("INFO", "ztoapi"):
        for key in (anna, KEY, {}):
            await ask(client, headers=key)
    lines = [line.partition(" /v1/")[0] for line in caplog.messages]
    assert lines == ["anna POST", "operator POST", "- POST"]


@in_loop
async def test_no_clients_key_goes_to_zai(client, zai):
    headers = {"x-api-key": "sk-your-key", "api-key": "sk-a", "Authorization": "sk-b"}
    for path, body in (("chat/completions", HELLO), ("messages", ASKING["messages"])):
        await ask(client, body, f"/v1/{path}", headers)
    for _, _, sent, _ in zai.asked:
        assert sent["Authorization"] == "Bearer zai-key"
        assert not {"x-api-key", "api-key"} & {name.lower() for name in sent}


@in_loop
async def test_a_key_sees_its_own_figures_and_the_operator_everybodys(client, zai):
    anna, bob = await make_key(client), await make_key(client, "bob", tokens="1M/day")
    zai.parts = [DOCUMENT]
    for key in (anna, bob, bob, KEY):
        await ask(client, headers=key)
    await ask(client, chat(model="no-such"), headers=bob)
    await client.app[ztoapi.DATABASE].sync(client.app[ztoapi.ACCOUNTS])
    figures = {"failures": 0, "prompt_tokens": 6, "cached_tokens": 2, "completion_tokens": 3}
    row = {"day": today(client), "model": "glm-4.6", "requests": 1, **figures}
    row["cost"] = pytest.approx((4 * 0.6 + 2 * 0.11 + 3 * 2.2) / 1e6)
    async with client.get("/dashboard/stats", headers=anna) as response:
        snapshot = await response.json()
        assert sorted(snapshot) == [
            *("client_keys", "database", "days", "name", "now", "operator", "recent"),
        ]
        assert [row["key"] for row in snapshot["recent"]] == ["anna"]
        assert (snapshot["days"], snapshot["operator"]) == ([row | {"key": "anna"}], False)
        assert [key["name"] for key in snapshot["client_keys"]] == ["anna"]
    async with client.get("/dashboard/stats", headers=KEY) as response:
        snapshot = await response.json()
    assert {
        (row["key"], row["model"], row["requests"], row["prompt_tokens"])
        for row in snapshot["days"]
    } == {
        *(("anna", "glm-4.6", 1, 6), ("bob", "glm-4.6", 2, 12), ("operator", "glm-4.6", 1, 6)),
        ("bob", "no-such", 1, 6),
    }
    assert [key["used_tokens"] for key in snapshot["client_keys"]] == [9, 27]


@in_loop
async def test_names_that_nobody_knows_are_counted_as_one(client, zai):
    zai.status, zai.parts = zai_refuses(1211, 400)
    for i in range(3):
        await ask(client, chat(model=f"m{i}"))
    assert await eventually(
        lambda: sum(row[0] for row in client.app[ztoapi.ACCOUNTS].counted.values()) == 3
    )
    assert [(key[2], row) for key, row in client.app[ztoapi.ACCOUNTS].take().items()] == [
        ("other", [3, 3, 0, 0, 0, 0])
    ]


@in_loop
async def test_a_stored_response_outlives_the_program_and_belongs_to_its_key(start, zai, tmp_path):
    where, zai.parts = f"sqlite:///{tmp_path}/z.db", [DOCUMENT]
    client = await start(database_url=where, default_key=("sk-a", "sk-b"))
    _, body = await ask(client, ASKING["responses"], "/v1/responses", {"x-api-key": "sk-a"})
    response_id = json.loads(body)["id"]
    await client.app.shutdown()
    await client.app.cleanup()
    client = await start(database_url=where, default_key=("sk-a", "sk-b"))
    follow_up = ASKING["responses"] | {"previous_response_id": response_id}
    for key, status in (("sk-a", 200), ("sk-b", 400)):
        assert (await ask(client, follow_up, "/v1/responses", {"x-api-key": key}))[
            0
        ].status == status
    assert len(zai.bodies[-1]["messages"]) == 3
    assert "sk-a" not in "".join(path.read_text("latin-1") for path in tmp_path.iterdir())


@in_loop
async def test_of_what_is_stored_only_so_much_is_loaded_for_one_request(connect):
    history = ztoapi.ClientHistory(connect("memory", loaded_size=2500), "a")
    for name in "12345":
        await history.put(ztoapi.StoredResponse({"id": name}, ["x" * 1000]), 0)
    await history.load(ztoapi.Referred(others=tuple("12345")))
    assert list(history.loaded) == ["1", "2"]


@in_loop
@pytest.mark.parametrize("stream", [False, True])
async def test_the_next_request_may_reach_another_process(start, database_url, stream):
    how = {"limits": Limits(database_interval=60), "database_url": database_url}
    here, there = [await start(**how) for _ in range(2)]
    _, answer = await ask(here, ASKED | {"stream": stream}, "/v1/responses")
    follow_up = ASKED | {"previous_response_id": re.search("resp_[0-9a-f]+", answer)[0]}
    assert (await ask(there, follow_up, "/v1/responses"))[0].status == 200


@in_loop
async def test_requests_go_on_while_the_database_is_lost(start, zai, postgresql, caplog):
    client, zai.parts = await start(database_url=postgresql.new_database()), [DOCUMENT]
    key = await make_key(client)
    postgresql.stop()
    try:
        await client.app[ztoapi.DATABASE].sync(client.app[ztoapi.ACCOUNTS])
        assert (await ask(client, headers=key))[0].status == 200
        assert (await stats(client))[0]["database"] is False
        async with client.post("/dashboard/keys", json={"name": "bob"}, headers=KEY) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (
                503,
                "database_unavailable",
            )
    finally:
        postgresql.start()


@in_loop
async def test_the_dashboard_shows_what_is_left_of_a_plan_and_asks_once_a_minute(start, zai):
    client = await start(zai_api_key=("plan", "other"))
    zai.quota = (200, json.dumps({"limits": [CREDITS, TOKENS], "level": "pro"}).encode())
    assert (await stats(client))[0]["plans"] == []
    asking = client.app[ztoapi.PLANS].asking
    await asking
    assert (await stats(client))[0]["plans"] == [{"key": number, **PLAN} for number in (1, 2)]
    assert client.app[ztoapi.PLANS].asking is asking
    assert zai.asked_for_quota == ["Bearer plan", "Bearer other"]


@in_loop
@pytest.mark.parametrize(
    "quota", [(302, b""), (200, b"<html>"), (500, b"{}"), (200, b'{"code": 401, "success": false}')]
)
async def test_a_key_without_a_plan_shows_nothing(start, zai, quota):
    client, zai.quota = await start(), quota
    await client.app[ztoapi.PLANS].ask()
    assert ((await stats(client))[0]["plans"], zai.asked_for_quota[0]) == ([], "Bearer zai-key")


@in_loop
async def test_prometheus_reads_the_metrics(start, zai):
    parser = pytest.importorskip("prometheus_client.parser")
    client, zai.parts = await start(max_retries=1), [DOCUMENT]
    zai.answers = [zai_refuses(1234, 500)]
    for body in (HELLO, chat(stream=True), chat(model='x"\\y')):
        await ask(client, body)
    await ask(client, {}, headers={})
    async with client.get("/metrics", headers=KEY) as response:
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = await response.text()
    found = {
        (sample.name.removeprefix("ztoapi_"), *sample.labels.values()): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert {
        key: value for key, value in found.items() if not key[0].startswith(("time", "request_d"))
    } == {
        ("build_info", ztoapi.__version__): 1,
        ("retries_total",): 1,
        ("key_requests_total", "operator"): 3,
        **{
            ("key_tokens_total", "operator", kind): 3 * n
            for kind, n in (("prompt", 6), ("cached", 2), ("completion", 3))
        },
        ("repairs_total", "line_ends_at_head"): 3,
        ("requests_total", "/v1/chat/completions", "glm-4.6", "200"): 2,
        ("requests_total", "/v1/chat/completions", 'x"\\y', "200"): 1,
        ("requests_total", "/v1/chat/completions", "", "401"): 1,
        **{
            ("tokens_total", "glm-4.6", kind): 2 * n
            for kind, n in (("prompt", 6), ("cached", 2), ("completion", 3))
        },
        **{
            ("tokens_total", 'x"\\y', kind): n
            for kind, n in (("prompt", 6), ("cached", 2), ("completion", 3))
        },
        **{(name, "glm-4.6"): n for name, n in (("in_flight", 0), ("waiting", 0), ("limit", 4))},
        **{(name, 'x"\\y'): n for name, n in (("in_flight", 0), ("waiting", 0), ("limit", 4))},
    }
    assert (
        found["request_duration_seconds_count", "glm-4.6"]
        == found["request_duration_seconds_bucket", "glm-4.6", "+Inf"]
        == 2
    )
    assert found["time_to_first_token_seconds_count", "glm-4.6"] == 2


def test_a_histogram_counts_what_is_at_most_each_bound():
    histogram = ztoapi.Histogram()
    for seconds in (0.1, 0.2, 1000):
        histogram.add(seconds)
    lines = list(histogram.samples("x", "m"))
    assert lines[:2] == [
        'ztoapi_x_bucket{model="m",le="0.1"} 1',
        'ztoapi_x_bucket{model="m",le="0.25"} 2',
    ]
    assert lines[-3:] == [
        'ztoapi_x_bucket{model="m",le="+Inf"} 3',
        'ztoapi_x_sum{model="m"} 1000.3',
        'ztoapi_x_count{model="m"} 3',
    ]


def test_at_most_fifty_models_have_a_name_of_their_own():
    statistics = ztoapi.Statistics(0)
    for name in (*(f"m{i}" for i in range(60)), *MODELS):
        statistics.add(ztoapi.Record("", "", 0, "", model=name, first=0), 1, 0)
    assert len(statistics.models) == 50
    assert (statistics.models["other"].requests, statistics.models["glm-5.3"].requests) == (
        60 - 50 + len(MODELS) + 1,
        1,
    )


def test_models_that_clients_make_up_take_no_place():
    statistics = ztoapi.Statistics(0)
    for i in range(60):
        statistics.add(ztoapi.Record("", "", 0, "", model=f"m{i}"), 1, 0)
    statistics.add(ztoapi.Record("", "", 0, "", model="new", first=0), 1, 0)
    assert statistics.models.keys() == {"other", "new"}


def test_keys_are_managed_by_the_command_line(command, tmp_path):
    where = {"DATABASE_URL": f"sqlite:///{tmp_path}/z.db", "PORT": "0"}

    def keys(*arguments, ending=0):
        status, out, notes = command("keys", *arguments, **where)
        assert status == ending, notes
        return out.removesuffix("\n") if ending == 0 else notes

    def listed():
        return json.loads(keys("--json"))["keys"]

    assert keys().startswith("There are no keys yet. Add one: python ztoapi.py keys add NAME")
    assert listed() == []
    assert not list(tmp_path.iterdir())
    key = keys(
        "add", "anna", "--tokens", "5M/day", "--models", "glm-4.*, glm-5.3", "--spend", "2.5"
    )
    [row] = listed()
    shown = ("name", "tokens", "spend", "models", "rpm", "paused", "requests")
    assert [row[name] for name in shown] == [
        *("anna", "5M/day", "2.5", "glm-4.*,glm-5.3", None, False, 0),
    ]
    assert keys("change", "anna", "--tokens", "none", "--rpm", "7") == "anna changed"
    assert keys("pause", "anna") == "anna paused"
    assert keys("rename", "anna", "bob") == "anna is now bob"
    [row] = listed()
    assert [row[name] for name in shown] == ["bob", None, "2.5", "glm-4.*,glm-5.3", 7, True, 0]
    assert keys("resume", "bob") == "bob resumed"
    stored = "".join(path.read_text("latin-1") for path in tmp_path.iterdir())
    assert hash_key(key) in stored
    assert key not in stored
    assert keys("rotate", "bob") != key
    assert keys("remove", "bob") == "bob removed"
    assert listed() == []


def test_a_new_key_stands_alone_on_stdout_and_what_people_need_around_it(command, tmp_path):
    where = {"DATABASE_URL": f"sqlite:///{tmp_path}/z.db", "PORT": "0", "DEFAULT_KEY": "sk-mine"}
    for action in ("add", "rotate"):
        status, out, notes = command("keys", action, "anna", **where)
        assert (status, bool(re.fullmatch(r"sk-[\w-]{43}\n", out))) == (0, True)
        for words in ("shown only now", "http://localhost:0/v1", f"{tmp_path}/z.db"):
            assert words in notes
        assert ("no key named" in notes, "nobody else" in notes) == (False, False)


def test_a_pattern_of_models_that_fits_none_is_added_with_a_warning(command, tmp_path):
    where = {"DATABASE_URL": f"sqlite:///{tmp_path}/z.db", "PORT": "0"}
    status, _, notes = command("keys", "add", "anna", "--models", "glm-5.3,glm-9*", **where)
    assert (status, "No known model fits glm-9*: " in notes) == (0, True)


def test_keys_stand_in_columns_however_wide_their_letters_are():
    accounts = Accounts(())
    named = [Account("a", "李四", rpm=3), Account("b", "anna", paused=True), Account("c", "Zoë")]
    accounts.written(Known(named, {"a": Totals(5, 1234567, DOLLAR // 8, "2026-11-21T11:59:58")}))
    lines = ztoapi.key_table(ztoapi.key_item(accounts, each, TODAY) for each in named).splitlines()
    assert lines == [
        "name  state   expires  tokens  spend  models  rpm  parallel  requests  used       in all     cost     last used",
        "李四  -       -        -       -      -       3    -         5         1,234,567  1,234,567  $0.1250  2026-11-21 11:59 UTC",
        "anna  paused  -        -       -      -       -    -         0         0          0          $0.0000  never",
        "Zoë   -       -        -       -      -       -    -         0         0          0          $0.0000  never",
    ]


def test_a_key_that_is_being_added_is_not_added_twice(connect, tmp_path):
    database, other = (connect(f"sqlite:///{tmp_path}/z.db") for _ in range(2))
    for each in (database, other):
        each.transact(each.list_accounts)
    other.execute("BEGIN IMMEDIATE")
    other.put_account(ANNA)

    def commit_later():  # a threading.Timer waits for ever under libfaketime
        time.sleep(0.3)
        other.execute("COMMIT")

    commit = threading.Thread(target=commit_later)
    commit.start()
    flags = ztoapi.parse_flags(["keys", "add", "anna"])
    with pytest.raises(BadRequest, match="There is already a key named anna"):
        ztoapi.tell_changed(Settings(port=0), database, flags)
    commit.join()
    assert database.transact(database.list_accounts) == [ANNA]


@pytest.mark.parametrize(
    ("arguments", "variables", "line"),
    [
        (["add"], {}, "A key's name is"),
        (["add", "a b"], {}, "A key's name is"),
        (["change", "bob", "--rpm", "1"], {}, "There is no key named bob"),
        (["rotate", "bob"], {}, "There is no key named bob"),
        (["rename", "bob", "eve"], {}, "There is no key named bob"),
        (["remove", "bob"], {}, "There is no key named bob"),
        (["change", "bob"], {}, "Say what to change: --expires, --tokens, --spend"),
        (["rename", "bob"], {}, "A key's name is"),
        (["pause", "bob", "--rpm", "1"], {}, "pause takes no limits"),
        (["add", "bob", "eve"], {}, "add takes one name"),
        (["add", "bob", "--spend", "0"], {}, "spend 0 cannot be used: it must be US dollars"),
        (["add", "bob", "--models", "glm 5"], {}, "models glm 5 cannot be used"),
        (["add", "bob", "--tokens", "lots"], {}, "tokens lots cannot be used: it must be"),
        (["add", "bob", "--expires", "2020-01-01"], {}, "expires 2020-01-01 cannot"),
        (["add", "bob", "--rpm", "0"], {}, "rpm 0 cannot"),
        ([], {"DATABASE_URL": "memory"}, "keys need a database"),
        ([], {"DATABASE_URL": "sqlite:////no/such/folder/z.db"}, ""),
        (
            ["add", "bob"],
            {"DATABASE_URL": "sqlite:////no/such/folder/z.db"},
            "the database cannot be used",
        ),
        ([], {"DATABASE_URL": "mysql://user:hunter2@host/db"}, "DATABASE_URL cannot be used"),
        (
            [],
            {"DATABASE_URL": "postgresql://u:hunter2@127.0.0.1:1/db?password=hunter2"},
            "the database cannot be used",
        ),
    ],
)
def test_what_the_keys_command_cannot_do_is_one_line_and_status_2(
    command, tmp_path, arguments, variables, line
):
    if "postgres" in line + str(variables):
        pytest.importorskip("psycopg")
    where = {"DATABASE_URL": f"sqlite:///{tmp_path}/z.db"} | variables
    status, _, words = command("keys", *arguments, **where)
    assert (status, words.count("\n")) == ((2, 1) if line else (0, 0))
    assert words.startswith(f"ztoapi: {line}" if line else "")
    assert "hunter2" not in words


@meanwhile
async def test_a_key_is_no_use_to_others_while_the_published_one_counts(run, tmp_path):
    urls = {key: f"sqlite:///{tmp_path}/{key}.db" for key in ("sk-your-key", "sk-mine")}
    adding = [
        run(Program, "keys", "add", "anna", DATABASE_URL=url, DEFAULT_KEY=key)
        for key, url in urls.items()
    ]
    (status, key, note), (*_, other_note) = (program.end() for program in adding)
    assert (status, bool(re.fullmatch(r"sk-[\w-]{43}\n", key))) == (0, True)
    alone = "nobody else can reach this server yet"
    assert (alone in note, alone in other_note) == (True, False)


@meanwhile
async def test_who_adds_a_key_is_told_loudly_that_the_server_has_another_database(run, tmp_path):
    urls = [f"sqlite:///{tmp_path}/{name}.db" for name in "ab"]
    server = run(Program, "--demo", DATABASE_URL=urls[0], DEFAULT_KEY="sk-mine")
    same = {"PORT": str(server.port), "DEFAULT_KEY": "sk-mine"}
    _, _, notes = run(Program, "keys", "add", "anna", DATABASE_URL=urls[1], **same).end()
    assert f"WARNING: the ztoapi that runs at http://localhost:{server.port}" in notes
    assert "ANOTHER DATABASE" in notes
    strange = {"PORT": str(server.port), "DEFAULT_KEY": "sk-other"}
    _, _, notes = run(Program, "keys", "add", "bob", DATABASE_URL=urls[1], **strange).end()
    assert "takes another DEFAULT_KEY" in notes


MOMENTS = [
    ["import", "argparse"],
    ["import", "aiohttp"],
    ["socket.bind"],
    ["sqlite3.connect"],
]


@meanwhile
async def test_ctrl_c_while_it_starts_is_one_line(run, tmp_path):
    programs = []
    for number, moment in enumerate(MOMENTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(interrupting(moment))
        database = f"sqlite:///{folder}/z.db"
        programs.append(run(Program, PYTHONPATH=str(folder), DATABASE_URL=database))
    for program in programs:
        status, _, words = program.end()
        assert (status, words) == (130, "ztoapi: interrupted\n")


def interrupting(moment):
    """A sitecustomize.py that sends a program Ctrl-C at this event of Python's audit."""
    return f"""
import os, signal, sys
def interrupt(event, about):
    if [event, *map(str, about)][: len({moment})] == {moment} and sys.argv[0]:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(interrupt)
"""


@meanwhile
async def test_ctrl_c_right_behind_the_banner_is_no_traceback(run):
    for _ in range(3):
        program = run(Program)
        assert program.banner
        program.process.send_signal(signal.SIGINT)
        status, _, words = program.end()
        assert (status, words) in [(130, "ztoapi: interrupted\n"), (0, "")]


@meanwhile
async def test_ctrl_c_stops_a_running_server_without_a_word(run):
    program = run(Program)
    await ask_once(program.port, GET)
    program.process.send_signal(signal.SIGINT)
    status, _, log = program.end()
    assert (status, "Traceback" in log) == (0, False)


@meanwhile
async def test_a_database_that_cannot_be_used_stops_the_start(run, tmp_path):
    (tmp_path / "z.db").write_bytes(b"no database" * 99)
    status, out, words = run(Program, DATABASE_URL=f"sqlite:///{tmp_path}/z.db").end()
    assert (status, out, words.count("\n")) == (2, "", 1)


@meanwhile
async def test_a_worker_whose_database_cannot_be_used_is_not_started_again():
    variables = {"DATABASE_URL": "sqlite:////no/folder/z.db", "PYTHONPATH": str(PROGRAM.parent)}
    command = [sys.executable, "-c", "import ztoapi; ztoapi.create_app()"]
    done = subprocess.run(
        command, env=INHERITED | variables, capture_output=True, text=True, check=False, timeout=20
    )
    assert (done.returncode, done.stderr.count("\n"), "cannot be used" in done.stderr) == (
        3,
        1,
        True,
    )


def test_postgresql_without_its_package_says_how_to_get_it(connect, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    database = connect("postgresql://h/d")
    with pytest.raises(ztoapi.DatabaseError, match=re.escape('pip install "psycopg[binary]"')):
        database.transact(database.list_accounts)


@meanwhile
async def test_a_process_manager_may_make_the_app_before_it_forks(tmp_path, zai):
    pytest.importorskip("gunicorn")
    database = f"sqlite:///{tmp_path}/z.db"
    (tmp_path / "z.db").touch()
    variables = {
        "ZAI_BASE_URL": zai.url,
        "ZAI_API_KEY": "k",
        "DATABASE_URL": database,
        "NO_PROXY": "127.0.0.1",
    }
    manager = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gunicorn", "ztoapi:create_app()", "--preload", "--workers", "2"),
        *(
            "--worker-class",
            "aiohttp.GunicornWebWorker",
            "--bind",
            f"127.0.0.1:{(port := free_port())}",
        ),
        env=INHERITED | variables,
        cwd=PROGRAM.parent,
        stderr=subprocess.PIPE,
    )
    answers = [await ask_once(port) for _ in range(20)]
    refused = await ask_once(port, request_with(b"x: " + b"y" * 40_000 + b"\r\n"))
    manager.terminate()
    _, log = await asyncio.wait_for(manager.communicate(), 20)
    with contextlib.closing(sqlite3.connect(tmp_path / "z.db")) as written:
        counted = written.execute("SELECT SUM(requests) FROM ztoapi_usage").fetchone()
    assert (set(answers), counted, b"Traceback" in log) == ({b"HTTP/1.1 200 OK"}, (20,), False)
    assert refused.startswith(b"HTTP/1.0 431 ")


async def ask_once(port, data=None):
    """The status line of an answer over a connection of its own, perhaps to a server that is starting."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        await asyncio.sleep(0.1)
        return await ask_once(port, data)
    writer.write(data or raw_request(HELLO))
    line = await asyncio.wait_for(reader.readline(), 10)
    writer.close()
    return line.strip()


@in_loop
async def test_a_running_server_knows_within_seconds_what_the_command_did(start, connect, tmp_path):
    where = f"sqlite:///{tmp_path}/z.db"
    client = await start(limits=Limits(database_interval=0.02), database_url=where)
    database = connect(where)

    async def status_of(key):
        async with client.get("/v1/models", headers={"x-api-key": key}) as response:
            return response.status

    async def becomes(key, status):
        while await status_of(key) != status:
            await asyncio.sleep(0.01)

    key = "sk-anna"
    adding = ztoapi.KeyChange("anna", adds="only"), ztoapi.new_account("anna", key)
    database.transact(database.change_account, *adding)
    await asyncio.wait_for(becomes(key, 200), 10)
    database.transact(database.change_account, ztoapi.KeyChange("anna", paused=True), adding[1])
    await asyncio.wait_for(becomes(key, 401), 10)


# ======== Launch ========

# A client that asks the server how it is and tells, as JSON in a file, how it was started; then it waits if it is told to.
FAKE_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(3))
signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in sys.argv else signal.SIG_DFL)
folder = os.environ["PI_CODING_AGENT_DIR"]
origin = json.load(open(folder + "/models.json"))["providers"]["ztoapi"]["baseUrl"][:-3]
server = socket.create_connection(("localhost", int(origin.split(":")[2])))
server.sendall(b"GET /health HTTP/1.0\\r\\nHost: localhost\\r\\n\\r\\n")
story = {{
    "arguments": sys.argv[1:],
    "key": json.load(open(folder + "/models.json"))["providers"]["ztoapi"]["apiKey"],
    "in_home": os.path.relpath(os.path.dirname(folder), os.environ["HOME"]),
    "theirs": [name for name in os.environ if "theirs" in os.environ[name]],
    "mode": oct(os.stat(folder).st_mode & 0o777),
    "files": sorted(os.listdir(folder)),
    "health": json.loads(server.makefile().read().partition("\\n\\n")[2]),
}}
with open(sys.argv[-1] + ".new", "w") as file:
    json.dump(story, file)
os.rename(sys.argv[-1] + ".new", sys.argv[-1])
open(folder + "/session", "w").close()
time.sleep(600 if "wait" in sys.argv else 0)
os.kill(os.getpid(), signal.SIGKILL if "die" in sys.argv else 0)
sys.exit(7)
"""


class Launch:
    """`launch pi` as a process, with a fake pi, on a port on which nothing listens yet."""

    def __init__(self, folder, *arguments, flags=(), options=(), port=None, **variables):
        folder = Path(tempfile.mkdtemp(dir=folder))
        self.folder, self.story = folder, folder / "story"
        (folder / "bin").mkdir()
        (folder / "bin/pi").write_text(FAKE_CLIENT.format(python=sys.executable))
        (folder / "bin/pi").chmod(0o755)
        for name in ("tmp", "home"):
            (folder / name).mkdir()
        self.port = port or free_port()
        self.process = subprocess.Popen(
            [
                sys.executable,
                PROGRAM,
                *flags,
                "launch",
                "pi",
                "--port",
                str(self.port),
                *options,
                "--",
                *arguments,
                self.story,
            ],
            env={
                **INHERITED,
                "TMPDIR": str(folder / "tmp"),
                "HOME": str(folder / "home"),
                "PATH": f"{folder}/bin",
                "ZAI_API_KEY": "zk",
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    async def told(self):
        assert await eventually(self.story.exists)
        return json.loads(self.story.read_text())

    def end(self):
        """The exit status, what it said, and what it left behind."""
        _, said = self.process.communicate(timeout=20)
        with socket.socket() as probe:
            server = probe.connect_ex(("127.0.0.1", self.port)) == 0
        return self.process.returncode, said, [*self.files(), *(["a server"] if server else [])]

    def files(self):
        """What is in its home, and among its temporary files."""
        return [file for name in ("tmp", "home") for file in (self.folder / name).iterdir()]


def free_port():
    """A port that nobody uses, below those that the system gives to whoever asks for any."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@meanwhile
async def test_launch_tells_a_client_what_it_needs_and_no_more(run, tmp_path):
    port = run(Program, "--demo").port
    secrets_of_others = {
        "OPENAI_API_KEY": "theirs",
        "ANTHROPIC_AUTH_TOKEN": "theirs",
        "CLAUDE_CODE_USE_BEDROCK": "theirs",
        "CLAUDE_CODE_OAUTH_TOKEN": "theirs",
        "OPENCODE_CONFIG_CONTENT": "theirs",
        "COPILOT_PROVIDER_API_KEY": "theirs",
        "GPTME_OPENAI_BASE_URL": "http://theirs/v1",
        "ZTOAPI_KEY": "theirs",
        "ZAI_API_KEY": "theirs",
        "DATABASE_URL": "sqlite:////theirs.db",
        "CORS_ORIGINS": "https://theirs",
        "VISION_MODEL": "theirs",
    }
    launch = run(
        Launch, tmp_path, "--own", port=port, DEFAULT_KEY="sk-your-key", **secrets_of_others
    )
    status, said, _ = launch.end()
    assert json.loads(launch.story.read_text()) == {
        "arguments": [
            "--provider",
            "ztoapi",
            "--model",
            "glm-4.7-flash",
            "--own",
            str(launch.story),
        ],
        "key": "sk-your-key",
        "in_home": ".cache",
        "theirs": [],
        "mode": "0o700",
        "files": ["models.json"],
        "health": {
            "status": "ok",
            "name": "ztoapi",
            "version": ztoapi.__version__,
            "demo": True,
            "zai_key": True,
            "model": "glm-4.7-flash",
        },
    }
    assert (status, launch.files()) == (7, [])
    assert (
        said
        == f"ztoapi: pi with glm-4.7-flash at http://localhost:{port}; --model NAME for another\n"
    )


@meanwhile
async def test_a_client_has_a_temporary_folder_where_the_cache_cannot_be_written(run, tmp_path):
    port = run(Program, "--demo").port
    launch = run(Launch, tmp_path, port=port, XDG_CACHE_HOME="/proc/nowhere")
    status, _, _ = launch.end()
    assert json.loads(launch.story.read_text())["in_home"] == "../tmp"
    assert (status, launch.files()) == (7, [])


@meanwhile
async def test_launch_leaves_alone_what_others_keep_in_the_cache(run, tmp_path):
    port = run(Program, "--demo").port
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "kept").touch()
    status, _, _ = run(Launch, tmp_path, port=port, XDG_CACHE_HOME=str(cache)).end()
    assert (status, [*cache.iterdir()]) == (7, [cache / "kept"])


@meanwhile
async def test_launch_starts_a_server_where_there_is_none_and_ends_it(run, tmp_path):
    launch = run(Launch, tmp_path, "die")
    status, said, left = launch.end()
    assert (status, left) == (128 + signal.SIGKILL, [])
    assert re.search(
        rf"starting a server for it; its log is {launch.folder}/tmp/ztoapi-\S+\.log\n$", said
    )


@meanwhile
async def test_a_launch_that_is_ended_leaves_nothing_behind(run, tmp_path):
    # Ctrl-C is the client's own.
    ends = {
        (os.killpg, signal.SIGINT): 3,
        (os.kill, signal.SIGTERM): 143,
        (os.kill, signal.SIGHUP): 129,
    }
    launches = {end: run(Launch, tmp_path, "wait") for end in ends}
    for (kill, number), launch in launches.items():
        await launch.told()
        kill(launch.process.pid, number)
    ended = {end: launch.end() for end, launch in launches.items()}
    assert {end: (status, left) for end, (status, _, left) in ended.items()} == {
        end: (ends[end], []) for end in ends
    }


@meanwhile
async def test_a_client_that_does_not_end_is_killed_when_the_launch_ends(run, tmp_path):
    launch = run(Launch, tmp_path, "wait", "stubborn")
    await launch.told()
    for _ in range(2):
        launch.process.terminate()
        await asyncio.sleep(0.1)
    status, _, left = launch.end()
    assert (status, left) == (143, [])


def answer_all(listener, reply, asked):
    with contextlib.suppress(OSError):  # it is closed
        while True:
            connection, _ = listener.accept()
            with connection:
                asked.append(connection.recv(65536))
                connection.sendall(reply)


@contextlib.contextmanager
def something_else(reply):
    """What is no ztoapi: its port, and what it is asked."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer_all, args=(listener, reply, asked)).start()
        try:
            yield listener.getsockname()[1], asked
        finally:
            listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("reply", "is_ours"),
    [
        (b'HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{"name":"ztoapi"}', True),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"name":"other"}', False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", False),
        (b"SSH-2.0\r\n", False),
    ],
)
def test_a_server_is_known_by_its_name(reply, is_ours):
    with something_else(reply) as (port, _):
        assert bool(ztoapi.ztoapi_at(f"http://127.0.0.1:{port}")) is is_ours


@meanwhile
async def test_launch_gives_no_key_to_what_is_not_ztoapi(run, tmp_path):
    with something_else(b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"name":"other"}') as (
        port,
        asked,
    ):
        launch = run(Launch, tmp_path, port=port)
        status, said, _ = launch.end()
    assert (status, launch.story.exists(), b"sk-your-key" in b"".join(asked)) == (2, False, False)
    assert f"ztoapi: port {launch.port} on localhost is in use" in said


def test_launch_of_a_demo_uses_no_server_that_is_none(command, tmp_path):
    (tmp_path / "pi").touch(0o755)
    with something_else(
        b'HTTP/1.1 200 OK\r\nContent-Length: 31\r\n\r\n{"name":"ztoapi","demo": false}'
    ) as (port, _):
        status, _, words = command(
            "--demo", "launch", "pi", "--port", str(port), PATH=str(tmp_path)
        )
    line = f"ztoapi: the ztoapi at http://localhost:{port} is no demo: use another --port, or leave --demo out\n"
    assert (status, words) == (2, line)


def test_launch_needs_a_port_that_it_can_tell_the_client(command, tmp_path):
    (tmp_path / "pi").touch(0o755)
    status, _, words = command("launch", "pi", "--port", "0", PATH=str(tmp_path), ZAI_API_KEY="zk")
    assert (status, "--port with another number than 0" in words) == (2, True)


@meanwhile
async def test_a_kept_folder_is_there_at_the_next_launch_and_for_the_user_alone(run, tmp_path):
    port = run(Program, "--demo").port
    home = tmp_path / "home"
    home.mkdir()
    stories = []
    for _ in range(2):
        launch = run(Launch, tmp_path, port=port, options=["--keep"], HOME=str(home))
        assert launch.end()[0] == 7
        stories.append(json.loads(launch.story.read_text()))
    assert [story["files"] for story in stories] == [["models.json"], ["models.json", "session"]]
    assert {story["in_home"] for story in stories} == {".local/share/ztoapi"}
    assert {story["mode"] for story in stories} == {"0o700"}


def test_what_cannot_be_kept_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setenv("XDG_DATA_HOME", "/proc/nowhere")
    with pytest.raises(SystemExit):
        ztoapi.kept_folder("pi")
    assert capsys.readouterr().err.startswith("ztoapi: --keep cannot keep anything: ")


@pytest.mark.parametrize(
    ("kept", "ours", "together"),
    [
        ({"trust": 1, "a": {"b": 2}}, {"a": {"c": 3}}, {"trust": 1, "a": {"b": 2, "c": 3}}),
        ({"models": ["old"]}, {"models": ["new"]}, {"models": ["new"]}),
        ({"a": {"b": 2}}, {"a": "new"}, {"a": "new"}),
        (["old"], ["new"], ["new"]),
        (None, {"a": 1}, {"a": 1}),
    ],
    ids=["objects", "lists", "another kind", "no object", "no file yet"],
)
def test_what_a_client_keeps_in_our_file_stays(tmp_path, kept, ours, together):
    file = tmp_path / "settings.json"
    if kept is not None:
        file.write_text(json.dumps(kept))
    ztoapi.write_client_file(file, json.dumps(ours))
    assert json.loads(file.read_text()) == together


def test_a_file_of_a_client_that_is_no_json_is_written_anew(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: other")
    ztoapi.write_client_file(file, '{"model": "ours"}')
    assert file.read_text() == '{"model": "ours"}'


NOTHING_TO_RESUME = (
    "ztoapi: sessions end with a launch, so there is nothing to resume; launch {} --keep keeps them"
)


@pytest.mark.parametrize(
    ("arguments", "is_said"),
    [
        (["claude", "--", "--continue"], True),
        (["claude", "--", "-p", "hello", "--resume=0f9c"], True),
        (["codex", "--", "exec", "resume", "--last"], True),
        (["claude", "--", "-p", "resume"], False),
        (["codex", "--", "-c", "model_verbosity=low"], False),
        (["aider", "--", "-c", "aider.yml"], False),
        (["claude", "--keep", "--", "--continue"], False),
    ],
    ids=["continue", "with an id", "command", "a prompt", "other -c", "in the project", "kept"],
)
def test_who_wants_to_resume_is_told_of_keep(capsys, arguments, is_said):
    flags = ztoapi.parse_flags(["launch", *arguments])
    server = ztoapi.LaunchServer("http://h", "sk-k", MODELS["glm-4.6"], {})
    ztoapi.tell_of_launch(server, flags)
    first, *others = capsys.readouterr().err.splitlines()
    assert first == f"ztoapi: {flags.client} with glm-4.6 at http://h; --model NAME for another"
    assert others == [NOTHING_TO_RESUME.format(flags.client)] * is_said


def test_each_client_that_may_resume_is_in_the_table():
    assert {*ztoapi.CLIENTS} - {*ztoapi.RESUMING} == {"aider"}


@meanwhile
async def test_launch_uses_a_server_elsewhere_with_the_key_for_that(run, tmp_path):
    port = run(Program, "--demo", DEFAULT_KEY="sk-of-ours").port
    url = ["--url", f"http://127.0.0.1:{port}/v1/"]
    launch = run(Launch, tmp_path, options=url, ZTOAPI_KEY="sk-of-ours")
    status, said, left = launch.end()
    story = json.loads(launch.story.read_text())
    assert (status, story["key"], story["health"]["demo"], left) == (7, "sk-of-ours", True, [])
    line = f"ztoapi: pi with glm-4.7-flash at http://127.0.0.1:{port}; --model NAME for another\n"
    assert said == line
    refused = run(Launch, tmp_path, options=[*url, "--key", "sk-wrong"])
    status, said, _ = refused.end()
    assert (status, refused.story.exists()) == (2, False)
    assert said.startswith(
        f"ztoapi: http://127.0.0.1:{port} refuses the key: The API key is wrong "
    )


def http_reply(document, status="200 OK", head=""):
    data = json.dumps(document).encode()
    return f"HTTP/1.1 {status}\r\n{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (http_reply({"name": "other"}), "what answers at {}/health (status 200) is no ztoapi"),
        (http_reply({}, "404 Not Found"), "what answers at {}/health (status 404) is no ztoapi"),
        (
            http_reply({}, "301 Moved", "Location: https://zt.example.org/glm/health\r\n"),
            "{} sends us to https://zt.example.org/glm: give that address",
        ),
        (b"SSH-2.0\r\n", "{} cannot be reached: SSH-2.0\r\n"),
    ],
    ids=["another program", "no path", "elsewhere", "no HTTP"],
)
def test_a_key_for_elsewhere_goes_to_a_ztoapi_only(command, tmp_path, reply, said):
    (tmp_path / "pi").touch(0o755)
    with something_else(reply) as (port, asked):
        url = f"http://127.0.0.1:{port}"
        flags = ("--url", url, "--key", "sk-theirs")
        answer = command("launch", "pi", *flags, PATH=str(tmp_path))
    assert answer == (2, "", f"ztoapi: {said.format(url)}\n")
    assert b"sk-theirs" not in b"".join(asked)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ZTOAPI_URL": "zt.example.org"}, "must be an address such as https://zt.example.org"),
        ({"ZTOAPI_URL": "https://u:p@zt.example.org"}, "must be an address such as"),
        ({"ZTOAPI_URL": "http://127.0.0.1:1"}, "set ZTOAPI_KEY, or give --key"),
        ({"ZTOAPI_URL": "http://127.0.0.1:1", "ZTOAPI_KEY": "sk-k"}, "cannot be reached: "),
    ],
    ids=["no scheme", "a password", "no key", "nobody there"],
)
def test_what_is_wrong_with_a_server_elsewhere_is_one_line(command, tmp_path, variables, said):
    (tmp_path / "pi").touch(0o755)
    status, out, line = command("launch", "pi", PATH=str(tmp_path), **variables)
    assert (status, out, line.count("\n"), said in line) == (2, "", 1, True)


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        (["launch", "pi"], "https://variable"),
        (["launch", "pi", "--url", "https://flag"], "https://flag"),
        (["launch", "pi", "--port", "8000"], ""),
        (["--demo", "launch", "pi"], ""),
    ],
    ids=["variable", "flag", "a port here", "demo"],
)
def test_a_flag_wins_over_the_variable_of_a_server_elsewhere(monkeypatch, arguments, url):
    monkeypatch.setenv("ZTOAPI_URL", "https://variable")
    assert ztoapi.url_elsewhere(ztoapi.parse_flags(arguments)) == url


@pytest.mark.parametrize(
    ("health", "options", "model"),
    [
        ({"name": "ztoapi", "model": "glm-5.3"}, [], "glm-5.3"),
        ({"name": "ztoapi"}, [], "glm-4.7-flash"),
        ({"name": "ztoapi", "model": "glm-5.3"}, ["--model", "glm-4.6"], "glm-4.6"),
    ],
    ids=["told", "not told", "chosen"],
)
def test_a_server_elsewhere_says_which_model(command, health, options, model):
    with something_else(http_reply(health)) as (port, asked):
        url = f"http://127.0.0.1:{port}"
        given = {"ZTOAPI_URL": url, "ZTOAPI_KEY": "sk-theirs", "PATH": "/nowhere"}
        status, out, _ = command("launch", "qwen", "--show", *options, **given)
    lines = {f"export OPENAI_BASE_URL={url}/v1", f"export OPENAI_MODEL={model}"}
    assert (status, lines <= {*out.splitlines()}) == (0, True)
    assert b"sk-theirs" not in b"".join(asked)


@meanwhile
async def test_a_server_that_runs_here_says_which_model(run, tmp_path):
    with something_else(http_reply({"name": "ztoapi", "model": "glm-5.2"})) as (port, _):
        launch = run(Launch, tmp_path, port=port)
        assert launch.end()[0] == 7
    assert json.loads(launch.story.read_text())["arguments"][3] == "glm-5.2"


def model_there(reply, *options):
    """The model glm-4.6 as a server elsewhere, which answers so, lists it."""
    flags = ztoapi.parse_flags(["launch", "pi", *options])
    with something_else(reply) as (port, _):
        origin = f"http://127.0.0.1:{port}"
        server = ztoapi.LaunchServer(origin, "sk-k", MODELS["glm-4.6"], {})
        return ztoapi.model_elsewhere(server, flags)


def test_a_server_elsewhere_knows_what_its_models_take():
    sees = {"input_modalities": ["text", "image"]}
    listed = {"context_length": 1000, "max_output_tokens": 100, "architecture": sees}
    known = MODELS["glm-4.6"]
    told = replace(known, context=1000, output=100, vision=True)
    assert model_there(http_reply(listed)) == told
    assert model_there(http_reply({"id": "glm-4.6"})) == known
    assert model_there(http_reply({}, "500 Oh")) == known
    assert model_there(http_reply({}, "404 No"), "--model", "glm-4.6") == known


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (http_reply({"error": {"message": "No\n!"}}, "403 No"), "{} refuses the key: No!"),
        (http_reply([], "401 No"), "{} refuses the key: status 401"),
        (http_reply({}, "404 No"), "the key is not for glm-4.6: choose another with --model"),
    ],
    ids=["words", "no words", "another model"],
)
def test_a_key_that_is_refused_elsewhere_is_said_before_the_client_starts(capsys, reply, said):
    with pytest.raises(SystemExit):
        model_there(reply)
    line = capsys.readouterr().err
    assert re.sub(r"http://[\d.:]+", "{}", line) == f"ztoapi: {said}\n"


def test_the_lines_that_keep_a_client_name_its_folder(command):
    _, out, _ = command("launch", "codex", "--show", "--keep", PATH="/nowhere")
    assert out.startswith("dir=~/.local/share/ztoapi/codex; mkdir -p -m 700 $dir\n")


def test_launch_says_how_a_client_is_installed(command):
    line = "ztoapi: codex is not installed: npm install -g @openai/codex\n"
    assert command("launch", "codex", PATH="/nowhere") == (127, "", line)


@meanwhile
async def test_check_says_how_the_clients_that_are_installed_start(run, tmp_path):
    for program in ("cn", "llm"):
        (tmp_path / program).touch(0o755)
    status, out, _ = run(Program, "--check", PATH=str(tmp_path), ZAI_API_KEY="").end()
    line = "✓ clients   python ztoapi.py launch continue, python ztoapi.py launch llm"
    assert (status, line in out.splitlines()) == (1, True)


@meanwhile
async def test_launch_starts_a_demo_without_a_key(run, tmp_path):
    launch = run(Launch, tmp_path, flags=["--demo"], ZAI_API_KEY="")
    status, _, left = launch.end()
    assert (status, json.loads(launch.story.read_text())["health"]["demo"], left) == (7, True, [])


@meanwhile
async def test_launch_needs_a_key_for_a_server_of_its_own(run, tmp_path):
    status, said, left = run(Launch, tmp_path, ZAI_API_KEY="").end()
    assert (status, left) == (2, [])
    assert said.endswith("or try it without a key: python ztoapi.py --demo\n")


@pytest.mark.parametrize(
    ("arguments", "variables", "model", "context", "sees"),
    [
        ([], {}, "glm-4.7-flash", 204800, "false"),
        (
            [],
            {"ZAI_BASE_URL": "https://api.z.ai/api/coding/paas/v4"},
            "glm-5.3",
            1048576,
            "false",
        ),
        ([], {"ZAI_API_KEY": "k@china-plan,k@api"}, "glm-5.3", 1048576, "false"),
        ([], {"ZAI_API_KEY": "k@api,k@plan"}, "glm-4.7-flash", 204800, "false"),
        (["--model", "best"], {"MODEL_ALIASES": "best=GLM-4.6"}, "glm-4.6", 204800, "false"),
        (["--model", "GLM-4.6-nothinking"], {}, "glm-4.6:off", 204800, "false"),
        (["--model", "glm-4.6:free"], {}, "glm-4.6", 204800, "false"),
        ([], {"VISION_MODEL": "glm-4.6v-flash"}, "glm-4.7-flash", 204800, "true"),
        ([], {"VISION_MODEL": "glm-4.5"}, "glm-4.7-flash", 204800, "false"),
    ],
    ids=[
        *("free", "plan", "plan first", "plan last", "alias", "a thinking word", "another word"),
        *("VISION_MODEL", "blind VISION_MODEL"),
    ],
)
def test_show_needs_neither_client_nor_server(command, arguments, variables, model, context, sees):
    given = {"PATH": "/nowhere", "HOST": "0.0.0.0", "DEFAULT_KEY": "sk-own", "PORT": "9999"}
    told = f'"contextWindowSize": {context}, "modalities": {{"image": {sees}}}'
    assert command("launch", "qwen", "--show", *arguments, **given, **variables) == (
        0,
        f"""mkdir -p ~/.cache && dir=$(mktemp -d ~/.cache/ztoapi-XXXXXX)
cat > "$dir/settings.json" <<'EOF'
{{"model": {{"generationConfig": {{{told}, "samplingParams": {{"max_tokens": 131072}}}}}}}}
EOF
export QWEN_HOME="$dir"
export NO_UPDATE_NOTIFIER=1
export OPENAI_API_KEY=sk-own
export OPENAI_BASE_URL=http://localhost:9999/v1
export OPENAI_MODEL={model}
qwen --auth-type openai
""",
        "",
    )


def test_the_banner_names_the_database_without_its_password():
    url = "postgresql://me:hunter2@db.example/z?password=hunter2"
    text = ztoapi.banner(Settings(database_url=url), 9090)
    assert "  database  PostgreSQL db.example/z\n" in text
    assert "hunter2" not in text


@pytest.mark.parametrize(("host", "told"), [("0.0.0.0", True), ("::", True), ("127.0.0.1", False)])
def test_the_banner_names_an_address_for_others_where_they_may_call(host, told):
    text = ztoapi.banner(Settings(host=host, default_key=("sk-mine",)), 9090)
    assert ("\n  others    http://" in text) is told
    assert "localhost" not in text.partition("others")[2].partition("\n")[0]


def test_the_banner_ends_with_what_to_do_next():
    with_key, without = (
        ztoapi.banner(Settings(zai_api_key=keys), 9090).splitlines() for keys in (("zk",), ())
    )
    assert with_key[-1] == "  agent     python ztoapi.py launch claude    (others: launch --help)"
    assert [re.sub(r"/\S+/", "…/", line) for line in without[-3:]] == [
        "  note      no ZAI_API_KEY yet, so chat answers 503. Get a key: https:…/apikey-list",
        "            put it in …/.env as ZAI_API_KEY=…, and start again;",
        "            or try it without one: python ztoapi.py --demo",
    ]


def test_the_banner_of_a_demo_names_an_agent_and_its_port():
    demo = ztoapi.banner(Settings(demo=True, zai_api_key=("k",)), 8000).splitlines()
    line = "  agent     python ztoapi.py launch claude --port 8000    (others: launch --help)"
    assert demo[-1] == line


def test_what_is_for_the_client_must_follow_two_dashes(command):
    status, _, said = command("launch", "claude", "-p", "hello")
    assert (status, "[-- client's arguments]" in said) == (2, True)


@pytest.mark.parametrize(("name", "status"), [("__main__", 2), ("ztoapi", 3)])
@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("import aiohttp; aiohttp.__version__ = '3.13.9'", "aiohttp 3.13.9"),
        (
            "import aiohttp; aiohttp.__version__ = '3.15.0'; sys.modules['aiohttp.web'] = None",
            "aiohttp 3.15.0",
        ),
        ("sys.modules['aiohttp.web'] = None", "aiohttp"),
        ("sys.modules['aiohttp'] = None", "aiohttp"),
        ("sys.modules['dotenv'] = None", "dotenv"),
    ],
    ids=["older", "newer", "broken", "no aiohttp", "no dotenv"],
)
def test_a_package_that_will_not_do_is_named_in_one_line(before, said, name, status):
    script = f"import runpy, sys; {before}; runpy.run_path({str(PROGRAM)!r}, run_name={name!r})"
    command = [sys.executable, "-c", script]
    ended = subprocess.run(
        command, env=INHERITED, capture_output=True, text=True, timeout=20, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (status, "", 1)
    assert said in ended.stderr
    assert "pip install -r requirements.txt" in ended.stderr


def test_the_program_names_its_dependencies_for_uv():
    program, requirements = PROGRAM.read_text(), (PROGRAM.parent / "requirements.txt").read_text()
    lines = requirements.split("# its tests")[0].splitlines()
    wanted = [line for line in lines if not line.startswith("#")]
    lines = [
        "/// script",
        'requires-python = ">=3.10"',
        f"dependencies = {json.dumps(wanted)}",
        "///",
    ]
    assert program.startswith("".join(f"# {line}\n" for line in lines))
    aiohttp, _ = wanted
    assert f'pip install --no-cache-dir "{aiohttp}" ' in PROGRAM.with_name("README.md").read_text()


def test_the_readme_says_first_what_this_version_brought():
    changes = PROGRAM.with_name("README.md").read_text().partition("## Changes\n\n")[2]
    assert changes.startswith(f"**{ztoapi.__version__}**\n")


def test_the_names_of_aiohttps_that_may_go_are_listed_where_it_is_bounded():
    requirements = PROGRAM.with_name("requirements.txt").read_text()
    listed = dict(re.findall(r"^#   (\S+) +(test_\w+)$", requirements, re.MULTILINE))
    source, names = PROGRAM.read_text(), {name.rpartition(".")[2] for name in listed}
    assert undocumented_names(program_tree()) <= names
    assert {name for name in names if not re.search(rf"\b{name}\b", source)} == set()
    assert set(listed.values()) <= globals().keys()


def undocumented_names(tree):
    """Private names, and what is imported from modules that aiohttp's documentation does not have."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)) if module.startswith("aiohttp"):
                found |= {alias.name for alias in node.names}
            case (
                ast.Attribute(attr=name)
                | ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
            ) if re.match("_[a-z]", name):
                found.add(name)
    return found - {"web", "_exit", "_make", "_replace"}  # documented


@contextlib.asynccontextmanager
async def nobody_is_stopped():
    """While this lasts, the loop does no more than a quarter of all the computing without a look at what others ask."""
    pauses, begun = [], time.process_time()

    async def look_at_the_clock():
        while True:
            started = time.thread_time()
            await asyncio.sleep(0.01)
            pauses.append(time.thread_time() - started)

    looking = asyncio.create_task(look_at_the_clock())
    gc.disable()  # what other tests left would be counted too
    try:
        yield
    finally:
        gc.enable()
        looking.cancel()
    assert max(pauses) < (time.process_time() - begun) / 4


def many(number, *values):
    return b",".join([json.dumps(value).encode() for value in values] * number)


FROM_USER, FROM_MODEL = turn("x"), turn("y", "assistant")
RESPONSES_CALL = {"type": "function_call", "name": "f", "call_id": "c", "arguments": "{}"}
WIDE = {
    "name": "f",
    "parameters": {"properties": {f"p{i}": {"type": "string"} for i in range(600)}},
}


@in_loop
@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("chat/completions", b'"messages":[{"role":"user","content":[%s]}]' % many(60_000, text_block("x")), id="parts"),
        pytest.param("chat/completions", b'"messages":[%s]' % many(20_000, FROM_USER, FROM_MODEL), id="messages"),
        pytest.param("chat/completions", b'"fallbacks":[%s],"messages":[%s]' % (many(8, "glm-5"), many(80_000, FROM_USER)), id="fallbacks"),
        pytest.param("chat/completions", b'"messages":[%s],"tools":[%s]' % (many(1, FROM_USER), many(128, {"type": "function", "function": WIDE})), id="tools"),
        pytest.param("responses", b'"input":[%s]' % many(10_000, RESPONSES_CALL, RESPONSES_CALL), id="items"),
        pytest.param("messages", b'"messages":[%s]' % many(32_000, FROM_USER, turn("s", "system")), id="reminders"),
    ],
)  # fmt: skip
async def test_a_large_request_stops_nobody_else(start, path, body):
    client = await start(reasoning_memory="all")
    client.app[ztoapi.UPSTREAM].memory.remember(
        "", Message("assistant", ("what another said",), "thought")
    )
    body = io.BytesIO(b'{"model":"glm-4.6","max_tokens":9,%s}' % body)
    async with nobody_is_stopped(), client.post(f"/v1/{path}", data=body, headers=KEY) as response:
        assert response.status == 200


@in_loop
@pytest.mark.parametrize(
    ("path", "stream", "data"),
    [
        pytest.param("chat/completions", False, b'{"x":[%s1]}' % (b"[]," * 2**23), id="values"),
        pytest.param(
            "chat/completions",
            True,
            b'data: {"x":[%s1]}\n\n' % (b"[]," * 2**23),
            id="values in a frame",
        ),
        pytest.param("messages", False, b'{"x":[%s1]}' % (b"[]," * 2**23), id="values of messages"),
    ],
)
async def test_an_answer_with_too_many_values_is_refused_and_stops_nobody_else(
    start, zai, path, stream, data
):
    client, zai.parts = await start(max_retries=0), [data]
    async with nobody_is_stopped():
        response, text = await ask(client, chat(stream=stream, max_tokens=9), f"/v1/{path}")
    assert (response.status, "too large" in text) == (502, True)


@in_loop
async def test_what_is_held_of_an_answer_is_held_in_linear_time():
    def read():
        reader = ztoapi.UsageReader()
        for _ in range(2**14):
            reader.feed(b"x" * 2**10)

    assert seconds_of(read) < 0.5  # in quadratic time 7


@in_loop
async def test_an_answer_that_is_packed_though_we_did_not_ask_for_it_stops_nobody_else(client, zai):
    zai.headers = EVENT_STREAM | {"Content-Encoding": "gzip"}
    zai.parts = [gzip.compress(FIRST * 160_000 + RECORDED)]
    async with nobody_is_stopped():
        assert (await ask(client))[0].status == 200


def test_the_wall_clock_is_read_in_one_place():
    """So a test's own clock is the only one."""
    reads = re.findall(r"time\.time\b|datetime\.now|\.today\(|utcnow", PROGRAM.read_text())
    assert reads == ["time.time"]


jumps = pytest.mark.parametrize("jump", [-86400, 86400], ids=["back", "forward"])


@in_loop
@jumps
async def test_a_jump_of_the_wall_clock_changes_neither_limits_nor_cooldowns_nor_queues(jump):
    clock = FakeClock()
    in_china = time.gmtime(clock.unix() + 8 * 3600 + 60)
    reset = time.strftime("%Y-%m-%d %H:%M:%S", in_china)
    keys = KeyPool((FIRST_KEY, SECOND_KEY), clock)
    queue = Queue(keys, 1, clock)
    async with slot_in(queue) as slot:
        slot.limit.refused(1, clock.now())
        keys.cool_down(FIRST_KEY, FREE, refusal(1113))
        clock.time += 1
        keys.cool_down(SECOND_KEY, FREE, refusal(1308, text=f"reset at {reset}"))
        clock.epoch += jump
        pause = slot.limit.probe_at - clock.now()
        waiting = asyncio.create_task(wait_in(queue))
        await asyncio.sleep(0)
    await asyncio.wait_for(waiting, 10)
    with pytest.raises(UpstreamError, match="1308") as told:
        keys.available(FREE)
    cooling = [cooldown.until - clock.now() for cooldown in keys.cooling.values()]
    assert [pause, told.value.retry_after, *cooling] == [1, 59, 299, 59]


@in_loop
@jumps
async def test_a_jump_of_the_wall_clock_changes_only_the_times_that_are_shown(start, zai, jump):
    client = await start(limits=Limits(keep_alive_interval=0.1))

    def parts():
        yield 0.15  # seconds
        client.app[ztoapi.CLOCK].epoch += jump
        yield 0.15
        yield RECORDED

    key = ztoapi.new_key()
    client.app[ztoapi.ACCOUNTS].written(Known([Account("a", "anna", rpm=2, hash=hash_key(key))]))
    zai.answers = [parts(), parts()]
    for _ in range(2):
        response, text = await ask(client, chat(stream=True), headers={"x-api-key": key})
        assert (response.status, ": keep-alive" in text) == (200, True)
        await listed(client)
        now, snapshot = client.app[ztoapi.CLOCK].unix(), (await stats(client))[0]
        times = [
            snapshot["now"],
            snapshot["started"],
            *(recent["time"] for recent in snapshot["recent"]),
        ]
        assert times == pytest.approx([now] * len(times), abs=60)
    assert sum(minute[0] for minute in snapshot["minutes"][-2:]) == 2
    assert all(0.3 <= recent["duration"] < 60 for recent in snapshot["recent"])
    assert zai.asked_for_models == 1
    assert (await ask(client, headers={"x-api-key": key}))[0].status == 429  # two a minute


@in_loop
async def test_a_path_is_routed_in_linear_time(client):
    started = time.thread_time()
    for path in (
        "/v1/models/" + "/" * 8100 + "x",
        "/v1/models/" + "a/" * 4050,
        "/v1" * 2700,
        "/" * 8000,
    ) * 3:
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert (await talk_raw(client, head.encode())).startswith(
            (b"HTTP/1.1 401", b"HTTP/1.1 404")
        )
    assert (time.thread_time() - started) / slowness() < 0.5


@in_loop
async def test_what_is_sent_to_zai_is_made_and_encoded_only_when_it_is_its_turn(
    start, zai, monkeypatch
):
    made = []
    make = ztoapi.zai_request

    def make_and_note(prompt, model, *others, **how):
        made.append((model.id, len(zai.asked)))
        return make(prompt, model, *others, **how)

    monkeypatch.setattr(ztoapi, "zai_request", make_and_note)
    client = await start(max_concurrency=1)
    zai.answers = [zai_refuses(1311)] * 2
    assert (await ask(client, chat(fallbacks=["glm-5", "glm-4.5", "glm-5.1"])))[0].status == 200
    assert made == [("glm-4.6", 0), ("glm-5", 1), ("glm-4.5", 2)]
    del made[:]
    assert (await ask(client, chat(n=4)))[0].status == 200
    assert made == [("glm-4.6", 3), ("glm-4.6", 4), ("glm-4.6", 5), ("glm-4.6", 6)]


@in_loop
async def test_a_request_names_no_more_than_8_fallbacks(client):
    response, text = await ask(client, chat(fallbacks=["glm-5"] * 9))
    assert (response.status, error_of(text)["param"]) == (400, "fallbacks")


@in_loop
async def test_odd_lists_of_models_break_nothing(client, zai):
    ids = ["glm-9", "\ud83d", "", "a b", "x" * 300, 7, None, ["glm-10"]]
    times = [1760762344000, 10**400, -1, 1.5, True, "1", None, [1]]
    items = [{"id": name, "created": 5} for name in ids] + [
        {"id": f"m{i}", "created": time} for i, time in enumerate(times)
    ]
    zai.models = 200, {"data": [*items, None, 7, []]}
    models = await listed(client)
    assert {name: models[name]["created"] for name in models.keys() - MODELS.keys()} == {
        "glm-9": 5,
        **{f"m{i}": ztoapi.Model("x").created for i in range(len(times))},
    }
    zai.models = 200, {"data": [{"id": f"m{i}"} for i in range(2000)]}
    client.app[ztoapi.CATALOG].asked_at, client.app[ztoapi.CATALOG].asking = -math.inf, None
    assert len(await listed(client)) == 1000 + len(MODELS)
    for path in ("/docs", "/v1/models?client_version=1"):
        async with client.get(path, headers=KEY | {"anthropic-version": "1"}) as response:
            assert response.status == 200


@pytest_asyncio.fixture
async def angry_proxy(monkeypatch):
    """A proxy with a password that lets nobody through."""

    async def refuse(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 407 user:s3cr3t? No\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    url = f"http://user:s3cr3t@127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, url)
    yield
    server.close()


@in_loop
async def test_a_proxys_password_is_told_nobody(angry_proxy, start, caplog, capsys, monkeypatch):
    base = "https://zai.example/v4"
    _, text = await ask(await start(zai_base_url=base))
    monkeypatch.setenv("ZAI_BASE_URL", base)
    monkeypatch.setenv("ZAI_API_KEY", "k")
    await ztoapi.check({"PORT": "0"})
    told = text + caplog.text + capsys.readouterr().out
    assert ("407" in told, "s3cr3t" in told) == (True, False)


def ask_health(port):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(GET)
        return connection.recv(65536)[:15]


@meanwhile
async def test_a_broken_stdout_stops_nothing(run):
    for stdout in (">/dev/full", ">&-", "> >(:)"):  # full, closed, gone
        port = free_port()
        program = run(Redirected, stdout, "--demo", "--port", str(port))
        assert await answer_to_health(port) == b"HTTP/1.1 200 OK"
        program.process.terminate()
        status, _, log = program.end()
        assert (status, "Traceback" in log, "Error" in log) == (0, False, False), stdout


class Redirected(Program):
    """With another stdout, as Bash writes it."""

    def __init__(self, stdout, *arguments):
        self.COMMAND = ("bash", "-c", f'exec "$@" {stdout}', "bash", *Program.COMMAND)
        super().__init__(*arguments)


async def answer_to_health(port):
    """Of a program that is still starting."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return ask_health(port)
        await asyncio.sleep(0.1)


@meanwhile
async def test_nobody_needs_to_read_the_log(run):
    program = run(Program, "--demo")
    with socket.create_connection(("127.0.0.1", program.port), timeout=10) as connection:
        for _ in range(2000):  # more lines than a pipe holds
            connection.sendall(GET)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    status, log = program.stop()
    assert (status, log.count("GET /health")) == (0, 2000)


def test_a_log_that_cannot_be_written_loses_lines_and_says_how_many():
    (reading, writing), line = os.pipe(), "x" * 2**12
    handler, log = ztoapi.BackgroundHandler(writing, max_waiting=2**17), b""
    for _ in range(100):
        handler.emit(ztoapi.logging.makeLogRecord({"msg": line}))
    assert handler.dropped > 0
    while b"dropped" not in log:
        handler.emit(ztoapi.logging.makeLogRecord({"msg": line}))
        if select.select([reading], [], [], 0.05)[0]:
            log += os.read(reading, 2**16)
    lines = log.decode().split("\n")
    told = next(int(line.split()[0]) for line in lines if "dropped" in line)
    assert lines.index(line) == 0
    assert told + lines.count(line) >= 100


def test_a_log_that_does_not_block_loses_nothing():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    handler, log = ztoapi.BackgroundHandler(writing), b""
    for _ in range(100):
        handler.emit(ztoapi.logging.makeLogRecord({"msg": "x" * 2**12}))
    while log.count(b"\n") < 100 and select.select([reading], [], [], 5)[0]:
        log += os.read(reading, 2**16)
    assert log == (b"x" * 2**12 + b"\n") * 100


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_fails_for_a_while_says_how_many_lines_are_missing():
    (reading, writing), full = os.pipe(), os.open("/dev/full", os.O_WRONLY)
    handler = ztoapi.BackgroundHandler(full)
    for _ in range(3):
        handler.emit(ztoapi.logging.makeLogRecord({"msg": "lost"}))
        handler.flush()
    os.dup2(writing, full)
    handler.emit(ztoapi.logging.makeLogRecord({"msg": "written"}))
    handler.flush()
    assert os.read(reading, 2**16).splitlines() == [
        b"3 lines were dropped here, because they could not be written",
        b"written",
    ]


def logged(words, *secrets):
    formatter = ztoapi.RedactingFormatter(Redactor(secrets))
    return formatter.format(ztoapi.logging.makeLogRecord({"msg": words})).split(" ", 4)[4]


@pytest.mark.parametrize("told_at", [0.0, 1_795_290_963.9996, 1_795_290_964.0])
def test_a_line_of_the_log_begins_with_the_time_as_it_usually_does(told_at):
    record = ztoapi.logging.makeLogRecord({"msg": "words", "levelname": "INFO", "created": told_at})
    record.msecs = told_at % 1 * 1000
    usual = ztoapi.logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    assert ztoapi.RedactingFormatter(Redactor(())).format(record) == usual.format(record)


@pytest.mark.parametrize("length", [100, 255])
def test_long_words_do_not_hold_up_the_log(length):
    bulk = ztoapi.RedactingFormatter.BASE64_RUN
    short, long = (seconds_of(bulk.sub, "…", ("x" * n + " ") * (2**19 // n)) for n in (20, length))
    assert long < 4 * short


def test_a_line_without_end_is_cut_off_but_not_a_secret_in_it():
    formatter = ztoapi.RedactingFormatter
    line = logged("s3cr3t-" * 2**20, "s3cr3t-")
    assert (set(line), line[-1]) == ({"*", "…"}, "…")
    assert seconds_of(logged, '"' * 2**25, 'a"b') < 0.5
    assert logged("- " * (formatter.MAX_LINE // 3)) == "- " * (formatter.MAX_LINE // 3)


def test_the_same_error_is_logged_once_a_minute():
    passes = ztoapi.RepeatFilter()
    records = [
        ztoapi.logging.makeLogRecord({"levelno": level, "msg": "%s", "args": (i,)})
        for level in (20, 40)
        for i in (1, 1, 2)
    ]
    assert [passes(record) for record in records] == [True, True, True, True, False, True]


def test_the_want_of_descriptors_is_no_traceback():
    record = ztoapi.logging.makeLogRecord(
        {"levelno": 40, "exc_info": (OSError, OSError(errno.EMFILE, "many"), None)}
    )
    assert ztoapi.RepeatFilter()(record)
    assert record.exc_info is None


# ======== For people ========


def record(**fields):
    return ztoapi.Record(
        "POST", "/v1/chat/completions", 10.0, "id", **{"model": "glm-4.6", "status": 200} | fields
    )


def test_the_statistics_sum_up_and_forget():
    statistics = ztoapi.Statistics(now=0)
    for i in range(1000):
        failed = (
            {"status": 502, "error": "zai_unavailable"}
            if i % 4 == 0
            else {"first": 10.1 + i / 1000, "usage": Usage(10, 5, 15)}
        )
        statistics.add(record(model=f"m{i % 200}", torn=i == 7, **failed), 2.0, now=i * 60)
    models = statistics.model_rows()
    assert sum(model["requests"] for model in models.values()) == 1000
    assert len(models) == statistics.MAX_MODELS - len(MODELS)
    recent = statistics.recent_rows(EVERYBODY, 0, 0)
    assert (len(recent), recent[0]["n"], recent[0]["model"]) == (500, 1000, "m199")
    assert len(statistics.minutes.stretches) == 61
    assert statistics.minute_sums(999 * 60)[-1] == [1, 0, 10, 5]
    assert statistics.torn == 1


def test_the_percentiles_of_times():
    figures = ztoapi.ModelFigures()
    for i in range(101):
        figures.add(record(first=10 + i / 100), duration=i / 10)
    snapshot = figures.snapshot(MODELS["glm-4.6"])
    assert (snapshot["first"], snapshot["duration"]) == (
        {"p50": 0.5, "p95": 0.95},
        {"p50": 5.0, "p95": 9.5},
    )
    assert ztoapi.percentiles([]) == {"p50": None, "p95": None}


async def stats(client):
    async with client.get("/dashboard/stats", headers=KEY) as response:
        return await response.json(), await response.text()


@in_loop
async def test_no_model_that_a_client_makes_up_breaks_the_dashboard(client):
    for name in ("[1m][1m]", "a/[1m] [1m]", "/ [1m]x"):
        await ask(client, chat(model=name))
    assert (await stats(client))[0]["models"].keys() == {"[1m]", "[1m]x"}


@in_loop
async def test_a_slow_database_shifts_no_times_of_the_dashboard(start, monkeypatch):
    async def wait(_):
        await asyncio.sleep(0.5)

    client = await start(clock=ztoapi.Clock())
    before = (await stats(client))[0]["started"]
    monkeypatch.setattr(ztoapi, "usage_days", wait)
    assert (await stats(client))[0]["started"] == pytest.approx(before, abs=0.4)


@in_loop
async def test_the_dashboard_tells_what_went_through_and_no_secret(start, zai):
    client = await start(zai_api_key=("zai-one", "zai-two"))
    zai.answers = [zai_refuses(1113), zai_refuses(1234, 500)]
    await ask(client, message(role="user", content="my secret prompt"))
    await ask(client, chat(model="<B>x", stream=True, fallbacks=["glm-5"]))
    await ask(client, {"model": ""})
    snapshot, text = await stats(client)
    figures = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost")
    assert {
        name: [model[figure] for figure in figures] for name, model in snapshot["models"].items()
    } == {
        "glm-4.6": [1, 6, 2, 3, pytest.approx((4 * 0.6 + 2 * 0.11 + 3 * 2.2) / 1e6)],
        "<b>x": [1, 6, 2, 3, None],
    }
    newest, older = snapshot["recent"][:2]
    assert older.keys() == {
        *("n", "time", "key", "route", "model", "answered", "status", "error", "words", "first"),
        *(
            "duration",
            "prompt_tokens",
            "cached_tokens",
            "completion_tokens",
            "cost",
            "retries",
            "id",
        ),
    }
    shown = ("n", "key", "route", "model", "answered", "status", "error", "cost", "retries")
    assert [newest[name] for name in shown] == [
        *(2, "operator", "/v1/chat/completions", "<b>x", "<b>x", 200, "", None, 0),
    ]
    assert older["retries"] == 2
    resting = snapshot["resting"][0]
    assert (snapshot["keys"], resting["key"], resting["model"], resting["why"]) == (
        2,
        2,
        "glm-4.6",
        "insufficient_quota",
    )
    assert resting["until"] == FakeClock().unix() + Limits.cooldown
    assert (
        snapshot["in_flight"],
        snapshot["healed"]["other_keys"],
        snapshot["healed"]["retries"],
    ) == (0, 1, 1)
    text = text.replace(zai.url, "")  # Z.ai's address stands beside the number of its key
    for secret in ("zai-one", "zai-two", "sk-your-key", "secret prompt", "127.0.0.1"):
        assert secret not in text


@in_loop
async def test_the_operator_sees_where_each_key_of_zais_goes_and_how_it_is(start, zai):
    client = await start(zai_api_key=("zai-one", f"zai-two@{zai.url}/b"))
    zai.answers = [zai_refuses(1113)]
    await ask(client)
    first, second = sorted(
        (await stats(client))[0]["zai_keys"], key=lambda key: key["state"], reverse=True
    )
    assert {first["key"], second["key"]} == {1, 2}
    assert {first["address"], second["address"]} == {zai.url, f"{zai.url}/b"}
    assert (first["state"], second["state"], second["resting"]) == ("resting", "ready", [])
    [rest] = first["resting"]
    assert (rest["model"], rest["why"]) == ("glm-4.6", "insufficient_quota")


async def news(client, cursor, key=KEY):
    async with client.get("/dashboard/stats", params={"since": cursor}, headers=key) as response:
        return await response.json(), await response.read()


@in_loop
async def test_a_page_is_told_what_it_has_not_seen(client):
    await ask(client)
    seen, _ = await news(client, "")
    assert (seen["reset"], [row["n"] for row in seen["recent"]]) == (True, [1])
    assert not {"days", "minutes"} & seen.keys()
    await ask(client, chat(model="glm-5"))
    await ask(client)
    fresh, _ = await news(client, seen["cursor"])
    assert (fresh["reset"], [row["n"] for row in fresh["recent"]]) == (False, [3, 2])
    assert {"models", "queues"} <= fresh.keys()
    assert not {"operator", "client_keys", "plans", "zai_keys"} & fresh.keys()


@in_loop
async def test_a_page_that_has_seen_all_is_told_next_to_nothing(start):
    client = await start(clock=ztoapi.Clock())
    await make_key(client, tokens="5M/day")
    await ask(client)
    seen, _ = await news(client, "")
    for _ in range(3):
        idle, body = await news(client, seen["cursor"])
        assert idle.keys() == {"now", "cursor", "reset", "recent"}
        assert (idle["cursor"], idle["recent"], len(body) < 300) == (seen["cursor"], [], True)


@pytest.mark.parametrize(
    ("value", "other", "same"),
    [
        ({"until": [1.8e9 + 0.0001]}, {"until": [1.8e9 + 0.0002]}, True),
        ({"until": 1.8e9}, {"until": 1.8e9 + 1}, False),
        ({"p50": 0.123}, {"p50": 0.124}, False),
        ({"a": None}, {"a": 0}, False),
    ],
)
def test_times_that_tremble_are_no_news(value, other, same):
    assert (ztoapi.field_digest(value) == ztoapi.field_digest(other)) is same


@in_loop
@pytest.mark.parametrize("cursor", ["", "x", "00000000-1-ab.cd", "0-0-", "\u0663" * 9])
async def test_a_cursor_of_another_process_begins_anew(client, cursor):
    await ask(client)
    seen, _ = await news(client, cursor)
    assert (seen["reset"], len(seen["recent"])) == (True, 1)
    assert {"models", "client_keys", "queues"} <= seen.keys()


@in_loop
async def test_a_named_key_sees_its_own_requests_alone(client):
    anna = await make_key(client)
    for key in (KEY, anna, KEY):
        await ask(client, headers=key)
    seen, _ = await news(client, "", anna)
    assert [(row["n"], row["key"]) for row in seen["recent"]] == [(2, "anna")]
    assert seen.keys() == {
        *("now", "cursor", "reset", "operator", "name", "recent", "client_keys"),
    }
    await client.app[ztoapi.DATABASE].sync(client.app[ztoapi.ACCOUNTS])
    async with client.get("/dashboard/history", headers=anna) as response:
        history = await response.json()
    for span in ("days", "quarters", "minutes"):
        assert [(row["key"], row["requests"]) for row in history[span]] == [("anna", 1)]
    assert len(history["times"]) == 1


@in_loop
async def test_a_refusal_says_why_among_the_requests_and_counts(client):
    anna = await make_key(client, rpm=1)
    for _ in range(2):
        await ask(client, headers=anna)
    seen, _ = await news(client, "", anna)
    assert [(row["status"], row["error"], row["words"]) for row in seen["recent"]] == [
        (429, "rate_limit_exceeded", "This key may send 1 requests a minute: wait a little."),
        (200, "", ""),
    ]
    [key] = seen["client_keys"]
    assert key["requests"] == 2


@in_loop
async def test_a_refusal_that_repeats_a_secret_is_redacted_among_the_requests(client):
    choice = {"type": "function", "function": {"name": "zai-key"}}
    await ask(client, chat(tools=[function("f")], tool_choice=choice))
    seen, _ = await news(client, "")
    [row] = seen["recent"]
    assert (row["status"], row["words"]) == (400, "'tool_choice' names ***, not among the tools.")


@in_loop
async def test_the_history_is_sent_again_only_when_it_has_changed(start):
    client = await start(clock=ztoapi.Clock())
    statuses, headers = [], {**KEY}
    for asks in (0, 1, 0, 0):
        for _ in range(asks):
            await ask(client)
        await client.app[ztoapi.DATABASE].sync(client.app[ztoapi.ACCOUNTS])
        async with client.get("/dashboard/history", headers=headers) as response:
            statuses.append((response.status, bool(await response.read())))
            headers["If-None-Match"] = response.headers["ETag"]
    assert statuses == [(200, True), (200, True), (304, False), (304, False)]


@in_loop
@pytest.mark.parametrize(("accepted", "coding"), [("gzip, br", "gzip"), ("br", None)])
@pytest.mark.parametrize("path", ["/dashboard/stats", "/dashboard/history"])
async def test_large_answers_of_the_dashboard_are_packed(client, path, accepted, coding):
    for i in range(8):
        await ask(client, chat(model=f"glm-{i}"))
    async with client.get(path, headers={**KEY, "Accept-Encoding": accepted}) as response:
        assert response.headers.get("Content-Encoding") == coding
        assert len(await response.json()) > 3


def test_a_timeline_keeps_its_last_stretches_and_says_when_they_were():
    timeline = ztoapi.Timeline(60, 2, 1)
    for minute in range(5):
        stretch = timeline.at(minute * 60 + 59.9)
        stretch.figures["a", "glm-5"] = [1, 0, 0, 0, 0]
        stretch.times.append(("a", 0.5, None))
    assert [row["at"] for row in timeline.rows("a", {"a": "anna"}, 3600)] == [3720, 3780, 3840]
    assert timeline.rows("b", {}, 0) == timeline.percentiles("b", 0) == []
    assert timeline.percentiles(EVERYBODY, 0)[0] == {
        "at": 120,
        "first": {"p50": 0.5, "p95": 0.5},
        "duration": {"p50": None, "p95": None},
    }


@in_loop
async def test_the_dashboard_blanks_what_clients_put_into_names(start):
    client = await start(default_key=("sk-mine",))
    await ask(client, chat(model="sk-mine"), headers={"x-api-key": "sk-mine"})
    async with client.get("/dashboard/stats", headers={"x-api-key": "sk-mine"}) as response:
        assert "sk-mine" not in await response.text()


@in_loop
async def test_invented_names_do_not_fill_the_memory(client):
    for i in range(200):
        await ask(client, chat(model=f"m{i}"))
    assert len(client.app[ztoapi.UPSTREAM].queues) <= len(MODELS) + 1


@in_loop
async def test_the_dashboard_sees_what_is_in_flight_and_what_waits(start, zai):
    client = await start(max_concurrency=1)
    zai.parts = [HANG]
    asking = [asyncio.create_task(ask(client)) for _ in range(3)]
    assert await eventually(lambda: len(client.app[ztoapi.IN_FLIGHT]) == 3)
    snapshot, _ = await stats(client)
    assert snapshot["in_flight"] == 3
    assert snapshot["queues"] == [
        {
            "model": "glm-4.6",
            "in_flight": 1,
            "waiting": 2,
            "limits": [1],
            "may_be_in_flight": 1,
            "refusals": [None],
            "max_in_flight": 1,
        }
    ]
    await ztoapi.end_tasks(asking)


@in_loop
async def test_the_dashboard_can_be_left_out(start):
    client = await start(dashboard_enabled=False)
    for path in ("/dashboard", "/dashboard/stats"):
        async with client.get(path, headers=KEY) as response:
            assert response.status == 404


@in_loop
async def test_the_figures_need_the_key_and_the_pages_do_not(client):
    for path, status in (("/dashboard/stats", 401), ("/dashboard", 200), ("/docs", 200)):
        async with client.get(path) as response:
            assert response.status == status


@pytest.mark.parametrize(
    "page", [ztoapi.DOCS_PAGE, ztoapi.DASHBOARD_PAGE], ids=["docs", "dashboard"]
)
def test_a_page_may_do_no_more_than_it_needs(page):
    rules = dict(rule.split(" ", 1) for rule in page.policy.split("; "))
    for own in ("script-src", "style-src"):
        assert re.fullmatch("'sha256-[A-Za-z0-9+/]{43}='", rules.pop(own))
    nothing = dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'")
    assert rules == {**nothing, "connect-src": "'self'", "img-src": "'self'"}


@in_loop
async def test_browsers_are_led_to_the_docs(client):
    async with client.get(
        "/", headers={"Accept": "text/html,*/*"}, allow_redirects=False
    ) as response:
        assert (response.status, response.headers["Location"]) == (302, "docs")


@in_loop
async def test_browsers_get_an_icon(client):
    async with client.get("/favicon.ico") as response:
        assert (response.status, response.content_type) == (200, "image/svg+xml")


@in_loop
async def test_the_docs_show_the_key_only_while_it_is_the_published_one(start):
    for key, snapshot in (("sk-your-key", True), ("sk-of-my-own", False)):
        client = await start(default_key=(key,), model_aliases=(("</script><b>", "glm-4.6"),))
        async with client.get("/docs") as response:
            text = await response.text()
        assert (f'"{key}"' in text) is snapshot
        assert "</script><b>" not in text
        assert "'unsafe" not in response.headers["Content-Security-Policy"]


async def shell(lines):
    done = await asyncio.create_subprocess_shell(
        lines, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return (await asyncio.wait_for(done.communicate(), 20))[0].decode()


@in_loop
@pytest.mark.browser
async def test_the_docs_page_answers_from_key_to_last_token(demo, browser):
    here = f"http://localhost:{(await demo(pace=0.015)).port}"
    await browser.open(here + "/docs", "document.querySelectorAll('#model-table tr').length > 22")
    assert await browser.run("$('base').querySelector('code').textContent") == here + "/v1"
    await browser.run(say_in_playground("it's 你好"))
    assert await browser.sees(ANSWERED)
    answer, thought = await browser.run("[chat.turns[1].text, chat.turns[1].thought]")
    assert ("it's 你好" in answer, "only a demo" in thought) == (True, True)
    figures = await browser.run("document.querySelector('.figures').textContent")
    for words in ("first token", "tokens in", "cached", "tokens out", "cost $0", "finish: stop"):
        assert words in figures
    assert browser.complaints == []
    assert {url.split("/")[2] for url in browser.asked if url.startswith("http")} == {
        here.split("/")[2]
    }


ANSWERED = "$('again').checkVisibility()"
# Puts what is copied into `copied`.
WATCH_CLIPBOARD = (
    "window.copied = ''; navigator.clipboard.writeText = async text => { window.copied = text }; "
)


def say_in_playground(text):
    return f"$('try-message').value = {json.dumps(text)}; $('send').click()"


@in_loop
@pytest.mark.browser
async def test_the_request_of_the_playground_hides_its_key_until_it_is_copied(here, browser):
    await browser.open(here + "/docs", "!!$('send')")
    await browser.run(WATCH_CLIPBOARD + say_in_playground("it's 你好"))
    assert await browser.sees(ANSWERED)
    await browser.run("document.querySelector('.asked').open = true")
    assert await browser.sees("!!document.querySelector('.asked pre')")
    assert "sk-your-key" not in await browser.run("$('log').textContent")
    await browser.run("document.querySelector('.asked button').click()")
    copied = await browser.run("window.copied")
    assert "sk-your-key" in copied
    assert "[DONE]" in await shell(copied)


@in_loop
@pytest.mark.browser
async def test_a_conversation_has_a_system_prompt_an_image_and_an_answer_made_again(here, browser):
    await browser.open(here + "/docs", "!!$('send')")
    await browser.run(
        "$('try-system').value = 'Be brief.'; $('try-model').value = 'glm-4.6v-flash'; "
        "$('try-model').onchange(); $('try-temperature').value = '0.5'; $('try-limit').value = '99'"
    )
    await browser.run(
        "(async () => { const canvas = document.createElement('canvas'); const file = await new Promise("
        "done => canvas.toBlob(done)); await addImages([new File([file], 'a.png', {type: file.type})]) })()"
    )
    await browser.run("$('try-thinking').value = 'off'; " + say_in_playground("What is it?"))
    assert await browser.sees(ANSWERED)
    await browser.run("$('try-message').value = 'Sure?'; $('try-message').focus()")
    await browser.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", modifiers=2)  # Ctrl
    assert await browser.sees("chat.turns.length === 4 && " + ANSWERED)
    await browser.run("$('again').click()")
    assert await browser.sees("chat.turns.length === 4 && " + ANSWERED)
    request = await browser.run("chat.turns[3].request")
    said = [message["role"] for message in request.pop("messages")]
    assert said == ["system", "user", "assistant", "user"]
    assert request == {
        "model": "glm-4.6v-flash",
        "stream": True,
        "stream_options": {"include_usage": True},
        "enable_thinking": False,
        "temperature": 0.5,
        "max_tokens": 99,
    }
    assert await browser.run("chat.turns[0].images.length") == 1
    await browser.run("$('clear').click()")
    assert await browser.run("chat.turns.length + document.querySelectorAll('.turn').length") == 0
    assert browser.complaints == []


@in_loop
@pytest.mark.browser
@pytest.mark.parametrize(
    ("text", "html"),
    [
        pytest.param("a *b* **c** `d` ~~e~~", "<p>a <em>b</em> <strong>c</strong> <code>d</code> <s>e</s></p>", id="spans"),
        pytest.param("snake_case_name 2 * 3 * 4", "<p>snake_case_name 2 * 3 * 4</p>", id="no spans"),
        pytest.param("# A\n#### B", "<h4>A</h4><h5>B</h5>", id="headings without a gap"),
        pytest.param("- a\n  - b\n- c", "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>", id="lists"),
        pytest.param("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>', id="a numbered list"),
        pytest.param("> a\n> b\n\n---", "<blockquote><p>a\nb</p></blockquote><hr>", id="a quotation"),
        pytest.param("[a](javascript:alert(1))", "<p><span>a</span></p>", id="a script as a link"),
        pytest.param("[a](data:text/html,b)", "<p><span>a</span></p>", id="data as a link"),
        pytest.param("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>", id="markup"),
        pytest.param(
            "![a](https://b.c/d.png)",
            '<p><a href="https://b.c/d.png" target="_blank" rel="noopener noreferrer">[picture] a</a></p>',
            id="a remote image is a link",
        ),
        pytest.param(
            "see https://b.c/d_e.",
            '<p>see <a href="https://b.c/d_e" target="_blank" rel="noopener noreferrer">https://b.c/d_e</a>.</p>',
            id="an address",
        ),
    ],
)  # fmt: skip
async def test_markdown_becomes_elements_and_nothing_else(here, browser, text, html):
    await browser.open(here + "/docs", "!!$('send')")
    rendered = f"make('div', {{}}, renderMarkdown({json.dumps(text)})).innerHTML"
    assert await browser.run(rendered) == html


@in_loop
@pytest.mark.browser
async def test_code_in_an_answer_can_be_copied(here, browser):
    await browser.open(here + "/docs", "!!$('send')")
    fence = json.dumps("```js\nlet a = 1;\n\n  b\n```")
    await browser.run(
        WATCH_CLIPBOARD + f"const made = make('div', {{}}, renderMarkdown({fence})); "
        "made.querySelector('button').click()"
    )
    assert await browser.sees("window.copied === 'let a = 1;\\n\\n  b'")


def shown_in(panel):
    return f"[...document.querySelectorAll('#{panel} pre')].map(pre => pre.textContent)"


def choose(tabs, value):
    return f"document.querySelector('#{tabs} [value=\"{value}\"]').click(); "


def choose_model(name):
    return f"$('client-model').value = '{name}'; $('client-model').dispatchEvent(new Event('change')); "


@in_loop
@pytest.mark.browser
@pytest.mark.parametrize(
    ("api", "way", "wanted"),
    [
        pytest.param("Chat", "text", '"object":"chat.completion"', id="chat"),
        pytest.param("Chat", "stream", "data: [DONE]", id="chat streamed"),
        pytest.param("Chat", "tool", '"name":"get_weather"', id="chat with a tool"),
        pytest.param("Chat", "image", '"finish_reason":"stop"', id="chat with an image"),
        pytest.param("Anthropic", "text", '"type":"message"', id="Anthropic"),
        pytest.param("Anthropic", "stream", "event: message_stop", id="Anthropic streamed"),
        pytest.param("Anthropic", "tool", '"name":"get_weather"', id="Anthropic with a tool"),
        pytest.param(
            "Anthropic", "image", '"stop_reason":"end_turn"', id="Anthropic with an image"
        ),
        pytest.param("Responses", "text", '"status":"completed"', id="Responses"),
        pytest.param("Responses", "stream", '"type":"response.completed"', id="Responses streamed"),
        pytest.param("Responses", "tool", '"name":"get_weather"', id="Responses with a tool"),
        pytest.param("Responses", "image", '"status":"completed"', id="Responses with an image"),
    ],
)
async def test_the_calls_of_the_docs_page_work_as_they_are_shown(here, browser, api, way, wanted):
    await browser.open(here + "/docs", "!!document.querySelector('#call-panel pre')")
    await browser.run(choose("call-api", api) + choose("call-way", way))
    (lines,) = await browser.run(shown_in("call-panel"))
    assert wanted in await shell(lines)


@in_loop
@pytest.mark.browser
@pytest.mark.parametrize(
    ("sdk", "apis"), [("openai", ["Chat", "Responses"]), ("anthropic", ["Anthropic"])]
)
async def test_the_python_calls_of_the_docs_page_work_as_they_are_shown(here, browser, sdk, apis):
    pytest.importorskip(sdk)
    await browser.open(here + "/docs", "!!document.querySelector('#call-panel pre')")
    await browser.run(choose("call-language", "Python"))
    program = []
    for api, way in product(apis, ("text", "stream", "tool", "image")):
        await browser.run(choose("call-api", api) + choose("call-way", way))
        program += await browser.run(shown_in("call-panel"))
    command = [sys.executable, "-c", "\n".join(program)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=40)
    printed = done.stdout.decode()
    assert printed.count("the demo of ztoapi") == 3 * len(apis)
    assert printed.count("get_weather") == len(apis)


@in_loop
@pytest.mark.browser
async def test_the_tabs_of_the_docs_page_obey_the_arrow_keys_and_share_the_model(here, browser):
    await browser.open(here + "/docs", "!!document.querySelector('#call-panel pre')")
    for key, wanted in (
        ("ArrowLeft", "JavaScript"),
        ("ArrowRight", "curl"),
        ("ArrowRight", "PowerShell"),
    ):
        await browser.run("document.querySelector('#call-language :checked').focus()")
        await browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        assert await browser.run("document.activeElement.value") == wanted
        assert await browser.run("chosenTab('call-language')") == wanted
    await browser.run(choose_model("glm-5.3"))
    assert '"model": "glm-5.3"' in (await browser.run(shown_in("call-panel")))[0]
    assert "glm-5.3" in (await browser.run(shown_in("client-panel")))[0]
    assert browser.complaints == []


@in_loop
@pytest.mark.browser
async def test_the_docs_page_shows_for_each_client_the_lines_that_launch_shows(here, browser):
    await browser.open(here + "/docs", "!!document.querySelector('#client-panel pre')")
    await browser.run(choose_model("glm-5.3-flash"))
    port = here.split(":")[2]
    for name, client in ztoapi.CLIENTS.items():
        await browser.run(choose("client-program", name))
        words = ztoapi.client_words(here, "sk-your-key", MODELS["glm-5.3-flash"])
        shown = client.filled({**words, "dir": "$dir"}).shell_lines()
        wanted = [
            f"python ztoapi.py launch {name} --port {port} --model glm-5.3-flash",
            shown,
            client.install,
        ]
        assert await browser.run(shown_in("client-panel")) == wanted
    assert browser.complaints == []


@in_loop
@pytest.mark.browser
async def test_the_table_of_models_begins_with_free_ones_and_can_be_filtered(here, browser):
    names = "[...document.querySelectorAll('#model-table tbody th')].map(cell => cell.textContent)"
    await browser.open(here + "/docs", "!!document.querySelector('#model-table td')")
    free = [model.id for model in MODELS.values() if model.free]
    assert (await browser.run(names))[: len(free)] == free
    await browser.run("$('filter').value = 'FLASH 4.6v'; $('filter').oninput()")
    assert await browser.run(names) == ["glm-4.6v-flash", "glm-4.6v-flashx"]
    await browser.run("$('filter').value = 'no such model'; $('filter').oninput()")
    assert await browser.run(text_of("filter-says")) == "No model is like this: change the filter."


@in_loop
@pytest.mark.browser
@pytest.mark.parametrize("page", ["docs", "dashboard"])
async def test_language_and_theme_are_chosen_and_remembered(here, browser, page):
    state = "[document.documentElement.lang, document.documentElement.dataset.theme, $('language').value]"
    await browser.open(f"{here}/{page}", "$('version').textContent !== ''")
    await browser.run(
        "$('language').value = 'zh'; $('language').onchange(); $('theme').value = 'dark'; $('theme').onchange()"
    )
    assert await browser.run(state) == ["zh-CN", "dark", "zh"]
    await browser.open(f"{here}/health")
    await browser.open(f"{here}/{page}", "$('version').textContent !== ''")
    assert await browser.run(state) == ["zh-CN", "dark", "zh"]


REQUEST_ROWS = "document.querySelectorAll('#request-table tbody tr:not(.opened)').length"


@in_loop
@pytest.mark.browser
async def test_a_stream_can_be_stopped_and_the_dashboard_counts_it(demo, browser):
    here = f"http://localhost:{(await demo(pace=0.03)).port}"
    await browser.open(here + "/docs", "!!$('send')")
    await browser.run(say_in_playground("word " * 500))
    assert await browser.sees("chat.turns[1].text.length > 20")
    await browser.run("$('stop').click()")
    assert await browser.sees("$('log').textContent.includes('finish: stopped')")
    await browser.open(here + "/dashboard#requests", f"{REQUEST_ROWS} === 1")
    assert "499" in await browser.run(text_of("request-table"))
    assert browser.complaints == []


@in_loop
@pytest.mark.browser
async def test_what_comes_from_outside_stays_text(demo, browser):
    evil = "<img src=x onerror=window.broken=1>"
    here = f"http://localhost:{(await demo(model_aliases=((evil, evil + 'x'),))).port}"
    await browser.open(here + "/docs", "!!$('send')")
    await browser.run(f"$('try-model').value = '{evil}'; " + say_in_playground(evil))
    assert await browser.sees("!!document.querySelector('.failure')?.checkVisibility()")
    assert "model_not_found" in await browser.run("document.querySelector('.failure').textContent")
    browser.complaints.clear()  # the 404 is one for the console
    async with ztoapi.aiohttp.ClientSession() as session:
        await session.post(
            here + "/v1/chat/completions", json=chat(model=evil), headers=KEY | {"User-Agent": evil}
        )
    images = "document.querySelectorAll('img').length + (window.broken || 0)"
    assert await browser.run(images) == 0
    await browser.open(here + "/dashboard#requests", f"{REQUEST_ROWS} === 2")
    await browser.run("document.querySelector('#request-table tbody button').click()")
    assert "<img" in await browser.run(text_of("request-table"))
    assert await browser.run(images) == 0
    assert browser.complaints == []


@in_loop
@pytest.mark.browser
async def test_the_dashboard_comes_back_by_itself(demo, browser):
    client = await demo()
    port = client.port
    await open_dashboard(browser, f"http://localhost:{port}", "sk-your-key")
    await client.close()
    assert await browser.sees("!$('gone').hidden")
    await demo(port=port)
    assert await browser.sees("$('gone').hidden && " + text_of("figures") + ".startsWith('0')")


@in_loop
@pytest.mark.browser
async def test_the_dashboard_asks_for_the_key(demo, browser):
    client = await demo(default_key=("sk-mine",))
    await browser.open(
        f"http://localhost:{client.port}/dashboard", "$('door') && !$('door').hidden"
    )
    for key, condition in (
        ("wrong", text_of("door-says") + " !== ''"),
        ("sk-mine", "!$('board').hidden"),
    ):
        await browser.run(f"$('door-key').value = '{key}'; $('door-open').click()")
        assert await browser.sees(condition)


@in_loop
@pytest.mark.browser
@pytest.mark.parametrize(
    ("remembers", "kept"),
    [pytest.param("false", None, id="for the tab"), pytest.param("true", "sk-your-key", id="on the device")],
)  # fmt: skip
async def test_the_key_is_kept_for_the_tab_unless_the_person_wants_more(
    here, browser, remembers, kept
):
    await browser.open(here + "/dashboard", "!!$('door')")
    await browser.run(f"$('door-keep').checked = {remembers}")
    await open_door(browser, "sk-your-key")
    keeps = "[sessionStorage.getItem('ztoapi-key'), localStorage.getItem('ztoapi-key')]"
    assert await browser.run(keeps) == ["sk-your-key", kept]
    await browser.run("$('leave').click()")
    assert await browser.run(keeps) == [None, None]


async def open_dashboard(browser, here, key):
    await browser.open(here + "/dashboard", "!!$('door')")
    await open_door(browser, key)


async def open_door(browser, key):
    await browser.run(f"$('door-key').value = '{key}'; $('door-open').click()")
    assert await browser.sees("!$('board').hidden")


async def stats_for(here, key):
    async with (
        ztoapi.aiohttp.ClientSession() as session,
        session.get(here + "/dashboard/stats", headers={"x-api-key": key}) as response,
    ):
        return response.status, await response.json()


@in_loop
@pytest.mark.browser
async def test_the_address_remembers_the_view_of_the_dashboard(here, browser):
    shown = "[...document.querySelectorAll('[id$=-view]')].filter(view => view.checkVisibility()).map(view => view.id)"
    await open_dashboard(browser, here, "sk-your-key")
    assert await browser.run(shown) == ["overview-view"]
    for view in ("requests", "keys", "upstream", "overview"):
        await browser.run(f"document.querySelector('#views [href=\"#{view}\"]').click()")
        assert await browser.sees(f"{shown}.join() === '{view}-view'")
        assert (await browser.run("location.hash")) == f"#{view}"
    await browser.open(f"{here}/dashboard#keys", f"{shown}.join() === 'keys-view'")
    assert browser.complaints == []


NEW_KEY = "(/sk-[\\w-]{43}/.exec($('made').textContent) ?? [''])[0]"


@in_loop
@pytest.mark.browser
async def test_keys_are_added_changed_and_removed_on_the_dashboard(here, browser):
    await browser.open(here + "/dashboard#keys", "!!$('door')")
    await open_door(browser, "sk-your-key")
    add = "$('add-key').click(); $('key-name').value = 'anna+1'; $('tokens-amount').value = '5'; $('key-save').click()"
    await browser.run(add)
    assert await browser.sees("$('made-dialog').open")
    key = await browser.run(NEW_KEY)
    lines = await browser.run(text_of("made"))
    assert (f"{here}/v1" in lines, "python ztoapi.py launch" in lines) == (True, True)
    await browser.run("$('made-close').click()")
    assert await browser.sees(text_of("key-table") + ".includes('0 of 5M/month')")
    same = (
        "const before = $('key-table').firstChild; drawKeys(); before === $('key-table').firstChild"
    )
    assert await browser.run(same)  # or a click would miss its button

    change = "$('change anna+1').focus(); $('change anna+1').click(); $('key-rpm').value = '7'; $('key-save').click()"
    await browser.run(change)
    assert await browser.sees(
        "!$('key-dialog').open && document.activeElement.id === 'change anna+1'"
    )
    status, snapshot = await stats_for(here, key)
    changed = snapshot["client_keys"][0]
    assert (status, changed["tokens"], changed["rpm"]) == (200, "5M/month", 7)

    await browser.run(add)
    assert await browser.sees(text_of("key-says") + ".includes('of this name')")
    await browser.run(
        "$('key-cancel').click(); $('remove anna+1').click(); document.activeElement.click()"
    )
    assert not await browser.run("$('sure-dialog').open")
    assert (await stats_for(here, key))[0] == 200
    await browser.run("$('remove anna+1').click(); $('sure-yes').click()")
    assert await browser.sees(text_of("key-table") + ".startsWith('No keys yet')")
    assert (await stats_for(here, key))[0] == 401
    assert browser.complaints == []


@in_loop
@pytest.mark.browser
async def test_keys_are_paused_renamed_and_rotated_on_the_dashboard(here, browser):
    async with (
        ztoapi.aiohttp.ClientSession(headers=KEY) as session,
        session.post(here + "/dashboard/keys", json={"name": "anna"}) as response,
    ):
        key = (await response.json())["key"]
    await browser.open(here + "/dashboard#keys", "!!$('door')")
    await open_door(browser, "sk-your-key")
    assert await browser.sees("!!$('pause anna')")
    await browser.run("$('pause anna').click()")
    assert await browser.sees("!!$('resume anna')")
    assert (await stats_for(here, key))[0] == 401
    await browser.run("$('resume anna').click()")
    assert await browser.sees("!!$('pause anna')")
    await browser.run(
        "$('rename anna').click(); $('new-name').value = '安娜'; $('sure-yes').click()"
    )
    assert await browser.sees("!!$('rotate 安娜')")
    assert (await stats_for(here, key))[0] == 200
    await browser.run("$('rotate 安娜').click(); $('sure-yes').click()")
    assert await browser.sees("$('made-dialog').open")
    assert (await stats_for(here, key))[0] == 401
    assert (await stats_for(here, await browser.run(NEW_KEY)))[0] == 200
    assert browser.complaints == []


@in_loop
@pytest.mark.browser
async def test_a_limit_is_written_as_it_was_picked(here, browser):
    await browser.open(here + "/dashboard#keys", "!!$('door')")
    await open_door(browser, "sk-your-key")
    for written in ("5M/month", "500K/day", "1200", "2.5M/week"):
        picked = f"setAmount('tokens', '{written}'); getAmount('tokens')"
        assert await browser.run(picked) == written
    assert await browser.run("setAmount('spend', null); getAmount('spend')") == "none"


@in_loop
@pytest.mark.browser
async def test_a_key_sees_on_the_dashboard_what_is_its_own(here, browser):
    async with ztoapi.aiohttp.ClientSession(headers=KEY) as session:
        async with session.post(here + "/dashboard/keys", json={"name": "anna"}) as response:
            key = (await response.json())["key"]
        for model, asked_with in (("glm-5.3", key), ("glm-4.6", "sk-your-key")):
            headers = {"x-api-key": asked_with, "Authorization": ""}
            await session.post(
                here + "/v1/chat/completions", json=chat(model=model), headers=headers
            )
    for asked_with, by_model, operator in (
        (key, ["glm-5.3", "total"], False),
        ("sk-your-key", ["glm-4.6", "glm-5.3", "total"], True),
    ):
        await open_dashboard(browser, here, asked_with)
        names = "[...document.querySelectorAll('#usage-table tbody th')].map(cell => cell.textContent).sort()"
        assert await browser.sees(f"JSON.stringify({names}) === '{ztoapi.json_text(by_model)}'")
        parts = ("by", "to-upstream")
        assert [await browser.run(f"$('{part}').checkVisibility()") for part in parts] == [
            operator
        ] * 2
        await browser.run("location.hash = '#keys'")
        assert await browser.sees("$('keys-view').checkVisibility()")
        assert await browser.run("$('add-key').checkVisibility()") is operator
        await browser.run("location.hash = ''; $('leave').click()")
    assert browser.complaints == []


@in_loop
@pytest.mark.browser
async def test_the_arrow_keys_choose_a_column_of_a_chart(here, browser):
    async with ztoapi.aiohttp.ClientSession(headers=KEY) as session:
        await session.post(here + "/v1/chat/completions", json=chat())
        days = []
        while not days:  # they are written behind the request's back
            async with session.get(here + "/dashboard/history") as response:
                days = (await response.json())["days"]
    await open_dashboard(browser, here, "sk-your-key")
    value = "document.querySelector('#usage-chart [role=slider]')?.getAttribute('aria-value{}')"
    await browser.run(choose("range", "31d"))
    assert await browser.sees(value.format("text") + ".includes('(glm-4.6 ')")
    await browser.run("$('by').value = 'key'; $('by').onchange()")
    assert await browser.sees(value.format("text") + ".includes('(operator ')")
    for key, wanted in (("ArrowLeft", "29"), ("Home", "0"), ("ArrowRight", "1")):
        await browser.run("document.querySelector('#usage-chart [role=slider]').focus()")
        await browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        assert await browser.run(value.format("now")) == wanted
    assert await browser.run(value.format("text") + ".endsWith(': 0')")


@in_loop
@pytest.mark.browser
async def test_the_list_of_requests_is_filtered_paused_and_opened(here, browser):
    async with ztoapi.aiohttp.ClientSession(headers=KEY) as session:
        for body in (chat(), chat(model="glm-4.5"), chat(temperature=9)):
            await session.post(here + "/v1/chat/completions", json=body)
        await browser.open(here + "/dashboard#requests", "!!$('door')")
        await open_door(browser, "sk-your-key")
        assert await browser.sees(f"{REQUEST_ROWS} >= 2")
        everything = await browser.run(REQUEST_ROWS)
        await browser.run("$('of-model').value = 'glm-4.5'; $('filters').oninput()")
        assert await browser.run(REQUEST_ROWS) == 1
        await browser.run(
            "$('of-model').value = ''; $('of-text').value = 'nowhere'; $('filters').oninput()"
        )
        assert "change the filters" in await browser.run(text_of("request-table"))
        await browser.run("$('of-text').value = ''; $('filters').oninput(); $('pause').click()")
        await browser.run("document.querySelector('#request-table tbody button').click()")
        assert "req_" in await browser.run("document.querySelector('.opened').textContent")
        await session.post(here + "/v1/chat/completions", json=chat())
        assert await browser.sees(text_of("requests-say") + ".includes('Paused: 1 more')")
        assert await browser.run(REQUEST_ROWS) == everything
        await browser.run("$('pause').click()")
        assert await browser.run(REQUEST_ROWS) == everything + 1
    assert await browser.run("document.querySelectorAll('.opened:not([hidden])').length") == 1
    assert browser.complaints == []


@in_loop
@pytest.mark.browser
async def test_the_dashboard_shows_what_is_left_of_a_plan_and_what_lowered_a_limit(
    client, browser, zai
):
    limit = {
        "type": "CREDIT_LIMIT",
        "unit": 3,
        "number": 5,
        "usage": 12000,
        "currentValue": 9000,
        "percentage": 75,
    }
    zai.quota = (
        200,
        json.dumps(
            {"limits": [limit, limit | {"unit": 6, "number": 1, "percentage": 95}]}
        ).encode(),
    )
    zai.answers = [zai_refuses(1302)]
    await ask(client)
    await open_dashboard(browser, f"http://localhost:{client.port}", "sk-your-key")
    bars = (
        "[...document.querySelectorAll('#limits [role=meter]')].map(bar => "
        "[bar.ariaLabel, bar.ariaValueNow, bar.parentNode.className].join())"
    )
    assert await browser.sees(f"{bars}.join(' ') === '5 hours,25,gauge week,5,gauge short'")
    assert "25 % left · 3,000 / 12,000" in await browser.run(text_of("limits"))
    await browser.run("location.hash = '#upstream'")
    assert await browser.sees(text_of("queue-table") + ".includes('lowered to 1 at')")
    assert browser.complaints == []


@pytest.fixture
def check(zai, monkeypatch, capsys):
    """Runs `--check`: its exit status and its lines."""
    monkeypatch.setattr(ztoapi, "ENV_FILE", Path("/nowhere"))
    monkeypatch.setenv("NO_PROXY", "*")

    async def checked(bases=ztoapi.ZAI_BASES, probe="", **settings):
        ours = {"PORT": "0", "ZAI_BASE_URL": zai.url, "ZAI_API_KEY": "id.secret"}
        ours["DATABASE_URL"] = "memory"
        status = await ztoapi.check({**ours, **settings}, bases, probe)
        return status, capsys.readouterr().out.splitlines()

    return checked


@in_loop
async def test_the_doctor_finds_all_well(check, zai):
    zai.parts = [DOCUMENT]
    status, lines = await check()
    assert (status, [line[0] for line in lines]) == (0, ["✓"] * 6)
    assert "你好" in lines[-1]


@in_loop
@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        pytest.param({"PORT": "abc"}, "✗ settings  PORT=abc cannot be used", id="a setting"),
        pytest.param(
            {"ZAI_API_KEY": ""}, "✗ key       This server has no Z.ai key. Get one at", id="no key"
        ),
        pytest.param(
            {"ZAI_BASE_URL": "http://127.0.0.1:1/v4"},
            "✗ Z.ai      Z.ai cannot be reached",
            id="refused",
        ),
        pytest.param(
            {"ZAI_BASE_URL": "http://name.invalid"},
            "✗ Z.ai      Z.ai cannot be reached",
            id="no such name",
        ),
    ],
)
async def test_the_doctor_says_what_is_wrong(check, settings, wanted):
    status, lines = await check(**settings)
    assert (status, lines[-1][: len(wanted)]) == (1, wanted)


@in_loop
async def test_the_doctor_knows_a_wrong_key(check, zai):
    zai.models = 401, {"error": {"code": "1000", "message": "bad key id.secret"}}
    status, lines = await check()
    assert status == 1
    assert lines[-1].startswith("✗ key 1     Z.ai did not accept")
    assert "id.secret" not in "".join(lines)


@in_loop
async def test_the_doctor_knows_a_wrong_address(check, zai):
    status, lines = await check(ZAI_BASE_URL=zai.url.replace("paas", "else"))
    assert (status, "ZAI_BASE_URL" in lines[-1]) == (1, True)


@in_loop
async def test_the_doctor_knows_a_coding_plan_key_on_the_general_address(check, zai):
    zai.status, zai.parts = zai_refuses(1113)
    status, lines = await check()
    assert (status, lines[-1][:6]) == (1, "✗ chat")
    assert "https://api.z.ai/api/coding/paas/v4" in lines[-1]


SECRET_KEY = "0123456789abcdef0123456789abcdef.abcdef"


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("PORT", "abc", "PORT=abc"),
        ("PORT", SECRET_KEY, "PORT"),
        ("PORT", "sk-something", "PORT"),
        ("ZAI_API_KEY", "ключ", "ZAI_API_KEY"),
        ("DATABASE_URL", "mysql://u:hunter2@h/d", "DATABASE_URL"),
        ("ZAI_BASE_URL", "http://u:hunter2@h", "ZAI_BASE_URL"),
        ("SPEND_LIMIT", "5/year", "SPEND_LIMIT=5/year"),
    ],
)
def test_a_malformed_setting_shows_neither_key_nor_password(name, text, shown):
    with pytest.raises(SettingsError) as raised:
        Settings.from_env({name: text})
    assert str(raised.value).startswith(f"{shown} cannot be used: it must be ")


@pytest.mark.parametrize(
    ("text", "value"),
    [('"7"', 7), ("'7'", 7), (' "7 " ', 7), ("7", 7), ('""', 9090)],
)
def test_quotes_around_a_setting_are_taken_off(text, value):
    assert Settings.from_env({"PORT": text}).port == value


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(("ZAI_KEY", "ZAI_API_KEY"), ("PROT", "PORT"), ("ZAI_URL", "ZAI_BASE_URL")),
        *(("CORS_ORIGIN", "CORS_ORIGINS"), ("PORT", None), ("HOSTNAME", None), ("PATH", None)),
        ("ZTOAPI_KEY", None),
    ],
)
def test_a_variable_that_looks_like_a_misspelt_setting_is_named(name, meant):
    found = [finding.words for finding in ztoapi.misspelt([name])]
    assert found == ([f"{name} is no setting: is {meant} meant?"] if meant else [])


class NamedSites:
    """Z.ai's four named addresses, at a fake that knows of each what it takes."""

    def __init__(self, zai):
        self.bases = {name: f"{zai.url}/{name}" for name in ztoapi.ZAI_BASES}
        self.lists = {"api"}  # those that take the key
        self.pays = set()  # those whose account has money for paid models
        self.free = set()  # those where free models answer
        self.zai, zai.list_models, zai.answer = zai, self.list_models, self.answer

    async def list_models(self, request):
        raise AssertionError(request.path)

    async def answer(self, request):
        name = request.path.split("/")[4]
        body = json.loads(self.zai.asked[-1][-1] or b"{}")
        if request.path.endswith("/models") and name in self.lists:
            return web.json_response({"data": [{"id": "glm-4.6"}]})
        if request.path.endswith("/models"):
            return web.json_response({"error": {"code": "1000", "message": "no"}}, status=401)
        takers = self.free if MODELS[body["model"]].free else self.pays
        if name in takers:
            return web.Response(body=DOCUMENT, content_type="application/json")
        return web.json_response({"error": {"code": "1113", "message": "no"}}, status=429)

    def asked_at(self):
        return [path.split("/")[4] for _, path, *_ in self.zai.asked]


@in_loop
@pytest.mark.parametrize(
    ("key", "takes", "words"),
    [
        pytest.param("@api", {"china"}, "set ZAI_API_KEY to KEY@china (", id="one other"),
        pytest.param("@plan", {"api", "china"}, "KEY@api (", id="several others"),
        pytest.param("@api", set(), "None of Z.ai's other addresses takes it", id="none"),
    ],
)
async def test_the_doctor_finds_the_address_of_a_refused_key(
    check, zai, monkeypatch, key, takes, words
):
    sites = NamedSites(zai)
    monkeypatch.setattr(ztoapi, "ZAI_BASES", sites.bases)
    sites.lists = takes
    status, lines = await check(sites.bases, ZAI_API_KEY=f"id.secret{key}")
    assert (status, lines[-1][:7], words in lines[-1]) == (1, "✗ key 1", True)
    assert sorted(sites.asked_at()) == sorted(ztoapi.ZAI_BASES)
    assert all(path.endswith("/models") for _, path, *_ in zai.asked)


@in_loop
async def test_a_key_with_an_address_of_its_own_never_leaves_it(check, zai):
    sites = NamedSites(zai)
    sites.lists = {"china"}
    status, lines = await check(sites.bases, ZAI_API_KEY=f"id.secret@{zai.url}/own")
    assert (status, sites.asked_at(), "another address" in lines[-1].lower()) == (1, ["own"], False)


@in_loop
@pytest.mark.parametrize(
    ("here", "free", "pays", "mark", "words"),
    [
        pytest.param("api", {"api"}, {"api"}, "✓", "paid models do", id="balance"),
        pytest.param("plan", set(), {"plan"}, "✓", "paid models do", id="plan"),
        pytest.param("api", {"api"}, {"plan"}, "!", "KEY@plan", id="plan's key, free works"),
        pytest.param("plan", {"api"}, {"api"}, "✗", "KEY@api", id="balance at the plan's"),
        pytest.param("api", {"api"}, set(), "!", "neither a plan nor a balance", id="empty"),
        pytest.param("china", {"china"}, {"china-plan"}, "!", "KEY@china-plan", id="china"),
    ],
)
async def test_the_doctor_tells_a_wrong_address_from_an_empty_account(
    check, zai, monkeypatch, here, free, pays, mark, words
):
    sites = NamedSites(zai)
    monkeypatch.setattr(ztoapi, "ZAI_BASES", sites.bases)
    sites.lists, sites.free, sites.pays = {here}, free, pays
    status, lines = await check(sites.bases, ZAI_API_KEY=f"id.secret@{here}")
    assert (status, lines[-1][:8], words in lines[-1]) == (int(mark == "✗"), f"{mark} paid 1", True)


@in_loop
async def test_the_doctor_asks_nothing_more_after_anything_but_yes(check, zai):
    zai.parts = [DOCUMENT]
    await check(probe="no")
    before = len(zai.asked)
    status, lines = await check(probe="yes")
    table = lines[lines.index("|---|---|") + 1 :]
    assert (status, before, len(zai.asked) - before, len(table)) == (
        0,
        1,
        11,
        12,
    )  # the fake does not know one path
    assert table[0].startswith("| tool_choice required | 200: calls no tool |")
    assert "id.secret" not in "".join(lines)


@in_loop
@pytest.mark.parametrize(
    ("url", "mark", "words"),
    [
        ("memory", "✓", "memory only"),
        ("sqlite:///{}/z.db", "✓", "z.db opens, and can be written"),
        ("sqlite:///{}/none/z.db", "✗", "the database cannot be used"),
    ],
)
async def test_the_doctor_opens_and_writes_the_database(check, zai, tmp_path, url, mark, words):
    status, lines = await check(DATABASE_URL=url.format(tmp_path))
    [line] = [line for line in lines if line[2:10] == "database"]
    assert (line[0], words in line, status) == (mark, True, int(mark == "✗"))


@in_loop
async def test_the_doctor_knows_a_port_in_use(check, client):
    with something_else(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}") as (taken, _):
        for port, good, words in (
            (taken, False, "✗ port"),
            (client.port, True, "✓ port      a ztoapi serves"),
        ):
            status, lines = await check(PORT=str(port))
            assert (status, lines[1].startswith(words)) == (0 if good else 1, True)
            assert lines[-1].startswith("✓ chat")


# ======== The OpenAI SDK ========


def random_events(seed):
    """The events of an answer, as the repairs let them through: any, in any order that they come in."""
    chance = random.Random(seed)
    words = ["", "a", "好😀", " \n", '{"x": 1}', "<think>", "\u2028"]
    thoughts = [Thought(chance.choice(words)) for _ in range(chance.randrange(4))]
    texts = [Text(chance.choice(words)) for _ in range(chance.randrange(4))]
    calls = []
    for index in range(chance.randrange(4)):
        calls.append(
            [ToolCall(index, f"c{index}", f"f{index}", chance.choice(["", "{", '{"a":1}']))]
        )
        calls[-1] += [ToolCall(index, "", "", ':"好"') for _ in range(chance.randrange(3))]
    events = [event for event in thoughts + texts if event.text]
    while any(calls):  # the pieces of two calls may alternate
        begun = [call for call in calls if not call[0].id]
        events.append(
            chance.choice([*begun, *[call for call in calls if call not in begun][:1]]).pop(0)
        )
        calls = [call for call in calls if call]
    if chance.random() < 0.3:
        chance.shuffle(texts)
        events += [event for event in texts if event.text]
    if chance.random() < 0.3:
        events.append(Citations((FOUND,)))
    if chance.random() < 0.7:
        events.append(Usage(*(chance.randrange(9) for _ in range(5))))
    return [*events, Finish(chance.choice(["stop", "length", "tool_calls", "content_filter"]))]


RANDOM = pytest.mark.parametrize("seed", range(60))


@RANDOM
def test_what_the_sdk_makes_of_a_streamed_chat_is_the_whole_one(seed):
    streaming = pytest.importorskip("openai.lib.streaming.chat._completions")
    types = pytest.importorskip("openai.types.chat")
    events = random_events(seed)
    state = streaming.ChatCompletionStreamState()
    for frame in frames(events, chat_reply(include_usage=True))[:-1]:
        state.handle_chunk(types.ChatCompletionChunk.model_validate(frame))
    whole = chat_document(events)
    made = state.current_completion_snapshot.model_dump(mode="json", exclude_unset=True)
    assert made["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert spoken(made) == spoken(whole)
    if Usage in map(type, events):
        assert made["usage"] == whole["usage"]


def spoken(document):
    """What a chat's message says, without what the SDK adds."""
    message = document["choices"][0]["message"]
    calls = message.get("tool_calls") or []
    return {
        "content": message.get("content") or "",
        "reasoning": message.get("reasoning_content") or "",
        "annotations": message.get("annotations") or [],
        "calls": [
            (call["id"], call["function"]["name"], call["function"]["arguments"]) for call in calls
        ],
    }


@RANDOM
def test_what_the_sdk_makes_of_a_streamed_response_is_the_whole_one(seed):
    openai = pytest.importorskip("openai")
    streaming = pytest.importorskip("openai.lib.streaming.responses._responses")
    types = pytest.importorskip("openai.types.responses")
    pydantic = pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter(types.ResponseStreamEvent)
    events, reply = random_events(seed), response_reply()
    state = streaming.ResponseStreamState(input_tools=openai.omit, text_format=openai.omit)
    made = None
    for frame in [*reply.frames_of(events), *reply.close()]:
        for event in state.handle_event(adapter.validate_python(frame)):
            if event.type in ("response.completed", "response.incomplete"):
                made = event.response.model_dump(mode="json")
    whole = response_reply().fold(events)
    assert [item["type"] for item in made["output"]] == [item["type"] for item in whole["output"]]
    assert without_parsed(made["output"], whole["output"]) == whole["output"]
    assert (made["status"], made["id"]) == (whole["status"], whole["id"])


@pytest.mark.parametrize(
    ("fields", "events"),
    [
        pytest.param(
            {"tools": [TOOL_SEARCH, {"type": "custom", "name": "apply_patch"}]},
            [
                Thought("hm"),
                Text("x"),
                ToolCall(0, "c1", "tool_search", '{"query":'),
                ToolCall(1, "c2", "apply_patch", json_text({"patch": PATCH})),
                ToolCall(0, "", "", '"weather"}'),
                Usage(5, 2, 7),
                Finish("tool_calls"),
            ],
            id="calls",
        ),
        pytest.param(
            {"tools": [NAMESPACE], "max_tool_calls": 7, "tool_choice": allowed("auto", NOW, DRAW)},
            [ToolCall(0, "c1", "mcp__w__get", "{}"), Finish("length")],
            id="a call in a namespace",
        ),
        pytest.param(
            {"tools": [HOSTED_SEARCH], "tool_choice": HOSTED_SEARCH},
            [Text("x"), Citations((FOUND,)), Finish("stop")],
            id="a search",
        ),
        pytest.param(
            {"reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"]},
            [Thought("hm"), Finish("content_filter")],
            id="a summary of reasoning",
        ),
        pytest.param(
            {"input": [*TO_SUM_UP[:1], summary_of("Do it."), TRIGGER]},
            [Thought("hm"), Text("Do"), Text(" it."), Usage(5, 2, 7), Finish("stop")],
            id="a compaction",
        ),
        pytest.param({"input": TO_SUM_UP}, [Text("Do")], id="a compaction that breaks off"),
        pytest.param({}, [], id="nothing"),
    ],
)
def test_every_event_of_a_response_has_one_of_the_sdks_types(fields, events):
    types = pytest.importorskip("openai.types.responses")
    pydantic = pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter(types.ResponseStreamEvent)
    reply = response_reply(**fields)
    frames = [*json.loads(f"[{sign_of_life(reply)}]"), *reply.frames_of(events)]
    if events and isinstance(events[-1], Finish):
        frames += reply.close()
    else:
        frames += reply.fail(zai_error(500, b"x"))
    for frame in frames:
        event = adapter.validate_python(frame)
        assert type(event).model_fields["type"].annotation.__args__ == (frame["type"],)
        for item in items_in(frame):
            read = pydantic.TypeAdapter(types.ResponseOutputItem).validate_python(item)
            assert type(read).model_fields["type"].annotation.__args__ == (item["type"],)
    for tool in frames[-1]["response"]["tools"]:
        pydantic.TypeAdapter(types.Tool).validate_python(tool)


def sign_of_life(reply):
    """The frames of a sign of life, as JSON with commas between them."""
    lines = reply.sign_of_life(HEAD).decode().splitlines()
    return ",".join(line.removeprefix("data: ") for line in lines if line.startswith("data: "))


def items_in(frame):
    return [frame["item"]] if "item" in frame else frame.get("response", {}).get("output", [])


@in_loop
async def test_the_sdk_has_a_conversation_summed_up(sdk, zai):
    summed_up = await sdk.responses.compact(model="glm-4.6", input="你好")
    (item,) = summed_up.output
    assert (summed_up.object, item.type) == ("response.compaction", "compaction")
    assert summed_up.usage.total_tokens == 9
    sent = [item.model_dump(), {"role": "user", "content": "and?"}]
    await sdk.responses.create(model="glm-4.6", input=sent)
    assert zai.bodies[1]["messages"][0]["content"].endswith("你好😀")


@in_loop
async def test_the_sdk_counts_tokens(sdk):
    counted = await sdk.responses.input_tokens.count(model="glm-4.6", input="a" * 100)
    assert (counted.object, counted.input_tokens) == ("response.input_tokens", 28)


def without_parsed(theirs, ours):
    """The SDK's document with only the fields that ours has too, at every depth."""
    if isinstance(ours, dict):
        return {name: without_parsed(theirs.get(name), ours[name]) for name in ours}
    if isinstance(ours, list) and isinstance(theirs, list) and len(theirs) == len(ours):
        return [without_parsed(*pair) for pair in zip(theirs, ours, strict=True)]
    return theirs


def sound_events(seed):
    """Random events in which each call has a JSON object as its arguments."""
    sound, given = [], {}
    for event in random_events(seed):
        if isinstance(event, ToolCall):
            pieces = given.setdefault(event.index, iter(["{", '"a":"好"']))
            sound.append(replace(event, arguments=next(pieces, " ")))
            continue
        if isinstance(event, Finish):
            sound += [ToolCall(index, "", "", "}") for index in given]
        sound.append(event)
    return sound


def unknown_to(model):
    """The fields of a value of the SDK's that its types do not have."""
    found = dict(model.model_extra or {})
    for name in model.model_fields_set:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else [value]:
            if hasattr(item, "model_extra"):
                found |= unknown_to(item)
    return found


@RANDOM
@pytest.mark.parametrize("display", ["summarized", "omitted"])
def test_what_the_sdk_makes_of_a_streamed_message_is_the_whole_one(seed, display):
    streaming = pytest.importorskip("anthropic.lib.streaming._messages")
    types = pytest.importorskip("anthropic.types")
    pydantic = pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter(types.RawMessageStreamEvent)
    asked = {"tools": [ANTHROPIC_SEARCH], "thinking": {"type": "adaptive", "display": display}}
    events = sound_events(seed)
    made, held = None, {}
    for frame in message_frames(events, **asked):
        event = adapter.validate_python(json.loads(json.dumps(frame)), strict=True)
        assert unknown_to(event) == {}
        made = streaming.accumulate_event(event=event, current_snapshot=made, json_bufs=held)
    whole = message_document(events, **asked)
    assert unknown_to(types.Message.model_validate(whole, strict=True)) == {}
    assert made.to_dict() == whole


@RANDOM
def test_a_streamed_completion_adds_up_to_the_whole_one(seed):
    events = random_events(seed)
    reply = begun(ztoapi.CompletionReply(["Hm. "], include_usage=True))
    streamed = decoded(reply.frames_of(events))
    (whole,) = reply.fold(events)["choices"]
    assert "".join(frame["choices"][0]["text"] for frame in streamed) == whole["text"]
    assert streamed[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


def random_deltas(chance):
    """Chunks of Z.ai's, with what models say wrong."""
    words = [
        "",
        "\n",
        "Hi",
        "<",
        "好",
        "<think>",
        "</think>",
        "```",
        "`",
        '{"a":1}',
        "STOP",
        "\n\nU",
    ]
    words += [*leak_pieces, "```json\n", "\n```", "\ud83d", "\ude00"]
    arguments = [
        "",
        "{}",
        '{"path":',
        '"a"',
        "}",
        ",",
        '{"path":"a"}',
        '{"n":"3',
        '"}',
        "null",
        "```\n",
    ]
    arguments += [r'"\ud83d', r'\ude00"']
    deltas = []
    for _ in range(chance.randrange(9)):
        kind = chance.randrange(4)
        if kind == 0:
            deltas.append({"reasoning_content": chance.choice(words)})
        elif kind == 1:
            index = chance.choice([0, 1, -1, None])
            name = chance.choice(["find", "find", None, "", "find\n", f"find{pair('path', 'a')}"])
            text = chance.choice([*arguments, pair("path", "a")])
            call_id = chance.choice(["a", "b", None])
            deltas.append(piece(index=index, id=call_id, function=named(name, text)))
        else:
            deltas.append({"content": chance.choice(words)})
    return deltas


leak_pieces = [
    "<tool_call>",
    "find",
    "<arg_key>path</arg_key>",
    "<arg_value>a",
    "</arg_value>",
    "</tool_call>",
    leak("find", path="a"),
    json_leak("find", path="a"),
]


def random_answer(seed):
    """An answer of Z.ai's, and what the request was that needs its repairs."""
    chance = random.Random(seed)
    reason = chance.choice(["stop", "tool_calls", "length"])
    data = stream_of(*random_deltas(chance), finish(reason, **SPENT), ensure_ascii=True)
    asked = {
        "tools": [FIND],
        "wants_json": seed % 3 == 0,
        "forced": "find" if seed % 4 == 0 else "",
        "stop": ("STOP", "\n\nUser:") if seed % 2 else (),
    }
    return data, asked


@RANDOM
@pytest.mark.parametrize("model", ["glm-4.6", "glm-4.5v"])
def test_repairs_give_the_same_wherever_a_stream_is_cut(seed, model):
    data, asked = random_answer(seed)
    wanted = chat_document(read_all([data], model=model, **asked))
    chance = random.Random(seed)
    for _ in range(5):
        at = sorted(chance.randrange(len(data)) for _ in range(3))
        parts = [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]
        assert chat_document(read_all(parts, model=model, **asked)) == wanted
    events = read_all([data], model=model, **asked)
    assert [type(event) for event in events].count(Finish) == 1
    assert events[-1].reason in ("stop", "tool_calls", "length")
    json_text(wanted).encode()  # raises for half a character


@pytest.mark.parametrize("seed", range(200))
def test_what_the_sdk_makes_of_a_mended_stream_is_the_whole_answer(seed):
    streaming = pytest.importorskip("openai.lib.streaming.chat._completions")
    types = pytest.importorskip("openai.types.chat")
    data, asked = random_answer(seed)
    events = read_all([data], **asked)
    state = streaming.ChatCompletionStreamState()
    for frame in frames(events, chat_reply(include_usage=True))[:-1]:
        state.handle_chunk(types.ChatCompletionChunk.model_validate(frame))
    whole = chat_document(events)
    made = state.current_completion_snapshot.model_dump(mode="json", exclude_unset=True)
    assert made["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert spoken(made) == spoken(whole)


@in_loop
async def test_the_sdk_reads_a_whole_answer(sdk):
    answer = await sdk.chat.completions.create(**HELLO)
    assert answer.choices[0].message.content == "你好😀"
    assert answer.choices[0].message.reasoning_content == "想"
    assert answer.usage.total_tokens == 9


@in_loop
async def test_the_sdk_reads_a_stream(sdk):
    stream = await sdk.chat.completions.create(
        **HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "你好😀"
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 9)


@in_loop
async def test_the_sdk_reads_a_tool_call(sdk, zai):
    zai.parts = [RECORDED_CALL]
    tools = [
        {
            "type": "function",
            "function": {"name": "bash", "parameters": {"type": "object", "properties": {}}},
        }
    ]
    async with sdk.chat.completions.stream(**HELLO, tools=tools) as stream:
        answer = await stream.get_final_completion()
    assert answer.choices[0].message.tool_calls[0].function.arguments == '{"cmd":"ls"}'
    assert answer.choices[0].finish_reason == "tool_calls"


@in_loop
async def test_the_sdk_works_without_async_too(client):
    openai = pytest.importorskip("openai")

    def talk():
        with openai.OpenAI(
            base_url=str(client.make_url("/v1")), api_key="sk-your-key", max_retries=0
        ) as sdk:
            whole = sdk.chat.completions.create(**HELLO)
            streamed = [
                chunk.choices[0].delta.content or ""
                for chunk in sdk.chat.completions.create(**HELLO, stream=True)
            ]
        return whole.choices[0].message.content, "".join(streamed)

    assert await asyncio.to_thread(talk) == ("你好😀", "你好😀")


@in_loop
async def test_the_sdk_parses_an_answer_into_a_model(sdk, zai):
    point, _ = sdk_models()
    zai.parts = [document_of({"role": "assistant", "content": '{"x": 1.5, "label": "点"}'})]
    answer = await sdk.chat.completions.parse(**HELLO, response_format=point)
    assert answer.choices[0].message.parsed == point(x=1.5, label="点")
    assert zai.bodies[0]["response_format"] == {"type": "json_object"}
    assert '"label"' in zai.bodies[0]["messages"][0]["content"]


LOOK = {
    "index": 0,
    "id": "c1",
    "type": "function",
    "function": {"name": "Look", "arguments": '{"at":"点"}'},
}


@cache
def sdk_models():
    """A format of answers and a tool; the SDK makes classes for each, which takes it long."""
    openai, pydantic = pytest.importorskip("openai"), pytest.importorskip("pydantic")
    look = pydantic.create_model("Look", at=str, range=(int | None, None))
    return pydantic.create_model("Point", x=float, label=str), [openai.pydantic_function_tool(look)]


async def parsed_chat(sdk, stream, point, tools):
    asked = {**HELLO, "response_format": point, "tools": tools}
    if stream:
        async with sdk.chat.completions.stream(**asked) as events:
            answer = await events.get_final_completion()
    else:
        answer = await sdk.chat.completions.parse(**asked)
    message = answer.choices[0].message
    return [message.parsed, *(call.function.parsed_arguments for call in message.tool_calls or ())]


async def parsed_response(sdk, stream, point, tools):
    asked = {"model": "glm-4.6", "input": "你好", "text_format": point, "tools": tools}
    if stream:
        async with sdk.responses.stream(**asked) as events:
            answer = await events.get_final_response()
    else:
        answer = await sdk.responses.parse(**asked)
    return [
        answer.output_parsed,
        *(item.parsed_arguments for item in answer.output if item.type == "function_call"),
    ]


@in_loop
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("parsed", [parsed_chat, parsed_response])
@pytest.mark.parametrize(
    ("said", "reason", "wanted"),
    [
        ({"content": '\n{"x": 1.5, "label": "点"}'}, "stop", {"x": 1.5, "label": "点"}),
        (
            {"content": "\nLet me look.\n", "tool_calls": [LOOK]},
            "tool_calls",
            {"at": "点", "range": None},
        ),
    ],
    ids=["answer", "call"],
)
async def test_the_sdk_parses_an_answer_or_a_call_into_a_model(
    sdk, zai, said, reason, wanted, parsed, stream
):
    point, tools = sdk_models()
    finish = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": reason}
    zai.parts = [stream_of(said, {"choices": [finish]}) if stream else document_of(said, reason)]
    assert [model.model_dump() for model in await parsed(sdk, stream, point, tools) if model] == [
        wanted
    ]


@in_loop
async def test_the_sdk_sends_an_image(sdk, zai):
    parts = [
        {"type": "text", "text": "?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}},
    ]
    await sdk.chat.completions.create(
        model="glm-4.6v", messages=[{"role": "user", "content": parts}]
    )
    assert zai.bodies[0]["messages"][0]["content"][1] == {
        "type": "image_url",
        "image_url": {"url": "QUJD"},
    }


@in_loop
async def test_the_sdk_reads_several_choices(sdk):
    answer = await sdk.chat.completions.create(**HELLO, n=2)
    assert [choice.message.content for choice in answer.choices] == ["你好😀"] * 2


@in_loop
async def test_the_sdk_streams_several_choices_whichever_speaks_first(sdk, zai):
    zai.answers = [[FIRST, 0.1, RECORDED], [RECORDED], [RECORDED]]
    async with sdk.chat.completions.stream(**HELLO, n=3) as stream:
        answer = await stream.get_final_completion()
    assert [choice.message.content for choice in answer.choices] == ["你好😀"] * 3


@in_loop
async def test_the_sdk_raises_what_it_should(sdk, zai):
    openai = pytest.importorskip("openai")
    zai.status, zai.parts = 429, [b'{"error":{"code":"1113","message":"no money"}}']
    with pytest.raises(openai.APIStatusError, match="1113: no money") as raised:
        await sdk.chat.completions.create(**HELLO)
    assert (raised.value.status_code, raised.value.code) == (402, "insufficient_quota")


@in_loop
async def test_the_sdk_raises_in_mid_stream(sdk, zai):
    openai = pytest.importorskip("openai")
    zai.parts = [FIRST, RESET]
    with pytest.raises(openai.APIError, match="broke off"):
        async for _ in await sdk.chat.completions.create(**HELLO, stream=True):
            pass


@in_loop
async def test_the_sdk_lists_models(sdk):
    assert {model.id async for model in sdk.models.list()} == set(MODELS)
    assert (await sdk.models.retrieve("GLM-4.6")).id == "glm-4.6"


# ======== The Anthropic SDK ========


@pytest_asyncio.fixture
async def anthropic_sdk(client):
    anthropic = pytest.importorskip("anthropic")
    url = str(client.make_url("/")).rstrip("/")
    async with anthropic.AsyncAnthropic(base_url=url, api_key="sk-your-key", max_retries=0) as sdk:
        yield sdk


ASKED_OF_CLAUDE = {"model": "glm-4.6", "max_tokens": 9000, "messages": [turn("你好")]}


@in_loop
async def test_the_anthropic_sdk_reads_a_whole_message(anthropic_sdk):
    message = await anthropic_sdk.messages.create(**ASKED_OF_CLAUDE, thinking={"type": "adaptive"})
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert (message.content[1].text, message.usage.output_tokens) == ("你好😀", 3)


@in_loop
async def test_the_anthropic_sdk_reads_a_stream(anthropic_sdk):
    async with anthropic_sdk.messages.stream(**ASKED_OF_CLAUDE) as stream:
        words = [text async for text in stream.text_stream]
        message = await stream.get_final_message()
    assert ("".join(words), message.stop_reason) == ("你好😀", "end_turn")


@in_loop
async def test_the_anthropic_sdk_reads_a_call(anthropic_sdk, zai):
    zai.parts = [RECORDED_CALL]
    tools = [{"name": "bash", "input_schema": {"type": "object"}}]
    async with anthropic_sdk.messages.stream(**ASKED_OF_CLAUDE, tools=tools) as stream:
        message = await stream.get_final_message()
    assert (message.content[0].name, message.content[0].input) == ("bash", {"cmd": "ls"})
    assert message.stop_reason == "tool_use"


@in_loop
async def test_the_anthropic_sdk_lists_models(anthropic_sdk):
    types = pytest.importorskip("anthropic.types")
    models = [model async for model in anthropic_sdk.models.list()]
    assert len(models) >= len(MODELS)
    types.ModelInfo.model_validate(models[0].to_dict(), strict=False)
    assert (await anthropic_sdk.models.retrieve("glm-4.6")).max_tokens == 131072


@in_loop
async def test_the_anthropic_sdk_counts_tokens_and_knows_errors(anthropic_sdk, zai):
    anthropic = pytest.importorskip("anthropic")
    counted = await anthropic_sdk.messages.count_tokens(model="glm-4.6", messages=[turn("hi")])
    assert counted.input_tokens == 1
    zai.status, zai.parts = zai_refuses(1305)
    with pytest.raises(anthropic.InternalServerError) as raised:
        await anthropic_sdk.messages.create(**ASKED_OF_CLAUDE, extra_body={"fallbacks": []})
    assert raised.value.body["error"]["type"] == "overloaded_error"
