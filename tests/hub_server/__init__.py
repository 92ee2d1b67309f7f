"""A Hugging Face Hub on this machine, for tests: real HTTP, real commits, nothing beyond 127.0.0.1.

An unmodified huggingface_hub talks to it, by LFS and by xet. What it must get right is what clients rely on:
commits are whole or absent, contents match their hashes, private and gated repositories are closed. Faults can be
ordered for any request. `python -m hub_server FOLDER` runs it by itself.
"""

from hub_server.accounts import Token as Token
from hub_server.faults import Fault as Fault
from hub_server.messages import Request as Request
from hub_server.server import HubServer as HubServer

__all__ = ["Fault", "HubServer", "Request", "Token"]
