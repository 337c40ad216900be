"""How far the layers of a model in training are from those of its teacher.

Axes: B blocks of a batch, N positions, T tokens, H hidden size.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from .ridge import token_weights


@dataclass
class LayerOutputs:
    """Of each layer, first to last: what its MLP adds to the residual stream, and the stream then; `[B, N, H]` each."""

    mlps: list[torch.Tensor] = field(default_factory=list)
    streams: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def recorded_layers(model: PreTrainedModel) -> Iterator[LayerOutputs]:
    """Within the context, which is for one forward pass of a causal LM, the outputs of its layers are kept."""
    outputs = LayerOutputs()
    with ExitStack() as hooks:
        for layer in model.model.layers:
            hooks.enter_context(layer.mlp.register_forward_hook(lambda _, __, output: outputs.mlps.append(output)))
            hooks.enter_context(layer.register_forward_hook(lambda _, __, output: outputs.streams.append(output)))
        yield outputs


def clone_loss(student: LayerOutputs, teacher: LayerOutputs, kept: torch.Tensor) -> torch.Tensor:
    """The error of the MLPs' outputs plus that of the streams, each relative to the teacher's, on average over layers.

    Of a low-rank clone most is lost without such a loss, and the MLPs' part of it weighs most (LRC, Hao et al. 2025,
    arXiv 2505.12781, section 3.2). Tokens are weighed by the stream, as in the calibration, so that massive activations
    own neither sum, not even in the layer whose MLP makes them.

    Memory: beside what training keeps anyway, for each of the T tokens that `kept [B, N]` says are text and each layer,
    8 * H numbers of the two models' outputs and their differences, in float32 and, of the outputs, the models' dtypes.
    """
    errors = []
    for mlp, stream, mlp_target, target in zip(*vars(student).values(), *vars(teacher).values(), strict=True):
        mlp, stream, mlp_target, target = (tensor[kept].float() for tensor in (mlp, stream, mlp_target, target))
        # The larger of the two: a massive activation of one model alone is beyond repair, and must not own the sum.
        weights = token_weights(torch.maximum(stream.detach().square().sum(1), target.square().sum(1)))
        errors += [_relative_error(mlp, mlp_target, weights), _relative_error(stream, target, weights)]
    return torch.stack(errors).sum() / len(student.streams)


def _relative_error(found: torch.Tensor, expected: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_t w_t |found_t - expected_t|^2 over sum_t w_t |expected_t|^2, of float32 `[T, H]` twice and `[T]`."""
    # No product of matrices, which autocast would round.
    error, whole = ((weights * rows.square().sum(1)).sum() for rows in (found - expected, expected))
    return torch.where(whole > 0, error / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0)
