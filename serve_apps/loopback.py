"""Keeps the port that Ray Serve opens for calls between deployments on this machine.

Ray 2.60 binds it to every interface, without its token, and unpickles what arrives (in its replica.py): on a
laptop that would be a way in for the whole network. In a cluster the network policy closes it."""

from ray.serve._private import replica


def bind_to_loopback() -> None:
    """Call it in a replica's constructor: Serve opens the port right after."""
    add_port = replica.add_port_to_grpc_server

    def add_port_on_loopback(server: object, address: str) -> int:
        return int(add_port(server, address.replace("[::]", "127.0.0.1")))

    replica.add_port_to_grpc_server = add_port_on_loopback
