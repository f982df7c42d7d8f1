"""OLMo training as pure functions on PyTorch.

Importing this package imports no torch; its modules do. Read ``spec.py``, ``models/``, ``grad.py``, ``step.py``,
``pipe.py`` and ``train.py`` in this order to see the whole way from a parameter's declaration to a training step.
"""

__version__ = "0.1.0"
