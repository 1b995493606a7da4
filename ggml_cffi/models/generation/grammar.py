"""`Grammar`: the texts that an answer may have, as JSON schema, regular expression, choices, Lark or GBNF."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ggml_cffi.errors import missing_extra

if TYPE_CHECKING:
    import types

#: Whitespace between the parts of JSON: as in llama.cpp's JSON grammars, so that a model cannot write spaces forever.
_JSON_WHITESPACE = r"( |\n{1,2}[ \t]{0,20})"
_NO_WHITESPACE = {"whitespace_flexible": False}


@dataclass(frozen=True)
class Grammar:
    """The set of texts that an answer may have. The class methods make one; each checks the grammar.

    A grammar does not belong to a model: the same one serves several models, and it travels to worker processes.
    `llguidance <https://github.com/guidance-ai/llguidance>`_, of the extra ``grammar``, interprets it.

    Raises
    ------
    ValueError
        If the grammar is malformed, or uses something that llguidance does not support. The message is llguidance's.
    ImportError
        If llguidance is not installed.

    Examples
    --------
    >>> from ggml_cffi.models import Grammar
    >>> Grammar.choices(["yes", "no"])  # doctest: +SKIP
    >>> Grammar.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}})  # doctest: +SKIP
    """

    kind: str
    """``"json_schema"``, ``"regex"``, ``"choices"``, ``"lark"`` or ``"gbnf"``."""
    source: str
    """The grammar in llguidance's own format."""

    def __post_init__(self) -> None:
        message = import_llguidance().LLMatcher.validate_grammar(self.source)
        if message and not message.startswith("WARNING"):
            raise ValueError(f"the grammar ({self.kind}) is not valid: {message}")

    @classmethod
    def json_schema(cls, schema: Any, *, whitespace: bool = True) -> Self:
        """Return the grammar of the JSON texts that a schema allows.

        Parameters
        ----------
        schema
            JSON schema, as a mapping or as JSON text; or a class with a method ``model_json_schema``, such as a model
            of Pydantic.
        whitespace
            True to allow a space, or one or two line breaks with an indentation of up to 20 characters, between the
            parts, as in llama.cpp's grammars. False for JSON without whitespace.

        Raises
        ------
        TypeError, ValueError
            If the schema is none of these, or not valid, or has a keyword that llguidance does not support.
        """
        make = getattr(schema, "model_json_schema", None)
        if isinstance(schema, type) and make is not None:
            schema = make()
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except json.JSONDecodeError as error:
                raise ValueError(f"the JSON schema is not JSON: {error}") from None
        if not isinstance(schema, Mapping):
            raise TypeError(f"a JSON schema must be a mapping, a text or a Pydantic model, not {schema!r:.80}")
        options: Any = {"whitespace_pattern": _JSON_WHITESPACE} if whitespace else _NO_WHITESPACE
        compile_schema = import_llguidance().LLMatcher.grammar_from_json_schema
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise type(error)(f"the JSON schema has a value that is not JSON: {error}") from None
        return cls("json_schema", compile_schema(text, defaults=options))

    @classmethod
    def json_object(cls, *, whitespace: bool = True) -> Self:
        """Return the grammar of JSON objects with any contents."""
        return cls.json_schema({"type": "object"}, whitespace=whitespace)

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Return the grammar of the texts that match a regular expression as a whole.

        The syntax is that of Rust's crate ``regex``, without anchors and word boundaries.
        """
        return cls("regex", import_llguidance().LLMatcher.grammar_from_regex(_text("regex", pattern)))

    @classmethod
    def choices(cls, choices: Iterable[str]) -> Self:
        """Return the grammar of a list of texts.

        Raises
        ------
        TypeError, ValueError
            If a choice is not a string or is empty, or there is none.
        """
        texts = [choices] if isinstance(choices, str) else list(choices)
        if isinstance(choices, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"choices must be several strings, not {choices!r:.80}")
        if not all(texts) or not texts:
            raise ValueError("choices must be one or more strings that are not empty")
        rule = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return cls("choices", import_llguidance().LLMatcher.grammar_from_lark(rule))

    @classmethod
    def lark(cls, grammar: str) -> Self:
        """Return a grammar in llguidance's variant of Lark's language. Its first rule is ``start``."""
        return cls("lark", import_llguidance().LLMatcher.grammar_from_lark(_text("lark", grammar)))

    @classmethod
    def gbnf(cls, grammar: str) -> Self:
        """Return a grammar in llama.cpp's language GBNF. Its first rule is ``root``."""
        llguidance = import_llguidance()
        from llguidance.gbnf_to_lark import gbnf_to_lark

        text = _text("gbnf", grammar)
        try:
            rules = gbnf_to_lark(text)
        except Exception as error:  # the converter raises errors of several kinds, some of them plain Exception
            raise ValueError(f"the grammar (gbnf) is not valid: {error}") from None
        return cls("gbnf", llguidance.LLMatcher.grammar_from_lark(rules))


def as_grammar(value: Any) -> Grammar | None:
    """Return the value of a parameter ``grammar``: a mapping is a JSON schema.

    Raises
    ------
    TypeError, ValueError
        If it is neither a grammar nor a valid JSON schema.
    """
    if value is None or isinstance(value, Grammar):
        return value
    if isinstance(value, Mapping):
        return Grammar.json_schema(value)
    raise TypeError(
        f"grammar must be a Grammar, or a JSON schema as a mapping, not {value!r:.80}: "
        "see Grammar.regex, Grammar.choices, Grammar.lark, Grammar.gbnf and Grammar.json_schema"
    )


def import_llguidance() -> types.ModuleType:
    """Return the module ``llguidance``.

    Raises
    ------
    ImportError
        If it is not installed. The message names the extra.
    """
    try:
        import llguidance
    except ImportError:
        raise missing_extra("a grammar", "llguidance", "grammar") from None
    return llguidance


def _text(name: str, value: Any) -> str:
    """Return a grammar's text; raise TypeError if it is not a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {value!r:.80}")
    return value
