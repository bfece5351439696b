"""The command line, as a user runs it."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

from moe_engine import Engine
from moe_engine.cli import main


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process, to the exit."""

    def run(*arguments: str, stdin: str = "") -> Done:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit:
            main(list(arguments))
        out, err = capsys.readouterr()
        return Done(int(exit.value.code or 0), out, err)

    return run


def test_generate_writes_text_to_stdout_and_the_summary_to_stderr(run: Run) -> None:
    done = run("generate", "Once upon a time", "--max-tokens", "8", "--seed", "1", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    with Engine.load(device="cpu") as engine:
        assert done.stdout == engine.generate("Once upon a time", max_tokens=8, seed=1).text + "\n"
    assert "tok/s" in done.stderr
    assert "VRAM" not in done.stderr  # there is none
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_budget_for_no_vram_is_said_to_have_no_effect(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    done = run("generate", "x", "--max-tokens", "1", "--device", "cpu", "--vram-budget", "1GiB")
    assert done.returncode == 0
    assert [record.getMessage() for record in caplog.records] == [
        "vram_budget '1GiB' has no effect: the model runs on the CPU"
    ]


def test_generate_json_is_one_object(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("The captain", encoding="utf-8")
    options = ("--max-tokens", "4", "--temperature", "0", "--device", "cpu", "--json")
    done = run("generate", "--prompt-file", str(file), *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"prompt_tokens", "tokens", "text", "stats"} <= set(found)
    assert len(found["tokens"]) == 4
    assert found["stats"]["prompt_tokens"] == len(found["prompt_tokens"])
    for stdin in ("The captain", "The captain\n"):  # the last newline is the editor's
        again = run("generate", "--prompt-file", "-", *options, stdin=stdin)
        assert json.loads(again.stdout)["tokens"] == found["tokens"]
    two = run("generate", "--prompt-file", "-", *options, stdin="The captain\n\n")
    assert json.loads(two.stdout)["prompt_tokens"] != found["prompt_tokens"]


def test_inspect(run: Run, tmp_path: Path) -> None:
    from moe_engine.loading import bundled_model

    done = run("inspect", str(bundled_model()), "--json")
    found = json.loads(done.stdout)
    assert found["architecture"] == "deepseek2"
    assert found["supported"] is True
    assert found["dimensions"]["expert_count"] == 32
    total = found["dense_bytes"] + found["shared_bytes"] + found["routed_bytes"]
    assert total == sum(use["nbytes"] for use in found["types"])
    assert {use["type"]: use["tensors"] for use in found["types"]} == {"Q4_K": 38, "F32": 23, "Q6_K": 5, "Q5_0": 4}
    # gate, up and down of 256 x 256: all Q4_K, or down in Q6_K
    assert found["expert_bytes"] == [3 * 256 * 144, 256 * (2 * 144 + 210)]
    assert "deepseek2" in run("inspect", str(bundled_model())).stdout


def test_inspect_of_an_unsupported_architecture(run: Run, tmp_path: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_block_count(1)
    writer.add_string("mamba.note", "[/b]")
    writer.add_tensor("x", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = run("inspect", str(tmp_path / "m.gguf"))
    assert done.returncode == 0
    assert "not supported" in done.stdout
    assert "[/b]" in done.stdout
    done = run("generate", "x", "-m", str(tmp_path / "m.gguf"))
    assert done.returncode == 1
    assert "'mamba' is not supported, expected one of: deepseek2, qwen2moe, qwen3moe" in done.stderr


def test_perplexity(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((Path(__file__).parent / "data" / "heldout-4k.txt").read_text(encoding="utf-8")[:3000])
    done = run("perplexity", "-f", str(text), "--ctx", "128", "--device", "cpu", "--kv-type", "q8_0", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 1 < found["ppl"] < 100
    assert found["tokens"] == found["chunks"] * 63


def test_tokenize(run: Run) -> None:
    done = run("tokenize", "Hello, world!", "--json")
    assert json.loads(done.stdout)["tokens"] == [39, 449, 78, 11, 1302, 0]
    assert len(run("tokenize", "Hello, world!").stdout.splitlines()) == 6


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "x", "-m", "no-such-file.gguf"),
        ("generate", "x", "--temperature", "-1"),
        ("generate", "x", "--vram-budget", "lots"),
        ("generate", "x", "--kv-type", "q4_0"),
        ("generate",),
        ("generate", "x", "--prompt-file", "y"),
        ("generate", "--prompt-file", "no-such-file.txt"),
        ("perplexity", "-f", "no-such-file.txt"),
        ("inspect", "no-such-file.gguf"),
        ("inspect", __file__),
        ("tokenize", "x", "-m", __file__),
    ],
)
def test_mistakes_are_one_line_without_traceback(run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "x", "-m", "{}", "--trace", "{}"),
        ("calibrate", "-m", "{}", "-o", "{}"),
        ("trace", "record", "-f", "{}", "-o", "{}"),
        ("trace", "import", "{}", "-o", "{}"),
        ("trace", "export", "{}", "-o", "{}"),
        ("trace", "simulate", "{}", "--plot", "{}"),
    ],
)
def test_what_is_read_is_not_written(run: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("content", encoding="utf-8")
    (tmp_path / "same").symlink_to(tmp_path / "file")
    names = iter([str(tmp_path / "file"), str(tmp_path / "same")])
    done = run(*(next(names) if word == "{}" else word for word in command))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path / 'same'}: is read by the same command: choose another file to write\n"
    assert (tmp_path / "file").read_text(encoding="utf-8") == "content"


TOKENIZE = f"{sys.executable} -m moe_engine tokenize hello"


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (f"{TOKENIZE} > /dev/full", "standard output cannot be written: No space left on device"),
        (f"{TOKENIZE} >&-", "standard input or output is closed"),
        (f"{sys.executable} -m moe_engine generate --prompt-file - <&-", "standard input or output is closed"),
    ],
)
def test_output_that_goes_nowhere(command: str, error: str) -> None:
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {error}\n")


def test_characters_that_a_terminal_does_not_have() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "moe_engine", "tokenize", "a b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u0120b" in done.stdout


def test_interrupt_before_anything_has_begun() -> None:
    program = """
import sys
class Interrupted:
    def find_spec(self, name, *rest):
        if name == "moe_engine.cli": raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from moe_engine.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_version(run: Run) -> None:
    assert run("--version") == Done(0, f"moe-engine {metadata.version('moe-engine')}\n", "")


def test_help_lists_the_commands(run: Run) -> None:
    done = run("--help")
    assert done.returncode == 0
    for name in ("generate", "inspect", "perplexity", "tokenize"):
        assert name in done.stdout
        assert run(name, "--help").returncode == 0


def test_python_m_is_the_same_program() -> None:
    command = [sys.executable, "-m", "moe_engine", "generate", "x", "-m", "no-such-file.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no-such-file.gguf: no such file\n"


def test_interrupt_ends_quietly() -> None:
    command = [sys.executable, "-m", "moe_engine", "generate", "Once", "--max-tokens", "2000", "--device", "cpu"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(10)  # it is generating
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=300)
            assert process.returncode == 130
            assert "Traceback" not in err.decode()
        finally:
            process.kill()
