"""Transforms of gradients and of steps, one idea a file; those that every run uses are in `olmo_fn.core.pipe`."""

from olmo_fn.core.pipe import accumulate, clip, donate, ema, grad, skip_spikes
from olmo_fn.transforms.attention import attention
from olmo_fn.transforms.balance import balance_experts
from olmo_fn.transforms.bias import first_step_bias
from olmo_fn.transforms.clipping import clip_groups, clip_value
from olmo_fn.transforms.freeze import freeze, train_only
from olmo_fn.transforms.gradient_noise import gradient_noise
from olmo_fn.transforms.merge import merge
from olmo_fn.transforms.noise import accumulate_measured, noise_scale
from olmo_fn.transforms.normalize import dims_of, normalize, unit_params
from olmo_fn.transforms.skip import skip_steps

__all__ = [
    "accumulate",
    "accumulate_measured",
    "attention",
    "balance_experts",
    "clip",
    "clip_groups",
    "clip_value",
    "dims_of",
    "donate",
    "ema",
    "first_step_bias",
    "freeze",
    "grad",
    "gradient_noise",
    "merge",
    "noise_scale",
    "normalize",
    "skip_spikes",
    "skip_steps",
    "train_only",
    "unit_params",
]
