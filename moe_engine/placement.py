"""`place`: which layers' experts are where, for people who know better than the defaults.

A rule is REGEX=PLACE, as in llama.cpp's -ot; the first rule whose pattern is found in a tensor's name decides.

    cuda:N  in VRAM for good: every expert of the layer has a slot of its own
    cache   in RAM, the ones in use also in the VRAM cache (the default, where there is room)
    cpu     in RAM, computed on the CPU, never copied
    disk    as cache, or without a GPU as cpu, but read from the file when needed: only what a step needs is in RAM

The experts of a layer are fetched and computed together, so their tensors must agree. All other tensors of a model on a
GPU are in VRAM.
"""

import re
from typing import Literal, cast

from moe_engine.config import EngineConfig, parse_rule
from moe_engine.errors import ConfigError
from moe_engine.gguf_file import GGUFFile

Home = Literal["vram", "cache", "cpu", "disk"]
"""Where the experts of a layer are: for good in VRAM, cached there, on the CPU, or cached there and not held in RAM."""

_EXPERTS = re.compile(r"blk\.[0-9]{1,9}\..*_exps\.")


def uses_slots(home: Home) -> bool:
    """Whether a layer's experts share the slots in VRAM, where there are any."""
    return home in ("cache", "disk")


def block_of(name: str) -> int:
    """The block of a tensor, -1 for those of the whole model."""
    head, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if head == "blk" and re.fullmatch(r"[0-9]{1,9}", number) else -1


def is_expert(name: str) -> bool:
    """Whether a tensor holds routed experts' weights."""
    return "_exps." in name


def placed_homes(file: GGUFFile, config: EngineConfig, device: str, n_layer: int) -> dict[int, Home]:
    """Homes of the layers that `config.place` names, by block.

    device: "cuda:N" or "simulated" (which passes for any cuda:N), or "cpu". n_layer: blocks from there on are not part
    of inference. Raises `ConfigError` for rules that name no tensor, a place that a tensor cannot be in, and layers on
    the CPU where every miss is to be fetched.
    """
    parsed = [(rule, *parse_rule(rule)) for rule in config.place]
    named: dict[str, tuple[str, str]] = {}  # rule and place by tensor
    for name in file.tensors:
        found = next(((rule, place) for rule, pattern, place in parsed if pattern.search(name)), None)
        if found is not None:
            named[name] = found
    for rule, pattern, _ in parsed:
        if not any(pattern.search(name) for name in file.tensors):
            raise ConfigError(f"place '{rule}' matches no tensor of {file.path}: moe-engine inspect lists none such")
    homes: dict[int, tuple[Home, str]] = {}  # with the tensor that said so
    for name, (rule, place) in named.items():
        of_experts, block = bool(_EXPERTS.match(name)), block_of(name)
        _check_possible(name, rule, place, device, of_experts)
        if of_experts and block < n_layer:
            home: Home = "vram" if place.startswith("cuda") else cast(Home, place)
            before = homes.setdefault(block, (home, name))
            if before[0] != home:
                raise _disagree(before[1], name)
    for name in file.tensors:
        block = block_of(name)
        if _EXPERTS.match(name) and block in homes and name not in named:
            raise _disagree(homes[block][1], name)
    result = {block: home for block, (home, _) in homes.items()}
    fetches = "exact" if config.exact else "miss='fetch'" if config.miss == "fetch" else ""
    if device != "cpu" and fetches and "cpu" in result.values():
        raise ConfigError(f"place puts experts on the CPU, but {fetches} fetches all that are needed: use cache there")
    return result


def _check_possible(name: str, rule: str, place: str, device: str, of_experts: bool) -> None:
    possible = ["cpu"] if device == "cpu" else ["cuda:0" if device == "simulated" else device]
    if of_experts:
        possible += ["disk"] if device == "cpu" else ["cache", "cpu", "disk"]
    on_any_gpu = device == "simulated" and place.startswith("cuda")
    if place not in possible and not on_any_gpu:
        what = "" if of_experts else ", which is no routed expert,"
        raise ConfigError(f"place '{rule}': tensor '{name}'{what} can only be in: {', '.join(possible)}")


def _disagree(first: str, second: str) -> ConfigError:
    block = first.split(".")[1]
    return ConfigError(
        f"place puts tensors '{first}' and '{second}' of one layer's experts in different places: they go together, "
        rf"name them all, as in 'blk\.{block}\..*_exps=cpu'"
    )
