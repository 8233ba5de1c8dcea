"""A call of the Hub → its answer, after as many tries as it takes, or one line that says what went wrong.

huggingface_hub retries uploads and listings by itself, but neither commits nor branches nor tags. Those are retried here, which is
safe because each says what it starts from: after an answer was lost, the repository is looked at before anything is done again.

No message holds a URL, for the addresses to which files are sent are signed.
"""

import time
from collections.abc import Callable, Sequence
from http.client import responses
from typing import TypeVar

import httpx2
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

Result = TypeVar("Result")
Notice = Callable[[str], None]

WAIT_SECONDS = (1, 2, 4)
"""Before each new try of a call that huggingface_hub does not retry, unless the Hub says how long to wait."""
PATIENT_SECONDS = (*WAIT_SECONDS, 8, 16, 32, 64, 128, *[300] * 14)
"""The same for a build of days: it outlives more than an hour without the Hub, and what the Hub counts by the hour."""
TRANSIENT = (408, 429)
"""And all from 500 on, of which some are known to what stands before the Hub only."""
UNREACHED = (httpx2.TransportError, ConnectionError, TimeoutError)
"""The last two are what hf_xet raises, with addresses in their text."""


class Calls:
    """Makes calls about one repository."""

    def __init__(self, repo_id: str, notice: Notice, waits: Sequence[int] = WAIT_SECONDS) -> None:
        """Call nothing yet.

        Args:
            repo_id: ORG/NAME, for messages.
            notice: told, in a line, of retries.
            waits: seconds before each new try.
        """
        self._id = repo_id
        self._notice = notice
        self._waits = waits

    def __call__(
        self, call: Callable[[], Result], *, retried: tuple[int, ...] = TRANSIENT
    ) -> Result:
        """The answer of a call, which is made again if its failure may pass.

        Args:
            call: to make.
            retried: statuses that may pass, besides those from 500 on.

        Raises:
            RemoteEntryNotFoundError: there is no such file.
            NoRepository: there is no such repository.
            ValueError: the Hub refuses, or fails each time.
        """
        for wait_seconds in (*self._waits, None):
            try:
                return call()
            except RemoteEntryNotFoundError:
                raise
            except (
                httpx2.HTTPError,
                LocalEntryNotFoundError,
                OfflineModeIsEnabled,
                RuntimeError,
                ConnectionError,
                TimeoutError,
            ) as error:
                cause = _cause(error)
                if wait_seconds is None or not _is_transient(cause, retried):
                    if isinstance(cause, RepositoryNotFoundError):
                        raise NoRepository(explain(cause, self._id)) from None
                    raise ValueError(explain(cause, self._id)) from None
                wait_seconds = _retry_after(cause) or wait_seconds
                self._notice(f"{_symptom(cause)}: trying again in {wait_seconds} s")
                time.sleep(wait_seconds)
        raise AssertionError


class NoRepository(ValueError):
    """The repository does not exist, or must not be seen."""


def explain(error: BaseException, repo_id: str) -> str:
    """What went wrong between us and the Hub, and what to do, in one line without addresses."""
    status = _status(error)
    reason = ""
    if isinstance(error, HfHubHTTPError):
        said = (error.server_message or "").splitlines()
        reason = f" ({said[0][:200]})" if said and "://" not in said[0] else ""
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return "the Hub does not accept the token (has it expired?); log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no dataset {repo_id!r} that you can read; check the name, and log in if it is private"
    if isinstance(error, RevisionNotFoundError):
        return f"dataset {repo_id!r} has no such revision on the Hub"
    if status == 403:
        return f"the token may not write to {repo_id}{reason}; use a token with write access to it, or publish under another name"
    if status == 429:
        return "the Hub's rate limit is reached; wait a few minutes"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, but this needs the Hub; unset it"
    if status is not None:
        phrase = f" {responses[status]}" if status in responses else ""
        return f"the Hub answers {status}{phrase}{reason}; try again later"
    if isinstance(error, (httpx2.HTTPError, LocalEntryNotFoundError, *UNREACHED)):
        return f"the Hub cannot be reached ({_symptom(error)}); check the network"
    return f"uploading failed ({type(error).__name__}); try again"


def _cause(error: BaseException) -> BaseException:
    """What lies under the RuntimeError into which huggingface_hub wraps a failed upload."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _is_transient(error: BaseException, retried: tuple[int, ...]) -> bool:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in retried or status >= 500
    return isinstance(error, UNREACHED)


def _retry_after(error: BaseException) -> int | None:
    value = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""  # fmt: skip
    return int(value) if value.isdigit() else None


def _symptom(error: BaseException) -> str:
    status = _status(error)
    return f"the Hub answers {status}" if status else f"the connection failed ({type(error).__name__})"  # fmt: skip
