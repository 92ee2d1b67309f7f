"""Importance: one score per channel group, higher is kept.

    random      uniform, seeded (LoRAM-Rand)
    magnitude   sum of |w|^p over the group, p = 1 (`l1`) or 2 (`l2`, the default)
    taylor      first- or second-order estimate of the loss when the group goes (LoRAM-Stru), as LLM-Pruner defines it
                (arXiv 2305.11627, eqs. 3-6): with weight W, gradient G of the mean loss over all calibration tokens,
                and F = 1/N sum_n g_n^2 over the N samples' own gradients,
                  param_first   |W o G|                    abs first, then the sum (the default)
                  vectorize     W o G                      sum along the removed slice first, then abs
                  param_second  |W o F o W|
                  param_mix     |W o G - 1/2 W o F o W|

A group's score is the sum over its rows of q, k, v, gate, up and its columns of o, down; biases and norms do not
count (as in LLM-Pruner). Query heads are credited to the KV head that serves them, h // (heads per KV head);
LLM-Pruner folds them by h % num_key_value_heads, which credits the wrong one under grouped-query attention.

`taylor` says how the Taylor scores come about with one decoder layer in memory, `stored` how scores lie in a file.
"""

from __future__ import annotations

from loram_hub.importance.groups import Scores as Scores
from loram_hub.importance.methods import VARIANTS as VARIANTS
from loram_hub.importance.methods import Importance as Importance
from loram_hub.importance.methods import importance_scores as importance_scores
from loram_hub.importance.methods import parse_importance as parse_importance
from loram_hub.importance.stored import StoredScores as StoredScores
from loram_hub.importance.stored import read_scores as read_scores
from loram_hub.importance.stored import write_scores as write_scores
