"""Runtimes with network code of their own, under `isthmus run`, in two networks joined by a bridge."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import LIMIT_S, becomes
from networks import Net

import isthmus
from isthmus.bench.bridge import Bridge
from isthmus.testing import PrivateBroker


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not importlib.util.find_spec(module), reason=f"{module} is not installed")


def listens(net: Net, port: int) -> None:
    becomes(lambda: port in [p["port"] for p in net.broker.ask("status", domain="b")["domain"]["ports"]])


UVLOOP_SERVER = """
import asyncio, uvloop
async def serve(reader, writer):
    print(writer.get_extra_info("peername")[0], flush=True)
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()
async def main():
    server = await asyncio.start_server(serve, "0.0.0.0", 7050)
    print("listening", flush=True)
    await server.serve_forever()
uvloop.run(main())
"""

UVLOOP_CLIENT = """
import asyncio, os, sys, uvloop
data = os.urandom(1_000_000)
async def talk():
    reader, writer = await asyncio.open_connection(sys.argv[1], int(sys.argv[2]))
    async def send():
        writer.write(data)
        await writer.drain()
        writer.write_eof()
    _, answer = await asyncio.gather(send(), reader.read(-1))
    assert answer == data
    writer.close()
    await writer.wait_closed()
async def main():
    assert type(asyncio.get_running_loop()) is uvloop.Loop
    for _ in range(3):
        await asyncio.gather(*(talk() for _ in range(20)))
    try:
        await asyncio.wait_for(asyncio.open_connection(sys.argv[1], 7051), 20)
    except ConnectionRefusedError:
        print("refused")
uvloop.run(main())
print("done", flush=True)
"""


def uvloop_client(net: Net, port: int, **more: Any) -> None:
    client = net.start("left", sys.executable, "-c", UVLOOP_CLIENT, Bridge.right_address, str(port), **more)
    assert [client.line(), client.line()] == ["refused", "done"]
    assert client.end()[0] == 0


@pytest.mark.program(
    "uvloop",
    "uvloop",
    "`isthmus run`",
    "streams of 1 MB, twenty at once",
)
@needs("uvloop")
def test_uvloop_on_both_sides(net: Net) -> None:
    server = net.start("right", sys.executable, "-c", UVLOOP_SERVER)
    assert server.line() == "listening"
    listens(net, 7050)
    before = net.bytes_on_the_bridge()
    uvloop_client(net, 7050)
    assert server.line() == Bridge.left_address
    assert net.bytes_on_the_bridge() - before < 20_000
    assert net.sockets() == 60
    assert all(":7051: nobody listens there" in why for why in net.fallbacks())


@needs("uvloop")
def test_a_server_that_has_a_ring_is_reached_over_tcp(net: Net) -> None:
    server = net.start("right", sys.executable, "-c", UVLOOP_SERVER, options="--io-uring")
    assert server.line() == "listening"
    uvloop_client(net, 7050)
    assert net.sockets() == 0
    assert any(":7050: nobody listens there" in why for why in net.fallbacks())


@pytest.mark.program("uvloop", "uvloop", "`kernel_socket`", "streams of 1 MB, twenty at once")
@needs("uvloop")
def test_uvloop_takes_kernel_sockets() -> None:
    import uvloop

    data = os.urandom(1_000_000)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while some := await reader.read(1 << 16):
            writer.write(some)
            await writer.drain()
        writer.close()

    async def talk(port: int, node: isthmus.Node) -> None:
        sock = await asyncio.to_thread(isthmus.kernel_socket, ("b", port), LIMIT_S, node=node)
        reader, writer = await asyncio.open_connection(sock=sock)

        async def send() -> None:
            writer.write(data)
            await writer.drain()
            writer.write_eof()

        _, answer = await asyncio.gather(send(), reader.read(-1))
        assert answer == data
        writer.close()
        await writer.wait_closed()

    async def main(broker: PrivateBroker) -> None:
        assert type(asyncio.get_running_loop()) is uvloop.Loop
        a, b = isthmus.attach(broker.door("a")), isthmus.attach(broker.door("b"))
        listener = isthmus.kernel_server(0, node=b)
        async with await asyncio.start_server(serve, sock=listener):
            await asyncio.gather(*(talk(listener.port, a) for _ in range(20)))
        counted = broker.ask("status", domain="a")["domain"]["traffic"]["socket"]
        assert counted["connections"] == 20

    with PrivateBroker(("a", "b")) as broker:
        uvloop.run(asyncio.wait_for(main(broker), LIMIT_S))


GRPC_SERVER = """
import sys, time, grpc
from concurrent import futures
def count(request, context):
    for n in range(int(request)):
        yield b"%d" % n
