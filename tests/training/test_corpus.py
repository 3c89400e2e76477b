"""The corpus: order, duplicates, split by document, and a manifest that notices any change."""

import json
from pathlib import Path

import pytest
from nemotron_super.training.corpus import (
    DEBIAN_SOURCES,
    TINY_CORPUS_MANIFEST,
    CorpusManifest,
    CorpusMismatchError,
    CorpusSource,
    CorpusSourceMissingError,
    Document,
    build_manifest,
    gather_corpus,
    installed_versions,
    is_heldout,
    load_corpus,
    read_source,
    summarize_split,
    verify_corpus,
)


def write(root: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def sources(tmp_path: Path) -> tuple[CorpusSource, CorpusSource]:
    write(tmp_path / "code", {f"m{i:03}.py": f"x = {i}\r\n" for i in range(200)} | {"pkg/é.py": "s = 'é'\n"})
    write(tmp_path / "docs", {"a.pod": "=head1 A\n", "copy.pod": "x = 7\r\n"})
    code = CorpusSource(
        "code",
        tmp_path / "code",
        ".py",
        "PSF-2.0",
        ("pkg-code",),
        frozenset({"__pycache__"}),
        frozenset({"skip", "pkg/only.py"}),
    )
    return code, CorpusSource("docs", tmp_path / "docs", ".pod", "Artistic", ("pkg-docs",))


def test_reads_sorted_text_byte_for_byte(sources):
    documents = read_source(sources[0])
    assert [d.path for d in documents] == sorted(d.path for d in documents)
    assert documents[0] == Document("code", "m000.py", "x = 0\r\n")
    assert documents[-1] == Document("code", "pkg/é.py", "s = 'é'\n")


def test_leaves_out_what_is_no_document_of_the_source(sources):
    code = sources[0]
    before = read_source(code)
    write(
        code.root,
        {
            "latin.py": b"s = '\xe9'\n",
            "empty.py": b"",
            "notes.txt": "text\n",
            "__pycache__/m.py": "cached\n",
            "pkg/__pycache__/m.py": "cached\n",
            "skip/deep/m.py": "skipped\n",
            "pkg/only.py": "skipped\n",
        },
    )
    (code.root / "link.py").symlink_to(code.root / "m000.py")
    assert read_source(code) == before
    write(code.root, {"pkg/skip/m.py": "kept: excluded paths are relative to the root\n"})
    assert len(read_source(code)) == len(before) + 1


def test_keeps_the_first_of_identical_files(sources):
    corpus = gather_corpus(sources)
    seven = [d for d in corpus.train + corpus.heldout if d.text == "x = 7\r\n"]
    assert [(d.source, d.path) for d in seven] == [("code", "m007.py")]


def test_split_is_by_document_and_does_not_move_with_other_files(sources):
    first = gather_corpus(sources, heldout_fraction=0.2)
    assert first.train and 15 < len(first.heldout) < 70
    assert all(is_heldout(d, 0.2) for d in first.heldout) and not any(is_heldout(d, 0.2) for d in first.train)
    (sources[0].root / "m050.py").unlink()
    write(sources[0].root, {"new.py": "new = True\n"})
    second = gather_corpus(sources, heldout_fraction=0.2)
    changed = {"m050.py", "new.py"}
    for split in ("train", "heldout"):
        assert {d.path for d in getattr(first, split)} - changed == {d.path for d in getattr(second, split)} - changed


def test_split_of_known_documents_is_stable():
    paths = [f"f{i}.py" for i in range(1000)]
    heldout = [p for p in paths if is_heldout(Document("any", p, "text"))]
    assert heldout == [p for p in paths if is_heldout(Document("other", p, "text"))]
    assert heldout[:3] == ["f3.py", "f49.py", "f54.py"] and len(heldout) == 22


def test_manifest_survives_a_file_and_verifies(sources, tmp_path):
    corpus = gather_corpus(sources)
    manifest = build_manifest(corpus, sources)
    assert manifest.sources["code"].files == 201 and manifest.sources["docs"].files == 1
    assert manifest.sources["docs"].bytes == len("=head1 A\n")
    assert manifest.sources["code"].licence == "PSF-2.0" and list(manifest.sources["code"].packages) == ["pkg-code"]
    assert manifest.train.bytes + manifest.heldout.bytes == sum(s.bytes for s in manifest.sources.values())
    manifest.save(tmp_path / "m.json")
    assert CorpusManifest.load(tmp_path / "m.json") == manifest
    assert load_corpus(tmp_path / "m.json", sources) == corpus


def test_a_changed_byte_is_refused_with_expected_and_found(sources, tmp_path):
    corpus = gather_corpus(sources)
    manifest = build_manifest(corpus, sources)
    manifest.save(tmp_path / "m.json")
    victim = corpus.train[0]
    replacement = victim.text.replace("x", "y")
    write(sources[0].root, {victim.path: replacement})
    assert not is_heldout(Document("code", victim.path, replacement)), "pick a change that stays in the train split"
    found = summarize_split(gather_corpus(sources).train)
    with pytest.raises(CorpusMismatchError) as caught:
        load_corpus(tmp_path / "m.json", sources)
    message = str(caught.value)
    assert "'train'" in message and "pkg-code=unknown" in message
    assert (
        f"expected {manifest.train.files} files, {manifest.train.bytes} bytes, sha256 {manifest.train.sha256}"
        in message
    )
    assert f"found {found.files} files, {found.bytes} bytes, sha256 {found.sha256}" in message
    assert found.bytes == manifest.train.bytes and found.sha256 != manifest.train.sha256


def test_digest_sees_names_borders_and_order():
    a, b = Document("s", "a", "one"), Document("s", "b", "two")
    digests = {
        summarize_split(documents).sha256
        for documents in (
            [a, b],
            [b, a],
            [Document("s", "a", "onet"), Document("s", "b", "wo")],
            [Document("s", "a", "ones\0b\0two")],
            [Document("s", "c", "one"), b],
            [Document("t", "a", "one"), b],
        )
    }
    assert len(digests) == 6


def test_missing_source_names_folder_and_package(tmp_path):
    absent = CorpusSource("perl", tmp_path / "nowhere", ".pod", "Artistic", ("perl-doc",))
    with pytest.raises(CorpusSourceMissingError, match=r"nowhere.*apt-get install perl-doc"):
        gather_corpus([absent])
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(CorpusSourceMissingError, match=r"no usable \*\.pod file"):
        gather_corpus([absent])


def test_installed_versions(tmp_path):
    status = tmp_path / "status"
    status.write_text("Package: a\nStatus: install ok installed\nVersion: 1-2\n\nPackage: b\nVersion: 3\n")
    assert installed_versions(status) == {"a": "1-2", "b": "3"}
    assert installed_versions(tmp_path / "none") == {}


def test_shipped_manifest_describes_the_debian_sources():
    manifest = CorpusManifest.load(TINY_CORPUS_MANIFEST)
    assert {s.name: (s.licence, list(s.packages)) for s in DEBIAN_SOURCES} == {
        name: (summary.licence, list(summary.packages)) for name, summary in manifest.sources.items()
    }
    total = sum(s.bytes for s in manifest.sources.values())
    assert manifest.train.bytes + manifest.heldout.bytes == total > 40_000_000
    assert 0.01 < manifest.heldout.bytes / total < 0.04
    assert json.loads(TINY_CORPUS_MANIFEST.read_text())["train"]["sha256"] == manifest.train.sha256


def test_this_machine_has_the_shipped_corpus():
    try:
        corpus = gather_corpus()
    except CorpusSourceMissingError as missing:
        pytest.skip(str(missing))
    versions = installed_versions()
    manifest = CorpusManifest.load(TINY_CORPUS_MANIFEST)
    for source in manifest.sources.values():
        for package, version in source.packages.items():
            if versions.get(package) != version:
                pytest.skip(f"{package} is {versions.get(package)}, the manifest was made from {version}")
    verify_corpus(corpus, manifest)
