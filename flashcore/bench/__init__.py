"""Benchmarks that ship with the package: named problems, peers, timing, reports."""
