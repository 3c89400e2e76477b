"""`trust_remote_code`: a saved checkpoint opens with our classes where that is asked for, and runs no code elsewhere."""

import ast
import json
import os
import re
import subprocess
import sys

import nemotron_super
import pytest
import torch
from nemotron_super.modeling.remote_code import AUTO_MAP, STUB_FILE
from transformers import AutoConfig, AutoModelForCausalLM

OPEN = """
import builtins, json, sys
builtins.input = lambda *a: sys.exit("asked a question")
{before}
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
import torch
found = {{}}
for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
    made = auto.from_pretrained(sys.argv[1], {arguments})
    found[auto.__name__] = type(made).__module__ + "." + type(made).__name__
{after}
print(json.dumps(found))
"""


def run(folder, cache, before="", arguments="", after="", **environment):
    """Open a checkpoint in a fresh process; return what it printed, or its error output where it failed."""
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", **environment}
    code = OPEN.format(before=before, arguments=arguments, after=after)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr


OURS = {
    "AutoConfig": "nemotron_super.configuration.configuration_nemotron_h.NemotronHConfig",
    "AutoModel": "nemotron_super.modeling.modeling_nemotron_h.NemotronHModel",
    "AutoModelForCausalLM": "nemotron_super.modeling.modeling_nemotron_h.NemotronHForCausalLM",
}
UPSTREAM = {
    "AutoConfig": "transformers.models.nemotron_h.configuration_nemotron_h.NemotronHConfig",
    "AutoModel": "transformers.models.nemotron_h.modeling_nemotron_h.NemotronHModel",
    "AutoModelForCausalLM": "transformers.models.nemotron_h.modeling_nemotron_h.NemotronHForCausalLM",
}
# A copy of the stub that tells whether it ran.
MARKED = "import pathlib\npathlib.Path(__file__).parent.joinpath('it ran').touch()\npathlib.Path({mark!r}).touch()\n"


@pytest.fixture
def marked(rewrite, published, tmp_path):
    """A checkpoint whose stub leaves a mark when it runs: the folder and the mark."""
    folder, mark = rewrite(), tmp_path / "it ran"
    stub = (published / STUB_FILE).read_text()
    (folder / STUB_FILE).write_text(MARKED.format(mark=str(mark)) + stub)
    return folder, mark


def test_trusted(marked, tmp_path, published):
    """Our classes without an import of ours; what they then save is a checkpoint like any other, without our sources."""
    folder, mark = marked
    after = (
        "made.save_pretrained(sys.argv[1] + '/again')\n"
        "from safetensors.torch import load_file\n"
        "found['same'] = load_file(sys.argv[1] + '/again/model.safetensors').keys() "
        "== load_file(sys.argv[1] + '/model.safetensors').keys()"
    )
    found = run(folder, tmp_path / "cache", arguments="trust_remote_code=True", after=after)
    assert found == {**OURS, "same": True} and mark.exists()
    names = {file.name for file in (folder / "again").iterdir()}
    assert names == {file.name for file in published.iterdir()}
    assert json.loads((folder / "again" / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_not_trusted_and_not_imported(marked, tmp_path):
    folder, mark = marked
    assert run(folder, tmp_path / "cache") == UPSTREAM
    assert run(folder, tmp_path / "cache", arguments="trust_remote_code=False") == UPSTREAM
    assert not mark.exists()


@pytest.mark.parametrize("arguments", ["", "trust_remote_code=False", "trust_remote_code=True"])
def test_imported(arguments, marked, tmp_path):
    """Ours, no question asked, and the checkpoint's file is not run: the installed package is at hand."""
    folder, mark = marked
    assert run(folder, tmp_path / "cache", before="import nemotron_super", arguments=arguments) == OURS
    assert not mark.exists()


def test_package_is_missing(rewrite, published, tmp_path):
    """The error says what to install."""
    folder = rewrite()
    (folder / STUB_FILE).write_text((published / STUB_FILE).read_text())
    hide = "import sys; sys.modules['nemotron_super'] = None"
    error = run(folder, tmp_path / "cache", before=hide, arguments="trust_remote_code=True")
    assert isinstance(error, str) and "pip install nemotron-super" in error.splitlines()[-1]
    assert "ImportError" in error.splitlines()[-1]


def test_the_stub(published):
    """Thin: a docstring, one guarded import, no model; and it names what `auto_map` promises."""
    source = (published / STUB_FILE).read_text()
    tree = ast.parse(source)
    assert [type(node) for node in tree.body] == [ast.Expr, ast.Try]
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    auto_map = json.loads((published / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= auto_map.keys()
    assert {f"{STUB_FILE.removesuffix('.py')}.{name}" for name in imported} == set(auto_map.values())
    for name in imported:
        assert hasattr(nemotron_super, name)
    assert max(len(line) for line in source.splitlines()) <= 119 and not re.search(r"[^\x00-\x7f]", source)


def test_a_published_auto_map_is_replaced(rewrite, tmp_path):
    """NVIDIA's files name code of their own, which we neither run nor leave behind."""
    folder = rewrite(
        auto_map={"AutoConfig": "configuration_nemotron_h.NemotronHConfig", "AutoModelForCausalLM": "x.Y"}
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_only_the_main_process_writes(published, tmp_path):
    model = nemotron_super.NemotronHForCausalLM.from_pretrained(published)
    model.save_pretrained(tmp_path / "worker", is_main_process=False)
    assert not list((tmp_path / "worker").glob("*"))
    model.save_pretrained(tmp_path / "also" / "nested")
    assert (tmp_path / "also" / "nested" / STUB_FILE).exists()


def test_upload_takes_the_stub_along(published, tmp_path, monkeypatch):
    """`save_pretrained(push_to_hub=True)` uploads what is new since it began, also what this package writes before transformers."""
    model = nemotron_super.NemotronHForCausalLM.from_pretrained(
        published, quantization_config=nemotron_super.NVFP4Config(recipe="fp8")
    )
    (tmp_path / "old.txt").write_text("was here")
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: _Hub())
    uploaded: list[str] = []

    def upload(working_dir, repo_id, files_timestamps, **kwargs):
        uploaded.extend(
            name
            for name in os.listdir(working_dir)
            if name not in files_timestamps
            or os.path.getmtime(os.path.join(working_dir, name)) > files_timestamps[name]
        )

    monkeypatch.setattr(model, "_upload_modified_files", upload)
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *a, **k: _Card())
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/something")
    assert {STUB_FILE, "config.json", "model.safetensors", "hf_quant_config.json"} <= set(
        uploaded
    ) and "old.txt" not in uploaded


class _Hub:
    def create_repo(self, repo_id, **kwargs):
        return type("Repo", (), {"repo_id": repo_id})


class _Card:
    def save(self, path):
        pass


def test_subclasses_may_still_be_remote_code(monkeypatch):
    class Mine(nemotron_super.NemotronHConfig):
        pass

    nemotron_super.NemotronHConfig.register_for_auto_class()
    assert nemotron_super.NemotronHConfig._auto_class is None
    Mine.register_for_auto_class()
    assert Mine._auto_class == "AutoConfig" and nemotron_super.NemotronHConfig._auto_class is None


def test_stub_is_not_needed(rewrite):
    """A checkpoint whose stub was deleted still opens with the package imported."""
    folder = rewrite()
    assert not (folder / STUB_FILE).exists() and "auto_map" in json.loads((folder / "config.json").read_text())
    assert type(AutoConfig.from_pretrained(folder)) is nemotron_super.NemotronHConfig
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model) is nemotron_super.NemotronHForCausalLM
