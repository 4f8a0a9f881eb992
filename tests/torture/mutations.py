"""Broken inputs, made from good ones."""

import copy
import json
import math
import random
import struct
from typing import Any

NUMBERS = [0, -1, 1, 2**31, 2**32 - 1, 2**63, -(2**63), 2**64 - 1, 10**400, 1e308, 0.5, math.nan, math.inf, 1e-320]
VALUES = [*NUMBERS, True, None, "", "x", "\ud83d", "\0", [], {}, [[]], {"a": {}}, "１", "1e9", "../../etc/passwd"]


def broken_bytes(good: bytes, generator: random.Random) -> bytes:
    """Flip bits, cut, repeat, splice in what is random or means something to parsers."""
    content = bytearray(good)
    for _ in range(generator.choice((1, 1, 1, 2, 5))):
        place = generator.randrange(len(content) + 1)
        end = min(len(content), place + generator.choice((1, 2, 8, 64)))
        match generator.randrange(6):
            case 0 if content:
                content[place % len(content)] ^= 1 << generator.randrange(8)
            case 1:
                del content[place:]
            case 2:
                del content[place:end]
            case 3:
                content[place:end] = generator.randbytes(end - place)
            case 4:
                content[place:place] = content[place:end] * generator.choice((1, 3, 50))
            case _:
                number = generator.choice((0, 1, -1, 2**31 - 1, 2**40, 2**62))
                marks = (b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\xed\xa0\xbd", b"[" * 30_000, b'{"a":' * 9)
                content[place:end] = generator.choice((struct.pack("<q", number), *marks, "👨‍👩‍👧".encode()))
    return bytes(content)


def broken_json(good: Any, generator: random.Random) -> bytes:
    """Change an object's values, names and structure, and sometimes its text."""
    value = json.loads(json.dumps(good))
    for _ in range(generator.choice((1, 1, 2, 4))):
        holder = value
        while nested := [inner for inner in holder.values() if isinstance(inner, dict) and inner]:
            if generator.random() < 0.5:
                break
            holder = generator.choice(nested)
        key = generator.choice(list(holder) or ["a"])
        match generator.randrange(5):
            case 0:
                holder.pop(key, None)
            case 1:
                holder[generator.choice(("", key.upper(), "auto_map", "rope_scaling"))] = copy.deepcopy(
                    generator.choice(VALUES)
                )
            case _:
                holder[key] = copy.deepcopy(generator.choice(VALUES))
    text = json.dumps(value, ensure_ascii=generator.random() < 0.9)
    match generator.randrange(12):
        case 0:
            text = text.replace("{", '{"hidden_size": 8, "text": "b", ', 1)  # a key twice
        case 1:
            text = text.replace("1", "[" * 20_000 + "]" * 20_000, 1)
        case 2:
            return broken_bytes(text.encode("utf-8", "surrogatepass"), generator)
    return text.encode("utf-8", "surrogatepass")
