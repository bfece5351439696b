"""Small copies to the GPU by a kernel: on one, else in Triton's interpreter."""

import pytest
import torch

from moe_engine.kernels import host_copy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("n", [1, 100, 4096, 5000])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_upload(n: int, dtype: torch.dtype) -> None:
    source = torch.arange(n, dtype=dtype, pin_memory=DEVICE.type == "cuda").view(-1, 1)
    target = host_copy.upload(source, DEVICE)
    assert target.device.type == DEVICE.type
    assert torch.equal(target.cpu(), source)
    assert target.data_ptr() != source.data_ptr()
    if DEVICE.type == "cpu":  # where `upload` does without the kernel
        host_copy._copy_kernel[(-(-n // 512),)](source, target.zero_(), n, BLOCK=512)
        assert torch.equal(target, source)
