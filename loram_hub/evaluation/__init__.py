"""Held-out loss of every model that LoRAM touches: did training on the pruned model help the original one?

Four models can be compared on the same tokens: the base, the pruned model (a release), the pruned model with the
adapter trained on it, and the base with the recovered adapter. The loss is the mean over completion tokens of
-ln p(token | what stands before it), in nats; prompt tokens are read but not scored. Everything is deterministic;
models are loaded one after another, never two at once.

An adapter that was trained masked on a sparse release is evaluated masked there, for that is the model that was
trained; on the base a recovered adapter acts unmasked.
"""

from loram_hub.evaluation.encoding import EncodedExample as EncodedExample
from loram_hub.evaluation.encoding import encode_examples as encode_examples
from loram_hub.evaluation.evaluating import MODELS as MODELS
from loram_hub.evaluation.evaluating import EvaluationRow as EvaluationRow
from loram_hub.evaluation.evaluating import EvaluationTable as EvaluationTable
from loram_hub.evaluation.evaluating import evaluate as evaluate
from loram_hub.evaluation.evaluating import memory_bytes as memory_bytes
from loram_hub.evaluation.losses import HeldOutLoss as HeldOutLoss
from loram_hub.evaluation.losses import held_out_loss as held_out_loss
