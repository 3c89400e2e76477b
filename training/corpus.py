"""The plain-text corpus of `nemotron-h-tiny`: permissively licensed files that Debian packages install.

Documents come in a fixed order, exact copies are dropped, and each document goes whole to the train or the held-out
split by a hash of its own path and bytes: adding or removing one file moves no other. The corpus is not shipped. Its
manifest is (`recipes/nemotron_h_tiny_corpus.json`), and `load_corpus` refuses files that do not match it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HELDOUT_FRACTION = 0.02
TINY_CORPUS_MANIFEST = Path(__file__).parent / "recipes" / "nemotron_h_tiny_corpus.json"


class CorpusSourceMissingError(FileNotFoundError):
    """A source's folder is absent, or holds no usable file."""


class CorpusMismatchError(ValueError):
    """The gathered files are not those the manifest describes."""


@dataclass(frozen=True)
class CorpusSource:
    """A folder of text files under one licence.

    `excluded` names files or folders that are left out wherever they stand in the tree; `excluded_paths` lists paths
    relative to `root`.
    """

    name: str
    root: Path
    suffix: str
    licence: str
    packages: tuple[str, ...]
    excluded: frozenset[str] = frozenset()
    excluded_paths: frozenset[str] = frozenset()

    def admits(self, path: Path) -> bool:
        """Whether `path`, relative to `root`, belongs to this source."""
        parts = path.parts
        listed = any("/".join(parts[:n]) in self.excluded_paths for n in range(1, len(parts) + 1))
        return path.name.endswith(self.suffix) and not listed and self.excluded.isdisjoint(parts)


@dataclass(frozen=True)
class Document:
    """One file: its source's name, its path relative to the source's root, and its text, byte for byte."""

    source: str
    path: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """The two splits, each in the order of the sources and then of the paths."""

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]


@dataclass(frozen=True)
class SourceSummary:
    """Files and UTF-8 bytes of one source, both splits together, its licence, and its packages with their versions."""

    files: int
    bytes: int
    licence: str
    packages: Mapping[str, str]


@dataclass(frozen=True)
class SplitSummary:
    """Files and UTF-8 bytes of one split, and a sha256 over every document's source, path, length and bytes."""

    files: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class CorpusManifest:
    """What a corpus holds, small enough to commit."""

    sources: Mapping[str, SourceSummary]
    train: SplitSummary
    heldout: SplitSummary

    def save(self, path: Path | str) -> None:
        """Write the manifest as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> CorpusManifest:
        """Read a manifest that `save` wrote."""
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        sources = {name: SourceSummary(**summary) for name, summary in fields["sources"].items()}
        return cls(sources, SplitSummary(**fields["train"]), SplitSummary(**fields["heldout"]))


_PERL = "Artistic-1.0-Perl OR GPL-1.0-or-later"

DEBIAN_SOURCES = (
    CorpusSource(
        name="python3.11-stdlib",
        root=Path("/usr/lib/python3.11"),
        suffix=".py",
        licence="PSF-2.0",
        packages=("libpython3.11-stdlib", "libpython3.11-testsuite"),
        excluded=frozenset({"__pycache__", "site-packages", "dist-packages"}),
        # Other Debian packages also put files here, so what these hold depends on the machine; `topics.py` repeats the
        # documentation, which would put held-out text into the train split.
        excluded_paths=frozenset(
            {
                "config-3.11-x86_64-linux-gnu",
                "distutils",
                "ensurepip",
                "idlelib",
                "lib2to3",
                "pydoc_data/topics.py",
                "tkinter",
                "turtledemo",
                "_sysconfigdata__x86_64-linux-gnu.py",
            }
        ),
    ),
    CorpusSource(
        name="python3.11-doc",
        root=Path("/usr/share/doc/python3.11/html/_sources"),
        suffix=".rst.txt",
        licence="PSF-2.0",
        packages=("python3.11-doc",),
    ),
    CorpusSource(
        name="perl-doc",
        root=Path("/usr/share/perl/5.36/pod"),
        suffix=".pod",
        licence=_PERL,
        packages=("perl-doc",),
    ),
)


def read_source(source: CorpusSource) -> list[Document]:
    """Read a source's UTF-8 files, sorted by relative path. Links, empty files and other encodings are skipped.

    Raises:
        CorpusSourceMissingError: the folder is absent or holds no such file; names it and the packages to install.
    """
    documents = []
    paths = (p for p in source.root.rglob("*" + source.suffix) if p.is_file() and not p.is_symlink())
    relative = (p.relative_to(source.root) for p in paths)
    for name in sorted(p.as_posix() for p in relative if source.admits(p)):
        try:
            text = (source.root / name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            documents.append(Document(source.name, name, text))
    if not documents:
        raise CorpusSourceMissingError(
            f"corpus source {source.name!r}: no usable *{source.suffix} file in {source.root}; "
            f"on Debian 12: apt-get install {' '.join(source.packages)}"
        )
    return documents


def is_heldout(document: Document, heldout_fraction: float = HELDOUT_FRACTION) -> bool:
    """Whether a hash of path and text puts the document in the held-out split (about `heldout_fraction` of all)."""
    digest = hashlib.sha256(f"{document.path}\0{document.text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < heldout_fraction * 2**64


def gather_corpus(
    sources: Sequence[CorpusSource] = DEBIAN_SOURCES, heldout_fraction: float = HELDOUT_FRACTION
) -> Corpus:
    """Read every source, keep the first of each set of identical files, and split by document.

    Raises:
        CorpusSourceMissingError: a source is not installed.
    """
    distinct: dict[bytes, Document] = {}
    for source in sources:
        for document in read_source(source):
            distinct.setdefault(hashlib.sha256(document.text.encode()).digest(), document)
    splits: dict[bool, list[Document]] = {False: [], True: []}
    for document in distinct.values():
        splits[is_heldout(document, heldout_fraction)].append(document)
    return Corpus(tuple(splits[False]), tuple(splits[True]))


def summarize_split(documents: Iterable[Document]) -> SplitSummary:
    """Count a split's files and bytes and digest it; the digest depends on the order of the documents."""
    digest, files, size = hashlib.sha256(), 0, 0
    for document in documents:
        data = document.text.encode()
        # With the length in the header, no byte can move from one document to the next unnoticed.
        digest.update(f"{document.source}\0{document.path}\0{len(data)}\0".encode())
        digest.update(data)
        files, size = files + 1, size + len(data)
    return SplitSummary(files, size, digest.hexdigest())


