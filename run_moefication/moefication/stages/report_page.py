"""The page of a report: one HTML file with all that it needs, made of the report's numbers alone. Here are its frame
and its top; `report_sections` has the rest."""

from collections.abc import Mapping
from html import escape
from typing import Any

from . import report_sections as sections
from .report_html import GENERATOR, Numbers
from .report_style import STYLE


def page_of(numbers: Mapping[str, Any]) -> str:
    """The whole page."""
    n = Numbers(numbers)
    title = f"{escape(n['model']['dense'] or n['model']['moe'])} as a Mixture of Experts"
    parts = {
        "What they write": sections.spoken(n),
        "The dial: quality against work": sections.dial(n),
        "Layers": sections.layers(n),
        "Experts": sections.experts(n),
        "A passage, by what each token cost": sections.passages(n),
        "Two splits": sections.overlap(n),
        "How it was made": sections.made(n),
    }
    body = "\n".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in parts.items())
    # The policy has the browser refuse whatever a text or a name might smuggle in: no script, no request.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{GENERATOR}">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header><h1>{title}</h1>{summary(n)}</header>
<div class="tiles">{runs(n)}{costs(n)}{buys(n)}</div>
{body}
<footer>The JSON file beside this page has its numbers, and more of them. Made by {GENERATOR}.</footer>
</body>
</html>
"""


def summary(n: Numbers) -> str:
    """What was converted, in words."""
    model, show = n["model"], n.show
    cut = (
        f"Each of its {show('model', 'layers')} layers has an MLP of {show('model', 'neurons')} neurons, which was cut "
        f"into {show('model', 'num_experts')} experts of {show('model', 'expert_neurons')} neurons."
    )
    shared, too = "", ""
    if model["num_shared_experts"]:
        shared, too = f" Of these, {show('model', 'num_shared_experts')} run for every token.", ", these included"
    chosen = f"A gate runs {show('model', 'num_selects')} for each token{too}."
    if model["routing"] == "threshold":
        chosen = (
            f"A gate runs as many as reach a threshold, {show('model', 'num_selects')} on average over the text that "
            f"it was set on{too}."
        )
    done = {stage["stage"] for stage in n["stages"]}
    fitted = [word for stage, word in (("calibrate", "calibrated"), ("distill", "distilled")) if stage in done]
    then = f" Then it was {' and '.join(fitted)}." if fitted else ""
    return f"<p>{cut}{shared} {chosen}{then}</p>"


def runs(n: Numbers) -> str:
    """How much runs."""
    place = ("texts", 0, "rows", n["texts"][0]["own"], "active")
    share = n["texts"][0]["rows"][place[3]]["active"]
    own = n.show(*place, form=".1%")
    words = f"of the MLPs' parameters run for a token of {n.text(0)}, gates included. Attention runs as before."
    return _tile("How much runs", own, _bars(1.0, share, "100%", own), words)


def costs(n: Numbers) -> str:
    """What it costs in perplexity."""
    text = n["texts"][0]
    place = ("texts", 0, "rows", text["own"])
    own = n.show(*place, "perplexity", form=".2f")
    if text["dense_perplexity"] is None:
        return _tile(
            "What it costs", own, "", f"is the perplexity on {n.text(0)}.{n.left_out('dense', 'Not compared')}"
        )
    dense = n.show("texts", 0, "dense_perplexity", form=".2f")
    bars = _bars(text["dense_perplexity"], text["rows"][text["own"]]["perplexity"], dense, own)
    words = (
        f"the dense model's perplexity on {n.text(0)}. Both expect the same next token "
        f"{n.show(*place, 'agreement', form='.1%')} of the time."
    )
    return _tile("What it costs", f"×{n.show(*place, 'ratio', form='.3f')}", bars, words)


def buys(n: Numbers) -> str:
    """What it buys in time. A gain or loss is one only where every round says so."""
    if n["time"] is None:
        return _tile("What it buys in time", "not measured", "", n.left_out("dense", "Left out"))
    write = n["time"]["write"]
    seconds = {
        task: [f"{n.show('time', task, f'{which}_seconds', form='.2f')} s" for which in ("dense", "moe")]
        for task in n["time"]
    }
    bars = _bars(write["dense_seconds"], write["moe_seconds"], *seconds["write"])
    words = (
        f"To write {n.show('time', 'write', 'tokens')} tokens, one by one: {_verdict(n, 'write')}. To read "
        f"{n.show('time', 'read', 'tokens')} at once: {_verdict(n, 'read')}; {seconds['read'][0]} dense, "
        f"{seconds['read'][1]} MoE. Measured on this machine, in turn, {n.show('time', 'write', 'rounds')} times each."
    )
    big = "nothing" if _gain(write) == "nothing" else f"×{n.show('time', 'write', 'speedup', form='.2f')} speed"
    return _tile("What it buys in time", big, bars, words)


def _gain(times: Mapping[str, float]) -> str:
    return "faster" if times["least_speedup"] > 1 else "slower" if times["most_speedup"] < 1 else "nothing"


def _verdict(n: Numbers, task: str) -> str:
    """What a task gains, with the least and the most of all rounds."""
    middle, least, most = (n.show("time", task, f"{which}speedup", form=".2f") for which in ("", "least_", "most_"))
    gain = _gain(n["time"][task])
    if gain == "nothing":
        return f"it buys nothing ({least} to {most} times the dense model's speed)"
    return f"{gain}, {middle} times the dense model's speed ({least} to {most})"


def _tile(what: str, big: str, bars: str, words: str) -> str:
    return f'<div class="tile"><h2>{what}</h2><div class="big">{big}</div>{bars}<div class="small">{words}</div></div>'


def _bars(dense: float, moe: float, dense_text: str, moe_text: str) -> str:
    """Two bars, the longer one full."""
    rows = (("", "dense", dense, dense_text), (" moe", "MoE", moe, moe_text))
    return "".join(
        f'<div class="bar{kind}"><span>{name}</span>'
        f'<span><i style="width:{100 * value / max(dense, moe):.1f}%"></i></span><b>{text}</b></div>'
        for kind, name, value, text in rows
    )
