"""Benchmarks. Each runs as `python -m dalikd.tools.bench.NAME` and prints what the documents report."""
