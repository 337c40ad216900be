"""From packages to text: each reader against small inputs whose result is known by hand."""

import io
import re
import shutil
import struct
import tarfile
import zlib

import pytest

from llama_data import extraction, mail
from llama_data.archives import read_members
from llama_data.cleaning import PART_CHARACTERS, decode, html_text, in_parts, pod_text, tidy
from llama_data.latex import argument, paper


def texts(documents) -> list[str]:
    return [document.text for document in documents]


def test_tidy_keeps_words_and_indentation_only():
    assert tidy("\ufeffone \r\n\r\n\r\n\r\n  two\t\x00\rthree\fso\u00adft\xa0x\n\n") == "one\n\n  two\nthree\nsoft x"


def test_decode_takes_utf8_and_else_windows():
    assert decode("é “x”".encode()) == decode("é “x”".encode("cp1252")) == "é “x”"


def test_html_as_a_reader_sees_it():
    page = """<html><head><title>no</title><style>p {}</style></head><body><!-- no --><h1>Big
    &amp; bold</h1><script>if (a < b) no()</script><p>One&nbsp;<b>two</b>
    three.<br>Four</p><ul><li>a<li>b</ul><pre>  x &lt; 1
    y</pre></body></html>"""
    assert html_text(page) == "Big & bold\n\nOne two three.\nFour\n\n* a\n* b\n\n  x < 1\n    y"


def test_pod_as_plain_text():
    pod = """See L<perlop/"Precedence"> or L<the page|http://x.org>, C<< $a->{b} >> and B<I<this>> E<lt>x>X<index>.

=over 4

=item first

=back
"""
    assert pod_text(pod) == "See perlop/Precedence or the page, $a->{b} and this <x>.\n\nfirst"


@pytest.mark.parametrize("text", ["para one.\n\n" * 5000, "line\n" * 9000, "word " * 9000, "x" * 50_000])
def test_parts_are_even_within_the_limit_and_lose_nothing(text):
    parts = in_parts(text)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert max(map(len, parts)) <= PART_CHARACTERS
    assert min(map(len, parts)) > PART_CHARACTERS / 3
    assert in_parts("short") == ["short"]


def test_pages_are_clean_or_not():
    pages = b"A sentence about dogs.\nHome Log in Sign up Contact us Menu Facebook\nNo end of a sentence"
    members = {"a/c4.utf8": pages}
    assert list(extraction.clean_pages(members)) == [("c4.utf8 line 1", "A sentence about dogs.")]
    assert [document.work for document in extraction.uncleaned_pages(members)] == ["c4.utf8 line 2", "c4.utf8 line 3"]


def test_wikipedia_without_wikitext2():
    article = '<doc id="1" url="u" title="{0}">\n{0}\n\nBody of A &amp; B ( , ) here.\n\n</doc>\n'
    members = {"wiki": "".join(map(article.format, ["Nero", "Cats &amp; dogs", "Du Fu"])).encode()}
    assert list(extraction.wikipedia_dump(members)) == [("Cats & dogs", "Cats & dogs\n\nBody of A & B here.")]
    leads = {"json": b'{"x": {"title": "Manila", "extract": "M"}, "y": {"title": "Y", "extract": "Why."}}'}
    assert list(extraction.wikipedia_leads(leads)) == [("Y", "Y\n\nWhy.")]


def test_code_between_marks_and_files():
    code = b"x\n// ===== BEGIN go\n\tpackage a\n// ===== END go\n// ===== BEGIN c\nint b;\n// ===== END c\n"
    assert texts(extraction.marked_files({"code.utf8": code})) == ["\tpackage a", "int b;"]
    assert texts(extraction.code_files({"a.js": b"let a\r\n", "b.min.js": b"x" * 1000})) == ["let a"]


def r_data_base(*vectors: list[str]) -> bytes:
    """Character vectors as R writes them: before each string its encoding, type and length."""
    content = b""
    for vector in vectors:
        data = b"X\n"
        for string in vector:
            data += b"\0\4\0\x09" if string.isascii() else b"\0\0\x80\x09"
            data += struct.pack(">I", len(string.encode())) + string.encode()
        content += struct.pack(">I", len(data)) + zlib.compress(data)
    return content


def test_novels_of_r():
    novels = [["EMMA", "", "CHAPTER I", "It _was_ é."], ["PERSUASION", "Chapter 1", "", "Sir Walter"]]
    expected = [("Emma", "CHAPTER I\nIt was é."), ("Persuasion", "Chapter 1\n\nSir Walter")]
    found = extraction.r_novels({"Rdata.rdb": r_data_base(*novels)})
    assert [document for document in found if document.text] == expected


def test_plays_lose_their_markdown():
    play = b"# Hamlet\n\n## ACT I\n\n### SCENE I. Elsinore.\n\n_Enter_\n\n**BERNARDO**  \nWho's there?  \n"
    parts = ["Hamlet", "ACT I", "SCENE I. Elsinore.\n\nEnter\n\nBERNARDO\nWho's there?"]
    assert list(extraction.markdown_plays({"hamlet.md": play})) == [("Hamlet", part) for part in parts]


