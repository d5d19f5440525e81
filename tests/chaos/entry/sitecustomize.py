"""Python runs this before anything else where the campaign has started a server: its data process gets its crash points here."""

import os
import pathlib
import sys

if "engram_service.data_process" in sys.orig_argv:
    from chaos.points import install

    install(pathlib.Path(os.environ["CHAOS_CONTROL"]).with_suffix(".data"))
