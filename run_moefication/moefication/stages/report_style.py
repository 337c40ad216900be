"""The style sheet of a report: for a phone first, wider screens, the dark, and A4."""

from .report_figures import HIGH

# Of page, cards, text, second text, lines, accent, and the lines of figures; text has a contrast of 4.5 at least.
LIGHT = {
    "page": "#ffffff",
    "card": "#f5f7f9",
    "ink": "#1b1f24",
    "muted": "#57606a",
    "line": "#d0d7de",
    "accent": "#0860b8",
    "s": ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#0b7285", "#7d4e00", "#57606a"),
}
DARK = {
    "page": "#14181d",
    "card": "#1d2329",
    "ink": "#e6edf3",
    "muted": "#9ea9b5",
    "line": "#3a444e",
    "accent": "#79b8ff",
    "s": ("#58a6ff", "#f0883e", "#3fb950", "#bc8cff", "#f778ba", "#39c5cf", "#d4a72c", "#9ea9b5"),
}
LEVELS = 8  # of the colours of a passage
MOST_OPAQUE = 0.6  # so that text on it stays legible, in the dark too


def _variables(colours: dict) -> str:
    single = {name: value for name, value in colours.items() if name != "s"}
    series = {f"s{number}": value for number, value in enumerate(colours["s"], start=1)}
    return "".join(f"--{name}:{value};" for name, value in (single | series).items())


def _levels() -> str:
    red, green, blue = HIGH
    opacities = [MOST_OPAQUE * level / (LEVELS - 1) for level in range(LEVELS)]
    return "\n".join(f".c{n}{{background:rgba({red},{green},{blue},{a:.2f})}}" for n, a in enumerate(opacities))


STYLE = f"""
:root{{color-scheme:light dark;{_variables(LIGHT)}}}
@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;padding:1rem;max-width:70rem;background:var(--page);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}}
h1{{font-size:1.6rem;line-height:1.2;margin:.5rem 0}}
h2{{font-size:1.25rem;margin:2.2rem 0 .5rem;padding-top:.6rem;border-top:1px solid var(--line)}}
h3{{font-size:1rem;margin:0 0 .3rem}}
p{{margin:.4rem 0;max-width:44rem}}
.small,figcaption,.left-out,footer{{font-size:.875rem;color:var(--muted)}}
.left-out{{border-left:3px solid var(--line);padding-left:.7rem}}
.tiles,.figures{{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr))}}
.figures{{grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.5rem 2rem}}
.tile{{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.8rem 1rem}}
.tile h2{{font-size:.95rem;margin:0;padding:0;border:0;color:var(--muted);font-weight:600}}
.big{{font-size:1.9rem;line-height:1.25;font-weight:650;margin:.1rem 0 .3rem}}
.bar{{display:grid;grid-template-columns:2.8rem 1fr 4.2rem;gap:.5rem;align-items:center;font-size:.8125rem}}
.bar i{{display:block;height:.6rem;border-radius:.15rem;background:var(--muted)}}
.bar.moe i{{background:var(--s1)}}
.bar b{{font-weight:400;text-align:right;font-variant-numeric:tabular-nums}}
figure{{margin:0;break-inside:avoid;min-width:0}}
figure svg{{display:block;width:100%;max-width:34rem;height:auto}}
figure svg image{{image-rendering:pixelated}}
figcaption{{margin:.3rem 0 .2rem;max-width:34rem}}
figcaption b{{color:var(--ink)}}
.wide{{overflow-x:auto;max-width:100%}}
table{{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;margin:.4rem 0}}
th,td{{text-align:right;padding:.2rem .6rem .2rem 0;border-bottom:1px solid var(--line);vertical-align:top}}
th:first-child,td:first-child{{text-align:left}}
th{{font-weight:600;color:var(--muted);overflow-wrap:normal}}
td{{white-space:nowrap}}
tr.own td{{font-weight:650}}
.passage{{font-size:.95rem;line-height:1.75;white-space:pre-wrap;background:var(--card);border:1px solid var(--line);
 border-radius:.5rem;padding:.7rem .9rem;margin:.3rem 0;max-width:44rem}}
.passage span{{padding:.1em 0}}
.scale{{white-space:nowrap}}
.scale i{{display:inline-flex;vertical-align:-.1em;margin:0 .3rem;border:1px solid var(--line)}}
.scale i span{{width:1.1rem;height:.9rem}}
.tile small{{display:inline-block;min-width:2.8rem;color:var(--muted)}}
details{{margin:.3rem 0}}
summary{{cursor:pointer;color:var(--accent);font-size:.875rem}}
dl{{display:grid;grid-template-columns:minmax(6rem,auto) 1fr;gap:.1rem .8rem;font-size:.875rem;margin:.3rem 0}}
dt{{color:var(--muted)}} dd{{margin:0}}
footer{{margin-top:2.5rem;border-top:1px solid var(--line);padding-top:.6rem}}
svg *{{stroke-linejoin:round;stroke-linecap:butt}}
{_levels()}
@page{{size:A4;margin:14mm}}
@media print{{
 body{{padding:0;font-size:10.5pt;max-width:none}}
 *{{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
 .figures{{grid-template-columns:1fr 1fr;gap:1rem 1.2rem}}
 .tiles{{grid-template-columns:1fr 1fr 1fr;gap:.7rem}}
 .tile,.passage,tr{{break-inside:avoid}}
 h2{{break-after:avoid}}
}}
"""
