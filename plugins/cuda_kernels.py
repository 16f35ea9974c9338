"""The token operators as CUDA kernels: source, PTX and launch geometry, for TensorRT's plugins and our own launches.

One source file, `token_rows.cu`, holds both kernels. A `Specialization` of it is compiled for each width of a word and
of an index, by NVRTC, which needs neither a GPU nor a driver.

Which machines take the PTX: it is compiled for the oldest architecture that NVRTC still knows, so a driver can assemble
it for every later one. NVRTC also stamps it with its own PTX version (13.5 says 9.5, which asks for a driver as new as
CUDA 13.5), although nothing newer than PTX 6.3 is in it. So the stamp is lowered to `PTX_VERSION`; an assembler holds
every instruction against the stamp, and the tests assemble the result for each architecture that we support.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from cat_pruning.errors import EngineError

GATHER: Final = "token_gather"
SCATTER: Final = "token_scatter"
ARCHITECTURE: Final = 75  # Turing
PTX_VERSION: Final = "8.0"  # of CUDA 12.0, older than any that our TensorRT runs on
LANES: Final = 32  # a warp moves a row
ROWS_PER_BLOCK: Final = 8
_WORDS: Final = {16: "uint4", 8: "uint2", 4: "unsigned int", 2: "unsigned short"}  # widest first
_INDICES: Final = {4: "int", 8: "long long"}
_REMEDY: Final = "pip install 'cat-pruning[tensorrt]'"


@dataclass(frozen=True, slots=True)
class Specialization:
    """What is fixed when the kernels are compiled.

    Attributes:
        word_bytes: of the words that rows are moved as, whatever their elements are: 16, 8, 4 or 2.
        index_bytes: of an index, 4 or 8.
    """

    word_bytes: int
    index_bytes: int

    @classmethod
    def of(cls, element_bytes: int, width: int, index_bytes: int) -> Self:
        """The widest words of which a row is a multiple.

        Args:
            element_bytes: 2 or 4.
            width: D, elements of a row; -1 if it is only known at run time, and words are elements then.
            index_bytes: 4 or 8.

        Raises:
            EngineError: elements or indices of another size.
        """
        if element_bytes not in (2, 4):
            raise EngineError(f"token rows have elements of {element_bytes} bytes, expected fp32, fp16 or bf16")
        if index_bytes not in _INDICES:
            raise EngineError(f"token indices have {index_bytes} bytes, expected int32 or int64")
        row_bytes = element_bytes * (1 if width < 0 else width)
        return cls(next(size for size in _WORDS if row_bytes % size == 0), index_bytes)

    def entry(self, kernel: str) -> str:
        """The name of `GATHER` or `SCATTER` in the PTX: no two specializations share one in an engine."""
        return f"{kernel}_{self.word_bytes}_{self.index_bytes}"

    @property
    def macros(self) -> tuple[str, ...]:
        """What the source wants defined."""
        return (
            f"TOKEN_WORD={_WORDS[self.word_bytes]}",
            f"TOKEN_INDEX={_INDICES[self.index_bytes]}",
            f"TOKEN_GATHER={self.entry(GATHER)}",
            f"TOKEN_SCATTER={self.entry(SCATTER)}",
        )


def kernel_sizes(
    specialization: Specialization, element_bytes: int, tokens: Sequence[Any], indices: Sequence[Any]
) -> list[Any]:
    """The scalars that both kernels take, in their order; each has to fit an int32.

    Args:
        specialization: of the kernel.
        element_bytes: of the tokens.
        tokens: their shape (B, N, D), ints or symbolic expressions of TensorRT's.
        indices: their shape (B, n), the same.

    Returns:
        B, N, n and the words of a row, of the type that came in.
    """
    _, num_tokens, width = tokens
    batch, num_kept = indices
    return [batch, num_tokens, num_kept, width * element_bytes // specialization.word_bytes]


def num_blocks(batch: Any, num_kept: Any) -> Any:
    """The grid's x for B * n rows; its y and z are 1, and a block is `LANES` × `ROWS_PER_BLOCK` threads.

    Ints or symbolic expressions of TensorRT's. Never 0, which no launch may be: the last block may find nothing to do.
    """
    return batch * num_kept // ROWS_PER_BLOCK + 1


def kernel_source() -> str:
    """`token_rows.cu`."""
    return importlib.resources.files(__package__).joinpath("token_rows.cu").read_text(encoding="utf-8")


@functools.cache
def compile_ptx(specialization: Specialization) -> str:
    """Both kernels as PTX, compiled once per process and specialization, on the CPU.

    Raises:
        EngineError: NVRTC is not installed, too old or broken, or refuses the source.
    """
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # the library is looked for at the first call, not at the import
    except (ImportError, RuntimeError) as error:
        raise EngineError(f"NVRTC cannot be loaded, which compiles our CUDA kernels ({error})", _REMEDY) from error
    options = [
        f"--gpu-architecture=compute_{ARCHITECTURE}",
        *(f"--define-macro={macro}" for macro in specialization.macros),
    ]
    status, program = nvrtc.nvrtcCreateProgram(kernel_source().encode(), b"token_rows.cu", 0, None, None)
    _check(nvrtc, status)
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _text(nvrtc, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise EngineError(f"NVRTC refused token_rows.cu with {' '.join(options)}: {log.strip() or status.name}")
        ptx = _text(nvrtc, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return _stamped(ptx)


def _stamped(ptx: str) -> str:
    stamped, count = re.subn(r"(?m)^\.version \S+$", f".version {PTX_VERSION}", ptx)
    if count != 1:
        raise EngineError(
            f"NVRTC's PTX has {count} lines `.version`, expected one", "install cuda-bindings 13 and its NVRTC"
        )
    return stamped


def _text(nvrtc: Any, size_of: Any, read: Any, program: Any) -> str:
    status, size = size_of(program)
    _check(nvrtc, status)
    text = bytearray(size)
    _check(nvrtc, *read(program, text))
    return text.rstrip(b"\0").decode()


def _check(nvrtc: Any, status: Any) -> None:
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise EngineError(f"NVRTC failed with {status.name}", _REMEDY)
