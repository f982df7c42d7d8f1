"""Text from a trained model, with a cache of keys and values: ``olmo-fn generate RUN "def "``.

Read ``decode.py`` (the model with a cache), ``sampling.py`` (one token from logits), ``sample.py`` (many
tokens), ``healing.py`` and ``text.py`` (text to tokens to text), ``load.py`` (a model out of a run folder).
"""
