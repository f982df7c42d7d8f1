"""OLMo training as pure functions on PyTorch.

Importing this package imports no torch; its modules do. Read ``spec.py``, ``nn/``, ``models/``, ``core/chain.py``,
``core/step.py``, ``core/pipe.py`` and ``train/loop.py`` in this order to see the way from a parameter's declaration to a run.
"""

__version__ = "0.1.0"
