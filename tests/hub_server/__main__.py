"""Run the server by itself: `PYTHONPATH=tests python -m hub_server FOLDER`."""

from __future__ import annotations

import argparse
import signal
import sys

from hub_server.server import HubServer


def main() -> None:
    """Serve a folder until interrupted."""
    parser = argparse.ArgumentParser(prog="hub_server", description="A Hugging Face Hub on this machine, for tests.")
    parser.add_argument("folder", help="where everything is kept; a server started on it again continues")
    parser.add_argument("--port", type=int, default=0, help="the port on 127.0.0.1 (default: a free one)")
    parser.add_argument("--no-xet", action="store_true", help="offer uploads by LFS only")
    parser.add_argument("--multipart", type=int, metavar="BYTES", help="upload larger LFS files in parts of this size")
    options = parser.parse_args()

    hub = HubServer(options.folder, port=options.port, xet=not options.no_xet, multipart_bytes=options.multipart)
    with hub:
        lines = [
            f"The Hub is at {hub.url}; a client takes it for the Hugging Face Hub with:",
            "",
            f"    export HF_ENDPOINT={hub.url} HF_TOKEN=hf_alice_write HF_HOME=$(mktemp -d)",
            *(["    export HF_HUB_DISABLE_XET=1"] if options.no_xet else []),
            "",
            f"Tokens: {', '.join(hub.tokens)}. Organizations: {', '.join(hub.organizations)}. Ctrl-C ends it.",
        ]
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # in every thread, for sigwait
    main()
