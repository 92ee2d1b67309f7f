"""What `torchrun` starts in the tests: `align`, with the arguments of a JSON file."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

from alignment.jobs import aligned

from loram_hub.errors import LoramError

if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        logging.basicConfig(level=logging.INFO)
    order = json.loads(Path(sys.argv[1]).read_text())
    Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_text(str(os.getpid()))
    try:
        aligned(**order)
    except LoramError as err:
        sys.stderr.write(f"Error: {err}\n")
        sys.exit(err.exit_code)
