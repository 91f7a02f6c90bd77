"""Ray as the one who starts the processes of a run and watches them; nothing outside this folder imports it."""

import importlib.util

from whet.errors import ConfigError

if importlib.util.find_spec("ray") is None:
    raise ConfigError(
        "cluster.address is given, which needs Ray; install it on all nodes with pip install -e '.[ray]' in the "
        "checkout of whet, or remove the setting to run on this machine"
    )
