"""The experts of one layer computed by llama.cpp's CPU backend, through ctypes, on the same bytes that we read.

Only functions are called whose arguments are numbers and pointers to opaque structs; the two fields that have no
setter are found by looking for known values. Loads `libggml-base` and `libggml-cpu` from a folder: the one of an
installed llama-cpp-python, or any build of llama.cpp with shared libraries.
"""

import ctypes
import importlib.util
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moe_engine.kernels.cpu import ExpertHandle
from moe_engine.kernels.quant_tensor import QuantTensor

_F32, _I32 = 0, 26


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ggml_init": (c_void_p, InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_new_tensor_3d": (c_void_p, c_void_p, c_int, c_int64, c_int64, c_int64),
    "ggml_get_data": (c_void_p, c_void_p),
    "ggml_nbytes": (c_size_t, c_void_p),
    "ggml_type_name": (c_char_p, c_int),
    "ggml_mul_mat_id": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_swiglu_split": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_mul": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_add": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_view_2d": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_size_t, c_size_t),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_cpu_set_threadpool": (None, c_void_p, c_void_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_free": (None, c_void_p),
    "ggml_threadpool_params_init": (None, c_void_p, c_int),
    "ggml_threadpool_new": (c_void_p, c_void_p),
    "ggml_threadpool_free": (None, c_void_p),
}


def find_folder() -> Path | None:
    """Where llama-cpp-python keeps its libraries, if it is installed; the package itself is not imported."""
    spec = importlib.util.find_spec("llama_cpp")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "lib"


class Ggml:
    """The functions of the two libraries, by name."""

    def __init__(self, folder: Path) -> None:
        self._libraries = [
            ctypes.CDLL(str(folder / f"libggml-{part}.so"), mode=ctypes.RTLD_GLOBAL) for part in ("base", "cpu")
        ]
        for name, (result, *arguments) in _SIGNATURES.items():
            function = self._find(name)
            function.restype = result
            function.argtypes = arguments
            setattr(self, name, function)
        self.data_offset = self._data_offset()

    def _find(self, name: str) -> "ctypes._NamedFuncPointer":
        for library in self._libraries:
            if hasattr(library, name):
                return getattr(library, name)  # type: ignore[no-any-return]
        raise SystemExit(f"the ggml libraries have no function {name}: their version does not fit this benchmark")

    def __getattr__(self, name: str) -> "ctypes._NamedFuncPointer":
        raise AttributeError(name)

    def _data_offset(self) -> int:
        """Where a tensor keeps the address of its data."""
        context = self.ggml_init(InitParams(1 << 16, None, False))
        tensor = self.ggml_new_tensor_3d(context, _F32, 4, 1, 1)
        address = self.ggml_get_data(tensor)
        offsets = [at for at in range(0, 512, 8) if c_void_p.from_address(tensor + at).value == address]
        self.ggml_free(context)
        if len(offsets) != 1:
            raise SystemExit("cannot tell where a ggml tensor keeps its data")
        return offsets[0]


class GgmlLayer:
    """One graph: `top_k` of the layer's experts for each of `n_tokens` tokens, gated, weighted and summed."""

    def __init__(self, ggml: Ggml, handle: ExpertHandle, n_tokens: int, top_k: int, threads: int) -> None:
        self.ggml, self.handle = ggml, handle
        hidden = handle.hidden
        self.context = ggml.ggml_init(InitParams((64 << 20) + n_tokens * top_k * hidden * 32, None, False))
        x = ggml.ggml_new_tensor_3d(self.context, _F32, hidden, 1, n_tokens)
        ids = ggml.ggml_new_tensor_3d(self.context, _I32, top_k, n_tokens, 1)
        weights = ggml.ggml_new_tensor_3d(self.context, _F32, 1, top_k, n_tokens)
        gate, up = (ggml.ggml_mul_mat_id(self.context, self._stack(w), x, ids) for w in (handle.gate, handle.up))
        h = ggml.ggml_swiglu_split(self.context, gate, up)
        down = ggml.ggml_mul_mat_id(self.context, self._stack(handle.down), h, ids)
        each = ggml.ggml_mul(self.context, down, weights)
        row = hidden * 4
        out = ggml.ggml_view_2d(self.context, each, hidden, n_tokens, top_k * row, 0)
        for k in range(1, top_k):
            part = ggml.ggml_view_2d(self.context, each, hidden, n_tokens, top_k * row, k * row)
            out = ggml.ggml_add(self.context, out, part)
        self.graph = ggml.ggml_new_graph(self.context)
        ggml.ggml_build_forward_expand(self.graph, out)
        self.x, self.weights = (self._array(t, np.float32) for t in (x, weights))
        self.ids, self.out = self._array(ids, np.int32), self._array(out, np.float32)

        self.backend = ggml.ggml_backend_cpu_init()
        parameters = ctypes.create_string_buffer(4096)  # 512 processor flags and a few numbers
        ggml.ggml_threadpool_params_init(parameters, threads)
        self.pool = ggml.ggml_threadpool_new(parameters)
        ggml.ggml_backend_cpu_set_n_threads(self.backend, threads)
        ggml.ggml_backend_cpu_set_threadpool(self.backend, self.pool)

    def _stack(self, weight: QuantTensor) -> int:
        assert weight.data.is_contiguous()
        size = [weight.n_in, weight.n_out, weight.shape[0]]
        context = self.ggml.ggml_init(InitParams(4096, None, True))  # lives as long as the process: a few bytes
        tensor = int(self.ggml.ggml_new_tensor_3d(context, weight.type.id, *size))
        name = self.ggml.ggml_type_name(weight.type.id).decode()
        assert self.ggml.ggml_nbytes(tensor) == weight.nbytes, f"llama.cpp's {name} is not our {weight.type}"
        c_void_p.from_address(tensor + self.ggml.data_offset).value = weight.data.data_ptr()
        return tensor

    def _array(self, tensor: int, dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        size = self.ggml.ggml_nbytes(tensor)
        memory = (ctypes.c_ubyte * size).from_address(self.ggml.ggml_get_data(tensor))
        return np.frombuffer(memory, dtype)

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Computes `out`; the three small inputs are copied first."""
        for array, values in ((self.x, x), (self.ids, ids), (self.weights, weights)):
            array[:] = values.numpy().reshape(-1)
        if self.ggml.ggml_backend_graph_compute(self.backend, self.graph) != 0:
            raise SystemExit("llama.cpp could not compute the layer")

    def close(self) -> None:
        self.ggml.ggml_backend_free(self.backend)
        self.ggml.ggml_threadpool_free(self.pool)
        self.ggml.ggml_free(self.context)
