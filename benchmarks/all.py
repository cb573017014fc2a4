"""Every benchmark, one after the other."""

from __future__ import annotations

from benchmarks import cached_run, cold_run, memory, storage, store, training

if __name__ == "__main__":
    for module in (training, cached_run, cold_run, store, memory, storage):
        module.main()
