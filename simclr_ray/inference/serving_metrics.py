"""What a replica of `model serve` counts, for Prometheus."""

from __future__ import annotations

from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ServingMetrics:
    """What a replica counts, all with its name: another one may answer the next time."""

    def __init__(self, replica: str) -> None:
        self._registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter(
            "simclr_requests", "Images asked about, by the answer.", ["replica", "code"], **options
        )
        self._replica = replica

        def histogram(name: str, says: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"simclr_{name}", says, ["replica"], buckets=buckets, **options)
            return made.labels(replica)

        self.request_s = histogram("request_seconds", "Of a request that was answered.", SECONDS)
        self.decode_s = histogram("decode_seconds", "Of an image.", SECONDS)
        self.encode_s = histogram("encode_seconds", "Of a batch.", SECONDS)
        self.batch = histogram("batch_images", "Of a batch.", SIZES)

    def count(self, code: int) -> None:
        """Count a request by the code of its answer."""
        self._requests.labels(self._replica, str(code)).inc()

    def text(self) -> str:
        """Return all of them as Prometheus reads them."""
        return generate_latest(self._registry).decode()
