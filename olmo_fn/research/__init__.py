"""What only a pure step gives: each file one idea, a function or two over an ordinary ``Step`` or loss.

``docs/research.md`` shows them with their notebooks.
"""

from olmo_fn.research.centralize import centralize
from olmo_fn.research.check_gradients import Checked, check_gradients, slope
from olmo_fn.research.hypergradient import hypergradient, unroll
from olmo_fn.research.laws import check_commutes, check_form, check_idempotent
from olmo_fn.research.lr_scale import lr_scale, with_lr_scale
from olmo_fn.research.many import compiled, many, stack, train_many, unstack
from olmo_fn.research.per_example import Examples, outliers, per_example, per_example_loop
from olmo_fn.research.sharpness import Eigen, hessian_product, mean_loss, sharpness, top_eigenvalue

__all__ = [
    "Checked",
    "Eigen",
    "Examples",
    "centralize",
    "check_commutes",
    "check_form",
    "check_gradients",
    "check_idempotent",
    "compiled",
    "hessian_product",
    "hypergradient",
    "lr_scale",
    "many",
    "mean_loss",
    "outliers",
    "per_example",
    "per_example_loop",
    "sharpness",
    "slope",
    "stack",
    "top_eigenvalue",
    "train_many",
    "unroll",
    "unstack",
    "with_lr_scale",
]
