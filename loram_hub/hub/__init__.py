"""The only package that talks to the network, always through huggingface_hub.

`fetching` turns names of models, releases and adapters into local folders, `bases` finds the base of a release;
`publishing` puts a set of files on the Hub in two phases; `access` says which failures pass, and turns the others into
one kind of error.
"""

from loram_hub.hub.bases import FoundBase as FoundBase
from loram_hub.hub.bases import check_base_checkpoint as check_base_checkpoint
from loram_hub.hub.bases import find_base as find_base
from loram_hub.hub.fetching import ADAPTER_FILES as ADAPTER_FILES
from loram_hub.hub.fetching import CHECKPOINT_FILES as CHECKPOINT_FILES
from loram_hub.hub.fetching import METADATA_FILES as METADATA_FILES
from loram_hub.hub.fetching import Source as Source
from loram_hub.hub.fetching import ask_once as ask_once
from loram_hub.hub.fetching import cached_commits as cached_commits
from loram_hub.hub.fetching import cached_config as cached_config
from loram_hub.hub.fetching import fetch_release as fetch_release
from loram_hub.hub.fetching import is_fetched as is_fetched
from loram_hub.hub.fetching import resolve as resolve
from loram_hub.hub.fetching import resolve_config as resolve_config
from loram_hub.hub.fetching import source_of as source_of
from loram_hub.hub.headers import remote_headers as remote_headers
from loram_hub.hub.publishing import Gate as Gate
from loram_hub.hub.publishing import Published as Published
from loram_hub.hub.publishing import RemoteFile as RemoteFile
from loram_hub.hub.publishing import RemoteRepository as RemoteRepository
from loram_hub.hub.publishing import UploadFile as UploadFile
from loram_hub.hub.publishing import look_up as look_up
from loram_hub.hub.publishing import publish_files as publish_files
from loram_hub.hub.publishing import why_not_writable as why_not_writable