def slow(request, context):
    while context.is_active():
        time.sleep(0.01)
    return b""
echo = grpc.method_handlers_generic_handler("Test", {
    "Echo": grpc.unary_unary_rpc_method_handler(lambda request, context: request),
    "Peer": grpc.unary_unary_rpc_method_handler(lambda request, context: context.peer().encode()),
    "Slow": grpc.unary_unary_rpc_method_handler(slow),
    "Count": grpc.unary_stream_rpc_method_handler(count),
    "Sum": grpc.stream_unary_rpc_method_handler(lambda requests, context: b"%d" % sum(map(int, requests))),
    "Talk": grpc.stream_stream_rpc_method_handler(lambda requests, context: (r.upper() for r in requests)),
})
server = grpc.server(
    futures.ThreadPoolExecutor(64), handlers=[echo], options=[("grpc.max_receive_message_length", 16 << 20)]
)
assert server.add_insecure_port("0.0.0.0:7060") == 7060
server.start()
print("listening", flush=True)
server.wait_for_termination()
"""

GRPC_CLIENT = """
import asyncio, os, sys, grpc
to = sys.argv[1] + ":7060"
options = [("grpc.max_receive_message_length", 16 << 20), ("grpc.use_local_subchannel_pool", 1)]
def work(channel):
    echo = channel.unary_unary("/Test/Echo")
    data = os.urandom(8 << 20)
    assert echo(data, timeout=20) == data
    calls = [echo.future(b"%d" % n, timeout=20) for n in range(500)]
    assert [int(call.result()) for call in calls] == list(range(500))
    assert [int(n) for n in channel.unary_stream("/Test/Count")(b"2000", timeout=20)] == list(range(2000))
    numbers = (b"%d" % n for n in range(2000))
    assert channel.stream_unary("/Test/Sum")(numbers, timeout=20) == b"1999000"
    words = [b"word %d" % n for n in range(2000)]
    assert list(channel.stream_stream("/Test/Talk")(iter(words), timeout=20)) == [w.upper() for w in words]
    try:
        channel.unary_unary("/Test/Slow")(b"", timeout=0.2)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    else:
        raise AssertionError
with grpc.insecure_channel(to, options) as channel:
    print(channel.unary_unary("/Test/Peer")(b"", timeout=20).decode().rpartition(":")[0], flush=True)
    work(channel)
async def many():
    channels = [grpc.aio.insecure_channel(to, options) for _ in range(10)]
    async def one(n):
        return await channels[n % 10].unary_unary("/Test/Echo")(b"%d" % n, timeout=20)
    assert [int(r) for r in await asyncio.gather(*(one(n) for n in range(500)))] == list(range(500))
    for channel in channels:
        await channel.close()
asyncio.run(many())
print("done", flush=True)
again = grpc.insecure_channel(to, [*options, ("grpc.initial_reconnect_backoff_ms", 100)])
peer = again.unary_unary("/Test/Echo")
assert peer(b"before", timeout=20) == b"before"
print("restart", flush=True)
input()
assert peer(b"after", timeout=20, wait_for_ready=True) == b"after"
print("after", flush=True)
"""


@pytest.mark.program(
    "gRPC",
    "grpcio",
    "`isthmus run`",
    "unary calls and streams, 8 MB messages, deadlines, 500 calls at once, asyncio, a restarted server",
)
@needs("grpc")
def test_grpc(net: Net) -> None:
    server = net.start("right", sys.executable, "-c", GRPC_SERVER)
    assert server.line() == "listening"
    listens(net, 7060)
    before = net.bytes_on_the_bridge()
    client = net.start("left", sys.executable, "-c", GRPC_CLIENT, Bridge.right_address, stdin=True)
    assert client.line() == f"ipv4:{Bridge.left_address}"
    assert client.line() == "done"
    assert client.line() == "restart"
    assert net.fallbacks() == {}
    assert net.sockets() == 12
    server.stop()
    server = net.start("right", sys.executable, "-c", GRPC_SERVER)
    assert server.line() == "listening"
    listens(net, 7060)
    client.say("go")
    assert client.line() == "after"
    assert client.end()[0] == 0
    assert net.sockets() == 13
    assert net.bytes_on_the_bridge() - before < 20_000
    assert all("nobody listens" in why for why in net.fallbacks())


GO = r"""
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func serve() {
	var connections atomic.Int64
	mux := http.NewServeMux()
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		must(err)
		w.Write(body)
	})
	mux.HandleFunc("/peer", func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintf(w, "%s %d", host, connections.Load())
	})
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	server := &http.Server{Addr: ":7070", Handler: mux, ConnState: func(c net.Conn, state http.ConnState) {
		if state == http.StateNew {
			connections.Add(1)
		}
	}}
	go func() { must(server.ListenAndServe()) }()
	raw, err := net.Listen("tcp", ":7071")
	must(err)
	fmt.Println("listening")
	for {
		conn, err := raw.Accept()
		must(err)
		go func() {
			io.Copy(conn, conn)
			conn.Close()
		}()
	}
}

