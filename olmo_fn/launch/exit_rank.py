"""How a rank's process ends: by its exit handlers and its code, without Python's finalization. Imports no torch.

gloo's threads drop their tensors a moment after a collective is done, and need the interpreter's lock for it. A thread that
asks for it while Python (< 3.14) finalizes is ended in a way that makes C++ abort: a rank that did all its work gets SIGABRT.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def exit_rank() -> Iterator[None]:
    """End the process with the block if it is a rank of a job (``RANK`` is set); for any other the block is all.

    Exit code and last words are Python's own. Threads that are no daemons are waited for, and exit handlers run.

    >>> with exit_rank():
    ...     print("not a rank")
    not a rank
    """
    if "RANK" not in os.environ:
        yield
        return
    code = 0
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code not in (None, code):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # closed, or nobody reads it
                stream.flush()
        os._exit(code & 0xFF)
