import os

from stellarbyte_server.client.launch import engine_environment

os.environ.update(engine_environment(os.environ))  # before torch and numba load OpenMP, as in the engine process
