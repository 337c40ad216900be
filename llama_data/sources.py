"""The sources of the sample data: the rows of tables/sources.csv, in packages that tables/packages.csv pins."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_data import extraction
from llama_data.extraction import Document, Members
from llama_download.registry import Package

TABLES = Path(__file__).parent / "tables"
DOMAINS = ("commoncrawl", "c4", "github", "wikipedia", "books", "arxiv", "stackexchange")


@dataclass(frozen=True)
class Source:
    """Files of a package that belong to one domain. `members` is a pattern of their whole names."""

    domain: str
    package: Package
    members: str
    extract: Callable[[Members], Iterator[Document]]
    licence: str
    what: str
    rights: str
    spare: str = ""  # not empty where it is taken only as far as the domain's other sources leave room


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of a table of this folder."""
    with (TABLES / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# The packages that hold the texts, each a single file known by its checksum.
PACKAGES = {row["name"]: Package(**row) for row in read_table("packages")}
# Where texts repeat one another, those of the earlier source are kept.
SOURCES = tuple(
    Source(**{**row, "package": PACKAGES[row["package"]], "extract": getattr(extraction, row["extract"])})
    for row in read_table("sources")
)
