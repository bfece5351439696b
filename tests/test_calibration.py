"""Files of calibrations: kept, read back, and distrusted."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_h200 import BUNDLED, BUSY_H200, H200

from moe_engine import CalibrationError, Engine, calibrate, hardware
from moe_engine.calibrate import GPU_TYPES, filled
from moe_engine.calibrate_gpu import _random_bytes
from moe_engine.calibration import Calibration, Product, cache_path, closest, kept, processor_name
from moe_engine.cli import main
from moe_engine.config import EngineConfig
from moe_engine.expert_cache import CachedExperts
from moe_engine.kernels.cpu import CpuKernels
from moe_engine.kernels.reference import dequantize
from moe_engine.prompt_split import PromptRates

CPU_ONLY = replace(H200, gpu=None, disk=None)


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("machine", [H200, CPU_ONLY])
def test_a_file_says_what_was_saved(machine: Calibration, tmp_path: Path) -> None:
    machine.save(tmp_path / "new" / "x.msgpack")
    assert Calibration.load(tmp_path / "new" / "x.msgpack") == machine
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.msgpack"]


def test_hardware_of_a_machine() -> None:
    assert H200.hardware == hardware.Hardware(vram=3.76e12, pcie=55.2e9, dram=149e9)
    assert CPU_ONLY.hardware == hardware.Hardware(vram=149e9, pcie=149e9, dram=149e9)


def test_rates_for_prompts_are_the_calibrations() -> None:
    """In bytes, operations and seconds, of the type that is asked for, the closest one where it was not measured."""
    rates = BUSY_H200.rates("Q4_K")
    assert (rates.pcie, rates.dram) == (55.1e9, 131e9)
    assert rates.cpu == pytest.approx(3.4348e12, rel=1e-4)
    assert rates.gpu == pytest.approx(6 * 2048 * 768 * 8 * (2048 - 64) / 382.6e-6)
    assert rates.step_layer == pytest.approx(70.1e-6)
    assert (rates.stream_layer, rates.cached_layer) == pytest.approx(
        (BUNDLED * (0.8e-3 + 6 / 5 * 2.2e-3), BUNDLED * 0.8e-3)
    )
    assert BUSY_H200.rates("Q8_0").cpu == pytest.approx(2.9611e12, rel=1e-4)
    assert BUSY_H200.rates("IQ2_XS").cpu == BUSY_H200.rates("Q2_K").cpu == pytest.approx(2.2865e12, rel=1e-4)
    assert rates.cpu_factor == 1.0  # learnt anew by each engine


@pytest.mark.parametrize("machine", [BUSY_H200, None])
def test_an_engine_divides_prompts_by_what_was_calibrated(
    machine: Calibration | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def calibration(device: torch.device, config: EngineConfig) -> Calibration | None:
        asked.append((device.type, config.n_threads))
        return machine

    monkeypatch.setattr("moe_engine.loading.calibration_of", calibration)
    with Engine.load(device="simulated", experts="cache", ctx=32, threads=2) as engine:
        assert isinstance(engine.experts, CachedExperts)
        assert engine.experts.prompt
        assert str(engine.experts.layouts[0].gate.type) == "Q4_K"
        assert engine.experts.prompt.rates == (PromptRates() if machine is None else machine.rates("Q4_K", 17.5 / 11))
    assert asked == [("cpu", 2)]


def test_closest_type_has_the_most_similar_size() -> None:
    rates = {"Q4_K": 1, "Q8_0": 2}
    assert [closest(rates, type) for type in ("Q4_K", "IQ4_XS", "Q2_K", "Q6_K", "BF16")] == [1, 1, 1, 2, 2]


def packed(**changes: Any) -> bytes:
    path = cache_path(None, 1)
    H200.save(path)
    values = msgpack.unpackb(path.read_bytes(), strict_map_key=False)
    for key, value in changes.items():
        target, *rest = key.split("__")
        inside = values
        for name in rest:
            inside, target = inside[target], name
        if value is None:
            del inside[target]
        else:
            inside[target] = value
    return msgpack.packb(values)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": "x"}, "no file of"),
        ({"version": 99}, "has version 99, expected 5: run"),
        ({"dram": {}}, "'dram'"),
        ({"dram": {0: 1.0}}, "'dram'"),
        ({"dram": {1: float("nan")}}, r"'dram\.1'"),
        ({"dram": {1: True}}, r"'dram\.1'"),
        ({"disk": -1.0}, "'disk'"),
        ({"threads": 1.5}, "'threads'"),
        ({"processor": 5}, "'processor'"),
        ({"cpu_experts": {"Q9_X": {"weights": 1.0, "operations": 1.0}}}, "'cpu_experts'"),
        ({"cpu_experts": {"Q4_K": {"weights": 1.0}}}, r"'cpu_experts\.Q4_K\.\*'"),
        ({"gpu": []}, "'gpu'"),
        ({"gpu__copy": None}, r"'gpu\.\*'"),
        ({"gpu__copy": 0.0}, r"'gpu\.copy'"),
        ({"gpu__step_seconds": {}}, r"'gpu\.step_seconds'"),
        ({"gpu__pcie": {"x": 1.0}}, r"'gpu\.pcie'"),
        (
            {"gpu__prompt": {"Q6_K": {"weights": 1.0, "operations": 998e12}}},
            r"'gpu\.prompt\.Q6_K\.operations' is 9.98e",
        ),
        ({"gpu__attention": 800e12}, r"'gpu\.attention' is 8e\+14, more than the 7.8e\+14"),
        ({"more": 1}, "'\\*'"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.msgpack"
    path.write_bytes(packed(**changes))
    with pytest.raises(CalibrationError, match=message) as refused:
        Calibration.load(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("type", GPU_TYPES)
def test_weights_to_measure_with_are_finite_and_differ(type: str) -> None:
    found = dequantize(filled(type, 64, 2048, make=partial(_random_bytes, torch.device("cpu"))))
    assert found.isfinite().all()
    assert len(found.unique()) > 1000


def test_impossible_rates_are_not_kept() -> None:
    """What measuring ends with: all rates in their place."""
    assert H200.gpu
    with pytest.raises(CalibrationError, match=r"'gpu\.prompt\.Q8_0\.operations' is 1\.02e.* calibrate again"):
        replace(H200.gpu, prompt={"Q4_K": Product(1e12, 511e12), "Q8_0": Product(1e12, 1020e12)})


@given(data=st.binary(max_size=200))
def test_any_bytes(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.msgpack"
    path.write_bytes(data)
    with pytest.raises(CalibrationError):
        Calibration.load(path)


@settings(max_examples=200)
@given(data=st.data())
def test_damaged_files(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.msgpack"
    H200.save(path)
    damaged = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(damaged)
    try:
        found = Calibration.load(path)
    except CalibrationError:
        return
    rates = [*found.dram.values(), *(product.weights for product in found.cpu_experts.values())]
    assert all(0 < rate < 1e30 for rate in rates)  # a flipped digit cannot be known; nonsense can


def test_a_machines_own_file_is_found(caplog: pytest.LogCaptureFixture) -> None:
    assert kept(None, 16) is None
    mine = replace(CPU_ONLY, processor=processor_name())
    mine.save(cache_path(None, 16))
    assert kept(None, 16) == mine
    assert kept(None, 8) is None
    assert kept("NVIDIA H200", 16) is None
    assert not caplog.records


@pytest.mark.parametrize(("content", "notice"), [(b"\x00", "ignored"), (None, "another machine")])
def test_a_file_that_is_not_in_order_is_reported_and_ignored(
    content: bytes | None, notice: str, caplog: pytest.LogCaptureFixture
) -> None:
    H200.save(cache_path(None, 16))  # of a machine with a GPU
    if content is not None:
        cache_path(None, 16).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert kept(None, 16) is None
    (record,) = caplog.records
    assert notice in record.getMessage()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "RAM_SAMPLE_BYTES", 1 << 20)
    monkeypatch.setattr(calibrate, "CPU_TYPES", ("Q4_K", "MXFP4"))
    monkeypatch.setattr(calibrate, "CPU_TOKENS", 2)
    monkeypatch.setattr(calibrate, "CPU_ROUNDS", 2)


@pytest.mark.usefixtures("quick")
def test_calibrate_measures_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "DISK_CHUNK", 1 << 16)
    file, steps = Path(__file__).parent / "data" / "file.bin", list[str]()
    file = tmp_path / "file.bin"
    file.write_bytes(bytes(1 << 20))
    found = calibrate.calibrate(torch.device("cpu"), 2, file, steps.append)
    assert len(steps) == calibrate.n_steps(torch.device("cpu"), True) == 3
    assert found.gpu is None
    assert found.threads == 2
    assert set(found.dram) == {1, 2}
    assert set(found.cpu_experts) == {"Q4_K", "MXFP4"}
    found.save(tmp_path / "x.msgpack")
    assert Calibration.load(tmp_path / "x.msgpack") == found  # so all numbers are sane


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("disturbed", [0, 1])
def test_the_cpus_best_round_counts(disturbed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call takes a second besides; eight experts 8 seconds, with two tokens 13."""
    turns = {"dram": 0, "Q4_K": 0, "MXFP4": 0}

    def slower(name: str) -> float:
        turns[name] += 1
        return 3.0 if turns[name] == disturbed + 1 else 1.0

    def times(calls: calibrate.ExpertCalls) -> tuple[float, float, float]:
        factor = slower(calls.handle.gate.type.name)
        return 9.0 * factor, 3.0 * factor, 14.0 * factor

    def dram_rates(*_: object) -> dict[int, float]:
        return {2: 10.0 / slower("dram")}

    monkeypatch.setattr(calibrate.ExpertCalls, "times", times)
    monkeypatch.setattr(calibrate, "_dram_rates", dram_rates)
    found = calibrate.calibrate(torch.device("cpu"), 2, None)
    assert set(turns.values()) == {2}
    assert found.dram == {2: 10.0}
    assert found.cpu_call_seconds == pytest.approx(1.0)
    calls = calibrate.ExpertCalls(CpuKernels(2), "Q4_K", calibrate.expert_memory())
    product = found.cpu_experts["Q4_K"]
    assert product.seconds(calls.nbytes, calls.operations) == pytest.approx(8.0)
    assert product.seconds(calls.nbytes, 2 * calls.operations) == pytest.approx(13.0)


@pytest.mark.usefixtures("quick")
def test_calibrate_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["calibrate", "--device", "cpu", "--threads", "2"])
    out, err = capsys.readouterr()
    assert not exit.value.code, err
    assert "CPU experts" in out
    assert str(cache_path(None, 2)) in err.replace("\n", "")
    assert kept(None, 2) is not None


def test_a_missing_file_to_read(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="nothing: cannot be read directly"):
        calibrate.disk_rate(tmp_path / "nothing")
    (tmp_path / "small").write_bytes(b"x")
    with pytest.raises(CalibrationError, match="has 1 bytes"):
        calibrate.disk_rate(tmp_path / "small")
