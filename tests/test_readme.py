"""The README's and the card's examples run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import nemotron_super
import pytest

ROOT = Path(nemotron_super.__file__).parent


@pytest.mark.parametrize("document", ["README.md", "model_card/nemotron-h-tiny/README.md"])
def test_examples(document):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert examples
    for example in examples:
        subprocess.run([sys.executable, "-c", example], cwd=ROOT, check=True, timeout=300)


def test_links_lead_somewhere():
    for document in [ROOT / "README.md", *ROOT.glob("model_card/**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert "://" in target or (document.parent / target).exists(), f"{document}: {target}"
