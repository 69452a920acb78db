"""The little of CUDA that a backend needs: memory, streams, graphs. Through cuda-python, imported when used.

A thread has a current context. Where the application already made one (PyCUDA's, say), it is the one used; otherwise
the device's primary context, which PyTorch and CuPy share. Every call may come from another thread, so work is done
inside `Cuda.active()`, which makes that context current and puts the thread's own back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import BackendError, GlipError, MissingPackage, OptionError
from glip_deploy.frames.geometry import ceil_div

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glip_deploy.frames.device import DeviceFrame

__all__ = ["Cuda", "compile_kernel"]

BLOCK = (32, 8)
"""Threads of a block, across and down."""

INSTALL = "pip install cuda-python (or 'glip-deploy[tensorrt]')"


class Cuda:
    """One GPU.

    Args:
        device: its number; the one of the thread's current context where there is one.

    Attributes:
        gpu: name as the driver gives it.
        compute_capability: 80 for 8.0.

    Raises:
        MissingPackage: cuda-python is not installed.
        BackendError: no driver.
        OptionError: no such GPU.
    """

    def __init__(self, device: int = 0) -> None:
        try:
            from cuda.bindings import driver, runtime
        except ImportError:
            raise MissingPackage(f"cuda-python is not installed; {INSTALL}") from None
        self._driver: Any = driver
        self._runtime: Any = runtime
        try:
            count = self._call(runtime.cudaGetDeviceCount())
            current = self._call(driver.cuCtxGetCurrent())
        except (RuntimeError, OSError):  # no libcuda
            raise BackendError("there is no NVIDIA driver here; install one, or use --backend onnxruntime") from None
        if int(current) == 0:
            if not 0 <= device < count:
                raise OptionError(f"GPU {device} is not here; legal is 0 to {count - 1}")
            self._call(runtime.cudaSetDevice(device))
            self._call(runtime.cudaFree(0))  # makes the primary context
            current = self._call(driver.cuCtxGetCurrent())
        self._context = current
        number = self._call(runtime.cudaGetDevice())
        properties = self._call(runtime.cudaGetDeviceProperties(number))
        self._resize: dict[bytes, Any] = {}
        self.gpu = properties.name.rstrip(b"\0").decode(errors="replace")
        self.compute_capability = 10 * int(properties.major) + int(properties.minor)

    def _call(self, answer: tuple[Any, ...]) -> Any:
        """The result of a call of cuda-python, which answers (error, result).

        Raises:
            BackendError: the call failed.
        """
        error, *result = answer
        if int(error) != 0:
            advice = "; close other programs or build smaller engines" if int(error) == 2 else ""
            raise BackendError(f"the GPU cannot be used: {error.name} ({int(error)}){advice}")
        return result[0] if len(result) == 1 else None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this object's context the thread's, for a while."""
        self._call(self._driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._call(self._driver.cuCtxPopCurrent())

    def stream(self) -> int:
        """Return a new stream that waits for no other."""
        return int(self._call(self._runtime.cudaStreamCreateWithFlags(self._runtime.cudaStreamNonBlocking)))

    def free_stream(self, stream: int) -> None:
        """Give a stream back."""
        self._call(self._runtime.cudaStreamDestroy(stream))

    def synchronize(self, stream: int) -> None:
        """Wait until a stream has done everything."""
        self._call(self._runtime.cudaStreamSynchronize(stream))

    def allocate(self, size: int) -> int:
        """Return the address of new device memory of `size` bytes."""
        return int(self._call(self._runtime.cudaMalloc(max(size, 1))))

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._call(self._runtime.cudaFree(address))

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an array in page-locked memory, which the GPU copies from and to by itself; `free_pinned` ends it."""
        import ctypes

        size = int(np.prod(shape)) * dtype.itemsize
        address = int(self._call(self._runtime.cudaMallocHost(max(size, 1))))
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return memory.view(dtype).reshape(shape)

    def free_pinned(self, array: NDArray[Any]) -> None:
        """Give page-locked memory back; the array must not be used any more."""
        self._call(self._runtime.cudaFreeHost(array.ctypes.data))

    def upload(self, target: int, source: NDArray[Any], stream: int) -> None:
        """Enqueue a copy of a pinned array to device memory."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._runtime.cudaMemcpyAsync(target, source.ctypes.data, source.nbytes, kind, stream))

    def download(self, target: NDArray[Any], source: int, stream: int) -> None:
        """Enqueue a copy of device memory to a pinned array."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._runtime.cudaMemcpyAsync(target.ctypes.data, source, target.nbytes, kind, stream))

    def capture(self, stream: int, work: Callable[[], None]) -> Any | None:
        """Record what `work` enqueues as a graph; None if something in it cannot be recorded."""
        runtime = self._runtime
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(runtime.cudaStreamBeginCapture(stream, mode))
        failed = False
        try:
            work()
        except GlipError:  # of CUDA or of TensorRT
            failed = True
        error, graph = runtime.cudaStreamEndCapture(stream)
        if failed or int(error) != 0:
            runtime.cudaGetLastError()  # what broke the recording is not an error of the next call
            if int(error) == 0:
                self._call(runtime.cudaGraphDestroy(graph))
            return None
        try:
            return self._call(runtime.cudaGraphInstantiate(graph, 0))
        finally:
            self._call(runtime.cudaGraphDestroy(graph))

    def launch(self, graph: Any, stream: int) -> None:
        """Enqueue a recorded graph."""
        self._call(self._runtime.cudaGraphLaunch(graph, stream))

    def free_graph(self, graph: Any) -> None:
        """Give a recorded graph back."""
        self._call(self._runtime.cudaGraphExecDestroy(graph))

    def prepare_resize(self) -> None:
        """Compile what `resize` needs, the first time.

        Raises:
            GlipError: as `compile_kernel`.
        """
        if not self._resize:
            code = compile_kernel(Path(__file__).with_name("resize.cu"), self.compute_capability)
            module = self._call(self._driver.cuModuleLoadData(code))
            for name in (b"glip_resize", b"glip_resize_nv12"):
                self._resize[name] = self._call(self._driver.cuModuleGetFunction(module, name))

    def resize(
        self,
        frame: DeviceFrame,
        red: int,
        canvas: int,
        canvas_size: tuple[int, int],
        size: tuple[int, int],
        stream: int,
    ) -> None:
        """Enqueue `resize.cu`: a frame in GPU memory, resized as Pillow does, to the top left of a BGR canvas.

        Args:
            frame: the picture, packed or in NV12.
            red: place of red in its pixels, 0 or 2.
            canvas: address of (height, width, 3) bytes.
            canvas_size: its height and width.
            size: height and width of the resized picture; zero around it.
            stream: where.

        Raises:
            GlipError: as `compile_kernel`.
        """
        import ctypes

        self.prepare_resize()
        pointer, row, number = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int
        source = [(pointer, frame.address), (row, frame.row_bytes)]
        sides = [(number, frame.height), (number, frame.width)]
        target = [(pointer, canvas), *((number, side) for side in (*canvas_size, *size))]
        if frame.chroma:
            name = b"glip_resize_nv12"
            arguments = [*source, (pointer, frame.chroma), (row, frame.chroma_row_bytes), *sides, *target]
        else:
            name = b"glip_resize"
            arguments = [*source, *sides, (number, frame.channels), (number, red), *target]
        values, kinds = tuple(value for _, value in arguments), tuple(kind for kind, _ in arguments)
        blocks = (ceil_div(canvas_size[1], BLOCK[0]), ceil_div(canvas_size[0], BLOCK[1]))
        launch = self._driver.cuLaunchKernel
        self._call(launch(self._resize[name], *blocks, 1, *BLOCK, 1, 0, stream, (values, kinds), 0))


def compile_kernel(source: Path, compute_capability: int) -> bytes:
    """Compile a CUDA file that includes nothing, with NVRTC; needs no GPU.

    Args:
        source: the file.
        compute_capability: 80 for 8.0.

    Returns:
        Machine code (a cubin).

    Raises:
        MissingPackage: no NVRTC here.
        BackendError: none that knows this GPU.
    """
    try:
        from cuda.bindings import nvrtc

        error, program = nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], [])
    except (ImportError, RuntimeError, OSError):
        raise MissingPackage(
            "NVRTC, which compiles the GPU's resize, is not installed;"
            " pip install nvidia-cuda-nvrtc (nvidia-cuda-nvrtc-cu12 for CUDA 12)"
        ) from None
    options = [f"--gpu-architecture=sm_{compute_capability}".encode(), b"--std=c++17"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(error) != 0:
        raise BackendError(
            f"NVRTC cannot compile {source.name} for SM{compute_capability} ({error.name});"
            " install the nvidia-cuda-nvrtc of a CUDA version that knows this GPU"
        )
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    code = bytes(size)
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    return code
