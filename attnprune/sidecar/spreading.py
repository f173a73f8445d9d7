"""Models whose layers lie on several devices, in the host's memory or on the disk, by accelerate."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

from attnprune.errors import InputError

DeviceMap = str | dict[str, Any]
_BALANCED = ("auto", "balanced", "balanced_low_0", "sequential")


def spread(model: Any, device_map: DeviceMap) -> Any:
    """Put a model in the host's memory where `device_map` says, in place; returns it.

    Args:
        device_map: "auto" and the like, as transformers has it, or a device (number, "cpu", "disk") for each part.

    What goes to the disk lies in a temporary folder as long as the model is there.

    Raises:
        InputError: no such strategy, or parts without a place.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    parts = list(model._no_split_modules or [])
    if isinstance(device_map, str):
        if device_map not in _BALANCED:
            raise InputError(f"device_map: {device_map!r} is not one of {', '.join(_BALANCED)}, or a dictionary")
        low_zero = device_map == "balanced_low_0"
        memory = None
        if device_map != "sequential":
            memory = get_balanced_memory(model, no_split_module_classes=parts, low_zero=low_zero)
        device_map = dict(infer_auto_device_map(model, max_memory=memory, no_split_module_classes=parts))
    disk = TemporaryDirectory() if "disk" in device_map.values() else None
    try:
        model = dispatch_model(model, device_map, offload_dir=disk and disk.name, force_hooks=True)
    except (ValueError, KeyError) as error:
        raise InputError(f"device_map: {str(error).splitlines()[0]}") from None
    model.__dict__["_attnprune_disk"] = disk  # it goes with the model
    return model
