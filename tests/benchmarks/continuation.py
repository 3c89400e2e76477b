"""Continues `nemotron-h-tiny` on text it has not seen, and measures both that text and the old one before, during and after.

    apt-get install cppreference-doc-en-html libpython3.11-testsuite python3.11-doc perl-doc
    python tests/benchmarks/continuation.py OUTPUT --save

The new text is cppreference.com's C and C++ reference as Debian packages it, without its markup; whole pages are held out by a
hash. The old text is the held-out split of the model's own corpus, which must be the one its card describes. The run itself is
`nemotron-super pretrain` with `continuation.yaml` beside this file. `--root` reads packages that were unpacked, not installed
(`dpkg -x PACKAGE ROOT`).
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import nemotron_super
import numpy as np
import torch
from nemotron_super import NemotronHForCausalLM
from nemotron_super.training import corpus
from nemotron_super.training.evaluation import evaluate_windows
from nemotron_super.training.packing import PackedWindows
from nemotron_super.training.run import run
from nemotron_super.training.run_config import PretrainConfig
from nemotron_super.training.tokenizer import encode_corpus
from torch.utils.data import Subset
from transformers import AutoTokenizer

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
TINY = Path(nemotron_super.__file__).parent / "model_card" / "nemotron-h-tiny"
PAGES = Path("usr/share/cppreference/doc/html/en")
LENGTH = 1024

_BLOCKS = {"p", "div", "li", "tr", "pre", "br", "dl", "dt", "dd", "table", "h1", "h2", "h3", "h4", "h5"}
_VOID = {"br", "img", "hr", "input", "meta", "link", "col", "wbr"}
_SKIPPED = {"script", "style", "t-navbar", "editsection", "printfooter", "toc", "siteSub", "contentSub", "mw-head"}


class _PageText(HTMLParser):
    """The text of one page between its heading and its footer, a line for each block, without navigation."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.inside = False
        self.open: list[bool] = []  # per open element, whether it is left out
        self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {tag, *" ".join(value or "" for key, value in attrs if key in ("class", "id")).split()}
        self.inside = (self.inside or "firstHeading" in names) and "printfooter" not in names
        if tag in _BLOCKS:
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")
        if tag not in _VOID:
            self.open.append(bool(names & _SKIPPED) or (bool(self.open) and self.open[-1]))
            self.verbatim += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in _VOID:
            return
        if self.open:
            self.open.pop()
        self.verbatim -= tag == "pre"
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self.inside and not (self.open and self.open[-1]):
            self.parts.append(data if self.verbatim > 0 else re.sub(r"\s+", " ", data))


def page_text(html: str) -> str:
    """One page as text."""
    parser = _PageText()
    parser.feed(html)
    lines = (re.sub(r"[ \t\u00a0]+$", "", line.replace("\u200e", "")) for line in "".join(parser.parts).splitlines())
    return re.sub(r"\n{2,}", "\n", "\n".join(line if line.strip() else "" for line in lines)).strip() + "\n"


def new_corpus(root: Path) -> corpus.Corpus:
    """The pages of cppreference, split by a hash of path and text; pages with the same text are one."""
    pages = root / PAGES
    distinct: dict[bytes, corpus.Document] = {}
    for path in sorted(pages.rglob("*.html")):
        text = page_text(path.read_text(encoding="utf-8"))
        found = corpus.Document("cppreference", path.relative_to(pages).as_posix(), text)
        distinct.setdefault(hashlib.sha256(text.encode()).digest(), found)
    if not distinct:
        raise SystemExit(f"{pages}: no pages; apt-get install cppreference-doc-en-html, or give --root.")
    split: dict[bool, list[corpus.Document]] = {False: [], True: []}
    for document in distinct.values():
        split[corpus.is_heldout(document)].append(document)
    return corpus.Corpus(tuple(split[False]), tuple(split[True]))


def old_heldout(root: Path) -> tuple[corpus.Document, ...]:
    """The held-out split of the tiny model's corpus, checked against its manifest."""
    sources = tuple(replace(s, root=root / s.root.relative_to("/")) for s in corpus.DEBIAN_SOURCES)
    documents = corpus.gather_corpus(sources).heldout
    expected = corpus.CorpusManifest.load(corpus.TINY_CORPUS_MANIFEST).heldout
    if corpus.summarize_split(documents) != expected:
        raise SystemExit("The held-out files of the old corpus are not those of the model's card.")
    return documents


