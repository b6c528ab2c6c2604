"""Training on preferences: pairs by DPO and its family (paired.py), labelled completions by KTO (unpaired.py).

data.py reads TRL's formats; reference_logps.py says which model the reference is and keeps its log-probabilities; weights.py holds
what changes a completion's log-probability (LD-DPO) or its loss (WPO); accuracy.py measures on held-out pairs.
"""

from .accuracy import PairAccuracy, pair_accuracy
from .data import Pair, Unpaired, load_preferences, load_unpaired
from .paired import PreferenceConfig, dpo
from .unpaired import KtoConfig, kto

__all__ = [
    "KtoConfig",
    "Pair",
    "PairAccuracy",
    "PreferenceConfig",
    "Unpaired",
    "dpo",
    "kto",
    "load_preferences",
    "load_unpaired",
    "pair_accuracy",
]
