"""Programs that we did not write, under `isthmus run`, in two networks joined by a bridge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import becomes
from networks import Net

from isthmus.bench.bridge import Bridge

needs_redis = pytest.mark.skipif(not shutil.which("redis-server"), reason="redis is not installed")


@pytest.mark.program(
    "Redis",
    "redis-server --version",
    "`isthmus run`",
    "server and client, 3 MB values, the bridge stays quiet; TCP clients at the same time",
)
@needs_redis
def test_redis_beside_the_bridge(net: Net) -> None:
    """A stock server and a stock client: their bytes do not touch the bridge."""
    words = ["redis-server", "--port", "6379", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""]
    net.start("right", *words)

    def client(*words: str) -> str:
        return net.output("left", "redis-cli", "-h", Bridge.right_address, *words).strip()

    becomes(lambda: net.broker.ask("status", domain="b")["domain"]["ports"])
    assert client("set", "key", "value") == "OK"
    before = net.bytes_on_the_bridge()
    assert client("eval", "return string.rep('x', 3000000)", "0") == "x" * 3_000_000
    listed = client("client", "list")
    assert f"addr={Bridge.left_address}:" in listed
    assert f"laddr={Bridge.right_address}:6379" in listed
    assert net.bytes_on_the_bridge() - before < 10_000
    plain = net.output("left", "redis-cli", "-h", Bridge.right_address, "get", "key", run=False)
    assert plain.strip() == "value"


NGINX = """
user root;
daemon off;
worker_processes 2;
pid {0}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {0}/1; proxy_temp_path {0}/2; fastcgi_temp_path {0}/3;
    uwsgi_temp_path {0}/4; scgi_temp_path {0}/5;
    sendfile on; tcp_nopush on; tcp_nodelay on;
    upstream back {{ server {1}:8081; keepalive 2; }}
    server {{ listen 8080; location / {{ root {0}; }} }}
    server {{
        listen 8082;
        location / {{ proxy_pass http://back; proxy_http_version 1.1; proxy_set_header Connection ""; }}
    }}
}}
"""


@pytest.mark.program(
    "nginx",
    "nginx -v",
    "`isthmus run`",
    "workers that share a listener; a proxy with kept connections to its upstream",
)
@pytest.mark.skipif(not (shutil.which("nginx") and shutil.which("curl")), reason="no nginx or no curl")
def test_nginx_serves_and_passes_on(net: Net, tmp_path: Path) -> None:
    """Workers that share a listener, and a proxy, whose upstream is in its event poll beforehand."""
    page = os.urandom(300_000)
    for side, name, upstream in (("right", "back", "127.0.0.1"), ("left", "front", Bridge.right_address)):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "page").write_bytes(page)
        (directory / "conf").write_text(
            NGINX.format(directory, upstream).replace("8080", "8081" if side == "right" else "8080")
        )
        net.start(side, "nginx", "-p", str(directory), "-e", "stderr", "-c", str(directory / "conf"))

    def ports(domain: str) -> set[int]:
        return {p["port"] for p in net.broker.ask("status", domain=domain)["domain"]["ports"]}

    becomes(lambda: {8081} <= ports("b") and {8082} <= ports("a"))
    got = tmp_path / "got"
    for url in (f"http://{Bridge.right_address}:8081/page", f"http://{Bridge.left_address}:8082/page"):
        for _ in range(3):
            net.output("left", "curl", "-sSf", "-o", str(got), url)
            assert got.read_bytes() == page
    before = net.bytes_on_the_bridge()
    net.output("left", "curl", "-sSf", "-o", str(got), f"http://{Bridge.left_address}:8082/page")
    assert net.bytes_on_the_bridge() - before < 10_000
    assert net.fallbacks() == {}


@pytest.mark.program(
    "iperf3",
    "iperf3 --version",
    "`isthmus run`",
    "both directions, four streams at once",
)
@pytest.mark.skipif(not shutil.which("iperf3"), reason="iperf3 is not installed")
def test_iperf3_both_ways_and_in_parallel(net: Net) -> None:
    net.start("right", "iperf3", "-s")
    becomes(lambda: net.broker.ask("status", domain="b")["domain"]["ports"])
    for words in ((), ("-R",), ("-P", "4")):
        text = net.output("left", "iperf3", "-c", Bridge.right_address, "-J", "-n", "200M", *words)
        assert json.loads(text)["end"]["sum_received"]["bytes"] > 100_000_000
    assert net.fallbacks() == {}


JAVA = """
import java.net.*; import java.nio.*; import java.nio.channels.*;
class Talk {
    public static void main(String[] words) throws Exception {
        if (words[0].equals("serve")) {
            ServerSocketChannel server = ServerSocketChannel.open();
            server.bind(new InetSocketAddress("0.0.0.0", 7020));
            System.out.println("listening");
            SocketChannel sock = server.accept();
            ByteBuffer buffer = ByteBuffer.allocate(5);
            while (buffer.hasRemaining()) sock.read(buffer);
            buffer.flip();
            while (buffer.hasRemaining()) sock.write(buffer);
            System.out.println(((InetSocketAddress) sock.getRemoteAddress()).getAddress().getHostAddress());
        } else {
            Selector selector = Selector.open();
            SocketChannel sock = SocketChannel.open();
            sock.configureBlocking(false);
            sock.setOption(StandardSocketOptions.TCP_NODELAY, true);
            SelectionKey key = sock.register(selector, SelectionKey.OP_CONNECT);
            if (sock.connect(new InetSocketAddress(words[1], 7020))) key.interestOps(SelectionKey.OP_WRITE);
            ByteBuffer buffer = ByteBuffer.wrap("hello".getBytes());
            ByteBuffer answer = ByteBuffer.allocate(5);
            while (answer.hasRemaining()) {
                selector.select(20000);
                if (key.isConnectable()) { sock.finishConnect(); key.interestOps(SelectionKey.OP_WRITE); }
                else if (key.isWritable()) {
                    sock.write(buffer);
                    if (!buffer.hasRemaining()) key.interestOps(SelectionKey.OP_READ);
                } else if (key.isReadable()) { sock.read(answer); }
                selector.selectedKeys().clear();
            }
            System.out.println(new String(answer.array()));
        }
    }
}
"""


@pytest.mark.program(
    "Java",
    "java -version",
    "`isthmus run`",
    "blocking and non-blocking channels, selectors, socket options",
)
@pytest.mark.skipif(not shutil.which("javac"), reason="no Java")
def test_java_with_selectors(net: Net, tmp_path: Path) -> None:
    (tmp_path / "Talk.java").write_text(JAVA)
    subprocess.run(["javac", "Talk.java"], cwd=tmp_path, check=True, timeout=100)
    server = net.start("right", "java", "-cp", str(tmp_path), "Talk", "serve")
    assert server.line() == "listening"
    client = net.start("left", "java", "-cp", str(tmp_path), "Talk", "talk", Bridge.right_address)
    assert client.line() == "hello"
    assert server.line() == Bridge.left_address
    assert net.fallbacks() == {}


@pytest.mark.program(
    "BusyBox",
    "busybox cat --help",
    "`isthmus run`",
    "statically linked: httpd and wget",
)
@pytest.mark.skipif(not shutil.which("busybox"), reason="busybox is not installed")
def test_a_static_program(net: Net, tmp_path: Path) -> None:
    busybox = shutil.which("busybox") or ""
    kind = subprocess.run(["ldd", busybox], capture_output=True, text=True, check=False)
    if kind.returncode == 0:
        pytest.skip("busybox is not static here")
    (tmp_path / "page").write_text("static")
    net.start("right", busybox, "httpd", "-f", "-p", "7021", "-h", str(tmp_path))
    becomes(lambda: net.broker.ask("status", domain="b")["domain"]["ports"])
    assert net.output("left", busybox, "wget", "-qO-", f"http://{Bridge.right_address}:7021/page") == "static"
    assert net.fallbacks() == {}


@pytest.mark.program(
    "CPython asyncio",
    "python3 --version",
    "`isthmus run`",
    "streams of 1 MB, twenty at once",
)
def test_asyncio_on_both_sides(net: Net) -> None:
    server = net.server("""
        import asyncio
        async def serve(reader, writer):
            print(writer.get_extra_info("peername")[0])
            writer.write(await reader.readexactly(1_000_000))
            await writer.drain()
            writer.close()
        async def main():
            server = await asyncio.start_server(serve, "0.0.0.0", 7022)
            print("listening")
            await server.serve_forever()
        asyncio.run(main())
    """)
    client = net.python(
        "left",
        f"""
        import asyncio, os
        data = os.urandom(1_000_000)
        async def talk():
            reader, writer = await asyncio.open_connection("{Bridge.right_address}", 7022)
            writer.write(data)
            assert await reader.read(-1) == data
            writer.close()
        async def main():
            await asyncio.gather(*(talk() for _ in range(20)))
        asyncio.run(main())
        print("done")
        """,
    )
    assert client.line() == "done"
    assert server.line() == Bridge.left_address
    assert net.fallbacks() == {}
