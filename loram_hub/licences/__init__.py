"""What a licence asks of whoever publishes a derivative, as data: names, notices, copies, lines on the card.

A pruned model and an adapter are derivatives of their base. `licence_of` finds the base's licence and lets nobody
declare one away that binds, `duties` says which of its conditions a repository meets and how to meet the others. `push`
stops on one that is not met. The texts of the licences are not here: they come from the base model's repository.

The records were read off the licences: Llama 3.1 to 4 in full, the others by their clauses and by what is quoted of
them. This is a checklist for publishers, no legal advice. No network.
"""

from loram_hub.licences.documents import licence_documents as licence_documents
from loram_hub.licences.duties import Duty as Duty
from loram_hub.licences.duties import duties as duties
from loram_hub.licences.duties import notice_file as notice_file
from loram_hub.licences.finding import declared_licence as declared_licence
from loram_hub.licences.finding import licence_of as licence_of
from loram_hub.licences.records import CHANGES as CHANGES
from loram_hub.licences.records import LICENCES as LICENCES
from loram_hub.licences.records import Licence as Licence
