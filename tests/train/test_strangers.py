"""Whoever connects to the port at which rank 0 waits for the others does not end the job."""

from __future__ import annotations

import socket

from dist_train.cluster.watch import Watch
from dist_train.place import Place


def test_who_is_no_rank_is_not_taken_for_one_whatever_it_sends_or_does_not() -> None:
    watch = Watch(Place(), timeout_s=2)  # alone: it does not wait by itself
    watch.place = Place(world_size=2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        strangers = [b"\x16\x03\x01 \xff 1\n", b"GET / HTTP/1.1\r\n", b"", b"guessed 1 there\n"]
        connections = [socket.create_connection(listener.getsockname()) for _ in [*strangers, "the rank"]]
        for connection, said in zip(connections, [*strangers, b"password 1 there\n"], strict=True):
            connection.sendall(said)
        watch._accept_all(listener, "password")
    for connection in connections:
        connection.close()
    assert [str(peer) for peer in watch._peers] == ["rank 1 on there"]
    watch._peers[0].connection.close()
