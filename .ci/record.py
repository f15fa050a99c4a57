"""Prints a conversation of a debug log as a test case, its words replaced: so a new quirk can be sent to others.

usage: python .ci/record.py LOG > case.json      (the log of a ztoapi that ran with DEBUG_MODE=true)

Each request of the log becomes an object: what was asked, the parts that Z.ai sent, what the client
got. Words of people become other letters, the same ones for the same word; the format, markup,
names of tools and models, numbers and lengths stay. Look through it before you send it.
"""

from __future__ import annotations

import json
import random
import re
import string
import sys
from pathlib import Path
from typing import Any

ENTRY = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \w+ ", re.MULTILINE)
LINE = re.compile(r"(\w{8}) (asked|sent|received|answered) ?(.*)", re.DOTALL)
WORD = re.compile(r"[^\W\d_]+")
ESCAPED_WORD = re.compile(r"\\u[0-9a-fA-F]{4}|\\.|[^\W\d_]+")  # in JSON that is not decoded


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What is markup, format or protocol inside a text stays as it is.
KEPT_WORDS = words("""
    think tool call arg key value begin end of box begin_of_box json http https data error
    null true false
""")
# The fields whose texts people or models wrote.
TEXT_FIELDS = words("""
    content text reasoning_content thinking reasoning arguments input output partial_json
    system instructions description title prompt query link url message delta data
""")
NAMES = frozenset(
    [
        "type",
        "name",
        "id",
        "role",
        "model",
        "tool_use_id",
        "tool_call_id",
        "call_id",
        "finish_reason",
        "object",
    ]
)
PRIVATE = frozenset(["user_id", "user", "safety_identifier", "prompt_cache_key", "session_id"])


class Disguise:
    """Replaces words by made-up ones of the same length; differs from run to run."""

    def __init__(self) -> None:
        self.chance = random.SystemRandom()
        self.words: dict[str, str] = {}  # lower case

    def text(self, text: str) -> str:
        return WORD.sub(self.word, text)

    def word(self, found: re.Match[str]) -> str:
        word = found[0]
        if word.startswith("\\") or word.lower() in KEPT_WORDS:
            return word
        known = self.words.get(word.lower())
        if known is None:
            letters = string.ascii_lowercase if word.isascii() else "天地玄黄宇宙洪荒日月盈昃"
            known = "".join(self.chance.choice(letters) for _ in word)
            self.words[word.lower()] = known
        return "".join(map(same_case, known, word))

    def value(self, value: Any, *, is_text: bool = False) -> Any:
        """A JSON value with the texts in it replaced; `is_text`: it stands in a field of TEXT_FIELDS."""
        if isinstance(value, str):
            return self.text(value) if is_text else value
        if isinstance(value, list):
            return [self.value(item, is_text=is_text) for item in value]
        if isinstance(value, dict):
            return {name: self.field(name, item, is_text=is_text) for name, item in value.items()}
        return value

    def field(self, name: str, value: Any, *, is_text: bool) -> Any:
        if name in PRIVATE:
            return "0" * len(str(value))
        if name in NAMES and isinstance(value, str):
            return value
        return self.value(value, is_text=is_text or name in TEXT_FIELDS)

    def stream(self, data: str) -> str:
        """Events as they came, cut or torn: whole ones are read, others replaced as text."""
        return "".join(map(self.line, data.splitlines(keepends=True)))

    def line(self, line: str) -> str:
        head, body, end = re.fullmatch(r"(\s*(?:data:)?\s*)(.*?)(\s*)", line, re.DOTALL).groups()
        try:
            document = json.loads(body)
        except ValueError:
            return head + self.strings(body) + end
        return head + compact(self.value(document)) + end

    def strings(self, text: str) -> str:
        """What is no JSON: the texts of the fields that are whole in it."""
        fields = "|".join(sorted(TEXT_FIELDS))
        pattern = rf'("(?:{fields})"\s*:\s*")((?:[^"\\]|\\.)*)'
        return re.sub(pattern, lambda found: found[1] + ESCAPED_WORD.sub(self.word, found[2]), text)


def compact(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def same_case(letter: str, like: str) -> str:
    return letter.upper() if like.isupper() else letter


def requests_in(log: str) -> list[dict[str, Any]]:
    """The requests of a log: path and body, the parts of Z.ai's answers, and ours."""
    found: dict[str, dict[str, Any]] = {}
    for entry in ENTRY.split(log)[1:]:
        line = LINE.match(entry.rstrip("\n"))
        if line is None:
            continue
        request_id, what, rest = line.groups()
        case = found.setdefault(
            request_id, {"path": "", "asked": None, "received": [], "answered": []}
        )
        if what == "asked":
            case["path"], _, body = rest.partition(" ")
            case["asked"] = json.loads(body)
        elif what == "received" and rest.startswith('"'):
            case["received"].append(json.loads(rest))
        elif what == "answered":
            case["answered"].append(rest)
    return [case for case in found.values() if case["asked"] and case["received"]]


def disguised(case: dict[str, Any]) -> dict[str, Any]:
    disguise = Disguise()
    return {
        "path": case["path"],
        "asked": disguise.value(case["asked"]),
        "received": [disguise.stream(part) for part in case["received"]],
        "answered": [disguise.stream(part) for part in case["answered"]],
    }


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    cases = [
        disguised(case) for case in requests_in(Path(sys.argv[1]).read_text("utf-8", "replace"))
    ]
    if not cases:
        sys.exit("There is no answered request in it: run ztoapi with DEBUG_MODE=true.")
    json.dump(cases, sys.stdout, ensure_ascii=False, indent=1)


if __name__ == "__main__":
    main()
