"""Benchmarks: `dalikd bench NAME`, each also `python -m dalikd.tools.bench NAME`.

A benchmark is a function of its options that measures candidates in turn (`record.alternate`) and fills a
`record.Record`, which becomes JSON, a table and a plot. commands.py lists them, and what `all` runs of them.
"""

import importlib
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run `dalikd bench NAME …`."""
    importlib.import_module("dalikd.tools.bench.commands").main(argv)
