"""What shapes a gate: the options of the select stage, checked."""

from dataclasses import dataclass

from ..errors import MoEficationError
from ..layers.scores import CRITERIA

# `similarity` is the linear gate as initialised, MoEfication's second mechanism: it is not trained.
GATE_NETWORKS = {"mlp": "mlp", "linear": "linear", "similarity": "linear"}
GATE_FITS = ("ridge", "adam")


@dataclass(frozen=True)
class GateSettings:
    """Options of the select stage that shape a gate; see `llama_select_mlp.py --help`."""

    templates: str
    num_experts: int
    num_selects: int
    select_criterion: str = "l2_norm"
    gate_network: str = "mlp"
    gate_fit: str | None = None  # None: ridge for linear gates, adam for others
    gate_rank: int | None = None
    use_softmax: bool = False
    epochs: int = 30
    batch_size: int = 1024
    lr: float = 0.01
    valid_percent: float = 0.1
    patience: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.select_criterion not in CRITERIA:
            raise MoEficationError(f"--select_criterion {self.select_criterion!r} is not one of {', '.join(CRITERIA)}")
        if self.gate_network not in GATE_NETWORKS:
            raise MoEficationError(f"--gate_network {self.gate_network!r} is not one of {', '.join(GATE_NETWORKS)}")
        if self.gate_fit is None:
            object.__setattr__(self, "gate_fit", "ridge" if self.gate_network == "linear" else "adam")
        if self.gate_fit not in GATE_FITS:
            raise MoEficationError(f"--gate_fit {self.gate_fit!r} is not one of {', '.join(GATE_FITS)}")
        if self.gate_network != "linear" and (self.gate_fit == "ridge" or self.gate_rank is not None):
            raise MoEficationError("--gate_fit ridge and --gate_rank are for --gate_network linear")
        if self.gate_rank is not None and self.gate_fit != "ridge":
            raise MoEficationError(f"--gate_rank {self.gate_rank} needs --gate_fit ridge")
        require_selects(self.num_selects, self.num_experts)
        if self.epochs < 0 or self.batch_size < 1:
            raise MoEficationError(
                f"--epochs {self.epochs} must not be negative, --batch_size {self.batch_size} at least 1"
            )
        if not 0 < self.lr < float("inf"):
            raise MoEficationError(f"--lr {self.lr} must be a positive number")
        if not 0 < self.valid_percent < 1:
            raise MoEficationError(f"--valid_percent {self.valid_percent} is not a fraction between 0 and 1")


def require_selects(num_selects: int, num_experts: int, num_shared_experts: int = 0) -> None:
    """Refuse a budget that is not between one routed expert beside the shared ones, and all experts."""
    least = num_shared_experts + 1
    if not least <= num_selects <= num_experts:
        shared = f" ({num_shared_experts} are shared)" if num_shared_experts else ""
        raise MoEficationError(
            f"--num_selects {num_selects} is outside of {least} to --num_experts {num_experts}{shared}"
        )


def require_rank(rank: int | None, hidden_size: int, num_routed_experts: int) -> None:
    """Refuse a rank that no gate of this shape has."""
    limit = min(hidden_size, num_routed_experts)
    if rank is not None and not 1 <= rank <= limit:
        raise MoEficationError(f"--gate_rank {rank} is outside of 1 to {limit}, the smaller side of the gate")
