"""A simulation of workers, collections and an unreliable store, in which every accident follows from a seed.

The real code runs: `tasks.worker.execute` with its lease, heartbeat, checkpoints and scratch folders, `Store.publish`, and
collection. Simulated are only what they stand on: the machines' clocks and threads (`scheduler`), the store's server and
the network before it (`server`), the processes and whoever starts them again (`scenario`). `ledger` watches every change
of the store and every step of every body, and writes down whatever must never happen; `mutations` breaks the protocol in
known ways, each of which the ledger has to notice.

    python -m tests.simulation --schedules 10000 --first 0 --processes 2       many schedules
    python -m tests.simulation --seed 4711 --trace                             one of them, with everything that happened
"""
