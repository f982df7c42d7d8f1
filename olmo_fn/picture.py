"""One way to make a picture: a matplotlib figure without a display."""

from __future__ import annotations

from typing import Any


def figure(width: float, height: float, rows: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of ``width`` x ``height`` inches and its axes, an array of them for several ``rows``; save with ``savefig``.

    ``options`` go to matplotlib's ``Figure.subplots``. ValueError, in one line, without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('a picture needs matplotlib; install it with: pip install "olmo-fn[plot]"') from None
    found = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(found)
    return found, found.subplots(rows, **options)
