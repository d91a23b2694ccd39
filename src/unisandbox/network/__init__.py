"""Networks that are more than a namespace: what connects a sandbox with the outside.

`user` does it with a helper program that needs no privilege. May know: host/, api/. Must not know: runtimes, backends,
the engine. Nothing here is imported before a sandbox asks for it.
"""
