"""Gated MLPs in float32: the dense one, and an MoE block seen as one, its neurons side by side.

Axes: T tokens, I neurons of all experts, E routed experts, W width of an expert, H hidden size.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from llama_moe import LlamaMoEConfig
from llama_moe.gates import Gate, make_gate

from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.moe import MoECheckpoint
from ..precision import linear, product_dtype


class GatedMLP:
    """A SwiGLU MLP. `down [I, H]` is what each neuron adds to the output, `bias [H]` (or None) the output's."""

    def __init__(
        self,
        weights: list[torch.Tensor],
        biases: list[torch.Tensor | None],
        down: torch.Tensor,
        bias: torch.Tensor | None,
    ):
        """`weights`: those of gate_proj and up_proj, `[I, H]` each; `biases`: theirs, `[I]` or None."""
        self._weights, self._biases = [weight.to(product_dtype(weight.device)) for weight in weights], biases
        self.down, self.bias = down, bias

    @classmethod
    def of_dense(cls, checkpoint: DenseCheckpoint, layer: int, device: str | torch.device) -> "GatedMLP":
        """A layer of the dense model, its neurons in their own order."""
        names = ("gate_proj", "up_proj", "down_proj")
        *weights, down = (checkpoint.mlp_tensor(layer, f"{name}.weight", device) for name in names)
        *biases, bias = [None, None, None]
        if checkpoint.config.mlp_bias:
            *biases, bias = (checkpoint.mlp_tensor(layer, f"{name}.bias", device) for name in names)
        return cls(weights, biases, down.T, bias)

    def gate_activations(self, inputs: torch.Tensor) -> torch.Tensor:
        """SiLU(gate_proj x), `[T, I]`, of the MLP's inputs `[T, H]`, not normalised."""
        return F.silu(linear(inputs, self._weights[0], self._biases[0]))

    def activations(self, inputs: torch.Tensor) -> torch.Tensor:
        """What enters down_proj, `[T, I]`, of the MLP's inputs `[T, H]`, not normalised."""
        return self.gate_activations(inputs) * linear(inputs, self._weights[1], self._biases[1])

    def output(self, activations: torch.Tensor) -> torch.Tensor:
        """The output `[T, H]` from the activations `[T, I]`."""
        return linear(activations, self.down.T.to(product_dtype(self.down.device)), self.bias)


class MoEMLP(GatedMLP):
    """A layer's experts as one MLP, routed experts' neurons first, shared ones' last; `gate` is a copy in float32."""

    def __init__(self, config: LlamaMoEConfig, layer: int, tensor: Callable[[str], torch.Tensor], device: str):
        """`tensor(name)`: the block's tensors by their names within it, such as `experts.down_proj`."""

        def loaded(name: str) -> torch.Tensor:
            return tensor(name).to(device).to(torch.float32)  # a GPU is sent 16 bits a weight

        def rows(kind: str) -> list[torch.Tensor]:
            """gate_proj and up_proj, weights or biases, of all experts."""
            packed = loaded("experts.gate_up_proj" + ("_bias" if kind == "bias" else "")).unflatten(1, (2, -1))
            parts = [packed[:, part].flatten(0, 1) for part in range(2)]  # [E * W, ...] each
            if not config.num_shared_experts:
                return parts
            shared = (loaded(f"shared_experts.{name}.{kind}") for name in ("gate_proj", "up_proj"))
            return [torch.cat(pair) for pair in zip(parts, shared, strict=True)]

        down = loaded("experts.down_proj").transpose(1, 2).flatten(0, 1)
        if config.num_shared_experts:
            down = torch.cat([down, loaded("shared_experts.down_proj.weight").T])
        biases = rows("bias") if config.mlp_bias else [None, None]
        bias = loaded("output_bias") if config.mlp_bias or config.output_bias else None
        super().__init__(rows("weight"), biases, down, bias)
        self._width, self._num_routed = config.moe_intermediate_size, config.num_experts * config.moe_intermediate_size
        with torch.device("meta"):
            self.gate: Gate = make_gate(config, layer)
        state = {name: loaded(f"gate.{name}").clone() for name in self.gate.state_dict()}
        self.gate.load_state_dict(state, assign=True)

    @classmethod
    def of_moe(cls, moe: MoECheckpoint, config: LlamaMoEConfig, layer: int, device: str) -> "MoEMLP":
        """A layer of a checkpoint, with zeros for the biases that `config` has beyond the checkpoint's own."""
        new = {"gate.bias": config.num_experts, "output_bias": config.hidden_size}

        def tensor(name: str) -> torch.Tensor:
            stored = f"layers.{layer}.mlp.{name}"
            return moe.tensor(stored) if stored in moe.tensors else torch.zeros(new[name])

        return cls(config, layer, tensor, device)

    @property
    def routed_neurons(self) -> torch.Tensor:
        """int64 `[E, W]`: places of each routed expert's neurons."""
        return torch.arange(self._num_routed).view(-1, self._width)

    def by_neuron(self, of_experts: torch.Tensor) -> torch.Tensor:
        """What holds for each routed expert, `[T, E]`, for each of its neurons, and 1 for shared ones': `[T, I]`."""
        of_neurons = of_experts.float().repeat_interleave(self._width, dim=1)
        return F.pad(of_neurons, (0, len(self.down) - self._num_routed), value=1.0)

    def masked(self, activations: torch.Tensor, runs: torch.Tensor) -> torch.Tensor:
        """A copy of the activations `[T, I]`, zero for experts that do not run, given bool `[T, E]`."""
        masked = activations.clone()
        masked[:, : self._num_routed].unflatten(1, (-1, self._width)).mul_(runs[..., None])
        return masked

    def down_tensors(self) -> dict[str, torch.Tensor]:
        """`down` as the tensors of the block."""
        routed = self.down[: self._num_routed].unflatten(0, (-1, self._width)).transpose(1, 2)
        tensors = {"experts.down_proj": routed}
        if self._num_routed < len(self.down):
            tensors["shared_experts.down_proj.weight"] = self.down[self._num_routed :].T
        return tensors
