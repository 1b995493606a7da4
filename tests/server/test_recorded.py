"""Recorded requests: the replies have the same form as when they were recorded, field by field."""

import json

import pytest

from tests.support.recorded import FILE, reply

REQUESTS = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("request_", REQUESTS, ids=[request["name"] for request in REQUESTS])
def test_a_recorded_request_has_its_recorded_reply(server, request_):
    found = reply(server, request_)
    assert found == {name: request_[name] for name in found}
    assert set(found) <= set(request_)
