"""How long work shows how far it is."""

import os
from collections.abc import Iterable

from tqdm import tqdm


def progress(items: Iterable, what: str, unit: str) -> tqdm:
    """The items, under a bar of the first process; silent where stderr is no terminal."""
    hidden = True if os.environ.get("RANK", "0") != "0" else None  # None: shown on a terminal
    return tqdm(items, desc=what, unit=unit, disable=hidden, dynamic_ncols=True)
