"""A model server without the library, as any ZeroMQ program can be one: python plain_model_server.py ENDPOINT

A manager starts it: ModelServerManager(messenger, 15446, command=["python", "plain_model_server.py", "{endpoint}"])
"""

import json
import sys

import zmq


def answer(result: object = "", success: bool = True, err: str = "", action: int = 0) -> bytes:
    """Return an answer; action 1 is a server's first message."""
    return json.dumps({"action": action, "result": result, "success": success, "err": err}).encode()


def carry_out(cmd: str, data: dict[str, object]) -> bytes:
    """Return what a command is answered with. This model predicts the sum of each row."""
    if cmd == "PRINT":
        return answer(f"MODEL_REPLY_{data['message']}")
    if cmd == "INFER":
        rows: list[list[float]] = data["rows"]  # type: ignore[assignment]  # What the manager sends.
        return answer({"predictions": [sum(row) for row in rows]})
    return answer(success=False, err=f"the command {cmd!r} is unknown")


with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
    dealer.setsockopt(zmq.LINGER, 1_000)
    dealer.connect(sys.argv[1])
    dealer.send_multipart([b"", b"0-0-" + answer(action=1)])
    while True:
        _, _, message = dealer.recv_multipart()  # [manager's identity, b"", source-destination-contents]
        callback_id, _, contents = message.split(b"-", 2)
        command = json.loads(contents)
        if command["cmd"] == "QUIT":
            break
        dealer.send_multipart([b"", b"0-%b-" % callback_id + carry_out(command["cmd"], command["data"])])
