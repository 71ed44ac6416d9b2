"""Going back to a state that was good: what is kept, where, and which of it counts."""

from lightning_gradguard.recovery.cooldown import LoweredRates
from lightning_gradguard.recovery.host import HostTensor, available_bytes, copy_to_host, num_bytes, put_back
from lightning_gradguard.recovery.ring import Entry, Ring
from lightning_gradguard.recovery.rollback import Rollback

__all__ = [
    "Entry",
    "HostTensor",
    "LoweredRates",
    "Ring",
    "Rollback",
    "available_bytes",
    "copy_to_host",
    "num_bytes",
    "put_back",
]
