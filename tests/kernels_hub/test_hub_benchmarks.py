"""The kernel repository's benchmarks, run by the `kernels` library's own runner, small and interpreted: what they time is right."""

from types import SimpleNamespace

import kernels
import pytest
from kernels.cli import benchmark as runner
from nemotron_super.kernels_hub import registry

pytestmark = pytest.mark.no_cover

SCRIPTS = runner.discover_benchmark_scripts("nemotron-h-kernels", registry.BUNDLE)
SMALL = {
    "tokens": 40, "hidden": 64, "inner": 96, "vocab": 300, "heads": 4, "groups": 2, "batch": 2, "slots": 100,
    "query_heads": 4, "width": 64, "experts": 8, "top_k": 3, "latent": 64, "intermediate": 96,
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_results_are_those_of_plain_torch(script, monkeypatch):
    monkeypatch.setattr(kernels, "get_local_kernel", lambda path: registry._bundle())
    monkeypatch.setattr(runner, "_backend", lambda: SimpleNamespace(name="cpu"))
    for cls in runner.discover_benchmark_classes(script, registry.BUNDLE):
        for name, size in SMALL.items():
            if hasattr(cls, name):
                monkeypatch.setattr(cls, name, size)
        results, _ = runner.run_benchmark_class(cls, 1, 0, str(registry.BUNDLE), is_local=True, revision="local")
        assert results and all(result.verified for result in results.values())


def test_every_function_is_timed():
    text = "".join(script.read_text() for script in SCRIPTS)
    assert not [name for name in registry._bundle().__all__ if name != "layers" and f"self.kernel.{name}(" not in text]