class Text:
    """Held-out documents as windows, with what is needed for bits per byte."""

    def __init__(self, documents: tuple[corpus.Document, ...], tokenizer):
        stream = encode_corpus(tokenizer, documents)
        self.windows = PackedWindows(stream, LENGTH)
        size = sum(len(document.text.encode()) for document in documents)
        self.bytes_per_token = size / (len(stream) - len(documents))  # a document's first token is not predicted

    def measure(self, model: NemotronHForCausalLM, windows: int) -> dict:
        """Loss and accuracies over so many windows, evenly spread over the text."""
        places = np.linspace(0, len(self.windows) - 1, min(windows, len(self.windows))).round().astype(int)
        chosen = Subset(self.windows, places.tolist())
        found = evaluate_windows(model, chosen, batch_size=4, progress=False)
        return {
            "bits_per_byte": found.bits_per_byte(self.bytes_per_token),
            "loss": found.loss,
            "accuracy": found.accuracy,
            "mtp_accuracy": found.mtp_accuracy,
            "maximum_violation": max(found.maximum_violation.values()),
            "dead_experts": sum(found.dead_experts.values()),
            "tokens": found.tokens,
        }


def draw(curve: list[dict], log: list[dict], path: Path) -> None:
    """Training loss, and held-out loss of both texts over the steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    training = [entry for entry in log if "loss" in entry]
    for name, label in (("loss", "both"), ("lm_loss", "next token"), ("mtp_loss", "MTP")):
        left.plot([entry["step"] for entry in training], [entry[name] for entry in training], lw=0.8, label=label)
    left.set(title="training loss, new text", xlabel="step", ylabel="nats per token")
    left.legend()
    for name, label in (("new", "new text"), ("old", "old text")):
        right.plot(
            [p["step"] for p in curve], [p[name]["bits_per_byte"] for p in curve], marker=".", lw=0.8, label=label
        )
    right.set(title="held-out loss", xlabel="step", ylabel="bits per byte")
    right.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Prepare the data, run, measure, and with `--save` write the results and the picture for the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the packages' files are")
    parser.add_argument("--steps", type=int, help="instead of the configuration's, to try it")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of each text")
    parser.add_argument("--hardware", default="CPU")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    pages = new_corpus(options.root)
    texts = {"new": Text(pages.heldout, tokenizer), "old": Text(old_heldout(options.root), tokenizer)}
    options.output.mkdir(parents=True, exist_ok=True)
    train = options.output / "train.jsonl"
    train.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in pages.train), encoding="utf-8")
    config = PretrainConfig.load(HERE / "continuation.yaml")
    config.model, config.output, config.data = str(TINY), str(options.output / "run"), str(train)
    config.steps = options.steps or config.steps
    summary = run(config)

    steps = {0: TINY}
    steps |= {int(p.name.rpartition("-")[2]): p for p in (options.output / "run").glob("checkpoint-*")}
    steps[config.steps] = options.output / "run"
    curve = []
    for step, path in sorted(steps.items()):
        model = NemotronHForCausalLM.from_pretrained(path, dtype=torch.float32)
        curve.append({"step": step, **{name: text.measure(model, options.windows) for name, text in texts.items()}})
        print(json.dumps(curve[-1]), flush=True)
    log = json.loads((options.output / "run" / "log.json").read_text(encoding="utf-8"))
    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": options.hardware,
        "threads": torch.get_num_threads(),
        "versions": summary["versions"],
        "seconds": summary["seconds"],
        "steps": config.steps,
        "tokens_per_step": config.rows_per_step * config.length,
        "new_corpus": {
            split: {"pages": found.files, "bytes": found.bytes, "sha256": found.sha256}
            for split in ("train", "heldout")
            for found in [corpus.summarize_split(getattr(pages, split))]
        },
        "heldout": curve,
        "training": [entry for entry in log if "loss" in entry],
    }
    (options.output / "continuation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(curve, log, options.output / "continuation.png")
    if options.save:
        (HERE / "results" / "continuation_cpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        draw(curve, log, TINY / "continuation.png")


if __name__ == "__main__":
    main()
