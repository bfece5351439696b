"""Decoding without Python between tokens: the captured step is replayed, and a native worker answers its misses."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Self

import torch

from moe_engine.config import EngineConfig, PrefetchMode
from moe_engine.decode_step import PROMPT_TOKENS, DecodeStep, Misses, Running, StepForm
from moe_engine.decoder import NOT_FINITE
from moe_engine.errors import DecodeError, ModelFormatError, MoeEngineError
from moe_engine.expert_cache import CachedExperts
from moe_engine.interrupts import deferred_interrupt
from moe_engine.kernels._cpu import StepTokens
from moe_engine.kernels.sampling_kernel import variant_for
from moe_engine.kernels.worker import MAX_AHEAD, DecodeWorker, Mode, WorkerLayer
from moe_engine.policies.registry import policy_of
from moe_engine.profile import Profile
from moe_engine.recording import Recorder
from moe_engine.stats import Stats
from moe_engine.trial_switch import TRIAL, TrialSwitch

# What steps do with misses, by the mode of the worker; of two, the second as long as that is found to be faster.
FORMS: dict[Mode, tuple[Misses, ...]] = {
    "cpu": ("cpu",),
    "fetch": ("late",),
    "auto": ("cpu", "late"),
    "exact": ("merge",),
}

PROMPT_SIZES = (4, 16, PROMPT_TOKENS)  # of steps with a prompt's tokens

STEPS_AHEAD = 2  # launched before the first one's tokens have come: the GPU never waits for Python


class GraphDecoder:
    """Replays the captured step, two steps ahead of the tokens; on the simulated device it launches each kernel."""

    def __init__(
        self,
        step: DecodeStep,
        worker: DecodeWorker,
        misses: tuple[Misses, ...],
        lookahead: bool,
        prefetch: PrefetchMode,
        recorder: Recorder | None = None,
    ) -> None:
        """misses: the form of step to run; of two, the first, and the second as long as that is found to be faster.

        lookahead: whether the CPU pulls predicted experts into its caches: in steps that prefetch, and in others as
        long as that is found to be faster. This and prefetch may be changed between generations.
        """
        self.step, self.worker, self.misses = step, worker, misses
        self.prefetch = TrialSwitch(prefetch)
        self.lookahead = TrialSwitch("auto" if lookahead else "off", first=2 * TRIAL, pays=lookahead)
        self.late = TrialSwitch("auto" if len(misses) > 1 else "off", first=TRIAL)  # whether to run the second form
        self._recorder = recorder
        step.recorded = recorder is not None
        self.launched = self.taken = 0  # the last step of each
        self._last = 0  # that `next` can ask for
        self.idle_steps: list[int] = []  # that have loaded a form
        self._form = StepForm(1, misses[0], "greedy")
        self._graphs: dict[StepForm, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if step.tokens.is_cuda else None
        self._filled = False  # all slots, where nothing may miss

    @classmethod
    def start(
        cls,
        step: DecodeStep,
        config: EngineConfig,
        recorder: Recorder | None = None,
        profile: Profile | None = None,
    ) -> Self:
        """Starts the worker too. profile: which experts the slots begin with, as an earlier run has left it."""
        experts = step.experts
        worker = start_worker(step, config, profile)
        misses = ("none",) if experts.holds_all else FORMS[_mode(experts, config)]
        # What the CPU does not compute it need not foresee.
        lookahead = config.lookahead and "cpu" in misses
        prefetch = config.prefetch if experts.caches and not experts.holds_all else "off"
        return cls(step, worker, misses, lookahead, prefetch, recorder)

    @torch.inference_mode()
    def begin(self, sequences: Sequence[Running], n_step: int) -> None:
        self._drain()
        self.step.begin(sequences)
        sampling = variant_for(running.params for running in sequences)
        self._form = StepForm(len(sequences), self.misses[0], sampling)
        self._last = self.taken + n_step

    @torch.inference_mode()
    def next(self) -> list[int]:
        while self.launched < min(self.taken + self._ahead(), self._last):
            self._launch(self._next_form())
        found = self._take()
        if found.bad:
            raise ModelFormatError(NOT_FINITE)
        if self._recorder is not None:
            self._recorder.note_tokens(*self.step.routing(self.taken, 1))
        return found.tokens

    def _ahead(self) -> int:
        """A form is captured while nothing else runs."""
        return STEPS_AHEAD if self._next_form() in self._graphs else 1

    def _next_form(self) -> StepForm:
        step = self.launched + 1
        ahead = MAX_AHEAD if self.prefetch.wants(step) else int(self.lookahead.wants(step))
        return replace(self._form, misses=self.misses[self.late.wants(step)], ahead=ahead)

    @property
    def takes_prompts(self) -> bool:
        """Whether `prompt` may be called: not where a step chooses more than can be fetched or read for it at once."""
        return self.misses[0] in ("none", "cpu") and not self.step.experts.store.reads_on_demand

    @torch.inference_mode()
    def prompt(self, index: int, ids: Sequence[int], position: int) -> bool:
        """Brings tokens of a prompt, from `position` on, into a sequence's KV cache, some with each step.

        Behind the last one the cache must have room for PROMPT_TOKENS more, which are written and mean nothing.
        Returns whether no step had to be captured, which takes longer.
        """
        self._drain()
        n_graph = len(self._graphs)
        for start in range(0, len(ids), PROMPT_TOKENS):
            some = ids[start : start + PROMPT_TOKENS]
            self.step.set_prompt(some, position + start)
            n_token = next(size for size in PROMPT_SIZES if len(some) <= size)
            self._launch(StepForm(n_token, self.misses[-1], "greedy", prompt_of=index))
            self._take()
            if self._recorder is not None:
                self._recorder.note_tokens(*self.step.routing(self.taken, len(some)))
        return len(self._graphs) == n_graph

    def await_slots(self) -> None:
        """Where nothing may miss: until every expert is in its slot."""
        if self.misses == ("none",) and not self._filled:
            with _decode_errors():
                self.worker.settle()
            self._filled = True

    def _launch(self, form: StepForm) -> None:
        self.await_slots()
        with deferred_interrupt():  # the worker expects a step only if it is launched
            if self._pool is not None and form not in self._graphs:
                self._load(form)
            self._start(form)

    def _load(self, form: StepForm) -> None:
        """Compiles, loads and captures a form's kernels, in a step in which every sequence is idle.

        Loading a kernel may wait for the GPU. In a step that misses something the GPU may then wait for the worker, the
        worker for the driver, and the driver for the loading.
        """
        # A prompt's tokens stand one behind the other from the first one's position on.
        of_prompt = form.prompt_of is not None
        positions = self.step.prompt_positions if of_prompt else self.step.positions
        kept = positions.clone()
        positions.fill_(-form.n_token if of_prompt else -1)
        self._start(form, idle=True)
        self._take()
        self.idle_steps.append(self.taken)
        self._capture(form)
        positions.copy_(kept)
        self._last += 1  # that one was nobody's

    def _start(self, form: StepForm, idle: bool = False) -> None:
        step = self.launched + 1
        with _decode_errors():
            late, posted = form.misses in ("late", "merge"), form.misses != "none"
            pull = form.ahead > 0 and self.lookahead.mode != "off"
            self.worker.expect(step, form.n_token, late, posted, pull=pull, idle=idle)
        graph = self._graphs.get(form)
        if graph is not None:
            graph.replay()
        else:
            self.step.run(form)
        self.launched = step

    def _take(self) -> StepTokens:
        step = self.taken + 1
        with _decode_errors():
            found = self.worker.wait_tokens(step)
        assert found is not None
        self.taken = step
        due = [switch for switch in (self.prefetch, self.late, self.lookahead) if switch.is_due(step)]
        if due:
            self._note_times()
        for switch in due:
            switch.turn(step)
        return found

    def _note_times(self, starts_again: bool = False) -> None:
        stats = self.worker.stats()
        self.prefetch.note(stats.timed, starts_again)
        self.late.note(stats.timed_late, starts_again)
        self.lookahead.note(stats.timed_pulled, starts_again)

    def _capture(self, form: StepForm) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self.step.run(form)
        self._graphs[form] = graph

    def _drain(self) -> None:
        while self.taken < self.launched:
            self._take()

    def forget_captures(self) -> None:
        """After a change of what the step does (`replay`, `stamps`)."""
        self._drain()
        self._graphs.clear()
        if self._pool is not None:
            torch.cuda.empty_cache()
            self._pool = torch.cuda.graph_pool_handle()  # one that has lost its last graph cannot be used again

    @torch.inference_mode()
    def drop(self, index: int) -> None:
        self.step.positions[index] = -1  # in order behind the steps that are launched

    @torch.inference_mode()
    def reset_stats(self) -> None:
        self._note_times(starts_again=True)
        self.worker.reset_stats()
        self.step.waited.zero_()

    def use_of_experts(self, model: str) -> Profile | None:
        """For the next run's start; None if nothing can be learnt from this one."""
        if not self.step.experts.caches or self.misses == ("none",) or self.taken == 0:
            return None
        try:
            self._drain()
            counts, resident = self.worker.use_counts(), self.step.experts.slot_table >= 0
        except (RuntimeError, MoeEngineError):  # the worker has failed before
            return None
        return Profile(model, counts, resident.cpu().numpy())

    def count(self, stats: Stats) -> None:
        expert_bytes = [layout.slot_bytes for layout in self.step.experts.layouts]
        waited = float(self.step.waited.sum()) * 1e-9
        stats.take(self.worker.stats(), expert_bytes, waited)

    def close(self) -> None:
        self.worker.stop()  # waits on the GPU end at once
        if self.step.tokens.is_cuda:
            torch.cuda.synchronize(self.step.tokens.device)
        self._graphs.clear()
        del self.step, self.worker


