"""The command line: ``olmo-fn train olmo2-tiny``, or ``python -m olmo_fn train olmo2-tiny``."""
