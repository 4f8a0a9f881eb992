"""What hostile files are made of; the functions that make one say which message refuses it."""

import numpy as np

DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
PREFIX = np.ones((10, 384), np.float32)


def hostile(message):
    """Mark a function that makes a hostile file in an empty folder and returns what reads it."""

    def mark(build):
        build.refused_with = message
        return build

    return mark


def builds(*modules):
    """Return the marked functions of modules."""
    return [build for module in modules for build in vars(module).values() if hasattr(build, "refused_with")]
