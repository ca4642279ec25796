"""The verifier: whether the answer in a completion is the ground truth, in processes that can be killed.
May import nothing of luffy but errors."""

from .pool import THINK_CLOSE, THINK_OPEN, Unchecked, Verifier, is_dangerous, solution

__all__ = ["THINK_CLOSE", "THINK_OPEN", "Unchecked", "Verifier", "is_dangerous", "solution"]
