"""Chat templates: messages to text in the form that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ggml_cffi.errors import FormatError

#: One message: ``{"role": "user", "content": "..."}``.
Message = Mapping[str, str]
#: The messages of one conversation.
Chat = Sequence[Message]


def render(template: str, messages: Chat, *, bos: str = "", eos: str = "", add_generation_prompt: bool = True) -> str:
    """Return the text of ``messages`` by a model's Jinja template.

    The template runs in Jinja's sandbox, since it comes from a model file.

    Parameters
    ----------
    template
        The template.
    messages
        The messages.
    bos, eos
        Texts of the tokens that begin and end a sequence.
    add_generation_prompt
        True to end with the beginning of the model's answer.

    Raises
    ------
    ValueError
        If a message has no role or content.
    FormatError
        If the template is malformed, or refuses the messages.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f"a message must be a dict with 'role' and 'content', not {message!r:.80}")

    def refuse(reason: str) -> Any:
        raise TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=[dict(m) for m in messages],
            bos_token=bos,
            eos_token=eos,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template can raise anything; the cause is always the model file
        raise FormatError(f"the model's chat template failed: {error or type(error).__name__}") from None
