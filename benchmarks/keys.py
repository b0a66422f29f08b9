"""The keys of the measurements with CURVE, made for nothing else, so that server and client need not exchange them."""

from typing import Any

from messenger import KeyPair, Security

SERVER = KeyPair("I{l4H^%9+(8e/!Y!:n1@lZuwKRc?nELiHI$6?k+(", "server")
CLIENT = KeyPair("9zYh?o/3$AccUgPV:FKcg&G7VyXb.jx3PC(}(DB<", "client")


def server_security() -> Security:
    """Return what a listener of Messenger wants."""
    return Security(key=SERVER, allow={CLIENT.public: "client"})


def client_security() -> Security:
    """Return what a connection of Messenger wants."""
    return Security(key=CLIENT, servers=SERVER.public)


def secure_server(socket: Any) -> None:
    """Have a socket of pyzmq speak CURVE, and let in any key."""
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = SERVER.public.encode(), SERVER.reveal()


def secure_client(socket: Any) -> None:
    """Have a socket of pyzmq speak CURVE with that server."""
    socket.curve_publickey, socket.curve_secretkey = CLIENT.public.encode(), CLIENT.reveal()
    socket.curve_serverkey = SERVER.public.encode()
