"""What the synchronous and the asynchronous client share: their options, and groups of a long row of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from serving.client.images import ImageLike, read_image
from serving.client.requests import Dialogue
from serving.shared.errors import InputError
from serving.transport.connection import Connection
from serving.transport.retries import Deadline, Retries

DEFAULT_URLS = {"http": "http://127.0.0.1:8000", "grpc": "grpc://127.0.0.1:8001"}
CONCURRENCY = 4
BATCH = 8


class ClientBase:
    """The options of a client. Raises InputError for one that is not usable.

    url: http://host:port or grpc://host:port, https:// or grpcs:// with TLS. timeout: seconds that one call may take,
    all its requests, retries and waits included. token: sent as `Authorization: Bearer`. headers: sent with every
    request. ca_file: PEM of the CAs to trust instead of the system's. certificate_file, key_file: PEM of a client
    certificate. insecure: accept any certificate, https alone. retries: when a request is tried again. concurrency:
    requests at a time, where a call needs several.
    """

    def __init__(
        self,
        url: str = DEFAULT_URLS["http"],
        timeout: float = 60.0,
        *,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        ca_file: Path | str | None = None,
        certificate_file: Path | str | None = None,
        key_file: Path | str | None = None,
        insecure: bool = False,
        retries: Retries | None = None,
        concurrency: int = CONCURRENCY,
    ) -> None:
        if not 1 <= concurrency <= 256:
            raise InputError(f"concurrency is {concurrency}; expected 1 to 256")
        sent = dict(headers or {})
        if token is not None:
            if any(name.lower() == "authorization" for name in sent):
                raise InputError("token and an Authorization header exclude each other; give one of them")
            sent["authorization"] = f"Bearer {token}"
        self._connection = Connection(url, sent, ca_file, certificate_file, key_file, insecure)
        self._timeout = Deadline(timeout).budget
        self._retries = retries or Retries()
        self._concurrency = concurrency
        self._dialogue = Dialogue(url)

    @property
    def url(self) -> str:
        """The server's address."""
        return self._connection.url

    def _deadline(self, timeout: float | None = None) -> Deadline:
        """A call's deadline, from now on."""
        return Deadline(self._timeout if timeout is None else timeout)


def groups(images: Iterable[ImageLike], size: int) -> Iterator[list[tuple[int, ImageLike]]]:
    """Runs of at most `size` images with their places, taken from `images` as they are needed."""
    if size < 1:
        raise InputError(f"batch is {size}; expected 1 or more")
    numbered = enumerate(images)
    while group := list(islice(numbered, size)):
        yield group


def read_group(group: Sequence[tuple[int, ImageLike]], check: bool, keep_going: bool) -> list[bytes | InputError]:
    """The encoded bytes of a group's images; with keep_going an unusable one leaves its error in its place."""
    read: list[bytes | InputError] = []
    for place, image in group:
        try:
            read.append(read_image(image, place, check))
        except InputError as error:
            if not keep_going:
                raise
            read.append(error)
    return read
