"""Pipeline parallelism, planned on paper and then carried out.

Without torch: which blocks go where (`split`), what each rank runs in which order (`schedule`), with which transfers
(`communicate`), how long that takes and what it keeps (`simulate`, `picture`). With it: the executor (`execute`), and a
backward in two parts for the zero-bubble schedule (`zero_bubble`; `traced` for compiled stages).
"""
