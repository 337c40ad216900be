"""What every call into transformers shares: silence while something that is checked here is loaded, and its errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import logging

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
    """Silences the reports and bars of transformers while something that is checked here is loaded."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


def last_line(error: BaseException) -> str:
    """The last line, where the validators of configs put the reason."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
