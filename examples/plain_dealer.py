"""A plain ZeroMQ program that talks to a Messenger listener, without the library: python plain_dealer.py 15445 hello"""

import sys

import zmq

if len(sys.argv) != 3:
    sys.exit(__doc__)
port, text = sys.argv[1:]
with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
    dealer.setsockopt(zmq.ROUTING_ID, b"plain-dealer")  # Our identity, as the listener sees it.
    dealer.setsockopt(zmq.LINGER, 1_000)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    # source_callback_id-dest_callback_id-contents: answer to our callback 1024, and run no callback of yours.
    dealer.send_multipart([b"", b"1024-0-" + text.encode()])
    if dealer.poll(5_000):
        print(dealer.recv_multipart())  # [listener's identity, b"", b"0-1024-…"]
