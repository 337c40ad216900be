"""R vignettes (Sweave: LaTeX with chunks of R code) as the plain LaTeX of a paper. Pure functions."""

import regex  # its patterns can be recursive, as nested braces are

from llama_data.cleaning import tidy

BRACES = r"(?<braces>\{(?:\\.|[^{}\\]|(?&braces))*+(?:\}|\Z))"
ARGUMENTS = rf"(?:\s?\[[^\]\n]*\])*(?:\s?{BRACES})*"
# Commands about the page and about R, without words of their own, as far as the pinned packages have them.
SETTINGS = (
    r"\\(?:SweaveOpts|setkeys|maketitle|tableofcontents|newpage|clearpage|pagebreak|noindent|bigskip|medskip|smallskip"
    r"|vspace|hspace|setlength|pagestyle|thispagestyle|input|include|setcounter|renewcommand|newcommand"
    r"|DefineVerbatimEnvironment|normalsize|appendix)\b\*?"
)
REMOVED = [
    regex.compile(pattern, regex.DOTALL | regex.MULTILINE)
    for pattern in (
        r"^<<[^\n]*>>=.*?(?:^@[^\n]*$|\Z)",  # chunks of code
        r"^[ \t]*%[^\n]*\n",  # a line that holds only a comment goes altogether, or paragraphs would break
        r"(?<!\\)%[^\n]*",
        rf"\\Sexpr{ARGUMENTS}",
        r"\\begin\{(Schunk|Sinput|Soutput|Code)\}.*?\\end\{\1\}",
    )
]
BODY = regex.compile(r"\\begin\{document\}(.*?)(?:\\end\{document\}|\Z)", regex.DOTALL)
BIBLIOGRAPHY = regex.compile(
    r"\\begin\{thebibliography\}.*?\\end\{thebibliography\}|\\bibliography(?:style)?\{[^}]*\}", regex.DOTALL
)
PUBLISHED = regex.compile(r"Copyright\s*\\copyright")  # the publisher owns it, whatever licence the package has
SHORTEST_PAPER = 1000


def paper(vignette: str) -> str:
    """Title, abstract and body of a vignette as LaTeX; "" where hardly any words are left or a publisher claims the
    rights. Code, output, comments, references and commands about the page go; the paper's own macros stay."""
    text = vignette.replace("\r\n", "\n")
    for removed in REMOVED:
        text = removed.sub("", text)
    body = BODY.search(text)
    if not body or PUBLISHED.search(text):
        return ""
    title, abstract = (argument(text[: body.start()], name) for name in ("title", "[Aa]bstract"))
    front = [f"\\title{{{title}}}"] * bool(title)
    front += [f"\\begin{{abstract}}\n{abstract}\n\\end{{abstract}}"] * bool(abstract)
    content = regex.sub(SETTINGS + ARGUMENTS, "", BIBLIOGRAPHY.sub("", body[1]), flags=regex.DOTALL)
    content = regex.sub(r"\\begin\{(figure|table|center)\}(?:\[[^\]]*\])?\s*\\end\{\1\}", "", content)
    whole = tidy("\n\n".join([*front, content]))
    return whole if len(whole) >= SHORTEST_PAPER else ""


def argument(text: str, command: str) -> str:
    """What stands in the braces after the command, or "" where the command does not occur."""
    match = regex.search(rf"\\{command}\s*{BRACES}", text, regex.DOTALL)
    return " ".join(match["braces"][1:-1].split()) if match else ""
