"""Model cards: README.md, pictures and evaluation results of a release or a recovered adapter, from what they record.

The text is a Jinja template in `model_cards/`, the metadata are huggingface_hub's own classes. Numbers come from the
manifest, the plan and an evaluation (the JSON of `loram eval`); what was not measured is said to be not measured.
Equal input gives equal bytes. Whatever a stranger could have written is shown as code, see `escaping`.

`making` is the way in; `releases` and `adapters` gather the facts, `evaluations`, `metadata`, `pictures` and
`rendering` turn them into files.
"""

from loram_hub.cards.adapters import adapter_card as adapter_card
from loram_hub.cards.folders import GENERATED as GENERATED
from loram_hub.cards.folders import Card as Card
from loram_hub.cards.folders import write_card as write_card
from loram_hub.cards.making import make_card as make_card
from loram_hub.cards.releases import release_card as release_card
