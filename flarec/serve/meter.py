"""What `/metrics` tells: counters as plain numbers, which cost a step nothing, read when somebody asks.

Numbers of a generation are added when it ends. Position p of a block counts from 1: `flarec_drafted_tokens_total` is
how many steps verified a draft there, `flarec_accepted_tokens_total` in how many of them it and all before it were
accepted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flarec.decode.stats import DecodeStats

from .jobs import Job, News

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Meter(Collector):
    """Counters since the server started, for one registry.

    stats    of the engine
    queued   gives how many generations wait for their first token, and how many run
    """

    def __init__(self, stats: DecodeStats) -> None:
        self.stats = stats
        self.queued: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.prompt_tokens = self.tokens = self.forwards = self.failures = 0
        self.outcomes: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.drafted: Counter[int] = Counter()
        self.accepted: Counter[int] = Counter()
        self.registry = CollectorRegistry()
        self.first_token = Histogram(
            "flarec_time_to_first_token_seconds", "From a request's arrival to its first token.",
            buckets=SECONDS, registry=self.registry,
        )
        self.registry.register(self)

    def ended(self, job: Job, news: News) -> None:
        """A generation ended as its news say."""
        request = job.request
        if request is None and news.refusal is not None:  # it never was one: a refusal counts it
            return
        self.outcomes[news.finish or "error"] += 1
        if request is None:
            return
        self.tokens += len(request.tokens)
        self.forwards += request.forwards
        if request.options.mode == "ar-trust":
            _positions(request.offered, self.drafted)
            _positions(request.histogram, self.accepted)

    def collect(self) -> Iterator[Metric]:
        waiting, running = self.queued()
        yield GaugeMetricFamily("flarec_requests_waiting", "Generations without a token so far.", value=waiting)
        yield GaugeMetricFamily("flarec_requests_running", "Generations that have tokens.", value=running)
        yield CounterMetricFamily("flarec_prompt_tokens", "Tokens of prompts.", value=self.prompt_tokens)
        yield CounterMetricFamily(
            "flarec_prompt_tokens_known", "Tokens of prompts that the prefix cache knew.", value=self.stats.known_tokens
        )
        yield CounterMetricFamily("flarec_generation_tokens", "New tokens of those that ended.", value=self.tokens)
        yield CounterMetricFamily(
            "flarec_generation_forwards", "Forwards that these took part in, a prefill counts as one.",
            value=self.forwards,
        )
        yield CounterMetricFamily(
            "flarec_taken_back_tokens", "Tokens that rechecks took back.", value=self.stats.taken_back
        )
        yield GaugeMetricFamily(
            "flarec_tokens_per_forward", "New tokens per forward, since the start.",
            value=self.tokens / self.forwards if self.forwards else 0.0,
        )
        yield CounterMetricFamily("flarec_engine_steps", "Forwards of running batches.", value=self.stats.steps)
        yield CounterMetricFamily("flarec_engine_prefills", "Forwards that read prompts.", value=self.stats.prefills)
        yield CounterMetricFamily("flarec_engine_failures", "Steps that raised an error.", value=self.failures)
        yield _labelled("flarec_generations", "Generations that ended, by how.", "finish", self.outcomes)
        yield _labelled("flarec_refusals", "Requests that were not served, by status.", "status", self.refused)
        yield _labelled("flarec_drafted_tokens", "Drafts that were verified, by position.", "position", self.drafted)
        yield _labelled("flarec_accepted_tokens", "Drafts that were accepted, by position.", "position", self.accepted)

    def text(self) -> bytes:
        """In the text format of Prometheus."""
        return generate_latest(self.registry)


def _positions(steps: Mapping[int, int], into: Counter[int]) -> None:
    """steps: a number of drafts -> in how many steps. A step with n drafts has one at each of the positions 1 to n."""
    for count, times in steps.items():
        for position in range(1, count + 1):
            into[position] += times


def _labelled(name: str, text: str, label: str, values: Mapping[str, int] | Mapping[int, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in sorted(values.items(), key=str):
        family.add_metric([str(key)], value)
    return family
