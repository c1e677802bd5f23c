"""Results of asynchronous functions, for threads that can't await them."""

import asyncio
import functools
import inspect
import threading
from collections.abc import Awaitable
from typing import Any


def awaited(value: Any) -> Any:
  """What an awaitable gives; any other value itself. Raises whatever the awaitable raises."""
  if not inspect.isawaitable(value):
    return value
  return asyncio.run_coroutine_threadsafe(_result(value), _loop()).result()


async def _result(value: Awaitable) -> Any:
  return await value


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
  """An event loop that runs in a thread of its own until the process ends.

  There is one for all calls: clients and semaphores that a module keeps belong to the loop that
  they were first used in.
  """
  loop = asyncio.new_event_loop()
  threading.Thread(target=loop.run_forever, name="reward event loop", daemon=True).start()
  return loop
