"""A step of an old run once more, bit for bit, with the text that it saw: ``olmo-fn replay RUN --step 120``.

Read ``replay.py`` (from the newest checkpoint before the step to the step) and ``command.py`` (what is printed).
"""
