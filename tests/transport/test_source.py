"""What is sent of the workload, and the name that its content gives it."""

from provision.source import content_hash, package_files


def test_the_hash_is_of_names_and_bytes() -> None:
    files = {"a": b"1", "b": b"2"}
    assert content_hash(files) == content_hash(dict(reversed(files.items())))
    others = [
        {"a": b"1"},
        {"a": b"1", "b": b"3"},
        {"a": b"1", "c": b"2"},
        {"a": b"12", "b": b""},
        {"a1": b"", "b": b"2"},
    ]
    assert len({content_hash(other) for other in [files, *others]}) == 6


def test_the_package_is_sent_whole_and_clean() -> None:
    names = set(package_files())
    assert {"workload/__main__.py", "workload/presets/demo.toml", "workload/assets/vocab.bpe.xz"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
