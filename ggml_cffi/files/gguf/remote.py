"""Headers of GGUF files on web servers: only the start of a file is read, by HTTP range requests."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import closing
from typing import Any

from ggml_cffi.errors import FormatError
from ggml_cffi.files.gguf.header import Header, HeaderIncompleteError, read_header

#: Bytes of the first request; each further one asks for as many as all before it.
FIRST_REQUEST = 1 << 20
#: Largest number of bytes that are read. A header has the vocabulary: 10 to 20 MB if that is large.
LARGEST_HEADER = 128 << 20
#: Seconds without an answer after which a request fails.
TIMEOUT = 30.0
_ADVICE = "check the address and the connection, or download the file"
_authorizations: dict[str, str] = {}  # by the start of an address
_UNKNOWN_SIZE = 2**62  # of a file whose server does not tell
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def is_url(path: object) -> bool:
    """Return whether a path is an HTTP address."""
    return isinstance(path, str) and path.lower().startswith(("http://", "https://"))


def authorize(prefix: str, authorization: str) -> None:
    """Send the header ``Authorization`` to addresses that begin with ``prefix``, and not to where they redirect."""
    _authorizations[prefix] = authorization


def remote_header(url: str, part: int = 0) -> tuple[Header, int]:
    """Return the header of the file at a URL, and the bytes of the file.

    Raises
    ------
    FileNotFoundError
        If the server has no such file.
    OSError
        If the server cannot be reached, or refuses.
    FormatError
        If the file is not GGUF, is cut short, or its header is larger than :data:`LARGEST_HEADER`.
    """
    data = b""
    with closing(_blocks(url)) as blocks:
        for block, size in blocks:
            data += block
            try:
                header = read_header(data, url, part, size=size, header_only=True)
                ends = [t.offset + t.nbytes for t in header.tensors.values()]
                return header, size if size < _UNKNOWN_SIZE else max(ends, default=len(data))
            except HeaderIncompleteError:
                if len(data) >= LARGEST_HEADER:
                    raise FormatError(f"{url}: the header is larger than {LARGEST_HEADER:,} bytes") from None
    raise FormatError(f"{url}: cut short: the server sent {len(data):,} bytes, and the header is longer")


def _blocks(url: str) -> Generator[tuple[bytes, int], None, None]:
    """Yield the file from its start in growing blocks, each with the bytes of the whole file.

    If the server ignores ranges, the blocks are read from one answer, which ends when the generator is closed.
    """
    start, n, size = 0, FIRST_REQUEST, _UNKNOWN_SIZE
    while start < size:
        with _open(url, start, n) as answer:
            ranged = answer.status == 206
            if not ranged and start:
                raise OSError(f"{url}: the server ignores ranges after the first request: download the file")
            size = _size_by_range(answer, url, start) if ranged else _size_by_length(answer)
            while block := _read(answer, url, n):
                start, n = start + len(block), start + len(block)
                yield block, size
                if ranged:
                    break
            if not block:
                return


def _read(answer: Any, url: str, n: int) -> bytes:
    """Return the next ``n`` bytes of an answer, fewer at its end.

    Raises
    ------
    OSError
        If the connection breaks.
    """
    from http.client import HTTPException  # its import takes as long as the package's

    try:
        return bytes(answer.read(n))
    except (OSError, HTTPException) as error:
        raise OSError(f"{url} cannot be read: {error}; {_ADVICE}") from None


def _size_by_range(answer: Any, url: str, start: int) -> int:
    """Return the bytes of the whole file by the headers of an answer to a range request."""
    header = answer.headers.get("Content-Range", "")
    found = _CONTENT_RANGE.fullmatch(header)
    if found is None or int(found[1]) != start:
        raise OSError(f"{url}: the server sent the range {header!r}, not the one from byte {start}")
    return _UNKNOWN_SIZE if found[2] == "*" else int(found[2])


def _size_by_length(answer: Any) -> int:
    """Return the bytes of the whole file by the headers of an answer that has all of it."""
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else _UNKNOWN_SIZE


def _open(url: str, start: int, n: int) -> Any:
    """Request ``n`` bytes from ``start``, and return the answer, which may be the whole file.

    Raises
    ------
    FileNotFoundError, OSError
        If there is no such file, the server cannot be reached or does not answer, or the address is malformed.
    """
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    try:
        request = Request(url, headers={"Range": f"bytes={start}-{start + n - 1}"})
        for prefix, authorization in _authorizations.items():
            if url.startswith(prefix):
                request.add_unredirected_header("Authorization", authorization)
        return urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise FileNotFoundError(f"{url}: the server has no such file (HTTP {error.code})") from None
        raise OSError(f"{url}: the server answered HTTP {error.code} {error.reason}") from None
    except URLError as error:
        raise OSError(f"{url} cannot be reached: {error.reason}; {_ADVICE}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise OSError(f"{url} cannot be read: {error}; {_ADVICE}") from None
