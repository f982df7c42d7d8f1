"""Data: from token files on disk to ``batch = data(step)``.

Read ``tokens.py`` (a file), ``windows.py`` (training instances), ``order.py`` (which of them at which step),
``batches.py`` (input ids and labels), ``heldout.py`` (evaluation), ``prefetch.py`` (read ahead) and
``source.py``, which ties them together. Text becomes token files in ``tokenizer.py``, ``documents.py``,
``encode.py``, ``tokenize.py`` (the command) and ``corpus.py`` (the default corpus).
"""
