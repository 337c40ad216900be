"""The sections of a report's page, each made of the report's numbers; what is missing says why."""

from html import escape

from . import report_figures as figures
from .report_html import Numbers, details, figure, names_and_values, table
from .report_style import LEVELS

STAGE_NAMES = {
    "split": "1 split",
    "hidden_features": "2 hidden features",
    "select": "3 select",
    "convert": "4 convert",
    "calibrate": "5 calibrate",
    "distill": "6 distil",
}
ROW_FORMS = {"num_selects": ",", "active": ".1%", "perplexity": ".3f", "ratio": ".4f", "agreement": ".1%"}
# Columns of the table by layer: where they stand, and their formats.
LAYER_COLUMNS = {
    "error before": ("errors", "error_before"),
    "error after": ("errors", "error_after"),
    "recall": ("gates", "recall"),
    "of a constant": ("gates", "constant_recall"),
    "mass recall": ("gates", "mass_recall"),
    "of a constant choice": ("gates", "constant_mass_recall"),
}


def spoken(n: Numbers) -> str:
    """What the models write after the same beginnings."""
    models = [key for key in ("dense", "moe") if key in n["spoken"][0]]
    cards = "".join(
        f'<div class="tile"><h3>{escape(row["prompt"])} …</h3>'
        + "".join(f"<p><small>{'MoE' if key == 'moe' else key}</small> {escape(row[key])}</p>" for key in models)
        + "</div>"
        for row in n["spoken"]
    )
    alone = "" if len(models) > 1 else n.left_out("dense", "The dense model's text is left out")
    words = (
        "Each goes on with the most likely token, one after the other, without a template for chats. A bad sign: loops "
        "that the dense model has not, or words that are none."
    )
    return f'<p class="small">{words}</p>{alone}<div class="tiles">{cards}</div>'


def dial(n: Numbers) -> str:
    """Perplexity at several budgets."""
    rows, strong = [], []
    for i, text in enumerate(n["texts"]):
        dense = n.show("texts", i, "dense_perplexity", form=".3f")
        rows.append([escape(text["name"]), "dense", "", dense, "", "", n.show("texts", i, "tokens")])
        for j in range(len(text["rows"])):
            strong += [len(rows)] if j == text["own"] else []
            cells = [n.show("texts", i, "rows", j, key, form=form) for key, form in ROW_FORMS.items()]
            rows.append(["", *cells, ""])
    head = ["text", "experts", "active", "perplexity", "ratio", "agreement", "tokens"]
    see = (
        "The model can be told to run more experts, or fewer. A line is a text; the ring is the model as it is stored. "
        "To the right is more work, below is better."
    )
    bad = (
        "one text far above the others, whose kind the conversion has hurt; or a line that falls steeply at the ring, "
        "where a little more work would buy much."
    )
    drawn = figure(figures.dial(n.all), see, bad, details("The numbers", table(head, rows, strong)))
    return drawn + (n.left_out("dial", "Other budgets are left out") if "dial" in n["left_out"] else "")


def layers(n: Numbers) -> str:
    """Errors, shares and gates by layer."""
    parts = [_errors(n), _ran(n), _gates(n)]
    has = {"errors": n["errors"], "gates": n["gates"]}
    columns = {name: place for name, place in LAYER_COLUMNS.items() if has[place[0]]}
    rows = [
        [str(layer), n.show("experts", "ran_by_layer", layer, form=".1%")]
        + [n.show(group, layer, key, form=".4f") for group, key in columns.values()]
        for layer in range(n["model"]["layers"])
    ]
    numbers = details("The numbers by layer", table(["layer", "neurons that ran", *columns], rows))
    return f'<div class="figures">{"".join(parts)}</div>{numbers}'


def _errors(n: Numbers) -> str:
    if not n["errors"]:
        return n.left_out("errors", "The error of each layer is left out")
    lines = {"before": "error_before", "after calibration": "error_after"}
    lines = {name: [row[key] for row in n["errors"]] for name, key in lines.items()}
    see = (
        "What a layer's output lacks of the dense model's, as a share of its square, on text that it was not fitted "
        "to. The gap between the lines is what calibration repaired."
    )
    bad = "lines that coincide, since then nothing was repaired; or a layer far above its neighbours."
    return figure(figures.lines("errors", "Error of each layer", lines, "error of the output"), see, bad)


def _ran(n: Numbers) -> str:
    lines = {"runs": [100 * share for share in n["experts"]["ran_by_layer"]]}
    svg = figures.lines("ran", "Share of the neurons that ran, by layer", lines, "neurons that ran, %")
    see = "The share of each layer's neurons that ran on these texts, shared experts included."
    if n["model"]["routing"] == "top_k":
        return figure(svg, see, "a line that is not flat: every token runs as many experts, in every layer.")
    return figure(svg, see, "a layer far off the others: its threshold was set on text unlike these.")


def _gates(n: Numbers) -> str:
    if not n["gates"]:
        return n.left_out("gates", "The quality of the gates is left out")
    keys = {"mass recall": "mass_recall", "recall": "recall"}
    keys |= {"mass recall, constant": "constant_mass_recall", "recall, constant": "constant_recall"}
    lines = {name: [row[key] for row in n["gates"]] for name, key in keys.items()}
    svg = figures.lines("gates", "Quality of the gates, by layer", lines, "of the best choice", [*lines][2:])
    see = (
        "Of the experts that a token needs most, the share that the gates of stage 3 find (recall), and the share of "
        "these experts' weight (mass recall). Dashed: the same experts for all tokens, the best on average."
    )
    return figure(svg, see, "a line near its dashed one: such a gate knows no more than a constant.")


