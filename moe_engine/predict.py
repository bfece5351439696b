"""Predicted speeds of a model on a machine: what a step or a prompt consists of, by the machine's rates."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_engine.calibration import CHOICE_CHUNKS, Calibration, Gpu, Product, closest
from moe_engine.costs import PromptLayer, StepCosts, miss_seconds
from moe_engine.decode_step import PROMPT_TOKENS
from moe_engine.expert_ring import CELL_BYTES
from moe_engine.model_work import HIT_KERNELS, ExpertLayer, ModelWork
from moe_engine.prompt_split import SHORT_PROMPT, choose_for_cpu
from moe_engine.routing_estimate import Found, RoutingEstimate

EXCHANGE_KERNELS = 2  # post and wait of a layer
N_MATRIX = 3  # of an expert: gate, up, down
COPIED = 1 / 3  # experts for later steps, by layers that miss some: 0.24 to 0.40 on an H200 by the default policy

BOUND_BY = {
    "kernels": "the fixed time of the GPU's kernels",
    "reads": "reading weights from VRAM",
    "hits": "reading experts from VRAM",
    "misses": "experts that are not in VRAM",
    "exchange": "messages between GPU and CPU",
    "gpu": "the GPU's products",
    "cpu": "the CPU's products",
    "launches": "starting the GPU's work from the host",
    "ram": "reading weights from RAM",
    "disk": "reading experts from the disk",
}


@dataclass(frozen=True)
class Prediction:
    """seconds by what they are spent on; binding is the largest of them."""

    tokens: int
    terms: Mapping[str, float]
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def binding(self) -> str:
        return max(self.terms, key=lambda name: self.terms[name])

    def as_dict(self) -> dict[str, object]:
        return {"tokens": self.tokens, "tokens_per_second": self.rate, "seconds": dict(self.terms)} | {
            "bound_by": self.binding
        }


@dataclass(frozen=True)
class RunShape:
    """How a model is run: what the predictions depend on besides model and machine.

    shares: of each MoE layer's experts that are in VRAM; in_ram: of those that are not in VRAM for good, that are in
    RAM, the others are read from the disk; fixed: layers whose experts do not move. on_gpu: whether there is a GPU at
    all. ctx: tokens that the KV cache holds. staging: bytes that are copied ahead of a prompt's choices; of what is
    missing besides, the CPU computes a part.
    """

    shares: tuple[float, ...]
    in_ram: tuple[float, ...]
    fixed: tuple[bool, ...]
    ubatch: int
    n_sequence: int = 1
    ctx: int = 0
    fetches: bool = False  # a step copies what it misses
    on_gpu: bool = True
    staging: float = math.inf


@dataclass(frozen=True)
class Predictor:
    """Speeds of `work` on `machine`."""

    work: ModelWork
    machine: Calibration
    routing: RoutingEstimate

    def found(self, shape: RunShape) -> list[Found]:
        """By MoE layer; misses in the model's terms."""
        ratio = self.work.top_k / self.routing.top_k
        # Sequences share some experts.
        distinct = len(self.routing.counts(shape.n_sequence, self.work.n_expert, self.work.top_k))
        return [
            Found(share, float(share < 1), (1 - share) * distinct)
            if fixed
            else replace(f := self.routing.found(share), misses=min(f.misses * ratio, distinct))
            for share, fixed in zip(shape.shares, shape.fixed, strict=True)
        ]

    # -- decode ------------------------------------------------------------------------------------------------

    def decode(self, shape: RunShape, context: int, found: Sequence[Found] | None = None) -> Prediction:
        """One step, with `context` tokens in each sequence's KV cache. found: by MoE layer, where it is known; by
        default as `shape` lets expect it."""
        gpu, n = self.machine.gpu, shape.n_sequence
        disk = self._from_disk(shape)
        if gpu is None or not shape.on_gpu:
            ram = self._cpu_step(n, context)
            return Prediction(n, {"ram": ram, "disk": disk}, ram + disk)
        work, per_choice = self.work, self.work.top_k * n
        kv_bytes = work.kv_bytes * context * n
        reads = kv_bytes / gpu.copy + _read_seconds(gpu, work.dense)
        beside = misses = fetched = n_missed = copies = 0.0
        for layer, of in zip(work.experts, found or self.found(shape), strict=True):
            hits = of.hit_rate * per_choice * _read_seconds(gpu, layer.by_type)
            reads += (1 - of.missed_layers) * hits
            beside += of.missed_layers * (hits + HIT_KERNELS * gpu.kernel_seconds * (of.hit_rate > 0))
            n_missed += of.missed_layers
            misses += of.misses * layer.nbytes
            copies += of.misses * _fetch_seconds(gpu, layer.nbytes)
            fetched += COPIED * of.missed_layers * layer.nbytes * (of.hit_rate > 0)
        kernels = work.kernels + HIT_KERNELS * (len(work.experts) - n_missed)
        if n_missed > 0:  # then every layer has an exchange, and where there are slots what may come late
            kernels += (EXCHANGE_KERNELS + HIT_KERNELS * any(shape.shares)) * len(work.experts)
        if shape.fetches:  # a layer's answer waits for the last one's slot number too
            least = min(gpu.pcie)
            seconds = copies + n_missed * (least / gpu.pcie[least] + self.machine.cpu_call_seconds)
        else:
            cpu = self._cpu_rate()
            alone = miss_seconds(misses, 0, cpu=cpu, ram=self.machine.ram)
            fetched = min(fetched, misses, alone * max(gpu.pcie.values()))
            seconds = miss_seconds(misses, fetched, cpu=cpu, ram=self.machine.ram)
            seconds += n_missed * self.machine.cpu_call_seconds
        costs = StepCosts(kernels * gpu.kernel_seconds, reads, beside, seconds, n_missed * gpu.exchange_seconds)
        return Prediction(n, costs.terms | {"disk": disk}, costs.seconds + disk)

    def _from_disk(self, shape: RunShape) -> float:
        """Seconds of one step: experts that neither VRAM nor RAM holds, which is an LRU cache too."""
        if self.machine.disk is None:
            return 0.0
        held = [max(shares) for shares in zip(shape.shares, shape.in_ram, strict=True)]
        misses = {share: self.routing.found(share).misses if share < 1 else 0.0 for share in set(held)}
        nbytes = sum(misses[share] * layer.nbytes for share, layer in zip(held, self.work.experts, strict=True))
        return nbytes * self.work.top_k / self.routing.top_k / self.machine.disk

    def _cpu_rate(self) -> float:
        """Bytes of experts per second that the CPU kernels read at one token."""
        seconds = total = 0.0
        for layer in self.work.experts:
            for type, nbytes in layer.by_type.items():
                total += nbytes
                seconds += nbytes / closest(self.machine.cpu_experts, type).weights
        return total / seconds

    def _cpu_step(self, n: int, context: int) -> float:
        """Seconds without a GPU."""
        work = self.work
        reads = (sum(work.dense.values()) + work.kv_bytes * context * n) / self.machine.ram
        experts = sum(self._cpu_product(layer, work.top_k * n, work.top_k * n) for layer in work.experts)
        return reads + experts + len(work.experts) * self.machine.cpu_call_seconds

    def _cpu_product(self, layer: ExpertLayer, n_used: float, n_pair: float) -> float:
        """Seconds of n_used experts with n_pair (token, expert) pairs."""
        return _product_seconds(self.machine.cpu_experts, layer, n_used, n_pair)

    # -- prompts -----------------------------------------------------------------------------------------------

    def prompt(self, shape: RunShape, n_token: int) -> Prediction:
        """A prompt from an empty context, the faster of two ways, as the engine learns: micro-batches or steps."""
        streamed = self.streamed(shape, n_token)
        fits = n_token + PROMPT_TOKENS <= shape.ctx  # a step writes as many, whatever they are
        if self.machine.gpu is None or not shape.on_gpu or shape.fetches or not fits:
            return streamed
        return min(streamed, self.in_steps(shape, n_token), key=lambda found: found.seconds)

    def in_steps(self, shape: RunShape, n_token: int) -> Prediction:
        """A prompt through the decoder, PROMPT_TOKENS with each step. There must be a GPU."""
        gpu = self.machine.gpu
        assert gpu is not None
        whole, rest = divmod(n_token, PROMPT_TOKENS)
        terms = defaultdict[str, float](float)
        for n, times in ((PROMPT_TOKENS, whole), (rest, 1)):
            if n and times:
                step = self._prompt_step(shape, n, gpu)
                for name, seconds in step.items():
                    terms[name] += times * seconds
        terms["reads"] += self.work.kv_bytes * n_token / 2 * -(-n_token // PROMPT_TOKENS) / gpu.copy
        return Prediction(n_token, dict(terms), sum(terms.values()))

    def _prompt_step(self, shape: RunShape, n: int, gpu: Gpu) -> dict[str, float]:
        """Seconds of a step with n tokens: the CPU computes what is missing while the GPU reads what is not."""
        work, n_used = self.work, len(self.routing.counts(n, self.work.n_expert, self.work.top_k))
        size = min((tokens for tokens in gpu.step_seconds if tokens >= n), default=max(gpu.step_seconds))
        # Kernels of 32 tokens of a large model take longer than the bundled one's
        terms = {"kernels": work.n_block * gpu.step_seconds[size], "reads": _read_seconds(gpu, work.dense)}
        terms |= {"misses": 0.0, "exchange": 0.0, "disk": 0.0}
        for layer, share, in_ram in zip(work.experts, shape.shares, shape.in_ram, strict=True):
            n_missing, n_pair = (1 - share) * n_used, (1 - share) * n * work.top_k
            hits = share * n_used * _read_seconds(gpu, layer.by_type)
            misses = max(self._cpu_product(layer, n_missing, n_pair), n_missing * layer.nbytes / self.machine.ram)
            terms["misses" if misses > hits else "reads"] += max(hits, misses)
            terms["exchange"] += (gpu.exchange_seconds + self.machine.cpu_call_seconds) * (share < 1)
            if self.machine.disk is not None:
                terms["disk"] += n_missing * (1 - in_ram) * layer.nbytes / self.machine.disk
        return terms

    def streamed(self, shape: RunShape, n_token: int) -> Prediction:
        """A prompt in micro-batches; without a GPU, on the CPU."""
        terms = dict.fromkeys(("misses", "gpu", "cpu", "launches", "disk"), 0.0)
        for start in range(0, n_token, shape.ubatch):
            n = min(shape.ubatch, n_token - start)
            for name, seconds in self._micro_batch(shape, n, start).items():
                terms[name] += seconds
        return Prediction(n_token, {k: s for k, s in terms.items() if s}, sum(terms.values()))

    def _micro_batch(self, shape: RunShape, n: int, start: int) -> dict[str, float]:
        """Seconds by the resource that bounds each layer."""
        gpu, work = self.machine.gpu, self.work
        counts = self.routing.counts(n, work.n_expert, work.top_k)
        disk = 0.0 if self.machine.disk is None else 1 / self.machine.disk  # seconds of a byte
        attention = work.attention_operations * n * (start + (n + 1) / 2)
        if gpu is None or not shape.on_gpu:
            products = sum(self._cpu_product(layer, len(counts), n * work.top_k) for layer in work.experts)
            for type, nbytes in work.prompt_dense.items():
                share = nbytes / sum(work.prompt_dense.values())
                operations = 2 * n * work.prompt_weights * share
                products += closest(self.machine.cpu_experts, type).seconds(nbytes, operations)
            products += attention / next(iter(self.machine.cpu_experts.values())).operations
            on_disk = sum((1 - r) * layer.nbytes for r, layer in zip(shape.in_ram, work.experts, strict=True))
            return {"cpu": products, "disk": len(counts) * disk * on_disk}
        expand = sum(nbytes / closest(gpu.dequantize, type) for type, nbytes in work.prompt_dense.items())
        products = 2 * n * work.prompt_weights / gpu.matmul + attention / gpu.attention
        dense = (expand + products + n * work.activation_bytes / gpu.copy) / work.n_block
        plain = work.n_block - len(work.experts)  # blocks without routed experts
        in_vram = gpu.layer_seconds * work.launches
        bound = {"gpu": plain * max(dense, in_vram)}
        alike: dict[tuple[tuple[float, float, bool], object], list[ExpertLayer]] = {}
        places = zip(shape.shares, shape.in_ram, shape.fixed, strict=True)
        for layer, place in zip(work.experts, places, strict=True):
            alike.setdefault((place, (layer.nbytes, *layer.by_type.items())), []).append(layer)
        streams = False  # a layer before
        for ((share, in_ram, fixed), _), layers in alike.items():
            layer, n_layer = layers[0], len(layers)
            found, later = (
                self._prompt_layer(layer, share, counts, dense, shape.staging if ahead else 0.0, n)
                for ahead in (streams or math.isinf(shape.staging), True)
            )
            if fixed and not share:  # the CPU computes all of these
                terms = {"cpu": dense + self._cpu_product(layer, len(counts), n * work.top_k)}
                seconds = n_layer * terms["cpu"]
            elif share < 1:
                pcie, of_disk = max(gpu.pcie.values()), disk * (1 - in_ram)  # neighbours are copied at once
                terms = later.terms(pcie, of_disk)
                seconds = found.seconds(found.terms(pcie, of_disk), ahead=streams)
                seconds += (n_layer - 1) * later.seconds(terms, ahead=True)
                streams = True
            else:  # nothing waits for the host
                terms = {"gpu": dense + found.products, "launches": in_vram}
                seconds = n_layer * max(terms.values())
            name = max(terms, key=lambda name: terms[name])
            bound[name] = bound.get(name, 0.0) + seconds
        return bound

    def _prompt_layer(
        self, layer: ExpertLayer, share: float, counts: list[int], dense: float, staging: float, n_token: int
    ) -> PromptLayer:
        """Without the experts that the CPU computes meanwhile, of those that `staging` bytes do not bring ahead.

        counts: tokens of each expert that has some, in any order; n_token: of the micro-batch. dense: seconds."""
        gpu = self.machine.gpu
        assert gpu is not None
        # Which experts are in slots has little to do with the prompt: evenly spread over popular and rare ones
        in_slot = [int((i + 1) * share) > int(i * share) for i in range(len(counts))]
        missing = sorted(n for n, cached in zip(counts, in_slot, strict=True) if not cached)
        n_free = len(missing) - int(min(len(missing), staging / layer.nbytes))
        if n_free:
            free, operations = np.array(missing[:n_free]), 2 * layer.n_weight
            rates = self.machine.rates(max(layer.by_type, key=layer.by_type.__getitem__))
            elsewhere, waits = sum(counts) - int(free.sum()), n_token > SHORT_PROMPT
            missing = missing[choose_for_cpu(free, elsewhere, layer.nbytes, operations, rates, waits) :]
        n_chunk = -(-len(missing) * layer.nbytes // CELL_BYTES)
        return PromptLayer(
            missing=missing,
            cached=[n for n, cached in zip(counts, in_slot, strict=True) if cached],
            nbytes=layer.nbytes,
            dense=dense,
            gpu_expert=_product_seconds(gpu.prompt, layer, 1, 0),
            gpu_token=_product_seconds(gpu.prompt, layer, 0, 1),
            launches=gpu.layer_seconds * self.work.launches + gpu.chunk_seconds * (CHOICE_CHUNKS + n_chunk),
        )


def _fetch_seconds(gpu: Gpu, nbytes: int) -> float:
    """Of one expert for the step that waits for it: its matrices are copied one after another."""
    part = max(nbytes / N_MATRIX, min(gpu.pcie))  # smaller copies take as long
    size = max(size for size in gpu.pcie if size <= part)
    return N_MATRIX * part / gpu.pcie[size]


def _read_seconds(gpu: Gpu, by_type: Mapping[str, int]) -> float:
    return sum(nbytes / closest(gpu.decode, type) for type, nbytes in by_type.items())


def _product_seconds(rates: Mapping[str, Product], layer: ExpertLayer, n_used: float, n_pair: float) -> float:
    """Of n_used experts' weights with n_pair tokens; the operations shared out by the types' bytes."""
    total = sum(layer.by_type.values())
    return sum(
        closest(rates, type).seconds(n_used * nbytes, n_pair * 2 * layer.n_weight * nbytes / total)
        for type, nbytes in layer.by_type.items()
    )
