"""The store's verbs over HTTP, for runners and trainers on other machines.

verb      the table of verbs, from which server, client and OpenAPI document are made
routes    the server: Starlette routes of a store
openapi   the OpenAPI document
client    the client: `HttpStore`, a store like the others
"""
