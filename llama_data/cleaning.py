"""From markup to plain text, and from long texts to parts: pure functions that every domain shares."""

import math
import re
from html.parser import HTMLParser

PART_CHARACTERS = 16_000  # about 4,000 tokens of prose; longer works are cut into parts of about equal length
CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\xad\u200b\u2028\u2029\ufeff\ufffd]")
# What stands in the text for a tag of HTML, where it begins and ends, or only where it begins.
LINES = {"br", "center", "dd", "div", "dl", "dt", "form", "hr", "li", "ol", "option", "tr", "ul"}
PARAGRAPHS = {"blockquote", "h1", "h2", "h3", "h4", "h5", "h6", "p", "pre", "table"}
BREAKS = dict.fromkeys(LINES, "\n") | dict.fromkeys(PARAGRAPHS, "\n\n")
MARKS = {"li": "* ", "td": "\0", "th": "\0"}
INVISIBLE = {"head", "noscript", "script", "select", "style", "textarea", "title"}


def decode(content: bytes) -> str:
    """Text of a file that says nothing about its encoding: UTF-8 where it is valid, else Windows' Western one."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def tidy(text: str) -> str:
    """The text with LF line ends, no control characters, no spaces at line ends and no runs of blank lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n").replace("\xa0", " ")
    text = re.sub(r"[ \t]+$", "", CONTROL.sub("", text), flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def in_parts(text: str, limit: int = PART_CHARACTERS) -> list[str]:
    """The text cut into parts of about equal length, none above the limit, at paragraphs, else lines, else anywhere."""
    if len(text) <= limit:
        return [text]
    aim = len(text) / math.ceil(len(text) / limit)
    parts, start = [], 0
    while len(text) - start > limit:
        end = start + round(aim)
        for border in ("\n\n", "\n", " "):
            cut = text.rfind(border, start + round(aim / 2), end)
            if cut > 0:
                end = cut
                break
        parts.append(text[start:end].strip("\n"))
        start = end
    return [part for part in [*parts, text[start:].strip("\n")] if part.strip()]


class _TextOfHtml(HTMLParser):
    """Collects what a reader of the page sees; lines break at block elements, `pre` keeps its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._invisible = self._preformatted = 0

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self._invisible += tag in INVISIBLE
        if tag == "body":  # closes a head that nobody closed
            self._invisible = 0
        self._preformatted += tag == "pre"
        self.pieces.append(BREAKS.get(tag, "") + MARKS.get(tag, ""))

    def handle_endtag(self, tag: str) -> None:
        self._invisible = max(0, self._invisible - (tag in INVISIBLE))
        self._preformatted = max(0, self._preformatted - (tag == "pre"))
        self.pieces.append(BREAKS.get(tag, ""))

    def handle_data(self, data: str) -> None:
        if not self._invisible:
            # Other white space is marked, so that it can be folded without touching that of `pre`.
            self.pieces.append(data if self._preformatted else re.sub(r"\s+", "\0", data))


def html_text(page: str) -> str:
    """What a reader of an HTML page or fragment sees, as plain text."""
    parser = _TextOfHtml()
    # A stray `<!` (as in old mail) would make the parser take the rest of the page for a declaration.
    parser.feed(re.sub(r"<!--.*?-->|<![^>]*>|<\?[^>]*>", " ", page, flags=re.DOTALL))
    parser.close()
    text = re.sub(r"(?<=\n)\0+", "", "".join(parser.pieces)).replace("\xa0", " ")
    text = re.sub(r"\0+", " ", text)
    return tidy(re.sub(r"^\* *\n+", "* ", text, flags=re.MULTILINE))


def pod_text(pod: str) -> str:
    """Perl's POD as plain text: formatting codes resolved, commands dropped, item markers kept as text."""
    pod = re.sub(r"^=(?:head\d|item) +", "", pod, flags=re.MULTILINE)
    pod = re.sub(r"^=\w+[^\n]*\n?", "", pod, flags=re.MULTILINE)
    pod = re.sub(r"\b[A-Z]<<+ (.*?) >>+", r"\1", pod, flags=re.DOTALL)
    code = re.compile(r"\b([A-Z])<([^<>]*)>")
    while code.search(pod):  # from the inside out
        pod = code.sub(_pod_code, pod)
    return tidy(pod.replace("\1", "<").replace("\2", ">"))


def _pod_code(match: re.Match) -> str:
    letter, content = match.groups()
    if letter == "E":
        return {"lt": "\1", "gt": "\2", "sol": "/", "verbar": "|"}.get(content, content)
    if letter == "L":  # the text, where the link has one
        return content.split("|")[0].removeprefix("/").replace('"', "")
    return "" if letter in "XZ" else content
