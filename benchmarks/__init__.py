"""Benchmarks: what is measured and how is in README.md; `python -m benchmarks.run` regenerates every result."""
