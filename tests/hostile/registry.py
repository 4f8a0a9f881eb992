"""All hostile files: functions that make one in an empty folder, and the message that refuses it."""

import numpy as np

HOSTILE = {}
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
PREFIX = np.ones((10, 384), np.float32)


def hostile(message):
    """Register a function that makes a hostile file in an empty folder and returns what reads it."""

    def register(build):
        HOSTILE[build.__name__] = (build, message)
        return build

    return register
