"""Policies by name: `policy_of("lfu-decay:half_life=64,admit=second-touch")`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from moe_engine.errors import ConfigError
from moe_engine.policies.admission import Always, BetterThanVictim, Outranks, SecondTouch
from moe_engine.policies.base import Admission, Policy
from moe_engine.policies.belady import Belady, BeladyBypass, SoonerThanVictim
from moe_engine.policies.blend import Blend
from moe_engine.policies.class_lru import ClassLRU
from moe_engine.policies.layer_floor import LayerFloor
from moe_engine.policies.least_stale import LeastStale
from moe_engine.policies.lfu import LFU
from moe_engine.policies.lfu_decay import DecayedLFU
from moe_engine.policies.lru import LRU
from moe_engine.policies.pinned_lru import PinnedLRU
from moe_engine.policies.random_choice import RandomChoice
from moe_engine.policies.router_weight import RouterWeight


@dataclass(frozen=True)
class Pool:
    """The slots that a policy works for. Keys are layer * n_expert + expert.

    uses     for Belady: the times of all uses of each key to come, ascending.
    profile  for pinned-lru: how often each key was used in some earlier run.
    """

    capacity: int
    n_layer: int
    n_expert: int
    uses: Mapping[int, Sequence[int]] | None = None
    profile: Mapping[int, int] | None = None


@dataclass(frozen=True)
class _Option:
    default: float
    low: float
    high: float

    def parse(self, where: str, text: str) -> float:
        """Raises ConfigError; the number is an integer if the default is one."""
        kind = type(self.default)
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not self.low <= value <= self.high:
            article = "an integer" if kind is int else "a number"
            raise ConfigError(f"{where} is '{text}', expected {article} from {self.low:g} to {self.high:g}")
        return value


_HALF_LIFE = _Option(64.0, 0.01, 1e9)
_FLOOR = _Option(0, 0, 1 << 16)
_Values = Mapping[str, float]


def _pinned_lru(pool: Pool, values: _Values) -> PinnedLRU[int]:
    if pool.profile is None:
        raise ConfigError("policy 'pinned-lru' needs a profile: a trace of an earlier run")
    by_use = sorted(pool.profile, key=lambda key: (-pool.profile[key], key))  # type: ignore[index]
    return PinnedLRU(pool.capacity, by_use[: int(values["share"] * pool.capacity)])


def _belady(pool: Pool, values: _Values) -> Belady[int]:
    if pool.uses is None:
        raise ConfigError("policy 'belady' must know the future: it can only be simulated")
    return Belady(pool.capacity, pool.uses)


def _belady_bypass(pool: Pool, values: _Values) -> BeladyBypass[int]:
    if pool.uses is None:
        raise ConfigError("policy 'belady-bypass' must know the future: it can only be simulated")
    return BeladyBypass(pool.capacity, pool.uses)


def _blend(pool: Pool, values: _Values) -> Blend:
    settings = {name: values[name] for name in ("half_life", "fast", "share", "margin")}
    return Blend(pool.capacity, pool.n_layer, pool.n_expert, **settings)


_POLICIES: dict[str, tuple[dict[str, _Option], Callable[[Pool, _Values], Policy[int]]]] = {
    "lru": ({}, lambda pool, _: LRU(pool.capacity)),
    "lfu": ({}, lambda pool, _: LFU(pool.capacity)),
    "lfu-decay": ({"half_life": _HALF_LIFE}, lambda pool, v: DecayedLFU(pool.capacity, v["half_life"])),
    "class-lru": ({"half_life": _HALF_LIFE}, lambda pool, v: ClassLRU(pool.capacity, v["half_life"])),
    "least-stale": ({}, lambda pool, _: LeastStale(pool.capacity, pool.n_layer, pool.n_expert)),
    "blend": (
        {
            "half_life": _Option(32.0, 0.01, 1e9),
            "fast": _Option(1.0, 0.01, 1e9),
            "share": _Option(0.1, 0.0, 1.0),
            "margin": _Option(1.4, 1.0, 1e9),
        },
        _blend,
    ),
    "pinned-lru": ({"share": _Option(0.5, 0.0, 1.0)}, _pinned_lru),
    "router-weight": ({"half_life": _HALF_LIFE}, lambda pool, v: RouterWeight(pool.capacity, v["half_life"])),
    "random": ({"seed": _Option(0, 0, 1 << 62)}, lambda pool, v: RandomChoice(pool.capacity, int(v["seed"]))),
    "belady": ({}, _belady),
    "belady-bypass": ({}, _belady_bypass),
}
_ADMISSIONS: dict[str, tuple[dict[str, _Option], Callable[[Policy[int], _Values], Admission[int]]]] = {
    "always": ({}, lambda _, values: Always()),
    "second-touch": ({"window": _Option(32, 1, 1 << 31)}, lambda _, v: SecondTouch(int(v["window"]))),
    "better-than-victim": ({"admit_half_life": _HALF_LIFE}, lambda _, v: BetterThanVictim(v["admit_half_life"])),
    "outranks": ({}, lambda policy, _: Outranks(policy)),
}


NATIVE = ("lru", "lfu", "lfu-decay", "class-lru", "least-stale", "blend")  # in kernels/csrc/policy.h, too


@dataclass(frozen=True)
class PolicySpec:
    """A policy, an admission rule and their settings; `text` is how the user wrote it. floor: slots that each of the
    layers which share a pool keeps."""

    text: str
    name: str
    admit: str = "always"
    values: _Values = field(default_factory=dict)
    floor: int = 0

    def build(self, pool: Pool) -> tuple[Policy[int], Admission[int]]:
        """Makes both for one pool. Raises ConfigError if `pool` lacks what they must know."""
        policy = _POLICIES[self.name][1](pool, self.values)
        if isinstance(policy, BeladyBypass):
            return policy, SoonerThanVictim(policy)
        if self.floor:
            policy = LayerFloor(policy, self.floor, pool.n_expert)
        return policy, _ADMISSIONS[self.admit][1](policy, self.values)

    @property
    def foresees(self) -> bool:
        """Whether `Pool.uses` is needed."""
        return self.name.startswith("belady")


def policy_names() -> list[str]:
    return list(_POLICIES)


def policy_of(text: str) -> PolicySpec:
    """Parses NAME[:key=value,...]; `admit=` chooses the admission rule, `floor=` the layers' floor in a shared pool.

    Raises ConfigError saying what is known.
    """
    name, _, settings = text.partition(":")
    if name not in _POLICIES:
        raise ConfigError(f"unknown policy '{name}', expected one of: {', '.join(_POLICIES)}")
    given: dict[str, str] = {}
    for setting in settings.split(",") if settings else ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"policy '{text}': '{setting}' should be key=value")
        if key in given:
            raise ConfigError(f"policy '{text}': '{key}' is given twice")
        given[key] = value

    known = dict(_POLICIES[name][0])
    admit, floor = "always", 0.0
    if name != "belady-bypass":  # which brings its own rule
        admit = given.pop("admit", admit)
        if admit not in _ADMISSIONS:
            raise ConfigError(f"policy '{text}': unknown admit={admit}, expected one of: {', '.join(_ADMISSIONS)}")
        known |= _ADMISSIONS[admit][0]
        floor = _FLOOR.parse(f"policy '{text}': floor", given.pop("floor", "0"))
    for key in given:
        if key not in known:
            names = [*known, *(["admit", "floor"] if name != "belady-bypass" else [])]
            raise ConfigError(f"policy '{text}': unknown key '{key}', expected one of: {', '.join(names) or 'none'}")
    values = {
        key: option.parse(f"policy '{text}': {key}", given[key]) if key in given else option.default
        for key, option in known.items()
    }
    return PolicySpec(text, name, admit, values, int(floor))


def require_native(spec: PolicySpec) -> None:
    """Raises ConfigError if the engine cannot run the policy."""
    if spec.name not in NATIVE:
        raise ConfigError(
            f"policy '{spec.text}' can be simulated, but not run: '{spec.name}' has no native twin; "
            f"those that have are {', '.join(NATIVE)}"
        )
