"""Processes that compile beside each other, and hold still while something is timed.

Tracing holds Python's global lock, so threads would take turns; and what other processes
compile would disturb a timing.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any


def _prepare() -> None:
    """Leaves the GPU's memory to the process that measures, Ctrl-C likewise."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Farm:
    """A pool of processes; use it in a ``with`` statement.

    Args:
        workers: number of processes.
        deadline: time, as ``time.monotonic`` has it, after which nothing is waited for.
    """

    def __init__(self, workers: int, deadline: float | None):
        self._deadline = deadline
        self._pool = concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _prepare
        )

    def __enter__(self) -> Farm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends without waiting for what is still being compiled."""
        self._signal(signal.SIGKILL)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, function: Callable, *args: Any) -> concurrent.futures.Future:
        return self._pool.submit(function, *args)

    def wait(self, futures: Iterable[concurrent.futures.Future]) -> None:
        """Until any is done.

        Raises:
            TimeoutError: the deadline has come first.
        """
        left = None
        if self._deadline is not None:
            left = max(0.0, self._deadline - time.monotonic())
        first = concurrent.futures.FIRST_COMPLETED
        if not concurrent.futures.wait(futures, left, first).done:
            raise TimeoutError

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """No process of the pool runs in the meantime."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def result(future: concurrent.futures.Future) -> Any:
    """What a process returned, or the first line of the error that it raised."""
    error = future.exception()
    if error is None:
        return future.result()
    return f"{type(error).__name__}: {error}".splitlines()[0]
