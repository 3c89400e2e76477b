"""The command `nemotron-super`, on the model that comes with the package."""

import subprocess
import sys

import pytest
from nemotron_super import cli


def run(capsys, *arguments):
    cli.main(["generate", *arguments])
    return capsys.readouterr().out


@pytest.mark.parametrize("extra", [(), ("--dtype", "bfloat16"), ("--temperature", "0.8"), ("--chat",)])
def test_generate(capsys, extra):
    text = run(capsys, "def add(a, b):", "--max-new-tokens", "12", *extra)
    assert text.startswith("def add(a, b):") is ("--chat" not in extra)
    assert len(text) > 20
    assert run(capsys, "def add(a, b):", "--max-new-tokens", "12", *extra) == text


def test_streaming(capsys, monkeypatch):
    """Text appears while the model works, not at the end."""
    written = []
    monkeypatch.setattr("transformers.TextStreamer.on_finalized_text", lambda self, text, **kw: written.append(text))
    run(capsys, "The list type", "--max-new-tokens", "20")
    assert sum(bool(text) for text in written) > 5


def test_offline_and_by_its_name():
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from nemotron_super.cli import main\n"
        "main(['generate', 'import os', '--max-new-tokens', '3'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.startswith("import os")


@pytest.mark.parametrize("arguments", [[], ["generate"], ["fly"], ["generate", "a", "--dtype", "int4"]])
def test_bad_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "usage: nemotron-super" in capsys.readouterr().err
