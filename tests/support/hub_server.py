"""A local server with the part of the Hugging Face hub's API that downloads use.

Files are sent as the hub sends large ones: an answer of ``resolve`` redirects to a signed address on another host,
where no token may arrive.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """A repository: the files of each revision by name."""

    revisions: dict[str, dict[str, bytes]]
    private: bool = False
    gated: bool = False


@dataclass
class Hub:
    """The content of the server, and the requests that it got."""

    repos: dict[str, Repo]
    token: str = "hf_secret"
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each request."""
    sent: int = 0
    """Bytes of files that clients took."""
    leaked: bool = False
    """True if a token arrived at the host of the files."""
    url: str = ""
    files_url: str = ""

    def commit(self, repo: str, revision: str) -> str:
        """Return the commit of a revision, 40 hexadecimal digits."""
        return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit and the files of a revision or a commit."""
        for name, files in self.repos[repo].revisions.items():
            commit = self.commit(repo, name)
            if revision in (name, commit):
                return commit, files
        return None


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer()

        def do_HEAD(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = urlsplit(self.path).path
            hub.requests.append((self.command, path))
            if found := re.fullmatch(r"/files/([0-9a-f]{64})", path):
                self.send_file(found[1])
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                if (content := self.content(found[1], found[2] or "main")) is not None:
                    commit, files = content
                    siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                    self.send_json({"id": found[1], "sha": commit, "siblings": siblings})
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                if (content := self.content(found[1], found[2])) is not None:
                    self.redirect(*content, unquote(found[3]))
            else:
                self.fail(404, "")

        def content(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
            """Return the commit and the files, or None after an answer with an error, as the hub words it."""
            repo = hub.repos.get(name)
            known = self.headers["Authorization"] == f"Bearer {hub.token}"
            if repo is None or (repo.private and not known):
                self.fail(404 if known else 401, "RepoNotFound", "Repository not found")
            elif repo.gated and not known:
                self.fail(401, "GatedRepo", "Access to this model is restricted")
            elif (found := hub.files(name, unquote(revision))) is None:
                self.fail(404, "RevisionNotFound", "Invalid rev id")
            else:
                return found
            return None

        def redirect(self, commit: str, files: dict[str, bytes], name: str) -> None:
            if name not in files:
                self.fail(404, "EntryNotFound", "Entry not found", commit)
                return
            digest = hashlib.sha256(files[name]).hexdigest()
            self.send_response(302)
            self.send_header("Location", f"{hub.files_url}/files/{digest}?signature=valid")
            self.send_header("X-Repo-Commit", commit)
            self.send_header("X-Linked-Etag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(len(files[name])))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send_file(self, digest: str) -> None:
            hub.leaked |= self.headers["Authorization"] is not None
            every = (
                data for repo in hub.repos.values() for files in repo.revisions.values() for data in files.values()
            )
            data = next(data for data in every if hashlib.sha256(data).hexdigest() == digest)
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
                first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                data = data[first : last + 1]
            else:
                self.send_response(200)
            self.send_header("ETag", f'"{digest}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                hub.sent += len(data)  # before the client has the data, and looks at the number
                self.wfile.write(data)

        def send_json(self, content: object) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def fail(self, status: int, code: str, message: str = "", commit: str = "") -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
            if commit:
                self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def serve_hub(repos: dict[str, Repo]) -> Iterator[Hub]:
    """Serve repositories on this machine until the end of the block."""
    hub = Hub(repos)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    port = server.server_address[1]
    hub.url, hub.files_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
