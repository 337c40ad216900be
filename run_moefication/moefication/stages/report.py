"""One page that shows what a conversion did: how much runs, what it costs and buys, and which experts do what.

The numbers come from the checkpoint's manifest, which tells of all stages, and from running the models on texts. The
page is one HTML file that needs nothing beside it; the same numbers lie beside it as JSON.
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_moe import LlamaMoEConfig

from ...settings import PROMPTS, ReportSettings
from ..artifacts.split import Split
from ..checkpoints.dense import DenseCheckpoint, resolve_model_path
from ..checkpoints.moe import StoredMoE, require_num_selects, verify_weights
from ..checkpoints.tokenizers import load_tokenizer
from ..errors import MoEficationError, SettingError
from ..names import model_name
from ..storage.artifact import open_finished
from ..storage.files import parse_json_object, write_atomically, write_json
from ..storage.manifest import MANIFEST, MOE_STAGES
from ..text.corpus import require_block_size
from . import report_measure as measure
from . import report_numbers as numbers_of
from .evaluate import blocks_of, load_model, read_config, same_tokens, tokens_digest
from .report_html import GENERATOR

FORMAT = f"{GENERATOR} 1"
# What the beginnings of pages, and of files of their numbers, have in them.
MARKS = (f'<meta name="generator" content="{GENERATOR}">', f'"format": "{GENERATOR} ')


@dataclass(frozen=True)
class Report:
    """A page that is there: its file, that of its numbers beside it, and these."""

    page: Path
    json: Path
    numbers: dict[str, Any]
    was_finished: bool  # there was nothing to do


def report(
    moe_path: str | Path,
    text_paths: Sequence[str | Path],
    save_path: str | Path,
    settings: ReportSettings | None = None,
    *,
    dense_path: str | Path | None = None,
    split_paths: Sequence[str | Path] = (),
    evaluation_path: str | Path | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> Report:
    """Measure a LlamaMoE checkpoint, and write a page `save_path` (.html) about it, and a JSON file beside it.

    What needs the dense model or the manifest is left out without them, and the page says so. Memory: both models.

    Args:
        moe_path: a LlamaMoE checkpoint, or a hub id.
        text_paths: of text that nothing was fitted to; the first is the one that the top of the page speaks of.
        dense_path: the dense model that it was made of.
        split_paths: two splits of that model, to compare.
        evaluation_path: what llama_evaluate.py --json wrote of both models: its text is not evaluated again.

    Raises:
        MoEficationError: a path is not what it should be, before anything is measured; or `save_path` is not ours.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MoEficationError(
            "the report needs the package matplotlib: pip install -e '.[quickstart]' -c constraints.txt"
        )
    from . import report_page  # which imports it

    place = _Place(Path(save_path))
    inputs = _Inputs(moe_path, text_paths, settings or ReportSettings(), dense_path, split_paths, evaluation_path)
    finished = place.finished(inputs.made_from, overwrite)
    if finished:
        return Report(place.page, place.json, finished, True)
    numbers = {"format": FORMAT, "made_from": inputs.made_from} | _gather(inputs, device)
    html = report_page.page_of(numbers).encode()
    place.json.unlink(missing_ok=True)  # it says of what the page is, so it goes before that, and comes after
    write_atomically(place.page, lambda file: file.write(html))
    write_json(place.json, numbers)
    return Report(place.page, place.json, numbers, False)


