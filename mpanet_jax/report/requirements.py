"""Checks that the extra `report` is installed."""

import importlib.util

from mpanet_jax.errors import UserError

PACKAGES = ("jinja2", "matplotlib", "sklearn")


def require_report(*packages: str) -> None:
    """Check that packages are installed.

    Args:
      packages: their import names, some of `PACKAGES`; none given: all of `PACKAGES`.

    Raises:
      UserError: one is not installed; the message says how to install it.
    """
    missing = [name for name in packages or PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join("scikit-learn" if name == "sklearn" else name for name in missing)
        raise UserError(f"{', '.join(missing)}: not installed, but needed for pictures; pip install {names}")
