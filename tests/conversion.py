"""Conversions within the tests' own process."""

from jaxprefix.config import ConvertConfig
from jaxprefix.conversion import convert


def converted(source, target, base=None):
    convert(ConvertConfig(source, target, base and str(base)))
    return target
