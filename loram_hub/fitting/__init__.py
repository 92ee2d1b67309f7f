"""Does it fit? What a fine-tuning on a release takes of a GPU, from configs and headers alone. No torch, no weights.

`subjects` finds what a name stands for, `estimating` applies the formulas of `loram_hub.estimation`, `advising` tries
what would lower it, `wording` and `picture` show it.
"""

from loram_hub.fitting.advising import Advice as Advice
from loram_hub.fitting.advising import advise as advise
from loram_hub.fitting.estimating import Fit as Fit
from loram_hub.fitting.estimating import estimate_memory as estimate_memory
from loram_hub.fitting.estimating import fit_of as fit_of
from loram_hub.fitting.picture import alternative_text as alternative_text
from loram_hub.fitting.picture import save_picture as save_picture
from loram_hub.fitting.subjects import Subject as Subject
from loram_hub.fitting.subjects import find_subject as find_subject
from loram_hub.fitting.wording import fit_text as fit_text
