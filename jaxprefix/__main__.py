"""python -m jaxprefix."""

from jaxprefix.cli import entry_point

entry_point()
