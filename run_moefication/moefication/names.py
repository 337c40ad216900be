"""What models and the folders of stages 1 to 3 are called; free of torch, since the shell scripts ask, too."""

from pathlib import Path


def model_name(model_path: str | Path) -> str:
    """The last part of a checkpoint's path or hub id."""
    name = Path(model_path).name
    return Path(model_path).resolve().name if name in ("", "..") else name


def split_folder(save_path: str | Path, model_name: str, num_experts: int, method: str) -> Path:
    """`SAVE/NAME-8Expert-Split-Clustering`; or `-Split-Graph` or `-Split-Random`, as the method is called"""
    return Path(save_path) / f"{model_name}-{num_experts}Expert-Split-{method}"


def features_folder(save_path: str | Path, model_name: str) -> Path:
    """`SAVE/NAME-Hidden-Features`"""
    return Path(save_path) / f"{model_name}-Hidden-Features"


def select_folder(save_path: str | Path, model_name: str, num_experts: int) -> Path:
    """`SAVE/NAME-8Expert-Select-MLP`"""
    return Path(save_path) / f"{model_name}-{num_experts}Expert-Select-MLP"
