"""Sizes and rules of a mixture-of-experts layer, for the families that have one."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class MoeShape:
    """Everything that fixes the parameters of a mixture of experts and their meaning."""

    num_experts: int
    top_k: int  # experts that a token goes to
    hidden_dim: int  # width of one expert
    num_shared_experts: int = 0  # experts that every token goes to as well
    score_func: Literal["sigmoid", "softmax"] = "sigmoid"
    route_norm: bool = False  # a token's weights add up to 1, before route_scale
    route_scale: float = 1.0
    load_balance_coeff: float = 1e-3  # by which an expert's bias moves in one step
