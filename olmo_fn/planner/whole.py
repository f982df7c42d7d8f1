"""Updates that see whole matrices (Muon, SOAP, Adafactor): what a rank computes and sends for its share of them."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from olmo_fn.planner.trace import Traffic


class WholeUpdate(NamedTuple):
    """The update of one parameter, by one rank of ``fsdp`` if it is ``dealt``, or else by all."""

    dealt: bool
    parts: int  # bytes of a rank's parts that go to the one that updates
    rows: int  # and of what comes back to a rank
    products: int  # FLOPs
    over_tp: Traffic


def share(updates: list[WholeUpdate], n: int) -> tuple[Traffic, int]:
    """Collectives, and FLOPs of products, of the first of ``n`` ranks: it does the first of every round of ``n``.

    >>> one = WholeUpdate(dealt=True, parts=16, rows=16, products=100, over_tp=Counter())
    >>> traffic, products = share([one] * 3, n=2)
    >>> traffic["fsdp", "all_to_all", "calls"], traffic["fsdp", "all_to_all", "bytes"], products
    (4, 112, 200)
    """
    dealt = [update for update in updates if update.dealt]
    own = [*dealt[::n], *(update for update in updates if not update.dealt)]
    traffic: Traffic = Counter()
    for update in own:
        traffic.update(update.over_tp)
    if dealt:
        sent = sum(update.parts for update in dealt) + n * sum(update.rows for update in dealt[::n])
        traffic += Counter({("fsdp", "all_to_all", "calls"): 2 * len(dealt[::n]), ("fsdp", "all_to_all", "bytes"): sent})
    return traffic, sum(update.products for update in own)
