"""Will a server take this adapter, and will it answer right? What to change, and the command that serves it.

Servers refuse some adapters, and take others without a word and apply them wrongly, which is worse. What each of them
does is a table of rules (`rules`), applied to what the folder holds (`evidence`); `fixing` writes the one form that all
of them read alike, wherever that is possible without changing what the adapter computes. Nothing here needs torch, and
no server is run: the rules say which version they were measured with or read from.
"""

from loram_hub.doctor.examination import Diagnosis as Diagnosis
from loram_hub.doctor.examination import Finding as Finding
from loram_hub.doctor.examination import examine as examine
from loram_hub.doctor.fixing import FixedAdapter as FixedAdapter
from loram_hub.doctor.fixing import fix as fix
from loram_hub.doctor.rules import RULES as RULES
from loram_hub.doctor.rules import TARGETS as TARGETS
from loram_hub.doctor.rules import Severity as Severity
from loram_hub.doctor.rules import Target as Target
