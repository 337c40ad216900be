"""How the toolkit reports progress without printing: it is handed something that wraps an iterable."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """`progress(items, what, unit)` yields the items and shows how far it is, as tqdm does."""

    def __call__(self, items: Iterable[T], what: str, unit: str) -> Iterable[T]: ...


def no_progress(items: Iterable[T], what: str, unit: str) -> Iterable[T]:
    """Shows nothing."""
    return items