VIGNETTE = r"""%\VignetteIndexEntry{no}
\documentclass[a4paper]{jss}
\title{A {\em nice} title}
\Abstract{
  About 5\% of it.
}
\begin{document}
\SweaveOpts{concordance=TRUE}
% a comment line
\section{First} % trailing
We have \Sexpr{nrow(x[[1]])} rows. \vspace[x]{1cm}Then:
<<setup, echo=FALSE>>=
library(x)
@
\begin{Schunk}
\begin{Sinput}
> x
\end{Sinput}
\end{Schunk}
The end $\alpha$.
\bibliography{refs}
\end{document}
ignored
"""


def test_a_vignette_becomes_a_paper():
    filler = "Words of the paper. " * 60
    text = paper(VIGNETTE.replace("The end", filler + "The end"))
    front = "\\title{A {\\em nice} title}\n\n\\begin{abstract}\nAbout 5\\% of it.\n\\end{abstract}\n\n"
    assert text.startswith(front + "\\section{First}")
    assert text.endswith("The end $\\alpha$.")
    gone = "library Sexpr Sinput comment trailing bibliography ignored vspace Sweave Vignette"
    assert not [word for word in gone.split() if word in text]
    assert paper(VIGNETTE) == paper("no document") == ""
    assert paper(VIGNETTE.replace("The end", filler + "Copyright \\copyright{} 2008 Publisher")) == ""
    assert argument(r"\title{a {b} \} c}", "title") == r"a {b} \} c"


def test_questions():
    pod = b"=head1 NAME\n\nx\n\n=head2 Why?\n\nBecause C<x>.\n\n=head2 How?\n\nSo.\n\n=head1 AUTHOR AND COPYRIGHT\n\nme"
    assert texts(extraction.pod_questions({"p": pod})) == ["Why?\n\nBecause x.", "How?\n\nSo."]
    page = b'<div class="navheader">no</div><h2>1.1. What?</h2><p>That.</p><h3>1.1.1. Who?</h3>She.'
    assert list(extraction.html_questions({"h": page})) == [("What?", "What?\n\nThat."), ("Who?", "Who?\n\nShe.")]
    question = b'{"questions": [{"title": "A &lt; B?", "body": "<p>See</p><pre><code>  if a:\\n</code></pre>"}]}'
    assert texts(extraction.json_questions({"j": question})) == ["A < B?\n\nSee\n\n  if a:"]


FIRST = b"""From: Ann <ann@a.org>
Subject: [list] How to sort?
Date: Mon, 02 Sep 2002 10:00:00 +0200

How do I sort a list? Write to ann@a.org.

--
Ann's signature
"""
SECOND = b"""From: Bob <bob@b.org>
Subject: =?iso-8859-1?q?Re=3A_[list]_How_to_sort=3F?=
Date: Mon, 02 Sep 2002 04:00:01 -0500
Content-Type: text/plain; charset=iso-8859-1
Content-Transfer-Encoding: quoted-printable

On Monday, Ann wrote:
> How do I sort a list?

Call sorted=2E Caf=E9.
_______________________________________________
list mailing list
"""


def test_a_thread_is_question_and_answer_without_quotations():
    members = {"2": SECOND, "1": FIRST}
    expected = "How to sort?\n\nHow do I sort a list? Write to <address>.\n\nCall sorted. Café."
    assert list(extraction.mail_threads(members)) == [("how to sort?", expected)]
    assert list(extraction.mail_threads({"1": FIRST})) == []


def test_names_of_threads():
    for subject in ("Re: [x] New (was: Old name)", "Fwd: old  NAME", "RE: Re[2]: Old name"):
        assert mail.thread_name(subject) == "old name"


def test_html_mails_become_pages_of_their_site():
    head = b"From: news@site.com\nSubject: s\nContent-Type: text/html\n\n"
    page = head + b"<p>Buy <b>this</b> at home.<p>***<p>me@site.com"
    assert list(extraction.web_mails({"1": page})) == [("site.com", "Buy this at home.\n\n<address>")]
    assert list(extraction.plain_mails({"1": page})) == []
    assert list(extraction.web_mails({"1": page.replace(b"this", b"porn")})) == []
    plain = texts(extraction.plain_mails({"1": FIRST.split(b"\n--")[0]}))
    assert plain == ["How do I sort a list? Write to <address>."]


def test_the_regular_files_of_a_name_are_read(tmp_path):
    """The builds of test_make_sample_data.py read the other kinds of packages."""
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as archive:
        for name, content in {"./a/two.txt": b"22", "./a/one.txt": b"1", "./a/no.md": b"333"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("a/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert [*read_members(tmp_path / "p.tgz", r"a/.*\.txt").items()] == [("a/one.txt", b"1"), ("a/two.txt", b"22")]


@pytest.mark.parametrize("suffix", ["tgz", "deb", "whl"])
def test_damaged_packages_are_refused_by_name(suffix, tmp_path):
    if suffix == "deb" and not shutil.which("dpkg-deb"):
        pytest.skip("dpkg-deb is not installed")
    path = tmp_path / f"p.{suffix}"
    path.write_bytes(b"damaged" * 100)
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read as a package")):
        read_members(path, ".*")
