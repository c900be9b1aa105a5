"""curl and nginx under `isthmus run`, in two networks joined by a bridge: what one connection is used for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import becomes
from networks import Net

from isthmus.bench.bridge import Bridge

NGINX = """
user root;
daemon off;
pid {0}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {0}/1; proxy_temp_path {0}/2; fastcgi_temp_path {0}/3;
    uwsgi_temp_path {0}/4; scgi_temp_path {0}/5;
    client_max_body_size 0;
    server {{
        listen 8090;
        location / {{ root {0}; }}
        location /upload {{ proxy_pass http://127.0.0.1:8091; }}
        location /peer {{ return 200 "$remote_addr $connection_requests"; }}
    }}
    server {{ listen 127.0.0.1:8091; location / {{ root {0}; dav_methods PUT; }} }}
}}
"""


@pytest.mark.program(
    "curl",
    "curl --version",
    "`isthmus run`",
    "nginx: three answers over one connection, ranges, an upload of 20 MB, three transfers at once",
)
@pytest.mark.skipif(not (shutil.which("nginx") and shutil.which("curl")), reason="no nginx or no curl")
def test_curl_keeps_its_connection_and_uploads(net: Net, tmp_path: Path) -> None:
    (tmp_path / "conf").write_text(NGINX.format(tmp_path))
    page, upload = os.urandom(500_000), os.urandom(20_000_000)
    (tmp_path / "page").write_bytes(page)
    (tmp_path / "body").write_bytes(upload)
    net.start("right", "nginx", "-p", str(tmp_path), "-e", "stderr", "-c", str(tmp_path / "conf"))
    becomes(lambda: 8090 in [p["port"] for p in net.broker.ask("status", domain="b")["domain"]["ports"]])
    to = f"http://{Bridge.right_address}:8090"
    before = net.bytes_on_the_bridge()

    def curl(*words: str) -> str:
        return net.output("left", "curl", "-sSf", "--max-time", "20", *words)

    told = curl(*[f"{to}/peer"] * 3, "-w", " %{num_connects}\n").splitlines()
    assert told == [f"{Bridge.left_address} {n} {int(n == 1)}" for n in (1, 2, 3)]
    assert net.sockets() == 1
    got = tmp_path / "got"
    curl("-o", str(got), "-r", "1000-400000", f"{to}/page")
    assert got.read_bytes() == page[1000:400_001]
    curl("-T", str(tmp_path / "body"), f"{to}/upload")
    assert (tmp_path / "upload").read_bytes() == upload
    names = [str(tmp_path / f"got{n}") for n in range(3)]
    curl("-Z", *(word for name in names for word in ("-o", name, f"{to}/page")))
    assert all(Path(name).read_bytes() == page for name in names)
    assert net.bytes_on_the_bridge() - before < 10_000
    assert net.fallbacks() == {}
