"""What the parts of a report's page are put together from. Every number among them says where it stands in the report's
JSON: `<data data-of="texts/0/tokens" data-as=",">4,088</data>`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

GENERATOR = "LLaMA-MoEfication report"


class Numbers:
    """The numbers of a report, and how the page writes them."""

    def __init__(self, numbers: Mapping[str, Any]):
        self.all = numbers

    def __getitem__(self, name: str) -> Any:
        return self.all[name]

    def show(self, *place: str | int, form: str = ",") -> str:
        """The number at a place, in a format; a dash where there is none."""
        value: Any = self.all
        for step in place:
            value = value[step]
        if value is None:
            return "–"
        path = "/".join(map(str, place))
        return f'<data value="{value}" data-of="{path}" data-as="{form}">{value:{form}}</data>'

    def text(self, index: int) -> str:
        """The name of a text, and how many tokens of it were predicted."""
        return f"{escape(self['texts'][index]['name'])} ({self.show('texts', index, 'tokens')} tokens)"

    def left_out(self, section: str, what: str = "Left out") -> str:
        """A line in the place of what is missing, that says why."""
        return f'<p class="left-out">{what}: {escape(self["left_out"][section])}.</p>'


def figure(svg: str, see: str, bad: str, more: str = "") -> str:
    """A figure, with what to see in it and what would be a bad sign."""
    return f"<figure>{svg}<figcaption>{see} <b>A bad sign:</b> {bad}</figcaption>{more}</figure>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], strong: Sequence[int] = ()) -> str:
    """A table that scrolls by itself where it is too wide; `strong`: numbers of rows that stand out."""
    columns = "".join(f"<th>{name}</th>" for name in head)
    lines = "".join(
        f"<tr{' class=own' if number in strong else ''}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for number, row in enumerate(rows)
    )
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def details(what: str, content: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{what}</summary>{content}</details>"


def names_and_values(values: Mapping[str, Any]) -> str:
    """Settings and the like, below each other."""
    items = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(value if isinstance(value, str) else json.dumps(value))}</dd>"
        for name, value in values.items()
    )
    return f"<dl>{items}</dl>"