func get(client *http.Client, url string) string {
	answer, err := client.Get(url)
	must(err)
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	must(err)
	return string(body)
}

func overHttp(to string) {
	kept := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 100}}
	for n := 0; n < 10; n++ {
		fmt.Println(get(kept, "http://"+to+":7070/peer"))
	}
	var group sync.WaitGroup
	for n := 0; n < 100; n++ {
		group.Add(1)
		go func() {
			defer group.Done()
			body := make([]byte, 100_000)
			rand.Read(body)
			for turn := 0; turn < 5; turn++ {
				answer, err := kept.Post("http://"+to+":7070/echo", "", bytes.NewReader(body))
				must(err)
				echoed, err := io.ReadAll(answer.Body)
				must(err)
				answer.Body.Close()
				if !bytes.Equal(body, echoed) {
					panic("damaged")
				}
			}
		}()
	}
	group.Wait()
	short := &http.Client{Timeout: 200 * time.Millisecond}
	_, err := short.Get("http://" + to + ":7070/slow")
	if e, ok := err.(net.Error); !ok || !e.Timeout() {
		panic(err)
	}
}

func overTcp(to string) {
	var group sync.WaitGroup
	for n := 0; n < 50; n++ {
		group.Add(1)
		go func() {
			defer group.Done()
			dialer := net.Dialer{Timeout: 20 * time.Second}
			dialer.SetMultipathTCP(n%2 == 1)
			conn, err := dialer.DialContext(context.Background(), "tcp", to+":7071")
			must(err)
			defer conn.Close()
			must(conn.(*net.TCPConn).SetNoDelay(n%2 == 0))
			must(conn.(*net.TCPConn).SetKeepAlivePeriod(time.Minute))
			must(conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond)))
			_, err = conn.Read(make([]byte, 1))
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				panic(err)
			}
			must(conn.SetReadDeadline(time.Time{}))
			sent := make([]byte, 1_000_000)
			rand.Read(sent)
			go func() {
				_, err := conn.Write(sent)
				must(err)
				must(conn.(*net.TCPConn).CloseWrite())
			}()
			got, err := io.ReadAll(conn)
			must(err)
			if !bytes.Equal(sent, got) {
				panic("damaged")
			}
		}()
	}
	group.Wait()
	_, err := net.DialTimeout("tcp", to+":7072", 20*time.Second)
	fmt.Println(err)
}

func main() {
	if os.Args[1] == "serve" {
		serve()
	}
	overHttp(os.Args[1])
	overTcp(os.Args[1])
	fmt.Println("done")
}
"""


@pytest.fixture(scope="session")
def go_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static program, made from `GO`."""
    go = shutil.which("go") or shutil.which("go", path=str(Path(sys.executable).parent))
    if go is None:
        pytest.skip("Go is not installed")
    directory = tmp_path_factory.mktemp("go")
    (directory / "talk.go").write_text(GO)
    # Its cache of the standard library stays where it keeps that, and makes the next build a short one.
    more = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "XDG_CONFIG_HOME": str(directory)}
    done = subprocess.run(
        [go, "build", "talk.go"],
        cwd=directory,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return directory / "talk"


@pytest.mark.program(
    "Go",
    "go version",
    "`isthmus run`",
    "statically linked: net/http with kept connections, 100 goroutines, deadlines; TCP and Multipath TCP",
)
@pytest.mark.timeout(600)  # Its program is compiled, and Go's own library with it.
def test_go(net: Net, go_program: Path) -> None:
    server = net.start("right", str(go_program), "serve")
    assert server.line() == "listening"
    listens(net, 7070)
    listens(net, 7071)
    before = net.bytes_on_the_bridge()
    client = net.start("left", str(go_program), Bridge.right_address)
    # Ten questions over one connection.
    assert [client.line() for _ in range(10)] == [f"{Bridge.left_address} 1"] * 10
    assert "connection refused" in client.line()
    assert client.line() == "done"
    assert net.bytes_on_the_bridge() - before < 100_000
    assert net.sockets() >= 100
    assert all(":7072: nobody listens there" in why for why in net.fallbacks())
