"""Pipeline parallelism.

Without torch: which blocks go where (`split`), what each rank runs in which order (`schedule`), and what it sends to whom
(`transfers`). With it: the executor (`execute`), how a chain is cut (`stages`), and the sweep of its gradients (`sweep`). How
long a schedule takes and what it keeps is told by `olmo_fn.planner.pipeline_simulate`.
"""
