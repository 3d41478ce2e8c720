import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: many small processes share few cores

pytest_plugins = ["fabric_core.testing.fixtures"]
