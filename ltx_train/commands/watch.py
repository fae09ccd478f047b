"""`ltx-train watch`: a run's page in a browser while it trains."""

from __future__ import annotations

from ltx_train.assembly import from_config
from ltx_train.assembly.live_view import LiveView
from ltx_train.config import Config
from ltx_train.contracts import ConfigError, Exit
from ltx_train.jobs import watching


def run(config: Config) -> int:
    """Serves the page until Ctrl-C. ConfigError when there is no such run."""
    folder = from_config.run_dir(config)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is no run's folder: give one, as ltx-train watch runs/<experiment>/<id>")
    with watching.open_server(LiveView(config, folder), config.watch.port) as server:
        try:
            print(f"{folder}: http://{watching.HOST}:{server.server_address[1]}/ (Ctrl-C ends it)", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print("")
    return Exit.DONE
