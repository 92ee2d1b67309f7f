"""Closed-form refit after pruning: what o_proj and down_proj lost with their columns, put into the kept ones.

`settings` says what is asked for, `least_squares` solves for one matrix, `layers` streams base and release and gives a
layer's new weights, `refitting` writes the release.
"""

from loram_hub.refitting.refitting import RefitEstimate as RefitEstimate
from loram_hub.refitting.refitting import check_refit as check_refit
from loram_hub.refitting.refitting import refit as refit
from loram_hub.refitting.settings import RefitSettings as RefitSettings
