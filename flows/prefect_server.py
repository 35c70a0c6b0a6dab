"""Prefect's server in a process whose cyclic garbage is collected by a thread of its own:

    python -m flows.prefect_server prefect server start

Python collects cycles in the thread that allocates, in a server that of the event loop. A cursor that an ended request
left in a cycle is reset there, which waits for its SQLite connection; that may be waiting, in its own thread, for the
write lock; whose holder waits for the event loop. So all stands still until SQLite gives up after 60 s (`py-spy dump
--native` has shown gc_collect_main, cursor_dealloc, sqlite3_reset and pthread_mutex_lock on the main thread, and
sqlite3InvokeBusyHandler on another). A thread of its own may wait: nobody waits for it.
"""

from __future__ import annotations

import gc
import runpy
import sys
import threading
import time

__all__ = ["main"]

_SECONDS = 0.25
_MIDDLE, _OLDEST = 10, 100
"""Of so many collections one takes the middle generation too, and the oldest; as Python's own thresholds."""


def main() -> None:
    """Run the module that the arguments name, with the rest of them."""
    gc.disable()
    threading.Thread(target=_collect, name="garbage", daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _collect() -> None:
    number = 0
    while True:
        time.sleep(_SECONDS)
        if gc.get_count()[0] > gc.get_threshold()[0]:
            number += 1
            gc.collect((number % _MIDDLE == 0) + (number % _OLDEST == 0))


if __name__ == "__main__":
    main()
