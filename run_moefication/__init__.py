"""Turning a dense LLaMA into a Mixture-of-Experts LLaMA: `moefy` for all stages, a function for each, their settings.

    import run_moefication as rm

    dense = rm.DenseCheckpoint("models/llama_7B")
    moe = rm.moefy(dense, "llama_data", "models/llama_7B-MoE")

The numbered scripts in this folder do the same from a shell. Heavy imports come with the first use of a name.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "moefication.stages.moefy": (
        *("moefy", "read_text", "split", "record_features", "fit_gates", "convert", "calibrate", "distill"),
    ),
    "moefication.stages.evaluate": ("evaluate",),
    "moefication.stages.export": ("export",),
    "moefication.stages.report": ("report",),
    "moefication.checkpoints.dense": ("DenseCheckpoint",),
    "moefication.checkpoints.moe": ("MoECheckpoint",),
    "moefication.errors": ("MoEficationError", "SettingError"),
    "settings": (
        *(
            "CALIBRATED",
            "ENGINE",
            "PLAIN",
            "Recipe",
            "CorpusSettings",
            "SplitSettings",
            "GraphSplitSettings",
            "FeatureSettings",
            "GateSettings",
        ),
        *("ConvertSettings", "CalibrateSettings", "DistillSettings", "ExportSettings", "ReportSettings"),
    ),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
