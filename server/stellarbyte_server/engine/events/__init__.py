"""Events of the KV cache for routers, over ZeroMQ in vLLM's form."""
