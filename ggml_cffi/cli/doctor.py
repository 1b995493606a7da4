"""The command ``ggml-cffi doctor``: one page on what was found and what was not, with a remedy for each gap.

The devices are listed in a worker process, so that a driver that ends its process does not end this one.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ggml_cffi
from ggml_cffi.c import library
from ggml_cffi.core.text import clean, count, size, table, to_json

if TYPE_CHECKING:
    from ggml_cffi.core.diagnosis import DeviceFacts, Diagnosis
    from ggml_cffi.core.gaps import Gap

_TIMEOUT = 300.0  # seconds: a driver with an empty cache of shaders may take long


def register(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser("doctor", help="show what was found and what was not, and what to do about it")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from ggml_cffi.core.gaps import find_gaps  # most commands need none of this

    found = _collect()
    gaps = find_gaps(found)
    if args.json:
        facts = {"ggml_cffi": ggml_cffi.__version__, **asdict(found), "gaps": [asdict(gap) for gap in gaps]}
        facts["library"]["refused"] = [place._asdict() for place in found.library.refused]
        print(to_json(facts, indent=2))
    else:
        print("\n".join(clean(line) for line in _page(found, gaps)))
    if not found.library.version:
        return 2
    return 1 if any(gap.asked for gap in gaps) else 0


def _collect() -> Diagnosis:
    """Return the diagnosis of a worker process. If it dies, find the plug-ins that end their process one by one."""
    import logging

    logging.getLogger("ggml_cffi").addHandler(logging.NullHandler())  # the page has what a worker writes
    environ = dict(os.environ)
    collector, prober = f"{__name__}:collector", f"{__name__}:prober"
    found: Diagnosis
    try:
        found = _call(collector, {}, environ=environ)
        return found
    except ggml_cffi.BackendCrashedError as error:
        end = _end(error)
    given = environ.get(library.BACKENDS)
    names = sorted(library.plugin_files() if given is None else library.plugin_names(given.split(",")))
    crashes = {}
    for name in names:
        try:
            _call(prober, {library.BACKENDS: name})
        except ggml_cffi.BackendCrashedError as error:
            crashes[name] = _end(error)
    crashes = crashes or dict.fromkeys(names, end)
    others = ",".join(name for name in names if name not in crashes)
    found = _call(collector, {library.BACKENDS: others}, crashes, environ=environ)
    return found


def collector() -> Callable[..., Diagnosis]:
    """Return the function with which a worker process collects the facts."""
    from ggml_cffi.core.diagnosis import collect

    return collect


def prober() -> Callable[[], None]:
    """Return the function with which a worker process tries a plug-in."""

    def probe() -> None:
        for device in ggml_cffi.devices():
            device.memory()

    return probe


def _call(make: str, env: dict[str, str], *args: Any, **kwargs: Any) -> Any:
    """Call the function that ``make`` returns in a worker process."""
    from ggml_cffi.isolate import Worker

    with Worker(make, name="doctor", env=env, timeout=_TIMEOUT) as worker:
        return worker(*args, **kwargs)


def _end(error: ggml_cffi.BackendCrashedError) -> str:
    """Return the end of a process in a word or two."""
    if isinstance(error, ggml_cffi.BackendTimeoutError):
        return f"no answer in {_TIMEOUT:.0f} s"
    code = error.exitcode or 0
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _page(found: Diagnosis, gaps: list[Gap]) -> Iterator[str]:
    """Yield the lines of the page: for each part what was found, then its gaps."""
    parts: tuple[tuple[str, str, Iterator[str]], ...] = (
        ("library", "Library", _library(found)),
        ("plugins", "Plug-ins", _plugins(found)),
        ("vulkan", "Vulkan", _vulkan(found)),
        ("devices", "Devices", _devices(found)),
        ("cpu", "CPU", _cpu(found)),
        ("python", "Python", _python(found)),
        ("environment", "Environment", (f"  {k}={v}" for k, v in found.environment.items())),
    )
    for part, title, lines in parts:
        yield title
        shown = list(lines)
        for gap in gaps:
            if gap.part == part:
                shown += [f"  gap  {gap.problem}", f"       -> {gap.remedy}"]
        yield from shown or ["  nothing is set" if part == "environment" else "  nothing"]
        yield ""
    yield f"GPUs that are used by default: {', '.join(found.gpus) or 'none, the CPU does all the work'}"
    yield f"{count(len(gaps), 'gap')}" if gaps else "no gaps"


def _library(found: Diagnosis) -> Iterator[str]:
    if found.library.version:
        facts = found.library
        yield f"  ok   ggml {facts.version}, from {facts.folder or 'the system'}: {facts.place}"


def _plugins(found: Diagnosis) -> Iterator[str]:
    for plugin in found.plugins:
        if plugin.loaded:
            yield f"  ok   {plugin.name}: {plugin.file}"
        elif plugin.excluded:
            yield f"  -    {plugin.name}: {plugin.reason}"


def _vulkan(found: Diagnosis) -> Iterator[str]:
    loader = found.vulkan.loader
    if not loader.error:
        yield f"  ok   loader {loader.file}, Vulkan {loader.version}"
    for driver in found.vulkan.drivers:
        if not driver.error:
            yield f"  ok   driver {driver.manifest}: {driver.library}, Vulkan {driver.api_version}"
    for card in found.vulkan.cards:
        yield f"  ok   {card.vendor} GPU at {card.address}"


def _devices(found: Diagnosis) -> Iterator[str]:
    if not found.devices:
        return
    rows = [("device", "type", "free", "total", "features", "description")]
    for device in found.devices:
        memory = (size(device.memory_free), size(device.memory_total))
        rows.append((device.name, device.type, *memory, _features(device), device.description))
    yield from (f"  {line}" for line in table(rows, right=(2, 3)).splitlines())
    for device in found.devices:
        if device.same_card_as:
            yield f"  -    {device.name} is the card of {device.same_card_as}, and is used only if it is named"
    if found.peer_access:
        yield f"  -    CUDA peer access is {found.peer_access}"


def _features(device: DeviceFacts) -> str:
    words = [key.replace("_", " ") for key in ("fp16", "bf16", "int_dot") if device.features.get(key, "0") != "0"]
    if (matrix := device.features.get("matrix_cores", "none")) != "none":
        words.append(matrix)
    if device.emulated:
        words.append("emulated on the CPU")
    return ", ".join(words) or "-"


def _cpu(found: Diagnosis) -> Iterator[str]:
    if found.cpu:
        yield f"  ok   {found.cpu.file}"
        yield f"       {', '.join(found.cpu.features)}"
        yield f"       {count(found.cpu.threads, 'thread')}"


def _python(found: Diagnosis) -> Iterator[str]:
    packages = ", ".join(f"{name} {version}" for name, version in found.python.packages.items())
    yield f"  ok   ggml-cffi {ggml_cffi.__version__}, Python {found.python.version}, {packages}"
    yield f"       {found.python.executable}, {found.python.platform}"