class _Place:
    """Where the page goes: refused if something lies there that no report has written."""

    def __init__(self, page: Path):
        if page.suffix != ".html":
            raise SettingError(f"save_path {page} is to be the name of a page: let it end in .html")
        self.page, self.json = page, page.with_suffix(".json")
        nearest = next(parent for parent in page.absolute().parents if parent.exists())
        if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            raise SettingError(f"save_path {page} cannot be written: {nearest} is no folder to write to")
        for file in (self.page, self.json):
            if (file.exists() or file.is_symlink()) and not self._is_ours(file):
                raise SettingError(
                    f"{file} is in the way, and no report of ours: move it away, or choose another save_path"
                )

    def _is_ours(self, file: Path) -> bool:
        if not file.is_file():
            return False
        with file.open("rb") as content:
            beginning = content.read(1000)
        return any(mark.encode() in beginning for mark in MARKS)

    def finished(self, made_from: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
        """The numbers of a page that is there already, made from the same; one made from others is refused."""
        if overwrite or not self.page.exists() or not self.json.exists():
            return None
        numbers = parse_json_object(self.json, "add overwrite to make it anew")
        if numbers.get("made_from") != made_from:
            raise SettingError(f"{self.page} was made of other models, texts or settings: add overwrite to redo it")
        return numbers


class _Inputs:
    """What a report is made from, checked before a weight is read."""

    def __init__(
        self,
        moe_path: str | Path,
        text_paths: Sequence[str | Path],
        settings: ReportSettings,
        dense_path: str | Path | None,
        split_paths: Sequence[str | Path],
        evaluation_path: str | Path | None,
    ):
        self.settings, self.moe = settings, resolve_model_path(moe_path)
        self.names = {"moe": model_name(moe_path)}
        self.config = read_config(self.moe)
        if not isinstance(self.config, LlamaMoEConfig):
            raise SettingError(f"model_path {moe_path} is a {self.config.model_type} model, not a LlamaMoE")
        self.artifact = open_finished(self.moe, *MOE_STAGES) if (self.moe / MANIFEST).exists() else None
        self.dense = DenseCheckpoint(str(dense_path)) if dense_path else None
        if self.dense:
            self.names["dense"] = self.dense.name
            if self.artifact:
                self.artifact.require_source(self.dense.fingerprint, self.dense.name)
        self.splits = self._splits(split_paths)
        if settings.layer is not None and not 0 <= settings.layer < self.config.num_hidden_layers:
            raise SettingError(f"layer {settings.layer} is outside of 0 to {self.config.num_hidden_layers - 1}")
        for budget in settings.num_selects or ():
            require_num_selects(budget, self.config)
        self._evaluation = measure.read_evaluation(Path(evaluation_path) if evaluation_path else None)
        self.texts = self._texts([Path(path) for path in text_paths])
        self.known = self._known()
        if evaluation_path and not self.known:
            what = f"{self.names['moe']} at {self.config.num_selects} experts, after the dense model, on these texts"
            raise SettingError(f"evaluation_path {evaluation_path} has no rows of {what}")

    def _splits(self, paths: Sequence[str | Path]) -> list[Split]:
        if not paths:
            return []
        if len(paths) != 2:
            raise SettingError(f"split_file_path names {len(paths)} splits: two are compared")
        if self.dense is None:
            raise SettingError("split_file_path needs dense_path, the model that both splits are of")
        artifacts = [open_finished(path, "split") for path in paths]
        return [
            Split(artifact.folder, self.dense, artifact.options["templates"][0], artifact.options["num_experts"])
            for artifact in artifacts
        ]

    def _texts(self, paths: list[Path]) -> dict[str, measure.Blocks]:
        """Blocks of each text, by its name: as many tokens as the settings say, or as the evaluation of it has read."""
        if not paths:
            raise SettingError("text_path names no text")
        models = [(self.dense.path, self.dense.config)] if self.dense else []
        folders, configs = zip(*models, (self.moe, self.config), strict=True)
        positions = min(config.max_position_embeddings for config in configs)
        block_size = require_block_size(self.settings.block_size, positions, "the smallest model")
        texts: dict[str, measure.Blocks] = {}
        for path in paths:
            if not path.is_file():
                raise SettingError(f"text_path {path} is not a file")
            if path.stem in texts:
                raise SettingError(f"text_path names two texts {path.stem}: rename one")
            # An evaluation says how many blocks it has read, and how many tokens of these it predicted.
            evaluated = [row["predicted_tokens"] + row["blocks"] for row in self._evaluation[:1]]
            for max_tokens in (*evaluated, self.settings.max_tokens):
                blocks = blocks_of(path, same_tokens(path, [*folders], [*configs], max_tokens), block_size)
                texts[path.stem] = blocks
                if self._evaluation and tokens_digest(blocks) == self._evaluation[0]["tokens_sha256"]:
                    break
        return texts

    def _known(self) -> dict[str, list[measure.Row]]:
        """Rows of the evaluation, by text."""
        names = (self.names.get("dense"), self.names["moe"], self.config.num_selects)
        rows = {
            text: measure.known_rows(self._evaluation, tokens_digest(blocks), *names)
            for text, blocks in self.texts.items()
        }
        return {text: found for text, found in rows.items() if found}

    @property
    def made_from(self) -> dict[str, Any]:
        """What a page is made from: another page of the same is not made again."""
        return {
            "moe": self.artifact.digest if self.artifact else StoredMoE(self.moe).hashed(self.config.to_dict()),
            "dense": self.dense.fingerprint if self.dense else None,
            "texts": {name: tokens_digest(blocks) for name, blocks in self.texts.items()},
            "splits": [split.artifact.digest for split in self.splits],
            "settings": self.settings.recorded(),
        }


def _gather(inputs: _Inputs, device: str) -> dict[str, Any]:
    """All numbers of a report, and by section why what is missing was left out."""
    verify_weights(inputs.moe)
    settings, config, left_out = inputs.settings, inputs.config, {}
    models = {"moe": load_model(inputs.moe, config, settings.dtype, device)}
    if inputs.dense:
        models["dense"] = load_model(inputs.dense.path, inputs.dense.config, settings.dtype, device)
    tokenizer = load_tokenizer(inputs.moe)
    how = dict(max_tokens=settings.max_tokens, batch_size=settings.batch_size)
    measured = measure.Measured(models, inputs.names, inputs.texts, inputs.known, **how)
    own = measured.own
    numbers = {
        "model": numbers_of.model_numbers(inputs.names.get("dense"), inputs.names["moe"], config, own),
        "experts": numbers_of.routing_numbers(measured.routings, config, settings.layer),
        "passages": _passages(inputs, measured.routings, tokenizer),
        "time": None,
        "spoken": measure.continued(models, tokenizer, settings.prompts or PROMPTS, settings.new_tokens),
    }
    if inputs.dense:
        first_text = next(iter(inputs.texts.values()))
        numbers["time"] = measure.time_both(models, first_text[0], settings.rounds)
    else:
        left_out["dense"] = "no dense model was given (--dense_path)"
    if len(inputs.texts) == 1:
        left_out["domains"] = "only one text was given"
    if numbers["experts"]["least_neurons"] == numbers["experts"]["most_neurons"]:
        left_out["costs"] = "every token runs as many neurons as any other"
    _turn_the_dial(measured, inputs, left_out)
    numbers["texts"] = [numbers_of.text_numbers(name, rows, own) for name, rows in measured.rows.items()]
    history = inputs.artifact.history if inputs.artifact else []
    numbers |= numbers_of.told_numbers(history, config.num_hidden_layers, left_out)
    numbers["overlap"] = numbers_of.overlap_numbers(inputs.splits, config.num_hidden_layers) if inputs.splits else None
    if not inputs.splits:
        left_out["overlap"] = "no two splits were given (--split_file_path)"
    return numbers | {"machine": numbers_of.machine(device), "left_out": left_out}


def _turn_the_dial(measured: measure.Measured, inputs: _Inputs, left_out: dict[str, str]) -> None:
    """Measure the other budgets: those asked for, or of the usual ones those that the model can run."""
    config, asked = inputs.config, inputs.settings.num_selects
    total = config.num_experts + config.num_shared_experts
    least, most = max(1, config.min_experts_per_tok), config.max_routed_experts
    usual = (total, 3 * total // 4, total // 2, -(-total // 4))
    usual = [budget for budget in usual if least <= budget - config.num_shared_experts <= most]
    try:
        for budget in dict.fromkeys(asked or usual):
            if budget != measured.own:
                measured.run_at(budget)
    except SettingError as error:  # its thresholds have no quantiles
        if asked:
            raise
        left_out["dial"] = str(error)


def _passages(inputs: _Inputs, routings: list[measure.Routing], tokenizer: Any) -> dict[str, Any]:
    """The beginning of each text, piece by piece, with the share of the neurons that each piece ran; least and most."""
    texts = []
    for (name, blocks), routing in zip(inputs.texts.items(), routings, strict=True):
        tokens = blocks[0][: inputs.settings.passage_tokens].tolist()
        costs = numbers_of.neurons_per_token(routing.counts[: len(tokens)], inputs.config).tolist()
        texts.append({"text": name, "pieces": numbers_of.passage(tokenizer, tokens, costs)})
    costs = [cost for text in texts for _, cost in text["pieces"]]
    return {"least": min(costs), "most": max(costs), "texts": texts}
