"""Data: from token files on disk to ``batch = data(step)``.

Read ``tokens.py`` (a file), ``instances/`` (training instances, by number), ``shuffle.py`` and ``sizes.py`` (which of them at
which step), ``loader.py`` (the batch of a step), ``heldout.py`` (evaluation), ``prefetch.py`` (read ahead) and ``source.py``,
which opens what ``settings.py`` describes. Text becomes token files in ``tokenizer.py``, ``documents.py``, ``encode.py``,
``tokenize.py`` (the command) and ``corpus.py`` (the default corpus).
"""
