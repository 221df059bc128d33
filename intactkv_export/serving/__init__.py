"""A model served over HTTP: a GGUF and its prefixes go in, upstream's llama-server runs on our library.

Also upstream's other programs, if they were built.
"""

from intactkv_export.serving.programs import program_names, program_path, run_program
from intactkv_export.serving.server import Server
from intactkv_export.serving.settings import Kept, Settings, choose_settings

__all__ = [
    "Kept", "Server", "Settings", "choose_settings", "program_names", "program_path", "run_program",
]  # fmt: skip
