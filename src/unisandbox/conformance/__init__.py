"""The contract as tests: a pytest plugin, parametrised by backend, usable by a stranger for his own backend.

May know: the public surface, the contracts, and what the kernel says about this process and this host.
Must not know: the inside of any backend or of the engine. What is tested here is promised to every user.
"""
