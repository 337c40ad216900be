"""Turns the files of a package into documents: one pure function for each kind of source."""

import html
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from llama_data import mail
from llama_data.cleaning import decode, html_text, in_parts, pod_text, tidy
from llama_data.latex import paper

Members = Mapping[str, bytes]  # content of each file by its name in the package

# Also in the test set of WikiText-2, on which models are evaluated.
WIKITEXT2_TEST_TITLES = {"Du Fu", "Olmec colossal heads", "Nero", "Manila"}
NAVIGATION = re.compile(
    r"log ?in|sign ?up|sign in|subscribe|skip to content|search for|contact us|about us|privacy policy|terms of use"
    r"|all rights reserved|©|my account|cart\b|newsletter|facebook|menu|home\b|\{\{",
    re.IGNORECASE,
)
EXPLICIT = re.compile(
    r"\b(?:porn|xxx|sex|viagra|penis|erotic|nude|slut|orgasm|horny|libido|marital|lesbian|adult (?:site|movie|web))",
    re.IGNORECASE,
)


class Document(NamedTuple):
    """A text and the name of the work that it is, or is part of; "" stands for the package as a whole."""

    work: str
    text: str


def clean_pages(members: Members) -> Iterator[Document]:
    """The pages of C4, one a line, without those that escaped its cleaning."""
    return (page for page in _pages(members) if not is_uncleaned(page.text))


def uncleaned_pages(members: Members) -> Iterator[Document]:
    """The pages among those of C4 that are as a crawler found them, with menus and buttons."""
    return (page for page in _pages(members) if is_uncleaned(page.text))


def _pages(members: Members) -> Iterator[Document]:
    for name, content in members.items():
        for number, line in enumerate(decode(content).split("\n"), 1):
            yield Document(f"{Path(name).name} line {number}", tidy(line))


def is_uncleaned(page: str) -> bool:
    """Whether a page shows what C4 removes: it ends like no sentence, or has the words of menus."""
    ends_well = re.search(r"""[.!?…:;)\]"'”’]$""", page)
    return not ends_well or len({word.lower() for word in NAVIGATION.findall(page)}) >= 4


def web_mails(members: Members) -> Iterator[Document]:
    """HTML mails (newsletters, advertisements) in English as pages; the work is the sender's site. Nothing explicit."""
    return _mails(members, lambda message: html_text(message.html))


def plain_mails(members: Members) -> Iterator[Document]:
    """Mails without HTML, by the same rules."""
    return _mails(members, lambda message: "" if message.html else message.plain)


def _mails(members: Members, text_of: Callable[[mail.Mail], str]) -> Iterator[Document]:
    for message in map(mail.parse_mail, members.values()):
        text = mail.readable(text_of(message))
        # As many letters beyond ASCII as this are another language, mostly one whose encoding was lost.
        if text and not EXPLICIT.search(text) and sum(map(str.isascii, text)) >= 0.95 * len(text):
            yield from _parts(message.sender or message.thread, text)


def marked_files(members: Members) -> Iterator[Document]:
    """The files between `// ===== BEGIN language` and `// ===== END`; text outside has no known borders."""
    marked = re.compile(r"^// ===== BEGIN [^\n]*\n(.*?)^// ===== END ", re.DOTALL | re.MULTILINE)
    for name, content in members.items():
        for number, match in enumerate(marked.finditer(decode(content)), 1):
            yield Document(f"{Path(name).name} file {number}", tidy(match[1]))


def code_files(members: Members) -> Iterator[Document]:
    """Files of source code as they are, but for those that a machine wrote (long lines); the work is the package."""
    for content in members.values():
        text = tidy(decode(content))
        if text and max(map(len, text.split("\n"))) <= 400:
            yield from _parts("", text)


def wikipedia_dump(members: Members) -> Iterator[Document]:
    """The articles of a WikiExtractor dump, each beginning with its title."""
    article = re.compile(r'^<doc [^\n]*title="([^\n]*)">\n(.*?)\n</doc>$', re.DOTALL | re.MULTILINE)
    for content in members.values():
        for match in article.finditer(decode(content)):
            yield from _article(html.unescape(match[1]), html.unescape(match[2]))


def wikipedia_leads(members: Members) -> Iterator[Document]:
    """Introductions of articles from a JSON object of objects with `title` and `extract`."""
    for content in members.values():
        for entry in json.loads(content).values():
            yield from _article(entry["title"], f"{entry['title']}\n\n{entry['extract']}")


