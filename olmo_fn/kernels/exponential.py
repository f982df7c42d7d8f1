"""The exponential function of the kernels, by device."""

from __future__ import annotations

import math

from torch import Tensor

LOG2E = math.log2(math.e)


def exp(x: Tensor) -> Tensor:
    """e^x; on a processor by way of 2^(x · log₂ e), since a compiled loop around that is a fifth to a quarter faster.

    Its relative error grows with |x|, by about 1e-7 |x| in fp32. For a GPU Inductor knows the sum of exp(x - max x), and makes
    one loop of both; of powers of two it makes two.

    >>> import torch
    >>> exp(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 2.7183])
    """
    return x.exp() if x.is_cuda else (x * LOG2E).exp2()