def installed_versions(status: Path = Path("/var/lib/dpkg/status")) -> dict[str, str]:
    """Versions of the installed Debian packages, by name; empty where dpkg is not in use."""
    versions, name = {}, ""
    for line in status.read_text(encoding="utf-8").splitlines() if status.is_file() else ():
        if line.startswith("Package: "):
            name = line.removeprefix("Package: ")
        elif line.startswith("Version: "):
            versions[name] = line.removeprefix("Version: ")
    return versions


def build_manifest(corpus: Corpus, sources: Sequence[CorpusSource] = DEBIAN_SOURCES) -> CorpusManifest:
    """Summarize a gathered corpus by source and by split."""
    versions = installed_versions()
    sizes: dict[str, list[int]] = {source.name: [] for source in sources}
    for document in corpus.train + corpus.heldout:
        sizes[document.source].append(len(document.text.encode()))
    summaries = {}
    for source in sources:
        packages = {name: versions.get(name, "unknown") for name in source.packages}
        summaries[source.name] = SourceSummary(
            len(sizes[source.name]), sum(sizes[source.name]), source.licence, packages
        )
    return CorpusManifest(summaries, summarize_split(corpus.train), summarize_split(corpus.heldout))


def verify_corpus(corpus: Corpus, manifest: CorpusManifest) -> None:
    """Check both splits against a manifest.

    Raises:
        CorpusMismatchError: names the split and, for files, bytes and sha256, what was expected and what was found.
    """
    for split in ("train", "heldout"):
        expected, found = getattr(manifest, split), summarize_split(getattr(corpus, split))
        if found != expected:
            made_from = [f"{p}={v}" for source in manifest.sources.values() for p, v in source.packages.items()]
            raise CorpusMismatchError(
                f"corpus split {split!r} is not the one in the manifest (made from {', '.join(made_from)}): "
                f"expected {expected.files} files, {expected.bytes} bytes, sha256 {expected.sha256}; "
                f"found {found.files} files, {found.bytes} bytes, sha256 {found.sha256}"
            )


def load_corpus(
    manifest: Path | str = TINY_CORPUS_MANIFEST, sources: Sequence[CorpusSource] = DEBIAN_SOURCES
) -> Corpus:
    """Gather the corpus and verify it: what comes back is, byte for byte, what the manifest was made from.

    Raises:
        CorpusSourceMissingError: a source is not installed.
        CorpusMismatchError: the files differ from the manifest's.
    """
    corpus = gather_corpus(sources)
    verify_corpus(corpus, CorpusManifest.load(manifest))
    return corpus
