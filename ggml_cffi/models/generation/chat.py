"""Chat templates: messages to the text that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ggml_cffi.errors import FormatError

#: One message: ``{"role": "user", "content": "..."}``.
Message = Mapping[str, str]


def render(template: str, messages: Sequence[Message], *, bos: str = "", eos: str = "", answer: bool = True) -> str:
    """The text of ``messages`` by a model's Jinja template, ready for the answer if ``answer``.

    Templates come from model files: they run in Jinja's sandbox.

    Raises
    ------
    ValueError
        If a message has no role or content.
    FormatError
        If the template is broken, or refuses the messages.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f"a message is a dict with 'role' and 'content', not {message!r:.80}")

    def refuse(reason: str) -> Any:
        raise TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=[dict(m) for m in messages], bos_token=bos, eos_token=eos, add_generation_prompt=answer
        )
    except Exception as error:  # whatever a template from a file does: it is the file that is wrong
        raise FormatError(f"the model's chat template failed: {error or type(error).__name__}") from None
