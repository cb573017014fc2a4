"""A writer that works while a collection does: `python -m tests.busy_writer STORE SECONDS`, in a process of its own.

It publishes outputs that share blobs with each other and with what it gave up a while ago, keeps the newest few by runs,
and reads what it keeps again and again. It prints what it did; a blob that is missing is an error.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from artifacts.record import payload_key
from artifacts.store import Store, new_record

CONTENTS = 12
KEPT = 4


def main() -> None:
    """Publish, read, give up, until the time is over."""
    store, seconds = Store.open(sys.argv[1]), float(sys.argv[2])
    started, number, kept = time.monotonic(), 0, []
    while time.monotonic() - started < seconds:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "out")
            out.mkdir()
            (out / "a").write_text(f"content {number // 3 % CONTENTS}")
            (out / "b").write_text(f"content {number // 3 % CONTENTS + 1}")
            payload = {"algorithm": 1, "stage": "busy", "code": "c", "config": {"n": number}, "inputs": {}}
            key = payload_key(payload)
            record = store.publish(
                out,
                lambda tree, key=key, payload=payload: new_record(
                    stage="busy", key=key, payload=payload, output=tree.digest, size=tree.size
                ),
            )
            node = {"stage": "busy", "key": key, "output": record.output}
            run = store.put_run({"experiment": str(number), "config": {}, "nodes": {"n": node}, "complete": True})
            kept.append((record, run))
            for number_kept, (standing, _) in enumerate(kept):
                assert store.lookup("busy", standing.key) is not None, standing.key
                store.materialise(standing.output, Path(folder, f"back-{number_kept}"))
        if len(kept) > KEPT:
            store.backend.delete(f"v1/run/{kept.pop(0)[1]}.json")
        number += 1
        time.sleep(0.1)
    print(json.dumps({"published": number}))


if __name__ == "__main__":
    main()
