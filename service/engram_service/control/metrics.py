"""Metrics of several processes as those of one server: told by each as JSON, and put together by the manager."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from prometheus_client import Metric

_OF_EACH = ("process_", "python_")  # metrics of a process as such: by process
_COMMON = (
    "engram_build_info",
    "engram_redis_",
)  # what all processes see alike: the greatest counts, the others are sums
MANAGER = "manager"


class Registry(Protocol):
    """Of prometheus_client."""

    def collect(self) -> Iterable[Metric]: ...


class Families:
    """Metrics that are put together already, for prometheus_client's exposition."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


def told(registry: Registry) -> list[dict[str, Any]]:
    """All of a registry as JSON has it."""
    return [
        {
            "name": family.name,
            "text": family.documentation,
            "kind": family.type,
            "samples": [
                [one.name, one.labels, one.value if math.isfinite(one.value) else str(one.value)]
                for one in family.samples
            ],
        }
        for family in registry.collect()
    ]


def together(processes: dict[str, list[dict[str, Any]]]) -> Families:
    """Of the manager and the data processes, by name: families in the order of the first that has them."""
    families: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for process, told in processes.items():
        for family in told:
            name = family["name"]
            families.setdefault(name, Metric(name, family["text"], family["kind"]))
            own = values.setdefault(name, {})
            for sample, labels, value in family["samples"]:
                if name.startswith(_OF_EACH):
                    labels = {**labels, "process": process}
                key = sample, tuple(sorted(labels.items()))
                value = float(value)
                if key not in own:
                    own[key] = value
                elif name.startswith(_COMMON):
                    own[key] = max(own[key], value)
                else:
                    own[key] += value
    for name, own in values.items():
        for (sample, pairs), value in own.items():
            families[name].add_sample(sample, dict(pairs), value)
    return Families(list(families.values()))
