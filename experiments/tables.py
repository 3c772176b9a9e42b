"""Stub."""

import dataclasses


@dataclasses.dataclass
class Tables:
    """Stub."""


def main(o):
    pass
