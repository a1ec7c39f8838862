"""Counts on the CPU what would make a program wait for a GPU."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = {  # operations whose result the program needs before it can go on
    aten._local_scalar_dense,  # .item(), bool(), int(), float()
    aten.is_nonzero,
    aten.equal,
    aten.allclose,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.repeat_interleave,
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__}
UPLOADS = {torch.tensor, torch.as_tensor, torch.from_numpy}
FACTORIES = {torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.eye}
FACTORIES |= {torch.rand, torch.randn, torch.randint, torch.linspace}


class Waiting:
    """Context manager. `reads` counts operations whose result must be known on the CPU, `uploads`
    tensors that are made on the CPU (on a machine with a GPU their copy to it waits, too).
    """

    def __init__(self):
        self.reads = 0
        self.uploads = 0
        self.modes = (_Functions(self), _Operations(self))
        self.inside = False

    def __enter__(self):
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)


class _Functions(TorchFunctionMode):
    def __init__(self, owner):
        super().__init__()
        self.owner = owner

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        owner = self.owner
        if owner.inside or function not in COPIES | UPLOADS | FACTORIES:
            return function(*args, **kwargs)
        if function in COPIES:
            owner.reads += not hasattr(args[0], "on_the_cpu")
        elif function in UPLOADS:
            owner.uploads += not isinstance(args[0], torch.Tensor)
        else:
            owner.uploads += "device" not in kwargs
        owner.inside = True  # the operations of this function are counted already
        try:
            result = function(*args, **kwargs)
            if function is torch.Tensor.cpu:
                result = result.view(result.shape)
                result.on_the_cpu = True  # to read it costs nothing more
            return result
        finally:
            owner.inside = False


class _Operations(TorchDispatchMode):
    def __init__(self, owner):
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        if not self.owner.inside and (packet in READS or self._by_flags(packet, args)):
            self.owner.reads += 1
        return function(*args, **(kwargs or {}))

    def _by_flags(self, packet, args):
        """An index of flags becomes an index of places: their number must be known."""
        if packet not in INDEXED:
            return False
        flags = (torch.bool, torch.uint8)
        return any(one is not None and one.dtype in flags for one in args[1])
