"""How many workers the load asks for. Each tells how much of its slots and of its cache is taken, waiting
requests included; there should be as many workers as keep the fuller of the two at ``TARGET``.

The same proportional rule as Kubernetes' autoscaler; Serve averages over time, waits and bounds."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from serve_apps.engine.types import EngineLoad

TARGET = 0.8


@dataclass(frozen=True, slots=True)
class Pressure:
    """Of one worker, or the sum of several; 1.0 of either is one full worker."""

    slots: float  # requests that run or wait, per request that can run at once: beyond 1 a queue stands
    kv: float  # blocks for keys and values

    def __add__(self, other: "Pressure") -> "Pressure":
        return Pressure(self.slots + other.slots, self.kv + other.kv)


def pressure_of(load: EngineLoad, max_running: int) -> Pressure:
    return Pressure((load.num_running + load.num_waiting) / max_running, load.kv_share)


def workers_wanted(pressures: Iterable[Pressure]) -> int:
    """At least one: nobody would hear of the request that needs the first."""
    total = sum(pressures, Pressure(0.0, 0.0))
    return max(1, math.ceil(max(total.slots, total.kv) / TARGET - 1e-9))
