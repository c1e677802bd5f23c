"""Serves a function of yours to reward.terms = (("remote", 1.0),).

The command is `python benchmarks/reward_server.py my_module:my_function --port=8000`. The function
has the signature of a local reward: (pixels float32 [b, (f,) h, w, 3] in [0, 1], prompts, metadata)
-> b numbers, with None or NaN for a sample that it cannot score.
"""

import argparse
import base64
import importlib
import io
import json
import math
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


def decode(body, kind):
  if kind == "application/json":
    request = json.loads(body)
    return np.stack(
      [np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in request["images"]]
    ), request
  arrays = np.load(io.BytesIO(body), allow_pickle=False)
  return arrays["pixels"], json.loads(arrays["request"].tobytes())


class Handler(BaseHTTPRequestHandler):
  def do_POST(self):
    try:
      body = self.rfile.read(int(self.headers["Content-Length"]))
      pixels, request = decode(body, self.headers["Content-Type"])
      scores = self.server.function(
        pixels.astype(np.float32) / 255, request["prompts"], request["metadata"]
      )
      status, answer = (
        200,
        {"scores": [float(x) if x is not None and math.isfinite(x) else None for x in scores]},
      )
    except Exception as error:  # any exception of the function is answered to the client
      status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
    self.send_response(status)
    self.end_headers()
    self.wfile.write(json.dumps(answer).encode())


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("function", help="module:function")
  parser.add_argument(
    "--host", default="127.0.0.1", help="0.0.0.0 accepts other machines; there is no password"
  )
  parser.add_argument("--port", type=int, default=8000, help="0 chooses a free port")
  flags = parser.parse_args()
  module, _, name = flags.function.partition(":")
  sys.path.insert(0, "")
  server = ThreadingHTTPServer((flags.host, flags.port), Handler)
  server.function = getattr(importlib.import_module(module), name)
  print(f"listening on http://{flags.host}:{server.server_address[1]}/", flush=True)
  server.serve_forever()
