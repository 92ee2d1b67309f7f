"""Failures of the network and of the Hub: which pass by themselves, and what to tell about the others."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import TypeVar

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import HFValidationError

from loram_hub.errors import AccessError, CheckpointError, InvalidRequestError, LoramError, ResourceError
from loram_hub.files import DISK_FULL, errno_of

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts; huggingface_hub itself repeats some requests and not others (a commit, a lost listing)."""
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_REFUSED = frozenset({401, 403, 404})
_XET = re.compile(r"CAS Client Error|Task error|File reconstruction error")
_SECRET = re.compile(r"\bhf_\w+|Bearer \S+")


def persistently(action: Callable[[], _T]) -> _T:
    """Run an action, and run it again after a pause where the network or the Hub failed for the moment.

    The action must look at the state of the Hub before it changes it: a request whose answer was lost was still
    carried out.
    """
    for pause in _PAUSES:
        try:
            return action()
        except (HTTPError, OSError, JSONDecodeError, UnicodeDecodeError) as err:
            if not _may_pass(err):
                raise
            logger.info("%s; trying again in %g s", _first_line(err), pause)
        time.sleep(pause)
    return action()


def _may_pass(err: BaseException) -> bool:
    """Whether a failure is of the moment: an overloaded server, a connection that broke."""
    if isinstance(err, OfflineModeIsEnabled | LocalTokenNotFoundError | LoramError):
        return False
    if isinstance(err, HfHubHTTPError):
        return status_of(err) in _PASSING
    if isinstance(err, EntryNotFoundError | LocalEntryNotFoundError):
        cause = err.__cause__  # "not in the cache" is how the client reports that it could not ask the Hub
        return cause is not None and _may_pass(cause)
    if type(err).__name__ == "ConnectError":  # nobody listens there; the client has tried for half a minute
        return False
    if isinstance(err, OSError) and not isinstance(err, ConnectionError | TimeoutError):
        return err.errno is None  # the client's own: fewer bytes arrived than were announced
    return True


def status_of(err: HfHubHTTPError) -> int | None:
    """Return the status code of the Hub's answer, None if there was none."""
    response = getattr(err, "response", None)
    return None if response is None else int(response.status_code)


@contextmanager
def access_errors(name: str) -> Iterator[None]:
    """Turn what huggingface_hub raises about a repository or name into errors that say what to do.

    Raises:
        CheckpointError: neither a folder nor a possible Hub id.
        AccessError: the repository does not exist, is gated or private, or the Hub cannot be reached.
        ResourceError: the disk is full.
    """
    try:
        with _xet_errors(name):
            yield
    except LoramError:
        raise
    except HFValidationError as err:
        raise CheckpointError(f"{name!r} is neither an existing folder nor a Hub id (org/name).") from err
    except GatedRepoError as err:
        raise AccessError(
            f"{name} is gated: accept its terms on its Hub page and log in with 'hf auth login' (or pass token=...)."
        ) from err
    except HfHubHTTPError as err:
        raise AccessError(_refusal(name, err)) from err
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as err:
        raise AccessError(
            f"{name} is no local folder, is not in the Hub cache, and the Hub was not reached "
            f"(offline mode, or no network): {_first_line(err)}"
        ) from err
    except OSError as err:
        if err.errno in DISK_FULL:
            raise ResourceError(
                f"Downloading {name} failed: {err}. Free some space, or set HF_HOME elsewhere."
            ) from err
        raise AccessError(f"The Hub could not be reached for {name}: {_first_line(err)}") from err
    except (JSONDecodeError, UnicodeDecodeError) as err:
        raise AccessError(f"The Hub's answer about {name} cannot be read: {err}. Try again later.") from err
    except HTTPError as err:
        raise AccessError(
            f"The connection to the Hub broke off ({type(err).__name__}) at {name}. Run it again: what has arrived is "
            "kept."
        ) from err


@contextmanager
def _xet_errors(name: str) -> Iterator[None]:
    """Tell apart what hf_xet, written in Rust, reports as one kind of error."""
    try:
        yield
    except RuntimeError as err:
        if errno_of(err) in DISK_FULL:
            raise ResourceError(
                f"Downloading {name} failed: {_first_line(err)}. Free some space, or set HF_HOME elsewhere."
            ) from err
        if _XET.search(str(err)) is None:
            raise
        raise AccessError(f"The transfer of {name} by xet failed: {_first_line(err)}. Try again later.") from err


def _refusal(name: str, err: HfHubHTTPError) -> str:
    status = status_of(err)
    if isinstance(err, RevisionNotFoundError):
        return f"{name} has no such revision on the Hub: {_first_line(err)}"
    if status == 403:
        hint = "This token may not do that there: use one that may write, of a member."
    elif status in _REFUSED:
        hint = "It does not exist, or you have no access: log in with 'hf auth login' (or pass token=...)."
    elif status in _PASSING:
        hint = "Try again later."
    else:
        hint = f"It says: {_first_line(err)}"
    return f"The Hub answered {status} for {name}. {hint}"


def clean_token(token: str | bool | None) -> str | bool | None:
    """Strip a token as huggingface_hub strips one from the environment, and refuse what no header can carry.

    Raises:
        InvalidRequestError: it holds characters that no token has; it is not shown.
    """
    if not isinstance(token, str):
        return token
    stripped = token.strip()
    if not stripped.isascii() or not stripped.isprintable() or " " in stripped:
        raise InvalidRequestError("The token holds characters that no Hub token has. Copy it again.")
    return stripped or None


def _first_line(err: BaseException) -> str:
    lines = [line for line in str(err).strip().splitlines() if line.strip() and not line.strip().endswith(":")]
    return _SECRET.sub("(token)", lines[0]) if lines else type(err).__name__
