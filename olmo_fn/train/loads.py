"""What routers report, as people read it: how even the loads of experts are."""

from __future__ import annotations

from typing import Any

PREFIX = "load/"


def with_loads(values: dict[str, Any], every_layer: bool) -> dict[str, Any]:
    """A step's metrics with those of its routers, if it has any; ``every_layer``: the loads of all experts too.

    - ``load_excess``: the largest load of an expert in any layer, less the even one and over it; 0 is even
    - ``router_entropy``: of a token's scores, in nats, the mean over tokens and layers; log(experts) is undecided
    - ``dropped``: the share of choices that no expert had room for
    - ``load/3``: the share of the choices of layer 3 that went to each expert

    >>> with_loads({"loss": 2.0, "load/0": [6.0, 2.0], "routed": 4.0, "router_entropy": 2.0, "dropped": 2.0}, True)
    {'loss': 2.0, 'load_excess': 0.5, 'router_entropy': 0.5, 'dropped': 0.25, 'load/0': [0.75, 0.25]}
    """
    loads = {name: load for name, load in values.items() if name.startswith(PREFIX)}
    if not loads:
        return values
    own = {*loads, "routed", "router_entropy", "dropped"}
    found = {name: value for name, value in values.items() if name not in own}
    found["load_excess"] = round(max(max(load) * len(load) / sum(load) for load in loads.values()) - 1, 4)
    found["router_entropy"] = values["router_entropy"] / values["routed"]
    found["dropped"] = values["dropped"] / sum(map(sum, loads.values()))
    shares = {name: [round(n / sum(load), 5) for n in load] for name, load in loads.items()} if every_layer else {}
    return found | shares
