"""Usage: kill_async_save.py PATH VALUE SIZE. Saves in the background, says when it has begun, waits for the end."""

import sys

import torch

from fabric_core.checkpoint.async_io import AsyncCheckpointIO

path, value, size = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
io = AsyncCheckpointIO()
io.save_checkpoint({"w": torch.full((size,), value)}, path)
print("begun", flush=True)
io.drain()
