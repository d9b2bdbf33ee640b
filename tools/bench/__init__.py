"""Benchmarks: `dalikd bench NAME`, each also `python -m dalikd.tools.bench.NAME`.

A benchmark is a module of this folder with a `main(argv)` and a `plan(root)`, see `dispatch.Planned`. It fills a
`record.Record`, prints `record.markdown` of it, and lets `record.write` write JSON, the same Markdown and a plot. What
all of them share:

    record.py     Record, summary, alternate, markdown, write
    machine.py    what a number depends on: versions, hardware, load; CPU time of the processes; waiting for quiet
    images.py     what the pictures are; page cache control; copies of a small set that exceed the page cache
    plots.py      the one plot
    options.py    options, lists of words among them, and checks
    tables.py     README's tables out of docs/benchmarks/*.json
"""

from dalikd.tools.bench.dispatch import main

__all__ = ["main"]
