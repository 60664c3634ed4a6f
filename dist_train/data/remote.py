"""Files of a shard set at a URL, through fsspec: small ones are read whole, shards downloaded.

Failures that may pass are retried.

Credentials and endpoints come from where fsspec and the cloud's own libraries look (environment, ~/.config/fsspec,
~/.aws, ...); nothing of them is in a recipe.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import fsspec
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from dist_train.errors import UseError, WorkError

log = logging.getLogger(__name__)

ATTEMPTS = 6  # with the waits below, a server may be away for a quarter of a minute
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0
CONNECT_S, SILENCE_S = 30, 60  # seconds for a connection, and between two bytes of an answer
CHUNK = 8 * 2**20  # bytes read at once; of object stores, bytes of one request
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}

T = TypeVar("T")


IsStopped = Callable[[], bool]
"""Says that what is being made ready is no longer wanted; any thread may ask it, often."""


def never_stopped() -> bool:
    """An `IsStopped` for callers that are never interrupted."""
    return False


class Stopped(Exception):
    """The download is no longer wanted."""


class _Damaged(Exception):
    """What arrived is not what the manifest announces."""


def is_url(root: str | Path) -> bool:
    """Whether a shard set is named by a URL rather than a folder."""
    return isinstance(root, str) and "://" in root


def file_url(root: str, name: str) -> str:
    """URL of a file of the set at `root`. Over HTTP, `name` is quoted and a query (a signature) stays at the end."""
    if not root.startswith(("http://", "https://")):
        return f"{root.rstrip('/')}/{name}"
    scheme, host, path, query, _ = urlsplit(root)
    return urlunsplit((scheme, host, f"{path.rstrip('/')}/{quote(name)}", query, ""))


def read_file(url: str) -> bytes:
    """A small file, whole.

    Raises FileNotFoundError, UseError for a URL that cannot be used, WorkError if the file cannot be read.
    """

    def read() -> bytes:
        with _open(url) as stream:
            return stream.read()

    return _persistently(url, read)


def download(url: str, size: int, sha256: str, file: IO[bytes], stopped: IsStopped) -> None:
    """Write what is at `url` to the beginning of `file`; it has that size and SHA-256 when this returns.

    Raises WorkError naming the URL where it cannot be had or stays damaged; Stopped soon after `stopped()` is true.
    """

    def attempt() -> None:
        file.seek(0)
        digest, received = hashlib.sha256(), 0
        with _open(url) as stream:
            while chunk := stream.read(min(CHUNK, size + 1 - received)):
                if stopped():
                    raise Stopped
                received += len(chunk)
                if received > size:
                    break
                _write(file, chunk)
                digest.update(chunk)
        if received != size:
            found = "more" if received > size else f"{received:,}"
            raise _Damaged(f"{found} bytes arrived, {size:,} by the manifest")
        if digest.hexdigest() != sha256:
            raise _Damaged("its SHA-256 is not the manifest's; has the set changed?")

    try:
        _persistently(url, attempt, stopped)
    except FileNotFoundError:
        raise WorkError(f"{url}: no such file, though the manifest lists it; upload the shard set again") from None


def _write(file: IO[bytes], chunk: bytes) -> None:
    try:
        file.write(chunk)
    except OSError as error:  # not the server's doing: no use in trying again
        raise WorkError(f"{file.name}: cannot be written ({error.strerror})") from None


def _open(url: str) -> IO[bytes]:
    """The file as a stream; over HTTP its `read` may return less than asked for before the end."""
    options: dict[str, Any] = {}
    http = url.startswith(("http://", "https://"))
    if http:
        import aiohttp

        # aiohttp ends every request after five minutes, which is nothing for a shard: limit the silences instead.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        configured = fsspec.config.conf.get(urlsplit(url).scheme, {}).get("client_kwargs", {})
        options["client_kwargs"] = {"timeout": timeout, **configured}
    try:
        files, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(url.partition("://")[0])
        cure = f"pip install 'dist-train[{extra}]'" if extra else "install what it names"
        raise UseError(f"{url}: {error}; {cure}") from None
    except ValueError as error:
        raise UseError(f"{url}: not a URL that can be read ({error})") from None
    if http:  # one request that streams; giving any size saves the request that would ask for it
        return files.open(path, "rb", block_size=0, size=1)
    return files.open(path, "rb", block_size=CHUNK, cache_type="none")


def _persistently(url: str, work: Callable[[], T], stopped: IsStopped = never_stopped) -> T:
    """The result of `work`, tried again with growing waits while it fails in a way that may pass."""

    def report(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning("%s: %s; trying again (%d of %d)", url, _describe(error), state.attempt_number + 1, ATTEMPTS)

    retrying = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(FIRST_WAIT_S, LONGEST_WAIT_S) + wait_random(0, FIRST_WAIT_S),
        retry=retry_if_exception(lambda error: _may_pass(error) and not stopped()),
        before_sleep=report,
        reraise=True,
    )
    try:
        return retrying(work)
    except (UseError, WorkError, FileNotFoundError, Stopped):
        raise
    except Exception as error:  # fsspec's back ends each raise their own; none of them is ours
        times = f", {ATTEMPTS} times" if _may_pass(error) else ""
        raise WorkError(f"{url}: cannot be read{times} ({_describe(error)})") from error


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later: not what the server refuses or the programme gets wrong."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int) and 400 <= status < 600:
        return status >= 500 or status in (408, 429)
    never = (UseError, WorkError, Stopped, FileNotFoundError, PermissionError, ValueError, TypeError, AttributeError)
    return isinstance(error, Exception) and not isinstance(error, never)


def _describe(error: BaseException | None) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if not isinstance(error, _Damaged) else text
