"""What a run says of its experts: metrics a person reads, the loads of some steps, and a picture of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import tiny_run

from olmo_fn.models.config import Attention, Block, Model
from olmo_fn.models.settings.moe import MoE
from olmo_fn.train.loads import plot_loads, with_loads
from olmo_fn.train.observers.jsonl import read_metrics
