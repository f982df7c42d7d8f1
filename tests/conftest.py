"""One thread a test process: for tensors of the tests' size more are slower, above all on a busy machine."""

import torch

torch.set_num_threads(1)
