"""moto's server with the one thing that its conditional writes lack: nobody comes between the look and the write.

    python -m tests.moto_atomic -H HOST -p PORT

Amazon decides a condition and writes in one step. moto looks first and writes then, in threads, so that once in some
thousand races two writers are told that they won: enough for the probe to refuse it, and for a test to fail.
"""

from __future__ import annotations

import threading
from typing import Any

from moto.s3.responses import S3Response
from moto.server import main

_WRITING = threading.Lock()
_put_object = S3Response.put_object


def _put_alone(self: S3Response) -> Any:
    """The body was received before, so that nobody waits for somebody else's network."""
    with _WRITING:
        return _put_object(self)


if __name__ == "__main__":
    S3Response.put_object = _put_alone
    main()
