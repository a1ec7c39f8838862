"""The device of a module, and its training or evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import RLock

import torch
from torch import nn

from demur.classifier.guard import raising_module_errors
from demur.errors import DemurError, ModuleError

_LOCK = RLock()
_ENTERED: dict[int, tuple[int, bool]] = {}
"""Modules that are evaluated now, by id: by how many callers, and the mode before the first."""


def device_of(module: nn.Module, default: torch.device) -> torch.device:
    """Give the device of the module's first parameter or buffer, or `default` if there is none.

    Raises
    ------
    DemurError
        If the module has no memory for its weights: its device is "meta".
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_meta:
            raise DemurError(
                'the module is on the device "meta", without weights: use to_empty(device="cpu"), '
                "and load its weights."
            )
        return tensor.device
    return default


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, every part of the module is in evaluation mode. Afterwards, each has its old mode.

    Modes are switched by `train()` and `eval()`, so that their overrides run. If several threads
    are inside at the same time, the last one that leaves restores the modes.
    """
    parts = list(module.modules())
    with _LOCK:
        for part in parts:
            callers, mode = _entered(part)
            _ENTERED[id(part)] = callers + 1, mode
    try:
        with _LOCK:
            _set_modes([(part, False) for part in parts])
        yield
    finally:
        with _LOCK:
            _set_modes(_left(parts))


@contextmanager
def modes_kept(*given: object) -> Iterator[None]:
    """After the block, every part of each module has the mode that it had before. Other objects
    are left alone. A part that another thread evaluates gets its mode when that thread leaves.
    """
    modules = [one for one in given if isinstance(one, nn.Module)]
    with _LOCK:
        modes = [(part, _entered(part)[1]) for one in modules for part in one.modules()]
    try:
        yield
    finally:
        with _LOCK:
            for part, mode in modes:
                if id(part) in _ENTERED:
                    _ENTERED[id(part)] = _entered(part)[0], mode
            _set_modes([one for one in modes if id(one[0]) not in _ENTERED])


def _entered(part: nn.Module) -> tuple[int, bool]:
    """Give how many callers evaluate a part now, and its mode without them."""
    return _ENTERED.get(id(part), (0, getattr(part, "training", False)))


def _left(parts: list[nn.Module]) -> list[tuple[nn.Module, bool]]:
    """Take one caller off each part, and give the mode that each part has from now on.

    A part without another caller returns to its old mode. Another part stays in evaluation mode:
    `train()` of a parent must not switch it.
    """
    modes = []
    for part in parts:
        callers, mode = _ENTERED.pop(id(part))
        if callers > 1:
            _ENTERED[id(part)] = callers - 1, mode
            modes.append((part, False))
        else:
            modes.append((part, mode))
    return modes


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Set the mode of each part, parents first. What `train()` leaves wrong is set directly.

    Raises
    ------
    ModuleError
        If a part fails. The others have their modes all the same.
    """
    failed: ModuleError | None = None
    for part, mode in modes:
        if getattr(part, "training", mode) == mode:
            continue  # a frozen TorchScript module has no mode
        try:
            with raising_module_errors(), suppress(NotImplementedError):
                # An exported program refuses: it keeps the behaviour that it was exported with.
                if mode:
                    part.train()
                else:
                    part.eval()
            if part.training != mode:
                part.training = mode
        except ModuleError as error:
            failed = error
    if failed is not None:
        raise failed
