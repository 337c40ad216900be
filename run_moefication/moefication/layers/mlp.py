"""An MoE block seen as one MLP: its neurons side by side, the gate's choice a mask over them."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from llama_moe import LlamaMoEConfig
from llama_moe.gates import Gate, make_gate

from ..checkpoints.moe import MoECheckpoint


class PackedMLP:
    """The experts of one layer as a single SwiGLU MLP in float32, routed experts' neurons first, shared ones last.

    Axes: T tokens, I neurons of all experts, E routed experts, W width of an expert, H hidden size.

    Attributes:
        gate: the block's gate, in float32.
        down: `[I, H]`, what each neuron adds to the output.
        bias: `[H]`, the bias on the output, or None.
    """

    def __init__(self, config: LlamaMoEConfig, layer: int, tensor: Callable[[str], torch.Tensor], device: str):
        """`tensor(name)`: the block's tensors by their names within it, such as `experts.down_proj`."""

        def loaded(name: str) -> torch.Tensor:
            return tensor(name).to(device, torch.float32)

        self._width, self._num_routed = config.moe_intermediate_size, config.num_experts * config.moe_intermediate_size
        gate_up = loaded("experts.gate_up_proj").unflatten(1, (2, -1))  # [E, 2, W, H]
        rows = [gate_up[:, part].flatten(0, 1) for part in range(2)]
        downs = [loaded("experts.down_proj").transpose(1, 2).flatten(0, 1)]
        biases = [None, None]
        if config.mlp_bias:
            both = loaded("experts.gate_up_proj_bias").unflatten(1, (2, -1))
            biases = [both[:, part].flatten() for part in range(2)]
        if config.num_shared_experts:
            names = [f"shared_experts.{projection}_proj" for projection in ("gate", "up")]
            rows = [torch.cat([row, loaded(f"{name}.weight")]) for row, name in zip(rows, names, strict=True)]
            downs.append(loaded("shared_experts.down_proj.weight").T)
            if config.mlp_bias:
                biases = [torch.cat([b, loaded(f"{name}.bias")]) for b, name in zip(biases, names, strict=True)]
        self._rows, self._biases = rows, biases
        self.down = torch.cat(downs)
        self.bias = loaded("output_bias") if config.mlp_bias or config.output_bias else None
        with torch.device("meta"):
            self.gate: Gate = make_gate(config, layer)
        # Its own copy: the gate is fitted in place.
        state = {name: loaded(f"gate.{name}").clone() for name in self.gate.state_dict()}
        self.gate.load_state_dict(state, assign=True)

    @classmethod
    def of(cls, moe: MoECheckpoint, config: LlamaMoEConfig, layer: int, device: str) -> "PackedMLP":
        """A layer of a checkpoint, with zeros for what `config` has beyond the checkpoint's own: biases."""
        new = {"gate.bias": config.num_experts, "output_bias": config.hidden_size}

        def tensor(name: str) -> torch.Tensor:
            stored = f"layers.{layer}.mlp.{name}"
            return moe.tensor(stored) if stored in moe.tensors else torch.zeros(new[name])

        return cls(config, layer, tensor, device)

    @property
    def routed_neurons(self) -> torch.Tensor:
        """int64 `[E, W]`: places of each routed expert's neurons."""
        return torch.arange(self._num_routed).view(-1, self._width)

    def activations(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[T, H]` -> what enters down_proj if every expert runs, `[T, I]`."""
        gate, up = (F.linear(inputs, row, bias) for row, bias in zip(self._rows, self._biases, strict=True))
        return F.silu(gate) * up

    def output(self, activations: torch.Tensor) -> torch.Tensor:
        """The block's output `[T, H]` from its (masked) activations `[T, I]`."""
        return F.linear(activations, self.down.T, self.bias)

    def mask_(self, activations: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
        """Zero, in place, the activations `[T, I]` of experts that do not run, given bool `[T, E]`."""
        activations[:, : self._num_routed].unflatten(1, (-1, self._width)).mul_(selected[..., None])
        return activations

    def down_tensors(self) -> dict[str, torch.Tensor]:
        """`down` as the tensors of the block."""
        routed = self.down[: self._num_routed].unflatten(0, (-1, self._width)).transpose(1, 2)
        tensors = {"experts.down_proj": routed}
        if self._num_routed < len(self.down):
            tensors["shared_experts.down_proj.weight"] = self.down[self._num_routed :].T
        return tensors
