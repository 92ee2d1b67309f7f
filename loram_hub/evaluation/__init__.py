"""Held-out loss of every model that LoRAM touches: did training on the pruned model help the original one?

Four models can be compared on the same tokens: the base, the pruned model (a release), the pruned model with the
adapter trained on it, and the base with the recovered adapter. The loss is the mean over completion tokens of
-ln p(token | what stands before it), in nats; prompt tokens are read but not scored. Everything is deterministic;
models are loaded one after another, never two at once.

An adapter that was trained masked on a sparse release is evaluated masked there, for that is the model that was
trained; on the base a recovered adapter acts unmasked.

`evaluating` is the way in; `opening` finds and opens the models, `encoding` makes token ids, `losses` measures one
model; `protocols` are ways to measure that others have fixed; `provenance` says what was measured.
"""

from loram_hub.evaluation.encoding import EncodedExample as EncodedExample
from loram_hub.evaluation.encoding import encode_examples as encode_examples
from loram_hub.evaluation.evaluating import EvaluationRow as EvaluationRow
from loram_hub.evaluation.evaluating import EvaluationTable as EvaluationTable
from loram_hub.evaluation.evaluating import check_losses as check_losses
from loram_hub.evaluation.evaluating import evaluate as evaluate
from loram_hub.evaluation.evaluating import memory_bytes as memory_bytes
from loram_hub.evaluation.evaluating import stored_parameters as stored_parameters
from loram_hub.evaluation.losses import HeldOutLoss as HeldOutLoss
from loram_hub.evaluation.losses import held_out_loss as held_out_loss
from loram_hub.evaluation.opening import MODELS as MODELS
from loram_hub.evaluation.opening import Placement as Placement
from loram_hub.evaluation.opening import Subjects as Subjects
from loram_hub.evaluation.opening import check_given as check_given
from loram_hub.evaluation.opening import find_subjects as find_subjects
from loram_hub.evaluation.opening import open_base as open_base
from loram_hub.evaluation.opening import open_pruned as open_pruned
from loram_hub.evaluation.opening import open_tokenizer as open_tokenizer
from loram_hub.evaluation.opening import placement as placement
from loram_hub.evaluation.opening import removed_weights as removed_weights
from loram_hub.evaluation.opening import with_adapter as with_adapter
from loram_hub.evaluation.protocols import PROTOCOLS as PROTOCOLS
from loram_hub.evaluation.protocols import Protocol as Protocol
from loram_hub.evaluation.provenance import Identity as Identity
from loram_hub.evaluation.provenance import Provenance as Provenance
from loram_hub.evaluation.provenance import provenance_of as provenance_of
