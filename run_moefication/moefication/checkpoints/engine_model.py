"""A LlamaMoE checkpoint as engines for other MoE architectures can hold one.

They run a fixed number of experts for every token and choose them by a score and a bias. Threshold routing becomes that
by zero experts: they compute nothing, and their bias is the threshold, so that they take the places of those of the
`experts_per_tok` best that do not reach it. The result is exact, but every token costs `experts_per_tok` experts.

Axes: E experts (routed ones, then zero experts), W width of one, H hidden size.
"""

import torch

from llama_moe import LlamaMoEConfig

from ..errors import MoEficationError, SettingError
from .moe import StoredMoE

WITHOUT_OUTPUT_BIAS = "OUTPUT_BIAS= bash run_moefication/5_calibrate.sh, or RECIPE=engine from the start"


class EngineModel:
    """The tensors of a checkpoint, refused if no engine can compute what it does.

    Args:
        moe: the checkpoint.
        max_selects: experts that a token runs at most, shared ones included, where it routes by threshold; None for
            the checkpoint's own bound.

    Attributes:
        reference: the config of the LlamaMoE that computes the same.
        experts_per_tok: experts that are chosen for each token, zero experts included.
        num_experts, num_zero_experts: of a layer; the latter are among the former.
        num_shared_experts: at least one, which computes nothing where the checkpoint has none: llama.cpp computes
            something else for `glm4moe` without any, and transformers builds an MLP of no width.
        has_selection_bias: whether experts are chosen by more than a product with the hidden state.
    """

    def __init__(self, moe: StoredMoE, max_selects: int | None = None):
        self.moe, self.reference = moe, _reference(moe, max_selects)
        config = self.reference
        is_threshold = config.routing == "threshold"
        self.experts_per_tok = config.max_routed_experts if is_threshold else config.num_experts_per_tok
        # So many of the best experts run whatever their score.
        self.num_zero_experts = self.experts_per_tok - config.min_experts_per_tok if is_threshold else 0
        self.num_experts = config.num_experts + self.num_zero_experts
        self.num_shared_experts = max(1, config.num_shared_experts)
        self.has_selection_bias = config.gate_bias or is_threshold

    def router(self, layer: int) -> torch.Tensor:
        """The gate as one matrix, float32 `[E, H]`."""
        if self.reference.gate_rank is None:
            weight = self._gate(layer, "weight").float()
        else:
            weight = (self._gate(layer, "output_weight").double() @ self._gate(layer, "input_weight").double()).float()
        return self._with_zero_experts(weight)

    def selection_bias(self, layer: int) -> torch.Tensor:
        """What is added to the scores, float32 `[E]`."""
        config = self.reference
        bias = self._gate(layer, "bias").float() if config.gate_bias else torch.zeros(config.num_experts)
        return self._with_zero_experts(bias, self._gate(layer, "threshold").item() if self.num_zero_experts else 0.0)

    def gate_up_proj(self, layer: int) -> torch.Tensor:
        """Both of the experts' first projections, `[E, 2W, H]`, gate rows first."""
        return self._with_zero_experts(self._experts(layer, "gate_up_proj"))

    def down_proj(self, layer: int, scale: float = 1.0) -> torch.Tensor:
        """`[E, H, W]`, times the config's factor of routed experts and `scale`."""
        return self._with_zero_experts(self._scaled(self._experts(layer, "down_proj"), scale))

    def expert(self, layer: int, projection: str, index: int) -> torch.Tensor:
        """`gate_proj`, `up_proj` or `down_proj` of one expert, `[W, H]`, `[W, H]` and `[H, W]`."""
        width = self.reference.moe_intermediate_size
        name = "down_proj" if projection == "down_proj" else "gate_up_proj"
        stored = self._experts(layer, name)
        weight = stored[index] if index < len(stored) else torch.zeros_like(stored[0])
        if name == "gate_up_proj":
            return weight[:width] if projection == "gate_proj" else weight[width:]
        return self._scaled(weight)

    def shared(self, layer: int, projection: str) -> torch.Tensor:
        """`gate_proj`, `up_proj` or `down_proj` of the shared experts, which are one MLP."""
        if not self.reference.num_shared_experts:
            return torch.zeros_like(self.expert(layer, projection, 0))
        return self.moe.tensor(f"layers.{layer}.mlp.shared_experts.{projection}.weight")

    def _gate(self, layer: int, name: str) -> torch.Tensor:
        return self.moe.tensor(f"layers.{layer}.mlp.gate.{name}")

    def _experts(self, layer: int, name: str) -> torch.Tensor:
        return self.moe.tensor(f"layers.{layer}.mlp.experts.{name}")

    def _scaled(self, down_proj: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Times `scale` and the config's factor of routed experts."""
        scale *= self.reference.score_scale_factor
        return down_proj if scale == 1 else (down_proj.float() * scale).to(down_proj.dtype)

    def _with_zero_experts(self, tensor: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        zeros = tensor.new_full((self.num_zero_experts, *tensor.shape[1:]), value)
        return torch.cat([tensor, zeros]) if len(zeros) else tensor


def _reference(moe: StoredMoE, max_selects: int | None) -> LlamaMoEConfig:
    """The config of what is exported; refused if engines cannot compute it."""
    config, path = moe.config, moe.path
    if moe.model_class != "LlamaMoEForCausalLM":
        raise MoEficationError(f"{path} is a {moe.model_class}; engines run a LlamaMoEForCausalLM")
    if config.gate_network != "linear":
        raise MoEficationError(
            f"{path} has gates of two layers, which no engine has; fit linear ones: GATE_NETWORK=linear bash "
            f"run_moefication/3_select.sh, or RECIPE=engine from the start"
        )
    if config.mlp_bias:
        raise MoEficationError(f"{path} has MLP biases, which no engine for MoEs has; it runs in transformers only")
    if config.output_bias:
        raise MoEficationError(
            f"{path} has a bias on the output of each MLP, which no engine for MoEs has; calibrate without one: "
            f"{WITHOUT_OUTPUT_BIAS}"
        )
    if config.multiply_gate_scores:
        raise MoEficationError(f"{path} weighs its experts by gate scores; only experts of weight 1 are exported")
    if config.hidden_act != "silu":
        raise MoEficationError(f"{path} has experts with {config.hidden_act}; engines have SiLU ones")
    if config.routing == "top_k":
        if config.layer_num_experts_per_tok and len(set(config.layer_num_experts_per_tok)) > 1:
            raise MoEficationError(f"{path} runs other numbers of experts in other layers; engines know one number")
        if max_selects is not None:
            raise SettingError(f"max_selects is for models that route by threshold, and {path} routes by top-k")
        return config
    if max_selects is not None:
        shared = config.num_shared_experts
        least, most = shared + max(1, config.min_experts_per_tok), shared + config.max_routed_experts
        if not least <= max_selects <= most:
            raise SettingError(f"max_selects {max_selects} is outside of {least} to {most}, the model's experts")
        budget = min(config.num_experts_per_tok, max_selects - shared)
        return moe.new_config(max_experts_per_tok=max_selects - shared, num_experts_per_tok=budget)
    if config.max_experts_per_tok is None:
        raise SettingError(
            f"{path} routes by threshold: a token may run any number of experts. Give max_selects, the most that one "
            f"runs (every token then costs that), or convert with ROUTING=top_k, as RECIPE=engine does"
        )
    return config
