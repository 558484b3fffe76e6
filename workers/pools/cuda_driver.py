"""The part of the CUDA driver API that moving blocks needs, through ctypes on ``libcuda.so.1``.

Any framework's GPU memory can be used, because all of them use the device's primary context. Nothing is installed for
this: the library comes with the GPU's driver. The environment variable ``KVLEDGER_LIBCUDA`` names another library with
the same entry points (the tests' stand-in). Every call that fails raises :class:`CudaError` with the error's CUDA name.

Signatures and sizes are those of the CUDA 13.0 headers. ``cuMemcpyBatchAsync`` without a suffix is the entry point of
CUDA 12.8, with nine arguments; drivers before it do not have it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

import numpy as np
import numpy.typing as npt

from ipc import LedgerError

LIBRARY = "KVLEDGER_LIBCUDA"
HANDLE_BYTES = 64
Words = npt.NDArray[np.uint64]

_NOT_READY = 600
_CONTEXT_IS_LOST = frozenset({214, 700, 702, 714, 715, 716, 717, 718, 719, 720})
"""Errors after which every later call in the context fails too (``cuda.h``: the process must be relaunched)."""
_DEVICE_OF_POINTER = 9
_NON_BLOCKING = 1
_NO_TIMING = 2
_PORTABLE = 1
_LAZY_PEER_ACCESS = 1
SOURCE_IN_STREAM_ORDER, SOURCE_ANY_TIME = 1, 3


class CudaError(LedgerError):
    """A call of the CUDA driver failed. ``name``: as CUDA names the error."""

    def __init__(self, call: str, name: str, text: str, code: int = 0) -> None:
        super().__init__(f"{call}: {name} ({text})")
        self.name = name
        self.lost = code in _CONTEXT_IS_LOST
        """Nothing works any more in this process."""


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


class _Location(ctypes.Structure):
    _fields_ = [("type", c_int), ("id", c_int)]


class _Attributes(ctypes.Structure):
    """``CUmemcpyAttributes``: the location hints matter for managed memory only."""

    _fields_ = [("order", c_int), ("source", _Location), ("target", _Location), ("flags", c_uint)]


_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDeviceGetCount": [c_void_p],
    "cuDeviceGet": [c_void_p, c_int],
    "cuDeviceGetUuid_v2": [c_void_p, c_int],
    "cuDevicePrimaryCtxRetain": [c_void_p, c_int],
    "cuDevicePrimaryCtxRelease_v2": [c_int],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [c_void_p],
    "cuCtxSetCurrent": [c_void_p],
    "cuPointerGetAttribute": [c_void_p, c_int, c_uint64],
    "cuMemGetAddressRange_v2": [c_void_p, c_void_p, c_uint64],
    "cuMemAlloc_v2": [c_void_p, c_size_t],
    "cuMemFree_v2": [c_uint64],
    "cuIpcGetMemHandle": [c_void_p, c_uint64],
    "cuIpcOpenMemHandle_v2": [c_void_p, _Handle, c_uint],
    "cuIpcCloseMemHandle": [c_uint64],
    "cuMemHostRegister_v2": [c_void_p, c_size_t, c_uint],
    "cuMemHostUnregister": [c_void_p],
    "cuStreamCreate": [c_void_p, c_uint],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamWaitEvent": [c_void_p, c_void_p, c_uint],
    "cuStreamSynchronize": [c_void_p],
    "cuEventCreate": [c_void_p, c_uint],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventQuery": [c_void_p],
    "cuEventDestroy_v2": [c_void_p],
    "cuMemcpyAsync": [c_uint64, c_uint64, c_size_t, c_void_p],
    "cuGetErrorName": [c_int, c_void_p],
    "cuGetErrorString": [c_int, c_void_p],
}
_BATCH = [c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, c_void_p, c_size_t, c_void_p, c_void_p]


class Driver:
    """The loaded and initialised library.

    Raises:
        CudaError: it is not there, or there is no device.
    """

    def __init__(self) -> None:
        name = os.environ.get(LIBRARY) or "libcuda.so.1"
        try:
            self._library = ctypes.CDLL(name)
        except OSError as error:
            raise CudaError("loading the CUDA driver", "CUDA_ERROR_SHARED_OBJECT_INIT_FAILED", str(error)) from error
        self._calls: dict[str, Any] = {}
        for symbol, arguments in _SIGNATURES.items():
            try:
                self._calls[symbol] = function = getattr(self._library, symbol)
            except AttributeError as error:
                raise CudaError(symbol, "CUDA_ERROR_NOT_FOUND", f"{name} does not have it") from error
            function.argtypes = arguments
            function.restype = c_int
        self._batch = getattr(self._library, "cuMemcpyBatchAsync", None)
        if self._batch is not None:
            self._batch.argtypes, self._batch.restype = _BATCH, c_int
        self._copy = self._calls["cuMemcpyAsync"]
        self._call("cuInit", 0)

    @property
    def has_batches(self) -> bool:
        """Whether the driver takes many copies in one call (CUDA 12.8 and later)."""
        return self._batch is not None

    def _call(self, symbol: str, *arguments: Any) -> None:
        if code := self._calls[symbol](*arguments):
            raise self._error(symbol, code)

    def _error(self, symbol: str, code: int) -> CudaError:
        texts = []
        for lookup in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            self._calls[lookup](code, byref(text))
            texts.append((text.value or b"unknown error").decode(errors="replace"))
        return CudaError(symbol, texts[0], texts[1], code)

    def _word(self, symbol: str, *arguments: Any) -> int:
        """The value that a call returns through its first argument."""
        value = c_uint64()
        self._call(symbol, byref(value), *arguments)
        return value.value

    # Devices and contexts

    def devices(self) -> int:
        """Count the devices; those that ``CUDA_VISIBLE_DEVICES`` hides do not count."""
        return self._word("cuDeviceGetCount") & 0xFFFFFFFF

    def device(self, ordinal: int) -> int:
        """A device, to be named in other calls."""
        return self._word("cuDeviceGet", ordinal) & 0xFFFFFFFF

    def uuid(self, device: int) -> bytes:
        """The name that a device has in all processes, 16 bytes."""
        buffer = (ctypes.c_ubyte * 16)()
        self._call("cuDeviceGetUuid_v2", buffer, device)
        return bytes(buffer)

    def device_of(self, address: int) -> int:
        """The device that an address belongs to."""
        return self._word("cuPointerGetAttribute", _DEVICE_OF_POINTER, address) & 0xFFFFFFFF

    def retain(self, device: int) -> int:
        """Retain the primary context of a device, which all frameworks share. To be released."""
        return self._word("cuDevicePrimaryCtxRetain", device)

    def release(self, device: int) -> None:
        """Give a primary context back."""
        self._call("cuDevicePrimaryCtxRelease_v2", device)

    def push(self, context: int) -> None:
        """Make a context this thread's, until :meth:`pop`."""
        self._call("cuCtxPushCurrent_v2", context)

    def pop(self) -> None:
        """Go back to the context before."""
        self._word("cuCtxPopCurrent_v2")

    def use(self, context: int) -> None:
        """Make a context this thread's."""
        self._call("cuCtxSetCurrent", context)

    # Memory

    def allocate(self, size: int) -> int:
        """Allocate bytes on the context's device; returns their address."""
        return self._word("cuMemAlloc_v2", size)

    def free(self, address: int) -> None:
        """Free what :meth:`allocate` gave."""
        self._call("cuMemFree_v2", address)

    def allocation_of(self, address: int) -> tuple[int, int]:
        """``(base, bytes)`` of the allocation that holds an address."""
        base, size = c_uint64(), c_size_t()
        self._call("cuMemGetAddressRange_v2", byref(base), byref(size), address)
        return base.value, size.value

    def handle(self, base: int) -> bytes:
        """Make the handle with which another process opens an allocation."""
        handle = _Handle()
        self._call("cuIpcGetMemHandle", byref(handle), base)
        return bytes(handle.reserved)

    def open(self, handle: bytes) -> int:
        """Map another process' allocation; returns its address here."""
        return self._word("cuIpcOpenMemHandle_v2", _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS)

    def close(self, address: int) -> None:
        """Unmap what :meth:`open` gave."""
        self._call("cuIpcCloseMemHandle", address)

    def pin(self, address: int, size: int) -> None:
        """Lock host memory of this process, so that the GPU can read and write it directly."""
        self._call("cuMemHostRegister_v2", address, size, _PORTABLE)

    def unpin(self, address: int) -> None:
        """Undo :meth:`pin`."""
        self._call("cuMemHostUnregister", address)

    # Streams

    def stream(self) -> int:
        """A stream that waits for no other."""
        return self._word("cuStreamCreate", _NON_BLOCKING)

    def wait_for(self, stream: int, event: int) -> None:
        """What is given to the stream from now on begins after the event."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def synchronize(self, stream: int) -> None:
        """Block until all that a stream was given is done."""
        self._call("cuStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back."""
        self._call("cuStreamDestroy_v2", stream)

    def event(self, stream: int) -> int:
        """An event that happens when all that the stream was given so far is done."""
        event = self._word("cuEventCreate", _NO_TIMING)
        self._call("cuEventRecord", event, stream)
        return event

    def happened(self, event: int) -> bool:
        """Whether an event has happened. Raises what went wrong on its stream."""
        code = self._calls["cuEventQuery"](event)
        if code not in (0, _NOT_READY):
            raise self._error("cuEventQuery", code)
        return bool(code == 0)

    def destroy_event(self, event: int) -> None:
        """Give an event back."""
        self._call("cuEventDestroy_v2", event)

    def copy(self, targets: Words, sources: Words, sizes: Words, order: int, stream: int) -> None:
        """Copy ``sizes[i]`` bytes from ``sources[i]`` to ``targets[i]``, asynchronously and in no order among them.

        ``order`` says when the sources may be read. One call where the driver can, one per copy where it cannot.
        """
        if not len(sizes):
            return
        if self._batch is None:
            copy = self._copy
            for target, source, size in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
                if code := copy(target, source, size, stream):
                    raise self._error("cuMemcpyAsync", code)
            return
        attributes, first, failed = _Attributes(order=order), c_size_t(0), c_size_t(0)
        arrays: Sequence[Words] = [np.ascontiguousarray(array, np.uint64) for array in (targets, sources, sizes)]
        pointers = [array.ctypes.data for array in arrays]
        count = len(sizes)
        if code := self._batch(*pointers, count, byref(attributes), byref(first), 1, byref(failed), stream):
            raise self._error(f"cuMemcpyBatchAsync (copy {failed.value} of {count})", code)
