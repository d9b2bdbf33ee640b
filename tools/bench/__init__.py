"""Benchmarks: `dalikd bench NAME`, each also `python -m dalikd.tools.bench NAME`. commands.py lists them.

A benchmark is a function of its options that measures candidates in turn (`record.alternate`) and fills a
`record.Record`, which becomes JSON, a table and a plot.
"""


def main(argv: list[str] | None = None) -> None:
    """Run `dalikd bench NAME …`."""
    from dalikd.tools.bench import commands

    commands.main(argv)
