"""Pipeline parallelism, planned on paper and then carried out.

Without torch: which blocks go where (`split`), what each rank runs in which order (`schedule`), with which transfers
(`communicate`), how long that takes and what it keeps (`simulate`, `picture`). With it: the executor (`execute`), how a
chain is cut (`stages`), and the sweep of its gradients (`sweep`).
"""
