"""Recover an adapter that was trained on a pruned model to the full size of the original one.

`origins` finds the release that it was trained on, `recovering` puts its factors where that has its channels. No torch.
"""

from loram_hub.recovery.recovering import RecoveredAdapter as RecoveredAdapter
from loram_hub.recovery.recovering import recover as recover
