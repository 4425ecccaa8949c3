"""One clear line where the extra `report` is not installed."""

import importlib.util

from mpanet_jax.errors import UserError

PACKAGES = ("jinja2", "matplotlib", "sklearn")


def require_report(*packages: str) -> None:
    """Returns if the packages, some of `PACKAGES` by the names they are imported by, are installed.

    Raises:
      UserError: one is not.
    """
    missing = [name for name in packages or PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)}: not installed, and pictures need it; pip install 'mpanet_jax[report]'")
