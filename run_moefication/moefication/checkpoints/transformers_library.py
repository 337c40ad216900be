"""What every call into transformers shares: few words while it loads what is checked here, and its errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import logging

from ..progress import Progress

# transformers raises these for a wrong config, beside the errors of files; the last comes from validated fields.
CONFIG_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError),
    StrictDataclassError,
)
# These fields of config.json change what a model returns or how it computes it, not its logits.
STEERING_FIELDS = {
    *("return_dict", "use_return_dict", "output_attentions", "output_hidden_states"),
    *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
}


def plain_config(raw: dict[str, Any]) -> PreTrainedConfig:
    """The config in a config.json, without the fields that steer the library. Raises ValueError for unknown types."""
    if raw.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"transformers knows no model_type {raw.get('model_type')!r}")
    fields = {name: value for name, value in raw.items() if name not in STEERING_FIELDS}
    with quiet_transformers():
        return CONFIG_MAPPING[raw["model_type"]].from_dict(fields)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the reports of transformers while something that is checked here is loaded; its bars become ours."""
    verbosity, hook = logging.get_verbosity(), logging.set_tqdm_hook(_bar_of_ours)
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.set_tqdm_hook(hook)


def _bar_of_ours(_: Any, items: tuple[Any, ...], options: dict[str, Any]) -> Progress:
    """What transformers would show by a tqdm of its own; a bar goes when it is done, since most loads are short."""
    return Progress(*items, **({"unit": "tensor", "leave": False} | options))


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


def last_line(error: BaseException) -> str:
    """The last line, where the validators of configs put the reason."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
