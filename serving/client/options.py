"""Base class of both clients (constructor options, deadlines), and splitting a stream of images into batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from serving.client.images import ImageLike, check_list, read_image
from serving.client.requests import RequestSequence
from serving.shared.errors import InputError
from serving.transport.connection import Connection
from serving.transport.retries import Deadline, Retries

DEFAULT_URLS = {"http": "http://127.0.0.1:8000", "grpc": "grpc://127.0.0.1:8001"}
CONCURRENCY = 4
BATCH = 8


class ClientBase:
    """Constructor options of a client. Raises InputError for an invalid option.

    url: http://host:port or grpc://host:port; https:// or grpcs:// with TLS. timeout: seconds for one call, including
    all its requests, retries and waits. token: sent as `Authorization: Bearer`. headers: sent with every request.
    ca_file: PEM of the CAs to trust instead of the system's. certificate_file, key_file: PEM of a client certificate.
    insecure: accept any certificate (https only). retries: the retry policy. concurrency: parallel requests of one
    call.
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
        all_headers = dict(headers or {})
        if token is not None:
            if any(name.lower() == "authorization" for name in all_headers):
                raise InputError("token and an Authorization header exclude each other; give one of them")
            all_headers["authorization"] = f"Bearer {token}"
        self._connection = Connection(url, all_headers, ca_file, certificate_file, key_file, insecure)
        self._timeout = Deadline(timeout).budget
        self._retries = retries or Retries()
        self._concurrency = concurrency
        self._sequence = RequestSequence(url)

    @property
    def url(self) -> str:
        """The server's URL."""
        return self._connection.url

    def _deadline(self, timeout: float | None = None) -> Deadline:
        """Return the deadline of a call that starts now; timeout=None uses the client's timeout."""
        return Deadline(self._timeout if timeout is None else timeout)


def groups(images: Iterable[ImageLike], size: int) -> Iterator[list[tuple[int, ImageLike]]]:
    """Yield lists of at most `size` (index, image) pairs, reading `images` lazily. Raises InputError."""
    if size < 1:
        raise InputError(f"batch is {size}; expected 1 or more")
    numbered = enumerate(check_list(images))
    while group := list(islice(numbered, size)):
        yield group


def encode_group(group: Sequence[tuple[int, ImageLike]], check: bool, keep_going: bool) -> list[bytes | InputError]:
    """Return the encoded bytes of a group's images; with keep_going an invalid image is replaced by its InputError."""
    encoded: list[bytes | InputError] = []
    for index, image in group:
        try:
            encoded.append(read_image(image, index, check))
        except InputError as error:
            if not keep_going:
                raise
            encoded.append(error)
    return encoded
