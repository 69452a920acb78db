"""The C++ runtime on a simulated GPU: libraries of the names that it opens, whose engines ONNX Runtime computes.

They stay in the process that loads them, where nothing else should take them for a GPU: `Simulation` belongs into a
process of its own. Plans are those of `simulated_tensorrt.write_engines`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from runtime_build import Library
from simulated_tensorrt import session_of

from glip_deploy.frames import make_canvas
from glip_deploy.frames.nv12 import nv12_to_rgb

TYPES = {"tensor(float)": (0, "f4"), "tensor(uint8)": (5, "u1"), "tensor(int64)": (8, "i8")}
"""TensorRT's number of a type, and NumPy's name."""
NARROW = {**TYPES, "tensor(int64)": (3, "i4")}
"""The same in TensorRT 8.6, which has no INT64."""
SIDES = 8
LIBRARIES = {"tensorrt": "libnvinfer.so", "tensorrt-rtx": "libtensorrt_rtx.so"}

_strings, _numbers = ctypes.POINTER(ctypes.c_char_p), ctypes.POINTER(ctypes.c_int64)
_ranks, _addresses = ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_void_p)
_int = ctypes.c_int
_DESCRIBE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_ACCEPTS = ctypes.CFUNCTYPE(_int, _int, _int, ctypes.c_char_p, _numbers, _int)
_INFER = ctypes.CFUNCTYPE(_int, _int, _strings, _numbers, _ranks, _int)
_RUN = ctypes.CFUNCTYPE(_int, _int, _strings, _addresses, _numbers, _ranks, _int)
_PLUGIN = ctypes.CFUNCTYPE(_int, ctypes.c_char_p)
_plane = (ctypes.c_void_p, ctypes.c_longlong)
_RESIZE = ctypes.CFUNCTYPE(None, *_plane, *[_int] * 4, *_plane, ctypes.c_void_p, *[_int] * 4)


class _Callbacks(ctypes.Structure):
    _fields_ = [
        ("describe", _DESCRIBE),
        ("accepts", _ACCEPTS),
        ("infer", _INFER),
        ("run", _RUN),
        ("load_plugin", _PLUGIN),
    ]


class Simulation:
    """The simulated libraries, and the runtime that opens them.

    Args:
        folder: where the runtime was built.
        number: the version that TensorRT's library tells, as NV_TENSORRT_VERSION counts.
        flavour: `tensorrt` or `tensorrt-rtx`: what is simulated.

    Attributes:
        library: the runtime's C interface.
        plugins: plugin libraries that were loaded.
        graphs: file names of the graphs that were run, in order.
    """

    def __init__(self, folder: Path, number: int, flavour: str = "tensorrt") -> None:
        self.cuda = ctypes.CDLL(str(folder / "simulated" / "libcuda.so.1"))
        (library,) = (folder / "simulated").glob(f"{LIBRARIES[flavour]}.*")
        self.trt = ctypes.CDLL(str(library))
        self.cuda.simulated_log.restype = ctypes.c_char_p
        self.library = Library(folder)
        self.plugins: list[str] = []
        self.plugin_loads = True
        self.graphs: list[str] = []
        self._types = NARROW if flavour == "tensorrt" and number < 10000 else TYPES
        self._engines: list[Any] = []
        self._kept: list[Any] = []
        self._callbacks = _Callbacks(
            _DESCRIBE(self._describe),
            _ACCEPTS(self._accepts),
            _INFER(self._infer),
            _RUN(self._run),
            _PLUGIN(self._plugin),
        )
        self._launcher = _RESIZE(self._resize)
        self.trt.simulated_tensorrt(ctypes.byref(self._callbacks), ctypes.c_int32(number))
        self.cuda.simulated_launcher(self._launcher)

    def log(self) -> list[str]:
        """Return what was enqueued and waited for since the last time."""
        return str(self.cuda.simulated_log().decode()).splitlines()

    def live(self, what: str) -> int:
        return int(self.cuda.simulated_live(what.encode()))

    def left(self) -> dict[str, int]:
        """Return what was not given back."""
        kinds = ("device", "pinned", "streams", "graphs", "executables", "modules", "primary", "current", "violations")
        counts = {kind: self.live(kind) for kind in kinds}
        counts |= {what: getattr(self.trt, f"simulated_{what}")() for what in ("engines", "contexts", "settings")}
        return {kind: count for kind, count in counts.items() if count}

    def fail(self, function: str, after: int = 0, error: int = 700) -> None:
        """Make a function of CUDA fail once, after so many calls."""
        self.cuda.simulated_fail(function.encode(), after, error)

    def refuse(self, what: str, yes: bool = True) -> None:
        """Make a function of TensorRT fail."""
        self.trt.simulated_refuse(what.encode(), int(yes))

    # -- what the simulated TensorRT calls ------------------------------------------------------------------------

    def _describe(self, plan: int, size: int) -> int:
        profiles, graph = eval(ctypes.string_at(plan, size).decode())  # written by write_engines
        session = session_of(Path(graph))
        self._engines.append((profiles, session, Path(graph).name))
        lines = [str(len(self._engines) - 1)]
        for mode, rows in (("in", session.get_inputs()), ("out", session.get_outputs())):
            lines += [f"{mode} {row.name} {self._types[row.type][0]}" for row in rows]
        text = ctypes.create_string_buffer("\n".join(lines).encode())
        self._kept.append(text)
        return ctypes.addressof(text)

    def _accepts(self, engine: int, profile: int, name: bytes, shape: Any, rank: int) -> int:
        least, _, most = self._engines[engine][0][profile][name.decode()]
        sides = shape[:rank]
        return int(
            len(least) == rank and all(low <= side <= high for low, side, high in zip(least, sides, most, strict=True))
        )

    def _feed(self, session: Any, shapes: dict[str, Any], array: Callable[[str, Any, Any], Any]) -> dict[str, Any]:
        made = {}
        for row in session.get_inputs():
            kind = np.dtype(self._types[row.type][1])
            made[row.name] = array(row.name, shapes[row.name], kind).astype(TYPES[row.type][1])
        return made

    def _infer(self, engine: int, names: Any, shapes: Any, ranks: Any, count: int) -> int:
        _, session, _ = self._engines[engine]
        known = {names[i].decode(): tuple(shapes[i * SIDES : i * SIDES + ranks[i]]) for i in range(count)}
        feed = self._feed(session, known, lambda _, shape, kind: np.zeros(shape, kind))
        for name in feed:
            if name == "image_sizes":
                feed[name][:] = 32
        found = {
            row.name: array.shape for row, array in zip(session.get_outputs(), session.run(None, feed), strict=True)
        }
        for i in range(count):
            for side, size in enumerate(found.get(names[i].decode(), ())):
                shapes[i * SIDES + side], ranks[i] = size, side + 1
        return 0

    def _run(self, engine: int, names: Any, addresses: Any, shapes: Any, ranks: Any, count: int) -> int:
        _, session, graph = self._engines[engine]
        self.graphs.append(graph)
        at = {names[i].decode(): addresses[i] for i in range(count)}
        known = {names[i].decode(): tuple(shapes[i * SIDES : i * SIDES + ranks[i]]) for i in range(count)}

        def array(name: str, shape: Any, kind: Any) -> Any:
            size = int(np.prod(shape)) * kind.itemsize
            return np.frombuffer(ctypes.string_at(at[name], size), kind).reshape(shape)

        feed = self._feed(session, known, array)
        for row, found in zip(session.get_outputs(), session.run(None, feed), strict=True):
            assert found.shape == known[row.name]
            content = np.ascontiguousarray(found, self._types[row.type][1])
            ctypes.memmove(at[row.name], content.ctypes.data, content.nbytes)
        return 1

    def _plugin(self, path: bytes) -> int:
        self.plugins.append(path.decode())
        return int(self.plugin_loads)

    def _resize(self, source: int, pitch: int, height: int, width: int, channels: int, red: int, *rest: Any) -> None:
        """The kernel itself is tested in tests/glip_deploy/frames/test_device.py."""
        chroma, chroma_pitch, out, canvas_height, canvas_width, *size = rest

        def plane(address: int, row: int, shape: tuple[int, ...], pixel: int) -> Any:
            memory = np.frombuffer(ctypes.string_at(address, (shape[0] - 1) * row + shape[1] * pixel), np.uint8)
            return np.lib.stride_tricks.as_strided(memory, shape, (row, pixel, 1)[: len(shape)])

        if chroma:
            planes = plane(source, pitch, (height, width), 1), plane(chroma, chroma_pitch, (height // 2, width), 1)
            picture, order = nv12_to_rgb(planes), "rgb"
        else:
            picture, order = plane(source, pitch, (height, width, 3), channels), "rgb" if red == 0 else "bgr"
        sides = {"shortest_side": min(size), "longest_side": max(size)}
        resized = make_canvas([np.ascontiguousarray(picture)], color=order, **sides).frames[0, : size[0], : size[1]]
        drawn = np.zeros((canvas_height, canvas_width, 3), np.uint8)
        drawn[: size[0], : size[1]] = resized
        ctypes.memmove(out, drawn.ctypes.data, drawn.nbytes)
