"""Conversions within the tests' own process."""

from jaxprefix.config import ConvertConfig
from jaxprefix.conversion import convert


def converted(source, target, base=None, newest=False):
    convert(ConvertConfig(source, target, base and str(base), newest=newest))
    return target
