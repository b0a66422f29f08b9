"""A web application that asks a Messenger service for each page: python web_app.py [web port]

Starlette serves HTTP; the service could stand in any other process. Both are here, so that one command shows it:
`curl http://127.0.0.1:8000/price/tea?pieces=3`. (`pip install starlette uvicorn`)
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from messenger import AsyncMessenger, HandlerError, Message, NotDelivered, OutcomeUnknown

PRICES_PORT = 15445
PRICES = {"tea": 3.5, "coffee": 4.25}


async def give_price(message: Message) -> None:
    """The service: a price for a name and a number of pieces."""
    asked = json.loads(message.contents)
    await asyncio.sleep(0.01)  # A database, say.
    await message.reply(json.dumps({"price": PRICES[asked["name"]] * asked["pieces"]}))


async def price(request: Request) -> JSONResponse:
    """A page: await the service, and say what became of it."""
    messenger: AsyncMessenger = request.app.state.messenger
    try:
        pieces = int(request.query_params.get("pieces", "1"))
    except ValueError as error:
        return JSONResponse({"error": f"pieces: {error}"}, 400)
    asked = {"name": request.path_params["name"], "pieces": pieces}
    try:
        response = await messenger.request(PRICES_PORT, json.dumps(asked), timeout=2)
    except HandlerError as error:
        return JSONResponse({"error": str(error)}, 404 if error.type_name == "KeyError" else 500)
    except (NotDelivered, OutcomeUnknown) as error:
        return JSONResponse({"error": str(error)}, 503)
    return JSONResponse(json.loads(response.contents))


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """One messenger for the life of the application, on its event loop."""
    async with AsyncMessenger("prices") as prices, AsyncMessenger("web") as app.state.messenger:
        prices.listen_for_connection(PRICES_PORT, give_price, workers=50)
        yield


app = Starlette(routes=[Route("/price/{name}", price)], lifespan=lifespan)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]) if sys.argv[1:] else 8000)
