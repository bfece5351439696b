"""Decode speeds of a model on a machine, from what a simulation says its cache would hit."""

from pathlib import Path

from moe_engine.calibration import Calibration
from moe_engine.errors import ConfigError
from moe_engine.planner import plan, require_same_shape
from moe_engine.predict import Prediction
from moe_engine.routing_estimate import Found
from moe_engine.simulator import Outcome
from moe_engine.traces import Trace


class SimulatedModel:
    """Sizes and speeds of the model that a trace is of; the latter as `moe-engine plan` predicts them, but with the
    simulated hits of each layer in place of estimated ones."""

    def __init__(self, model: Path, trace: Trace, machine: Calibration | None) -> None:
        """model: the GGUF file that the trace is of, or one of its shape; only its header is read. machine: without
        one sizes are known, but no speeds. Raises `ConfigError` if they do not go together, and as `plan`."""
        if machine is not None and machine.gpu is None:
            raise ConfigError("the machine of the hardware file has no GPU: there is no cache whose speed to predict")
        self._plan = plan(model, device="cpu") if machine is None else plan(model, machine=machine, elsewhere=True)
        require_same_shape(self._plan.work, trace.model, str(model))

    @property
    def expert_bytes(self) -> tuple[int, ...]:
        """Of a slot, by MoE layer."""
        return tuple(layer.nbytes for layer in self._plan.work.experts)

    @property
    def room(self) -> int | None:
        """Bytes of slots that the machine's VRAM has room for; None without a machine."""
        return None if self._plan.vram is None else self._plan.vram.slots

    def decode(self, outcome: Outcome) -> Prediction:
        """Of one sequence with the plan's `decode_context`. There must be a machine."""
        predictor = self._plan.predictor
        assert predictor is not None
        found = [
            Found(hits / n, missed / outcome.n_token, (n - hits) / outcome.n_token)
            for hits, n, missed in zip(outcome.hits, outcome.accesses, outcome.missed_steps, strict=True)
        ]
        return predictor.decode(self._plan.run_shape, self._plan.decode_context, found)
