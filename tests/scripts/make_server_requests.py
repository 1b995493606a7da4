"""Record the replies of the server to the requests of ``tests/data/server_requests.json``.

    python -m tests.scripts.make_server_requests

Add a request with ``name``, ``path`` and ``body`` to the file, run the script, and read the change.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.server.conftest import OPTIONS, TEMPLATE
from tests.support.byte_level_model import byte_level_model
from tests.support.http_server import served
from tests.support.recorded import FILE, reply


def main() -> None:
    """Send all requests, and write the file."""
    requests = json.loads(FILE.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        model = byte_level_model(Path(folder) / "tiny.gguf", TEMPLATE, {"llama.context_length": 16384})
        with served(f"tiny={model}", *OPTIONS) as server:
            recorded = [{**request, **reply(server, request)} for request in requests]
    lines = ",\n".join(json.dumps(request, ensure_ascii=False) for request in recorded)
    FILE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
