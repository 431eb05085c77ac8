"""Versions of packages for provenance; one that is used from its source folder has none, and that stops nothing."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

NOT_INSTALLED = "not installed"


def version(package: str) -> str:
    """The installed version of `package`, or "not installed"."""
    try:
        return installed(package)
    except PackageNotFoundError:
        return NOT_INSTALLED
