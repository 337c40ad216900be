"""Which texts repeat others, by the runs of words (shingles) they share. Linear in the text but for one sort.

The idea of shingles is that of Broder, On the resemblance and containment of documents (1997). Everything here is
containment: the share of a text's shingles that also occur elsewhere.
"""

import re
from collections.abc import Sequence

import numpy as np

SHINGLE_WORDS = 13  # as usual when test sets are compared with training sets (Brown et al. 2020, appendix C)
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, with irregular bits
WORD = re.compile(r"\w+")


class Shingles:
    """The different shingles of each of many texts as numbers: `values[i]` of text `owners[i]`, in the texts' order."""

    def __init__(self, texts: Sequence[str]):
        numbers: dict[str, int] = {}
        shingles = [_shingles(text, numbers) for text in texts]
        self.count = len(texts)
        self.values = np.concatenate([*shingles, np.empty(0, np.uint64)])
        self.owners = np.repeat(np.arange(len(texts)), [len(part) for part in shingles])

    def repeated(self) -> np.ndarray:
        """For each text the share of its shingles that occur in texts before it. `[texts]`"""
        _, first, inverse = np.unique(self.values, return_index=True, return_inverse=True)
        return self._share(self.owners[first][inverse] < self.owners)

    def found_in(self, others: np.ndarray) -> np.ndarray:
        """For each text the share of its shingles that occur in the texts of the mask `others [texts]`. `[texts]`"""
        return self._share(np.isin(self.values, self.values[others[self.owners]]))

    def _share(self, marked: np.ndarray) -> np.ndarray:
        sizes = np.bincount(self.owners, minlength=self.count)
        return np.bincount(self.owners, weights=marked, minlength=self.count) / np.maximum(sizes, 1)


def _shingles(text: str, numbers: dict[str, int]) -> np.ndarray:
    """A number for each different shingle. New words get their numbers in `numbers`."""
    ids = [numbers.setdefault(word, len(numbers) + 1) for word in WORD.findall(text.lower())]
    ids = np.array(ids, dtype=np.uint64)
    values = np.zeros(max(0, len(ids) - SHINGLE_WORDS + 1), dtype=np.uint64)
    for offset in range(SHINGLE_WORDS):  # a polynomial, modulo 2^64
        values = values * MULTIPLIER + ids[offset : offset + len(values)]
    return np.unique(values)


def unique_texts(texts: Sequence[str], limit: float) -> np.ndarray:
    """Mask of the texts to keep so that none has more than `limit` of its shingles in those before it. Texts equal but
    for white space are equal."""
    first: dict[str, int] = {}
    is_first = [first.setdefault(" ".join(text.split()), i) == i for i, text in enumerate(texts)]
    return np.array(is_first, dtype=bool) & (Shingles(texts).repeated() <= limit)


def untangled(texts: Sequence[str], held_out: np.ndarray, limit: float) -> np.ndarray:
    """Mask of the texts to keep so that neither a held-out text (mask `held_out`) has more than `limit` of its
    shingles in training texts nor the other way round."""
    shingles = Shingles(texts)
    keep = ~held_out | (shingles.found_in(~held_out) <= limit)
    return keep & (held_out | (shingles.found_in(held_out & keep) <= limit))
