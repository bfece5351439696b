"""Rules of `place`: what they resolve to, what is refused, and that results do not change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from moe_engine import ConfigError, Engine
from moe_engine.cli import main
from moe_engine.config import EngineConfig
from moe_engine.expert_cache import CachedExperts
from moe_engine.gguf_file import GGUFFile
from moe_engine.graph_decoder import GraphDecoder
from moe_engine.placement import placed_homes

PROMPT = [1, 2, 3]
SMALL = {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
ALL_EXPERTS = r"_exps\."


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("qwen3moe/plain", tmp_path_factory.mktemp("model"), "F16", **SMALL).path


@pytest.fixture
def homes(path: Path) -> Callable[..., dict[int, str]]:
    def resolve(*rules: str, device: str = "cuda:0", n_layer: int = 3, **options: Any) -> dict[int, str]:
        return {**placed_homes(GGUFFile(path), EngineConfig.of(place=rules, **options), device, n_layer)}

    return resolve


def test_the_first_rule_decides(homes: Callable[..., dict[int, str]]) -> None:
    assert homes() == {}
    assert homes(rf"{ALL_EXPERTS}=cpu") == {0: "cpu", 1: "cpu", 2: "cpu"}
    assert homes(r"blk\.1\..*_exps=cuda:0", rf"{ALL_EXPERTS}=cpu") == {0: "cpu", 1: "vram", 2: "cpu"}
    assert homes(rf"{ALL_EXPERTS}=cpu", r"blk\.1\..*_exps=cuda:0") == {0: "cpu", 1: "cpu", 2: "cpu"}
    assert homes(r"blk\.[02]\.ffn_(gate|up|down)_exps=cache") == {0: "cache", 2: "cache"}
    assert homes("attn=cuda:0") == {}  # where it is anyway
    assert homes(rf"{ALL_EXPERTS}=cuda:3", device="simulated")[0] == "vram"
    assert homes(".=cpu", device="cpu") == {0: "cpu", 1: "cpu", 2: "cpu"}
    assert homes(rf"{ALL_EXPERTS}=cpu", n_layer=2) == {0: "cpu", 1: "cpu"}


@pytest.mark.parametrize(
    ("rules", "options", "message"),
    [
        (("exps=cpu", "nothing_like_it=cpu"), {}, "'nothing_like_it=cpu' matches no tensor"),
        ((r"attn_q\.=cpu",), {}, r"'blk\.0\.attn_q\.weight', which is no routed expert, can only be in: cuda:0$"),
        (("_exps=cuda:1",), {}, "can only be in: cuda:0, cache, cpu, disk$"),
        (("_exps=cuda:0",), {"device": "cpu"}, "can only be in: cpu, disk$"),
        ((".=disk",), {}, "which is no routed expert, can only be in: cuda:0$"),
        ((".=disk",), {"device": "cpu"}, "which is no routed expert, can only be in: cpu$"),
        (("gate_exps=disk", "exps=cache"), {}, "of one layer's experts in different places"),
        (
            ("ffn_gate_exps=cpu",),
            {},
            r"'blk\.0\.ffn_gate_exps\.weight' and 'blk\.0\.ffn_\w+_exps\.weight' of one layer",
        ),
        (("gate_exps=cpu", "exps=cache"), {}, "of one layer's experts in different places"),
        (("_exps=cpu",), {"exact": True}, "exact fetches"),
        (("_exps=cpu",), {"miss": "fetch"}, "miss='fetch' fetches"),
        (("_exps=tape",), {}, "'_exps=tape', expected REGEX=PLACE with a place of: cuda:0, cache, cpu, disk"),
        (("_exps",), {}, "expected REGEX=PLACE"),
        (("=cpu",), {}, "expected REGEX=PLACE"),
        (("(=cpu",), {}, "no regular expression"),
        ((5,), {}, "place is 5"),
    ],
)
def test_impossible_rules(
    rules: tuple[str, ...], options: dict[str, Any], message: str, homes: Callable[..., dict[int, str]]
) -> None:
    with pytest.raises(ConfigError, match=message):
        homes(*rules, **options)


def load(path: Path, *rules: str, **options: Any) -> Engine:
    common: dict[str, Any] = {"device": "simulated", "ctx": 32, "threads": 2, "vram_budget": "64MiB"}
    return Engine.load(path, place=rules, **(common | options))


MIXED = (r"blk\.0\..*_exps=cuda:0", r"blk\.1\..*_exps=cpu")


def decode(engine: Engine) -> list[int]:
    tokens = engine.generate(PROMPT, temperature=0, max_tokens=2).tokens
    assert isinstance(engine.decoder, GraphDecoder)
    engine.decoder.worker.settle()
    engine.decoder.worker.check_integrity()
    return tokens


@pytest.fixture(scope="module")
def expected(path: Path) -> list[int]:
    with load(path) as engine:
        return decode(engine)


@pytest.mark.parametrize(
    ("rules", "options"),
    [
        (MIXED, {"cache_slots": 3, "miss": "auto"}),
        (MIXED, {"experts": "cpu"}),
        ((f"{ALL_EXPERTS}=cuda:0",), {"experts": "cpu", "exact": True}),
        ((f"{ALL_EXPERTS}=cpu",), {}),
    ],
)
def test_results_are_those_without_rules(
    path: Path, expected: list[int], rules: tuple[str, ...], options: dict[str, Any]
) -> None:
    with load(path, *rules, **options) as engine:
        assert decode(engine) == expected
        assert isinstance(engine.decoder, GraphDecoder)
        stats = engine.decoder.worker.stats()
        experts = engine.experts
        assert isinstance(experts, CachedExperts)
        assert engine.vram_plan
        homes = engine.vram_plan.homes
        assert len(homes) == (2 if rules == MIXED else 3)
        for layer, home in homes.items():
            resident = (experts.slot_table[layer] >= 0).sum()
            assert resident == {"vram": experts.n_expert, "cpu": 0}[home]
            if not experts.holds_all:
                assert (stats.misses if home == "vram" else stats.hits)[layer] == 0
                assert (stats.hits if home == "vram" else stats.misses)[layer] > 0


def test_placed_layers_without_graph_or_worker(path: Path) -> None:
    with load(path, eager=True) as engine:
        expected = engine.generate(PROMPT, temperature=0, max_tokens=1).tokens
        logits = engine.forward(PROMPT)
    with load(path, *MIXED, eager=True) as engine:
        assert engine.generate(PROMPT, temperature=0, max_tokens=1).tokens == expected
        assert (engine.forward(PROMPT) - logits).abs().max() < 0.05 * logits.std()


def test_placed_experts_are_part_of_the_budget(path: Path) -> None:
    with load(path) as free, load(path, *MIXED) as placed:
        assert free.vram_plan
        assert placed.vram_plan
        one_layer = 4 * sum(
            info.nbytes for name, info in free.file.tensors.items() if "blk.0." in name and "_exps" in name
        )
        assert placed.vram_plan.placed * 4 == one_layer  # F16 rows need no padding
        assert placed.vram_plan.placed > 0
        assert sum(placed.vram_plan.terms.values()) + placed.vram_plan.slots == placed.vram_plan.budget
        assert "placed experts" in str(placed.vram_plan)


def test_command_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(path), "--device", "simulated", "--vram-budget", "64MiB"]
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--place", MIXED[0], "--place", MIXED[1]])
    out, err = capsys.readouterr()
    assert not exit.value.code, err
    assert "placed experts" in out
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--place", "nothing_like_it=cpu"])
    assert exit.value.code == 1
    assert "matches no tensor" in capsys.readouterr().err
