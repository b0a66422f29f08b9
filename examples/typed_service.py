"""An asyncio service with typed commands: python typed_service.py

The service keeps accounts. Its server-loop callback takes a tagged union of commands and returns a struct; what does
not decode is answered with an error that names the field, and the service goes on. Transfers from one account run one
after the other, those from different accounts at once.
"""

import asyncio

import msgspec

from messenger import AsyncMessenger, HandlerError, Message, typed

PORT = 15445


class Deposit(msgspec.Struct, tag=True):
    """Put money into an account."""

    account: str
    cents: int


class Transfer(msgspec.Struct, tag=True):
    """Move money to another account."""

    account: str
    to: str
    cents: int


class Balance(msgspec.Struct):
    """What an account holds afterwards."""

    account: str
    cents: int


accounts: dict[str, int] = {}


async def handle(command: Deposit | Transfer) -> Balance:
    """The server-loop callback: from one struct to another."""
    before = accounts.get(command.account, 0)
    await asyncio.sleep(0.001)  # A database, say. Without `order_by` another command could come between.
    if isinstance(command, Transfer):
        if before < command.cents:
            raise ValueError(f"{command.account} has only {before} cents")
        accounts[command.to] = accounts.get(command.to, 0) + command.cents
        accounts[command.account] = before - command.cents
    else:
        accounts[command.account] = before + command.cents
    return Balance(command.account, accounts[command.account])


def account_of(message: Message) -> str:
    """Name what commands have in common that must run one after the other."""
    return str(msgspec.msgpack.decode(message.contents).get("account"))


async def main() -> None:
    """Serve, and ask."""
    async with AsyncMessenger("accounts") as service, AsyncMessenger("teller") as teller:
        service.listen_for_connection(PORT, typed(handle), workers=50, order_by=account_of)
        deposits = [
            teller.request(PORT, Deposit(f"account {number % 10}", 100), response_type=Balance) for number in range(200)
        ]
        print("deposited:", max([balance.cents for balance in await asyncio.gather(*deposits)]))
        balance = await teller.request(PORT, Transfer("account 0", "savings", 500), response_type=Balance)
        print("left after the transfer:", balance)
        for wrong in (Transfer("account 0", "savings", 10_000), b"\x82\xa4type\xa7Deposit\xa7account\xa1x"):
            try:
                await teller.request(PORT, wrong, response_type=Balance)
            except HandlerError as error:
                print(f"refused, {error.type_name}: {str(error).split(': ', 2)[-1]}")


if __name__ == "__main__":
    asyncio.run(main())