def _article(title: str, text: str) -> Iterator[Document]:
    if title not in WIKITEXT2_TEST_TITLES:
        # WikiExtractor leaves empty brackets where it removed pronunciations, and tags of formulas.
        text = re.sub(r" ?\([;, ]*\)", "", re.sub(r"</?(?:br|ref|templatestyles|math|nowiki)[^>]*>", "", text))
        yield from _parts(title, text)


def r_novels(members: Members) -> Iterator[Document]:
    """Novels in an R data base (.rdb): a character vector each, a line of the book per string, the title first. Each
    object is 4 bytes (a length) and zlib data. R writes before a string its encoding, its type (9) and its length."""
    for rdb in members.values():
        while rdb:
            decompressor = zlib.decompressobj()
            content = decompressor.decompress(rdb[4:])
            _, *lines = re.split(rb"(?s)\0[\0\x04][\0\x80]\x09.{4}", content)
            if lines:  # other objects have no strings
                title, _, text = b"\n".join(lines).decode().partition("\n")
                yield from _chapters(tidy(title).title(), text, r"^(?:CHAPTER|Chapter) [IVXLC\d]+")
            rdb = decompressor.unused_data


def plain_novel(members: Members) -> Iterator[Document]:
    """A novel as a text file with headings `CHAPTER 1. Name`; the work is the package ("")."""
    for content in members.values():
        yield from _chapters("", decode(content), r"^CHAPTER \d+\. ")


def markdown_plays(members: Members) -> Iterator[Document]:
    """Plays in Markdown, a file each, cut at their acts and scenes."""
    for name, content in members.items():
        text = re.sub(r"\*\*|(?<!\w)_|_(?!\w)", "", decode(content))
        title = re.match(r"# ([^\n]+)\n", text)
        yield from _chapters(title[1] if title else name, text, r"^##+ ")


def _chapters(work: str, text: str, heading: str) -> Iterator[Document]:
    """The book in chapters, long ones in parts. `_emphasis_` loses its underscores."""
    text = re.sub(r"(?<!\w)_([^_\n]+)_(?!\w)", r"\1", tidy(text))
    starts = [match.start() for match in re.finditer(heading, text, re.MULTILINE)]
    for start, end in zip([0, *starts], [*starts, len(text)], strict=True):
        yield from _parts(work, re.sub(r"^#+ ", "", text[start:end], flags=re.MULTILINE))


def vignettes(members: Members) -> Iterator[Document]:
    """The papers among the files of an R package; the work is the package."""
    for content in members.values():
        yield from _parts("", paper(decode(content)))


def pod_questions(members: Members) -> Iterator[Document]:
    """The questions of a FAQ in POD, each with its answer."""
    for content in members.values():
        for section in re.split(r"^=head2 ", decode(content).split("=head1 AUTHOR")[0], flags=re.MULTILINE)[1:]:
            question, _, answer = section.partition("\n")
            answer = re.split(r"^=head1 ", answer, maxsplit=1, flags=re.MULTILINE)[0]
            yield from _parts(pod_text(question), f"{pod_text(question)}\n\n{pod_text(answer)}")


def html_questions(members: Members) -> Iterator[Document]:
    """The numbered sections of a FAQ in HTML (DocBook), each with its answer."""
    furniture = re.compile(r'<div class="(?:navheader|navfooter|toc)">.*?</div>', re.DOTALL)
    for content in members.values():
        text = html_text(furniture.sub("", decode(content)))
        for section in re.split(r"^\d+\.\d+\.(?:\d+\.)? ", text, flags=re.MULTILINE)[1:]:
            yield from _parts(section.partition("\n")[0], section)


def json_questions(members: Members) -> Iterator[Document]:
    """Questions as the interface of Stack Overflow gave them: titles, and bodies in HTML."""
    for content in members.values():
        for question in json.loads(content)["questions"]:
            title = html.unescape(question["title"])
            yield from _parts(title, f"{title}\n\n{html_text(question['body'])}")


def mail_threads(members: Members) -> Iterator[Document]:
    """The threads of mailing lists, each mail without what it quotes."""
    for name, text in mail.threads(map(mail.parse_mail, members.values())).items():
        yield from _parts(name, text)


def _parts(work: str, text: str) -> Iterator[Document]:
    yield from (Document(work, part) for part in in_parts(tidy(text)))
