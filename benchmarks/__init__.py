"""Measurements, not tests: each prints a table of ratios against a baseline taken in the same run.

python -m benchmarks.all             every benchmark
python -m benchmarks.cold_run        the default study by stage, from an empty store
python -m benchmarks.cached_run      a fully cached run against plain Prefect caching of as many no-op tasks
python -m benchmarks.training        tokens per second of training stages against a bare PyTorch loop
"""
