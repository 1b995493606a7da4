"""Chat templates."""

import pytest

import ggml_cffi as ggml
from ggml_cffi.models.generation import render


def test_chat_templates_are_rendered_in_a_sandbox():
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ eos_token }}"
    assert render(template, [{"role": "user", "content": "hi"}], bos="<s>", eos="</s>") == "<s>[user]hi</s>"
    with pytest.raises(ValueError, match="a message must be a dict with 'role' and 'content'"):
        render(template, [{"role": "user"}])
    for wrong in ("{% if %}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}"):
        with pytest.raises(ggml.FormatError, match="chat template failed"):
            render(wrong, [])
