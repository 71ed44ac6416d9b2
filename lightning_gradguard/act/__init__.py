"""A decision to the optimizer: clipping and skipping, on the host, in the queue, or on the device."""
