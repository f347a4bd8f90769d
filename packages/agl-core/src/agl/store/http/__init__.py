"""The store's verbs over HTTP, for runners and trainers on other machines.

verb      the table of verbs, which server, client and document are made from
routes    the server's side: Starlette routes of a store
openapi   the OpenAPI document
client    the client's side: `HttpStore`, a store like the others
"""
