"""Declarations of each version in ``codegen/versions/``, and the one set that covers all versions.

A version's file is written from its headers. It is kept in the repository because a header package can vanish from its
distribution: the generated layer must not change then.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from codegen.headers import Function, Headers, read
from codegen.versions import ROOT, MissingHeadersError, Version, supported

FOLDER = ROOT / "codegen" / "declarations"


@dataclass
class Declarations:
    """Declarations that cover all supported versions: what any of them declares."""

    versions: tuple[str, ...]
    newest_built: str
    """The newest version with source, which ``build_lib.sh`` builds."""
    functions: list[Function] = field(default_factory=list)
    enums: dict[str, dict[str, int]] = field(default_factory=dict)
    structs: dict[str, dict[str, int]] = field(default_factory=dict)
    macros: dict[str, int | str] = field(default_factory=dict)
    cdef: str = ""
    members: dict[str, set[str]] = field(default_factory=dict)
    """The names that each version declares: functions, enum constants and macros."""
    varying: dict[str, dict[str, int | str]] = field(default_factory=dict)
    """Constants whose value differs between versions, with the value in each version that has them."""

    def since(self, name: str) -> str:
        """Return the first supported version that declares ``name``."""
        return next(v for v in self.versions if name in self.members[v])

    @property
    def newer(self) -> dict[str, list[Function]]:
        """The functions that the oldest version lacks, by the first version that has them."""
        found: dict[str, list[Function]] = {}
        for f in self.functions:
            if self.since(f.name) != self.versions[0]:
                found.setdefault(self.since(f.name), []).append(f)
        return found


class IncompatibleError(Exception):
    """Signal that two versions declare something in ways that one typed layer cannot cover."""


def text(headers: Headers) -> str:
    """Return the text of a version's file."""
    return json.dumps(asdict(headers), indent=1) + "\n"


def stored(version: Version) -> Headers:
    """Return the declarations of a version as stored in the repository."""
    data: dict[str, Any] = json.loads((FOLDER / f"{version.name}.json").read_text())
    functions = [Function(**{**f, "params": tuple((n, t) for n, t in f["params"])}) for f in data.pop("functions")]
    return Headers(**data, functions=functions)


def files() -> tuple[dict[str, str], dict[str, str]]:
    """Return the text of each version's file by its path, and the reason for each version without headers."""
    found, missing = {}, {}
    for version in supported():
        try:
            found[f"codegen/declarations/{version.name}.json"] = text(read(version))
        except MissingHeadersError as error:
            missing[version.name] = str(error)
    return found, missing


def merged() -> Declarations:
    """Return the declarations that cover all versions, from their stored files.

    Raises
    ------
    IncompatibleError
        If a function's signature, a struct's layout or an enum's number differs between versions.
    """
    return merge([stored(v) for v in supported()])


def merge(all_headers: list[Headers]) -> Declarations:
    """Return the declarations that cover several versions, given oldest first."""
    with_source = [h.version for h in all_headers if h.from_source]
    out = Declarations(tuple(h.version for h in all_headers), with_source[-1] if with_source else "")
    functions: dict[str, Function] = {}
    cdef: dict[str, str] = {}
    for headers in all_headers:
        for f in headers.functions:
            known = functions.get(f.name)
            if known and _signature(known) != _signature(f):
                raise IncompatibleError(f"{f.name} has another signature in ggml {headers.version}")
            # Only source tells which library exports a function, and the newest version may have headers alone.
            library = known.library if known and not headers.from_source else f.library
            functions[f.name] = Function(f.name, f.header, library, f.returns, f.params, f.deprecated)
        for struct, layout in headers.structs.items():
            if out.structs.setdefault(struct, layout) != layout:
                raise IncompatibleError(f"{struct} has another layout in ggml {headers.version}")
        for enum, members in headers.enums.items():
            known_members = out.enums.get(enum, {})
            for name, number in members.items():
                # Python's enums have one number for all versions; only a count of members may grow.
                if known_members.get(name, number) != number and not name.endswith("_COUNT"):
                    raise IncompatibleError(f"{name} has another number in ggml {headers.version}")
            out.enums[enum] = known_members | members
        out.macros |= headers.macros
        cdef |= headers.cdef
        constants = headers.constants()
        out.members[headers.version] = {*constants, *(f.name for f in headers.functions)}
        for name, value in constants.items():
            out.varying.setdefault(name, {})[headers.version] = value
    out.varying = {name: values for name, values in out.varying.items() if len(set(values.values())) > 1}
    out.functions = list(functions.values())
    out.cdef = "".join(cdef.values())
    return out


def _signature(f: Function) -> tuple[str, ...]:
    return (f.returns, *(c_type for _, c_type in f.params))
