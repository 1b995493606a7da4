"""Benchmarks, each beside a peer in the same run. Each module prints a table and writes JSON to ``results/``."""

from __future__ import annotations

import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def save(name: str, result: dict[str, Any]) -> Path:
    """Write ``result`` with the machine and the date to ``results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    result = {"date": date.today().isoformat(), "machine": platform.machine(), "processor": _processor()} | result
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
