"""A GPU made of the CPU: its tensors say ``cuda:0``, compute on the CPU, and tell when the host would have to wait.

What a real GPU refuses (tensors of two devices in one operation) is refused here, and what would stop the host until
the GPU has caught up is noted: reading a value, an output whose size depends on values, a copy to the host, a copy from
memory that is not pinned. On a real GPU ``torch.cuda.set_sync_debug_mode`` notes the same. The forward pass only:
torch's autograd asks the driver for streams.
"""

import contextlib
import traceback
from contextlib import contextmanager

import pytest
import torch
from packed_attention import slow_runs
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from skipvision_train.plans import backends

aten = torch.ops.aten
REAL_TENSOR = torch.tensor
SIZE_BY_VALUE = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class OnGpu(Tensor):
    """A tensor on the simulated GPU; ``inner`` has its values."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cuda:0",
        )
        made.inner = inner
        return made

    def tolist(self):
        """C code that would look for the memory."""
        return self.cpu().tolist()

    def untyped_storage(self):
        """Where the values are."""
        return self.inner.untyped_storage()

    def __repr__(self, **_):
        return f"OnGpu({self.cpu()})"

    def __format__(self, spec):
        return repr(self)

    def numpy(self, *, force=False):
        """The same."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function}: a tensor of the simulated GPU outside of it")


class SimulatedGpu(TorchDispatchMode):
    """While it is entered, ``device="cuda"`` is there.

    Attributes:
        waits: where the host would have waited, and for what.
        packed: calls of torch's packed attention.
    """

    def __init__(self):
        super().__init__()
        self.waits = []
        self.packed = 0
        self.pinned = set()

    def _note(self, what):
        ours = [f for f in traceback.extract_stack() if "skipvision_train/" in f.filename or "/models/" in f.filename]
        place = f"{ours[-1].filename}:{ours[-1].lineno} {ours[-1].line}" if ours else "test"
        self.waits.append(f"{what}: {place}")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
        wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if function is aten._pin_memory.default:
            copy = args[0].clone()
            self.pinned.add(copy.untyped_storage().data_ptr())
            return copy
        if not on_gpu and wanted != "cuda":
            return function(*args, **kwargs)
        if wanted is not None:
            kwargs["device"] = "cpu"
        if function is aten.copy_.default:
            wanted = "cuda" if isinstance(args[0], OnGpu) else "cpu"
        self._check(function, args, kwargs, tensors, on_gpu, wanted)
        plain = tree_map(lambda leaf: leaf.inner if isinstance(leaf, OnGpu) else leaf, (args, kwargs))
        result = function(*plain[0], **plain[1])
        if function._schema.is_mutable and isinstance(args[0], Tensor):
            return args[0]
        if wanted == "cpu":
            return result
        return tree_map(lambda leaf: OnGpu(leaf) if isinstance(leaf, Tensor) else leaf, result)

    def varlen(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, enable_gqa=True, window_size=(-1, 0)
    ):
        """In the place of ``torch.nn.attention.varlen.varlen_attn``."""
        self.packed += 1
        parts = (part.inner for part in (query, key, value, cu_seq_q, cu_seq_k))
        return OnGpu(slow_runs(*parts, max_q, max_k, scale))

    def _check(self, function, args, kwargs, tensors, on_gpu, wanted):
        host = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
        moved = function in (aten._to_copy.default, aten.copy_.default)
        if moved and on_gpu and wanted == "cpu":
            self._note("copied to the host")
        elif moved and host and wanted == "cuda":
            is_async = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if not is_async or host[-1].untyped_storage().data_ptr() not in self.pinned:
                self._note("copied from the host, unpinned or blocking")
        elif on_gpu and any(tensor.ndim for tensor in host):
            if function not in BY_INDEX or not isinstance(args[0], OnGpu):
                raise RuntimeError(f"{function}: tensors on cpu and cuda:0")
            self._note("indices on the host")
        elif function is aten._local_scalar_dense.default:
            self._note("a value read")
        elif function in SIZE_BY_VALUE:
            self._note("a size that depends on values")
        elif function in BY_INDEX and any(i is not None and i.dtype == torch.bool for i in args[1]):
            filled = function is not aten.index.Tensor and args[2].numel() == 1 and len(args[1]) == 1
            if not filled:  # which is a masked_fill
                self._note("a mask as an index")


def _new_tensor(data, *, device=None, **kwargs):
    """In the place of ``torch.tensor``, which makes tensors without asking anybody."""
    made = REAL_TENSOR(tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, OnGpu) else leaf, data), **kwargs)
    return made if device is None else made.to(device)


@contextmanager
def simulated_gpu():
    """A :class:`SimulatedGpu` of compute capability 9.0, with torch's packed attention, in fp32 too."""
    torch._C._ensureCUDADeviceGuardSet()  # one that does nothing where there is no driver
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch, SimulatedGpu() as gpu:
        patch.setattr(torch, "tensor", _new_tensor)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "simulated")
        patch.setattr(backends, "PACKED_DTYPES", (torch.float32, *backends.PACKED_DTYPES))
        patch.setattr(varlen, "varlen_attn", gpu.varlen)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        backends.select_backend.cache_clear()
        try:
            yield gpu
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
            backends.select_backend.cache_clear()


@contextmanager
def a_gpu():
    """A real GPU where there is one, else a simulated one: the device ``cuda`` either way."""
    with contextlib.nullcontext() if torch.cuda.is_available() else simulated_gpu():
        yield