def _mode(experts: CachedExperts, config: EngineConfig) -> Mode:
    return "cpu" if not experts.caches else "exact" if config.exact else config.miss


def start_worker(step: DecodeStep, config: EngineConfig, profile: Profile | None) -> DecodeWorker:
    """A worker that fills the slots with the first experts of each layer, or those of an earlier run."""
    experts = step.experts
    pools = map(experts.pool_of, range(len(experts.handles)))
    layers = [WorkerLayer(handle, pool.layout, pool.slots) for handle, pool in zip(experts.handles, pools, strict=True)]
    worker = DecodeWorker(
        step.mailbox,
        layers,
        experts.slot_table,
        experts.cpu,
        mode=_mode(experts, config),
        policy=policy_of(config.policy),
    )

    def reserve(layer: int, expert: int) -> int:
        place = worker.reserve(layer, expert, evict=False)
        assert place is not None
        worker.complete(layer, expert)  # nobody looks before all are loaded
        return place.slot

    experts.load_placed(reserve)
    if profile is not None:
        worker.seed(profile.counts)
    if experts.slot_table.is_cuda:  # slots and table may still be in use in the order of the current stream
        torch.cuda.synchronize(experts.slot_table.device)
    worker.fill(list(experts.by_number(range(len(layers)))) if profile is None else profile.best_first())
    return worker


@contextmanager
def _decode_errors() -> Iterator[None]:
    """The worker's complaints as errors of this package."""
    try:
        yield
    except RuntimeError as error:
        raise DecodeError(str(error)) from error
