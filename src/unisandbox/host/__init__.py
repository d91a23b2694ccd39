"""Linux mechanisms: keeper, init, cgroups, namespaces, mounts, pidfds, seccomp.

May know: the kernel and the standard library (and, on the client's side, anyio and the contracts' errors).
Must not know: sandboxes, containers, OCI, engines. Everything here can be tested alone.
"""
