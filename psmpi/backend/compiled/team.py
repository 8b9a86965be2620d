"""Threads that run the C kernels."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Team:
    """Threads that share the work of one call. size: number of threads, including the caller's."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pool = ThreadPoolExecutor(size - 1, "psmpi-kernel") if size > 1 else None

    def run(self, share: Callable[[int], None], members: int) -> None:
        """Run share(0), ..., share(members - 1) in parallel, share(0) on the caller's thread."""
        waiting = [self.pool.submit(share, k) for k in range(1, members)] if self.pool is not None else []
        share(0)
        for future in waiting:
            future.result()
