"""Which modules, how large and in which layers: searched for, and kept as a front of configurations."""

from importlib.util import find_spec

from ..errors import TunesmithError

for package in ("optuna", "botorch", "sqlalchemy"):
    if find_spec(package) is None:
        raise TunesmithError(f"a search needs the package {package}: pip install 'tunesmith[search]'")
