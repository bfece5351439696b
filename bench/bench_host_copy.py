"""Times small copies from the host to the GPU by a kernel. Reference: torch's, by the copy engine."""

from functools import partial

import torch
from gpu_timing import DEVICE, Report, Row, check_equal

from moe_engine.kernels.host_copy import upload


def results(tiny: bool = False) -> list[Row]:
    report = Report("host copy")
    for n in (100,) if tiny else (1 << 10, 1 << 14, 1 << 18):
        source = torch.arange(n, dtype=torch.int32, pin_memory=DEVICE.type == "cuda")
        target = torch.empty(n, dtype=torch.int32, device=DEVICE)
        report.add(
            "upload",
            "",
            f"{4 * n} bytes",
            [partial(upload, source, DEVICE)],
            error=check_equal("upload", upload(source, DEVICE), source),
            reference=partial(target.copy_, source, non_blocking=True),
        )
    return report.rows
