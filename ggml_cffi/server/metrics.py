"""Counts and times for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ggml_cffi.server.catalog import Catalog

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server, in a registry of its own.

    Parameters
    ----------
    catalog
        The models, whose load is read for each report.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter("ggml_cffi_requests", "Requests that have ended", ["path", "status"], **own)
        self.request_seconds = Histogram(
            "ggml_cffi_request_seconds", "Time of a request, its stream included", ["path"], buckets=_SECONDS, **own
        )
        self.prompt_tokens = Counter("ggml_cffi_prompt_tokens", "Tokens of prompts", ["model"], **own)
        self.first_token_seconds = Histogram(
            "ggml_cffi_first_token_seconds", "Time from a prompt to its first token", ["model"], buckets=_SECONDS, **own
        )
        self._registry.register(_Load(catalog))

    def text(self) -> bytes:
        """Return the report in Prometheus' text format."""
        return generate_latest(self._registry)


class _Load(Collector):
    """The load of the models at the moment of a report."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        running = GaugeMetricFamily("ggml_cffi_running", "Answers in generation", labels=["model"])
        waiting = GaugeMetricFamily("ggml_cffi_waiting", "Jobs that wait", labels=["model"])
        n_bytes = GaugeMetricFamily("ggml_cffi_model_bytes", "Planned bytes of a loaded model", labels=["model"])
        generated = CounterMetricFamily(
            "ggml_cffi_generated_tokens", "Generated tokens since the model was loaded", labels=["model"]
        )
        for loaded in self._catalog.loaded:
            running.add_metric([loaded.name], loaded.engine.n_running)
            waiting.add_metric([loaded.name], loaded.engine.n_waiting)
            generated.add_metric([loaded.name], loaded.engine.n_generated)
            n_bytes.add_metric([loaded.name], loaded.engine.facts.n_bytes)
        yield from (running, waiting, n_bytes, generated)