def experts(n: Numbers) -> str:
    """What the experts do."""
    never = f"Of all, {n.show('experts', 'never')} never ran on these {n.show('experts', 'tokens')} tokens."
    load = figure(
        figures.load(n.all),
        f"A row is a layer, a cell one of its routed experts, from the most used one to the least used one. {never}",
        "a strong left edge with nothing beside it, where few experts do all the work; experts that hardly run.",
    )
    if "domains" in n["left_out"]:
        domains = n.left_out("domains", "Load by text is left out")
    else:
        domains = figure(
            figures.load_by_text(n.all),
            "Experts that run more (blue) or less (orange) on a text than they do on average over the texts.",
            "hardly any colour (see the scale): the gates make no difference between kinds of text.",
        )
    together = figure(
        figures.together(n.all),
        "Blue: two experts run for the same tokens more often than by chance; orange: less often. Those that run "
        "together are neighbours; what never ran, or always, is blank.",
        "blue all over: then gates decide how much runs for a token, and hardly what.",
    )
    least, most = (n.show("experts", f"{end}_neurons", form=".1%") for end in ("least", "most"))
    if "costs" in n["left_out"]:
        cost = n.left_out("costs", "Tokens by cost are left out")
    else:
        cost = figure(
            figures.tokens_by_cost(n.all),
            f"Tokens differ in what they cost: {least} of the neurons the cheapest, {most} the dearest.",
            "a heap at either end, or two far apart: thresholds that do not suit these texts.",
        )
    return f'<div class="figures">{load}{together}{domains}{cost}</div>'


def passages(n: Numbers) -> str:
    """The beginnings of the texts, coloured by cost."""
    texts, least, most = (n["passages"][name] for name in ("texts", "least", "most"))
    if "costs" in n["left_out"]:
        return n.left_out("costs")
    ends = [n.show("passages", end, form=".0%") for end in ("least", "most")]
    scale = "".join(f'<span class="c{level}"></span>' for level in range(LEVELS))
    words = (
        "<p>The stronger the colour, the more neurons ran for a token: "
        f'<span class="scale">{ends[0]}<i>{scale}</i>{ends[1]}</span> of all, the mean over the layers. '
        "<b>A bad sign:</b> one colour all over, or colours that follow the place in the text instead of its words.</p>"
    )
    shown = []
    for i, one in enumerate(texts):
        levels = (min(LEVELS - 1, int(LEVELS * (cost - least) / (most - least))) for _, cost in one["pieces"])
        spans = (
            f'<span class="c{level}" title="{cost:.1%}">{escape(piece)}</span>'
            for level, (piece, cost) in zip(levels, one["pieces"], strict=True)
        )
        mean = n.show("experts", "neurons_by_text", i, form=".1%")
        head = f"<h3>{escape(one['text'])}, {mean} of the neurons on average</h3>"
        shown.append(f'<div>{head}<div class="passage">{"".join(spans)}</div></div>')
    rest = details("The other texts", f'<div class="figures">{"".join(shown[1:])}</div>') if shown[1:] else ""
    return words + shown[0] + rest


def overlap(n: Numbers) -> str:
    """How far two splits agree."""
    if not n["overlap"]:
        return n.left_out("overlap")
    together = n["overlap"]["together"]
    lines = {"together in both": [100 * share for share in together]}
    lines["at random"] = [100 * n["overlap"]["at_random"]] * len(together)
    svg = figures.lines("overlap", "How far two splits agree, by layer", lines, "pairs of neurons, %", ["at random"])
    first, second = map(escape, n["overlap"]["splits"])
    see = (
        f"Of two neurons that share an expert in {first}, how often they do in {second}. At random: "
        f"{n.show('overlap', 'at_random', form='.2%')}."
    )
    rows = [[str(layer), n.show("overlap", "together", layer, form=".2%")] for layer in range(len(together))]
    numbers = details("The numbers", table(["layer", "together in both"], rows))
    return figure(svg, see, "lines that coincide: the two ways to split have nothing in common.", numbers)


def made(n: Numbers) -> str:
    """Stages, settings and machine."""
    of = n["machine"]
    machine = names_and_values({name: value for name, value in of.items() if name != "versions"} | of["versions"])
    machine = f"<h3>The machine that measured this page</h3>{machine}"
    if not n["stages"]:
        return n.left_out("stages", "The stages are left out") + machine
    rows, settings = [], ""
    for i, stage in enumerate(n["stages"]):
        name = escape(STAGE_NAMES.get(stage["stage"], stage["stage"]))
        rows.append([name, n.show("stages", i, "minutes", form=".1f"), n.show("stages", i, "tokens")])
        versions = ", ".join(f"{key} {value}" for key, value in stage["environment"].items())
        settings += f"<h3>{name}</h3>{names_and_values(stage['options'] | {'made with': versions})}"
    words = (
        "Minutes of all processes together; of a distillation that was interrupted, those since its last start. A "
        "dash: the manifest does not say."
    )
    stages = table(["stage", "minutes", "tokens read"], rows)
    return f'{stages}<p class="small">{words}</p>{details("Settings of the stages", settings)}{machine}'
