"""R vignettes (Sweave: LaTeX with chunks of R code) as the plain LaTeX of a paper. Pure functions."""

import re

from llama_data.cleaning import tidy

CODE_CHUNK = re.compile(r"^<<[^\n]*>>=.*?(?:^@[^\n]*$|\Z)", re.MULTILINE | re.DOTALL)
CODE_ENVIRONMENT = re.compile(
    r"\\begin\{(Schunk|Sinput|Soutput|CodeChunk|CodeInput|CodeOutput|Code)\}.*?\\end\{\1\}", re.S
)
COMMENT = re.compile(r"(?<!\\)%[^\n]*")
BODY = re.compile(r"\\begin\{document\}(.*?)(?:\\end\{document\}|\Z)", re.DOTALL)
BIBLIOGRAPHY = re.compile(
    r"\\begin\{thebibliography\}.*?\\end\{thebibliography\}|\\bibliography(?:style)?\{[^}]*\}", re.DOTALL
)
# Commands about the page and about R, without words of their own.
SETTINGS = re.compile(
    r"\\(?:SweaveOpts|SweaveInput|setkeys|usepackage|maketitle|tableofcontents|newpage|clearpage|pagebreak|noindent"
    r"|bigskip|medskip|smallskip|vspace|hspace|setlength|addtolength|pagestyle|thispagestyle|hyphenation|input|include"
    r"|setcounter|addcontentsline|renewcommand|newcommand|providecommand|DefineVerbatimEnvironment|normalsize"
    r"|listoffigures|listoftables|appendix|sloppy|raggedright|parindent|parskip)\b\*?"
)
OPTION, ARGUMENT = re.compile(r"\s?\[[^\]\n]*\]"), re.compile(r"\s?(?=\{)")
PUBLISHED = re.compile(r"Copyright\s*\\copyright")  # a publisher's, whatever licence the package has
SHORTEST_PAPER = 1000


def paper(vignette: str) -> str:
    """Title, abstract and body of a vignette as LaTeX; "" where hardly any words are left or a publisher
    claims the rights.

    Gone: code and its output, comments, the preamble, references, commands that set up the page. Macros of the paper's
    own stay as they are.
    """
    text = CODE_CHUNK.sub("", vignette.replace("\r\n", "\n"))
    # A line that holds only a comment goes altogether, or paragraphs would break.
    text = COMMENT.sub("", re.sub(r"^[ \t]*%[^\n]*\n", "", text, flags=re.MULTILINE))
    text = CODE_ENVIRONMENT.sub("", _without(text, r"\\Sexpr"))
    body = BODY.search(text)
    if not body or PUBLISHED.search(text):
        return ""
    preamble = text[: body.start()]
    title, abstract = argument(preamble, "title"), argument(preamble, "Abstract") or argument(preamble, "abstract")
    front = [f"\\title{{{title}}}"] * bool(title) + [f"\\begin{{abstract}}\n{abstract}\n\\end{{abstract}}"] * bool(
        abstract
    )
    content = _without_settings(BIBLIOGRAPHY.sub("", body[1]))
    content = re.sub(r"\\begin\{(figure|table|center)\}(?:\[[^\]]*\])?\s*\\end\{\1\}", "", content)
    whole = tidy("\n\n".join([*front, content]))
    return whole if len(whole) >= SHORTEST_PAPER else ""


def argument(text: str, command: str) -> str:
    """What stands in the braces after the command, or "" where the command does not occur."""
    match = re.search(rf"\\{command}\s*(?=\{{)", text)
    return " ".join(text[match.end() + 1 : closing_brace(text, match.end())].split()) if match else ""


def closing_brace(text: str, start: int) -> int:
    """Place of the brace that closes the one at `start`; the end of the text where none does."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return len(text)


def _without_settings(text: str) -> str:
    """The text without commands of the page's layout and their arguments."""
    return _without(text, SETTINGS.pattern)


def _without(text: str, command: str) -> str:
    pieces, end = [], 0
    for match in re.finditer(command, text):
        if match.start() < end:  # within the arguments of one before
            continue
        pieces.append(text[end : match.start()])
        end = match.end()
        while match := OPTION.match(text, end):
            end = match.end()
        while match := ARGUMENT.match(text, end):
            end = closing_brace(text, match.end()) + 1
    return "".join(pieces) + text[end:]
