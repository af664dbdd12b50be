"""What a server measures of itself, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)
_SHORT = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 25)
_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """The metrics of one server, with a registry of its own. Any thread may call every method."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._queue = Gauge("controlrt_queue_length", "Jobs that wait or run", ["model"], registry=self.registry)
        self._step = self._histogram("step_seconds", "Time of one denoising step of a batch", ["model"], _SHORT)
        self._batch = self._histogram("batch_pictures", "Pictures that a step was for", ["model"], _COUNTS)
        self._restarts = self._counter("worker_restarts_total", "Workers that died and were replaced", ["model"])
        self._preview = self._histogram(
            "first_preview_seconds", "From submission to the first preview that a client sees", ["model"], _LONG
        )
        self._request = self._histogram(
            "request_seconds", "From a request's head to the end of its answer", ["method", "route", "status"], _LONG
        )
        self._rejections = self._counter(
            "rejections_total", "Requests that were answered with an error, by its code", ["reason"]
        )

    def queued(self, bundle: str, jobs: int) -> None:
        """So many jobs wait or run now."""
        self._queue.labels(bundle).set(jobs)

    def stepped(self, bundle: str, pictures: int, seconds: float) -> None:
        """A step for several pictures has run."""
        self._batch.labels(bundle).observe(pictures)
        self._step.labels(bundle).observe(seconds)

    def restarted(self, bundle: str) -> None:
        """A worker has died, and another one takes its place."""
        self._restarts.labels(bundle).inc()

    def previewed(self, bundle: str, seconds: float) -> None:
        """A client is about to see the first preview of its job."""
        self._preview.labels(bundle).observe(seconds)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """An answer is out; ``route`` is the path's template, so that there are few of them."""
        self._request.labels(method, route, str(status)).observe(seconds)

    def rejected(self, reason: str) -> None:
        """A request was answered with an error."""
        self._rejections.labels(reason).inc()

    def exposition(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, what: str, labels: list[str], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"controlrt_{name}", what, labels, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, what: str, labels: list[str]) -> Counter:
        return Counter(f"controlrt_{name}", what, labels, registry=self.registry)
