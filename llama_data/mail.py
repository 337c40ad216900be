"""Mails as text: threads of mailing lists, and HTML mails as the web pages they are. Pure functions."""

import contextlib
import email
import email.policy
import email.utils
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC
from email.message import EmailMessage

from llama_data.cleaning import decode, tidy

MASK = "<address>"  # in place of addresses, which need not be learnt
ADDRESS = re.compile(r"<?\b[\w.+=-]+@[\w-]+(?:\.[\w-]+)+\b>?")
PREFIXES = re.compile(r"^(?:(?:re|fwd?|aw|sv)\s*(?:\[\d+\])?\s*:|\[[^\]]*\]|\s)+", re.IGNORECASE)
ATTRIBUTION = re.compile(
    r"^(?:[^\n]*\n)?[^\n]*\b(?:wrote|writes|said|says|spake thusly|schrieb|typed)\b[^\n]{0,40}[:.]+\s*$", re.MULTILINE
)
# From here on a mail says nothing of its own: signatures, lists' footers, the mail that it answers.
ENDINGS = re.compile(
    r"^(?:-- ?$|_{10,}|={10,}|-{3,} ?Original Message|-+BEGIN PGP SIGNATURE|-{20,}\s*\n(?:This |Welcome)"
    r"|To unsubscribe|http://xent\.com/mailman)[^\n]*",
    re.MULTILINE | re.IGNORECASE,
)
SIGNATURE = re.compile(r"^[-=_*~+]{20,}[ \t]*(?:\n[^\n]*){0,8}\Z", re.MULTILINE)  # a ruler near the end, and the rest
HEADER_LINES = re.compile(r"^(?:From|To|Cc|Sent|Date|Subject|URL|Reply-To|Hash): [^\n]*\n", re.MULTILINE)
NO_WORDS = re.compile(r"\b(?!https?:|www\.)[^\s/]{45,}|mailman/listinfo|mailing list$|DeathToSpam|_{10,}")
MARKUP = re.compile(r"<(?:html|body|table|font|br|/p|/a|/b)\b", re.IGNORECASE)  # whatever the header says


@dataclass(frozen=True)
class Mail:
    """What matters of a mail. `thread` is its subject without the marks of answers; `time` orders the thread."""

    sender: str
    subject: str
    thread: str
    time: float
    plain: str
    html: str


def parse_mail(content: bytes) -> Mail:
    """A raw mail; headers that are wrong, as in old mail they often are, are taken as far as they go."""
    message = email.message_from_bytes(content, policy=email.policy.default)
    plain, html = [], []
    for part in message.walk():
        if part.get_content_maintype() == "text" and part.get_content_disposition() != "attachment":
            text = _text(part)
            (html if part.get_content_subtype() == "html" or MARKUP.search(text) else plain).append(text)
    subject = " ".join(str(message.get("subject", "")).split())
    address = email.utils.parseaddr(str(message.get("from", "")))[1]
    date = getattr(message.get("date"), "datetime", None)
    return Mail(
        sender=address.rpartition("@")[2].lower().strip("> "),
        subject=PREFIXES.sub("", subject).strip(),
        thread=thread_name(subject),
        time=date.replace(tzinfo=date.tzinfo or UTC).timestamp() if date else 0.0,
        plain=tidy("\n\n".join(plain)),
        html="\n".join(html),
    )


def thread_name(subject: str) -> str:
    """What all the subjects of a thread have in common: `Re: [list] New name (was: Old name)` -> `old name`."""
    name = PREFIXES.sub("", " ".join(subject.split()))
    while match := re.search(r"[(\[]was:? ?(.+?)[)\]]?$", name, re.IGNORECASE):
        name = PREFIXES.sub("", match[1])
    return name.lower().strip()


def own_words(plain: str) -> str:
    """A plain mail without what it quotes, its signature, headers within the text, and addresses."""
    text = re.sub(r"^-+BEGIN PGP SIGNED MESSAGE-+\n(?:Hash: [^\n]*\n)?", "", plain, flags=re.MULTILINE)
    text = re.sub(r"^[ \t]*(?:[\w-]{0,12}>|[|}]|: )[^\n]*$", "\0", text, flags=re.MULTILINE)
    # Who is quoted stands right above the quotation.
    text = re.sub(r"(?:^[^\n\0]{0,100}\n)?^[^\n\0]{0,100}:[ \t]*\n+(?=\0)", _drop_attribution, text, flags=re.MULTILINE)
    text = ENDINGS.split(HEADER_LINES.sub("", text.replace("\0", "")), maxsplit=1)[0].rstrip()
    text = SIGNATURE.sub("", text)
    return tidy(ADDRESS.sub(MASK, ATTRIBUTION.sub("", text))).strip()


def _drop_attribution(match: re.Match) -> str:
    first, _, second = match[0].strip().partition("\n")
    return "" if not second or ATTRIBUTION.search(match[0]) else first + "\n"


def threads(mails: Iterable[Mail]) -> dict[str, str]:
    """Text of each thread by name: its subject, then what each mail adds, oldest first. Threads without an answer are
    left out: mostly news passed on."""
    groups: dict[str, list[Mail]] = {}
    for mail in sorted(mails, key=lambda mail: mail.time):
        if mail.thread:
            groups.setdefault(mail.thread, []).append(mail)
    texts = {}
    for name, group in groups.items():
        contributions = list(dict.fromkeys(words for mail in group if (words := own_words(mail.plain))))
        if len(contributions) > 1:
            texts[name] = "\n\n".join([ADDRESS.sub(MASK, group[0].subject), *contributions])
    return texts


def readable(text: str) -> str:
    """The text without addresses, footers of lists, and lines without words, which are to confuse spam filters."""
    lines = (
        line
        for line in text.split("\n")
        if not line.strip() or (re.search(r"[^\W\d_]{2}", line) and not NO_WORDS.search(line))
    )
    return ADDRESS.sub(MASK, tidy("\n".join(lines)))


def _text(part: EmailMessage) -> str:
    """The part's text. Windows' encoding is often meant where another Western one or none is named."""
    content, charset = part.get_payload(decode=True) or b"", part.get_content_charset("us-ascii")
    with contextlib.suppress(LookupError, ValueError):
        if charset not in ("us-ascii", "iso-8859-1", "unknown-8bit"):
            return content.decode(charset)
    return decode(content)
