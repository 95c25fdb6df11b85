"""What torch raises when a processor gives out, told apart."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's has a class of its own, the CPU's allocator only a sentence."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_device_lost(error: BaseException) -> bool:
    """A GPU that fell off the bus, whose driver went, or that met an illegal address: this process cannot use it again."""
    return not is_out_of_memory(error) and (
        type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)
    )
