"""From a recipe to a published release: prune, refit, teach, align, quantize, evaluate, card, push, resumable.

recipe        what is asked for, as frozen dataclasses
reading       recipes from YAML, and their JSON Schema
materials     base and data, each at one commit
remote        what the Hub holds of a release that was pushed
stages        what each stage reads, makes and depends on
workspace     the folder: outputs, and records of what they were made of
assessment    which stages hold, which are to do, and why
preview       estimates of disk, memory, time and cost
checks        what can fail late, checked early
launching     a step in several processes
publishing    `publish` and `check_publish`, which put all this together
"""

from loram_hub.pipeline.preview import Preview as Preview
from loram_hub.pipeline.publishing import Published as Published
from loram_hub.pipeline.publishing import check_publish as check_publish
from loram_hub.pipeline.publishing import publish as publish
from loram_hub.pipeline.reading import read_recipe as read_recipe
from loram_hub.pipeline.reading import recipe_from as recipe_from
from loram_hub.pipeline.reading import recipe_schema as recipe_schema
from loram_hub.pipeline.recipe import Recipe as Recipe
