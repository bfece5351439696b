"""Who was busy when in one decode step: GPU, CPU and the copies, from the engine's own timestamps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_engine.engine import Engine
from moe_engine.graph_decoder import GraphDecoder
from moe_engine.kernels.mailbox import new_stamps

LANES = ("GPU", "CPU", "PCIe")
STEPS = 16  # decoded with timestamps; the last one is kept


@dataclass(frozen=True)
class Event:
    """Nanoseconds since the step's first event. layer: of the MoE layers, -1 behind the last one."""

    lane: str
    name: str
    layer: int
    start: int
    end: int


def record(engine: Engine, token: int) -> list[Event]:
    """Decodes a few tokens behind `token` with timestamps on.

    Empty where no GPU runs captured steps, or where none of them posts anything because every expert has a slot.
    """
    decoder = engine.decoder
    if not isinstance(decoder, GraphDecoder) or engine.device.type != "cuda":
        return []
    step = decoder.step
    step.stamps = new_stamps(step.mailbox, engine.device)
    try:
        decoder.forget_captures()
        n_step = min(STEPS, engine.cache.capacity - 1)
        engine.generate([token], max_tokens=n_step, temperature=0, ignore_eos=True)
        decoder.worker.settle()
        return events_of(step.stamps.cpu().numpy(), decoder.worker.timeline(), decoder.worker.copies())
    finally:
        step.stamps = None
        decoder.forget_captures()


def events_of(stamps: NDArray[np.int64], messages: NDArray[np.void], copies: NDArray[np.void]) -> list[Event]:
    """The last step's events, in order of lane and time.

    stamps: see `new_stamps`, on the GPU's clock; messages, copies: see `DecodeWorker`, on the host's. The clocks are
    brought together by the message that took least time from GPU to host, as if it had taken none.
    """
    n_layer = (len(stamps) - 2) // 3
    posted, waiting, over = stamps[: 3 * n_layer].reshape(n_layer, 3).T
    before, after = (int(stamp) for stamp in stamps[3 * n_layer :])
    last = messages[-n_layer:]
    if len(last) < n_layer or not posted.all() or (np.diff(last["seq"]) != 1).any():
        return []
    shift = int((last["seen"] - posted).min())
    gpu: list[Event] = []
    free = before + shift  # the GPU's, since when
    for layer in range(n_layer):
        at = [int(stamp) + shift for stamp in (posted[layer], waiting[layer], over[layer])]
        gpu.append(Event("GPU", "attention, router", layer, free, at[0]))
        free = at[0]
        if waiting[layer] > posted[layer]:  # this step waits for answers
            gpu.append(Event("GPU", "hits, shared expert", layer, at[0], at[1]))
            gpu.append(Event("GPU", "waits", layer, at[1], at[2]))
            free = at[2]
    gpu.append(Event("GPU", "logits, sampling", -1, free, after + shift))
    cpu = [
        Event("CPU", "computes misses", layer, int(message["seen"]), int(message["answered"]))
        for layer, message in enumerate(last)
        if message["answered"]
    ]
    begin, end = before + shift, after + shift
    pcie = [
        Event("PCIe", f"expert {copy['expert']}", int(copy["layer"]), int(copy["begun"]), int(copy["ended"]))
        for copy in copies
        if copy["ended"] > begin and copy["begun"] < end
    ]
    return [Event(e.lane, e.name, e.layer, e.start - begin, e.end - begin) for e in gpu + cpu + pcie]


def packed(events: Sequence[Event]) -> list[list[Any]]:
    """For a result row: [lane, name, layer, start, end]."""
    return [[event.lane, event.name, event.layer, event.start, event.end] for event in events]


def unpacked(rows: Sequence[Sequence[Any]]) -> list[Event]:
    return [Event(str(lane), str(name), int(layer), int(start), int(end)) for lane, name, layer, start, end in rows]


def chrome_trace(events: Sequence[Event]) -> dict[str, Any]:
    """The trace event format that Perfetto and chrome://tracing read: complete events, in microseconds."""
    names = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": lane}}
        for number, lane in enumerate(LANES, 1)
    ]
    slices = [
        {
            "name": event.name,
            "cat": event.lane,
            "ph": "X",
            "pid": 1,
            "tid": LANES.index(event.lane) + 1,
            "ts": event.start / 1000,
            "dur": (event.end - event.start) / 1000,
            "args": {"layer": event.layer},
        }
        for event in events
    ]
    return {"traceEvents": names + slices, "displayTimeUnit": "ns"}
