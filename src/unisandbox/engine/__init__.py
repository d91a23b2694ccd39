"""The composition root: registry, choice, state, events and the life of sandboxes.

May know: backends by name only (entry points), mechanisms, contracts.
Must not know: any backend by import, nor any face.
"""
