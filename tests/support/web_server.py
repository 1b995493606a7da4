"""A web server for a folder, with ranges or without, that counts what it sends."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class WebServer:
    """A server of the files in a folder.

    Parameters
    ----------
    folder
        The folder.
    ranges
        True to answer range requests with the range, False to answer them with the whole file.
    """

    def __init__(self, folder: Path, *, ranges: bool) -> None:
        self.folder, self.ranges = folder, ranges
        self.requests: list[tuple[str, str | None]] = []
        """Path and ``Range`` header of each request."""
        self.sent = 0
        """Bytes of files that clients took."""
        self.forgets_ranges = False
        """True to answer only the first request with a range."""
        self.hides_size = False
        """True to leave out the size of the file."""
        self.shift = 0
        """Bytes by which ranges begin too late."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


def _handler(web: WebServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            web.requests.append((self.path, self.headers["Range"]))
            name = self.path.partition("?")[0].lstrip("/")
            if name == "secret":
                self.send_error(403)
                return
            if name == "moved.gguf":
                self.send_response(302)
                self.send_header("Location", "/m.gguf")
                self.end_headers()
                return
            try:
                data = (web.folder / name).read_bytes()
            except FileNotFoundError:
                self.send_error(404)
                return
            size: int | str = "*" if web.hides_size else len(data)
            ranges = web.ranges and not (web.forgets_ranges and len(web.requests) > 1)
            if ranges and (asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")):
                first, last = int(asked[1]) + web.shift, min(int(asked[2]), len(data) - 1)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
                data = data[first : last + 1]
                self.send_header("Content-Length", str(len(data)))
            else:
                self.send_response(200)
                if not web.hides_size:
                    self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            for i in range(0, len(data), 1 << 16):
                try:
                    self.wfile.write(data[i : i + (1 << 16)])
                except ConnectionError:  # the client has what it wants
                    return
                web.sent += len(data[i : i + (1 << 16)])

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def serve(folder: Path, *, ranges: bool = True) -> Iterator[WebServer]:
    """Serve a folder on this machine until the end of the block."""
    web = WebServer(folder, ranges=ranges)
    thread = threading.Thread(target=web.server.serve_forever)
    thread.start()
    try:
        yield web
    finally:
        web.server.shutdown()
        thread.join()
        web.server.server_close()
