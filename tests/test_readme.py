"""The README's examples run as they stand."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from moe_engine.cli import main
from moe_engine.trace_npz import import_npz

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(?:\$ |    )(moe-engine .*)$", README, re.MULTILINE)


def test_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 100


def test_examples_are_found() -> None:
    assert len(COMMANDS) == 13


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large models are not at hand: there the command must stop at the missing file, not at its options."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("moe_engine.hardware.RAM_SAMPLE_BYTES", 1 << 20)
    monkeypatch.setattr("moe_engine.calibrate.CPU_TYPES", ("Q4_K",))
    if command == "moe-engine calibrate":
        command += " --device cpu"  # with a GPU it takes longer than a test may
    held_out = Path(__file__).parent / "data" / "heldout-4k.txt"
    Path("text.txt").write_text(held_out.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    np.savez("routing.npz", ids=np.array([[[0, 1], [2, 3]], [[3, 0], [2, 1]]]))
    import_npz("routing.npz").save("model.trace")
    arguments = shlex.split(command)[1:]
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    out, err = capsys.readouterr()
    if "Qwen3-30B" in command:
        assert exit.value.code == 1
        assert err == "error: Qwen3-30B-A3B-Q4_K_M.gguf: no such file\n"
    else:
        assert not exit.value.code, err
        assert out
