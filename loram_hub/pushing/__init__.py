"""Publish a release or a recovered adapter on the Hub.

What is pushed is what was verified: the files of the manifest and a card, licence texts and pictures beside them, and
nothing else of the folder. Duties of the base model's licence are looked at first, and an unmet one stops the push. The
push itself has two phases (see `hub.publishing`): readers see a complete and compared release, or none.

`contents` takes what a folder has, `planning` decides with what the Hub says, `documents` adds card and licence texts,
`pushes` does it.
"""

from loram_hub.pushing.pushes import push as push
from loram_hub.pushing.pushes import push_adapter as push_adapter
from loram_hub.pushing.records import Pushed as Pushed
from loram_hub.pushing.records import PushedFile as PushedFile
