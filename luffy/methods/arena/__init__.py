"""The methods that came after LUFFY, one file per idea; ARENA.md has their sources, and where ours differ from them."""

from .bread import BREAD
from .chord import ChordMu, ChordPhi
from .exgrpo import ExGRPO
from .gates import AMPO, HPT, SuperRL
from .guided import POPE, QuestA
from .opd import OPD
from .prefix_rft import PrefixRFT
from .ratios import CISPO, DAPO, GSPO, MaxRL
from .relift import ReLIFT
from .rl_plus import RLPlus
from .srft import SRFT
from .supervised import DFT, PSFT
from .trapo import TRAPO
from .uft import UFT

ARENA_METHODS = (
    "hpt", "superrl", "chord_mu", "chord_phi", "prefix_rft", "uft", "relift", "exgrpo", "trapo", "ampo", "bread",
    "pope", "questa", "srft", "rl_plus", "dft", "psft", "dapo", "gspo", "cispo", "maxrl", "opd",
)  # fmt: skip

__all__ = [
    "AMPO", "ARENA_METHODS", "BREAD", "CISPO", "DAPO", "DFT", "GSPO", "HPT", "OPD", "POPE", "PSFT", "SRFT", "TRAPO",
    "UFT", "ChordMu", "ChordPhi", "ExGRPO", "MaxRL", "PrefixRFT", "QuestA", "RLPlus", "ReLIFT", "SuperRL",
]  # fmt: skip
