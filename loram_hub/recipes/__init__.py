"""Recipes: frozen dataclasses that people write as YAML, read strictly.

fields      the keys of a recipe, read off its dataclasses
yaml_text   YAML as recipes use it
reading     values into dataclasses; an error names file, line and key
schema      the JSON Schema of a recipe, for editors

What a recipe asks for is decided elsewhere: `loram_hub.pipeline` has those of releases, `loram_hub.finetuning` those of
fine-tuning runs.
"""

from loram_hub.recipes.fields import FLAT as FLAT
from loram_hub.recipes.fields import PATH as PATH
from loram_hub.recipes.fields import keys_of as keys_of
from loram_hub.recipes.reading import read_file as read_file
from loram_hub.recipes.reading import read_profile as read_profile
from loram_hub.recipes.reading import read_section as read_section
from loram_hub.recipes.reading import section_from as section_from
from loram_hub.recipes.schema import schema_of as schema_of
