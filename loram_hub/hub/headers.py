"""What the weights of a repository are, by their headers alone: a few hundred kilobytes of a model of any size."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from huggingface_hub.utils import TensorInfo as RemoteTensor

from loram_hub.errors import VerificationError
from loram_hub.hub.access import access_errors, clean_token, persistently
from loram_hub.tensors import MAX_TENSORS, TensorInfo


def remote_headers(
    repo_id: str, files: Iterable[str], *, revision: str | None = None, token: str | bool | None = None
) -> dict[str, TensorInfo]:
    """Read the headers of safetensors files on the Hub, by range requests.

    Args:
        repo_id: `org/name`.
        files: names of the files.
        revision: branch, tag or commit.
        token: of the Hub.

    Returns:
        Every tensor by name. Its `file` is the name in the repository, and `start` counts from the end of the header.

    Raises:
        VerificationError: a header is damaged, a tensor has a type or length that none has, or is in two files.
        AccessError: the Hub refused or could not be reached.
    """
    api = HfApi(token=clean_token(token))
    found: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in _headers_of(api, repo_id, file, revision).items():
            if name in found:
                raise VerificationError(
                    f"Tensor {name!r:.200} is in two files of {repo_id}: {found[name].file}, {file}."
                )
            found[name] = info
        if len(found) > MAX_TENSORS:
            raise VerificationError(f"{repo_id} lists {len(found):,} tensors; at most {MAX_TENSORS:,} are read.")
    return found


def _headers_of(api: HfApi, repo_id: str, file: str, revision: str | None) -> dict[str, TensorInfo]:
    try:
        with access_errors(repo_id):
            metadata = persistently(lambda: api.parse_safetensors_file_metadata(repo_id, file, revision=revision))
    except (SafetensorsParsingError, NotASafetensorsRepoError) as err:
        raise VerificationError(f"{file} of {repo_id} is not a sound safetensors file: {err!s:.300}.") from err
    found = {}
    for name, entry in metadata.tensors.items():
        info = _info_of(file, entry)
        if info is None:
            raise VerificationError(
                f"{name!r:.200} in {file} of {repo_id} is said to be {entry.dtype!r:.20} {entry.shape!r:.100} at "
                f"{entry.data_offsets!r:.100}, which cannot be."
            )
        found[name] = info
    return found


def _info_of(file: str, entry: RemoteTensor) -> TensorInfo | None:
    """Where a tensor lies and what it is; None if its type, shape and length do not go together."""
    try:
        first, last = entry.data_offsets
        info = TensorInfo(Path(file), entry.dtype, tuple(entry.shape), first)
        is_sound = all(axis >= 0 for axis in info.shape) and info.nbytes == last - first
    except (KeyError, TypeError, ValueError):
        return None
    return info if is_sound else None
