"""Planning on paper: memory, traffic and time of a rank for any mesh, with no devices and nothing allocated.

`trace` watches a program, `profile` cuts the real step into parts while it runs on meta tensors, and `memory`, `traffic` and
`clock` put the parts together for a rank of any depth and schedule. `estimate` is all of it; `search` looks for the best.
"""
