"""What LitServe serves; a module of its own because LitServe's worker imports it in another process."""

import base64
import tempfile
from pathlib import Path
from typing import Any

import litserve
from fastapi import Request

from .models import as_npy, make_model, read_matrix


class Api(litserve.LitAPI):  # type: ignore[misc]  # It has no types.
    """Predicts single rows, which it may join, and matrices."""

    def setup(self, device: str) -> None:
        """Make the model."""
        with tempfile.TemporaryDirectory() as folder:
            self.model = make_model(Path(folder))

    def decode_request(self, request: Request) -> Any:
        """Return a row, or a matrix. By its annotation LitServe makes an object of the request's JSON."""
        data: Any = request
        return data["rows"][0] if "rows" in data else read_matrix(base64.b64decode(data["npy"]))

    def batch(self, inputs: list[Any]) -> Any:
        """Join rows."""
        return inputs

    def predict(self, rows: Any) -> Any:
        """Return predictions for a row, for rows, or for a matrix."""
        is_one = self.max_batch_size == 1 and isinstance(rows, list)
        return self.model.predict([rows] if is_one else rows)

    def unbatch(self, output: Any) -> Any:
        """Part predictions."""
        return [output[number : number + 1] for number in range(len(output))]

    def encode_response(self, output: Any) -> Any:
        """Return what becomes JSON."""
        if len(output) == 1:
            return {"predictions": output.tolist()}
        return {"npy": base64.b64encode(as_npy(output)).decode()}
