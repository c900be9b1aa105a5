"""Isthmus: a high-performance interconnect between isolated neighbours.

    server = isthmus.create_server(("", 9000))             # in one container
    sock = isthmus.create_connection("worker-7:9000")      # in another
    sock.path, sock.why                                    # which way the bytes go, and why

A `Socket` behaves like `socket.socket`; `isthmus.aio` has awaitable connections that cost less than asyncio's
streams; `kernel_socket` is for whoever insists on a descriptor of the kernel's; `isthmus.errors` has
everything that can go wrong, by name.
"""

from __future__ import annotations

from importlib import import_module

from isthmus.errors import IsthmusError

# What type checkers look for; importing `typing` would take most of the time that this module takes.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from isthmus import aio, errors, mx, views
    from isthmus.kernel import kernel_server, kernel_socket
    from isthmus.node import Node, attach
    from isthmus.sockets import Socket, Stats, create_connection, create_server

    __version__: str

__all__ = [  # noqa: RUF022  # in reading order
    "attach",
    "Node",
    "create_connection",
    "create_server",
    "Socket",
    "Stats",
    "kernel_socket",
    "kernel_server",
    "aio",
    "mx",
    "views",
    "errors",
    "IsthmusError",
    "__version__",
]

#: Where the names are. A module is imported when one of its names is first used: `import isthmus` is cheap.
_WHERE = {
    "attach": "isthmus.node",
    "Node": "isthmus.node",
    "create_connection": "isthmus.sockets",
    "create_server": "isthmus.sockets",
    "Socket": "isthmus.sockets",
    "Stats": "isthmus.sockets",
    "kernel_socket": "isthmus.kernel",
    "kernel_server": "isthmus.kernel",
    "aio": "isthmus.aio",
    "mx": "isthmus.mx",
    "views": "isthmus.views",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("isthmus")
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
    module = import_module(where)
    found = module if where == f"isthmus.{name}" else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
