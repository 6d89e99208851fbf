"""How each library says that memory ran out, and what sounds alike but is something else."""

from __future__ import annotations

import pytest
import torch

from minibert.runtime.device import out_of_memory


def with_code(message: str, code: int) -> RuntimeError:
    """As torch raises it for an error of the CUDA runtime."""
    error = torch.AcceleratorError(message)
    error.error_code = code  # type: ignore[attr-defined]
    return error


OUT_OF_MEMORY = {
    "Python": MemoryError(),
    "torch on a GPU": torch.OutOfMemoryError("Tried to allocate 2.00 GiB"),
    "torch on a GPU, by its words": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CUDA, by its code": with_code("an error of the accelerator", 2),
    "CUDA, by its words": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    "the driver": RuntimeError("CUDA driver error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "torch on Windows": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory"
    ),
    "the system": RuntimeError("unable to mmap 4096 bytes from file: Cannot allocate memory (12)"),
    "C++": RuntimeError("std::bad_alloc"),
    "oneDNN": RuntimeError("could not create a memory object"),
}
SOMETHING_ELSE = {
    "CUDA, by its code": with_code("CUDA error: an illegal memory access was encountered", 700),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    "torch": RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
    "a file": OSError(12, "Cannot allocate memory"),
}


@pytest.mark.parametrize("library", OUT_OF_MEMORY)
def test_out_of_memory_is_recognised(library: str) -> None:
    assert out_of_memory(OUT_OF_MEMORY[library])


def test_torchs_own_refusal_on_a_cpu_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.float64)
    assert out_of_memory(caught.value)


@pytest.mark.parametrize("library", SOMETHING_ELSE)
def test_other_errors_are_not_taken_for_it(library: str) -> None:
    assert not out_of_memory(SOMETHING_ELSE[library])


def test_too_little_shared_memory_for_a_kernel_is_not_taken_for_it() -> None:
    errors = pytest.importorskip("triton.runtime.errors", reason="Triton is for Linux alone")
    error = errors.OutOfResources(300_000, 232_448, "shared memory")
    assert "out of resource" in str(error) and not out_of_memory(error)
