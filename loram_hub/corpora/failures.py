"""What `datasets`, pyarrow and the network raise while a corpus is read, turned into errors that say what to do."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loram_hub.corpora.corpus import Corpus
from loram_hub.errors import AccessError, InvalidRequestError, LoramError, VerificationError

_DAMAGE = (ValueError, OSError, EOFError, zlib.error, TypeError, KeyError)
"""How rows that cannot be read are reported; pyarrow's errors are ValueErrors or OSErrors."""


@contextmanager
def opening_errors(corpus: Corpus) -> Iterator[None]:
    """Translate what goes wrong before the first row.

    Raises:
        InvalidRequestError: there is no such configuration or split, or nothing to read.
        VerificationError: the first file is damaged.
        AccessError: the dataset cannot be had from the Hub.
    """
    from pyarrow import ArrowException  # type: ignore[import-untyped]  # ships no types

    try:
        with reading_errors(corpus, lambda: ""):
            yield
    except VerificationError as err:
        cause = err.__cause__
        if corpus.is_local or isinstance(cause, ArrowException | UnicodeDecodeError | EOFError | zlib.error):
            raise
        # `datasets` says which configurations and splits there are
        raise InvalidRequestError(f"The corpus {corpus.name} cannot be opened: {cause}") from cause
    except RuntimeError as err:  # a dataset that is a program: `datasets` runs none
        raise InvalidRequestError(f"The corpus {corpus.name} cannot be opened: {err}") from err


@contextmanager
def reading_errors(corpus: Corpus, place: Callable[[], str]) -> Iterator[None]:
    """Translate what goes wrong with a row; `place` names the file it is in.

    Raises:
        VerificationError: the file is damaged.
        AccessError: the network failed.
    """
    from datasets.exceptions import DatasetNotFoundError  # type: ignore[import-untyped]  # ships no types
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except LoramError:
        raise
    except DatasetNotFoundError as err:
        raise AccessError(f"The corpus {corpus.name} cannot be had from the Hub: {err}") from err
    except (HTTPError, ConnectionError, TimeoutError) as err:
        # what they say holds signed addresses, so only their kind is told
        status = getattr(getattr(err, "response", None), "status_code", None)
        what = type(err).__name__ if status is None else f"it answered {status}"
        raise AccessError(
            f"The connection to the Hub broke off at the corpus {corpus.name} ({what}). Run it again later: it goes on "
            "where it stopped."
        ) from err
    except StopIteration as err:
        raise InvalidRequestError(f"The corpus {corpus.name} holds no rows{place()}.") from err
    except _DAMAGE as err:
        raise VerificationError(
            f"The corpus {corpus.name} is damaged{place()}: {err or type(err).__name__}. Get that file again, or leave "
            "it out."
        ) from err
