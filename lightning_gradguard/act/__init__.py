"""A decision to the optimizer: clipping and skipping, on the host, in the queue, or on the device.

`executor_for` chooses the way; see `base.Executor` for what each of them does, and `gate.Gate` for what they do it with.
"""
