"""The technologies: one room per isolation technology, found through the entry points `unisandbox.backends`.

May know: oci/, host/ and the contracts. Must not know: another backend, the engine, any face.
"""
