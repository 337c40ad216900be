"""Describes the sample data: its manifest, its licences, and the table that is printed."""

from collections.abc import Container, Iterable, Mapping, Sequence

from llama_data.selection import HELD_OUT_TOKENS, TRAIN_TOKENS, Half
from llama_data.sources import DOMAINS, TABLES, Source, read_table
from llama_download.registry import Package

WANTED_TOKENS = 300_000  # to train on, a domain; what stays below is called short
LINKS = {row["licence"]: row["link"] for row in read_table("licences")}


def manifest(
    recipe: Mapping, halves: Mapping[str, tuple[Half, Half]], sources: Sequence[Source], had: Container[Package]
) -> dict:
    """All but the checksums of the files: `recipe`, and for each domain its sources, licences, documents, tokens;
    sources whose package is not among those `had` as skipped."""
    domains = {}
    for domain, (train, held_out) in halves.items():
        used = [source for source in sources if source.domain == domain and source.package in had]
        domains[domain] = {
            "sources": [*{source.package: describe(source) for source in used}.values()],
            "licences": sorted({document.source.licence for half in (train, held_out) for document in half.documents}),
            "train": counts(train),
            "heldout": counts(held_out),
            "short": train.tokens < WANTED_TOKENS,
        }
    missing = [source for source in sources if source.package not in had]
    skipped = [{"domain": source.domain, "package": source.package.title} for source in missing]
    return {**recipe, "domains": domains, "skipped": skipped}


def describe(source: Source) -> dict[str, str]:
    """A source as the manifest has it."""
    package = source.package
    return {
        "package": package.title,
        "version": package.version,
        "file": package.file_name,
        "sha256": package.sha256,
        "members": source.members,
        "licence": source.licence,
    }


def counts(half: Half) -> dict[str, int]:
    """Documents, works, characters and tokens of a half."""
    return {
        "documents": len(half.documents),
        "works": len({document.work.lower() for document in half.documents}),
        "characters": sum(len(document.text) for document in half.documents),
        "tokens": half.tokens,
    }


def licences(sources: Iterable[Source]) -> str:
    """LICENCES.md: for each source what it is, whose, under which licence."""
    sources = list(sources)
    lines = [(TABLES / "licences.md").read_text(encoding="utf-8")]
    for domain in DOMAINS:
        lines += [f"## {domain}\n", "| source | what | rights | licence |", "|---|---|---|---|"]
        for source in sources:
            if source.domain == domain:
                link = f" ({LINKS[source.licence]})" if source.licence in LINKS else ""
                lines.append(f"| {source.package.title} | {source.what} | {source.rights} | {source.licence}{link} |")
        lines.append("")
    return "\n".join(lines)


def table(manifest: Mapping) -> str:
    """Documents and tokens of each domain, and what is short."""
    lines = [f"{'domain':<15}{'documents':>10}{'works':>8}{'tokens':>10}{'held out: documents':>24}{'tokens':>10}"]
    for domain in DOMAINS:
        entry = manifest["domains"].get(domain)
        if entry is None:
            lines.append(f"{domain:<15} nothing: none of its sources could be had")
            continue
        train, held_out = entry["train"], entry["heldout"]
        numbers = f"{train['documents']:>10,}{train['works']:>8,}{train['tokens']:>10,}"
        remark = f"  short of {WANTED_TOKENS:,}" if entry["short"] else ""
        lines.append(f"{domain:<15}{numbers}{'':<14}{held_out['documents']:>10,}{held_out['tokens']:>10,}{remark}")
    aims = f"aimed at: {TRAIN_TOKENS:,} tokens a domain and {HELD_OUT_TOKENS:,} held out"
    return "\n".join([*lines, f"{aims}, as the tokenizer of SmolLM2 counts"])
