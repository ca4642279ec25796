"""The methods, one file per family: who joins a group, and what every token counts for (base.py has the vocabulary).
May import objective, shaping and errors; the trainer knows no method by name."""

from .base import METHODS, Method, full_name, get, register
from .mixed import Luffy, Mixed, MixedShaping
from .on_policy import OnPolicy, OnPolicyNoClip, OnPolicyShaping
from .supervised import SFT, SFTRL, RLSFTLoss

# isort: split
from .arena import ARENA_METHODS

PAPER_METHODS = (
    "on_policy", "on_policy_shaping", "on_policy_no_clip", "mixed", "mixed_shaping", "luffy", "sft", "rl_sft_loss",
    "sft_rl",
)  # fmt: skip

__all__ = [
    "ARENA_METHODS", "METHODS", "PAPER_METHODS", "SFT", "SFTRL", "Luffy", "Method", "Mixed", "MixedShaping", "OnPolicy",
    "OnPolicyNoClip", "OnPolicyShaping", "RLSFTLoss", "full_name", "get", "register",
]  # fmt: skip
