"""How long work shows what it does, how far it is, and how long it still takes."""

import math
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from tqdm import tqdm

MINUTE = 60.0


class Progress(tqdm):
    """A tqdm bar, of the first process; where stderr is no terminal, a line a minute at most takes its place.

    A line is written when a unit of work is done, not by a thread that waits for the minute. Work of less than a
    minute writes none. `is_drawn`: whether it is a bar.
    """

    _last_line = -math.inf  # of any of them, by the clock: several at a time share the minute

    def __init__(self, iterable: Iterable | None = None, desc: str = "", *, unit: str = "it", **options: Any):
        is_first = os.environ.get("RANK", "0") == "0"
        self.is_drawn = is_first and sys.stderr.isatty()
        # A disabled tqdm has no `desc` and `unit`, and does not count.
        options |= {"disable": not self.is_drawn, "dynamic_ncols": True}
        super().__init__(iterable, desc, unit=unit, **options)
        self._prefix, self._unit, self._is_scaled = f"{desc}: " if desc else "", unit, options.get("unit_scale", False)
        self._first, self._start = self.n, time.monotonic() if is_first else math.inf

    def __iter__(self) -> Iterator:
        return super().__iter__() if self.is_drawn else self._told()

    def _told(self) -> Iterator:
        for item in self.iterable:
            yield item
            self.update()

    def update(self, n: float = 1) -> bool | None:
        """Count so many units more."""
        if self.is_drawn:
            return super().update(n)
        self.n += n
        now = time.monotonic()
        is_due = now - max(self._start, Progress._last_line) >= MINUTE
        if is_due:
            Progress._last_line = now
            print(self._line(now - self._start), file=sys.stderr, flush=True)
        return is_due

    def _line(self, elapsed: float) -> str:
        """Such as `calibrate: layer 7 of 30, 4 min 10 s, about 13 min still`."""
        n, total = (tqdm.format_sizeof(x or 0, self._unit) if self._is_scaled else x for x in (self.n, self.total))
        count = f"{n} of {total}" if self.total else str(n)
        parts = [count if self._is_scaled else f"{self._unit} {count}", duration(elapsed)]
        if self._first < self.n < (self.total or 0):
            left = elapsed * (self.total - self.n) / (self.n - self._first)
            minutes = max(1, round(left / MINUTE))  # it is no more exact than that
            parts.append(f"about {minutes} min still" if minutes < 120 else f"about {minutes / 60:.1f} h still")
        return self._prefix + ", ".join(parts)


def progress(items: Collection, what: str, unit: str, done: int = 0) -> Progress:
    """The items, one unit each, under a bar or a line a minute; so many more were `done` by an earlier run."""
    return Progress(items, what, unit=unit, total=done + len(items), initial=done)


def duration(seconds: float) -> str:
    """For people: `34.8 s`, `4 min 10 s` beyond two minutes, `3 h 12 min` beyond an hour."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
