"""The endpoints of the API, in the order in which the document has them."""

from stellarbyte_server.api.contract.operation import operations_of
from stellarbyte_server.api.routes import adapters, chat, completions, embeddings, health, models, responses, tokenize

ROUTERS = tuple(
    module.router for module in (completions, chat, responses, embeddings, models, adapters, tokenize, health)
)
OPERATIONS = operations_of(ROUTERS)
