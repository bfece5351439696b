"""Samples of the memory that a GPU has in use while something runs."""

import subprocess
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from moe_engine.benchmark.environment import gpu_id


@dataclass
class MemoryWatch:
    """Samples the memory that the device has in use, as nvidia-smi counts it, until the block ends."""

    enabled: bool
    peak: int = 0
    base: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def used(self) -> int:
        command = ["nvidia-smi", f"--id={gpu_id('cuda')}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) << 20

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.peak = max(self.peak, self.used())

    def __enter__(self) -> Self:
        if self.enabled:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.enabled:
            self._stop.set()
            self._thread.join()
