"""Which commit a branch of a dataset is at, for whoever must read the same data tomorrow."""

from __future__ import annotations

from huggingface_hub import HfApi

from loram_hub.hub.access import access_errors, clean_token, persistently


def dataset_commit(name: str, *, revision: str | None = None, token: str | bool | None = None) -> str:
    """Return the commit of a dataset on the Hub.

    Args:
        name: `org/name`.
        revision: branch, tag or commit; None for `main`.
        token: of the Hub.

    Raises:
        AccessError: there is no such dataset or revision, or the Hub could not be reached.
    """
    api = HfApi(token=clean_token(token))
    with access_errors(name):
        return str(persistently(lambda: api.dataset_info(name, revision=revision)).sha)
