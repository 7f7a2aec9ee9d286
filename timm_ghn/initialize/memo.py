"""What this process has read and predicted of the last few models, so that many seeds of one model need it once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any


class Memo:
    """The results that were used last, by what determines them. Threads may share a memo.

    Args:
        size: Number of results that are kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._results: OrderedDict[Hashable, Any] = OrderedDict()

    def find(self, key: Hashable) -> Any:
        """The result of that key; None if there is none."""
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
            return self._results.get(key)

    def keep(self, key: Hashable, result: Any) -> None:
        """Keep a result, which nobody may change from now on, and forget the one that was not used for longest."""
        with self._lock:
            self._results[key] = result
            self._results.move_to_end(key)
            if len(self._results) > self._size:
                self._results.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._results.clear()
