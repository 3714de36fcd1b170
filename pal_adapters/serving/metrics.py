"""What `/metrics` reports."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST


class Metrics:
    """Prometheus metrics of one service. Task labels are names of served tasks, so their number is bounded."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.predictions = Counter(
            "pal_adapters_predictions", "Answered requests by task.", ["task"], registry=self.registry
        )
        self.calls = Counter("pal_adapters_calls", "Calls of /predict by status.", ["status"], registry=self.registry)
        self.call_seconds = Histogram(
            "pal_adapters_call_seconds", "Duration of a call of /predict.", registry=self.registry
        )
        self.batch_seconds = Histogram("pal_adapters_batch_seconds", "Duration of a batch.", registry=self.registry)
        self.batch_size = Histogram(
            "pal_adapters_batch_size", "Requests in a batch.", buckets=[2**i for i in range(9)],
            registry=self.registry,
        )  # fmt: skip
        self.waiting = Gauge("pal_adapters_waiting", "Requests that wait for their batch.", registry=self.registry)

    def count_call(self, path: str, status: int) -> None:
        """Counts a response."""
        if path == "/predict":
            self.calls.labels(status).inc()

    def text(self) -> bytes:
        """The metrics in Prometheus' format."""
        return generate_latest(self.registry)
