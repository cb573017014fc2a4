"""Measurements, not tests: each prints a table of ratios against a baseline taken in the same run.

python -m benchmarks.all             every benchmark
python -m benchmarks.cold_run        the default study by stage, from an empty store
python -m benchmarks.cached_run      a fully cached run against plain Prefect caching of as many no-op tasks
python -m benchmarks.training        tokens per second of training stages against a bare PyTorch loop
python -m benchmarks.store           the store's targets: put and get against raw copies, plans, collection
python -m benchmarks.plan            planning 1,000 cached stages, on a folder and on S3
python -m benchmarks.collect         marking 1,000,000 objects
python -m benchmarks.memory          most memory that one large file takes
python -m benchmarks.storage         bytes stored for what was put, by what is shared
"""
