"""The kinds of datasets that come with the package, the default first. Imports no torch."""

from __future__ import annotations

from olmo_fn.data.instances import InstancesSettings
from olmo_fn.data.instances.fixed import FixedLength
from olmo_fn.data.instances.interleaved import Interleaved
from olmo_fn.data.instances.joined import Joined
from olmo_fn.data.instances.packed import Packed
from olmo_fn.data.instances.padded import Padded
from olmo_fn.data.instances.variable import VariableLength

KINDS: tuple[type[InstancesSettings], ...] = (FixedLength, Joined, Padded, Packed, Interleaved, VariableLength)
