"""The same lines, whether the other side is in this process or in another: python two_processes.py serve | ask"""

import sys
import threading

from messenger import ECHO, Message, Messenger


def replication(message: Message) -> None:
    """A server-loop callback (SLC): run on every message that arrives at the endpoint."""
    message.reply(b"applied " + message.contents)


def ask(messenger: Messenger) -> None:
    """Send with a callback for this message only, to a built-in callback, and wait for a response."""
    messenger.send_message(15445, b"record 1", lambda response: print(response.contents))
    messenger.send_message(15445, b"potato", lambda response: print(response.contents), remote_callback=ECHO)
    print(messenger.request(15445, b"record 2", timeout=5).contents)


if __name__ == "__main__":
    with Messenger() as messenger:
        if sys.argv[1:] == ["ask"]:
            ask(messenger)
        else:
            messenger.listen_for_connection(15445, replication)
            print("serving on 15445, Ctrl-C ends", flush=True)
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                print("bye")
