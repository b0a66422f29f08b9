"""A program of threads and a program with asyncio talk: python threads_and_asyncio.py asyncio | threads"""

import asyncio
import sys

from messenger import AsyncMessenger, Message, Messenger

PORT = 15445


async def square(message: Message) -> None:
    """A server-loop callback as a coroutine: up to `workers` of them run at once, and start in order."""
    await asyncio.sleep(0.05)
    await message.reply(b"%d" % int(message.contents) ** 2)


async def serve() -> None:
    """Serve until Ctrl-C."""
    async with AsyncMessenger("squares") as messenger:
        messenger.listen_for_connection(PORT, square, workers=100)
        print(f"serving on {PORT}, Ctrl-C ends", flush=True)
        await asyncio.Event().wait()


def ask() -> None:
    """Ask from threads, as if the other side had threads too; the callbacks run on the messenger's own."""
    with Messenger() as messenger:
        for number in range(100):
            messenger.send_message(PORT, b"%d" % number, lambda response: squares.append(int(response.contents)))
        print("12 squared is", messenger.request(PORT, b"12").contents.decode())
    print(f"{len(squares)} squares, the sum is {sum(squares)}")


squares: list[int] = []

if __name__ == "__main__":
    if sys.argv[1:] == ["threads"]:
        ask()
    else:
        try:
            asyncio.run(serve())
        except KeyboardInterrupt:
            print("bye")
