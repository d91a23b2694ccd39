"""OCI: bundles, the runtime command line driver, and the task service over it.

May know: host/ and the contracts. Must not know: backends, the engine.
`bundle` writes config.json, `features` finds runtimes, `runtime` calls them, `task` drives containers; `starting` and
`restore` are how it comes by them.
"""
